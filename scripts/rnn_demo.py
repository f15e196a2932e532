"""A recurrent network that learns a text by heart, and writes.

    python scripts/rnn_demo.py "the quick brown fox jumps over the lazy dog. "
    python scripts/rnn_demo.py --file poem.txt --epochs 200 --hidden-size 64 --save-every 50
    python scripts/rnn_demo.py --load RUN_ID --epochs 1000
    PRESET=rnn_medium python scripts/rnn_demo.py --epochs 100
    python scripts/rnn_demo.py --file book.txt --tokenizer bytes --do-rl --rl-task arithmetic
    python scripts/rnn_demo.py --load RUN_ID --do-rl --rl-episodes 1600

Without a text it takes one of its own. An epoch is one pass over the text, which is cut into
BATCH_SIZE streams that are read side by side; a text that does not fill them goes on from its
beginning. The loss is of this very text, the mean over an epoch. The trainer is train_gpt.py under
PRESET=rnn_char; other settings are variables: NORM=rms DEVICE=cpu python scripts/rnn_demo.py.
--load goes on with parameters, moments and text of a run, under its own name, or of one of its
checkpoints, as a new run; INIT_FROM=logs/RUN_ID and --tokenizer logs/RUN_ID take its weights to
another text. Data are kept in data/rnn_demo, a folder for each text.
--do-rl goes on with a task, for which right answers are rewarded: train_rl.py does that, in a run
of its own, RUN_ID-rl, after a warm-up on right answers. The vocabulary must have the characters of
the task. --load RUN_ID --do-rl without --epochs begins with it at once.
Exit codes: 0 it has written, 2 a wrong option or text, 130 interrupted, others as of train_gpt.py.
Options of rnn-rust, a program of this kind, in its order, and what is another here:
  --hiddenSize --embedSize --numLayers --numHeads: --hidden-size (the embedding's, too) --layers
      --heads (twice that divides the size)
  --numExperts --topK: --experts --top-k; both count the expert for all tokens in the first
  --fastMode --useRWKV=false: --fast-mode --no-rwkv; other mixers by MIXER
  --trainingText --epochs --logEvery --temperature --genLength: TEXT or --file, --epochs
      --log-every --temperature --gen-length; later: scripts/sample.py RUN_ID --prompt TEXT
  --learningRate --weightDecay --batchSize --seqLength: --lr --weight-decay --batch-size
      --seq-length; states are carried from one sample to the next
  --savePath --saveOnComplete=false --saveEvery --loadCheckpoint: --run-id and --log-dir, --no-save
      --save-every (epochs, all kept) --load
  --useBPE --bpeLoadPath: --tokenizer FILE
  --trainBPE --bpeVocabSize --bpeMinFrequency --bpeSavePath --bpeTrainingFile --bpeTrainingText:
      scripts/train_tokenizer.py --vocab-size (257 or more) --min-frequency --out --source --text
  --doRL --rlTask --rlEpisodes --rlLearningRate: --do-rl --rl-task --rl-episodes --rl-learning-rate
      and --rl-length; an episode is a prompt with 16 answers, a step has 8 of them: 800 episodes,
      not 100, at half of LR, not 0.0001; --epochs=0 with a checkpoint is --load RUN --do-rl
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import contextlib
import csv
import glob
import hashlib
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

import rnn_rl
import tokenization
from encode_shards import dump, write_file, write_shard
from harness.checkpoints import step_folders
from harness.files import RunFiles
from harness.provenance import new_run_id
from harness.settings import ROOT
from store.contract import ConfigError, DataError
from store.process import ENDINGS
from load_model import (
    Trained,
    as_environment,
    find_folder,
    load_trained,
    read_settings,
    read_tokenizer,
)
from prepare_data import about
from sample import encode_prompt, number, stream
from tokenization import Tokenizer
from train_gpt import Config, ShardLoader, load_shard

TEXT = (
    "A river does not hurry, and yet it reaches the sea. It keeps what it needs of yesterday in "
    "the shape of its bed, and lets the rest go by. A small network does the same with letters: "
    "it reads one, changes its state a little, and guesses the next. After a hundred readings "
    "it knows this text by heart. "
)
PRESET = "rnn_char"
EPOCHS = 500
DATA = Path("data/rnn_demo")
RULE = "-" * 70
SPEED_STEPS = 10  # that are enough to say how long all will take
MOST_POINTS = 20_000  # of a curve: where there are fewer steps, every one of them is logged
COURSE = {"NUM_ITERATIONS", "MAX_EPOCHS", "LOG_EVERY", "SAVE_EVERY", "KEEP_LAST"}  # see course
OPTIONS = {  # option: (setting, kind, what it is)
    "hidden-size": ("N_EMBD", int, "channels of the embedding and the states"),
    "layers": ("N_LAYER", int, "recurrent layers"),
    "heads": ("N_HEAD", int, "heads of RWKV's linear attention"),
    "top-k": ("TOP_K", int, "experts that a token is sent to, beside the one for all"),
    "lr": ("LR", float, "learning rate of AdamW"),
    "weight-decay": ("WEIGHT_DECAY", float, "of AdamW"),
    "seq-length": ("SEQUENCE_LENGTH", int, "tokens that gradients flow back through"),
    "seed": ("SEED", int, "of the initialisation and of what is drawn"),
}
OURS = {  # settings that are made here: what says them
    "INPUT_BIN": "TEXT or --file says it",
    "INPUT_VAL_BIN": "TEXT or --file says it",
    "MAX_TRAIN_TOKENS": "TEXT or --file says it",
    "VAL_TOKENS": "TEXT or --file says it",
    "VOCAB_SIZE": "--tokenizer says it",
    "NUM_ITERATIONS": "--epochs says it",
    "MAX_EPOCHS": "--epochs says it",
    "LOG_EVERY": "--log-every says it",
    "RESUME": "--load says it",
    "DRY_RUN": "this trains",
}


class Plan(NamedTuple):
    """A training run before it starts."""

    env: dict[str, str]  # of the trainer
    run: RunFiles
    epochs: int
    steps: int  # of an epoch
    shown: int  # the step up to which an earlier start has told what happened
    task: rnn_rl.Plan | None = None  # that is learned then

    @property
    def last_step(self) -> int:
        return self.epochs * self.steps


########################################
#                 Text                 #
########################################


def read_text(args: argparse.Namespace) -> str | bytes:
    """TEXT, or what is in --file, or the text of this file. Raises DataError."""
    if not args.file:
        return TEXT if args.text is None else args.text
    try:
        return args.file.read_bytes()
    except OSError as error:
        raise DataError(
            f"--file {args.file}: expected a text, found none that can be read "
            f"({error.strerror}): name another"
        ) from None


def encode(args: argparse.Namespace) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer and the tokens (n,) of the text. Raises DataError."""
    text = read_text(args)
    if args.tokenizer == "chars":
        text = tokenization.text_of(text)
        found = f"only {text[0]!r}" if text else "none"
        if len(set(text)) < 2:
            raise DataError(
                f"the text: expected two different characters or more, found {found}: there is "
                "nothing to learn, give another"
            )
        tokenizer = tokenization.from_chars(text, has_eot=False)
    else:
        tokenizer = tokenization.named(args.tokenizer)
    tokens = tokenizer.encode(text)
    if not len(tokens):
        raise DataError("the text: expected one token or more, found none: give another")
    return tokenizer, tokens


