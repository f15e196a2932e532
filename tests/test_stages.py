"""scripts/stages.py, split_results.py and make_tables.py: what a stage file says, and tables that
follow from rows."""

import csv
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import committed
from scipy import stats as scipy_stats

import derive_stage
import gate_facts
import make_tables
import plan_stage
import split_results
import stage_gate
import stages
import train_rl
from harness.ranks import Ranks
from harness.settings import ROOT
from stages import load_stage
from store.contract import ConfigError
from train_gpt import Config, cautions, check_batch, make_plan, peak_rate

FILE = """
question = "Is it so?"
reference = "none LR=0.1"
seeds = [1, 2]
[base]
N_LAYER = 2
BIAS = true
MUON_LR = ""
[variants.none]
[variants."a gate"]
ATTNGATE = "headwise"
[grid]
LR = [0.1, 0.00396]
[gate]
better = 0.1
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty project below tmp_path, with the stage `toy`."""
    monkeypatch.chdir(tmp_path)
    Path("experiments/stages").mkdir(parents=True)
    Path("experiments/stages/toy.toml").write_text(FILE)
    return tmp_path


def test_a_stage_is_variants_times_grid_over_the_base(folder):
    stage = load_stage("toy")
    assert list(stage.variants) == [
        "none LR=0.1",
        "none LR=0.00396",
        "a gate LR=0.1",
        "a gate LR=0.00396",
    ]
    assert stage.variants["a gate LR=0.00396"] == {
        "N_LAYER": "2",
        "BIAS": "1",
        "MUON_LR": "",
        "ATTNGATE": "headwise",
        "LR": "0.00396",
    }
    assert (stage.axes, stage.seeds, stage.max_seeds, stage.gate) == (
        ("attngate", "lr"),
        (1, 2),
        8,
        {"better": 0.1},
    )


def test_each_cell_is_compared_with_its_reference(folder):
    """By the label of a variant, at the same point of the grid; or by what settings have to be."""
    text = FILE.replace('reference = "none LR=0.1"', "AGAINST")
    cells = {
        "none LR=0.1": "none LR=0.1",
        "none LR=0.00396": "none LR=0.00396",
        "a gate LR=0.1": "none LR=0.1",
        "a gate LR=0.00396": "none LR=0.00396",
    }
    Path("experiments/stages/toy.toml").write_text(text.replace("AGAINST", 'against = "none"'))
    stage = load_stage("toy")
    assert stage.references == cells
    assert stage.references_first() == list(cells) and stage.is_reference("none LR=0.00396")
    said = text.replace("[variants.none]", '[variants.none]\nATTNGATE = "none"')
    for against, references in (
        ('{ATTNGATE = "none"}', cells),
        ("{LR = 0.1}", {label: label.split(" LR")[0] + " LR=0.1" for label in cells}),
    ):
        Path("experiments/stages/toy.toml").write_text(
            said.replace("AGAINST", f"against = {against}")
        )
        assert load_stage("toy").references == references
    Path("experiments/stages/one.toml").write_text('extends = "toy"\nreference = "none LR=0.1"')
    assert {*load_stage("one").references.values()} == {"none LR=0.1"}, "it takes the other's place"


def test_a_stage_of_another_program_has_its_options(folder):
    text = FILE.replace("[base]", "[base]\ngroup_size = 4\nshaped = true")
    Path("experiments/stages/toy.toml").write_text('program = "scripts/mine.py"\n' + text)
    stage = load_stage("toy")
    assert stage.program == "scripts/mine.py"
    assert (
        stage.variants["none LR=0.1"] | {"group_size": "4", "shaped": "True"}
        == (stage.variants["none LR=0.1"])
    )
    Path("experiments/stages/toy.toml").write_text(text)
    with pytest.raises(ValueError, match="group_size is nothing|shaped is nothing"):
        load_stage("toy")


def test_a_stage_that_extends_another_says_only_what_differs(folder):
    Path("experiments/stages/small.toml").write_text(
        'extends = "toy"\nseeds = [5]\nreference = "none"\n[base]\nN_LAYER = '
        "1\n[grid]\n[gate]\nstop_gain = 0.5\n"
    )
    small = load_stage("small")
    assert (
        list(small.variants) == ["none", "a gate"]
        and small.seeds == (5,)
        and small.question == "Is it so?"
    )
    assert small.variants["none"] == {"N_LAYER": "1", "BIAS": "1", "MUON_LR": ""}
    assert small.gate == {"better": 0.1, "stop_gain": 0.5}


def test_a_stage_says_in_what_its_variants_are_compared(folder):
    """The final loss without a word; what extends it is compared in the same, or says another."""
    assert load_stage("toy").measure == "final_loss" and load_stage("toy").compares_losses
    Path("experiments/stages/rates.toml").write_text('measure = "pass_at_1"\n' + FILE)
    small = {"extends": "rates", "seeds": [5]}
    stages.write_stage("small", small)
    stages.write_stage("whole", {key: stages.read("small")[key] for key in stages.read("rates")})
    stages.write_stage("other", small | {"measure": "reward_2"})
    for name, measure in (("small", "pass_at_1"), ("whole", "pass_at_1"), ("other", "reward_2")):
        stage = load_stage(name)
        assert stage.measure == measure and not stage.compares_losses
    assert 'measure = "pass_at_1"' in Path("experiments/stages/whole.toml").read_text()
    assert 'measure = "pass_at_1" ' in stages.__doc__


