"""scripts/code_variants.py: refs and patches as variants of a stage, from the plan to the
verdict."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import TINY

import code_variants
import launch_runs
import make_tables
import plan_stage
import run_stage
import split_results
from harness.settings import ROOT
from stages import load_stage, toml_text
from store.contract import ConfigError
from store import source
from store.source import HARNESS, source_hash, text_hash
import train_gpt

# It trains nothing: its loss follows from LR and the seed. It leaves a row and a curve as a run.
STUB = '''
import importlib, os, subprocess, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "scripts"))
from store.source import HARNESS, source_hash, text_hash
train_gpt = importlib.import_module("train_gpt")
from store.tables import update_results

LR = 0.1
env = os.environ
names = """PRESET BATCH_SIZE DEVICE_BATCH_SIZE SEQUENCE_LENGTH VAL_TOKENS NUM_ITERATIONS VAL_EVERY
    INPUT_BIN INPUT_VAL_BIN VOCAB_SIZE MAX_EPOCHS DEVICE SEED STAGE VARIANT RUN_ID"""
row = {name.lower(): env.get(name, "") for name in names.split()}
row |= {"world_size": 1, "config_hash": "c", "source_sha": source_hash(Path(__file__).read_text())}
if "DRY_RUN" in env:  # a setting that is called dry_run elsewhere
    print("\\n".join(f"{name}:{value}" for name, value in row.items()))
    sys.exit("config: BATCH_SIZE=13: no" if row["batch_size"] == "13" else 0)

losses = [2 + LR + int(env["SEED"]) / 64 + left for left in (1, 0.5, 0)]
points = [f"{10 * i},{10 * i},2,{loss},{i}" for i, loss in enumerate(losses)]
curve = "\\n".join(["step,tokens,train_loss,val_loss,train_time", *points, ""])
Path("logs", env["RUN_ID"] + ".csv").write_text(curve)
commit = subprocess.check_output(["git", "-C", HERE, "rev-parse", "HEAD"], text=True).strip()
row |= {"status": "ok", "started": 2026, "final_loss": losses[-1], "git": commit}
row |= {"data_fingerprint": "d", "val_fingerprint": "d", "device_name": "H100", "num_experts": 1}
row |= {"params_total": 9, "flops_per_token": 9, "tokens": 20, "bad_steps": 0}
update_results("experiments/results.csv", [row])
'''
BASE = {name: TINY[name.lower()] for name in "BATCH_SIZE DEVICE_BATCH_SIZE DEVICE".split()}
BASE |= {"SEQUENCE_LENGTH": 16, "VAL_TOKENS": 64, "NUM_ITERATIONS": 20, "VAL_EVERY": 10}
BASE |= {"VOCAB_SIZE": 64, "MAX_EPOCHS": 0}


def git(*words):
    who = ("-c", "user.name=A", "-c", "user.email=a@b.c")
    done = subprocess.run(["git", *who, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def patch(name, old, new, file="train_gpt.py"):
    """Writes a patch that replaces a text, and leaves the file as it was."""
    before = Path(file).read_text()
    assert old in before
    Path(file).write_text(before.replace(old, new))
    Path(name).write_text(git("diff") + "\n")
    Path(file).write_text(before)


def commit(branch, old, new):
    """A branch whose one commit replaces a text in the trainer; the working tree stays on main."""
    git("checkout", "-q", "-B", branch)
    Path("train_gpt.py").write_text(Path("train_gpt.py").read_text().replace(old, new))
    git("commit", "-qam", "A change")
    made = git("rev-parse", "HEAD")
    git("checkout", "-q", "main")
    return made


def forget():
    """Has the next start look at git again, as a process of its own does."""
    for known in ("found", "root_of", "source_in_git"):
        getattr(code_variants, known).cache_clear()
    plan_stage.asked_of_code.cache_clear()
    plan_stage.checked.cache_clear()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Makes a checkout of a trainer, which is this project then, and the working directory."""

    def make(trainer):
        folder = tmp_path / "repo"
        for package in ("harness", "ops", "store"):
            shutil.copytree(ROOT / "scripts" / package, folder / "scripts" / package)
        shutil.copy(ROOT / ".gitignore", folder)
        (folder / "train_gpt.py").write_text(trainer)
        monkeypatch.chdir(folder)
        git("init", "-q", "-b", "main")
        git("add", ".")
        git("commit", "-qm", "The trainer")
        for module in (code_variants, plan_stage, launch_runs):
            monkeypatch.setattr(module, "ROOT", folder)
        monkeypatch.setattr(source, "PLACES", (folder / "scripts", folder))
        Path("experiments/stages").mkdir(parents=True)
        return folder

    forget()
    yield make
    forget()


