"""The table of results, which many runs write to."""

import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from store.contract import RENAMED, RUN_ID_PATTERN, ConfigError, renamed
from store.files import locked, regular, write_whole

QUOTED = re.compile(rb'"[^"]*"')
LONGEST_CELL = 1000  # characters; what is longer is cut, so that one run spoils no table
csv.field_size_limit(2**31 - 1)  # others' tables may hold any


def update_results(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Merges rows into the results table, one per run_id, under a lock: columns are united.

    A path of none is no table. Lines that are no rows of it are kept beside it, in <path>.unread.
    Without rows it only tries whether that could be done. Raises ConfigError.
    """
    if str(path) == "none":
        return
    path = Path(path).resolve()  # a link stays one
    try:
        regular(path)
        with locked(Path(f"{path}.lock")):
            if path.exists() and not is_plain(path):
                write_whole(path, rewritten(path))
            for row in rows:
                write_whole(path, merged(path, row))
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise ConfigError(
            f"RESULTS_CSV={path}: cannot be written as a table with a column run_id "
            f"({str(error)[:200]}); name another, or none"
        ) from None


def is_plain(path: Path) -> bool:
    """Whether a table's header has run_id first and no name of an earlier version."""
    with open(path, "rb") as file:
        header = cells_of(next(rows_of(file)))
    return header[:1] == ["run_id"] and RENAMED.keys().isdisjoint(header)


def rewritten(path: Path) -> str:
    """A table, also as a spreadsheet saves it, with run_id first, under the names of today."""
    text = path.read_text("utf-8-sig")
    table = [renamed(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
    if text.strip() and not (table and "run_id" in table[0]):
        raise KeyError("no column run_id")
    return table_text({"run_id": row["run_id"]} | row for row in table)


def cells_of(row: bytes) -> list[str]:
    """The cells of one row of a table. Raises csv.Error where it is not one."""
    rows = [*csv.reader(io.StringIO(row.decode(), newline=""), strict=True)]
    if len(rows) > 1:
        raise csv.Error(f"a quote that nothing closes, in the row that begins {row[:40]!r}")
    return rows[0] if rows else []


def rows_of(file: BinaryIO) -> Iterator[bytes]:
    """The rows of a table, each with its end of line: a quoted cell may hold ends of lines."""
    row, quotes = [], 0
    for line in file:
        row.append(line)
        quotes += line.count(b'"')
        if quotes % 2 == 0:
            yield b"".join(row)
            row, quotes = [], 0
    yield b"".join(row)


def sound_rows(row: bytes, width: int, unread: list[bytes]) -> list[bytes]:
    """[row] where it fits a table of so many columns; of one that does not, the lines that do.

    The other lines are added to `unread`.
    """
    unquoted = QUOTED.sub(b"", row) if b'"' in row else row
    if unquoted.count(b",") == width - 1 and row[:1] not in b',"':
        return [row.rstrip(b"\r\n") + b"\n"]
    sound = []
    lines = row.splitlines(keepends=True)
    for part in [row] if fits(row, width) else lines:
        if fits(part, width):
            missing = width - len(cells_of(part))
            sound.append(part.rstrip(b"\r\n") + b"," * missing + b"\n")
        elif part.strip():
            unread.append(part)
    return sound


def fits(row: bytes, width: int) -> bool:
    """Whether these are the cells of a run in a table of so many columns."""
    try:
        cells = cells_of(row)
    except (UnicodeDecodeError, csv.Error):
        return False
    if not cells or not re.fullmatch(RUN_ID_PATTERN, cells[0]):
        return False
    is_short = len(cells) < width and len(row.splitlines()) == 1  # by another program, or cut off
    return len(cells) == width or is_short


def merged(path: Path, row: dict[str, Any]) -> Iterator[bytes]:
    """The rows of a table with one more, or with that one brought up to date.

    Only the header and the row of the same run_id are taken apart, since there may be many. Lines
    that are no rows are set aside before the last of it is given, so before the table is replaced.
    """
    unread = []
    cells = {name: cell_of(value) for name, value in renamed(row).items()}
    cells = {"run_id": cells["run_id"]} | cells
    with open(path, "rb") if path.exists() else io.BytesIO() as file:
        rows = rows_of(file)
        header = cells_of(next(rows))
        columns = list(dict.fromkeys([*header, *cells]))
        yield row_text(columns).encode()
        key, more = f"{cells['run_id']},".encode(), b"," * (len(columns) - len(header))
        written = False
        for old in rows:
            for sound in sound_rows(old, len(header), unread):
                if not sound.startswith(key):
                    yield sound[:-1] + more + b"\n"
                elif not written:
                    written = True
                    known = dict(zip(header, cells_of(sound)))
                    yield table_row(columns, known | cells)
        if not written:
            yield table_row(columns, cells)
    set_aside_lines(path, unread)


def table_row(columns: Iterable[str], cells: dict[str, Any]) -> bytes:
    return row_text(cells.get(name, "") for name in columns).encode(errors="backslashreplace")


def cell_of(value: Any) -> Any:
    """What stands in the table for a value."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and len(value) > LONGEST_CELL:
        return f"{value[:LONGEST_CELL]}... (cut)"
    return value


def set_aside_lines(path: Path, unread: list[bytes]) -> None:
    """Adds lines that are no rows to <path>.unread, and says so."""
    if unread:
        aside = regular(path.with_name(f"{path.name}.unread"))
        with open(aside, "ab") as file:
            file.writelines(unread)
        print(
            f"warning: {path}: {len(unread)} lines that are no rows of it are now in {aside}",
            file=sys.stderr,
        )


def row_text(cells: Iterable[Any]) -> str:
    """One row as CSV."""
    line = io.StringIO()
    csv.writer(line).writerow(cells)  # to \r\n: only so does Python 3.11 quote a \r
    return line.getvalue().removesuffix("\r\n") + "\n"


def table_text(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as CSV, under a header of all their columns."""
    rows = list(rows)
    header = {column: column for row in rows for column in row}
    return "".join(
        row_text(row.get(column, "") for column in header) for row in (header, *rows) if header
    )
