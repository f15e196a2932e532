"""Token shards for train_gpt.py from text: packages, files, folders, the Hugging Face hub.

    python scripts/prepare_data.py --source package:sympy --tokenizer bytes --out data/sympy
    python scripts/prepare_data.py --source books --tokenizer gpt2 --out data/books
    python scripts/prepare_data.py --source hf:Salesforce/wikitext/wikitext-103-raw-v1 \
        --tokenizer gpt2 --out data/wikitext103
    python scripts/prepare_data.py --source code.jsonl --weight 0.3 --source 'web/*.parquet' \
        --weight 0.7 --tokenizer data/tokenizer.json --out data/mix

writes sympy_val_000000.bin, sympy_train_000001.bin, ..., tokenizer.json and index.json (recipe,
SHA-256 of shards) to data/sympy. The same input gives the same bytes on every machine and with any
number of workers. What is not whole yet lies in the folder .partial; the same command goes on with
it after any end.
Exit codes: 0 all is there, 1 a worker ended, 2 a wrong option, 3 input that cannot be used, 130
interrupted.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import contextlib
import glob
import hashlib
import json
import math
import os
import shlex
import shutil
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import text_sources
import tokenization
from encode_shards import Job, Progress, dump, encoder, read_record, write_file
from harness.settings import ROOT, read_preset
from store.contract import DataError
from store.files import regular, sha256sum
from store.process import usable_cores
from text_sources import FILES_SPLIT, Reading, Source, fetch, open_source, split_of, survey

PARTIAL = ".partial"  # folder of what is not whole yet
RECIPE = (  # what makes the bytes of the shards; those that are not set are not in the index
    "source",
    "source_version",
    "source_sha256",
    "weight",
    "tokenizer",
    "split",
    "val_fraction",
    "shard_tokens",
    "newline",
    "text_field",
    "binary",
)
FOUND = ("source_version", "source_sha256", "split")  # those that the sources say
LOCK_S = 5.0  # to wait for a lock: the workers of a run that was killed hold it for a second
BYTES_A_WORKER = 1 << 20  # of text, at least: a process takes some time to start

########################################
#            What is there             #
########################################


def read_index(out: Path) -> dict:
    """index.json of a folder, {} where there is none or it cannot be used."""
    try:
        index = json.loads((out / "index.json").read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return index if is_index(index) else {}


def is_index(index: Any) -> bool:
    """Whether all that is read of an index here is there, and of its kind."""
    if not isinstance(index, dict) or not isinstance(index.get("shards"), list):
        return False
    if not all(map(is_shard, index["shards"])):
        return False
    documents = index.get("documents")
    return (
        {"train", "val"} <= {shard["split"] for shard in index["shards"]}
        and isinstance(documents, dict)
        and all(isinstance(count, int) for count in documents.values())
        and isinstance(index.get("vocab_size"), int)
        and isinstance(index.get("bytes_per_token"), float | int)
        and isinstance(index.get("used", {}), dict)
    )


def is_shard(entry: Any) -> bool:
    """Whether an entry of an index is that of a file in the index's own folder."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return False
    is_name = Path(entry["name"]).name == entry["name"] and "\0" not in entry["name"]
    has_split = entry.get("split") in ("train", "val", "test")
    return is_name and has_split and isinstance(entry.get("tokens"), int)


def old_shards(out: Path) -> list[Path]:
    """What the trainer's globs of this folder match."""
    stem = glob.escape(out.absolute().name)
    return [
        path for split in ("train", "val", "test") for path in out.glob(f"{stem}_{split}_*.bin")
    ]


def differences(recipe: dict, index: dict, keys: tuple[str, ...] = RECIPE) -> list[str]:
    """The keys of a recipe in which an index, or a record of progress, differs."""
    if "tokenizer_sha256" in recipe:
        keys = (*keys, "tokenizer_sha256")
    return [key for key in keys if recipe.get(key) != index.get(key)]


def refuse(out: Path, what: str, different: list[str]) -> None:
    """Raises DataError for data that is not of this recipe."""
    raise DataError(
        f"--out {out}: expected no data or that of this recipe, found {what} {', '.join(different)}"
        ": give another folder, or --force to replace its data"
    )


def is_whole(folder: Path, shard: dict) -> bool:
    """Whether a shard of an index is in a folder, byte for byte; by its header where the index, of
    an earlier version, does not say the SHA-256."""
    path = folder / shard["name"]
    if shard.get("bytes") and shard.get("sha256"):
        has_size = path.is_file() and path.stat().st_size == shard["bytes"]
        return has_size and sha256sum(path)[:64] == shard["sha256"]
    from train_gpt import shard_tokens  # takes a second, for torch

    try:
        return shard_tokens(path) == shard["tokens"]
    except DataError:
        return False


