"""Signals, crashes, hangs, numbers that are not finite, full disk, full memory: orderly ends."""

import json
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
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
    tensors,
    tiny,
)

import harness.run
from harness.checkpoints import Checkpoints, defect
from harness.files import RunFiles
from harness.records import Records
from harness.watch import Watch
import train_gpt
from train_gpt import State

ENDLESS = {"NUM_ITERATIONS": 10**6, "WARMDOWN_ITERS": 0}


def announce(patch, owner, name, text, seconds=0.0, rank=None):
    """A function prints a line, and takes a while, before it does its work."""
    original = getattr(owner, name)

    def announced(*args, **kwargs):
        if rank in (None, torch.distributed.get_rank()):
            print(text, flush=True)
            time.sleep(seconds)
        return original(*args, **kwargs)

    patch.setattr(owner, name, announced)


# Signals


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("ranks", [[0, 1], [1]], ids=["all", "one"])
def test_a_signal_to_any_rank_saves_all_at_one_step(settings, monkeypatch, number, ranks):
    settings |= WIDE | ENDLESS | {"SAVE_EVERY": 0}
    job = Job(settings, 2)
    job.wait_for("step:9/")
    began = time.monotonic()
    job.kill(number, ranks)
    job.kill(number, ranks)  # a second one changes nothing
    codes, out = job.wait()
    assert codes == [0, 0] and time.monotonic() - began < 20
    (step,) = checkpoints(settings)
    told = row(settings)
    assert told["status"] == "preempted" and step >= 9 and "\nstatus: preempted\n" in out
    assert (
        told["tokens"] == str(step * 12 * 16)
        and f"\npreempted at step {step}; this goes on: " in out
        and " RUN_ID=toy RESUME=auto " in out
    )
    told_of = [int(float.fromhex(point[0])) for point in curve(settings)]
    assert told_of == list(range(step))  # the last one is for who goes on
    validated = [point["step"] for point in points(settings) if point["val_loss"]]
    assert told["val_step"] == validated[-1] and f"\nval_step: {validated[-1]}\n" in out
    assert not list((settings["LOG_DIR"] / "toy").glob("stacks*"))
    assert defect(folder(settings, step)) == ""


PLACES = {
    "a step": None,
    "warm-up": (train_gpt, "compile_model"),
    "evaluation": (train_gpt, "evaluate"),
    "a save": (Checkpoints, "write"),
    "the end": (harness.run, "export_weights"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_anywhere_loses_nothing(settings, monkeypatch, place):
    """SIGTERM comes while the run is there; what goes on is the run that was never stopped."""
    settings |= WIDE | {"NUM_ITERATIONS": 12, "VAL_EVERY": 6}
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "compile_model", lambda *args: None)
        settings |= {"COMPILE": 1} if place == "warm-up" else {}
        assert launch(settings | {"RUN_ID": "whole"}, 2)[0] == [0, 0]
        if place == "a step":
            dies_at(patch, 5, signal.SIGTERM, rank=1)
            job = Job(settings, 2)
        else:
            announce(patch, *PLACES[place], "<now>", 0.5)
            job = Job(settings, 2)
            job.wait_for("<now>")
            job.kill(signal.SIGTERM, [1])
        codes, out = job.wait()
        assert codes == [0, 0] and row(settings)["status"] == (
            "ok" if place == "the end" else "preempted"
        ), out
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "compile_model", lambda *args: None)
        assert launch(settings | {"RESUME": "auto"}, 2)[0] == [0, 0]
    assert curve(settings) == curve(settings, "whole") and row(settings)["status"] == "ok"
    assert_same(folder(settings, 12), folder(settings, 12, "whole"))


def test_a_long_evaluation_is_left_at_once(settings, monkeypatch):
    announce(monkeypatch, train_gpt.GPT, "score", "x", 0.05)
    job = Job(settings | {"VAL_TOKENS": 384, "DEVICE_BATCH_SIZE": 1}, 2)  # 12 batches a rank
    job.wait_for("x\nx\n")
    job.kill(signal.SIGTERM)
    codes, out = job.wait()
    assert codes == [0, 0] and out.count("x\n") < 7 and checkpoints(settings) == [0]


