"""Reinforcement learning after rnn_demo.py has trained: its options, its settings, what it prints.

The work is done by train_rl.py in a process of its own, from the weights of the text. A model of a
text knows nothing of a task, so that it learns from right answers first, the warm-up, until one
sampled answer in ten is right; from there on by rewards alone.
"""

import argparse
import dataclasses
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_gpt
from harness.checkpoints import step_folders
from harness.files import RunFiles
from store.contract import ConfigError, DataError
from load_model import Trained, find_folder, read_settings, read_tokenizer
from rl_settings import with_options
from rl_tasks import TASKS
from rollouts import Lesson, draw_answers, make_lesson, missing_characters
from sample import number
from tokenization import Tokenizer
from train_gpt import GPT, Config

# With these two minutes show something: copying by models of 64 and 128 channels.
EPISODES = 800
PROMPTS = 8  # of a step; an episode is one of them, with 16 answers
RATE = 0.5  # of the learning rate that the text was learned with
WARM_UP_RATE = 4  # likewise
WARM_UP_ROWS = 64  # texts of a step
WARM_UP = ["--warm-up-steps", "1500", "--warm-up-until", "0.1"]
LENGTH = 3  # at most, unless --rl-length says: these models are small

KEPT = ("DEVICE", "DTYPE", "STAGE", "VARIANT", "NOTE", "RESULTS_CSV")  # settings of both runs
LINES = 10  # at most, of the steps
WARM_UP_EVERY = 50  # steps between the lines of the warm-up
ANSWERS = 5  # that are shown at the end
OPTIONS = ("rl_task", "rl_length", "rl_episodes", "rl_learning_rate")


class Plan(NamedTuple):
    """A run of train_rl.py before it starts."""

    run: RunFiles
    steps: int
    shown: int  # the step up to which an earlier start has told what happened
    lesson: Lesson  # with the tokenizer of the model
    words: list[str]  # of the command line
    env: dict[str, str]
    place: Path | None  # folder that it runs in, if not here


########################################
#               Options                #
########################################


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--do-rl", action="store_true", help="then learn a task by rewards: train_rl.py")
    add("--rl-task", choices=list(TASKS), help="of rl_tasks.py (copy)")
    add("--rl-length", type=number(int, 1, 2**20), help="letters (3), or digits of a number (1)")
    add(
        "--rl-episodes",
        type=number(int, 1, 10**9),
        help=f"prompts with 16 answers each, {PROMPTS} of them a step ({EPISODES})",
    )
    add(
        "--rl-learning-rate",
        type=number(float, 0),
        help="learning rate by rewards (half of LR; the warm-up has four times LR)",
    )


def option_problem(args: argparse.Namespace) -> str | None:
    """What of these options needs another, in one sentence."""
    given = [name for name in OPTIONS if getattr(args, name) is not None]
    if given and not args.do_rl:
        option = "--" + given[0].replace("_", "-")
        return f"argument {option}: expected --do-rl beside it, found none: add it"
    return None


def words_of(args: argparse.Namespace) -> list[str]:
    """These options as a command line has them; [] without --do-rl."""
    words = ["--do-rl"] if args.do_rl else []
    for name in OPTIONS:
        value = getattr(args, name)
        if value is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    return words


def is_alone(args: argparse.Namespace) -> bool:
    """Whether the model of --load learns a task without learning more of its text before."""
    return bool(args.load and args.do_rl and not args.epochs)


########################################
#               Settings               #
########################################


def make_plan(
    args: argparse.Namespace,
    cfg: Config,
    tokenizer: Tokenizer | None,
    folder: Path,
    run: RunFiles,
    place: Path | None = None,
) -> Plan:
    """What goes on, as `run`, from the weights that are, or will be, in a folder, of a model with
    these settings and this tokenizer. It runs in the folder `place`, or here.

    Raises ConfigError, DataError.
    """
    check_is_free(args, run)
    task = args.rl_task or "copy"
    length = args.rl_length or min(LENGTH, TASKS[task].usual_length)
    lesson = lesson_of(dataclasses.replace(cfg, run_id=run.run_id), tokenizer, task, length)
    steps = math.ceil((args.rl_episodes or EPISODES) / PROMPTS)
    rate = RATE * cfg.lr if args.rl_learning_rate is None else args.rl_learning_rate
    words = ["--from", str(folder), "--task", task, "--length", str(length)]
    words += ["--steps", str(steps), "--lr", f"{rate:g}", "--prompts-per-step", str(PROMPTS)]
    words += [*WARM_UP, "--warm-up-lr", f"{WARM_UP_RATE * cfg.lr:g}"]
    shown = max(step_folders(run.folder), default=0)
    return Plan(run, steps, shown, lesson, words, environment(run, place), place)


def loaded_plan(args: argparse.Namespace) -> Plan:
    """That of a model which learns no more of its text before. Raises ConfigError, DataError."""
    log_dir = args.log_dir or os.environ.get("LOG_DIR") or Config.log_dir
    folder = find_folder(args.load, log_dir)
    own = folder.parent if re.fullmatch(r"step_\d+", folder.name) else folder
    run = RunFiles(own.parent, args.run_id or f"{own.name}-rl")
    return make_plan(args, read_settings(folder, "auto"), read_tokenizer(folder), folder, run)