@pytest.fixture
def repo(checkout, shards, monkeypatch):
    """The settings of a small run, in a checkout of a trainer that trains nothing."""
    folder = checkout(STUB)
    identity = {"data_fingerprint": "d", "val_fingerprint": "d"}
    monkeypatch.setattr(plan_stage.train_gpt, "data_identity", lambda *_: identity)
    monkeypatch.setattr(plan_stage.Config, "hash", lambda *_: "c")
    here = lambda: source_hash(Path("train_gpt.py").read_text())  # noqa: E731
    monkeypatch.setattr(split_results, "source_here", here)
    monkeypatch.setattr(run_stage.plot_ablation, "write_figures", lambda _: None)  # it takes long
    monkeypatch.setattr(launch_runs, "POLL", 0.02)
    monkeypatch.setattr(
        launch_runs, "command", lambda _, words: [sys.executable, str(folder / words[0])]
    )
    return BASE | {name.upper(): value for name, value in shards.items()}


def write_stage(base, variants, **more):
    tables = {"question": "?", "reference": [*variants][0], "seeds": [1, 2, 3], "max_seeds": 3}
    tables |= {"base": base, "variants": variants} | more
    Path("experiments/stages/toy.toml").write_text(toml_text(tables))


def work():
    """Runs what has no result, as a process of its own does; returns how many that were."""
    forget()
    stage = load_stage("toy")
    runs = plan_stage.plan_runs(stage, dict.fromkeys(stage.variants, stage.seeds), 1, "run")
    known = plan_stage.results("toy")
    waiting = [run for run in runs if plan_stage.status_of(run, known) != "ok"]
    assert launch_runs.Pool(2, None, False).work(runs) == []
    return len(waiting)


def rows():
    with open("experiments/results.csv", newline="") as file:
        return list(csv.DictReader(file))


def differences():
    return pd.read_csv("experiments/tables/toy.csv").set_index("variant").difference


def verdicts():
    table = pd.read_csv("experiments/tables/toy_gate.csv").query("kind == 'variant'")
    return table.set_index("variant")[["verdict", "reason"]]


def test_old_and_new_code_in_one_table_from_plan_to_verdict(repo, capsys):
    """A wrong learning rate is caught with three seeds, its cure is promoted, and what changes
    comments only never is."""
    wrong = commit("wrong", "LR = 0.1", "LR = 0.9")
    patch("words.patch", "LR = 0.1", "LR = 0.1  # a word")
    patch("cure.patch", "LR = 0.1", "LR = 0.02")
    codes = {
        "old": "main",
        "new": "wrong",
        "words": "words.patch",
        "here": ".",
        "cure": "cure.patch",
    }
    write_stage(repo, {label: {"CODE": name} for label, name in codes.items()})
    assert run_stage.main(["toy", "--jobs", "3"]) == 0
    out = capsys.readouterr().out
    main = git("rev-parse", "main")
    assert f"old: the reference, CODE main ({main[:10]})\n" in out
    assert f"new: against old: CODE main ({main[:10]}) -> wrong ({wrong[:10]})\n" in out
    assert "warning: 'words': its code is the same as that of 'old', but for comments" in out
    assert "warning: 'here': " in out and "warning: 'cure'" not in out
    assert code_variants.source_in_git(main) == source_hash(Path("train_gpt.py").read_text())

    found = {label: {r["source_sha"] for r in rows() if r["variant"] == label} for label in codes}
    source = Path("train_gpt.py").read_text()
    assert found["old"] == found["words"] == found["here"] == {source_hash(source)}
    assert found["new"] == {source_hash(source.replace("LR = 0.1", "LR = 0.9"))}
    assert len(rows()) == 15 and len(git("worktree", "list").splitlines()) == 5

    assert differences().round(6).to_dict() == pytest.approx(
        {"old": float("nan"), "new": 0.8, "words": 0, "here": 0, "cure": -0.08}, nan_ok=True
    )
    steps = pd.read_csv("experiments/tables/toy_steps.csv")
    assert (steps[steps.variant.isin(["words", "here"])].difference == 0).all()
    told = verdicts()
    assert told.verdict[["new", "words", "here", "cure"]].tolist() == ["hold"] * 3 + ["promote"]
    assert "its loss is higher, and no rule holds" in told.reason["new"]
    assert told.reason["words"].startswith("its code is the same as that of 'old', but for comm")
    text = Path("experiments/tables/toy.md").read_text()
    assert f"| new | wrong | {wrong[:10]} | 3 |" in text and f"| here | . | {main[:10]} | 3" in text
    assert "The code of 'words' is the same as that of 'old', but for comments" in text

    assert git("status", "--short", "-uno") == ""


