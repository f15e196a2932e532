"""Text from anywhere, as documents in pieces, and its split into train, val and test.

A source is package:NAME (the Python source of an installed package), hf:OWNER/NAME[/CONFIG]
(parquet files of the Hugging Face hub), text:TEXT, a file, a quoted glob, or a folder. A file is
one document; of .jsonl, .ndjson and .parquet each row is one. Names that end in .gz or .zst are
unpacked. No more than a piece of a file, a row or an article is held in memory.
"""

import argparse
import codecs
import concurrent.futures
import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import shlex
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from store.contract import DataError
from tokenization import CUT

SYMPY_VERSION = "1.14.0"  # the version with published losses
CHUNK = 1 << 20  # bytes that are read at once
PIECE_CHARS = 1 << 20
LONGEST_PIECE = 1 << 24  # characters; a text without a place to cut is cut here all the same
BOM = codecs.BOM_UTF8
FILE_SPLIT = (
    "contiguous: the first floor((1 - val_fraction) * n) of the n bytes (chars, gpt2: characters) "
    "are train"
)
FILES_SPLIT = (
    "by file: val if the first 8 bytes (big-endian) of SHA-256(relative path) / 2^64 < val_fraction"
)
ROWS_SPLIT = (
    "by document: val if the first 8 bytes (big-endian) of SHA-256(relative path, of a row "
    "path:number from 1) / 2^64 < val_fraction"
)
OWN_SPLIT = "as published: the source's own train, validation and test"
WIKITEXT = {"wiki.train": "train", "wiki.valid": "val", "wiki.test": "test"}
HUB_SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}

Text = bytes | str


class Reading(NamedTuple):
    """How files become documents."""

    as_text: bool = True  # str of checked UTF-8, else the bytes as they are
    binary: bool = False  # every file is one document, neither checked nor unpacked
    newline: str = "keep"  # lf: \r\n becomes \n, and a byte-order mark goes
    text_field: str = "text"  # of rows
    val_fraction: float = 0.1


class Piece(NamedTuple):
    """A part of a document, cut where no token goes across."""

    name: str
    starts: bool  # whether it is the first of its document
    text: Text


