"""Feeds experiment trackers from what a run leaves, while it trains or afterwards; the run does not know of them.

    python scripts/track.py RUN_ID --to tensorboard                             # then: tensorboard --logdir logs
    python scripts/track.py RUN_ID --to tensorboard,wandb --follow              # until the run ends

It reads logs/RUN_ID.csv and .json and writes into logs/RUN_ID/tb and logs/RUN_ID/wandb alone. Each tracker is fed by a
process of its own, so that one that fails or hangs costs no other its data. sent.csv in a tracker's folder lists what
it has, by step and name, and nothing is sent twice: of steps that a resumed run makes again, which the trainer promises
to be the same, a tracker keeps what came first. Without sent.csv all is sent anew.

wandb reads its own variables, WANDB_MODE=offline, WANDB_PROJECT and so on; where they are not set, the project is
train_gpt, the group is STAGE, and name, id and folder are those of the run, so that a resumed run goes on there.
Neither code nor environment is sent.

Exit codes: 0 all is sent, or another follower does it, 1 a tracker failed, 2 wrong arguments, or one is not installed.
"""

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

FIGURES = """tokens train_time tokens_per_sec step_avg peak_mem mfu compile_time data_wait eval_time save_time bad_steps
    final_loss best_loss bits_per_byte ppl status error resumes""".split()  # of the summary, beside moe_*
TAGS = {
    "train_loss": "train/loss",
    "val_loss": "val/loss",
}  # what trackers call columns of the curve
MOE = r"aux_coef|(aux|entropy|load_min|load_max|dead)_\d+"  # columns that tell of experts


def settings_and_figures(summary):
    """Both as dicts, without blanks."""
    known = {name: value for name, value in summary.items() if value is not None}
    figures = {name: known[name] for name in known if name in FIGURES or name.startswith("moe_")}
    return {name: known[name] for name in known if name not in figures}, figures


def is_live(folder):
    """Whether a trainer holds the lock of a run, by its folder. Where none does, this holds it for some microseconds; a
    trainer that starts tries for a second."""
    lock = folder / "live.lock"
    try:
        with FileLock(lock, timeout=0) if lock.exists() else contextlib.nullcontext():
            return False
    except Timeout:
        return True


class Run:
    """The files of a run, which are only read."""

    def __init__(self, log_dir, run_id):
        self.id, self.folder = run_id, log_dir / run_id
        self.curve, self.json = log_dir / f"{run_id}.csv", log_dir / f"{run_id}.json"

    def summary(self):
        """What the JSON holds. Raises ValueError where that is not a summary."""
        with contextlib.suppress(ValueError, TypeError):
            if "status" in (summary := json.loads(self.json.read_text())):
                return summary
        raise ValueError(f"{self.json} is no summary of a run; name another")

    def lines(self):
        """Those of the curve, without one that is still being written."""
        text = self.curve.read_text() if self.curve.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()


class TensorBoard:
    """Event files in logs/RUN_ID/tb. A point has the time at which the run started plus the train time until then."""

    def __init__(self, run, summary):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.event, self.start = Event, datetime.fromisoformat(summary["started"]).timestamp()
        self.writer = EventFileWriter(str(run.folder / "tb"))
        hparams = hparams_pb(
            settings_and_figures(summary)[0], trial_id=run.id, start_time_secs=self.start
        )
        self.writer.add_event(Event(wall_time=self.start, summary=hparams))

    def log(self, points):
        for step, seconds, _, values in points:
            event = self.event(step=step, wall_time=self.start + seconds)
            for tag, value in values.items():
                event.summary.value.add(tag=tag, simple_value=value)
            self.writer.add_event(event)
        self.writer.flush()

    def finish(self, point, figures, failed):
        numbers = {
            f"final/{name}": value for name, value in figures.items() if not isinstance(value, str)
        }
        self.log([(*point[:3], numbers)])
        self.writer.close()


