"""The one object that a training loop talks to."""

import contextlib
import math
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor

from harness.checkpoints import Checkpoints, Held, export_weights
from harness.failures import report_failure
from harness.meter import Meter
from harness.provenance import device_name
from harness.ranks import Ranks, from_rank0, setup
from harness.records import Records
from harness.settings import Settings
from harness.watch import Watch
from store.contract import CURVE, Diverged

# NAME=value words, quoted as shlex does it, at the beginning of a text
SETTINGS = r"""(\w+=('[^']*'|"'"|[^\s'"])* ?)*"""


class Run:
    """Keeps what happens in a run, and lets the run survive what happens.

        with Run(Config, env, SOURCE) as run:
            run.open(...)     # claims the run's id, begins or continues its records
            run.restore(...)  # what a checkpoint holds
            ...               # for each step: poll, and save and point where they are due
            run.close(...)
        return run.exit_code

    Every rank makes the same calls. An error inside the block ends the records and sets exit_code.
    """

    def __init__(self, cls: type[Settings], env: Mapping[str, str], source: str):
        """`cls` is what the settings will be an instance of, `source` the text of the program."""
        self.cls = cls
        self.env = env
        self.source = source
        self.ranks = Ranks.from_env(env)
        self.exit_code = 0
        self.first_step = self.step = 0  # steps made before this attempt, and until now
        self.records: Records | None = None
        self.watch: Watch | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if self.watch:
            self.watch.close()
        if not isinstance(error, (Exception, KeyboardInterrupt)):
            return False
        self.exit_code = report_failure(error, self.cls, self.ranks, self.records, self.env)
        return True

    def open(
        self,
        cfg: Settings,
        changes: str,
        plan: Mapping[str, Any],
        warnings: Iterable[str],
        columns: Sequence[str] = (),
    ) -> None:
        """Joins the ranks, claims the run's id and begins, or continues, log, curve and row.

        `changes` says what differs from the defaults; `plan` has what is known before the start,
        among it what the Meter needs; `columns` are those of the curve beside the
        usual ones. Raises ConfigError where the id cannot be used or goes on from another run.
        """
        run_id = setup(cfg, self.ranks, self.env)
        self.cfg = cfg
        self.changes = changes
        self.records = Records(cfg, run_id, [*CURVE, *columns], self.source, self.ranks)
        plan = dict(plan) | {
            "device_name": device_name(self.ranks.device(cfg)),
            "changes": changes,
        }
        self.checkpoint: Path | None = from_rank0(lambda: self.records.open(plan, warnings))
        self.records.live = True
        self.watch = Watch(self.records.files, self.ranks, cfg.hang_timeout)
        self.checkpoints = Checkpoints(cfg, self.ranks, self.records)
        self.meter = Meter(cfg, self.ranks, plan)

    def restore(self, tensors: Held) -> tuple[int, Any] | None:
        """Fills tensors from the run's checkpoint: (step, `extra` as saved); None without one."""
        if self.checkpoint is None:
            return None
        about = self.checkpoints.load(tensors, self.checkpoint)
        self.first_step = about["step"]
        self.meter.load_state(about["meter"])
        self.records.summary |= self.meter.figures
        kept = {name: about[name] for name in ("meter", "extra")}
        self.checkpoints.save(self.first_step, tensors, kept)  # of another run: now this one's too
        return self.first_step, about["extra"]

    @property
    def status(self) -> str:
        """What the last `poll` returned."""
        return self.watch.status

    def poll(self, step: int, waited: float = 0.0) -> str:
        """The status to end with after `step` steps, "" to go on: one decision of all ranks.

        The first call starts the clock of training. `waited` are seconds that the last step waited
        for its data.
        """
        if not self.meter.running:
            self.meter.begin()
        self.meter.seconds["data_wait"] += waited
        self.step = step
        if step > self.first_step:
            self.watch.hurry()
        return self.watch.poll()

    def timed(self, kind: str) -> contextlib.AbstractContextManager[None]:
        """Within it the clock of training stands still: eval_time, compile_time."""
        return self.meter.off_the_clock(kind)

    def print(self, line: str) -> None:
        """A line to the log and to standard output."""
        self.records.print(line)

    def save(self, tensors: Held, extra: Any, bad_steps: Iterable[Sequence[str]]) -> None:
        """Saves a checkpoint of the step last polled, with `extra`, which JSON can hold.

        `bad_steps` has, for each step since the last call of `save` or `point`, the lines that say
        where its gradient was not finite. Raises Diverged after too many such steps in a row,
        OSError after too many saves that failed.
        """
        with self.meter.off_the_clock("save_time"):
            self._count_bad_steps(bad_steps)
            self.records.summary |= self.meter.update(self.step)
            kept = {"meter": self.meter.state(), "extra": extra}
            self.checkpoints.save(self.step, tensors, kept)

    def point(
        self,
        values: Mapping[str, float],
        lines: Iterable[str],
        figures: Mapping[str, float],
        bad_steps: Iterable[Sequence[str]],
    ) -> None:
        """Logs the step last polled: a row of the curve, lines of the log, the summary.

        `values` are columns of the curve: train_loss and grad_norm of the last step, val_loss after
        it, or what there is of them; `lines` are printed between both losses; `figures` belong to
        the summary; `bad_steps` are as in `save`. Raises Diverged.
        """
        self._count_bad_steps(bad_steps)
        step, steps = self.step, self.cfg.num_iterations
        row = {"step": step} | self.meter.point(step) | dict(values)
        milliseconds = 1000 * row["train_time"]
        times = f"train_time:{milliseconds:.0f}ms step_avg:{milliseconds / max(1, step):.2f}ms"

        if "train_loss" in row:
            self.print(f"step:{step}/{steps} train_loss:{row['train_loss']:.4f} {times}")
        for line in lines:
            self.print(line)
        val_loss, norm = row.get("val_loss"), row.get("grad_norm")
        if val_loss is not None:
            if "tokens_per_sec" in row:
                times += f" tokens_per_sec:{row['tokens_per_sec']:.0f}"
            self.print(f"step:{step}/{steps} val_loss:{val_loss:.4f} {times}")
        self.records.point(row)
        self.meter.figures |= figures
        self.records.summary |= self.meter.update(step, val_loss)
        if not math.isfinite(val_loss or 0) or norm == 0:
            raise Diverged(
                f"val_loss is {val_loss}, the gradient's norm {norm} at step {step}; "
                + self.cfg.advice("diverged")
            )

    def close(self, weights: Mapping[str, Tensor]) -> None:
        """Ends the run with the status last polled; without one it is "ok" and leaves weights."""
        records, status = self.records, self.watch.status or "ok"
        self.watch.wait_for_records()
        self.checkpoints.wait(last=True)
        if status != "ok":
            command = command_of(self.cfg, self.changes, records.files.run_id, self.ranks)
            records.print(f"{status} at step {self.step}; this goes on: {command}")
        if status == "ok" and self.ranks.rank == 0:
            export_weights(weights, self.cfg, records.files.folder)
        records.close(status)
        dist.barrier()  # until rank 0 has written everything, no signal may end another
        self.watch.close()
        self.watch = None
        dist.destroy_process_group()
        self.exit_code = 1 if records.lost else 0

    def _count_bad_steps(self, bad_steps: Iterable[Sequence[str]]) -> None:
        """Prints and counts them. Raises Diverged after too many in a row."""
        bad_steps = list(bad_steps)
        for lines in bad_steps:
            for line in lines:
                self.print(line)
        try:
            self.meter.count_bad_steps([bool(lines) for lines in bad_steps], self.step)
        except Diverged:
            self.records.summary |= self.meter.update(self.step)
            raise


def command_of(cfg: Settings, changes: str, run_id: str, ranks: Ranks) -> str:
    """What a shell has to be told so that a run goes on; `changes` are those from the defaults."""
    words = [re.match(SETTINGS, changes)[0].strip()]  # a program's options are in sys.argv
    for name in cfg.LABELS:
        value = getattr(cfg, name)
        if name not in ("run_id", "resume", "dry_run") and value != getattr(type(cfg), name):
            words.append(f"{name.upper()}={shlex.quote(str(value))}")
    words.append(f"RUN_ID={run_id} RESUME=auto")
    launcher = "torchrun <as before, on every machine>"
    if ranks.local_world_size == ranks.world_size:
        launcher = f"torchrun --standalone --nproc_per_node={ranks.world_size}"
    if ranks.world_size == 1:
        launcher = "python"
    return " ".join([*words, launcher, *map(shlex.quote, sys.argv)]).strip()