@dataclass
class Source:
    """Where documents come from: files by their names within it, or a text's own bytes."""

    spec: str
    files: dict[str, Path | bytes]
    version: str | None = None
    sha256: str = ""  # of the listing of the files' hashes, as sha256sum prints it
    own_splits: dict[str, list[str]] = field(default_factory=dict)  # names of files
    is_wikitext: bool = False  # lines or rows that make articles
    notes: list[str] = field(default_factory=list)
    lengths: dict[str, int] = field(default_factory=dict)  # by `survey`: characters or bytes
    hub_files: list[tuple[str, str, str]] = field(default_factory=list)  # name, commit, SHA-256

    def has_rows(self, name: str, reading: Reading) -> bool:
        """Whether a file holds several documents: rows, or the lines of WikiText's articles."""
        return not reading.binary and (self.is_wikitext or kind_of(name) != "text")

    def is_one_text(self, reading: Reading) -> bool:
        """Whether it is a single document, to be cut in two."""
        if self.own_splits or len(self.files) != 1 or self.spec.startswith("package:"):
            return False
        [(name, path)] = self.files.items()
        is_named = isinstance(path, bytes) or is_file(self.spec)
        return is_named and not self.has_rows(name, reading)

    def split_rule(self, reading: Reading) -> str:
        """In words, for the records."""
        if "val" in self.own_splits:
            return OWN_SPLIT
        if self.is_one_text(reading):
            return FILE_SPLIT
        has_rows = any(self.has_rows(name, reading) for name in self.names())
        rule = ROWS_SPLIT if has_rows else FILES_SPLIT
        return f"{rule}; test as published" if self.own_splits else rule

    def names(self) -> list[str]:
        return sorted(self.files) or [name for name, _, _ in self.hub_files]

    def splits(self) -> tuple[str, ...]:
        """Those that it has, in the order of writing."""
        return ("val", "train", "test") if "test" in self.own_splits else ("val", "train")

    def files_of(self, split: str) -> tuple[list[str], bool]:
        """The names of files with documents of a split, and whether others' are among them."""
        if split == "test" or "val" in self.own_splits:
            return self.own_splits[split], False
        return self.own_splits.get("train") or sorted(self.files), True

    def pieces(self, split: str, reading: Reading) -> Iterator[Piece]:
        """All documents of a split in order, in pieces. Raises DataError, OSError."""
        if split not in self.splits():
            return
        if self.is_one_text(reading):
            [name] = self.files
            yield from in_pieces(name, self.part_of_text(split, reading), reading)
            return
        names, are_mixed = self.files_of(split)
        for name, text in self.documents(names, reading):
            if not are_mixed or split_of(name, reading.val_fraction) == split:
                yield from in_pieces(name, text, reading)

    def documents(self, names: list[str], reading: Reading) -> Iterator[tuple[str, Iterable[Text]]]:
        """Name and text of each file, of each row that is not empty, or of WikiText's articles.
        Raises DataError, OSError."""
        if names and self.is_wikitext and not reading.binary:
            # Rows of the hub are lines, "" for blank ones; an article may go on in the next file.
            lines = (row or " \n" for name in names for row in rows_of(self.files[name], reading))
            yield from numbered(names[0], articles(lines), reading)
            return
        for name in names:
            if self.has_rows(name, reading):
                yield from numbered(name, rows_of(self.files[name], reading), reading)
            else:
                yield name, text_of(self.files[name], reading)

    def part_of_text(self, split: str, reading: Reading) -> Iterator[Text]:
        """The first part of a single document, or what follows; `survey` has its length."""
        [(name, path)] = self.files.items()
        # exact: in floats 1 - 0.9 is less than 0.1
        cut = int(self.lengths[name] * (1 - Fraction(str(reading.val_fraction))))
        start = 0
        for chunk in text_of(path, reading):
            middle = min(max(cut - start, 0), len(chunk))
            part = chunk[:middle] if split == "train" else chunk[middle:]
            start += len(chunk)
            if part:
                yield part


def numbered(
    name: str, texts: Iterable[str], reading: Reading
) -> Iterator[tuple[str, Iterable[Text]]]:
    """Those of the texts of a file that are not empty, as documents name:number from 1."""
    for number, text in enumerate(texts, 1):
        if text:
            yield f"{name}:{number}", [text if reading.as_text else text.encode()]


########################################
#               Options                #
########################################


def add_options(parser: argparse.ArgumentParser) -> None:
    """What says which text a script reads, and how."""
    default = Reading()
    add = parser.add_argument
    add(
        "--source",
        action="append",
        help="package:NAME, hf:OWNER/NAME[/CONFIG], a file, a quoted glob, a folder; also several",
    )
    add(
        "--text",
        action="append",
        dest="source",
        type=lambda text: "text:" + text,
        help="a text itself, as a source",
    )
    add(
        "--val-fraction",
        type=float,
        default=default.val_fraction,
        help="part of the documents, or of a file's end (%(default)s)",
    )
    add(
        "--text-field",
        default=default.text_field,
        help="field or column with the text of a row (%(default)s)",
    )
    add(
        "--newline",
        choices=("keep", "lf"),
        default=default.newline,
        help=r"lf: \n for \r\n, and no byte-order mark at the start",
    )


def option_problem(args: argparse.Namespace) -> str | None:
    """What is wrong with these options, in one sentence."""
    if not args.source:
        return "argument --source: expected a package, file, folder or --text, found none"
    if not 0 < args.val_fraction < 1:
        return (
            "argument --val-fraction: expected 0 < number < 1, such as 0.1, "
            f"found {args.val_fraction}"
        )
    return None


