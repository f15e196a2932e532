"""Loss, perplexity, accuracy and bits per byte of a trained model on any text or shards.

    python scripts/evaluate_model.py RUN_ID                        # its own validation data
    python scripts/evaluate_model.py RUN_ID --data 'data/sympy/sympy_val_*.bin' --stride 256
    python scripts/evaluate_model.py RUN_ID --text wiki.test.raw   # and perplexity a word
    python scripts/evaluate_model.py RUN_ID --tasks hellaswag,arc_easy --limit 100

The model sees windows of --context tokens, each --stride after the one before. A window predicts
the token after each of its own; scored are those that no window before it has scored. So every
token but the first of a text is scored once; from the second window on at least context - stride
tokens of the text stand before it. With stride = context, the default, windows follow each other
as in training: that is fastest, and gives the highest loss. Of shards only whole windows count, as
in training; the last window of a text is as long as what is left.

A text begins with the end token where the tokenizer has one, so that its first token is scored
too. Text of WikiText, known by a first line like " = Title = ", is cut into its articles, each a
text of its own, as lm-evaluation-harness does; its perplexity a word, word_ppl, is exp(nats /
words) with words = len(re.split(r"\\s+", article)) of the article as it is, to stand beside
published ones. No detokenizer is applied; --tasks wikitext applies one, and lets the last window
of an article reach back. Bits per byte leave out special tokens: the figure in a run's row has them
in it and is a little higher. They are blank where the bytes of a token are not known.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import contextlib
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import tokenization
from harness.provenance import dataset_folder, dataset_index
from store.contract import ConfigError, DataError
from store.files import write_whole
from load_model import Trained, load_trained
from sample import number, with_tokenizer
from scoring import Scores, Window, score, windows
from train_gpt import ShardLoader

TOKENS_PER_BATCH = 16384
UNKNOWN, SPECIAL = -1, 0  # in the place of a token's bytes
# A heading of the first level, as EleutherAI's wikitext_document_level finds where articles begin
TITLE = re.compile(r"\s*= [^=](?:.*[^=])? =\s*")


#######################################################################
# Texts
#######################################################################


def articles(text: str) -> list[str]:
    """WikiText cut before each title; lines keep their newlines but for the one before a title."""
    found, lines = [], []
    for line in text.split("\n"):
        if TITLE.fullmatch(line):
            found.append("\n".join(lines))
            lines = []
        lines.append(line)
    found.append("\n".join(lines))
    return [article for article in found if article.strip()]


def is_wikitext(text: str) -> bool:
    """Whether the first line that is not blank is a title."""
    first = re.search(r"^.*\S.*$", text, re.MULTILINE)
    return first is not None and TITLE.fullmatch(first[0]) is not None


def count_words(text: str) -> int:
    """As the task wikitext of lm-evaluation-harness counts them, an empty one at either end too."""
    return len(re.split(r"\s+", text))


def read_texts(path: str, raw_bytes: bool) -> tuple[bool, list[str] | list[bytes]]:
    """Whether a file is WikiText, and its articles, or else all of it. Raises DataError."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"--text {path}: expected a text file, found none ({error.strerror}); correct the path"
        ) from None
    try:
        text = tokenization.text_of(raw)
    except DataError as error:
        if raw_bytes:
            return False, [raw]
        raise DataError(f"--text {path}: {error}") from None
    if is_wikitext(text):
        return True, articles(text)
    return False, [text]


def text_tokens(tokenizer: tokenization.Tokenizer, text: str | bytes) -> np.ndarray:
    """Ids of a text, (n,), behind the end token where there is one. Raises DataError."""
    ids = tokenizer.encode(text)
    if tokenizer.eot_id is None:
        return ids
    return np.concatenate([np.array([tokenizer.eot_id], ids.dtype), ids])


#######################################################################
# Shards
#######################################################################


