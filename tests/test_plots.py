"""scripts/plot_runs.py, plot_ablation.py: what is drawn was measured; a figure says what it is."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import ttest_1samp

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
    """Two variants of three and two seeds, not in the stage's order, and runs not to be drawn."""
    runs = [
        ("wide", 1, [5, 3, 1.30], {}),
        ("wide", 2, [5, 3.2, 1.34], {}),
        ("none", 1, [5, 2, 1.20], {}),
        ("none", 2, [5, 2.2, 1.26], {}),
        ("none", 3, [5, 2.6, 1.21], {}),
        ("none", 4, [5, 4, 9.0], {"status": "diverged"}),
        ("gone", 1, [5, 4, 7.0], {"started": -1}),
        ("wide", 4, [5, 4, 8.0], {"source_sha": "old", "started": -1}),
    ]
    return leave("gates", runs, attngate="x")


def rates():
    runs = [
        (
            f"{gate} LR={lr}",
            seed,
            [5, 2, 1 + (lr - best) ** 2 + seed / 100],
            {"attngate": gate, "lr": lr},
        )
        for gate, best in (("none", 0.1), ("wide", 0.2))
        for lr in (0.1, 0.2, 0.4)
        for seed in (1, 2)
    ]
    return leave("rates", runs)


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
        for seed in (1, 2)
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
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    return pytest.approx([low, high])


def is_dressed(fig, device="cpu: Abacus"):
    """Whether title, panels, axes and caption say what they are."""
    assert fig.get_suptitle() and device in caption(fig) and "n =" in caption(fig)
    for ax in fig.axes:
        assert ax.get_title(loc="left") and ax.get_xlabel()
        assert ax.get_ylabel() or ax.get_yticklabels()[0].get_text() in (
            "none",
            "large batch 4x2",
            "wide",
        )
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
        ax.get_ylabel(): [(line.get_color(), *xy(line)[1]) for line in ax.lines]
        for ax in fig.axes[4:]
    }
    assert drawn == {
        "load entropy (1 = even)": [("#0072B2", 0.8, 0.8)],
        "load max violation (0 = even)": [("#0072B2", pytest.approx(0.6), pytest.approx(0.6))],
        "coefficient of the aux loss": [("#0072B2", 0.01, 0.01)],
    }
    del runs["moe"].attrs["num_experts"]
    ax = plot_runs.runs_figure(runs, "T").axes[5]
    assert ax.get_ylabel() == "largest load of an expert (share of all choices)" and xy(
        ax.lines[0]
    )[1] == [0.4, 0.4]


@pytest.mark.parametrize(
    "run", ["logs/lr0.1.csv", "logs/lr0.1", "logs/lr0.1/", "lr0.1", "gates-0.x"]
)
def test_a_run_may_be_named_in_many_ways(here, run):
    gates()
    Path("logs/lr0.1").mkdir()
    Path("logs/lr0.1.csv").write_text(curve_text([5, 3, 1.30]))
    Path("logs/lr0.1.json").write_text('{"device_name": "cpu: Abacus"}')
    curve = plot_runs.load_run(run)
    assert curve["val_loss"].tolist() == [5, 3, 1.30] and curve.attrs == {
        "device_name": "cpu: Abacus"
    }


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
        (["--run", "a"], "--run a: must be label=run, each label once"),
        (["--run", "x=a", "--run", "x=a"], "--run x=a: must be label=run, each label once"),
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
    assert "n = 3 none, 2 wide." in caption(fig) and "No finished run of late." in caption(fig)
    times = rows.set_index("run_id")["train_time"].tolist()
    for ax, none, wide in zip(
        fig.axes, ([1.20, 1.26, 1.21], times[2:5]), ([1.30, 1.34], times[:2])
    ):
        assert [text.get_text() for text in ax.get_yticklabels()] == ["none", "wide"]
        for i, (values, (color, mean, ends)) in enumerate(zip((none, wide), bars(ax))):
            assert (color, mean) == (
                ["#000000", "#0072B2"][i],
                [[pytest.approx(np.mean(values))], [i]],
            )
            assert [point[0] for point in ends[0]] == bounds(values)
        seeds = [xy(line)[0] for line in ax.lines if line.get_alpha()]
        assert seeds == [none, wide]
        (dashed,) = [line.get_xdata() for line in ax.lines if line.get_linestyle() == "--"]
        assert dashed == pytest.approx([np.mean(none)] * 2)


