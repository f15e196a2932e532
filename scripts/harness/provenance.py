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
from typing import Any

import numpy as np
import torch

from harness.settings import ROOT
from store.contract import DataError
from store.files import sha256sum, write_whole

CPUINFO = Path("/proc/cpuinfo").read_text("utf-8") if sys.platform == "linux" else ""


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_run_id(preset: str) -> str:
    return f"{preset}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"


def output_of(*command: str | Path) -> str:
    """What a command prints; "" where it fails or is not there."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True
        )
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


SOURCES = {  # by the name of a dataset's folder
    "sympy": "package:sympy --tokenizer bytes",
    "wikitext103": "hf:Salesforce/wikitext/wikitext-103-raw-v1 --tokenizer gpt2",
}


def how_to_get(pattern: str, shards: int = 9) -> str:
    """What makes or fetches the data of a glob."""
    folder = os.path.dirname(pattern) or "."
    if "fineweb" in pattern:
        return f"fetch it: DATA_DIR={folder} python cached_fineweb10B.py {min(shards, 103)}"
    source = SOURCES.get(os.path.basename(folder), "...")
    return f"make it: python scripts/prepare_data.py --source {source} --out {folder}"


def dataset_folder(pattern: str) -> Path:
    """The folder of a glob, whose name may have gone through glob.escape."""
    return Path(re.sub(r"\[([*?[])\]", r"\1", os.path.dirname(pattern)))


def dataset_index(pattern: str) -> dict:
    """index.json of the folder of a glob, {} where there is none. Raises DataError."""
    folder = dataset_folder(pattern)
    path = folder / "index.json"
    if not path.is_file():
        if (folder / ".partial").is_dir():
            raise DataError(
                f"{folder}: its data are not whole: prepare_data.py was ended before it wrote "
                f"index.json; run the same command again, which goes on, or {how_to_get(pattern)}"
            )
        return {}
    try:
        index = json.loads(path.read_bytes().decode())
        expected = expected_in(index)
    except (OSError, ValueError, RecursionError):
        expected = "a JSON object"
    if expected:
        raise DataError(
            f"{path}: expected {expected}, found something else; remove it and "
            f"{how_to_get(pattern)}"
        )
    return index


def expected_in(index: Any) -> str:
    """What an index.json should hold where it holds something of another kind, "" for a sound one.

    A field that is null, or not there, is not known.
    """
    if not isinstance(index, dict):
        return "a JSON object"
    size, end = index.get("vocab_size"), index.get("eot_id")
    sizes, shards = index.get("token_bytes") or [], index.get("shards") or []
    is_sound = {
        "vocab_size 1 to 65536": size is None or size in range(1, 2**16 + 1),
        "eot_id an id": end is None or end in range(2**16),
        "tokenizer_sha256 text": isinstance(index.get("tokenizer_sha256"), str | None),
        "token_bytes the bytes of each id": isinstance(sizes, list)
        and all(isinstance(size, int | None) for size in sizes),
        "shards a list of records, each with its sha256 as text": isinstance(shards, list)
        and all(
            isinstance(shard, dict) and isinstance(shard.get("sha256"), str | None)
            for shard in shards
        ),
    }
    return next((f"in {what}" for what, sound in is_sound.items() if not sound), "")


def check_tokenizers(train: str, val: str) -> None:
    """Raises DataError where the data of two globs are known to be of different tokenizers."""
    known = {dataset_index(pattern).get("tokenizer_sha256") for pattern in (train, val)} - {None}
    if len(known) > 1:
        raise DataError(
            f"INPUT_BIN={train} and INPUT_VAL_BIN={val} are of different tokenizers; set both to "
            "data of one"
        )


def bytes_per_token(pattern: str, tokens: np.ndarray) -> float | None:
    """Mean size of tokens of a glob's data; None where its index.json does not know them all."""
    of_token = dataset_index(pattern).get("token_bytes") or []
    if tokens.max() >= len(of_token):
        return None
    mean = np.array(of_token, dtype=float)[tokens].mean().item()  # nan with one that is null
    return mean if mean > 0 else None


def check_hash(file: Path, found: str) -> None:
    """Raises DataError where index.json of the file's folder has another SHA-256 of it."""
    for shard in dataset_index(str(file)).get("shards") or []:
        if shard.get("name") == file.name:
            expected = shard.get("sha256") or found
            if found != expected:
                raise DataError(
                    f"{file}: damaged or changed: expected SHA-256 {expected[:12]}... of "
                    f"index.json, found {found[:12]}...; remove it and {how_to_get(str(file))}"
                )


def fingerprint(files: Iterable[str | Path], log_dir: Path) -> str:
    """SHA-256 over names and contents of files, hex; cached in log_dir by what the disk says.

    Raises DataError for a file whose contents are not those that its folder's index.json has.
    """
    cache, known, hashes = log_dir / ".shard_hashes.json", {}, []
    with contextlib.suppress(OSError, ValueError):  # none yet, or a damaged one
        known = json.loads(cache.read_text("utf-8"))
    for file in map(Path, files):
        stat = file.stat()  # whoever sets a file's time back leaves st_ctime
        times = f"{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"
        key = f"{file.resolve()}:{stat.st_size}:{times}"
        known[key] = known.get(key) or sha256sum(file)[:64]
        check_hash(file, known[key])
        hashes.append((file.name, known[key]))
    with contextlib.suppress(OSError):  # opening the records says what is wrong with the folder
        write_whole(cache, json.dumps(known))
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
