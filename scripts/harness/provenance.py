"""Where a run comes from: git, machine, versions, and the data it sees."""

import contextlib, hashlib, json, os, platform, re, subprocess, sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from harness.contract import DataError
from harness.files import sha256sum, write_whole
from harness.settings import ROOT

CPUINFO = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""


def output_of(*command):
    """What a command prints; "" where it fails or is not there."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return ""


def git_state():
    """(commit, whether tracked files but results, log_curves, figures, tables differ); blanks outside a repository."""
    commit = output_of("git", "-C", ROOT, "rev-parse", "--verify", "--quiet", "HEAD")
    changed = output_of(
        "git", "-C", ROOT, "status", "-suno", "--", ".", ":!experiments/[rlft]*", ":!logs"
    )
    return commit, bool(changed) if commit else ""


def machine_text():
    """Versions and the device, as the log shows them: nvidia-smi where it runs, else the CPU's name."""
    device = (
        output_of("nvidia-smi")
        or f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
    )
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"numpy {np.__version__}\n{device}"
    )


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"model name\s*: (.+)", CPUINFO)
    return f"cpu: {names[0] if names else platform.processor() or platform.machine()}"


def utc_now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def new_run_id(preset):
    return f"{preset}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"


def how_to_get(pattern, shards=9):
    """What makes or fetches the data of a glob."""
    folder = os.path.dirname(pattern) or "."
    if "fineweb" in pattern:
        return f"fetch it: DATA_DIR={folder} python cached_fineweb10B.py {min(shards, 103)}"
    source = "package:sympy --tokenizer bytes" if os.path.basename(folder) == "sympy" else "..."
    return f"make it: python scripts/prepare_data.py --source {source} --out {folder}"


def dataset_index(pattern):
    """index.json of the folder of a glob, {} where there is none. Raises DataError."""
    path = Path(pattern).parent / "index.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        raise DataError(
            f"{path}: expected JSON, found something else; {how_to_get(pattern)}"
        ) from None


def fingerprint(loaders, folder):
    """SHA-256 over names and contents of the loaders' shards, hex; they are cached in folder by path, size and time."""
    cache, known, hashes = folder / ".shard_hashes.json", {}, []
    with contextlib.suppress(OSError, ValueError):  # none yet, or a damaged one
        known = json.loads(cache.read_text())
    for file in [Path(file) for loader in loaders for file in loader.files]:
        key = f"{file.resolve()}:{file.stat().st_size}:{file.stat().st_mtime_ns}"
        known[key] = known.get(key) or sha256sum(file)[:64]
        hashes.append((file.name, known[key]))
    with contextlib.suppress(OSError):  # Records.open says what is wrong with the folder
        write_whole(cache, json.dumps(known))
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
