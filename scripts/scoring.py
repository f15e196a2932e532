"""Log-probabilities of tokens under a model, in windows over sequences of any length."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cross_entropy import rows_per_chunk
from train_gpt import GPT

Item = TypeVar("Item")


class Window(NamedTuple):
    """Tokens that the model sees at once, and which of them are scored there."""

    tokens: np.ndarray  # (n + 1,): n inputs, each with the next token as its target
    new: int  # the last so many targets are scored; those before them already were


class Scores(NamedTuple):
    """What the model says of the new targets of a window, each (new,)."""

    targets: np.ndarray
    logp: np.ndarray  # natural logarithm of the probability, float32
    is_likeliest: np.ndarray  # whether no token was more probable


def windows(tokens: np.ndarray, context: int, stride: int, whole: bool = False) -> Iterator[Window]:
    """Windows of `context` inputs, each `stride` after the one before, over tokens (n,).

    Every token but the first is scored once. The last window is shorter; with `whole` it is left
    out. As https://huggingface.co/docs/transformers/perplexity does it, but that a target may lie
    one beyond the inputs, as in training.
    """
    scored = 0  # the index of the last target until now
    for first in range(0, len(tokens) - 1, stride):
        last = min(first + context, len(tokens) - 1)  # target of the window's last input
        if scored == last or (whole and last < first + context):
            return
        yield Window(tokens[first : last + 1], last - scored)
        scored = last


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of so many items, the last of what is left; Python has it from 3.12."""
    items = iter(items)
    batch = list(islice(items, size))
    while batch:
        yield batch
        batch = list(islice(items, size))


def score(model: GPT, windows: Iterable[Window], batch_size: int) -> Iterator[Scores]:
    """Scores of each window in turn, computed in batches of rows padded at their end."""
    for batch in batches(windows, batch_size):
        yield from score_batch(model, batch)


def score_batch(model: GPT, batch: list[Window]) -> Iterator[Scores]:
    """Scores of each window. Nothing before the padding of a row can see it."""
    longest = max(len(window.tokens) for window in batch)
    tokens = np.zeros((len(batch), longest), np.int64)
    is_new = np.zeros((len(batch), longest - 1), bool)
    for row, window in enumerate(batch):
        n = len(window.tokens)
        tokens[row, :n] = window.tokens
        is_new[row, n - 1 - window.new : n - 1] = True
    device = model.embed.device
    targets = tokens[:, 1:][is_new]
    logp, is_likeliest = score_targets(
        model,
        torch.from_numpy(tokens[:, :-1]).to(device),
        torch.from_numpy(is_new).to(device),
        torch.from_numpy(targets).to(device),
    )
    ends = np.cumsum([window.new for window in batch])[:-1]
    parts = [np.split(values, ends) for values in (targets, logp.numpy(), is_likeliest.numpy())]
    return map(Scores, *parts)


@torch.no_grad()
def score_targets(
    model: GPT, inputs_BT: Tensor, is_new_BT: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """(logp (n,), is_likeliest (n,)) of targets (n,), those of the n inputs that are new."""
    x, head, _ = model.hidden(inputs_BT)
    x, weight = x[is_new_BT], head.type_as(x)
    rows = rows_per_chunk(x, head)
    logps, likeliest = [], []
    for xs, ts in zip(x.split(rows), targets.split(rows)):
        logits = model.logits(xs, weight)
        logps.append(F.log_softmax(logits, dim=-1).gather(-1, ts[:, None]).squeeze(-1))
        likeliest.append(logits.argmax(-1) == ts)
    return torch.cat(logps).cpu(), torch.cat(likeliest).cpu()
