"""Files that are whole or not there, and their hashes."""

import hashlib
import os
from pathlib import Path


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


def quoted(text: str) -> str:
    """The lines of a text, each behind a bar, what a terminal would act on as Python writes it."""
    lines = [
        "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        for line in text.splitlines()
    ]
    return "".join(f"\n| {line}" for line in lines)
