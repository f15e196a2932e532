"""Reinforcement learning on tasks whose answers can be checked: Group Relative Policy Optimization.

    python scripts/train_rl.py --task copy                        # a small model from nothing
    python scripts/train_rl.py --task arithmetic --from RUN_ID    # goes on with a trained one
    torchrun --standalone --nproc_per_node=2 scripts/train_rl.py --task reverse --length 4

A step draws a group of answers to each of several prompts, gives every answer 1 where it is right
and else 0, and makes answers likelier that earned more than their group's mean (arXiv 2402.03300).
Without --from the model learns from right answers first, until sampled ones are right now and
then. Prompts that are validated are never trained on. Options are below; all else is set as for
train_gpt.py, by variables: PRESET=rl_tasks N_LAYER=4 OPTIMIZER=adamw python scripts/train_rl.py.
Log, curve, row, checkpoints, signals and exit codes are those of train_gpt.py.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing

import os

from store.process import before_torch

if __name__ == "__main__":
    before_torch(os.environ)

import argparse
import contextlib
import dataclasses
import glob
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import grpo
import tokenization
import train_gpt
from encode_shards import dump
from harness.ranks import Ranks
from harness.run import Run
from harness.settings import read_preset
from store.contract import ConfigError, DataError, Diverged
from store.files import sha256sum, write_whole
from store.source import source_hash
from load_model import as_environment, find_trusted, read_settings, read_tokenizer, read_weights
from prepare_data import about
from rl_settings import (
    OWN,
    PRESET,
    SLOWER,
    RLConfig,
    add_options,
    option_of,
    scaled_rates,
    supervised,
    with_options,
)
from rl_tasks import TASKS
from rollouts import TEXT, WARM_UP, Batch, Lesson, Rollouts, answer_held_out, chances_of
from rollouts import draw_answers, fitting_prompt, make_lesson, roll_out, token_logprobs
from train_gpt import GPT, Config, ShardLoader, State, build_optimizers

ROOT = Path(__file__).resolve().parents[1]
PARTS = "train_rl rl_settings rollouts grpo rl_tasks".split()
FILES = [ROOT / "train_gpt.py", *(ROOT / "scripts" / f"{part}.py" for part in PARTS)]
SOURCE = "".join(file.read_text("utf-8") for file in FILES)  # for the log and source_sha
DATA = Path("data/rl")  # has a folder for each vocabulary
WARM_UP_STEPS = 2000  # at most, where there is no checkpoint to start from
WARM_UP_EVERY = 2  # steps between looks at how often it is right, until some answer is
WARM_UP_SAMPLES = 256  # answers of such a look
SAMPLES, KS = 8, (1, 4, 8)  # answers to a held-out prompt, and the k of pass@k
PATIENCE = 10  # steps in a row without any signal, after which the run says so
RECENT = 5  # steps, in the mean of which a curriculum looks at the part that is right
LEARNED, UNLEARNED = 0.9, 0.1  # from the one on it goes on, below the other back
COLUMNS = """
    reward reward_sd exact no_signal entropy kl_to_start clip_fraction ended answer_length unscored
    prompt_length pass_at_1
""".split()
COURSE = """
    num_iterations val_every log_every save_every grad_clip lr_schedule warmup_iters warmdown_iters
    warmdown_frac decay_schedule momentum_start momentum_warmup_iters momentum_cooldown_iters
""".split()  # settings that the run of a checkpoint says for itself only
LABELS = [*Config.LABELS, "init_from", "device"]  # likewise
MODEL = """
    vocab_size n_layer n_head n_embd d_ff mixer ffn norm pos qk_norm bias tie_embeddings attngate
    gatepos gateact num_experts top_k expert shared_expert recurrence n_unique unshared_ends
    per_visit reset_at_eot preset
