"""The form of the house: sizes, layering, presets that a shell can read, and a README that is true."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

import train_gpt
from train_gpt import Config, axes

ROOT = Path(train_gpt.__file__).parent
README = (ROOT / "README.md").read_text()
PYTHON = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not {".venv", "build"} & set(path.relative_to(ROOT).parts)
)
NODES = [
    (f"{path.relative_to(ROOT)}:{node.name}", node)
    for path in PYTHON
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, (ast.FunctionDef, ast.ClassDef))
]


def test_the_trainer_imports_no_script_and_scripts_need_no_path_tricks():
    assert not re.search(r"^\s*(from|import) (scripts|cached_fineweb10B)", train_gpt.SOURCE, re.M)
    for path in (ROOT / "scripts").glob("*.py"):
        used = [
            ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
        ]
        assert "sys.path" not in used, path


@pytest.mark.parametrize(
    "preset", sorted((ROOT / "experiments" / "presets").glob("*.env")), ids=lambda path: path.stem
)
def test_a_shell_reads_the_same_preset(preset):
    script = f"set -a; . {preset}; {sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    shell = subprocess.run(
        ["bash", "-c", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, check=True
    )
    name = {"PRESET": preset.stem}
    assert Config.from_env(json.loads(shell.stdout) | name) == Config.from_env(name)


def test_readme_axes_are_those_of_the_code():
    """A value that a change adds need not be in the table; one that is there must live, and every axis is there."""
    table = re.findall(r"^\| .+? \| `([A-Z_]+)` \| (.+?) \| (\w+) \|$", README, re.M)
    assert {name for name, _, _ in table} == {name.upper() for name in axes()} - {
        "DEVICE",
        "COMPILE",
    }
    for name, values, default in table:
        assert (
            set(values.split()) <= set(axes()[name.lower()])
            and getattr(Config, name.lower()) == default
        )
        assert default in values.split()


def test_readme_names_what_exists():
    listed = README.split("And by number or switch: `")[1].split("`")[0].split()
    assert not [name for name in listed if not hasattr(Config, name.lower())]
    for name in re.findall(r"\b([A-Z][A-Z_]{3,})=", README):
        assert hasattr(Config, name.lower()) or name == "DATA_DIR", name
    presets = {path.stem for path in (ROOT / "experiments" / "presets").glob("*.env")}
    rows = re.findall(r"^\| ((?:`\w+`[ ,]*)+)\| ", README, re.M)
    assert presets == set(re.findall(r"`([a-z]\w+)`", " ".join(rows)))
    for path in re.findall(r"(?:python|bash) ((?:scripts/)?\w+\.(?:py|sh))", README):
        assert (ROOT / path).is_file(), path
    assert len(README.splitlines()) <= 200


def test_the_gate_of_the_readme_is_two_hunks_and_trains(tmp_path):
    """What a newcomer does: a class of 15 lines or fewer before the dict, an entry in it."""
    example = re.search(r"```python\n(class SquaredGate.*?)```", README, re.S)[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    source = train_gpt.SOURCE.replace("\nGATES = {", f"\n{example}\n\nGATES = {{")
    source = source.replace('"const": ConstGate', '"const": ConstGate, "squared": SquaredGate')
    path = tmp_path / "patched_train_gpt.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("patched_train_gpt", path)
    patched = sys.modules["patched_train_gpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(patched)
    cfg = patched.Config(**TINY | {"attngate": "squared"})
    state = patched.State.build(cfg, patched.Ranks())
    tokens = torch.randint(0, 64, (2, 17))
    torch.nn.init.normal_(state.model.blocks[0].mixer.proj.weight)
    state.model(tokens[:, :-1], tokens[:, 1:])[0].backward()
    assert state.model.blocks[0].mixer.gate_output.score.weight.grad.abs().max() > 0
    assert "squared" in patched.help_text()
