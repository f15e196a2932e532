"""The table of results, which many runs write to."""

import codecs
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
RUN_ID = re.compile(RUN_ID_PATTERN)
LONGEST_CELL = 1000  # characters; what is longer is cut, so that one run spoils no table
csv.field_size_limit(2**31 - 1)  # others' tables may hold any


def update_results(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Merges rows into the results table, one per run_id, under a lock: columns are united.

    A path of none is no table. Lines that are no rows of it are kept beside it, in <path>.unread.
    Without rows it only tries whether that could be done. Raises ConfigError.
    """
    if str(path) == "none":
        return
    try:
        path = Path(path).resolve()  # a link stays one
        regular(path)
        with locked(Path(f"{path}.lock")):
            if path.exists() and not is_plain(path):
                text, unread = read_table(path)
                set_aside_lines(path, unread)
                write_whole(path, text)
            if rows:
                write_whole(path, merged(path, rows))
    except (OSError, RuntimeError, KeyError, ValueError, csv.Error) as error:
        raise ConfigError(
            f"RESULTS_CSV={path}: cannot be written as a table with a column run_id "
            f"({str(error)[:200]}); name another, or none"
        ) from None


def is_plain(path: Path) -> bool:
    """Whether a table's header has run_id first, not in quotes, and no name of an earlier
    version."""
    with open(path, encoding="latin-1") as file:  # which takes any bytes
        header = file.readline().strip().split(",")
    return header[0] == "run_id" and RENAMED.keys().isdisjoint(header)


def read_table(path: Path) -> tuple[str, list[bytes]]:
    """(text, unread): a table, also as a spreadsheet saves it, with run_id first and under the
    names of today; and the lines of the file that are no rows of it. Raises ValueError."""
    unread, sound = [], []
    try:
        with open(path, "rb") as file:
            rows = filter(bytes.strip, rows_of(file))
            header = cells_of(next(rows, b"").removeprefix(codecs.BOM_UTF8))
            if not header:
                return "", unread
            at = header.index("run_id")
            for row in rows:
                sound += sound_rows(row, len(header), unread, at)
    except (ValueError, csv.Error):
        raise ValueError(f"{path} is no table of results: it has no column run_id") from None
    if is_plain(path):
        return row_text(header) + b"".join(sound).decode(), unread
    blank = {"run_id": ""} | renamed(dict.fromkeys(header, ""))
    cells = [(blank | renamed(dict(zip(header, cells_of(row))))).values() for row in sound]
    return "".join(map(row_text, [blank, *cells])), unread


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


def sound_rows(row: bytes, width: int, unread: list[bytes], at: int = 0) -> list[bytes]:
    """[row] where it fits a table of so many columns, with run_id at this one; of one that does
    not, the lines that do.

    The other lines are added to `unread`.
    """
    lines = row.splitlines(keepends=True)
    if len(lines) == 1 and at == 0 and row[:1] not in b',"' and is_text(row):
        unquoted = QUOTED.sub(b"", row) if b'"' in row else row
        if unquoted.count(b",") == width - 1:
            return [row.rstrip(b"\r\n") + b"\n"]
    sound = []
    is_whole = not any(looks_like_a_row(line, width, at) for line in lines[1:])
    for part in [row] if is_whole and fits(row, width, at) else lines:
        if fits(part, width, at):
            missing = width - len(cells_of(part))
            sound.append(part.rstrip(b"\r\n") + b"," * missing + b"\n")
        elif part.strip():
            unread.append(part)
    return sound


def is_text(row: bytes) -> bool:
    """Whether bytes are UTF-8."""
    try:
        return row.isascii() or bool(row.decode())
    except UnicodeDecodeError:
        return False


def looks_like_a_row(line: bytes, width: int, at: int) -> bool:
    """Whether a line within quotes is a row of its own, which a stray quote would swallow."""
    cells = line.split(b",")
    if len(cells) < width or width < 3 or not is_text(line):
        return False
    return RUN_ID.fullmatch(cells[at].decode()) is not None


def fits(row: bytes, width: int, at: int) -> bool:
    """Whether these are the cells of a run in a table of so many columns."""
    try:
        cells = cells_of(row)
    except (UnicodeDecodeError, csv.Error):
        return False
    if len(cells) <= at or not RUN_ID.fullmatch(cells[at]):
        return False
    # by another program it may be short, but not cut off
    return len(cells) == width or len(cells) < width and row.find(b"\n") + 1 == len(row)


def merged(path: Path, rows: list[dict[str, Any]]) -> Iterator[bytes]:
    """The rows of a table with these too, of which it may have some, which are brought up to date.

    Only the header and the rows of the same run_id are taken apart, since there may be many. Lines
    that are no rows are set aside before the last of it is given, so before the table is replaced.
    """
    unread, new = [], {}
    for row in rows:
        cells = {name: cell_of(value) for name, value in renamed(row).items()}
        cells.pop("history", None)  # a curve, which the summary alone keeps
        key = cells["run_id"].encode()
        new[key] = new.get(key, {}) | cells
    left = dict(new)
    with open(path, "rb") if path.exists() else io.BytesIO() as file:
        old_rows = rows_of(file)
        header = cells_of(next(old_rows)) or ["run_id"]
        names = [name for cells in new.values() for name in cells if name not in header]
        columns = [*header, *dict.fromkeys(names)]  # a spreadsheet's may share a name, or no name
        yield row_text(columns).encode()
        more = b"," * (len(columns) - len(header))
        for old in old_rows:
            for sound in sound_rows(old, len(header), unread):
                key = sound[:-1].split(b",", 1)[0]
                if key not in new:
                    yield sound[:-1] + more + b"\n"
                elif key in left:  # of two rows of one run the first is kept
                    known = dict(zip(header, cells_of(sound)))
                    yield table_row(columns, known | left.pop(key))
        for cells in left.values():
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
