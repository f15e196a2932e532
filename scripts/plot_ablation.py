"""Draws the figures of a stage from what is published of it and the runs here.

    python scripts/plot_ablation.py stage1           # figures/stage1.png in experiments
    python scripts/plot_ablation.py batch_vs_seqlen  # and one a rate, ..._lr0005.png for 0.005

Dots and lines are means over seeds, bars and bands their 95 % t-intervals, small dots the seeds.
Differences to the reference, and their intervals, are those of make_tables.py. With fewer than
three seeds there is no interval.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from matplotlib.transforms import ScaledTranslation, Transform
from scipy.special import stdtrit

from gate_stats import FEWEST
from make_tables import difference_of
from published import RESULTS
from plot_runs import ACCURACY, AXES, GREY, SPEED, Looks, Words, dress, frame, has, name_of, save
from plot_runs import styles
from split_results import comparable, curves_of_rows, measured, planned_seconds, rows_of
from stages import Stage, load_stage

# stages with these axes ask what should fill the memory
SHAPE = {"batch_size", "sequence_length"}
RATE = "muon_lr"
TIMED = {"train_time", SPEED}  # other work on a CPU decides these
SEEDS = {"alpha": 0.6, "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.5}
DASHED = {"color": GREY, "linewidth": 0.8, "linestyle": "--"}  # the reference
PAIR = {"color": "#BBBBBB", "linewidth": 0.7, "zorder": 1}  # two runs of one seed
LABEL = 30  # letters of a label on one line
MARKED = 8  # points of a curve, of which each is marked: the lines between them say nothing
NEAR = 0.03  # of an axis: what is nearer than this to a number on it has none of its own
MOST_PAIRS = 12  # of more lines none can be followed
WIDTHS = (14, 40)  # at one value of a numeric axis, in points: of a line's dots, of all lines'

Groups = Mapping[str, pd.DataFrame]  # rows of results, by the label of their line


def load(stage_name: str) -> tuple[Stage, pd.DataFrame, pd.DataFrame]:
    """(Stage, its comparable runs by the order of its variants, with differences, their curves).
    Raises ValueError where it has none."""
    stage = load_stage(stage_name)
    rows = comparable(rows_of(stage_name), stage)
    if len(rows) and measured(rows, stage).empty:
        raise ValueError(f"STAGE {stage_name} has no finished run that has {stage.measure}")
    rows = measured(rows, stage)
    order = {label: i for i, label in enumerate(stage.variants)}
    rows = rows[rows["variant"].isin(order)]
    rows = rows.sort_values("variant", key=lambda labels: labels.map(order), kind="stable")
    if rows.empty:
        raise ValueError(
            f"STAGE {stage_name} has no finished run of the stage as its file is now; "
            f"python scripts/run_stage.py {stage_name} makes them"
        )
    curves = curves_of_rows(stage_name, rows, Path("logs"))
    if not curves:
        raise ValueError(f"STAGE {stage_name} has no curve in logs, and none is published")
    curves = pd.concat(curves, ignore_index=True)
    if stage.seconds:
        curves = with_planned_seconds(stage, rows, curves)
    return stage, with_differences(stage, rows), curves


def with_planned_seconds(stage: Stage, rows: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """The curves with what of its time a run has used, by plan."""
    steps = rows.set_index("run_id")["num_iterations"]
    return pd.concat(
        own.assign(planned_seconds=planned_seconds(own, steps[run_id], stage.seconds))
        for run_id, own in curves.groupby("run_id", sort=False)
    )


def progress(stage: Stage, curves: pd.DataFrame) -> str:
    """The column that curves are drawn against. Of what a run samples, tokens differ by seed."""
    if "planned_seconds" in curves:
        return "planned_seconds"
    return "tokens" if stage.compares_losses else "step"


def words_of(stage: Stage) -> Words:
    """What axes say, with the measure of a stage."""
    if stage.compares_losses:
        return AXES
    name, unit = AXES.get(stage.measure, (stage.measure, ""))
    return AXES | {stage.measure: (name, unit), "difference": (f"difference of {name}", unit)}


def with_differences(stage: Stage, rows: pd.DataFrame) -> pd.DataFrame:
    """The runs with the measure of the reference's run with the same seed, and the difference to
    it; NaN where they are not compared."""
    values = rows.set_index(["variant", "seed"])[stage.measure]
    partners = pd.MultiIndex.from_arrays([rows["variant"].map(stage.references), rows["seed"]])
    compared = [label for label in rows["variant"].unique() if difference_of(stage, label, rows)]
    theirs = pd.Series(values.reindex(partners).to_numpy(), rows.index)
    theirs = theirs.where(rows["variant"].isin(compared))
    return rows.assign(of_reference=theirs, difference=rows[stage.measure] - theirs)


def grouped(rows: pd.DataFrame, column: str) -> dict[str, pd.DataFrame]:
    """{value: its rows} of a column, in the order of the rows."""
    return {value: rows[rows[column] == value] for value in rows[column].unique()}


def interval(values) -> tuple[pd.Series, pd.Series]:
    """(mean, half the width of its 95 % t-interval, NaN for fewer than three) of each group of
    values."""
    n = values.count()
    halves = stdtrit(n - 1, 0.975) * values.std() / n**0.5
    return values.mean(), halves.where(n >= FEWEST)


def difference_line(stage: Stage, label: str, rows: pd.DataFrame) -> dict:
    """Mean, interval and test of a variant's difference to its reference, as the table has them; a
    reference has 0."""
    if stage.is_reference(label):
        return {"mean": 0.0}
    line = difference_of(stage, label, rows)
    if not line:
        return {}
    counts = rows["variant"].value_counts()
    n, test = line["pairs"], "paired"
    if np.isnan(n):
        n, test = min(counts.get(label, 0), counts.get(stage.references[label], 0)), "Welch"
    if n < FEWEST or np.isnan(line["low"]):
        return {"mean": line["difference"]}
    return {"mean": line["difference"], "low": line["low"], "high": line["high"], "test": test}


def estimates(stage: Stage, rows: pd.DataFrame, y: str) -> pd.DataFrame:
    """Mean, ends of the interval (low, high) and, of a difference, test of column y, by label."""
    if y == "difference":
        labels = rows["variant"].unique()
        lines = [difference_line(stage, label, rows) for label in labels]
        return pd.DataFrame(lines, labels, ["mean", "low", "high", "test"])
    means, halves = interval(rows.groupby("variant")[y])
    return pd.DataFrame({"mean": means, "low": means - halves, "high": means + halves})


def is_compared(stage: Stage, rows: pd.DataFrame) -> bool:
    """Whether any variant has a difference to its reference."""
    known = estimates(stage, rows, "difference")["mean"].dropna()
    return not all(map(stage.is_reference, known.index))


def is_on_cpu(rows: pd.DataFrame) -> bool:
    """Whether any of the runs was measured on a CPU."""
    return rows["device_name"].str.startswith("cpu").any()


def panels(stage: Stage, rows: pd.DataFrame, columns: Iterable[str]) -> list[str]:
    """Those of the columns that can be shown: differences of what is compared, times of no CPU."""
    left_out = TIMED - {stage.measure} if is_on_cpu(rows) else set()
    if not is_compared(stage, rows):
        left_out = left_out | {"difference"}
    return [name for name in dict.fromkeys(columns) if name not in left_out]


def offsets(values: Iterable) -> dict:
    """{value: its place between -0.5 and 0.5}, in ascending order and around 0."""
    values = sorted(set(values))
    return {value: (i + 0.5) / len(values) - 0.5 for i, value in enumerate(values)}


def mark_reference(draw: Callable, stage: Stage, rows: pd.DataFrame, y: str) -> None:
    """A dashed line, by ax.axvline or axhline, at no difference, or at the mean of column y of the
    reference where there is one for all."""
    references = {*stage.references.values()}
    own = rows.loc[rows["variant"].isin(references), y]
    if y == "difference":
        draw(0, **DASHED)
    elif len(references) == 1 and own.notna().any():
        draw(own.mean(), **DASHED)


def draw_dots(ax: Axes, stage: Stage, groups: Groups, looks: Looks, y: str) -> None:
    """For each of {label: rows of a variant} mean, interval and seeds of column y, at its
    height."""
    rows = pd.concat(groups.values())
    lines = estimates(stage, rows, y)
    places = offsets(rows["seed"])
    for i, (label, own) in enumerate(groups.items()):
        color = looks[label]["color"]
        mean, low, high = lines.loc[own["variant"].iloc[0], ["mean", "low", "high"]]
        ends = [[mean - low], [high - mean]]
        ax.errorbar(mean, i, xerr=ends, fmt="o", color=color, capsize=4, markersize=7)
        heights = i + 0.6 * own["seed"].map(places)
        ax.plot(own[y], heights, "o", color=color, zorder=3, **SEEDS)
        if y == stage.measure and is_joined(rows) and own["of_reference"].notna().any():
            up = [*groups].index(stage.references[label]) - i
            ax.plot([own[y], own["of_reference"]], [heights, heights + up], **PAIR)
    texts = [textwrap.fill(label, LABEL) for label in groups]
    ax.set_yticks(range(len(groups)), texts, fontsize=8.5 if "\n" in "".join(texts) else 10)
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.locator_params(axis="x", nbins=6)
    words = words_of(stage)
    dress(ax, y, "variant", name_of(y, words), words=words)


def is_joined(rows: pd.DataFrame) -> bool:
    """Whether lines join the runs of a seed: where there are pairs, and few."""
    return 0 < rows["difference"].count() <= MOST_PAIRS


def moved(ax: Axes, points: float) -> Transform:
    """Data coordinates of a panel, so many points to the right."""
    return ax.transData + ScaledTranslation(points / 72, 0, ax.figure.dpi_scale_trans)


def spaced(values: Iterable[float], log: bool) -> list[float]:
    """Those of ascending values that have room for their numbers on an axis."""
    values = [*values]
    places = np.log(values) if log else np.array(values)
    near = NEAR * (places[-1] - places[0])
    kept = [0]
    for i in range(1, len(values)):
        if places[i] - places[kept[-1]] >= near:
            kept.append(i)
    return [values[i] for i in kept]


def draw_over(ax: Axes, stage: Stage, groups: Groups, looks: Looks, x: str, y: str) -> None:
    """For each of {label: rows} a line over the numeric setting x: means, intervals and seeds of
    column y, side by side where lines share values of x and have intervals."""
    rows = pd.concat(groups.values())
    lines = estimates(stage, rows, y)
    width = min(WIDTHS[0], WIDTHS[1] / len(groups))
    are_apart = rows.groupby(x)["variant"].nunique().max() > 1 and lines["low"].notna().any()
    places = offsets(rows["seed"])
    for i, (label, own) in enumerate(groups.items()):
        middle = are_apart * (i - (len(groups) - 1) / 2) * width
        cells = own.drop_duplicates("variant").sort_values(x)
        marks = lines.loc[cells["variant"]].reset_index(drop=True)
        ends = [marks["mean"] - marks["low"], marks["high"] - marks["mean"]]
        style = {"capsize": 3, "marker": "o", "transform": moved(ax, middle)}
        ax.errorbar(cells[x], marks["mean"], yerr=ends, **style, **looks[label])
        for seed, runs in own.groupby("seed"):
            style = SEEDS | {"transform": moved(ax, middle + 0.8 * width * places[seed])}
            ax.plot(runs[x], runs[y], "o", color=looks[label]["color"], zorder=3, **style)

    ranges = rows[["variant", x, y]].join(lines[["mean", "low", "high"]], on="variant")
    for column in (y, "mean", "low", "high"):  # what is moved says nothing to the axes
        ax.update_datalim(ranges[[x, column]].dropna().to_numpy(float))

    values = sorted(rows[x].unique())
    is_log = 0 < 3 * values[0] < values[-1]
    if is_log:
        ax.set_xscale("log")
    ax.margins(x=0.18)  # room for what is moved
    values = spaced(values, is_log)
    rotation = 45 if len(values) > 6 else 0
    ax.set_xticks(values, [f"{value:g}" for value in values], rotation=rotation)
    ax.xaxis.set_minor_locator(NullLocator())
    words = words_of(stage)
    dress(ax, x, y, name_of(y, words), words=words)


def draw_curves(
    ax: Axes, stage: Stage, groups: Groups, looks: Looks, points: pd.DataFrame, y: str, title: str
) -> None:
    """For each of {label: rows} the mean over seeds of column y of its curves against tokens, or
    what progress says, its interval a band; a training loss, being that of one batch, has none."""
    x = progress(stage, points)
    for label, rows in groups.items():
        own = points[points["run_id"].isin(rows["run_id"])].dropna(subset=y)
        means, halves = interval(own.groupby(x)[y])
        mark = {"marker": "o", "markersize": 4} if len(means) <= MARKED else {}
        (line,) = ax.plot(means.index, means, **mark, **looks[label])
        if y.startswith("train_"):
            continue
        band = {"color": line.get_color(), "alpha": 0.15, "linewidth": 0}
        ax.fill_between(means.index, means - halves, means + halves, **band)
    dress(ax, x, y, title, log=y.endswith("_loss"), words=words_of(stage))


def with_train_differences(stage: Stage, curves: pd.DataFrame) -> pd.DataFrame:
    """The curves of variants with the difference of their training loss to that of the reference's
    run of the same seed at the same step, and so, but for what has another order of data, of the
    same batch."""
    keys = ["variant", "seed", "step"]
    known = curves.dropna(subset="train_loss").set_index(keys)["train_loss"]
    own = curves[~curves["variant"].map(stage.is_reference)]
    partners = pd.MultiIndex.from_frame(
        own[keys].assign(variant=own["variant"].map(stage.references))
    )
    theirs = known.reindex(partners).to_numpy()
    return own.assign(train_difference=own["train_loss"] - theirs)


def followed(stage: Stage, curves: pd.DataFrame) -> str:
    """The column whose curves are shown: what the stage measures, or else the validation loss, or,
    where both are known at the end alone, the training loss."""
    done = curves[progress(stage, curves)]
    known = [name for name in (stage.measure, "val_loss", "train_loss") if has(curves, name)]
    often = [name for name in known if done[curves[name].notna()].nunique() > 1]
    return (often or known or ["val_loss"])[0]


def draw_halves(
    axes: list[Axes], stage: Stage, groups: Groups, looks: Looks, curves: pd.DataFrame
) -> None:
    """Curves, in one panel whole, in the other from the middle of the run on. Of training losses
    that are compared with one reference the other has the differences, for the loss of a batch is
    that of its data more than that of a variant."""
    done = curves[progress(stage, curves)]
    late = curves[done >= done.max() / 2]
    y = followed(stage, curves)
    name = name_of(y, words_of(stage))
    whole = name if y == "val_loss" else f"{name}, whole run"
    draw_curves(axes[0], stage, groups, looks, curves, y, whole)
    if y == "train_loss" and len({*stage.references.values()}) == 1:
        y, late = "train_difference", with_train_differences(stage, late)
        name = name_of(y)
        axes[1].axhline(0, **DASHED)
        groups = {
            label: own for label, own in groups.items() if {*own["run_id"]} & {*late["run_id"]}
        }
    draw_curves(axes[1], stage, groups, looks, late, y, f"{name}, second half")


def names(labels: Iterable[str]) -> str:
    """Labels in a sentence: in quotes, for a label may have commas, and `none` is one."""
    return ", ".join(f"'{label}'" for label in labels)


def seeds_text(rows: pd.DataFrame) -> str:
    """How many seeds the variants have; where they differ, of which how many."""
    seeds = rows.groupby("variant", sort=False).size()
    if seeds.nunique() == 1:
        return f"Seeds: n = {seeds.iloc[0]} a variant."
    parts = [f"{n} of {names(own.index)}" for n, own in seeds.groupby(seeds)]
    return f"Seeds: n = {'; '.join(parts)}."


def interval_text(rows: pd.DataFrame) -> str:
    """How to read the marks of means."""
    seeds = rows.groupby("variant").size()
    if seeds.max() < FEWEST:
        return "Dots and lines: means; small dots: seeds. Fewer than three seeds have no interval."
    text = "Dots and lines: means; bars and bands: 95\u00a0% t-intervals; small dots: seeds."
    return text if seeds.min() >= FEWEST else f"{text} Fewer than three seeds have no interval."


def difference_text(stage: Stage, rows: pd.DataFrame) -> str:
    """What is compared with what, and by which test; "" where nothing is."""
    if not is_compared(stage, rows):
        return ""
    lines = estimates(stage, rows, "difference")
    references = dict.fromkeys(stage.references.values())
    whose = "its reference, one of " if len(references) > 1 else ""
    text = f"Differences: each variant minus {whose}{names(references)}"
    tests = lines["test"].dropna()
    unpaired = list(tests.index[tests == "Welch"])
    if len(tests):
        text += "; 95\u00a0% intervals of "
        text += "Welch's test" if len(unpaired) == len(tests) else "the paired differences"
        if 0 < len(unpaired) < len(tests):
            text += f", for {names(unpaired)} of Welch's test"
    text += "; small dots: pairs of one seed."
    unknown = lines.index[lines["mean"].isna()]
    apart = [label for label in unknown if stage.references[label] in lines.index]
    if apart:
        text += f" Not compared, since validated on other tokens: {names(apart)}."
    return text


def curves_text(stage: Stage, curves: pd.DataFrame) -> str:
    """What the curves are, where they are not of validations."""
    if followed(stage, curves) != "train_loss":
        return ""
    return "Training losses are of single batches, differences of them of the same one."


def caption(stage: Stage, rows: pd.DataFrame, *sentences: str) -> str:
    """Devices, seeds, how to read the marks, what else there is to say, and what was not run."""
    devices = " / ".join(sorted(rows["device_name"].unique()))
    said = [f"Measured on {devices}.", seeds_text(rows), interval_text(rows), *sentences]
    if stage.measure == "ema_val_loss":
        said.append("Where nothing is averaged, weights are those of the last step.")
    missing = [label for label in stage.variants if label not in set(rows["variant"])]
    if missing:
        lacking = "" if stage.compares_losses else f" that has {stage.measure}"
        said.append(f"No finished run of {names(missing)}{lacking}.")
    return " ".join(filter(None, said))


def dashed_text(stage: Stage, rows: pd.DataFrame) -> str:
    """What the dashed lines are, where there is one reference for all."""
    references = {*stage.references.values()} & {*rows["variant"]}
    if len({*stage.references.values()}) > 1 or not references:
        return ""
    return f"Dashed: the mean of {names(references)}."


def variants_figure(stage: Stage, rows: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Differences, final losses or another measure and, on a GPU, train times of the variants, in
    the order of the stage file, and their curves."""
    groups = grouped(rows, "variant")
    looks = styles(stage.references_first())
    lines = max(len(textwrap.wrap(label, LABEL)) for label in groups)
    heights = [1 + (0.2 + 0.16 * lines) * max(4, len(groups)), 2.8]
    fig = Figure(figsize=(10, 1.2 + sum(heights)), layout="constrained")
    # apart, for the labels of the upper ones are wide
    upper, lower = fig.subfigures(2, height_ratios=heights)
    shown = panels(stage, rows, ["difference", stage.measure, "train_time"])
    for ax, y in zip(upper.subplots(1, len(shown), squeeze=False, sharey=True)[0], shown):
        draw_dots(ax, stage, groups, looks, y)
        mark_reference(ax.axvline, stage, rows, y)
    draw_halves(lower.subplots(1, 2), stage, groups, looks, curves)
    what = "losses" if stage.compares_losses else stage.measure
    joined = f"Grey lines join {what} of one seed." if is_joined(rows) else ""
    said = [difference_text(stage, rows), joined, dashed_text(stage, rows)]
    said.append(curves_text(stage, curves))
    frame(
        fig,
        f"{stage.name}: {stage.question}",
        caption(stage, rows, *said),
        {label: looks[label] for label in groups},
    )
    return fig


