"""Does this machine train right, and how fast? Checks train_gpt.py on a device and times it.

    python scripts/check_device.py                                 # all that fits 8 minutes
    python scripts/check_device.py --device cpu --only ops,variants.mixer --json checks.json
    torchrun --standalone --nproc_per_node=8 scripts/check_device.py    # `ranks` with these ranks

ops: single operations against float64. variants: every value of every axis, some steps. compiled:
against the same without. ranks: several against one. faults: kill -9, SIGTERM, no memory. speed:
steps, kernels, ceilings. Each group is a process of its own with a time limit; its results come as
they are found and again in a table. No data is needed and nothing is kept but what --json and
--log-entry name. Exit codes: 0 all is well; 1 a check failed, or a group crashed or took too long;
2 a wrong option.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

import device_checks
import device_runs
import device_speed
import device_variants
from device_report import FAILED, LEFT_OUT, OK, Check, Part, append, config, first_line, held
from device_report import left_out, plain_environment
from harness.provenance import device_name, git_state, machine_text, utc_now
from harness.ranks import Ranks, setup
from harness.settings import ROOT
from store.files import write_whole
from store.process import end_with_launcher

LOG = ROOT / "experiments" / "LOG.md"
MARK = device_runs.FOLDER  # a variable that all processes of a group have
LEAST = 5  # seconds: with less of the budget left no group is started
LAST_LINES = 6  # of the output of a group that crashed


class Group(NamedTuple):
    """Parts that are checked in one process, or some."""

    parts: Callable[[str], dict[str, Part]]  # of the type of the device
    limits: dict[str, int]  # seconds that a process may take
    processes: dict[str, int]  # that share the parts


GROUPS = {
    "ops": Group(lambda kind: device_checks.PARTS, {"cuda": 150, "cpu": 60}, {"cuda": 1, "cpu": 1}),
    "variants": Group(
        lambda kind: device_variants.PARTS, {"cuda": 240, "cpu": 120}, {"cuda": 2, "cpu": 2}
    ),
    "compiled": Group(
        device_variants.compiled_parts, {"cuda": 240, "cpu": 200}, {"cuda": 3, "cpu": 1}
    ),
    "ranks": Group(lambda kind: device_runs.RANKS, {"cuda": 150, "cpu": 90}, {"cuda": 1, "cpu": 1}),
    "faults": Group(
        lambda kind: device_runs.FAULTS, {"cuda": 200, "cpu": 120}, {"cuda": 1, "cpu": 1}
    ),
    "speed": Group(device_speed.parts, {"cuda": 300, "cpu": 120}, {"cuda": 1, "cpu": 1}),
}
ALONE = ("ranks", "speed")  # beside which no other group runs
BUDGET = {"cuda": 480, "cpu": 240}  # seconds


class Result(NamedTuple):
    """A line of the table, as --json has it."""

    group: str
    name: str
    value: str
    status: str
    seconds: float

    def line(self) -> str:
        status = self.status or "-"
        name = f"{self.group}.{self.name}"
        return f"{name:36} {status:8} {self.seconds:6.1f} s  {self.value}"


########################################
#          Process of a group          #
########################################


def failure(group: str, name: str, error: Exception) -> Check:
    """What a part comes to that raised. A preset that a small device has no room for is not timed
    there, and nothing is wrong with it."""
    if group == "speed" and isinstance(error, torch.OutOfMemoryError):
        return left_out(name, first_line(error))
    return held(name, first_line(error), False)


def make_checks(group: str, parts: Mapping[str, Part], device: torch.device, file: Path) -> None:
    """Makes the checks of parts one after another and appends them to a file, which also gets the
    name of each part that is done."""
    for name, part in parts.items():
        torch.manual_seed(0)
        began = time.monotonic()
        try:
            for check in part(device):
                append(file, [*check, time.monotonic() - began])
                began = time.monotonic()
        except Exception as error:  # the other parts are checked all the same
            traceback.print_exc()
            append(file, [*failure(group, name, error), time.monotonic() - began])
        append(file, [name])


def be_a_group(args: argparse.Namespace) -> int:
    """The process of a group: checks the parts that it was given."""
    group, _, names = args.process.partition(":")
    parts = GROUPS[group].parts(args.device)
    parts = {name: parts[name] for name in names.split(",")}
    device = torch.device(args.device)
    if group != "ranks":
        cfg = config(device)
        setup(cfg, Ranks(), {})
        device = Ranks().device(cfg)
    end_with_launcher()
    make_checks(group, parts, device, args.report)
    return 0


########################################
#                Driver                #
########################################


def is_marked(folder: Path, mark: bytes) -> bool:
    """Whether a process of /proc has a variable in its environment."""
    with contextlib.suppress(OSError):
        return mark in (folder / "environ").read_bytes().split(b"\0")
    return False


def no_time(group: str, parts: list[str], seconds: float = 0.0) -> Result:
    """Says that --budget was over before parts of a group were checked, or all of them were."""
    text = f"no time left of --budget: {', '.join(parts)}"
    return Result(group, "process", text, LEFT_OUT, seconds)


class Process:
    """The process of a group or of some of its parts, and what it has said until now."""

    def __init__(self, group: str, parts: list[str], folder: Path, args: argparse.Namespace):
        self.group, self.parts = group, parts
        label = f"{group}.{parts[0]}"
        self.report, self.output = folder / f"{label}.jsonl", folder / f"{label}.out"
        self.report.touch()
        (folder / label).mkdir()  # where a group that is killed leaves its files
        self.read = 0  # bytes of the report
        self.done: list[str] = []  # parts
        self.began = time.monotonic()
        self.limit = args.limit or GROUPS[group].limits[args.device]
        env = dict(os.environ) if group == "ranks" else plain_environment()
        env |= {MARK: str(folder / label), "PYTHONUNBUFFERED": "1"}
        # What is killed while it compiles leaves half a file where later runs would find it.
        env["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
        if group != "speed":  # small models beside others are fastest so
            env.setdefault("OMP_NUM_THREADS", "1")
        self.mark = f"{MARK}={env[MARK]}".encode()
        with open(self.output, "w", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                self.command(args.device),
                env=env,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def command(self, device: str) -> list[str]:
        """What is started."""
        work = f"{self.group}:{','.join(self.parts)}"
        options = ["--device", device, "--process", work, "--report", str(self.report)]
        return [sys.executable, __file__, *options]

    def listen(self) -> Iterator[Result]:
        """The results that have come since the last call."""
        text = self.report.read_bytes()[self.read :]
        whole = text[: text.rfind(b"\n") + 1]
        self.read += len(whole)
        for words in map(json.loads, whole.splitlines()):
            if len(words) == 1:
                self.done += words
            else:
                yield Result(self.group, *words)

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def kill(self) -> None:
        """Ends it with all that it has started, in other sessions too where /proc shows them."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for folder in Path("/proc").glob("[0-9]*"):
            if is_marked(folder, self.mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(folder.name), signal.SIGKILL)

    def end(self, deadline: float) -> Iterator[Result]:
        """What it said last, and how it ended where that was not by itself and well."""
        code = self.process.poll()
        self.kill()
        yield from self.listen()
        lines = [
            line for line in self.output.read_text("utf-8", errors="replace").splitlines() if line
        ]
        last = "\n    ".join(["", *lines[-LAST_LINES:]])
        missing = [part for part in self.parts if part not in self.done]
        if code is None and time.monotonic() >= deadline:
            yield no_time(self.group, missing, self.seconds())
        elif code is None or code:
            why = f"ended with {code}"
            if code is None:
                why = f"stopped after its limit of {self.limit:g} s"
            text = f"{why}, not done: {', '.join(missing) or 'nothing'}{last}"
            yield Result(self.group, "process", text, FAILED, self.seconds())


