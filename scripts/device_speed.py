"""What train_gpt.py and its pieces cost on a device, beside the device's ceilings; for
check_device.py. Tokens are random. A figure is a median, in brackets the range.
"""

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import bench
from device_report import FIGURE, Check, Part, left_out
from harness.meter import now, peak_memory
from harness.ranks import Ranks
from ops import cross_entropy
import train_gpt
from train_gpt import Config, State

PRESETS = {  # {preset: settings beside it}
    "cuda": {
        "gpt2_small": {},
        "moe_muon_exp5_bf16": {},
        "recurrent_shared_moe": {},
    },
    "cpu": {"quickstart": {"VOCAB_SIZE": "256"}},
}
SECONDS = 10  # of steps that are timed, at least 2 and at most 20
KERNELS = 25
CALLS = 5  # of a piece, timed


def preset_config(device: torch.device, preset: str) -> Config:
    """The settings of a preset without an end of its learning rate."""
    settings = PRESETS[device.type][preset]
    env = settings | {"PRESET": preset, "DEVICE": device.type}
    cfg = train_gpt.resolve(Config.from_env(env))
    return dataclasses.replace(cfg, num_iterations=2**31)


def default_config(device: torch.device) -> Config:
    return preset_config(device, next(iter(PRESETS[device.type])))


def built(cfg: Config, device: torch.device) -> State:
    """A model and its optimizers, compiled where cfg says so."""
    state = State.build(cfg, Ranks())
    if cfg.compile == "1":
        train_gpt.compile_model(state.model, cfg, device)
    return state


def step_of(state: State, cfg: Config, device: torch.device) -> Callable[[], object]:
    """A function that makes a training step on random tokens."""
    shape = cfg.batch_size, cfg.sequence_length + 1
    tokens = torch.randint(cfg.vocab_size, shape, device=device)
    return lambda: train_gpt.train_step(state, cfg, tokens[:, :-1], tokens[:, 1:])


def host_share(step: Callable[[], object], device: torch.device, count: int) -> float:
    """Seconds that the host needs to launch steps over those that they take: near 1, it is late."""
    began = now(device)
    for _ in range(count):
        step()
    launched = time.perf_counter() - began
    return launched / (now(device) - began)


def preset_part(preset: str) -> Part:
    """The part that times a preset."""

    def time_preset(device: torch.device) -> Iterator[Check]:
        cfg = preset_config(device, preset)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = now(device)
        state = built(cfg, device)
        step = step_of(state, cfg, device)
        step()
        seconds = now(device) - began
        yield Check(f"{preset}_first_step", f"{seconds:.1f} s from settings to the first step")

        began = now(device)
        step()
        count = round(SECONDS / (now(device) - began))
        args = argparse.Namespace(warmup=1, steps=min(20, max(2, count)))
        for name, row in bench.bench_step(state, cfg, Ranks(), args).items():
            yield Check(f"{preset}_{name}", figure_text(row))
        yield Check(f"{preset}_peak_memory", f"{peak_memory(device):.2f} GiB")
        if device.type == "cuda":
            share = host_share(step, device, args.steps)
            yield Check(f"{preset}_host", f"{100 * share:.0f} % of a step is launched by the host")
        else:
            yield left_out(f"{preset}_host", "the host is the device")

    return time_preset


def figure_text(row: bench.Figure) -> str:
    """A figure of the bench in words."""
    if row["value"] is None:
        return f"unknown, {row['unit']}"
    return f"{row['value']:,.4g} {row['unit']} ({row['min']:,.4g} to {row['max']:,.4g})"