@pytest.mark.parametrize(
    "change, sentence",
    [
        ("reference = 'no'", "reference = 'no': choose one of 'none LR=0.1'"),
        ("reference = ''", "needs one of reference"),
        ("against = 'none'", "needs one of reference"),
        ("base.N_HEAD = 1\n[grid]\nATTNGATE = ['none']", "variants.a gate and grid both set ATTNG"),
        ("reference = 1", "reference = 1 must be of type str"),
        ("against = 1", "against = 1 must be of type dict or str"),
        ("next = [{name = 'a', most = 0}]", "most = 0 of next must be a whole number, 1 or more"),
        ("next = [{name = 'a', around = {x = 1}}]", "around of next must be tables"),
        ("next = [{NUM_ITERATIONS = 1}]", "every stage in next needs a name"),
        ("seeds = [1, 1]", "different whole numbers"),
        ("seeds = [[1], 2]", "different whole numbers"),
        ("seeds = [true, 2]", "different whole numbers"),
        ("max_seeds = 0", "max_seeds = 0 must be a whole number up to 50"),
        ("max_seeds = 100", "max_seeds = 100 must be a whole number up to 50"),
        ("next = [{name = '../x'}]", "name of next '../x': must be letters, digits, _"),
        ("next = [{name = 3}]", "name of next 3: must be letters, digits, _"),
        ("next = [{name = 'a', mosst = 3}]", "mosst of next is no key; choose from name, most"),
        ("base.N_HEAD = 1\n[grid]\nLR = []", "grid.LR = [] must have different values"),
        ("base.N_HEAD = 1\n[grid]\nLR = [1, 1]", "grid.LR = [1, 1] must have different values"),
        ("measure = 1", "measure = 1 must be of type str"),
        ("measure = ''", "measure = '' must be a column of rows, in small letters, digits and _"),
        ("measure = 'Pass@1'", "measure = 'Pass@1' must be a column of rows, in small letters"),
        ("measure = '1st'", "measure = '1st' must be a column of rows, in small letters"),
        ("columns = ['lr', 'lr']", "columns = ['lr', 'lr'] must be different names"),
        ("columns = [1]", "columns = [1] must be different names"),
        ("colour = 1", "colour is no key of a stage; choose from extends, question"),
        ("seeds = []", "has no seeds"),
        ("base.SEED = 3", "SEED is nothing a variant can set"),
        ("base.lr = 3", "lr is nothing a variant can set"),
        ("seeds = [1", "is no TOML"),
        ("extends = 'toy'", "extends itself"),
        ("extends = 'gone'", "choose one of toy"),
    ],
    ids=str,
)
def test_what_is_wrong_in_a_file_is_said_in_one_sentence(folder, capsys, change, sentence):
    kept = [line for line in FILE.splitlines() if line.split(" ")[0] != change.split(" ")[0]]
    text = "\n".join([change, *kept])
    if change.startswith("base."):
        text = FILE.replace("[base]", change.replace("base.", "[base]\n"))
        if "[grid]" in change:
            text = FILE.replace("[grid]\nLR = [0.1, 0.00396]", change.partition("\n")[2])
    Path("experiments/stages/toy.toml").write_text(text)
    assert stages.main(["toy"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("stages.py: error: ") and sentence in error and error.count("\n") == 1


SCHEDULES = """
extends = "toy"
[equal_time]
seconds = 1.5
[schedules]
"none LR=0.1" = {NUM_ITERATIONS = 10}
"none LR=0.00396" = {NUM_ITERATIONS = 11}
"a gate LR=0.1" = {NUM_ITERATIONS = 7, N_LAYER = 3}
"a gate LR=0.00396" = {NUM_ITERATIONS = 8}
"""


def test_schedules_change_runs_of_a_stage_and_nothing_else_of_it(folder):
    """Not what is compared with what, and no column of its table."""
    against = FILE.replace('reference = "none LR=0.1"', 'against = {ATTNGATE = "none"}')
    against = against.replace("[variants.none]", '[variants.none]\nATTNGATE = "none"')
    Path("experiments/stages/toy.toml").write_text(against)
    Path("experiments/stages/timed.toml").write_text(SCHEDULES)
    toy, timed = load_stage("toy"), load_stage("timed")
    assert (timed.seconds, toy.seconds) == (1.5, 0)
    assert (timed.references, timed.axes) == (toy.references, toy.axes)
    changed = {"NUM_ITERATIONS": "7", "N_LAYER": "3"}
    assert timed.variants["a gate LR=0.1"] == toy.variants["a gate LR=0.1"] | changed


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        ("seconds = 1.5", "seconds = 0", "equal_time.seconds = 0 must be a number above 0"),
        ("seconds = 1.5", "", "equal_time.seconds = None must be a number above 0"),
        ("seconds = 1.5", "seconds = nan", "equal_time.seconds = nan must be a number above 0"),
        ("seconds = 1.5", "seconds = true", "equal_time.seconds = True must be a number above 0"),
        ("[equal_time]\nseconds = 1.5", "", "schedules goes with equal_time, and has to name ea"),
        ('"none LR=0.1" =', '"none" =', "schedules goes with equal_time, and has to name each va"),
        ("{NUM_ITERATIONS = 10}", "10", "schedules.none LR=0.1 = 10 must be of type dict"),
        ("N_LAYER = 3", "SEED = 3", "SEED is nothing a variant can set"),
    ],
    ids=str,
)
def test_schedules_that_cannot_be_are_told(folder, old, new, sentence):
    assert old in SCHEDULES
    Path("experiments/stages/timed.toml").write_text(SCHEDULES.replace(old, new))
    with pytest.raises(ValueError) as told:
        load_stage("timed")
    assert sentence in str(told.value)


