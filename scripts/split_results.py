"""Splits the table of results by stage: the rows of its runs and their curves, which notebooks and plots read.

    python scripts/split_results.py            # every stage in the table
    python scripts/split_results.py stage1_cpu

For each it writes experiments/results_<stage>.csv and experiments/log_curves_<stage>.csv. The curves come from
LOG_DIR (logs); where a log is gone, what the file of curves already holds of the run is kept.
"""

import argparse
import hashlib
import io
import os
import shlex
import sys
from pathlib import Path

import pandas as pd

from stages import Stage

RESULTS = Path("experiments/results.csv")
TEXT = (
    "run_id",
    "stage",
    "variant",
    "preset",
    "status",
    "git",
    "source_sha",
    "config_hash",
    "data_fingerprint",
    "changes",
    "note",
    "error",
    "per_step",
    "started",
    "device_name",
    "torch",
)  # never numbers
NUMBERS = (
    "seed",
    "final_loss",
    "train_time",
    "tokens_per_sec",
    "tokens_per_step",
    "params_total",
    "params_active",
    "flops_per_token",
    "num_experts",
    "bad_steps",
)  # of a run that ended early they may be missing
UNTRAINED = {
    *"PRESET SEED INPUT_BIN INPUT_VAL_BIN PEAK_TFLOPS LOG_EVERY SAVE_EVERY KEEP_LAST MAX_BAD_STEPS "
    "HANG_TIMEOUT BALANCE_LOG_INTERVAL".split()
}  # settings that make no other run of one, beside labels


def read_results(path=RESULTS) -> pd.DataFrame:
    """A table of results, a row per run. Raises ValueError where there is none."""
    if not Path(path).is_file():
        raise ValueError(
            f"{path} is not there; python scripts/run_stage.py makes it, or rebuild_results.py from logs"
        )
    rows = pd.read_csv(
        path,
        dtype=dict.fromkeys(TEXT, str),
        keep_default_na=False,
        na_values=[""],
        low_memory=False,
    )
    blanks = dict.fromkeys(TEXT, "") | dict.fromkeys(NUMBERS, float("nan"))
    rows = rows.fillna(
        {name: blank for name, blank in blanks.items() if name in rows and name in TEXT}
    )
    return rows.assign(**{name: blank for name, blank in blanks.items() if name not in rows})


def current(rows: pd.DataFrame, stage: Stage) -> pd.DataFrame:
    """The rows of a stage that go with its newest finished run, of the trainer that is here if there is one: same
    trainer, same data, same settings but for those in which variants differ, and of each variant those it had last."""
    varied = {
        name
        for name in set().union(*stage.variants.values())
        if len({settings.get(name) for settings in stage.variants.values()}) > 1
    }
    given = set().union(*stage.variants.values()) - varied

    def base(changes):
        found = dict(word.split("=", 1) for word in shlex.split(changes))
        names = (given if "PRESET" in varied else set(found) - varied) - UNTRAINED
        return str(sorted((name, found.get(name)) for name in names))

    rows = rows[
        rows.variant.isin(stage.variants) & (rows.source_sha != "")
    ]  # a refused run has none
    rows = rows.assign(base=rows.changes.map(base)).sort_values("started", kind="stable")
    trainer = Path(__file__).parents[1] / "train_gpt.py"
    source = hashlib.sha256(trainer.read_bytes()).hexdigest()[:12] if trainer.exists() else ""
    ok = rows[rows.status == "ok"]
    newest = (ok if source not in set(ok.source_sha) else ok[ok.source_sha == source]).tail(1)
    for name in ("source_sha", "data_fingerprint", "base") if len(newest) else ():
        rows = rows[rows[name] == newest[name].item()]
    last = rows.groupby("variant").config_hash.transform("last")
    return rows[rows.config_hash == last].drop(columns="base")


def comparable(rows: pd.DataFrame, stage: Stage) -> pd.DataFrame:
    """The finished ones of a stage's current rows, one per variant and seed."""
    rows = current(rows, stage)
    return rows[rows.status == "ok"].drop_duplicates(["variant", "seed"], keep="last").sort_index()


def read_curve(path) -> pd.DataFrame:
    """The curve of one run, a live one too: whole lines only, of a step that was run twice the later line."""
    text = Path(path).read_text()
    curve = pd.read_csv(io.StringIO(text[: text.rfind("\n") + 1]))
    return curve.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)


def read_curves(stage: str) -> pd.DataFrame:
    """The curves of a stage's runs, below each other, from experiments/log_curves_<stage>.csv. Raises ValueError."""
    path = RESULTS.with_name(f"log_curves_{stage}.csv")
    if not path.is_file():
        raise ValueError(f"{path} is not there; python scripts/run_stage.py {stage} makes it")
    return pd.read_csv(path, dtype={"run_id": str, "variant": str})


def write(content: pd.DataFrame | str, path: Path):
    """Replaces a file by a table or text at one stroke; numbers come back as they were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(content if isinstance(content, str) else content.to_csv(index=False))
    temporary.replace(path)


def split(stage: str, rows: pd.DataFrame, logs: Path) -> tuple[int, int]:
    """Writes both files of a stage from the rows of all; returns how many runs and how many curves they hold."""
    rows, old = rows[rows.stage == stage].dropna(axis="columns", how="all"), {}
    if RESULTS.with_name(f"log_curves_{stage}.csv").is_file():
        old = dict(list(read_curves(stage).groupby("run_id", sort=False)))
    curves = []
    for run in rows[rows.status != "running"].itertuples():
        if (path := logs / f"{run.run_id}.csv").is_file():
            curve = read_curve(path)
            curve[["run_id", "variant", "seed"]] = run.run_id, run.variant, int(run.seed)
            curves.append(curve)
        elif run.run_id in old:
            curves.append(old[run.run_id])
    write(rows, RESULTS.with_name(f"results_{stage}.csv"))
    if curves:
        table = pd.concat(curves, ignore_index=True)
        names = list(dict.fromkeys(["run_id", "variant", "seed", *table]))
        write(table[names], RESULTS.with_name(f"log_curves_{stage}.csv"))
    return len(rows), len(curves)


def main(argv=None) -> int:
    """Splits the table; exit code 0, or 2 with one sentence where there is no such stage in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("stage", nargs="*", help="only these")
    parser.add_argument("--log-dir", type=Path, default=Path("logs"), help="folder of the curves")
    args = parser.parse_args(argv)
    try:
        rows = read_results()
        stages = [name for name in rows.stage.unique() if name]
        if unknown := [name for name in args.stage if name not in stages]:
            raise ValueError(
                f"STAGE {unknown[0]} has no run in {RESULTS}; it has {', '.join(stages) or 'none'}"
            )
        for stage in args.stage or stages:
            runs, curves = split(stage, rows, args.log_dir)
            print(f"{stage}: {runs} runs, {curves} curves")
    except ValueError as error:
        print(f"split_results.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
