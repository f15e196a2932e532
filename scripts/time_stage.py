"""Makes of a stage one at equal time, where each variant has the steps that its step time buys.

scripts/bench.py times the steps of all variants in turns, so that a slow minute hits all alike.
What it finds is written once, with the schedules that follow, into the file of a stage of its own,
experiments/stages/<stage>_<seconds>s.toml; from then on that is a stage as any other.
"""

import argparse
import contextlib
import hashlib
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from derive_stage import overridden
from estimate_runs import device_here, duration_text
from harness.files import RunFiles
from store.contract import ConfigError, DataError
from store.files import write_whole
from launch_runs import command, environment
from plan_stage import PlannedRun, plan_runs, results
from scale_model import positive, scheduled_steps, with_steps
from stages import FOLDER, TRAINER, Stage, check_name, load_stage, read, stage_of, toml_text
import train_gpt
from train_gpt import Config

ROUNDS = 5  # of a process for each variant
STEPS, WARMUP = 20, 3  # of such a process: timed ones, and those before them
SLOW = 1.1  # times the fastest round: a median above tells of other work on the machine
# All are validated at the same shares of their time, for which a variant's steps are a multiple of
# the number of validations: of these there are so few that it leaves out at most this share.
LEFT_OUT = 0.02

Times = Mapping[str, Sequence[float]]  # ms of a step in each round, by label


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of run_stage.py that make a stage at equal time."""
    parser.add_argument(
        "--seconds",
        type=positive,
        metavar="S",
        help="of training for each variant, which has the steps that these buy: a stage of its own",
    )
    parser.add_argument(
        "--measure-again", action="store_true", help="with --seconds: time all steps anew"
    )


def check_arguments(stage: Stage, args: argparse.Namespace) -> None:
    """Raises ConfigError where --seconds cannot be, or is not there and has to be."""
    if args.measure_again and not args.seconds:
        raise ConfigError("--measure-again goes with --seconds, whose step times it measures anew")
    if not args.seconds:
        return
    if stage.seconds:
        raise ConfigError(
            f"--seconds: {stage.name} is a stage at equal time; its variants have the steps of "
            f"{stage.seconds:g} s; give the stage that it extends"
        )
    if stage.program != TRAINER:
        raise ConfigError(
            f"--seconds: {stage.name} runs {stage.program}, whose steps cannot be timed, only "
            f"those of {TRAINER}"
        )
    if stage.names_code:
        raise ConfigError(
            f"--seconds: {stage.name} has variants with CODE, and only the steps of the code here "
            "can be timed; python scripts/bench.py --against-file compares step times of code"
        )
    if args.slurm is not None:
        raise ConfigError(
            "--seconds measures on this machine, and --slurm runs on others: start it on one of "
            f"those, then run_stage.py {name_at(stage, args.seconds)} --slurm"
        )
    check_name(name_at(stage, args.seconds), "--seconds makes the stage")


def name_at(stage: Stage, seconds: float) -> str:
    """The name of the stage at equal time."""
    return f"{stage.name}_{seconds:.12g}s"


def conditions(runs: Sequence[PlannedRun], world_size: int) -> dict[str, str | int]:
    """What step times hold for: device, threads, version, source and the settings of these runs;
    without what is not known where there is no device or no data."""
    cfg = runs[0].cfg
    hashes = {run.settings["VARIANT"]: run.plan["config_hash"] for run in runs}
    known = {
        "device": device_here(cfg),
        "world_size": world_size,
        "omp_num_threads": environment({}, cfg.device, world_size).get("OMP_NUM_THREADS", "unset"),
        "torch": train_gpt.torch.__version__,
        "source_sha": runs[0].plan["source_sha"],
    }
    if all(run.identity[-1] for run in runs):  # VOCAB_SIZE may be the data's
        text = json.dumps(hashes, sort_keys=True)
        known["settings_sha"] = hashlib.sha256(text.encode()).hexdigest()[:8]
    return {name: value for name, value in known.items() if value}


def stale(name: str, runs: Sequence[PlannedRun], world_size: int) -> str:
    """A sentence on the first thing in which the step times of a stage are not of these runs here;
    "" where there is none."""
    measured = read(name)["equal_time"]
    for what, here in conditions(runs, world_size).items():
        there = measured.get(what)
        if there != here:
            return (
                f"{FOLDER / f'{name}.toml'} has step times for {what} {there!r}, here is {here!r}"
            )
    return ""


def warn(stage: Stage, world_size: int) -> None:
    """Says where a stage at equal time, which is run by its own name, has step times of something
    else; it may be so on purpose. Raises ConfigError, DataError."""
    parent = read(stage.name)["equal_time"].get("of")
    if parent:
        sentence = stale(stage.name, runs_of(load_stage(parent), world_size, "dry"), world_size)
        if sentence:
            print(f"{sentence}; its steps stay as they are", file=sys.stderr)


def runs_of(stage: Stage, world_size: int, mode: str) -> list[PlannedRun]:
    """A run of each variant. Raises ConfigError, DataError."""
    return plan_runs(stage, dict.fromkeys(stage.variants, stage.seeds[:1]), world_size, mode)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Holds the lock of those who time steps. Raises ConfigError where another does, or a run is
    live."""
    for run_id, row in results().items():
        if row["status"] == "running" and RunFiles(Config.log_dir, run_id).is_live():
            raise ConfigError(
                f"step times are measured alone on the machine, and {run_id} is live; start this "
                "again when it has ended"
            )
    lock = Path(Config.log_dir) / "step_times.lock"
    lock.parent.mkdir(exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise ConfigError(
            "another run_stage.py times steps here; start this again when it has ended"
        ) from None


def step_time(stage: Stage, label: str, device: str, world_size: int) -> float:
    """Milliseconds of a step of a variant: the median of some, in a process of its own. Raises
    ConfigError, DataError."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = f"--only step --steps {STEPS} --warmup {WARMUP} --json {report}".split()
        done = subprocess.run(
            command(world_size, ["scripts/bench.py", *options]),
            env=environment(stage.variants[label], device, world_size),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if report.exists():
            return json.loads(report.read_text("utf-8"))["figures"]["step_time"]["value"]
    # the first is the bench's own, what follows is torchrun's
    found = re.search(r"^(?:config|data): .*|^[\w.]*Error\b.*", done.stderr, re.M)
    reason = found[0] if found else f"bench.py ended with {done.returncode} and no word"
    error = DataError if reason.startswith("data: ") else ConfigError
    raise error(f"{stage.name}, {label}: its steps cannot be timed: {reason}")


def measure(stage: Stage, device: str, world_size: int) -> dict[str, list[float]]:
    """Step times (ms) of all variants, by label and round, each round beginning with another."""
    labels = stage.references_first()
    times: dict[str, list[float]] = {label: [] for label in labels}
    with tqdm(total=ROUNDS * len(labels), bar_format="{desc} |{bar}|", disable=None) as bar:
        for i in range(ROUNDS):
            first = i % len(labels)
            for label in labels[first:] + labels[:first]:
                bar.set_description_str(f"step times, round {i + 1}/{ROUNDS}, {label}")
                times[label].append(round(step_time(stage, label, device, world_size), 4))
                bar.update()
    return times


def schedules_of(runs: Sequence[PlannedRun], times: Times, seconds: float) -> dict[str, dict]:
    """{label: settings} of the steps that `seconds` buy each variant, warm-up and decay in
    proportion, all validated at the same shares. Raises ConfigError."""
    step_ms = {label: statistics.median(values) for label, values in times.items()}
    steps = {label: int(1000 * seconds / ms) for label, ms in step_ms.items()}
    slowest = max(step_ms, key=step_ms.get)
    if not steps[slowest]:
        raise ConfigError(
            f"--seconds {seconds:g}: a step of {runs[0].settings['STAGE']}'s {slowest!r} takes "
            f"{step_ms[slowest]:.4g} ms; give at least {1.001 * step_ms[slowest] / 1000:.4g}"
        )
    first = runs[0].cfg
    asked = math.ceil(first.num_iterations / (first.val_every or first.num_iterations))
    validations = min(asked, 1 + int(LEFT_OUT * steps[slowest]))

    made = {}
    for run in runs:
        label, cfg = run.settings["VARIANT"], run.cfg
        every = steps[label] // validations
        scaled = with_steps(cfg, every * validations)
        made[label] = {"NUM_ITERATIONS": scaled.num_iterations, "VAL_EVERY": every}
        made[label] |= {
            name.upper(): getattr(scaled, name)
            for name in scheduled_steps(cfg)
            if getattr(cfg, name) and name not in cfg.idle()
        }
    return made


def lines_of(name: str, args: argparse.Namespace) -> list[str]:
    """What was measured of each variant of a stage at equal time, and what follows, in a line
    each; then what speaks against them, and what several jobs make of them."""
    tables = read(name)
    lines = []
    unsteady = []
    for label, own in tables["schedules"].items():
        times = tables["equal_time"]["step_ms"][label]
        lines.append(
            f"{label}: {statistics.median(times):.4g} ms a step ({min(times):.4g} to "
            f"{max(times):.4g}), {own['NUM_ITERATIONS']:,} steps"
        )
        if statistics.median(times) > SLOW * min(times):
            unsteady.append(label)
    if unsteady:
        lines.append(
            f"warning: the median of {', '.join(map(repr, unsteady))} is more than {SLOW:g} times "
            "the fastest round: other work slowed it; --measure-again on a quiet machine"
        )
    if args.jobs > 1:
        lines.append(
            f"--jobs {args.jobs}: runs share the machine and take longer than the "
            f"{args.seconds:g} s that their steps would take alone"
        )
    return lines


def check_is_ours(name: str, stage: Stage, seconds: float) -> None:
    """Raises ConfigError where a file of this name is not of the stage at equal time."""
    tables = read(name)
    told = tables.get("equal_time", {})
    if tables.get("extends") != stage.name or told.get("seconds") != seconds:
        raise ConfigError(
            f"{FOLDER / f'{name}.toml'} is there and is not of {stage.name} at {seconds:g} s; move "
            "it out of the way"
        )


def write_timed(stage: Stage, runs: Sequence[PlannedRun], args: argparse.Namespace) -> None:
    """Times the steps of a stage's variants and writes the stage at equal time. Raises ConfigError,
    DataError."""
    name, ranks = name_at(stage, args.seconds), args.nproc
    with alone():
        times = measure(stage, runs[0].cfg.device, ranks)
    told = {"seconds": args.seconds, "of": stage.name}
    told |= conditions(runs, ranks) | {"step_ms": times}
    own = {
        "extends": stage.name,
        "next": [],  # its steps would not be those of the time
        "equal_time": told,
        "schedules": schedules_of(runs, times, args.seconds),
    }
    runs_of(stage_of(name, read(stage.name) | own), ranks, "run")
    write_whole(FOLDER / f"{name}.toml", toml_text(own))


def say_what_it_would_do(stage: Stage, args: argparse.Namespace) -> None:
    """Prints, of a stage whose steps have not been timed, what comes instead of a dry run."""
    name, runs = name_at(stage, args.seconds), len(stage.variants) * len(stage.seeds)
    duration = duration_text(runs * args.seconds / args.jobs)
    print(
        f"# would time the steps of {len(stage.variants)} variants in turns, {ROUNDS} rounds, "
        "alone on this machine\n"
        f"# then write {FOLDER / f'{name}.toml'} and run {len(stage.variants)} variants x "
        f"{len(stage.seeds)} seeds, {duration} of training with --jobs {args.jobs}"
    )


def at_equal_time(stage: Stage, args: argparse.Namespace) -> Stage | None:
    """The stage at equal time, from its file; where there is none, or --measure-again asks for it,
    the steps are timed first. A dry run times none, says so and returns None. Raises ConfigError,
    DataError."""
    name = name_at(stage, args.seconds)
    path = FOLDER / f"{name}.toml"
    exists = path.exists()
    if exists:
        check_is_ours(name, stage, args.seconds)
    if args.no_run and not exists:
        raise ConfigError(f"{path} is not there; the same command without --no-run writes it")

    if not args.no_run:
        is_new = args.measure_again or not exists
        runs = runs_of(stage, args.nproc, "dry" if args.dry_run else "run")
        if is_new and args.dry_run:
            say_what_it_would_do(stage, args)
            return None
        reason = "" if is_new else stale(name, runs, args.nproc)
        if reason:
            raise ConfigError(
                f"{reason}; --measure-again measures anew, python scripts/run_stage.py {name} goes "
                "on with its steps"
            )
        if is_new:
            write_timed(stage, runs, args)
        mark = "# " if args.dry_run else ""
        print("\n".join(f"{mark}{line}" for line in lines_of(name, args)))
    made = load_stage(name)
    return made if args.name else overridden(made, args.set, "")
