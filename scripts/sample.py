"""Text from a trained model.

    python scripts/sample.py RUN_ID --prompt "def " --num-samples 3
    python scripts/sample.py logs/RUN_ID/step_000500 --interactive

The checkpoint is a run id, a run's folder or one of its step_<number> folders; nothing else is
needed. New text goes to standard output as it comes, figures go to standard error. On a CPU that
others use too, OMP_NUM_THREADS=1 before the command is often faster.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from store.contract import ConfigError, DataError
from load_model import Trained, load_trained
from ops.generation import generate
from tokenization import Tokenizer, named


class Answer:
    """The text of a sequence as its tokens come, up to the end token or a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self.eot_id = tokenizer.eot_id
        self.decoder = tokenizer.decoder()
        self.stops = stops
        self.held = ""  # what may be the beginning of a stop string
        self.ended = False

    def feed(self, token: int) -> str:
        """The text that is certain with this token and was not before."""
        if self.ended:
            return ""
        if token == self.eot_id:
            return self.end()
        return self.show(self.decoder.feed(token))

    def end(self) -> str:
        """What was held back until now."""
        if self.ended:
            return ""
        shown = self.show(self.decoder.flush())
        if not self.ended:
            shown += self.held
        self.ended = True
        return shown

    def show(self, text: str) -> str:
        """Holds back what may become a stop string; ends where one is whole."""
        text = self.held + text
        found = [text.find(stop) for stop in self.stops if stop in text]
        if found:
            self.ended = True
            return text[: min(found)]
        kept = 0
        for stop in self.stops:
            beginnings = (n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
            kept = max(kept, next(beginnings, 0))
        self.held = text[len(text) - kept :]
        return text[: len(text) - kept]


def stream(
    trained: Trained,
    prompts: list[list[int]],
    steps: int,
    stops: Sequence[str] = (),
    samples: int = 1,
    **options,
) -> Iterator[list[str]]:
    """Yields, after each token, the new text of every sequence; ends when all have ended.

    `samples` sequences of each prompt, prompts[0]'s first; `options` are those of generate.
    """
    answers = [Answer(trained.tokenizer, stops) for _ in range(samples * len(prompts))]
    size = trained.tokenizer.vocab_size  # the model's may be larger
    for tokens in generate(trained.model, prompts, steps, samples, vocab_size=size, **options):
        yield [answer.feed(token) for answer, token in zip(answers, tokens)]
        if all(answer.ended for answer in answers):
            return
    yield [answer.end() for answer in answers]


def with_tokenizer(trained: Trained, name: str | None) -> Trained:
    """With the tokenizer of this name in the place of the checkpoint's. Raises ConfigError,
    DataError."""
    tokenizer = named(name) if name else trained.tokenizer
    if tokenizer is None:
        raise ConfigError(
            f"{trained.folder} has no tokenizer.json that can be read; copy that of its dataset "
            "there, or give --tokenizer bytes, gpt2 or a PATH"
        )
    own = trained.tokenizer
    if own and own.token_bytes != tokenizer.token_bytes:
        raise ConfigError(
            f"--tokenizer {name} is not that of {trained.folder}, so their ids do not mean the "
            "same; leave it out"
        )
    if tokenizer.vocab_size > trained.cfg.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model VOCAB_SIZE="
            f"{trained.cfg.vocab_size}; give the one that it was trained with by --tokenizer PATH"
        )
    return trained._replace(tokenizer=tokenizer)


def encode_prompt(trained: Trained, text: str | bytes) -> list[int]:
    """Tokens of a prompt; of an empty one the end token, or else a new line.

    Raises DataError for characters that the tokenizer lacks, ConfigError where they are too many.
    """
    tokenizer, context = trained.tokenizer, trained.model.context
    tokens = tokenizer.encode(text).tolist()
    if not tokens and tokenizer.eot_id is not None:
        tokens = [tokenizer.eot_id]
    elif not tokens:
        tokens = tokenizer.encode("\n").tolist()
    if len(tokens) > context:
        raise ConfigError(
            f"the prompt has {len(tokens)} tokens, the model sees SEQUENCE_LENGTH={context}; "
            "shorten the prompt"
        )
    return tokens


