"""Draws runs over each other, finished or live, and says which is ahead at the last step that all have evaluated.

    python scripts/plot_runs.py --run baseline=logs/<run_id>.csv --run experts=<run_id> --output F.png --title 'Experts'

A run is a curve's file, the folder logs/<run_id>, a run_id below --log-dir, or one that experiments/log_curves_*.csv
holds. Runs are compared at a step that all have evaluated, never at their ends.
"""

import argparse
import io
import json
import sys
import textwrap
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from split_results import RESULTS, read_curve, read_curves, read_results

COLORS = [
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
]  # Okabe and Ito's
DASHES = ["-", "--", ":"]  # for more lines than colours
GREY = "#888888"
AXES = {  # column: what its axis says, and the unit
    "step": ("step", ""),
    "tokens": ("tokens trained on", "millions"),
    "train_time": ("train time", "s"),
    "loss": ("loss", "nats per token"),
    "train_loss": ("training loss", "nats per token"),
    "val_loss": ("validation loss", "nats per token"),
    "final_loss": ("final validation loss", "nats per token"),
    "tokens_per_sec": ("throughput", "tokens/s"),
    "aux_coef": ("coefficient of the aux loss", ""),
    "entropy": ("load entropy", "1 = even"),
    "max_vio": ("load max violation", "0 = even"),
    "load_max": ("largest load of an expert", "share of all choices"),
    "variant": ("variant", ""),
}
LOSSES, SPEED = ["step", "tokens", "train_time"], "tokens_per_sec"
FORMATS = {
    "tokens": lambda value, _: f"{value / 1e6:,.6g}",
    "train_time": "{x:,g}",
    SPEED: "{x:,.0f}",
}
PANELS = [["step", "tokens"], ["train_time", SPEED]]
EXPERT_PANELS = [["entropy", "balance"], ["aux_coef", "aux_coef"]]


def name_of(column):
    """What a column is called; a setting by its name."""
    return AXES.get(column, [column.upper()])[0]