def test_the_stop_file_stops_a_run_that_can_go_on(settings):
    settings |= WIDE | {"NUM_ITERATIONS": 300, "WARMDOWN_ITERS": 0}
    job = Job(settings, 2)
    job.wait_for("step:5/")
    (settings["LOG_DIR"] / "toy/stop").touch()
    assert job.wait()[0] == [0, 0] and row(settings)["status"] == "stopped"
    assert not (settings["LOG_DIR"] / "toy/stop").exists()
    step = max(checkpoints(settings))
    codes, out = launch(settings | {"RESUME": "auto", "NUM_ITERATIONS": step + 4}, 2)
    assert (
        codes == [0, 0]
        and f"resumed:{folder(settings, step)}" in out
        and row(settings)["status"] == "ok"
    )


def test_the_decision_is_the_same_on_all_ranks_and_waits_for_none(tmp_path):
    files = RunFiles(tmp_path, "toy")
    files.folder.mkdir()

    def work(ranks):
        watch, statuses = Watch(files, ranks, 60), []
        for i in range(6):
            if (i, ranks.rank) == (2, 1):
                os.kill(os.getpid(), signal.SIGUSR1)
            statuses.append(watch.poll())
        watch.close()
        return statuses

    assert run_ranks(3, work) == [["", "", "", "preempted", "preempted", "preempted"]] * 3


# Ranks that fail


def raises(*args):
    raise RuntimeError("this rank has had enough")


FAILURES = {
    "exception": raises,
    "exit": lambda *args: os._exit(7),
    "kill": lambda *args: os.kill(os.getpid(), 9),
    "segmentation fault": lambda *args: os.kill(os.getpid(), signal.SIGSEGV),
}


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_rank_fails_the_job_ends_and_says_which(settings, monkeypatch, kind, rank):
    settings |= WIDE | {"NUM_ITERATIONS": 12, "SAVE_EVERY": 4}
    original = train_gpt.train_step

    def failing(state, *args):
        if (state.step, torch.distributed.get_rank()) == (6, rank):
            FAILURES[kind]()
        return original(state, *args)

    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "train_step", failing)
        codes, out = launch(settings, 2)
    assert (
        time.monotonic() - began < 60
        and codes[1 - rank] == 1
        and codes[rank] != 0
        and checkpoints(settings) == [4]
    )
    first = (settings["LOG_DIR"] / "toy/error.txt").read_text()
    if kind == "exception":
        assert first.startswith(f"crash: RuntimeError: this rank has had enough\nrank {rank}, ")
        assert "Traceback" in first
        assert row(settings)["status"] == "crash" and "had enough" in row(settings)["error"]
    else:
        assert f"\nrank {1 - rank}, " in first and row(settings)["status"] == "crash"
    assert launch(settings | {"RESUME": "auto"}, 2)[0] == [0, 0] and row(settings)["status"] == "ok"
    assert not (settings["LOG_DIR"] / "toy/error.txt").exists() and row(settings)["error"] == ""
    assert (settings["LOG_DIR"] / "toy/last_error.txt").read_text() == first


def test_ranks_that_hang_write_their_stacks_and_end(settings, monkeypatch):
    original = train_gpt.train_step

    def hangs(state, *args):
        if (state.step, torch.distributed.get_rank()) == (5, 1):
            time.sleep(600)
        return original(state, *args)

    monkeypatch.setattr(train_gpt, "train_step", hangs)
    job = Job(settings | {"HANG_TIMEOUT": 2}, 2)
    try:
        job.wait_for("step:4/")
        began = time.monotonic()
        assert (
            os.waitstatus_to_exitcode(os.waitpid(job.pids[0], 0)[1]) == 1
            and time.monotonic() - began < 15
        )
        stacks = [
            (settings["LOG_DIR"] / f"toy/stacks_rank{rank}.txt").read_text() for rank in (0, 1)
        ]
        assert all("Timeout (0:00:02)!" in text for text in stacks) and "in hangs" in stacks[1]
        assert row(settings)["status"] == "crash" and "stacks_rank" in row(settings)["error"]
    finally:
        job.kill(signal.SIGKILL, [1])
        os.waitpid(job.pids[1], 0)