def test_curves_are_means_with_bands(here):
    gates()
    whole, late = plot_ablation.figure("gates").axes[2:]
    for ax, start in ((whole, 0), (late, 1)):
        assert xy(ax.lines[0]) == [
            [0, 1000, 2000][start:],
            pytest.approx([5, 2.8 * 2 / 2 - 8 / 15, 3.67 / 3][start:]),
        ]
        assert xy(ax.lines[1])[1] == pytest.approx([5, 3.1, 1.32][start:])
        edges = ax.collections[0].get_paths()[0].vertices
        assert [edges[edges[:, 0] == 1000, 1].min(), edges[edges[:, 0] == 1000, 1].max()] == bounds(
            [2, 2.2, 2.6]
        )
        assert ax.collections[0].get_facecolor()[0, :3].tolist() == [0, 0, 0]
    assert late.get_title(loc="left") == "Validation loss, second half"


def test_one_seed_has_no_interval(here):
    leave("gates", [("none", 1, [5, 2, 1.2], {}), ("wide", 1, [5, 2, 1.3], {})], attngate="x")
    fig = plot_ablation.figure("gates")
    assert "n = 1 a variant" in caption(fig)
    assert [(mean[0][0], ends) for _, mean, ends in bars(fig.axes[0])] == [(1.2, [[]]), (1.3, [[]])]


def test_a_numeric_axis_becomes_lines(here):
    rows, _ = rates()
    fig = plot_ablation.figure("rates")
    assert is_dressed(fig) and legend(fig) == {
        "ATTNGATE=none": "#000000",
        "ATTNGATE=wide": "#0072B2",
    }
    for ax, y in zip(fig.axes, ("final_loss", "train_time")):
        for gate, (color, (xs, means), ends) in zip(("none", "wide"), bars(ax)):
            assert (color, xs) == (legend(fig)[f"ATTNGATE={gate}"], [0.1, 0.2, 0.4])
            for lr, mean, end in zip(xs, means, ends):
                values = rows.loc[(rows["attngate"] == gate) & (rows["lr"] == lr), y]
                assert mean == pytest.approx(values.mean()) and [
                    point[1] for point in end
                ] == bounds(values)
        reference = rows.loc[rows["variant"] == "none LR=0.1", y].mean()
        assert [line.get_ydata() for line in ax.lines if line.get_linestyle() == "--"] == [
            [reference] * 2
        ]
        assert [text.get_text() for text in ax.get_xticklabels()] == ["0.1", "0.2", "0.4"]
    assert "(ATTNGATE=none at 0.1, ATTNGATE=wide at 0.2)" in caption(fig)
    assert xy(fig.axes[2].lines[1])[1][-1] == pytest.approx(
        1.015
    )  # wide at 0.2, where its loss is least


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
    for ax, y in zip(made["batch_vs_seqlen"].axes, ("final_loss", "tokens_per_sec")):
        for (name, color), (drawn, (xs, means), _) in zip(colors.items(), bars(ax)):
            own = rows[rows["variant"].str.startswith(name)]
            assert (drawn, xs) == (color, [0.005, 0.02])
            assert means == pytest.approx(own.groupby("muon_lr")[y].mean().tolist())
    for lr, fig in ((0.005, made["batch_vs_seqlen_lr0005"]), (0.02, made["batch_vs_seqlen_lr002"])):
        assert f"MUON_LR {lr}" in fig.get_suptitle()
        for i, (name, color) in enumerate(colors.items()):
            own = rows[rows["variant"] == f"{name} MUON_LR={lr}"]
            points = curves[curves["run_id"].isin(own["run_id"])].dropna(subset="train_loss")
            assert xy(fig.axes[0].lines[i])[1] == pytest.approx(
                points.groupby("tokens")["train_loss"].mean().tolist()
            )
            for ax, y in ((fig.axes[1], "final_loss"), (fig.axes[2], "tokens_per_sec")):
                assert bars(ax)[i][:2] == (color, [[pytest.approx(own[y].mean())], [i]])
            assert fig.axes[0].lines[i].get_color() == color


def test_colours_stay_when_a_strategy_has_not_been_run(here):
    fills(without=["large batch 4x2"])
    fig = plot_ablation.figures("batch_vs_seqlen")["batch_vs_seqlen_lr002"]
    assert [line.get_color() for line in fig.axes[0].lines] == ["#2AB7A9", "#1F4FD8"]
    assert "No finished run of large batch 4x2" in caption(fig)


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


@pytest.mark.parametrize(
    "stage, status, sentence",
    [
        (
            "gates",
            None,
            "experiments/results_gates.csv has no finished run; "
            "python scripts/run_stage.py gates makes them",
        ),
        (
            "gates",
            "oom",
            "experiments/results_gates.csv has no finished run; "
            "python scripts/run_stage.py gates makes them",
        ),
        (
            "no",
            None,
            "STAGE no: choose one of batch_vs_seqlen, gates, rates; "
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
