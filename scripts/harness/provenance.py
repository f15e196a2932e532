"""Where a run comes from: its source, git, machine and versions, and the data it sees."""

import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from harness.contract import DataError
from harness.files import sha256sum, write_whole
from harness.settings import ROOT

CPUINFO = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_run_id(preset: str) -> str:
    return f"{preset}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"


def output_of(*command: str | Path) -> str:
    """What a command prints; "" where it fails or is not there."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    return ""


def git_state() -> tuple[str, bool | str]:
    """(commit, whether tracked files but results differ from it); blanks outside a repository."""
    commit = output_of("git", "-C", ROOT, "rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:
        return "", ""
    results = (":!experiments/[rlft]*", ":!logs")  # results*, log_curves*, figures, tables
    changed = output_of("git", "-C", ROOT, "status", "-suno", "--", ".", *results)
    return commit, bool(changed)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"model name\s*: (.+)", CPUINFO)
    return f"cpu: {names[0] if names else platform.processor() or platform.machine()}"


def machine_text() -> str:
    """Versions and the device, as the log shows them: nvidia-smi where it runs, else the CPU."""
    cpu = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}, numpy {np.__version__}\n{output_of('nvidia-smi') or cpu}"
    )


def how_to_get(pattern: str, shards: int = 9) -> str:
    """What makes or fetches the data of a glob."""
    folder = os.path.dirname(pattern) or "."
    if "fineweb" in pattern:
        return f"fetch it: DATA_DIR={folder} python cached_fineweb10B.py {min(shards, 103)}"
    source = "..."
    if os.path.basename(folder) == "sympy":
        source = "package:sympy --tokenizer bytes"
    return f"make it: python scripts/prepare_data.py --source {source} --out {folder}"


def dataset_index(pattern: str) -> dict:
    """index.json of the folder of a glob, {} where there is none. Raises DataError."""
    path = Path(pattern).parent / "index.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        raise DataError(
            f"{path}: expected JSON, found something else; {how_to_get(pattern)}"
        ) from None


def fingerprint(files: Iterable[str | Path], log_dir: Path) -> str:
    """SHA-256 over names and contents of files, hex; cached in log_dir by path, size and time."""
    cache, known, hashes = log_dir / ".shard_hashes.json", {}, []
    with contextlib.suppress(OSError, ValueError):  # none yet, or a damaged one
        known = json.loads(cache.read_text())
    for file in map(Path, files):
        key = f"{file.resolve()}:{file.stat().st_size}:{file.stat().st_mtime_ns}"
        known[key] = known.get(key) or sha256sum(file)[:64]
        hashes.append((file.name, known[key]))
    with contextlib.suppress(OSError):  # opening the records says what is wrong with the folder
        write_whole(cache, json.dumps(known))
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
