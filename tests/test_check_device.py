"""scripts/check_device.py: it finds planted faults, and ends what hangs or crashes and says so."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import run_ranks

import check_device
import device_variants
from device_report import config, held
from harness.settings import ROOT
import train_gpt
from train_gpt import axes

# Faults

WRONG_PRODUCT = """
from ops import products
outer = products.grouped_outer
products.grouped_outer = lambda y, x, offsets: 1.01 * outer(y, x, offsets)
"""

WRONG_RATE = """
import torch.nn.functional as F
attention = F.scaled_dot_product_attention

def too_much(*args, dropout_p=0.0, **kwargs):
    return attention(*args, dropout_p=dropout_p and dropout_p + 1 / 16, **kwargs)

F.scaled_dot_product_attention = too_much
"""

SKIPPED_REDUCTION = """
import os
import torch.distributed as dist
from unittest import mock
import train_gpt
reduce_grads, all_reduce = train_gpt.Optimizer.reduce_grads, dist.all_reduce

def skip(self):
    with mock.patch.object(dist, "all_reduce", lambda tensor: all_reduce(tensor.clone())):
        return reduce_grads(self)

if os.environ.get("RANK") == "1":
    train_gpt.Optimizer.reduce_grads = skip
"""


def check_with(fault, tmp_path, *options):
    """(exit code, {name: (status, value)}, output) of the real command, whose processes have a
    fault."""
    (tmp_path / "sitecustomize.py").write_text(fault)
    path = os.pathsep.join(map(str, [tmp_path, ROOT, ROOT / "scripts"]))
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "scripts" / "check_device.py", "--device", "cpu"]
    report = tmp_path / "report.json"
    done = subprocess.run(
        [*command, "--json", report, *options], env=env, capture_output=True, text=True
    )
    results = json.loads(report.read_text())["results"]
    found = {f"{r['group']}.{r['name']}": (r["status"], r["value"]) for r in results}
    return done.returncode, found, done.stdout + done.stderr


def test_sound_operations_pass(tmp_path):
    code, found, output = check_with("", tmp_path, "--only", "ops")
    assert code == 0, output
    assert {status for status, _ in found.values()} <= {"ok", "left out"} and len(found) > 20


def test_a_product_one_percent_off_is_found(tmp_path):
    code, found, output = check_with(WRONG_PRODUCT, tmp_path, "--only", "ops.grouped,ops.loss")
    assert code == 1, output
    wrong = {name for name, (status, _) in found.items() if status == "FAILED"}
    assert wrong == {name for name in found if name.startswith("ops.grouped_")}


def test_a_dropout_rate_a_sixteenth_too_high_is_found(tmp_path):
    code, found, output = check_with(WRONG_RATE, tmp_path, "--only", "ops.dropout")
    assert code == 1, output
    status, value = found["ops.dropout_default"]
    assert status == "FAILED" and abs(float(value.split()[0]) - 0.1625) < 0.01


def test_a_rank_that_skips_a_reduction_is_found(tmp_path):
    code, found, output = check_with(SKIPPED_REDUCTION, tmp_path, "--only", "ranks")
    assert code == 1, output
    assert found["ranks.collectives"][0] == "ok"  # the fault is in the trainer's own use
    assert found["ranks.weights_of_ranks"][0] == "FAILED"


# Variants


def test_every_value_of_every_axis_has_an_effect_where_it_is_checked():
    for axis, values in device_variants.model_axes().items():
        assert axis in device_variants.PARTS
        for value in values:
            settings = device_variants.settings_of(axis, value)
            cfg = config(torch.device("cpu"), **settings)
            assert getattr(cfg, axis) == value and axis not in cfg.idle()


def test_a_new_value_is_checked_by_itself(monkeypatch):
    monkeypatch.setitem(train_gpt.EXPERTS, "relu", train_gpt.ReLU2)
    names = [check.name for check in device_variants.PARTS["expert"](torch.device("cpu"))]
    assert names == [f"expert={name}" for name in axes()["expert"]] and "expert=relu" in names


def test_a_wrong_product_in_float32_alone_shows_in_a_curve(monkeypatch):
    """What a broken library would do; in float64 it is right."""
    linear = train_gpt.linear
    cfg = config(torch.device("cpu"), num_iterations=3)

    def off(x, weight):
        return linear(x, weight) * (1.001 if x.dtype == torch.float32 else 1)

    assert run_ranks(1, lambda ranks: device_variants.compared(cfg)[0])[0].endswith("at most")
    monkeypatch.setattr(train_gpt, "linear", off)
    text, good = run_ranks(1, lambda ranks: device_variants.compared(cfg))[0]
    assert not good, text


# Driver

FINE = """
import json, sys
file = open(sys.argv[1], "a")
for words in (["a", "1", "ok", 0.5], ["b", "2 | 3", "", 0.5], ["c", "why", "left out", 0], ["x"]):
    print(json.dumps(words), file=file, flush=True)
