"""Draws the figures of a stage from its results_<stage>.csv and log_curves_<stage>.csv alone.

    python scripts/plot_ablation.py stage1           # figures/stage1.png in experiments
    python scripts/plot_ablation.py batch_vs_seqlen  # and one a rate, ..._lr0005.png for 0.005

Dots and lines are means over seeds, bars and bands their 95 % t-intervals, small dots the seeds.
"""

import argparse
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from matplotlib.transforms import ScaledTranslation
from scipy.special import stdtrit

from plot_runs import GREY, SPEED, Looks, dress, frame, name_of, save, styles
from split_results import RESULTS, comparable, read_curves, read_results
from stages import Stage, load_stage

# stages with these axes ask what should fill the memory
SHAPE = {"batch_size", "sequence_length"}
RATE = "muon_lr"
FILLS = {  # red, teal, blue, as the source
    "large batch": "#C1272D",
    "long sequence": "#2AB7A9",
    "balanced": "#1F4FD8",
}
SEEDS = {"alpha": 0.4, "markersize": 4, "markeredgewidth": 0}  # their small dots
DASHED = {"color": GREY, "linewidth": 0.8, "linestyle": "--"}  # the reference

Groups = Mapping[str, pd.DataFrame]  # rows of results, by the label of their line


def load(stage_name: str) -> tuple[Stage, pd.DataFrame, pd.DataFrame]:
    """(Stage, its comparable runs by the order of its variants, their curves). Raises ValueError
    where it has none."""
    stage = load_stage(stage_name)
    path = RESULTS.with_name(f"results_{stage_name}.csv")
    rows = pd.DataFrame({"variant": []})
    if path.is_file():
        rows = comparable(read_results(path), stage)
    order = {label: i for i, label in enumerate(stage.variants)}
    rows = rows[rows["variant"].isin(order)]
    rows = rows.sort_values("variant", key=lambda labels: labels.map(order), kind="stable")
    if rows.empty:
        raise ValueError(
            f"{path} has no finished run; python scripts/run_stage.py {stage_name} makes them"
        )
    curves = read_curves(stage_name)
    return stage, rows, curves[curves["run_id"].isin(rows["run_id"])]


def grouped(rows: pd.DataFrame, column: str) -> dict[str, pd.DataFrame]:
    """{value: its rows} of a column, in the order of the rows."""
    return {value: rows[rows[column] == value] for value in rows[column].unique()}


def interval(values: pd.Series) -> tuple[pd.Series | float, pd.Series | float]:
    """(mean, half the width of its 95 % t-interval, NaN for one value) of a column, or of each
    group of columns."""
    n = values.count()
    return values.mean(), stdtrit(n - 1, 0.975) * values.std() / n**0.5


def draw_dots(ax: Axes, groups: Groups, looks: Looks, y: str, reference: str | None = None) -> None:
    """For each of {label: rows} mean, interval and seeds of column y, each at its height; the
    reference's mean."""
    for i, (label, rows) in enumerate(groups.items()):
        mean, half = interval(rows[y])
        color = looks[label]["color"]
        ax.plot(rows[y], [i + 0.25] * len(rows), "o", **SEEDS | {"color": color})
        ax.errorbar(mean, i, xerr=half, fmt="o", color=color, capsize=4, markersize=7)
        if label == reference:
            ax.axvline(mean, **DASHED)
    ax.set_yticks(range(len(groups)), [textwrap.fill(label, 24) for label in groups])
    ax.set_ylim(len(groups) - 0.4, -0.6)
    dress(ax, y, "variant", name_of(y))


