"""Where the files of a run are, and what they say."""

import contextlib
import json
import re
from pathlib import Path

from filelock import FileLock, Timeout

from store.files import whole_lines

# Columns of the curve that the summary of a run that has ended keeps, and of how many rows.
HISTORY = ("step", "train_time", "tokens_per_sec", "train_loss", "val_loss", "val_accuracy")
MOST_POINTS = 1000
VALIDATED = re.compile(r"([^,]*,){4}[^,]")  # a row of the curve that has its fifth cell, val_loss
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?(e[+-]?\d+)?")  # as Python and JSON write it


class RunFiles:
    """What a run leaves in its LOG_DIR, whether it is there yet or not."""

    def __init__(self, log_dir: str | Path, run_id: str):
        self.run_id = run_id
        self.log = Path(log_dir) / f"{run_id}.txt"
        self.curve = Path(log_dir) / f"{run_id}.csv"
        self.json = Path(log_dir) / f"{run_id}.json"
        self.folder = Path(log_dir) / run_id  # checkpoints, and what follows
        self.stop = self.folder / "stop"  # who makes it asks the run to save and end
        self.error = self.folder / "error.txt"  # the first error of the ranks
        self.output = self.folder / "output.txt"  # of a run that run_stage.py has started
        self.lock = self.folder / "live.lock"  # held as long as the run is live

    def summary(self) -> dict:
        """What the JSON holds. Raises ValueError where that is not a summary."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            summary = json.loads(self.json.read_text("utf-8"))
            if "status" in summary:
                return summary
        raise ValueError(f"{self.json} is no summary of a run; name another")

    def lines(self) -> list[str]:
        """Those of the curve, without one that is still being written."""
        return whole_lines(self.curve)

    def history(self) -> dict[str, list[float | None]]:
        """The columns HISTORY of the curve, None where a cell is blank or not finite.

        Of many rows at most MOST_POINTS, evenly spaced, and as many of those with a validation; the
        last is among them.
        """
        lines = self.lines()
        kept = {*lines[:1]}
        for group in lines, [*filter(VALIDATED.match, lines)]:
            every = len(group) // MOST_POINTS + 1
            kept |= {*group[::-every]}  # back from the last
        columns = zip(*(line.split(",") for line in lines if line in kept))
        return {
            name: [json.loads(cell) if NUMBER.fullmatch(cell) else None for cell in cells]
            for name, *cells in columns
            if name in HISTORY
        }

    def last_step(self) -> int:
        """The step that the curve has reached; 0 where there is none."""
        first_cells = [line.partition(",")[0] for line in self.lines()]
        return int(next(filter(str.isdigit, reversed(first_cells)), 0))

    def is_live(self) -> bool:
        """Whether a trainer holds the lock of the run.

        Where none does, this holds it for some microseconds; a trainer that starts tries for a
        second.
        """
        try:
            with FileLock(self.lock, timeout=0) if self.lock.exists() else contextlib.nullcontext():
                return False
        except Timeout:
            return True


def summary_text(summary: dict) -> str:
    """What the JSON of a run holds of a summary: a line for each name."""
    body = ",\n".join(f" {json.dumps(name)}: {json.dumps(summary[name])}" for name in summary)
    return f"{{\n{body}\n}}\n"
