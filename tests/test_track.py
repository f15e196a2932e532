"""scripts/track.py: trackers get every value of a curve once, live or afterwards, and none can harm
another."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields

import pytest
from conftest import launch
from filelock import FileLock

import track
from harness.settings import ROOT
from store.contract import CURVE
from store.files import write_whole
import train_gpt

HEAD = "step,tokens,epoch,train_loss,val_loss,lr,grad_norm,train_time,tokens_per_sec,data_wait"
ROWS = [
    "0,0,0.0,,7.5,,,0.0,,0.0",
    "1,64,0.125,7.25,,0.01,3.5,0.5,128.0,0.25",
    "2,128,0.25,6.5,6.75,0.01,inf,1.0,128.0,0.25",
]
RUNNING = {
    "run_id": "toy",
    "stage": "first",
    "status": "running",
    "started": "2026-01-01T00:00:00+00:00",
    "error": None,
    "lr": 0.01,
    "ffn": "moe",
    "bias": False,
    "embed_lr": None,
}
ENDED = RUNNING | {"status": "ok", "final_loss": 6.75, "moe_dead": 0, "mfu": None}
FAST = "--follow", "--every", "0.05", "--patience"


def leave(tmp_path, rows=ROWS, head=HEAD, summary=ENDED):
    """Writes curve and summary as the trainer does: whole."""
    for kind, text in ("csv", "\n".join([head, *rows, ""])), ("json", json.dumps(summary)):
        write_whole(tmp_path / f"logs/toy.{kind}", text)


@contextlib.contextmanager
def tracking(tmp_path, *args, to="tensorboard", env=None):
    """The script as a process of its own, in which neither torch nor the trainer can be
    imported."""
    for name in "torch", "train_gpt":
        (tmp_path / f"fakes/{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"fakes/{name}.py").write_text("raise SystemExit('slow to import')\n")
    command = [
        sys.executable,
        ROOT / "scripts/track.py",
        "toy",
        "--to",
        to,
        "--log-dir",
        "logs",
        *args,
    ]
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(tmp_path / "fakes"),
    } | (env or {})
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def tracked(*args, **kwargs):
    """It from start to end: (exit code, standard output, standard error)."""
    with tracking(*args, **kwargs) as process:
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err


def scalars(tmp_path):
    """{tag: [(step, value), ...]} of the event files, in the order in which they came."""
    return {
        tag: [(event.step, event.value) for event in events]
        for tag, events in events_of(tmp_path)[0].items()
    }


def events_of(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "logs/toy/tb"), {"scalars": 0}).Reload()
    return {tag: found.Scalars(tag) for tag in found.Tags()["scalars"]}, found


def read(path):
    return path.read_text() if path.exists() else ""


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def hashes(tmp_path):
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "logs").glob("toy.*")
    }


def test_tensorboard_has_what_the_curve_has(tmp_path):
    head = HEAD + ",aux_coef,aux_0,load_min_0,dead_0"
    leave(
        tmp_path,
        [row + cells for row, cells in zip(ROWS, [",,,,", ",,,,", ",0.01,1.0,0.125,2"])],
        head,
    )
    before = hashes(tmp_path)
    assert tracked(tmp_path) == (0, "toy (ok): tensorboard has it up to step 2\n", "")
    assert hashes(tmp_path) == before and len(before) == 2
    assert [path.name for path in (tmp_path / "logs/toy").iterdir()] == ["tb"]
    known, found = events_of(tmp_path)
    assert scalars(tmp_path) == {
        "tokens": [(0, 0), (1, 64), (2, 128)],
        "epoch": [(0, 0), (1, 0.125), (2, 0.25)],
        "train/loss": [(1, 7.25), (2, 6.5)],
        "val/loss": [(0, 7.5), (2, 6.75)],
        "lr": [(1, pytest.approx(0.01)), (2, pytest.approx(0.01))],
        "grad_norm": [(1, 3.5), (2, float("inf"))],
        "train_time": [(0, 0), (1, 0.5), (2, 1)],
        "tokens_per_sec": [(1, 128), (2, 128)],
        "data_wait": [(0, 0), (1, 0.25), (2, 0.25)],
        "moe/aux_coef": [(2, pytest.approx(0.01))],
        "moe/aux_0": [(2, 1)],
        "moe/load_min_0": [(2, 0.125)],
        "moe/dead_0": [(2, 2)],
        "final/final_loss": [(2, 6.75)],
        "final/moe_dead": [(2, 0)],
    }
    assert [event.wall_time for event in known["train/loss"]] == [1767225600.5, 1767225601]
    hparams = found.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert (
        b"embed_lr" not in hparams
        and b"final_loss" not in hparams
        and b"bias" in hparams
        and b"moe" in hparams
    )
    files = sorted((tmp_path / "logs/toy/tb").iterdir())
    assert tracked(tmp_path)[0] == 0 and sorted((tmp_path / "logs/toy/tb").iterdir()) == files


def test_a_live_run_arrives_once_and_the_follower_ends_with_it(tmp_path):
    """It starts before the run, and meets lines of which it sees one half first."""
    rows = [
        ROWS[0],
        *(
            f"{step},{64 * step},0.1,{step / 8},,0.01,1.0,{step / 2},128.0,0.0"
            for step in range(1, 30)
        ),
    ]

    def train():
        time.sleep(0.3)
        leave(tmp_path, [], summary=RUNNING)
        with open(tmp_path / "logs/toy.csv", "a") as curve:
            for step, row in enumerate(rows):
                for part in row[:9], row[9:] + "\n":
                    curve.write(part)
                    curve.flush()
                    time.sleep(0.02)
                if step == 14:
                    seen.wait(20)
        write_whole(tmp_path / "logs/toy.json", json.dumps(ENDED))

    trainer, seen = threading.Thread(target=train), threading.Event()
    with tracking(tmp_path, *FAST, "5") as process:
        trainer.start()
        wait_for(lambda: "14," in read(tmp_path / "logs/toy/tb/sent.csv"))
        assert scalars(tmp_path)["tokens"][-1] == (14, 896)
        seen.set()
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "toy (ok): tensorboard has it up to step 29\n", "")
    found = scalars(tmp_path)
    assert found["train/loss"] == [(step, step / 8) for step in range(1, 30)]
    assert found["val/loss"] == [(0, 7.5)] and found["final/final_loss"] == [(29, 6.75)]


def test_of_a_resumed_run_no_value_comes_twice(tmp_path):
    """Neither within a follower nor from one to the next; a value that is new at an old step does
    come."""
    leave(tmp_path, summary=RUNNING)
    again = [*ROWS[:1], "1,64,0.125,7.25,7.125,0.01,3.5,0.5,64.0,0.25"]
    with tracking(tmp_path, *FAST, "5") as process:
        wait_for(lambda: read(tmp_path / "logs/toy/tb/sent.csv"))
        leave(tmp_path, ROWS[:1], summary=RUNNING | {"resumes": 1})
        time.sleep(0.2)
        leave(tmp_path, again, summary=RUNNING | {"resumes": 1, "status": "preempted"})
        assert process.wait(20) == 0
    leave(tmp_path, again + ROWS[2:] + ["3,192,0.375,6.25,,0.01,3.5,1.5,128.0,0.25"])
    assert tracked(tmp_path, *FAST, "5")[0] == 0
    found = scalars(tmp_path)
    assert found["train/loss"] == [(1, 7.25), (2, 6.5), (3, 6.25)]
    assert found["val/loss"] == [(0, 7.5), (2, 6.75), (1, 7.125)]
    assert found["tokens_per_sec"] == [(1, 128), (2, 128), (3, 128)]


def test_a_killed_run_ends_and_one_that_is_quiet_does_not(tmp_path):
    leave(tmp_path, summary=RUNNING)
    with FileLock(tmp_path / "logs/toy/live.lock"), tracking(tmp_path, *FAST, "0.6") as process:
        wait_for(lambda: read(tmp_path / "logs/toy/tb/sent.csv"))
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2.5)
    (tmp_path / "logs/toy/live.lock").unlink()
    with tracking(tmp_path, *FAST, "0.6") as process:
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (
        0,
        "toy (killed): tensorboard has it up to step 2\n",
        "",
    )
    assert not (tmp_path / "logs/toy/live.lock").exists()
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_follower_in_good_order(tmp_path, number):
    leave(tmp_path, summary=RUNNING)
    with tracking(tmp_path, *FAST, "5") as process:
        wait_for(lambda: read(tmp_path / "logs/toy/tb/sent.csv"))
        os.killpg(process.pid, number)  # as a terminal does: every process of it
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (
        0,
        "toy (running): tensorboard has it up to step 2\n",
        "",
    )


def wandb_records(path):
    """Of a .wandb file: chunks in blocks of 32 KiB, as in LevelDB's log, each with checksum, size
    and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += -at % 2**15
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record, at = record + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, last
            yield Record.FromString(record)
            record = b""


