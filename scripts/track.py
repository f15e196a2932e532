"""Feeds experiment trackers from what a run leaves, while it trains or afterwards.

    python scripts/track.py RUN_ID --to tensorboard             # then: tensorboard --logdir logs
    python scripts/track.py RUN_ID --to tensorboard,wandb --follow            # until the run ends

The run does not know of them. This reads logs/RUN_ID.csv and .json and writes into logs/RUN_ID/tb
and logs/RUN_ID/wandb alone. Each tracker is fed by a process of its own, so that one that fails or
hangs costs no other its data. sent.csv in a tracker's folder lists what it has, by step and name,
and nothing is sent twice: of steps that a resumed run makes again, which the trainer promises to be
the same, a tracker keeps what came first. Without sent.csv all is sent anew.

wandb reads its own variables, WANDB_MODE=offline, WANDB_PROJECT and so on; where they are not set,
the project is train_gpt, the group is STAGE, and name, id and folder are those of the run, so that
a resumed run goes on there. Neither code nor environment is sent.

Exit codes: 0 all is sent, or another follower does it, 1 a tracker failed, 2 wrong arguments, or
one is not installed.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import contextlib
import csv
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from harness.files import RunFiles
from store.contract import RUN_ID_PATTERN, RUN_ID_RULE

FIGURES = """
    tokens train_time tokens_per_sec step_avg peak_mem mfu compile_time data_wait eval_time
    save_time bad_steps val_step final_loss best_loss bits_per_byte ppl val_accuracy ema_val_loss
    status error resumes
""".split()  # what a summary measures, beside moe_*; the rest of its keys is given
# what trackers call columns of the curve
TAGS = {
    "train_loss": "train/loss",
    "val_loss": "val/loss",
    "val_accuracy": "val/accuracy",
    "ema_val_loss": "val/loss_of_averages",
}
MOE = r"aux_coef|(aux|entropy|load_min|load_max|dead|dropped)_\d+"  # columns that tell of experts


class Point(NamedTuple):
    """What a tracker gets of a step."""

    step: int
    seconds: float  # train time until then
    tokens: int
    values: dict[str, float]  # by tag


def settings_and_figures(summary: Mapping[str, object]) -> tuple[dict, dict]:
    """Both as dicts, without blanks and without the history, which the curve has."""
    known = {
        name: value for name, value in summary.items() if value is not None and name != "history"
    }
    figures = {name: known[name] for name in known if name in FIGURES or name.startswith("moe_")}
    return {name: known[name] for name in known if name not in figures}, figures


def tag_of(column: str) -> str:
    """What trackers call a column of the curve."""
    if re.fullmatch(MOE, column):
        return f"moe/{column}"
    return TAGS.get(column, column)


class TensorBoard:
    """Event files in logs/RUN_ID/tb. A point has the time at which the run started plus the train
    time until then."""

    def __init__(self, run: RunFiles, summary: dict) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.event = Event
        self.start = datetime.fromisoformat(summary["started"]).timestamp()
        self.writer = EventFileWriter(str(run.folder / "tb"))
        settings, _ = settings_and_figures(summary)
        hparams = hparams_pb(settings, trial_id=run.run_id, start_time_secs=self.start)
        self.writer.add_event(Event(wall_time=self.start, summary=hparams))

    def log(self, points: list[Point]) -> None:
        for point in points:
            event = self.event(step=point.step, wall_time=self.start + point.seconds)
            for tag, value in point.values.items():
                event.summary.value.add(tag=tag, simple_value=value)
            self.writer.add_event(event)
        self.writer.flush()

    def finish(self, point: Point, figures: dict, failed: bool) -> None:
        numbers = {
            f"final/{name}": value for name, value in figures.items() if not isinstance(value, str)
        }
        self.log([point._replace(values=numbers)])
        self.writer.close()


class WandB:
    """A run of Weights & Biases whose charts are over the step, with its files in
    logs/RUN_ID/wandb."""

    def __init__(self, run: RunFiles, summary: dict) -> None:
        import wandb

        defaults = {
            "WANDB_PROJECT": ("project", "train_gpt"),
            "WANDB_NAME": ("name", run.run_id),
            "WANDB_RUN_GROUP": ("group", summary["stage"] or None),
            "WANDB_DIR": ("dir", str(run.folder)),
            "WANDB_RUN_ID": ("id", run.run_id),
            "WANDB_RESUME": ("resume", "allow"),
        }
        private = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        settings, _ = settings_and_figures(summary)
        not_set = dict(pair for name, pair in defaults.items() if not os.environ.get(name))
        self.run = wandb.init(config=settings, settings=private, **not_set)
        # wandb's own step would leave out a point that comes late
        self.run.define_metric("*", step_metric="step")

    def log(self, points: list[Point]) -> None:
        for point in points:
            self.run.log({"step": point.step, "tokens": point.tokens} | point.values)

    def finish(self, point: Point, figures: dict, failed: bool) -> None:
        self.run.summary.update(figures)
        self.run.finish(exit_code=int(failed))


TRACKERS = {"tensorboard": (TensorBoard, "tb"), "wandb": (WandB, "wandb")}  # with the folder


class Journal:
    """The file that lists what a tracker has, a line for a step and the columns of the curve whose
    values went out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.sent = {(int(step), name) for step, *names in csv.reader(lines) for name in names}

    def lacks(self, row: Mapping[str, float]) -> list[str]:
        """The columns of a row of the curve that are not listed."""
        return [name for name in row if name != "step" and (row["step"], name) not in self.sent]

    def add(self, lines: Iterable[list]) -> None:
        """Lists (step, *columns)."""
        self.sent |= {(step, name) for step, *names in lines for name in names}
        with open(self.path, "a", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)


