"""scripts/chaos.py: a run that is killed ends with the loss of the run that is not."""

import os
import re
import subprocess
import sys
import time

import pytest

from harness.settings import ROOT
import train_gpt


@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_cost_time_and_nothing_else(settings, ranks):
    env = {name: str(value) for name, value in settings.items()} | {
        "NUM_ITERATIONS": "300",
        "SAVE_EVERY": "20",
        "LOG_EVERY": "5",
        "VAL_EVERY": "0",
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    began = time.monotonic()
    trial = {"RUN_ID": "trial", "NUM_ITERATIONS": "2", "WARMDOWN_ITERS": "0"}
    subprocess.run(
        [sys.executable, train_gpt.__file__], env=env | trial, check=True, stdout=subprocess.DEVNULL
    )
    every = (
        1.2 * (time.monotonic() - began) * ranks + 1
    )  # enough to start, with torchrun too, and to train a little
    command = [
        sys.executable,
        ROOT / "scripts/chaos.py",
        "--every",
        str(every),
        "--nproc",
        str(ranks),
    ]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    line = r"^(\w+): kills:(\d+) steps_lost:(\d+) .* goodput:([\d.]+) final_loss:(\S+)$"
    told = re.findall(line, result.stdout, re.M)
    (_, none, _, goodput, loss), (_, kills, lost, lower, same) = told
    assert none == "0" and int(kills) >= 1 and int(lost) <= 20 * int(kills) and loss == same
    assert 0 < float(lower) < float(goodput) < 1
