"""Draws runs over each other, finished or live, and says which is ahead at their last shared step.

    python scripts/plot_runs.py --run baseline=logs/<run_id>.csv --run experts=<run_id> \\
        --output F.png --title 'Experts'

A run is a curve's file, the folder logs/<run_id>, a run_id below --log-dir, or one that
experiments/log_curves_*.csv holds. Runs are compared at the last step that all have evaluated,
never at their ends. Beside losses and throughput it draws what else it knows where curves have it,
such as reward and pass_at_1; --y COLUMN draws any other column of a curve.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import io
import json
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from published import RESULTS
from split_results import read_curve, read_curves, read_results
from stages import MEASURES, load_stage, stage_names

COLORS = [  # Okabe and Ito's
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
]
FILLS = {  # what fills the memory: red, teal, blue, as the source
    "large batch": "#C1272D",
    "long sequence": "#2AB7A9",
    "balanced": "#1F4FD8",
}
DASHES = ["-", "--", ":"]  # for more lines than colours
GREY = "#888888"
AXES = {  # column: what its axis says, and the unit
    "step": ("step", ""),
    "tokens": ("tokens trained on", "millions"),
    "train_time": ("train time", "s"),
    "planned_seconds": ("train time by plan", "s"),
    "loss": ("loss", "nats per token"),
    "train_loss": ("training loss", "nats per token"),
    "val_loss": ("validation loss", "nats per token"),
    "difference": ("difference of the final loss", "nats per token"),
    "train_difference": ("difference of the training loss", "nats per token"),
    "val_accuracy": ("validation accuracy", "fraction of tokens"),
    "reward": ("training reward", "mean over samples"),
    "tokens_per_sec": ("throughput", "tokens/s"),
    "aux_coef": ("coefficient of the aux loss", ""),
    "entropy": ("load entropy", "1 = even"),
    "max_vio": ("load max violation", "0 = even"),
    "load_max": ("largest load of an expert", "share of all choices"),
    "variant": ("variant", ""),
    **{name: (one.words, one.unit) for name, one in MEASURES.items()},
}
LOSSES = ["step", "tokens", "train_time"]
SPEED = "tokens_per_sec"
ACCURACY = "val_accuracy"
PASS_RATE = "pass_at_1"
EVALUATED = {ACCURACY, PASS_RATE}  # known at few steps
POSITIVE = {"train_time", "step_avg", SPEED}  # their axes have no values below zero


def millions(value: float, _: int) -> str:
    """A number of tokens on an axis, for matplotlib."""
    return f"{value / 1e6:,.6g}"


FORMATS = {"tokens": millions, "train_time": "{x:,g}", SPEED: "{x:,.0f}"}
PANELS = [["step", "tokens"], ["train_time", SPEED]]
EXPERT_PANELS = [["entropy", "balance"]]
OF_EXPERTS = {"entropy", "balance", "aux_coef"}
MORE = [ACCURACY, "reward", PASS_RATE]  # each a panel where curves have it

Looks = Mapping[str, dict[str, str]]  # keywords of lines, by label
Words = Mapping[str, tuple[str, str]]  # what axes say and their units, by column


def name_of(column: str, words: Words = AXES) -> str:
    """What a column is called; a setting by its name."""
    return words.get(column, [column.upper()])[0]


def styles(labels: Iterable[str]) -> dict[str, dict[str, str]]:
    """{label: keywords of its lines}: black first, then colours that the colour-blind can tell,
    then another dash; of what fills the memory its own colour."""
    looks = {}
    for i, label in enumerate(labels):
        own = [color for name, color in FILLS.items() if label.startswith(name)]
        looks[label] = {
            "color": [*own, COLORS[i % len(COLORS)]][0],
            "linestyle": "-" if own else DASHES[i // len(COLORS) % len(DASHES)],
        }
    return looks


def looks_of(runs: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, str]]:
    """{label: keywords of its lines} of {label: curve}: those of their variants in the figures of
    their stage, if they are different ones of one stage."""
    stages = {curve.attrs.get("stage") for curve in runs.values()}
    variants = {label: curve.attrs.get("variant") for label, curve in runs.items()}
    if len(stages) == 1 and stages & {*stage_names()}:
        known = styles(load_stage(*stages).references_first())
        looks = {label: known.get(variant) for label, variant in variants.items()}
        different = {tuple(look.items()) for look in looks.values() if look}
        if len(different) == len(runs):
            return looks
    return styles(runs)


def has(curve: pd.DataFrame, name: str) -> bool:
    """Whether a curve has figures in a column."""
    return name in curve and curve[name].notna().any()


def axis_label(column: str, words: Words = AXES) -> str:
    """What a column is called, with its unit."""
    if column == "variant":
        return ""
    _, unit = words.get(column, ("", ""))
    name = name_of(column, words)
    return f"{name} ({unit})" if unit else name


def dress(ax: Axes, x: str, y: str, title: str, log: bool = False, words: Words = AXES) -> None:
    """Names the panel and its axes with their units; `log` where the values span more than a factor
    of two."""
    for column, axis in ((x, ax.xaxis), (y, ax.yaxis)):
        text = axis_label(column, words)
        room = 30 if axis is ax.yaxis or ax.get_gridspec().ncols > 2 else 55  # characters
        axis.set_label_text(text.replace(" (", "\n(") if len(text) > room else text)
        if column in FORMATS:
            axis.set_major_formatter(FORMATS[column])
        if column in POSITIVE and min(axis.get_view_interval()) < 0:
            axis.set_view_interval(0, max(axis.get_view_interval()), ignore=True)
    ax.set_title(title[0].upper() + title[1:], fontsize=10, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)

    low, high = ax.dataLim.intervaly
    if log and 0 < 2 * low < high:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())


def frame(fig: Figure, title: str, caption: str, looks: Looks) -> None:
    """Title above, a legend of {label: keywords of its lines} below it, and at the foot what a
    reader must know; the figure grows with the rows of both."""
    title, caption = textwrap.fill(title, 85), textwrap.fill(caption, 150)
    font = 10 if len(looks) <= 8 else 8.5
    columns = min(len(looks), max(1, int(1250 / font / (6 + max(map(len, looks))))))
    rows = -(-len(looks) // columns)
    lines = len(caption.splitlines())
    width, height = fig.get_size_inches()
    height += 0.02 * font * (rows - 1) + 0.15 * max(0, lines - 2)
    fig.set_size_inches(width, height)
    under_title = 1 - (0.15 + 0.22 * len(title.splitlines())) / height
    top = under_title - (0.12 + 0.02 * font * rows) / height
    bottom = (0.1 + 0.15 * lines) / height

    fig.suptitle(title, y=1 - 0.1 / height, fontsize=13, fontweight="bold")
    fig.legend(
        handles=[
            Line2D([], [], label=label, linewidth=2.5, **look) for label, look in looks.items()
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, under_title),
        ncols=columns,
        fontsize=font,
        frameon=False,
        borderaxespad=0,
    )
    fig.text(0.1 / width, 0.08 / height, caption, fontsize=8.5, color="#444444")
    fig.get_layout_engine().set(rect=(0, bottom, 1, top - bottom))


def save(fig: Figure, path: str | Path) -> None:
    """Writes a PNG, the same bytes for the same figure, 1200 pixels wide where that is 10
    inches."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO()
    fig.savefig(whole, dpi=120)
    # a third of the size
    small = Image.open(whole).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
    small.save(path, optimize=True)
    print(path)


