"""What a check of a device says, and how the process of its group says it; for check_device.py."""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from harness.ranks import Ranks
import train_gpt
from train_gpt import Config

OK, FAILED, LEFT_OUT, FIGURE = "ok", "FAILED", "left out", ""


class Check(NamedTuple):
    """A line of the table."""

    name: str
    value: str
    status: str = FIGURE


Part = Callable[[torch.device], Iterator[Check]]  # some checks, made one after another


def held(name: str, value: str, good: bool | Tensor) -> Check:
    """A check that is ok or FAILED."""
    return Check(name, value, OK if good else FAILED)


def left_out(name: str, why: str) -> Check:
    """A check that is not made here."""
    return Check(name, why, LEFT_OUT)


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest error over the largest wanted value, inf where something is no number."""
    got, want = got.detach().double(), want.detach().double()
    error = (got - want).abs().max() / want.abs().max()
    return error.item() if math.isfinite(error) else math.inf


def scale_error(got: Tensor, want: Tensor) -> float:
    """How far the factor that fits best between two tensors is from 1, inf where it is no number.

    Rounding errors cancel in it, so that it shows a wrong factor that they would hide.
    """
    got, want = got.detach().double().flatten(), want.detach().double().flatten()
    error = abs(got @ want / (want @ want) - 1)
    return error.item() if math.isfinite(error) else math.inf


def config(device: torch.device, **settings) -> Config:
    """Settings of a small float32 model on this device, ready to be built."""
    small = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "vocab_size": 64,
        "sequence_length": 32,
        "batch_size": 4,
        "device_batch_size": 2,
        "num_iterations": 15,
        "warmdown_iters": 5,
        "device": device.type,
        "dtype": "float32",
        "compile": "0",
    }
    return train_gpt.resolve(Config(**small | settings))


def is_of_torchrun(name: str) -> bool:
    """Whether torchrun tells a rank its place by this variable."""
    places = {field.upper() for field in Ranks._fields} | {"MASTER_ADDR", "MASTER_PORT"}
    return name in places or name.startswith("TORCHELASTIC_")


def torchrun_environment() -> dict[str, str]:
    """What torchrun has told this process, {} where it has not started it."""
    return {name: value for name, value in os.environ.items() if is_of_torchrun(name)}


def plain_environment() -> dict[str, str]:
    """This process's environment without that, and without settings of a run."""
    settings = {name.upper() for name in Config.__dataclass_fields__}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in settings and not is_of_torchrun(name)
    }


def append(file: Path, words: list) -> None:
    """Writes a line for the process that waits for it."""
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(words) + "\n")
