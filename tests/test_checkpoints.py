"""Checkpoints: a resumed run is the one that never stopped, on any ranks, and no damage is read."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import (
    WIDE,
    Job,
    assert_same,
    checkpoints,
    curve,
    dies_at,
    folder,
    launch,
    points,
    row,
    run_ranks,
    summary,
    tensors,
    tiny,
    write_shard,
)

import harness.checkpoints
import harness.run
from harness.checkpoints import VERSION, Checkpoints, changed_settings, find_checkpoint, tally
from harness.records import Records
from store.contract import CURVE, ConfigError
from store.source import source_hash
import train_gpt
from train_gpt import Config, State


def interrupted(settings, monkeypatch, step, world=1):
    """A run that is killed before the update after `step` and goes on with no fault."""
    with monkeypatch.context() as patch:
        patch.setattr(harness.checkpoints, "SAVE_STALL", 60.0)  # on a busy machine too
        dies_at(patch, step)
        codes, out = launch(settings, world)
        assert codes == [-9] * world, out
    codes, out = launch(settings | {"RESUME": "auto"}, world)
    assert codes == [0] * world, out
    return out


# Resuming


@pytest.mark.parametrize(
    "world, step, every",
    [
        (1, 1, 1),  # the first step
        (2, 3, 2),  # in the middle of a shard; 36 samples of 43
        (1, 4, 4),  # beyond the end of the first shard, 43 of 94 samples
        (2, 9, 4),  # in the second epoch: 94 samples
        (1, 15, 5),  # before the last step
        (2, 16, 8),
    ],
)  # after it, before the row
def test_a_killed_run_that_goes_on_is_the_run_that_was_never_stopped(
    settings, monkeypatch, world, step, every
):
    settings |= WIDE | {
        "NUM_ITERATIONS": 16,
        "SAVE_EVERY": every,
        "VAL_EVERY": 3,
        "OPTIMIZER": "muon",
    }
    assert launch(settings | {"RUN_ID": "whole"}, world)[0] == [0] * world
    if step == 16:
        with monkeypatch.context() as patch:
            patch.setattr(
                harness.run, "export_weights", lambda *args: os.kill(os.getpid(), signal.SIGKILL)
            )
            assert -9 in launch(settings, world)[0]
        out = launch(settings | {"RESUME": "auto"}, world)[1]
    else:
        out = interrupted(settings, monkeypatch, step, world)
    assert f"resumed:{folder(settings, step // every * every)}" in out
    assert curve(settings) == curve(settings, "whole") and len(curve(settings)) == 17
    assert_same(folder(settings, 16), folder(settings, 16, "whole"))
    told, whole = row(settings), row(settings, "whole")
    assert told["status"] == "ok" and told["resumes"] == "1" and whole["resumes"] == "0"
    assert all(
        told[name] == whole[name]
        for name in ("final_loss", "best_loss", "tokens", "ppl", "bad_steps")
    )
    log = (settings["LOG_DIR"] / "toy.txt").read_text()
    assert log.count(train_gpt.SOURCE) == 1
    assert [log.count(f"\nstep:{n}/16 train_loss") for n in range(1, 17)] == [1] * 16


@pytest.mark.parametrize(
    "changes",
    [
        {"OPTIMIZER": "adamw", "TIE_EMBEDDINGS": 0, "LR": 0.003},
        {"DTYPE": "float16"},
        {"DTYPE": "bfloat16", "NORM": "layer", "BIAS": 1, "WEIGHT_DECAY": 0.1},
        {
            "MUON_NORM": "rows",
            "EMA_ITERS": 3,
            "RESIDUAL": "x0",
            "VALUE_RESIDUAL": 1,
            "VALUE_EMBEDS": 1,
            "WEIGHT_DECAY": 0.1,
            "CAUTIOUS_DECAY": 1,
            "MOMENTUM_START": 0.8,
            "MOMENTUM_WARMUP_ITERS": 5,
            "MOMENTUM_COOLDOWN_ITERS": 2,
        },
    ],
    ids=str,
)
def test_other_parts_resume_too(settings, monkeypatch, changes):
    settings |= WIDE | changes | {"DEVICE_BATCH_SIZE": 3}  # two micro-batches a rank
    assert launch(settings | {"RUN_ID": "whole"}, 2)[0] == [0, 0]
    interrupted(settings, monkeypatch, 6, 2)
    assert curve(settings) == curve(settings, "whole")
    assert_same(folder(settings, 8), folder(settings, 8, "whole"))


def test_killed_at_random_moments_a_run_loses_at_most_save_every_steps_and_no_row(settings):
    """A kill comes within nine steps of a start, or while it starts. KILLS=50 is the long test."""
    kills, rng = int(os.environ.get("KILLS", 6)), random.Random(0)
    settings |= WIDE | {
        "NUM_ITERATIONS": 10 * kills,
        "BATCH_SIZE": 4,
        "DEVICE_BATCH_SIZE": 2,
        "SAVE_EVERY": 5,
        "VAL_EVERY": 50,
        "RESUME": "auto",
    }
    assert launch(settings | {"RUN_ID": "whole"}, 2)[0] == [0, 0]
    reached, lost = 0, []
    for _ in range(kills):
        job, steps = Job(settings, 2), rng.choice([0, *range(1, 10)])
        job.wait_for(f"step:{reached + steps}/" if steps else "run_id:toy")
        time.sleep(rng.uniform(0, 0.05))
        job.kill(signal.SIGKILL)
        out = job.wait()[1]
        resumed = re.search(r"^resumed:.*step_(\d+)$", out, re.M)
        lost.append(reached - (int(resumed[1]) if resumed else 0))
        reached = max(map(int, re.findall(r"^step:(\d+)/", out, re.M)), default=reached - lost[-1])
        assert row(settings)["status"] == "running"
    assert max(lost) <= 5 and len(lost) == kills, lost
    print(f"{kills} kills, steps lost: {lost}")
    assert launch(settings, 2)[0] == [0, 0]
    assert curve(settings) == curve(settings, "whole") and row(settings)["status"] == "ok"
    assert_same(folder(settings, 10 * kills), folder(settings, 10 * kills, "whole"))


CRASH_POINTS = {
    "before a file is written": (dcp.FileSystemWriter, "write_data"),
    "before the metadata": (dcp.FileSystemWriter, "finish"),
    "before the facts": (harness.checkpoints, "write_whole"),
    "before the hashes": (harness.checkpoints, "sha256sum"),
    "before the disk has it": (harness.checkpoints, "sync", ".tmp_step_000012"),
    "before it has its name": (os, "replace", ".tmp_step_000012"),
    "before its name is on the disk": (harness.checkpoints, "sync", "toy"),
    "while an old one goes": (shutil, "rmtree", ".tmp_step_000004"),
}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder for a run that several tests compare theirs with."""
    return tmp_path_factory.mktemp("logs")


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_killed_at_any_point_of_a_save_the_newest_whole_one_is_used(
    settings, elsewhere, monkeypatch, point
):
    """The third save, at step 12, dies: it would be the one that deletes the first."""
    settings |= WIDE | {"NUM_ITERATIONS": 16, "VAL_EVERY": 0}
    whole = settings | {"LOG_DIR": elsewhere, "RUN_ID": "whole"}
    if not (elsewhere / "whole.csv").exists():
        assert launch(whole)[0] == [0]
    owner, name, *suffix = CRASH_POINTS[point]
    with monkeypatch.context() as patch:
        original, write = getattr(owner, name), Checkpoints.write

        def fatal(*args, **kwargs):
            if Checkpoints.fatal and str(args[0]).endswith(*suffix or [""]):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        def arm(self, copies, tensors, facts):
            Checkpoints.fatal = facts["step"] == 12
            return write(self, copies, tensors, facts)

        patch.setattr(Checkpoints, "fatal", False, raising=False)
        patch.setattr(Checkpoints, "write", arm)
        patch.setattr(owner, name, fatal)
        assert launch(settings)[0] == [-9]
    newest = 12 if suffix in (["toy"], [".tmp_step_000004"]) else 8
    assert (
        name == "write_data"
        or suffix == ["toy"]
        or list((settings["LOG_DIR"] / "toy").glob(".tmp_*"))
    )
    codes, out = launch(settings | {"RESUME": "auto"})
    assert codes == [0] and f"resumed:{folder(settings, newest)}" in out, out
    assert checkpoints(settings) == [12, 16] and not list(
        (settings["LOG_DIR"] / "toy").glob(".tmp_*")
    )
    assert curve(settings) == curve(whole) and len(curve(whole)) == 16
    assert_same(folder(settings, 16), folder(whole, 16, "whole"))


