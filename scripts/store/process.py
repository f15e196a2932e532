"""What a process asks of the system before torch loads: its share of the cores, and its end."""

import contextlib
import ctypes
import importlib.util
import os
import signal
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

SPINS = 3000  # times that an idle OpenMP thread looks for work before it sleeps
CGROUP = Path("/sys/fs/cgroup")
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # that ask for an end; Windows has not all
ENDINGS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


def before_torch(env: MutableMapping[str, str]) -> None:
    """Changes `env`, the environment of this process, where the user has set nothing.

    Without torch it ends the process with a sentence and exit code 2.
    """
    steady_streams()
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = say_interrupted
    if importlib.util.find_spec("torch") is None:
        way = "source .venv/bin/activate, or pip install -r requirements.txt"
        print(f"config: {sys.executable} has no torch; {way}", file=sys.stderr)
        sys.exit(2)
    if "TORCHELASTIC_RUN_ID" in env:
        end_with_launcher()
    share_cores(env)


def say_interrupted(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """What is printed of an exception: of Ctrl-C, which may come while packages load, a line."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted before it began; nothing was written", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def steady_streams() -> None:
    """Opens closed standard streams on nothing, and lets all take what their encoding lacks.

    A file that a run opens would else get the number of a closed one, and take what libraries
    print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure") and stream.errors == "strict":  # else a script has chosen
            stream.reconfigure(errors="backslashreplace")


def share_cores(env: MutableMapping[str, str], cgroup: Path = CGROUP) -> None:
    """Lets idle threads sleep soon, and starts no more than a container may use.

    By itself GNU's OpenMP lets them spin for milliseconds, which takes the cores from other runs:
    on two cores two runs were each six times slower than one alone, and are two times slower so.
    """
    if "OMP_WAIT_POLICY" not in env:
        env.setdefault("GOMP_SPINCOUNT", str(SPINS))
    cores = core_quota(cgroup)
    if cores and cores < (os.cpu_count() or 1):
        env.setdefault("OMP_NUM_THREADS", str(cores))


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may use, at least 1."""
    there = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # macOS has none
        there = len(os.sched_getaffinity(0))
    return min(core_quota(cgroup) or there, there)


def core_quota(cgroup: Path) -> int:
    """Whole cores that a container may use, at least 1; 0 where it may use all there are."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text("utf-8").split()
        return 0 if quota == "max" else max(1, int(quota) // int(period))
    with contextlib.suppress(OSError, ValueError):  # the first version of cgroups
        quota, period = (
            int((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text("utf-8"))
            for name in ("quota", "period")
        )
        return max(1, quota // period) if quota > 0 else 0
    return 0


def end_with_launcher() -> None:
    """Has the system end this process when its launcher, torchrun, ends; Linux alone can."""
    with contextlib.suppress(OSError, AttributeError):  # another system or C library
        parent_death_signal = 1
        ctypes.CDLL("libc.so.6").prctl(parent_death_signal, signal.SIGTERM)
        init = Path("/proc/1/cmdline").read_bytes()
        if os.getppid() == 1 and b"python" not in init and b"torchrun" not in init:
            sys.exit(1)  # it has ended before