def reading_of(args: argparse.Namespace, **more: Any) -> Reading:
    """The Reading that these options ask for."""
    return Reading(
        val_fraction=args.val_fraction, text_field=args.text_field, newline=args.newline, **more
    )


########################################
#               Finding                #
########################################


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


def is_file(source: str) -> bool:
    """Whether a file has this very name; False where no file could have it."""
    try:
        return Path(source).is_file()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def find_files(source: str) -> dict[str, Path]:
    """A file, all of a folder that are not hidden, or those of a glob (also **); by path relative
    to the part without wildcards. Raises DataError, OSError."""
    if not source:  # as of a variable that is not set: it would be the folder that one is in
        raise DataError("--source: expected a package, file or folder, found a blank: name one")
    if is_file(source):
        return {Path(source).name: Path(source)}
    if Path(source).is_dir():
        return files_below(Path(source))
    parts = Path(source).parts
    fixed = 0  # parts that exist as they are written, [ or not
    while fixed < len(parts) and Path(*parts[: fixed + 1]).exists():
        fixed += 1
    while fixed < len(parts) and not set(parts[fixed]) & set("*?["):
        fixed += 1
    root = Path(*parts[:fixed])  # names relative to it give the same split wherever this folder is
    pattern = "/".join(parts[fixed:])
    names = glob.glob(pattern, root_dir=root, recursive=True) if pattern else []
    files = {Path(name).as_posix(): root / name for name in names if (root / name).is_file()}
    if not files:
        raise DataError(
            f"--source {source}: expected package:NAME, hf:OWNER/NAME, a file, a folder, or a "
            "quoted glob like 'texts/**/*.txt', found no such file: correct the path"
        )
    return files


