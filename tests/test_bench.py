"""scripts/bench.py: all figures are there and agree with each other; nothing is left behind."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import bench
import bench_versions
import bench_worker
from harness.settings import ROOT
from store.contract import ConfigError
import train_gpt

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
            "config: N_HEAD=2 needs N_EMBD=33 to be a multiple of 4 with POS=rotary: 32 or 36",
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


def test_two_models_are_timed_in_turn(capsys, monkeypatch):
    """By a clock on which the first part of a step takes N_LAYER seconds, and the second 8."""
    seconds, made = [0.0], []
    forward_backward, update = train_gpt.accumulate_gradients, train_gpt.update

    def slow_forward_backward(state, cfg, *batch):
        made.append(cfg.n_layer)
        seconds[0] += cfg.n_layer
        return forward_backward(state, cfg, *batch)

    def slow_update(*args):
        result = update(*args)
        seconds[0] += 8
        return result

    monkeypatch.setattr(bench_worker, "now", lambda device: seconds[0])
    monkeypatch.setattr(train_gpt, "accumulate_gradients", slow_forward_backward)
    monkeypatch.setattr(train_gpt, "update", slow_update)
    options = ["--steps", "2", "--warmup", "1", "--against", "N_LAYER=1"]
    assert bench.main(options, SETTINGS | {"N_LAYER": "6"}) == 0
    table = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    found = {name: [float(cell.replace(",", "")) for cell in table[name][1:4]] for name in table}
    assert found == {
        "step_ours": [14000] * 3,
        "step_other": [9000] * 3,
        "step_ratio": [pytest.approx(14 / 9, rel=1e-3)] * 3,
        "forward_backward_ours": [6000] * 3,
        "forward_backward_other": [1000] * 3,
        "forward_backward_ratio": [6] * 3,
        "optimizer_ours": [8000] * 3,
        "optimizer_other": [8000] * 3,
        "optimizer_ratio": [1] * 3,
    }
    assert made in ([1, 6, 6, 1, 1, 6], [6, 1, 1, 6, 6, 1]), "in turn, neither always first"
    with pytest.raises(SystemExit):
        bench.main(["--against", "N_LAYER"], SETTINGS)
    assert "--against takes settings like" in capsys.readouterr().err
    assert bench.main(["--against", "N_EMBD=33"], SETTINGS) == 2
    assert bench.main(["--against", "NLAYERS=2"], SETTINGS) == 2
    assert "config: --against NLAYERS: no setting; python" in capsys.readouterr().err


# Another version

SLOW = """

ours = train_step


def train_step(*args):
    time.sleep(0.05)
    return ours(*args)
"""
COUNTED = """

ours = train_step


def train_step(*args):
    with open(os.environ["STEPS"], "a") as file:
        file.write(f"{os.getpid()} begins\\n")
    stats = ours(*args)
    with open(os.environ["STEPS"], "a") as file:
        file.write(f"{os.getpid()} ends\\n")
    return stats
"""


def copied(folder, text):
    """A version with the scripts of this one and more text at the end of its train_gpt.py."""
    shutil.copytree(
        ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "train_gpt.py").write_text((ROOT / "train_gpt.py").read_text() + text)
    return folder


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository of two commits: a slow version, then one that tells of its steps."""
    folder = copied(tmp_path_factory.mktemp("repository"), SLOW)
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for text in (SLOW, COUNTED):
        (folder / "train_gpt.py").write_text((ROOT / "train_gpt.py").read_text() + text)
        for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "version"]):
            subprocess.run(["git", *who, *words], cwd=folder, check=True)
    return folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files, of this process and those that it starts."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


def left_in(folder):
    """What lies there but torch's cache."""
    return [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")]


def test_a_version_of_git_is_timed_in_turn(repository, temporary, tmp_path, monkeypatch, capsys):
    """One that sleeps takes longer, in the part where it sleeps; its numbers are the same."""
    monkeypatch.setattr(bench_versions, "ROOT", repository)
    argv = ["--against-file", "HEAD~1", "--steps", "5", "--warmup", "1"]
    assert bench.main([*argv, "--json", str(tmp_path / "report.json")], SETTINGS) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    figures = report["figures"]
    parts = ("step", "forward_backward", "optimizer")
    names = [f"{part}_{kind}" for part in parts for kind in ("ours", "other", "ratio")]
    for part in ("tokens_per_sec", "peak_memory", "loss"):
        names += [f"{part}_ours", f"{part}_other"]
    assert list(figures) == names
    value = {name: figures[name]["value"] for name in names}

    assert value["step_ratio"] < 1 and value["forward_backward_ratio"] < 1
    assert figures["forward_backward_other"]["min"] >= 50
    for name in bench.NAMES:
        speed = value[f"tokens_per_sec_{name}"] * value[f"step_{name}"] / 1000
        assert speed == pytest.approx(4 * 16)
        assert 0.05 < value[f"peak_memory_{name}"] < 4
    assert value["loss_ours"] == value["loss_other"] == pytest.approx(math.log(64), abs=0.5)

    shas = report["source_sha"]
    assert shas["ours"] == train_gpt.source_hash(train_gpt.SOURCE) != shas["other"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-3]] == names
    assert lines[-3:] == [
        f"ours: source_sha {shas['ours']}",
        f"other: source_sha {shas['other']}, HEAD~1, commit {report['other']['git'][:12]}",
        "losses of all 6 steps: equal to the bit",
    ]
    assert left_in(temporary) == []


