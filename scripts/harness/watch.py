"""Ends a run in good order: signals, the stop file, and stacks of ranks that hang."""

import faulthandler
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

from harness.files import RunFiles
from harness.ranks import FIRST_STEP_TIMEOUT, Ranks
from store.files import LOCK_LIMIT
from store.process import ENDINGS

GO_ON, PREEMPTED, STOPPED = 0, 1, 2  # what a rank asks for; the largest wins
STATUS = ("", "preempted", "stopped")  # by that number


class Watch:
    """One decision of all ranks on whether to end; ranks that make no step write their stacks."""

    def __init__(self, files: RunFiles, ranks: Ranks, hang_timeout: float):
        self.files = files
        self.sees_stop_file = ranks.rank == 0
        self.hang_timeout = hang_timeout
        self.patience = FIRST_STEP_TIMEOUT  # seconds without a step until the stacks are written
        self.hurried = False
        self.asks = GO_ON  # what this rank was told by a signal
        self.status = ""  # what all ranks have agreed on
        self.flag = None  # the largest that any rank asks for, while it is being reduced
        self.reduction = None
        self.stacks_path = files.folder / f"stacks_rank{ranks.rank}.txt"
        self.stacks_path.unlink(missing_ok=True)  # it may be a link to elsewhere
        self.stacks = open(self.stacks_path, "x", encoding="utf-8")
        for number in ENDINGS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self.ask_to_end)

    def ask_to_end(self, *_: object) -> None:
        """The handler of all signals, for good: a second one may not cut off the last words."""
        self.asks = PREEMPTED

    def poll(self) -> str:
        """The status to end with, or "".

        Every rank calls it equally often; what one rank asks, all learn in their next call.
        """
        if self.reduction:
            self.reduction.wait()
            self.status = self.status or STATUS[self.flag.item()]
        stop = self.sees_stop_file and self.files.stop.exists()
        self.flag = torch.tensor(STOPPED if stop else self.asks)
        self.reduction = dist.all_reduce(self.flag, op=dist.ReduceOp.MAX, async_op=True)
        faulthandler.dump_traceback_later(self.patience, file=self.stacks)
        return self.status

    def hurry(self) -> None:
        """Shortens the patience, once a step has been made."""
        if self.hurried:
            return
        self.hurried = True
        self.patience = self.hang_timeout
        end = timedelta(seconds=1.5 * self.patience)  # first the stacks, then the end
        dist.distributed_c10d._set_pg_timeout(end)

    def wait_for_records(self) -> None:
        """Lets the other ranks wait longer than rank 0 may need for the last records."""
        faulthandler.cancel_dump_traceback_later()
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=5 * LOCK_LIMIT))

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if not self.stacks.tell():
            self.stacks_path.unlink(missing_ok=True)
        self.files.stop.unlink(missing_ok=True)  # it has been obeyed