def shard_windows(
    loader: ShardLoader, context: int, stride: int, max_tokens: float
) -> Iterator[Window]:
    """Whole windows of the shards in turn, together of at most so many targets. Raises
    DataError."""
    total = 0
    for index, shard in enumerate(loader.shards):
        if total >= max_tokens:
            return
        loader.check_tokens([index])
        for window in windows(shard, context, stride, whole=True):
            total += window.new
            if total > max_tokens:
                return
            yield window


def token_sizes(trained: Trained, pattern: str) -> np.ndarray:
    """Bytes of each id of shards, (V,), SPECIAL or UNKNOWN: as noted beside them, or else by the
    model's tokenizer. Raises DataError where they were made with another."""
    folder, theirs = dataset_folder(pattern), None
    with contextlib.suppress(DataError):  # one of an earlier version: it is not needed
        if (folder / "tokenizer.json").is_file():
            theirs = tokenization.load(folder)
    ours = trained.tokenizer
    if ours and theirs and ours.token_bytes != theirs.token_bytes:
        raise DataError(
            f"--data {pattern}: {folder / 'tokenizer.json'} is another tokenizer than the model's, "
            "so their ids do not mean the same; make the shards with that of the model"
        )
    noted = dataset_index(pattern).get("token_bytes")
    if noted:
        check_sizes(noted, folder)
        return padded_sizes(noted, trained.cfg.vocab_size)
    known = theirs or ours
    sizes = [len(token) for token in known.token_bytes] if known else []
    return padded_sizes(sizes, trained.cfg.vocab_size)


def check_sizes(sizes: object, folder: Path) -> None:
    """Raises DataError for what is no list of sizes of tokens."""
    if not isinstance(sizes, list) or not all(
        size is None or (isinstance(size, int) and 0 <= size < 2**31) for size in sizes
    ):
        raise DataError(
            f"{folder / 'index.json'}: expected in token_bytes the bytes of each id, found "
            f"something else; make the shards again"
        )


def padded_sizes(sizes: list[int | None], vocab_size: int) -> np.ndarray:
    """Sizes (V,), UNKNOWN where there is None or nothing."""
    padded = np.full(vocab_size, UNKNOWN)
    known = [UNKNOWN if size is None else size for size in sizes[:vocab_size]]
    padded[: len(known)] = known
    return padded


#######################################################################
# Figures
#######################################################################


class Totals:
    """Sums over scored tokens, of which sizes (V,) has the bytes."""

    def __init__(self, sizes: np.ndarray):
        self.sizes = sizes
        self.nats = self.special_nats = 0.0
        self.tokens = self.special_tokens = self.likeliest = self.bytes = 0
        self.knows_bytes = True

    def add(self, scores: Scores) -> None:
        nats = -scores.logp.astype(np.float64)
        sizes = self.sizes[scores.targets]
        is_special = sizes == SPECIAL
        self.nats += nats.sum()
        self.tokens += len(nats)
        self.likeliest += int(scores.is_likeliest.sum())
        self.special_nats += nats[is_special].sum()
        self.special_tokens += int(is_special.sum())
        self.knows_bytes &= bool((sizes != UNKNOWN).all())
        self.bytes += int(sizes.sum())

    def figures(self) -> dict[str, float | int | None]:
        """What the sums say; None where it is not known."""
        loss = self.nats / self.tokens
        figures = {
            "tokens": self.tokens,
            "loss": loss,
            "ppl": exp(loss),
            "accuracy": self.likeliest / self.tokens,
            "special_tokens": None,
            "bytes": None,
            "bits_per_byte": None,
        }
        if self.knows_bytes:
            figures |= {"special_tokens": self.special_tokens, "bytes": self.bytes}
        if self.knows_bytes and self.bytes:
            bits = (self.nats - self.special_nats) / math.log(2)
            figures["bits_per_byte"] = bits / self.bytes
        return figures


def exp(nats: float) -> float | None:
    """A perplexity; None beyond what a float holds."""
    return math.exp(nats) if nats < 700 else None


