"""Token shards for train_gpt.py from an installed package, one file, or a glob of files.

    python scripts/prepare_data.py --source package:sympy --tokenizer bytes --out data/sympy

writes sympy_val_000000.bin, sympy_train_000001.bin, ..., tokenizer.json and index.json (recipe,
SHA-256 of shards) to data/sympy. The same input gives the same bytes on every machine. All text is
held in memory.
"""

import argparse
import glob
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from importlib import metadata, util
from itertools import chain
from pathlib import Path

import numpy as np

from harness.contract import DataError
from train_gpt import HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, shard_tokens

SYMPY_VERSION = "1.14.0"  # the version with published losses
MAX_VOCAB = 1 << 16  # shards store uint16
PIECE_CHARS = 1 << 20
FILE_SPLIT = (
    "contiguous: the first floor((1 - val_fraction) * n) of the n bytes (chars, gpt2: characters) "
    "are train"
)
CORPUS_SPLIT = (
    "by file: val if the first 8 bytes (big-endian) of SHA-256(relative path) / 2^64 < val_fraction"
)

Text = bytes | str
Encoder = Callable[[Text], np.ndarray]


def find_package(source: str) -> tuple[dict[str, Path], str | None]:
    """The *.py files of package:NAME, installed, outside folders named tests; and its version.
    Raises DataError."""
    name = source.removeprefix("package:")
    # find_spec would import the parent of a dotted name, and fails for __main__
    spec = util.find_spec(name) if name.isidentifier() and name != "__main__" else None
    roots = (spec and spec.submodule_search_locations) or []
    files = {
        path.relative_to(root).as_posix(): path
        for root in roots
        for path in Path(root).rglob("*.py")
        if "tests" not in path.relative_to(root).parts
    }
    if not files:
        what = "no such files" if spec else "no package"
        raise DataError(
            f"--source {source}: expected an installed top-level package with *.py files, "
            f"found {what}: install it, or name another source"
        )
    distributions = metadata.packages_distributions().get(name)
    version = metadata.version(distributions[0]) if distributions else None
    if name == "sympy" and version != SYMPY_VERSION:
        print(
            f"warning: sympy {version} is installed, not {SYMPY_VERSION}: losses on this data "
            "cannot be compared with those of others; "
            f"run pip install sympy=={SYMPY_VERSION}",
            file=sys.stderr,
        )
    return files, version


def find_files(source: str) -> dict[str, Path]:
    """One file, or the files of a glob (also **) by path relative to its part without wildcards.
    Raises DataError."""
    if Path(source).is_file():
        return {Path(source).name: Path(source)}
    parts = Path(source).parts
    fixed = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    root = Path(*parts[:fixed])  # names relative to it give the same split wherever this folder is
    names = glob.glob("/".join(parts[fixed:]), root_dir=root, recursive=True)
    files = {Path(name).as_posix(): root / name for name in names if (root / name).is_file()}
    if not files:
        what = "a folder" if Path(source).is_dir() else "no such file"
        raise DataError(
            f"--source {source}: expected package:NAME, a file, or a quoted glob like "
            f"'texts/**/*.txt', found {what}: correct the path"
        )
    return files


def decode(raw: bytes, path: Path) -> str:
    """UTF-8 text with its newlines as they are. Raises DataError."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8 text, found an invalid byte at offset {error.start}: "
            "convert the file, or use --tokenizer bytes"
        ) from None


def split_texts(
    texts: dict[str, Text], is_corpus: bool, val_fraction: float
) -> dict[str, list[Text]]:
    """Texts per split: those of a corpus by the hash of their names, one file by a cut. Raises
    DataError."""
    if not is_corpus:
        [text] = texts.values()
        # exact: in floats 1 - 0.9 is less than 0.1
        cut = int(len(text) * (1 - Fraction(str(val_fraction))))
        return {"val": [text[cut:]], "train": [text[:cut]]}
    splits = {"val": [], "train": []}
    for name, text in texts.items():
        value = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        splits["val" if value / 2**64 < val_fraction else "train"].append(text)
    if not all(splits.values()):
        only = "val" if splits["val"] else "train"
        raise DataError(
            f"--val-fraction {val_fraction}: expected files in train and in val, found all "
            f"{len(texts)} in {only}: give more files, another fraction, or just one FILE"
        )
    return splits


def pieces(text: str) -> Iterator[str]:
    """Consecutive pieces of about PIECE_CHARS characters whose GPT-2 tokens are those of the whole
    text."""
    start = 0
    while start < len(text):
        # No GPT-2 token continues from anything else to white space, so a cut between the two
        # changes no token.
        cut = re.compile(r"\S(?=[ \t\r\n])").search(text, start + PIECE_CHARS)
        end = cut.end() if cut else len(text)
        yield text[start:end]
        start = end


def encode_bytes(raw: bytes) -> np.ndarray:
    """The bytes of a text, (n,)."""
    return np.frombuffer(raw, np.uint8)


def gpt2_tokenizer() -> tuple[dict, Encoder]:
    """GPT-2's, as make_tokenizer has it. Raises DataError where its vocabulary cannot be had."""
    try:
        import tiktoken

        encode = tiktoken.get_encoding("gpt2").encode_ordinary
    except (ImportError, OSError, ValueError) as error:
        raise DataError(
            "--tokenizer gpt2: tiktoken could not get its vocabulary "
            f"({type(error).__name__}): run once online with TIKTOKEN_CACHE_DIR=FOLDER set, or use "
            "--tokenizer bytes"
        ) from None

    def encode_gpt2(text: str) -> np.ndarray:
        return np.fromiter(chain.from_iterable(map(encode, pieces(text))), np.uint16)

    return {"kind": "gpt2", "vocab_size": 50257, "eot_id": 50256}, encode_gpt2