def shares(names: list[str], count: int) -> list[list[str]]:
    """Names in turn for each of up to `count` processes."""
    return [share for i in range(count) if (share := names[i::count])]


def plan(args: argparse.Namespace) -> list[list[tuple[str, list[str]]]]:
    """Groups and parts of each process, in stages that follow each other."""
    together, alone = [], []
    several = args.ranks.world_size > 1  # the other ranks wait for this one
    for group, parts in args.only.items():
        works = [(group, share) for share in shares(parts, GROUPS[group].processes[args.device])]
        if group in ALONE:
            alone += [[work] for work in works]
        else:
            together += works
    stages = [*alone, together] if several else [together, *alone]
    return [stage for stage in stages if stage]


def run_stage(works, args: argparse.Namespace, folder: Path, deadline: float) -> Iterator[Result]:
    """Results of processes, of which --jobs run at a time, as they come."""
    waiting, running = list(works), []
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                group, parts = waiting.pop(0)
                if deadline - time.monotonic() < LEAST:
                    yield no_time(group, parts)
                else:
                    running.append(Process(group, parts, folder, args))
            for process in [*running]:
                yield from process.listen()
                is_late = process.seconds() > process.limit or time.monotonic() >= deadline
                if is_late or process.process.poll() is not None:
                    running.remove(process)
                    yield from process.end(deadline)
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()