def test_a_run_is_of_its_own_trainer_and_harness(checkout, shards, monkeypatch):
    """Of the real trainer, whatever PYTHONPATH says; without torchrun, which takes seconds."""
    checkout(train_gpt.SOURCE)
    monkeypatch.setattr(launch_runs, "command", lambda _, words: [sys.executable, *words])
    tiny = {name.upper(): value for name, value in (TINY | shards).items()}
    patch("wrong.patch", "lr: float = 0.0036", "lr: float = 0.36")
    patch("more.patch", '"output.txt"', '"out.txt"', "scripts/harness/files.py")
    Path("wrong.patch").write_text(Path("wrong.patch").read_text() + Path("more.patch").read_text())
    write_stage(tiny | {"MAX_EPOCHS": 0}, {"new": {"CODE": "wrong.patch"}}, seeds=[1])
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'scripts'}")
    assert work() == 1
    (row,) = rows()
    source = train_gpt.SOURCE.replace("lr: float = 0.0036", "lr: float = 0.36")
    assert (row["lr"], row["source_sha"]) == ("0.36", source_hash(source))
    assert (row["git"], row["dirty"]) == (git("rev-parse", "HEAD"), "1")
    assert row["harness_sha"] not in ("", text_hash(HARNESS))
    log = Path(f"logs/{row['run_id']}.txt").read_text()
    assert source in log and '"out.txt"' in log and '"output.txt"' not in log


def test_the_same_code_with_other_settings_is_another_thing(repo, monkeypatch, capsys):
    """And no word is said of the same code; where the settings agree too, ids differ by name."""
    monkeypatch.setattr(plan_stage.Config, "hash", lambda cfg, *_: str(cfg.lr))
    source = STUB.replace('names = """', 'names = """LR ').replace('"c"', 'env["LR"]')
    Path("train_gpt.py").write_text(source)
    git("commit", "-qam", "A hash")
    git("branch", "other")
    write_stage(
        repo | {"LR": 0.1},
        {"my_x": {"CODE": "main"}, "my-x": {"CODE": "other"}, "b": {"CODE": "other", "LR": 0.2}},
        reference="my_x",
        seeds=[1],
    )
    stage = load_stage("toy")
    seeds = dict.fromkeys(stage.variants, stage.seeds)
    runs = plan_stage.plan_runs(stage, seeds, 1, "run")
    told = plan_stage.cautions_of_code(stage, {run.settings["VARIANT"]: run for run in runs})
    assert [sentence.split(":")[0] for sentence in told] == ["'my-x'"]
    assert len({run.run_id for run in runs}) == 3
    assert work() == 3
    found = split_results.comparable(split_results.rows_of("toy"), stage)
    assert [split_results.has_same_code(stage, label, found) for label in ("my-x", "b")] == [
        True,
        False,
    ]


def test_pairs_of_a_seed_are_run_together(repo):
    write_stage(repo, {"here": {}, "b": {"CODE": "main"}}, reference="b")
    stage = load_stage("toy")
    order = plan_stage.run_order(stage, {"here": [5, 6], "b": [5, 6]})
    assert order == [("b", 5), ("here", 5), ("b", 6), ("here", 6)]


def test_a_branch_that_moved_is_run_anew_and_its_old_runs_are_left_out(repo):
    commit("idea", "LR = 0.1", "LR = 0.2")
    write_stage(repo, {"old": {}, "new": {"CODE": "idea"}}, seeds=[1])

    def losses():
        forget()
        text = make_tables.write_tables("toy")
        table = pd.read_csv("experiments/tables/toy.csv").set_index("variant")
        return table.final_loss.round(3).to_dict(), "Left out: 1 finished runs of another" in text

    assert work() == 2 and work() == 0 and losses() == ({"old": 2.116, "new": 2.216}, False)
    later = commit("idea", "LR = 0.1", "LR = 0.4")
    assert losses() == ({"old": 2.116, "new": pytest.approx(float("nan"), nan_ok=True)}, True)
    assert work() == 1 and losses() == ({"old": 2.116, "new": 2.416}, True)
    assert [row["git"] for row in rows()].count(later) == 1
    git("branch", "-qD", "idea")
    assert losses() == ({"old": 2.116, "new": 2.416}, True), "without the branch the newest count"