def test_no_sample_is_missed_or_read_twice(settings, tmp_path, monkeypatch):
    """Every token is the number of its sample; the run dies on 2 ranks in step 13 and goes on,
    from 12, on 3."""
    for i, (first, last) in enumerate(((0, 40), (40, 70), (70, 94))):
        write_shard(
            tmp_path / f"toy_train_{i + 1:06d}.bin", [*np.repeat(np.arange(first, last), 16), 0]
        )
    original = train_gpt.train_step

    def recording(state, cfg, inputs, targets):
        died, rank = tmp_path / "died", torch.distributed.get_rank()
        with open(tmp_path / f"seen_{rank}.txt", "a") as file:
            print(int(cfg.resume == "auto"), state.step, *inputs[:, 0].tolist(), file=file)
        if (state.step, rank) == (13, 1) and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(state, cfg, inputs, targets)

    monkeypatch.setattr(train_gpt, "train_step", recording)
    settings |= {
        "VOCAB_SIZE": 128,
        "SHARD_TAIL": "keep",
        "DEVICE_BATCH_SIZE": 2,
        "NUM_ITERATIONS": 23,
        "SAVE_EVERY": 3,
        "VAL_EVERY": 0,
    }
    assert (
        launch(settings, 2)[0] == [1, -9] and launch(settings | {"RESUME": "auto"}, 3)[0] == [0] * 3
    )
    seen = {}
    for file in sorted(tmp_path.glob("seen_*.txt")):
        for line in file.read_text().splitlines():
            attempt, step, *samples = map(int, line.split())
            seen.setdefault((attempt, step), []).extend(samples)
    assert seen.keys() == {
        *((0, step) for step in range(14)),
        *((1, step) for step in range(12, 23)),
    }
    for (attempt, step), samples in seen.items():
        assert samples == [i % 94 for i in range(12 * step, 12 * step + 12)], (attempt, step)


