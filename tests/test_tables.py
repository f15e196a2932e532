"""The table of results: what many runs, and a spreadsheet, may do to it."""

import contextlib
import csv
import os
import stat
import time

from filelock import FileLock
import pytest

from store import files, tables
from store.contract import ConfigError
from store.tables import update_results


def read(path):
    """{run_id: row}, as csv reads it."""
    with open(path, newline="") as file:
        return {row["run_id"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path, kind):
    path = tmp_path / "n"
    if kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    before = os.lstat(path)
    with pytest.raises(ConfigError, match="is no regular file.*name another, or none"):
        update_results(path, [{"run_id": "a"}])
    after = os.lstat(path)
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)


def test_a_link_that_leads_nowhere_is_made_a_table_or_refused(tmp_path):
    path = tmp_path / "r.csv"
    path.symlink_to("there.csv")
    update_results(path, [{"run_id": "a"}])
    assert path.is_symlink() and list(read(tmp_path / "there.csv")) == ["a"]
    path.unlink()
    path.symlink_to("r.csv")
    with contextlib.suppress(ConfigError):  # as Python 3.13 sees it, there is no file yet
        update_results(path, [{"run_id": "a"}])


def test_none_is_no_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    update_results("none", [{"run_id": "a"}])
    assert list(tmp_path.iterdir()) == []