def check(args: argparse.Namespace) -> list[Result]:
    """Runs all groups and prints each result as it comes."""
    results = []
    deadline = time.monotonic() + args.budget
    with tempfile.TemporaryDirectory(
        prefix="check_device_",
        ignore_cleanup_errors=True,  # of processes that have yet to die
    ) as folder:
        for works in plan(args):
            for result in run_stage(works, args, Path(folder), deadline):
                results.append(result)
                if args.rank == 0:
                    print(result.line(), flush=True)
    return results


########################################
#                Report                #
########################################


def report_of(results: list[Result], args: argparse.Namespace, seconds: float) -> dict:
    """What --json writes."""
    git, dirty = git_state()
    return {
        "command": f"python {shlex.join(sys.argv)}",
        "finished": utc_now(),
        "git": git,
        "dirty": dirty,
        "versions": machine_text().splitlines()[0],
        "device": device_name(torch.device(args.device)),
        "devices": torch.cuda.device_count() if args.device == "cuda" else 1,
        "ranks": args.ranks.world_size,
        "seconds": round(seconds, 1),
        "results": [result._asdict() for result in results],
    }


def verdict(results: list[Result]) -> str:
    """A sentence: how many checks held, and which did not."""
    wrong = [f"{r.group}.{r.name}" for r in results if r.status == FAILED]
    held_up = sum(r.status == OK for r in results)
    text = f"{held_up} checks ok, {len(wrong)} FAILED"
    text += f", {sum(r.status == LEFT_OUT for r in results)} left out"
    return f"{text}: {', '.join(wrong)}" if wrong else text


def table(results: list[Result]) -> str:
    """All results as a table of Markdown."""
    lines = ["| check | result | | seconds |", "|-|-|-|-|"]
    for r in results:
        value = " ".join(r.value.split()).replace("|", "\\|")
        lines.append(f"| {r.group}.{r.name} | {value} | {r.status} | {r.seconds:.1f} |")
    return "\n".join(lines)


def log_entry(report: Mapping, results: list[Result]) -> str:
    """A dated entry of LOG.md."""
    return "\n".join(
        [
            f"## {report['finished'][:10]}: this machine checked by scripts/check_device.py",
            f"{report['device']}, {report['devices']} of them, {report['ranks']} ranks; "
            f"{report['versions']}; commit {report['git'] or 'unknown'}"
            f"{' with changes' if report['dirty'] else ''}. `{report['command']}`, "
            f"{report['seconds']:.0f} s: {verdict(results)}.",
            "",
            table(results),
            "",
        ]
    )


def add_to_log(entry: str) -> None:
    """Puts an entry before the others of LOG.md, below its head."""
    head, mark, others = LOG.read_text("utf-8").partition("\n## ")
    write_whole(LOG, f"{head}\n{entry}{mark}{others}")


########################################
#               Options                #
########################################


