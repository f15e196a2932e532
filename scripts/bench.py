"""Measures what a configuration of train_gpt.py costs on this machine; the settings are the same environment variables.

    PRESET=quickstart python scripts/bench.py --json experiments/bench/quickstart.json
    torchrun --standalone --nproc_per_node=8 scripts/bench.py     # all but the start; every rank measures, rank 0 tells
    PRESET=moe_muon_exp5 python scripts/bench.py --against FFN=gelu D_FF=3072     # steps in turn with another model

Tokens are random, so no data is needed, but VOCAB_SIZE=0 asks for the dataset's index.json. All files except that of
--json are temporary; TMPDIR chooses the disk they are on, and so the disk the loader is measured on.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch

from harness.checkpoints import Checkpoints, step_folders
from harness.contract import CURVE, ConfigError, DataError, EXIT_CODES
from harness.files import write_whole
from harness.meter import model_flops_utilization
from harness.provenance import device_name, git_state, machine_text, utc_now
from harness.ranks import Ranks, agree, setup
from harness.records import Records
from harness.settings import ROOT
import train_gpt

SECTIONS = {"step", "peak", "loader", "checkpoint", "start"}
TOKENS, READS, WAITS, RECORDS, PRODUCTS, SAVES = (
    2**25,
    1000,
    50,
    200,
    5,
    5,
)  # how much of each is measured


def figure(unit, values, value=None):
    """A row: the median of what was measured, or another `value` of it, and the range; blank where nothing was."""
    row = (
        [np.median(values) if value is None else value, min(values), max(values)]
        if len(values)
        else [None] * 3
    )
    return {key: x if x is None else float(x) for key, x in zip(("value", "min", "max"), row)} | {
        "unit": unit
    }


def now(device):
    """Seconds on some clock, after the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(call, count, device=torch.device("cpu")):
    """Seconds that each of `count` calls took, after one that is not timed."""
    call()
    marks = [now(device)]
    for _ in range(count):
        call()
        marks.append(now(device))
    return np.diff(marks)