def is_below(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def files_below(folder: Path) -> dict[str, Path]:
    """The files in a folder and those below it, also through links, but for hidden ones, by
    relative path. Raises DataError, OSError."""
    files, seen = {}, set()

    def fail(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link to a folder above it would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(root, name) for name in names if not name.startswith(".")):
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path
    if not files:
        raise DataError(f"--source {folder}: expected a folder with text, found no file: fill it")
    return files


def open_source(
    spec: str, reading: Reading, revision: str | None = None, without: Path | None = None
) -> Source:
    """A source whose files are found, told from other data, and hashed; those of the hub only
    named. `revision` is the hub's to take; `without` a folder that is no part of it. Raises
    DataError, OSError."""
    if spec.startswith("hf:") and not is_file(spec):
        return find_on_hub(spec, revision)
    if spec.startswith("text:") and not is_file(spec):
        text = spec.removeprefix("text:").encode(errors="surrogateescape")  # as it was typed
        source = Source(spec, {"text": text})
    elif spec.startswith("package:") and not is_file(spec):
        files, version = find_package(spec)
        source = Source(spec, files, version)
    else:
        files = find_files(spec)
        if without and without.exists():
            files = {name: path for name, path in files.items() if not is_below(path, without)}
        source = Source(spec, files)
    find_wikitext(source)
    if not reading.binary:
        leave_out_other_data(source)
    hashes = {name: hash_of(source.files[name]) for name in source.names()}
    leave_out_copies(source, hashes)
    listing = "".join(f"{hashes[name]}  {name}\n" for name in source.names())
    source.sha256 = hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
    return source


def hash_of(path: Path | bytes) -> str:
    """SHA-256 of a file as it is, hex."""
    if isinstance(path, bytes):
        return hashlib.sha256(path).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_wikitext(source: Source) -> None:
    """Takes WikiText's files, told by name, in their own splits, where train and valid are."""
    parts = {}
    for name in source.names():
        stem, ending = os.path.splitext(os.path.basename(name))
        if stem in WIKITEXT and ending in (".raw", ".tokens"):
            parts.setdefault(WIKITEXT[stem], []).append(name)
    if {"train", "val"} <= parts.keys() and all(len(names) == 1 for names in parts.values()):
        kept = [name for names in parts.values() for name in names]
        others = len(source.files) - len(kept)
        if others:
            source.notes.append(f"{others} file(s) beside WikiText's are left out")
        source.files = {name: source.files[name] for name in kept}
        source.own_splits = parts
        source.is_wikitext = True


def leave_out_copies(source: Source, hashes: dict[str, str]) -> None:
    """Keeps the first, by name, of the files with the same content; empty ones stay."""
    first, copies = {}, []
    empty = hash_of(b"")
    for name in sorted(source.files):
        if first.setdefault(hashes[name], name) != name and hashes[name] != empty:
            copies.append(name)
    for name in copies:
        del source.files[name]
        for names in source.own_splits.values():
            if name in names:
                names.remove(name)
    if copies:
        original = first[hashes[copies[0]]]
        source.notes.append(
            f"{len(copies)} file(s) have the content of another and are left out, "
            f"such as {copies[0]}, which is {original}"
        )


########################################
#       Telling text from other        #
########################################

MAGIC = {  # how files begin that are no text
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"PK\x03\x04": "a zip archive",
    b"%PDF-": "PDF",
    b"PAR1": "parquet",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x7fELF": "a program",
    b"SQLite format 3": "an SQLite database",
    b"\x88\xd8\x34\x01": "a shard of tokens",
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
CONTROL = bytes({*range(32), 127} - {*b"\t\n\v\f\r\b\x1b"})


def looks_like(head: bytes) -> str | None:
    """What the beginning of a file, some KB, says that it is; None for text."""
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive"
    nulls = head.count(0)
    if nulls > len(head) / 4 and max(head[::2].count(0), head[1::2].count(0)) > 0.9 * nulls:
        return "UTF-16"
    controls = len(head) - len(head.translate(None, CONTROL))
    # Text in old 8-bit encodings has next to no control characters. Other data is seldom UTF-8,
    # where more of them are let pass.
    return "binary data" if controls > len(head) * (0.1 if is_utf8(head) else 0.02) else None


def is_utf8(head: bytes) -> bool:
    """Whether bytes are UTF-8, of which the last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def advice_for(kind: str, path: Path) -> str:
    """What to do about a file that is no text."""
    packed = {"gzip": ".gz", "zstd": ".zst", "parquet": ".parquet"}
    if kind in packed:
        return f"give it the ending {packed[kind]}"
    if kind.startswith("UTF"):
        old, new = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
        return f"convert it: iconv -f {kind} -t UTF-8 {old} > {new}"
    return "name text"


def leave_out_other_data(source: Source) -> None:
    """Leaves out of a folder what is no text, and says so in the notes; raises DataError for such a
    file that was named, or that a glob was to find."""
    is_folder = os.path.isdir(source.spec)
    left_out = []
    for name in [name for name in source.names() if kind_of(name) == "text"]:
        path = source.files[name]
        kind = looks_like(next(bytes_of(path), b"")[: 1 << 16])
        if not kind:
            continue
        if not is_folder:
            raise DataError(
                f"{path}: expected text, found what looks like {kind}: {advice_for(kind, path)}, "
                "or take its bytes as they are with --tokenizer bytes --binary"
            )
        left_out.append(f"{name} ({kind})")
        del source.files[name]
    if left_out and not source.files:
        raise DataError(
            f"--source {source.spec}: expected a folder with text, found only {left_out[0]} and "
            "its like: name another"
        )
    if left_out:
        source.notes.append(
            f"{len(left_out)} file(s) look like other data and are left out, such as {left_out[0]}"
        )


########################################
#               Reading                #
########################################


def kind_of(name: str) -> str:
    """text, jsonl or parquet, by the end of a name."""
    stem = name.lower().removesuffix(".gz").removesuffix(".zst")
    if stem.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    return "parquet" if stem.endswith(".parquet") else "text"


def read(file: Any) -> Iterator[bytes]:
    """The rest of an open file in chunks."""
    return iter(lambda: file.read(CHUNK), b"")


def bytes_of(path: Path | bytes, unpack: bool = True) -> Iterator[bytes]:
    """The bytes of a file in chunks, unpacked where its name says so. Raises DataError, OSError."""
    if isinstance(path, bytes):
        yield path
        return
    ending = path.suffix.lower() if unpack else ""
    with open(path, "rb") as file:
        try:
            if ending == ".gz":
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield from read(unpacked)
            elif ending == ".zst":
                yield from read_zstd(file, path)
            else:
                yield from read(file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{path}: expected what {ending} packs, found {str(error) or 'its end too early'}: "
                "fetch or make the file again"
            ) from None


def read_zstd(file: Any, path: Path) -> Iterator[bytes]:
    """What the frames of a file pack, in chunks. Raises DataError, EOFError."""
    try:
        import zstandard
    except ImportError:
        yield from read_zstd_by_python(file, path)
        return
    window = 1 << 31  # of files packed with --long=31; the library's own limit is lower
    frame = zstandard.ZstdDecompressor(max_window_size=window).decompressobj()
    try:
        for packed in read(file):
            while packed:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor(max_window_size=window).decompressobj()
                yield frame.decompress(packed)
                packed = frame.unused_data
    except zstandard.ZstdError as error:
        raise EOFError(error) from None
    if not frame.eof:
        raise EOFError


def read_zstd_by_python(file: Any, path: Path) -> Iterator[bytes]:
    """As read_zstd, by the library that Python has from 3.14. Raises DataError, EOFError."""
    try:
        from compression import zstd
    except ImportError:
        raise DataError(
            f"{path}: reading .zst needs zstandard: run pip install zstandard, or unpack the file"
        ) from None
    try:
        yield from read(zstd.open(file))
    except zstd.ZstdError as error:
        raise EOFError(error) from None


def with_lf(chunks: Iterable[bytes]) -> Iterator[bytes]:
    r"""The same bytes with \n for \r\n and without a byte-order mark at the start."""
    held = b""
    for number, chunk in enumerate(chunks):
        chunk = held + (chunk.removeprefix(BOM) if number == 0 else chunk)
        held = b"\r" if chunk.endswith(b"\r") else b""  # \n may follow
        yield chunk.removesuffix(held).replace(b"\r\n", b"\n")
    yield held


def text_of(path: Path | bytes, reading: Reading) -> Iterator[Text]:
    """One file's text in chunks, str or bytes. Raises DataError for what is not UTF-8."""
    chunks = bytes_of(path, unpack=not reading.binary)
    if reading.newline == "lf":
        chunks = with_lf(chunks)
    if not reading.as_text:
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    for chunk in itertools.chain(chunks, [None]):
        held = len(decoder.getstate()[0])
        try:
            yield decoder.decode(chunk or b"", final=chunk is None)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: expected UTF-8 text, found an invalid byte at offset "
                f"{offset - held + error.start}: convert the file, or use --tokenizer bytes"
            ) from None
        offset += len(chunk or b"")


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """A text in pieces of about PIECE_CHARS characters whose tokens are those of the whole text."""
    held = ""
    for chunk in chunks:
        held += chunk
        while len(held) > PIECE_CHARS:
            cut = CUT.search(held, PIECE_CHARS - 1)
            if cut is None and len(held) < LONGEST_PIECE:
                break  # there may be one in what follows
            end = cut.end() if cut else LONGEST_PIECE
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def in_pieces(name: str, text: Iterable[Text], reading: Reading) -> Iterator[Piece]:
    """The pieces of a document: of an empty one, one that is empty."""
    is_empty = True
    for part in pieces(text) if reading.as_text else text:
        yield Piece(name, is_empty, part)
        is_empty = False
    if is_empty:
        yield Piece(name, True, "" if reading.as_text else b"")


def split_of(name: str, val_fraction: float) -> str:
    """The split of a document, by its name: a new one moves no other."""
    value = int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8])
    return "val" if value / 2**64 < val_fraction else "train"


