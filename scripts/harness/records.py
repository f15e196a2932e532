"""What a run leaves: log, curve, summary, row."""

import contextlib, csv, dataclasses, hashlib, io, json, math, os, platform, re, shutil, subprocess, sys
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from harness.checkpoints import changed_settings, find_checkpoint, set_aside, step_folders
from harness.contract import CURVE, ConfigError
from harness.files import write_whole
from harness.provenance import git_state, machine_text, utc_now
from harness.settings import ROOT, redact


def update_results(path, rows):
    """Merges rows into the results table, one per run_id, under a lock: columns are united. Raises ConfigError."""
    path = Path(path).resolve()  # a link stays one
    try:
        with FileLock(f"{path}.lock"):  # which makes the folder
            old = path.read_bytes().decode() if path.exists() else ""
            table = {row["run_id"]: row for row in csv.DictReader(io.StringIO(old, newline=""))}
            for row in rows:
                cells = {
                    name: int(value) if isinstance(value, bool) else value
                    for name, value in row.items()
                }
                table[row["run_id"]] = table.get(row["run_id"], {}) | cells
            header, text = {column: column for row in table.values() for column in row}, ""
            for row in (header, *table.values()):
                csv.DictWriter(line := io.StringIO(), header).writerow(
                    row
                )  # to \r\n: only so does 3.11 quote a \r
                text += line.getvalue().removesuffix("\r\n") + "\n"
            if rows:  # without, it is a trial
                write_whole(path, text)
    except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"RESULTS_CSV={path}: cannot be written as a table with a column run_id ({error!r}); "
            "name another"
        ) from None


