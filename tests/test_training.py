"""The program as users run it: what a run prints and leaves, and how it refuses and ends."""

import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import launch, points, rows, summary, write_shard

from harness import failures
from harness.settings import ROOT
import train_gpt
from ops import sharding


def cells(settings, *columns):
    """Columns of the curve as they are written."""
    return [tuple(point[column] for column in columns) for point in points(settings)]


def losses(settings):
    return np.array([float(loss) for (loss,) in cells(settings, "train_loss") if loss])


def test_a_run_leaves_log_curve_summary_and_row(settings):
    codes, out = launch(
        settings | {"NUM_ITERATIONS": 30, "VAL_EVERY": 10, "STAGE": "s", "NOTE": 'a, "b"'}
    )
    assert codes == [0], out
    log = (settings["LOG_DIR"] / "toy.txt").read_text()
    assert train_gpt.SOURCE in log
    line = re.compile(
        r"^step:(\d+)/30 (val|train)_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms"
        r"(?: tokens_per_sec:\d+)?$",
        re.M,
    )
    seen = [(int(step), kind) for step, kind in line.findall(out)]
    assert seen == [(int(step), kind) for step, kind in line.findall(log)]
    assert {step for step, kind in seen if kind == "val"} == {0, 10, 20, 30}
    assert {step for step, kind in seen if kind == "train"} == set(range(1, 31))
    steps = cells(settings, "step", "tokens", "val_loss")
    assert [int(step) for step, _, _ in steps] == list(range(31)) and steps[30][1] == str(
        30 * 12 * 16
    )
    speeds = [f"{float(speed):.0f}" for (speed,) in cells(settings, "tokens_per_sec") if speed]
    told_speeds = re.findall(r" val_loss:.* tokens_per_sec:(\d+)$", out, re.M)
    assert told_speeds == speeds[9::10]
    told = summary(settings)
    assert told["status"] == "ok" and told["final_loss"] == float(steps[30][2]) < 0.8 * float(
        steps[0][2]
    )
    assert told["best_loss"] <= told["final_loss"] and told["ppl"] == pytest.approx(
        np.exp(told["final_loss"])
    )
    (row,) = rows(settings)
    assert (
        row["status"] == "ok"
        and row["final_loss"] == str(told["final_loss"])
        and row["note"] == 'a, "b"'
    )
    assert row["mfu"] == row["compile_time"] == row["bits_per_byte"] == ""  # not known, so blank
    assert all(
        row[name]
        for name in "started source_sha config_hash host torch world_size params_total stage "
        "flops_per_token tokens train_time eval_time step_avg tokens_per_sec peak_mem "
        "data_fingerprint changes".split()
    )
    assert out.rstrip().split("---")[1].split() and f"row: {settings['RESULTS_CSV']}" in out


@pytest.mark.parametrize("world", [2, 3])
def test_several_ranks_give_the_curve_of_one(settings, world):
    """Clipped, with a large balance loss."""
    settings |= {"FFN": "moe", "NUM_EXPERTS": 4, "D_FF": 32, "BALANCE_LOG_INTERVAL": 1}
    settings |= {"AUX_LOSS_COEF": 1, "GRAD_CLIP": 0.5, "DEVICE_BATCH_SIZE": 2}
    assert launch(settings | {"RUN_ID": "one"})[0] == [0]
    codes, out = launch(settings | {"RUN_ID": "many"}, world)
    assert codes == [0] * world, out
    columns = "train_loss", "val_loss", "grad_norm", "lr", "aux_0", "aux_1", "load_max_1"
    one, many = (cells(settings | {"RUN_ID": name}, *columns) for name in ("one", "many"))
    for a, b in zip(one, many, strict=True):
        assert all(x == y or abs(float(x) - float(y)) < 1e-4 for x, y in zip(a, b))
    norms = [float(norm) for _, _, norm, *_ in one if norm]
    assert len(norms) == 8 and max(norms) > 0.5
    assert [row["run_id"] for row in rows(settings)] == ["one", "many"]
    assert rows(settings)[1]["world_size"] == str(world)
    assert out.count("step:8/8 val_loss") == 1


def test_same_seed_same_curve(settings):
    runs = {}
    for name, changes in {
        "a": {},
        "b": {},
        "seed": {"SEED": 1},
        "rare": {"VAL_EVERY": 0, "LOG_EVERY": 1},
        "shuffled": {"SHUFFLE": 1},
    }.items():
        assert launch(settings | changes | {"RUN_ID": name, "DROPOUT": 0.1})[0] == [0]
        runs[name] = losses(settings | {"RUN_ID": name})
    assert np.array_equal(runs["a"], runs["b"]) and np.array_equal(runs["a"], runs["rare"])
    assert not np.array_equal(runs["a"], runs["seed"]) and not np.array_equal(
        runs["a"], runs["shuffled"]
    )


