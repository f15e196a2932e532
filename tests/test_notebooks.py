"""notebooks/: each runs on experiments/ alone and says the same; make_notebook.py makes more."""

import csv
import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from conftest import committed
from scipy.stats import ttest_1samp
from jupyter_client.manager import start_new_kernel

import make_notebook
import make_tables
import stage_gate
import stages
from harness.settings import ROOT

NOTEBOOKS = committed("notebooks/*.ipynb")


def write_copy(folder):
    """The project without logs, data and trainer."""
    for path in (
        path
        for part in ("experiments", "scripts", "notebooks")
        for path in committed(f"{part}/**/*")
        if path.is_file()
    ):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder


@pytest.fixture
def copy(tmp_path, monkeypatch):
    monkeypatch.chdir(write_copy(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "")
    return tmp_path


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """(a copy, what runs a notebook of it): in one kernel for all, emptied before each, since a new
    one takes longer than most notebooks."""
    folder = write_copy(tmp_path_factory.mktemp("copy"))
    anew = f"""%reset -f
%cd -q {folder / "notebooks"}
%matplotlib inline
%config InlineBackend.figure_formats = set()
import matplotlib, pandas, sys
matplotlib.rcdefaults()
pandas.reset_option("^display")
sys.path[:] = [path for path in sys.path if path != "scripts"]"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", "")
        manager, client = start_new_kernel(extra_arguments=["--log-level=40"])

    def execute(name):
        notebook = nbformat.read(folder / "notebooks" / f"{name}.ipynb", as_version=4)
        notebook.cells.insert(0, new_code_cell(anew))
        return NotebookClient(notebook, km=manager, timeout=300).execute()

    yield folder, execute
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def said(notebook):
    """All that the cells of a notebook have put out but images, and the names that pandas gives its
    tables by chance."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kinds = [dict(output.get("data", {}), text=output.get("text")) for output in outputs]
    texts = [[one.get(kind) for kind in ("text/html", "text/markdown", "text")] for one in kinds]
    return [re.sub(r"T_\w{5}", "T", str(text)) for text in texts]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_says_the_same_again(path, again):
    folder, execute = again
    kept = nbformat.read(path, as_version=4)
    text = "\n".join(cell.source for cell in kept.cells if cell.cell_type == "markdown")
    assert all(
        re.search(f"^{part}", text, re.M) for part in ("# ", "## Data", "## Plots", "## Answer")
    )
    assert any(
        "image/png" in output.get("data", {})
        for cell in kept.cells
        for output in cell.get("outputs", ())
    )
    before, now = said(kept), said(execute(path.stem))
    assert before == now, "stale: python scripts/make_notebook.py"
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["experiments", "notebooks", "scripts"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_figures_in_an_answer_are_filled_in_not_typed(path):
    """But for those that others have published."""
    source = nbformat.read(path, as_version=4).cells[-1].source
    assert "filled(answer" in source and "Not yet written." not in source
    answer = source.split('"""')[1]
    assert re.search(r"\{[^{}]+\}", answer), "an answer has figures of its stage"
    typed = re.sub(r"\{[^{}]*\}|95 %", "", answer)
    for sentence in re.split(r"(?<=[.:;])\s", typed):
        assert not re.search(r"\d", sentence) or "published" in sentence, sentence


def test_every_stage_with_rows_has_a_notebook():
    studied = {
        path.stem.removeprefix("results_") for path in committed("experiments/results_*.csv")
    }
    assert studied - {"smoke"} <= {path.stem for path in NOTEBOOKS}
    assert "final_figures" in {path.stem for path in NOTEBOOKS}


def test_a_new_notebook_asks_the_question_of_its_stage_and_keeps_the_answer(copy, capsys):
    of_stages = [path for path in NOTEBOOKS if path.stem != "final_figures"]
    name = min(of_stages, key=lambda path: path.stat().st_size).stem
    path = Path(f"notebooks/{name}.ipynb")
    path.unlink()
    assert make_notebook.main([name]) == 0 and capsys.readouterr().out.strip() == str(path)
    made = nbformat.read(path, as_version=4)
    assert stages.load_stage(name).question in made.cells[0].source
    answer = made.cells[-1]
    assert "Not yet written." in str(answer.outputs[0].data)
    reference = stages.load_stage(name).references_first()[0]
    text = f"It is so: {{{reference}|final_loss}} after {{{reference}|num_iterations}}."
    answer.source = answer.source.replace("Not yet written.", text)
    nbformat.write(made, path)
    assert make_notebook.main([name]) == 0
    said_now = said(nbformat.read(path, as_version=4))[-1]
    with open(f"experiments/tables/{name}.csv", newline="") as file:
        loss = next(row for row in csv.DictReader(file) if row["variant"] == reference)
    assert re.search(rf"It is so: {float(loss['final_loss']):.4f} after \d+\.", said_now)


def test_an_answer_may_compare_any_two_variants():
    rows = pd.read_csv("experiments/results_speedrun_cpu.csv")
    losses = rows.pivot(index="seed", columns="variant", values="final_loss")
    pairs = losses["speedrun"] - losses["rows alone"]
    test = ttest_1samp(pairs, 0)
    low, high = test.confidence_interval(0.95)
    asked = "{speedrun minus rows alone|%s}"
    text = ", ".join(asked % column for column in ("difference", "interval", "p", "pairs"))
    told = make_tables.filled(text, "speedrun_cpu")
    assert (
        told == f"{pairs.mean():+.4f}, {low:+.4f} to {high:+.4f}, {test.pvalue:.3f}, {len(pairs)}"
    )
    for wrong in (asked % "p_holm", asked % "verdict", "{speedrun minus nothing|difference}"):
        with pytest.raises(ValueError):
            make_tables.filled(wrong, "speedrun_cpu")


def test_a_figure_that_an_answer_asks_for_in_vain_is_told():
    label = stages.load_stage("stage1_cpu").references_first()[0]
    asked = f"{{{label}|lost}}"
    with pytest.raises(ValueError) as told:
        make_tables.filled(f"It is {asked}.", "stage1_cpu")
    assert f"{asked} names no figure there is: choose from interval, " in str(told.value)


def test_a_notebook_of_another_measure_shows_it_and_no_verdict(copy, monkeypatch):
    """Of rows and curves of a stage that is there, with pass rates in them."""
    rows, curves = (
        pd.read_csv(f"experiments/{kind}_moe_topk_cpu.csv") for kind in ("results", "log_curves")
    )
    rows = rows.assign(stage="solved", pass_at_1=1 / rows.final_loss)
    for name in ("results", "results_solved"):
        rows.to_csv(f"experiments/{name}.csv", index=False)
    curves.assign(pass_at_1=1 / curves.val_loss).to_csv("experiments/log_curves_solved.csv")
    stages.write_stage("solved", {"extends": "moe_topk_cpu", "measure": "pass_at_1"})
    stage_gate.write_gate("solved")
    answer = "It solves {top 1|pass_at_1}, {top 1|difference} more."
    monkeypatch.setattr(
        make_notebook, "ANSWER", make_notebook.ANSWER.replace("Not yet written.", answer)
    )
    assert make_notebook.main(["solved"]) == 0
    made = nbformat.read("notebooks/solved.ipynb", as_version=4)
    source = "\n".join(cell.source for cell in made.cells)
    assert "does not judge it" in source and "_gate.csv" not in source
    table = pd.read_csv("experiments/tables/moe_topk_cpu.csv").set_index("variant")
    outputs = said(made)
    assert "higher is better" in " ".join(outputs) and "{" not in outputs[-1].split("It solves")[1]
    (rate,) = re.findall(r"It solves (0\.\d{4}), ", outputs[-1])
    assert float(rate) == pytest.approx(1 / table.final_loss["top 1"], abs=1e-3)


def test_what_cannot_be_made_is_one_sentence(copy, capsys):
    assert make_notebook.main(["tou"]) == 2
    assert "STAGE tou: choose one of" in capsys.readouterr().err
    unstudied = next(
        name
        for name in stages.stage_names()
        if not Path(f"experiments/results_{name}.csv").exists()
    )
    assert make_notebook.main([unstudied]) == 1
    error = capsys.readouterr().err
    assert not Path(f"notebooks/{unstudied}.ipynb").exists(), "nothing half made is left"
    assert (
        f"STAGE {unstudied} has no run in experiments/results.csv or " in error
        and error.count("\n") == 1
    )
