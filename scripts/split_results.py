"""Publishes the results of stages: the rows of their runs and the curves, a file each.

    python scripts/split_results.py            # every stage in the table
    python scripts/split_results.py stage1_cpu

experiments/results.csv has the runs of this machine and is not for git. From it the rows of each
stage are added to experiments/results_<stage>.csv, and the curves, from LOG_DIR (logs), to
experiments/log_curves_<stage>.csv: what notebooks and plots read, and what others get. A published
row that has a result stays as it is, and its curve, until they are taken out of those files; others
are brought up to date. A published file that is not whole is refused, and stays.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import contextlib
import functools
import io
import itertools
import os
import shlex
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd

import code_variants
from harness.settings import preset_files, read_preset
from published import RESULTS, curves_path, not_there, not_whole, results_path, whole_rows
from published import published_rows, readable, settled, stage_table, stages_here
from stages import CODE, TRAINER, Stage
from store.files import locked, write_whole
from store.source import source_hash
from store.tables import table_text

SWITCH = {"true": 1, "false": 0}  # as rows have it
TEXT = (  # never numbers
    "run_id",
    "stage",
    "variant",
    "preset",
    "status",
    "git",
    "source_sha",
    "config_hash",
    "data_fingerprint",
    "val_fingerprint",
    "changes",
    "note",
    "error",
    "per_visit",
    "started",
    "device_name",
    "torch",
)
NUMBERS = (  # of a run that ended early they may be missing
    "seed",
    "final_loss",
    "train_time",
    "tokens_per_sec",
    "tokens_per_step",
    "params_total",
    "params_active",
    "flops_per_token",
    "num_experts",
    "sequence_length",
    "val_tokens",
    "bad_steps",
    "resumes",
    "tokens",
)
FIGURES = ("bits_per_byte", "moe_entropy", "moe_max_vio")  # numbers that not every row has


@functools.cache
def setting_columns() -> set[str]:
    """The columns of rows that hold settings."""
    from train_gpt import Config  # here, since torch takes seconds to come

    return {*Config.__dataclass_fields__}


@functools.cache
def untrained() -> set[str]:
    """The settings that make no other run of one, in capitals; without labels, which are not in the
    column `changes`."""
    from train_gpt import Config  # here, since torch takes seconds to come

    return {name.upper() for name in {*Config.NOT_HASHED, "seed"} - {*Config.LABELS}}


def read_results(path: Path = RESULTS) -> pd.DataFrame:
    """A table of results, a row per run. Raises ValueError where there is none."""
    if not Path(path).exists():
        raise not_there(path)
    if path != RESULTS:
        whole_rows(path)
    return frame_of(readable(path), path)


def rows_of(stage_name: str) -> pd.DataFrame:
    """The rows of a stage, a row per run: what is published, brought up to date by the runs here.
    Raises ValueError where there is none."""
    return frame_of(
        table_text(stage_table(stage_name)), f"{results_path(stage_name)} with {RESULTS}"
    )


def frame_of(text: str, path: str | Path) -> pd.DataFrame:
    """A table of results out of CSV, which is of this file. Raises ValueError."""
    if not text:
        raise ValueError(f"{path} is empty; python scripts/rebuild_results.py fills it from logs")
    rows = pd.read_csv(
        io.StringIO(text),
        dtype=dict.fromkeys(TEXT, str),
        keep_default_na=False,
        na_values=[""],
        low_memory=False,
    )
    blanks = dict.fromkeys(TEXT, "") | dict.fromkeys(NUMBERS, float("nan"))
    if "run_id" not in rows or "stage" not in rows:
        raise ValueError(f"{path} is no table of results: it has no columns run_id and stage")
    rows = rows.fillna({name: "" for name in TEXT if name in rows})
    missing = {name: blank for name, blank in blanks.items() if name not in rows}
    rows = pd.concat([rows, pd.DataFrame(missing, index=rows.index)], axis="columns")
    for name in (*NUMBERS, *(name for name in FIGURES if name in rows)):
        numbers = pd.to_numeric(rows[name], errors="coerce")
        wrong = rows[numbers.isna() & rows[name].notna()]
        if len(wrong):
            one = wrong.iloc[0]
            raise ValueError(f"{path}: {name} of {one.run_id} is {one[name]!r}, no number")
        rows[name] = numbers
    texts = [name for name, kind in rows.dtypes.items() if isinstance(kind, pd.StringDtype)]
    # all texts in one piece: rows are taken from a piece at a time, and there are many columns
    return rows.astype(dict.fromkeys(texts, object)).copy()


def source_here() -> str:
    """The hash of the trainer beside the scripts, as rows have it; "" where there is none."""
    trainer = Path(__file__).parents[1] / "train_gpt.py"
    return source_hash(trainer.read_text("utf-8")) if trainer.exists() else ""


def preset_of(settings: Mapping[str, str]) -> dict[str, str]:
    """What the preset of a variant sets; {} for the default one and for one that is gone."""
    name = settings.get("PRESET")
    return read_preset(name, None, "") if name in preset_files() else {}


def is_same(name: str, text: str, asked: Mapping[str, str], row: Mapping) -> bool:
    """Whether a run had for a setting what a stage says of it: `asked` is what differed from the
    defaults, `row` has the values of all settings."""
    value = asked.get(name)
    if text == "auto":
        return value in (None, "0")
    if value is None:
        value = row.get(name.lower(), text)  # what older rows have no column for counts as said
    if pd.isna(value) or value == "":
        return text == "none" or not row["preset"]  # without, nothing is known of its settings
    try:
        return float(value) == float(SWITCH.get(text.lower(), text))
    except ValueError:
        return str(value) == text


@functools.cache
def asked_of(changes: str) -> dict[str, str]:
    """What differed from the defaults in a run whose row says so: {setting: text}; a program's
    options, which come after them, have columns of their own. Raises ValueError."""
    words = itertools.takewhile(lambda word: not word.startswith("--"), shlex.split(changes))
    return dict(word.split("=", 1) for word in words)


def is_of_the_trainer(stage: Stage, variant: str) -> bool:
    """Whether a variant trains by train_gpt.py as it is here, no other program or code."""
    return stage.program == TRAINER and not stage.code_of(variant)


def said_of(stage: Stage, variant: str) -> dict[str, str]:
    """What the stage's file, or its preset, says that runs of a variant have: {setting: text}.

    Of another program its options count as well, by their columns; they may change what a preset
    says, which is not compared then, nor is that of other code.
    """
    own = {name: text for name, text in stage.variants[variant].items() if text and name != CODE}
    if is_of_the_trainer(stage, variant):
        return preset_of(own) | own
    return {name: text for name, text in own.items() if name.islower() or name.lower() not in own}


def is_as_said(row: Mapping, said: Mapping[str, str], is_of_trainer: bool) -> bool:
    """Whether a run had all settings that a stage says its variant has. Raises ValueError."""
    skipped = untrained()
    try:
        asked = asked_of(row["changes"])
    except ValueError:
        raise ValueError(
            f"{RESULTS}: changes of {row['run_id']} are no NAME=value words; "
            "python scripts/rebuild_results.py makes the table anew"
        ) from None
    # Without a preset nothing is known of what else it had; DEVICE is Slurm's.
    if row["preset"] and is_of_trainer:
        more = asked.keys() - said.keys() - skipped - {"PRESET", "DEVICE"}
        if any(name.lower() in setting_columns() for name in more):
            return False
    return all(
        is_same(name, text, asked, row)
        for name, text in said.items()
        if text and (name == "PRESET" or name not in skipped)
    )


def tried(rows: pd.DataFrame, stage: Stage) -> pd.DataFrame:
    """The rows of a stage as its file is now, whatever became of them, with the code of their
    variants, "." for the working tree. One that was refused, or died before it began, has no source
    and no settings."""
    rows = rows[rows.variant.isin(stage.variants)]
    rows = rows.assign(code=[stage.code_of(label) or "." for label in rows.variant])
    said = {label: said_of(stage, label) for label in rows.variant.unique()}
    fits = [
        row["source_sha"] == ""
        or is_as_said(row, said[row["variant"]], is_of_the_trainer(stage, row["variant"]))
        for row in rows.to_dict("records")
    ]
    return rows.loc[fits]


def sources_that_count(rows: pd.DataFrame, stage: Stage) -> dict[str, str]:
    """{code: source_sha} of the code that is here if any of the rows, in the order of their start,
    is a finished run of it, else of each code the one of its newest."""
    finished = rows[rows.status == "ok"]
    newest = {
        **rows.groupby("code").source_sha.last(),
        **finished.groupby("code").source_sha.last(),
    }
    trainer = source_here() if stage.program == TRAINER else ""
    known = {
        code: trainer if code == "." else code_variants.source_of(code, stage.program)
        for code in newest
    }
    here = {code: source_sha for code, source_sha in known.items() if source_sha}
    is_here = finished.source_sha == finished.code.map(here)
    return newest | here if is_here.any() else newest


def current(rows: pd.DataFrame, stage: Stage) -> pd.DataFrame:
    """The rows of a stage as its file is now that go with its newest finished run, of the code that
    is here if there is one: each of the source that its variant's code is, and, unless data are
    what varies, all of the same data."""
    rows = tried(rows[rows.source_sha != ""], stage).sort_values("started", kind="stable")
    finished = rows.status == "ok"
    of_its_code = rows.source_sha == rows.code.map(sources_that_count(rows, stage))
    newest = rows[finished & of_its_code].tail(1)
    if len(newest):
        rows = rows[of_its_code]
        if len({settings.get("INPUT_BIN") for settings in stage.variants.values()}) == 1:
            rows = rows[rows.data_fingerprint == newest.data_fingerprint.item()]
    for name in ("config_hash", "data_fingerprint"):  # of each variant those it had last
        rows = rows[rows[name] == rows.groupby("variant")[name].transform("last")]
    return rows


def has_same_code(stage: Stage, variant: str, runs: pd.DataFrame) -> bool:
    """Whether a variant names other code than its reference, but has the same by its runs, with the
    same settings and data."""
    reference = stage.references[variant]
    told_by = runs[["source_sha", "config_hash", "data_fingerprint"]].agg("|".join, axis=1)
    ours, theirs = ({*told_by[runs.variant == label]} for label in (variant, reference))
    return stage.code_of(variant) != stage.code_of(reference) and bool(ours & theirs)


def validation_of(*tables: pd.DataFrame) -> set[tuple[str, float]]:
    """On what the runs of these tables were validated: {(fingerprint, tokens)}."""
    seen = set()
    for runs in tables:
        data = runs.val_fingerprint.where(runs.val_fingerprint != "", runs.data_fingerprint)
        length = runs.sequence_length
        tokens = (runs.val_tokens // length * length).fillna(0)
        seen |= {*zip(data, tokens)}
    return seen


def comparable(rows: pd.DataFrame, stage: Stage) -> pd.DataFrame:
    """The finished ones of a stage's current rows, one per variant and seed."""
    rows = current(rows, stage)
    return rows[rows.status == "ok"].drop_duplicates(["variant", "seed"], keep="last").sort_index()