def write_data(place: Path, tokenizer: Tokenizer, tokens: np.ndarray) -> dict[str, str]:
    """Shards for training and validation, both of all tokens, in a folder of this text's own;
    returns the settings that name them."""
    vocabulary = tokenizer.to_json().encode()
    name = hashlib.sha256(vocabulary + tokens.tobytes()).hexdigest()[:12]
    folder = place / name
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / f"{name}_train_000001.bin", tokens)
    write_shard(folder / f"{name}_val_000000.bin", tokens)
    write_file(folder / "tokenizer.json", vocabulary)
    index = {"source": "scripts/rnn_demo.py", "tokenizer": tokenizer.kind} | about(tokenizer)
    write_file(folder / "index.json", dump(index))
    stem = glob.escape(str(folder / name))
    return {"INPUT_BIN": f"{stem}_train_*.bin", "INPUT_VAL_BIN": f"{stem}_val_*.bin"}


########################################
#               Settings               #
########################################


def asked_settings(args: argparse.Namespace) -> dict[str, str]:
    """The settings that the options stand for."""
    settings = {}
    for option, (name, _, _) in OPTIONS.items():
        value = getattr(args, option.replace("-", "_"))
        if value is not None:
            settings[name] = str(value)
    if args.batch_size:
        settings |= dict.fromkeys(("BATCH_SIZE", "DEVICE_BATCH_SIZE"), str(args.batch_size))
    if args.experts:
        settings |= {"FFN": "moe", "SHARED_EXPERT": "1", "NUM_EXPERTS": str(args.experts - 1)}
    if args.fast_mode:
        settings["FFN"] = "none"
    if args.no_rwkv:
        settings["MIXER"] = "gru"
    if args.log_dir:
        settings["LOG_DIR"] = args.log_dir
    return settings