def test_a_version_that_crashes_ends_the_other(temporary, tmp_path, monkeypatch, capfd):
    """Its sentence is told after its traceback, with the place; no process stays."""
    folder = copied(tmp_path / "version", "\nprint(1)\nraise RuntimeError('an idea')\n")
    pids = []
    start = subprocess.Popen

    def remembered(*args, **kwargs):
        process = start(*args, **kwargs)
        pids.append(process.pid)
        return process

    monkeypatch.setattr(bench_versions.subprocess, "Popen", remembered)
    assert bench.main(["--against-file", str(folder)], SETTINGS) == 1
    out, err = capfd.readouterr()
    *trace, said = err.splitlines()
    file = folder / "train_gpt.py"
    line = len(file.read_text().splitlines())
    assert said == f"crash: {folder}: RuntimeError: an idea ({file}:{line})"
    assert trace[-1] == "RuntimeError: an idea" and out == ""
    assert len(pids) == 2 and not any(map(is_there, pids))


def is_there(pid):
    """Whether there is such a process."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@pytest.mark.parametrize("moment", ["it builds", "steps"])
def test_nothing_is_left_of_an_interrupted_comparison(repository, temporary, tmp_path, moment):
    """Neither of Ctrl-C nor of a launcher's signal: no process and no files. Until then there was
    one step at a time, A B B A."""
    steps = tmp_path / "steps"
    steps.touch()
    command = [sys.executable, repository / "scripts" / "bench.py", "--against-file", "HEAD"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        [*command, "--steps", "100000"],
        env=env | SETTINGS | {"STEPS": str(steps)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell has it ignored in what it runs behind
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        deadline = time.monotonic() + 60
        ready = temporary.rglob if moment == "it builds" else None
        while not (list(ready("train_gpt.py")) if ready else steps.read_text().count("ends") > 7):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM if ready else signal.SIGINT)
        # what a worker says it says here, so this ends with the last of them
        out, _ = run.communicate(timeout=20)
    assert (run.returncode, out) == (-signal.SIGINT, "interrupted\n")
    assert left_in(temporary) == []

    if moment == "steps":
        begun = [line.split()[0] for line in steps.read_text().splitlines()[::2]][:8]
        ended = [line.split()[0] for line in steps.read_text().splitlines()[1::2]][:8]
        a, b = begun[:2]
        assert begun == ended == [a, b, b, a, a, b, b, a] and a != b
        assert not is_there(int(a)) and not is_there(int(b))


@pytest.mark.parametrize(
    "version, change, sentence",
    [
        ("HEAD~no", {}, "config: --against-file HEAD~no: no such file, and no commit of git here"),
        ("{empty}", {}, "config: --against-file {empty}: no such file, and no commit"),
        ("{alone}", {}, "config: --against-file {alone}: it needs scripts/harness/ beside"),
        ("HEAD", {"N_EMBD": "33"}, "config: N_HEAD=2 needs N_EMBD=33 to be a multiple of 4"),
        ("HEAD", {"WORLD_SIZE": "2"}, "config: --against-file measures one process of each"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, capsys, version, change, sentence):
    places = {"empty": tmp_path / "empty", "alone": tmp_path / "train_gpt.py"}
    places["empty"].mkdir()
    places["alone"].touch()
    argv = ["--against-file", version.format(**places)]
    assert bench.main(argv, SETTINGS | change) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(sentence.format(**places)) and captured.out == ""


def test_a_version_is_given_what_can_change_a_step():
    """The environment over our preset; a blank change takes a setting away."""
    env = {"PRESET": "quickstart", "LR": "0.5", "RUN_ID": "x", "SAVE_EVERY": "7", "HOME": "/"}
    given = bench_versions.settings_of(env, {})
    assert given["N_EMBD"] == "192" and given["LR"] == "0.5" and "INPUT_BIN" in given
    assert not {"PRESET", "RUN_ID", "SAVE_EVERY", "HOME"} & given.keys()
    changes = {"N_EMBD": "", "LR": "0.1", "OF_THE_OTHER": "1"}
    changed = bench_versions.settings_of(env, changes)
    del given["N_EMBD"], changes["N_EMBD"]
    assert changed == given | changes


def test_a_setting_that_a_version_does_not_know_is_told():
    with pytest.raises(
        ConfigError, match="^SO_NEW=1 is no setting there; --against SO_NEW= leaves"
    ):
        bench_worker.Steps(train_gpt, {"N_EMBD": "32", "SO_NEW": "1"})


@pytest.mark.parametrize(
    "ours, other, sentence",
    [
        ([2.0, math.nan], [2.0, math.nan], "losses of all 2 steps: equal to the bit"),
        (
            [2.0, 2.0, 1.5],
            [2.0, math.nextafter(2, 3), 1.25],
            "losses of 3 steps: different from step 2 on, by 0.25 at most and 0.25 at the last "
            "(ours - other)",
        ),
    ],
)
def test_losses_are_compared_to_the_bit(ours, other, sentence):
    assert bench_versions.losses_compared(ours, other) == sentence
