"""Ends a script with one sentence where Python is too old or lacks the project's packages.

A script imports it before all that may be missing; so it runs under any Python 3. From then on
Ctrl-C is told without a traceback, also while other packages load, and a reader that has gone away,
as in `| head -1`, is nothing to tell. The train_gpt.py that scripts import is the one above them,
whatever is installed.
"""

import atexit
import errno
import importlib.util
import os
import sys

OLDEST = (3, 11)
NEEDED = ("numpy", "torch", "tqdm", "filelock")


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def check_packages():
    """Exits with code 2 and a sentence that says what is missing and what to run."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if sys.version_info >= OLDEST and not missing:
        return
    found = f"Python {sys.version_info[0]}.{sys.version_info[1]} ({sys.executable})"
    if missing:
        found += f" without {', '.join(missing)}"
    root = os.path.relpath(ROOT)
    python = os.path.normpath(os.path.join(root, ".venv", "bin", "python"))
    requirements = os.path.normpath(os.path.join(root, "requirements.txt"))
    way = f"run it with {python}"
    if not os.path.exists(python):
        way = f"run python3 -m pip install -r {requirements}, with a Python that is new enough"
    script = os.path.basename(sys.argv[0])
    sys.stderr.write(
        f"{script}: expected Python 3.11 or newer with the project's packages, found {found}: "
        f"{way}\n"
    )
    sys.exit(2)


def say_briefly(kind, error, trace):
    """What is printed of an exception: of Ctrl-C, which may come while packages load, one word; of
    a full disk a sentence; of a reader that has gone away nothing."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")
    elif issubclass(kind, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        script = os.path.basename(sys.argv[0])
        sys.stderr.write(f"{script}: error: {error}; make room\n")
    elif not (issubclass(kind, BrokenPipeError) and is_reader_gone("\n")):
        sys.__excepthook__(kind, error, trace)


def is_reader_gone(more=""):
    """Whether nobody reads standard output; what is left to write goes nowhere then."""
    try:
        sys.stdout.write(more)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    except (AttributeError, OSError, ValueError):  # closed, or full
        pass
    return False


check_packages()
atexit.register(is_reader_gone)
sys.excepthook = say_briefly
if ROOT not in sys.path:
    sys.path.insert(1, ROOT)