""".split()  # settings that come with the weights of a checkpoint
OURS = {  # settings that are made here: what says them
    "INPUT_BIN": "--task says what is trained on",
    "INIT_FROM": "--from says it",
    "CARRY_STATE": "every answer begins with its prompt",
    "SAMPLE_EVERY": "the log has answers at the beginning and at the end",
}


########################################
#               Settings               #
########################################


class Start(NamedTuple):
    """What a run begins with."""

    lesson: Lesson
    folder: Path | None = None  # with the weights; None: new ones
    val_loader: ShardLoader | None = None  # of the data that validated the checkpoint, if here
    supervised: RLConfig | None = None  # settings of the warm-up
    changes: str = ""  # what was asked for, beside the defaults


def prepare(given: Mapping[str, Any], env: Mapping[str, str]) -> Start:
    """What options and environment ask for. Raises ConfigError, DataError."""
    for name, reason in OURS.items():
        if env.get(name, "0") not in ("", "0"):
            raise ConfigError(f"{name}={env[name]}: expected it not to be set, for {reason}")
    folder = None
    if given.get("from_checkpoint"):
        folder = find_trusted(given["from_checkpoint"], env.get("LOG_DIR") or Config.log_dir)
        cfg, tokenizer = settings_of(folder, env), read_tokenizer(folder)
        if tokenizer is None:
            raise ConfigError(
                f"--from: {folder} has no tokenizer.json that can be read; copy that of its "
                "dataset there"
            )
    else:
        cfg = Config.from_env({**env, "PRESET": env.get("PRESET") or PRESET})
        # Those of all tasks, so that who has learned one may go on with another.
        characters = {character for task in TASKS.values() for character in task().characters}
        tokenizer = tokenization.from_chars(characters, has_eot=True)
    if 0 < cfg.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"VOCAB_SIZE={cfg.vocab_size}: the vocabulary has {tokenizer.vocab_size}; unset it"
        )

    trainer = dataclasses.replace(cfg, carry_state=False, ema_iters=0)
    asked = cfg = with_options(trainer, given)
    changes = {
        "vocab_size": cfg.vocab_size or tokenizer.vocab_size,
        "input_bin": f"{vocabulary_folder(tokenizer)}/*.bin",
        "compile": "0",  # sizes differ from step to step
    }
    if not folder:
        changes["input_val_bin"] = changes["input_bin"]  # there are none: right answers are read
    if cfg.warm_up_steps < 0:
        changes["warm_up_steps"] = 0 if folder else WARM_UP_STEPS
    cfg = train_gpt.resolve(dataclasses.replace(cfg, **changes))
    lesson = make_lesson(cfg, tokenizer, empty_model(cfg).context)
    if folder:
        read_weights(empty_model(cfg), folder)  # before anything is written
    val_loader = language_data(cfg) if folder else None
    return Start(lesson, folder, val_loader, supervised(trainer, cfg), asked.changes_text())


def empty_model(cfg: RLConfig) -> GPT:
    """A model without numbers or memory."""
    with torch.device("meta"):
        return GPT(cfg)


def settings_of(folder: Path, env: Mapping[str, str]) -> Config:
    """The settings of a trained model with lower rates, and what the environment adds to them.

    Raises ConfigError where that changes the model.
    """
    trained = read_settings(folder, "cpu")
    own = as_environment(scaled_rates(trained, SLOWER))
    course = read_preset(PRESET, None, "")
    for name in (*COURSE, *LABELS):
        own.pop(name.upper(), None)
        if name in COURSE and name.upper() in course:
            own[name.upper()] = course[name.upper()]
    given = {name: value for name, value in env.items() if value}
    own |= {"DTYPE": "auto", "CARRY_STATE": "0"}  # an answer begins with its prompt, not a stream
    cfg = Config.from_env(own | given)
    for name in MODEL:
        ours, theirs = getattr(cfg, name), getattr(trained, name)
        if ours != theirs:
            raise ConfigError(
                f"{name.upper()}={ours}: the model of --from has {theirs}; unset {name.upper()}"
            )
    return cfg


def language_data(cfg: RLConfig) -> ShardLoader | None:
    """The data that validated a checkpoint, where they are here. Raises DataError."""
    if not glob.glob(cfg.input_val_bin):
        return None
    loader = ShardLoader(cfg.input_val_bin, cfg, limit=cfg.val_tokens)
    shortfall = loader.shortfall("VAL_TOKENS", cfg.val_tokens, cfg.val_tokens // loader.length)
    if shortfall:
        raise DataError(shortfall)
    return loader


def vocabulary_folder(tokenizer: tokenization.Tokenizer) -> Path:
    """Where the vocabulary of a run lies, as that of a dataset does."""
    return DATA / hashlib.sha256(tokenizer.to_json().encode()).hexdigest()[:12]


def write_vocabulary(tokenizer: tokenization.Tokenizer) -> None:
    """What checkpoints copy, so that other scripts can read what a model writes.

    Raises ConfigError.
    """
    folder = vocabulary_folder(tokenizer)
    record = {"source": "scripts/train_rl.py", "tokenizer": tokenizer.kind} | about(tokenizer)
    try:
        write_whole(folder / "tokenizer.json", tokenizer.to_json())
        write_whole(folder / "index.json", dump(record))
    except OSError as error:
        raise ConfigError(
            f"{folder}: the vocabulary cannot be written there ({error}); start from another folder"
        ) from None


def make_plan(start: Start, ranks: Ranks) -> dict[str, Any]:
    """What the run will be, for its records. Raises ConfigError where ranks cannot share it."""
    lesson, cfg = start.lesson, start.lesson.cfg
    answers = cfg.prompts_per_step * cfg.group_size
    if answers < ranks.world_size:
        raise ConfigError(
            f"--prompts-per-step {cfg.prompts_per_step} x --group-size {cfg.group_size}: fewer "
            f"answers than {ranks.world_size} ranks; ask for more, or start fewer ranks"
        )
    if cfg.warm_up_steps:
        train_gpt.check_batch(cfg, ranks)
    begins_with = "new weights"
    if start.folder:
        weights = start.folder / "model.safetensors"
        begins_with = sha256sum(weights if weights.exists() else start.folder / "SHA256SUMS")
    vocabulary = lesson.tokenizer.to_json()
    most = answers * lesson.most
    return train_gpt.make_plan(cfg, ranks) | {
        "source_sha": source_hash(SOURCE),
        "tokens_per_step": most,  # at most
        "tokens_needed": most * cfg.num_iterations,
        "data_fingerprint": hashlib.sha256((begins_with + vocabulary).encode()).hexdigest(),
        "val_fingerprint": lesson.fingerprint(),
        "val_prompts": len(lesson.held_out),
        "steps": cfg.num_iterations,  # as the option is called
    }


def cautions(env: Mapping[str, str], lesson: Lesson) -> list[str]:
    """A sentence for everything that is allowed and hardly meant."""
    cfg, sentences = lesson.cfg, train_gpt.cautions(lesson.cfg)
    for name in OWN:
        if env.get(name.upper()):
            sentences.append(f"{name.upper()} is no setting; the option is {option_of(name)}")
    if cfg.group_size == 1:
        sentences.append("--group-size 1: a group of one has no mean to exceed; nothing is learned")
    answers = [lesson.encode(lesson.task.answer(prompt)) for prompt in lesson.held_out]
    needed = min(map(len, answers)) + 1
    if lesson.most < needed:
        sentences.append(
            f"--max-new-tokens {lesson.most}: a right answer with its end has {needed} or more"
        )
    return sentences


########################################
#                State                 #
########################################


@dataclasses.dataclass
class Progress:
    """What changes from step to step beside tensors, as JSON can hold it."""

    length: int  # of the prompts
    tokens: int = 0  # of all answers until now
    silent: int = 0  # steps in a row in which no group had a signal
    recent: list = dataclasses.field(default_factory=list)  # parts that were right, at this length
    last: dict = dataclasses.field(default_factory=dict)  # what the last step measured


@dataclasses.dataclass
class Learner:
    """The policy with its optimizers, and as it was at the start."""

    state: State
    start: GPT
    progress: Progress

    def tensors(self):
        """What a checkpoint holds."""
        start = self.start.state_dict()
        held = {f"start.{name}": (tensor, "copy") for name, tensor in start.items()}
        return self.state.tensors() | held

    def save(self, run: Run) -> None:
        run.save(self.tensors(), dataclasses.asdict(self.progress), bad_lines(self.state, run))


def bad_lines(state: State, run: Run) -> list[list[str]]:
    """For each update since the last call [], or a line that its gradient was not finite."""
    updates = torch.stack(state.bad).tolist() if state.bad else []
    state.bad.clear()
    line = f"step:{run.step}/{run.cfg.num_iterations} bad_gradient, left out"
    return [[line] if is_bad else [] for is_bad, *_ in updates]


def begin(start: Start, run: Run) -> Learner:
    """The learner at its start, warmed up where that is asked for, or as a checkpoint has it."""
    lesson, cfg = start.lesson, start.lesson.cfg
    state = State.build(cfg, run.ranks)
    frozen = GPT(cfg, state.model.dtype).to(state.model.embed.device)
    frozen.requires_grad_(False).eval()
    learner = Learner(state, frozen, Progress(1 if cfg.curriculum else cfg.length))
    saved = run.restore(learner.tensors())
    if saved:
        learner.progress = Progress(**saved[1])
    else:
        if start.folder:
            read_weights(state.model, start.folder)
        if cfg.warm_up_steps:
            run.meter.seconds.setdefault("warm_up_time", 0.0)
            run.poll(0)  # which starts the clocks
            with run.timed("warm_up_time"):
                warm_up(state, lesson, start.supervised, run)
            state.optimizers = build_optimizers(state.model, cfg, run.ranks)  # without moments
        frozen.load_state_dict(state.model.state_dict())
        if cfg.warm_up_steps and not run.poll(0):
            learner.save(run)
    state.model.eval()  # no dropout, and routers that stay as they are
    run.meter.tokens = lambda step: learner.progress.tokens
    run.meter.peak = None  # answers are drawn token by token: no figure of training says how well
    return learner


########################################
#               Warm-up                #
########################################


def warm_up(state: State, lesson: Lesson, supervised: RLConfig, run: Run) -> None:
    """Steps of the trainer, set by `supervised`, on right answers, until those that the model draws
    are right now and then. Raises Diverged."""
    cfg, ranks = lesson.cfg, run.ranks
    state.optimizers = build_optimizers(state.model, supervised, ranks)
    own = cfg.batch_size // ranks.world_size
    right, loss = 0.0, ""
    for step in range(cfg.warm_up_steps + 1):
        is_last = step == cfg.warm_up_steps
        if step % WARM_UP_EVERY == 0 or right or is_last:
            right = pass_rate(state.model, lesson, step, ranks)
            run.print(f"warm_up:{step}/{cfg.warm_up_steps}{loss} right:{right:.3f}")
            if right >= cfg.warm_up_until or is_last:
                break
        if run.poll(0):
            return
        first, context = ranks.rank * own, state.model.context
        texts = [warm_up_text(lesson, context, step, first + i) for i in range(own)]
        rows = Batch.of(texts, [[]] * own, lesson.end, state.model.embed.device).tokens
        state.model.train()
        stats = train_gpt.train_step(state, supervised, rows[:, :-1], rows[:, 1:])
        loss = f" loss:{stats.loss.item():.4f}"
    if not 0.05 <= right <= 0.5:
        run.print(
            f"warning: {right:.1%} of the answers are right after the warm-up: {advice(right)}"
        )
    if not all(p.isfinite().all() for p in state.model.parameters()):
        raise Diverged("the warm-up ended in weights that are not finite; lower LR")
    state.bad.clear()


def advice(right: float) -> str:
    """What to do where sampled answers are right this often after a warm-up."""
    if right < 0.05:
        return "few groups will differ; raise --warm-up-steps, or lower --length"
    return "little is left to learn; lower --warm-up-until, or raise --length"


def warm_up_text(lesson: Lesson, context: float, step: int, row: int) -> list[int]:
    """A prompt that is not held out with its right answer."""
    return lesson.text(warm_up_prompt(lesson, context, TEXT, step, row))


def warm_up_prompt(lesson: Lesson, context: float, *key: int) -> str:
    """A prompt that is not held out, by this key; before a curriculum of any length up to the
    longest."""
    cfg = lesson.cfg
    rng = np.random.default_rng((cfg.seed, *key))
    length = int(rng.integers(1, cfg.length + 1)) if cfg.curriculum else cfg.length
    return fitting_prompt(lesson, context, rng, length)


def pass_rate(model: GPT, lesson: Lesson, step: int, ranks: Ranks) -> float:
    """The part of answers to training prompts, as they are drawn in training, that is right."""
    model.eval()
    right = torch.zeros(1)
    numbers = range(ranks.rank, WARM_UP_SAMPLES, ranks.world_size)
    keys = [(WARM_UP, step, number) for number in numbers]
    prompts = [warm_up_prompt(lesson, model.context, *key, 0) for key in keys]
    tokens = [lesson.encode(prompt) for prompt in prompts]
    chances = chances_of(lesson, *keys)
    answers = draw_answers(model, lesson, tokens, list(range(len(prompts))), chances)
    for prompt, answer in zip(prompts, answers):
        right += lesson.score(prompt, answer).exact == 1
    dist.all_reduce(right)
    return right.item() / WARM_UP_SAMPLES


########################################
#               Learning               #
########################################


def take_step(learner: Learner, lesson: Lesson, run: Run) -> None:
    """Draws answers, learns from them where they differ, and notes what was measured."""
    progress, ranks, model = learner.progress, run.ranks, learner.state.model
    rollouts = roll_out(model, lesson, run.step, progress.length, ranks.rank, ranks.world_size)
    has_signal = grpo.has_signal(rollouts.rewards)
    figures = describe(rollouts, has_signal) | {"prompt_length": progress.length}
    is_scored = not rollouts.rewards.isnan().all()  # else there is no part in any loss
    if has_signal.any() or (lesson.cfg.kl and is_scored):
        figures |= improve(learner, lesson, rollouts, run)
    progress.last = figures
    progress.tokens += int(rollouts.lengths.sum())
    progress.silent = 0 if has_signal.any() else progress.silent + 1
    if progress.silent == PATIENCE:
        run.print(f"warning: no group had a signal in {PATIENCE} steps: {silence(figures)}")
    if lesson.cfg.curriculum:
        next_length(progress, figures["exact"], lesson.cfg.length)


def describe(rollouts: Rollouts, has_signal: Tensor) -> dict[str, float]:
    """Figures of the answers of a step."""
    scored = ~rollouts.rewards.isnan()
    rewards = rollouts.rewards[scored]
    figures = {
        "no_signal": 1 - has_signal.double().mean().item(),
        "ended": rollouts.ended.mean().item(),
        "answer_length": rollouts.lengths.mean().item(),
        "unscored": int((~scored).sum()),
    }
    if len(rewards):
        figures["reward"] = rewards.mean().item()
        figures["reward_sd"] = rewards.std(correction=0).item()
        figures["exact"] = rollouts.exact.nanmean().item()  # rewards may be shuffled
    return figures


def silence(figures: Mapping[str, float]) -> str:
    """Why nothing is learned from the answers of a step, and what to do."""
    exact = figures.get("exact")
    if exact is None or (figures.get("unscored") and not exact):
        return "no answer that ended could be judged; see the task's method reward"
    if exact > LEARNED:
        return "all answers are right, nothing is left to learn; raise --length"
    if figures["ended"] == 0:
        return "no answer comes to its end; raise --max-new-tokens or --warm-up-steps"
    return (
        "answers earn nothing, or all the same; raise --warm-up-steps or --group-size, lower "
        "--length, or give --shaping prefix"
    )


def next_length(progress: Progress, exact: float | None, most: int) -> None:
    """Makes prompts longer where answers are right, and shorter where they are not."""
    progress.recent = [*progress.recent, exact or 0.0][-RECENT:]
    if len(progress.recent) < RECENT:
        return
    mean = sum(progress.recent) / RECENT
    if mean >= LEARNED and progress.length < most:
        progress.length, progress.recent = progress.length + 1, []
    elif mean < UNLEARNED and progress.length > 1:
        progress.length, progress.recent = progress.length - 1, []


class Rows(NamedTuple):
    """Answers of this rank with what their loss needs, on the device."""

    batch: Batch
    advantage: Tensor  # (n,)
    weight: Tensor  # (n,) of each of an answer's tokens

    def part(self, at: slice) -> "Rows":
        return Rows(self.batch.rows(at), self.advantage[at], self.weight[at])


def improve(learner: Learner, lesson: Lesson, rollouts: Rollouts, run: Run) -> dict[str, float]:
    """The updates of a step; returns what they measured, the same on all ranks."""
    state, cfg = learner.state, lesson.cfg
    device = state.model.embed.device
    lengths = rollouts.lengths * ~rollouts.rewards.isnan()
    per_answer = [
        values.flatten()[rollouts.rows].float().to(device)
        for values in (
            grpo.ADVANTAGES[cfg.advantage](rollouts.rewards),
            grpo.LOSSES[cfg.loss](lengths, lesson.most),
        )
    ]
    rows = Rows(rollouts.batch, *per_answer)
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    old: list[Tensor] = []  # log-probabilities by which the answers were drawn
    measures_kl = is_logged(run.step + 1, cfg)
    for number in range(cfg.updates_per_step):
        state.step = run.step  # all have the learning rate of this step
        start = learner.start if cfg.kl or (measures_kl and number == 0) else None
        loss, routing, measured = policy_gradients(state, lesson, rows, start, old)
        if number:  # clips are those of all updates, all else is of the answers as drawn
            measured[:3] = 0
        sums += measured
        stats, _ = train_gpt.update(state, cfg, loss, routing)
    dist.all_reduce(sums)
    tokens, entropy, kl, clipped, seen = sums.tolist()
    figures = {"train_loss": stats.loss.item(), "entropy": entropy / max(1, tokens)}
    figures["clip_fraction"] = clipped / max(1, seen)
    if cfg.kl or measures_kl:
        figures["kl_to_start"] = kl / max(1, tokens)
    if stats.grad_norm > 0:
        figures["grad_norm"] = stats.grad_norm.item()
    return figures


def policy_gradients(
    state: State, lesson: Lesson, rows: Rows, start: GPT | None, old: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward of this rank's answers, in micro-batches.

    `old` has the log-probabilities of the first update, and gets them there. Returns the rank's
    parts of the loss (), of the routing, and of sums over tokens that count (5,): their number,
    entropy, divergence from `start`, those clipped, their number again.
    """
    cfg, model = lesson.cfg, state.model
    answers = cfg.prompts_per_step * cfg.group_size
    drawn_by = (cfg.temperature, lesson.tokenizer.vocab_size)
    is_first = not old
    loss_sum = routing_sum = 0.0
    sums = torch.zeros(5, dtype=torch.float64, device=model.embed.device)
    for i, first in enumerate(range(0, len(rows.weight), cfg.device_batch_size)):
        batch, advantage, weight = rows.part(slice(first, first + cfg.device_batch_size))
        logp, entropy, routings = token_logprobs(model, batch, *drawn_by)
        if is_first:
            old.append(logp.detach())
        of_answer = batch.is_answer[:, 1:].nonzero()[:, 0]  # the row of each token
        of_token = weight[of_answer]
        loss, clipped = grpo.policy_loss(
            logp, old[i], advantage[of_answer], cfg.clip_low, cfg.clip_high
        )
        kl = torch.zeros_like(logp)
        if start is not None:
            with torch.no_grad():
                start_logp = token_logprobs(start, batch, *drawn_by)[0]
            kl = grpo.kl_estimate(logp, start_logp)
        loss = ((loss + cfg.kl * kl) * of_token).sum()
        loss.backward(state.loss_scale.value)

        routing = torch.stack(routings) if routings else loss.new_zeros(0, 4, 0)
        loss_sum = loss_sum + loss.detach()
        routing_sum = routing_sum + routing.detach() * (len(weight) / answers)
        counts = of_token > 0
        measured = (counts, entropy * counts, kl * counts, clipped & counts, counts)
        sums += torch.stack([values.detach().double().sum() for values in measured])
    return loss_sum, routing_sum, sums