def test_a_patch_is_for_the_working_tree_with_what_is_not_committed(repo):
    Path("train_gpt.py").write_text(STUB.replace("LR = 0.1", "LR = 0.3"))
    Path("scripts/ops/mine.py").write_text("ONE = 1\n")  # not yet known to git
    before = git("status", "--short"), git("write-tree")
    Path("idea.patch").write_text(
        "--- a/scripts/ops/mine.py\n+++ b/scripts/ops/mine.py\n@@ -1 +1 @@\n-ONE = 1\n+ONE = 2\n"
    )
    root = code_variants.root_of(code_variants.found("idea.patch"))
    assert (root / "scripts/ops/mine.py").read_text() == "ONE = 2\n"
    assert "LR = 0.3" in (root / "train_gpt.py").read_text()
    for file in "README.md", "notes/train_gpt.py":  # of no run, and not committed: left out
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text("a\n")
        text = f"--- a/{file}\n+++ b/{file}\n@@ -1 +1 @@\n-a\n+b\n"
        Path("idea.patch").write_text(Path("idea.patch").read_text() + text)
    forget()
    root = code_variants.root_of(code_variants.found("idea.patch"))
    assert (root / "scripts/ops/mine.py").read_text() == "ONE = 2\n"
    assert not (root / "README.md").exists()
    shutil.rmtree("notes")
    for file in "README.md", "idea.patch":
        Path(file).unlink()
    assert (git("status", "--short"), git("write-tree")) == before, "tree and index stay"


def test_a_module_that_the_code_imports_is_part_of_it(repo):
    """As text of a commit, and as a worktree has it."""
    git("checkout", "-q", "-B", "module")
    for value in (1, 2):
        Path("scripts/idea.py").write_text(f"FACTOR = {value}\n")
        Path("train_gpt.py").write_text(STUB.replace("LR = 0.1", "import idea\n\nLR = 0.1"))
        git("add", ".")
        git("commit", "-qm", f"A module with {value}")
    git("checkout", "-q", "main")
    write_stage(repo, {"two": {"CODE": "module"}, "one": {"CODE": "module~1"}}, seeds=[1])
    assert work() == 2
    two, one = (
        {row["variant"]: row["source_sha"] for row in rows()}[name] for name in ("two", "one")
    )
    assert two != one
    for ref, sha in (("module", two), ("module~1", one)):
        assert code_variants.source_in_git(git("rev-parse", ref)) == sha


def test_a_patch_that_changes_nothing_of_a_run_is_refused(repo):
    patch("idea.patch", "import ", "import  ", "scripts/ops/averages.py")
    good = Path("idea.patch").read_text()
    for wrong in (
        good.replace("a/scripts", "scripts").replace("b/scripts", "scripts"),
        README_PATCH,
    ):
        Path("idea.patch").write_text(wrong)
        forget()
        with pytest.raises(ConfigError, match="CODE=idea.patch: changes nothing of what runs dep"):
            code_variants.root_of(code_variants.found("idea.patch"))
    Path("idea.patch").write_text(good)
    forget()
    assert code_variants.root_of(code_variants.found("idea.patch")).is_dir()


README_PATCH = "--- a/README.md\n+++ b/README.md\n@@ -0,0 +1 @@\n+a\n"
DAMAGES = [
    "rm logs/.code/*/train_gpt.py",
    "sed -i s/0.1/0.7/ logs/.code/*/train_gpt.py",
    "echo X = 1 > $(ls -d logs/.code/*/scripts/ops)/more.py",
    "rm logs/.code/*.json",  # as kill -9 leaves it
    "rm logs/.code/*/.git",
    "echo '[]' > $(ls logs/.code/*.json)",
    "rm -r logs",
    "rm -r logs; git worktree lock $(git worktree list | tail -1 | cut -d' ' -f1)",
    "git -C logs/.code/*/ checkout -q --orphan other",
]


