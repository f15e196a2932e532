"""Measures what a configuration of train_gpt.py costs on this machine; settings are its variables.

    PRESET=quickstart python scripts/bench.py --json experiments/bench/quickstart.json
    torchrun --standalone --nproc_per_node=8 scripts/bench.py     # all but the start
    PRESET=moe_muon_exp5 python scripts/bench.py --against FFN=gelu D_FF=3072   # in turn
    PRESET=quickstart python scripts/bench.py --against-file HEAD~3   # or another train_gpt.py

Of several ranks every one measures, and rank 0 tells. Tokens are random, so no data is needed, but
VOCAB_SIZE=0 asks for the dataset's index.json. All files except that of --json are temporary;
TMPDIR chooses the disk they are on, and so the disk the loader is measured on.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import os

from store.process import ENDINGS, before_torch

if __name__ == "__main__":  # as train_gpt.py does
    before_torch(os.environ)

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from bench_versions import VersionError, losses_compared, other_version, steps_in_turn
from bench_worker import timed_step as timed_parts
from harness.checkpoints import Checkpoints, step_folders
from harness.meter import now, peak_flops
from harness.provenance import device_name, git_state, machine_text, utc_now
from harness.ranks import Ranks, from_rank0, setup
from harness.records import Records
from harness.settings import ROOT
from store.contract import CURVE, ConfigError, DataError, EXIT_CODES
from store.files import write_whole
from store.source import source_hash
from ops.products import matmul_nt
import train_gpt
from train_gpt import Config, State

SECTIONS = {"step", "peak", "loader", "checkpoint", "start"}
# how much of each is measured
TOKENS = 2**25
READS = 1000
WAITS = 50
RECORDS = 200
PRODUCTS = 5
SAVES = 5
NAMES = ("ours", "other")  # of two models that are timed in turn

Figure = dict[str, float | str | None]  # value, min, max and unit
Figures = dict[str, Figure]  # by name


def figure(unit: str, values: Sequence[float], value: float | None = None) -> Figure:
    """A row: the median of what was measured, or another `value` of it, and the range; blank where
    nothing was."""
    if not len(values):
        return {"value": None, "min": None, "max": None, "unit": unit}
    middle = np.median(values) if value is None else value
    return {
        "value": float(middle),
        "min": float(min(values)),
        "max": float(max(values)),
        "unit": unit,
    }


def timed(call: Callable[[], object], count: int, device: torch.device | None = None) -> np.ndarray:
    """Seconds that each of `count` calls took, (count,), after one that is not timed; of a CPU
    where no device is named."""
    device = device or torch.device("cpu")
    call()
    marks = [now(device)]
    for _ in range(count):
        call()
        marks.append(now(device))
    return np.diff(marks)


def timed_step(state: State, cfg: Config, ranks: Ranks) -> list[float]:
    """Seconds of one train_step on random tokens: [forward and backward, reduction and
    optimizer]."""
    shape = cfg.batch_size // ranks.world_size, cfg.sequence_length + 1
    batch = torch.randint(cfg.vocab_size, shape, device=ranks.device(cfg))
    return timed_parts(train_gpt.train_step, state, cfg, batch)[0]


def compared(ours: np.ndarray, other: np.ndarray) -> Figures:
    """Steps of two models that were made in turn, and their ratios pair by pair: above 1, ours
    takes longer. From seconds (steps, parts), as timed_step has them."""
    parts = {"step": (ours.sum(1), other.sum(1))}
    if ours.shape[1] == other.shape[1] == 2:  # else a version does not tell them apart
        parts["forward_backward"] = ours[:, 0], other[:, 0]
        parts["optimizer"] = ours[:, 1], other[:, 1]
    figures = {}
    for name, (a, b) in parts.items():
        figures[f"{name}_ours"] = figure("ms", 1000 * a)
        figures[f"{name}_other"] = figure("ms", 1000 * b)
        figures[f"{name}_ratio"] = figure("ours / other", a / b)
    return figures


def bench_against(
    state: State, cfg: Config, other_cfg: Config, ranks: Ranks, args: argparse.Namespace
) -> Figures:
    """Steps of this model and another in turn, compared."""
    other_cfg = replace(other_cfg, num_iterations=cfg.num_iterations)
    other = State.build(other_cfg, ranks)
    if other_cfg.compile == "1":
        train_gpt.compile_model(other.model, other_cfg, ranks.device(cfg))

    times = {name: [] for name in NAMES}
    models = [("ours", state, cfg), ("other", other, other_cfg)]
    for _ in range(args.warmup + args.steps):
        models.reverse()  # so that neither is always the first
        for name, one_state, one_cfg in models:
            times[name].append(timed_step(one_state, one_cfg, ranks))

    ours, theirs = (np.array(times[name])[args.warmup :] for name in NAMES)
    return compared(ours, theirs)


def token_speed(tokens: int, seconds: np.ndarray) -> Figure:
    """Tokens per second of steps of so many that took so long, at their median."""
    return figure("tokens/s", tokens / seconds, tokens / np.median(seconds))


def bench_step(state: State, cfg: Config, ranks: Ranks, args: argparse.Namespace) -> Figures:
    """Times train_step and its two parts."""
    device = ranks.device(cfg)
    times = [timed_step(state, cfg, ranks) for _ in range(args.warmup + args.steps)]
    backward, optimizer = np.array(times)[args.warmup :].T
    seconds = backward + optimizer
    tokens = cfg.batch_size * cfg.sequence_length
    tokens_per_sec = token_speed(tokens, seconds)
    speed = tokens_per_sec["value"]
    flops = state.model.flops_per_token() / ranks.world_size
    peak = peak_flops(cfg, device)
    return {
        "step_time": figure("ms", 1000 * seconds),
        "tokens_per_sec": tokens_per_sec,
        "flops": figure("TFLOP/s a rank", flops * tokens / 1e12 / seconds, flops * speed / 1e12),
        "mfu": figure("%", [100 * flops * speed / peak] if peak else []),
        "forward_backward": figure("% of step", 100 * backward / seconds),
        "reduce_and_optimizer": figure("% of step", 100 * optimizer / seconds),
    }


def bench_records(folder: str, cfg: Config, step_ms: float) -> Figures:
    """What a step that is logged pays for its line and its point of the curve."""
    cfg = replace(cfg, log_dir=folder, results_csv=f"{folder}/results.csv")
    records = Records(cfg, "bench", CURVE, "", Ranks())
    values = dict.fromkeys(CURVE, 1 / 3) | {"step": 1}

    def record() -> None:
        records.print("step:1/9 train_loss:3.3333")
        records.point(values)

    with (
        open(f"{folder}/terminal", "w", encoding="utf-8") as out,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        records.open({"changes": ""}, [])
        seconds = timed(record, RECORDS)
    return {
        "records": figure("us", 1e6 * seconds),
        "records_share": figure("% of step", 1e5 * seconds / step_ms),
    }


def bench_peak(cfg: Config, device: torch.device) -> Figures:
    """The fastest of some matrix products in the run's dtype: large squares, and the two of an
    FFN."""
    tokens = cfg.device_batch_size * cfg.sequence_length
    hidden = cfg.d_ff or 4 * cfg.n_embd
    # repeats hide the launches
    squares, repeats = ((4096, 8192), 20) if device.type == "cuda" else ((2048,), 1)
    shapes = [(size, size, size) for size in squares]
    shapes += [(tokens, cfg.n_embd, hidden), (tokens, hidden, cfg.n_embd)]
    dtype = train_gpt.DTYPES[cfg.dtype]

    figures = {}
    for m, k, n in shapes:
        a, b = (torch.randn(rows, k, device=device, dtype=dtype) for rows in (m, n))

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b) -> None:
            for _ in range(repeats):
                matmul_nt(a, b)

        seconds = timed(multiply, PRODUCTS, device)
        figures[f"product_{m}x{k}x{n}"] = figure("TFLOP/s", 2e-12 * m * k * n * repeats / seconds)
    fastest = max(product["max"] for product in figures.values())
    return figures | {"peak": figure("TFLOP/s", [fastest])}


def blocks_read() -> int:
    """Blocks of 512 bytes that this process has read from a disk."""
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock


def drop_from_cache(file: str) -> None:
    """Has the system read a file from the disk again, where it knows how to."""
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as shard:
            os.fsync(shard.fileno())  # what has yet to be written stays in the cache
            os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench_loader(file: str, state: State, cfg: Config, ranks: Ranks, kind: str) -> Figures:
    """Training steps' waits for their batches, and the speed of reading the next ones, with the
    shard in the page cache ("warm") or dropped from it ("cold"); blank where it cannot be
    dropped."""
    if kind == "cold":
        drop_from_cache(file)
    loader = train_gpt.ShardLoader(file, cfg, cfg.shuffle)
    blocks = blocks_read()
    count = cfg.batch_size // ranks.world_size

    waits = []
    asked = [(i * count, count) for i in range(WAITS)]
    for inputs, targets, waited in loader.prefetch(asked, ranks.device(cfg)):
        waits.append(1000 * waited)
        loss = train_gpt.train_step(state, cfg, inputs, targets)[0]
        loss.item()  # late is late for the device, not for Python

    starts = iter(range(WAITS * count, 2**62, count))
    reads = max(1, min(READS, loader.samples // count - WAITS - 1))
    seconds = timed(lambda: loader.read(next(starts), count), reads)

    tokens = count * cfg.sequence_length
    from_disk = 512 * (blocks_read() - blocks)
    # more than half of the bytes came from the disk
    is_known = kind == "warm" or from_disk > tokens * (WAITS + len(seconds))
    speeds = tokens / seconds if is_known else []
    waits = waits[1:] if is_known else []  # the first batch cannot be read ahead
    return {
        f"data_wait_{kind}": figure("ms, 99th percentile", waits, np.percentile(waits or [0], 99)),
        f"read_{kind}": figure("tokens/s", speeds, tokens * len(seconds) / seconds.sum()),
    }


def bench_checkpoint(folder: str, state: State, cfg: Config, ranks: Ranks) -> Figures:
    """What a checkpoint takes from the loop, the first apart, for it has to allocate; and until it
    is on the disk."""
    cfg = replace(cfg, log_dir=folder, results_csv=f"{folder}/results.csv")
    records = Records(cfg, "saves", CURVE, "", ranks)
    records.files.folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(cfg, ranks, records)
    stalls, totals = [], []
    with open(os.devnull, "w", encoding="utf-8") as out, contextlib.redirect_stdout(out):
        for _ in range(1 + SAVES):
            began = now(ranks.device(cfg))
            state.step += 1
            checkpoints.save(state.step, state.tensors(), {})
            stalls.append(time.perf_counter() - began)
            checkpoints.wait(last=True)
            totals.append(time.perf_counter() - began)
    _, newest = max(step_folders(records.files.folder).items())
    size = sum(path.stat().st_size for path in newest.iterdir())
    return {
        "checkpoint_size": figure("MB", [size / 1e6]),
        "checkpoint_stall_first": figure("s", stalls[:1]),
        "checkpoint_stall": figure("s", stalls[1:]),
        "checkpoint_written": figure("s", totals[1:]),
    }


def bench_start(env: Mapping[str, str]) -> Figures:
    """Seconds from the launch of train_gpt.py to the losses of its first validation and its first
    step."""
    command = [sys.executable, ROOT / "train_gpt.py"]
    seen = {}
    began = time.perf_counter()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, encoding="utf-8") as run:
        for line in run.stdout:
            seen.setdefault(line.partition("/")[0], time.perf_counter() - began)
    if run.returncode:
        sys.exit(run.returncode)  # it has said why
    return {
        "start_to_validation": figure("s", [seen["step:0"]]),
        "start_to_step": figure("s", [seen["step:1"]]),
    }


def make_shards(folder: str, vocab_size: int) -> tuple[str, str]:
    """The paths of a shard of random tokens for training, and of the same for validation."""
    header = np.zeros(train_gpt.HEADER_INTS, dtype="<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, TOKENS
    tokens = np.random.default_rng(0).integers(vocab_size, size=TOKENS, dtype="<u2")
    train, val = f"{folder}/random.bin", f"{folder}/val.bin"
    np.append(header.view("<u2"), tokens).tofile(train)
    os.link(train, val)
    return train, val


def one_step_env(
    env: Mapping[str, str], cfg: Config, train: str, val: str, folder: str
) -> dict[str, str]:
    """The environment of a run of one step on random tokens that leaves all in a folder."""
    return {
        **env,
        "INPUT_BIN": train,
        "INPUT_VAL_BIN": val,
        "MAX_EPOCHS": "0",
        "VAL_TOKENS": str(cfg.device_batch_size * cfg.sequence_length),
        "VAL_EVERY": "1",
        "VOCAB_SIZE": str(cfg.vocab_size),
        "NUM_ITERATIONS": "1",
        "LOG_DIR": f"{folder}/one_step",
        "RESULTS_CSV": f"{folder}/one_step.csv",
    }


def measure(
    args: argparse.Namespace, cfg: Config, other_cfg: Config, ranks: Ranks, shard: str, folder: str
) -> Figures:
    """All figures that are asked for but the start, of a process group that is set up."""
    device = ranks.device(cfg)
    figures = {}
    cfg = replace(cfg, num_iterations=2**31)  # no end for the learning rate to go to
    state = State.build(cfg, ranks)
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
        fraction = figures["flops"]["value"] / figures["peak"]["value"]
        figures["share_of_peak"] = figure("%", [100 * fraction])
    if "loader" in args.only:
        for kind in ("warm", "cold"):
            figures |= bench_loader(shard, state, cfg, ranks, kind)
    if "checkpoint" in args.only:
        figures |= bench_checkpoint(from_rank0(lambda: folder), state, cfg, ranks)
    return figures


def bench(args: argparse.Namespace, env: Mapping[str, str], ranks: Ranks, folder: str) -> dict:
    """What was measured, where and with what. Raises ConfigError, DataError."""
    asked = Config.from_env(env)
    cfg = train_gpt.resolve(asked)
    for name, _ in args.against:
        if name.lower() not in Config.__dataclass_fields__:
            raise ConfigError(f"--against {name}: no setting; python train_gpt.py --help has them")
    other_cfg = train_gpt.resolve(Config.from_env({**env, **dict(args.against)}))
    train_gpt.check_batch(other_cfg, ranks)
    train, val = make_shards(folder, cfg.vocab_size)
    one_step = one_step_env(env, cfg, train, val, folder)
    train_gpt.check_batch(cfg, ranks)
    train_gpt.preflight(train_gpt.resolve(Config.from_env(one_step)), ranks)

    figures = {}
    if "start" in args.only and "MASTER_ADDR" not in env:  # before this process takes the device
        figures |= bench_start(one_step)
    setup(cfg, ranks, env)
    figures |= measure(args, cfg, other_cfg, ranks, train, folder)
    torch.distributed.destroy_process_group()
    return report_of(asked, cfg, ranks, figures)


def bench_file(args: argparse.Namespace, env: Mapping[str, str], ranks: Ranks) -> dict:
    """Like bench, of this train_gpt.py and another version of it. Raises VersionError, too."""
    if ranks.world_size > 1:
        raise ConfigError(
            f"--against-file measures one process of each version, and here are {ranks.world_size} "
            "ranks; start it without torchrun"
        )
    asked = Config.from_env(env)
    cfg = train_gpt.resolve(asked)
    train_gpt.check_batch(cfg, ranks)
    with other_version(args.against_file) as version:
        count = args.warmup + args.steps
        measured = steps_in_turn(version, env, dict(args.against), count)
        shas = source_hash(train_gpt.SOURCE), version.source_sha()

    seconds = [np.array([step["seconds"] for step in steps])[args.warmup :] for steps in measured]
    losses = [[step["loss"] for step in steps] for steps in measured]
    figures = compared(*seconds)
    tokens = {name: steps[0]["tokens"] for name, steps in zip(NAMES, measured)}
    for name, times in zip(NAMES, seconds):
        figures[f"tokens_per_sec_{name}"] = token_speed(tokens[name], times.sum(1))
    for name, steps in zip(NAMES, measured):
        figures[f"peak_memory_{name}"] = figure("GiB", [steps[-1]["memory"]])
    for name, of_steps in zip(NAMES, losses):
        figures[f"loss_{name}"] = figure("of the last step", of_steps[-1:])
    facts = {
        "other": {"version": version.label, "git": version.commit, "settings": dict(args.against)},
        "source_sha": dict(zip(NAMES, shas)),
        "losses": losses_compared(*losses),
    }
    return report_of(asked, cfg, ranks, figures) | facts


def report_of(asked: Config, cfg: Config, ranks: Ranks, figures: Figures) -> dict:
    """The report: figures, and where and with what they were measured."""
    git, dirty = git_state()
    return {
        "command": f"python {' '.join(sys.argv)}",
        "changes": asked.changes(),
        "finished": utc_now(),
        "git": git,
        "dirty": dirty,
        "versions": machine_text().splitlines()[0],
        "device": device_name(ranks.device(cfg)),
        "dtype": cfg.dtype,
        "ranks": ranks.world_size,
        "figures": figures,
    }


def print_table(report: Mapping) -> None:
    """The report as a table, a line a figure."""
    head = f"{report['device']}, {report['dtype']}".ljust(28)
    print(f"{head}{'value':>12}{'min':>12}{'max':>12}  unit")
    for name, row in report["figures"].items():
        values = [row[key] for key in ("value", "min", "max")]
        cells = ["" if value is None else f"{value:,.4g}" for value in values]
        print(f"{name:28}{cells[0]:>12}{cells[1]:>12}{cells[2]:>12}  {row['unit']}")
    if "other" in report:
        sources, other = report["source_sha"], report["other"]
        commit = f", commit {other['git'][:12]}" if other["git"] else ""
        print(f"ours: source_sha {sources['ours']}")
        print(f"other: source_sha {sources['other']}, {other['version']}{commit}")
        print(report["losses"])


def names(text: str) -> set[str]:
    """A list with commas from an argument."""
    return set(text.split(","))


def setting(text: str) -> list[str]:
    """[NAME, VALUE] from an argument; what has no = is alone."""
    return text.split("=", 1)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; a wrong one ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="timed training steps")
    parser.add_argument("--warmup", type=int, default=3, help="training steps before them")
    parser.add_argument("--only", type=names, default=SECTIONS, help="like step,peak")
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="NAME=VALUE",
        default=[],
        type=setting,
        help="settings of another model to time in turn with this one; nothing else is measured",
    )
    parser.add_argument(
        "--against-file",
        metavar="PATH_OR_REF",
        help="another version to time in turn with this one, each in a process of its own: the "
        "path of a train_gpt.py beside its scripts/, or a git ref like HEAD~3; nothing else is "
        "measured. Settings and PRESET are the same for both, and --against gives some to the "
        "other alone. On one GPU there must be memory for both",
    )
    parser.add_argument("--json", help="file for the report; without it the table is all")
    args = parser.parse_args(argv)
    if any(len(pair) < 2 for pair in args.against):
        parser.error("--against takes settings like FFN=gelu D_FF=3072")
    if args.against or args.against_file:
        args.only = set()
    if not args.only <= SECTIONS or min(args.steps, args.warmup) < 1:
        parser.error(
            f"--only takes some of {','.join(sorted(SECTIONS))}; "
            "--steps and --warmup are at least 1"
        )
    return args


def main(argv: list[str], env: Mapping[str, str]) -> int:
    """Measures, prints the table and writes the report; returns the exit code."""
    args = parse(argv)
    ranks = Ranks.from_env(env)
    try:
        if args.against_file:
            report = bench_file(args, {**env, "DRY_RUN": ""}, ranks)
        else:
            with tempfile.TemporaryDirectory() as folder:
                report = bench(args, {**env, "DRY_RUN": ""}, ranks, folder)
    except (ConfigError, DataError, VersionError) as error:
        if ranks.local_rank == 0:
            print(f"{error.status}: {error}", file=sys.stderr)
        if ranks.rank > 0:
            # torchrun ends all ranks as soon as one is gone, and rank 0 has to say why
            time.sleep(1)
        return EXIT_CODES[error.status]

    if ranks.rank == 0:
        print_table(report)
        if args.json:
            write_whole(args.json, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    for number in {*ENDINGS} - {signal.SIGINT}:  # end like Ctrl-C: nothing is left behind
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)
    sys.exit(main(sys.argv[1:], dict(os.environ)))
