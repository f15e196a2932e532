"""Clocks, memory, and the share of a device's peak."""

import contextlib, resource, sys, time

import torch

from harness.provenance import device_name

PEAK_TFLOPS = {  # dense bfloat16 by the name CUDA gives the device, the more particular name first; makers' data sheets
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


def peak_memory(device):
    """Most memory in use at once, GiB: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**30 if sys.platform == "darwin" else 2**20
    )


def model_flops_utilization(cfg, device, flops_per_sec):
    """Share of the device's peak; None where the peak is not known, for it is never guessed."""
    name = device_name(device) if device.type == "cuda" and cfg.dtype != "float32" else ""
    peak = cfg.peak_tflops or next(
        (peak for part, peak in PEAK_TFLOPS.items() if part in name), None
    )
    return flops_per_sec / (peak * 1e12) if peak else None


class Clock:
    """Measures training from `start` on, and apart from it the seconds of work of other kinds."""

    def __init__(self, device):
        self.device, self.start = device, 0.0
        self.seconds = dict.fromkeys(("data_wait", "eval_time", "save_time", "compile_time"), 0.0)

    def now(self):
        """Seconds on some clock, after the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def off_the_clock(self, kind):
        """Times work of another kind, for which the clock of the training stands still."""
        began = self.now()
        yield
        spent = self.now() - began
        self.seconds[kind] += spent
        self.start += spent