@pytest.mark.parametrize("world", [1, 3, 4])
def test_saved_on_two_ranks_and_resumed_on_others(settings, monkeypatch, world):
    settings |= WIDE | {"DEVICE_BATCH_SIZE": 1, "NUM_ITERATIONS": 12, "DROPOUT": 0}
    assert launch(settings | {"RUN_ID": "whole"}, 2)[0] == [0, 0]
    with monkeypatch.context() as patch:
        dies_at(patch, 5)
        launch(settings, 2)
    saved = tensors(folder(settings, 4))

    def load(ranks):
        cfg = tiny(log_dir=str(settings["LOG_DIR"]), vocab_size=2305)
        state = State.build(cfg, ranks)
        checkpoints = Checkpoints(cfg, ranks, Records(cfg, "toy", CURVE, "", ranks))
        about = checkpoints.load(state.tensors(), folder(settings, 4))
        return about["step"], {
            key: (kind, tensor.clone()) for key, (tensor, kind) in state.tensors().items()
        }

    loaded = run_ranks(world, load)
    assert [step for step, _ in loaded] == [4] * world
    for key, wanted in saved.items():
        held = [found[key] for _, found in loaded if key in found]
        kinds = {kind for kind, _ in held}
        assert len(held) == (1 if kinds == {"own"} else world) and len(kinds) == 1
        parts = (
            [torch.cat([part for _, part in held])]
            if kinds == {"slice"}
            else [part for _, part in held]
        )
        assert all(torch.equal(part, wanted) for part in parts), key
    assert {kind for _, found in loaded for kind, _ in found.values()} >= {"copy", "own"}

    codes, out = launch(settings | {"RESUME": "auto"}, world)
    assert codes == [0] * world, out
    assert f"WORLD_SIZE 2 -> {world}" in out
    ours, whole = (
        np.array(
            [[float.fromhex(x or "nan") for x in point[:3]] for point in curve(settings, run_id)]
        )
        for run_id in ("toy", "whole")
    )
    assert np.allclose(ours, whole, atol=1e-4, equal_nan=True)


def test_a_number_of_ranks_that_cannot_share_the_batch_is_refused_with_those_that_can(settings):
    codes, out = launch(settings | {"DEVICE_BATCH_SIZE": 2}, 5)
    assert codes == [2] * 5 and "1 or 2 or 3 or 6 ranks" in out, out


# What must not be loaded


