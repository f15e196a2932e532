"""scripts/bench.py: all figures are there and agree with each other; nothing is left behind."""

import json
import os
import subprocess
import sys

import pytest

import bench
from harness.settings import ROOT

SETTINGS = {
    "RUN_ID": "of-test-bench",
    "DEVICE": "cpu",
    "DTYPE": "float32",
    "COMPILE": "0",
    "N_LAYER": "1",
    "N_HEAD": "2",
    "N_EMBD": "32",
    "VOCAB_SIZE": "64",
    "SEQUENCE_LENGTH": "16",
    "BATCH_SIZE": "4",
    "DEVICE_BATCH_SIZE": "2",
}
STEP = {
    "step_time",
    "tokens_per_sec",
    "flops",
    "mfu",
    "forward_backward",
    "reduce_and_optimizer",
    "records",
    "records_share",
}
PEAK = {"product_2048x2048x2048", "product_32x32x128", "product_32x128x32", "peak", "share_of_peak"}
LOADER = {"data_wait_warm", "read_warm", "data_wait_cold", "read_cold"}
CHECKPOINT = {"checkpoint_size", "checkpoint_stall_first", "checkpoint_stall", "checkpoint_written"}
START = {"start_to_validation", "start_to_step"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(report, table, working folder, folder of temporary files) of one run of everything."""
    folder, temporary = tmp_path_factory.mktemp("cwd"), tmp_path_factory.mktemp("temporary")
    env = (
        os.environ
        | SETTINGS
        | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    )
    command = [
        sys.executable,
        ROOT / "scripts" / "bench.py",
        "--steps",
        "2",
        "--warmup",
        "1",
    ]
    run = subprocess.run(
        [*command, "--json", "made/report.json"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")
    return json.loads((folder / "made" / "report.json").read_text()), run.stdout, folder, temporary


def test_every_promised_figure_is_measured(measured):
    report, table, _, _ = measured
    figures = report["figures"]
    assert figures.keys() == STEP | PEAK | LOADER | CHECKPOINT | START
    assert all(figures[name]["value"] > 0 for name in figures.keys() - LOADER - {"mfu"})
    assert figures["read_warm"]["value"] > 0 and figures["data_wait_warm"]["value"] >= 0
    assert all(
        row["min"] <= row["value"] <= row["max"]
        for row in figures.values()
        if row["value"] is not None
    )
    assert [line.split()[0] for line in table.splitlines()[1:]] == list(figures)


def test_what_is_not_known_is_blank(measured):
    figures = measured[0]["figures"]
    assert figures["mfu"] == {
        "value": None,
        "min": None,
        "max": None,
        "unit": "%",
    }  # no peak is published for this CPU
    cold = {figures[name]["value"] is None for name in ("data_wait_cold", "read_cold")}
    assert (
        len(cold) == 1
    )  # both or neither: some file systems cannot drop a file from the page cache


def test_figures_agree(measured):
    value = {name: row["value"] for name, row in measured[0]["figures"].items()}
    flops_per_token = 6 * (64 * 32 + 12 * 32**2) + 12 * 32 * 16
    assert value["tokens_per_sec"] * value["step_time"] / 1000 == pytest.approx(4 * 16)
    assert value["flops"] * 1e12 == pytest.approx(value["tokens_per_sec"] * flops_per_token)
    assert value["forward_backward"] + value["reduce_and_optimizer"] == pytest.approx(100)
    assert value["share_of_peak"] == pytest.approx(100 * value["flops"] / value["peak"])
    assert all(
        0 < value[name] < 100
        for name in ("forward_backward", "reduce_and_optimizer", "share_of_peak")
    )
    assert value["records_share"] == pytest.approx(value["records"] / value["step_time"] / 10)
    assert value["checkpoint_stall"] <= value["checkpoint_written"]
    assert value["start_to_validation"] < value["start_to_step"]


def test_report_says_what_ran_where(measured):
    report = measured[0]
    assert report["changes"]["N_EMBD"] == 32
    assert "--steps 2" in report["command"]
    assert report["dtype"] == "float32" and report["ranks"] == 1
    assert report["device"].startswith("cpu: ")
    assert {"git", "dirty", "finished", "versions"} <= report.keys()


def test_nothing_is_left_behind(measured):
    _, _, folder, temporary = measured
    assert [path.name for path in folder.rglob("*")] == ["made", "report.json"]
    assert [
        path for path in temporary.iterdir() if not path.name.startswith("torchinductor_")
    ] == []  # torch's cache
    records = [path for place in ("logs", "experiments") for path in (ROOT / place).rglob("*")]
    assert not [path for path in records if SETTINGS["RUN_ID"] in path.name]
    assert all(
        SETTINGS["RUN_ID"] not in path.read_text() for path in records if path.name == "results.csv"
    )


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"N_EMBD": "33"},
            "config: N_EMBD=33 needs a multiple of 4, for N_HEAD=2 and POS=rotary: 32 or 36",
        ),
        (
            {"BATCH_SIZE": "3"},
            "config: BATCH_SIZE=3: must be a multiple of DEVICE_BATCH_SIZE=2 x 1 ranks",
        ),
        ({"LEARNING_RATE": "1"}, "config: LEARNING_RATE is no setting; the name here is LR"),
    ],
)
def test_bad_settings_are_refused(capsys, change, sentence):
    assert bench.main([], SETTINGS | change) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(sentence) and captured.out == ""


@pytest.mark.parametrize("argv", [["--only", "steps"], ["--steps", "0"], ["--warmup", "0"]])
def test_bad_arguments_are_refused(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv, SETTINGS)
    assert stopped.value.code == 2
    assert "--only takes some of checkpoint,loader,peak,start,step" in capsys.readouterr().err


def test_two_models_are_timed_in_turn(capsys):
    """One of twice the layers takes longer; the parts add up to the step."""
    twice = ["--against", "N_LAYER=1", "D_FF=64"]
    assert bench.main(["--steps", "5", *twice], SETTINGS | {"N_LAYER": "6", "D_FF": "512"}) == 0
    table = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    kinds = "ours", "other", "ratio"
    parts = [
        f"{part}_{kind}" for part in ("step", "forward_backward", "optimizer") for kind in kinds
    ]
    assert list(table) == parts
    assert float(table["forward_backward_ratio"][1]) > 1
    with pytest.raises(SystemExit):
        bench.main(["--against", "N_LAYER"], SETTINGS)
    assert "--against takes settings like" in capsys.readouterr().err
    assert bench.main(["--against", "N_EMBD=33"], SETTINGS) == 2