########################################
#              Validation              #
########################################


def validate(learner: Learner, start: Start, run: Run, thoroughly: bool) -> dict[str, float]:
    """Figures of answers to the prompts that are held out, and the loss of language.

    Thoroughly, with samples for pass@k beside the likeliest answers. {} where the run is to end.
    """
    lesson, model = start.lesson, learner.state.model
    figures = {"val_loss": language_loss(model, start, run)}
    model.eval()
    if run.status:
        return {}
    likeliest = right_answers(model, lesson, 0, run, shows=thoroughly)
    figures["pass_at_1"] = likeliest.mean().item()
    figures["pass_at_1_low"], figures["pass_at_1_high"] = grpo.wilson(
        figures["pass_at_1"], len(lesson.held_out)
    )
    if thoroughly:
        sampled = right_answers(model, lesson, SAMPLES, run).tolist()
        for k in KS:
            chances = [grpo.pass_at_k(SAMPLES, int(right), k) for right in sampled]
            figures[f"sampled_pass_at_{k}"] = sum(chances) / len(chances)
    return figures


def right_answers(
    model: GPT, lesson: Lesson, samples: int, run: Run, shows: bool = False
) -> Tensor:
    """(prompts held out,) how many answers to each are right, of so many samples or, with 0, of the
    likeliest; shows a few of them in the log."""
    ranks = run.ranks
    right = torch.zeros(len(lesson.held_out), dtype=torch.float64)
    of_rank = answer_held_out(model, lesson, samples, ranks.rank, ranks.world_size)
    for number, answers in of_rank.items():
        prompt = lesson.held_out[number]
        scores = [lesson.score(prompt, answer) for answer in answers]
        right[number] = sum(score.exact == 1 for score in scores)
        if shows and ranks.rank == 0 and number < 3 * ranks.world_size:
            text = lesson.tokenizer.decode(token for token in answers[0] if token != lesson.end)
            verdict = "right" if right[number] else "wrong"
            run.print(f"answer: {prompt!a} -> {text!a} {verdict}")
    dist.all_reduce(right)
    return right


