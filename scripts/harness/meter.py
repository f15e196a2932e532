"""Clocks, throughput, memory, MFU: from what is timed to the figures of the summary."""

import contextlib
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from harness.provenance import device_name
from harness.ranks import Ranks
from harness.settings import Settings
from store.contract import Diverged

# Dense bfloat16 TFLOP/s, by the part of CUDA's name of a device that says its model: makers' data
# sheets.
PEAK_TFLOPS = {
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "H200 NVL": 836,
    "H200": 989,
    "GB200": 2500,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
    "RTX 3090": 71,
}
# What CUDA's names have around that part: no word of another model, as Ti, Laptop GPU or MIG.
AROUND = (r"(?:NVIDIA )?(?:GeForce )?", r"(?:[ -](?:SXM\d|PCIE|PCIe|\d+GB|HBM3))*")
KINDS = ("data_wait", "eval_time", "save_time", "compile_time")  # what is timed beside training


def peak_memory(device: torch.device) -> float | None:
    """Most memory in use at once, GiB: of the device, or of this process on a CPU; None unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    units = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units


def model_of(device_name: str) -> str:
    """The key in PEAK_TFLOPS of a device; "" where it is none of them."""
    before, after = AROUND
    for model in PEAK_TFLOPS:  # H100 PCIe before H100
        if re.fullmatch(before + model + after, device_name):
            return model
    return ""


def peak_flops(cfg: Settings, device: torch.device) -> float | None:
    """FLOP/s that a device can make; None where that is not known, for it is never guessed."""
    if cfg.peak_tflops:
        return cfg.peak_tflops * 1e12
    if device.type == "cuda" and cfg.dtype != "float32":
        peak = PEAK_TFLOPS.get(model_of(device_name(device)))
        return peak * 1e12 if peak else None
    return None


def now(device: torch.device) -> float:
    """Seconds on some clock, after the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Meter:
    """Measures training from `start` on, and apart from it the seconds of work of other kinds."""

    # What a checkpoint keeps.
    KEPT = ("seconds", "last_point", "bad_steps", "bad_steps_in_a_row", "figures")

    def __init__(self, cfg: Settings, ranks: Ranks, plan: Mapping[str, Any]):
        """`plan` has tokens_per_step and flops_per_token; val_bytes_per_token where it is known."""
        self.cfg = cfg
        self.device = ranks.device(cfg)
        self.tokens_per_step = plan["tokens_per_step"]
        self.flops_per_token = plan["flops_per_token"] / ranks.world_size  # of this device
        self.peak = peak_flops(cfg, self.device)
        self.bytes_per_token = plan.get("val_bytes_per_token")
        self.start = 0.0  # of the clock
        self.running = False
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.last_point = (0, 0.0)  # tokens, train time
        self.bad_steps = 0  # updates that were left out
        self.bad_steps_in_a_row = 0
        self.figures = {"train_time": 0.0}  # of the summary

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to know, as JSON can hold it."""
        return {name: getattr(self, name) for name in self.KEPT}

    def load_state(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def begin(self) -> None:
        """Starts the clock of training, at the time that the steps until now have taken."""
        self.start = now(self.device) - self.figures["train_time"]
        self.running = True

    def train_time(self, step: int) -> float:
        """Seconds of training until now."""
        return now(self.device) - self.start if step else 0.0

    @contextlib.contextmanager
    def off_the_clock(self, kind: str) -> Iterator[None]:
        """Times work of another kind, for which the clock of training stands still."""
        began = now(self.device)
        yield
        spent = now(self.device) - began
        self.seconds[kind] += spent
        self.start += spent

    def count_bad_steps(self, were_bad: list[bool], step: int) -> None:
        """Counts steps, of which `step` is the last. Raises Diverged after too many in a row."""
        longest = 0
        for bad in were_bad:
            self.bad_steps += bad
            self.bad_steps_in_a_row = self.bad_steps_in_a_row + 1 if bad else 0
            longest = max(longest, self.bad_steps_in_a_row)
        if longest > self.cfg.max_bad_steps:
            raise Diverged(
                f"loss or gradients were not finite {longest} times in a row until step {step}; "
                + self.cfg.advice("diverged")
            )

    def tokens(self, step: int) -> int:
        """What has been trained on; a program whose steps differ puts its own count here."""
        return step * self.tokens_per_step

    def point(self, step: int) -> dict[str, float]:
        """The columns of the curve that clocks give, of a step that is logged now."""
        tokens, seconds = self.tokens(step), self.train_time(step)
        values = {"tokens": tokens, "train_time": seconds, "data_wait": self.seconds["data_wait"]}
        last_tokens, last_seconds = self.last_point
        if tokens > last_tokens:
            values["tokens_per_sec"] = (tokens - last_tokens) / (seconds - last_seconds)
        self.last_point = (tokens, seconds)
        return values

    def update(self, step: int, val_loss: float | None = None) -> dict[str, Any]:
        """The figures of the summary, brought up to this step."""
        tokens, seconds = self.tokens(step), self.train_time(step)
        speed = tokens / seconds if tokens else None
        self.figures |= self.seconds | {
            "bad_steps": self.bad_steps,
            "tokens": tokens,
            "train_time": seconds,
            "tokens_per_sec": speed,
            "step_avg": 1000 * seconds / step if tokens else None,
            "peak_mem": peak_memory(self.device),
            "mfu": speed * self.flops_per_token / self.peak if speed and self.peak else None,
            "compile_time": self.seconds["compile_time"] or None,
        }
        if val_loss is not None:
            self.figures |= self.losses(val_loss) | {"val_step": step}
        return self.figures

    def losses(self, val_loss: float) -> dict[str, float | None]:
        """What a validation loss, nats a token, says in other units."""
        bits = val_loss / math.log(2)
        return {
            "final_loss": val_loss,
            "best_loss": min(val_loss, self.figures.get("best_loss", math.inf)),
            "bits_per_byte": bits / self.bytes_per_token if self.bytes_per_token else None,
            "ppl": math.exp(val_loss) if val_loss < 700 else None,
        }