def draw_over(ax: Axes, groups: Groups, looks: Looks, x: str, y: str) -> None:
    """For each of {label: rows} a line over the numeric setting x: means, intervals and seeds of
    column y."""
    for i, (label, rows) in enumerate(groups.items()):
        means, halves = interval(rows.groupby(x)[y])
        shift = ScaledTranslation((8 + 6 * i) / 72, 0, ax.figure.dpi_scale_trans)  # off the bars
        style = SEEDS | {"color": looks[label]["color"]}
        ax.plot(rows[x], rows[y], "o", transform=ax.transData + shift, **style)
        ax.errorbar(means.index, means, yerr=halves, capsize=4, marker="o", **looks[label])

    values = sorted({value for rows in groups.values() for value in rows[x]})
    if 0 < 3 * values[0] < values[-1]:
        ax.set_xscale("log")
    ax.margins(x=0.12)
    rotation = 45 if len(values) > 6 else 0
    ax.set_xticks(values, [f"{value:g}" for value in values], rotation=rotation)
    ax.xaxis.set_minor_locator(NullLocator())
    dress(ax, x, y, f"{name_of(y)} over {name_of(x)}")


def draw_curves(
    ax: Axes, groups: Groups, looks: Looks, points: pd.DataFrame, y: str, title: str
) -> None:
    """For each of {label: rows} the mean over seeds of column y of its curves against tokens, its
    interval a band."""
    for label, rows in groups.items():
        own = points[points["run_id"].isin(rows["run_id"])].dropna(subset=y)
        means, halves = interval(own.groupby("tokens")[y])
        (line,) = ax.plot(means.index, means, **looks[label])
        band = {"color": line.get_color(), "alpha": 0.15, "linewidth": 0}
        ax.fill_between(means.index, means - halves, means + halves, **band)
    dress(ax, "tokens", y, title, log=True)


def draw_halves(axes: list[Axes], groups: Groups, looks: Looks, curves: pd.DataFrame) -> None:
    """Validation curves, in one panel whole, in the other from the middle of the run on."""
    late = curves[curves["tokens"] >= curves["tokens"].max() / 2]
    draw_curves(axes[0], groups, looks, curves, "val_loss", "validation loss")
    draw_curves(axes[1], groups, looks, late, "val_loss", "validation loss, second half")


def caption(stage: Stage, rows: pd.DataFrame) -> str:
    """Devices, seeds, what was not run, and how to read the marks."""
    seeds = rows.groupby("variant", sort=False).size()
    each = f"{seeds.iloc[0]} a variant"
    if seeds.nunique() > 1:
        each = ", ".join(f"{n} {label}" for label, n in seeds.items())
    text = (
        f"Measured on {' / '.join(sorted(rows['device_name'].unique()))}. Seeds: n = {each}. "
        "Dots and lines: means; bars and bands: 95 % t-intervals; small dots: seeds."
    )
    missing = ", ".join(label for label in stage.variants if label not in seeds)
    return f"{text} No finished run of {missing}." if missing else text