def facts_of(path: Path, run_id: str) -> dict:
    """What the summary beside a curve, or else a table of results, says of the run; {} where there
    is neither."""
    summary = path.with_name(f"{run_id}.json")
    if summary.is_file():
        return json.loads(summary.read_text("utf-8"))
    for table in (path.with_name(path.name.replace("log_curves_", "results_")), RESULTS):
        if table != path and table.is_file():
            rows = read_results(table)
            for row in rows[rows["run_id"] == run_id].to_dict("records"):
                return row
    return {}


def find_curve(run: str, log_dir: str) -> tuple[pd.DataFrame, Path, str]:
    """(its curve, the file that has it, run_id) of a run given in any of the ways above. Raises
    FileNotFoundError."""
    for path in (Path(run), Path(f"{run.rstrip('/')}.csv"), Path(log_dir) / f"{run}.csv"):
        if path.is_file():
            return read_curve(path), path, path.stem

    run_id = Path(run).name
    for path in sorted(RESULTS.parent.glob("log_curves_*.csv")):
        curves = read_curves(path.stem.removeprefix("log_curves_"))
        own = curves[curves["run_id"] == run_id]
        if len(own):
            return own.drop_duplicates("step", keep="last"), path, run_id

    known = sorted(Path(log_dir).glob("*.csv"), key=lambda path: path.stat().st_mtime)
    newest = ", ".join(path.stem for path in known[-5:])
    raise FileNotFoundError(
        f"--run {run}: no curve, run folder or run_id of that name; newest in {log_dir}: "
        f"{newest or 'none yet; PRESET=quickstart python train_gpt.py makes one'}"
    )