class WandB:
    """A run of Weights & Biases whose charts are over the step, with its files in logs/RUN_ID/wandb."""

    def __init__(self, run, summary):
        import wandb

        defaults = {
            "WANDB_PROJECT": ("project", "train_gpt"),
            "WANDB_NAME": ("name", run.id),
            "WANDB_RUN_GROUP": ("group", summary["stage"] or None),
            "WANDB_DIR": ("dir", str(run.folder)),
            "WANDB_RUN_ID": ("id", run.id),
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
        self.run = wandb.init(
            config=settings_and_figures(summary)[0],
            settings=private,
            **dict(pair for name, pair in defaults.items() if not os.environ.get(name)),
        )
        self.run.define_metric(
            "*", step_metric="step"
        )  # wandb's own step would leave out a point that comes late

    def log(self, points):
        for step, _, tokens, values in points:
            self.run.log({"step": step, "tokens": tokens} | values)

    def finish(self, point, figures, failed):
        self.run.summary.update(figures)
        self.run.finish(exit_code=int(failed))


TRACKERS = {"tensorboard": (TensorBoard, "tb"), "wandb": (WandB, "wandb")}  # with the folder


class Journal:
    """The file that lists what a tracker has, a line for a step and the columns of the curve whose values went out."""

    def __init__(self, path):
        self.path, listed = path, path.read_text().splitlines() if path.exists() else []
        self.sent = {(int(step), name) for step, *names in csv.reader(listed) for name in names}

    def lacks(self, row):
        return [name for name in row if name != "step" and (row["step"], name) not in self.sent]

    def add(self, lines):
        self.sent |= {(step, name) for step, *names in lines for name in names}
        with open(self.path, "a") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)


def looks(run, args, pipe):
    """(summary, lines of the curve, how the run ended or "") every so often until the pipe says that it has ended."""
    end, wait = "", 0
    while not end:
        try:
            end = pipe.recv() if pipe.poll(wait) else ""
        except EOFError:  # the parent is gone
            end = "running"
        yield run.summary(), run.lines(), end  # read after the end was told, they are whole
        wait = args.every


def send(name, run, args, pipe):
    """Sends a tracker what it lacks until the run has ended, and tells that."""
    build, folder = TRACKERS[name]
    journal, tracker, seen, point = (
        Journal(run.folder / folder / "sent.csv"),
        None,
        set(),
        (0, 0, 0, {}),
    )
    for summary, lines, end in looks(run, args, pipe):
        points, added = [], []
        for cells in csv.DictReader(lines[:1] + [line for line in lines[1:] if line not in seen]):
            row = {
                name: int(cell) if cell.isdigit() else float(cell)
                for name, cell in cells.items()
                if cell
            }
            names = journal.lacks(row)
            values = {
                TAGS.get(name) or "moe/" * bool(re.fullmatch(MOE, name)) + name: row[name]
                for name in names
            }
            point = row["step"], row["train_time"], row["tokens"], values
            if names:
                points.append(point)
                added.append([row["step"], *names])
        seen.update(lines)
        final = end not in ("", "running") and (point[0], "final") not in journal.sent
        if not tracker and (points or final or not end):
            tracker = build(run, summary)
        if points:
            tracker.log(points)
            journal.add(added)
    if tracker:
        figures = settings_and_figures(summary)[1] | {"status": end}
        tracker.finish(
            point, figures if final else {}, end not in ("ok", "stopped", "preempted", "running")
        )
        journal.add([[point[0], "final"]] * final)
    print(f"{run.id} ({end}): {name} has it up to step {point[0]}", flush=True)


def complain(run, name, what, code):
    """One sentence on a tracker; returns the code."""
    command = f"python scripts/track.py {run.id} --to {name} --log-dir {run.folder.parent}"
    print(
        f"track.py: error: {name} {what}; once that is mended, {command} sends what it lacks",
        file=sys.stderr,
        flush=True,
    )
    return code


def feed(name, run, args, pipe):
    """The process of a tracker. Exits with the code that the script is to have, and tells why where that is not 0."""
    for number in signal.SIGINT, signal.SIGTERM:  # the parent has them too, and says when to end
        signal.signal(number, signal.SIG_IGN)
    code = 0
    try:  # who feeds it for an earlier attempt of this run may need a while to finish
        with FileLock(
            run.folder / TRACKERS[name][1] / "track.lock",
            timeout=args.patience if args.follow else 0,
        ):
            send(name, run, args, pipe)
    except Timeout:
        print(f"{run.id}: another follower feeds {name}", flush=True)
    except ImportError as error:
        code = complain(run, name, f"cannot be imported ({error}): pip install {name}", 2)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        code = complain(run, name, f"failed ({reason})", 1)
    os._exit(code)  # what a tracker has left to do at an exit may hang