########################################
#                 Rows                 #
########################################


def rows_of(path: Path, reading: Reading) -> Iterator[str]:
    """The texts of a file's rows; of a text file, its lines with their ends. Raises DataError."""
    kind = kind_of(path.name)
    if kind == "parquet":
        rows = parquet_rows(path, reading.text_field)
    elif kind == "jsonl":
        rows = jsonl_rows(path, lines_of(bytes_of(path)), reading.text_field)
    else:
        checked = text_of(path, reading._replace(as_text=True))
        rows = (line.decode() for line in lines_of(chunk.encode() for chunk in checked))
    if reading.newline == "lf":
        rows = (row.removeprefix("\ufeff").replace("\r\n", "\n") for row in rows)
    return rows


def lines_of(chunks: Iterable[bytes]) -> Iterator[bytes]:
    r"""Lines with their \n."""
    held = b""
    for chunk in chunks:
        *lines, held = (held + chunk).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if held:
        yield held


def jsonl_rows(path: Path, lines: Iterable[bytes], text_field: str) -> Iterator[str]:
    """The texts in lines of JSON; blank lines have none. Raises DataError."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = "no JSON"
        try:
            row = json.loads(line)
            found = f"the fields {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
            text = row[text_field]
            if b"\\u" in line:
                text.encode()  # half of a pair of surrogates is no text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            text = 0
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"{path}: expected an object with text in its field {text_field} on line {number}, "
                f"found {found}: set --text-field, or correct the line"
            )
        yield text or ""


def open_parquet(path: Path) -> Any:
    """A pyarrow.parquet.ParquetFile. Raises DataError, OSError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow: run pip install pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid:
        raise DataError(
            f"{path}: expected parquet, found something else: fetch or make the file again"
        ) from None