def total(trained: Trained, rows: Iterable[Window], sizes: np.ndarray, batch_size: int) -> Totals:
    """Sums over the windows, with a bar on a terminal. Raises ConfigError for a loss that is no
    number."""
    totals = Totals(sizes)
    with tqdm(unit=" tokens", unit_scale=True, disable=None, leave=False) as bar:
        for scores in score(trained.model, rows, batch_size):
            totals.add(scores)
            bar.update(len(scores.targets))
    if not math.isfinite(totals.nats):
        raise ConfigError(
            f"{trained.folder}: the loss is {totals.nats / totals.tokens}, so its weights are of "
            "no use; name one of its earlier step_<number> folders"
        )
    return totals


def evaluate_shards(trained: Trained, args: argparse.Namespace) -> dict:
    """Figures of --data, or of what the run validates on. Raises DataError."""
    cfg, pattern, max_tokens = trained.cfg, args.data, args.max_tokens
    loader = ShardLoader(pattern or cfg.input_val_bin, cfg)
    if not pattern:
        pattern = cfg.input_val_bin
        if not max_tokens:
            max_tokens = cfg.val_tokens
            samples = cfg.val_tokens // cfg.sequence_length
            problem = loader.shortfall("VAL_TOKENS", cfg.val_tokens, samples)
            if problem:
                raise DataError(problem)
    rows = shard_windows(loader, args.context, args.stride, max_tokens or math.inf)
    totals = total(trained, rows, token_sizes(trained, pattern), args.batch_size)
    if not totals.tokens:
        raise DataError(
            f"--data {pattern}: expected a window of {args.context} tokens and one more, found "
            f"{loader.tokens} tokens in {len(loader.files)} file(s) and --max-tokens "
            f"{max_tokens or 'not set'}; lower --context"
        )
    about = {
        "data": pattern,
        "max_tokens": max_tokens or None,
        "first_token": "of a shard is not scored: nothing is before it",
    }
    return about | totals.figures()


def evaluate_text(trained: Trained, args: argparse.Namespace) -> dict:
    """Figures of --text. Raises DataError."""
    tokenizer = trained.tokenizer
    has_articles, texts = read_texts(args.text, tokenizer.kind == "bytes" and not args.words)
    rows = []
    for text in texts:
        rows += windows(text_tokens(tokenizer, text), args.context, args.stride)
    if not rows:
        raise DataError(
            f"--text {args.text}: expected 2 tokens or more, the end token counted, found fewer; "
            "give more text"
        )
    sizes = padded_sizes([len(token) for token in tokenizer.token_bytes], trained.cfg.vocab_size)
    totals = total(trained, rows, sizes, args.batch_size)
    first = "of a text is not scored: nothing is before it, for the tokenizer has no end token"
    if tokenizer.eot_id is not None:
        first = "of a text is scored, after the end token"
    figures = {"text": args.text, "texts": len(texts), "first_token": first} | totals.figures()
    if args.words or has_articles:
        words = sum(map(count_words, texts))
        figures |= {"words": words, "word_ppl": exp(totals.nats / words), "detokenizer": "none"}
    return figures


def evaluate_tasks(trained: Trained, args: argparse.Namespace) -> dict:
    """Results of --tasks. Raises ConfigError, DataError."""
    try:
        from lm_eval_adapter import run_tasks
    except ImportError as error:
        raise ConfigError(
            f"--tasks: needs lm-evaluation-harness, found no {error.name}: pip install -U lm-eval"
        ) from None
    return run_tasks(trained, args.tasks, args.batch_size, args.limit, args.include_path)


