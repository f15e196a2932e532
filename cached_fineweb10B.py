"""Fetches GPT-2 tokens of FineWeb from the Hugging Face hub.

    python cached_fineweb10B.py 9      # 9 of 103 shards

Environment: DATA_DIR, the folder (data/fineweb10B); REVISION, a branch, tag or commit (the folder's
own, else main); HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE, as in the hub's client. Shards
that are whole already are kept.
Exit codes: 0 all shards are whole, 1 failed, 2 wrong arguments, 3 no network, 130 interrupted.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

# the hub's client and train_gpt are imported where they are used: they take seconds
from filelock import FileLock

REPO = "kjj0/fineweb10B-gpt2"
TRAIN_SHARDS = 103
SHARD_BYTES = 200_001_024  # of a full one: 1,024 of header and 100,000,000 uint16 tokens
INDEX = {
    "source": REPO,
    "commit": None,
    "tokenizer": "gpt2",
    "tokenizer_sha256": None,
    "vocab_size": 50257,
    "eot_id": 50256,
    "split": "by shard, as published",
    "bytes_per_token": None,
    "token_bytes": None,  # the number of bytes of each id, by which bits per byte are counted
    "shards": [],
}
ATTEMPTS = 5
BACKOFF_S = 1.0
ADVICE = {  # by HTTP status, None without an answer
    401: "set a valid HF_TOKEN",
    403: "set an HF_TOKEN with access",
    404: "check REVISION and HF_ENDPOINT",
    None: "fetch on a machine with network and copy the folder, set HF_ENDPOINT to a mirror, or "
    "train on the embedded dataset with `bash scripts/quickstart.sh`",
}
Result = TypeVar("Result")


class FetchError(RuntimeError):
    """A sentence for the user (what was expected, what was found, what to do) and the exit code."""


def cause_of(error: Exception) -> Exception:
    """With force_download the client wraps the failure of its first request in a ValueError."""
    if isinstance(error, ValueError) and error.__cause__:
        return error.__cause__
    return error


def attempt(what: str, call: Callable[[], Result], folder: Path) -> Result:
    """Result of call() to the hub, which may download into a folder; repeated after transient
    failures, but for one that stalls. Raises FetchError, OSError (of this disk)."""
    import train_gpt  # brings scripts/ onto the path
    from text_sources import check_endpoint, unless_stalled

    try:
        check_endpoint()
    except train_gpt.DataError as error:
        raise FetchError(str(error), 2) from None
    from huggingface_hub.errors import OfflineModeIsEnabled

    for number in range(1, ATTEMPTS + 1):
        try:
            return unless_stalled(call, folder)
        except TimeoutError as error:
            raise FetchError(
                f"{what}: expected data of the hub for {REPO}, found {error}: start again later, "
                "which goes on after the shards that are whole, or set HF_HUB_DOWNLOAD_TIMEOUT to "
                "more seconds",
                3,
            ) from None
        except Exception as error:  # the client's transports, HTTP and xet, share no error class
            if isinstance(error, OSError) and error.errno:
                raise  # from this machine's disk: the client's have no errno
            cause = cause_of(error)
            status = getattr(getattr(cause, "response", None), "status_code", None)
            if status:
                transient = status >= 500 or status in (408, 429)
                answer = f"HTTP {status}"
            else:
                transient = not isinstance(cause, OfflineModeIsEnabled)
                answer = f"{type(cause).__name__}: {cause}".splitlines()[0].rstrip(".")
            if number == ATTEMPTS or not transient:
                raise FetchError(
                    f"{what}: expected an answer of the hub for {REPO}, found {answer}: "
                    f"{ADVICE.get(status, 'start again later')}",
                    1 if status else 3,
                ) from error
        time.sleep(BACKOFF_S * 2 ** (number - 1))


def inspect(path: Path, record: dict, sha256: str | None = None) -> tuple[dict | None, str | None]:
    """(index entry, None) of a whole shard, hashed unless `record` is of the same bytes; else
    (None, what is wrong)."""
    from train_gpt import DataError, shard_tokens

    try:
        tokens = shard_tokens(path)
        stat = path.stat()
    except DataError as error:
        return None, str(error)
    entry = {
        "name": path.name,
        "split": path.name.split("_")[1],
        "tokens": tokens,
        "sha256": record.get("sha256"),
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,  # which whoever sets a file's time back does not
    }
    if entry != record:
        with path.open("rb") as file:
            entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 not in (None, entry["sha256"]):
        return None, f"{path}: expected SHA-256 {sha256}, found {entry['sha256']}"
    return entry, None


def fetch(path: Path, commit: str, sha256: str | None) -> dict:
    """Index entry of a shard fetched from the hub, a second time if it came wrong. Raises
    FetchError, OSError."""

    def download() -> str:
        from huggingface_hub import hf_hub_download

        # Forced, because the client's own records vouch for a file that was damaged after it came.
        return hf_hub_download(
            REPO,
            path.name,
            repo_type="dataset",
            revision=commit,
            local_dir=path.parent,
            force_download=True,
        )

    for _ in range(2):
        attempt(path.name, download, path.parent / ".cache")
        entry, fault = inspect(path, {}, sha256)
        if entry:
            return entry
        path.unlink()
    raise FetchError(
        f"{fault} (fetched twice, then removed): "
        "set HF_ENDPOINT or REVISION to a source that is whole",
        1,
    )


def read_index(folder: Path) -> dict:
    """index.json of a folder, or what it would say of an empty one. Raises FetchError, OSError."""
    path = folder / "index.json"
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        index = json.loads(path.read_text("utf-8")) if path.exists() else {}
        index = INDEX | index
        names = [shard["name"] for shard in index["shards"]]
        if index["source"] == REPO and all(isinstance(name, str) for name in names):
            return index
    raise FetchError(
        f"{path}: expected the index of {REPO}, found another: delete it or set another DATA_DIR", 1
    )


def write_text(path: Path, text: str) -> None:
    """Write a file in one step so that no reader sees half of it. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def write_index(folder: Path, index: dict, records: dict[str, dict]) -> None:
    """Write index.json with the records of the shards that are there. Raises OSError."""
    index["shards"] = [records[name] for name in sorted(records) if (folder / name).is_file()]
    text = json.dumps(index | {"token_bytes": "HERE"}, indent=1)
    one_line = json.dumps(index["token_bytes"])  # of 50,257 numbers
    write_text(folder / "index.json", text.replace('"HERE"', one_line) + "\n")


