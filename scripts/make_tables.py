"""Makes the tables of a stage from its rows: mean, sd and number of seeds, difference, p.

    python scripts/make_tables.py            # every stage that has rows, and README.md
    python scripts/make_tables.py stage1_cpu

Reads experiments/results_<stage>.csv; writes experiments/tables/<stage>.csv and .md. Compared are
finished runs of one trainer source and one dataset, one a seed; what did not finish is counted in a
column. The interval (95 %) and p (two-sided) of the difference to the reference are those of
Welch's t-test, which takes no equal variances for granted; p is not corrected for the number of
variants.
"""

import argparse
import re
import sys
from pathlib import Path

import pandas as pd
from scipy import stats

from harness.files import write_whole
from split_results import RESULTS, comparable, read_results, write_table
from stages import Stage, load_stage, stage_names

NAMES = {  # as published
    "attngate": "attn_gate",
    "gateact": "gate_act",
    "gatepos": "gate_pos",
    "lr": "learning_rate",
}
MEANS = ("bits_per_byte", "train_time", "tokens_per_sec", "moe_entropy", "moe_max_vio")
TEST = ("difference", "low", "high", "p")
SIZES = ("params_total", "params_active")
FORMATS = {
    "final_loss": ".4f",
    "sd": ".4f",
    "difference": "+.4f",
    "p": ".3f",
    "tokens_per_sec": ",.0f",
    "moe_entropy": ".3f",
    "moe_max_vio": ".2f",
    "params_total": ",.0f",
    "params_active": ",.0f",
}
README = Path("README.md")
BLOCK = re.compile(r"(<!-- table (\w+): .*?-->\n).*?(<!-- /table -->)", re.S)


def rows_of(stage_name: str) -> pd.DataFrame:
    """All rows of a stage. Raises ValueError."""
    path = RESULTS.with_name(f"results_{stage_name}.csv")
    if not path.is_file():
        raise ValueError(
            f"stage {stage_name} has no results; "
            f"python scripts/run_stage.py {stage_name} makes them"
        )
    return read_results(path)


def welch(losses: pd.Series, reference: pd.Series) -> dict[str, float]:
    """Difference of the means, its 95 % interval and p; with fewer than two seeds of either, the
    first alone."""
    difference = losses.mean() - reference.mean()
    if min(len(losses), len(reference)) < 2:
        return {"difference": difference}
    test = stats.ttest_ind(losses, reference, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return dict(zip(TEST, (difference, low, high, test.pvalue)))


def line_of(stage: Stage, variant: str, rows: pd.DataFrame, runs: pd.DataFrame) -> dict:
    """A variant's line: its axes, seeds, loss, difference to the reference, speed, sizes, and what
    did not finish."""
    own, reference = runs[runs.variant == variant], runs[runs.variant == stage.reference]
    all_of_it = rows[rows.variant == variant]
    described = (own if len(own) else all_of_it).tail(1)

    line = {"variant": variant}
    line |= {
        NAMES.get(axis, axis): value for axis in stage.axes for value in described.get(axis, [])
    }
    line |= {"seeds": len(own), "final_loss": own.final_loss.mean(), "sd": own.final_loss.std()}
    line |= dict.fromkeys(TEST)
    if variant != stage.reference:
        line |= welch(own.final_loss, reference.final_loss)
    line |= {name: own[name].mean() for name in MEANS if name in own}
    if len(own):
        line |= {name: own[name].iloc[0] for name in SIZES}

    unfinished = all_of_it[(all_of_it.status != "ok") & ~all_of_it.seed.isin(own.seed)]
    counts = unfinished.drop_duplicates("seed", keep="last").status.value_counts()
    return line | {"unfinished": ", ".join(f"{n} {status}" for status, n in counts.items())}


def table(stage: Stage, rows: pd.DataFrame) -> pd.DataFrame:
    """The table of a stage, a line a variant in the order of its file; columns without a figure are
    left out."""
    runs = comparable(rows, stage)
    lines = pd.DataFrame([line_of(stage, variant, rows, runs) for variant in stage.variants])
    return lines.replace({"unfinished": {"": None}}).dropna(axis="columns", how="all")


def cell(name: str, value: object) -> str:
    """A figure as the Markdown table shows it."""
    if pd.isna(value):
        return ""
    if name == "train_time":
        minutes, seconds = divmod(round(value, 1), 60)
        return f"{minutes:.0f}m {seconds:.1f}s"
    if name == "p" and value < 0.001:
        return "< 0.001"
    if name in FORMATS:
        return format(value, FORMATS[name])
    return f"{value:g}" if isinstance(value, float) else str(value)


def markdown(stage: Stage, lines: pd.DataFrame, runs: pd.DataFrame) -> str:
    """The table in Markdown, with what was compared, on what device, below it."""
    shown = lines.drop(columns=[name for name in ("low", "high", "bits_per_byte") if name in lines])
    if "low" in lines:
        intervals = [
            "" if pd.isna(low) else f"{low:+.4f} to {high:+.4f}"
            for low, high in zip(lines.low, lines.high)
        ]
        shown.insert(shown.columns.get_loc("difference") + 1, "95 % interval", intervals)

    cells = [
        [cell(name, value) for name, value in line.items()] for line in shown.to_dict("records")
    ]
    if "difference" in shown:
        reference = list(lines.variant).index(stage.reference)
        cells[reference][shown.columns.get_loc("difference")] = "reference"
    head, *body = ["| " + " | ".join(line) + " |" for line in [list(shown.columns), *cells]]
    rule = "|-" * len(shown.columns) + "|"

    devices = sorted({f"{run.device_name}, torch {run.torch}" for run in runs.itertuples()})
    note = (
        f"Measured on {' / '.join(devices) or 'nothing yet'}; "
        "difference, interval and p by Welch's test, over seeds."
    )
    if lines.seeds.nunique() > 1:
        note += (
            " Where numbers of seeds differ, some were added because of the losses: "
            "p does not know of that."
        )
    return "\n".join([head, rule, *body, "", note, ""])


def write_tables(stage_name: str) -> str:
    """Writes experiments/tables/<stage>.csv and .md; returns the latter's text. Raises
    ValueError."""
    stage = load_stage(stage_name)
    rows = rows_of(stage_name)
    lines = table(stage, rows)
    text = markdown(stage, lines, comparable(rows, stage))
    folder = RESULTS.with_name("tables")
    write_table(lines, folder / f"{stage_name}.csv")
    write_whole(folder / f"{stage_name}.md", text)
    return text


def with_tables(readme: str) -> str:
    """The text of a README with the tables in it as experiments/tables has them. Raises
    ValueError."""
    folder = RESULTS.with_name("tables")
    for _, name, _ in BLOCK.findall(readme):
        if not (folder / f"{name}.md").is_file():
            raise ValueError(
                f"{README} has a table of {name}, which is not in {folder}; run that stage"
            )

    def filled(block: re.Match) -> str:
        return block[1] + (folder / f"{block[2]}.md").read_text() + block[3]

    return BLOCK.sub(filled, readme)


def main(argv: list[str] | None = None) -> int:
    """Makes tables; exit code 0, or 2 with one sentence where a stage is unknown or has no rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("stage", nargs="*", help="only these")
    args = parser.parse_args(argv)
    try:
        with_rows = [
            name for name in stage_names() if RESULTS.with_name(f"results_{name}.csv").is_file()
        ]
        for name in args.stage or with_rows:
            print(f"{name}\n{write_tables(name)}")
        if README.is_file():
            write_whole(README, with_tables(README.read_text()))
    except ValueError as error:
        print(f"make_tables.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
