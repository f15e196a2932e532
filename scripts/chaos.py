"""Kills a run again and again, starts it again, and says what that cost; the settings are train_gpt.py's.

    PRESET=quickstart python scripts/chaos.py --every 30
    PRESET=quickstart python scripts/chaos.py --every 10 --nproc 2 --seed 1 --spread 1     # at random, 0 to 20 s apart

Every attempt is `python train_gpt.py`, or torchrun for several ranks, with RESUME=auto and one RUN_ID, ended by SIGKILL
to all its processes. Goodput is the training time of the steps that counted over the time that passed.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from harness.checkpoints import step_folders
from harness.provenance import new_run_id
import train_gpt


def processes(run_id):
    """Those of a run, launcher and ranks: the ranks of torchrun are in process groups of their own. Linux only."""
    mark = f"RUN_ID={run_id}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


def attempt(command, env, seconds):
    """Runs a command whose processes are all killed after so many seconds; its exit code, None where killed."""
    with subprocess.Popen(command, env=env) as run:
        try:
            return run.wait(seconds)
        except subprocess.TimeoutExpired:
            while found := [*processes(env["RUN_ID"])]:  # a zombie has no environment
                for pid in found:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.1)
            return None


def run_killed(command, env, waits):
    """Starts a run anew after each kill until it ends by itself; (exit code, kills, steps lost, seconds in all)."""
    curve = Path(env["LOG_DIR"]) / f"{env['RUN_ID']}.csv"
    kills, lost, began = 0, 0, time.perf_counter()
    while True:
        code = attempt(command, env, next(waits))
        if code is not None:
            return code, kills, lost, time.perf_counter() - began
        kills += 1
        points = curve.read_text().splitlines()[1:] if curve.exists() else []
        reached = int(points[-1].split(",")[0]) if points else 0
        saved = max(step_folders(curve.with_suffix("")), default=0)
        lost += max(0, reached - saved)
        print(f"kill:{kills} reached:{reached} saved:{saved}", flush=True)


def main(argv, env):
    """The run without kills, then with them; returns the exit code."""
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
    args = parser.parse_args(argv)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}"] * (
        args.nproc > 1
    )
    command, rng = [sys.executable, *launcher, train_gpt.__file__], random.Random(args.seed)
    env = {"LOG_DIR": "logs"} | env | {"RESUME": "auto"}
    told = {}
    for name, waits in (
        ("undisturbed", iter([None])),
        ("killed", iter(lambda: args.every * (1 + args.spread * rng.uniform(-1, 1)), None)),
    ):
        run_id = new_run_id(f"chaos-{name}")
        code, kills, lost, seconds = run_killed(command, env | {"RUN_ID": run_id}, waits)
        if code:
            return code
        summary = json.loads((Path(env["LOG_DIR"]) / f"{run_id}.json").read_text())
        trained, told[name] = summary["train_time"], summary["final_loss"]
        print(
            f"{name}: kills:{kills} steps_lost:{lost} seconds:{seconds:.1f} train_time:{trained:.1f} "
            f"goodput:{trained / seconds:.3f} final_loss:{told[name]!r}",
            flush=True,
        )
    return int(told["undisturbed"] != told["killed"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
