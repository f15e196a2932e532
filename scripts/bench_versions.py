"""Two versions of train_gpt.py in processes of their own, whose steps are made in turn.

For `scripts/bench.py --against-file`: finds the other version in a file or in git, starts a
scripts/bench_worker.py for each, and ends them however this program ends.
"""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from harness.provenance import output_of
from harness.settings import ROOT, read_preset
from store.contract import ConfigError
from store.source import text_hash
from train_gpt import Config

WORKER = Path(__file__).with_name("bench_worker.py")
IN_ARCHIVE = ("train_gpt.py", "scripts/", "experiments/presets/")  # what a version needs of git
PAUSE = 0.02  # seconds until idle threads of the one no longer spin beside the other's step
LAST_WORD = 5  # seconds that a worker has to end by itself


class VersionError(Exception):
    """A version that makes no more steps: says which and why; `status` is a key of EXIT_CODES."""

    def __init__(self, status: str, sentence: str):
        super().__init__(sentence)
        self.status = status


class Version(NamedTuple):
    """A train_gpt.py that is there, beside its scripts/."""

    label: str  # as the user gave it
    file: Path
    commit: str = ""  # hash; "" where it is a file of its own

    def source_sha(self) -> str:
        """The hash of its text and its scripts/ops/, as rows of results have it."""
        ops = sorted((self.file.parent / "scripts" / "ops").glob("*.py"))
        return text_hash("".join(path.read_text("utf-8") for path in (self.file, *ops)))


OURS = Version("this version", ROOT / "train_gpt.py")


@contextlib.contextmanager
def other_version(text: str) -> Iterator[Version]:
    """The version at a path, or of a git ref; files of the latter are there until the end.

    Raises ConfigError.
    """
    file = Path(text).resolve()
    if file.is_dir():
        file = file / "train_gpt.py"
    if file.is_file():
        check_harness(text, file.parent)
        yield Version(text, file)
        return

    commit = output_of(
        *("git", "-C", ROOT, "rev-parse", "--verify", "--quiet", "--end-of-options"),
        f"{text}^{{commit}}",
    )
    if not commit:
        raise ConfigError(
            f"--against-file {text}: no such file, and no commit of git here; give the path of a "
            "train_gpt.py beside its scripts/, or a ref like HEAD~3"
        )
    with tempfile.TemporaryDirectory() as folder:
        extract(commit, Path(folder))
        check_harness(text, Path(folder))
        yield Version(text, Path(folder) / "train_gpt.py", commit)


def check_harness(text: str, folder: Path) -> None:
    """Raises ConfigError where a version has no harness beside it."""
    if not (folder / "scripts" / "harness").is_dir():
        raise ConfigError(
            f"--against-file {text}: it needs scripts/harness/ beside train_gpt.py, and has none; "
            "versions before there was one cannot be measured"
        )


def extract(commit: str, folder: Path) -> None:
    """Writes what a commit has of IN_ARCHIVE into a folder."""
    command = ["git", "-C", ROOT, "archive", "--format=tar", commit]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = [member for member in tar if member.name.startswith(IN_ARCHIVE)]
        tar.extractall(folder, members, filter="data")


def settings_of(env: Mapping[str, str], changes: Mapping[str, str]) -> dict[str, str]:
    """The settings that a version is given: those of the environment and of its PRESET, a preset of
    ours, that can change a step; `changes` over them, of which blank ones are left out."""
    fields = {field.name.upper() for field in dataclasses.fields(Config)}
    preset = changes.get("PRESET") or env.get("PRESET")
    texts = read_preset(preset, fields, Config.preset) if preset else {}
    texts |= {name: env[name] for name in fields if env.get(name)}
    without_effect = {name.upper() for name in Config.NOT_HASHED} - {"INPUT_BIN"}
    texts = {name: text for name, text in texts.items() if name not in without_effect}
    texts |= {name: text for name, text in changes.items() if name != "PRESET"}
    return {name: text for name, text in texts.items() if text}


class Worker:
    """A process that makes steps of a version; within `with`, after which there is none left."""

    def __init__(self, version: Version, settings: Mapping[str, str]):
        self.version = version
        # a session of its own: the terminal's Ctrl-C is for this program, which ends it
        self.process = subprocess.Popen(
            [sys.executable, "-P", WORKER, version.file],  # -P: its harness is not the one here
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        self.send(json.dumps(settings))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.process.stdin.close()  # it ends where it has no more to read
            if kind is None:
                self.process.wait(LAST_WORD)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # and what it has started
        self.process.wait()
        self.process.stdout.close()

    def send(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # its answer says why
            print(line, file=self.process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """What it says next. Raises VersionError."""
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            reason = f"ended with {code} and no word"
            if code == -signal.SIGKILL:
                reason += "; where the system killed it, memory was short"
            raise VersionError("crash", f"{self.version.label}: {reason}")
        facts = json.loads(line)
        if "error" in facts:
            raise VersionError(facts["status"], f"{self.version.label}: {facts['error']}")
        return facts

    def step(self) -> dict[str, Any]:
        """Has it make a step. Raises VersionError."""
        time.sleep(PAUSE)
        self.send("step")
        return self.answer()


def steps_in_turn(
    other: Version, env: Mapping[str, str], changes: Mapping[str, str], count: int
) -> tuple[list[dict], list[dict]]:
    """What `count` steps of our version and of another measured, one at a time: A B B A A B ...

    `changes` are settings of the other alone. Raises ConfigError, VersionError.
    """
    ours_has, other_has = settings_of(env, {}), settings_of(env, changes)
    with Worker(other, other_has) as theirs, Worker(OURS, ours_has) as ours:
        order = [ours, theirs]
        for worker in (theirs, ours):
            worker.answer()  # it is ready

        measured = {ours: [], theirs: []}
        for _ in range(count):
            for worker in order:
                measured[worker].append(worker.step())
            order.reverse()
        return measured[ours], measured[theirs]


def losses_compared(ours: Sequence[float], other: Sequence[float]) -> str:
    """A sentence on whether the losses of two versions' steps are the same numbers."""
    # float.hex tells signs of zero apart, and has nan equal to itself
    pairs = [(a.hex(), b.hex()) for a, b in zip(ours, other)]
    differ = [i for i, (a, b) in enumerate(pairs) if a != b]
    if not differ:
        return f"losses of all {len(pairs)} steps: equal to the bit"
    largest = max(abs(a - b) for a, b in zip(ours, other))
    return (
        f"losses of {len(pairs)} steps: different from step {differ[0] + 1} on, by {largest:.3g} "
        f"at most and {ours[-1] - other[-1]:.3g} at the last (ours - other)"
    )
