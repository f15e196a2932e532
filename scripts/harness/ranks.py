"""The ranks of a run: which one this process is, how they meet, and how they agree."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist

from harness.provenance import new_run_id
from harness.settings import Settings
from store.contract import ConfigError

JOIN_PATIENCE = 10  # seconds until a rank says that it waits for others
FIRST_STEP_TIMEOUT = 1800  # seconds: joining, compiling and reading may take so long


class Ranks(NamedTuple):
    """Where this process stands among those that torchrun started; alone without torchrun."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """From the variables that torchrun sets; `check` says where they cannot be."""
        texts = {name: env.get(name.upper(), "") for name in cls._fields}
        return cls(**{name: int(text) for name, text in texts.items() if text.isdecimal()})

    def check(self, env: Mapping[str, str]) -> None:
        """Raises ConfigError for variables that torchrun would not have set so."""
        way = (
            "start ranks with torchrun --standalone --nproc_per_node=2 train_gpt.py; for one "
            "process unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE"
        )
        for name in map(str.upper, self._fields):
            if name in env and not env[name].isdecimal():
                raise ConfigError(f"{name}={env[name][:80]!r}: must be a whole number; {way}")
        for name, count in ("rank", "world_size"), ("local_rank", "local_world_size"):
            own, limit = getattr(self, name), getattr(self, count)
            if not own < limit:
                raise ConfigError(
                    f"{name.upper()}={own}: must be below {count.upper()}={limit}; {way}"
                )
        if self.world_size > 1 and env.get("DRY_RUN", "0") in ("", "0"):  # a dry run meets nobody
            if "MASTER_ADDR" not in env:
                raise ConfigError(f"WORLD_SIZE={self.world_size} without MASTER_ADDR; {way}")
            port = env.get("MASTER_PORT", "")
            if not (port.isdecimal() and 0 < int(port) < 2**16):
                raise ConfigError(f"MASTER_PORT={port[:80]!r}: must be 1 to 65535; {way}")
            if "TORCHELASTIC_USE_AGENT_STORE" in env and "TORCHELASTIC_RUN_ID" not in env:
                raise ConfigError(
                    "TORCHELASTIC_USE_AGENT_STORE without torchrun: every rank would wait for "
                    "another to begin; unset TORCHELASTIC_USE_AGENT_STORE"
                )

    @property
    def speaks(self) -> bool:
        """Whether a refusal is told here: by one rank of a machine, or by what is none."""
        return self.local_rank == 0 or self.local_rank >= self.local_world_size

    def device(self, cfg: Settings) -> torch.device:
        """The device of this rank."""
        return torch.device(f"cuda:{self.local_rank}" if cfg.device == "cuda" else "cpu")


def setup(cfg: Settings, ranks: Ranks, env: Mapping[str, str]) -> str:
    """Joins the ranks in a process group, of one without torchrun; returns the run's id.

    Raises ConfigError for ranks that torchrun has started again.
    """
    if env.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise ConfigError(
            "torchrun's --max-restarts: a restarted rank may look for one that is gone; "
            "MAX_RESTARTS=3 bash scripts/run_8xh100.sh starts all ranks again"
        )
    if cfg.deterministic:
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Products of float32 are of float32, whatever an environment or sitecustomize said before: by
    # this call of old torch, after which its old and new settings agree and both can be read.
    torch.set_float32_matmul_precision("highest")
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # torch.compile's advice
    if cfg.device == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    else:
        keep_memory()
    where = f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}"
    with joining(f"rank {ranks.rank} waits for the {ranks.world_size} ranks to meet at {where}"):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cfg.device == "cuda" else "gloo",
            store=None if ranks.world_size > 1 else dist.HashStore(),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timedelta(seconds=FIRST_STEP_TIMEOUT),
        )
    if cfg.device == "cuda":  # nccl is set up here, and not in the first step on the clock
        dist.barrier(device_ids=[ranks.local_rank])
    return from_rank0(lambda: cfg.run_id or new_run_id(cfg.preset))


@contextlib.contextmanager
def joining(words: str) -> Iterator[None]:
    """Says `words` when the work within takes long, and why it failed; Ctrl-C ends it.

    Torch would not see Ctrl-C before its time is up: the process ends, which has no records yet.
    Raises RuntimeError where the ranks do not meet.
    """
    said = f"{words}; Ctrl-C ends it"
    patience = threading.Timer(JOIN_PATIENCE, print, [said], {"file": sys.stderr, "flush": True})
    patience.daemon = True
    patience.start()
    raises = signal.getsignal(signal.SIGINT) == signal.default_int_handler
    if raises:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    except dist.DistError as error:
        why = str(error).splitlines()[0]
        raise RuntimeError(f"{words}: {why}; start all of them, with one address") from None
    finally:
        patience.cancel()
        if raises:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def keep_memory() -> None:
    """Keeps freed memory for later: pages of large tensors, new each step, take a tenth of it."""
    with contextlib.suppress(OSError, AttributeError):  # another system or C library
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def from_rank0(work: Callable[[], Any]) -> Any:
    """Runs work on every rank, returns what rank 0 got; its ConfigError is raised by all."""
    try:
        outcome = [work()]
    except ConfigError as error:
        outcome = [error]
    dist.broadcast_object_list(outcome, device=torch.device("cpu"))
    if isinstance(outcome[0], ConfigError):
        raise outcome[0]
    return outcome[0]