def chosen(text: str | None, device: str) -> dict[str, list[str]]:
    """{group: names of its parts} of --only. Raises ValueError with a sentence."""
    parts = {name: list(group.parts(device)) for name, group in GROUPS.items()}
    if text is None:
        return parts
    wanted = {}
    for word in text.split(","):
        group, dot, part = word.partition(".")
        if group not in parts:
            raise ValueError(f"--only {word}: choose groups of {', '.join(parts)}")
        if dot and part not in parts[group]:
            raise ValueError(f"--only {word}: {group} has {', '.join(parts[group])}")
        of_group = wanted.setdefault(group, [])
        of_group += [name for name in ([part] if dot else parts[group]) if name not in of_group]
    return wanted


def can_write(file: Path) -> bool:
    """Whether a file can be put where this says, in a folder that may have to be made."""
    folder = next(folder for folder in file.absolute().parents if folder.exists())
    return folder.is_dir() and os.access(folder, os.W_OK)


def complete(args: argparse.Namespace) -> None:
    """Puts in what follows from other options. Raises ValueError with a sentence."""
    has_cuda = torch.cuda.is_available()
    if args.device == "cuda" and not has_cuda:
        raise ValueError("--device cuda: torch finds no CUDA device here; choose cpu")
    args.device = args.device or ("cuda" if has_cuda else "cpu")
    args.only = chosen(args.only, args.device)
    if args.budget is None:
        args.budget = BUDGET[args.device]
    if args.jobs is None:
        args.jobs = min(4 if args.device == "cuda" else 2, os.cpu_count() or 1)
    args.ranks = Ranks.from_env(os.environ)
    args.rank = args.ranks.rank
    if args.rank:  # rank 0 makes all other checks, and tells
        args.only = {name: parts for name, parts in args.only.items() if name == "ranks"}
    if args.json and args.json.is_dir():
        raise ValueError(f"--json {args.json}: is a folder; name a file")
    if args.json and not can_write(args.json):
        raise ValueError(f"--json {args.json}: cannot be written; name a file in another folder")
    if args.log_entry and not (LOG.is_file() and can_write(LOG)):
        raise ValueError(f"--log-entry: {LOG} cannot be written; keep the results by --json FILE")


def positive(text: str) -> float:
    """A number of seconds from an option."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; a wrong one ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        metavar="GROUPS",
        help=f"some of {','.join(GROUPS)}, or parts of them: ops.dropout,variants.mixer",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        metavar="SECONDS",
        help="for everything (480 on cuda, 240 on a CPU); what does not fit is left out",
    )
    parser.add_argument("--limit", type=positive, metavar="SECONDS", help="for each process")
    parser.add_argument("--jobs", type=int, help="processes at a time (4 on cuda, 2 on a CPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="gets the results as well")
    # not --log, which torchrun would take for the beginning of its own options
    parser.add_argument("--log-entry", action="store_true", help=f"add an entry to {LOG.name}")
    parser.add_argument("--process", help=argparse.SUPPRESS)  # group:part,part
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.process:
        return args
    if args.jobs is not None and args.jobs < 1:
        parser.error("--jobs: at least 1")
    try:
        complete(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str]) -> int:
    """Checks, prints the table, and writes what was asked for; returns the exit code."""
    args = parse(argv)
    if args.process:
        return be_a_group(args)
    # Whoever ends this ends its processes too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    began = time.monotonic()
    if args.rank == 0:
        print(f"{device_name(torch.device(args.device))}; {machine_text().splitlines()[0]}")
    results = check(args)
    if args.rank:
        return 0
    report = report_of(results, args, time.monotonic() - began)
    print(f"\n{table(results)}\n\n{verdict(results)}; {report['seconds']} s")
    if args.json:
        write_whole(args.json, json.dumps(report, indent=1) + "\n")
    if args.log_entry:
        add_to_log(log_entry(report, results))
    statuses = {result.status for result in results}
    return int(FAILED in statuses or statuses <= {LEFT_OUT})  # that nothing was checked is no pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
