"""What is published of a stage, and the runs here that go with it: rows as text.

experiments/results.csv has the runs of this machine. A published row that has a result stays as it
is; other rows are brought up to date by the runs here, which are added. A file that is not whole is
refused, since what it lacks would be lost.
"""

import csv
import functools
import io
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from store.contract import renamed
from store.files import regular
from store.tables import RUN_ID, read_table

RESULTS = Path("experiments/results.csv")
STAGE_NAME = re.compile(r"[\w-][\w.-]{0,99}", re.ASCII)
HAS_RESULT = ("ok", "diverged")  # how a run ends that need not be tried again


def results_path(stage_name: str) -> Path:
    """The file of a stage's results that is for git. Raises ValueError."""
    if not STAGE_NAME.fullmatch(stage_name):
        raise ValueError(
            f"STAGE {stage_name[:100]!r} is no name of a file; nothing of it is published"
        )
    return RESULTS.with_name(f"results_{stage_name}.csv")


def curves_path(stage_name: str) -> Path:
    """The file of a stage's curves that is for git."""
    return RESULTS.with_name(f"log_curves_{stage_name}.csv")


@functools.cache
def say_once(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def whole_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a published file as they stand; [] where there is none. Raises ValueError where
    it is not whole: a cut, a quote or a merge would pass for results."""
    if not path.exists():
        return []
    try:
        with open(regular(path), encoding="utf-8-sig", newline="") as file:
            text = file.read()
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(rows, [])
        lines = [row for row in rows if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise not_whole(path, str(error)) from None
    if text[-1:] != "\n" or "\0" in text or len({*header}) < len(header):
        raise not_whole(path, "it is cut off, or has a NUL or a column twice")
    for row in lines:
        if len(row) != len(header) or row == header:
            raise not_whole(
                path, f"{row[0][:60]!r} begins a row that is none of {len(header)} cells"
            )
    return [renamed(dict(zip(header, row))) for row in lines]


def not_whole(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is published and not whole: {reason[:200]}; git checkout it, mend it, or move it "
        "away and python scripts/split_results.py makes it of the runs here"
    )


def published_rows(stage_name: str) -> dict[str, dict[str, str]]:
    """The published rows of a stage, by run_id. Raises ValueError."""
    path = results_path(stage_name)
    rows = {}
    for row in whole_rows(path):
        run_id = row.get("run_id", "")
        if run_id in rows or row.get("stage") != stage_name:
            raise not_whole(path, f"row {run_id[:60]!r} is in it twice or of another stage")
        rows[run_id] = row
    return rows


def settled(stage_name: str) -> set[str]:
    """The run_ids that are published with a result. Raises ValueError."""
    return {run_id for run_id, row in published_rows(stage_name).items() if has_result(row)}


def own_rows() -> dict[str, dict[str, str]]:
    """The rows of the runs here, by run_id; of two of one run the first. What has no status, or is
    another header, is no run's, which is told. Raises ValueError."""
    rows, odd = {}, []
    if RESULTS.exists():
        for row in csv.DictReader(io.StringIO(readable(RESULTS))):
            has_status = row.get("status") not in (None, "", "status")
            if not has_status or not RUN_ID.fullmatch(row["run_id"]):
                odd.append(row["run_id"])
            else:
                rows.setdefault(row["run_id"], row)
    if odd:
        say_once(f"{RESULTS}: {len(odd)} rows without a status are left out, as {odd[0]!r}")
    return rows


def newer(own: Mapping[str, Mapping], there: Mapping[str, Mapping]) -> list[str]:
    """The run_ids of the runs here that are not published, or without a result. Where another start
    of a run is published with one, that counts, and it is said."""
    known = {run_id for run_id, row in there.items() if has_result(row)}
    others = [
        run_id for run_id in own if run_id in known and is_another(own[run_id], there[run_id])
    ]
    if others:
        say_once(
            f"{RESULTS}: {len(others)} runs are published with a result of another start, as "
            f"{others[0]}; that counts"
        )
    return [run_id for run_id in own if run_id not in known]


def has_result(row: Mapping) -> bool:
    """Whether a run has ended so that it need not be tried again."""
    return row.get("status") in HAS_RESULT


def is_another(one: Mapping, other: Mapping) -> bool:
    """Whether two rows of one run_id are of two starts."""
    return any(one.get(name) != other.get(name) for name in ("started", "status"))


def stage_table(stage_name: str) -> list[dict[str, str]]:
    """The rows of a stage: what is published, and the runs here. Raises ValueError where there is
    none, or where what is published is not whole."""
    there = published_rows(stage_name)
    own = {run_id: row for run_id, row in own_rows().items() if row.get("stage") == stage_name}
    rows = there | {run_id: there.get(run_id, {}) | own[run_id] for run_id in newer(own, there)}
    if not rows:
        raise ValueError(
            f"STAGE {stage_name} has no run in {RESULTS} or {results_path(stage_name).name}; "
            f"python scripts/run_stage.py {stage_name} makes them"
        )
    return [*rows.values()]


def readable(path: Path) -> str:
    """A table as CSV, without what are no rows of it, which is told."""
    try:
        text, unread = read_table(regular(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if unread:
        say_once(f"warning: {path}: {len(unread)} lines are no rows of it and are left out")
    return text


def not_there(path: Path) -> ValueError:
    return ValueError(
        f"{path} is not there; python scripts/run_stage.py makes it, "
        "or rebuild_results.py from logs"
    )


def stages_here() -> list[str]:
    """The stages of the runs here. Raises ValueError where there is no table."""
    if not RESULTS.exists():
        raise not_there(RESULTS)
    names = dict.fromkeys(row.get("stage") for row in own_rows().values())
    return [name for name in names if name]
