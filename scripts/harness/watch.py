"""Signals, stop file, and stacks of ranks that hang."""

import faulthandler, signal
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from harness.ranks import FIRST_STEP_TIMEOUT


class Watch:
    """Ends a run in good order, by one decision of all ranks; ranks that make no step write where they stand."""

    def __init__(self, folder, ranks, timeout):
        self.stop_file, self.leads, self.timeout = folder / "stop", ranks.rank == 0, timeout
        self.asked, self.status, self.pending, self.flag, self.patience = (
            0,
            "",
            None,
            None,
            FIRST_STEP_TIMEOUT,
        )
        (stacks := folder / f"stacks_rank{ranks.rank}.txt").unlink(
            missing_ok=True
        )  # it may be a link to elsewhere
        self.stacks = open(stacks, "x")
        for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(
                    number, lambda *_: setattr(self, "asked", 1)
                )  # for good: none may cut off last words

    def agreed(self):
        """Status to end with, or "". Every rank calls it equally often; all learn in the next call what one asks."""
        if self.pending:
            self.pending.wait()
            self.status = self.status or ("", "preempted", "stopped")[self.flag.item()]
        self.flag = torch.tensor(2 if self.leads and self.stop_file.exists() else self.asked)
        self.pending = dist.all_reduce(self.flag, op=dist.ReduceOp.MAX, async_op=True)
        faulthandler.dump_traceback_later(self.patience, file=self.stacks)
        return self.status

    def hurry(self):
        """Shortens the patience, once a step has been made."""
        self.patience = self.timeout
        dist.distributed_c10d._set_pg_timeout(
            timedelta(seconds=1.5 * self.patience)
        )  # first the stacks, then the end

    def close(self):
        faulthandler.cancel_dump_traceback_later()
        if not self.stacks.tell():
            Path(self.stacks.name).unlink(missing_ok=True)
        self.stop_file.unlink(missing_ok=True)  # it has been obeyed