def test_accumulation_does_not_change_the_curve(settings):
    for size in (1, 12):
        assert launch(settings | {"RUN_ID": f"micro{size}", "DEVICE_BATCH_SIZE": size})[0] == [0]
    assert np.allclose(
        losses(settings | {"RUN_ID": "micro1"}), losses(settings | {"RUN_ID": "micro12"}), atol=1e-4
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_learns(settings, dtype):
    codes, out = launch(settings | {"DTYPE": dtype, "NUM_ITERATIONS": 20})
    assert codes == [0], out
    assert losses(settings)[-1] < 0.9 * losses(settings)[0] and summary(settings)["bad_steps"] <= 2


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_run_equals_eager(settings):
    short = settings | {
        "NUM_ITERATIONS": 3,
        "N_LAYER": 1,
        "VAL_TOKENS": 80,
    }  # 80 / 16 = 5 samples: a last batch of one
    assert launch(short | {"RUN_ID": "eager"})[0] == [0]
    compiled = short | {"RUN_ID": "compiled", "COMPILE": 1, "PATH": os.environ["PATH"]}
    codes, out = launch(compiled)
    assert codes == [0], out
    assert "compiling" in out and summary(compiled)["compile_time"] > 0
    assert np.allclose(losses(compiled), losses(short | {"RUN_ID": "eager"}), atol=1e-4)


REFUSED = [  # settings, exit code, what the one sentence says
    ({"ATTNGATE": "foo"}, 2, ["ATTNGATE=foo", ", ".join(train_gpt.GATES)]),
    ({"BATCH_SIZE": 7}, 2, ["BATCH_SIZE=7", "DEVICE_BATCH_SIZE=6", "choose 12"]),
    ({"LEARNING_RATE": 1}, 2, ["LEARNING_RATE", "LR"]),
    ({"DEVICE": "cuda"}, 2, ["DEVICE=cuda"]),
    (
        {"MAX_EPOCHS": 1, "NUM_ITERATIONS": 1000},
        3,
        ["NUM_ITERATIONS=1000", "12,000 samples", "prepare_data.py"],
    ),
    ({"VAL_TOKENS": 10**6}, 3, ["VAL_TOKENS=1000000", "62,500 samples"]),
    ({"INPUT_BIN": "nowhere/fineweb_train_*.bin"}, 3, ["nowhere", "python cached_fineweb10B.py"]),
    ({"VOCAB_SIZE": 63}, 3, ["token 63", "VOCAB_SIZE=63"]),
    ({"VOCAB_SIZE": 0}, 3, ["index.json beside the shards that match INPUT_BIN=", os.getcwd()]),
]


@pytest.mark.skipif(train_gpt.torch.cuda.is_available(), reason="DEVICE=cuda is no mistake here")
@pytest.mark.parametrize("changes, code, words", REFUSED, ids=lambda value: str(value)[:40])
def test_a_refused_run_says_why_in_one_line_and_leaves_a_row(settings, changes, code, words):
    began = time.perf_counter()
    codes, out = launch(settings | changes, world=2)
    assert codes == [code] * 2 and time.perf_counter() - began < 15
    assert len(out.splitlines()) == 1 and all(word in out for word in words), out
    (row,) = rows(settings)
    assert (
        row["status"] == {2: "config", 3: "data"}[code]
        and row["run_id"] == "toy"
        and words[0] in row["error"]
    )


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\x00"], ids=["columns", "bytes"])
def test_a_table_that_is_none_is_refused_and_left_alone(settings, content):
    settings["RESULTS_CSV"].write_bytes(content)
    codes, out = launch(settings)
    said = "cannot be written as a table with a column run_id"
    assert codes == [2] and len(out.splitlines()) == 1 and said in out, out
    assert (
        settings["RESULTS_CSV"].read_bytes() == content
        and not (settings["LOG_DIR"] / "toy.txt").exists()
    )


def test_a_bad_shard_ends_every_rank(settings, tmp_path):
    write_shard(tmp_path / "toy_train_000002.bin", range(10)).write_bytes(b"x" * 3000)
    codes, out = launch(settings, world=2)
    assert codes == [3, 3] and "toy_train_000002.bin: expected magic 20240520, " in out


def test_a_finished_run_id_is_not_used_again(settings):
    assert launch(settings)[0] == [0]
    before = rows(settings), (settings["LOG_DIR"] / "toy.txt").read_text()
    codes, out = launch(settings)
    assert codes == [2] and "RUN_ID=toy" in out and "toy.txt exists" in out
    assert (rows(settings), (settings["LOG_DIR"] / "toy.txt").read_text()) == before


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"LR": 1e30, "MUON_LR": 1e30}, "not finite 21 times in a row"),
        (
            {"LR": 1e15, "MUON_LR": 1e15, "NORM": "layer", "QK_NORM": 0, "INIT": "gpt2"},
            "val_loss is nan",
        ),
    ],
    ids=str,
)
def test_divergence_ends_the_run(settings, changes, reason):
    codes, out = launch(settings | changes | {"NUM_ITERATIONS": 1000}, world=2)
    assert codes == [4, 4] and reason in out and "lower LR" in out
    assert (
        rows(settings)[0]["status"] == "diverged"
        and int(rows(settings)[0]["tokens"]) < 100 * 12 * 16
    )


