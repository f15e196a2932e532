"""Every variant of train_gpt.py trained for some steps on a device; for check_device.py."""

import contextlib
import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from device_report import Check, Part, config, first_line, held, left_out
from harness.ranks import Ranks
from store.contract import ConfigError
import train_gpt
from train_gpt import Config, State, axes

# How far losses, and the first gradient norms, may lie apart: some ten times what was seen.
FIRST_STEP = {"cpu": 1e-5, "cuda": 1e-4}
EACH_STEP = {"cpu": 1e-4, "cuda": 0.03}
BFLOAT16 = 0.1
COMPILED_GAP = 0.03
MIN_FALL = 0.05  # of the loss, nats
# What an axis, or a value of it, needs beside what Config says of itself.
SETTINGS = {
    "balance": {"ffn": "moe"},
    "per_visit": {"recurrence": "shared", "n_layer": 4, "ffn": "moe", "norm": "rms_gain"},
    "recurrence=shared": {"n_layer": 4},
    "optimizer=adamw": {"lr": 0.003},
}
SWITCHES = {  # what is no choice of an axis
    "values": {"value_residual": True, "value_embeds": 1},
    "softcap": {"logit_softcap": 5.0},
    "decay": {"weight_decay": 0.1, "cautious_decay": True},
    "momentum": {"momentum_start": 0.8, "momentum_warmup_iters": 8, "momentum_cooldown_iters": 4},
}
COMPILED = {  # on a CPU, where compiling takes longest, the first alone
    "moe": {"ffn": "moe", "num_experts": 4, "n_layer": 1},
    "default": {},
    "headwise": {"attngate": "headwise"},
    "elementwise_value": {"attngate": "elementwise", "gatepos": "value"},
    "gpt2": {"norm": "layer", "pos": "learned", "ffn": "gelu", "bias": True, "optimizer": "adamw"},
    "indexed": {"recurrence": "indexed", "ffn": "moe", "num_experts": 4, "n_layer": 3},
    "shared": SETTINGS["per_visit"] | {"per_visit": "norm,router,scale"},
    "gated_deltanet": {"mixer": "gated_deltanet"},
    "values": SWITCHES["values"] | {"ffn": "relu2,gelu", "residual": "unet", "logit_softcap": 5.0},
}


def met(need: str) -> dict:
    """Settings by which a need of Config.NEEDS holds: FIELD=value or FIELD!=value."""
    name, _, value = need.partition("=")
    field = name.rstrip("!").lower()
    if not name.endswith("!"):
        return {field: Config.parse(field, value)}
    if field in axes():
        return {field: next(choice for choice in axes()[field] if choice != value)}
    kind = Config.__dataclass_fields__[field].type
    return {field: 1 if kind in (int, bool) else 0.1}


def settings_of(axis: str, value: str) -> dict:
    """Settings with which a value of an axis has an effect. Raises ConfigError.

    What it needs is what Config says: the conditions in NEEDS, and settings named by a refusal.
    """
    settings = SETTINGS.get(axis, {}) | SETTINGS.get(f"{axis}={value}", {}) | {axis: value}
    for _ in range(len(Config.NEEDS)):
        try:
            need = config(torch.device("cpu"), **settings).idle().get(axis)
        except ConfigError as error:
            found = re.search(r"needs .*?([A-Z_]+=\w+)", str(error))
            if found is None:
                raise
            need = found[1]
        if need is None:
            break
        settings |= met(need)
    return settings


def model_axes() -> dict[str, list[str]]:
    """The axes that change what is trained: {field: values}."""
    how = {"device", "dtype", "compile", *Config.LABELS, *Config.NOT_HASHED}
    return {axis: [*values] for axis, values in axes().items() if axis not in how}


def batches(cfg: Config) -> list[Tensor]:
    """A batch (B, T + 1) a step that can be learned: a token follows from the last, with noise."""
    rng, made = torch.Generator().manual_seed(1), []
    for _ in range(cfg.num_iterations):
        tokens = torch.randint(4, (cfg.batch_size, cfg.sequence_length + 1), generator=rng)
        for t in range(cfg.sequence_length):
            tokens[:, t + 1] = (tokens[:, t] * 5 + 7 + tokens[:, t + 1]) % cfg.vocab_size
        made.append(tokens)
    return made


class Curve(NamedTuple):
    """What the steps of a model measured."""

    losses: list[float]
    norms: list[float]  # of the gradients

    def first_gap(self, other: "Curve") -> float:
        """How far the first losses and gradient norms lie apart, the latter as a ratio."""
        return largest([self.losses[0] - other.losses[0], self.norms[0] / other.norms[0] - 1])

    def gap(self, other: "Curve") -> float:
        """How far two losses of one step lie apart at most."""
        return largest([a - b for a, b in zip(self.losses, other.losses)])

    def fall(self) -> float:
        return self.losses[0] - self.losses[-1]


def largest(values: list[float]) -> float:
    """The largest absolute value; inf where one is no number."""
    return max(abs(value) if math.isfinite(value) else math.inf for value in values)