def find_index(
    out: Path, recipe: dict, keys: tuple[str, ...] = RECIPE, said: bool = True
) -> dict | None:
    """The index of a folder that holds all of recipe, None if any is missing. Raises DataError for
    other data. A damaged shard is told unless it was `said`, for several ask on the way."""
    index = read_index(out)
    different = differences(recipe, index, keys)
    if different and (index or old_shards(out)):
        refuse(out, "another", different)
    if different or not (out / "tokenizer.json").is_file():
        return None
    damaged = [shard["name"] for shard in index["shards"] if not is_whole(out, shard)]
    if damaged and not said:
        print(f"{out / damaged[0]}: missing or damaged: is made again", file=sys.stderr)
    if damaged:
        return None
    return upgraded(out, index)


def upgraded(out: Path, index: dict) -> dict:
    """The index with all that this version knows of the same shards, in the folder too, and the
    tokenizer.json of today; where either cannot be had or written, as it was."""
    if "tokenizer_sha256" in index:
        return index
    with contextlib.suppress(DataError, OSError):  # no GPT-2 vocabulary here, or no right to write
        tokenizer = tokenization.load(out)
        new = index | about(tokenizer)
        new["shards"] = [
            shard | {"bytes": (out / shard["name"]).stat().st_size} for shard in index["shards"]
        ]
        write_file(out / "tokenizer.json", tokenizer.to_json().encode())
        write_file(out / "index.json", dump(new))
        return new
    return index


def about(tokenizer: tokenization.Tokenizer) -> dict:
    """What the index says of a tokenizer; bits per byte need the number of bytes of each id."""
    return {
        "tokenizer_sha256": hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "token_bytes": [len(token) for token in tokenizer.token_bytes],
    }


########################################
#               Recipe                 #
########################################


def one_or_list(values: list) -> object:
    """The value of a single source, else the list."""
    return values[0] if len(values) == 1 else values


def asked_recipe(args: argparse.Namespace) -> dict:
    """What the command line alone says of the data. Raises DataError for a tokenizer's file."""
    recipe = {
        "source": one_or_list(args.source),
        "tokenizer": args.tokenizer,
        "val_fraction": args.val_fraction,
        "shard_tokens": args.shard_tokens,
    }
    optional = {
        "weight": args.weight,
        "newline": args.newline != "keep" and args.newline,
        "text_field": args.text_field != "text" and args.text_field,
        "binary": args.binary,
    }
    recipe |= {key: value for key, value in optional.items() if value}
    if args.tokenizer not in ("bytes", "chars", "gpt2"):
        content = tokenization.load(args.tokenizer).to_json()
        recipe["tokenizer_sha256"] = hashlib.sha256(content.encode()).hexdigest()
    return recipe


def found_recipe(sources: list[Source], reading: Reading) -> dict:
    """What the sources say of the data."""
    return {
        "source_version": one_or_list([source.version for source in sources]),
        "source_sha256": one_or_list([source.sha256 for source in sources]),
        "split": one_or_list([source.split_rule(reading) for source in sources]),
    }


def find_sources(args: argparse.Namespace, reading: Reading) -> list[Source]:
    """All sources, those of the hub at the commit that unfinished data is of. Raises DataError,
    OSError."""
    begun = read_record(args.out / PARTIAL).get("recipe", {})
    commits = {}
    if begun.get("source") == one_or_list(args.source) and begun.get("source_version"):
        versions = begun["source_version"]
        versions = [versions] if isinstance(versions, str) else versions
        commits = dict(zip(args.source, versions))
    return [open_source(spec, reading, commits.get(spec), without=args.out) for spec in args.source]


def check_files(source: Source, reading: Reading, size: int) -> None:
    """Raises DataError for a source without text, or whose files are all in one split."""
    names = source.names()
    if not size:
        raise DataError(
            f"--source {source.spec}: expected text, found {len(names)} file(s) without any: "
            "name another"
        )
    splits = {split_of(name, reading.val_fraction) for name in names}
    if source.split_rule(reading) == FILES_SPLIT and len(splits) == 1:
        fractions = [percent / 100 for percent in range(1, 100)]
        other = [f for f in fractions if len({split_of(name, f) for name in names}) == 2]
        nearest = min(other, key=lambda f: abs(f - reading.val_fraction), default=None)
        which = f", such as {nearest}," if nearest else ""
        raise DataError(
            f"--val-fraction {reading.val_fraction}: expected files in train and in val, found all "
            f"{len(names)} in {splits.pop()}: give more files, another fraction{which} or just one "
            "FILE"
        )


