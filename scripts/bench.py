"""Measures what a configuration of train_gpt.py costs on this machine; the settings are the same environment variables.

    PRESET=quickstart python scripts/bench.py --json experiments/bench/quickstart.json
    torchrun --standalone --nproc_per_node=8 scripts/bench.py --only step,peak        # every rank measures, rank 0 tells

Tokens are random, so no data is needed, but VOCAB_SIZE=0 asks for the dataset's index.json. All files except that of
--json are temporary; TMPDIR chooses the disk they are on, and so the disk the loader is measured on.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import train_gpt
from train_gpt import ConfigError, DataError, Ranks, ShardLoader

SECTIONS = ["step", "peak", "loader", "start"]
LOADER_TOKENS, READS, WAITS, RECORD_CALLS, PRODUCTS = 2**25, 1000, 50, 200, 5  # how much of each is measured


def figure(unit, values, value=None):
    """A row: the median of what was measured, or another `value` of it, and the range; blank where nothing was."""
    row = [np.median(values) if value is None else value, np.min(values), np.max(values)] if len(values) else [np.nan] * 3
    return dict(zip(("value", "min", "max"), (None if np.isnan(x) else float(x) for x in row))) | {"unit": unit}


def mark(device):
    """A point in time. On CUDA it is an event in the stream, so that timing never makes the device wait for Python."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def intervals(marks):
    """Seconds between neighbouring marks, once the device has reached the last."""
    if isinstance(marks[0], float):
        return np.diff(marks)
    torch.cuda.synchronize()
    return np.array([a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)])


def timed(call, count, device=torch.device("cpu")):
    """Seconds that each of `count` calls took, after one that is not timed."""
    call()
    marks = [mark(device)]
    for _ in range(count):
        call()
        marks.append(mark(device))
    return intervals(marks)


def step_parts(state, cfg, ranks, args):
    """Seconds (steps, 3) of train_step: forward and backward, gradient reduction, the rest. The first optimizer sets
    marks, so these are the parts of the very steps that are timed."""
    device, marks, first = ranks.device(cfg), [], state.optimizers[0]
    batch = torch.randint(cfg.vocab_size, (cfg.batch_size // ranks.world_size, cfg.sequence_length + 1), device=device)

    def marked(method):
        return lambda *values: (marks.append(mark(device)), method(*values))[1]

    first.reduce_grads, first.step = marked(first.reduce_grads), marked(first.step)
    for _ in range(args.warmup + args.steps):
        marks.append(mark(device))
        train_gpt.train_step(state, cfg, batch[:, :-1], batch[:, 1:])
    marks.append(mark(device))
    del first.reduce_grads, first.step  # uncovers the methods of the class
    return intervals(marks[3 * args.warmup:]).reshape(-1, 3)


def bench_step(state, cfg, ranks, args, plan):
    parts = step_parts(state, cfg, ranks, args)
    seconds, tokens = parts.sum(1), plan["tokens_per_step"]
    speed, teraflops = tokens / np.median(seconds), plan["flops_per_token"] / 1e12
    mfu = train_gpt.model_flops_utilization(cfg, ranks.device(cfg), 1e12 * teraflops * speed / ranks.world_size)
    shares = zip(("forward_backward", "gradient_reduction", "optimizer"), (100 * parts / seconds[:, None]).T)
    return {"step_time": figure("ms", 1000 * seconds), "tokens_per_sec": figure("tokens/s", tokens / seconds, speed),
            "flops": figure("TFLOP/s", teraflops * tokens / seconds, teraflops * speed),
            "mfu": figure("%", [] if mfu is None else [100 * mfu]),
            **{name: figure("% of step", share) for name, share in shares}}


def bench_records(folder, cfg, step_ms):
    """What a logged step pays for its line and its point of the curve."""
    cfg = dataclasses.replace(cfg, log_dir=str(folder), results_csv=str(folder / "results.csv"))
    records, values = train_gpt.Records(cfg, "bench", writes=True), dict.fromkeys(train_gpt.CURVE, 1 / 3) | {"step": 1}
    line = "step:1/1 train_loss:3.3333 train_time:333ms step_avg:333.33ms"
    with open(folder / "terminal", "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        records.open({"changes": ""}, [])
        seconds = timed(lambda: (records.print(line), records.point(values)), RECORD_CALLS)
    return {"records": figure("us", 1e6 * seconds), "records_share": figure("% of a logged step", 1e5 * seconds / step_ms)}


def bench_peak(cfg, device):
    """The fastest of some matrix products in the run's dtype: large squares, and the two of an FFN."""
    tokens, hidden = cfg.device_batch_size * cfg.sequence_length, cfg.d_ff or 4 * cfg.n_embd
    squares, repeats = ((4096, 8192), 20) if device.type == "cuda" else ((2048,), 1)  # a lone kernel shows its launch
    figures = {}
    for m, k, n in *((size,) * 3 for size in squares), (tokens, cfg.n_embd, hidden), (tokens, hidden, cfg.n_embd):
        a, b = (torch.randn(rows, k, device=device, dtype=train_gpt.DTYPES[cfg.dtype]) for rows in (m, n))
        seconds = timed(lambda a=a, b=b: [F.linear(a, b) for _ in range(repeats)], PRODUCTS, device)
        figures[f"product_{m}x{k}x{n}"] = figure("TFLOP/s", 2e-12 * m * k * n * repeats / seconds)
    return figures | {"peak": figure("TFLOP/s", [max(product["max"] for product in figures.values())])}


def write_random_shard(path, tokens, vocab_size):
    header = np.zeros(train_gpt.HEADER_INTS, dtype="<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, tokens
    path.write_bytes(header.tobytes() + np.random.default_rng(0).integers(0, vocab_size, tokens, dtype="<u2").tobytes())
    return str(path)


def open_loader(file, cfg, cold):
    """A loader of one shard, which is dropped from the page cache first if `cold`; no map of it may be open then."""
    if cold and hasattr(os, "posix_fadvise"):
        with open(file, "rb") as shard:
            os.fsync(shard.fileno())  # what waits to be written cannot be dropped
            os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return ShardLoader(file, cfg, cfg.shuffle)


def bench_loader(file, state, cfg, ranks, cold):
    """Speed of reading batches, and how long training steps wait for theirs; blank where cold is not to be had."""
    loader, count, firsts = open_loader(file, cfg, cold), cfg.batch_size // ranks.world_size, itertools.count(0, ...)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    seconds = timed(lambda: loader.read(next(firsts), count), min(READS, loader.samples // count))
    from_disk = 512 * (resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before)
    tokens, waits = count * loader.length, []
    if cold and from_disk < tokens * len(seconds):  # not even half of the bytes
        seconds = seconds[:0]
    ...


def bench_start(env, one_step):
    """Seconds from the launch of train_gpt.py to the losses of its first validation and its first step."""
    env, seen, began = env | {name.upper(): str(value) for name, value in one_step.items()}, {}, time.perf_counter()
    command = [sys.executable, train_gpt.ROOT / "train_gpt.py"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            seen.setdefault(line.partition("/")[0], time.perf_counter() - began)
    if run.returncode:
        sys.exit(run.returncode)  # it has said why
    return {"start_to_validation": figure("s", [seen["step:0"]]), "start_to_step": figure("s", [seen["step:1"]])}