"""
FAILS = FINE.replace('"ok"', '"FAILED"')
CRASHES = FINE + 'print("\\n".join(f"line {i}" for i in range(9)))\nsys.exit(3)\n'
HANGS = """
import subprocess, sys, time
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
print("child", child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def checked(monkeypatch, capsys):
    """A function: (exit code, output) of main with these options, whose groups run scripts.

    Each takes the name of its report.
    """
    before = signal.getsignal(signal.SIGTERM)

    def run(scripts, *options):
        def command(process, device):
            return [sys.executable, "-S", "-c", scripts[process.group], str(process.report)]

        monkeypatch.setattr(check_device.Process, "command", command)
        argv = ["--device", "cpu", "--only", ",".join(scripts), *map(str, options)]
        monkeypatch.setattr(sys, "argv", ["check_device.py", *argv])
        code = check_device.main(argv)
        return code, capsys.readouterr().out

    yield run
    signal.signal(signal.SIGTERM, before)


def test_results_are_told_as_a_table_and_as_json(checked, tmp_path):
    code, output = checked({"ops": FINE, "ranks": FINE}, "--json", tmp_path / "a.json")
    assert code == 0
    lines = output.splitlines()
    assert lines[1].split() == ["ops.a", "ok", "0.5", "s", "1"]
    assert "| ranks.b | 2 \\| 3 |  | 0.5 |" in lines and "| ops.c | why | left out | 0.0 |" in lines
    assert lines[-1].startswith("2 checks ok, 0 FAILED, 2 left out; ")
    report = json.loads((tmp_path / "a.json").read_text())
    assert set(report) > {"command", "versions", "device", "seconds", "finished", "git"}
    assert torch.__version__ in report["versions"]
    keys = ("group", "name", "value", "status", "seconds")
    assert report["results"][3] == dict(zip(keys, ("ranks", "a", "1", "ok", 0.5)))
    assert len(report["results"]) == 6 and [*tmp_path.iterdir()] == [tmp_path / "a.json"]


def test_a_failed_check_is_the_exit_code(checked):
    code, output = checked({"ops": FAILS, "ranks": FINE})
    assert code == 1 and output.splitlines()[-1].startswith("1 checks ok, 1 FAILED")


def test_a_crash_is_told_with_its_last_lines(checked):
    code, output = checked({"ops": CRASHES, "ranks": FINE})
    assert code == 1
    assert "ended with 3" in output and "\n    line 3\n" in output and "line 2\n" not in output
    assert "ranks.a" in output and ": ops.process; " in output.splitlines()[-1]


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_hangs_is_killed_with_all_that_it_started(checked):
    began = time.monotonic()
    code, output = checked({"ops": HANGS, "ranks": FINE}, "--limit", "1")
    assert code == 1 and time.monotonic() - began < 20
    assert "stopped after its limit of 1 s, not done: grouped, loss" in output
    (pid,) = [line.split()[1] for line in output.splitlines() if line.startswith("    child")]
    assert not is_alive(pid) and "ranks.a" in output


def test_what_does_not_fit_the_budget_is_left_out(checked, monkeypatch):
    code, output = checked({"ops": FINE}, "--budget", "1")
    assert code == 0 and "ops.process" in output and "no time left of --budget" in output
    assert output.splitlines()[-1].startswith("0 checks ok, 0 FAILED, 1 left out")
    monkeypatch.setattr(check_device, "LEAST", 0.1)
    code, output = checked({"ops": HANGS, "ranks": FINE}, "--budget", "1")
    assert code == 0 and output.splitlines()[-1].startswith("0 checks ok, 0 FAILED, 2 left out")


def test_the_log_gets_one_entry_below_its_head(checked, monkeypatch, tmp_path):
    log = tmp_path / "LOG.md"
    old = "# Log\n\nA head\nof two lines.\n\n## 2026-11-26: an entry\ntext\n\n## another\ntext\n"
    log.write_text(old)
    monkeypatch.setattr(check_device, "LOG", log)
    checked({"ops": FINE})
    assert log.read_text() == old
    checked({"ops": FINE}, "--log")
    head, entry, rest = log.read_text().partition("## ")[0], "", old.partition("\n## ")[2]
    assert head == "# Log\n\nA head\nof two lines.\n\n" and log.read_text().endswith(rest)
    entry = log.read_text()[len(head) : -len("\n## " + rest)]
    assert entry.count("## ") == 1 and "checked by scripts/check_device.py" in entry
    assert "| ops.a | 1 | ok | 0.5 |" in entry and "`python check_device.py --device cpu" in entry


def test_a_part_that_raises_does_not_end_the_others(tmp_path):
    def raises(device):
        yield held("first", "1", True)
        raise ValueError("no such\nthing")

    def fine(device):
        yield held("second", "2", False)

    file = tmp_path / "report"
    check_device.make_checks("ops", {"bad": raises, "good": fine}, torch.device("cpu"), file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line[:3] for line in lines] == [
        ["first", "1", "ok"],
        ["bad", "ValueError: no such", "FAILED"],
        ["bad"],
        ["second", "2", "FAILED"],
        ["good"],
    ]


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--only", "opps"], "--only opps: choose groups of ops, variants, "),
        (["--only", "ops.drop"], "--only ops.drop: ops has grouped, loss, "),
        (["--budget", "-1"], "argument --budget: must be a number above 0"),
        (["--budget", "nan"], "argument --budget: must be a number above 0"),
        (["--limit", "soon"], "argument --limit: must be a number above 0"),
        (["--jobs", "0"], "--jobs: at least 1"),
        (["--json", "."], "--json .: is a folder; name a file"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_wrong_options_are_refused(capsys, options, sentence):
    with pytest.raises(SystemExit) as ended:
        check_device.main(options)
    assert ended.value.code == 2
    assert f"error: {sentence}" in capsys.readouterr().err
