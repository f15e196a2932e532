"""What is damaged at random ends in a sentence: a small share of scripts/fuzz.py's cases."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz
import train_gpt
from harness.settings import ROOT


@pytest.mark.parametrize("kind, count", [("settings", 300), ("shards", 200), ("tables", 100)])
def test_what_is_damaged_at_random_ends_in_a_sentence(kind, count):
    assert list(fuzz.findings(kind, fuzz.CASES[kind], count, seed=0)) == []


def test_the_cases_can_fail(tmp_path, monkeypatch):
    """Without the comparison of hashes, changed data are found to train."""
    monkeypatch.setattr("harness.provenance.check_hash", lambda file, found: None)
    assert any(
        "trained although changed" in found
        for found in fuzz.findings("shards", fuzz.shards_case, 30, seed=0)
    )
    monkeypatch.setattr(train_gpt, "check_batch", lambda cfg, ranks: 1 / 0)
    fuzz.write_shards(tmp_path)
    assert any(fuzz.settings_case(tmp_path, random.Random(n)) for n in range(20))
    for leave in lambda folder: Path("stray").touch(), lambda folder: (folder / "stray").touch():
        found = [
            *fuzz.findings("any", lambda folder, _, leave=leave: leave(folder) or "", 1, seed=0)
        ]
        assert found == ["any --seed 0 --count 1: left stray"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")
def test_a_dry_run_at_the_bounds_takes_neither_memory_nor_time(tmp_path):
    """Of a process of its own, for a peak never falls."""
    largest = {"N_LAYER": 512, "N_EMBD": 65536, "N_HEAD": 1, "SEQUENCE_LENGTH": 2**31}
    env = fuzz.environment(tmp_path) | {name: str(value) for name, value in largest.items()}
    env |= {"VAL_TOKENS": str(2**31), "DRY_RUN": "1", "MAX_EPOCHS": "0"}
    code = f"""
import sys; sys.path[:0] = ["scripts"]
import train_gpt
assert train_gpt.main([], {env}) == 0
with open("/proc/self/status") as file:  # rusage would begin with what the parent had in use
    (most,) = [line.split()[1] for line in file if line.startswith("VmHWM")]
print(int(most) / 2**20, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stderr.splitlines()[-1]) < fuzz.LARGEST, done.stderr
