"""A byte-level BPE vocabulary of your own text, for prepare_data.py and what follows it.

    python scripts/train_tokenizer.py --source package:sympy --vocab-size 1024 --out data/bpe.json

writes a tokenizer.json of the `tokenizers` library from the text that prepare_data.py trains on
under the same options: the part for validation is not read. Every byte has a token, so that no text
is lost, and <|endoftext|> is the last id. The same text gives the same file in every run.
Exit codes: 0 the file is there, 2 a wrong option, 3 input that cannot be used,
130 interrupted.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import text_sources
from harness.settings import ROOT
from store.contract import DataError
from store.files import regular, write_whole
from text_sources import Reading, fetch, open_source, survey
from tokenization import END, MAX_VOCAB, SPLITS, Tokenizer, parse, pieces

SMALLEST = 257  # a token for each byte, and the end
SAMPLE_BYTES = 10_000_000
LARGE_BYTES = 100_000_000
# Measured with tokenizers 0.23 on 266 MB of Python source. Memory follows the number of different
# words, 1 KB each, and that grows more slowly than the text.
MEMORY_PER_BYTE = 1.7
# Pairs are counted in 32 bits (huggingface/tokenizers#437): beyond this size one may overflow.
MOST_BYTES = 2_000_000_000


class Texts:
    """The pieces of all sources' text for training; keeps their size and some for measuring."""

    def __init__(self, specs: list[str], reading: Reading):
        self.reading = reading
        self.sources = [open_source(spec, reading) for spec in specs]
        self.size = 0  # bytes that were read
        self.sample, self.sample_size = [], 0

    def survey(self) -> None:
        """Fetches and checks all text; says what a large one takes. Raises DataError, OSError."""
        size = 0
        for source in self.sources:
            fetch(source)
            size += survey(source, self.reading, with_alphabet=False).bytes
            for note in source.notes:
                print(f"note: {source.spec}: {note}", file=sys.stderr)
        if size >= LARGE_BYTES:
            gib = size * MEMORY_PER_BYTE / 2**30
            print(f"{size:,} bytes of text: needs up to about {gib:.1f} GiB", file=sys.stderr)
        if size > MOST_BYTES:
            print(
                f"warning: in more than {MOST_BYTES:,} bytes the library may count a pair wrong: "
                "a part of the text gives nearly the same vocabulary",
                file=sys.stderr,
            )

    def pieces(self, line_ends: bool) -> Iterator[str]:
        """All text for training, cut where no token goes across. Raises DataError, OSError."""
        for source in self.sources:
            for part in source.pieces("train", self.reading):
                yield from map(self.note, pieces(part.text, line_ends))

    def note(self, piece: str) -> str:
        """Counts a piece, and returns it."""
        size = len(piece.encode())
        self.size += size
        if self.sample_size < SAMPLE_BYTES:
            self.sample.append(piece)
            self.sample_size += size
        return piece


def train(texts: Iterable[str], vocab_size: int, min_frequency: int, pattern: str) -> Tokenizer:
    """Byte-level BPE of at most vocab_size tokens, by the `tokenizers` library. Raises DataError
    without it."""
    try:
        import tokenizers
        from tokenizers import Regex, models, pre_tokenizers, trainers
    except ImportError:
        raise DataError("train_tokenizer.py needs a library: pip install tokenizers") from None
    written = SPLITS[pattern].written
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=written is None)
    steps = [to_bytes]
    if written is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(written), behavior="isolated"))
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # the end comes last
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # else unseen bytes would be lost
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    trained.add_special_tokens([END])
    return parse(trained.to_str(), "the trained vocabulary")