########################################
#                Making                #
########################################


def prepare(args: argparse.Namespace) -> dict:
    """Write the data that args ask for unless it is there, and return its index. Raises DataError,
    OSError."""
    for path in (args.out / "index.json", args.out / "tokenizer.json", *old_shards(args.out)):
        regular(path)  # what is to be replaced
    reading = text_sources.reading_of(args, as_text=args.tokenizer != "bytes", binary=args.binary)
    recipe = asked_recipe(args)
    index = None
    if not args.force and all(spec.startswith("hf:") for spec in args.source):
        with contextlib.suppress(DataError):  # the hub is to be asked only for what is not there
            index = find_index(args.out, recipe, tuple(key for key in RECIPE if key not in FOUND))
    if index is None:
        sources = find_sources(args, reading)
        recipe |= found_recipe(sources, reading)
        if not args.force and not is_being_moved(args.out, recipe):
            index = find_index(args.out, recipe)
    if index:
        print(f"already there: {args.out}")
        return index
    return make(args, recipe, sources, reading)


def is_being_moved(out: Path, recipe: dict) -> bool:
    """Whether an earlier run had made all of recipe, and ended before all was in its place."""
    record = read_record(out / PARTIAL)
    if not is_index(record.get("index")) or differences(recipe, record["recipe"]):
        return False
    shards = record["index"]["shards"]
    return all(is_whole(out / PARTIAL, shard) or is_whole(out, shard) for shard in shards)


def make(args: argparse.Namespace, recipe: dict, sources: list[Source], reading: Reading) -> dict:
    """Write the data of a recipe, or what is missing of it. Raises DataError, OSError."""
    partial = args.out / PARTIAL
    begun = read_record(partial)
    if begun and differences(recipe, begun["recipe"]):
        if not args.force:
            refuse(args.out, "unfinished data of another", differences(recipe, begun["recipe"]))
        begun = {}
    if is_being_moved(args.out, recipe):
        with unfinished(args.out, goes_on=True):
            if is_being_moved(args.out, recipe):  # no other run has done it meanwhile
                return move(partial, args.out)

    for source in sources:
        fetch(source)
    surveys = [survey(source, reading, args.tokenizer == "chars") for source in sources]
    for source, seen in zip(sources, surveys):
        check_files(source, reading, seen.bytes)
        for note in source.notes:
            print(f"note: {source.spec}: {note}", file=sys.stderr)
    is_one_text = len(sources) == 1 and sources[0].is_one_text(reading)
    if args.tokenizer == "chars":
        alphabet = set().union(*(seen.alphabet for seen in surveys))
        tokenizer = tokenization.from_chars(alphabet, has_eot=not is_one_text)
    else:
        tokenizer = tokenization.named(args.tokenizer)
    stem, total = args.out.absolute().name, sum(seen.bytes for seen in surveys)
    job = Job(partial, stem, recipe, sources, reading, args.weight, args.shard_tokens)
    with_end = not is_one_text and tokenizer.eot_id is not None
    if not is_one_text and not with_end:
        print(
            f"note: {args.tokenizer} has no <|endoftext|>: documents follow each other without one",
            file=sys.stderr,
        )
    with unfinished(args.out, goes_on=bool(begun)):
        index = None if args.force else find_index(args.out, recipe, said=False)
        if index:  # of another run, that this one has waited for
            shutil.rmtree(partial, ignore_errors=True)
            return index
        write_file(partial / "tokenizer.json", tokenizer.to_json().encode())
        write_shards(job, tokenizer, with_end, args.workers, total)
        job.save(index=recipe | about(tokenizer) | counts(job) | {"shards": job.shards})
        return move(partial, args.out)


@contextlib.contextmanager
def unfinished(out: Path, goes_on: bool):
    """Holds the folder of unfinished data, emptied unless a run goes on; what a failure leaves
    there stays only where it has a whole shard and the same command could go on. Raises DataError
    where another run works."""
    is_new, partial = not out.exists(), out / PARTIAL
    if partial.is_symlink():
        raise DataError(
            f"--out {out}: expected its folder {PARTIAL} to be its own, found a link, whose files "
            "would be lost: remove the link"
        )
    lock = take_lock(partial)  # until here what is there may be another run's
    try:
        with lock:
            for path in () if goes_on else partial.iterdir():
                if path.suffix != ".lock":
                    path.unlink()
            yield
    except (DataError, OSError, KeyboardInterrupt) as error:
        if isinstance(error, DataError) or not read_record(partial).get("shards"):
            shutil.rmtree(partial, ignore_errors=True)
            if is_new:
                with contextlib.suppress(OSError):
                    out.rmdir()
        raise


