"""Kills a run again and again, starts it again, and says what that cost; settings of train_gpt.py.

    PRESET=quickstart python scripts/chaos.py --every 30
    PRESET=quickstart python scripts/chaos.py --every 10 --nproc 2 --seed 1 --spread 1   # 0 to 20 s

Every attempt is `python train_gpt.py`, or torchrun for several ranks, with RESUME=auto and one
RUN_ID, ended by SIGKILL to all its processes. Goodput is the training time of the steps that
counted over the time that passed.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from harness.checkpoints import step_folders
from harness.files import RunFiles
from harness.provenance import new_run_id
import train_gpt


def processes(run_id: str) -> Iterator[int]:
    """Ids of those of a run, launcher and ranks: the ranks of torchrun are in process groups of
    their own. Linux only."""
    mark = f"RUN_ID={run_id}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


def kill_all(run_id: str) -> None:
    """Kills the processes of a run until none is left."""
    pids = list(processes(run_id))  # a zombie has no environment
    while pids:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        pids = list(processes(run_id))


def attempt(command: list[str], env: Mapping[str, str], seconds: float | None) -> int | None:
    """Runs a command whose processes are all killed after so many seconds; its exit code, None
    where killed."""
    with subprocess.Popen(command, env=env) as run:
        try:
            return run.wait(seconds)
        except subprocess.TimeoutExpired:
            kill_all(env["RUN_ID"])
            return None


def run_killed(
    command: list[str], env: Mapping[str, str], wait: Callable[[], float | None]
) -> tuple[int, int, int, float]:
    """Starts a run anew after each kill, `wait()` seconds after its start, until it ends by itself;
    (exit code, kills, steps lost, seconds in all)."""
    files = RunFiles(env["LOG_DIR"], env["RUN_ID"])
    kills = 0
    lost = 0
    began = time.perf_counter()
    while True:
        code = attempt(command, env, wait())
        if code is not None:
            return code, kills, lost, time.perf_counter() - began
        kills += 1
        reached = files.last_step()
        saved = max(step_folders(files.folder), default=0)
        lost += max(0, reached - saved)
        print(f"kill:{kills} reached:{reached} saved:{saved}", flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; a wrong one ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=float, default=30, help="seconds from a start to the kill")
    parser.add_argument(
        "--spread",
        type=float,
        default=0,
        help="by which part of it, up or down, that varies: 0 to 1",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the spread")
    parser.add_argument("--nproc", type=int, default=1, help="ranks")
    return parser.parse_args(argv)


def main(argv: list[str], env: Mapping[str, str]) -> int:
    """The run without kills, then with them; returns the exit code."""
    args = parse(argv)
    launcher = []
    if args.nproc > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}"]
    command = [sys.executable, *launcher, train_gpt.__file__]
    rng = random.Random(args.seed)
    env = {"LOG_DIR": "logs", **env, "RESUME": "auto"}

    def never() -> None:
        return None

    def every() -> float:
        return args.every * (1 + args.spread * rng.uniform(-1, 1))

    losses = {}
    for name, wait in (("undisturbed", never), ("killed", every)):
        run_id = new_run_id(f"chaos-{name}")
        code, kills, lost, seconds = run_killed(command, env | {"RUN_ID": run_id}, wait)
        if code:
            return code
        summary = json.loads((Path(env["LOG_DIR"]) / f"{run_id}.json").read_text("utf-8"))
        train_time = summary["train_time"]
        losses[name] = summary["final_loss"]
        print(
            f"{name}: kills:{kills} steps_lost:{lost} seconds:{seconds:.1f} "
            f"train_time:{train_time:.1f} goodput:{train_time / seconds:.3f} "
            f"final_loss:{losses[name]!r}",
            flush=True,
        )
    return int(losses["undisturbed"] != losses["killed"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
