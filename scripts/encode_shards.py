"""Documents to shards of tokens: encoded in parallel, written in order, continued after any end.

prepare_data.py uses it. A shard is whole or absent. Beside the shards lies progress.json: those
that are whole, and the place in every source from which the next one goes on.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from store.contract import DataError
from store.files import regular
from text_sources import Piece, Reading, Source
from tokenization import MAX_VOCAB, Tokenizer

BATCH = 1 << 20  # characters, about, that a worker is given at once
AHEAD = 2  # batches for each worker that are read before they are needed
PROGRESS_S = 10.0  # between lines where stderr is no terminal
RECORD = "progress.json"

########################################
#               Encoding               #
########################################


class Encoded(NamedTuple):
    """A piece as tokens, (n,) uint16, and how many bytes of UTF-8 it has."""

    starts: bool
    ids: np.ndarray
    size: int


def encode(tokenizer: Tokenizer, with_end: bool, batch: list[Piece]) -> list[Encoded]:
    """The pieces as tokens, with the end token before each document. Raises DataError."""
    encoded = []
    for piece in batch:
        try:
            ids = tokenizer.encode(piece.text)
        except DataError as error:
            raise DataError(f"{piece.name}: {error}") from None
        if piece.starts and with_end:
            ids = np.concatenate([np.array([tokenizer.eot_id], np.uint16), ids])
        is_ascii = isinstance(piece.text, bytes) or piece.text.isascii()
        size = len(piece.text) if is_ascii else len(piece.text.encode())
        encoded.append(Encoded(piece.starts, ids, size))
    return encoded


own_encode: Callable = encode  # a worker's, with its tokenizer


def start_worker(parent: int, tokenizer: Tokenizer, with_end: bool) -> None:
    """Readies a worker process, which ends soon after its parent, however that ends."""

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    global own_encode
    own_encode = partial(encode, tokenizer, with_end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted parent ends its workers
    threading.Thread(target=follow, daemon=True).start()


def encode_in_worker(batch: list[Piece]) -> list[Encoded]:
    return own_encode(batch)


Map = Callable[[Iterable[list[Piece]]], Iterator[list[Encoded]]]


@contextlib.contextmanager
def encoder(tokenizer: Tokenizer, with_end: bool, workers: int) -> Iterator[Map]:
    """A function from batches to encoded batches, in order, by so many processes; by none for 1."""
    if workers == 1:
        yield partial(map, partial(encode, tokenizer, with_end))
        return
    # a fork has the tokenizer at once; elsewhere it is not safe
    method = "fork" if sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context(method),
        start_worker,
        (os.getpid(), tokenizer, with_end),
    )
    try:
        yield partial(map_in_order, pool, AHEAD * workers)
    finally:
        pool.shutdown(cancel_futures=True)


def map_in_order(
    pool: Executor, ahead: int, batches: Iterable[list[Piece]]
) -> Iterator[list[Encoded]]:
    """As map, with at most so many batches in work or waiting. Raises DataError."""
    waiting = deque()
    for batch in batches:
        waiting.append(pool.submit(encode_in_worker, batch))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def in_batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Consecutive pieces together, about BATCH characters at once."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + 1
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


########################################
#                Order                 #
########################################


@dataclass
class Position:
    """How much of each source is in a split; that is where its next piece comes from."""

    split: str
    pieces: list[int]
    documents: list[int]
    tokens: list[int]
    bytes: list[int]
    current: int = 0  # the source of the last piece
    skip: int = 0  # tokens of the next piece that are in shards already

    @classmethod
    def start(cls, split: str, sources: int) -> "Position":
        return cls(split, *([0] * sources for _ in range(4)))

    def add(self, piece: Encoded) -> None:
        """Counts the next piece of the current source as taken."""
        self.pieces[self.current] += 1
        self.documents[self.current] += piece.starts
        self.tokens[self.current] += len(piece.ids)
        self.bytes[self.current] += piece.size
        self.skip = 0


def choose(ahead: list[Encoded | None], weights: list[float] | None, position: Position) -> int:
    """The source of the next piece: the same within a document; then the one that is most behind
    its share of tokens, or without weights the first that has more."""
    piece = ahead[position.current]
    if piece and not piece.starts:
        return position.current
    if weights:
        shares = [
            tokens / weight if weight else math.inf
            for tokens, weight in zip(position.tokens, weights)
        ]
        return shares.index(min(shares))
    return next((i for i, piece in enumerate(ahead) if piece), 0)


def mix(
    streams: list[Iterator[Encoded]], weights: list[float] | None, position: Position
) -> Iterator[Encoded]:
    """The pieces of all sources in their order, until the source whose turn it is has no more. A
    piece is counted in position once the next is asked for."""
    ahead = [next(stream, None) for stream in streams]
    while True:
        position.current = choose(ahead, weights, position)
        piece = ahead[position.current]
        if piece is None:
            return
        yield piece
        position.add(piece)
        ahead[position.current] = next(streams[position.current], None)


def stream(source: Source, position: Position, taken: int, reading: Reading, run: Map) -> Iterator:
    """The encoded pieces of a source in a split after so many that are in shards already."""
    pieces = source.pieces(position.split, reading)
    for _ in range(taken):
        next(pieces)
    for batch in run(in_batches(pieces)):
        yield from batch


########################################
#               Writing                #
########################################


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write the parts to a temporary name beside path, sync, rename: path is whole or absent.
    Raises OSError, also for what is no regular file."""
    regular(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: str | os.PathLike, tokens: np.ndarray) -> str:
    """Write tokens, (n,) integers below 65536 with n >= 1, as one shard, atomically; its SHA-256,
    hex. Raises DataError."""
    from train_gpt import HEADER_INTS, SHARD_MAGIC, SHARD_VERSION  # takes a second, for torch

    if tokens.ndim != 1 or not tokens.size or tokens.min() < 0 or tokens.max() >= MAX_VOCAB:
        raise DataError(
            f"{path}: expected tokens (n,) in 0..{MAX_VOCAB - 1}, "
            f"found {tokens.dtype} {tokens.shape}"
        )
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    parts = header.data, np.ascontiguousarray(tokens, "<u2").data
    write_file(Path(path), *parts)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def dump(record: dict) -> bytes:
    """JSON with each entry on its own lines, but for the list token_bytes, which has one line."""
    text = json.dumps(record | {"token_bytes": "HERE"}, indent=2)
    one_line = json.dumps({"token_bytes": record.get("token_bytes")})[1:-1]
    return text.replace('"token_bytes": "HERE"', one_line).encode() + b"\n"