def test_shares_of_a_budget_are_equal_whatever_the_steps():
    """Bit for bit, at any number of validations."""
    for steps, budget in ((7 * 30, 60.0), (7 * 131, 0.7)):
        curves = [pd.DataFrame({"step": np.arange(1, 8) * n}) for n in (steps // 7, 13, 977)]
        found = [split_results.planned_seconds(one, one.step.max(), budget) for one in curves]
        assert found[0] == found[1] == found[2] and found[0][-1] == budget


def test_why_a_stage_is_not_run_is_told_where_it_is_listed(folder, capsys):
    assert stages.main(["toy"]) == 0 and "Not run" not in capsys.readouterr().out
    path = Path("experiments/stages/toy.toml")
    path.write_text(f'not_run = "seeds spread by more than it asks for"\n{path.read_text()}')
    assert stages.main(["toy"]) == 0
    assert "  Not run: seeds spread by more than it asks for\n" in capsys.readouterr().out


@pytest.mark.parametrize("measure", ["seed", "seeds", "variant", "p"])
def test_what_is_no_figure_of_a_run_is_not_compared(folder, measure):
    path = Path("experiments/stages/toy.toml")
    path.write_text(f'measure = "{measure}"\n{path.read_text()}')
    with pytest.raises(ValueError, match=f"measure = '{measure}': is no figure of a run; choose"):
        load_stage("toy")


def test_an_unknown_stage_is_told_the_known_ones(folder, capsys):
    assert stages.main(["tou"]) == 2
    assert "STAGE tou: choose one of toy" in capsys.readouterr().err


@pytest.mark.parametrize("name", stages.stage_names())
def test_a_stage_of_the_project_that_is_written_reads_the_same(name, tmp_path, monkeypatch):
    stage, tables = load_stage(name), stages.read(name)
    monkeypatch.chdir(tmp_path)
    Path("experiments/stages").mkdir(parents=True)
    stages.write_stage(name, {key: tables[key] for key in tables if key != "extends"})
    assert load_stage(name) == stage


def test_what_is_written_reads_the_same_whatever_it_says(folder):
    tables = {
        "extends": "toy",
        "question": 'Is "it" so, or\n\\not: é 😀 \x7f?',
        "seeds": [3, 5],
        "max_seeds": 9,
        "axes": ["ATTNGATE", "BIAS"],
        "reference": 'a "b"',
        "base": {"BIAS": False, "LR": 1e-20, "NOTE": 'say "no"', "N_EMBD": 64},
        "grid": {},
        "variants": {'a "b"': {}, "😀 é": {"LR": 2}, "c.d": {"ATTNGATE": "const", "BIAS": True}},
        "gate": {"better": 0.5, "rules": ["better", "same_loss"]},
        "next": [
            {"name": "later", "N_LAYER": 3, "BIAS": True},
            {"name": "last", "around": {'a "key" é 😀': {"NOTE": ["x", 'y"']}}},
        ],
    }
    stages.write_stage("copy", tables)
    assert stages.read("copy") == stages.read("toy") | tables | {
        "base": {"N_LAYER": 2, "MUON_LR": ""} | tables["base"]
    }
    copy = load_stage("copy")
    assert (copy.references_first()[0], copy.seeds, copy.max_seeds) == ('a "b"', (3, 5), 9)
    assert copy.variants["c.d"]["BIAS"] == "1" and copy.axes == ("attngate", "bias")
    assert copy.variants['a "b"']["LR"] == "1e-20" and copy.next == tuple(tables["next"])
    stages.write_stage("copy", tables)
    with pytest.raises(FileExistsError, match="copy.toml is there and says something else"):
        stages.write_stage("copy", tables | {"next": []})
    stages.write_stage("short", {"extends": "copy", "next": []})
    assert load_stage("short").next == ()


@pytest.mark.parametrize(
    "against, sentence",
    [
        ("'no'", "against = 'no': choose one of 'none', 'a gate'"),
        ("{ATTNGATE = 'none'}", "against ATTNGATE: variant 'none LR=0.1' does not set it"),
        ("{LR = 5}", "against {'LR': 5}: 0 variants are so and otherwise as 'none LR=0.1'"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_sentence(folder, against, sentence):
    text = FILE.replace('reference = "none LR=0.1"', f"against = {against}")
    Path("experiments/stages/toy.toml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_stage("toy")


@pytest.fixture
def asked_here(monkeypatch, capsys):
    """A stage's program of its own is asked in this process, where torch is loaded."""
    start = subprocess.run

    def run(command, **options):
        if Path(command[1]).name != "train_rl.py":
            return start(command, **options)
        capsys.readouterr()
        code = train_rl.main(command[2:], options["env"])
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize("name", stages.stage_names())
def test_variants_of_every_stage_differ_as_it_says_and_are_validated_alike(name, asked_here):
    stage = load_stage(name)
    seeds = dict.fromkeys(stage.variants, stage.seeds[:1])
    runs = plan_stage.plan_runs(stage, seeds, 1, "dry")
    told = plan_stage.description(stage, runs)
    assert [line.split(":")[0] for line in told[: len(runs)]] == stage.references_first()
    if stage.program == "scripts/train_rl.py":
        assert all(int(run.plan["val_prompts"]) >= 500 for run in runs)
    elif name.endswith("_cpu"):
        least = {"mixers_lr_cpu": 2**16, "mixers_cpu": 2**17, "mixers_cpu_60s": 2**17}
        least |= dict.fromkeys(("gate_optimizer_cpu", "gate_rate_cpu", "optimizer_lr_cpu"), 2**17)
        tokens = least.get(name, 2**18)  # states are slow to validate, and some runs are short
        assert all(run.validation()[1] >= tokens and run.cfg.shuffle for run in runs)


@pytest.mark.parametrize("name", stages.stage_names())
def test_every_stage_of_the_project_can_be_trained(name):
    """Settings, batch and schedule are sound; every variant of a stage sees the same tokens, but at
    equal time, is validated on as many, and has the learning rates of the others, unless these are
    what the stage compares: then Muon's follows."""
    stage, tokens, validated, rates = load_stage(name), set(), set(), []
    for settings in stage.variants.values():
        of_trainer = {name: text for name, text in settings.items() if name.isupper()}
        cfg = Config.from_env(
            of_trainer | {"DEVICE": "cpu", "VOCAB_SIZE": settings.get("VOCAB_SIZE") or "257"}
        )
        check_batch(cfg, Ranks())
        tokens.add(make_plan(cfg, Ranks())["tokens_needed"])
        validated.add(cfg.val_tokens // cfg.sequence_length * cfg.sequence_length)
        is_gates_alone = name == "gate_rate_cpu"  # the rate that varies, LR
        rates.append((cfg.lr, peak_rate(cfg, "muon_lr") / (1 if is_gates_alone else cfg.lr)))
        told = cautions(cfg)
        if cfg.optimizer == "adamw":  # a variant, under a preset that is Muon's
            told = [warning for warning in told if "without OPTIMIZER=muon" not in warning]
        loud = [warning for warning in told if "WARMDOWN" not in warning]
        assert not loud, loud
    assert len(tokens) == 1 or stage.seconds
    assert len(validated) == 1, validated
    for setting, values in zip(("LR", "MUON_LR"), zip(*rates)):
        said = {settings.get(setting) for settings in stage.variants.values()}
        assert len(said) > 1 or max(values) == pytest.approx(min(values)), (setting, rates)
    assert len({str(settings) for settings in stage.variants.values()}) > 1


@pytest.mark.parametrize("name", stages.stage_names())
def test_a_setting_of_the_command_line_reaches_every_variant(name):
    """And changes nothing else of it, whatever a preset, or what the stage extends, says of it."""
    stage = load_stage(name)
    for setting, text in ("BETA2", "0.77"), ("WARMUP_ITERS", "17"), ("D_FF", "24"):
        own = {settings.get(setting) for settings in stage.variants.values()}
        if stage.seconds or len(own) > 1:
            with pytest.raises(ConfigError, match=f"^--set {setting}"):
                derive_stage.overridden(stage, [f"{setting}={text}"], "made", write=False)
            continue
        made = derive_stage.overridden(stage, [f"{setting}={text}"], "made", write=False)
        assert made.variants.keys() == stage.variants.keys()
        for label, settings in stage.variants.items():
            before, after = (
                Config.from_env({name: word for name, word in one.items() if name.isupper()})
                for one in (settings, made.variants[label])
            )
            expected = {**vars(before), setting.lower(): type(after.beta2)(float(text))}
            assert vars(after) == expected, label


def test_a_small_stage_has_published_runs_or_says_why_not():
    small = [path.stem for path in committed("experiments/stages/*_cpu*.toml")]
    published = {name for name in small if Path(f"experiments/results_{name}.csv").is_file()}
    said = {name for name in small if load_stage(name).not_run}
    assert len(small) > 20 and published | said == {*small} and not published & said


def test_the_stages_of_the_sources_are_there_each_with_a_cpu_edition():
    """Variants, steps, rates and seeds as published."""
    published = {
        "stage1": (5, 2, "1500", "0.0036"),
        "stage2": (8, 2, "800", "0.0036"),
        "stage2_5": (2, 2, "1500", "0.00468"),
        "stage3": (3, 3, "5100", "0.00468"),
    }
    for name, (variants, seeds, steps, rate) in published.items():
        stage = load_stage(name)
        first = stage.variants[stage.references_first()[0]]
        assert (len(stage.variants), len(stage.seeds), first["NUM_ITERATIONS"], first["LR"]) == (
            variants,
            seeds,
            steps,
            rate,
        )
    values = {
        "moe_aux": ("AUX_LOSS_COEF", "0.0 0.005 0.01 0.02"),
        "moe_topk": ("TOP_K", "1 2"),
        "moe_experts": ("NUM_EXPERTS", "20 40 60"),
        "moe_dff": ("D_FF", "1024 2048 3072"),
        "stage2": ("LR", "0.0036 0.00396 0.00432 0.00468"),
    }
    for name, (setting, wanted) in values.items():
        assert {settings[setting] for settings in load_stage(name).variants.values()} == set(
            wanted.split()
        )
    shapes = [
        tuple(settings[name] for name in ("BATCH_SIZE", "SEQUENCE_LENGTH", "MUON_LR"))
        for settings in load_stage("batch_vs_seqlen").variants.values()
    ]
    assert shapes == [
        (b, t, rate)
        for b, t in (("64", "256"), ("8", "1024"), ("24", "512"))
        for rate in ("0.005", "0.01", "0.02")
    ]
    names = {*published, *values, "moe_depth", "half_params", "batch_vs_seqlen"}
    assert {*stages.stage_names()} >= names | {f"{name}_cpu" for name in names} | {"smoke"}


def row(variant, seed, loss, **more):
    return {
        "run_id": f"{variant[0]}{variant[-1]}{seed}{more.get('source_sha', 'new')}",
        "stage": "toy",
        "variant": variant,
        "seed": seed,
        "status": "ok",
        "source_sha": "new",
        "data_fingerprint": "d1",
        "config_hash": "c",
        "changes": f"PRESET=small N_LAYER=2 LR={variant.split('=')[1]} SEED={seed}",
        "started": f"2026-01-0{seed}",
        "final_loss": loss,
        "train_time": 60.0 + seed,
        "tokens_per_sec": 1000.0,
        "params_total": 1234567,
        "params_active": 1234567,
        "device_name": "cpu: toy",
        "torch": "2",
        "attngate": "headwise" if "gate" in variant else "none",
        "lr": float(variant.split("=")[1]),
        "error": "",
    } | more


ROWS = [
    *(row("none LR=0.1", seed, loss) for seed, loss in enumerate((3.0, 3.1, 3.2), 1)),
    *(row("a gate LR=0.1", seed, loss) for seed, loss in enumerate((2.8, 2.9, 2.7), 1)),
    row("none LR=0.00396", 1, 4.0),
    row("none LR=0.00396", 2, None, status="diverged"),
    row("none LR=0.1", 1, 9.0, source_sha="old", started="2025-01-01"),
    row("none LR=0.1", 4, 9.0, status="running"),
    row("none LR=0.1", 5, 9.0, data_fingerprint="d0", started="2025-01-01"),
]


def results(rows, path="experiments/results.csv"):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def curve(folder, run_id, text):
    Path(folder, "logs").mkdir(exist_ok=True)
    Path(folder, "logs", f"{run_id}.csv").write_text(text)


def test_only_one_source_and_one_dataset_are_compared_and_a_seed_once(folder):
    results([*ROWS, row("none LR=0.1", 1, 3.05, run_id="again", started="2026-02-01")])
    runs = split_results.comparable(split_results.read_results(), load_stage("toy"))
    assert sorted(runs.run_id) == [
        "a11new",
        "a12new",
        "a13new",
        "again",
        "n12new",
        "n13new",
        "n61new",
    ]
    assert (runs[runs.variant == "none LR=0.1"].final_loss.sort_values() == [3.05, 3.1, 3.2]).all()


def test_only_one_setting_of_what_does_not_vary_is_compared(folder):
    """N_LAYER is the same in all variants, whoever gives it, and LOG_EVERY changes no result; LR
    varies."""

    def of(layers, *more):
        return "PRESET=small LR=0.1 " + " ".join([f"N_LAYER={layers}", *more])

    results(
        [
            row("none LR=0.1", 1, 3.0, changes=of(2)),
            row("none LR=0.1", 2, 3.0, changes=of(2, "LOG_EVERY=5")),
            row("a gate LR=0.1", 2, 3.0, changes=of(2, "ATTNGATE=headwise")),
            row(
                "a gate LR=0.1", 1, 2.0, changes=of(4), started="2025"
            ),  # left from before the stage was edited
            row("none LR=0.00396", 1, 2.0, changes=of(2, "BATCH_SIZE=9"), started="2025"),
        ]
    )
    stage, rows = load_stage("toy"), split_results.read_results()
    assert sorted(split_results.comparable(rows, stage).run_id) == ["a12new", "n11new", "n12new"]
    rows.loc[2, ["config_hash", "started"]] = "edited", "2027"
    rows = pd.concat([rows, rows[2:3].assign(seed=5, config_hash="before", started="2026")])
    assert sorted(split_results.comparable(rows, stage).seed) == [1, 2, 2], (
        "a variant has the settings it had last"
    )


def test_what_makes_no_other_run_is_what_the_trainer_says():
    assert {name.lower() for name in split_results.untrained()} == {
        *Config.NOT_HASHED,
        "seed",
    } - {*Config.LABELS}


def test_curves_of_live_and_of_resumed_runs(folder):
    """Half a line is not read, of a step that was run twice the later line holds, numbers come back
    to the last bit."""
    curve(
        folder,
        "n11new",
        f"step,val_loss,lr\n1,,{1 / 3!r}\n10,5.0,0.1\n12,4.9,0.1\n10,4.5,0.1\n11,4.4",
    )
    path = folder / "logs" / "n11new.csv"
    read = split_results.read_curve(path)
    assert (
        read.step.tolist() == [1, 10, 12]
        and read.val_loss.tolist()[1:] == [4.5, 4.9]
        and read.lr[0] == 1 / 3
    )
    results(ROWS)
    assert split_results.main(["toy"]) == 0
    kept = split_results.read_curves("toy")
    assert list(kept.columns[:4]) == ["run_id", "variant", "seed", "step"] and kept.lr[0] == 1 / 3
    assert set(kept.run_id) == {"n11new"} and set(kept.seed) == {1}
    path.unlink()
    curve(folder, "a11new", "step,val_loss,lr,aux_coef\n10,2.5,0.1,0.01\n")
    assert split_results.main([]) == 0
    kept = split_results.read_curves("toy")
    assert list(kept.run_id) == ["n11new"] * 3 + ["a11new"], "what the logs no longer have is kept"
    whole = split_results.read_results(Path("experiments/results_toy.csv"))
    assert len(whole) == len(ROWS) and whole.final_loss[0] == 3.0


def test_results_that_are_not_there(folder, capsys):
    assert (
        split_results.main([]) == 2 and "or rebuild_results.py from logs" in capsys.readouterr().err
    )
    results(ROWS)
    assert split_results.main(["tou"]) == 2 and "STAGE tou has no run" in capsys.readouterr().err
    assert make_tables.main(["toy"]) == 0, "of the runs here, published or not"
    Path("experiments/results.csv").unlink()
    assert make_tables.main(["toy"]) == 2
    assert "python scripts/run_stage.py toy makes them" in capsys.readouterr().err


def welch_by_hand(a, b):
    """Welch's t-test from its definition: difference, half width of the 95 % interval, p."""
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    dof = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    difference, error = np.mean(a) - np.mean(b), (va + vb) ** 0.5
    return (
        difference,
        scipy_stats.t.ppf(0.975, dof) * error,
        2 * scipy_stats.t.sf(abs(difference / error), dof),
    )


def test_tables_are_what_the_rows_say(folder):
    results(ROWS)
    split_results.main([])
    text = make_tables.write_tables("toy")
    table = pd.read_csv("experiments/tables/toy.csv").set_index("variant")
    assert list(table.columns[:4]) == ["attn_gate", "learning_rate", "seeds", "final_loss"]
    gate, reference = table.loc["a gate LR=0.1"], table.loc["none LR=0.1"]
    assert (gate.seeds, gate.attn_gate, gate.learning_rate, gate.params_total) == (
        3,
        "headwise",
        0.1,
        1234567,
    )
    assert (
        gate.final_loss == pytest.approx(2.8)
        and gate.sd == pytest.approx(0.1)
        and gate.train_time == 62
    )
    test = scipy_stats.ttest_rel([2.8, 2.9, 2.7], [3.0, 3.1, 3.2])
    assert [gate.difference, gate.low, gate.high, gate.p] == pytest.approx(
        [-0.3, *test.confidence_interval(0.95), test.pvalue]
    )
    assert gate.pairs == 3 and gate.p_holm == gate.p, "the only comparison that has a p"
    assert (
        reference[["difference", "low", "p"]].isna().all() and reference.unfinished == "1 running"
    )
    lone = table.loc["none LR=0.00396"]
    assert lone.seeds == 1 and pd.isna(lone.p) and lone.difference == pytest.approx(1.0)
    assert lone.unfinished == "1 diverged"
    assert table.loc["a gate LR=0.00396"].seeds == 0
    lines = text.splitlines()
    assert lines[0].startswith(
        "| variant | attn_gate | learning_rate | seeds | final_loss | sd | difference | 95 % "
    )
    assert "| a gate LR=0.1 | headwise | 0.1 | 3 | 2.8000 | 0.1000 | -0.3000 |" in text
    assert "| 1m 2.0s |" in text and "1,234,567" in text
    assert "| none LR=0.1 | none | 0.1 | 3 | 3.1000 | 0.1000 | reference |" in text
    assert "Measured on cpu: toy, torch 2. Difference, interval and p by the paired t-test" in text
    assert len({line.count("|") for line in lines[:6]}) == 1


def test_a_table_begins_with_the_columns_that_its_stage_names(folder, capsys):
    """Settings that do not vary among them, figures of runs, as means, and the accuracy, which no
    other table has."""
    names = ["learning_rate", "n_layer", "final_loss", "train_time", "val_accuracy", "ppl", "seeds"]
    made = [
        one | {"n_layer": 2, "val_accuracy": one["seed"] / 8, "ppl": one["seed"] ** 2}
        for one in ROWS[:6]
    ]
    results(made)
    Path("experiments/stages/toy.toml").write_text(f"columns = {names}\n{FILE}")
    text = make_tables.write_tables("toy")
    table = pd.read_csv("experiments/tables/toy.csv")
    assert list(table.columns[:10]) == [*names, "variant", "attn_gate", "sd"]
    assert text.startswith(f"| {' | '.join(names)} | variant | attn_gate | sd | difference | 95 % ")
    assert (
        "| 0.1 | 2 | 2.8000 | 1m 2.0s | 0.2500 | 4.66667 | 3 | a gate LR=0.1 | headwise |" in text
    )
    Path("experiments/stages/toy.toml").write_text(f"columns = ['loss']\n{FILE}")
    assert make_tables.main(["toy"]) == 2
    assert "columns: 'loss' is no column of its table; choose a setting, or one of variant, " in (
        capsys.readouterr().err
    )


def test_a_change_that_has_no_effect_is_called_that(folder):
    results([one | {"final_loss": 3.0 + one["seed"]} for one in ROWS[:6]])
    assert "the same to the last digit: what differs here has no effect" in (
        make_tables.write_tables("toy")
    )
    changed = {"a gate LR=0.1": 0.5, "none LR=0.1": 0}
    results([one | {"final_loss": one["seed"] + changed[one["variant"]]} for one in ROWS[:6]])
    assert "no effect" not in make_tables.write_tables("toy")


def test_tables_of_the_sources_begin_as_published():
    begin = {
        "stage1": "attn_gate gate_act seeds final_loss train_time",
        "stage2": "attn_gate learning_rate final_loss train_time",
        "stage2_5": "attn_gate learning_rate num_iterations final_loss train_time",
        "stage3": "attn_gate learning_rate seeds final_loss train_time",
    }
    for name, columns in begin.items():
        for edition in (name, f"{name}_cpu"):
            assert load_stage(edition).columns == tuple(columns.split())
    assert "val_accuracy" in load_stage("batch_vs_seqlen_cpu").columns


RATES = {"none LR=0.1": (0.25, 0.5, 0.375), "a gate LR=0.1": (0.5, 0.625, 0.75)}


def rates(**more):
    """Rows of two variants with pass rates, and losses that say the opposite."""
    losses = {"none LR=0.1": 2.5, "a gate LR=0.1": 3.5}
    return [
        row(label, seed, losses[label] + seed / 10, tokens=seed, pass_at_1=rate, **more)
        for label in RATES
        for seed, rate in enumerate(RATES[label], 1)
    ]


def write_measure(measure="pass_at_1"):
    Path("experiments/stages/toy.toml").write_text(f'measure = "{measure}"\n{FILE}')


def test_a_table_compares_what_its_stage_measures(folder):
    write_measure()
    unmeasured = [row("none LR=0.1", 4, 2.0, pass_at_1=None), row("none LR=0.00396", 1, 2.0)]
    results([*rates(), *unmeasured])
    split_results.main([])
    text = make_tables.write_tables("toy")
    table = pd.read_csv("experiments/tables/toy.csv").set_index("variant")
    assert list(table.columns[2:7]) == ["seeds", "final_loss", "pass_at_1", "sd", "difference"]
    gate, reference = table.loc["a gate LR=0.1"], table.loc["none LR=0.1"]
    test = scipy_stats.ttest_rel(*(RATES[label] for label in ("a gate LR=0.1", "none LR=0.1")))
    assert (gate.pass_at_1, gate.sd, gate.final_loss) == pytest.approx((0.625, 0.125, 3.7))
    assert [gate.difference, gate.low, gate.high, gate.p] == pytest.approx(
        [0.25, *test.confidence_interval(0.95), test.pvalue]
    )
    assert (reference.seeds, reference.pass_at_1) == (3, 0.375)
    assert table.seeds["none LR=0.00396"] == 0, "what has no pass rate is no run of the comparison"
    assert "| 3 | 3.7000 | 0.6250 | 0.1250 | +0.2500 |" in text
    assert text.count("Compared is pass_at_1 (greedy pass@1, held out; fraction of prompts)") == 1
    assert text.count("; higher is better.") == 1
    assert (
        "on different numbers of tokens, 1 to 3: the pass_at_1 of their rows is compared." in text
    )
    assert "Left out: 2 finished runs without pass_at_1." in text and "other trainer" not in text


def test_of_a_measure_that_is_not_known_no_direction_is_claimed(folder):
    write_measure("score")
    results([one | {"score": 12 - one["pass_at_1"]} for one in rates()])
    split_results.main([])
    text = make_tables.write_tables("toy")
    table = pd.read_csv("experiments/tables/toy.csv").set_index("variant")
    assert table.difference["a gate LR=0.1"] == pytest.approx(-0.25)
    assert "Compared is score. Difference, " in text and "better" not in text
    write_measure("final_loss")
    text = make_tables.write_tables("toy")
    assert "Compared" not in text and "tokens, 1 to 3: final losses are compared." in text


@pytest.mark.parametrize("measure, seeds", [("pass_at_1", 0), ("final_loss", 3)])
def test_rows_without_the_measure_leave_nothing_to_compare(folder, measure, seeds):
    write_measure(measure)
    results(ROWS[:6])
    split_results.main([])
    text = make_tables.write_tables("toy")
    assert pd.read_csv("experiments/tables/toy.csv").seeds.tolist() == [seeds, 0, seeds, 0]
    assert ("Left out: 6 finished runs without pass_at_1." in text) == (seeds == 0)


def test_a_measure_that_is_no_number_is_named(folder, capsys):
    results([*rates(), row("none LR=0.1", 9, 3.0, run_id="odd", pass_at_1="all")])
    write_measure()
    split_results.main([])
    assert make_tables.main(["toy"]) == 2
    assert "error: pass_at_1 of odd is 'all', no number" in capsys.readouterr().err
    write_measure("status")
    assert make_tables.main(["toy"]) == 2
    assert "status of n11new is 'ok', no number" in capsys.readouterr().err


def test_without_shared_seeds_the_test_is_welchs_and_the_table_says_so(folder):
    apart = [row("a gate LR=0.1", seed + 10, loss) for seed, loss in ((1, 2.8), (2, 2.9), (3, 2.7))]
    results([*ROWS[:3], *apart])
    split_results.main([])
    text = make_tables.write_tables("toy")
    gate = pd.read_csv("experiments/tables/toy.csv").set_index("variant").loc["a gate LR=0.1"]
    difference, half, p = welch_by_hand([2.8, 2.9, 2.7], [3.0, 3.1, 3.2])
    assert [gate.difference, gate.low, gate.high, gate.p] == pytest.approx(
        [difference, difference - half, difference + half, p]
    )
    assert "pairs" not in gate and "by Welch's t-test; p_holm" in text


def test_p_is_corrected_for_all_comparisons_of_the_table(folder):
    """Holm's correction by hand: the least p times three, the next times two, none below it."""
    losses = {"a gate LR=0.1": (2.8, 2.9, 2.7), "none LR=0.00396": (3.3, 3.5, 3.4)}
    losses |= {"a gate LR=0.00396": (3.0, 3.3, 3.1)}
    made = [row(name, seed, loss) for name in losses for seed, loss in enumerate(losses[name], 1)]
    results([*ROWS[:3], *made])
    split_results.main([])
    text = make_tables.write_tables("toy")
    table = pd.read_csv("experiments/tables/toy.csv").dropna(subset="p").sort_values("p")
    expected = np.maximum.accumulate(np.array([3, 2, 1]) * table.p).clip(upper=1)
    assert table.p_holm.to_numpy() == pytest.approx(expected.to_numpy())
    assert "Holm's correction for 3 comparisons" in text
    other = make_tables.other_view("toy", ["LR=0.1"])
    test = scipy_stats.ttest_rel(losses["a gate LR=0.00396"], losses["a gate LR=0.1"])
    assert f"| a gate LR=0.1 | {np.mean(losses['a gate LR=0.00396']) - 2.8:+.4f} |" in other
    assert f"{test.confidence_interval(0.95).low:+.4f} to" in other


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"val_tokens": 4096}, "Runs that were validated on different tokens are not compared."),
        ({"val_fingerprint": "v2"}, "Runs that were validated on different tokens are not"),
        ({"sequence_length": 32, "val_tokens": 2048}, "Sequence lengths differ"),
        ({"sequence_length": 30}, "Runs that were validated on different tokens are not"),
    ],
    ids=str,
)
def test_only_what_was_validated_on_the_same_tokens_is_compared(folder, change, sentence):
    same = {"val_tokens": 2048, "sequence_length": 16, "val_fingerprint": "v1"}
    made = [row("none LR=0.1", seed, 3.0 + seed, **same) for seed in (1, 2)]
    made += [row("a gate LR=0.1", seed, 2.9 + seed, **same | change) for seed in (1, 2)]
    results(made)
    split_results.main([])
    text = make_tables.write_tables("toy")
    table = pd.read_csv("experiments/tables/toy.csv").set_index("variant")
    is_compared = "difference" in table and table.difference["a gate LR=0.1"] < 0
    assert is_compared == (sentence == "Sequence lengths differ") and sentence in text


def test_runs_here_are_added_to_what_is_published_and_take_nothing_from_it(folder, capsys):
    """A published row stays to the byte, whatever became of the table of the runs here."""
    results(ROWS)
    split_results.main(["toy"])
    published = Path("experiments/results_toy.csv")
    before = published.read_text()
    new = row("none LR=0.1", 9, 2.5, run_id="own", batch_time=1.5)
    results([new | {"stage": "other", "run_id": "o"}, new])
    assert len(split_results.rows_of("toy")) == len(ROWS) + 1 and published.read_text() == before
    assert split_results.main([]) == 0
    head, *rows = published.read_text().splitlines()
    assert head == before.splitlines()[0] + ",batch_time"
    assert rows[:-1] == [f"{line}," for line in before.splitlines()[1:]]
    assert split_results.rows_of("toy").batch_time.iloc[-1] == 1.5 and rows[-1].startswith("own,")

    before = published.read_text()
    for damage in ('own,"torn\n', "\xff", '"' * 7 + "\n"):
        with open("experiments/results.csv", "a") as file:
            file.write(damage)
        assert split_results.main(["toy"]) == 0 and published.read_text() == before
    assert "lines are no rows of it and are left out" in capsys.readouterr().err
    Path("experiments/results.csv").unlink()
    assert split_results.main(["toy"]) == 0 and published.read_text() == before

    published.write_text(before.replace("\nn12new,", '\n"n12new,'))
    damaged = published.read_text()
    results([new])
    assert split_results.main(["toy"]) == 2 and published.read_text() == damaged
    assert "results_toy.csv is published and not whole: " in capsys.readouterr().err


def test_a_published_row_with_a_result_is_not_that_of_a_run_here(folder, capsys):
    """Ids follow from settings, source and data, so another machine makes the same: what is begun
    here, torn or written by an earlier version takes nothing from what is published."""
    results(ROWS)
    curve(folder, ROWS[0]["run_id"], "step,val_loss\n1,3.5\n2,3.0\n")
    split_results.main(["toy"])
    files = [Path(f"experiments/{name}_toy.csv") for name in ("results", "log_curves")]
    before = [path.read_bytes() for path in files]
    begun = [one | {"status": "crash", "final_loss": "", "started": "2027"} for one in ROWS[:1]]
    for rows in begun, [ROWS[0] | {"final_loss": "3.00"}], [{"run_id": ROWS[0]["run_id"]}]:
        results([{"stage": "toy"} | one for one in rows])
        curve(folder, ROWS[0]["run_id"], "step,val_loss\n1,9.0\n")
        assert split_results.main(["toy"]) == 0 and [path.read_bytes() for path in files] == before
    assert "2 runs are published" not in (said := capsys.readouterr().err)
    assert f"1 runs are published with a result of another start, as {ROWS[0]['run_id']}" in said


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: text[:-1],
        lambda text: text.replace(",ok,", ",ok,ok,", 1),
        lambda text: text.replace("\n", "\n<<<<<<< HEAD\n", 1),
        lambda text: text.replace("toy", '"toy', 1),
        lambda text: text + text.splitlines()[1] + "\n",
        lambda text: text + text.splitlines()[0] + "\n",
        lambda text: text.replace("toy", "t\0y", 1),
        lambda text: text.replace(",", ";"),
    ],
    ids=["cut", "end", "cells", "merge", "quote", "twice", "header", "nul", "semicolons"],
)
def test_a_published_file_that_is_not_whole_is_refused_and_stays(folder, capsys, damage):
    results(ROWS)
    curve(folder, ROWS[0]["run_id"], "step,val_loss\n1,3.5\n2,3.0\n")
    split_results.main(["toy"])
    path = Path("experiments/results_toy.csv")
    path.write_bytes(damaged := damage(path.read_text()).encode())
    assert split_results.main(["toy"]) == 2 and path.read_bytes() == damaged
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "results_toy.csv is published and not whole: " in said


def test_published_curves_that_are_not_whole_are_refused_and_stay(folder, capsys):
    results(ROWS)
    curve(folder, ROWS[0]["run_id"], "step,val_loss\n1,3.5\n2,3.0\n")
    split_results.main(["toy"])
    path = Path("experiments/log_curves_toy.csv")
    whole = path.read_text()
    quote, header = whole.replace("3.5", '3"5'), whole[: whole.index("\n") + 1]
    for damaged in whole[:-2], whole + header, quote:
        path.write_text(damaged)
        assert split_results.main(["toy"]) == 2 and path.read_text() == damaged
        assert "log_curves_toy.csv is published and not whole" in capsys.readouterr().err
        with pytest.raises(ValueError, match="is published and not whole"):
            split_results.read_curves("toy")


def test_what_is_no_file_in_the_place_of_a_table_is_a_sentence(folder, capsys):
    results(ROWS)
    split_results.main(["toy"])
    for name in "results_toy", "results":
        path = Path(f"experiments/{name}.csv")
        for make in os.mkfifo, os.mkdir:
            path.unlink() if path.is_file() or path.is_fifo() else path.rmdir()
            make(path)
            told = split_results.main(["toy"]), make_tables.main(["toy"]), stage_gate.main(["toy"])
            said = capsys.readouterr().err.splitlines()
            assert told == (2, 2, 2) and len(said) == 3, said
            assert all("is no regular file" in line for line in said)
            with pytest.raises(ValueError, match="is no regular file"):
                plan_stage.results("toy")
        path.rmdir()
        results(ROWS, path)
    Path("experiments/results.csv").unlink()
    Path("experiments/results.csv").symlink_to("results.csv")
    assert split_results.main(["toy"]) == 0, "a link to itself is no table"


def test_a_begun_run_takes_no_published_curve_from_the_gate(folder):
    results(ROWS[:1])
    run_id = ROWS[0]["run_id"]
    curve(folder, run_id, "step,train_loss,val_loss\n1,3.0,3.5\n")
    split_results.main(["toy"])
    curve(folder, run_id, "step,train_loss,val_loss\n1,9.0,9.5\n")
    curves = gate_facts.curves_of("toy", split_results.rows_of("toy"), Path("logs"))
    assert list(curves[run_id].val_loss) == [3.5]


def test_runs_of_other_settings_than_the_file_has_are_left_out_and_counted(folder):
    """A stage that was edited has no results until it is run again."""
    stage = Path("experiments/stages/toy.toml")
    for old, new in (
        ("N_LAYER = 2", "N_LAYER = 3"),
        ('MUON_LR = ""', "MUON_LR = 0.5"),
        ("BIAS = true", "BIAS = false"),
        ("LR = [0.1,", "LR = [0.2, 0.1,"),
    ):
        rows = pd.DataFrame(ROWS).assign(muon_lr=0.25, bias=1)
        results(rows.astype(object).fillna("").to_dict("records"))
        stage.write_text(FILE.replace(old, new))
        text = make_tables.write_tables("toy")
        if old.startswith("LR"):
            assert "other settings" not in text, "another variant changes nothing for those there"
        else:
            assert "Left out: 9 finished runs with other settings than the stage has now" in text
    rows = pd.DataFrame(ROWS).assign(muon_lr=0.25)
    stage.write_text(FILE.replace('MUON_LR = ""', 'MUON_LR = "auto"'))
    results(rows.astype(object).fillna("").to_dict("records"))
    text = make_tables.write_tables("toy")
    assert "other settings" not in text, "what is auto has a value in the row"
    assert "Left out: 1 finished runs of another trainer or other data." in text
    rows["changes"] += " MUON_LR=0.25"
    results(rows.astype(object).fillna("").to_dict("records"))
    assert "Left out: 9" in make_tables.write_tables("toy")


def test_a_setting_that_left_the_stage_leaves_no_results(folder):
    """What a run had beyond what its stage says makes it another one."""
    made = [row for row in ROWS if row["source_sha"] == "new"]
    rows = pd.DataFrame(made).assign(preset="gpt2_small", run_id=range(len(made)))
    rows["changes"] = rows.changes.str.replace("PRESET=small ", "")
    rows.loc[0, "changes"] += " WEIGHT_DECAY=0.1"
    rows.loc[1, "changes"] += " LOG_EVERY=5 DEVICE=cuda"
    stage, known = load_stage("toy"), rows.assign(device_name="cpu")
    assert set(split_results.tried(known, stage).run_id) == set(range(1, len(made)))


def test_rows_of_a_program_are_compared_by_its_options(folder):
    """Which may change what a preset says, as --steps and --lr do; a setting still counts."""
    text = 'program = "scripts/mine.py"\n' + FILE.replace("N_LAYER = 2", "N_LAYER = 2\nsteps = 40")
    Path("experiments/stages/toy.toml").write_text(text)
    made = [one | {"steps": 40, "preset": "small", "num_iterations": 40} for one in ROWS[:4]]
    for one in made:
        one["changes"] += " NUM_ITERATIONS=40 --goal 3 --fast"
    made[1]["steps"] = 50
    made[2]["changes"] = made[2]["changes"].replace("N_LAYER=2", "N_LAYER=3")
    rows = pd.DataFrame(made).assign(run_id=range(4))
    told = split_results.tried(rows, load_stage("toy"))
    assert set(told.run_id) == {0, 3}


def test_a_blank_setting_stays_in_the_rows_of_a_stage(folder):
    """Else a stage that sets it now would take them for its own."""
    results([one | {"head_lr": "", "note": ""} for one in ROWS])
    split_results.main([])
    kept = pd.read_csv("experiments/results_toy.csv")
    assert "head_lr" in kept and "error" not in kept
    Path("experiments/results_toy.csv").unlink()
    stage = Path("experiments/stages/toy.toml")
    rows = pd.DataFrame(ROWS).assign(head_lr="", preset="gpt2_small")
    results(rows.astype(object).fillna("").to_dict("records"))
    stage.write_text(FILE.replace("N_LAYER = 2", "N_LAYER = 2\nHEAD_LR = 0.01"))
    split_results.main([])
    assert len(split_results.comparable(split_results.read_results(), load_stage("toy"))) == 0
    assert "Left out: 9 finished runs with other settings" in make_tables.write_tables("toy")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"final_loss": "3,01"}, "final_loss of odd is '3,01', no number"),
        ({"moe_entropy": "x"}, "moe_entropy of odd is 'x', no number"),
        ({"changes": "PRESET='x"}, "changes of odd are no NAME=value words"),
        ({"changes": "PRESET"}, "changes of odd are no NAME=value words"),
        ({"changes": "LR=1 PRESET --fast"}, "changes of odd are no NAME=value words"),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_read_is_named(folder, capsys, change, sentence):
    more = dict.fromkeys(change.keys() - ROWS[0].keys(), 1)
    results([*(one | more for one in ROWS[:3]), row("none LR=0.1", 9, 3.0, run_id="odd", **change)])
    codes = split_results.main(["toy"]), make_tables.main(["toy"])
    assert 2 in codes and sentence in capsys.readouterr().err