def draw_grid(
    figure, stage: Stage, groups: Groups, looks: Looks, x: str, columns: Iterable[str]
) -> None:
    """Panels of these columns, as far as they can be shown, over the numeric setting x."""
    rows = pd.concat(groups.values())
    shown = panels(stage, rows, columns)
    for ax, y in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        draw_over(ax, stage, groups, looks, x, y)
        mark_reference(ax.axhline, stage, rows, y)


def looks_of(stage: Stage, groups: Groups, part: Callable[[str], str]) -> Looks:
    """{label: keywords of its lines} of groups of variants: by the order in which the stage names
    that part of them, run or not."""
    looks = styles(dict.fromkeys(map(part, stage.references_first())))
    return {label: looks[part(rows["variant"].iloc[0])] for label, rows in groups.items()}


def best_point(stage: Stage, cells: pd.DataFrame, number: str) -> float:
    """Where on the numeric axis the mean of what the stage measures is best."""
    means = cells.groupby(number)[stage.measure].mean()
    return means.idxmax() if stage.what_is_measured.is_higher_better else means.idxmin()


def best_text(stage: Stage) -> str:
    """What the best mean of a stage is."""
    if stage.compares_losses:
        return "least mean loss"
    extreme = "greatest" if stage.what_is_measured.is_higher_better else "least"
    return f"{extreme} mean {stage.measure}"


