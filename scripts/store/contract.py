"""What other programs rely on: names, columns, exit codes and their errors. Needs no torch."""

from collections.abc import Mapping
from typing import Any

RUN_ID_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"
RUN_ID_RULE = "1 to 100 letters, digits, _, and within . -"  # the pattern in words

CURVE = [  # columns of every run's curve; parts of the model may add more
    "step",
    "tokens",
    "epoch",
    "train_loss",
    "val_loss",
    "lr",
    "grad_norm",
    "train_time",
    "tokens_per_sec",
    "data_wait",
]
RENAMED = {"per_step": "per_visit"}  # columns of older rows, and what they are called now


def renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row under the names of today; where it has a column under both, what is not blank."""
    new = {}
    for name, value in row.items():
        name = RENAMED.get(name, name)
        if value not in (None, "") or name not in new:
            new[name] = value
    return new


# How a run may end, and the exit code that says so.
EXIT_CODES = {
    "ok": 0,
    "stopped": 0,
    "preempted": 0,
    "crash": 1,
    "config": 2,
    "data": 3,
    "diverged": 4,
    "oom": 5,
}


class ConfigError(ValueError):
    """A setting that cannot be used: says which, its value, the choices and what to do."""

    status = "config"


class DataError(ValueError):
    """Data that cannot be trained on: says which file, what was expected and found, what to do."""

    status = "data"


class Diverged(ArithmeticError):
    """The loss is no longer a finite number."""

    status = "diverged"