def test_a_broken_curve_is_named_and_blocks_only_a_finished_run(folder, capsys):
    results([row("none LR=0.1", 1, 3.0, run_id="good"), row("none LR=0.1", 2, 3.0, status="crash")])
    curve(folder, "good", "step,val_loss\n1,2.0\n")
    curve(folder, row("none LR=0.1", 2, 3.0)["run_id"], "ste")
    assert split_results.main(["toy"]) == 0
    curve(folder, "good", "ste")
    assert split_results.main(["toy"]) == 0, "what is published stays"
    Path("experiments/log_curves_toy.csv").unlink()
    assert split_results.main(["toy"]) == 2 and "good.csv is no curve" in capsys.readouterr().err
    Path("experiments/results.csv").write_text("a,b\n1,2\n")
    assert split_results.main([]) == 2 and "is no table of results" in capsys.readouterr().err


def test_different_numbers_of_tokens_are_told(folder):
    made = [row("none LR=0.1", seed, 3.0 + seed, tokens=1000) for seed in (1, 2)]
    results(made + [row("a gate LR=0.1", seed, 2.9 + seed, tokens=2000) for seed in (1, 2)])
    split_results.main([])
    assert "different numbers of tokens, 1,000 to 2,000:" in make_tables.write_tables("toy")


