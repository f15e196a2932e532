"""How a run ends that went wrong."""

import contextlib, json, re, sys, time, traceback
from pathlib import Path

import torch

from harness.contract import EXIT_CODES, RUN_ID_PATTERN, ConfigError
from harness.files import write_whole
from harness.meter import peak_memory
from harness.provenance import new_run_id, utc_now
from harness.records import update_results
from harness.settings import redact
import platform


def record_failure(records, status, reason, trace):
    """Ends the records of a run that went wrong. The rank that fails first says why, for the others fail of it."""
    first = records.folder / "error.txt"
    with contextlib.suppress(OSError, ValueError):  # no disk, no record; the terminal has it
        if not first.exists():
            write_whole(first, f"{status}: {reason}\nrank {records.rank}, {utc_now()}\n{trace}")
        if records.rank:
            time.sleep(1)  # rank 0 knows more
            records.summary = json.loads(records.json.read_text())
            if records.summary["status"] == "running":  # rank 0 has not lived to say it
                records.summary |= {"status": status, "error": reason}
                records.save()
        status, _, reason = first.read_text().splitlines()[0].partition(": ")
    if records.rank == 0:
        records.append(records.log, trace)
        records.close(status, error=reason)
    return status


def refuse(env, error, cls):
    """Leaves a summary and a row for a run that did not start, with what is known of it."""
    labels = "run_id", "stage", "variant", "preset", "note", "log_dir", "results_csv"
    row = {name: redact(env.get(name.upper()) or getattr(cls, name), env) for name in labels}
    row |= {
        "status": error.status,
        "error": redact(str(error), env),
        "started": utc_now(),
        "host": platform.node(),
    }
    row["run_id"] = (
        row["run_id"] if re.fullmatch(RUN_ID_PATTERN, row["run_id"]) else new_run_id("refused")
    )
    summary = Path(row["log_dir"]) / f"{row['run_id']}.json"
    with contextlib.suppress(
        OSError, ConfigError
    ):  # where nothing can be written, the terminal has to do
        if not summary.exists():  # no finished run is touched
            write_whole(summary, json.dumps(row, indent=1) + "\n")
            update_results(row["results_csv"], [row])


def report(error, ranks, records, env, store, cls):
    """Says why a run ended, on the terminal and in its records; returns the exit code."""
    full = isinstance(
        error, (torch.OutOfMemoryError, MemoryError)
    ) or "can't allocate memory" in str(error)
    status = getattr(
        error,
        "status",
        "oom" if full else "stopped" if isinstance(error, KeyboardInterrupt) else "crash",
    )
    reason, trace = redact(str(error) or "interrupted", env), redact(traceback.format_exc(), env)
    if full and records:
        reason = (
            f"out of memory, peak {peak_memory(ranks.device(records.cfg)):.2f} GiB; lower DEVICE_BATCH_SIZE="
            f"{records.cfg.device_batch_size}, which leaves the result as it is, or SEQUENCE_LENGTH, or N_LAYER"
        )
    if status == "crash":
        reason = f"{type(error).__name__}: {reason}".splitlines()[0][:300]
        reason += (
            f"; {records.folder}/stacks_rank*.txt say where"
            if records and "imed out" in reason
            else ""
        )
        print(trace, file=sys.stderr)
    elif (
        ranks.local_rank == 0 or records and status in ("data", "oom")
    ):  # others would say the same
        print(f"{status}: {reason}", file=sys.stderr)
    if records and records.live:
        status = record_failure(records, status, reason, trace)
    elif ranks.rank == 0 and status in ("config", "data") and env.get("DRY_RUN", "0") in ("", "0"):
        refuse(env, error, cls)
    if EXIT_CODES[status] > 1 and store:
        with contextlib.suppress(RuntimeError):  # the launcher may be gone
            store.set("train_gpt/exit", str(EXIT_CODES[status]))
    if ranks.rank and not (records and records.live):
        time.sleep(1)  # torchrun ends all ranks as soon as one is gone, and rank 0 has to say why
    return EXIT_CODES[status]
