"""scripts/plot_runs.py, plot_ablation.py: what is drawn was measured; a figure says what it is."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy.stats import ttest_1samp, ttest_ind, ttest_rel

import plot_ablation
import plot_runs
from split_results import read_curve

SCRIPTS = Path(__file__).parents[1] / "scripts"

CURVE = "step,tokens,epoch,train_loss,val_loss,lr,grad_norm,train_time,tokens_per_sec,data_wait\n"
STAGES = {
    "gates": (
        'variants = {none = {}, wide = {ATTNGATE = "elementwise"}, late = {ATTNGATE = "const"}}',
        'reference = "none"',
    ),
    "rates": (
        'variants = {none = {}, wide = {ATTNGATE = "elementwise"}}\ngrid.LR = [0.1, 0.2, 0.4]',
        'reference = "none LR=0.1"',
    ),
    "cells": (
        'variants = {none = {ATTNGATE = "none"}, wide = {ATTNGATE = "elementwise"}}\n'
        "grid.LR = [0.1, 0.2, 0.4]",
        'against = {ATTNGATE = "none"}',
    ),
    "batch_vs_seqlen": (
        """variants."large batch 4x2" = {BATCH_SIZE = 4, SEQUENCE_LENGTH = 2}
variants."long sequence 1x8" = {BATCH_SIZE = 1, SEQUENCE_LENGTH = 8}
variants."balanced 2x4" = {BATCH_SIZE = 2, SEQUENCE_LENGTH = 4}
grid.MUON_LR = [0.005, 0.02]""",
        'reference = "balanced 2x4 MUON_LR=0.02"',
    ),
}


def curve_text(losses, every=10, experts=""):
    """A curve with these validation losses: training loss twice that, 100 tokens and 2 s a step."""
    lines = []
    for i, loss in enumerate(losses):
        step, train = i * every, 2 * loss if i else ""
        lines.append(f"{step},{step * 100},0.0,{train},{loss},0.1,1.0,{step * 2.0},{50 + i},0")
    names = ",aux_coef,entropy_0,load_max_0,entropy_2,load_max_2" if experts else ""
    return CURVE.strip() + names + "\n" + "".join(f"{line}{experts}\n" for line in lines)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("logs").mkdir()
    Path("experiments/stages").mkdir(parents=True)
    for name, (variants, reference) in STAGES.items():
        text = f'question = "Why?"\nseeds = [1, 2]\n{reference}\n{variants}\n'
        Path(f"experiments/stages/{name}.toml").write_text(text)
    return tmp_path


def leave(stage, runs, **columns):
    """Writes a stage of `runs`, (variant, seed, losses, settings); returns rows and curves."""
    rows, curves = [], []
    for i, (variant, seed, losses, settings) in enumerate(runs):
        run_id = f"{stage}-{i}.x"
        Path("curve").write_text(curve_text(losses))
        curves.append(read_curve("curve").assign(run_id=run_id, variant=variant, seed=seed))
        rows.append(
            {
                "run_id": run_id,
                "stage": stage,
                "variant": variant,
                "status": "ok",
                "seed": seed,
                "started": i,
                "source_sha": "s",
                "changes": "",
                "config_hash": "c",
                "data_fingerprint": "d",
                "device_name": "cpu: Abacus",
                "final_loss": losses[-1],
                "train_time": 100.0 + i,
                "tokens_per_sec": 5000.0 + i,
            }
            | columns
            | settings
        )
    rows, curves = pd.DataFrame(rows), pd.concat(curves)
    rows.to_csv(f"experiments/results_{stage}.csv", index=False)
    curves.to_csv(f"experiments/log_curves_{stage}.csv", index=False)
    return rows, curves


def gates():
    """Two variants of three, not in the stage's order, with five and four seeds, three of them
    shared, and runs not to be drawn."""
    runs = [
        ("wide", 1, [5, 3, 1.30], {}),
        ("wide", 2, [5, 3.2, 1.34], {}),
        ("wide", 3, [5, 3.1, 1.38], {}),
        ("wide", 7, [5, 3.3, 1.30], {}),
        ("none", 1, [5, 2, 1.20], {}),
        ("none", 2, [5, 2.2, 1.26], {}),
        ("none", 3, [5, 2.6, 1.21], {}),
        ("none", 5, [5, 2.5, 1.21], {}),
        ("none", 6, [5, 2.4, 1.22], {}),
        ("none", 4, [5, 4, 9.0], {"status": "diverged"}),
        ("gone", 1, [5, 4, 7.0], {"started": -1}),
        ("wide", 4, [5, 4, 8.0], {"source_sha": "old", "started": -1}),
    ]
    return leave("gates", runs)


def rates(stage="rates", seeds=(1, 2, 3)):
    """Two gates at three rates, their losses best at different ones."""
    runs = [
        (
            f"{gate} LR={lr}",
            seed,
            [5, 2, 1 + (lr - best) ** 2 + seed / 100 + seed * lr * best / 10],
            {"attngate": gate.replace("wide", "elementwise"), "lr": lr},
        )
        for gate, best in (("none", 0.1), ("wide", 0.2))
        for lr in (0.1, 0.2, 0.4)
        for seed in seeds
    ]
    return leave(stage, runs)


def fills(without=()):
    kinds = {"large batch 4x2": (4, 2), "long sequence 1x8": (1, 8), "balanced 2x4": (2, 4)}
    runs = [
        (
            f"{kind} MUON_LR={lr}",
            seed,
            [5, 2, 1 + lr + size / 10 + seed / 100],
            {"muon_lr": lr, "batch_size": size, "sequence_length": length},
        )
        for kind, (size, length) in kinds.items()
        for lr in (0.005, 0.02)
        for seed in (1, 2, 3)
        if kind not in without
    ]
    return leave("batch_vs_seqlen", runs)


def xy(line):
    return [np.asarray(values, dtype=float).tolist() for values in line.get_data()]


def legend(fig):
    box = fig.legends[0]
    return {
        text.get_text(): handle.get_color()
        for text, handle in zip(box.texts, box.legend_handles, strict=True)
    }


def caption(fig):
    return " ".join(fig.texts[-1].get_text().split())


def bars(ax):
    """[(color, means as (x, y), ends of the intervals)] of the error bars of a panel."""
    return [
        (bar[0].get_color(), xy(bar[0]), [segment.tolist() for segment in bar[2][0].get_segments()])
        for bar in ax.containers
    ]


def bounds(values):
    return ends_of(ttest_1samp(values, 0))


def ends_of(test):
    low, high = test.confidence_interval(0.95)
    return pytest.approx([low, high])


def losses_of(rows, variant):
    """{seed: final loss} of the runs of a variant that are to be drawn."""
    fit = (rows["status"] == "ok") & (rows["source_sha"] == "s")
    own = rows[(rows["variant"] == variant) & fit]
    return own.set_index("seed")["final_loss"]


def panel(fig, column):
    """The panel of a column."""
    title = plot_runs.name_of(column).capitalize()
    (ax,) = [ax for ax in fig.axes if ax.get_title(loc="left").lower() == title.lower()]
    return ax


def titles(fig):
    return [ax.get_title(loc="left") for ax in fig.axes]


def seed_dots(ax):
    """[(x, y)] of the small dots of each variant of a panel."""
    return [xy(line) for line in ax.lines if line.get_alpha()]


def dashed(ax):
    return [line for line in ax.lines if line.get_linestyle() == "--"]


def label_of(axis):
    return " ".join(axis.get_label_text().split())


def is_dressed(fig, device="cpu: Abacus"):
    """Whether title, panels, axes and caption say what they are."""
    assert fig.get_suptitle() and device in caption(fig) and "n =" in caption(fig)
    for ax in fig.axes:
        assert ax.get_title(loc="left") and ax.get_xlabel()
        beside = ax.get_shared_y_axes().get_siblings(ax)
        labels = {text.get_text() for one in beside for text in one.get_yticklabels()}
        assert ax.get_ylabel() or labels & {"none", "large batch 4x2"}
    return True


def test_runs_are_drawn_as_their_curves(here):
    Path("logs/a.csv").write_text(curve_text([5, 3, 2]))
    Path("logs/b.csv").write_text(curve_text([6, 4, 3, 1]))
    runs = {"first": plot_runs.load_run("a"), "second": plot_runs.load_run("b")}
    fig = plot_runs.runs_figure(runs, "Two runs")
    assert is_dressed(fig, "device not recorded") and fig.get_suptitle() == "Two runs"
    assert legend(fig) == {"first": "#000000", "second": "#0072B2"}
    for ax, x in zip(fig.axes, ("step", "tokens", "train_time")):
        for curve, color, (train, val) in zip(
            runs.values(), legend(fig).values(), (ax.lines[:2], ax.lines[2:4])
        ):
            assert xy(train) == [curve[x][1:].tolist(), curve["train_loss"][1:].tolist()]
            assert xy(val) == [curve[x].tolist(), curve["val_loss"].tolist()]
            assert train.get_color() == val.get_color() == color and val.get_marker() == "o"
    assert [xy(line) for line in fig.axes[3].lines] == [
        [[0, 10, 20], [50, 51, 52]],
        [[0, 10, 20, 30], [50, 51, 52, 53]],
    ]
    assert [ax.get_xlabel() for ax in fig.axes] == [
        "step",
        "tokens trained on (millions)",
        "train time (s)",
        "step",
    ]
    assert fig.axes[1].xaxis.get_major_formatter()(1_500_000_000, 0) == "1,500"


def test_progress_is_compared_at_the_last_shared_step(here, capsys):
    not_evaluated = "25,2500,0.0,3.5,,0.1,1.0,50.0,52,0\n"
    Path("logs/a.csv").write_text(curve_text([5, 3, 2]) + not_evaluated)
    Path("logs/b.csv").write_text(curve_text([6, 4, 3, 1]) + not_evaluated)
    Path("logs/odd.csv").write_text(CURVE + "7,1,0,2.5,2.25,0,0,1,1,0\n")
    assert plot_runs.main(["--run", "first=a", "--run", "second=b", "--output", "f/x.png"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "f/x.png",
        "first: step 25, training loss 3.5000, validation loss 2.0000",
        "second: step 30, training loss 2.0000, validation loss 1.0000",
        "at step 20, the last that all have evaluated: first 2.0000, second 3.0000 (+1.0000)",
    ]
    a, b, odd = map(plot_runs.load_run, ("a", "b", "odd"))
    upright = plot_runs.runs_figure({"a": a, "b": b}, "T").axes[0].lines[4:]
    assert [line.get_xdata() for line in upright] == [[20, 20]]
    assert len(plot_runs.runs_figure({"a": a, "again": a}, "T").axes[0].lines) == 4
    assert len(plot_runs.runs_figure({"a": a, "odd": odd}, "T").axes[0].lines) == 4
    assert plot_runs.summary({"a": a, "odd": odd}).endswith(
        "\nno step that all have evaluated: nothing to compare"
    )
    assert "at step" not in plot_runs.summary({"a": a})


def test_a_live_run_is_read_up_to_its_last_whole_line_and_a_step_run_twice_once(here):
    text = curve_text([5, 3, 2])
    Path("logs/live.csv").write_text(
        text + text.splitlines()[-1].replace(",2,", ",1.5,") + "\n30,3000,0.0,2.5,1."
    )
    fig = plot_runs.runs_figure({"live": plot_runs.load_run("live")}, "T")
    assert xy(fig.axes[0].lines[1]) == [[0, 10, 20], [5, 3, 1.5]]
    Path("logs/begun.csv").write_text(CURVE)
    begun = plot_runs.load_run("begun")
    assert plot_runs.summary({"begun": begun}) == "begun: step 0"
    assert is_dressed(plot_runs.runs_figure({"begun": begun}, "T"), "device not recorded")


def test_balance_of_experts_is_a_mean_over_layers(here):
    Path("logs/moe.csv").write_text(curve_text([5, 3], experts=",0.01,0.9,0.3,0.7,0.5"))
    Path("logs/dense.csv").write_text(curve_text([5, 4]))
    Path("logs/moe.json").write_text('{"device_name": "cpu: Abacus", "num_experts": 4}')
    runs = {name: plot_runs.load_run(name) for name in ("dense", "moe")}
    fig = plot_runs.runs_figure(runs, "T")
    assert is_dressed(fig) and "device not recorded (dense)" in caption(fig)
    drawn = {
        label_of(ax.yaxis): [(line.get_color(), *xy(line)[1]) for line in ax.lines]
        for ax in fig.axes[4:]
    }
    assert drawn == {
        "load entropy (1 = even)": [("#0072B2", 0.8, 0.8)],
        "load max violation (0 = even)": [("#0072B2", pytest.approx(0.6), pytest.approx(0.6))],
        "coefficient of the aux loss": [("#0072B2", 0.01, 0.01)],
    }
    del runs["moe"].attrs["num_experts"]
    ax = plot_runs.runs_figure(runs, "T").axes[5]
    assert label_of(ax.yaxis) == "largest load of an expert (share of all choices)"
    assert xy(ax.lines[0])[1] == [0.4, 0.4]


def leave_rates(name, rates, **columns):
    """A curve with a pass rate where it is evaluated, and a reward at every step logged."""
    Path("curve").write_text(curve_text([5, 4, 3, 2]))
    curve = read_curve("curve")
    curve.loc[1::2, "val_loss"] = np.nan
    curve = curve.assign(pass_at_1=[rates[0], np.nan, rates[1], np.nan], **columns)
    curve.assign(reward=curve["step"] / 100).to_csv(f"logs/{name}.csv", index=False)


def test_rewards_and_pass_rates_are_drawn_and_compared_where_curves_have_them(here, capsys):
    leave_rates("a", [0.125, 0.25])
    leave_rates("b", [0.125, 0.5], reward_mean=2.0)
    Path("logs/copied.csv").write_text(curve_text([5, 3]))
    runs = {name: plot_runs.load_run(name) for name in ("a", "b", "copied")}
    fig = plot_runs.runs_figure(runs, "T")
    assert titles(fig)[4:] == ["Training reward", "Greedy pass@1, held out"]
    rate, reward = panel(fig, "pass_at_1"), panel(fig, "reward")
    assert [xy(line) for line in rate.lines] == [
        [[0, 20], [0.125, 0.25]],
        [[0, 20], [0.125, 0.5]],
        [[], []],
    ]
    assert rate.lines[0].get_marker() == "o" and rate.get_xlabel() == "step"
    assert label_of(rate.yaxis) == "greedy pass@1, held out (fraction of prompts)"
    assert xy(reward.lines[0]) == [[0, 10, 20, 30], [0, 0.1, 0.2, 0.3]]
    assert "Greedy pass@1, held out" not in titles(plot_runs.runs_figure({"c": runs["copied"]}, ""))

    assert plot_runs.main(["--run", "first=a", "--run", "second=b", "--output", "x.png"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"{label}: step 30, training loss 4.0000, validation loss 3.0000, training reward 0.3000, "
        f"greedy pass@1, held out {rate}"
        for label, rate in (("first", "0.2500"), ("second", "0.5000"))
    ] + [
        "at step 20, the last that all have evaluated: first 3.0000, second 3.0000 (+0.0000)",
        "greedy pass@1, held out, at step 20: first 0.2500, second 0.5000 (+0.2500)",
    ]
    del runs["a"], runs["copied"]["val_loss"]
    assert plot_runs.summary(runs | {"copied": plot_runs.load_run("copied")}).count("pass@1") == 1


def test_any_column_of_a_curve_can_be_asked_for(here, capsys):
    leave_rates("a", [0.125, 0.25], kl=[0.0, 0.1, 0.2, 0.3])
    Path("logs/plain.csv").write_text(curve_text([5, 3]))
    runs = {name: plot_runs.load_run(name) for name in ("a", "plain")}
    fig = plot_runs.runs_figure(runs, "T", ["kl", "pass_at_1", "kl"])
    assert titles(fig)[4:] == ["Training reward", "Greedy pass@1, held out", "Kl"]
    assert xy(fig.axes[6].lines[0]) == [[0, 10, 20, 30], [0.0, 0.1, 0.2, 0.3]]
    assert label_of(fig.axes[6].yaxis) == "kl"
    assert fig.axes[6].get_subplotspec().colspan.stop == 2  # in a row of its own
    words = ["--run", "a=a", "--run", "plain=plain", "--output", "x.png", "--y"]
    assert plot_runs.main([*words, "kl"]) == 0 and Path("x.png").exists()
    capsys.readouterr()
    assert plot_runs.main([*words, "kk"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("plot_runs.py: error: --y kk: no run has figures in such a column; ")
    assert "choose from step, tokens, epoch, " in error and "kl" in error


@pytest.mark.parametrize(
    "run", ["logs/lr0.1.csv", "logs/lr0.1", "logs/lr0.1/", "lr0.1", "gates-0.x"]
)
def test_a_run_may_be_named_in_many_ways(here, run):
    gates()
    Path("logs/lr0.1").mkdir()
    Path("logs/lr0.1.csv").write_text(curve_text([5, 3, 1.30]))
    Path("logs/lr0.1.json").write_text('{"device_name": "cpu: Abacus"}')
    curve = plot_runs.load_run(run)
    assert curve["val_loss"].tolist() == [5, 3, 1.30]
    assert curve.attrs["device_name"] == "cpu: Abacus"


@pytest.mark.parametrize(
    "args, sentence",
    [
        (
            ["--run", "a=nowhere"],
            "--run nowhere: no curve, run folder or run_id of that name; newest in logs: table, a",
        ),
        (
            ["--run", "a=nowhere", "--log-dir", "none"],
            "--run nowhere: no curve, run folder or run_id of that name; newest "
            "in none: none yet; PRESET=quickstart python train_gpt.py makes one",
        ),
        (["--run", "a"], "--run a: must be label=run, each label once, as a=RUN_ID"),
        (
            ["--run", "x=a", "--run", "x=a"],
            "--run x=a: must be label=run, each label once, as a=RUN_ID",
        ),
        (
            ["--run", "a=table"],
            "--run table: is not the curve of a run; name logs/<run_id>.csv or the run_id",
        ),
        (
            ["--run", "a=picture"],
            "--run picture: is not the curve of a run; name logs/<run_id>.csv or the run_id",
        ),
        (["--run", "a=a", "--output", "f.gif"], "--output f.gif: must end in .png"),
    ],
    ids=lambda value: value[-1],
)
def test_what_is_no_run_gets_one_sentence(here, capsys, args, sentence):
    Path("logs/table.csv").write_text("step,loss\n1,2\n")
    Path("logs/a.csv").write_text(curve_text([5]))
    Path("picture").write_bytes(b"\x89PNG\n")
    assert plot_runs.main(["--output", "f.png", *args]) == 2
    assert (
        capsys.readouterr() == ("", f"plot_runs.py: error: {sentence}\n")
        and not Path("f.png").exists()
    )


def test_dots_are_means_with_intervals_and_seeds(here):
    rows, _ = gates()
    fig = plot_ablation.figure("gates")
    assert is_dressed(fig) and fig.get_suptitle() == "gates: Why?"
    assert legend(fig) == {"none": "#000000", "wide": "#0072B2"}
    assert "n = 4 of 'wide'; 5 of 'none'." in caption(fig)
    assert "No finished run of 'late'." in caption(fig)
    ax = panel(fig, "final_loss")
    assert [text.get_text() for text in fig.axes[0].get_yticklabels()] == ["none", "wide"]
    for i, (variant, (color, mean, ends)) in enumerate(zip(legend(fig), bars(ax))):
        losses = losses_of(rows, variant)
        assert color == legend(fig)[variant] and mean == [[pytest.approx(losses.mean())], [i]]
        assert [point[0] for point in ends[0]] == bounds(losses)
        assert seed_dots(ax)[i][0] == losses.tolist()
    (line,) = dashed(ax)
    assert line.get_xdata() == pytest.approx([losses_of(rows, "none").mean()] * 2)


def test_the_first_panel_shows_differences_with_the_interval_of_pairs(here):
    rows, _ = gates()
    fig = plot_ablation.figure("gates")
    none, wide = losses_of(rows, "none"), losses_of(rows, "wide")
    shared = [1, 2, 3]
    ax = fig.axes[0]
    assert ax is panel(fig, "difference")
    assert ax.get_xlabel() == "difference of the final loss (nats per token)"
    (_, reference, no_ends), (color, mean, ends) = bars(ax)
    assert reference == [[0], [0]] and no_ends == [[]]
    assert color == "#0072B2" and mean == [[pytest.approx((wide - none).mean())], [1]]
    test = ttest_rel(wide[shared], none[shared])
    assert [point[0] for point in ends[0]] == ends_of(test)
    pairs = [x for x in seed_dots(ax)[1][0] if not np.isnan(x)]
    assert pairs == pytest.approx((wide - none)[shared].tolist())
    assert [line.get_xdata() for line in dashed(ax)] == [[0, 0]]
    assert "each variant minus 'none'; 95 % intervals of the paired differences" in caption(fig)


def test_without_pairs_the_interval_is_that_of_welchs_test(here):
    runs = [("none", seed, [5, 2, 1.2 + seed**2 / 100], {}) for seed in (1, 2, 3)]
    runs += [("wide", seed, [5, 2, 1.1 + seed / 100], {}) for seed in (4, 5, 6, 7)]
    runs += [("late", seed, [5, 2, 1.1 + seed / 50], {}) for seed in (1, 2, 3)]
    rows, _ = leave("gates", runs)
    fig = plot_ablation.figure("gates")
    test = ttest_ind(losses_of(rows, "wide"), losses_of(rows, "none"), equal_var=False)
    assert [point[0] for point in bars(fig.axes[0])[1][2][0]] == ends_of(test)
    assert "of the paired differences, for 'wide' of Welch's test;" in caption(fig)
    leave("gates", runs[:-3])
    assert "95 % intervals of Welch's test;" in caption(plot_ablation.figure("gates"))


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_fewer_than_three_seeds_have_no_interval(here, seeds):
    losses = {"none": 1.2, "wide": 1.3}
    runs = [
        (name, seed, [5, 2 + seed / 10, loss + seed**2 / 100], {})
        for name, loss in losses.items()
        for seed in seeds
    ]
    leave("gates", runs, device_name="GPU")
    fig = plot_ablation.figure("gates")
    assert f"n = {len(seeds)} a variant" in caption(fig)
    assert "Fewer than three seeds have no interval." in caption(fig)
    assert "intervals" not in caption(fig)
    for ax in fig.axes[:3]:
        assert [ends for _, _, ends in bars(ax)] == [[[]], [[]]]
    for ax in fig.axes[3:]:
        assert all(np.isnan(band.get_datalim(ax.transData).y0) for band in ax.collections) or all(
            len(path.vertices) == 0 for band in ax.collections for path in band.get_paths()
        )
    assert seed_dots(fig.axes[0])[1][0] == pytest.approx([0.1] * len(seeds))


def test_a_difference_of_two_pairs_has_no_interval_though_its_losses_have(here):
    runs = [("none", seed, [5, 2, 1 + seed**2 / 100], {}) for seed in (1, 2, 3)]
    runs += [("wide", seed, [5, 2, 1 + seed / 100], {}) for seed in (2, 3, 4)]
    leave("gates", runs)
    fig = plot_ablation.figure("gates")
    assert bars(fig.axes[0])[1][2] == [[]]
    assert all(ends != [[]] for _, _, ends in bars(panel(fig, "final_loss")))
    runs[3:] = [("wide", seed, [5, 2, 1 + seed / 100], {}) for seed in (4, 5)]  # Welch's
    leave("gates", runs)
    assert bars(plot_ablation.figure("gates").axes[0])[1][2] == [[]]


def test_runs_on_other_validation_tokens_are_not_compared(here):
    runs = [("none", seed, [5, 2, 1 + seed**2 / 100], {"val_tokens": 64}) for seed in (1, 2, 3)]
    runs += [("wide", seed, [5, 2, 1 + seed / 100], {"val_tokens": 64}) for seed in (1, 2, 3)]
    runs += [("late", seed, [5, 2, 1 + seed / 100], {"val_tokens": 32}) for seed in (1, 2, 3)]
    leave("gates", runs, sequence_length=8)
    fig = plot_ablation.figure("gates")
    assert "Not compared, since validated on other tokens: 'late'." in caption(fig)
    assert np.isnan(bars(fig.axes[0])[2][1][0]).all() and np.isnan(seed_dots(fig.axes[0])[2]).any()
    leave("gates", runs[:3] + runs[6:], sequence_length=8)
    assert "Difference of the final loss" not in titles(plot_ablation.figure("gates"))


def test_a_variant_without_its_reference_is_drawn_alone(here):
    leave("gates", [("wide", seed, [5, 2, 1.3], {}) for seed in (1, 2, 3)])
    fig = plot_ablation.figure("gates")
    assert titles(fig)[0] == "Final validation loss" and not dashed(fig.axes[0])
    assert "Differences" not in caption(fig) and "Dashed" not in caption(fig)
    assert legend(fig) == {"wide": "#0072B2"}


def test_lines_join_the_runs_of_a_seed_where_they_are_few(here):
    rows, _ = gates()
    ax = panel(plot_ablation.figure("gates"), "final_loss")
    none, wide = losses_of(rows, "none"), losses_of(rows, "wide")
    heights = [dict(zip(x, y)) for x, y in seed_dots(ax)]
    drawn = [xy(line) for line in ax.lines if line.get_color() == plot_ablation.PAIR["color"]]
    drawn = [pair for pair in drawn if not np.isnan(pair).any()]
    assert [losses for losses, _ in drawn] == [[wide[seed], none[seed]] for seed in (1, 2, 3)]
    assert drawn[1][1] == pytest.approx([heights[1][wide[2]], heights[0][none[2]]])

    runs = [(name, seed, [5, 1], {}) for name in ("none", "wide", "late") for seed in range(7)]
    leave("gates", runs)
    fig = plot_ablation.figure("gates")
    colors = [line.get_color() for line in panel(fig, "final_loss").lines]
    assert plot_ablation.PAIR["color"] not in colors and "Grey" not in caption(fig)


def test_dots_of_seeds_lie_apart_in_their_order(here):
    leave("gates", [(name, seed, [5, 1], {}) for name in ("none", "wide") for seed in (3, 1, 2)])
    ax = panel(plot_ablation.figure("gates"), "final_loss")
    for i, (_, heights) in enumerate(seed_dots(ax)):
        third, first, second = heights
        assert i - 0.4 < first < second == i < third < i + 0.4
        assert first + third == pytest.approx(2 * i)


def test_a_cpu_has_no_panel_of_times_and_a_gpu_has_one_from_zero(here):
    runs = [
        (name, seed, [5, 1 + seed / 100], {"train_time": seconds})
        for name in ("none", "wide")
        for seed, seconds in ((1, 1), (2, 2), (3, 60))
    ]
    leave("gates", runs)
    assert "Train time" not in titles(plot_ablation.figure("gates"))
    rows, _ = leave("gates", runs, device_name="NVIDIA")
    fig = plot_ablation.figure("gates")
    ax = panel(fig, "train_time")
    assert is_dressed(fig, "NVIDIA") and ax.get_xlim()[0] == 0 and ax.get_xlim()[1] > 60
    assert [point[0] for point in bars(ax)[1][2][0]] == bounds([1, 2, 60])
    assert panel(fig, "difference").get_xlim()[0] < 0


def test_curves_are_means_with_bands(here):
    gates()
    whole, late = plot_ablation.figure("gates").axes[-2:]
    for ax, start in ((whole, 0), (late, 1)):
        assert xy(ax.lines[0]) == [
            [0, 1000, 2000][start:],
            pytest.approx([5, 11.7 / 5, 6.1 / 5][start:]),
        ]
        assert xy(ax.lines[1])[1] == pytest.approx([5, 12.6 / 4, 5.32 / 4][start:])
        edges = ax.collections[0].get_paths()[0].vertices
        ends = edges[edges[:, 0] == 1000, 1]
        assert [ends.min(), ends.max()] == bounds([2, 2.2, 2.6, 2.5, 2.4])
        assert ax.collections[0].get_facecolor()[0, :3].tolist() == [0, 0, 0]
    assert late.get_title(loc="left") == "Validation loss, second half"


def test_a_numeric_axis_becomes_lines(here):
    rows, _ = rates()
    fig = plot_ablation.figure("rates")
    colors = {"ATTNGATE=none": "#000000", "ATTNGATE=elementwise": "#0072B2"}
    assert is_dressed(fig) and legend(fig) == colors
    assert titles(fig)[:2] == ["Final validation loss", "Difference of the final loss"]
    ax = fig.axes[0]
    for gate, (color, (xs, means), ends) in zip(("none", "wide"), bars(ax)):
        assert (color, xs) == (dict(zip(("none", "wide"), colors.values()))[gate], [0.1, 0.2, 0.4])
        for lr, mean, end in zip(xs, means, ends):
            values = losses_of(rows, f"{gate} LR={lr}")
            assert mean == pytest.approx(values.mean())
            assert [point[1] for point in end] == bounds(values)
    mean = losses_of(rows, "none LR=0.1").mean()
    assert [line.get_ydata() for line in dashed(ax)] == [[mean] * 2]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0.1", "0.2", "0.4"]
    assert "(ATTNGATE=none at 0.1, ATTNGATE=elementwise at 0.2)" in caption(fig)
    best = losses_of(rows, "wide LR=0.2").mean()  # where its loss is least
    assert xy(fig.axes[2].lines[1])[1][-1] == pytest.approx(best)


@pytest.mark.parametrize("stage", ["rates", "cells"])
def test_differences_over_a_numeric_axis_are_to_the_reference_of_each_cell(here, stage):
    rows, _ = rates(stage)
    fig = plot_ablation.figure(stage)
    ax = panel(fig, "difference")
    for gate, (_, (xs, means), ends) in zip(("none", "wide"), bars(ax)):
        for lr, mean, end in zip(xs, means, ends):
            label, reference = f"{gate} LR={lr}", f"none LR={lr if stage == 'cells' else 0.1}"
            if label == reference:
                assert mean == 0 and len(end) == 0
                continue
            ours, theirs = losses_of(rows, label), losses_of(rows, reference)
            assert mean == pytest.approx((ours - theirs).mean())
            assert [point[1] for point in end] == ends_of(ttest_rel(ours, theirs))
    assert [line.get_ydata() for line in dashed(ax)] == [[0, 0]]
    drawn = {round(y, 9) for _, heights in seed_dots(ax) for y in heights if not np.isnan(y)}
    pairs = losses_of(rows, "wide LR=0.4") - losses_of(rows, reference)
    assert {round(y, 9) for y in pairs} <= drawn
    single = "Dashed: the mean of 'none LR=0.1'." in caption(fig)
    assert single == (stage == "rates") and ("one of 'none LR=0.1'" in caption(fig)) != single


def test_what_shares_a_value_of_a_numeric_axis_stands_side_by_side(here):
    rates()
    fig = plot_ablation.figure("rates")
    FigureCanvasAgg(fig).draw()
    ax = fig.axes[0]
    places = [line.get_transform().transform((0.2, 1))[0] for line in ax.lines if line.get_alpha()]
    gaps = np.diff(places)
    assert (gaps > 2).all()  # seeds 1, 2, 3 of one line, then of the other
    middle = ax.transData.transform((0.2, 1))[0]
    assert np.mean(places) == pytest.approx(middle)
    shown = ax.transData.transform([(0.1, 1), (0.4, 1)])[:, 0]
    window = ax.get_window_extent()
    assert window.x0 < shown[0] + places[0] - middle
    assert shown[1] + places[-1] - middle < window.x1
    assert shown[1] - shown[0] > 0.73 * window.width  # no empty space on either side
    low, high = np.array([ends for _, _, all_ends in bars(ax) for ends in all_ends])[..., 1].T
    bottom, top = ax.get_ylim()
    assert bottom < low.min() and high.max() < top < high.max() + 0.1 * (top - bottom)


def test_colours_are_by_the_order_of_the_stage_file_references_first(here):
    Path("experiments/stages/sizes.toml").write_text(
        'question = "Why?"\nseeds = [1]\nreference = "8"\n'
        "variants = {4 = {N_HEAD = 4}, 8 = {N_HEAD = 8}, 2 = {N_HEAD = 2}, 1 = {N_HEAD = 1}}\n"
    )
    runs = [(name, 1, [5, 1], {"n_head": int(name)}) for name in ("1", "8")]
    leave("sizes", runs)
    fig = plot_ablation.figure("sizes")
    assert legend(fig) == {"8": "#000000", "1": "#009E73"}
    runs = {"last": plot_runs.load_run("sizes-0.x"), "first": plot_runs.load_run("sizes-1.x")}
    assert legend(plot_runs.runs_figure(runs, "T")) == {"last": "#009E73", "first": "#000000"}
    runs["again"] = runs["first"]  # one variant twice must not look the same
    assert len({*legend(plot_runs.runs_figure(runs, "T")).values()}) == 3


def test_a_line_over_a_numeric_axis_needs_two_values(here):
    rows, curves = rates("cells")
    labels = ["none LR=0.1", "none LR=0.2", "none LR=0.4", "wide LR=0.1"]
    rows[rows["variant"].isin(labels)].to_csv("experiments/results_cells.csv", index=False)
    fig = plot_ablation.figure("cells")
    assert legend(fig).keys() == {*labels}
    assert [len(ax.lines) for ax in fig.axes[-2:]] == [4, 4]


def test_lines_of_a_grid_keep_their_colours_when_one_is_not_run(here):
    rows, curves = rates("cells")
    rows[rows["attngate"] == "elementwise"].to_csv("experiments/results_cells.csv", index=False)
    fig = plot_ablation.figure("cells")
    assert legend(fig) == {"ATTNGATE=elementwise": "#0072B2"}
    assert titles(fig)[1] == "Validation loss"


def test_a_figure_of_many_variants_with_long_labels_can_be_read(here):
    labels = [f"a variant with many experts, half as deep, aux 0.05 to 0.{i:02}" for i in range(12)]
    variants = "".join(f'variants."{label}" = {{N_HEAD = 1}}\n' for label in labels)
    Path("experiments/stages/many.toml").write_text(
        f'question = "{"Why? " * 30}"\nseeds = [1]\nreference = "{labels[0]}"\n{variants}'
    )
    runs = [(label, seed, [5, 1 + seed / 100], {}) for label in labels for seed in (1, 2, 3)]
    leave("many", runs, device_name="GPU")
    fig = plot_ablation.figure("many")
    FigureCanvasAgg(fig).draw()
    ticks = [text.get_window_extent() for text in fig.axes[0].get_yticklabels()]
    assert all(lower.y1 < upper.y0 for upper, lower in zip(ticks, ticks[1:]))
    box = fig.legends[0].get_window_extent()
    foot = fig.texts[-1].get_window_extent()
    assert min(text.x0 for text in ticks) > 0 and box.x0 > 0 and foot.x1 < fig.bbox.x1
    for ax in fig.axes:
        whole = ax.get_tightbbox()
        assert foot.y1 < whole.y0 and whole.y1 < box.y0 + 1 and whole.x1 < fig.bbox.x1 + 1
    across = [ax.xaxis.label.get_window_extent() for ax in fig.axes[:3]]
    assert all(one.x1 < other.x0 for one, other in zip(across, across[1:]))


def test_strategies_have_one_colour_in_every_figure(here):
    rows, curves = fills()
    made = plot_ablation.figures("batch_vs_seqlen")
    assert [*made] == ["batch_vs_seqlen", "batch_vs_seqlen_lr0005", "batch_vs_seqlen_lr002"]
    colors = {
        "large batch 4x2": "#C1272D",
        "long sequence 1x8": "#2AB7A9",
        "balanced 2x4": "#1F4FD8",
    }
    for fig in made.values():
        assert is_dressed(fig) and legend(fig) == colors
        assert "not the same measurement" in caption(fig)
    whole = made["batch_vs_seqlen"]
    assert titles(whole) == ["Final validation loss", "Difference of the final loss"]
    for (name, color), (drawn, (xs, means), _) in zip(colors.items(), bars(whole.axes[0])):
        own = rows[rows["variant"].str.startswith(name)]
        assert (drawn, xs) == (color, [0.005, 0.02])
        assert means == pytest.approx(own.groupby("muon_lr")["final_loss"].mean().tolist())
    for lr, fig in ((0.005, made["batch_vs_seqlen_lr0005"]), (0.02, made["batch_vs_seqlen_lr002"])):
        assert f"MUON_LR {lr}" in fig.get_suptitle()
        assert titles(fig) == ["Training loss", "Validation loss", "Throughput"]
        for i, (name, color) in enumerate(colors.items()):
            own = rows[rows["variant"] == f"{name} MUON_LR={lr}"]
            for ax, y in zip(fig.axes, ("train_loss", "val_loss")):
                points = curves[curves["run_id"].isin(own["run_id"])].dropna(subset=y)
                assert xy(ax.lines[i])[1] == pytest.approx(points.groupby("tokens")[y].mean())
                assert ax.lines[i].get_color() == color
            drawn, mean, ends = bars(fig.axes[2])[i]
            assert (drawn, mean) == (color, [[pytest.approx(own["tokens_per_sec"].mean())], [i]])
            assert [point[0] for point in ends[0]] == bounds(own["tokens_per_sec"])


def test_the_plot_of_a_rate_says_what_decides_throughput_on_a_cpu(here):
    rows, _ = fills()
    note = "Other work on the machine decides the throughput."
    made = plot_ablation.figures("batch_vs_seqlen")
    assert [note in caption(fig) for fig in made.values()] == [False, True, True]
    rows.assign(device_name="GPU").to_csv("experiments/results_batch_vs_seqlen.csv", index=False)
    made = plot_ablation.figures("batch_vs_seqlen")
    assert not any(note in caption(fig) for fig in made.values())
    assert titles(made["batch_vs_seqlen"])[2] == "Throughput"


def test_validation_accuracy_is_drawn_where_curves_have_it(here):
    _, curves = fills()
    curves["val_accuracy"] = 1 / curves["val_loss"]
    curves.to_csv("experiments/log_curves_batch_vs_seqlen.csv", index=False)
    ax = panel(plot_ablation.figures("batch_vs_seqlen")["batch_vs_seqlen_lr002"], "val_accuracy")
    own = curves[curves["variant"] == "balanced 2x4 MUON_LR=0.02"]
    means = own.groupby("tokens")["val_accuracy"].mean()
    assert xy(ax.lines[2]) == [means.index.tolist(), pytest.approx(means)]
    assert label_of(ax.yaxis) == "validation accuracy (fraction of tokens)"

    runs = {name: plot_runs.load_run(f"batch_vs_seqlen-{i}.x") for i, name in enumerate("ab")}
    ax = panel(plot_runs.runs_figure(runs, "T"), "val_accuracy")
    assert [xy(line)[1] for line in ax.lines] == [
        run["val_accuracy"].tolist() for run in runs.values()
    ]
    runs["b"]["aux_coef"] = 0.01
    fig = plot_runs.runs_figure(runs, "T")
    assert titles(fig)[-2:] == ["Coefficient of the aux loss", "Validation accuracy"]
    rowspans = [ax.get_subplotspec().rowspan for ax in fig.axes[-2:]]
    assert rowspans[0] == rowspans[1]  # side by side

    curves.assign(val_accuracy=np.nan).to_csv(
        "experiments/log_curves_batch_vs_seqlen.csv", index=False
    )
    for fig in plot_ablation.figures("batch_vs_seqlen").values():
        assert "Validation accuracy" not in titles(fig)
    runs = {"a": plot_runs.load_run("batch_vs_seqlen-0.x")}
    assert "Validation accuracy" not in titles(plot_runs.runs_figure(runs, "T"))


def test_colours_stay_when_a_strategy_has_not_been_run(here):
    fills(without=["large batch 4x2"])
    fig = plot_ablation.figures("batch_vs_seqlen")["batch_vs_seqlen_lr002"]
    assert [line.get_color() for line in fig.axes[0].lines] == ["#2AB7A9", "#1F4FD8"]
    assert "No finished run of 'large batch 4x2" in caption(fig)
    runs = {name: plot_runs.load_run(f"batch_vs_seqlen-{i}.x") for name, i in (("a", 0), ("b", 6))}
    assert legend(plot_runs.runs_figure(runs, "T")) == {"a": "#2AB7A9", "b": "#1F4FD8"}


def test_files_are_small_pngs_of_the_same_bytes(here, capsys):
    fills()
    assert plot_ablation.main(["batch_vs_seqlen"]) == 0
    files = [Path(line) for line in capsys.readouterr().out.split()]
    assert [str(file) for file in files] == [
        f"experiments/figures/batch_vs_seqlen{end}.png" for end in ("", "_lr0005", "_lr002")
    ]
    assert all(
        Image.open(file).size[0] == 1200 and len(file.read_bytes()) < 150_000 for file in files
    )
    plot_runs.save(plot_ablation.figure("batch_vs_seqlen"), "again.png")
    assert Path("again.png").read_bytes() == files[0].read_bytes()
    assert all(
        len(Image.open(file).convert("RGB").getcolors(99999)) > 50 for file in files
    )  # something is drawn


def give_measure(stage, measure="pass_at_1", in_curves=True):
    """Has a stage compare 1 / loss, which its rows, and its curves, get; returns the rows."""
    path = Path(f"experiments/stages/{stage}.toml")
    path.write_text(f'measure = "{measure}"\n' + path.read_text())
    rows, curves = (
        pd.read_csv(f"experiments/{kind}_{stage}.csv") for kind in ("results", "log_curves")
    )
    rows[measure] = 1 / rows["final_loss"]
    rows.to_csv(f"experiments/results_{stage}.csv", index=False)
    if in_curves:
        curves[measure] = 1 / curves["val_loss"]
    curves["tokens"] += np.arange(len(curves))  # of what it samples no two runs have as many
    curves.to_csv(f"experiments/log_curves_{stage}.csv", index=False)
    return rows


def test_a_stage_is_drawn_in_what_it_measures(here):
    rows, curves = gates()
    give_measure("gates")
    fig = plot_ablation.figure("gates")
    name = "reedy pass@1, held out"
    assert is_dressed(fig) and titles(fig) == [
        f"Difference of g{name}",
        f"G{name}",
        f"G{name}, whole run",
        f"G{name}, second half",
    ]
    difference, final, whole, late = fig.axes
    assert label_of(difference.xaxis) == f"difference of g{name} (fraction of prompts)"
    assert {label_of(final.xaxis), label_of(whole.yaxis)} == {f"g{name} (fraction of prompts)"}
    none, wide = 1 / losses_of(rows, "none"), 1 / losses_of(rows, "wide")
    assert [ends for _, _, ends in bars(difference)][1][0][0][0] < bars(difference)[1][1][0][0] < 0
    test = ttest_rel(wide[[1, 2, 3]], none[[1, 2, 3]])
    assert [point[0] for point in bars(difference)[1][2][0]] == ends_of(test)
    assert [mean[0][0] for _, mean, _ in bars(final)] == pytest.approx([none.mean(), wide.mean()])
    assert [xs for xs, _ in seed_dots(final)] == [none.tolist(), wide.tolist()]
    assert plot_ablation.PAIR["color"] in [line.get_color() for line in final.lines]
    assert "Grey lines join pass_at_1 of one seed." in caption(fig)
    own = curves[(curves["variant"] == "none") & curves["seed"].ne(4)]
    means = (1 / own["val_loss"]).groupby(own["step"]).mean()
    assert xy(whole.lines[0]) == [[0, 10, 20], pytest.approx(means)]
    assert xy(late.lines[0]) == [[10, 20], pytest.approx(means[1:])]
    assert whole.get_xlabel() == "step" and whole.get_yscale() == "linear"


def test_a_run_without_the_measure_is_not_drawn(here):
    gates()
    rows = give_measure("gates", in_curves=False)
    rows.loc[rows["variant"] == "wide", "pass_at_1"] = np.nan
    rows.to_csv("experiments/results_gates.csv", index=False)
    fig = plot_ablation.figure("gates")
    assert legend(fig) == {"none": "#000000"}
    assert "No finished run of 'wide', 'late' that has pass_at_1." in caption(fig)
    assert titles(fig)[-2:] == ["Validation loss", "Validation loss, second half"]
    rows.drop(columns="pass_at_1").to_csv("experiments/results_gates.csv", index=False)
    with pytest.raises(ValueError, match="STAGE gates has no finished run that has pass_at_1"):
        plot_ablation.figure("gates")


def test_training_losses_are_compared_batch_by_batch_where_nothing_else_is_followed(here):
    gates()
    path = "experiments/log_curves_gates.csv"
    curves = pd.read_csv(path)
    curves["val_loss"] = curves["val_loss"].where(curves["step"] == 20)
    curves["train_loss"] += 0.1 * curves["seed"] ** 2 * (curves["variant"] == "wide")
    curves.to_csv(path, index=False)
    fig = plot_ablation.figure("gates")
    whole, late = fig.axes[-2:]
    assert titles(fig)[-2:] == [
        "Training loss, whole run",
        "Difference of the training loss, second half",
    ]
    assert label_of(late.yaxis) == "difference of the training loss (nats per token)"
    assert "Training losses are of single batches, differences of them of" in caption(fig)
    assert not whole.collections and not late.collections, "no bands"
    finished = curves[curves["seed"] < 4]
    by_seed = finished.pivot(index=["step", "seed"], columns="variant", values="train_loss")
    differences = (by_seed["wide"] - by_seed["none"]).dropna().groupby("step")
    zero, *lines = late.lines
    assert xy(lines[0]) == [[1000, 2000], pytest.approx(differences.mean())]
    assert [line.get_color() for line in lines] == [legend(fig)["wide"]]


def test_numbers_on_an_axis_have_room():
    rates = [0.001, 0.002, 0.00375, 0.004, 0.0075, 0.008, 0.03]
    assert plot_ablation.spaced(rates, log=True) == [0.001, 0.002, 0.00375, 0.0075, 0.03]
    assert plot_ablation.spaced([1, 1.01, 1.5, 2], log=False) == [1, 1.5, 2]
    assert plot_ablation.spaced([3], log=True) == [3]


def test_the_best_of_a_grid_is_where_the_measure_is_best(here):
    rows, _ = rates()
    give_measure("rates")
    fig = plot_ablation.figure("rates")
    best = "of its greatest mean pass_at_1 (ATTNGATE=none at 0.1, ATTNGATE=elementwise at 0.2)"
    assert best in caption(fig)
    assert titles(fig)[0] == "Greedy pass@1, held out"
    mean = (1 / losses_of(rows, "wide LR=0.2")).mean()
    assert xy(fig.axes[2].lines[1])[1][-1] == pytest.approx(mean)


def test_of_a_measure_that_is_not_known_nothing_is_called_best(here):
    rates()
    give_measure("rates", "score")
    fig = plot_ablation.figure("rates")
    assert titles(fig) == ["Difference of score", "Score", "Score, whole run", "Score, second half"]
    assert "best" not in caption(fig) and "least" not in caption(fig)


@pytest.mark.parametrize(
    "stage, status, sentence",
    [
        (
            "gates",
            None,
            "STAGE gates has no run in experiments/results.csv or results_gates.csv; "
            "python scripts/run_stage.py gates makes them",
        ),
        (
            "gates",
            "oom",
            "STAGE gates has no finished run of the stage as its file is now; "
            "python scripts/run_stage.py gates makes them",
        ),
        (
            "no",
            None,
            "STAGE no: choose one of batch_vs_seqlen, cells, gates, rates; "
            "python scripts/stages.py says what they ask",
        ),
    ],
)
def test_a_stage_without_runs_gets_one_sentence(here, capsys, stage, status, sentence):
    if status:
        leave("gates", [("none", 1, [5], {"status": status})])
    assert plot_ablation.main([stage]) == 2
    assert capsys.readouterr() == ("", f"plot_ablation.py: error: {sentence}\n")


def test_importing_loads_no_trainer_and_no_plotting_state():
    heavy = "{'torch', 'train_gpt', 'matplotlib.pyplot'}"
    command = f"import sys, plot_ablation; sys.exit(len({heavy} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", command], cwd=SCRIPTS, check=False).returncode == 0