def write_tokenizer(folder: Path, index: dict, records: dict[str, dict]) -> None:
    """Write tokenizer.json: at first a record that names GPT-2's; then that itself, where its
    vocabulary is at hand or can be fetched, and what the index says of it. Raises OSError."""
    path = folder / "tokenizer.json"
    if not path.exists():
        about = {"kind": "gpt2", "vocab_size": INDEX["vocab_size"], "eot_id": INDEX["eot_id"]}
        write_text(path, json.dumps(about, indent=1) + "\n")
    elif index["token_bytes"]:
        return
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "on", "yes"):
        return
    print("tokenizer.json: looking for GPT-2's vocabulary", flush=True)
    from train_gpt import DataError  # brings scripts/ onto the path

    try:
        import tokenization

        tokenizer = tokenization.named("gpt2")
    except (ImportError, DataError):
        return
    text = tokenizer.to_json()
    write_text(path, text)
    index["tokenizer_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    index["token_bytes"] = [len(token) for token in tokenizer.token_bytes]
    write_index(folder, index, records)


def check_space(folder: Path, missing: int) -> None:
    """Raises FetchError where the disk has no room for so many shards."""
    needed = missing * SHARD_BYTES / 1e9
    free = shutil.disk_usage(folder).free / 1e9
    if needed > free:
        raise FetchError(
            f"{folder}: expected {needed:.2f} GB free for {missing} shards, found {free:.2f} GB: "
            "free some, ask for fewer shards or set DATA_DIR to a folder on a larger disk",
            1,
        )


def ask_hub(revision: str, folder: Path) -> tuple[str, dict[str, str]]:
    """(commit of a revision, {file: its SHA-256}). Raises FetchError, OSError."""

    def dataset_info() -> object:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(REPO, revision=revision, files_metadata=True, timeout=30)

    hub = attempt(revision, dataset_info, folder / ".cache")
    return hub.sha, {file.rfilename: file.lfs.sha256 for file in hub.siblings or () if file.lfs}


def fetch_all(folder: Path, names: list[str], revision: str | None) -> None:
    """Make the named shards of a folder whole, record them, and print what was done. Raises
    FetchError, OSError."""
    index = read_index(folder)
    held, records = index["commit"], {shard["name"]: shard for shard in index["shards"]}
    revision = revision or held or "main"
    whole = {}
    for name in names:
        record = records.get(name, {})
        entry, fault = inspect(folder / name, record, record.get("sha256"))
        if entry:
            whole[name] = entry
        elif record and (folder / name).exists():
            print(f"damaged, is fetched again: {fault}", flush=True)
    missing = len(names) - len(whole)
    check_space(folder, missing)

    commit = held
    sha256s = {}
    if missing:
        commit, sha256s = ask_hub(revision, folder)
        whole = {
            name: entry
            for name, entry in whole.items()
            if sha256s.get(name) in (None, entry["sha256"])
        }
    # a full hash is compared without network, too
    asked = revision if len(revision) == 40 else commit
    if held not in (None, asked):
        raise FetchError(
            f"{folder}: expected commit {asked}, found {held}: "
            "unset REVISION or set another DATA_DIR",
            1,
        )

    for number, name in enumerate(names, 1):
        note = " is already whole" if name in whole else ""
        print(f"{number}/{len(names)} {name}{note}", flush=True)
        entry = whole.get(name) or fetch(folder / name, commit, sha256s.get(name))
        if entry != records.get(name):
            records[name] = entry
            index["commit"] = commit
            if os.access(folder, os.W_OK):  # of a copy that cannot be written only times differ
                write_index(folder, index, records)
    if os.access(folder, os.W_OK):
        write_tokenizer(folder, index, records)  # last, since it may wait for the network
    size = sum(records[name]["bytes"] for name in names) / 1e9
    skipped = f"{len(whole)} skipped" if missing else f"{len(whole)} skipped without network"
    print(
        f"{len(names) - len(whole)} shards fetched, {skipped}: "
        f"{size:.2f} GB in {folder}, commit {commit or 'unknown'}"
    )
    print("next: torchrun --standalone --nproc_per_node=8 train_gpt.py")


def fetch_locked(folder: Path, names: list[str]) -> None:
    """Make the named shards of a folder whole, once no other fetch into it runs. Raises FetchError,
    OSError."""
    if folder.is_symlink() and not folder.exists():
        raise FetchError(
            f"{folder}: expected a folder, found a dead link: make {folder.readlink()} or relink", 1
        )
    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"{folder}: checking {len(names)} shards, once no other fetch into this folder runs",
        flush=True,
    )
    can_lock = os.access(folder, os.W_OK)
    with FileLock(folder / ".fetch.lock") if can_lock else contextlib.nullcontext():
        fetch_all(folder, names, os.environ.get("REVISION"))


def main(argv: list[str] | None = None) -> int:
    """Exit code of one run with command line arguments; environment as in the docstring of the
    module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "N", nargs="?", type=int, default=TRAIN_SHARDS, help="training shards, 0.2 GB each (all)"
    )
    count = parser.parse_args(argv).N
    if not 1 <= count <= TRAIN_SHARDS:
        parser.error(f"N: expected 1 to {TRAIN_SHARDS} training shards, found {count}")
    train_names = [f"fineweb_train_{number:06d}.bin" for number in range(1, count + 1)]
    folder = Path(os.environ.get("DATA_DIR") or "data/fineweb10B")
    try:
        fetch_locked(folder, ["fineweb_val_000000.bin", *train_names])
    except FetchError as error:
        sentence, code = error.args
        print(f"error: {sentence}", file=sys.stderr)
        return code
    except OSError as error:
        print(f"error: {error}: set another DATA_DIR", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "interrupted: start it again to continue, shards that are whole stay", file=sys.stderr
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