def watch(run, args, feeders):
    """Waits until the run has ended or no feeder is left; returns how it ended, "running" where it has not.

    A run that was killed says that it is running. It counts as killed when its files have not grown for --patience and
    its lock has been free for as long after that, in which a launcher may start it again.
    """
    seen, life = None, time.monotonic()
    while any(feeder.is_alive() for feeder in feeders):
        status, files = (
            run.summary()["status"],
            [path.stat() for path in (run.json, run.curve) if path.exists()],
        )
        if status != "running" or not args.follow:
            return status
        quiet, files = time.monotonic() - life, [(file.st_size, file.st_mtime_ns) for file in files]
        if seen != files or quiet > args.patience and is_live(run.folder):
            seen, life = files, time.monotonic()
        elif quiet > 2 * args.patience:
            return "killed"
        time.sleep(args.every)
    return "running"


def supervise(run, args):
    """Starts a process for each tracker, tells them when the run has ended, waits for them; returns the exit code."""
    context = multiprocessing.get_context("spawn")  # torch is not there, and stays out
    feeders, end, codes = {}, "running", [0]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        for name in args.to:
            theirs, ours = context.Pipe(duplex=False)
            feeders[name] = (
                context.Process(target=feed, args=(name, run, args, theirs), daemon=True),
                ours,
            )
            feeders[name][0].start()
        end = watch(run, args, [feeder for feeder, _ in feeders.values()])
    deadline = time.monotonic() + 5 * args.patience
    for _, ours in feeders.values():
        with contextlib.suppress(OSError):  # it has failed
            ours.send(end)
    for name, (feeder, _) in feeders.items():
        feeder.join(max(0, deadline - time.monotonic()))
        if (code := feeder.exitcode) is None or code < 0:
            feeder.kill()
            code = complain(
                run,
                name,
                "hung and was ended" if code is None else f"was ended by signal {-code}",
                1,
            )
        codes.append(code)
    return max(codes)


def parse(argv):
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
        help="seconds to wait for a run to begin; one that is "
        "quiet counts as killed after two of them, a tracker hangs that is not done five after its end",
    )
    parser.add_argument("--log-dir", type=Path, default="logs", help="folder of the run's files")
    args = parser.parse_args(argv)
    args.to = [*dict.fromkeys(args.to.split(","))]
    if unknown := [name for name in args.to if name not in TRACKERS]:
        parser.error(f"--to {unknown[0]!r}: choose some of {','.join(TRACKERS)}")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", args.run_id):
        parser.error(f"RUN_ID {args.run_id!r}: 1 to 100 letters, digits, _, and within . -")
    if not (0 < args.every < 1e6 and 0 < args.patience < 1e6):
        parser.error(
            f"--every {args.every:g} --patience {args.patience:g}: both must be more than 0 seconds"
        )
    return args


def main(argv=None) -> int:
    """Waits for the run's files and feeds the trackers; returns the exit code."""
    args = parse(argv)
    run, deadline = Run(args.log_dir, args.run_id), time.monotonic() + args.patience * args.follow
    while not run.json.exists() and time.monotonic() < deadline:
        time.sleep(min(args.every, 1))
    try:
        if not run.json.exists():
            found = sorted(args.log_dir.glob("[!.]*.json"), key=os.path.getmtime)
            newest = (
                ", ".join(path.stem for path in found[:-4:-1]) or "none; name another --log-dir"
            )
            raise ValueError(f"no run {run.id} in {args.log_dir}; the newest there: {newest}")
        run.summary()
    except ValueError as error:
        print(f"track.py: error: {error}", file=sys.stderr)
        return 2
    os.nice(10)  # a run on a CPU comes first
    os.environ["OMP_NUM_THREADS"] = "1"
    return supervise(run, args)


if __name__ == "__main__":
    sys.exit(main())
