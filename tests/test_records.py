"""Records: the table loses nothing, files are whole or absent, a run leaves what it promises."""

import csv
import json
import math
import multiprocessing
import os
import re

import pytest
from conftest import launch, row, tiny

import rebuild_results
from harness.failures import record_refusal
from harness.files import RunFiles
from harness.ranks import Ranks
from harness.records import Records
from store.tables import update_results
from store.contract import CURVE, ConfigError, DataError
from store.files import write_whole
from store.source import HARNESS, OPS, source_hash, text_hash
import train_gpt
from train_gpt import Config

AWKWARD = [
    "a,b",
    'say "no"',
    "two\nlines",
    "carriage\rreturn",
    "both\r\n",
    "=1+1",
    " spaces ",
    "é 日本",
    "'",
    "\t",
]


def read(path):
    """The table as {run_id: row}; fails where it is torn."""
    with open(path, newline="", encoding="utf-8") as file:
        columns, *rows = csv.reader(file)
    assert len(set(columns)) == len(columns) and all(len(row) == len(columns) for row in rows)
    table = [dict(zip(columns, row)) for row in rows]
    assert len({row["run_id"] for row in table}) == len(table)
    return {row["run_id"]: row for row in table}


def names(folder):
    """What a folder holds, locks left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return sorted(str(path.relative_to(folder)) for path in files)


def strict(path):
    """JSON without the NaN and Infinity that only Python takes."""

    def refuse_constant(name):
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text(), parse_constant=refuse_constant)


def start(folder, run_id="r", rank=0, facts=None, **changes):
    """The open records of a run."""
    cfg = tiny(**dict(log_dir=f"{folder}/logs", results_csv=f"{folder}/results.csv") | changes)
    records = Records(cfg, run_id, CURVE, train_gpt.SOURCE, Ranks(rank))
    records.open({"changes": "LR=1"} | (facts or {}), ["mind the gap"])
    return records


def use_all(records):
    """Every method that a run calls after open()."""
    records.print("a line")
    records.point({"step": 0, "val_loss": 4.0})
    records.point({"step": 1, "train_loss": 0.1 + 0.2, "tokens_per_sec": 1 / 3})
    records.close("ok", final_loss=1 / 3)


def rebuild(folder, results, code=0):
    assert rebuild_results.main(["--log-dir", str(folder), "--results", str(results)]) == code


# The table


def test_many_processes_at_once_lose_no_row_and_no_reader_sees_a_torn_table(tmp_path):
    path, fork = tmp_path / "new/results.csv", multiprocessing.get_context("fork")
    barrier = fork.Barrier(32)

    def work(i):
        barrier.wait()
        update_results(path, [{"run_id": f"run{i}", "note": f"{i}," * 300, f"own{i % 4}": i}])

    children = [fork.Process(target=work, args=(i,)) for i in range(32)]
    for child in children:
        child.start()
    seen = [0]
    while any(child.is_alive() for child in children):
        if path.exists():
            seen.append(len(read(path)))
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 32
    assert seen == sorted(seen) and len(set(seen)) > 2
    table = read(path)
    assert table.keys() == {f"run{i}" for i in range(32)}
    for i in range(32):
        own = {f"own{k}": str(i) if i % 4 == k else "" for k in range(4)}
        assert table[f"run{i}"] == {"run_id": f"run{i}", "note": f"{i}," * 300} | own
    assert names(tmp_path) == ["new/results.csv"]


def test_a_run_has_one_row_of_its_latest_values(tmp_path):
    path = tmp_path / "results.csv"
    update_results(
        path, [{"run_id": "a", "status": "running", "lr": 0.1}, {"run_id": "b", "status": "ok"}]
    )
    update_results(path, [{"run_id": "a", "status": "ok", "loss": 1 / 3}])
    update_results(path, [])
    assert list(read(path).values()) == [
        {"run_id": "a", "status": "ok", "lr": "0.1", "loss": repr(1 / 3)},
        {"run_id": "b", "status": "ok", "lr": "", "loss": ""},
    ]
    assert path.read_text().startswith("run_id,status,lr,loss\n")


def test_cells_come_back_as_they_went(tmp_path):
    path = tmp_path / "results.csv"
    row = {"run_id": "a", "none": None, "yes": True, "no": False, "zero": 0, "text": ""} | {
        f"column {i}{text}": text for i, text in enumerate(AWKWARD)
    }
    update_results(path, [row])
    expected = row | {"none": "", "yes": "1", "no": "0", "zero": "0"}
    for _ in range(3):
        assert read(path) == {"a": expected}
        update_results(path, [{"run_id": "a", "zero": 0}])
    update_results(path, [{"run_id": "a", "yes": None}])
    assert read(path)["a"]["yes"] == ""


def test_a_torn_last_line_spoils_no_other_row_and_columns_in_any_order_are_read(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("loss,run_id,status\n0.5,a,ok\n0.2")
    update_results(path, [{"run_id": "b", "status": "ok", "loss": 0.1}])
    whole = {
        "a": {"loss": "0.5", "run_id": "a", "status": "ok"},
        "b": {"loss": "0.1", "run_id": "b", "status": "ok"},
    }
    assert {run_id: row for run_id, row in read(path).items() if run_id} == whole


# Whole files


def test_write_whole_replaces_a_file_and_leaves_nothing_else(tmp_path):
    for text in "old", "new,\r\n", "":
        write_whole(tmp_path / "a/b.json", text)
        assert (tmp_path / "a/b.json").read_bytes() == text.encode()
    assert names(tmp_path) == ["a/b.json"]


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch, name):
    write_whole(tmp_path / "x.json", "old")

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, name, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "x.json", "new")
    assert (tmp_path / "x.json").read_text() == "old"
    assert names(tmp_path) == ["x.json"]


# A run


def test_a_run_leaves_log_curve_summary_and_row(tmp_path, capsys):
    records = start(tmp_path, facts={"params_total": 5})
    assert (
        read(tmp_path / "results.csv")["r"]["status"]
        == strict(tmp_path / "logs/r.json")["status"]
        == "running"
    )
    use_all(records)
    assert names(tmp_path) == ["logs/r.csv", "logs/r.json", "logs/r.txt", "results.csv"]

    rule, log = "=" * 100, (tmp_path / "logs/r.txt").read_text()
    sources = f"{rule}\n{train_gpt.SOURCE}\n{rule}\n{HARNESS}{OPS}\n{rule}\n"
    assert log.startswith(f"{sources}Python ") and len(train_gpt.SOURCE) > 10000
    settings, _, lines = log.removeprefix(sources).partition(f"\n{rule}\n")
    assert json.loads(settings.partition("settings: ")[2])["params_total"] == 5
    assert lines.startswith(
        "run_id:r\nchanges: LR=1\nwarning: mind the gap\na line\n---\nstatus: ok\n"
    )
    assert f"\nfinal_loss: {1 / 3:.6g}\n" in lines
    assert capsys.readouterr().out == lines

    curve = (tmp_path / "logs/r.csv").read_text().splitlines()
    assert curve == [
        ",".join(CURVE),
        "0,,,,4.0,,,,,",
        "1,,,0.30000000000000004,,,,,0.3333333333333333,",
    ]

    summary = strict(tmp_path / "logs/r.json")
    assert summary["run_id"] == "r" and summary["status"] == "ok" and summary["final_loss"] == 1 / 3
    assert summary["source_sha"] == source_hash(train_gpt.SOURCE)
    assert summary["harness_sha"] == text_hash(HARNESS)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", summary["started"])
    assert set(vars(tiny())) <= summary.keys()
    row = read(tmp_path / "results.csv")["r"]
    assert row.keys() == summary.keys() - {"history"}
    assert summary["history"] == {
        "step": [0, 1],
        "train_loss": [None, 0.1 + 0.2],
        "val_loss": [4.0, None],
        "train_time": [None, None],
        "tokens_per_sec": [None, 1 / 3],
    }
    lines = (tmp_path / "logs/r.json").read_text().splitlines()
    assert len(lines) == len(summary) + 2, "a line for each name"
    assert (row["params_total"], row["bias"], row["embed_lr"], float(row["final_loss"])) == (
        "5",
        "0",
        "0.0036",  # auto, worked out
        1 / 3,
    )


def test_another_rank_writes_nothing(tmp_path, capsys):
    use_all(start(tmp_path, rank=1))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_run_id_that_exists_is_refused_and_its_files_stay(tmp_path):
    use_all(start(tmp_path))
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with pytest.raises(ConfigError) as error:
        start(tmp_path, seed=1)
    assert (
        str(error.value)
        == f"RUN_ID=r: {tmp_path}/logs/r.txt exists; RESUME=auto goes on with it, or choose another"
    )
    record_refusal(
        error.value,
        Config,
        {"RUN_ID": "r", "LOG_DIR": f"{tmp_path}/logs", "RESULTS_CSV": f"{tmp_path}/results.csv"},
    )
    assert before == {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}


@pytest.mark.parametrize("place", ["log_dir", "results_csv"])
def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        ConfigError, match=f"{place.upper()}={tmp_path}/file/x.*: cannot be written .*name another"
    ):
        start(tmp_path, **{place: f"{tmp_path}/file/x"})
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("table", ["r.csv", "r/live", "r/results.csv"])
def test_a_table_among_the_files_of_the_run_is_refused_and_not_made(tmp_path, table):
    """Not by the row of the refusal either; r/live.lock is what the run holds."""
    table = tmp_path / "logs" / table
    with pytest.raises(ConfigError, match="is a file of RUN_ID=r itself") as error:
        start(tmp_path, results_csv=f"{table}")
    env = {"RUN_ID": "r", "LOG_DIR": f"{tmp_path}/logs", "RESULTS_CSV": f"{table}"}
    record_refusal(error.value, Config, env)
    assert not table.exists() and strict(tmp_path / "logs/r.json")["status"] == "config"


def test_a_damaged_summary_is_told_when_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/r.txt").write_text("step:1/8 train_loss:2\n")
    (tmp_path / "logs/r.json").write_text('{"status": "run')
    start(tmp_path, resume="auto", run_id="r").close("ok")
    said = capsys.readouterr().err
    assert (
        f"{tmp_path}/logs/r.json is no summary of a run; name another; resumes are counted" in said
    )
    assert read(tmp_path / "results.csv")["r"]["resumes"] == "0"


def test_a_log_dir_that_is_a_file_ends_a_run_with_code_2(tmp_path, settings):
    (tmp_path / "logs").write_text("in the way")
    codes, output = launch(settings)
    assert codes == [2] and f"config: LOG_DIR={tmp_path}/logs" in output, output
    assert row(settings)["status"] == "config", "the table can be written"


def test_a_summary_that_cannot_be_written_costs_no_row(tmp_path, monkeypatch, capsys):
    """LOG_DIR may be full where the table is not."""
    records = start(tmp_path)
    whole = write_whole

    def full(path, content):
        if path == records.files.json:
            raise OSError(28, "No space left on device")
        whole(path, content)

    monkeypatch.setattr("harness.records.write_whole", full)
    records.close("ok", final_loss=1.5)
    said = capsys.readouterr().out
    assert f"row: {tmp_path}/results.csv, but {tmp_path}/logs/r.json was not written: [Er" in said
    one = read(tmp_path / "results.csv")["r"]
    assert (one["status"], one["final_loss"]) == ("ok", "1.5") and records.lost


def test_a_table_that_cannot_be_written_leaves_a_summary_that_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    table = f"{tmp_path}/file/results.csv"
    with pytest.raises(ConfigError) as error:
        start(tmp_path, results_csv=table)
    record_refusal(
        error.value, Config, {"RUN_ID": "r", "LOG_DIR": f"{tmp_path}/logs", "RESULTS_CSV": table}
    )
    assert strict(tmp_path / "logs/r.json")["status"] == "config"


def test_times_have_their_unit_in_the_last_words(tmp_path, capsys):
    start(tmp_path).close("ok", warm_up_time=1.5, data_wait=0.5, step_avg=2.0, final_loss=3.0)
    out = capsys.readouterr().out
    assert "warm_up_time: 1.5 s\ndata_wait: 0.5 s\nstep_avg: 2 ms\nfinal_loss: 3\n" in out


def test_the_history_is_the_whole_curve_or_its_rows_evenly_spaced(tmp_path):
    run = RunFiles(tmp_path, "r")
    assert run.history() == {}
    rows = [f"{i},,,0.5,{'2.5' if i % 50 == 0 else ''},,,,1e-05,,nan" for i in range(1, 4001)]
    text = "\n".join([",".join([*CURVE, "val_accuracy"]), *rows])
    run.curve.write_text(f"{text}\n4001,torn")
    told = run.history()
    assert {"step": int, "train_loss": float, "val_loss": float} == {
        name: type(told[name][-1]) for name in ("step", "train_loss", "val_loss")
    }
    assert told["step"] == sorted({*range(4000, 0, -5), *range(50, 4001, 50)})
    assert told["val_accuracy"] == [None] * 800 and {*told["tokens_per_sec"]} == {1e-05}
    run.curve.write_text("\n".join([*text.split("\n")[:900], "no,row", ""]))
    assert set(run.history()) <= {*told} and run.last_step() == 899


def test_a_diverged_run_leaves_strict_json_and_a_row_that_can_be_rebuilt(tmp_path):
    start(tmp_path).close("diverged", final_loss=math.nan, best_loss=math.inf, ppl=None)
    assert strict(tmp_path / "logs/r.json")["status"] == "diverged"
    rebuild(tmp_path / "logs", tmp_path / "rebuilt.csv")
    assert read(tmp_path / "rebuilt.csv") == read(tmp_path / "results.csv")


# A run that does not start


def test_a_refused_run_leaves_a_summary_and_a_row(tmp_path):
    env = {
        "LOG_DIR": f"{tmp_path}/logs",
        "RESULTS_CSV": f"{tmp_path}/results.csv",
        "NOTE": "why\n",
        "RUN_ID": "mine",
    }
    record_refusal(ConfigError("LR=-1: no"), Config, env)
    record_refusal(DataError("no shard"), Config, env | {"RUN_ID": "../x"})
    record_refusal(ConfigError("a second time"), Config, env | {"RUN_ID": "mine"})
    mine, other = read(tmp_path / "results.csv").values()
    assert (mine["run_id"], mine["status"], mine["error"], mine["note"]) == (
        "mine",
        "config",
        "LR=-1: no",
        "why\n",
    )
    assert (other["status"], other["error"]) == ("data", "no shard")
    assert re.fullmatch(r"refused-\d{8}-\d{6}-[0-9a-f]{4}", other["run_id"])
    assert names(tmp_path) == ["logs/mine.json", f"logs/{other['run_id']}.json", "results.csv"]
    assert strict(tmp_path / "logs/mine.json") == mine


def test_a_refusal_that_cannot_be_written_is_no_second_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    record_refusal(
        ConfigError("LR=-1: no"),
        Config,
        {"LOG_DIR": f"{tmp_path}/file", "RESULTS_CSV": f"{tmp_path}/file/x.csv"},
    )
    assert names(tmp_path) == ["file"]


# scripts/rebuild_results.py


def test_rebuilt_table_is_the_one_that_the_runs_wrote(tmp_path, capsys):
    for i, note in enumerate(AWKWARD):
        records = start(tmp_path, f"r{i}", note=note, bias=True)
        if i % 2:
            records.close("ok", final_loss=i / 3, mfu=None, bad_steps=i)
    record_refusal(
        ConfigError("LR=-1: no"),
        Config,
        {"LOG_DIR": f"{tmp_path}/logs", "RESULTS_CSV": f"{tmp_path}/results.csv"},
    )
    (tmp_path / "logs/.shard_hashes.json").write_text('{"/data/x.bin:1:2": "ab"}')
    (tmp_path / "logs/list.json").write_text("[1]")
    (tmp_path / "logs/torn.json").write_text((tmp_path / "logs/r1.json").read_text()[:100])
    capsys.readouterr()
    rebuild(tmp_path / "logs", tmp_path / "rebuilt.csv")
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/rebuilt.csv: 11 runs of 13 files\n"
    skipped = ["list.json is skipped, it is no summary", "torn.json is skipped, it holds no JSON"]
    assert err.count("\n") == 2 and all(f"{tmp_path}/logs/{text}" in err for text in skipped)
    assert read(tmp_path / "rebuilt.csv") == read(tmp_path / "results.csv")
    assert len(read(tmp_path / "rebuilt.csv")) == 11


def test_rebuilding_orders_new_rows_by_start_and_keeps_rows_without_a_summary(tmp_path):
    for run_id, started in ("a", "2026-01-03"), ("b", "2026-01-01"), ("c", "2026-01-02"):
        write_whole(
            tmp_path / f"{run_id}.json",
            json.dumps({"run_id": run_id, "started": started, "loss": 1}),
        )
    rebuild(tmp_path, tmp_path / "results.csv")
    assert list(read(tmp_path / "results.csv")) == ["b", "c", "a"]
    update_results(
        tmp_path / "other.csv",
        [{"run_id": name, "note": "kept", "loss": 2} for name in ("gone", "a")],
    )
    rebuild(tmp_path, tmp_path / "other.csv")
    table = read(tmp_path / "other.csv")
    assert list(table) == ["gone", "a", "b", "c"]
    assert [table[name][key] for name in ("gone", "a") for key in ("note", "loss")] == [
        "kept",
        "2",
        "kept",
        "1",
    ]


@pytest.mark.parametrize("text", [None, '{"x.bin:1:2": "ab"}', '{"run_id": "to'])
def test_without_a_summary_nothing_is_rebuilt(tmp_path, capsys, text):
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / "logs/pipe.json")
    if text:
        (tmp_path / "logs/x.json").write_text(text)
    rebuild(tmp_path / "logs", tmp_path / "results.csv", code=3)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"rebuild_results.py: error: no summary of a run in {tmp_path}/logs; name its --log-dir"
    )
    assert not (tmp_path / "results.csv").exists()