def course(args: argparse.Namespace, steps: int) -> dict[str, str]:
    """The settings of how long is trained, logged and saved, with so many steps an epoch."""
    points = [size for size in range(1, steps + 1) if steps % size == 0]
    few = [size for size in points if args.epochs * steps / size <= MOST_POINTS]
    settings = {
        "NUM_ITERATIONS": args.epochs * steps,
        "MAX_EPOCHS": 0,
        "LOG_EVERY": min(few, default=steps),
    }
    if args.save_every is not None:
        settings["SAVE_EVERY"] = args.save_every * steps
        settings["KEEP_LAST"] = args.epochs // max(1, args.save_every) + 2  # all of them
    return {name: str(value) for name, value in settings.items()}


def check_environment() -> None:
    """Raises ConfigError for a variable that has to be an option here."""
    for name, reason in OURS.items():
        value = os.environ.get(name)
        if value and value != "0":
            raise ConfigError(f"{name}={value}: expected it not to be set, for {reason}: unset it")


def new_plan(args: argparse.Namespace, place: Path | None) -> Plan:
    """A run on the text, whose data are written; what it leaves lies in a folder `place`, or where
    a run's things lie. Raises ConfigError, DataError."""
    env = {**os.environ, "PRESET": os.environ.get("PRESET") or PRESET} | asked_settings(args)
    env["RUN_ID"] = args.run_id or env.get("RUN_ID") or new_run_id("rnn_demo")
    env["SAVE_EVERY"] = env.get("SAVE_EVERY") or "0"
    env["VAL_TOKENS"] = str(2**31)  # enough for all streams, until the text says how many there are
    if place:
        env |= {"LOG_DIR": str(place / "logs"), "RESULTS_CSV": str(place / "results.csv")}
    cfg = Config.from_env(env)
    run = RunFiles(cfg.log_dir, cfg.run_id)
    if run.log.exists():
        raise ConfigError(
            f"--run-id {cfg.run_id}: {run.log} exists; --load {cfg.run_id} goes on with it, or "
            "choose another"
        )
    tokenizer, tokens = encode(args)
    task = None
    if args.do_rl:
        of_task = RunFiles(cfg.log_dir, f"{cfg.run_id}-rl")
        task = rnn_rl.make_plan(args, cfg, tokenizer, run.folder, of_task, place)
    batch = cfg.batch_size * cfg.sequence_length
    steps = math.ceil(len(tokens) / batch)
    env |= course(args, steps) | {"VOCAB_SIZE": "0"}
    samples = min(steps * cfg.batch_size, max(cfg.batch_size, 100))
    env["VAL_TOKENS"] = str(samples * cfg.sequence_length)
    Config.from_env(env)
    filled = np.resize(tokens, steps * batch + 1)
    env |= write_data(place / "data" if place else DATA, tokenizer, filled)

    unit = {"chars": "characters", "bytes": "bytes"}.get(tokenizer.kind, "tokens")
    times, repeated = steps * batch / len(tokens), ""
    if times > 1:
        repeated = f" It is repeated {times:.3g} times, to fill {cfg.batch_size} streams."
    print(
        f"The text has {len(tokens):,} {unit} of a vocabulary of {tokenizer.vocab_size:,}."
        f"{repeated} Steps an epoch: {steps:,}. The loss is of this text itself.",
        flush=True,
    )
    return Plan(env, run, args.epochs, steps, shown=0, task=task)