def test_a_cell_of_any_length_spoils_nothing(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("run_id,note\nold," + "x" * 200_000 + "\n")  # of an earlier version
    update_results(path, [{"run_id": "a", "note": "y" * 30_000}])
    update_results(path, [{"run_id": "a", "status": "ok"}])
    table = read(path)
    assert table["a"]["note"] == "y" * 1000 + "... (cut)" and table["a"]["status"] == "ok"
    assert len(table["old"]["note"]) == 200_000


def test_a_stray_quote_swallows_no_row(tmp_path, capsys):
    path = tmp_path / "r.csv"
    path.write_text('run_id,note,loss\na,fine,1\nb,"torn,2\nc,fine,3\n,nameless,4\nd,"x\ny",5\n')
    update_results(path, [{"run_id": "e", "loss": 6}])
    assert {name: row["loss"] for name, row in read(path).items()}.keys() >= {"a", "c", "e"}
    kept = (tmp_path / "r.csv.unread").read_text()
    assert 'b,"torn,2' in kept and ",nameless,4" in kept
    assert "lines that are no rows of it are now in" in capsys.readouterr().err
    before = path.read_text()
    update_results(path, [{"run_id": "e", "loss": 6}])
    assert path.read_text() == before and (tmp_path / "r.csv.unread").read_text() == kept


def test_blank_lines_are_no_header(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("\n\nrun_id,loss\n\na,1\n\n")
    update_results(path, [{"run_id": "b"}])
    assert path.read_text() == "run_id,loss\na,1\nb,\n" and len([*tmp_path.glob("*.unread")]) == 0


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("names", ["run_id,note,loss", "note,run_id,loss"])
def test_two_stray_quotes_swallow_no_row(tmp_path, names, mark):
    """Between them a reader of CSV sees one cell, in which the rows are."""
    path = tmp_path / "r.csv"
    runs = [("a", '"torn', 1), ("b", "fine", 2), ("c", 'torn"', 3), ("d", "fine", 4)]
    rows = [f"{x},{y},{z}\n" if names.startswith("run") else f"{y},{x},{z}\n" for x, y, z in runs]
    path.write_text(f"{mark}{names}\n{''.join(rows)}", encoding="utf-8")
    update_results(path, [{"run_id": "e", "loss": 6}])
    assert {"b", "d", "e"} <= {*read(path)} <= {"b", "c", "d", "e"}
    assert rows[0] in (tmp_path / "r.csv.unread").read_text()


def test_rows_that_are_no_utf_8_or_have_too_many_cells_are_kept_aside(tmp_path):
    path = tmp_path / "r.csv"
    path.write_bytes(b"loss,run_id\n1,a\n2,b,more\n3,\xff\n4,\n5,e\n")
    update_results(path, [{"run_id": "f"}])
    assert list(read(path)) == ["a", "e", "f"]
    path.write_bytes(b"run_id,note\na,fine\nb,\xff\n")
    update_results(path, [{"run_id": "c"}])
    assert list(read(path)) == ["a", "c"]
    unread = (tmp_path / "r.csv.unread").read_bytes()
    assert unread == b"2,b,more\n3,\xff\n4,\nb,\xff\n"


def test_a_row_that_is_cut_off_is_no_row(tmp_path, capsys):
    """Else what is left of it would count as the run's."""
    path = tmp_path / "r.csv"
    path.write_text("run_id,status,loss\na,ok,1\nb,ok\nc,ok,2.")
    assert tables.read_table(path) == ("run_id,status,loss\na,ok,1\nb,ok,\nc,ok,2.\n", [])
    path.write_text("run_id,status,loss\na,ok,1\nb,ok")
    update_results(path, [{"run_id": "c"}])
    assert list(read(path)) == ["a", "c"] and "1 lines that are no rows" in capsys.readouterr().err
    assert (tmp_path / "r.csv.unread").read_text() == "b,ok"
    path.write_text('run_id,status,loss\na,"o\nk"')
    assert tables.read_table(path)[0] == "run_id,status,loss\n", "over two lines neither"
    path.write_text("run_id,status,loss\na,ok,1\n")
    update_results(path, [{"run_id": "b", "status": "ok", "loss": 2}])
    assert read(path)["b"]["loss"] == "2"


def test_what_a_spreadsheet_saves_takes_no_row(tmp_path):
    """Names and cells in quotes, and blank columns behind."""
    path = tmp_path / "r.csv"
    path.write_text('"run_id","loss"\n"a",1\n"b",2\n')
    update_results(path, [{"run_id": "a", "loss": 3}])
    assert path.read_text() == "run_id,loss\na,3\nb,2\n"
    path.write_text("run_id,loss,,\na,1,,mine\nb,2,,\n")
    for run in "c", "d":
        update_results(path, [{"run_id": run}])
    assert path.read_text() == "run_id,loss,,\na,1,,mine\nb,2,,\nc,,,\nd,,,\n"
    assert not (tmp_path / "r.csv.unread").exists()


def test_many_rows_are_one_write(tmp_path, monkeypatch):
    path, written = tmp_path / "r.csv", []
    whole = files.write_whole
    monkeypatch.setattr(tables, "write_whole", lambda *args: written.append(whole(*args)))
    update_results(path, [{"run_id": "a", "loss": 1}, {"run_id": "b"}, {"run_id": "a", "x": 2}])
    assert len(written) == 1
    assert read(path)["a"] == {"run_id": "a", "loss": "1", "x": "2"} and len(read(path)) == 2


def test_what_cannot_be_kept_aside_stays_in_the_table(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("run_id,loss\na,1\nthis,is,precious\n")
    (tmp_path / "r.csv.unread").mkdir()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="r.csv.unread is no regular file"):
        update_results(path, [{"run_id": "b"}])
    assert path.read_bytes() == before


def test_a_spreadsheet_may_have_saved_it(tmp_path):
    path = tmp_path / "r.csv"
    path.write_bytes("\ufeffloss,run_id,note\r\n1,a,ä\r\n".encode())
    update_results(path, [{"run_id": "b", "loss": 2}])
    assert read(path) == {
        "a": {"run_id": "a", "loss": "1", "note": "ä"},
        "b": {"run_id": "b", "loss": "2", "note": ""},
    }
    path.write_text("run_id;loss\na;1\n")
    with pytest.raises(ConfigError, match="a column run_id"):
        update_results(path, [{"run_id": "b"}])


def test_a_new_column_leaves_blanks_in_the_rows_before(tmp_path):
    path = tmp_path / "r.csv"
    update_results(path, [{"run_id": "a", "note": 'one,\n"two"'}])
    update_results(path, [{"run_id": "b", "loss": 1.5}])
    assert read(path) == {
        "a": {"run_id": "a", "note": 'one,\n"two"', "loss": ""},
        "b": {"run_id": "b", "note": "", "loss": "1.5"},
    }


def test_a_lock_that_stays_held_is_waited_for_aloud_and_given_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "LOCK_PATIENCE", 0.05)
    monkeypatch.setattr(files, "LOCK_LIMIT", 0.2)
    with FileLock(f"{tmp_path}/r.csv.lock"):
        with pytest.raises(ConfigError, match="was held by another process for 0.2 s"):
            update_results(tmp_path / "r.csv", [{"run_id": "a"}])
    assert "waiting for " in capsys.readouterr().err
    update_results(tmp_path / "r.csv", [{"run_id": "a"}])
    assert list(read(tmp_path / "r.csv")) == ["a"]


def test_a_long_table_takes_a_row_quickly(tmp_path):
    """Seconds of this process alone: others may have the machine."""
    path = tmp_path / "r.csv"
    path.write_text("run_id,note\n" + "".join(f"r{i},{'x' * 200}\n" for i in range(100_000)))
    began = time.process_time()
    update_results(path, [{"run_id": "r70000", "note": "changed"}])
    assert time.process_time() - began < 1.5
    table = read(path)
    assert len(table) == 100_000 and table["r70000"]["note"] == "changed"
    assert tables.LONGEST_CELL == 1000
