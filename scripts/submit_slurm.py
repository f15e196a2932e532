"""Submits the runs of a stage to Slurm as one array; submitit makes the jobs."""

import argparse
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import launch_runs
from plan_stage import HAS_RESULT, PlannedRun, description, pairs, plan_runs, results, status_of
from stages import Stage
from store.contract import ConfigError

if TYPE_CHECKING:  # submitit is only needed where something is submitted
    from submitit import AutoExecutor
    from submitit.helpers import DelayedSubmission


def ignore_usr2() -> None:
    """Slurm tells the whole step by USR2, of which who does not expect it dies."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


class Task:
    """A run as an element of a Slurm array; preempted or out of time, it saves, ends, and is queued
    again."""

    def __call__(
        self, settings: Mapping[str, str], device: str, world_size: int, words: Sequence[str]
    ) -> int:
        self.process = subprocess.Popen(
            launch_runs.command(world_size, words),
            env=launch_runs.environment(settings, device, world_size),
            preexec_fn=ignore_usr2,
        )
        # inside wait(), `checkpoint`, a signal's handler, could not wait
        while self.process.poll() is None:
            time.sleep(launch_runs.POLL)
        return self.process.returncode

    def checkpoint(self, *arguments: object) -> "DelayedSubmission":
        """What submitit calls before the job is taken away."""
        from submitit.helpers import DelayedSubmission

        self.process.terminate()
        self.process.wait()
        return DelayedSubmission(Task(), *arguments)


def make_executor(
    stage: Stage, args: argparse.Namespace, cluster: str, options: dict[str, str]
) -> "AutoExecutor":
    """What submits, with the options of sbatch. Raises ConfigError where there is no such cluster.

    A job imports this file, so it has to find the folder: by its environment, or by the script of
    the job where sbatch is told to pass none.
    """
    import submitit

    try:
        executor = submitit.AutoExecutor(folder="logs/slurm", cluster=cluster)
    except RuntimeError as error:
        raise ConfigError(f"--slurm: {error}; cluster=local tries it on this machine") from None
    paths = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    executor.update_parameters(
        name=stage.name,
        slurm_array_parallelism=args.jobs,
        slurm_setup=[f"export PYTHONPATH={shlex.quote(os.environ['PYTHONPATH'])}"],
        tasks_per_node=1,
        **{
            f"slurm_{name}": int(value) if value.isdigit() else value
            for name, value in options.items()
        },
    )
    return executor


def unfinished_runs(stage: Stage, world_size: int) -> list[PlannedRun]:
    """The runs of the stage that have no result and are not live; prints in what variants differ.
    Raises ConfigError, DataError."""
    rows = results(stage.name)
    runs = plan_runs(stage, dict.fromkeys(stage.variants, stage.seeds), world_size, "slurm")
    print("\n".join(description(stage, runs)))
    return [
        run for run in runs if status_of(run, rows) not in HAS_RESULT and not run.files.is_live()
    ]


def submit(stage: Stage, args: argparse.Namespace) -> int:
    """Submits what has no result as one array, --jobs at a time, with options of sbatch; the exit
    code. Raises ConfigError, DataError."""
    options = pairs("--slurm", args.slurm, r"\w+")
    cluster = options.pop("cluster", "slurm")
    if args.gate or (cluster == "slurm" and "time" not in options):
        raise ConfigError(
            "--slurm needs time=MINUTES and cannot have --gate, which watches runs; run_stage.py "
            f"{stage.name} --no-run judges them when they have ended"
        )

    runs = unfinished_runs(stage, args.nproc)
    executor = make_executor(stage, args, cluster, options)
    if runs:
        if runs[0].cfg.device == "cuda":
            executor.update_parameters(gpus_per_node=args.nproc)
        arguments = [(run.settings, run.cfg.device, args.nproc, run.words) for run in runs]
        executor.map_array(Task(), *zip(*arguments))
    print(
        f"submitted {len(runs)} runs; when they have ended: "
        f"python scripts/run_stage.py {stage.name} --no-run"
    )
    return 0