def language_loss(model: GPT, start: Start, run: Run) -> float | None:
    """Nats a token: of the data that validated the checkpoint, or of right answers with their
    prompts, held out; None where the run is to end."""
    lesson, ranks = start.lesson, run.ranks
    if start.val_loader:
        measured = train_gpt.evaluate(model, start.val_loader, lesson.cfg, run, run.step)
        return measured and measured[0]
    device = model.embed.device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    texts = [lesson.text(prompt) for prompt in lesson.held_out[ranks.rank :: ranks.world_size]]
    for first in range(0, len(texts), lesson.cfg.device_batch_size):
        some = texts[first : first + lesson.cfg.device_batch_size]
        begins, rests = [text[:1] for text in some], [text[1:] for text in some]
        batch = Batch.of(begins, rests, lesson.end, device)
        with torch.no_grad():
            logp, *_ = token_logprobs(model, batch, 1.0, lesson.tokenizer.vocab_size)
        total[0] -= logp.double().sum()
        total[1] += len(logp)
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


########################################
#                 Loop                 #
########################################


def is_logged(step: int, cfg: RLConfig) -> bool:
    """Whether the step that was the step-th is logged."""
    return step == 1 or step % cfg.log_every == 0 or step == cfg.num_iterations


def log_point(learner: Learner, start: Start, run: Run, validation: Mapping[str, float]) -> None:
    """Logs the last step, if there was one, and what a validation after it has found."""
    step, cfg, last = run.step, start.lesson.cfg, learner.progress.last
    values, figures, lines = {}, {}, []
    if last:
        values |= last | {"lr": cfg.lr * train_gpt.lr_factor(step - 1, cfg)}
        figures |= {name: last[name] for name in COLUMNS if name in last}
        words = [f"{name}:{last[name]:.4g}" for name in COLUMNS if name in last]
        lines.append(f"[RL] step:{step}/{cfg.num_iterations} {' '.join(words)}")
    if validation:
        values |= {name: validation[name] for name in ("val_loss", "pass_at_1")}
        named = validation if step else {f"{name}_before": v for name, v in validation.items()}
        figures |= {name: value for name, value in named.items() if name != "val_loss"}
        head = f"[RL] step:{step}/{cfg.num_iterations} held_out:{len(start.lesson.held_out)}"
        lines.append(f"{head} {validation_text(validation)}")
    run.point(values, lines, figures, bad_lines(learner.state, run))


