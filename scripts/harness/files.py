"""Files that are whole or not there, and their hashes."""

import hashlib, os
from pathlib import Path


def sha256sum(path):
    """The line that `sha256sum` prints for a file."""
    with open(path, "rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n"


def sync(path):
    """Brings a file, or the names in a folder, to the disk."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def write_whole(path, content):
    """Replaces a file by text or bytes at one stroke, so that no reader and no crash ever sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp_{path.name}.{os.getpid()}.tmp")
    try:
        content = (
            content if isinstance(content, bytes) else content.encode(errors="backslashreplace")
        )
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
