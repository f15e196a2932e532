"""Estimates what runs will take, by finished ones or the planner's table; prints a stage dry."""

import argparse
import shlex
import statistics
from collections.abc import Mapping

from harness.provenance import device_name
from harness.ranks import Ranks
import train_gpt
from plan_stage import HAS_RESULT, PlannedRun, status_of
from price_runs import GPUS, choose_mfu, gpu_of, kind_of, run_cost
from train_gpt import Config


def device_here(cfg: Config) -> str:
    """The name of the device that would train cfg on this machine; "" where it has none."""
    if cfg.device != "cpu" and not train_gpt.torch.cuda.is_available():
        return ""
    return device_name(Ranks().device(cfg))


def measured_rates(
    run: PlannedRun, rows: Mapping[str, dict[str, str]], device_name: str
) -> list[float]:
    """FLOP/s of the finished runs of this kind on as many of this device, the oldest first."""
    alike = [
        row
        for row in rows.values()
        if row["status"] == "ok"
        and row.get("flops_per_token")
        and row.get("tokens")
        and row.get("device_name") == device_name
        and row["ffn"] == run.cfg.ffn
        and int(row["world_size"]) == run.plan["world_size"]
    ]
    return [
        float(row["flops_per_token"]) * float(row["tokens"]) / float(row["train_time"])
        for row in alike
    ]


def estimate(
    run: PlannedRun, rows: Mapping[str, dict[str, str]], gpu: str
) -> tuple[float | None, float | None]:
    """(seconds, dollars) of a run, by its plan, the speed of finished ones on this device, or the
    planner's table; None for what is not known."""
    if not run.flops:  # of a program that does not say
        return None, None
    device_name = device_here(run.cfg)
    gpu_here = gpu_of(device_name)
    world_size = run.plan["world_size"]

    if not gpu or gpu == gpu_here:
        rates = measured_rates(run, rows, device_name)
        if run.seconds or rates:
            seconds = run.seconds or run.flops / statistics.median(rates[-20:])
            if not gpu_here:
                return seconds, None
            return seconds, seconds / 3600 * world_size * GPUS[gpu_here].price

    gpu = gpu or gpu_here
    if not gpu:
        return None, None
    mfu, _ = choose_mfu(Config.results_csv, GPUS[gpu], kind_of(run.cfg.ffn))
    return run_cost(run.flops, gpu, mfu, world_size)


def duration_text(seconds: float | None) -> str:
    """A time as people say it."""
    if seconds is None:
        return "unknown time"
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def cost_text(dollars: float | None) -> str:
    """A cost behind a time; "" where there is none."""
    return f", ${dollars:.2f}" if dollars else ""


def dry_run(
    runs: list[PlannedRun], args: argparse.Namespace, rows: Mapping[str, dict[str, str]]
) -> None:
    """Prints what would be run, a command a line, and what it would take."""
    starter = f"torchrun --standalone --nproc_per_node={args.nproc}" if args.nproc > 1 else "python"
    total_seconds = 0.0
    total_dollars = 0.0
    to_do = 0
    for run in runs:
        status = status_of(run, rows) if run.identity[-1] else ""
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in run.settings.items())
        words = shlex.join(run.words)
        command = f"{settings} {starter} {words}"
        if status in HAS_RESULT:
            print(f"# {command}  # has a result: {status}")
            continue

        seconds, dollars = estimate(run, rows, args.gpu)
        time_and_cost = duration_text(seconds) + cost_text(dollars)
        print(f"{command}  # {run.flops:.2g} FLOPs, {time_and_cost}")
        to_do += 1
        total_seconds += seconds or 0.0
        total_dollars += dollars or 0.0

    sentence = f"# {to_do} of {len(runs)} runs to do"
    if to_do:
        duration = duration_text(total_seconds / args.jobs)
        sentence += (
            f", {duration} of training with --jobs {args.jobs}{cost_text(total_dollars)}; "
            "start, compilation, validation and checkpoints come on top"
        )
    print(sentence)