def train(cfg: Config, weights: dict[str, Tensor] | None = None) -> Curve:
    """Steps of a model that starts with its own weights, or with these."""
    ranks = Ranks()
    device = ranks.device(cfg)
    state = State.build(cfg, ranks)
    if weights:
        state.model.load_state_dict(weights)
    if cfg.compile == "1":
        train_gpt.compile_model(state.model, cfg, device)
    stats = []
    for tokens in batches(cfg):
        tokens = tokens.to(device)
        stats.append(train_gpt.train_step(state, cfg, tokens[:, :-1], tokens[:, 1:]))
    return Curve(*([stat[i].item() for stat in stats] for i in range(2)))


def plain_adamw(*args, **kwargs) -> None:
    """torch's AdamW as a loop, for its fused one keeps float32 among float64 parameters."""
    adamw(*args, **kwargs | {"fused": False, "found_inf": None})


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Within it float32 means float64 to what builds and trains a model, Newton-Schulz aside."""
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.dict(train_gpt.DTYPES, float32=torch.float64),
            mock.patch.object(Tensor, "float", Tensor.double),
            mock.patch.object(train_gpt, "adamw", plain_adamw),
        ):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def reference(cfg: Config) -> Curve:
    """The curve that cfg's should be: on the CPU in float32, or of a CPU's in float64."""
    on_cpu = dataclasses.replace(cfg, device="cpu")
    if cfg.device != "cpu":
        return train(on_cpu)
    weights = State.build(on_cpu, Ranks()).model.state_dict()
    with in_float64():
        return train(on_cpu, weights)


@functools.cache  # the default is a value of many axes
def compared(cfg: Config) -> tuple[str, bool]:
    """A variant against its reference, in bfloat16 against float32, and whether it learns."""
    curve, wanted = train(cfg), reference(cfg)
    first, gap, fall = curve.first_gap(wanted), curve.gap(wanted), curve.fall()
    good = first < FIRST_STEP[cfg.device] and gap < EACH_STEP[cfg.device] and fall > MIN_FALL
    other = "cpu" if cfg.device == "cuda" else "float64"
    text = f"loss falls by {fall:.2f}; off {other}'s by {first:.1e} at first, {gap:.1e} at most"
    if cfg.device == "cuda":
        half_gap = curve.gap(train(dataclasses.replace(cfg, dtype="bfloat16")))
        good = good and half_gap < BFLOAT16
        text += f", bfloat16 {half_gap:.1e}"
    return text, good


def axis_part(axis: str) -> Part:
    """The part that checks every value of an axis."""

    def check_values(device: torch.device) -> Iterator[Check]:
        for value in axes()[axis]:
            name = f"{axis}={value}"
            try:
                cfg = config(device, **settings_of(axis, value))
                yield held(name, *compared(cfg))
            except Exception as error:  # of one variant; the others are checked all the same
                yield held(name, first_line(error), False)

    return check_values


def switches(device: torch.device) -> Iterator[Check]:
    """Those of SWITCHES, as values of an axis."""
    for name, settings in SWITCHES.items():
        yield held(f"switches={name}", *compared(config(device, **settings)))


def bfloat16_left_out(device: torch.device) -> Iterator[Check]:
    """Says what is not compared on a CPU."""
    if device.type == "cpu":
        yield left_out("bfloat16", "compared with float32 on CUDA only: CPUs are slow in it")


def compiled_part(name: str) -> Part:
    """The part that compares a variant compiled with the same as it is written."""

    def check_compiled(device: torch.device) -> Iterator[Check]:
        from torch._dynamo.utils import counters  # a second to load

        # As a run would have it: bfloat16 on CUDA, but float16 on cards that are too old for it.
        cfg = config(device, **COMPILED[name] | {"dtype": "auto"})
        torch._dynamo.reset()
        counters.clear()
        began = time.perf_counter()
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            curve = train(dataclasses.replace(cfg, compile="1"))
        seconds = time.perf_counter() - began
        gap = curve.gap(train(cfg))
        graphs = counters["stats"]["unique_graphs"]
        breaks = sum(counters["graph_break"].values())
        text = f"{graphs} graphs, {breaks} breaks, losses {gap:.1e} apart, {seconds:.0f} s"
        good = gap < COMPILED_GAP and breaks == 0 and graphs > 0 and curve.fall() > MIN_FALL
        yield held(name, text, good)

    return check_compiled


def compiled_parts(device_type: str) -> dict[str, Part]:
    """The variants that are compiled on a device."""
    names = list(COMPILED) if device_type == "cuda" else list(COMPILED)[:1]
    return {name: compiled_part(name) for name in names}


def variant_parts() -> dict[str, Part]:
    """A part for each axis of today, and for what is none."""
    others = {"switches": switches, "bfloat16": bfloat16_left_out}
    return {axis: axis_part(axis) for axis in model_axes()} | others


PARTS = variant_parts()