def take_lock(partial: Path) -> contextlib.AbstractContextManager:
    """The lock of a folder of unfinished data, held. Raises DataError where another run works."""
    for _ in range(3):
        partial.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(partial / "live.lock", timeout=LOCK_S).acquire()
        except FileNotFoundError:  # the run that held it has ended, and removed the folder
            continue
        except Timeout:
            break
    raise DataError(
        f"--out {partial.parent}: expected no other run, found one that makes this data: wait for "
        "it"
    )


def write_shards(
    job: Job, tokenizer: tokenization.Tokenizer, with_end: bool, workers: int, size: int
) -> None:
    """All shards of a job, by so many workers or as many as its bytes are worth."""
    job.restore()
    if not all(is_whole(job.folder, shard) for shard in job.shards):
        job.shards, job.totals, job.position = [], {}, None
    if job.shards:
        print(f"going on after {len(job.shards)} shard(s)", file=sys.stderr)
    if tokenizer.kind != "bpe":
        workers = 1  # the others take less time than handing text over does
    workers = max(1, min(workers, math.ceil(size / BYTES_A_WORKER)))
    progress = Progress(size, job.bytes_before())
    try:
        with encoder(tokenizer, with_end, workers) as run:
            job.run(run, progress)
    finally:
        progress.close()


def counts(job: Job) -> dict:
    """What the index says of documents, bytes and, of several sources, their parts."""
    totals = {split: job.totals[split] for split in ("train", "val", "test") if split in job.totals}
    size = sum(sum(each["bytes"]) for each in totals.values())
    tokens = sum(sum(each["tokens"]) for each in totals.values())
    index = {"documents": {split: sum(each["documents"]) for split, each in totals.items()}}
    index["bytes_per_token"] = size / tokens
    if len(job.sources) > 1:
        index["used"] = totals
    return index


def move(partial: Path, out: Path) -> dict:
    """Replace the data of out by what is whole in its folder .partial, index.json last."""
    index = read_record(partial)["index"]
    new = {shard["name"] for shard in index["shards"]}
    (out / "index.json").unlink(missing_ok=True)
    for path in old_shards(out):
        if path.name not in new:
            path.unlink()
    for name in ("tokenizer.json", *sorted(new)):
        if (partial / name).exists():  # else an earlier run has moved it
            os.replace(partial / name, out / name)
    write_file(out / "index.json", dump(index))  # last: with it, all is there
    shutil.rmtree(partial, ignore_errors=True)  # a run that waits may make its lock anew
    return index


########################################
#            Command line              #
########################################


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with code 2 and one sentence if it cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    text_sources.add_options(parser)
    add = parser.add_argument
    add("--weight", action="append", type=float, help="share of each source's tokens, in order")
    add("--out", required=True, type=path, help="folder, which also names the shards")
    add(
        "--tokenizer",
        default="bytes",
        help="bytes, chars, gpt2, or a tokenizer.json, its folder, *.tiktoken, vocab.bpe (bytes)",
    )
    add(
        "--shard-tokens",
        type=int,
        default=100_000_000,
        help="most tokens of one shard (%(default)s)",
    )
    add(
        "--binary", action="store_true", help="with bytes: take files that are no text, as they are"
    )
    add("--workers", type=int, default=usable_cores(), help="processes that encode (all cores)")
    add("--force", action="store_true", help="replace whatever data --out holds")
    args = parser.parse_args(argv)
    problem = text_sources.option_problem(args) or option_problem(args)
    if problem:
        parser.error(problem)
    return args