def looks(
    run: RunFiles, args: argparse.Namespace, pipe: Connection
) -> Iterator[tuple[dict, list[str], str]]:
    """(summary, lines of the curve, how the run ended or "") every so often until the pipe says
    that it has ended."""
    end = ""
    wait = 0
    while not end:
        try:
            end = pipe.recv() if pipe.poll(wait) else ""
        except EOFError:  # the parent is gone
            end = "running"
        yield run.summary(), run.lines(), end  # read after the end was told, they are whole
        wait = args.every


def numbers_of(cells: Mapping[str, str]) -> dict[str, float]:
    """A row of the curve as numbers, without blanks."""
    return {
        name: int(cell) if cell.isdigit() else float(cell) for name, cell in cells.items() if cell
    }


def send(name: str, run: RunFiles, args: argparse.Namespace, pipe: Connection) -> None:
    """Sends a tracker what it lacks until the run has ended, and tells that."""
    build, folder = TRACKERS[name]
    journal = Journal(run.folder / folder / "sent.csv")
    tracker = None
    seen: set[str] = set()  # lines of the curve
    last = Point(0, 0, 0, {})
    for summary, lines, end in looks(run, args, pipe):
        points, added = [], []
        new_lines = [line for line in lines[1:] if line not in seen]
        for cells in csv.DictReader([*lines[:1], *new_lines]):
            row = numbers_of(cells)
            lacking = journal.lacks(row)
            values = {tag_of(column): row[column] for column in lacking}
            last = Point(row["step"], row["train_time"], row["tokens"], values)
            if lacking:
                points.append(last)
                added.append([row["step"], *lacking])
        seen.update(lines)

        is_final = end not in ("", "running") and (last.step, "final") not in journal.sent
        if not tracker and (points or is_final or not end):
            tracker = build(run, summary)
        if points:
            tracker.log(points)
            journal.add(added)

    if tracker:
        _, figures = settings_and_figures(summary)
        failed = end not in ("ok", "stopped", "preempted", "running")
        tracker.finish(last, figures | {"status": end} if is_final else {}, failed)
        journal.add([[last.step, "final"]] if is_final else [])
    print(f"{run.run_id} ({end}): {name} has it up to step {last.step}", flush=True)


def complain(run: RunFiles, name: str, what: str, code: int) -> int:
    """One sentence on a tracker; returns the code."""
    command = f"python scripts/track.py {run.run_id} --to {name} --log-dir {run.folder.parent}"
    print(
        f"track.py: error: {name} {what}; once that is mended, {command} sends what it lacks",
        file=sys.stderr,
        flush=True,
    )
    return code


def feed(name: str, run: RunFiles, args: argparse.Namespace, pipe: Connection) -> None:
    """The process of a tracker. Exits with the code that the script is to have, and tells why where
    that is not 0."""
    for number in signal.SIGINT, signal.SIGTERM:  # the parent has them too, and says when to end
        signal.signal(number, signal.SIG_IGN)
    lock = run.folder / TRACKERS[name][1] / "track.lock"
    # who feeds it for an earlier attempt of this run may need a while to finish
    patience = args.patience if args.follow else 0
    code = 0
    try:
        with FileLock(lock, timeout=patience):
            send(name, run, args, pipe)
    except Timeout:
        print(f"{run.run_id}: another follower feeds {name}", flush=True)
    except ImportError as error:
        code = complain(run, name, f"cannot be imported ({error}): pip install {name}", 2)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        code = complain(run, name, f"failed ({reason})", 1)
    os._exit(code)  # what a tracker has left to do at an exit may hang


