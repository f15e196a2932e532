"""Measures what a configuration of train_gpt.py costs on this machine; the settings are the same environment variables.

    PRESET=quickstart python scripts/bench.py
    python scripts/bench.py --only step,peak --json experiments/bench/gpt2_small.json
    torchrun --standalone --nproc_per_node=8 scripts/bench.py        # every rank measures, rank 0 tells

Tokens are random, so no data is needed, but VOCAB_SIZE=0 asks for the dataset's index.json. All files except that of
--json are temporary; TMPDIR chooses the disk they are on, and so the disk the loader is measured on.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import platform
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
from train_gpt import Config, ConfigError, DataError, Ranks, Records, ShardLoader, State

SECTIONS = ("step", "peak", "loader", "start")
LOADER_TOKENS = 2**25  # of the loader's dataset
LOADER_SECONDS = 2.0  # after which a pass over it ends early
WAIT_BATCHES = 50  # steps over which the waits for data are taken
RECORD_CALLS = 200
CPU = torch.device("cpu")


def figure(value, unit, low=None, high=None):
    return {"value": value, "min": low, "max": high, "unit": unit}


def spread(values, unit):
    """The median of what was measured several times, with its range."""
    return figure(float(np.median(values)), unit, float(np.min(values)), float(np.max(values)))


def rate(work, seconds, unit):
    """Work per second in the median time, with the range."""
    return figure(float(work / np.median(seconds)), unit, float(work / np.max(seconds)), float(work / np.min(seconds)))


def mark(device):
    """A point in time. On CUDA it is an event in the stream, so that timing never makes the device wait for Python."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def intervals(marks):
    """Seconds between neighbouring marks, after the device has reached the last."""
    if isinstance(marks[0], float):
        return np.diff(marks)
    torch.cuda.synchronize()
    return np.array([a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)])


def timed(call, count, device):
    """Seconds that each of `count` calls took, after one that is not timed."""
    call()
    marks = [mark(device)]
    for _ in range(count):
        call()
        marks.append(mark(device))
    return intervals(marks)


def time_parts(state, cfg, args, ranks):
    """Seconds (steps, 3) of train_step: forward and backward, gradient reduction, the rest. Marks in the first optimizer
    make the parts those of the very steps that are timed."""
    device, marks, first = ranks.device(cfg), [], state.optimizers[0]
    shape = cfg.batch_size // ranks.world_size, cfg.sequence_length + 1
    batch = torch.randint(cfg.vocab_size, shape, device=device)

    def marked(method):
        def call(*values):
            marks.append(mark(device))
            return method(*values)
        return call

    first.reduce_grads, first.step = marked(first.reduce_grads), marked(first.step)
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            marks.clear()
        marks.append(mark(device))
        train_gpt.train_step(state, cfg, batch[:, :-1], batch[:, 1:])
    marks.append(mark(device))
    del first.reduce_grads, first.step  # uncovers the methods of the class
    return intervals(marks).reshape(args.steps, 3)


def bench_step(state, cfg, args, ranks, plan):
    parts = time_parts(state, cfg, args, ranks)
    seconds, tokens = parts.sum(1), plan["tokens_per_step"]
    flops = rate(tokens * plan["flops_per_token"] / 1e12, seconds, "TFLOP/s")
    mfu = train_gpt.model_flops_utilization(cfg, ranks.device(cfg), flops["value"] * 1e12 / ranks.world_size)
    shares = zip(("forward_backward", "gradient_reduction", "optimizer"), (100 * parts / seconds[:, None]).T)
    return {"step_time": spread(1000 * seconds, "ms"), "tokens_per_sec": rate(tokens, seconds, "tokens/s"),
            "flops": flops, "mfu": figure(None if mfu is None else 100 * mfu, "%"),
            **{name: spread(share, "% of step") for name, share in shares}}