def test_a_gradient_that_reaches_nothing_ends_the_run(settings, monkeypatch):
    for module in (train_gpt, sharding):
        monkeypatch.setattr(module, "squared_norm", lambda tensors: torch.zeros(()))
    codes, out = launch(settings)
    assert codes == [4] and "the gradient's norm 0.0 at step 1" in out


def test_gradients_that_stay_bad_end_the_run(settings, monkeypatch):
    """Each is left out of the update and counted."""
    for module in (train_gpt, sharding):
        monkeypatch.setattr(module, "squared_norm", lambda tensors: torch.tensor(np.nan))
    codes, out = launch(settings | {"NUM_ITERATIONS": 30})
    assert (
        codes == [4]
        and "not finite 21 times in a row" in out
        and rows(settings)[0]["bad_steps"] == "21"
    )
    validations = {loss for (loss,) in cells(settings, "val_loss") if loss}
    assert len(validations) == 1  # no update was made


def test_a_crash_leaves_its_traceback_and_a_row(settings, monkeypatch):
    monkeypatch.setattr(train_gpt, "train_step", lambda *args: 1 / 0)
    codes, out = launch(settings)
    assert codes == [1] and "ZeroDivisionError" in out and rows(settings)[0]["status"] == "crash"


def test_out_of_memory_has_its_own_status(settings, monkeypatch):
    def fail(*args):
        raise train_gpt.torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_gpt, "train_step", fail)
    monkeypatch.setattr(failures, "peak_memory", lambda device: None)  # as on Windows
    assert launch(settings)[0] == [5] and rows(settings)[0]["status"] == "oom"
    assert rows(settings)[0]["error"].startswith("out of memory; lower")


def run(*command, **env):
    return subprocess.run(
        command, cwd=ROOT, env={"PATH": os.environ["PATH"]} | env, capture_output=True, text=True
    )


def test_dry_run_prints_the_plan_without_data_or_device():
    result = run(sys.executable, "train_gpt.py", DRY_RUN="1")
    told = dict(line.split(":", 1) for line in result.stdout.splitlines())
    assert result.returncode == 0 and told["params_total"] == told["params_active"] == "123568128"
    assert told["flops_per_token"] == "854654976" and told["tokens_needed"] == str(
        5100 * 524288 + 1
    )
    assert told["n_layer"] == "12" and told["tokens_on_disk"].isdigit()


EFFECTS = """
import os, random, sys, threading
before = dict(os.environ), random.getstate(), os.listdir('.'), threading.active_count()
import torch
rng, dtype, threads = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
import train_gpt
assert (dict(os.environ), random.getstate(), os.listdir('.'), threading.active_count()) == before
assert torch.equal(torch.get_rng_state(), rng)
assert (torch.get_default_dtype(), torch.get_num_threads()) == (dtype, threads)
assert not torch.distributed.is_initialized() and 'torch._dynamo' not in sys.modules
"""


def test_import_has_no_effects(tmp_path):
    """In an empty folder: other tests may write into this one meanwhile."""
    program = f"import os; os.chdir({str(tmp_path)!r})\n{EFFECTS}"
    result = run(sys.executable, "-c", program, PYTHONDONTWRITEBYTECODE="1", PYTHONPATH=str(ROOT))
    assert result.returncode == 0 and result.stdout == result.stderr == "", result.stderr