def test_a_project_below_its_repository_is_found_and_kept_whole(repo, monkeypatch):
    for path in git("ls-files").splitlines():
        Path("part", path).parent.mkdir(parents=True, exist_ok=True)
        git("mv", path, f"part/{path}")
    git("commit", "-qm", "Below")
    patch("part/idea.patch", "LR = 0.1", "LR = 0.2", "part/train_gpt.py")
    monkeypatch.chdir("part")
    for module in (code_variants, plan_stage, launch_runs):
        monkeypatch.setattr(module, "ROOT", Path.cwd())
    forget()
    for name, rate in ("HEAD", "0.1"), ("idea.patch", "0.2"):
        code = code_variants.found(name)
        trainer = code_variants.root_of(code) / "train_gpt.py"
        kept = trainer.read_text()
        assert f"LR = {rate}" in kept and trainer.parent.name == "part"
        (trainer.parent / "scripts/ops/__pycache__").mkdir()
        (trainer.parent / "scripts/ops/__pycache__/a.pyc").touch()
        assert code_variants.is_whole(code), "what runs leave is no change"
        trainer.write_text(kept + "X = 1\n")
        code_variants.root_of.cache_clear()
        assert code_variants.root_of(code) == trainer.parent and trainer.read_text() == kept


def test_a_worktree_that_is_not_whole_is_made_anew(repo):
    head = code_variants.found("HEAD")
    for damage in DAMAGES:
        root = code_variants.root_of(head)
        git("worktree", "prune")
        subprocess.run(damage, shell=True, check=True)
        code_variants.root_of.cache_clear()
        assert not code_variants.is_whole(head), damage
        half = Path("logs/.code/0123")  # of another commit
        half.mkdir(parents=True)
        assert code_variants.root_of(head) == root and not half.exists(), damage
        assert (root / "train_gpt.py").read_text() == STUB and code_variants.is_whole(head), damage
        assert [path.name for path in (root / "scripts/ops").glob("mo*.py")] == [], damage


REFUSED = [
    ("nowhere", {}, "CODE=nowhere: git here has no such branch, tag or commit; git branch -a"),
    ("--all", {}, "CODE=--all: git here has no such branch"),
    ("gone.patch", {}, "CODE=gone.patch: no such file; git diff > idea.patch makes one"),
    ("other.patch", {}, "does not apply to the working tree: error: patch failed: train_gpt."),
    ("empty.patch", {}, "empty.patch: does not apply to the working tree: error: No valid pat"),
    ("done.patch", {}, "done.patch: is in the working tree already, which is what the other"),
    ("old", {}, "CODE=old: its train_gpt.py does not know DRY_RUN, or is not there, so"),
    ("main", {"EMA_ITERS": 3}, "EMA_ITERS is no setting of that code"),
    ("main", {"BATCH_SIZE": 13}, "train_gpt.py with DRY_RUN=1: config: BATCH_SIZE=13: no"),
    ("silent", {}, "train_gpt.py with DRY_RUN=1: prints no source_sha, which a stage needs"),
]


def test_code_that_cannot_be_run_is_one_sentence_and_starts_nothing(repo, capsys):
    commit("old", "dry_run", "a dry run")
    commit("silent", '"source_sha"', '"sha"')
    patch("other.patch", "LR = 0.1", "LR = 0.2")
    patch("done.patch", "row |= {", "row  |= {")
    git("apply", "done.patch")
    Path("train_gpt.py").write_text(Path("train_gpt.py").read_text().replace("LR = 0.1", "LR = 1"))
    Path("empty.patch").touch()
    for code, more, sentence in REFUSED:
        write_stage(repo, {"here": {}, "new": {"CODE": code} | more})
        assert run_stage.main(["toy"]) == 2, code
        error = capsys.readouterr().err
        assert error.startswith(f"run_stage.py: error: toy, new: CODE={code}"), error
        assert sentence in error and error.count("\n") == 1, error
    assert not Path("experiments/results.csv").exists()
    assert not [*Path("logs/.code").glob("*-*")], "nothing is left of the patches"


def test_code_needs_a_checkout_of_git(repo, capsys, monkeypatch):
    shutil.rmtree(".git")
    write_stage(repo, {"here": {}, "new": {"CODE": "main"}})
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(Path.cwd().parent))
    assert run_stage.main(["toy"]) == 2
    assert "CODE=main: needs a git checkout, which " in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    forget()
    assert run_stage.main(["toy"]) == 2
    assert "CODE=main: needs a git checkout, which " in capsys.readouterr().err