def print_answers(trained: Trained, text: str | bytes, args: argparse.Namespace) -> None:
    """Streams the first sample, then prints the others, and says how fast it went."""
    prompt = encode_prompt(trained, text)
    if args.echo:
        print(trained.tokenizer.decode(prompt), end="", flush=True)
    options = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    texts = [""] * args.num_samples
    began, steps, first = time.perf_counter(), 0, 0.0
    made = stream(trained, [prompt], args.max_new_tokens, args.stop, args.num_samples, **options)
    try:
        for new in made:
            steps += 1
            first = first or time.perf_counter() - began
            texts = [text + more for text, more in zip(texts, new)]
            print(new[0], end="", flush=True)
    finally:  # also where Ctrl-C has ended the answer
        seconds = time.perf_counter() - began
        print(flush=True)
        for i, text in enumerate(texts[1:], start=2):
            print(f"--- sample {i} of {args.num_samples} ---\n{text}", flush=True)
        tokens = min(steps, args.max_new_tokens) * args.num_samples
        print(
            f"{tokens} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):.0f} tokens/s; the "
            f"prompt ({len(prompt)} tokens) and the first took {first:.2f} s",
            file=sys.stderr,
        )


def converse(trained: Trained, args: argparse.Namespace) -> None:
    """A prompt a line until the input ends; each is answered by itself."""
    print("a prompt a line; Ctrl-C ends an answer, Ctrl-D the session", file=sys.stderr)
    while True:
        try:
            print("> ", end="", file=sys.stderr, flush=True)
            text = input()
        except (EOFError, RuntimeError):  # the latter where there is no input at all
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        try:
            print_answers(trained, text, args)
        except KeyboardInterrupt:
            continue
        except (ConfigError, DataError) as error:
            print(f"sample.py: {error}", file=sys.stderr)


def number(kind: type, least: float, most: float = float("inf")):
    """A type for argparse: a number from least to most."""

    def parse(text: str):
        value = kind(text)
        if not least <= value <= most:
            upto = f"to {most}" if most < float("inf") else "or more"
            raise argparse.ArgumentTypeError(f"expected {least} {upto}, found {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", help="run id, a run's folder, or a step_<number> folder")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="text to go on with; blank: from nothing")
    prompt.add_argument("--prompt-file", type=Path, help="file with the prompt")
    prompt.add_argument("--interactive", action="store_true", help="a prompt a line, until Ctrl-D")
    add("--num-samples", type=number(int, 1, 10_000), default=1, help="answers to each prompt (1)")
    add("--max-new-tokens", type=number(int, 1, 10_000_000), default=200, help="of an answer (200)")
    add(
        "--temperature",
        type=number(float, 0, 1e6),
        default=0.8,
        help="below 1 likely tokens are drawn more often; 0: always the likeliest (0.8)",
    )
    add("--top-k", type=number(int, 0), default=200, help="draw from the k likeliest; 0: all (200)")
    add(
        "--top-p",
        type=number(float, 0, 1),
        default=1.0,
        help="of these, from the fewest whose probabilities add up to p (1)",
    )
    add("--seed", type=number(int, 0), default=0, help="another seed, another text (0)")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"end the answer before this text; \n is a new line; may be repeated",
    )
    add("--echo", action="store_true", help="print the prompt before the answer")
    add("--tokenizer", help="bytes, gpt2 or a path, where the checkpoint has none")
    add("--log-dir", default="logs", help="where run ids are looked for")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    args.stop = [stop.replace(r"\n", "\n") for stop in args.stop if stop]
    return args


def read_prompt(args: argparse.Namespace) -> str | bytes:
    """What --prompt or --prompt-file says. Raises DataError."""
    if not args.prompt_file:
        return args.prompt
    try:
        return args.prompt_file.read_bytes()
    except OSError as error:
        raise DataError(
            f"--prompt-file {args.prompt_file}: cannot be read ({error.strerror}); name a text file"
        ) from None


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2, 3 or 5 with one sentence for bad input, 130 where Ctrl-C ended the answer."""
    args = parse_args(argv)
    if sys.stdout:  # it may be closed
        sys.stdout.reconfigure(errors="replace")
    try:
        trained = load_trained(args.checkpoint, args.log_dir, args.device)
        trained = with_tokenizer(trained, args.tokenizer)
        if args.interactive:
            converse(trained, args)
        else:
            print_answers(trained, read_prompt(args), args)
    except BrokenPipeError:  # who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ConfigError, DataError, OSError) as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 3
    except (MemoryError, torch.OutOfMemoryError):
        print(
            "sample.py: error: out of memory; lower --num-samples or --max-new-tokens",
            file=sys.stderr,
        )
        return 5
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