def measured(runs: pd.DataFrame, stage: Stage) -> pd.DataFrame:
    """Those of the runs that have the measure of their stage, as a number. Raises ValueError."""
    values = runs.get(stage.measure, pd.Series(np.nan, runs.index))
    numbers = pd.to_numeric(values, errors="coerce")
    wrong = runs[numbers.isna() & values.notna()]
    if len(wrong):
        one = wrong.iloc[0]
        raise ValueError(f"{stage.measure} of {one.run_id} is {one[stage.measure]!r}, no number")
    return runs.assign(**{stage.measure: numbers})[numbers.notna()]


def read_curve(path: Path) -> pd.DataFrame:
    """The curve of one run, a live one too: whole lines only, of a step that was run twice the
    later line."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        curve = pd.read_csv(io.StringIO(text[: text.rfind("\n") + 1]))
    except (pd.errors.ParserError, pd.errors.EmptyDataError):
        curve = pd.DataFrame()
    if "step" not in curve:
        raise ValueError(f"{path} is no curve of a run")
    return curve.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)


def is_curve(path: Path) -> bool:
    """Whether a file has begun to be the curve of a run."""
    try:
        read_curve(path)
    except ValueError:
        return False
    return True


def read_curves(stage_name: str) -> pd.DataFrame:
    """The curves of a stage's runs, below each other, from experiments/log_curves_<stage>.csv.
    Raises ValueError."""
    path = curves_path(stage_name)
    if not whole_rows(path):
        raise ValueError(f"{path} is not there; python scripts/run_stage.py {stage_name} makes it")
    curves = pd.read_csv(path, dtype={"run_id": str, "variant": str})
    for name in curves.columns.difference(["run_id", "variant"]):
        if not pd.api.types.is_numeric_dtype(curves[name]):
            raise not_whole(path, f"not every {name} is a number")
    return curves


def planned_seconds(curve: pd.DataFrame, num_iterations: float, seconds: float) -> list[float]:
    """How much of its seconds of training a run has used at each point of its curve, by its share
    of the steps: the same float for the same share, however many steps there are."""
    a_step = Fraction(seconds) / int(num_iterations)
    return [float(a_step * int(step)) for step in curve.step]


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Replaces a file by a table at one stroke; numbers come back as they were."""
    write_whole(path, table.to_csv(index=False))