class Records:
    """What a run leaves: log, curve, summary, row. Rank 0 writes them; elsewhere no method writes."""

    def __init__(self, cfg, run_id, rank=0, columns=CURVE, source=""):
        self.cfg, self.rank, self.bar, self.lost, self.live = (
            cfg,
            rank,
            None,
            "",
            False,
        )  # live: the run_id is claimed
        self.log, self.curve, self.json = (
            Path(cfg.log_dir) / f"{run_id}.{kind}" for kind in ("txt", "csv", "json")
        )
        self.folder = (
            Path(cfg.log_dir) / run_id
        )  # checkpoints, the stop file, stacks of ranks that hang
        self.lock = FileLock(self.folder / "live.lock")
        self.summary, self.columns = dataclasses.asdict(cfg) | {"run_id": run_id}, columns
        self.source = source

    def open(self, facts, warnings, restarted=False):
        """Claims the run_id, starts or continues its files; returns the checkpoint to resume. Raises ConfigError."""
        self.summary |= facts
        if self.rank:
            return None
        claim(self.folder, self.lock)
        update_results(self.cfg.results_csv, [])  # where it cannot be written, nothing has begun
        run_id, known, step, warnings = self.folder.name, self.log.exists(), -1, [*warnings]
        if path := find_checkpoint(self.cfg, self.folder, restarted, warnings):
            saved = json.loads((path / "run.json").read_text())
            step, warnings = saved["step"], warnings + changed_settings(saved, self.cfg, facts)
        goes_on = (
            restarted
            or self.cfg.resume == "auto"
            or path
            and path.parent.resolve() == self.folder.resolve()
        )
        if goes_on and not path and (self.folder / "model.safetensors").exists():
            raise ConfigError(
                f"RUN_ID={run_id}: the run has ended and no valid checkpoint is left to go on from; "
                f"choose another RUN_ID (INIT_FROM={self.folder} starts it with these weights)"
            )
        if known and not goes_on:
            raise ConfigError(
                f"RUN_ID={run_id}: {self.log} exists; RESUME=auto goes on with it, or choose another"
            )
        warnings += ["no valid checkpoint: starts at step 0"] * (known and not path)
        for later in [
            later for number, later in step_folders(self.folder).items() if number > step
        ]:
            set_aside(later, "superseded")
        old = json.loads(self.json.read_text()) if known and self.json.exists() else {}
        self.summary = (
            dict.fromkeys(("run_id", "stage", "variant", "preset"))
            | {
                "status": "running",
                "started": old.get("started", utc_now()),
                **dict(zip(("git", "dirty"), git_state())),
                "source_sha": hashlib.sha256(self.source.encode()).hexdigest()[:12],
                "host": platform.node(),
                "torch": torch.__version__,
                "resumes": old.get("resumes", -1) + 1,
                "error": None,
            }
            | facts
            | self.summary
        )
        (self.folder / "stop").unlink(missing_ok=True)
        if (error := self.folder / "error.txt").exists():
            error.replace(self.folder / "last_error.txt")
        log, rule, settings = before(self.log, step), "=" * 100, json.dumps(self.summary, indent=1)
        head = f"{rule}\n{self.source}\n{rule}\n{machine_text()}\nsettings: {settings}\n{rule}\n"
        write_whole(self.log, log + head * (self.source not in log))
        write_whole(self.curve, before(self.curve, step) or ",".join(self.columns) + "\n")
        self.save()
        self.given = len(self.summary)
        self.print(
            "\n".join(
                [
                    f"run_id:{run_id}",
                    f"changes: {facts['changes'] or 'none'}",
                    *[f"resumed:{path}"] * bool(path),
                    *(f"warning: {warning}" for warning in warnings),
                ]
            )
        )
        self.bar = tqdm(
            total=self.summary["num_iterations"], initial=max(0, step), unit="step", disable=None
        )
        if (
            self.cfg.trackers != "none"
        ):  # in a session of its own: what becomes of it, the run does not notice
            command = [
                sys.executable,
                ROOT / "scripts" / "track.py",
                run_id,
                "--follow",
                "--log-dir",
                self.cfg.log_dir,
            ]
            with contextlib.suppress(OSError), open(self.folder / "track.txt", "a") as out:
                subprocess.Popen(
                    [*command, "--to", self.cfg.trackers],
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
        return path

    def append(self, path, text):
        """Adds to a file. A disk that is full costs the record, not the run, which says so at once and at its end."""
        try:
            with open(path, "a") as file:
                file.write(text)
        except OSError as error:
            self.lost = self.lost or f"{path} is not whole: {error}"
            print(f"warning: {path}: {error}", file=sys.stderr)

    def print(self, line):
        """A line to the log and to standard output."""
        if self.rank == 0:
            line = redact(line, os.environ)
            self.append(self.log, line + "\n")
            with contextlib.suppress(OSError):  # a reader that has gone away ends no run
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()

    def point(self, values):
        """A row of the curve; what is not given stays blank."""
        if self.rank == 0:
            cells = (repr(values[name]) if name in values else "" for name in self.columns)
            self.append(self.curve, ",".join(cells) + "\n")
            if "train_loss" in values:
                loss, speed = values["train_loss"], values["tokens_per_sec"]
                self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
                self.bar.update(values["step"] - self.bar.n)

    def save(self):
        """Writes summary and row; in both a number that is not finite is a blank, for JSON has none."""
        summary = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in self.summary.items()
        }
        write_whole(self.json, json.dumps(summary, indent=1) + "\n")
        update_results(self.cfg.results_csv, [summary])

    def close(self, status, **values):
        """The run's last words: a block of figures and files, the summary, the row."""
        self.summary |= {"status": status, "error": self.lost or None} | values
        if self.bar is not None:
            self.bar.close()
            told = [
                "status",
                *list(self.summary)[self.given :],
                "resumes",
                "error",
            ]  # what was measured
            files = {
                "log": self.log,
                "curve": self.curve,
                "summary": self.json,
                "row": self.cfg.results_csv,
            }
            try:
                self.save()
            except (OSError, ConfigError) as error:
                self.lost = files["row"] = (
                    f"not written ({error}); mend it, then python scripts/rebuild_results.py"
                )
            lines = {
                key: self.summary[key] for key in told if self.summary.get(key) not in (None, "")
            } | files
            lines = {
                key: f"{value:.6g}" if isinstance(value, float) else value
                for key, value in lines.items()
            }
            self.print("\n".join(["---", *(f"{key}: {value}" for key, value in lines.items())]))


def claim(folder, lock):
    """Makes sure that no other live run has this RUN_ID, and clears away what a killed one left half done."""
    if folder.resolve() != folder.parent.resolve() / folder.name:
        raise ConfigError(f"RUN_ID={folder.name}: {folder} leads out of LOG_DIR; remove that link")
    try:
        lock.acquire(timeout=1)  # makes the folder
    except Timeout:
        raise ConfigError(
            f"RUN_ID={folder.name} is live; choose another, or end it: touch {folder}/stop"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"LOG_DIR={folder.parent}: cannot be written ({error}); name another"
        ) from None
    for path in folder.glob(".tmp_*"):
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(
            path, ignore_errors=True
        )


def before(path, step):
    """The whole lines of a log or curve, without those of the steps from `step` on, which will be run again."""
    lines = re.findall(".*\n", path.read_text()) if path.exists() else []
    return "".join(
        line
        for line in lines
        if not (found := re.match(r"(?:\[MOE] )?(?:step:)?(\d+)[/,]", line))
        or int(found[1]) < step + (" bad_gradient " in line)
    )  # that of `step` is in the checkpoint