def bench_records(folder, cfg, run_id, step_ms):
    """What a logged step pays for its line and its point of the curve."""
    cfg = dataclasses.replace(cfg, log_dir=str(folder), results_csv=str(folder / "results.csv"))
    records, values = Records(cfg, run_id, writes=True), dict.fromkeys(train_gpt.CURVE, 1 / 3) | {"step": 1}
    line = f"step:1/{cfg.num_iterations} train_loss:3.3333 train_time:333333ms step_avg:333.33ms"
    with open(folder / "terminal", "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        records.open({"changes": ""}, [])
        prints = timed(lambda: records.print(line), RECORD_CALLS, CPU)
        points = timed(lambda: records.point(values), RECORD_CALLS, CPU)
        records.bar.close()
    return {"records_print": spread(1e6 * prints, "us"), "records_point": spread(1e6 * points, "us"),
            "records": spread(1e5 * (prints + points) / step_ms, "% of step, if logged")}


def bench_peak(cfg, device):
    """The fastest of some matrix products in the run's dtype: large squares, and the two of an FFN."""
    tokens, hidden = cfg.device_batch_size * cfg.sequence_length, cfg.d_ff or 4 * cfg.n_embd
    sizes, repeats = ((4096, 8192), 20) if device.type == "cuda" else ((2048,), 1)  # a short kernel is mostly its launch
    products = {}
    for m, k, n in [(size,) * 3 for size in sizes] + [(tokens, cfg.n_embd, hidden), (tokens, hidden, cfg.n_embd)]:
        a, b = (torch.randn(rows, k, device=device, dtype=train_gpt.DTYPES[cfg.dtype]) for rows in (m, n))
        seconds = timed(lambda a=a, b=b: [F.linear(a, b) for _ in range(repeats)], 5, device)
        products[f"product_{m}x{k}x{n}"] = rate(2e-12 * m * k * n * repeats, seconds, "TFLOP/s")
    return products | {"peak": figure(max(product["max"] for product in products.values()), "TFLOP/s")}


def write_random_shard(path, tokens, vocab_size):
    """A shard on the disk itself: pages that wait to be written cannot be dropped from the cache. Returns its path."""
    header = np.zeros(train_gpt.HEADER_INTS, dtype="<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, tokens
    with open(path, "wb") as file:
        file.write(header.tobytes() + np.random.default_rng(0).integers(0, vocab_size, tokens, dtype="<u2").tobytes())
        file.flush()
        os.fsync(file.fileno())
    return str(path)


def drop_from_cache(file):
    """Makes the next read of a file come from the disk, where the system can do that; no map of it may be open."""
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as shard:
            os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def blocks_read():
    """Blocks of 512 bytes that this process has got from a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock


def read_speed(file, cfg, count, cold):
    """One pass over a shard in batches of `count` samples, or LOADER_SECONDS of it. The value is that of the whole pass:
    a disk is read ahead, so most batches of a cold pass wait for nothing."""
    if cold:
        drop_from_cache(file)
    loader, blocks, marks = ShardLoader(file, cfg, cfg.shuffle), blocks_read(), [time.perf_counter()]
    for first in range(0, max(1, loader.samples - count), count):
        loader.read(first, count)
        marks.append(time.perf_counter())
        if marks[-1] - marks[0] > LOADER_SECONDS:
            break
    batch, seconds = count * loader.length, np.diff(marks)
    if cold and 512 * (blocks_read() - blocks) < batch * len(seconds):  # not even half of the bytes came from a disk
        return figure(None, "tokens/s")
    return rate(batch, seconds, "tokens/s") | {"value": float(batch * len(seconds) / seconds.sum())}


def data_waits(file, cfg, count, cold, state, device):
    """Milliseconds that WAIT_BATCHES training steps waited for their batches. The first finds nothing read ahead, and is
    left out."""
    if cold:
        drop_from_cache(file)
    waits, slices = [], ((i * count, count) for i in range(1 + WAIT_BATCHES))
    with contextlib.closing(ShardLoader(file, cfg, cfg.shuffle).prefetch(slices, device)) as batches:
        for inputs, targets, waited in batches:
            waits.append(1000 * waited)
            loss, _ = train_gpt.train_step(state, cfg, inputs, targets)
            loss.item()  # a batch is late when the device is free, not when Python is
    waits = waits[1:]
    return spread(waits, "ms, 99th percentile") | {"value": float(np.percentile(waits, 99))}


def bench_loader(folder, state, cfg, ranks):
    file = write_random_shard(folder / "random.bin", LOADER_TOKENS, cfg.vocab_size)
    count, figures = cfg.batch_size // ranks.world_size, {}
    for kind in "warm", "cold":
        figures[f"read_{kind}"] = read_speed(file, cfg, count, kind == "cold")
        if figures[f"read_{kind}"]["value"] is not None:
            figures[f"data_wait_{kind}"] = data_waits(file, cfg, count, kind == "cold", state, ranks.device(cfg))
        else:
            figures[f"data_wait_{kind}"] = figure(None, "ms, 99th percentile")
    return figures


def one_step_settings(folder, cfg, ranks):
    """Settings of a run that ends after one step, on data of its own."""
    tokens = cfg.batch_size * cfg.sequence_length + 1
    file = write_random_shard(folder / "one_step.bin", tokens, cfg.vocab_size)
    return {"input_bin": file, "input_val_bin": file, "vocab_size": cfg.vocab_size, "num_iterations": 1, "max_epochs": 0,
            "val_tokens": cfg.device_batch_size * ranks.world_size * cfg.sequence_length,
            "log_dir": str(folder / "one_step"), "results_csv": str(folder / "one_step.csv")}


def bench_start(env, one_step, ranks):
    """Seconds from the launch of train_gpt.py, on the ranks of this machine, to its first validation and first step."""
    of_torchrun = {name.upper() for name in Ranks._fields}
    env = {name: text for name, text in env.items() if name not in of_torchrun and not name.startswith("TORCHELASTIC_")}
    env |= {name.upper(): str(value) for name, value in one_step.items()}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks.local_world_size}"]
    command = [sys.executable, *torchrun * (ranks.world_size > 1), str(train_gpt.ROOT / "train_gpt.py")]
    began, seen = time.perf_counter(), {}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            seen.setdefault(line.partition("/")[0], time.perf_counter() - began)
    if child.returncode:
        raise RuntimeError(f"train_gpt.py ended with exit code {child.returncode}")
    return {"start_to_validation": figure(seen["step:0"], "s"), "start_to_step": figure(seen["step:1"], "s")}


def bench(args, env, ranks, folder):
    """The report: what was measured, where and with what. Raises ConfigError, DataError."""
    asked = Config.from_env(env)
    cfg = train_gpt.resolve(asked)
    one_step = one_step_settings(folder, cfg, ranks)
    short = dataclasses.replace(cfg, **one_step)
    train_gpt.preflight(short, ranks)
    plan, figures, device = train_gpt.make_plan(short, ranks), {}, ranks.device(cfg)
    if "start" in args.only and ranks.rank == 0:  # before this process takes the device
        figures |= bench_start(env, one_step, ranks)
    run_id = train_gpt.setup(cfg, ranks)
    cfg = dataclasses.replace(cfg, num_iterations=2**31)  # no end that the learning rate could reach
    if {"step", "loader"} & set(args.only):
        state = State.build(cfg, ranks)
        if cfg.compile == "1":
            train_gpt.compile_model(state.model, cfg, device)
    if "step" in args.only:
        figures |= bench_step(state, cfg, args, ranks, plan)
        figures |= bench_records(folder, cfg, run_id, figures["step_time"]["value"])
    if "peak" in args.only:
        figures |= bench_peak(cfg, device)
    if {"step", "peak"} <= set(args.only):
        share = figures["flops"]["value"] / ranks.world_size / figures["peak"]["value"]
        figures["share_of_peak"] = figure(100 * share, "%")
    if "loader" in args.only:
        figures |= bench_loader(folder, state, cfg, ranks)
    dist.destroy_process_group()
    commit, dirty = train_gpt.git_state()
    return {"command": f"python {' '.join(sys.argv)}", "changes": asked.changes(), "config_hash": asked.hash(),
            "started": train_gpt.utc_now(), "git": commit, "dirty": dirty, "device_name": train_gpt.device_name(device),
            "dtype": cfg.dtype, "world_size": ranks.world_size, "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "numpy": np.__version__, "figures": figures}


def table(report):
    ...
