"""Files that are whole or not there, their hashes, and where those of a run are."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from filelock import FileLock, Timeout


def sha256sum(path: Path) -> str:
    """The line that `sha256sum` prints for a file."""
    with open(path, "rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n"


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Replaces a file at one stroke, so that no reader and no crash ever sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp_{path.name}.{os.getpid()}.tmp")
    try:
        if isinstance(content, str):
            content = content.encode(errors="backslashreplace")
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        with contextlib.suppress(ValueError, TypeError):
            summary = json.loads(self.json.read_text())
            if "status" in summary:
                return summary
        raise ValueError(f"{self.json} is no summary of a run; name another")

    def lines(self) -> list[str]:
        """Those of the curve, without one that is still being written."""
        text = self.curve.read_text() if self.curve.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def last_step(self) -> int:
        """The step that the curve has reached; 0 where there is none."""
        first_cells = [line.partition(",")[0] for line in self.lines()]
        steps = [int(cell) for cell in first_cells if cell.isdigit()]
        return steps[-1] if steps else 0

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


def quoted(text: str) -> str:
    """The lines of a text, each behind a bar, what a terminal would act on as Python writes it."""
    lines = [
        "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        for line in text.splitlines()
    ]
    return "".join(f"\n| {line}" for line in lines)