def published_curves(stage_name: str) -> dict[str, pd.DataFrame]:
    """The published curves of a stage as text, by run_id. Raises ValueError."""
    lines = whole_rows(curves_path(stage_name))
    if not lines:
        return {}
    if not {"run_id", "step"} <= lines[0].keys():
        raise not_whole(curves_path(stage_name), "it has no columns run_id and step")
    read_curves(stage_name)  # whose numbers are numbers
    return dict(list(pd.DataFrame(lines).groupby("run_id", sort=False)))


def curves_of_logs(rows: pd.DataFrame, logs: Path, stay: set[str]) -> dict[str, pd.DataFrame]:
    """The curves in `logs`, by run_id, of rows that did not just begin, without those that stay as
    they are published. Raises ValueError."""
    curves = {}
    new = rows[(rows.status != "running") & ~rows.run_id.isin(stay)]
    for run in new.itertuples():
        path = logs / f"{run.run_id}.csv"
        if path.is_file() and (run.status == "ok" or is_curve(path)):
            curve = read_curve(path)
            curve[["run_id", "variant", "seed"]] = run.run_id, run.variant, int(run.seed)
            curves[run.run_id] = curve
    return curves


def curves_of_rows(stage_name: str, rows: pd.DataFrame, logs: Path) -> list[pd.DataFrame]:
    """The curves of rows of a stage that did not just begin: what is published, and of `logs` those
    whose rows are not published with a result. Raises ValueError."""
    kept = {}
    if curves_path(stage_name).exists():
        kept = dict(list(read_curves(stage_name).groupby("run_id", sort=False)))
    curves = kept | curves_of_logs(rows, logs, kept.keys() & settled(stage_name))
    return [curves[run_id] for run_id in rows[rows.status != "running"].run_id if run_id in curves]