def load_run(run: str, log_dir: str = "logs") -> pd.DataFrame:
    """The curve of a run given in any of the ways above; its attrs say device_name, stage, variant
    and, with experts, num_experts, as far as they are known.

    Raises FileNotFoundError with the newest runs, ValueError where the file is no curve.
    """
    try:
        curve, path, run_id = find_curve(run, log_dir)
        curve[[*LOSSES, "train_loss", "val_loss", SPEED]]  # noqa: B018  a curve has them all
    except (KeyError, ValueError):
        raise ValueError(
            f"--run {run}: is not the curve of a run; name logs/<run_id>.csv or the run_id"
        ) from None
    facts = facts_of(path, run_id)
    names = ("device_name", "stage", "variant", "num_experts")
    curve.attrs = {name: facts[name] for name in names if not pd.isna(facts.get(name))}
    return curve


def last_shared(runs: Mapping[str, pd.DataFrame], column: str = "val_loss") -> int | None:
    """The last step with a figure in this column in every run of {label: curve}; None where there
    is none."""
    steps = [
        set(curve.dropna(subset=column)["step"]) if column in curve else set()
        for curve in runs.values()
    ]
    return max(set.intersection(*steps), default=None)


def progress(label: str, curve: pd.DataFrame) -> str:
    """Where a run is: its last step and losses, and reward and pass rate where it has them."""
    parts = [f"{label}: step {max(curve['step'], default=0)}"]
    for name in ("train_loss", "val_loss", "reward", PASS_RATE):
        if has(curve, name):
            values = curve[name].dropna()
            parts.append(f"{name_of(name)} {values.iloc[-1]:.4f}")
    return ", ".join(parts)


def values_at(runs: Mapping[str, pd.DataFrame], step: int, column: str) -> str:
    """A column of {label: curve} at a step, of all but the first with the difference to it."""
    values = {
        label: curve.loc[curve["step"] == step, column].item() for label, curve in runs.items()
    }
    first, *others = values
    parts = [f"{first} {values[first]:.4f}"]
    parts += [
        f"{label} {values[label]:.4f} ({values[label] - values[first]:+.4f})" for label in others
    ]
    return ", ".join(parts)


def comparison(runs: Mapping[str, pd.DataFrame]) -> list[str]:
    """The losses of two or more runs at the last step that all have evaluated, and their pass rates
    where all have them, in sentences."""
    step = last_shared(runs)
    lines = ["no step that all have evaluated: nothing to compare"]
    if step is not None:
        losses = values_at(runs, step, "val_loss")
        lines = [f"at step {step}, the last that all have evaluated: {losses}"]
    step = last_shared(runs, PASS_RATE)
    if step is not None:
        rates = values_at(runs, step, PASS_RATE)
        lines.append(f"{name_of(PASS_RATE)}, at step {step}: {rates}")
    return lines


def summary(runs: Mapping[str, pd.DataFrame]) -> str:
    """Where each run of {label: curve} is, a line each, and how they compare."""
    lines = [progress(label, curve) for label, curve in runs.items()]
    if len(runs) > 1:
        lines += comparison(runs)
    return "\n".join(lines)


def health(curve: pd.DataFrame, name: str) -> pd.Series:
    """A column of a run; of load figures the mean over its layers, max_vio = num_experts * load_max
    - 1."""
    if name == "max_vio":
        return curve.attrs["num_experts"] * health(curve, "load_max") - 1
    if name in curve:
        return curve[name]
    return curve.filter(regex=rf"^{name}_\d+$").mean(axis="columns")


def draw_losses(ax: Axes, runs: Mapping[str, pd.DataFrame], looks: Looks, x: str) -> None:
    """Training losses as thin lines, validation losses as dots on a line, of {label: curve} against
    column x."""
    for label, curve in runs.items():
        train, val = curve.dropna(subset="train_loss"), curve.dropna(subset="val_loss")
        ax.plot(train[x], train["train_loss"], alpha=0.4, linewidth=0.9, **looks[label])
        ax.plot(val[x], val["val_loss"], marker="o", markersize=4, **looks[label])

    last_steps = {max(curve["step"], default=0) for curve in runs.values()}
    step = last_shared(runs)
    if x == "step" and len(last_steps) > 1 and step is not None:
        ax.axvline(step, color=GREY, linewidth=0.8, zorder=0)
    dress(ax, x, "loss", f"loss against {name_of(x)}", log=True)


