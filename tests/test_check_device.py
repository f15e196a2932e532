"""scripts/check_device.py: it finds planted faults, and ends what hangs or crashes and says so."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.run import get_args_parser
from conftest import run_ranks

import check_device
import device_checks
import device_report
import device_runs
import device_variants
from device_report import config, held
from harness.settings import ROOT
from ops import cross_entropy, orthogonalize, products
import train_gpt
from train_gpt import axes

CPU = torch.device("cpu")

# Faults

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


def checks(part):
    """{name: (status, value)} of a part, checked in a process of its own."""
    (found,) = run_ranks(1, lambda ranks: [*part(CPU)])
    return {check.name: (check.status, check.value) for check in found}


def test_sound_operations_pass(tmp_path):
    """The command as users start it."""
    command = [sys.executable, check_device.__file__, "--device", "cpu", "--only", "ops"]
    report = tmp_path / "report.json"
    env = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [*command, "--json", report], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(report.read_text())["results"]
    assert len(results) > 20 and {r["status"] for r in results} <= {"ok", "left out"}


def test_a_product_one_percent_off_is_found(monkeypatch):
    outer = products.grouped_outer
    monkeypatch.setattr(products, "grouped_outer", lambda *args: 1.01 * outer(*args))
    found = checks(device_checks.PARTS["grouped"])
    assert len(found) > 3 and {status for status, _ in found.values()} == {"FAILED"}


def no_update(*args, **kwargs):
    """In place of a function that changes its arguments."""


def loss_off(*args):
    loss, grad = loss_chunk(*args)
    return loss, 1.01 * grad


def applied(*args, found_inf, **kwargs):
    return adamw(*args, found_inf=None, **kwargs)


def later(self, first, count):
    return read(self, first + 1, count)


loss_chunk = cross_entropy.loss_chunk
adamw = train_gpt.adamw
rms_norm = F.rms_norm
read = train_gpt.ShardLoader.read


@pytest.mark.parametrize(
    "part, owner, name, replacement, wrong",
    [
        ("loss", cross_entropy, "loss_chunk", loss_off, "loss_"),
        ("loss", cross_entropy, "soft_cap", lambda logits, cap: logits, "loss_float32_257_cap15"),
        ("orthogonalize", torch, "baddbmm", lambda a, *args, **kwargs: a, "newton_schulz"),
        ("adamw", train_gpt, "adamw", applied, "adamw_found_inf"),
        ("adamw", torch, "_foreach_div_", no_update, "adamw_grad_scale"),
        ("loss_scale", torch, "_amp_update_scale_", no_update, "loss_scale"),
        ("rotary_norm", train_gpt.Rotary, "forward", lambda self, x, ctx: x, "rotary"),
        ("rotary_norm", F, "rms_norm", lambda *a, **k: 1.01 * rms_norm(*a, **k), "rms_norm_"),
        ("collectives", torch.distributed, "all_reduce", torch.Tensor.zero_, "collectives_alone"),
        ("prefetch", train_gpt.ShardLoader, "read", later, "prefetch"),
    ],
)
def test_a_wrong_operation_is_found(monkeypatch, part, owner, name, replacement, wrong):
    monkeypatch.setattr(owner, name, replacement)
    found = checks(device_checks.PARTS[part])
    failed = {check for check, (status, _) in found.items() if status == "FAILED"}
    named = {check for check in found if check.startswith(wrong)}
    assert named and named <= failed


@pytest.mark.parametrize("factor, status", [(1.0, "ok"), (1.01, "FAILED")])
def test_newton_schulz_may_be_a_bit_off_and_no_more(monkeypatch, factor, status):
    """A library may sum a stack of matrices in another order than one of them."""
    coefficients = [(3.4445 * factor, -4.7750, 2.0315)] * 5

    def other(G, dtype=torch.bfloat16):
        return orthogonalize.iterate(G, coefficients, dtype, 1.0, 1e-7) * (1 + 2**-7)

    monkeypatch.setitem(train_gpt.ORTHOGONALIZERS, "newton_schulz", other)
    torch.manual_seed(0)
    found = checks(device_checks.PARTS["orthogonalize"])["newton_schulz"]
    assert found[0] == status and found[1].startswith("0 of 3"), found


def test_a_dropout_rate_a_sixteenth_too_high_is_found(monkeypatch):
    attention = F.scaled_dot_product_attention

    def too_much(*args, dropout_p=0.0, **kwargs):
        return attention(*args, dropout_p=dropout_p and dropout_p + 1 / 16, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", too_much)
    status, value = checks(device_checks.PARTS["dropout"])["dropout_default"]
    assert status == "FAILED" and abs(float(value.split()[0]) - 0.1625) < 0.01


def test_settings_and_ranks_of_the_caller_do_not_reach_the_checks(monkeypatch):
    names = ("LR", "PRESET", "RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "HF_HOME")
    for name in names:
        monkeypatch.setenv(name, "1")
    assert [name for name in names if name in device_report.plain_environment()] == ["HF_HOME"]
    assert set(device_report.torchrun_environment()) == {*names[2:5]}


def test_a_rank_that_skips_a_reduction_is_found(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SKIPPED_REDUCTION)
    path = os.pathsep.join(map(str, [tmp_path, ROOT, ROOT / "scripts"]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = checks(device_runs.RANKS["ranks"])
    assert found["collectives"][0] == "ok"  # the fault is in the trainer's own use of them
    assert found["weights_of_ranks"][0] == "FAILED"


# Variants


def test_every_value_of_every_axis_has_an_effect_where_it_is_checked():
    for axis, values in device_variants.model_axes().items():
        assert axis in device_variants.PARTS
        for value in values:
            settings = device_variants.settings_of(axis, value)
            cfg = config(CPU, **settings)
            assert getattr(cfg, axis) == value and axis not in cfg.idle()


def test_every_switch_has_an_effect_where_it_is_checked():
    checked = [*device_variants.SWITCHES.values(), *device_variants.COMPILED.values()]
    for settings in checked:
        cfg = config(CPU, **settings)
        assert not settings.keys() & cfg.idle().keys()


def test_a_new_value_is_checked_by_itself(monkeypatch):
    monkeypatch.setitem(train_gpt.EXPERTS, "relu", train_gpt.ReLU2)
    names = [check.name for check in device_variants.PARTS["expert"](CPU)]
    assert names == [f"expert={name}" for name in axes()["expert"]] and "expert=relu" in names


def test_a_wrong_product_in_float32_alone_shows_in_a_curve(monkeypatch):
    """What a broken library would do; in float64 it is right."""
    linear = train_gpt.linear
    cfg = config(CPU, num_iterations=3)

    def off(x, weight):
        return linear(x, weight) * (1.001 if x.dtype == torch.float32 else 1)

    assert run_ranks(1, lambda ranks: device_variants.compared(cfg)[0])[0].endswith("at most")
    monkeypatch.setattr(train_gpt, "linear", off)
    text, good = run_ranks(1, lambda ranks: device_variants.compared(cfg))[0]
    assert not good, text


def test_blocks_that_torch_leaves_uncompiled_are_found(monkeypatch):
    """Without a limit of its own compile_model would be content with some of the graphs."""

    def compile_some(model, cfg, device):
        for block in model.blocks:
            block.compile(backend="eager")

    def work(ranks):
        with torch._dynamo.config.patch(recompile_limit=1):
            with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
                next(device_variants.compiled_part("values")(CPU))

    monkeypatch.setattr(train_gpt, "compile_model", compile_some)
    run_ranks(1, work)


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
import os, subprocess, sys, time
print("cache", os.environ["TORCHINDUCTOR_CACHE_DIR"])
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
    # It may have been compiling: what it leaves is gone.
    (cache,) = [line.split()[1] for line in output.splitlines() if line.startswith("    cache")]
    assert "check_device_" in cache and not os.path.exists(os.path.dirname(cache))


def test_a_group_that_is_killed_leaves_no_files(checked, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    hangs = 'import os\nopen(os.environ["CHECK_DEVICE_FOLDER"] + "/a", "w")\n' + HANGS
    code, output = checked({"ops": hangs}, "--limit", "1")
    assert code == 1 and "    child" in output and not [*tmp_path.iterdir()]
    monkeypatch.setenv("CHECK_DEVICE_FOLDER", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with device_runs.data_folder() as folder:
        assert folder.parent == tmp_path


def test_what_does_not_fit_the_budget_is_left_out(checked, monkeypatch):
    code, output = checked({"ops": FINE}, "--budget", "1")
    assert code == 1 and "ops.process" in output and "no time left of --budget" in output
    assert output.splitlines()[-1].startswith("0 checks ok, 0 FAILED, 1 left out")
    monkeypatch.setattr(check_device, "LEAST", 0.1)
    code, output = checked({"ops": HANGS, "ranks": FINE}, "--budget", "1")
    assert code == 1 and output.splitlines()[-1].startswith("0 checks ok, 0 FAILED, 2 left out")


def test_the_log_gets_one_entry_below_its_head(checked, monkeypatch, tmp_path):
    log = tmp_path / "LOG.md"
    old = "# Log\n\nA head\nof two lines.\n\n## 2026-11-26: an entry\ntext\n\n## another\ntext\n"
    log.write_text(old)
    monkeypatch.setattr(check_device, "LOG", log)
    checked({"ops": FINE})
    assert log.read_text() == old
    checked({"ops": FINE}, "--log-entry")
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
    check_device.make_checks("ops", {"bad": raises, "good": fine}, CPU, file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line[:3] for line in lines] == [
        ["first", "1", "ok"],
        ["bad", "ValueError: no such", "FAILED"],
        ["bad"],
        ["second", "2", "FAILED"],
        ["good"],
    ]


@pytest.mark.parametrize("group, status", [("speed", "left out"), ("ops", "FAILED")])
def test_a_preset_that_a_device_has_no_room_for_is_left_out(tmp_path, group, status):
    def too_large(device):
        yield held("small", "1", True)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nMore")

    file = tmp_path / "report"
    check_device.make_checks(group, {"large": too_large}, CPU, file)
    line = json.loads(file.read_text().splitlines()[1])
    assert line[0] == "large" and line[2] == status and line[1].endswith("allocate 3 GiB.")


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
        (["--json", f"{__file__}/a.json"], f"--json {__file__}/a.json: cannot be written"),
        (["--log-entry"], f"--log-entry: {__file__}/LOG.md cannot be written; "),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_wrong_options_are_refused(monkeypatch, capsys, options, sentence):
    """Before anything is checked."""
    monkeypatch.setattr(check_device, "LOG", Path(__file__) / "LOG.md")
    with pytest.raises(SystemExit) as ended:
        check_device.main(["--only", "ops.loss_scale", *options])
    assert ended.value.code == 2
    assert f"error: {sentence}" in capsys.readouterr().err


def test_torchrun_leaves_every_option_to_the_script(capsys):
    with pytest.raises(SystemExit):
        check_device.main(["--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    options = re.findall("--[a-z-]+", usage)
    assert len(options) > 5
    for option in options:
        args = get_args_parser().parse_args(["check_device.py", option])
        assert args.training_script_args == [option]
