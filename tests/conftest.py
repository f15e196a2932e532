"""What several test files share: a tiny model, tiny shards, and ranks forked from this process."""

import contextlib
import csv
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import numpy.ma  # noqa: F401  a run's first np.unique imports it: once here, not in every fork
import pytest
import torch
import torch._dynamo  # noqa: F401  a run's first save imports it: once here, not in every fork
import torch.distributed as dist
import torch.distributed.checkpoint as dcp  # once here, not a second in every forked run

from harness.checkpoints import step_folders
from harness.provenance import output_of
from harness.ranks import Ranks
from harness.settings import ROOT
from store.source import HARNESS, OPS, text_hash
import train_gpt
from train_gpt import GATE_ACTS, GATE_POSITIONS, GATES, Config, axes

torch.set_num_threads(1)  # with models this small a second thread waits more than it computes

TINY = dict(
    n_layer=2,
    n_head=2,
    n_embd=32,
    sequence_length=16,
    batch_size=12,
    device_batch_size=6,  # one rank has two micro-batches a step
    vocab_size=64,
    num_iterations=8,
    warmdown_iters=4,
    val_tokens=64,
    val_every=4,
    device="cpu",
    dtype="float32",
    compile="0",
)
CLOCKS = ("train_time", "tokens_per_sec", "data_wait")  # columns that differ between equal runs
# 2 ranks slice the embedding, 3 cannot
WIDE = {"VOCAB_SIZE": 2305, "DROPOUT": 0.1, "SHUFFLE": 1, "SAVE_EVERY": 4}

# Settings that together name every choice of the axes of a model
VARIANTS = [
    dict(zip(("attngate", "gatepos", "gateact"), (gate, where, act)))
    for gate in GATES
    for where in GATE_POSITIONS
    for act in GATE_ACTS
]
VARIANTS += [
    {axis: choice}
    for axis in ("mixer", "ffn", "norm", "pos", "init", "residual")
    for choice in axes()[axis]
]
VARIANTS += [
    {"bias": True, "norm": "layer"},
    {"tie_embeddings": False},
    {"qk_norm": False},
    {"ffn": "relu2,swiglu"},
]
VARIANTS += [
    {"ffn": "moe", axis: choice}
    for axis in ("expert", "balance", "recurrence")
    for choice in axes()[axis]
]
VARIANTS += [{"mixer": choice, "recurrence": "indexed"} for choice in axes()["mixer"]]
VARIANTS += [
    {"ffn": "moe", "norm": "rms_gain", "recurrence": "shared", "n_layer": 4, "per_visit": choice}
    for choice in axes()["per_visit"]
]
GATED_VALUES = {"value_residual": True, "value_embeds": 1, "attngate": "headwise"}
GATED_VALUES |= {"gatepos": "value"}
VARIANTS += [
    {"value_residual": True},
    {"value_embeds": 1},
    {"logit_softcap": 5.0},
    {"recurrence": "indexed", "residual": "unet"} | GATED_VALUES,
]
VARIANTS += [
    {"ffn": "moe", "recurrence": "shared", "n_layer": 4, "logit_softcap": 5.0, "residual": choice}
    | GATED_VALUES
    for choice in axes()["residual"]
]


def committed(pattern):
    """The files of a glob that git has, or all outside a repository: what users add is theirs."""
    known = output_of("git", "-C", ROOT, "ls-files").splitlines()
    return sorted(
        path for path in ROOT.glob(pattern) if not known or str(path.relative_to(ROOT)) in known
    )


def tiny(**changes):
    """A Config that trains in milliseconds."""
    return Config(**TINY | changes)


def context(T, **fields):
    """What blocks and mixers are given for sequences of T tokens."""
    return train_gpt.Context(positions=torch.arange(T), **fields)


def write_shard(path, tokens):
    """A shard written without the code under test."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def run_ranks(world, work):
    """What work(ranks) returns on each of `world` forked ranks in a gloo group, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        children = [fork(rank, world, work, folder) for rank in range(world)]
        codes = [os.waitpid(child, 0)[1] for child in children]
        assert codes == [0] * world, f"ranks ended with {codes}"
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def fork(rank, world, work, folder):
    if child := os.fork():
        return child
    code = 1
    try:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        torch.save(work(Ranks(rank, rank, world, world)), f"{folder}/{rank}.pt")
        dist.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def train(env):
    """The trainer, as its own process calls it."""
    return train_gpt.main([], env)