def grid_figure(
    stage: Stage, rows: pd.DataFrame, curves: pd.DataFrame, number: str, other: str
) -> Figure:
    """Final losses or another measure, differences and, on a GPU, train times over the numeric
    axis, a line for each value of the other; curves at its best value."""
    labels = [f"{other.upper()}={value}" for value in rows[other]]
    groups = grouped(rows.assign(group=labels), "group")
    looks = looks_of(
        stage, groups, lambda label: stage.variants[label].get(other.upper(), "its default")
    )
    fig = Figure(figsize=(10, 7.2), layout="constrained")
    upper, lower = fig.subfigures(2)
    draw_grid(upper, stage, groups, looks, number, [stage.measure, "difference", "train_time"])

    best = {label: best_point(stage, cells, number) for label, cells in groups.items()}
    at_best = {label: cells[cells[number] == best[label]] for label, cells in groups.items()}
    draw_halves(lower.subplots(1, 2), stage, at_best, looks, curves)
    shown = ", ".join(f"{label} at {value:g}" for label, value in best.items())
    said = [
        difference_text(stage, rows),
        dashed_text(stage, rows),
        f"Curves: each at the {name_of(number)} of its {best_text(stage)} ({shown}).",
        curves_text(stage, curves),
    ]
    frame(fig, f"{stage.name}: {stage.question}", caption(stage, rows, *said), looks)
    return fig


