"""What several test files share: a tiny model, tiny shards, and ranks forked from this process."""

import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint  # noqa: F401  once here, not a second in every forked run

from harness.provenance import output_of
from harness.ranks import Ranks
from harness.settings import ROOT
import train_gpt
from train_gpt import Config

TINY = dict(
    n_layer=2,
    n_head=2,
    n_embd=32,
    sequence_length=16,
    batch_size=12,
    device_batch_size=2,
    vocab_size=64,
    num_iterations=8,
    warmdown_iters=4,
    val_tokens=64,
    val_every=4,
    device="cpu",
    dtype="float32",
    compile="0",
)


def committed(pattern):
    """The files of a glob below the project that git has, or all outside a repository: what users add is theirs."""
    known = output_of("git", "-C", ROOT, "ls-files").splitlines()
    return sorted(
        path for path in ROOT.glob(pattern) if not known or str(path.relative_to(ROOT)) in known
    )


def tiny(**changes):
    """A Config that trains in milliseconds."""
    return Config(**TINY | changes)


def write_shard(path, tokens):
    """A shard written without the code under test."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def run_ranks(world, work):
    """Runs work(ranks) on `world` forked ranks in a gloo group and returns what each returned, by rank."""
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


class Job:
    """A run of train_gpt.main as torchrun would start it, on `world` forked ranks with these settings only."""

    def __init__(self, env, world=1):
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
            self.pids.append(start(settings | (ranks if world > 1 else {}), output))

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
        """(exit codes by rank, what rank 0 printed). Ranks that take longer are killed, and the test fails."""
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


def launch(env, world=1):
    """A Job from its start to its end: (exit codes by rank, what rank 0 printed on both streams)."""
    return Job(env, world).wait()


def start(env, output):
    """A forked process that runs train_gpt.main in this environment; its id. Its output goes to a file."""
    if child := os.fork():
        return child
    code = 70
    try:
        torch.set_num_threads(1)
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell has it ignored in what it runs behind
        os.environ.clear()
        os.environ.update(env)
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = train_gpt.main([], os.environ)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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
    """A dataset of three training shards and one for validation; returns the settings that name it."""
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 64, 97)  # repeats, so that there is something to learn
    for i, size in enumerate((700, 500, 333)):
        write_shard(tmp_path / f"toy_train_{i + 1:06d}.bin", np.resize(np.roll(pattern, i), size))
    write_shard(tmp_path / "toy_val_000000.bin", np.resize(pattern, 400))
    return {
        "input_bin": f"{tmp_path}/toy_train_*.bin",
        "input_val_bin": f"{tmp_path}/toy_val_*.bin",
    }
