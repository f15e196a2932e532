"""Makes the tables of a stage from its rows: mean, sd and number of seeds, difference, p.

    python scripts/make_tables.py            # every stage that has rows, and README.md
    python scripts/make_tables.py stage1_cpu
    python scripts/make_tables.py stage2_cpu --against LR=0.015  # print it with other references

Reads what is published of a stage, experiments/results_<stage>.csv, and the runs here, of
experiments/results.csv; writes experiments/tables/<stage>.csv and .md. Compared are finished runs
of one trainer source, or of one for each code that variants name, on one dataset and validation
set, one a seed, in the column that the stage names as its measure (final_loss); what did not finish
is counted in a column. Runs
with the same seed share data order and initialisation, so difference, interval (95 %) and p
(two-sided) are those of the paired t-test over the seeds that a variant and its reference share;
where they share fewer than two, of Welch's. p_holm is p corrected for the number of comparisons in
the table.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import functools
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import gate_stats
from store.files import write_whole
from published import RESULTS, results_path
from split_results import comparable, has_same_code, measured, rows_of, tried, validation_of
from split_results import write_table
from stages import FINAL_LOSS, Stage, load_stage, read, stage_names, stage_of

NAMES = {  # as published
    "attngate": "attn_gate",
    "gateact": "gate_act",
    "gatepos": "gate_pos",
    "lr": "learning_rate",
}
MEANS = ("bits_per_byte", "train_time", "tokens_per_sec", "moe_entropy", "moe_max_vio")
ASKED = ("val_accuracy",)  # means, too, of a stage that has them among its columns
TEST = ("difference", "low", "high", "pairs", "p", "p_holm")
SIZES = ("params_total", "params_active")
FORMATS = {
    "final_loss": ".4f",
    "pass_at_1": ".4f",
    "val_accuracy": ".4f",
    "sd": ".4f",
    "difference": "+.4f",
    "p": ".3f",
    "p_holm": ".3f",
    "tokens": ",.0f",
    "tokens_per_sec": ",.0f",
    "moe_entropy": ".3f",
    "moe_max_vio": ".2f",
    "params_total": ",.0f",
    "params_active": ",.0f",
}
README = Path("README.md")
BLOCK = re.compile(r"(<!-- table (\w+): .*?-->\n).*?(<!-- /table -->)", re.S)


def difference_of(stage: Stage, variant: str, runs: pd.DataFrame) -> dict[str, float]:
    """What a variant's runs measure minus its reference's, the 95 % interval and p, as far as seeds
    allow; {} where they were validated on other data."""
    own, reference = (runs[runs.variant == label] for label in (variant, stage.references[variant]))
    if stage.is_reference(variant) or len(validation_of(own, reference)) > 1:
        return {}
    ours, theirs = (one.set_index("seed")[stage.measure] for one in (own, reference))
    difference, test = gate_stats.compare(ours, theirs)
    pairs = difference.n if test == "paired" else np.nan
    values = (difference.mean, difference.low, difference.high, pairs, difference.p)
    return dict(zip(TEST, values))


def git_text(run: pd.Series) -> str:
    """The commit of a run, and whether its code was changed since."""
    is_changed = str(run.get("dirty")).lower() in ("1", "1.0", "true")
    return f"{run.git[:10]}{' + changes' if is_changed else ''}"


def line_of(stage: Stage, variant: str, rows: pd.DataFrame, runs: pd.DataFrame) -> dict:
    """A variant's line: its axes, seeds, loss and measure, difference to its reference, speed,
    sizes, what did not finish, and what other columns its stage asks for."""
    own = runs[runs.variant == variant]
    all_of_it = rows[rows.variant == variant]
    described = (own if len(own) else all_of_it).tail(1)

    line = {"variant": variant}
    line |= {
        NAMES.get(axis, axis): value for axis in stage.axes for value in described.get(axis, [])
    }
    if "code" in line:
        line |= {"git": git_text(described.iloc[0])}
    line |= {"seeds": len(own), FINAL_LOSS: own[FINAL_LOSS].mean()}
    line |= {stage.measure: own[stage.measure].mean(), "sd": own[stage.measure].std()}
    if len({*stage.references.values()}) > 1:
        line["against"] = None if stage.is_reference(variant) else stage.references[variant]
    line |= dict.fromkeys(TEST) | difference_of(stage, variant, runs)
    line |= {"tokens": own.tokens.mean()} if stage.seconds else {}
    means = (*MEANS, *(name for name in ASKED if name in stage.columns))
    line |= {name: own[name].mean() for name in means if name in own}
    if len(own):
        line |= {name: own[name].iloc[0] for name in SIZES}

    unfinished = all_of_it[(all_of_it.status != "ok") & ~all_of_it.seed.isin(own.seed)]
    counts = unfinished.drop_duplicates("seed", keep="last").status.value_counts()
    line |= {"unfinished": ", ".join(f"{n} {status}" for status, n in counts.items())}
    shown = own if len(own) else described
    for name in stage.columns:  # a setting in which the variants do not differ
        if name not in line and len(shown.get(setting_of(name), [])):
            line[name] = same_or_mean(shown[setting_of(name)])
    return line


def same_or_mean(values: pd.Series) -> object:
    """What all runs of a variant have, or the mean of numbers that differ; NaN for other texts."""
    if values.nunique(dropna=False) == 1:
        return values.iloc[0]
    return pd.to_numeric(values, errors="coerce").mean()


def setting_of(column: str) -> str:
    """The setting, in lower case, that a column of tables shows."""
    return {published: name for name, published in NAMES.items()}.get(column, column)


def column_order(stage: Stage, lines: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """The columns of a table that has these lines: first those that the stage names. Raises
    ValueError for what is none."""
    for name in stage.columns:
        if name not in lines and name not in ASKED and setting_of(name) not in rows:
            raise ValueError(
                f"STAGE {stage.name}: columns: {name!r} is no column of its table; choose a "
                f"setting, or one of {', '.join([*lines, *ASKED])}"
            )
    first = [name for name in stage.columns if name in lines]
    return [*first, *(name for name in lines if name not in first)]


def table(stage: Stage, rows: pd.DataFrame) -> pd.DataFrame:
    """The table of a stage, a line a variant in the order of its file; columns without a figure are
    left out."""
    runs, rows = measured(comparable(rows, stage), stage), tried(rows, stage)
    lines = pd.DataFrame([line_of(stage, variant, rows, runs) for variant in stage.variants])
    lines["p_holm"] = gate_stats.holm(lines.p)
    lines = lines[column_order(stage, lines, rows)]
    return lines.replace({"unfinished": {"": None}}).dropna(axis="columns", how="all")


def cell(name: str, value: object) -> str:
    """A figure as the Markdown table shows it."""
    if pd.isna(value):
        return ""
    if name == "train_time":
        minutes, seconds = divmod(round(value, 1), 60)
        return f"{minutes:.0f}m {seconds:.1f}s"
    if name in ("p", "p_holm") and value < 0.001:
        return "< 0.001"
    if name in FORMATS:
        return format(value, FORMATS[name])
    if isinstance(value, float) and value.is_integer() and abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def measure_text(stage: Stage) -> str:
    """What is compared, and which way is better where that is known; "" for final losses."""
    words, unit, is_higher_better = stage.what_is_measured
    if stage.compares_losses:
        return ""
    if is_higher_better is None:
        return f"Compared is {stage.measure}."
    direction = "higher" if is_higher_better else "lower"
    return f"Compared is {stage.measure} ({words}; {unit}); {direction} is better."


def left_out(stage: Stage, rows: pd.DataFrame) -> list[str]:
    """How many finished runs are not compared, and why, in sentences."""
    finished = rows[rows.status == "ok"]
    as_the_file_says = tried(finished, stage)
    tried_now = as_the_file_says
    if not stage.names_code:  # where code is what varies, what an earlier one did is told
        tried_now = tried_now.drop_duplicates(["variant", "seed"])
    runs = comparable(rows, stage)
    counts = {
        "with other settings than the stage has now": len(finished) - len(as_the_file_says),
        "of another trainer or other data": len(tried_now) - len(runs),
        f"without {stage.measure}": len(runs) - len(measured(runs, stage)),
    }
    return [f"Left out: {count} finished runs {what}." for what, count in counts.items() if count]


def differences_without_p(lines: pd.DataFrame) -> str:
    """Why the differences of a table have no p."""
    if (lines.difference.dropna() == 0).all():
        return (
            "With every seed the losses are the same to the last digit: what differs here has no "
            "effect, as a part that no setting switches on."
        )
    if lines.get("pairs", lines.difference * np.nan).max() > 1:
        return "Differences are the same with every seed, so there is no p."
    return "Differences are of single pairs of runs with the same seed: no finding."


def notes(stage: Stage, lines: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """What a reader of the table must know, in sentences."""
    runs = measured(comparable(rows, stage), stage)
    devices = sorted({f"{run.device_name}, torch {run.torch}" for run in runs.itertuples()})
    said = [f"Measured on {' / '.join(devices) or 'nothing yet'}."]
    if measure_text(stage):
        said.append(measure_text(stage))
    if "difference" in lines and "p" not in lines:
        said.append(differences_without_p(lines))
    if "p" in lines:
        compared = lines.dropna(subset="p")
        is_paired = compared.get("pairs", compared.p * np.nan).notna()
        test = "the paired t-test, over seeds that both have"
        if not is_paired.all():
            test = "Welch's t-test" if not is_paired.any() else f"{test}; without pairs, Welch's"
        count = f"{len(compared)} comparison{'s' if len(compared) > 1 else ''}"
        said.append(
            f"Difference, interval and p by {test}; p_holm is p after Holm's correction for "
            f"{count}."
        )
    if lines.seeds.max() > len(stage.seeds):
        said.append(
            f"p takes the number of seeds as fixed beforehand; this stage planned "
            f"{len(stage.seeds)}, and has up to {lines.seeds.max()}."
        )
    for variant in stage.variants:
        if has_same_code(stage, variant, runs):
            said.append(
                f"The code of {variant!r} is the same as that of {stage.references[variant]!r}, "
                "but for comments, layout or files that change no loss."
            )
    if runs.sequence_length.nunique() > 1:
        said.append(
            "Sequence lengths differ: with a longer one there is more to predict from, so the "
            "losses are not the same measurement."
        )
    if stage.seconds:
        said.append(
            f"Each variant has the steps that {stage.seconds:g} s of training take by its step "
            "time, measured in turns beforehand; train_time is what the runs took, whatever else "
            "the machine did."
        )
    if runs.tokens.nunique() > 1:
        ends = (
            "final losses are" if stage.compares_losses else f"the {stage.measure} of their rows is"
        )
        said.append(
            f"Trained on different numbers of tokens, {runs.tokens.min():,.0f} to "
            f"{runs.tokens.max():,.0f}: {ends} compared."
        )
    if len(validation_of(runs)) > 1:
        said.append("Runs that were validated on different tokens are not compared.")
    return said + left_out(stage, rows)


def markdown(stage: Stage, lines: pd.DataFrame, rows: pd.DataFrame) -> str:
    """The table in Markdown, with what was compared, on what device, below it."""
    shown = lines.drop(columns=[name for name in ("low", "high", "bits_per_byte") if name in lines])
    if "low" in lines:
        shown.insert(
            shown.columns.get_loc("difference") + 1,
            "95 % interval",
            [interval_text(low, high) for low, high in zip(lines.low, lines.high)],
        )
    cells = [
        [cell(name, value) for name, value in line.items()] for line in shown.to_dict("records")
    ]
    if "difference" in shown:
        column = shown.columns.get_loc("difference")
        for label, line in zip(lines.variant, cells):
            if stage.is_reference(label):
                line[column] = "reference"
    cells = [[text.replace("|", "\\|") for text in line] for line in cells]
    head, *body = ["| " + " | ".join(line) + " |" for line in [list(shown.columns), *cells]]
    rule = "|-" * len(shown.columns) + "|"
    return "\n".join([head, rule, *body, "", " ".join(notes(stage, lines, rows)), ""])


def interval_text(low: float, high: float) -> str:
    """An interval as the Markdown table shows it."""
    return "" if pd.isna(low) else f"{low:+.4f} to {high:+.4f}"


def write_tables(stage_name: str) -> str:
    """Writes experiments/tables/<stage>.csv and .md; returns the latter's text. Raises
    ValueError."""
    stage = load_stage(stage_name)
    rows = rows_of(stage_name)
    lines = table(stage, rows)
    text = markdown(stage, lines, rows)
    folder = RESULTS.with_name("tables")
    write_table(lines, folder / f"{stage_name}.csv")
    write_whole(folder / f"{stage_name}.md", text)
    return text


def other_view(stage_name: str, against: list[str]) -> str:
    """The text of a stage's table with other references, as its file would have them: the label of
    a line or of a variant, or words NAME=VALUE. Raises ValueError."""
    if against[0] in load_stage(stage_name).variants:
        tables = read(stage_name) | {"reference": against[0]}
        tables.pop("against", None)
        stage, rows = stage_of(stage_name, tables), rows_of(stage_name)
        return markdown(stage, table(stage, rows), rows)
    words = against[0]
    if "=" in words:
        wrong = [word for word in against if "=" not in word]
        if wrong:
            raise ValueError(f"--against {wrong[0]}: must be a label alone, or NAME=VALUE each")
        words = dict(word.split("=", 1) for word in against)
    tables = read(stage_name)
    tables.pop("reference", None)
    stage, rows = stage_of(stage_name, tables | {"against": words}), rows_of(stage_name)
    return markdown(stage, table(stage, rows), rows)


def filled(text: str, stage_name: str) -> str:
    """A text with a stage's figures in it: {variant|column} becomes that cell of its table,
    {variant|interval} the 95 % interval of the difference; columns of its verdicts and of its runs,
    as settings, serve as well. {variant minus other|difference} is against another variant than
    its reference, and so are interval and p. Raises ValueError for what is none of these."""
    stage, rows = load_stage(stage_name), rows_of(stage_name)
    own_lines = table(stage, rows).set_index("variant")
    path = RESULTS.with_name("tables") / f"{stage_name}_gate.csv"
    if not path.is_file():
        raise ValueError(f"no {path}; python scripts/run_stage.py {stage_name} --no-run makes it")
    gate = pd.read_csv(path)
    gate = gate[gate.kind == "variant"].set_index("variant")
    runs = comparable(rows, stage).groupby("variant")

    @functools.cache
    def lines_against(label: str) -> pd.DataFrame:
        tables = {name: value for name, value in read(stage_name).items() if name != "against"}
        other = stage_of(stage_name, tables | {"reference": label})
        return table(other, rows).set_index("variant").drop(columns="p_holm")

    def figure(place: re.Match) -> str:
        label, _, column = place[1].partition("|")
        label, _, other = label.partition(" minus ")
        lines = lines_against(other) if other else own_lines
        if column in ("interval", "95 % interval") and label in lines.index and "low" in lines:
            return interval_text(lines.low[label], lines.high[label])
        for source in (lines,) if other else (lines, gate):
            if label in source.index and column in source and pd.notna(source[column][label]):
                return cell(column, source[column][label])
        if not other and label in runs.groups and column in runs.obj:
            value = same_or_mean(runs.get_group(label)[column])
            if pd.notna(value):
                return cell(column, value)
        if label not in lines.index:
            choices = ", ".join(lines.index)
            raise ValueError(f"{place[0]} names no variant of {stage_name}: choose from {choices}")
        choices = ", ".join(["interval", *lines, *gate])
        raise ValueError(f"{place[0]} names no figure there is: choose from {choices}")

    return re.sub(r"\{([^{}]*)\}", figure, text)


def with_tables(readme: str) -> str:
    """The text of a README with the tables in it as experiments/tables has them. Raises
    ValueError."""
    folder = RESULTS.with_name("tables")
    for _, name, _ in BLOCK.findall(readme):
        if not (folder / f"{name}.md").is_file():
            raise ValueError(
                f"{README} has a table of {name}, which is not in {folder}; run that stage"
            )

    def with_table(block: re.Match) -> str:
        return block[1] + (folder / f"{block[2]}.md").read_text("utf-8") + block[3]

    return BLOCK.sub(with_table, readme)


def main(argv: list[str] | None = None) -> int:
    """Makes tables; exit code 0, or 2 with one sentence where a stage is unknown or has no rows."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", nargs="*", help="only these")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="LABEL or NAME=VALUE",
        help="print the table of a stage with each variant against this, or the one that has this",
    )
    args = parser.parse_args(argv)
    try:
        if args.against and not args.stage:
            raise ValueError(f"--against {args.against[0]}: of which stage?")
        if args.against:
            for name in args.stage:
                print(other_view(name, args.against))
            return 0
        with_rows = [name for name in stage_names() if results_path(name).exists()]
        for name in args.stage or with_rows:
            print(f"{name}\n{write_tables(name)}")
        if README.is_file():
            write_whole(README, with_tables(README.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        print(f"make_tables.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