def timed_step(state, cfg, ranks):
    """Seconds of one train_step on random tokens: (forward and backward, reduction and optimizer)."""
    device, first = ranks.device(cfg), state.optimizers[0]
    batch = torch.randint(
        cfg.vocab_size, (cfg.batch_size // ranks.world_size, cfg.sequence_length + 1), device=device
    )
    marks, reduce_grads = [now(device)], first.reduce_grads
    first.reduce_grads = lambda: (marks.append(now(device)), reduce_grads())[
        1
    ]  # here the backward pass has ended
    train_gpt.train_step(state, cfg, batch[:, :-1], batch[:, 1:])
    first.reduce_grads = reduce_grads
    return np.diff([*marks, now(device)])


def bench_against(state, cfg, other_cfg, ranks, args):
    """Steps of this model and another in turn, and their ratios pair by pair: above 1, this one takes longer."""
    other_cfg = replace(other_cfg, num_iterations=cfg.num_iterations)
    other = train_gpt.State.build(other_cfg, ranks)
    if other_cfg.compile == "1":
        train_gpt.compile_model(other.model, other_cfg, ranks.device(cfg))
    pairs = [
        (timed_step(state, cfg, ranks), timed_step(other, other_cfg, ranks))
        if i % 2
        else (timed_step(other, other_cfg, ranks), timed_step(state, cfg, ranks))[::-1]
        for i in range(args.warmup + args.steps)
    ]
    ours, theirs = np.array(pairs[args.warmup :]).transpose(1, 2, 0)
    figures = {"step": (ours.sum(0), theirs.sum(0))}
    figures |= {"forward_backward": (ours[0], theirs[0]), "optimizer": (ours[1], theirs[1])}
    return {
        f"{name}_{kind}": figure(unit, values)
        for name, (a, b) in figures.items()
        for kind, unit, values in (
            ("ours", "ms", 1000 * a),
            ("other", "ms", 1000 * b),
            ("ratio", "ours / other", a / b),
        )
    }


def bench_step(state, cfg, ranks, args):
    """Times train_step and its two parts."""
    device, times = (
        ranks.device(cfg),
        [timed_step(state, cfg, ranks) for _ in range(args.warmup + args.steps)],
    )
    backward, optimizer = np.array(times)[args.warmup :].T
    seconds, tokens = backward + optimizer, cfg.batch_size * cfg.sequence_length
    speed, flops = tokens / np.median(seconds), state.model.flops_per_token() / ranks.world_size
    mfu = model_flops_utilization(cfg, device, flops * speed)
    return {
        "step_time": figure("ms", 1000 * seconds),
        "tokens_per_sec": figure("tokens/s", tokens / seconds, speed),
        "flops": figure("TFLOP/s a rank", flops * tokens / 1e12 / seconds, flops * speed / 1e12),
        "mfu": figure("%", [] if mfu is None else [100 * mfu]),
        "forward_backward": figure("% of step", 100 * backward / seconds),
        "reduce_and_optimizer": figure("% of step", 100 * optimizer / seconds),
    }


def bench_records(folder, cfg, step_ms):
    """What a step that is logged pays for its line and its point of the curve."""
    cfg = replace(cfg, log_dir=folder, results_csv=f"{folder}/results.csv")
    records, values = Records(cfg, "bench"), dict.fromkeys(CURVE, 1 / 3) | {"step": 1}
    with (
        open(f"{folder}/terminal", "w") as out,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        records.open({"changes": ""}, [])
        seconds = timed(
            lambda: (records.print("step:1/9 train_loss:3.3333"), records.point(values)), RECORDS
        )
    return {
        "records": figure("us", 1e6 * seconds),
        "records_share": figure("% of step", 1e5 * seconds / step_ms),
    }


def bench_peak(cfg, device):
    """The fastest of some matrix products in the run's dtype: large squares, and the two of an FFN."""
    tokens, hidden, figures = (
        cfg.device_batch_size * cfg.sequence_length,
        cfg.d_ff or 4 * cfg.n_embd,
        {},
    )
    squares, repeats = (
        ((4096, 8192), 20) if device.type == "cuda" else ((2048,), 1)
    )  # hides the launches
    for m, k, n in (
        *((size,) * 3 for size in squares),
        (tokens, cfg.n_embd, hidden),
        (tokens, hidden, cfg.n_embd),
    ):
        a, b = (
            torch.randn(rows, k, device=device, dtype=train_gpt.DTYPES[cfg.dtype])
            for rows in (m, n)
        )
        seconds = timed(
            lambda a=a, b=b: [train_gpt.product(a, b) for _ in range(repeats)], PRODUCTS, device
        )
        figures[f"product_{m}x{k}x{n}"] = figure("TFLOP/s", 2e-12 * m * k * n * repeats / seconds)
    return figures | {
        "peak": figure("TFLOP/s", [max(product["max"] for product in figures.values())])
    }


def bench_loader(file, state, cfg, ranks, kind):
    """Training steps' waits for their batches, and the speed of reading the next ones, with the shard in the page
    cache ("warm") or dropped from it ("cold"); blank where it cannot be dropped."""
    if kind == "cold" and hasattr(os, "posix_fadvise"):
        with open(file, "rb") as shard:
            os.fsync(shard.fileno())  # what has yet to be written stays in the cache
            os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    loader, blocks = (
        train_gpt.ShardLoader(file, cfg, cfg.shuffle),
        resource.getrusage(resource.RUSAGE_SELF).ru_inblock,
    )
    waits, count = [], cfg.batch_size // ranks.world_size
    for inputs, targets, waited in loader.prefetch(
        [(i * count, count) for i in range(WAITS)], ranks.device(cfg)
    ):
        waits.append(1000 * waited)
        train_gpt.train_step(state, cfg, inputs, targets)[
            0
        ].item()  # late is late for the device, not for Python
    starts, batch = iter(range(WAITS * count, 2**62, count)), count * cfg.sequence_length
    seconds = timed(
        lambda: loader.read(next(starts), count),
        max(1, min(READS, loader.samples // count - WAITS - 1)),
    )
    from_disk = 512 * (resource.getrusage(resource.RUSAGE_SELF).ru_inblock - blocks)
    known = kind == "warm" or from_disk > batch * (
        WAITS + len(seconds)
    )  # more than half of the bytes
    waits, speeds = (
        (waits[1:], batch / seconds) if known else ([], [])
    )  # the first batch cannot be read ahead
    return {
        f"data_wait_{kind}": figure("ms, 99th percentile", waits, np.percentile(waits or [0], 99)),
        f"read_{kind}": figure("tokens/s", speeds, batch * len(seconds) / seconds.sum()),
    }


def bench_checkpoint(folder, state, cfg, ranks):
    """What a checkpoint takes from the loop, the first apart, for it has to allocate; and until it is on the disk."""
    cfg = replace(cfg, log_dir=folder, results_csv=f"{folder}/results.csv")
    records, stalls, totals = Records(cfg, "saves", ranks.rank), [], []
    records.folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(cfg, ranks, records)
    with open(os.devnull, "w") as out, contextlib.redirect_stdout(out):
        for _ in range(1 + SAVES):
            began, state.step = now(ranks.device(cfg)), state.step + 1
            checkpoints.save(state, {})
            stalls.append(time.perf_counter() - began)
            checkpoints.wait(last=True)
            totals.append(time.perf_counter() - began)
    size = sum(
        path.stat().st_size for path in max(step_folders(records.folder).items())[1].iterdir()
    )
    return {
        "checkpoint_size": figure("MB", [size / 1e6]),
        "checkpoint_stall_first": figure("s", stalls[:1]),
        "checkpoint_stall": figure("s", stalls[1:]),
        "checkpoint_written": figure("s", totals[1:]),
    }


def bench_start(env):
    """Seconds from the launch of train_gpt.py to the losses of its first validation and its first step."""
    command, seen, began = [sys.executable, ROOT / "train_gpt.py"], {}, time.perf_counter()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            seen.setdefault(line.partition("/")[0], time.perf_counter() - began)
    if run.returncode:
        sys.exit(run.returncode)  # it has said why
    return {
        "start_to_validation": figure("s", [seen["step:0"]]),
        "start_to_step": figure("s", [seen["step:1"]]),
    }


def bench(args, env, ranks, folder):
    """What was measured, where and with what. Raises ConfigError, DataError."""
    asked = train_gpt.Config.from_env(env)
    cfg = train_gpt.resolve(asked)
    other_cfg = train_gpt.resolve(train_gpt.Config.from_env(env | dict(args.against)))
    train_gpt.check_batch(other_cfg, ranks)
    file, device, figures = f"{folder}/random.bin", ranks.device(cfg), {}
    header = [train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, TOKENS] + [0] * (
        train_gpt.HEADER_INTS - 3
    )
    tokens = np.random.default_rng(0).integers(cfg.vocab_size, size=TOKENS, dtype="<u2")
    np.append(np.array(header, dtype="<i4").view("<u2"), tokens).tofile(file)
    os.link(file, f"{folder}/val.bin")
    one_step = env | {
        "INPUT_BIN": file,
        "INPUT_VAL_BIN": f"{folder}/val.bin",
        "MAX_EPOCHS": "0",
        "VAL_TOKENS": str(cfg.device_batch_size * cfg.sequence_length),
        "VAL_EVERY": "1",
        "VOCAB_SIZE": str(cfg.vocab_size),
        "NUM_ITERATIONS": "1",
        "LOG_DIR": f"{folder}/one_step",
        "RESULTS_CSV": f"{folder}/one_step.csv",
    }
    train_gpt.check_batch(cfg, ranks)
    train_gpt.preflight(train_gpt.resolve(train_gpt.Config.from_env(one_step)), ranks)
    if "start" in args.only and "MASTER_ADDR" not in env:  # before this process takes the device
        figures |= bench_start(one_step)
    setup(cfg, ranks, env)
    cfg = replace(cfg, num_iterations=2**31)  # no end for the learning rate to go to
    state = train_gpt.State.build(cfg, ranks)
    if cfg.compile == "1" and ({"step", "loader"} & args.only or args.against):
        train_gpt.compile_model(state.model, cfg, device)
    if args.against:
        figures |= bench_against(state, cfg, other_cfg, ranks, args)
    if "step" in args.only:
        figures |= bench_step(state, cfg, ranks, args)
        figures |= bench_records(folder, cfg, figures["step_time"]["value"])
    if "peak" in args.only:
        figures |= bench_peak(cfg, device)
    if {"step", "peak"} <= args.only:
        figures["share_of_peak"] = figure(
            "%", [100 * figures["flops"]["value"] / figures["peak"]["value"]]
        )
    if "loader" in args.only:
        figures |= bench_loader(file, state, cfg, ranks, "warm") | bench_loader(
            file, state, cfg, ranks, "cold"
        )
    if "checkpoint" in args.only:
        figures |= bench_checkpoint(agree(lambda: folder), state, cfg, ranks)
    torch.distributed.destroy_process_group()
    return {
        "command": f"python {' '.join(sys.argv)}",
        "changes": asked.changes(),
        "finished": utc_now(),
        **dict(zip(("git", "dirty"), git_state())),
        "versions": machine_text().splitlines()[0],
        "device": device_name(device),
        "dtype": cfg.dtype,
        "ranks": ranks.world_size,
        "figures": figures,
    }


def main(argv, env):
    """Measures, prints the table and writes the report; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="timed training steps")
    parser.add_argument("--warmup", type=int, default=3, help="training steps before them")
    parser.add_argument(
        "--only", type=lambda text: set(text.split(",")), default=SECTIONS, help="like step,peak"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="NAME=VALUE",
        default=[],
        type=lambda text: text.split("=", 1),
        help="settings of another model to time in turn with this one; nothing else is measured then",
    )
    parser.add_argument("--json", help="file for the report; without it the table is all")
    args, ranks = parser.parse_args(argv), Ranks.from_env(env)
    if any(len(pair) < 2 for pair in args.against):
        parser.error("--against takes settings like FFN=gelu D_FF=3072")
    args.only = set() if args.against else args.only
    if not args.only <= SECTIONS or min(args.steps, args.warmup) < 1:
        parser.error(
            f"--only takes some of {','.join(sorted(SECTIONS))}; --steps and --warmup are at least 1"
        )
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = bench(args, env | {"DRY_RUN": ""}, ranks, folder)
    except (ConfigError, DataError) as error:
        if ranks.local_rank == 0:
            print(f"{error.status}: {error}", file=sys.stderr)
        time.sleep(
            ranks.rank > 0
        )  # torchrun ends all ranks as soon as one is gone, and rank 0 has to say why
        return EXIT_CODES[error.status]
    if ranks.rank == 0:
        print(
            f"{report['device']}, {report['dtype']}".ljust(28)
            + f"{'value':>12}{'min':>12}{'max':>12}  unit"
        )
        for name, row in report["figures"].items():
            cells = [
                "" if row[key] is None else f"{row[key]:,.4g}" for key in ("value", "min", "max")
            ]
            print(f"{name:28}{cells[0]:>12}{cells[1]:>12}{cells[2]:>12}  {row['unit']}")
        if args.json:
            write_whole(args.json, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
