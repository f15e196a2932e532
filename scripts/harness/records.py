"""What a run leaves: log, curve, summary, and a row in the table of results."""

import contextlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from harness.checkpoints import changed_settings, find_checkpoint, set_aside, step_folders
from harness.files import RunFiles, summary_text
from harness.provenance import git_state, machine_text, utc_now
from harness.ranks import Ranks
from harness.settings import ROOT, Settings
from store.contract import ConfigError
from store.files import whole_lines, write_whole
from store.secrets import redact
from store.source import HARNESS, OPS, lineage, modules_text, text_hash
from store.tables import update_results


# Of the last words; what ends in _time is in seconds, all else has no unit.
UNITS = {"data_wait": "s", "step_avg": "ms", "peak_mem": "GiB"}


class Records:
    """Log, curve, summary and row of one run. Rank 0 writes them; elsewhere no method writes."""

    def __init__(self, cfg: Settings, run_id: str, columns: list[str], source: str, ranks: Ranks):
        self.cfg = cfg
        self.rank = ranks.rank
        self.files = RunFiles(cfg.log_dir, run_id)
        self.columns = columns  # of the curve
        self.source = source  # text of the program that trains
        self.summary = vars(cfg) | cfg.resolved() | {"run_id": run_id}
        self.lock = FileLock(self.files.lock)
        self.bar = None
        self.live = False  # the run_id is claimed
        self.lost = ""  # the first record that could not be written, and why

    def open(self, plan: dict[str, Any], warnings: Iterable[str]) -> Path | None:
        """Claims the run_id, starts or continues the files; returns the checkpoint to go on from.

        `plan` is what is known of the run before it starts, for the summary. Raises ConfigError.
        """
        self.summary = plan | self.summary
        if self.rank:
            return None
        claim(self.files, self.lock)
        refuse_foreign_files(self.files, self.cfg.results_csv)
        update_results(self.cfg.results_csv, [])  # where it cannot be written, nothing has begun
        warnings = list(warnings)
        checkpoint, step = find_checkpoint(self.cfg, self.files.folder, warnings), -1
        if checkpoint:
            saved = json.loads((checkpoint / "run.json").read_text("utf-8"))
            step = saved["step"]
            warnings += changed_settings(saved, self.cfg, plan)
        known = self.files.log.exists()
        refuse_second_start(self.cfg, self.files, known, checkpoint)
        if known and not checkpoint:
            warnings.append("no valid checkpoint: starts at step 0")
        for number, later in step_folders(self.files.folder).items():
            if number > step:
                set_aside(later, "superseded")
        self.files.stop.unlink(missing_ok=True)
        if self.files.error.exists():
            self.files.error.replace(self.files.folder / "last_error.txt")
        self.begin_summary(step)
        try:
            self.begin_files(step)
        except OSError as error:
            raise ConfigError(
                f"LOG_DIR={self.cfg.log_dir}: cannot be written ({error}); name another"
            ) from None

        self.print(f"run_id:{self.files.run_id}\nchanges: {plan['changes'] or 'none'}")
        if checkpoint:
            self.print(f"resumed:{checkpoint}")
        if "+" in self.summary["source_sha"]:
            warnings.append(
                "other code has trained this run, too, so its row is compared with none"
            )
        for warning in warnings:
            self.print(f"warning: {warning}")
        steps = self.cfg.num_iterations
        self.bar = tqdm(total=steps, initial=max(0, step), unit="step", disable=None)
        start_trackers(self.cfg, self.files)
        return checkpoint

    def begin_summary(self, step: int) -> None:
        """Puts into the summary what is known at the start, names first."""
        old = {}
        if self.files.log.exists():
            try:
                old = self.files.summary()
            except ValueError as error:
                print(f"warning: {error}; resumes are counted anew", file=sys.stderr)
        commit, dirty = git_state()
        identity = {name: self.summary[name] for name in ("run_id", "stage", "variant", "preset")}
        found_here = {
            "status": "running",
            "started": old.get("started", utc_now()),
            "git": commit,
            "dirty": dirty,
            "harness_sha": text_hash(HARNESS),
            "host": platform.node(),
            "torch": torch.__version__,
            "resumes": old.get("resumes", -1) + 1,
            "error": None,
        }
        self.summary = identity | found_here | self.summary
        self.summary |= lineage(self.source, dirty, old, step, self.cfg.num_iterations)
        self.n_given = len(self.summary)  # what comes after these is measured

    def begin_files(self, step: int) -> None:
        """Log and curve without what will be run again, a head of the log, summary and row."""
        log = truncate_to_step(self.files.log, step)
        sources = (self.source, HARNESS + OPS + modules_text(self.source))
        if any(text not in log for text in sources):
            rule = "=" * 100
            texts = (*sources, f"{machine_text()}\nsettings: {summary_text(self.summary)}")
            log += rule + "".join(f"\n{text}\n{rule}" for text in texts) + "\n"
        write_whole(self.files.log, log)
        curve = truncate_to_step(self.files.curve, step)
        write_whole(self.files.curve, curve or ",".join(self.columns) + "\n")
        self.save()

    def append(self, path: Path, text: str) -> None:
        """Adds to a file. A full disk costs the record, not the run, which says so twice."""
        try:
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            if not self.lost:
                self.lost = f"{path} is not whole: {error}"
                print(f"warning: {self.lost}", file=sys.stderr)

    def print(self, line: str) -> None:
        """A line to the log and to standard output."""
        if self.rank == 0:
            line = redact(line, os.environ)
            self.append(self.files.log, line + "\n")
            with contextlib.suppress(OSError):  # a reader that has gone away ends no run
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()

    def point(self, values: dict[str, float]) -> None:
        """A row of the curve; what is not given stays blank."""
        if self.rank:
            return
        cells = [repr(values[name]) if name in values else "" for name in self.columns]
        self.append(self.files.curve, ",".join(cells) + "\n")
        if "train_loss" in values:
            text = f"loss {values['train_loss']:.4f}, {values['tokens_per_sec']:,.0f} tokens/s"
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(values["step"] - self.bar.n)

    def save(self, **series: Any) -> None:
        """Writes summary and row; a number that is not finite is a blank, for JSON has none.

        `series` are for the summary alone.
        """
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in self.summary.items()
        }
        try:
            write_whole(self.files.json, summary_text(finite | series))
        finally:  # the table may be on a disk with room
            update_results(self.cfg.results_csv, [finite])

    def close(self, status: str, **values: Any) -> None:
        """The run's last words: a block of figures and files, the summary, the row."""
        self.summary |= {"status": status, "error": self.lost or None} | values
        if self.bar is None:
            return
        self.bar.close()
        row = self.cfg.results_csv
        try:
            self.save(history=self.files.history())
        except OSError as error:
            row = self.lost = f"{row}, but {self.files.json} was not written: {error}"
        except ConfigError as error:
            row = f"not written ({error}); mend it, then python scripts/rebuild_results.py"
            self.lost = row
        measured = ["status", *list(self.summary)[self.n_given :], "resumes", "error"]
        told, files = {key: self.summary.get(key) for key in measured}, self.files
        if status == "ok":
            told["weights"] = files.folder / "model.safetensors"
        told |= {"log": files.log, "curve": files.curve, "summary": files.json, "row": row}
        lines = ["---"]
        for key, value in told.items():
            if value not in (None, ""):
                text = f"{value:.6g}" if isinstance(value, float) else value
                unit = UNITS.get(key, "s" if key.endswith("_time") else "")
                lines.append(f"{key}: {text} {unit}".rstrip())
        self.print("\n".join(lines))