def chars_tokenizer(texts: Iterable[str], is_corpus: bool) -> tuple[dict, Encoder]:
    """The characters of the texts, as make_tokenizer has it. Raises DataError where they are too
    many."""
    chars = sorted(set().union(*texts))
    vocab_size = len(chars) + (1 if is_corpus else 0)
    if vocab_size > MAX_VOCAB:
        raise DataError(
            f"--tokenizer chars: expected a vocabulary of at most {MAX_VOCAB}, found {vocab_size}: "
            "use --tokenizer bytes"
        )
    ids = np.zeros(ord(chars[-1]) + 1, np.uint16)
    ids[[ord(char) for char in chars]] = np.arange(len(chars))

    def encode_chars(text: str) -> np.ndarray:
        return ids[np.frombuffer(text.encode("utf-32-le"), "<u4")]

    eot_id = len(chars) if is_corpus else None
    about = {"kind": "chars", "vocab_size": vocab_size, "eot_id": eot_id, "chars": chars}
    return about, encode_chars


def make_tokenizer(kind: str, texts: Iterable[Text], is_corpus: bool) -> tuple[dict, Encoder]:
    """Contents of tokenizer.json, and the function from a text to its tokens, (n,) integers. Raises
    DataError."""
    if kind == "bytes":
        return {"kind": kind, "vocab_size": 257, "eot_id": 256}, encode_bytes
    if kind == "gpt2":
        return gpt2_tokenizer()
    return chars_tokenizer(texts, is_corpus)


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write the parts to a temporary name beside path, sync, rename: path is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: str | os.PathLike, tokens: np.ndarray) -> None:
    """Write tokens, (n,) integers below 65536 with n >= 1, as one shard, atomically. Raises
    DataError."""
    if tokens.ndim != 1 or not tokens.size or tokens.min() < 0 or tokens.max() >= MAX_VOCAB:
        raise DataError(
            f"{path}: expected tokens (n,) in 0..{MAX_VOCAB - 1}, "
            f"found {tokens.dtype} {tokens.shape}"
        )
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    write_file(Path(path), header.data, np.ascontiguousarray(tokens, "<u2").data)


def old_shards(out: Path) -> list[Path]:
    """What the trainer's globs of this folder match."""
    stem = glob.escape(out.absolute().name)
    return [*out.glob(f"{stem}_train_*.bin"), *out.glob(f"{stem}_val_*.bin")]


def find_index(out: Path, recipe: dict) -> dict | None:
    """The index of a folder that holds all of recipe, None if any is missing. Raises DataError for
    other data."""
    try:
        index = json.loads((out / "index.json").read_bytes())
    except (FileNotFoundError, ValueError):
        index = {}
    same = recipe.items() <= index.items()
    if not same and (index or old_shards(out)):
        different = ", ".join(key for key in recipe if recipe[key] != index.get(key))
        raise DataError(
            f"--out {out}: expected no data or that of this recipe, found another {different}: "
            "give another folder, or --force to replace its data"
        )
    try:
        whole = same and all(
            shard_tokens(out / shard["name"]) == shard["tokens"] for shard in index["shards"]
        )
    except DataError:
        whole = False
    return index if whole and (out / "tokenizer.json").is_file() else None


def write_shards(
    folder: Path, stem: str, tokens: dict[str, np.ndarray], per_shard: int
) -> list[dict]:
    """Shards of tokens["val"] and tokens["train"], (n,) each, in a folder; returns their entries in
    the index."""
    shards = []
    for split in ("val", "train"):
        for start in range(0, len(tokens[split]), per_shard):
            path = folder / f"{stem}_{split}_{len(shards):06d}.bin"
            write_shard(path, tokens[split][start : start + per_shard])
            shards.append(
                {
                    "name": path.name,
                    "split": split,
                    "tokens": shard_tokens(path),
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                }
            )
    return shards


def write_dataset(
    out: Path, tokens: dict[str, np.ndarray], per_shard: int, about: dict, index: dict
) -> dict:
    """Replace the data of out by shards of tokens["val"] and tokens["train"], (n,) each; returns
    the whole index."""
    out.mkdir(parents=True, exist_ok=True)
    # old data stays until the new is whole
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as staging:
        shards = write_shards(Path(staging), out.absolute().name, tokens, per_shard)
        write_file(Path(staging, "tokenizer.json"), json.dumps(about, indent=2).encode(), b"\n")
        for path in [out / "index.json", out / "tokenizer.json", *old_shards(out)]:
            path.unlink(missing_ok=True)
        for path in sorted(Path(staging).iterdir()):
            os.replace(path, out / path.name)
    index = index | {"shards": shards}
    # last: with it, all is there
    write_file(out / "index.json", json.dumps(index, indent=2).encode(), b"\n")
    return index