def styles(labels):
    """{label: keywords of its lines}: black first, then colours that the colour-blind can tell, then another dash."""
    return {
        label: {
            "color": COLORS[i % len(COLORS)],
            "linestyle": DASHES[i // len(COLORS) % len(DASHES)],
        }
        for i, label in enumerate(labels)
    }


def dress(ax, x, y, title, log=False):
    """Names the panel and its axes with their units; `log` where the values span more than a factor of two."""
    for column, axis in ((x, ax.xaxis), (y, ax.yaxis)):
        unit = AXES.get(column, ["", ""])[1]
        axis.set_label_text(
            "" if column == "variant" else name_of(column) + f" ({unit})" * bool(unit)
        )
        if column in FORMATS:
            axis.set_major_formatter(FORMATS[column])
    ax.set_title(title[0].upper() + title[1:], fontsize=10, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    low, high = ax.dataLim.intervaly
    if log and 0 < 2 * low < high:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())


def frame(fig, title, caption, looks):
    """Title above, a legend of {label: keywords of its lines} below it, and at the foot what a reader must know."""
    title, caption, (width, height) = (
        textwrap.fill(title, 85),
        textwrap.fill(caption, 140),
        fig.get_size_inches(),
    )
    ncols = min(len(looks), max(1, 125 // (6 + max(map(len, looks)))))
    under_title = 1 - (0.15 + 0.22 * len(title.splitlines())) / height
    top = under_title - 0.25 * -(-len(looks) // ncols) / height
    bottom = (0.1 + 0.15 * len(caption.splitlines())) / height
    fig.suptitle(title, y=1 - 0.1 / height, fontsize=13, fontweight="bold")
    fig.legend(
        handles=[
            Line2D([], [], label=label, linewidth=2.5, **look) for label, look in looks.items()
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, under_title),
        ncols=ncols,
        frameon=False,
        borderaxespad=0,
    )
    fig.text(0.1 / width, 0.08 / height, caption, fontsize=8.5, color="#444444")
    fig.get_layout_engine().set(rect=(0, bottom, 1, top - bottom))


def save(fig, path):
    """Writes a PNG, the same bytes for the same figure, 1200 pixels wide where that is 10 inches."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(whole := io.BytesIO(), dpi=120)
    small = (
        Image.open(whole).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
    )  # a third of the size
    small.save(path, optimize=True)
    print(path)


def facts_of(path, run_id):
    """What the summary beside a curve, or else a table of results, says of the run; {} where there is neither."""
    if (summary := path.with_name(f"{run_id}.json")).is_file():
        return json.loads(summary.read_text())
    for table in (path.with_name(path.name.replace("log_curves_", "results_")), RESULTS):
        if table != path and table.is_file():
            rows = read_results(table)
            for row in rows[rows["run_id"] == run_id].to_dict("records"):
                return row
    return {}


def find_curve(run, log_dir):
    """(its curve, the file that has it, run_id) of a run given in any of the ways above. Raises FileNotFoundError."""
    for path in (Path(run), Path(f"{run.rstrip('/')}.csv"), Path(log_dir) / f"{run}.csv"):
        if path.is_file():
            return read_curve(path), path, path.stem
    run_id = Path(run).name
    for path in sorted(RESULTS.parent.glob("log_curves_*.csv")):
        curves = read_curves(path.stem.removeprefix("log_curves_"))
        if (own := curves["run_id"] == run_id).any():
            return curves[own].drop_duplicates("step", keep="last"), path, run_id
    known = sorted(Path(log_dir).glob("*.csv"), key=lambda path: path.stat().st_mtime)
    newest = (
        ", ".join(path.stem for path in known[-5:])
        or "none yet; PRESET=quickstart python train_gpt.py makes one"
    )
    raise FileNotFoundError(
        f"--run {run}: no curve, run folder or run_id of that name; newest in {log_dir}: {newest}"
    )


def load_run(run, log_dir="logs"):
    """The curve of a run given in any of the ways above; its attrs say device_name and, with experts, num_experts.

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
    curve.attrs = {
        name: facts[name] for name in ("device_name", "num_experts") if not pd.isna(facts.get(name))
    }
    return curve


def last_shared(runs):
    """The last step with a validation loss in every run of {label: curve}; None where there is none."""
    steps = [set(curve.dropna(subset="val_loss")["step"]) for curve in runs.values()]
    return max(set.intersection(*steps), default=None)


def summary(runs):
    """Text: where each run of {label: curve} is, and their losses at the last step that all have evaluated."""
    lines = []
    for label, curve in runs.items():
        losses = [
            f"{name_of(name)} {values.iloc[-1]:.4f}"
            for name in ("train_loss", "val_loss")
            if len(values := curve[name].dropna())
        ]
        lines.append(", ".join([f"{label}: step {max(curve['step'], default=0)}", *losses]))
    if len(runs) > 1 and (step := last_shared(runs)) is None:
        lines.append("no step that all have evaluated: nothing to compare")
    elif len(runs) > 1:
        losses = {
            label: curve.loc[curve["step"] == step, "val_loss"].item()
            for label, curve in runs.items()
        }
        first, *others = losses
        lines.append(
            f"at step {step}, the last that all have evaluated: {first} {losses[first]:.4f}, "
            + ", ".join(
                f"{label} {losses[label]:.4f} ({losses[label] - losses[first]:+.4f})"
                for label in others
            )
        )
    return "\n".join(lines)


def health(curve, name):
    """A column of a run; of load figures the mean over its layers, max_vio = num_experts * load_max - 1."""
    if name == "max_vio":
        return curve.attrs["num_experts"] * health(curve, "load_max") - 1
    return (
        curve[name] if name in curve else curve.filter(regex=rf"^{name}_\d+$").mean(axis="columns")
    )


def draw_losses(ax, runs, looks, x):
    """Training losses as thin lines, validation losses as dots on a line, of {label: curve} against column x."""
    for label, curve in runs.items():
        train, val = curve.dropna(subset="train_loss"), curve.dropna(subset="val_loss")
        ax.plot(train[x], train["train_loss"], alpha=0.4, linewidth=0.9, **looks[label])
        ax.plot(val[x], val["val_loss"], marker="o", markersize=4, **looks[label])
    if x == "step" and len({max(curve["step"], default=0) for curve in runs.values()}) > 1:
        if (step := last_shared(runs)) is not None:
            ax.axvline(step, color=GREY, linewidth=0.8, zorder=0)
    dress(ax, x, "loss", f"loss against {name_of(x)}", log=True)


def runs_figure(runs, title):
    """A Figure of {label: curve}: losses against steps, tokens and train time, throughput, and balance of experts."""
    looks = styles(runs)
    experts = {
        label: curve
        for label, curve in runs.items()
        if "aux_coef" in curve and curve["aux_coef"].notna().any()
    }
    panels = PANELS + EXPERT_PANELS * bool(experts)
    fig = Figure(figsize=(10, 1.2 + 2.9 * len(panels)), layout="constrained")
    axes = fig.subplot_mosaic(panels)
    for x in LOSSES:
        draw_losses(axes[x], runs, looks, x)
    known = all("num_experts" in curve.attrs for curve in experts.values())
    for panel in [panel for panel in axes if panel not in LOSSES]:
        y = ("max_vio" if known else "load_max") if panel == "balance" else panel
        for label, curve in (runs if panel == SPEED else experts).items():
            points = curve[["step"]].assign(y=health(curve, y)).dropna()
            axes[panel].plot(points["step"], points["y"], **looks[label])
        dress(axes[panel], "step", y, name_of(y))
    devices = {
        label: curve.attrs.get("device_name", "a device not recorded")
        for label, curve in runs.items()
    }
    where = ", ".join(f"{device} ({label})" for label, device in devices.items())
    where = next(iter(devices.values())) if len({*devices.values()}) == 1 else where
    upright = " Upright: the last step that all have evaluated." * bool(
        axes["step"].get_lines()[2 * len(runs) :]
    )
    frame(
        fig,
        title,
        f"Measured on {where}. One run a line (n = 1). Thin: training loss; dots: validation loss."
        f"{upright}{' Loads: means over the layers.' * bool(experts)}",
        looks,
    )
    return fig


def main(argv=None) -> int:
    """Writes the figure, prints where the runs are; exit code 0, or 2 with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--run", action="append", required=True, metavar="LABEL=RUN", help="once for each line"
    )
    parser.add_argument("--output", required=True, metavar="F.png")
    parser.add_argument("--title", default="Runs compared")
    parser.add_argument("--log-dir", default="logs", help="folder of the curves")
    args = parser.parse_args(argv)
    runs = {}
    try:
        if not args.output.endswith(".png"):
            raise ValueError(f"--output {args.output}: must end in .png")
        for text in args.run:
            label, _, run = text.rpartition("=")
            if not label or not run or label in runs:
                raise ValueError(f"--run {text}: must be label=run, each label once")
            runs[label] = load_run(run, args.log_dir)
        save(runs_figure(runs, args.title), args.output)
    except (ValueError, OSError) as error:
        print(f"plot_runs.py: error: {error}", file=sys.stderr)
        return 2
    print(summary(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