def test_wandb_offline(tmp_path):
    leave(tmp_path, summary=ENDED | {"status": "diverged"})
    before = hashes(tmp_path)
    code, out, err = tracked(
        tmp_path, to="wandb", env={"WANDB_MODE": "offline", "WANDB_NAME": "mine"}
    )
    assert code == 0 and out == "toy (diverged): wandb has it up to step 2\n", err
    assert hashes(tmp_path) == before
    (file,) = (tmp_path / "logs/toy/wandb").glob("offline-run-*/*.wandb")
    records = [*wandb_records(file)]
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_id, run.display_name, run.run_group) == (
        "train_gpt",
        "toy",
        "mine",
        "first",
    )
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config.pop("_wandb") is not None
    assert config == {
        "run_id": "toy",
        "stage": "first",
        "started": RUNNING["started"],
        "lr": 0.01,
        "ffn": "moe",
        "bias": False,
    }
    history = [
        {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [
        (row["step"], row["tokens"], row.get("train/loss"), row.get("val/loss")) for row in history
    ] == [(0, 0, None, 7.5), (1, 64, 7.25, None), (2, 128, 6.5, 6.75)]
    summary = {
        item.key: json.loads(item.value_json)
        for record in records
        for item in record.summary.update
    }
    assert summary["final_loss"] == 6.75 and summary["status"] == "diverged"
    assert [
        record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"
    ] == [1]
    assert not {record.WhichOneof("record_type") for record in records} & {
        "files",
        "environment",
        "stats",
    }
    left = [
        path
        for path in file.parent.rglob("*")
        if path.is_file() and not path.match("logs/debug*.log")
    ]
    assert left == [file]


FAKE = "class Settings:\n    def __init__(self, **kwargs): pass\n"
RUN = """class Run:
    def define_metric(self, *args, **kwargs): pass
    def log(self, values): {log}
    summary = {{}}
    def finish(self, exit_code): {finish}
def init(**kwargs): return Run()
"""


@pytest.mark.parametrize(
    "module, code, says",
    [
        (
            FAKE + "def init(**kwargs): raise OSError('no network\\nand more')\n",
            1,
            "wandb failed (OSError: no network);",
        ),
        (
            FAKE + RUN.format(log="raise ValueError('no')", finish="pass"),
            1,
            "wandb failed (ValueError: no);",
        ),
        (
            FAKE + RUN.format(log="pass", finish="raise SystemExit(3)"),
            1,
            "wandb failed (SystemExit: 3);",
        ),
        (
            FAKE + RUN.format(log="import os; os.kill(os.getpid(), 9)", finish="pass"),
            1,
            "wandb was ended by signal 9;",
        ),
        (
            FAKE + "import time\ndef init(**kwargs): time.sleep(60)\n",
            1,
            "wandb hung and was ended;",
        ),
        (
            "raise ModuleNotFoundError('No module named wandb')\n",
            2,
            "wandb cannot be imported (No module named wandb): pip install wandb;",
        ),
    ],
    ids=["init", "log", "finish", "killed", "hangs", "absent"],
)
def test_a_broken_tracker_costs_no_other_its_data(tmp_path, module, code, says):
    leave(tmp_path)
    before = hashes(tmp_path)
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes/wandb.py").write_text(module)
    found = tracked(tmp_path, "--patience", "0.8", to="wandb,tensorboard")
    command = (
        "once that is mended, python scripts/track.py toy --to wandb --log-dir logs sends what it "
        "lacks"
    )
    assert found == (
        code,
        "toy (ok): tensorboard has it up to step 2\n",
        f"track.py: error: {says} {command}\n",
    )
    assert scalars(tmp_path)["train/loss"] == [(1, 7.25), (2, 6.5)] and hashes(tmp_path) == before


def test_a_second_follower_leaves_it_to_the_first(tmp_path):
    leave(tmp_path)
    with FileLock(tmp_path / "logs/toy/tb/track.lock"):
        assert tracked(tmp_path, *FAST, "0.6") == (
            0,
            "toy: another follower feeds tensorboard\n",
            "",
        )
    assert not [*(tmp_path / "logs/toy/tb").glob("events*")]


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["toy", "--to", "tensorboard,mlflow"], "--to 'mlflow': choose some of tensorboard,wandb"),
        (
            ["../toy", "--to", "wandb"],
            "RUN_ID '../toy': 1 to 100 letters, digits, _, and within . -",
        ),
        (
            ["toy", "--to", "wandb", "--every", "0"],
            "--every 0 --patience 60: both must be more than 0 seconds",
        ),
    ],
)
def test_wrong_arguments_are_refused(capsys, argv, sentence):
    with pytest.raises(SystemExit) as stopped:
        track.main(argv)
    assert stopped.value.code == 2 and capsys.readouterr().err.endswith(f"error: {sentence}\n")