def split(stage_name: str, logs: Path) -> tuple[int, int]:
    """Writes both files of a stage; returns how many runs and how many curves they hold. Raises
    ValueError, OSError."""
    lock = Path(f"{os.path.realpath(RESULTS)}.lock")  # another run_stage.py may end now, too
    with locked(lock) if RESULTS.exists() else contextlib.nullcontext():
        there, table = published_rows(stage_name), stage_table(stage_name)
        filled = {name for row in table for name, cell in row.items() if cell}
        kept = filled | setting_columns() | {name for row in there.values() for name in row}
        text = table_text({name: row[name] for name in row if name in kept} for row in table)
        rows = frame_of(text, f"{results_path(stage_name)} with {RESULTS}")
        curves = published_curves(stage_name)
        curves |= curves_of_logs(rows, logs, curves.keys() & settled(stage_name))

        write_whole(os.path.realpath(results_path(stage_name)), text)  # a link stays one
        if curves:
            points = pd.concat(curves.values(), ignore_index=True)
            names = list(dict.fromkeys(["run_id", "variant", "seed", *points]))
            write_table(points[names], os.path.realpath(curves_path(stage_name)))
    return len(rows), len(curves)


def main(argv: list[str] | None = None) -> int:
    """Publishes stages; exit code 0, or 2 with a sentence for each that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("stage", nargs="*", help="only these")
    parser.add_argument("--log-dir", type=Path, default=Path("logs"), help="folder of the curves")
    args = parser.parse_args(argv)
    code = 0
    try:
        names = args.stage or stages_here()
    except ValueError as error:
        names = []
        code = refused(error)
    for name in names:
        try:
            runs, curves = split(name, args.log_dir)
            print(f"{name}: {runs} runs, {curves} curves")
        except (OSError, ValueError) as error:
            code = refused(error)
    return code


def refused(error: Exception) -> int:
    """Says what cannot be published; the exit code."""
    print(f"split_results.py: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
