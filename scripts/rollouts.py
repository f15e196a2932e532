"""Answers that a model gives to the prompts of a task: how they are drawn and what they earn."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from store.contract import ConfigError, DataError
from ops.generation import continuations
from rl_settings import RLConfig
from rl_tasks import REWARDS, TASKS, Score, Task, held_out_prompts, training_prompt
from tokenization import Tokenizer
from train_gpt import GPT

# What a random number is for: it depends on this and the seed, the step, the prompt and the answer.
PROMPT, ANSWER, TEXT, WARM_UP, VALIDATION, SHUFFLE = range(6)
SPARE_TOKENS = 2  # that an answer may have more than a right one, unless --max-new-tokens says
MOST_ROWS = 2048  # answers of a validation that are drawn at once


class Lesson(NamedTuple):
    """A task in the tokens of a model."""

    cfg: RLConfig
    task: Task
    tokenizer: Tokenizer
    end: int  # the token that ends an answer
    held_out: list[str]  # prompts, never trained on
    most: int  # tokens of an answer, its end counted

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).tolist()

    def text(self, prompt: str) -> list[int]:
        """Tokens of a prompt with its right answer, as the warm-up has it."""
        return [*self.encode(prompt), *self.encode(self.task.answer(prompt)), self.end]

    def score(self, prompt: str, tokens: list[int]) -> Score:
        """What an answer (tokens, the end token among them if it was drawn) earns."""
        ended = tokens[-1] == self.end
        text = self.tokenizer.decode(tokens[:-1] if ended else tokens)
        return REWARDS[self.cfg.shaping](self.task, prompt, text, ended)

    def fingerprint(self) -> str:
        """Of the prompts that are held out."""
        return hashlib.sha256("\n".join(self.held_out).encode()).hexdigest()


def make_lesson(cfg: RLConfig, tokenizer: Tokenizer, context: float) -> Lesson:
    """The lesson of these settings for a model that sees `context` tokens.

    Raises ConfigError, DataError.
    """
    task = TASKS[cfg.task](cfg.operators)
    check_characters(task, tokenizer)
    held_out = held_out_prompts(task, cfg.length, cfg.held_out)
    if not held_out:
        raise ConfigError(
            f"--length {cfg.length}: no prompt of --task {cfg.task} is held out; choose a longer "
            "one"
        )
    lesson = Lesson(cfg, task, tokenizer, end_of(tokenizer), held_out, cfg.max_new_tokens)
    if not cfg.max_new_tokens:
        longest = max(len(lesson.encode(task.answer(prompt))) for prompt in held_out)
        lesson = lesson._replace(most=longest + 1 + SPARE_TOKENS)
    longest = max(len(lesson.encode(prompt)) for prompt in held_out)
    if longest + lesson.most > context:
        raise ConfigError(
            f"a prompt of {longest} tokens and an answer of {lesson.most} do not fit into "
            f"SEQUENCE_LENGTH={context}; lower --length {cfg.length} or --max-new-tokens"
        )
    fitting_prompt(lesson, context, np.random.default_rng(0), cfg.length)  # whether there is one
    return lesson


def missing_characters(task: Task, tokenizer: Tokenizer) -> str:
    """Those of a task that a vocabulary lacks."""
    missing = ""
    for character in dict.fromkeys(task.characters):
        try:
            is_known = tokenizer.decode(tokenizer.encode(character)) == character
        except DataError:
            is_known = False
        missing += "" if is_known else character
    return missing


def check_characters(task: Task, tokenizer: Tokenizer) -> None:
    """Raises DataError where a vocabulary lacks characters of a task."""
    missing = missing_characters(task, tokenizer)
    if missing:
        raise DataError(
            f"the vocabulary has no {missing!r}, which the task writes; choose a model whose "
            "tokenizer is bytes, or a BPE, which have every character, or another --task"
        )


def end_of(tokenizer: Tokenizer) -> int:
    """The token that ends an answer: the end token, or a new line where there is none."""
    if tokenizer.eot_id is not None:
        return tokenizer.eot_id
    try:
        (token,) = tokenizer.encode("\n").tolist()
        return token
    except (DataError, ValueError):
        raise DataError(
            "the vocabulary has neither an end token nor a new line, so that no answer could end; "
            "scripts/train_tokenizer.py makes one that has"
        ) from None


########################################
#               Answers                #
########################################


def draw_answers(
    model: GPT, lesson: Lesson, prompts: list[list[int]], rows: list[int], chances: np.ndarray
) -> list[list[int]]:
    """Tokens of an answer to prompts[row] for each row, drawn by chances (rows, most).

    Each ends with its end token, or has the most tokens that it may have. They are drawn from the
    probabilities that token_logprobs computes. Without chances, (rows, 0), the likeliest are taken.
    """
    temperature = lesson.cfg.temperature
    if not chances.size:
        temperature, chances = 0.0, np.zeros((len(rows), lesson.most))
    answers: list[list[int]] = [[] for _ in rows]
    size = lesson.tokenizer.vocab_size  # the model's may be larger
    for tokens in continuations(model, prompts, rows, chances, temperature, vocab_size=size):
        for answer, token in zip(answers, tokens):
            if lesson.end not in answer[-1:]:
                answer.append(token)
        if all(answer[-1] == lesson.end for answer in answers):
            break
    return answers


def chances_of(lesson: Lesson, *keys: tuple[int, ...]) -> np.ndarray:
    """Random numbers in [0, 1), (keys, most), each row by the seed and its key alone."""
    seed = lesson.cfg.seed
    return np.array([np.random.default_rng((seed, *key)).random(lesson.most) for key in keys])


class Batch(NamedTuple):
    """Prompts with their answers, side by side."""

    tokens: Tensor  # (n, L), padded by the end token
    is_answer: Tensor  # (n, L) bool: what was drawn, end tokens among it

    @classmethod
    def of(cls, prompts: list[list[int]], answers: list[list[int]], end: int, device) -> "Batch":
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers)]
        tokens = torch.full((len(prompts), max(lengths)), end)
        is_answer = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(zip(prompts, answers)):
            tokens[row, : lengths[row]] = torch.tensor(prompt + answer)
            is_answer[row, len(prompt) : lengths[row]] = True
        return cls(tokens.to(device), is_answer.to(device))

    def rows(self, at: slice) -> "Batch":
        return Batch(self.tokens[at], self.is_answer[at])


def token_logprobs(
    model: GPT, batch: Batch, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of all tokens of answers, row after row: their log-probabilities and the entropy of the
    distribution that they are drawn from, (n,) each; and the routings of the model."""
    x, head, routings = model.hidden(batch.tokens[:, :-1])
    drawn = batch.is_answer[:, 1:]
    logits = model.logits(x[drawn], head[:vocab_size]) / temperature
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    targets = batch.tokens[:, 1:][drawn]
    return logp.gather(-1, targets[:, None]).squeeze(-1), entropy, routings