@pytest.fixture
def two(settings):
    """The settings of a finished run with checkpoints of steps 4 and 8."""
    settings |= WIDE
    assert launch(settings)[0] == [0] and checkpoints(settings) == [4, 8]
    return settings


def flips(path):
    """Copies of a file with one byte changed: first, middle, last."""
    content = path.read_bytes()
    for i in (0, len(content) // 2, len(content) - 1):
        yield content[:i] + bytes([content[i] ^ 7]) + content[i + 1 :]


def test_a_flipped_byte_in_any_file_sets_the_checkpoint_aside(two):
    run, newest = two["LOG_DIR"] / "toy", folder(two, 8)
    cfg, names = (
        tiny(log_dir=str(two["LOG_DIR"]), resume="auto"),
        sorted(path.name for path in newest.iterdir()),
    )
    assert names == [".metadata", "SHA256SUMS", "__0_0.distcp", "run.json"]
    assert find_checkpoint(cfg, run, []) == newest
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for damaged in [*flips(path), whole[:-1], whole + b"x", None]:
            path.unlink() if damaged is None else path.write_bytes(damaged)
            warnings = []
            assert find_checkpoint(cfg, run, warnings) == folder(two, 4), path
            assert len(warnings) == 1 and str(newest) in warnings[0] and "set aside" in warnings[0]
            assert checkpoints(two) == [4] and (run / "step_000008.corrupt").is_dir()
            (run / "step_000008.corrupt").rename(newest)
            path.write_bytes(whole)
    assert find_checkpoint(cfg, run, []) == newest


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(two):
    before = curve(two), tensors(folder(two, 8))
    with open(folder(two, 8) / "__0_0.distcp", "r+b") as file:
        file.seek(5000)
        file.write(bytes([file.read(1)[0] ^ 1]))
    codes, out = launch(two | {"RESUME": "auto"})
    assert codes == [0] and "is set aside: __0_0.distcp is not what was written" in out
    assert f"resumed:{folder(two, 4)}" in out and checkpoints(two) == [4, 8]
    assert curve(two) == before[0] and all(
        torch.equal(x, before[1][key]) for key, x in tensors(folder(two, 8)).items()
    )


def test_with_no_valid_checkpoint_a_run_starts_afresh(two):
    before = curve(two)
    for step in 4, 8:
        (folder(two, step) / "run.json").write_text("{}")
    codes, out = launch(
        two | {"RESUME": "auto"}
    )  # the weights of a finished run are not to be overwritten
    assert codes == [2] and "no valid checkpoint is left" in out and curve(two) == before
    (two["LOG_DIR"] / "toy/model.safetensors").unlink()
    codes, out = launch(two | {"RESUME": "auto"})
    assert codes == [0] and "no valid checkpoint: starts at step 0" in out and curve(two) == before


@pytest.mark.parametrize("fault", ["nothing arrives", "one tensor is not restored"])
def test_what_does_not_arrive_is_an_error(two, monkeypatch, fault):
    original = dcp.load

    def faulty(copies, **kwargs):
        if fault == "one tensor is not restored":
            lost = copies.pop("muon.blocks.1.ffn.fc.weight.0.momentum")
            original(copies, **kwargs)
            copies["muon.blocks.1.ffn.fc.weight.0.momentum"] = lost

    monkeypatch.setattr(dcp, "load", faulty)
    codes, out = launch(two | {"RESUME": "auto"})
    assert codes == [1] and "did not come back as it was saved" in out
    assert "muon.blocks.1.ffn.fc.weight.0.momentum" in out or fault == "nothing arrives"


def test_ranks_that_have_come_apart_are_found_at_the_next_save(settings, monkeypatch):
    original = train_gpt.train_step

    def drifting(state, *args):
        if (state.step, torch.distributed.get_rank()) == (2, 1):
            state.model.embed.data[0, 0] += 1e-6  # too small to be split over the ranks
        return original(state, *args)

    monkeypatch.setattr(train_gpt, "train_step", drifting)
    codes, out = launch(settings | {"SAVE_EVERY": 3}, 2)
    assert codes == [1, 1] and "model.embed of rank 1" in out and checkpoints(settings) == []


# What may change

FACTS = {"data_fingerprint": "f", "world_size": 1}


def test_changed_settings_are_refused_field_by_field(two):
    before = (
        sorted(path for path in two["LOG_DIR"].rglob("*")),
        (two["LOG_DIR"] / "toy.csv").read_bytes(),
    )
    codes, out = launch(
        two
        | {
            "RESUME": "auto",
            "N_LAYER": 3,
            "LR": 0.02,
            "MUON_MOMENTUM": 0.9,
            "BATCH_SIZE": 24,
            "NUM_ITERATIONS": 20,
            "NOTE": "new",
        }
    )
    assert codes == [2] and len(out.splitlines()) == 1
    for text in (
        "N_LAYER 2 -> 3",
        "LR 0.01 -> 0.02",
        "MUON_MOMENTUM 0.95 -> 0.9",
        "BATCH_SIZE 12 -> 24",
        "NUM_ITERATIONS 8 -> 20",
    ):  # its cooldown had begun
        assert text in out, text
    assert "NOTE" not in out and row(two)["status"] == "ok"
    assert before == (
        sorted(path for path in two["LOG_DIR"].rglob("*")),
        (two["LOG_DIR"] / "toy.csv").read_bytes(),
    )


def test_changed_data_is_refused(two, tmp_path):
    write_shard(tmp_path / "toy_train_000002.bin", range(1, 60))
    codes, out = launch(two | {"RESUME": "auto"})
    assert codes == [2] and "DATA_FINGERPRINT" in out


def test_a_longer_run_before_its_cooldown_is_the_longer_run(settings, monkeypatch):
    settings |= WIDE | {"WARMDOWN_ITERS": 4}
    assert launch(settings | {"NUM_ITERATIONS": 16, "RUN_ID": "whole"})[0] == [0]
    with monkeypatch.context() as patch:
        dies_at(patch, 5)
        launch(settings | {"NUM_ITERATIONS": 12})
    codes, out = launch(
        settings | {"NUM_ITERATIONS": 16, "RESUME": "auto", "LOG_EVERY": 2, "KEEP_LAST": 3}
    )
    assert codes == [0] and "warning: goes on with other settings:" in out
    assert all(
        text in out for text in ("NUM_ITERATIONS 12 -> 16", "LOG_EVERY 1 -> 2", "KEEP_LAST 2 -> 3")
    )
    logged = {0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16}
    kept = [point for point in curve(settings, "whole") if float.fromhex(point[0]) in logged]
    assert curve(settings) == kept
    assert_same(folder(settings, 16), folder(settings, 16, "whole"))


@pytest.mark.parametrize(
    "changes, same",
    [
        ({"num_iterations": 20}, True),
        ({"num_iterations": 8}, False),
        ({"warmdown_iters": 3}, True),
        ({"warmdown_iters": 8}, False),
        ({"warmup_iters": 2}, False),
        ({"lr_schedule": "cosine"}, False),
        ({"warmdown_frac": 0.25}, True),
        ({"warmdown_frac": 0.75}, False),
        ({"decay_schedule": "follow_lr"}, True),
        ({"decay_schedule": "to_zero"}, False),
        ({"momentum_cooldown_iters": 4}, True),
        ({"momentum_cooldown_iters": 8}, False),
        ({"momentum_warmup_iters": 4}, False),
        ({"momentum_start": 0.9}, False),
        ({"ema_iters": 5}, False),
        ({"logit_softcap": 5.0}, False),
        (
            {"val_every": 1, "log_every": 3, "save_every": 1, "note": "x", "device_batch_size": 4},
            True,
        ),
        ({"seed": 1}, False),
        ({"dtype": "bfloat16"}, False),
        ({"shuffle": True}, False),
        ({"beta2": 0.9}, False),
    ],
    ids=str,
)
def test_what_may_change_at_step_6_of_12(changes, same):
    base = dict(num_iterations=12, warmdown_iters=4, weight_decay=0.1, momentum_start=0.8)
    base |= dict(momentum_warmup_iters=3, momentum_cooldown_iters=2)
    saved = {"version": VERSION, "step": 6, "config": vars(tiny(**base))} | FACTS
    if same:
        assert len(changed_settings(saved, tiny(**base | changes), FACTS)) == 1
    else:
        with pytest.raises(ConfigError, match=next(iter(changes)).upper()):
            changed_settings(saved, tiny(**base | changes), FACTS)
    assert changed_settings(saved, tiny(**base), FACTS) == []


# RESUME


def test_resume_by_path_goes_back_and_sets_later_ones_aside(two):
    before = curve(two)
    codes, out = launch(two | {"RESUME": folder(two, 4), "RUN_ID": ""})
    assert codes == [0] and f"resumed:{folder(two, 4)}" in out and "run_id:toy" in out
    assert curve(two) == before and checkpoints(two) == [4, 8]
    assert (two["LOG_DIR"] / "toy/step_000008.superseded").is_dir()


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_in_it(
    settings, monkeypatch
):
    """What is saved is the state of its step, also where writing takes longer than steps."""
    settings |= WIDE
    assert launch(settings | {"RUN_ID": "whole"}, 2)[0] == [0, 0]
    write, step = Checkpoints.write, train_gpt.train_step

    def slow(self, *args):
        time.sleep(0.5)
        return write(self, *args)

    def told(state, *args):
        print(f"update:{state.step}", flush=True)
        return step(state, *args)

    monkeypatch.setattr(harness.checkpoints, "SAVE_STALL", 0.0)
    monkeypatch.setattr(Checkpoints, "write", slow)
    monkeypatch.setattr(train_gpt, "train_step", told)
    codes, out = launch(settings, 2)
    assert codes == [0, 0] and out.index("update:6\n") < out.index("step_000004 write_time"), out
    for saved in 4, 8:
        assert_same(folder(settings, saved), folder(settings, saved, "whole"))
    assert curve(settings) == curve(settings, "whole")


def test_a_fork_killed_before_its_first_save_goes_on_from_where_it_began(two, monkeypatch):
    with monkeypatch.context() as patch:
        dies_at(patch, 5)
        assert launch(two | {"RESUME": folder(two, 4), "RUN_ID": "fork"})[0] == [-9]
    assert checkpoints(two, "fork") == [4]
    codes, out = launch(two | {"RESUME": "auto", "RUN_ID": "fork"})
    assert (
        codes == [0]
        and f"resumed:{folder(two, 4, 'fork')}" in out
        and curve(two, "fork") == curve(two)[4:]
    )


def test_resume_by_path_under_another_id_is_another_run(two):
    files = {path: path.read_bytes() for path in two["LOG_DIR"].glob("toy*") if path.is_file()}
    codes, out = launch(two | {"RESUME": folder(two, 4), "RUN_ID": "fork"})
    assert codes == [0] and checkpoints(two, "fork") == [4, 8] and checkpoints(two) == [4, 8]
    assert curve(two, "fork") == curve(two)[4:] and files == {
        path: path.read_bytes() for path in files
    }


@pytest.mark.parametrize(
    "path, words",
    [
        ("toy/step_000005", "step_000004"),
        ("toy", "is no checkpoint"),
        ("nowhere/step_000004", "is no checkpoint"),
        ("../logs2/toy/step_000004", "outside LOG_DIR"),
        ("toy/step_000004.corrupt", "is no checkpoint"),
        ("../Auto", "choose auto, none"),
    ],
)
def test_a_path_that_cannot_be_resumed_is_refused(two, path, words):
    shutil.copytree(two["LOG_DIR"], two["LOG_DIR"].parent / "logs2")
    before = (two["LOG_DIR"] / "toy.txt").read_bytes()
    codes, out = launch(two | {"RESUME": two["LOG_DIR"] / path})
    assert codes == [2] and words in out and len(out.splitlines()) == 1, out
    assert (two["LOG_DIR"] / "toy.txt").read_bytes() == before


def test_resume_auto_without_anything_starts_and_after_the_end_only_validates_again(settings):
    settings |= {"RESUME": "auto"}
    assert launch(settings)[0] == [0]
    before, told = curve(settings), row(settings)
    assert launch(settings)[0] == [0]
    assert curve(settings) == before
    assert all(
        row(settings)[name] == told[name]
        for name in ("started", "final_loss", "best_loss", "status", "tokens")
    )


def test_a_row_names_the_code_that_trained(settings, monkeypatch):
    """All of it: of a run that goes on under other code both, and under no circumstances the code
    that found it finished."""
    first, second, third = (f"{train_gpt.SOURCE}\nEDIT = {i}\n" for i in range(3))
    hashes = [source_hash(text) for text in (first, second, third)]
    assert len({*hashes}) == 3
    settings |= {"SAVE_EVERY": 4, "RESUME": "auto"}
    with monkeypatch.context() as patch:
        patch.setattr(harness.checkpoints, "SAVE_STALL", 60.0)
        patch.setattr(train_gpt, "SOURCE", first)
        dies_at(patch, 6)
        assert launch(settings)[0] == [-9]
    assert row(settings)["source_sha"] == hashes[0]
    for source, is_mixed in (first, False), (second, True), (third, True):
        with monkeypatch.context() as patch:
            patch.setattr(train_gpt, "SOURCE", source)
            if source == first:  # again, to die later
                dies_at(patch, 7)
            code, out = launch(settings)
        assert code == [-9 if source == first else 0], out
        assert ("warning: other code has trained this run, too" in out) == is_mixed
        said = hashes[0] if source == first else f"{hashes[0]}+{hashes[1]}"
        assert row(settings)["source_sha"] == summary(settings)["source_sha"] == said


def test_two_live_runs_never_share_an_id(settings, monkeypatch):
    job = Job(settings | {"NUM_ITERATIONS": 10**6})
    try:
        job.wait_for("step:2/")
        before = (settings["LOG_DIR"] / "toy.txt").read_text()[:1000]
        for resume in "auto", "none":
            codes, out = launch(settings | {"RESUME": resume, "NUM_ITERATIONS": 10**6})
            assert codes == [2] and "RUN_ID=toy is live" in out and "touch" in out
        assert (settings["LOG_DIR"] / "toy.txt").read_text()[:1000] == before
        (settings["LOG_DIR"] / "toy/stop").touch()
        assert job.wait()[0] == [0] and row(settings)["status"] == "stopped"
    finally:
        job.kill(signal.SIGKILL)


# Keeping


@pytest.mark.parametrize("keep", [2, 3])
def test_keep_last(settings, keep):
    foreign = settings["LOG_DIR"] / "toy/step_000001.mine"
    foreign.mkdir(parents=True)
    assert launch(settings | {"SAVE_EVERY": 1, "KEEP_LAST": keep})[0] == [0]
    assert checkpoints(settings) == list(range(9 - keep, 9)) and foreign.is_dir()


def test_keep_last_of_one_is_refused(settings):
    codes, out = launch(settings | {"KEEP_LAST": 1})
    assert codes == [2] and "KEEP_LAST=1: must lie between 2" in out


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(settings, monkeypatch):
    original = Path.rename

    def stuck(self, target):
        if self.name == "step_000001":
            raise PermissionError(13, "Permission denied")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", stuck)
    codes, out = launch(settings | {"SAVE_EVERY": 1})
    assert (
        codes == [0]
        and checkpoints(settings) == [1, 7, 8]
        and "step_000001 stays: [Errno 13]" in out
    )


def test_the_state_is_on_the_disk_before_the_last_validation(settings, monkeypatch):
    original = train_gpt.evaluate

    def fails_at_the_end(model, loader, cfg, ranks, watch):
        if folder(settings, 8).exists():
            raise RuntimeError("the validation fails")
        return original(model, loader, cfg, ranks, watch)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "evaluate", fails_at_the_end)
        assert launch(settings)[0] == [1] and row(settings)["status"] == "crash"
    assert launch(settings | {"RESUME": "auto"})[0] == [0] and row(settings)["error"] == ""
    assert launch(settings | {"RUN_ID": "whole"})[0] == [0] and curve(settings) == curve(
        settings, "whole"
    )