def path(text: str) -> Path:
    """A path that is not blank, for argparse: a blank one would be the folder that one is in."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found a blank")
    return Path(text)


def option_problem(args: argparse.Namespace) -> str | None:
    """What is wrong with the other options, in one sentence."""
    if not 2 <= args.shard_tokens < 2**31:
        return f"argument --shard-tokens: expected 2 to {2**31 - 1}, found {args.shard_tokens}"
    if args.workers < 1:
        return f"argument --workers: expected 1 or more, found {args.workers}"
    if args.binary and args.tokenizer != "bytes":
        return f"argument --binary: expected --tokenizer bytes, found {args.tokenizer}"
    if args.weight is None:
        return None
    if len(args.weight) != len(args.source):
        return (
            f"argument --weight: expected one for each of the {len(args.source)} source(s), found "
            f"{len(args.weight)}"
        )
    if not all(0 < weight < math.inf for weight in args.weight):
        return f"argument --weight: expected numbers above 0, found {min(args.weight)}"
    return None


def print_summary(index: dict) -> None:
    """What the data hold."""
    sizes = {}
    for split, count in index["documents"].items():
        tokens = sum(shard["tokens"] for shard in index["shards"] if shard["split"] == split)
        sizes[split] = tokens
        print(f"{split}: {tokens:,} tokens of {count:,} document(s)")
        used = index.get("used", {}).get(split)
        for number, spec in enumerate(index["source"] if used else []):
            share = used["tokens"][number] / max(1, tokens)
            print(f"  {share:.1%} {spec}: {used['documents'][number]:,} document(s)")
    print(f"vocabulary: {index['vocab_size']:,}   bytes per token: {index['bytes_per_token']:.4f}")
    share, asked = sizes["val"] / (sizes["val"] + sizes["train"]), index["val_fraction"]
    if index["split"] == FILES_SPLIT and not asked / 2 < share < 2 * asked:
        print(
            f"note: val has {share:.0%} of the tokens, since files are not cut; more files, or "
            f"another --val-fraction than {asked}, change that",
            file=sys.stderr,
        )


def next_command(out: Path, index: dict) -> str:
    """A command that trains the preset quickstart on the data, with what it needs to fit them."""
    preset = read_preset("quickstart", None, "")
    length, iterations, batch, val_tokens = (
        int(preset[name])
        for name in ("SEQUENCE_LENGTH", "NUM_ITERATIONS", "BATCH_SIZE", "VAL_TOKENS")
    )
    sizes = {"train": [], "val": [], "test": []}
    for shard in index["shards"]:
        sizes[shard["split"]].append(shard["tokens"])
    changes = []
    longest = min(max(sizes["train"]), max(sizes["val"])) - 1
    if longest < length:
        length = longest
        changes.append(f"SEQUENCE_LENGTH={length}")
    samples = {
        split: sum((tokens - 1) // length for tokens in sizes[split]) for split in ("train", "val")
    }
    if samples["train"] < iterations * batch:
        changes.append("MAX_EPOCHS=0")
    if samples["val"] < val_tokens // length:
        changes.append(f"VAL_TOKENS={samples['val'] * length}")

    stem = out / index["shards"][0]["name"].rsplit("_", 2)[0]
    pattern = glob.escape(str(stem))
    trainer = ROOT / "train_gpt.py"
    if Path.cwd() == ROOT:
        trainer = trainer.relative_to(ROOT)
    words = [
        "PRESET=quickstart",
        "INPUT_BIN=" + shlex.quote(f"{pattern}_train_*.bin"),
        "INPUT_VAL_BIN=" + shlex.quote(f"{pattern}_val_*.bin"),
        "VOCAB_SIZE=0",
        *changes,
        f"python {shlex.quote(str(trainer))}",
    ]
    return " ".join(words)


def any_name_can_be_printed() -> None:
    """Lets standard output take names of files, which may be any bytes."""
    if sys.stdout:  # it may be closed
        sys.stdout.reconfigure(errors="surrogateescape")


def main(argv: list[str] | None = None) -> int:
    """Prepare data and say what was made; exit code 0, or as above with one sentence."""
    args = parse_args(argv)
    any_name_can_be_printed()
    try:
        index = prepare(args)
        any_name_can_be_printed()  # train_gpt.py, which writing shards imports, changes it
    except PermissionError as error:
        print(
            f"prepare_data.py: error: {error.filename}: expected a right to read or write it, "
            f"found {error.strerror}: change its mode, or name another",
            file=sys.stderr,
        )
        return 3
    except (DataError, OSError) as error:
        print(f"prepare_data.py: error: {error}", file=sys.stderr)
        return 3
    except BrokenProcessPool:
        print(
            "prepare_data.py: error: a worker was ended, mostly for want of memory: start the same "
            "command again with fewer --workers, it goes on",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with what is whole", file=sys.stderr)
        return 130
    try:
        print_summary(index)
        print(f"next: {next_command(args.out, index)}", flush=True)
    except BrokenPipeError:  # who reads is gone, and the data are there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