########################################
#              Of a step               #
########################################


@dataclass
class Rollouts:
    """The answers of this rank to the prompts of a step, and what all answers have earned."""

    prompts: list[str]  # of all ranks, (P,)
    rows: list[int]  # of the (P * G) answers those of this rank
    batch: Batch  # its answers
    rewards: Tensor  # (P, G) float64, nan where an answer cannot be judged
    exact: Tensor  # likewise, 1 for a right answer
    ended: Tensor  # 1 where the end token was drawn
    lengths: Tensor  # tokens, the end token counted


def roll_out(model: GPT, lesson: Lesson, step: int, length: int, rank: int, world: int) -> Rollouts:
    """Answers to the prompts of a step, of this difficulty; the same on any number of ranks.

    Raises ConfigError where a task of somebody's own makes prompts that are too long.
    """
    cfg = lesson.cfg
    P, G = cfg.prompts_per_step, cfg.group_size
    prompts = [step_prompt(lesson, model.context, step, i, length) for i in range(P)]
    rows = np.array_split(np.arange(P * G), world)[rank].tolist()
    asked = sorted({row // G for row in rows})  # of the prompts those that this rank answers
    tokens = {i: lesson.encode(prompts[i]) for i in asked}
    chances = chances_of(lesson, *[(ANSWER, step, row // G, row % G) for row in rows])
    places = [asked.index(row // G) for row in rows]
    answers = draw_answers(model, lesson, list(tokens.values()), places, chances)

    device = model.embed.device
    batch = Batch.of([tokens[row // G] for row in rows], answers, lesson.end, device)
    table = torch.zeros(4, P * G, dtype=torch.float64)
    for row, answer in zip(rows, answers):
        score = lesson.score(prompts[row // G], answer)
        table[:, row] = torch.tensor([*score, answer[-1] == lesson.end, len(answer)])
    dist.all_reduce(table)
    rewards, exact, ended, lengths = table.view(4, P, G)
    if cfg.shuffle_rewards:
        order = np.random.default_rng((cfg.seed, SHUFFLE, step)).permutation(P * G)
        rewards = rewards.flatten()[order].view(P, G)
    return Rollouts(prompts, rows, batch, rewards, exact, ended, lengths)


def step_prompt(lesson: Lesson, context: float, step: int, place: int, length: int) -> str:
    """The prompt at a place of a step. Raises ConfigError where none fits into the context."""
    rng = np.random.default_rng((lesson.cfg.seed, PROMPT, step, place))
    return fitting_prompt(lesson, context, rng, length)


def fitting_prompt(lesson: Lesson, context: float, rng: np.random.Generator, length: int) -> str:
    """A prompt that is not held out and leaves room for an answer. Raises ConfigError."""
    for _ in range(100):
        try:
            prompt = training_prompt(lesson.task, rng, length)
        except ValueError as error:
            raise ConfigError(
                f"--task {lesson.cfg.task}: {error}; choose another --length"
            ) from None
        if len(lesson.encode(prompt)) + lesson.most <= context:
            return prompt
    raise ConfigError(
        f"--task {lesson.cfg.task} --length {length}: 100 prompts in a row leave no room for an "
        f"answer of {lesson.most} tokens in SEQUENCE_LENGTH={context}; lower --length"
    )


def answer_held_out(
    model: GPT, lesson: Lesson, samples: int, rank: int, world: int
) -> dict[int, list[list[int]]]:
    """{number of a held-out prompt: its answers} of this rank; 0 samples: one, the likeliest."""
    numbers = range(rank, len(lesson.held_out), world)
    rows = [(number, sample) for number in numbers for sample in range(max(1, samples))]
    answers: dict[int, list[list[int]]] = {number: [] for number in numbers}
    for first in range(0, len(rows), MOST_ROWS):
        some = rows[first : first + MOST_ROWS]
        places = {number: place for place, number in enumerate(dict(some))}
        prompts = [lesson.encode(lesson.held_out[number]) for number in places]
        chances = np.zeros((len(some), 0))
        if samples:
            chances = chances_of(lesson, *[(VALIDATION, *row) for row in some])
        of_rows = [places[number] for number, _ in some]
        drawn = draw_answers(model, lesson, prompts, of_rows, chances)
        for (number, _), answer in zip(some, drawn):
            answers[number].append(answer)
    return answers
