"""Makes the notebook of a stage where there is none, and runs notebooks in place, to keep output.

    python scripts/make_notebook.py stage1_cpu     # notebooks/stage1_cpu.ipynb
    python scripts/make_notebook.py                # runs all of notebooks/ again

A notebook has four parts: the question, the data, plots, the answer; the last is for you to write,
and stays. Its figures are not typed: {elementwise|difference} becomes that cell of the table when
the notebook is run, {elementwise minus headwise|difference} compares those two; see
make_tables.filled. It reads nothing but experiments/.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from stages import Stage, load_stage
from store.files import write_whole

FOLDER = Path("notebooks")
OPENING = """%matplotlib inline
%cd -q ..
import sys
sys.path.insert(0, "scripts")
from IPython.display import Markdown, display
import make_tables, plot_ablation
from stages import load_stage"""
DATA = """rows = make_tables.rows_of(stage.name)
display(Markdown(make_tables.markdown(stage, make_tables.table(stage, rows), rows)))"""
VERDICT = (
    """import pandas as pd

gate = pd.read_csv(f"experiments/tables/{stage.name}_gate.csv")
columns = "variant verdict reason time_to_target reference_time_to_target".split()
pd.set_option("display.max_colwidth", None)
display(gate[gate.kind == "variant"][columns]"""
    """.style.hide(axis="index").format(precision=4, na_rep=""))"""
)
STEPS = """steps = pd.read_csv(f"experiments/tables/{stage.name}_steps.csv")
display(steps.style.hide(axis="index").format(precision=4, na_rep=""))"""
ANSWER = '''answer = """
Not yet written.
"""  # {VARIANT|difference} in it becomes that cell of the table, {VARIANT|interval} the interval
display(Markdown(make_tables.filled(answer, stage.name)))'''
PLOTS = """for figure in plot_ablation.figures(stage.name).values():
    display(figure)"""


def verdict_cells(stage: Stage) -> list[nbformat.NotebookNode]:
    """The cells on what the gate says of a stage, where it says anything."""
    if not stage.compares_losses:
        text = f"The gate, whose rules are about losses, does not judge it: {stage.measure} counts."
        return [new_markdown_cell(text)]
    return [
        new_markdown_cell(
            "The gate compares at the last step that both have, and takes the noise of seeds "
            "and the number of looks into account:"
        ),
        new_code_cell(VERDICT),
        new_markdown_cell("Differences at every step that both have:"),
        new_code_cell(STEPS),
    ]


def new(stage: Stage) -> nbformat.NotebookNode:
    """The notebook of a stage, not yet run, its answer not yet written."""
    return new_notebook(
        cells=[
            new_markdown_cell(f"# {stage.name}\n\n{stage.question}"),
            new_code_cell(f"{OPENING}\nstage = load_stage({stage.name!r})"),
            new_markdown_cell("## Data"),
            new_code_cell(DATA),
            *verdict_cells(stage),
            new_markdown_cell("## Plots"),
            new_code_cell(PLOTS),
            new_markdown_cell("## Answer"),
            new_code_cell(ANSWER),
        ],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        },
    )


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the output of all its cells, run where it lies. Raises
    CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--log-level=40"],  # errors only
    )
    client.execute()
    for number, cell in enumerate(notebook.cells):  # nothing that differs from run to run
        cell["id"] = f"cell{number}"
        cell.metadata.pop("execution", None)
    return notebook


def main(argv: list[str] | None = None) -> int:
    """Makes and runs notebooks; exit code 0, 1 where one fails, 2 with one sentence where a stage
    is unknown."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", nargs="*", help="only the notebooks of these")
    args = parser.parse_args(argv)
    made = set()
    try:
        paths = [FOLDER / f"{name}.ipynb" for name in args.stage]
        for name, path in zip(args.stage, paths):
            if not path.exists():
                write_whole(path, nbformat.writes(new(load_stage(name))) + "\n")
                made.add(path)
        for path in paths or sorted(FOLDER.glob("*.ipynb")):
            write_whole(path, nbformat.writes(execute(path)) + "\n")
            print(path)
    except ValueError as error:
        print(f"make_notebook.py: error: {error}", file=sys.stderr)
        return 2
    except CellExecutionError as error:
        print(f"make_notebook.py: error: {path}: {error.evalue}", file=sys.stderr)
        if path in made:
            path.unlink()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
