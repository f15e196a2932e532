"""The ranks of a run: who they are, how they meet and agree."""

import contextlib, ctypes, os, signal
from collections import namedtuple
from datetime import timedelta

import torch
import torch.distributed as dist

from harness.contract import ConfigError
from harness.provenance import new_run_id

FIRST_STEP_TIMEOUT = 1800  # seconds: joining, compiling and reading may take so long


class Ranks(
    namedtuple("Ranks", "rank local_rank world_size local_world_size", defaults=(0, 0, 1, 1))
):
    """Where this process stands among those that torchrun started; alone without torchrun."""

    @classmethod
    def from_env(cls, env):
        return cls(**{name: int(env[name.upper()]) for name in cls._fields if name.upper() in env})

    def device(self, cfg):
        return (
            torch.device("cuda", self.local_rank) if cfg.device == "cuda" else torch.device("cpu")
        )


def setup(cfg, ranks, env, store=None):
    """Joins the ranks in a process group, of one without torchrun, and agrees on the run's id, which is returned."""
    if cfg.deterministic:
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if cfg.device == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    with contextlib.suppress(OSError, AttributeError):  # another system or C library
        libc, parent_death_signal, trim_threshold, mmap_max = ctypes.CDLL("libc.so.6"), 1, -1, -4
        if store:  # where the launcher is killed, its ranks are to save and end
            libc.prctl(parent_death_signal, signal.SIGTERM)
        if (
            cfg.device == "cpu"
        ):  # keep what is freed for the next step: large tensors' pages anew take a tenth of it
            libc.mallopt(mmap_max, 0)
            libc.mallopt(trim_threshold, 2**31 - 1)
    meeting = None if "MASTER_ADDR" in env else dist.HashStore()
    if (
        store and ranks.local_world_size == ranks.world_size
    ):  # it still has the addresses of ranks that have died
        meeting = dist.PrefixStore(f"attempt_{env['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cfg.device == "cuda" else "gloo",
        store=meeting,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=FIRST_STEP_TIMEOUT),
    )
    run_id = cfg.run_id or new_run_id(cfg.preset)  # unless the store has one from before a restart
    return agree(
        lambda: store.compare_set("train_gpt/run_id", "", run_id).decode() if store else run_id
    )


def agree(work):
    """Runs work on every rank and returns what it returned on rank 0, whose ConfigError is raised by all."""
    try:
        outcome = [work()]
    except ConfigError as error:
        outcome = [error]
    dist.broadcast_object_list(outcome, device=torch.device("cpu"))
    if isinstance(outcome[0], ConfigError):
        raise outcome[0]
    return outcome[0]
