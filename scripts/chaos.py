"""Kills a run again and again, starts it again, and says what that cost; settings of train_gpt.py.

    PRESET=quickstart python scripts/chaos.py --every 30
    PRESET=quickstart python scripts/chaos.py --every 10 --nproc 2 --seed 1 --spread 1   # 0 to 20 s
    PRESET=quickstart python scripts/chaos.py --every 4 --nproc 2 --spread 1 --victim any --kills 50

Every attempt is `python train_gpt.py`, or torchrun for several ranks, with RESUME=auto and one
RUN_ID, ended by SIGKILL to all its processes, or to the launcher or one rank alone: then no process
may be left 10 seconds later. Goodput is the training time of the steps that counted over the time
that passed. The exit code is 0 where the run that was killed has the weights of the other, bit for
bit, one row in the table, and left no process.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import contextlib
import csv
import hashlib
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

PATIENCE = 10  # seconds until no process of a run may be left whose launcher or rank was killed
VICTIMS = ("launcher", "rank")


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


def kill_one(run_id: str, launcher: int, victim: str, rng: random.Random) -> tuple[str, int]:
    """Kills the launcher or a rank of a run; (which it was, processes left after PATIENCE)."""
    ranks = sorted(set(processes(run_id)) - {launcher})
    if victim == "any":
        victim = rng.choice(VICTIMS)
    if not ranks:
        victim = "launcher"
    with contextlib.suppress(ProcessLookupError):
        os.kill(rng.choice(ranks) if victim == "rank" else launcher, signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    left = list(processes(run_id))
    while left and time.monotonic() < end:
        time.sleep(0.1)
        left = list(processes(run_id))
    return victim, len(left)


def attempt(
    command: list[str],
    env: Mapping[str, str],
    seconds: float | None,
    kill: Callable[[int], None] = lambda launcher: None,
) -> int | None:
    """Runs a command, for so many seconds; its exit code, None where its time was up.

    Then kill(id of the launcher) is called, and all processes that are left are killed.
    """
    with subprocess.Popen(command, env=env) as run:
        try:
            return run.wait(seconds)
        except subprocess.TimeoutExpired:
            kill(run.pid)
            kill_all(env["RUN_ID"])
            return None


class Killer:
    """Decides when a run is killed and what of it, and counts what that leaves."""

    def __init__(self, args: argparse.Namespace, run_id: str):
        self.args = args
        self.run_id = run_id
        self.rng = random.Random(args.seed)
        self.kills = 0
        self.lost = 0  # steps
        self.orphans = 0
        self.told = ""

    def wait(self) -> float | None:
        """Seconds until the next kill; None where there is none to come."""
        if self.kills == self.args.kills:
            return None
        return self.args.every * (1 + self.args.spread * self.rng.uniform(-1, 1))

    def __call__(self, launcher: int) -> None:
        if self.args.victim == "all":
            return
        name, left = kill_one(self.run_id, launcher, self.args.victim, self.rng)
        self.orphans += left
        self.told = f" victim:{name} left:{left}"

    def count(self, files: RunFiles, seconds: float) -> None:
        """Takes note of a kill, and prints it."""
        self.kills += 1
        reached = files.last_step()
        saved = max(step_folders(files.folder), default=0)
        self.lost += max(0, reached - saved)
        told = f" after:{seconds:.2f}{self.told}" if self.told else ""
        print(f"kill:{self.kills} reached:{reached} saved:{saved}{told}", flush=True)


def run_killed(command: list[str], env: Mapping[str, str], killer: Killer) -> tuple[int, float]:
    """Starts a run anew after each kill, until it ends by itself; (exit code, seconds in all)."""
    files = RunFiles(env["LOG_DIR"], env["RUN_ID"])
    began = time.perf_counter()
    while True:
        seconds = killer.wait()
        code = attempt(command, env, seconds, killer)
        if code is not None:
            return code, time.perf_counter() - began
        killer.count(files, seconds)


def rows_of(env: Mapping[str, str]) -> int:
    """Rows of a run in the table."""
    table = env.get("RESULTS_CSV", train_gpt.Config.results_csv)
    with open(table, newline="", encoding="utf-8") as file:
        return sum(row["run_id"] == env["RUN_ID"] for row in csv.DictReader(file))


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
    parser.add_argument("--kills", type=int, default=-1, help="at most so many; -1: to the end")
    parser.add_argument(
        "--victim",
        choices=("all", "any", *VICTIMS),
        default="all",
        help="what is killed; any: by chance the launcher or one rank",
    )
    return parser.parse_args(argv)


def main(argv: list[str], env: Mapping[str, str]) -> int:
    """The run without kills, then with them; returns the exit code."""
    args = parse(argv)
    launcher = []
    if args.nproc > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}"]
    command = [sys.executable, *launcher, train_gpt.__file__]
    env = {"LOG_DIR": "logs", **env, "RESUME": "auto"}
    figures = []
    for name, kills in (("undisturbed", 0), ("killed", args.kills)):
        run_id = new_run_id(f"chaos-{name}")
        own_env = env | {"RUN_ID": run_id}
        killer = Killer(argparse.Namespace(**vars(args) | {"kills": kills}), run_id)
        code, seconds = run_killed(command, own_env, killer)
        if code:
            return code
        files = RunFiles(env["LOG_DIR"], run_id)
        summary = files.summary()
        train_time, loss, rows = summary["train_time"], summary["final_loss"], rows_of(own_env)
        weights = hashlib.sha256((files.folder / "model.safetensors").read_bytes()).hexdigest()
        figures.append((loss, weights, rows, killer.orphans))
        print(
            f"{name}: kills:{killer.kills} steps_lost:{killer.lost} seconds:{seconds:.1f} "
            f"train_time:{train_time:.1f} rows:{rows} left:{killer.orphans} "
            f"weights:{weights[:12]} goodput:{train_time / seconds:.3f} final_loss:{loss!r}",
            flush=True,
        )
    undisturbed, killed = figures
    return int(killed != undisturbed or undisturbed[2:] != (1, 0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