# Weights for others


def test_the_exported_weights_are_the_model_and_start_another_run(settings):
    assert launch(settings)[0] == [0]
    run = settings["LOG_DIR"] / "toy"
    from safetensors.torch import load_file

    weights, saved = load_file(run / "model.safetensors"), tensors(folder(settings, 8))
    assert weights and all(torch.equal(x, saved[f"model.{name}"]) for name, x in weights.items())
    model = train_gpt.GPT(Config(**json.loads((run / "config.json").read_text())))
    model.load_state_dict(weights)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error")
        train_gpt.import_weights(
            train_gpt.GPT(tiny()), run
        )  # the check before a run says nothing where all is well
    assert sum(p.numel() for p in model.parameters()) == int(row(settings)["params_total"])
    for i, path in enumerate((run, run / "model.safetensors")):
        assert launch(settings | {"INIT_FROM": path, "RUN_ID": f"tuned{i}"})[0] == [0]
        assert (
            curve(settings, f"tuned{i}")[0][2] == curve(settings)[-1][2]
            and len(curve(settings, f"tuned{i}")) == 9
        )
    os.mkfifo(settings["LOG_DIR"] / "pipe")
    codes, out = launch(settings | {"INIT_FROM": settings["LOG_DIR"] / "pipe", "RUN_ID": "pipe"})
    assert codes == [2] and "pipe is no regular file" in out
    codes, out = launch(settings | {"INIT_FROM": run, "RUN_ID": "wide", "N_EMBD": 64})
    assert codes == [2] and f"INIT_FROM={run}" in out and "size mismatch" in out
    assert len(out.splitlines()) == 1 and row(settings, "wide")["status"] == "config"
    assert (run / "model.safetensors").stat().st_mode & 0o777 == (
        run / "config.json"
    ).stat().st_mode & 0o777