def encode_splits(
    splits: dict[str, list[Text]], encode: Encoder, eot_id: int | None, args: argparse.Namespace
) -> dict[str, np.ndarray]:
    """The tokens of each split, (n,), with the id before each text where there is one. Raises
    DataError for fewer than two."""
    eot = [] if eot_id is None else [np.array([eot_id], np.uint16)]
    tokens = {}
    for split, texts in splits.items():
        tokens[split] = np.concatenate([part for text in texts for part in (*eot, encode(text))])
    for split, ids in tokens.items():
        if len(ids) < 2:  # one input and its target
            raise DataError(
                f"--source {args.source}: expected at least 2 tokens in {split}, found {len(ids)}: "
                f"give more text, or change --val-fraction {args.val_fraction}"
            )
    return tokens


def prepare(args: argparse.Namespace) -> dict:
    """Write the data that args ask for unless it is there, and return its index. Raises
    DataError."""
    is_corpus = not Path(args.source).is_file()
    if args.source.startswith("package:") and is_corpus:
        files, version = find_package(args.source)
    else:
        files = find_files(args.source)
        version = None
    raws = {name: path.read_bytes() for name, path in sorted(files.items())}
    listing = "".join(f"{hashlib.sha256(raw).hexdigest()}  {name}\n" for name, raw in raws.items())
    recipe = {
        "source": args.source,
        "source_version": version,
        "source_sha256": hashlib.sha256(listing.encode()).hexdigest(),
        "tokenizer": args.tokenizer,
        "split": CORPUS_SPLIT if is_corpus else FILE_SPLIT,
        "val_fraction": args.val_fraction,
        "shard_tokens": args.shard_tokens,
    }
    index = None if args.force else find_index(args.out, recipe)
    if index:
        print(f"already there: {args.out}")
        return index

    if not any(raws.values()):
        raise DataError(
            f"--source {args.source}: expected text, found {len(raws)} file(s) without any: "
            "name another"
        )
    texts = raws
    if args.tokenizer != "bytes":
        texts = {name: decode(raw, files[name]) for name, raw in raws.items()}
    splits = split_texts(texts, is_corpus, args.val_fraction)
    about, encode = make_tokenizer(args.tokenizer, texts.values(), is_corpus)
    tokens = encode_splits(splits, encode, about["eot_id"] if is_corpus else None, args)
    index = recipe | {
        "vocab_size": about["vocab_size"],
        "eot_id": about["eot_id"],
        "documents": {split: len(splits[split]) for split in ("train", "val")},
        "bytes_per_token": sum(map(len, raws.values())) / sum(map(len, tokens.values())),
    }
    return write_dataset(args.out, tokens, args.shard_tokens, about, index)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with code 2 and one sentence if it cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--source", required=True, help="package:NAME, a file, or a quoted glob")
    parser.add_argument(
        "--out", required=True, type=Path, help="folder, which also names the shards"
    )
    parser.add_argument("--tokenizer", choices=("bytes", "chars", "gpt2"), default="bytes")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        help="part of the files, or of the one file's end",
    )
    parser.add_argument(
        "--shard-tokens", type=int, default=100_000_000, help="most tokens of one shard"
    )
    parser.add_argument("--force", action="store_true", help="replace whatever data --out holds")
    args = parser.parse_args(argv)
    if not 0 < args.val_fraction < 1:
        parser.error(
            "argument --val-fraction: expected 0 < number < 1, such as 0.1, "
            f"found {args.val_fraction}"
        )
    if not 2 <= args.shard_tokens < 2**31:
        parser.error(
            f"argument --shard-tokens: expected 2 to {2**31 - 1}, found {args.shard_tokens}"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Prepare data and say what was made; exit code 0, or 3 with one sentence if the data cannot be
    made."""
    args = parse_args(argv)
    try:
        index = prepare(args)
    except (DataError, OSError) as error:
        print(f"prepare_data.py: error: {error}", file=sys.stderr)
        return 3
    for split, count in index["documents"].items():
        tokens = sum(shard["tokens"] for shard in index["shards"] if shard["split"] == split)
        print(f"{split}: {tokens:,} tokens of {count:,} document(s)")
    print(f"vocabulary: {index['vocab_size']:,}   bytes per token: {index['bytes_per_token']:.4f}")
    stem = args.out / index["shards"][0]["name"].rsplit("_", 2)[0]
    print(
        f"next: PRESET=quickstart INPUT_BIN='{stem}_train_*.bin' "
        f"INPUT_VAL_BIN='{stem}_val_*.bin' VOCAB_SIZE=0 python train_gpt.py"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
