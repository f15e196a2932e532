"""Makes steps of one version of train_gpt.py as they are asked for; scripts/bench.py asks two.

    python -P scripts/bench_worker.py PATH/TO/train_gpt.py     # -P: nothing of scripts/ here

A line of JSON each way: in, the settings; out, {"ready": true}; then for every further line in a
step, and out {"seconds", "tokens", "loss", "memory"}. Last may come {"status", "error"}: why there
is no more. Harness and ops are those beside that file. So that versions as old as scripts/harness/
can be measured, nothing is imported from ours, and of theirs only what all of them have.
"""

import contextlib
import dataclasses
import importlib.machinery
import importlib.util
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

STATUS = ("config", "data", "diverged")  # that errors of the harness have
ENDLESS = 2**31  # steps: no end for the learning rate to go to


def now(device: torch.device) -> float:
    """Seconds on some clock, after the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: torch.device) -> float:
    """Most memory in use at once, GiB: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "linux":  # whose rusage starts with what the parent had in use
        kib = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
        return int(kib[1]) / 2**20
    import resource  # Windows has none

    units = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units


def timed_step(
    train_step: Callable, state: Any, cfg: Any, batch: torch.Tensor
) -> tuple[list[float], Any]:
    """One step on a batch (n, T + 1): its seconds, and what train_step returned.

    The seconds are those of forward and backward, and of reduction and optimizer; or of all at once
    in a version that does not reduce gradients by its first optimizer's reduce_grads.
    """
    device = batch.device
    first = state.optimizers[0]
    reduce_grads = getattr(first, "reduce_grads", None)
    marks = []

    def marked_reduce_grads() -> Any:
        marks.append(now(device))  # here the backward pass has ended
        return reduce_grads()

    if reduce_grads:
        first.reduce_grads = marked_reduce_grads
    began = now(device)
    stats = train_step(state, cfg, batch[:, :-1], batch[:, 1:])
    ended = now(device)
    if reduce_grads:
        first.reduce_grads = reduce_grads
    if len(marks) == 1:
        return [marks[0] - began, ended - marks[0]], stats
    return [ended - began], stats


def load(file: Path) -> ModuleType:
    """The module of a train_gpt.py, whatever its name is; it finds its scripts/ by itself."""
    loader = importlib.machinery.SourceFileLoader("train_gpt", str(file))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("train_gpt", loader))
    sys.modules["train_gpt"] = module
    loader.exec_module(module)
    return module


class Steps:
    """A model of one version and its steps on random tokens, which are the same for all versions.

    Raises the version's ConfigError, DataError.
    """

    def __init__(self, trainer: ModuleType, settings: Mapping[str, str]):
        from store.contract import ConfigError
        from harness.ranks import Ranks, setup

        for name, value in settings.items():
            if name.lower() not in trainer.Config.__dataclass_fields__:
                raise ConfigError(
                    f"{name}={value} is no setting there; --against {name}= leaves it out"
                )
        cfg = trainer.resolve(trainer.Config.from_env(settings))
        ranks = Ranks()
        trainer.check_batch(cfg, ranks)
        setup(cfg, ranks, {})

        self.device = ranks.device(cfg)
        self.cfg = dataclasses.replace(cfg, num_iterations=ENDLESS)
        self.train_step = trainer.train_step
        self.state = trainer.State.build(self.cfg, ranks)
        self.made = 0
        if cfg.compile == "1":
            trainer.compile_model(self.state.model, self.cfg, self.device)

    def step(self) -> dict[str, Any]:
        """Makes the next step: its seconds and tokens, the loss before it, the most memory until
        now (GiB)."""
        generator = torch.Generator().manual_seed(self.made)
        shape = self.cfg.batch_size, self.cfg.sequence_length + 1
        batch = torch.randint(self.cfg.vocab_size, shape, generator=generator).to(self.device)
        seconds, stats = timed_step(self.train_step, self.state, self.cfg, batch)
        self.made += 1
        return {
            "seconds": seconds,
            "tokens": batch[:, 1:].numel(),
            "loss": float(stats[0]),
            "memory": peak_memory(self.device),
        }


def failure(error: BaseException) -> dict[str, str]:
    """Why there are no more steps: {"status", "error"}, a sentence."""
    status = getattr(error, "status", None)
    if status in STATUS:
        return {"status": status, "error": str(error)}
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return {"status": "oom", "error": str(error).splitlines()[0]}
    traceback.print_exc()
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}"
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return {"status": "crash", "error": f"{reason} ({place})"}


def main(file: str) -> int:
    """Answers until there is nothing more to read; returns the exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a version prints is no answer

    def answer(facts: Mapping[str, Any]) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    try:
        settings = sys.stdin.readline()
        if not settings:  # who asks is gone
            return 1
        steps = Steps(load(Path(file)), json.loads(settings))
        answer({"ready": True})
        for _ in sys.stdin:
            answer(steps.step())
    except BrokenPipeError:  # who asks is gone
        return 1
    except BaseException as error:
        with contextlib.suppress(BrokenPipeError):
            answer(failure(error))
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stderr.flush()
    os._exit(code)  # a version's threads and processes may wait for each other
