"""What a process asks of the system before torch loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from store.process import SPINS, core_quota, share_cores, usable_cores

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "file, text, cores",
    [
        ("cpu.max", "max 100000", 0),
        ("cpu.max", "250000 100000", 2),
        ("cpu.max", "50000 100000", 1),
        ("cpu.max", "garbage", 0),
        ("nothing", "", 0),
    ],
)
def test_a_container_has_as_many_threads_as_it_may_use(tmp_path, file, text, cores, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    (tmp_path / file).write_text(text)
    env = {}
    share_cores(env, tmp_path)
    assert core_quota(tmp_path) == cores
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(2), raising=False)
    assert usable_cores(tmp_path) == min(cores or 2, 2)
    assert env.get("OMP_NUM_THREADS", "0") == str(cores)


def test_the_first_version_of_cgroups_is_read(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    for quota, cores in (("300000", 3), ("-1", 0)):
        (tmp_path / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert core_quota(tmp_path) == cores


def test_without_torch_a_run_is_one_sentence():
    """As under the system's Python: -S hides all packages."""
    command = [sys.executable, "-S", ROOT / "train_gpt.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == (
        f"config: {sys.executable} has no torch; source .venv/bin/activate, or pip install -r "
        "requirements.txt\n"
    )


def test_what_the_user_sets_of_threads_stays(tmp_path):
    (tmp_path / "cpu.max").write_text("100000 100000")
    for own in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}):
        env = own | {"OMP_NUM_THREADS": "5"}
        share_cores(env, tmp_path)
        assert env == own | {"OMP_NUM_THREADS": "5"}
    env = {}
    share_cores(env, tmp_path / "nowhere")
    assert env == {"GOMP_SPINCOUNT": str(SPINS)}


def test_a_plan_needs_nothing_that_other_systems_lack():
    """macOS has no sched_getaffinity, Windows no resource and not all signals."""
    script = """
import os, signal, sys
sys.modules["resource"] = None
del os.sched_getaffinity, os.geteuid, signal.SIGHUP, signal.SIGUSR1
import train_gpt
sys.exit(train_gpt.main([], {"DRY_RUN": "1"}))
"""
    command = [sys.executable, "-c", script]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "params_total:123568128" in done.stdout, done.stderr


def test_ctrl_c_while_packages_load_is_told_in_a_line():
    """Torch, which takes seconds, is cut off as Ctrl-C would; another error keeps its trace."""
    script = """
import runpy, sys
class Finder:
    def find_spec(name, path, target=None):
        if name == "torch":
            raise {error}
sys.meta_path.insert(0, Finder)
runpy.run_path("train_gpt.py", run_name="__main__")
"""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    for error, told in (
        ("KeyboardInterrupt", "interrupted before it began"),
        ("ZeroDivisionError", "Traceback"),
    ):
        command = [sys.executable, "-c", script.format(error=error)]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode and done.stderr.startswith(told), done.stderr
        assert ("Traceback" in done.stderr) == (told == "Traceback")


def test_streams_that_are_closed_end_no_run():
    """The log gets no number of theirs, and nobody's output."""
    env = {"PATH": os.environ["PATH"], "DRY_RUN": "1"}
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        command = f"{sys.executable} {ROOT}/train_gpt.py {closed}"
        assert subprocess.run(["bash", "-c", command], env=env, capture_output=True).returncode == 0
