"""Where the files of a run are, and what they say."""

import contextlib
import json
import re
from pathlib import Path

from filelock import FileLock, Timeout


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


def whole_lines(path: Path) -> list[str]:
    """The lines of a file, without one that is still being written; [] where there is no file."""
    return re.findall("(.*)\n", path.read_text("utf-8", "replace")) if path.exists() else []