def parquet_rows(path: Path, text_field: str) -> Iterator[str]:
    """The texts in a column; "" for none. Raises DataError, OSError."""
    with open_parquet(path) as file:
        columns = file.schema_arrow
        kind = str(columns.field(text_field).type) if text_field in columns.names else "none"
        if kind not in ("string", "large_string", "string_view"):
            raise DataError(
                f"{path}: expected a column {text_field} of text, found the columns "
                f"{', '.join(columns.names)}: set --text-field"
            )
        for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                yield text or ""


HEADING = re.compile(r" = (?!= ).* = \n?")


def articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's articles, each from its heading of level 1, after a blank line, to the next; what
    comes before the first belongs to it."""
    article, after_blank = [], True
    for line in lines:
        if after_blank and HEADING.fullmatch(line) and any(map(str.strip, article)):
            yield "".join(article)
            article = []
        article.append(line)
        after_blank = not line.strip()
    if article:
        yield "".join(article)


########################################
#               The hub                #
########################################


STALL_S = 120.0  # without a byte, until a request is given up


def stall_limit() -> float:
    """Seconds; more where HF_HUB_DOWNLOAD_TIMEOUT, the hub's own for one answer, asks for it."""
    asked = os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", "")
    return max(STALL_S, float(asked) if asked.isdecimal() else 0.0)