class Progress:
    """Says how far the text is: a bar where stderr is a terminal, else a line now and then."""

    def __init__(self, total: int, before: int):
        """`total` bytes of text, of which an earlier run did `before`."""
        self.total, self.before, self.done = total, before, 0
        self.began = self.printed = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total or None, initial=before, unit="B", unit_scale=True, desc="text"
            )

    def add(self, size: int) -> None:
        """Counts bytes of text that are done."""
        self.done += size
        if self.bar is not None:
            self.bar.update(size)
        elif time.monotonic() - self.printed > PROGRESS_S:
            self.printed = time.monotonic()
            print(self.line(self.printed - self.began), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """Bytes done of those to do, MB/s, and the time that is left at this speed."""
        speed = self.done / seconds
        left = self.total - self.before - self.done
        text = f"text: {(self.before + self.done) / 1e6:,.0f} MB, {speed / 1e6:.1f} MB/s"
        if left > 0 and speed > 0:
            text += f", {left / speed / 60:,.1f} min left of {self.total / 1e6:,.0f} MB"
        return text

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@dataclass
class Job:
    """Writes the shards of all splits into a folder, from where an earlier run of it ended."""

    folder: Path
    stem: str
    recipe: dict
    sources: list[Source]
    reading: Reading
    weights: list[float] | None
    per_shard: int
    shards: list[dict] = field(default_factory=list)  # entries of the index
    totals: dict[str, dict] = field(default_factory=dict)  # by split, of splits that are whole
    position: Position | None = None

    def restore(self) -> None:
        """Takes up what progress.json says."""
        record = read_record(self.folder)
        self.shards = record.get("shards", [])
        self.totals = record.get("totals", {})
        if record.get("position"):
            self.position = Position(**record["position"])

    def bytes_before(self) -> int:
        """How much text is in shards already."""
        size = sum(sum(totals["bytes"]) for totals in self.totals.values())
        return size + (sum(self.position.bytes) if self.position else 0)

    def save(self, **more: Any) -> None:
        """Writes progress.json. Raises OSError."""
        record = {
            "recipe": self.recipe,
            "shards": self.shards,
            "totals": self.totals,
            "position": vars(self.position) if self.position else None,
        }
        record |= more
        write_file(self.folder / RECORD, dump(record | {"record_sha256": record_hash(record)}))

    def splits(self) -> list[str]:
        return [
            split
            for split in ("val", "train", "test")
            if any(split in source.splits() for source in self.sources)
        ]

    def run(self, run: Map, progress: Progress) -> None:
        """Writes what is missing. Raises DataError, OSError."""
        for split in self.splits():
            if split in self.totals:
                continue
            if self.position is None or self.position.split != split:
                self.position = Position.start(split, len(self.sources))
            self.write_split(run, progress)
            self.check(split)

    def write_split(self, run: Map, progress: Progress) -> None:
        """Writes the rest of a split from the position."""
        position = self.position
        streams = [
            stream(source, position, taken, self.reading, run)
            for source, taken in zip(self.sources, position.pieces)
        ]
        buffer, filled = np.empty(self.per_shard, np.uint16), 0
        for piece in mix(streams, self.weights_of(position.split), position):
            ids = piece.ids[position.skip :]
            while len(ids):
                part = ids[: self.per_shard - filled]
                buffer[filled : filled + len(part)] = part
                filled += len(part)
                ids = ids[len(part) :]
                position.skip += len(part)
                if filled == self.per_shard:
                    self.publish(buffer)
                    self.save()
                    filled = 0
            progress.add(piece.size)
        if filled:
            self.publish(buffer[:filled])
        totals = {name: getattr(position, name) for name in ("documents", "tokens", "bytes")}
        self.totals[position.split] = totals
        self.position = None
        self.save()

    def weights_of(self, split: str) -> list[float] | None:
        """The weights, 0 for sources without this split."""
        if self.weights is None:
            return None
        return [
            weight if split in source.splits() else 0.0
            for source, weight in zip(self.sources, self.weights)
        ]

    def publish(self, tokens: np.ndarray) -> None:
        """Writes the next shard of the split, and its entry."""
        split = self.position.split
        # val and train are numbered together, as FineWeb's are; test by itself, so that a test
        # split changes no other name
        before = [shard for shard in self.shards if (shard["split"] == "test") == (split == "test")]
        path = self.folder / f"{self.stem}_{split}_{len(before):06d}.bin"
        digest = write_shard(path, tokens)
        self.shards.append(
            {
                "name": path.name,
                "split": split,
                "tokens": len(tokens),
                "bytes": path.stat().st_size,
                "sha256": digest,
            }
        )

    def check(self, split: str) -> None:
        """Raises DataError for a split without an input and its target."""
        tokens = sum(self.totals[split]["tokens"])
        if tokens < 2 and split != "test":
            specs = ", ".join(source.spec for source in self.sources)
            raise DataError(
                f"--source {specs}: expected at least 2 tokens in {split}, found {tokens}: "
                f"give more text, or change --val-fraction {self.reading.val_fraction}"
            )


def record_hash(record: dict) -> str:
    """SHA-256 of what a record says, hex."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_record(folder: Path) -> dict:
    """progress.json of a folder, {} where there is none or it is not as it was written."""
    try:
        record = json.loads(regular(folder / RECORD).read_bytes())
        digest = record.pop("record_sha256")
        record.pop("token_bytes")  # an entry of every dump
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return {}
    return record if digest == record_hash(record) else {}