def test_a_run_that_is_not_there_is_told(tmp_path, capsys):
    argv = ["other", "--to", "tensorboard", "--log-dir", str(tmp_path / "logs")]
    assert track.main(argv) == 2
    assert capsys.readouterr().err == (
        f"track.py: error: no run other in {tmp_path}/logs; the newest there: none; "
        "name another --log-dir\n"
    )
    leave(tmp_path)
    (tmp_path / "logs/older.json").write_text("{}")
    os.utime(tmp_path / "logs/older.json", (1, 1))
    assert track.main([*argv, *FAST, "0.1"]) == 2
    assert capsys.readouterr().err.endswith("/logs; the newest there: toy, older\n")
    assert track.main(["older", *argv[1:]]) == 2
    assert "older.json is no summary of a run; name another" in capsys.readouterr().err


def test_the_trainers_own_files_are_understood(tmp_path, settings):
    """Every figure is told from the settings, and every column of experts is named so."""
    code, output = launch(
        settings | {"FFN": "relu2,moe", "BALANCE_LOG_INTERVAL": 4, "RUN_ID": "toy"}
    )
    assert code == [0], output
    assert tracked(tmp_path)[0] == 0
    found, log = scalars(tmp_path), (tmp_path / "logs/toy.txt").read_text()
    summary = json.loads((tmp_path / "logs/toy.json").read_text())
    at_start, _ = json.JSONDecoder().raw_decode(log.rpartition("\nsettings: ")[2])
    known, figures = track.settings_and_figures(summary)
    assert {*figures} & {*at_start} <= {"status", "resumes"} and {*known} <= {*at_start}
    assert not {*figures} & {field.name for field in fields(train_gpt.Config)}
    header, *rows = (tmp_path / "logs/toy.csv").read_text().splitlines()
    experts = {tag for tag in found if tag.startswith("moe/")}
    own = {name for name in header.split(",")[len(CURVE) :] if name != "val_accuracy"}
    assert experts == {f"moe/{name}" for name in own} and len(experts) == 7
    assert found["val/accuracy"][-1] == found["final/val_accuracy"][0]
    assert found["val/loss"][-1] == found["final/final_loss"][0] and len(found["tokens"]) == len(
        rows
    )
    assert found["final/final_loss"][0][1] == pytest.approx(summary["final_loss"])


def test_the_trainer_starts_it_beside_itself_and_ends_well_whatever_becomes_of_it(
    tmp_path, settings
):
    """tensorboard is fed to the end while wandb is broken; without TRACKERS nothing is started."""
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes/wandb.py").write_text("raise OSError('no network')\n")
    settings |= {"PYTHONPATH": tmp_path / "fakes", "PATH": os.environ["PATH"], "HOME": tmp_path}
    assert launch(settings)[0] == [0] and not (tmp_path / "logs/toy/track.txt").exists()
    plain = (tmp_path / "logs/toy/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "logs")
    codes, output = launch(settings | {"TRACKERS": "tensorboard,wandb"})
    assert codes == [0] and json.loads(read(tmp_path / "logs/toy.json"))["status"] == "ok", output
    assert (tmp_path / "logs/toy/model.safetensors").read_bytes() == plain
    wait_for(lambda: "tensorboard has it up to step 8" in read(tmp_path / "logs/toy/track.txt"), 30)
    wait_for(lambda: "wandb failed (OSError: no network)" in read(tmp_path / "logs/toy/track.txt"))
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == list(range(1, 9))