def start_trackers(cfg: Settings, files: RunFiles) -> None:
    """Starts scripts/track.py in a session of its own: what becomes of it, no run notices."""
    if cfg.trackers == "none":
        return
    script = ROOT / "scripts" / "track.py"
    options = "--to", cfg.trackers, "--follow", "--log-dir", cfg.log_dir
    command = sys.executable, script, files.run_id, *options
    with contextlib.suppress(OSError), open(files.folder / "track.txt", "ab") as out:
        subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)


def claim(files: RunFiles, lock: FileLock) -> None:
    """Makes sure that no other live run has this RUN_ID; clears what a killed one left."""
    folder = files.folder
    if folder.resolve() != folder.parent.resolve() / folder.name:
        raise ConfigError(f"RUN_ID={folder.name}: {folder} leads out of LOG_DIR; remove that link")
    try:
        lock.acquire(timeout=1)  # makes the folder
    except Timeout:
        raise ConfigError(
            f"RUN_ID={folder.name} is live; choose another, or end it: touch {files.stop}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"LOG_DIR={folder.parent}: cannot be written ({error}); name another"
        ) from None
    for path in folder.glob(".tmp_*"):
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def refuse_second_start(
    cfg: Settings, files: RunFiles, known: bool, checkpoint: Path | None
) -> None:
    """Raises ConfigError where the run_id was used and this start does not go on with it."""
    folder = files.folder
    own = checkpoint and checkpoint.parent.resolve() == folder.resolve()
    goes_on = cfg.resume == "auto" or own
    if known and not goes_on:
        raise ConfigError(
            f"RUN_ID={files.run_id}: {files.log} exists; "
            "RESUME=auto goes on with it, or choose another"
        )
    if goes_on and not checkpoint and (folder / "model.safetensors").exists():
        raise ConfigError(
            f"RUN_ID={files.run_id}: the run has ended and no valid checkpoint is left to go on "
            f"from; choose another RUN_ID (INIT_FROM={folder} starts it with these weights)"
        )


def refuse_foreign_files(files: RunFiles, results_csv: str) -> None:
    """Raises ConfigError where files of this run would be, or are, something else."""
    table = Path(results_csv).resolve()
    for path in files.log, files.curve, files.json:
        if path.resolve() == table or files.folder.resolve() in table.parents:
            raise ConfigError(
                f"RESULTS_CSV={table} is a file of RUN_ID={files.run_id} itself; choose "
                "another RUN_ID or table"
            )
        if path.exists() and not path.is_file():
            raise ConfigError(f"RUN_ID={files.run_id}: {path} is no file; choose another")
    if files.curve.exists() and not files.log.exists():
        raise ConfigError(
            f"RUN_ID={files.run_id}: {files.curve} is there without a log, so it is no run's; "
            "choose another, or remove it"
        )


def truncate_to_step(path: Path, step: int) -> str:
    """The whole lines of a log or curve, without those of steps that will be run again.

    That `step` itself had a bad gradient is in its checkpoint; all else of it is not yet logged.
    """
    kept = []
    for line in whole_lines(path):
        # "step:5/9 …" and "[MOE] step:5/9 …" of a log, "5,…" of a curve
        number = re.match(r"(?:\[\w+\] )?(?:step:)?(\d+)[/,]", line)
        first_dropped = step + 1 if " bad_gradient " in line else step
        if not number or int(number[1]) < first_dropped:
            kept.append(f"{line}\n")
    return "".join(kept)
