"""Files that are whole or not there, and their hashes."""

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_PATIENCE = 5  # seconds until it is said that a lock is waited for
LOCK_LIMIT = 60  # seconds until it is given up


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


def regular(path: str | Path) -> Path:
    """The path, where a file is or may come to be. Raises OSError for a device, pipe or folder."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file")
    return path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file. Raises OSError where another process does, for LOCK_LIMIT."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(regular(path), "ab"):  # where it cannot be made, a lock would wait for ever
        lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=LOCK_PATIENCE)
        except Timeout:
            print(f"waiting for {path}, which another process holds", file=sys.stderr, flush=True)
            lock.acquire(timeout=LOCK_LIMIT - LOCK_PATIENCE)
    except Timeout:
        raise OSError(f"{path} was held by another process for {LOCK_LIMIT} s") from None
    try:
        yield
    finally:
        lock.release()


def write_whole(path: str | Path, content: str | bytes | Iterable[bytes]) -> None:
    """Replaces a file at one stroke, so that no reader and no crash ever sees half of it.

    Content may come in pieces. Raises OSError, also for what is no regular file.
    """
    path = regular(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp_{path.name}.{os.getpid()}.tmp")
    try:
        if isinstance(content, str):
            content = content.encode(errors="backslashreplace")
        with open(temporary, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def quoted(text: str) -> str:
    """The lines of a text, each behind a bar, what a terminal would act on as Python writes it."""
    lines = [
        "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        for line in text.splitlines()
    ]
    return "".join(f"\n| {line}" for line in lines)


def whole_lines(path: Path) -> list[str]:
    """The lines of a file, without one that is still being written; [] where there is no file."""
    return re.findall("(.*)\n", path.read_text("utf-8", "replace")) if path.exists() else []
