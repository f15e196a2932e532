"""Runs a stage: every variant and seed of experiments/stages/<stage>.toml that has no result yet,
then its tables.

    python scripts/run_stage.py smoke                # two variants, three seeds, to the verdict
    python scripts/run_stage.py stage1 --dry-run     # the commands, with estimates of time and cost
    python scripts/run_stage.py stage1 --nproc 8     # each run on 8 GPUs, one after another
    python scripts/run_stage.py stage1_cpu --jobs 2  # two runs at a time
    python scripts/run_stage.py moe_aux --gate       # and act on verdicts: stop, seeds, next stage
    python scripts/run_stage.py smoke --seeds 101,102,103  # once more, beside the seeds it has
    python scripts/run_stage.py stage1_cpu --seconds 60  # at equal time: each its steps of 60 s
    python scripts/run_stage.py stage1 --nproc 8 --slurm partition=gpu time=120
    python scripts/run_stage.py --code main --code my-branch PRESET=quickstart SEEDS=3

A run has a result when results.csv, or results_<stage>.csv, holds one of the same settings, seed,
trainer source and data.
Before the first run it prints in what variants differ once everything is resolved. Settings that
the shell exports reach no run; --set NAME=VALUE gives one to all, and if it changes what is trained
this makes a new stage, which --as names. Started again after any end, kill -9 too, it goes on: runs
that are still live are waited for, those that were cut short go on from their last checkpoint.
--seconds times the steps of all variants in turns, alone on the machine, and writes once the stage
<stage>_<S>s, in which each variant has as many steps as take S seconds of training; its runs count
steps, and no clock decides anything in them.
--code compares versions of the code, old first: branches, tags, commits, patches, and . for the
working tree, which is the other one where there is one --code alone. Each runs from a worktree of
its own below logs/.code/; the stage is named after them, or by --as.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from tqdm import tqdm

import derive_stage
import make_tables
import plot_ablation
import split_results
import stage_gate
import time_stage
from derive_stage import build_next, of_codes, overridden, seed_list
from estimate_runs import dry_run
from launch_runs import Pool, devices
from plan_stage import SETTINGS, PlannedRun, description, plan_runs, results
from price_runs import GPUS
from stages import Stage, load_stage
from submit_slurm import submit
from store.contract import ConfigError
from train_gpt import Config


def finish(stage: Stage, fresh_seeds: Sequence[int] = ()) -> pd.DataFrame:
    """Tables, figure and verdicts of the stage from what is there; returns the verdicts, a row a
    variant. Of fresh seeds there is a table beside it. Raises ValueError."""
    split_results.split(stage.name, Path(Config.log_dir))
    if fresh_seeds:
        rows = split_results.rows_of(stage.name)
        alone = rows[rows.seed.isin(fresh_seeds)]
        lines = make_tables.table(stage, alone)
        print(f"seeds {', '.join(map(str, fresh_seeds))} alone:")
        print(make_tables.markdown(stage, lines, alone))
        print("all seeds:")
    print(make_tables.write_tables(stage.name))
    verdicts = stage_gate.write_gate(stage.name).query("kind == 'variant'")
    for one in verdicts.itertuples():
        print(f"{one.variant}: {one.verdict}, {one.reason}")
    print(f"experiments/tables/{stage.name}.md .csv _gate.csv _steps.csv")
    try:
        plot_ablation.write_figures(stage.name)
    except ValueError as error:
        Path(f"experiments/figures/{stage.name}.png").unlink(missing_ok=True)
        print(f"no figure: {error}")
    return verdicts


def stopper(stage: Stage) -> Callable[[PlannedRun], None]:
    """What stops a live run by the rules of the stage: the file `stop`, so that it can go on
    later."""
    rules = stage_gate.rules_of(stage)

    def look(run: PlannedRun) -> None:
        curve = split_results.read_curve(run.files.curve)
        stop, reason, _ = stage_gate.stop_verdict(curve, rules, run.cfg.num_experts)
        is_reference = stage.is_reference(run.settings["VARIANT"])
        if stop and not is_reference:  # others are compared with it, at their steps
            run.files.stop.touch()
            tqdm.write(f"{run.run_id}: stopped by the gate: {reason}")

    return look


def ask(
    stage: Stage, seeds: Mapping[str, Sequence[int]], verdicts: pd.DataFrame
) -> list[tuple[str, int]]:
    """(variant, seed) of what the gate wants to see next: the reference has to have as many as any
    other."""
    asking = set(verdicts[verdicts.verdict == "seed"].seed_for)
    more = {
        variant: int(variant in asking and len(known) < stage.max_seeds)
        for variant, known in seeds.items()
    }
    for reference in filter(stage.is_reference, seeds):
        compared = [variant for variant in seeds if stage.references[variant] == reference]
        most = max(len(seeds[variant]) + more[variant] for variant in compared)
        more[reference] = most - len(seeds[reference])
    return [
        (variant, max(seeds[variant]) + 1 + i)
        for variant, count in more.items()
        for i in range(count)
    ]


def check_devices(runs: list[PlannedRun], args: argparse.Namespace) -> None:
    """Raises ConfigError where there are fewer CUDA devices than the runs will use at once."""
    if runs[0].cfg.device == "cuda" and args.jobs * args.nproc > len(devices()):
        raise ConfigError(
            f"--jobs {args.jobs} x --nproc {args.nproc}: there are {len(devices())} CUDA devices"
        )


def work_through(stage: Stage, args: argparse.Namespace) -> int:
    """Runs all that has no result, adds seeds as the gate asks for them, then builds the next
    stage; the exit code. Raises ConfigError, DataError."""
    pool = Pool(args.jobs, stopper(stage) if args.gate else None, args.gate)
    seeds: dict[str, list[int]] = {}
    wanted = [(variant, seed) for variant in stage.variants for seed in stage.seeds]
    is_first = True
    while wanted:
        for variant, seed in wanted:
            seeds.setdefault(variant, []).append(seed)
        runs = plan_runs(stage, seeds, args.nproc, "run")
        check_devices(runs, args)
        if is_first:
            print("\n".join(description(stage, runs)))
            is_first = False

        failed = pool.work(runs)
        verdicts = None if pool.asked_to_end else finish(stage, stage.seeds if args.seeds else ())
        if pool.asked_to_end or failed:
            print("some runs have no result yet; the same command goes on with them")
            return 1

        wanted = ask(stage, seeds, verdicts) if args.gate else []
        for variant, seed in wanted:
            print(f"the gate asks for another seed: {variant}, seed {seed}")
    if args.gate:
        by_loss = verdicts.sort_values("val_loss")
        promoted = by_loss[by_loss.verdict == "promote"].variant
        reference = next(filter(stage.is_reference, by_loss.variant))
        print(build_next(load_stage(stage.name), list(promoted), reference))
    return 0


def asked_for(args: argparse.Namespace, write: bool = False) -> Stage:
    """The stage of the command line; where it makes one, its file is written if that is asked for.
    Raises ConfigError."""
    if args.code:
        if args.set:
            raise ConfigError(f"--set {args.set[0]}: with --code settings are words without --set")
        return of_codes(args.code, args.words, args.name, write)
    if len(args.words) != 1:
        raise ConfigError(
            "name one stage, which python scripts/stages.py lists, or compare code: --code main"
        )
    return overridden(load_stage(args.words[0]), args.set, args.name, write)


def write_new(stage: Stage, args: argparse.Namespace) -> None:
    """Writes the file of the stage that the command line makes, once it is sure that it can be run.
    Raises ConfigError, DataError."""
    mode = "run" if args.slurm is None else "slurm"
    plan_runs(stage, dict.fromkeys(stage.variants, stage.seeds), args.nproc, mode)
    asked_for(args, write=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; a wrong one ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="stage",
        help="a file of experiments/stages, which python scripts/stages.py lists; with --code "
        "settings of all runs, NAME=VALUE, and SEEDS=3",
    )
    add("--jobs", type=int, default=1, help="runs at the same time")
    add(
        "--nproc",
        type=int,
        default=1,
        help="processes, and GPUs where there are any, of each run",
    )
    derive_stage.add_options(parser)
    add(
        "--seeds",
        default="",
        metavar="N,N",
        help="other seeds than the stage's, beside those that have a result",
    )
    time_stage.add_options(parser)
    add("--dry-run", action="store_true", help="print the commands; needs no data and no GPU")
    add(
        "--gpu",
        default="",
        choices=["", *GPUS],
        help="estimate for this GPU, not for the one here",
    )
    add(
        "--gate",
        action="store_true",
        help="act on the verdicts: stop runs, add seeds, build the next stage",
    )
    add(
        "--slurm",
        nargs="*",
        metavar="NAME=VALUE",
        help="submit as an array, with options of sbatch",
    )
    add(
        "--no-run",
        action="store_true",
        help="only make tables, figure and verdicts of what is there",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs, submits or prints a stage; exit code 0, 1 where runs failed or are left, 2 with a
    sentence on bad input, 130 after Ctrl-C between runs."""
    args = parse(argv)
    try:
        if min(args.jobs, args.nproc) < 1:
            raise ConfigError(f"--jobs {args.jobs} --nproc {args.nproc}: both must be at least 1")
        stage = asked_for(args)
        fresh_seeds = seed_list("--seeds", args.seeds) if args.seeds else ()
        stage_gate.rules_of(stage)
        if stage.not_run:
            print(f"warning: {stage.name}: {stage.not_run}", file=sys.stderr)
        if args.gate and stage_gate.not_judged(stage):
            raise ConfigError(f"--gate: {stage_gate.not_judged(stage)}; leave --gate out")
        time_stage.check_arguments(stage, args)
        exported = [name for name in SETTINGS if os.environ.get(name)]
        if exported:
            print(
                f"not passed on to the runs: {', '.join(exported)}; what --set gives is",
                file=sys.stderr,
            )

        if (args.name or args.code) and not args.dry_run and not args.no_run:
            write_new(stage, args)
        if args.seconds:
            stage = time_stage.at_equal_time(stage, args)
            if stage is None:
                return 0
        elif stage.seconds and not args.no_run:
            time_stage.warn(stage, args.nproc)
        if fresh_seeds:
            stage = replace(stage, seeds=fresh_seeds)

        if args.dry_run:
            seeds = dict.fromkeys(stage.variants, stage.seeds)
            runs = plan_runs(stage, seeds, args.nproc, "dry")
            print("\n".join(f"# {line}" for line in description(stage, runs)))
            dry_run(runs, args, results(stage.name))
            return 0
        if args.no_run:
            finish(stage, fresh_seeds)
            return 0
        if args.slurm is not None:
            return submit(stage, args)
        return work_through(stage, args)
    except (OSError, ValueError) as error:  # ConfigError and DataError are ValueErrors
        print(f"run_stage.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # of runs Pool takes it over
        told = "run_stage.py: interrupted while no run was going on; the same command goes on"
        print(told, file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