# On the fly


@pytest.fixture
def planned(repo, monkeypatch):
    """The words of a small run, and the runs that starts plan and do not make."""
    plans = []
    monkeypatch.setattr(launch_runs.Pool, "work", lambda self, runs: plans.append(runs) or [])
    monkeypatch.setattr(run_stage, "finish", lambda *_: None)
    return [f"{name}={value}" for name, value in repo.items()], plans


def test_versions_of_the_code_are_compared_on_the_fly(planned, capsys):
    """In a stage whose file is written once it is sure that it can run."""
    words, plans = planned
    commit("my/idea", "LR = 0.1", "LR = 0.2")
    patch("b.patch", "LR = 0.1", "LR = 0.4")
    codes = ["--code", "main", "--code", "my/idea", "--code", "b.patch"]
    assert run_stage.main([*codes, *words, "SEEDS=2", "--dry-run"]) == 0
    path = Path("experiments/stages/main_vs_my-idea_vs_b.toml")
    assert not path.exists(), "who only looks writes nothing"
    assert run_stage.main([*codes, words[0], "--jobs", "2", *words[1:], "SEEDS=2"]) == 0
    stage, text = load_stage(path.stem), path.read_text()
    assert stage.seeds == (1, 2) and {*stage.references.values()} == {"main"}
    assert [*stage.variants] == ["main", "my/idea", "b.patch"] and stage.axes == ("code",)
    order = [(run.settings["VARIANT"], run.settings["SEED"]) for run in plans[0]]
    assert order == [(label, seed) for seed in "12" for label in stage.variants]
    assert len({run.identity[4] for run in plans[0]}) == 3
    assert run_stage.main([*codes, *words, "SEEDS=2"]) == 0 and path.read_text() == text
    assert run_stage.main([path.stem]) == 0
    ids = [[run.run_id for run in runs] for runs in plans]
    assert len(ids) == 3 and ids[0] == ids[1] == ids[2]

    capsys.readouterr()
    assert run_stage.main([*codes, *words, "SEEDS=5,7"]) == 2 and path.read_text() == text
    assert "is there and says something else; --as NAME makes another" in capsys.readouterr().err
    assert run_stage.main([*codes, *words, "SEEDS=5,7", "--as", "more"]) == 0
    assert load_stage("more").seeds == (5, 7)
    assert run_stage.main(["--code", "my/idea", *words]) == 0
    alone = load_stage("my-idea_vs_tree")
    assert [*map(alone.code_of, alone.variants)] == ["my/idea", ""] and alone.seeds == (1, 2, 3)


NOT_COMPARED = [
    (["--code", "main", "--code", "nowhere"], "nowhere: CODE=nowhere: git here has no such"),
    (["--code", "main", "--code", "main"], "--code main: is there twice; name what it is"),
    (["--code", "."], "--code tree: is there twice"),
    (["--code", "main", "LR=1", "LR=2"], "with --code LR: is there twice, as 1 and 2"),
    (["--code", "main", "quickstart"], "quickstart: with --code all words are settings"),
    (["--code", "main", "SEEDS=0"], "SEEDS=0: must be how many, 1 to 50, or which, as 5,6"),
    (["--code", "main", "SEEDS=1,1"], "SEEDS 1,1: must be different whole numbers"),
    (["--code", "main", "SEED=1"], "SEED is nothing a variant can set"),
    (["--code", "main", "LRR=1"], "LRR is no setting"),
    (["--code", "main", "--set", "LR=1"], "--set LR=1: with --code settings are words"),
    (["--code", "main", "--seconds", "9"], "has variants with CODE, and only the steps of"),
    (["--code", "main", "--as", "../x"], "--as '../x': must be letters, digits, _"),
    ([], "name one stage, which python scripts/stages.py lists, or compare code: --code main"),
    (["a", "b"], "name one stage, which"),
]


def test_what_cannot_be_compared_is_one_sentence_and_writes_nothing(planned, capsys):
    for words, sentence in NOT_COMPARED:
        more = planned[0] if words[:1] == ["--code"] else []
        assert run_stage.main([*words, *more]) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("run_stage.py: error: ") and sentence in error, error
        assert error.count("\n") == 1, error
    assert not planned[1] and not [*Path("experiments/stages").iterdir()]