def rate_figure(stage: Stage, cells: pd.DataFrame, curves: pd.DataFrame, looks: Looks) -> Figure:
    """Training loss, validation loss and the stage's measure or accuracy, and throughput of the
    runs of one learning rate."""
    groups = grouped(cells, "fill")
    own = curves[curves["run_id"].isin(cells["run_id"])]
    known = [name for name in (stage.measure, ACCURACY) if has(own, name)]
    corner = known[0] if known else "train_loss"
    fig = Figure(figsize=(10, 7.2 if known else 5.8), layout="constrained")
    axes = fig.subplot_mosaic([["train_loss", "val_loss"], [corner, SPEED]])
    for y, ax in axes.items():
        if y == SPEED:
            draw_dots(ax, stage, groups, looks, y)
        else:
            draw_curves(ax, stage, groups, looks, curves, y, name_of(y, words_of(stage)))
    return fig


def strategy_of(label: str) -> str:
    """What fills the memory, of a variant: its label without the learning rate."""
    return label.partition(f" {RATE.upper()}=")[0]


def fill_figures(stage: Stage, rows: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """{name: Figure}: all learning rates in one, then for each its curves and throughput."""
    groups = grouped(rows.assign(fill=rows["variant"].map(strategy_of)), "fill")
    looks = looks_of(stage, groups, strategy_of)
    lengths = (
        "Losses at different sequence lengths are not the same measurement: "
        "with a longer one the model sees more."
    )
    whole = Figure(figsize=(10, 4.8), layout="constrained")
    draw_grid(whole, stage, groups, looks, RATE, [stage.measure, "difference", SPEED])
    said = [difference_text(stage, rows), dashed_text(stage, rows), lengths]
    frame(whole, f"{stage.name}: {stage.question}", caption(stage, rows, *said), looks)

    made = {stage.name: whole}
    shared = "Other work on the machine decides the throughput." if is_on_cpu(rows) else ""
    for rate, cells in pd.concat(groups.values()).groupby(RATE):
        fig = rate_figure(stage, cells, curves, looks)
        title = f"{stage.name} at {name_of(RATE)} {rate:g}: {stage.question}"
        frame(fig, title, caption(stage, rows, lengths, shared), looks)
        made[f"{stage.name}_lr{f'{rate:g}'.replace('.', '')}"] = fig
    return made


def is_grid(rows: pd.DataFrame, number: str, other: str) -> bool:
    """Whether the variants make lines over one axis, the other one telling the lines apart: the one
    has three values or more, at least two on every line, the other, if numeric, has fewer."""
    if not {number, other} <= {*rows} or not pd.api.types.is_numeric_dtype(rows[number]):
        return False
    if pd.api.types.is_numeric_dtype(rows[other]) and rows[other].nunique() > 2:
        return False
    return rows[number].nunique() > 2 and rows.groupby(other)[number].nunique().min() > 1


def figures(stage_name: str) -> dict[str, Figure]:
    """{name: Figure} of a stage: itself, and one for each learning rate where it asks what should
    fill the memory.

    Raises ValueError where nothing has been run.
    """
    stage, rows, curves = load(stage_name)
    if SHAPE | {RATE} <= {*stage.axes}:
        return fill_figures(stage, rows, curves)
    if len(stage.axes) == 2 and stage.what_is_measured.is_higher_better is not None:
        for number, other in itertools.permutations(stage.axes):
            if is_grid(rows, number, other):
                return {stage_name: grid_figure(stage, rows, curves, number, other)}
    return {stage_name: variants_figure(stage, rows, curves)}


def figure(stage_name: str) -> Figure:
    """The Figure that shows the whole stage. Raises ValueError where nothing has been run."""
    return figures(stage_name)[stage_name]


def write_figures(stage_name: str) -> list[Path]:
    """Writes experiments/figures/<name>.png for each figure; returns the paths. Raises
    ValueError."""
    made = {
        RESULTS.with_name("figures") / f"{name}.png": fig
        for name, fig in figures(stage_name).items()
    }
    for path, fig in made.items():
        save(fig, path)
    return list(made)


def main(argv: list[str] | None = None) -> int:
    """Writes the figures of a stage; exit code 0, or 2 with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("stage", help="python scripts/stages.py lists them")
    try:
        write_figures(parser.parse_args(argv).stage)
    except (ValueError, OSError) as error:
        print(f"plot_ablation.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