def check_is_free(args: argparse.Namespace, run: RunFiles) -> None:
    """Raises ConfigError where a run is there already that this would not go on with."""
    if not run.log.exists():
        return
    has_finished = run.json.exists() and run.summary()["status"] == "ok"
    if not is_alone(args):
        raise ConfigError(
            f"--do-rl: {run.log} exists; leave it out, and then --load with --do-rl and --run-id "
            "gives it another name"
        )
    if has_finished:
        raise ConfigError(f"--do-rl: {run.log} has finished; --run-id gives it another name")


def lesson_of(cfg: Config, tokenizer: Tokenizer | None, task: str, length: int) -> Lesson:
    """The task in the tokens of a model, which need not be there yet. Raises ConfigError,
    DataError."""
    if tokenizer is None:
        raise DataError(
            "--load: expected a tokenizer.json in its folder, found none: copy it there"
        )
    missing = missing_characters(TASKS[task](), tokenizer)
    if missing:
        raise DataError(
            f"--rl-task {task}: the vocabulary has no {missing!r}, which the task writes: a model "
            "with --tokenizer bytes, or a BPE, has every character"
        )
    cfg = dataclasses.replace(cfg, vocab_size=tokenizer.vocab_size)
    cfg = train_gpt.resolve(with_options(cfg, {"task": task, "length": length}))
    with torch.device("meta"):
        context = GPT(cfg).context
    return make_lesson(cfg, tokenizer, context)


def environment(run: RunFiles, place: Path | None) -> dict[str, str]:
    """Variables of train_rl.py: what the text was learned with comes with the weights."""
    settings = {name.upper() for name in Config.__dataclass_fields__} - set(KEPT)
    env = {name: value for name, value in os.environ.items() if name not in settings}
    env |= {"RUN_ID": run.run_id, "LOG_DIR": str(run.folder.parent), "RESUME": "auto"}
    env |= dict.fromkeys(("BATCH_SIZE", "DEVICE_BATCH_SIZE"), str(WARM_UP_ROWS))
    env |= {"LOG_EVERY": "1", "VAL_EVERY": "0", "SAVE_EVERY": "0"}
    if place:
        env["RESULTS_CSV"] = str(place / "results.csv")
    return env


########################################
#               Printing               #
########################################


class Report:
    """What is printed of a run while it learns: its warm-up, its steps, what is held out."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.every = math.ceil(plan.steps / LINES)  # steps of a line
        self.rewards, self.right = [], []  # of the steps since the last line
        self.warm_up = ""  # its last line, where it is not printed yet
        self.seconds = 0.0  # of learning by rewards

    def read(self, line: str) -> int | None:
        """Takes a line of the log; returns the step whose point of the curve is about to come."""
        warm_up = re.match(r"warm_up:(\d+)/\d+(?: loss:(\S+))? right:(\S+)", line)
        if warm_up:
            self.end_warm_up_line(int(warm_up[1]), warm_up[2], float(warm_up[3]))
        held_out = re.match(
            r"\[RL\] step:(\d+)/\d+ held_out:(\d+) pass@1:(\S+) \((\S+) to (\S+)\)", line
        )
        if held_out:
            self.end_validation(*held_out.groups())
        step = re.match(r"\[RL\] step:(\d+)/\d+ (?!held_out)", line)
        return int(step[1]) if step else None

    def end_warm_up_line(self, step: int, loss: str | None, right: float) -> None:
        """Prints every so many lines of the warm-up; the last one waits for what comes next."""
        loss = f" | Loss: {float(loss):.6f}" if loss else ""
        self.warm_up = f"Warm-up {step:4d}{loss} | Right: {right:.1%}"
        if step % WARM_UP_EVERY == 0:
            self.print_warm_up()

    def print_warm_up(self) -> None:
        if self.warm_up:
            print(self.warm_up, flush=True)
        self.warm_up = ""

    def end_validation(self, step: str, prompts: str, rate: str, low: str, high: str) -> None:
        """Prints how many of the held-out prompts are answered, by the likeliest answers."""
        self.print_warm_up()
        when = "before" if step == "0" else "after"
        interval = f"{float(low):.1%} to {float(high):.1%}"
        print(
            f"Held out, {when}: {float(rate):.1%} right ({interval}) of {prompts} prompts that "
            "are never trained on",
            flush=True,
        )

    def add(self, point: dict[str, float]) -> None:
        """Takes a point of the curve, be it of an earlier start; prints a line where one is due."""
        step, self.seconds = int(point["step"]), point["train_time"]
        if "reward" not in point:
            return
        self.rewards.append(point["reward"])
        self.right.append(point["exact"])
        if step % self.every and step != self.plan.steps:
            return
        if step > self.plan.shown:
            reward, right = np.mean(self.rewards), np.mean(self.right)
            times = f"Time: {self.seconds:.1f}s"
            print(
                f"Step {step:5d} | Reward: {reward:.4f} | Right: {right:.1%} | {times}", flush=True
            )
        self.rewards, self.right = [], []


def print_answers(trained: Trained, lesson: Lesson) -> None:
    """The likeliest answers to some of the prompts that are held out."""
    prompts = lesson.held_out[:ANSWERS]
    rows = list(range(len(prompts)))
    tokens = [lesson.encode(prompt) for prompt in prompts]
    answers = draw_answers(trained.model, lesson, tokens, rows, np.zeros((len(rows), 0)))
    print("Answers to prompts that are held out:")
    for prompt, answer in zip(prompts, answers):
        is_right = lesson.score(prompt, answer).exact == 1
        text = lesson.tokenizer.decode(token for token in answer if token != lesson.end)
        verdict = "right" if is_right else f"wrong, {lesson.task.answer(prompt)} is right"
        print(f"  {prompt} -> {text!a:8} {verdict}")
    print(flush=True)