@pytest.mark.parametrize("slow, code", [(1, 0), (2, 1)], ids=["first", "second"])
def test_only_until_the_first_step_a_rank_may_be_late(settings, monkeypatch, slow, code):
    original, calls = train_gpt.evaluate, []

    def late(*args):
        calls.append(1)
        if len(calls) == slow and torch.distributed.get_rank() == 1:
            time.sleep(3)
        return original(*args)

    monkeypatch.setattr(train_gpt, "evaluate", late)
    codes, out = launch(settings | {"HANG_TIMEOUT": 1, "VAL_EVERY": 2, "NUM_ITERATIONS": 2}, 2)
    assert codes == [code, code] and "step:1/2 train_loss" in out, out


# Numbers that are not finite


def poison(monkeypatch, steps, rank, kind):
    """In these steps, one rank has a loss that is NaN, or an infinite gradient at a finite loss."""
    original, reduce_grads = train_gpt.train_step, train_gpt.Optimizer.reduce_grads
    now = {}

    def step(state, *args):
        now["bad"] = state.step in steps and torch.distributed.get_rank() == rank
        return original(state, *args)

    def forward(self, *args):
        loss, routing = plain(self, *args)
        return (
            loss * np.nan if now.get("bad") and kind == "loss" and self.training else loss
        ), routing

    def reduce(self):
        if now.get("bad") and kind == "gradient":
            self.partitions[0].params[0].grad.view(-1)[3] = np.inf
        return reduce_grads(self)

    plain = train_gpt.GPT.forward
    monkeypatch.setattr(train_gpt, "train_step", step)
    monkeypatch.setattr(train_gpt.GPT, "forward", forward)
    monkeypatch.setattr(train_gpt.Optimizer, "reduce_grads", reduce)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("world, rank", [(2, 1), (1, 0)])
def test_a_step_that_is_not_finite_changes_nothing_and_is_told(
    settings, monkeypatch, kind, world, rank
):
    """A skipped step leaves all bits as they were; its line says which rank and which samples."""
    settings |= WIDE | {
        "SHUFFLE": 0,
        "SAVE_EVERY": 1,
        "KEEP_LAST": 9,
        "NUM_ITERATIONS": 9,
        "VAL_EVERY": 0,
        "LOG_EVERY": 100,
    }
    poison(monkeypatch, {5}, rank, kind)
    codes, out = launch(settings, world)
    assert codes == [0] * world, out
    steps = checkpoints(settings)
    assert steps == [1, 2, 3, 4, 5, 7, 8, 9]  # what may have diverged is not saved
    first = 5 * 12 + rank * 12 // world  # of 36, 24 and 12 samples, the whole batches of shards
    assert (
        f"step:6/9 bad_gradient rank:{rank} shard:'{settings['INPUT_BIN'].replace('*', '000003')}' "
        in out
    )
    assert (
        f" offset:{16 * (first - 60)} samples:{12 // world}\n" in out
        and out.count("bad_gradient") == 1
    )
    assert row(settings)["bad_steps"] == "1" and row(settings)["status"] == "ok"


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_bit_on_any_rank(monkeypatch, kind):
    def work(ranks):
        cfg = tiny(vocab_size=2304, weight_decay=0.1)
        state, batches = (
            State.build(cfg, ranks),
            torch.randint(0, 64, (2, 6, 17), generator=torch.Generator()),
        )
        held = []
        for batch in batches:
            held.append({key: tensor.clone() for key, (tensor, _) in state.tensors().items()})
            train_gpt.train_step(state, cfg, batch[:, :-1], batch[:, 1:])
        held.append({key: tensor for key, (tensor, _) in state.tensors().items()})
        return [
            [key for key in a if not torch.equal(a[key], b[key])] for a, b in zip(held, held[1:])
        ]

    poison(monkeypatch, {1}, 1, kind)
    for first, second in run_ranks(2, work):
        assert len(first) >= 10 and second == []