def test_a_checkpoint_touches_no_gpu(settings, monkeypatch):
    """Where there is one, torch's loader for it opens device 0 in a thread of every rank."""

    def refuse(*args, **options):
        raise AssertionError("a loader that copies from a GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dcp.filesystem, "_OverlappingCpuLoader", refuse)
    codes, out = launch(settings)
    assert codes == [0] and checkpoints(settings), out


@pytest.mark.parametrize("world", [1, 2])
def test_averages_are_validated_saved_and_left_and_change_nothing(settings, world):
    """Their loss is that of the weights that the checkpoint holds, computed here by torch."""
    settings |= {"NUM_ITERATIONS": 6, "VAL_EVERY": 2, "VOCAB_SIZE": 2305}
    averaging = settings | {"EMA_ITERS": 3}
    assert launch(settings | {"RUN_ID": "none"}, world)[0] == [0] * world
    codes, out = launch(averaging, world)
    assert codes == [0] * world, out
    assert curve(settings, "toy") == curve(settings, "none")
    told = points(averaging)
    assert "ema_val_loss" not in points(settings, "none")[0]
    assert [point["step"] for point in told if point["ema_val_loss"]] == ["0", "2", "4", "6"]
    assert told[0]["ema_val_loss"] == told[0]["val_loss"]
    saved, plain = tensors(folder(averaging, 6)), tensors(folder(settings, 6, "none"))
    averages = {key[8:]: saved.pop(key) for key in [*saved] if key.startswith("average.")}
    assert saved.keys() == plain.keys()
    assert all(torch.equal(saved[key], plain[key]) for key in saved)
    assert not torch.equal(averages["embed"], saved["model.embed"])

    left = averaging["LOG_DIR"] / "toy" / "averages"
    model = train_gpt.GPT(Config(**json.loads((left / "config.json").read_text())))
    train_gpt.import_weights(model, left)
    for name, p in model.named_parameters():
        assert torch.equal(p, averages[name]), name
    tokens = torch.from_numpy(np.fromfile(settings["INPUT_VAL_BIN"].replace("*", "000000"), "<u2"))
    tokens = tokens[512 : 512 + 65].long()  # after the header
    logits = model(tokens[:-1].view(4, 16)).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[1:]).item()
    assert summary(averaging)["ema_val_loss"] == float(told[-1]["ema_val_loss"])
    assert summary(averaging)["ema_val_loss"] == pytest.approx(loss, rel=1e-6)
    assert summary(averaging)["ema_val_loss"] != summary(averaging)["final_loss"]


def test_averages_start_from_the_weights_that_a_run_starts_from(settings):
    settings |= {"NUM_ITERATIONS": 1, "VAL_EVERY": 1}
    assert launch(settings)[0] == [0]
    tuned = {"INIT_FROM": settings["LOG_DIR"] / "toy", "RUN_ID": "tuned", "EMA_ITERS": 3}
    assert launch(settings | tuned)[0] == [0]
    first = points(settings, "tuned")[0]
    assert first["ema_val_loss"] == first["val_loss"] == points(settings)[-1]["val_loss"]


def test_tally_adds_slices_and_compares_copies():
    a = {"x": ("slice", "f", 2, 5), "y": ("copy", "f", 3, 7)}
    assert tally([a, a, {"z": ("own", "f", 1, 1)}]) == {
        "x": ["f", 4, 10],
        "y": ["f", 3, 7],
        "z": ["f", 1, 1],
    }
    for other in itertools.product(("f", "g"), (3, 4), (7, 8)):
        if other != ("f", 3, 7):
            with pytest.raises(RuntimeError, match="y of rank 1"):
                tally([a, {"y": ("copy", *other)}])