def make(args: argparse.Namespace) -> str:
    """Writes the vocabulary that args ask for; returns what is to be said of it. Raises DataError,
    OSError."""
    if args.out.is_dir():
        raise DataError(
            f"--out {args.out}: expected a file, found a folder: try {args.out / 'tokenizer.json'}"
        )
    regular(args.out)
    texts = Texts(args.source, text_sources.reading_of(args))
    texts.survey()
    started = time.perf_counter()
    tokenizer = train(
        texts.pieces(SPLITS[args.pattern].line_ends),
        args.vocab_size,
        args.min_frequency,
        args.pattern,
    )
    seconds = time.perf_counter() - started
    if not texts.size:
        raise DataError(
            f"--source {args.source[0]}: expected text in the part to train on, found none: give "
            "more"
        )
    content = tokenizer.to_json()
    if args.out.exists() and args.out.read_bytes() != content.encode() and not args.force:
        raise DataError(
            f"--out {args.out}: expected no file or this same vocabulary, found another: data made "
            "with it would lose it; give another name, or --force to replace it"
        )
    write_whole(args.out, content)
    return report(args, texts, tokenizer, seconds)


def report(args: argparse.Namespace, texts: Texts, tokenizer: Tokenizer, seconds: float) -> str:
    """What was made, and the next command."""
    tokens = sum(len(tokenizer.encode(piece)) for piece in texts.sample)
    lines = [
        f"vocabulary: {tokenizer.vocab_size:,}   "
        f"bytes per token: {texts.sample_size / tokens:.4f}   "
        f"text: {texts.size:,} bytes, all but the part for validation   time: {seconds:.1f}s"
    ]
    if tokenizer.vocab_size < args.vocab_size:
        lines.append(
            f"fewer than the {args.vocab_size:,} asked for: no further pair occurs "
            f"{args.min_frequency} times; give more text, or a lower --min-frequency"
        )
    return "\n".join([*lines, f"next: {next_command(args)}"])


def next_command(args: argparse.Namespace) -> str:
    """The command that makes data of the same sources with the vocabulary, and its name."""
    script = ROOT / "scripts" / "prepare_data.py"
    if Path.cwd() == ROOT:
        script = script.relative_to(ROOT)
    words = ["python", str(script)]
    for spec in args.source:
        words += ["--source", spec]
    for option in ("val_fraction", "text_field", "newline"):  # or it would be another text
        value = getattr(args, option)
        if value != Reading._field_defaults[option]:
            words += [f"--{option.replace('_', '-')}", str(value)]
    name = args.out.stem if args.out.stem != "tokenizer" else args.out.absolute().parent.name
    words += ["--tokenizer", str(args.out), "--out", f"data/{name}"]
    return shlex.join(words)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with code 2 and one sentence if it cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    text_sources.add_options(parser)
    add = parser.add_argument
    add("--vocab-size", type=int, default=1024, help="ids, with the end of text (1024)")
    add("--min-frequency", type=int, default=2, help="how often a pair must occur to merge (2)")
    add(
        "--pattern",
        choices=("gpt2", "gpt4"),
        default="gpt2",
        help="where text is cut into words; gpt4: numbers at three digits (gpt2)",
    )
    add("--out", required=True, type=Path, help="the tokenizer.json to write")
    add("--force", action="store_true", help="replace another vocabulary at --out")
    args = parser.parse_args(argv)
    problem = text_sources.option_problem(args)
    if problem:
        parser.error(problem)
    if not SMALLEST <= args.vocab_size <= MAX_VOCAB:
        parser.error(
            f"argument --vocab-size: expected {SMALLEST} (the 256 bytes and {END}) to {MAX_VOCAB} "
            f"(ids are uint16), found {args.vocab_size}"
        )
    if args.min_frequency < 1:
        parser.error(f"argument --min-frequency: expected 1 or more, found {args.min_frequency}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Train a vocabulary and say what was made; exit code 0, or as above with one sentence."""
    args = parse_args(argv)
    if sys.stdout:  # it may be closed
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files may be any bytes
    try:
        print(make(args))
    except (DataError, OSError) as error:
        print(f"train_tokenizer.py: error: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