def test_bad_steps_in_a_row_end_the_run_and_leave_no_bad_checkpoint(settings, monkeypatch):
    poison(monkeypatch, set(range(4, 10**6)), 1, "loss")
    codes, out = launch(
        settings | ENDLESS | {"MAX_BAD_STEPS": 3, "SAVE_EVERY": 2, "LOG_EVERY": 5, "VAL_EVERY": 0},
        2,
    )
    assert (
        codes == [4, 4]
        and row(settings)["status"] == "diverged"
        and checkpoints(settings) == [2, 4]
    )
    assert out.count("bad_gradient rank:1") == int(row(settings)["bad_steps"]) == 6
    assert all(torch.isfinite(x).all() for x in tensors(folder(settings, 4)).values())


def test_float16_gradients_that_stay_infinite_end_the_run(settings, monkeypatch):
    """The scale sinks to 1 first, as far as it can help."""
    poison(monkeypatch, set(range(4, 10**6)), 0, "gradient")
    codes, out = launch(settings | ENDLESS | {"DTYPE": "float16", "MAX_BAD_STEPS": 3})
    assert (
        codes == [4]
        and row(settings)["status"] == "diverged"
        and 3 < int(row(settings)["bad_steps"]) < 40
    )


def test_the_bad_step_of_a_checkpoint_is_told_after_resuming(settings, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, {5}, 0, "gradient")
        dies_at(patch, 7)
        assert launch(settings | {"SAVE_EVERY": 6})[0] == [-9]
    assert (
        launch(settings | {"RESUME": "auto", "SAVE_EVERY": 6})[0] == [0]
        and row(settings)["bad_steps"] == "1"
    )
    assert (settings["LOG_DIR"] / "toy.txt").read_text().count("\nstep:6/8 bad_gradient") == 1