def watch(run: RunFiles, args: argparse.Namespace, feeders: list[BaseProcess]) -> str:
    """Waits until the run has ended or no feeder is left; returns how it ended, "running" where it
    has not.

    A run that was killed says that it is running. It counts as killed when its files have not grown
    for --patience and its lock has been free for as long after that, in which a launcher may start
    it again.
    """
    seen, life = None, time.monotonic()
    while any(feeder.is_alive() for feeder in feeders):
        status = run.summary()["status"]
        if status != "running" or not args.follow:
            return status

        stats = [path.stat() for path in (run.json, run.curve) if path.exists()]
        state = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        quiet = time.monotonic() - life
        if seen != state or (quiet > args.patience and run.is_live()):
            seen, life = state, time.monotonic()
        elif quiet > 2 * args.patience:
            return "killed"
        time.sleep(args.every)
    return "running"


def join(run: RunFiles, name: str, feeder: BaseProcess, deadline: float) -> int:
    """Waits for the process of a tracker until the deadline, then kills it; returns its code."""
    feeder.join(max(0, deadline - time.monotonic()))
    code = feeder.exitcode
    if code is not None and code >= 0:
        return code
    feeder.kill()
    what = "hung and was ended" if code is None else f"was ended by signal {-code}"
    return complain(run, name, what, 1)


def supervise(run: RunFiles, args: argparse.Namespace) -> int:
    """Starts a process for each tracker, tells them when the run has ended, waits for them; returns
    the exit code."""
    context = multiprocessing.get_context("spawn")  # torch is not there, and stays out
    feeders: dict[str, tuple[BaseProcess, Connection]] = {}
    end = "running"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        for name in args.to:
            theirs, ours = context.Pipe(duplex=False)
            feeder = context.Process(target=feed, args=(name, run, args, theirs), daemon=True)
            feeders[name] = feeder, ours
            feeder.start()
        end = watch(run, args, [feeder for feeder, _ in feeders.values()])

    deadline = time.monotonic() + 5 * args.patience
    for _, ours in feeders.values():
        with contextlib.suppress(OSError):  # it has failed
            ours.send(end)
    codes = [join(run, name, feeder, deadline) for name, (feeder, _) in feeders.items()]
    return max(codes, default=0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked; ends the script with code 2 where they are wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run_id", help="name of the run")
    parser.add_argument(
        "--to", required=True, help=f"trackers: {', '.join(TRACKERS)}, or both with a comma"
    )
    parser.add_argument(
        "--follow", action="store_true", help="wait for the run to begin, and go on until it ends"
    )
    parser.add_argument(
        "--every", type=float, default=5, help="seconds between two looks at the run's files"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=60,
        help="seconds to wait for a run to begin; one that is quiet counts as killed after two of "
        "them, a tracker hangs that is not done five after its end",
    )
    parser.add_argument("--log-dir", type=Path, default="logs", help="folder of the run's files")
    args = parser.parse_args(argv)

    args.to = list(dict.fromkeys(args.to.split(",")))
    for name in args.to:
        if name not in TRACKERS:
            parser.error(f"--to {name!r}: choose some of {','.join(TRACKERS)}")
    if not re.fullmatch(RUN_ID_PATTERN, args.run_id):
        parser.error(f"RUN_ID {args.run_id!r}: {RUN_ID_RULE}")
    if not (0 < args.every < 1e6 and 0 < args.patience < 1e6):
        parser.error(
            f"--every {args.every:g} --patience {args.patience:g}: both must be more than 0 seconds"
        )
    return args


def check_is_there(run: RunFiles, log_dir: Path) -> None:
    """Raises ValueError where the run has no summary, with the names of the newest."""
    if run.json.exists():
        run.summary()
        return
    summaries = sorted(log_dir.glob("[!.]*.json"), key=os.path.getmtime)
    newest = ", ".join(path.stem for path in summaries[:-4:-1])
    raise ValueError(
        f"no run {run.run_id} in {log_dir}; the newest there: "
        f"{newest or 'none; name another --log-dir'}"
    )


def main(argv: list[str] | None = None) -> int:
    """Waits for the run's files and feeds the trackers; returns the exit code."""
    args = parse(argv)
    run = RunFiles(args.log_dir, args.run_id)
    deadline = time.monotonic() + (args.patience if args.follow else 0)
    while not run.json.exists() and time.monotonic() < deadline:
        time.sleep(min(args.every, 1))
    try:
        check_is_there(run, args.log_dir)
    except ValueError as error:
        print(f"track.py: error: {error}", file=sys.stderr)
        return 2
    os.nice(10)  # a run on a CPU comes first
    os.environ["OMP_NUM_THREADS"] = "1"
    return supervise(run, args)


if __name__ == "__main__":
    sys.exit(main())