def loaded_plan(args: argparse.Namespace) -> Plan:
    """A run that goes on with the weights, the optimizer's state and the text of --load.

    A run goes on under its own id, one of its checkpoints as a run of its own. Raises ConfigError,
    DataError.
    """
    folder = find_folder(args.load, args.log_dir or os.environ.get("LOG_DIR") or Config.log_dir)
    trained = read_settings(folder, "auto")
    env = as_environment(trained)
    if re.fullmatch(r"step_\d+", Path(args.load).name):
        begins = int(folder.name.removeprefix("step_"))
        run = RunFiles(folder.parent.parent, args.run_id or new_run_id("rnn_demo"))
        shown, resume = begins, str(folder)
    else:
        own = folder.parent if folder.name.startswith("step_") else folder
        begins = max(step_folders(own), default=0)
        run = RunFiles(own.parent, own.name)
        shown, resume = min(begins, run.last_step()), "auto"
    given = {name: value for name, value in os.environ.items() if value or name not in env}
    env = env | given | asked_settings(args)
    env |= {"LOG_DIR": str(run.folder.parent), "RUN_ID": run.run_id, "RESUME": resume}
    env["PRESET"] = trained.preset
    cfg = Config.from_env(env)
    if not glob.glob(cfg.input_bin):
        raise DataError(
            f"--load {args.load}: expected its text in {cfg.input_bin}, found none: call this from "
            "the folder where the run began, or give the text and begin anew"
        )
    steps = ShardLoader(cfg.input_bin, cfg).samples // cfg.batch_size
    if args.epochs * steps <= begins:
        raise ConfigError(
            f"--epochs {args.epochs}: expected more than the {begins / steps:g} that {args.load} "
            "has made: give the epochs that it is to have then"
        )
    env |= course(args, steps)
    task = None
    if args.do_rl:
        of_task = RunFiles(cfg.log_dir, f"{cfg.run_id}-rl")
        task = rnn_rl.make_plan(args, cfg, read_tokenizer(folder), run.folder, of_task)
    return Plan(env, run, args.epochs, steps, shown, task)


########################################
#               Training               #
########################################


class Trainer:
    """train_gpt.py, or another program, in a process of its own, which is asked to end when this
    one is."""

    def __init__(self, env: dict[str, str], words: Sequence[str] = ("train_gpt.py",), place=None):
        self.env, self.place = env, place
        self.command = [sys.executable, ROOT / words[0], *words[1:]]
        self.process = None
        self.interrupted = False
        self.errors = tempfile.TemporaryFile()

    def __enter__(self) -> Self:
        heeded = [n for n in ENDINGS if signal.getsignal(n) != signal.SIG_IGN]  # as nohup has it
        self.handlers = {n: signal.signal(n, self.ask_to_end) for n in heeded}
        self.process = subprocess.Popen(
            self.command,
            env=self.env,
            cwd=self.place,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
            errors="replace",
        )
        if self.interrupted:
            self.process.terminate()
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdout.close()  # first, or it might wait for a reader
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        for number_, handler in self.handlers.items():
            signal.signal(number_, handler)

    def ask_to_end(self, *_: object) -> None:
        self.interrupted = True
        if self.process:
            self.process.terminate()

    def reason(self) -> str:
        """The last line of what it has said on its standard error."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it has not said why")


class Curve:
    """The points of a run's curve, as they come."""

    def __init__(self, path: Path):
        self.path = path
        self.offset = 0
        self.header = None

    def new(self, step: int) -> Iterator[dict[str, float]]:
        """Those that are new, {column: value}, up to that of `step`, which is about to come."""
        for _ in range(200):
            points = list(self.read())
            yield from points
            if points and points[-1]["step"] >= step:
                return
            time.sleep(0.001)

    def read(self) -> Iterator[dict[str, float]]:
        """The whole lines after those that were read."""
        with open(self.path, "rb") as curve:
            curve.seek(self.offset)
            text = curve.read()
        text = text[: text.rfind(b"\n") + 1]
        self.offset += len(text)
        for cells in csv.reader(text.decode().splitlines()):
            if self.header:
                point = zip(self.header, cells)
                yield {name: float(value) for name, value in point if value}
            else:
                self.header = cells


