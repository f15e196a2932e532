"""Prices of GPUs, their speed and MFU, and from them what a run takes in seconds and dollars."""

import csv
import io
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from harness.meter import PEAK_TFLOPS, model_of
from store.contract import ConfigError
from store.files import regular
from store.tables import read_table


class Gpu(NamedTuple):
    """A GPU as it can be rented."""

    name: str
    peak: float  # TFLOP/s, dense bfloat16
    price: float  # dollars an hour for one
    price_source: str
    memory: float  # GB of the data sheet
    mfu: float  # fraction of the peak, assumed for dense models


READ = "read Aug-Nov 2026"
# On demand, dollars an hour for a GPU. H100: Lambda 3.99, RunPod 2.69 to 3.99, Hyperstack 3.20,
# median of 16 providers on 2026-10-24 3.64 (compute-screener). B200: Hyperstack 6.00 on 2026-08-26,
# RunPod 5.98, Lambda 6.69. For the others none was read: as much a FLOP as the H100. MFU of dense
# models: nanochat has .46 to .50 on H100, and .35 with experts; none is known for B200, on which
# small models reach less.
GPUS = {
    name.lower(): Gpu(name, PEAK_TFLOPS[name], *rest)
    for name, *rest in (
        ("H100", 3.50, READ, 80, 0.45),
        ("H200", 3.50, "assumed, set --price", 141, 0.45),
        ("B200", 6.00, READ, 180, 0.35),
        ("A100", 1.10, "assumed, set --price", 80, 0.45),
    )
}
MOE_MFU = 0.30


def run_cost(
    flops_total: float, gpu: str | Gpu, mfu: float | None = None, gpus: int = 1
) -> tuple[float, float]:
    """(seconds, dollars) of so many FLOPs on `gpus` of a GPU, a name in GPUS or a Gpu. mfu is a
    fraction; None: that assumed for dense models. Raises ConfigError."""
    if isinstance(gpu, str):
        if gpu not in GPUS:
            raise ConfigError(f"GPU {gpu}: choose one of {', '.join(GPUS)}")
        gpu = GPUS[gpu]
    seconds = flops_total / (gpus * gpu.peak * 1e12 * (mfu or gpu.mfu))
    return seconds, seconds / 3600 * gpu.price * gpus


def gpu_of(device_name: str) -> str:
    """The name in GPUS of what CUDA calls a device; "" where it is none of them."""
    known = model_of(device_name).lower()
    return known if known in GPUS else ""


def kind_of(ffn: str) -> str:
    """`moe` for the FFN of a model with experts in some layer, else `dense`."""
    return "moe" if "moe" in ffn.split(",") else "dense"


def mfu_of_rows(rows: Iterable[dict[str, str]], gpu: Gpu, kind: str) -> list[float]:
    """MFU of the finished runs with this kind of FFN on this GPU, out of rows of results."""
    return [
        float(row["mfu"])
        for row in rows
        if row.get("status") == "ok"
        and float(row.get("mfu") or 0)
        and kind_of(row["ffn"]) == kind
        and gpu.name.lower() == gpu_of(row["device_name"])
    ]


def measured_mfu(path: str, gpu: Gpu, kind: str) -> list[float]:
    """The same from a table of results; [] where there is no table. Raises ConfigError."""
    try:
        text, _ = read_table(regular(path))
        return mfu_of_rows(csv.DictReader(io.StringIO(text)), gpu, kind)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} cannot be read for its mfu: {error}") from None


def choose_mfu(results: str, gpu: Gpu, kind: str, given: float | None = None) -> tuple[float, str]:
    """(MFU, where it is from): given before measured in the table `results` before assumed."""
    if given:
        return given, "given"
    measured = measured_mfu(results, gpu, kind)
    if measured:
        runs = "1 run" if len(measured) == 1 else f"{len(measured)} runs"
        return statistics.median(measured), f"measured, {runs}"
    return MOE_MFU if kind == "moe" else gpu.mfu, "assumed"