#######################################################################
# Command line
#######################################################################


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with code 2 and one sentence if it cannot be run."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", help="run id, a run's folder, or a step_<number> folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--data", metavar="PATTERN", help="shards, as a quoted glob")
    what.add_argument("--text", metavar="FILE", help="UTF-8 text, encoded by the tokenizer")
    what.add_argument("--tasks", metavar="NAMES", help="of lm-evaluation-harness, a comma list")
    add("--context", type=number(int, 1), help="tokens of a window; else SEQUENCE_LENGTH")
    add("--stride", type=number(int, 1), help="tokens from window to window; else --context")
    add("--max-tokens", type=number(int, 1), help="of shards; else all, or the run's VAL_TOKENS")
    add("--words", action="store_true", help="perplexity a word of other text too")
    add("--limit", type=number(int, 1), help="examples of each task; else all")
    add("--include-path", metavar="DIR", help="more tasks: YAML files of lm-evaluation-harness")
    add("--batch-size", type=number(int, 1), help="windows at once; else 16384 tokens")
    add("--json", type=Path, metavar="OUT", help="write the figures to this file too")
    add("--tokenizer", help="bytes, gpt2 or a path, where the checkpoint has none")
    add("--log-dir", default="logs", help="where run ids are looked for")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    needs = {"words": "text", "limit": "tasks", "include_path": "tasks"}
    for name, needed in needs.items():
        if getattr(args, name) and not getattr(args, needed):
            parser.error(f"argument --{name.replace('_', '-')}: needs --{needed}")
    for name in ("context", "stride", "max_tokens"):
        if getattr(args, name) and (args.tasks or (name == "max_tokens" and args.text)):
            mode = "--tasks" if args.tasks else "--text"
            parser.error(f"argument --{name.replace('_', '-')}: has no effect with {mode}")
    return args


def fit_windows(args: argparse.Namespace, sequence_length: int, limit: float) -> None:
    """Works out --context, --stride and --batch-size; the model sees `limit` tokens, inf where it
    has states alone. Raises ConfigError."""
    args.context = args.context or sequence_length
    args.stride = args.stride or args.context
    args.batch_size = args.batch_size or max(1, TOKENS_PER_BATCH // args.context)
    if args.context > limit:
        raise ConfigError(
            f"--context {args.context}: the model was trained on SEQUENCE_LENGTH={limit} tokens "
            "and knows no position beyond; give at most that"
        )
    if args.stride > args.context:
        raise ConfigError(
            f"--stride {args.stride}: tokens between windows would not be scored; give at most "
            f"--context {args.context}"
        )


def evaluate(args: argparse.Namespace) -> dict:
    """All figures that args ask for. Raises ConfigError, DataError."""
    trained = load_trained(args.checkpoint, args.log_dir, args.device)
    if args.tokenizer or args.text or args.tasks:
        trained = with_tokenizer(trained, args.tokenizer)
    fit_windows(args, trained.cfg.sequence_length, trained.model.context)
    head = {
        "checkpoint": str(trained.folder),
        "device": f"{trained.cfg.device}, {trained.cfg.dtype}",
        "context": args.context,
    }
    if args.tasks:
        return head | evaluate_tasks(trained, args)
    head["stride"] = args.stride
    work = evaluate_text if args.text else evaluate_shards
    return head | work(trained, args)


def check_output(path: Path | None) -> None:
    """Raises ConfigError where no file can be written, before the work is done."""
    if path and (not path.absolute().parent.is_dir() or (path.exists() and not path.is_file())):
        raise ConfigError(f"--json {path}: expected the name of a file in a folder that is there")


def show(figures: dict) -> None:
    """A block of `key: value` lines, as at the end of a run."""
    print("---")
    for key, value in figures.items():
        if key == "bits_per_byte" and value is None:
            print("bits_per_byte:  (not known for these tokens; --tokenizer PATH would tell)")
        elif isinstance(value, dict):  # of a task
            for name, figure in value.items():
                if figure is not None:
                    print(f"{key} {name}: {shown(figure)}")
        elif value is not None:
            print(f"{key}: {shown(value)}")


def shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 or 3 with one sentence for bad input, 130 where Ctrl-C ended it."""
    args = parse_args(argv)
    try:
        check_output(args.json)
        figures = evaluate(args)
        show(figures)
        if args.json:
            write_whole(args.json, json.dumps(figures, indent=2, default=float) + "\n")
    except (ConfigError, DataError, OSError) as error:
        print(f"evaluate_model.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 3
    except torch.OutOfMemoryError:
        print("evaluate_model.py: error: out of memory; lower --batch-size", file=sys.stderr)
        return 5
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