def show_warning(line: str, program: str = "rnn_demo.py") -> None:
    """What the trainer warns of, but for what is meant: settings of the preset that an option makes
    idle, and a run that goes on for longer."""
    name = line.split()[1]
    is_idle = " has no effect without " in line and not os.environ.get(name)
    changed = re.findall(r"([A-Z_]+) \S+ -> ", line)
    is_longer = changed and set(changed) <= COURSE
    if not is_idle and not is_longer:
        print(f"{program}: {line.strip()}", file=sys.stderr, flush=True)


class Report:
    """What is printed of a run while it trains: a line every so many epochs."""

    def __init__(self, plan: Plan, log_every: int):
        self.plan, self.log_every = plan, log_every
        self.losses, self.norms = [], []  # of this epoch
        self.seconds = 0.0  # of training
        self.best = math.inf  # loss of an epoch
        self.first = None  # (step, seconds) of the first point of this start; False once used

    def add(self, point: dict[str, float]) -> None:
        """Takes a point of the curve, be it of an earlier start."""
        step, self.seconds = int(point["step"]), point["train_time"]
        if "train_loss" in point:
            self.losses.append(point["train_loss"])
            self.norms.append(point["grad_norm"])
        if step > self.plan.shown and self.first is not False:
            self.estimate(step)
        if step % self.plan.steps == 0 and self.losses:
            self.end_epoch(step)

    def estimate(self, step: int) -> None:
        """Says how long it will take, once that is known, where it is more than a minute."""
        if self.first is None:
            self.first = step, self.seconds
        first, began = self.first
        if step < first + SPEED_STEPS:
            return
        left = (self.seconds - began) / (step - first) * (self.plan.last_step - step)
        self.first = False
        if left > 60:
            text = f"{left / 60:.0f} minutes" if left < 7200 else f"{left / 3600:.1f} hours"
            print(f"This will take about {text}; Ctrl-C ends it in good order.", flush=True)

    def end_epoch(self, step: int) -> None:
        """Prints the line of an epoch that is over, where it is due."""
        plan, epoch = self.plan, step // self.plan.steps
        loss, norm = np.mean(self.losses), np.mean(self.norms)
        self.losses, self.norms = [], []
        self.best = min(self.best, loss)
        is_due = epoch % self.log_every == 0 or epoch == plan.epochs
        if step > plan.shown and is_due:
            times = f"Time: {self.seconds:.1f}s"
            print(f"Epoch {epoch:4d} | Loss: {loss:.6f} | ∇: {norm:.4f} | {times}", flush=True)


def train(plan: Plan, args: argparse.Namespace) -> tuple[int, Report]:
    """Trains, and says so when that does not come to its end: (exit code, the Report)."""
    report, curve = Report(plan, args.log_every), Curve(plan.run.curve)
    with Trainer(plan.env) as trainer:
        for line in trainer.process.stdout:
            if line.startswith("warning: "):
                show_warning(line)
            logged = re.match(r"step:(\d+)/\d+ train_loss:", line)
            if logged:
                for point in curve.new(int(logged[1])):
                    report.add(point)
        code = trainer.process.wait()

    run = plan.run
    if is_complete(code, run, plan.last_step):
        return 0, report
    step = max(step_folders(run.folder), default=0)
    what = "nothing is kept"
    if step and not args.no_save:
        way = command(run.run_id, run, args, plan.epochs)
        what = f"step {step:,} of {plan.last_step:,} is kept; {way} goes on"
    return explain_end(code, trainer, what), report


def learn_task(task: rnn_rl.Plan, args: argparse.Namespace, base: str) -> tuple[int, rnn_rl.Report]:
    """Has the model of the run `base` learn a task by rewards; returns what train does."""
    report, curve = rnn_rl.Report(task), Curve(task.run.curve)
    with Trainer(task.env, ["scripts/train_rl.py", *task.words], task.place) as trainer:
        for line in trainer.process.stdout:
            if line.startswith("warning: "):
                show_warning(line, "train_rl.py")
            step = report.read(line)
            for point in () if step is None else curve.new(step):
                report.add(point)
        code = trainer.process.wait()

    if is_complete(code, task.run, task.steps):
        return 0, report
    way = command(base, task.run, args)
    folders = step_folders(task.run.folder)
    what = f"no step of the task is kept; {way} begins with it anew"
    if folders:
        what = f"step {max(folders):,} of {task.steps:,} is kept; {way} goes on"
    if args.no_save:
        what = "nothing is kept"
    return explain_end(code, trainer, what), report