def test_the_step_waits_for_no_device(settings, monkeypatch):
    """What waits is reading a number from a device; between logged steps no line does that."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen, OURS = (
        [],
        re.compile(
            re.escape(os.path.dirname(train_gpt.__file__)) + r"/(train_gpt\.py|scripts/harness/)"
        ),
    )

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if "_local_scalar_dense" in str(operator):
                frame = sys._getframe()
                while frame and not OURS.match(frame.f_code.co_filename):
                    frame = frame.f_back
                seen.append(frame.f_code.co_name if frame else "elsewhere")
            return operator(*args, **kwargs or {})

    original = train_gpt.train

    def watched(*args):
        with Reads():
            status = original(*args)
        print("reads:", {name: seen.count(name) for name in sorted(set(seen))}, flush=True)
        return status

    monkeypatch.setattr(train_gpt, "train", watched)
    codes, out = launch(
        settings | {"NUM_ITERATIONS": 40, "LOG_EVERY": 100, "VAL_EVERY": 0, "SAVE_EVERY": 0}
    )
    reads = json.loads(re.search(r"^reads: (.*)$", out, re.M)[1].replace("'", '"'))
    assert codes == [0] and reads.pop("poll") <= 42 and sum(reads.values()) < 12, (
        reads
    )  # poll: a flag on the CPU


def test_few_bad_steps_in_a_row_do_not_end_the_run_and_are_remembered(settings, monkeypatch):
    settings |= WIDE | {"MAX_BAD_STEPS": 3, "NUM_ITERATIONS": 16, "SAVE_EVERY": 6, "LOG_EVERY": 4}
    with monkeypatch.context() as patch:
        poison(patch, {3, 4, 5, 8, 9, 10}, 0, "gradient")
        dies_at(patch, 9)
        assert launch(settings)[0] == [-9]
    poison(monkeypatch, {3, 4, 5, 8, 9, 10}, 0, "gradient")
    assert launch(settings | {"RESUME": "auto"})[0] == [0] and row(settings)["bad_steps"] == "6"
    assert (settings["LOG_DIR"] / "toy.txt").read_text().count("\nstep:5/16 bad_gradient") == 1


def test_learning_rate_without_measure_diverges(settings):
    codes, out = launch(settings | ENDLESS | {"LR": 1e20, "MUON_LR": 1e20, "SAVE_EVERY": 10}, 2)
    assert codes == [4, 4] and row(settings)["status"] == "diverged" and checkpoints(settings) == []
    assert not (settings["LOG_DIR"] / "toy/model.safetensors").exists()


def test_an_overflow_of_float16_lowers_the_scale_and_is_no_bad_step(monkeypatch):
    def work(ranks):
        cfg = tiny(dtype="float16", init="gpt2")
        state = State.build(cfg, ranks)
        state.loss_scale.value.fill_(2.0**40)
        before = state.model.embed.detach().clone()
        tokens = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(ranks.rank))
        loss, norm, _ = train_gpt.train_step(state, cfg, tokens[:, :-1], tokens[:, 1:])
        return (
            torch.isfinite(loss).item(),
            torch.isfinite(norm).item(),
            torch.equal(before, state.model.embed),
            state.loss_scale.value.item(),
            state.bad[0][0].item(),
        )

    assert run_ranks(2, work) == [(True, False, True, 2.0**39, 0.0)] * 2


# Disk and memory


def limit(patch, owner, name, size):
    """From a call of this function on, no file of this process may grow beyond `size` bytes."""
    original = getattr(owner, name)

    def limited(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size(*args), resource.RLIM_INFINITY))
        return original(*args, **kwargs)

    patch.setattr(owner, name, limited)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(settings, monkeypatch):
    """The second save fails on rank 0; the others, before and after, are whole."""

    def size(self, copies, held, facts):
        full = facts["step"] == 4 and torch.distributed.get_rank() == 0
        return 400_000 if full else resource.RLIM_INFINITY

    limit(monkeypatch, Checkpoints, "write", size)
    settings |= WIDE | {"SAVE_EVERY": 2, "KEEP_LAST": 5}
    codes, out = launch(settings, 2)
    assert codes == [0, 0] and checkpoints(settings) == [2, 6, 8], out
    assert "warning: no checkpoint at step 4: " in out and "File too large" in out
    assert not list((settings["LOG_DIR"] / "toy").glob(".tmp*")) and row(settings)["status"] == "ok"
    assert not any(defect(folder(settings, step)) for step in (2, 6, 8))


def test_a_disk_that_stays_full_ends_the_run(settings, monkeypatch):
    limit(
        monkeypatch,
        Checkpoints,
        "write",
        lambda self, copies, held, facts: resource.RLIM_INFINITY if facts["step"] == 2 else 400_000,
    )
    codes, out = launch(settings | WIDE | ENDLESS | {"SAVE_EVERY": 2}, 2)
    assert (
        codes == [1, 1] and checkpoints(settings) == [2] and out.count("no checkpoint at step") == 3
    )
    told = row(settings)
    assert (
        "3 checkpoints in a row could not be written" in told["error"] and told["status"] == "crash"
    )


def test_a_last_checkpoint_that_cannot_be_written_is_no_success(settings, monkeypatch):
    limit(monkeypatch, Checkpoints, "write", lambda self, copies, held, facts: 400_000)
    codes, out = launch(settings | WIDE | {"SAVE_EVERY": 0}, 2)
    assert codes == [1, 1] and row(settings)["status"] == "crash" and row(settings)["final_loss"]


def test_a_log_that_cannot_grow_is_told_and_the_summary_is_whole(settings, monkeypatch):
    log = settings["LOG_DIR"] / "toy.txt"
    limit(
        monkeypatch,
        train_gpt,
        "train_step",
        lambda state, *args: log.stat().st_size + 10 if state.step == 3 else resource.RLIM_INFINITY,
    )
    limit(monkeypatch, Records, "close", lambda *args: log.stat().st_size)
    codes, out = launch(settings | {"SHARD_TAIL": "keep"})
    assert codes == [1] and f"warning: {log} is not whole: [Errno 27] File too large" in out
    assert out.count("warning: ") == 1, "once, not for each line that is lost"
    told = json.loads((settings["LOG_DIR"] / "toy.json").read_text())
    assert told["status"] == "ok" and told["final_loss"] and f"{log} is not whole" in told["error"]
    assert f"final_loss: {told['final_loss']:.6g}" in out


def test_a_table_that_cannot_be_written_at_the_end_is_told(settings, monkeypatch):
    original = Records.close

    def broken(self, *args, **values):
        settings["RESULTS_CSV"].unlink()
        settings["RESULTS_CSV"].mkdir()
        return original(self, *args, **values)

    monkeypatch.setattr(Records, "close", broken)
    codes, out = launch(settings)
    assert codes == [1] and "row: not written" in out and "rebuild_results.py" in out
    assert json.loads((settings["LOG_DIR"] / "toy.json").read_text())["status"] == "ok"


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is on Linux")
@pytest.mark.parametrize("rank", [0, 1])
def test_out_of_memory_names_the_peak_and_what_to_lower(settings, monkeypatch, rank):
    def greedy(state, *args):
        if state.step == 3 and torch.distributed.get_rank() == rank:
            torch.empty(2**50)
        return original(state, *args)

    original = train_gpt.train_step
    monkeypatch.setattr(train_gpt, "train_step", greedy)
    codes, out = launch(settings, 2)
    assert codes[rank] == 5 and row(settings)["status"] == "oom"
    for text in "lower DEVICE_BATCH_SIZE=6,", "SEQUENCE_LENGTH", "N_LAYER":
        assert text in row(settings)["error"]
    assert re.search(r"peak \d+\.\d\d GiB", row(settings)["error"])


# DETERMINISTIC=1


def test_deterministic_runs_are_equal_and_refuse_what_is_not(settings):
    settings |= {"DETERMINISTIC": 1, "DROPOUT": 0.1}
    for name in "a", "b":
        assert launch(settings | {"RUN_ID": name}, 2)[0] == [0, 0]
    assert curve(settings, "a") == curve(settings, "b")
    codes, out = launch(settings | {"COMPILE": 1, "RUN_ID": "c"})
    assert (
        codes == [2]
        and "DETERMINISTIC=1 needs COMPILE=0 or auto" in out
        and len(out.splitlines()) == 1
    ), out


# What lies around


def test_an_overflow_in_the_last_step_still_ends_in_a_checkpoint(settings, monkeypatch):
    """The update is left out; what it would have changed is whole; a second run says the same."""
    poison(monkeypatch, {7}, 0, "gradient")
    assert launch(settings)[0] == [0] and checkpoints(settings) == [8]
    monkeypatch.undo()
    codes, out = launch(settings | {"RESUME": "auto"})
    assert codes == [0] and "status: ok" in out


def test_damaged_caches_and_indices(settings):
    """A cache is made anew; an index is named, before anything begins."""
    assert launch(settings)[0] == [0]
    (settings["LOG_DIR"] / ".shard_hashes.json").write_text('{"torn')
    assert launch(settings | {"RUN_ID": "next"})[0] == [0]
    index = Path(settings["INPUT_BIN"]).parent / "index.json"
    index.write_text('{"torn')
    codes, out = launch(settings | {"RUN_ID": "third", "VOCAB_SIZE": 0})
    assert codes == [3] and f"{index}: expected a JSON object" in out and "Traceback" not in out


def test_a_rank_whose_files_are_elsewhere_is_missed(tmp_path):
    """A folder that not all machines share gets no checkpoint, for none could be resumed."""
    records = SimpleNamespace(folder=tmp_path, rank=0, print=print)
    checkpoints = SimpleNamespace(world=2, records=records)
    (tmp_path / ".tmp_step").mkdir()
    (tmp_path / ".tmp_step/__0_0.distcp").write_text("")
    with pytest.raises(OSError, match="one folder for all machines"):
        Checkpoints.publish(checkpoints, tmp_path / ".tmp_step", tmp_path / "step_000001", {})
    assert not (tmp_path / "step_000001").exists()