def variants_figure(stage: Stage, rows: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Final loss and train time of every variant, in the order of the stage file, and their
    validation curves."""
    groups = grouped(rows, "variant")
    others = [label for label in stage.variants if label != stage.reference]
    looks = styles([stage.reference, *others])
    fig = Figure(figsize=(10, 5.5 + 0.35 * len(groups)), layout="constrained")
    # apart, for the labels of the upper ones are wide
    upper, lower = (part.subplots(1, 2) for part in fig.subfigures(2))
    for ax, y in zip(upper, ("final_loss", "train_time")):
        draw_dots(ax, groups, looks, y, stage.reference)
    draw_halves(lower, groups, looks, curves)
    frame(
        fig,
        f"{stage.name}: {stage.question}",
        f"{caption(stage, rows)} Dashed: the mean of {stage.reference}.",
        {label: looks[label] for label in groups},
    )
    return fig


def grid_figure(stage: Stage, rows: pd.DataFrame, curves: pd.DataFrame, number: str) -> Figure:
    """Final loss and train time over the numeric axis, a line for each value of the other; curves
    at its best value."""
    (other,) = {*stage.axes} - {number}
    labels = [f"{other.upper()}={value}" for value in rows[other]]
    groups = grouped(rows.assign(group=labels), "group")
    looks = styles(groups)
    fig = Figure(figsize=(10, 7.2), layout="constrained")
    axes = fig.subplots(2, 2)
    for ax, y in zip(axes[0], ("final_loss", "train_time")):
        draw_over(ax, groups, looks, number, y)
        ax.axhline(rows.loc[rows["variant"] == stage.reference, y].mean(), **DASHED)

    best = {
        label: cells.groupby(number)["final_loss"].mean().idxmin()
        for label, cells in groups.items()
    }
    at_best = {label: cells[cells[number] == best[label]] for label, cells in groups.items()}
    draw_halves(axes[1], at_best, looks, curves)
    shown = ", ".join(f"{label} at {value:g}" for label, value in best.items())
    frame(
        fig,
        f"{stage.name}: {stage.question}",
        f"{caption(stage, rows)} Dashed: the mean of {stage.reference}. "
        f"Curves: each at the {name_of(number)} of its least mean loss ({shown}).",
        looks,
    )
    return fig


def fill_looks(fills: list[str]) -> dict[str, dict[str, str]]:
    """{what fills the memory: keywords of its lines}, in the colours of the source."""
    looks = styles(fills)
    for fill in looks:
        for name, color in FILLS.items():
            if fill.startswith(name):
                looks[fill]["color"] = color
    return looks


def rate_figure(cells: pd.DataFrame, curves: pd.DataFrame, looks: Looks) -> Figure:
    """Curves, final losses and throughput of the runs of one learning rate."""
    groups = grouped(cells, "fill")
    fig = Figure(figsize=(10, 5.4), layout="constrained")
    axes = fig.subplot_mosaic([["curve", "final_loss"], ["curve", SPEED]], width_ratios=[3, 2])
    draw_curves(axes["curve"], groups, looks, curves, "train_loss", "training loss")
    for y in ("final_loss", SPEED):
        draw_dots(axes[y], groups, looks, y)
    return fig


def fill_figures(stage: Stage, rows: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """{name: Figure}: all learning rates in one, then for each its curves, final losses and
    throughput."""
    rows = rows.assign(fill=[label.partition(f" {RATE.upper()}=")[0] for label in rows["variant"]])
    looks = fill_looks(rows["fill"].unique())
    whole = Figure(figsize=(10, 4.8), layout="constrained")
    for ax, y in zip(whole.subplots(1, 2), ("final_loss", SPEED)):
        draw_over(ax, grouped(rows, "fill"), looks, RATE, y)

    made = {stage.name: (whole, f"{stage.name}: {stage.question}")}
    for rate, cells in rows.groupby(RATE):
        name = f"{stage.name}_lr{f'{rate:g}'.replace('.', '')}"
        title = f"{stage.name} at {name_of(RATE)} {rate:g}: {stage.question}"
        made[name] = rate_figure(cells, curves, looks), title
    foot = (
        f"{caption(stage, rows)} Losses at different sequence lengths are not the same "
        "measurement: with a longer one the model sees more."
    )
    for fig, title in made.values():
        frame(fig, title, foot, looks)
    return {name: fig for name, (fig, _) in made.items()}


def figures(stage_name: str) -> dict[str, Figure]:
    """{name: Figure} of a stage: itself, and one for each learning rate where it asks what should
    fill the memory.

    Raises ValueError where nothing has been run.
    """
    stage, rows, curves = load(stage_name)
    if SHAPE | {RATE} <= {*stage.axes}:
        return fill_figures(stage, rows, curves)
    numbers = [
        axis
        for axis in stage.axes  # three values or more: two make no line, and a switch has no more
        if axis in rows and pd.api.types.is_numeric_dtype(rows[axis]) and rows[axis].nunique() > 2
    ]
    if len(stage.axes) == 2 and len(numbers) == 1:
        return {stage_name: grid_figure(stage, rows, curves, *numbers)}
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