def is_complete(code: int, run: RunFiles, last_step: int) -> bool:
    """Whether the process that has ended with this exit code has made all steps of the run."""
    status = run.summary()["status"] if run.json.exists() else ""
    return code == 0 and status == "ok" and run.last_step() == last_step


def explain_end(code: int, trainer: Trainer, what: str) -> int:
    """Says why a run has not come to its end, or what is kept of it; returns the exit code."""
    if code and not trainer.interrupted:
        print(f"rnn_demo.py: error: {trainer.reason()}", file=sys.stderr)
        return code
    print(f"interrupted: {what}", file=sys.stderr)
    return 130 if trainer.interrupted else 0


def command(load: str, run: RunFiles, args: argparse.Namespace, epochs: int = 0) -> str:
    """What goes on with a run, up to so many epochs, or with the task that is learned then."""
    script = os.path.relpath(ROOT / "scripts" / "rnn_demo.sh")
    words = ["bash", script, "--load", load]
    if epochs:
        words += ["--epochs", str(epochs)]
    elif args.load and args.run_id:
        words += ["--run-id", args.run_id]
    log_dir = str(run.folder.parent)
    if log_dir != (os.environ.get("LOG_DIR") or Config.log_dir):
        words += ["--log-dir", log_dir]
    return shlex.join(words + rnn_rl.words_of(args))


########################################
#               Writing                #
########################################


def write(plan: Plan, args: argparse.Namespace, report: Report) -> None:
    """Says how training went and what it leaves, then what the model writes."""
    run = plan.run
    print(f"Done in {report.seconds:.1f}s | Best loss: {report.best:.6f}\n")
    say_what_is_kept(run, args)
    if args.save_every and not args.no_save:
        for step, folder in step_folders(run.folder).items():
            print(f"  after epoch {step / plan.steps:g}: {folder}")
    print()
    write_text(load_trained(str(run.folder)), args)
    if not args.no_save and not args.do_rl:
        way = command(run.run_id, run, args, 2 * plan.epochs)
        print(f"next: {way}   # trains on", flush=True)


def write_task(task: rnn_rl.Plan, args: argparse.Namespace, report: rnn_rl.Report) -> None:
    """The same after reinforcement learning, with some answers."""
    print(f"Done in {report.seconds:.1f}s\n")
    say_what_is_kept(task.run, args)
    print()
    trained = load_trained(str(task.run.folder))
    rnn_rl.print_answers(trained, task.lesson)
    write_text(trained, args)


def say_what_is_kept(run: RunFiles, args: argparse.Namespace) -> None:
    if args.no_save:
        print("Nothing is kept (--no-save).")
        return
    weights = run.folder / "model.safetensors"
    print(f"Saved checkpoint to {weights} ({weights.stat().st_size / 1e6:.2f} MB)")


def write_text(trained: Trained, args: argparse.Namespace) -> None:
    """What the model writes after the first token of its text, or after none where that is gone."""
    files = sorted(glob.glob(trained.cfg.input_val_bin))
    prompt = load_shard(files[0])[:1].tolist() if files else encode_prompt(trained, "")
    print(f"Temperature: {args.temperature:g}")
    print(f"Generated ({args.gen_length} tokens):\n{RULE}")
    print(trained.tokenizer.decode(prompt), end="", flush=True)
    options = {"temperature": args.temperature, "seed": trained.cfg.seed}
    for (new,) in stream(trained, [prompt], args.gen_length, **options):
        print(new, end="", flush=True)
    print(f"\n{RULE}", flush=True)


