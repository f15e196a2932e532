"""How a run ends that went wrong: what the terminal and its records say of it."""

import contextlib
import json
import platform
import re
import sys
import time
import traceback
from collections.abc import Mapping

import torch

from harness.files import RunFiles, summary_text
from harness.meter import peak_memory
from harness.provenance import new_run_id, utc_now
from harness.ranks import Ranks
from harness.records import Records, refuse_foreign_files
from harness.settings import Settings
from store.contract import EXIT_CODES, RUN_ID_PATTERN, ConfigError
from store.files import write_whole
from store.secrets import redact
from store.tables import update_results


def status_of(error: BaseException) -> str:
    """The status that a run of this error ends with: a key of EXIT_CODES."""
    if getattr(error, "status", None) in EXIT_CODES:
        return error.status
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if out_of_memory or "can't allocate memory" in str(error):
        return "oom"
    return "stopped" if isinstance(error, KeyboardInterrupt) else "crash"


def report_failure(
    error: BaseException,
    cls: type[Settings],
    ranks: Ranks,
    records: Records | None,
    env: Mapping[str, str],
) -> int:
    """Says why a run ended, on the terminal and in its records; returns the exit code.

    `records` is None where the run has not come so far as to have any.
    """
    status, trace = status_of(error), redact(traceback.format_exc(), env)
    interrupted = "interrupted"
    if records is None:
        interrupted += " before it began; nothing of it was written"
    reason = redact(str(error) or interrupted, env)
    if status == "oom" and records:
        peak = peak_memory(ranks.device(records.cfg))
        known = f", peak {peak:.2f} GiB" if peak else ""
        reason = f"out of memory{known}; {records.cfg.advice(status)}"
    if status == "crash":
        reason = f"{type(error).__name__}: {reason}".splitlines()[0][:300]
        if records and "imed out" in reason:
            reason += f"; {records.files.folder}/stacks_rank*.txt say where"
        print(trace, file=sys.stderr)
    elif ranks.speaks or (records and status in ("data", "oom")):
        reason = one_sentence(reason)
        print(f"{status}: {reason}", file=sys.stderr)  # other ranks would say the same

    if EXIT_CODES[status]:
        tell_launcher(f"{status}: {one_sentence(reason)}", env)
    live = records is not None and records.live
    dry_run = env.get("DRY_RUN", "0") not in ("", "0")
    if live:
        status = record_failure(records, status, reason, trace)
    elif ranks.rank == 0 and status in ("config", "data") and not dry_run:
        record_refusal(error, cls, env)
    if ranks.rank and not live:
        time.sleep(1)  # torchrun ends all ranks as soon as one is gone, and rank 0 has to say why
    return EXIT_CODES[status]


def tell_launcher(sentence: str, env: Mapping[str, str]) -> None:
    """Has torchrun end its own table of what failed with the sentence, by the file it reads."""
    path = env.get("TORCHELASTIC_ERROR_FILE")
    if path and "TORCHELASTIC_RUN_ID" in env:
        failure = {"message": sentence, "extraInfo": {"timestamp": int(time.time())}}
        with contextlib.suppress(OSError), open(path, "x", encoding="utf-8") as file:
            json.dump({"message": failure}, file)


def one_sentence(text: str) -> str:
    """A text as one line of at most 500 characters: of a longer one, its two ends."""
    line = "\\n".join(text.splitlines())
    return line if len(line) <= 500 else f"{line[:250]} ... {line[-240:]}"


def record_failure(records: Records, status: str, reason: str, trace: str) -> str:
    """Ends the records of a run; returns the status that they have.

    The rank that fails first says why, for the others fail of it.
    """
    first = records.files.error
    with contextlib.suppress(OSError, ValueError):  # no disk, no record; the terminal has it
        if not first.exists():
            write_whole(first, f"{status}: {reason}\nrank {records.rank}, {utc_now()}\n{trace}")
        if records.rank:
            time.sleep(1)  # rank 0 knows more
            records.summary = records.files.summary()
            # Rank 0 has not lived to say it.
            if records.summary["status"] == "running":
                records.summary |= {"status": status, "error": reason}
                records.save()
        status, _, reason = first.read_text("utf-8").splitlines()[0].partition(": ")
    if records.rank == 0:
        records.append(records.files.log, trace)
        records.close(status, error=reason)
    return status


def record_refusal(error: BaseException, cls: type[Settings], env: Mapping[str, str]) -> None:
    """Leaves a summary and a row for a run that did not start, with what is known of it."""
    labels = ("run_id", "stage", "variant", "preset", "note", "log_dir", "results_csv")
    row = {name: redact(env.get(name.upper()) or getattr(cls, name), env) for name in labels}
    if not re.fullmatch(RUN_ID_PATTERN, row["run_id"]):
        row["run_id"] = new_run_id("refused")
    row |= {
        "status": error.status,
        "error": redact(str(error), env),
        "started": utc_now(),
        "host": platform.node(),
    }
    files = RunFiles(row["log_dir"], row["run_id"])
    with contextlib.suppress(
        OSError, ConfigError
    ):  # where nothing can be written, the terminal has to do
        if not files.json.exists():  # no finished run is touched
            try:
                write_whole(files.json, summary_text(row))
            finally:
                refuse_foreign_files(files, row["results_csv"])
                update_results(row["results_csv"], [row])