class Job:
    """A run of `main` as torchrun starts it, on `world` ranks with these settings only."""

    def __init__(self, env, world=1, main=train):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        settings, self.folder = (
            {name: str(value) for name, value in env.items()},
            tempfile.TemporaryDirectory(),
        )
        self.outputs = [Path(self.folder.name) / f"{rank}.txt" for rank in range(world)]
        self.pids = []
        for rank, output in enumerate(self.outputs):
            ranks = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "LOCAL_WORLD_SIZE": world,
            }
            ranks = {name: str(value) for name, value in ranks.items()} | group
            self.pids.append(start(settings | (ranks if world > 1 else {}), output, main))

    def output(self, rank=0):
        """What a rank has printed so far, on both streams."""
        return self.outputs[rank].read_text() if self.outputs[rank].exists() else ""

    def wait_for(self, text, seconds=60):
        """Until rank 0 has printed this."""
        deadline = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < deadline, f"{text!r} did not appear in {self.output()}"
            time.sleep(0.01)

    def kill(self, number, ranks=None):
        """Sends a signal to these ranks, or to all."""
        for pid in self.pids if ranks is None else [self.pids[rank] for rank in ranks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds=120):
        """(exit codes by rank, what rank 0 printed). Kills what takes longer and fails the test."""
        deadline, codes = time.monotonic() + seconds, [None] * len(self.pids)
        while None in codes:
            for rank in [rank for rank, code in enumerate(codes) if code is None]:
                pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                codes[rank] = os.waitstatus_to_exitcode(status) if pid else None
            if time.monotonic() > deadline:
                self.kill(signal.SIGKILL)
                raise AssertionError(f"still running after {seconds} s: {codes}; {self.output()}")
            time.sleep(0.005)
        return codes, self.output()


def launch(env, world=1, main=train):
    """A Job from start to end: (exit codes by rank, what rank 0 printed on both streams)."""
    return Job(env, world, main).wait()


def start(env, output, main=train):
    """The id of a forked process that calls main with this environment, printing into a file."""
    for source in (train_gpt.SOURCE + OPS, HARNESS):
        text_hash(source)  # which is kept: once here, not again in every fork
    if child := os.fork():
        return child
    code = 70
    try:
        torch.set_num_threads(1)
        # a shell has it ignored in what it runs behind
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(env)
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = main(os.environ)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def checkpoints(settings, run_id="toy"):
    """The steps that a run has checkpoints of."""
    return list(step_folders(settings["LOG_DIR"] / run_id))


def folder(settings, step, run_id="toy"):
    """The checkpoint of a step."""
    return settings["LOG_DIR"] / run_id / f"step_{step:06d}"


def tensors(path):
    """All tensors of a checkpoint, read without the code under test."""
    reader = dcp.FileSystemReader(path)
    meta = reader.read_metadata().state_dict_metadata
    held = {key: torch.empty(kept.size, dtype=kept.properties.dtype) for key, kept in meta.items()}
    dcp.load(held, storage_reader=reader, no_dist=True)
    return held


def assert_same(a, b):
    """Two checkpoints hold the same bits."""
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and len(a) > 20
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def points(settings, run_id=None):
    """The curve as it is written: {column: text} for each logged step."""
    path = settings["LOG_DIR"] / f"{run_id or settings['RUN_ID']}.csv"
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def curve(settings, run_id=None, columns=("step", "train_loss", "val_loss", "lr", "grad_norm")):
    """What was measured in every logged step, floats as hexadecimals."""
    return [
        tuple(float(point[name]).hex() if point[name] else "" for name in columns)
        for point in points(settings, run_id)
    ]


def summary(settings, run_id=None):
    """The summary of a run."""
    return json.loads((settings["LOG_DIR"] / f"{run_id or settings['RUN_ID']}.json").read_text())


def rows(settings):
    """The table of all runs: {column: text} for each."""
    with open(settings["RESULTS_CSV"], newline="") as file:
        return list(csv.DictReader(file))


def row(settings, run_id=None):
    """The one row of a run."""
    run_id = run_id or settings["RUN_ID"]
    (found,) = [row for row in rows(settings) if row["run_id"] == run_id]
    return found


def dies_at(monkeypatch, step, number=signal.SIGKILL, rank=None):
    """Before it makes the update after `step`, a rank (or each) sends itself a signal."""
    original = train_gpt.train_step

    def fatal(state, *args):
        if state.step == step and rank in (None, torch.distributed.get_rank()):
            os.kill(os.getpid(), number)
        return original(state, *args)

    monkeypatch.setattr(train_gpt, "train_step", fatal)


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def settings(shards, tmp_path):
    """The environment of a tiny run that leaves everything below tmp_path."""
    return {
        name.upper(): int(value) if isinstance(value, bool) else value
        for name, value in (TINY | shards).items()
    } | {
        "LOG_DIR": tmp_path / "logs",
        "RESULTS_CSV": tmp_path / "results.csv",
        "RUN_ID": "toy",
        "LR": 0.01,
        "MAX_EPOCHS": 0,
        "LOG_EVERY": 1,
    }


@pytest.fixture
def shards(tmp_path):
    """The settings that name a dataset of three training shards and one for validation."""
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 64, 97)  # repeats, so that there is something to learn
    for i, size in enumerate((700, 500, 333)):
        write_shard(tmp_path / f"toy_train_{i + 1:06d}.bin", np.resize(np.roll(pattern, i), size))
    write_shard(tmp_path / "toy_val_000000.bin", np.resize(pattern, 400))
    return {
        "input_bin": f"{tmp_path}/toy_train_*.bin",
        "input_val_bin": f"{tmp_path}/toy_val_*.bin",
    }