########################################
#            Command line              #
########################################


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with code 2 and one sentence where it cannot be run."""
    parser = argparse.ArgumentParser(
        prog="rnn_demo.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("text", nargs="*", metavar="TEXT", help="text to learn, in quotes")
    add("--file", type=Path, help="file with the text")
    add("--tokenizer", default="chars", help="chars, bytes, gpt2 or a tokenizer.json (chars)")
    add("--epochs", type=number(int, 0, 10**7), help=f"passes over the text ({EPOCHS})")
    add("--log-every", type=number(int, 1), default=25, help="epochs between lines (25)")
    add("--temperature", type=number(float, 0, 1e6), default=0.8, help="of what it writes (0.8)")
    add("--gen-length", type=number(int, 1, 10**7), default=100, help="tokens it writes (100)")
    for option, (setting, kind, what) in OPTIONS.items():
        least = 0 if option in ("seed", "weight-decay", "lr") else 1
        add(f"--{option}", type=number(kind, least), help=f"{setting}: {what}")
    add("--batch-size", type=number(int, 1), help="BATCH_SIZE: streams side by side")
    add("--experts", type=number(int, 2), help="experts of a layer, the one for all among them")
    add("--fast-mode", action="store_true", help="FFN=none: no experts")
    add("--no-rwkv", action="store_true", help="MIXER=gru: without linear attention")
    add("--save-every", type=number(int, 0), help="epochs between checkpoints; 0: at the end (0)")
    add("--no-save", action="store_true", help="leave nothing behind, neither model nor log")
    add("--run-id", help="name of the run")
    add("--log-dir", help="LOG_DIR: folder of the runs (logs)")
    add("--load", metavar="RUN", help="go on with a run or one of its checkpoints, up to --epochs")
    rnn_rl.add_options(parser)
    args = parser.parse_args(argv)
    words = args.text
    args.text = words[0] if words else None
    problem = option_problem(args)
    if len(words) > 1:
        problem = f"argument TEXT: expected one, in quotes, found {len(words)}: quote it"
    if problem:
        parser.error(problem)
    if args.epochs is None and not rnn_rl.is_alone(args):
        args.epochs = EPOCHS
    return args


def option_problem(args: argparse.Namespace) -> str | None:
    """What of the options does not go together, in one sentence."""
    if args.text is not None and args.file:
        return "argument --file: expected no TEXT beside it, found both: leave one out"
    if args.fast_mode and (args.experts or args.top_k):
        return "argument --fast-mode: expected no --experts or --top-k, for it has none: leave out"
    is_alone = rnn_rl.is_alone(args)
    if args.epochs == 0 and not is_alone:
        return "argument --epochs: expected 1 to 10000000, found 0"
    if not args.load:
        return rnn_rl.option_problem(args)
    is_step = re.fullmatch(r"step_\d+", Path(args.load).name)
    others = {
        "TEXT": args.text is not None,
        "--file": args.file,
        "--tokenizer": args.tokenizer != "chars",
        "--no-save": args.no_save,
        "--run-id": args.run_id and not is_step and not is_alone,
    }
    found = [name for name, value in others.items() if value]
    if found:
        return (
            f"argument --load: expected no {found[0]}, for a run goes on with its own text under "
            f"its own name: leave it out (INIT_FROM={args.load} starts a new run with its weights)"
        )
    return rnn_rl.option_problem(args)


def demo(args: argparse.Namespace) -> int:
    """Trains and writes; returns the exit code. Raises ConfigError, DataError, OSError."""
    check_environment()
    if rnn_rl.is_alone(args):
        return demo_task(rnn_rl.loaded_plan(args), args, args.load)
    with tempfile.TemporaryDirectory() if args.no_save else contextlib.nullcontext() as place:
        plan = loaded_plan(args) if args.load else new_plan(args, place and Path(place))
        code, report = train(plan, args)
        if code == 0 and math.isfinite(report.best):
            write(plan, args, report)
        if code == 0 and plan.task:
            print()
            return demo_task(plan.task, args, plan.run.run_id)
    return code


def demo_task(task: rnn_rl.Plan, args: argparse.Namespace, base: str) -> int:
    """Learns a task with the model of `base`, and writes; returns the exit code."""
    print(
        f"Learning {task.lesson.cfg.task} by rewards, as {task.run.run_id}: steps {task.steps:,}, "
        f"of {rnn_rl.PROMPTS} prompts each; before them a warm-up on right answers.",
        flush=True,
    )
    code, report = learn_task(task, args, base)
    if code == 0:
        write_task(task, args, report)
    return code


def main(argv: list[str] | None = None) -> int:
    """Exit code as above."""
    args = parse_args(argv)
    if sys.stdout:  # it may be closed
        sys.stdout.reconfigure(errors="replace")
    try:
        return demo(args)
    except BrokenPipeError:  # who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ConfigError, DataError, OSError) as error:
        print(f"rnn_demo.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
