"""scripts/chaos.py: a run that is killed ends with the loss of the run that is not."""

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import start

import chaos
from harness.settings import ROOT
import train_gpt


class Forked:
    """A run on one rank that is forked from this process, which has torch loaded."""

    runs = []

    def __init__(self, command, env):
        assert command == [sys.executable, train_gpt.__file__]
        self.pid, self.code = start(env, Path(env["LOG_DIR"]).with_name("output.txt")), None
        self.runs.append(self)

    def poll(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)
        return self.code

    @classmethod
    def processes(cls, run_id):
        """In place of chaos.processes: /proc shows the environment of the parent."""
        return [run.pid for run in cls.runs if run.poll() is None]


class Attempt:
    """In place of subprocess.Popen, so that no clock decides: the time of an attempt is up a few
    steps after the next checkpoint of `kills`, or never where there is none left."""

    start, kills = subprocess.Popen, []

    def __init__(self, command, env):
        self.command, self.run = command, self.start(command, env=env)
        self.pid = self.run.pid
        self.folder = Path(env["LOG_DIR"]) / env["RUN_ID"]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.run.wait()

    def wait(self, seconds):
        if seconds and self.kills:
            step = self.kills.pop(0)
            while self.run.poll() is None:
                if (self.folder / f"step_{step:06d}").exists() and self.last_step() > step:
                    raise subprocess.TimeoutExpired(self.command, seconds)
                time.sleep(0.01)
        return self.run.wait()

    def last_step(self):
        """The last that the curve shows, 0 before there is one."""
        curve = self.folder.with_suffix(".csv")
        steps = re.findall(r"^(\d+),.*\n", curve.read_text(), re.M) if curve.exists() else []
        return int(steps[-1]) if steps else 0


@pytest.mark.parametrize("ranks, kills, victim", [(1, [50, 100], "all"), (2, [20], "launcher")])
def test_kills_cost_time_and_nothing_else(settings, monkeypatch, capfd, ranks, kills, victim):
    env = {name: str(value) for name, value in settings.items()} | {
        "NUM_ITERATIONS": str(2 * kills[-1]),
        "BATCH_SIZE": str(2 * ranks),
        "DEVICE_BATCH_SIZE": "2",
        "SAVE_EVERY": str(kills[0]),
        "LOG_EVERY": "5",
        "VAL_EVERY": "0",
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    monkeypatch.setattr(Attempt, "kills", [*kills])
    if ranks == 1:
        monkeypatch.setattr(Attempt, "start", Forked)
        monkeypatch.setattr(chaos, "processes", Forked.processes)
    own = SimpleNamespace(Popen=Attempt, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(chaos, "subprocess", own)
    code = chaos.main(["--every", "5", "--nproc", str(ranks), "--victim", victim], env)
    out, err = capfd.readouterr()
    assert code == 0, out + err
    told = re.findall(r"^kill:\d+ reached:(\d+) saved:(\d+)(?: .*)?$", out, re.M)
    steps = [(int(reached), int(saved)) for reached, saved in told]
    assert len(steps) == len(kills)
    assert all(wanted <= saved for wanted, (_, saved) in zip(kills, steps))
    if victim == "all":  # else the ranks are told to end, and save
        assert all(saved <= reached for reached, saved in steps)
    line = r"^(\w+): kills:(\d+) steps_lost:(\d+) .* goodput:([\d.]+) final_loss:(\S+)$"
    undisturbed, killed = re.findall(line, out, re.M)
    name, count, lost, goodput, loss = undisturbed
    assert (name, count, lost) == ("undisturbed", "0", "0")
    name, count, lost, lower, same = killed
    assert (name, count) == ("killed", str(len(kills)))
    assert int(lost) == sum(max(0, reached - saved) for reached, saved in steps)
    assert int(lost) <= kills[0] * len(kills)
    assert out.count(" rows:1 left:0 ") == 2 and out.count(f" victim:{victim} left:0\n") == (
        0 if victim == "all" else len(kills)
    )
    weights = re.findall(r" weights:(\w+) ", out)
    assert weights[0] == weights[1]
    assert loss == same and 0 < float(lower) < float(goodput) < 1


def test_when_its_time_is_up_all_processes_of_a_run_are_gone(tmp_path):
    """Those in a process group of their own too, as the ranks of torchrun are."""
    env = {"PATH": os.environ["PATH"], "RUN_ID": f"of-{tmp_path.name}"}
    assert chaos.attempt(["bash", "-c", "exit 3"], env, 60) == 3
    began = time.monotonic()
    assert chaos.attempt(["bash", "-c", "setsid sleep 60 & sleep 60; exit"], env, 0.5) is None
    assert 0.5 <= time.monotonic() - began < 30
    assert not [*chaos.processes(env["RUN_ID"])]


def test_what_outlives_its_launcher_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "PATIENCE", 0.3)
    env = {"PATH": os.environ["PATH"], "RUN_ID": f"of-{tmp_path.name}"}
    told = []

    def kill(launcher):
        told.append(chaos.kill_one(env["RUN_ID"], launcher, "launcher", random.Random(0)))

    command = ["bash", "-c", "setsid sleep 60 & sleep 60; exit"]
    assert chaos.attempt(command, env, 0.5, kill) is None
    assert told == [("launcher", 2)] and not [*chaos.processes(env["RUN_ID"])]


@pytest.mark.parametrize("rows, weights", [(2, "w"), (0, "w"), (1, "other")])
def test_a_run_that_kills_have_changed_is_told(tmp_path, monkeypatch, rows, weights):
    """By the exit code; the runs are files only, the second as a kill would have left it."""
    done = []

    def run_killed(command, env, killer):
        folder = Path(env["LOG_DIR"]) / env["RUN_ID"]
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(weights if done else "w")
        summary = {"status": "ok", "train_time": 1, "final_loss": 2.0}
        folder.with_suffix(".json").write_text(json.dumps(summary))
        done.append(env["RUN_ID"])
        lines = ["run_id", done[0], *done[1:] * rows]
        Path(env["RESULTS_CSV"]).write_text("\n".join(lines) + "\n")
        return 0, 1.0

    monkeypatch.setattr(chaos, "run_killed", run_killed)
    env = {"LOG_DIR": str(tmp_path / "logs"), "RESULTS_CSV": str(tmp_path / "results.csv")}
    assert chaos.main([], env) == 1