def validation_text(validation: Mapping[str, float]) -> str:
    """The pass rates of a validation, that of the likeliest answers with its interval."""
    low, high = validation["pass_at_1_low"], validation["pass_at_1_high"]
    words = [f"pass@1:{validation['pass_at_1']:.4f} ({low:.4f} to {high:.4f})"]
    for k in KS:
        if f"sampled_pass_at_{k}" in validation:
            words.append(f"sampled_pass@{k}:{validation[f'sampled_pass_at_{k}']:.4f}")
    return " ".join(words)


def train(start: Start, run: Run) -> Learner:
    """The run from its beginning or its checkpoint to its end."""
    cfg = start.lesson.cfg
    learner = begin(start, run)
    first_step = run.first_step
    step = first_step
    while not run.status:
        last = step == cfg.num_iterations
        status = run.poll(step)
        is_due = cfg.save_every and step > first_step and step % cfg.save_every == 0
        if status or last or is_due:
            learner.save(run)
        if status:
            break

        validation = {}
        if last or step == 0 or (cfg.val_every and step % cfg.val_every == 0):
            with run.timed("eval_time"):
                validation = validate(learner, start, run, thoroughly=last or step == 0)
            if run.status:
                continue  # it was cut short: who goes on will repeat it
        if validation or (step and is_logged(step, cfg)):
            log_point(learner, start, run, validation)
        if last:
            break
        take_step(learner, start.lesson, run)
        step += 1
    return learner