def unless_stalled(call: Callable[[], Any], folder: Path) -> Any:
    """The result of call(), which may download into unfinished files below a folder.

    It is left behind where these do not change for stall_limit(), as when a server asks to come
    again tomorrow, or at an interrupt; what is unfinished then goes. Raises TimeoutError.
    """
    answer = concurrent.futures.Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # the caller's
            answer.set_exception(error)

    before = {path.name for path in folder.rglob("*.incomplete")}
    threading.Thread(target=run, daemon=True).start()
    size, since = 0, time.monotonic()
    try:
        while not concurrent.futures.wait([answer], min(1.0, stall_limit())).done:
            size_before, size = size, unfinished_bytes(folder)
            if size != size_before:
                since = time.monotonic()
            elif time.monotonic() - since > stall_limit():
                raise TimeoutError(f"nothing for {stall_limit():.0f} s")
    except BaseException:
        for path in folder.rglob("*.incomplete"):
            if path.name not in before:
                path.unlink(missing_ok=True)
        raise
    return answer.result()


def unfinished_bytes(folder: Path) -> int:
    """Size of all files below a folder that the hub's client has not finished."""
    size = 0
    for path in folder.rglob("*.incomplete"):
        with contextlib.suppress(FileNotFoundError):  # finished meanwhile
            size += path.stat().st_size
    return size


def check_endpoint() -> None:
    """Raises DataError where HF_ENDPOINT is no address: the hub's client would not even load."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        address = urlsplit(endpoint)
        is_sound = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:
        is_sound = False
    if not is_sound:
        raise DataError(
            f"HF_ENDPOINT={endpoint}: expected an address such as https://huggingface.co, found "
            "something else: correct it, or unset it"
        )


def ask_hub(spec: str, call: Any) -> Any:
    """The result of call(), a request to the hub. Raises DataError where there is no answer."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    owner_and_name = spec.removeprefix("hf:").split("/")[:2]
    folder = Path(HF_HUB_CACHE, "--".join(["datasets", *owner_and_name]))
    try:
        return unless_stalled(call, folder)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of this machine's disk
        status = getattr(getattr(error, "response", None), "status_code", None)
        found = f"HTTP {status}" if status else type(error).__name__
        if isinstance(error, TimeoutError) and str(error).startswith("nothing for"):
            found = str(error)
    except Exception as error:  # the client's transports share no class of errors
        found = type(error).__name__
    raise DataError(
        f"--source {spec}: expected an answer of the Hugging Face hub, found {found}: correct the "
        "name, set HF_TOKEN, or fetch the files where there is a network and name their folder"
    )


def hub_client(spec: str) -> Any:
    """huggingface_hub.HfApi. Raises DataError where it is not installed, or has no address."""
    check_endpoint()
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise DataError(
            f"--source {spec}: needs huggingface_hub: run pip install huggingface_hub"
        ) from None
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def find_on_hub(spec: str, revision: str | None) -> Source:
    """The parquet files of hf:OWNER/NAME[/CONFIG], named but not fetched. Raises DataError."""
    owner, _, rest = spec.removeprefix("hf:").partition("/")
    name, _, config = rest.partition("/")
    if not owner or not name:
        raise DataError(
            f"--source {spec}: expected hf:OWNER/NAME or hf:OWNER/NAME/CONFIG, such as "
            "hf:Salesforce/wikitext/wikitext-103-raw-v1"
        )
    client = hub_client(spec)
    info = ask_hub(
        spec,
        lambda: client.dataset_info(f"{owner}/{name}", revision=revision, files_metadata=True),
    )
    hashes = {}
    for file in info.siblings or ():
        if file.rfilename.endswith(".parquet"):
            hashes[file.rfilename] = file.lfs.sha256 if file.lfs else file.blob_id
    configs = sorted({os.path.dirname(path) for path in hashes})
    if not config and len(configs) == 1:
        config = configs[0]
    chosen = {path: digest for path, digest in hashes.items() if os.path.dirname(path) == config}
    if not chosen:
        found = f"parquet in {', '.join(configs)}" if configs else "no parquet file"
        raise DataError(
            f"--source {spec}: expected parquet files in one folder, found {found}: "
            "name a folder, or download other formats and name their folder"
        )
    source = Source(spec, {}, info.sha, is_wikitext=name.lower() == "wikitext")
    listing = "".join(f"{chosen[path]}  {path}\n" for path in sorted(chosen))
    source.sha256 = hashlib.sha256(listing.encode()).hexdigest()
    source.hub_files = [(path, info.sha, chosen[path]) for path in sorted(chosen)]
    source.own_splits = hub_splits(sorted(chosen))
    return source