def most_expensive(device: torch.device) -> Iterator[Check]:
    """The kernels of a step of the default, or a CPU's operators, by what they take themselves."""
    cfg = default_config(device)
    few = dataclasses.replace(cfg, batch_size=2 * cfg.device_batch_size)
    step = step_of(built(few, device), few, device)
    step()
    kinds = [ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as recorded:
        step()
        now(device)

    spent = []
    for event in recorded.key_averages():
        if device.type == "cuda" and str(event.device_type).endswith("CUDA"):
            spent.append((event.self_device_time_total / 1000, event.count, event.key))
        elif device.type == "cpu":
            spent.append((event.self_cpu_time_total / 1000, event.count, event.key))
    spent.sort(reverse=True)
    total = sum(milliseconds for milliseconds, _, _ in spent)
    for i, (milliseconds, count, key) in enumerate(spent[:KERNELS], 1):
        share = 100 * milliseconds / total
        yield Check(f"kernel_{i:02}", f"{share:.1f} %, {milliseconds:.2f} ms, {count} x {key[:90]}")


def ceilings(device: torch.device) -> Iterator[Check]:
    """The fastest large products, and a large copy."""
    for name, row in bench.bench_peak(default_config(device), device).items():
        yield Check(name, figure_text(row))
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = bench.timed(lambda: target.copy_(source), 20, device)
    yield Check("copy", figure_text(bench.figure("GB/s read and written", 2e-9 * size / seconds)))


def attention(device: torch.device) -> Iterator[Check]:
    """Forward and backward of causal attention as the default has it, by backend."""
    cfg = default_config(device)
    B, T, H, D = cfg.device_batch_size, cfg.sequence_length, cfg.n_head, cfg.n_embd // cfg.n_head
    dtype = train_gpt.DTYPES[cfg.dtype]
    q, k, v = (
        torch.randn(B, T, H, D, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    grad = torch.randn_like(q)

    def both() -> None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(y, (q, k, v), grad)

    for name, backend in [("default", None), *SDPBackend.__members__.items()]:
        if name in ("ERROR", "OVERRIDEABLE"):
            continue
        label = f"attention_{name.lower().removesuffix('_attention')}"
        try:
            with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                seconds = bench.timed(both, CALLS, device)
        except RuntimeError as error:
            yield left_out(label, str(error).splitlines()[0][:60])
            continue
        yield Check(label, figure_text(bench.figure("ms", 1000 * seconds)))


def loss_by_chunk(device: torch.device) -> Iterator[Check]:
    """The default's loss with its gradients, by the logits that are there at a time."""
    cfg = default_config(device)
    rows = cfg.device_batch_size * cfg.sequence_length
    x = torch.randn(rows, cfg.n_embd, device=device, dtype=train_gpt.DTYPES[cfg.dtype])
    head = torch.randn(cfg.vocab_size, cfg.n_embd, device=device).requires_grad_()
    targets = torch.randint(cfg.vocab_size, (rows,), device=device)
    x.requires_grad_()
    one_chunk = cross_entropy.loss_chunk
    if cfg.compile == "1":
        one_chunk = torch.compile(one_chunk, dynamic=False)

    def loss() -> None:
        args = x, head, targets, one_chunk, cfg.logit_softcap
        torch.autograd.grad(cross_entropy.LinearCrossEntropy.apply(*args), (x, head))

    own = cross_entropy.LOGITS_PER_CHUNK[device.type]
    for logits in (own // 4, own, 4 * own):
        with mock.patch.dict(cross_entropy.LOGITS_PER_CHUNK, {device.type: logits}):
            seconds = bench.timed(loss, CALLS, device)
        name = f"loss_2^{int(np.log2(logits))}_logits"
        yield Check(name, figure_text(bench.figure("ms", 1000 * seconds)))


def optimizers(device: torch.device) -> Iterator[Check]:
    """Each optimizer of the default: the reduction of its gradients, and its update."""
    cfg = default_config(device)
    state = State.build(cfg, Ranks())
    for p in state.model.parameters():
        p.grad = torch.randn_like(p)
    skip = torch.zeros((), device=device)
    for i, optimizer in enumerate(state.optimizers):
        marks = []
        for _ in range(1 + CALLS):
            marks.append(now(device))
            optimizer.reduce_grads()
            marks.append(now(device))
            optimizer.step(0, None, skip)
            marks.append(now(device))
        # The first call is not counted.
        milliseconds = 1000 * np.diff(np.array(marks).reshape(-1, 3))[1:]
        name = f"optimizer_{i}_{type(optimizer.rule).__name__.lower()}"
        for column, what in enumerate(("reduce", "update")):
            row = bench.figure("ms", milliseconds[:, column])
            yield Check(f"{name}_{what}", figure_text(row), FIGURE)


def parts(device_type: str) -> dict[str, Part]:
    """The default first, then its pieces, then other presets."""
    presets = {name: preset_part(name) for name in PRESETS[device_type]}
    default = next(iter(presets))
    pieces = {
        "kernels": most_expensive,
        "ceilings": ceilings,
        "attention": attention,
        "loss": loss_by_chunk,
        "optimizers": optimizers,
    }
    return {default: presets.pop(default)} | pieces | presets


PARTS = parts("cpu")