########################################
#            Command line              #
########################################


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an option in one line."""

    def error(self, message: str) -> None:
        if "=" in message.rpartition(" ")[2]:
            message += "; settings go before: LR=0.003 python scripts/train_rl.py"
        self.exit(2, f"{self.prog}: error: {message}; --help says which options there are\n")


def parse_args(argv: list[str]) -> dict[str, Any]:
    """The options that were given. Exits with code 2 and one sentence for those that are none."""
    parser = Parser(
        prog="train_rl.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    return vars(parser.parse_args(argv))


def main(argv: list[str], env: Mapping[str, str]) -> int:
    """One run as options and environment set it; returns the exit code."""
    given = parse_args(argv)
    with Run(RLConfig, env, SOURCE) as run:
        run.ranks.check(env)
        start = prepare(given, env)
        cfg = start.lesson.cfg
        plan, warnings = make_plan(start, run.ranks), cautions(env, start.lesson)
        if cfg.dry_run:
            for warning in warnings:
                print(f"warning: {warning}", file=sys.stderr)
            for key, value in (vars(cfg) | cfg.resolved() | plan).items():
                print(f"{key}:{value}")
            return 0
        if run.ranks.rank == 0:
            write_vocabulary(start.lesson.tokenizer)
        run.open(cfg, start.changes, plan, warnings, COLUMNS)
        learner = train(start, run)
        run.close(learner.state.model.state_dict())
    return run.exit_code


if __name__ == "__main__":
    code = main(sys.argv[1:], os.environ)
    with contextlib.suppress(OSError):  # who reads may be gone
        sys.stdout.flush()
    os._exit(code)  # as train_gpt.py does