def hub_splits(paths: list[str]) -> dict[str, list[str]]:
    """The files of a source's own splits by their names, {} where it has train alone."""
    parts = {}
    for path in paths:
        word = re.match(r"[a-z]+", os.path.basename(path))
        if word and word[0] in HUB_SPLITS:
            parts.setdefault(HUB_SPLITS[word[0]], []).append(path)
    return parts if "train" in parts and len(parts) > 1 else {}


def fetch(source: Source) -> None:
    """Gives a source of the hub its files, from the client's cache where they are there. Raises
    DataError, OSError."""
    owner_and_name = "/".join(source.spec.removeprefix("hf:").split("/")[:2])
    for path, commit, digest in source.hub_files:
        download = partial(
            hub_client(source.spec).hf_hub_download,
            owner_and_name,
            path,
            repo_type="dataset",
            revision=commit,
        )
        local = Path(ask_hub(source.spec, download))
        if len(digest) == 64 and hash_of(local) != digest:
            raise DataError(
                f"{local}: expected SHA-256 {digest}, found another: remove it and start again"
            )
        source.files[path] = local


########################################
#               Survey                 #
########################################


class Survey(NamedTuple):
    """What a look at all of a source's text says."""

    alphabet: str  # sorted, where it was asked for
    bytes: int  # of the text; about, where there are rows


def survey(source: Source, reading: Reading, with_alphabet: bool) -> Survey:
    """Looks at every file before anything is written: measures texts, checks UTF-8, and notes
    byte-order marks and carriage returns. Raises DataError, OSError."""
    seen = np.zeros(sys.maxunicode + 1, bool)
    total, marks, returns = 0, 0, 0
    for name in source.names():
        path = source.files[name]
        if not source.has_rows(name, reading):
            source.lengths[name] = 0
            has_mark = has_returns = False
            for number, chunk in enumerate(text_of(path, reading)):
                is_text = isinstance(chunk, str)
                mark, crlf = ("\ufeff", "\r\n") if is_text else (BOM, b"\r\n")
                has_mark |= number == 0 and chunk.startswith(mark)
                has_returns |= crlf in chunk
                source.lengths[name] += len(chunk)
                total += len(chunk.encode()) if is_text and not chunk.isascii() else len(chunk)
                if with_alphabet:
                    seen[code_points(chunk)] = True
            marks += has_mark
            returns += has_returns
        elif with_alphabet:
            for row in rows_of(path, reading):
                seen[code_points(row)] = True
    if not reading.binary:
        note_marks(source, marks, returns)
    alphabet = "".join(map(chr, np.flatnonzero(seen)))
    return Survey(alphabet, total + rows_size(source, reading))


def code_points(text: str) -> np.ndarray:
    """Those of a text, (n,)."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def note_marks(source: Source, marks: int, returns: int) -> None:
    for count, what in ((marks, "begin with a byte-order mark"), (returns, r"have \r\n")):
        if count:
            source.notes.append(
                f"{count} file(s) {what}, which is kept: --newline lf takes it out of the text"
            )


def rows_size(source: Source, reading: Reading) -> int:
    """About how many bytes of text the files with rows hold."""
    size = 0
    for name, path in source.files.items():
        if not source.has_rows(name, reading):
            continue
        if kind_of(name) == "parquet":
            with open_parquet(path) as file:
                groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
                columns = [group.column(i) for group in groups for i in range(group.num_columns)]
                size += sum(
                    column.total_uncompressed_size
                    for column in columns
                    if column.path_in_schema == reading.text_field
                )
        else:
            size += path.stat().st_size
    return size