def devices_text(runs: Mapping[str, pd.DataFrame]) -> str:
    """On what each run was measured; once where it is the same for all."""
    devices = {
        label: curve.attrs.get("device_name", "a device not recorded")
        for label, curve in runs.items()
    }
    if len(set(devices.values())) == 1:
        return next(iter(devices.values()))
    return ", ".join(f"{device} ({label})" for label, device in devices.items())


def check_columns(runs: Mapping[str, pd.DataFrame], columns: Iterable[str]) -> None:
    """Raises ValueError where no run of {label: curve} has numbers in one of the columns."""
    known = {
        name: None
        for curve in runs.values()
        for name in curve.select_dtypes("number")
        if has(curve, name)
    }
    for column in columns:
        if column not in known:
            raise ValueError(
                f"--y {column}: no run has figures in such a column; choose from {', '.join(known)}"
            )


def panels_of(runs: Mapping[str, pd.DataFrame], columns: Sequence[str]) -> list[list[str]]:
    """The panels of a figure of {label: curve}, by row: those of every run, those of experts, then
    these columns and what else curves have, two a row, the last one wide where it is alone."""
    with_experts = any(has(curve, "aux_coef") for curve in runs.values())
    rows = PANELS + EXPERT_PANELS if with_experts else PANELS
    there = [name for name in MORE if any(has(curve, name) for curve in runs.values())]
    shown = {name for row in rows for name in row}
    wanted = (["aux_coef"] if with_experts else []) + there + [*columns]
    alone = [name for name in dict.fromkeys(wanted) if name not in shown]
    pairs = [alone[i : i + 2] for i in range(0, len(alone), 2)]
    return rows + [pair if len(pair) == 2 else pair * 2 for pair in pairs]


def runs_figure(
    runs: Mapping[str, pd.DataFrame], title: str, columns: Sequence[str] = ()
) -> Figure:
    """A Figure of {label: curve}: losses against steps, tokens and train time, throughput, balance
    of experts, what else curves have, and these columns of theirs."""
    looks = looks_of(runs)
    words = {column: (column, "") for column in columns} | AXES
    experts = {label: curve for label, curve in runs.items() if has(curve, "aux_coef")}
    panels = panels_of(runs, columns)
    fig = Figure(figsize=(10, 1.2 + 2.9 * len(panels)), layout="constrained")
    axes = fig.subplot_mosaic(panels)

    for x in LOSSES:
        draw_losses(axes[x], runs, looks, x)
    experts_known = all("num_experts" in curve.attrs for curve in experts.values())
    balance = "max_vio" if experts_known else "load_max"
    for panel in [panel for panel in axes if panel not in LOSSES]:
        y = balance if panel == "balance" else panel
        for label, curve in (experts if panel in OF_EXPERTS else runs).items():
            points = curve[["step"]].assign(y=health(curve, y)).dropna()
            marker = "o" if panel in EVALUATED or len(points) == 1 else ""
            axes[panel].plot(
                points["step"], points["y"], marker=marker, markersize=4, **looks[label]
            )
        dress(axes[panel], "step", y, name_of(y, words), words=words)

    caption = (
        f"Measured on {devices_text(runs)}. One run a line (n = 1). "
        "Thin: training loss; dots: validation loss."
    )
    if len(axes["step"].get_lines()) > 2 * len(runs):
        caption += " Upright: the last step that all have evaluated."
    if experts:
        caption += " Loads: means over the layers."
    frame(fig, title, caption, looks)
    return fig


def main(argv: list[str] | None = None) -> int:
    """Writes the figure, prints where the runs are; exit code 0, or 2 with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--run", action="append", required=True, metavar="LABEL=RUN", help="once for each line"
    )
    parser.add_argument("--output", required=True, metavar="F.png")
    parser.add_argument("--title", default="Runs compared")
    parser.add_argument(
        "--y", action="append", default=[], metavar="COLUMN", help="draw this, too; once for each"
    )
    parser.add_argument("--log-dir", default="logs", help="folder of the curves")
    args = parser.parse_args(argv)
    runs = {}
    try:
        if not args.output.endswith(".png"):
            raise ValueError(f"--output {args.output}: must end in .png")
        for text in args.run:
            label, _, run = text.rpartition("=")
            if not label or not run or label in runs:
                raise ValueError(f"--run {text}: must be label=run, each label once, as a=RUN_ID")
            runs[label] = load_run(run, args.log_dir)
        check_columns(runs, args.y)
        save(runs_figure(runs, args.title, args.y), args.output)
    except (ValueError, OSError) as error:
        print(f"plot_runs.py: error: {error}", file=sys.stderr)
        return 2
    print(summary(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