STUDIED = [path.stem.removeprefix("results_") for path in committed("experiments/results_*.csv")]


@pytest.mark.parametrize("name", STUDIED)
def test_committed_tables_and_verdicts_are_those_of_the_committed_rows_and_curves(
    name, tmp_path, monkeypatch
):
    of_git = shutil.ignore_patterns("results.csv*", "*.png")
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments", ignore=of_git)
    monkeypatch.chdir(tmp_path)
    assert split_results.main([name]) == 0
    make_tables.write_tables(name)
    stage_gate.write_gate(name)
    for path in (
        f"results_{name}.csv",
        f"log_curves_{name}.csv",
        f"tables/{name}.csv",
        f"tables/{name}.md",
        f"tables/{name}_gate.csv",
        f"tables/{name}_steps.csv",
    ):
        assert Path("experiments", path).read_text() == (ROOT / "experiments" / path).read_text(), (
            f"{path} is stale: python scripts/run_stage.py {name} --no-run"
        )


def test_the_table_of_the_runs_here_is_not_for_git():
    assert committed("experiments/results.csv*") == []
    assert "/experiments/results.csv\n" in (ROOT / ".gitignore").read_text()


def test_readme_tables_are_those_of_the_rows(monkeypatch):
    monkeypatch.chdir(ROOT)
    readme = Path("README.md").read_text()
    assert STUDIED and len(make_tables.BLOCK.findall(readme)) >= 1
    assert make_tables.with_tables(readme) == readme, "stale: python scripts/make_tables.py"
    assert make_tables.with_tables(re.sub(r"\| 5 \| \d", "| 4 | 9", readme)) == readme
