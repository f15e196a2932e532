"""The table of results, which many runs write to."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from store.contract import ConfigError, renamed
from store.files import write_whole


def update_results(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Merges rows into the results table, one per run_id, under a lock: columns are united.

    Without rows it only tries whether that could be done. Raises ConfigError.
    """
    path = Path(path).resolve()  # a link stays one
    try:
        with FileLock(f"{path}.lock"):  # which makes the folder
            old = path.read_bytes().decode() if path.exists() else ""
            table = {}
            for row in csv.DictReader(io.StringIO(old, newline="")):
                table[row["run_id"]] = renamed(row)
            for row in map(renamed, rows):
                cells = {name: int(v) if isinstance(v, bool) else v for name, v in row.items()}
                table[row["run_id"]] = table.get(row["run_id"], {}) | cells
            if rows:
                write_whole(path, table_text(table.values()))
    except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"RESULTS_CSV={path}: cannot be written as a table with a column run_id ({error!r}); "
            "name another"
        ) from None


def table_text(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as CSV, under a header of all their columns."""
    header = {column: column for row in rows for column in row}
    lines = []
    for row in (header, *rows):
        line = io.StringIO()
        csv.DictWriter(line, header).writerow(row)  # to \r\n: only so does Python 3.11 quote a \r
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)
