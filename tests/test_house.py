"""The form of the house: sizes, layout, directions of imports, presets, a README that is true."""

import ast
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
import torch
import mutants
from conftest import TINY

import harness
import rl_tasks
from harness.run import Run
import train_gpt
from harness.ranks import Ranks
from train_gpt import Config, axes

ROOT = Path(train_gpt.__file__).parent
README = (ROOT / "README.md").read_text()
PYTHON = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not any(part == "build" or part[0] == "." for part in path.relative_to(ROOT).parts)
)
TRAINER = [ROOT / "train_gpt.py"]
HARNESS = sorted((ROOT / "scripts" / "harness").glob("*.py"))
OPS = sorted((ROOT / "scripts" / "ops").glob("*.py"))
STORE = sorted((ROOT / "scripts" / "store").glob("*.py"))
LAYOUT = ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER")


# Size


def docstring_lines(text):
    """The numbers of the lines that docstrings are on."""
    lines = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node) is not None:
                lines |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return lines


def count_tokens(text):
    """Words of a Python text without comments, docstrings and layout; an f-string is one."""
    docstrings, count, depth = docstring_lines(text), 0, 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if depth == 0 and kind not in LAYOUT and token.start[0] not in docstrings:
            count += 1
        depth += kind == "FSTRING_START"  # Python 3.12 and later take f-strings apart
        depth -= kind == "FSTRING_END"
    return count


def parts_of(text):
    """[(name, tokens)] of the functions and classes at the top of a text, the largest first."""
    lines = text.splitlines(keepends=True)
    parts = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts.append(
                (node.name, count_tokens("".join(lines[node.lineno - 1 : node.end_lineno])))
            )
    return sorted(parts, key=lambda part: -part[1])


def test_tokens_are_counted_the_same_under_every_python():
    text = '''"""Doc."""


def f(a, *, b=1):  # no word
    """Doc."""
    return f"{a!r:>{b}} {f'{b}'}" + (
        "x"
    )
'''
    assert count_tokens(text) == 18


@pytest.mark.parametrize(
    "place, files, limit",
    [
        ("train_gpt.py", TRAINER, 18_000),
        ("scripts/harness", HARNESS, 12_500),
        ("scripts/ops", OPS, 8_700),
        ("scripts/store", STORE, 4_100),
    ],
)
def test_tokens_have_a_limit(place, files, limit):
    """What does not fit must push something weaker out."""
    texts = {path: path.read_text() for path in files}
    total = sum(map(count_tokens, texts.values()))
    parts = [
        (tokens, f"{path.name}:{name}") for path in files for name, tokens in parts_of(texts[path])
    ]
    largest = ", ".join(f"{name} {tokens}" for tokens, name in sorted(parts, reverse=True)[:8])
    assert total <= limit, f"{place}: {total} tokens, {total - limit} too many; largest: {largest}"


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_classes_have_a_limit(path):
    """Lines: a function 60, `main` and `train` 90, a class 180."""
    too_long = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        limit = 90 if node.name in ("main", "train") else 60
        if isinstance(node, ast.ClassDef):
            limit = 180
        lines = node.end_lineno - node.lineno + 1
        if lines > limit:
            too_long.append(f"{node.name} has {lines} lines, {lines - limit} too many")
    assert not too_long


def test_a_formatter_owns_the_layout():
    """Ruff formats to 100 columns; longer lines, of text, are broken by hand."""
    for command in (
        ["format", "--check"],
        ["check", "--select", "E501", "--output-format=concise"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, ROOT], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


# Direction of imports


def imports_of(path):
    """The first word of every module that a file imports, wherever in the file."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").split(".")[0])
    return modules


def test_wrong_lines_for_the_tests_have_their_place():
    """Each of tests/mutants.py is in its file once, and the tests that have to notice are there."""
    assert not mutants.misplaced()
    names = [mutant.name for mutant in mutants.MUTANTS]
    assert len(names) == len(set(names)) >= 130
    for words in {mutant.tests for mutant in mutants.MUTANTS}:
        file, _, test = words.partition("::")
        assert not test or f"def {test}(" in (ROOT / file).read_text(), words


def test_imports_point_one_way():
    """Scripts to train_gpt to ops to harness to store; nothing imports a package `scripts`."""
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} | {"cached_fineweb10B"}
    for path in HARNESS:
        assert "ops" not in imports_of(path), path
    for path in STORE:
        assert not imports_of(path) & {"ops", "harness", "torch"}, path
    for path in HARNESS + OPS + STORE:
        assert not imports_of(path) & {*scripts, "train_gpt", "scripts"}, path
    assert not imports_of(ROOT / "train_gpt.py") & {*scripts, "scripts"}
    for path in PYTHON:
        assert "scripts" not in imports_of(path), path


def names_no_encoding(call):
    """Whether a call reads or writes text as the locale has it."""
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if isinstance(call.func, ast.Name) and call.func.id == "open":
        mode = ast.unparse(call.args[1]) if len(call.args) > 1 else given.get("mode", "")
        return "b" not in mode and "encoding" not in given
    if name in ("read_text", "write_text"):
        return len(call.args) < 1 + (name == "write_text") and "encoding" not in given
    return given.get("text") == "True" and "encoding" not in given


def test_text_is_utf_8_whatever_the_locale():
    assert names_no_encoding(ast.parse("open('x')").body[0].value)
    assert not names_no_encoding(ast.parse("open('x', 'rb')").body[0].value)
    tests = {path for path in PYTHON if path.parent.name == "tests"}
    for path in {*PYTHON} - tests:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert [ast.unparse(call) for call in calls if names_no_encoding(call)] == [], path


def test_no_module_is_loaded_twice():
    """Under two names, a class would not be itself."""
    files = [m.__file__ for m in [*sys.modules.values()] if getattr(m, "__file__", None)]
    ours = [file for file in files if file.startswith(str(ROOT / "scripts"))]
    assert len(ours) == len(set(ours)) and harness.__file__ in ours


def test_scripts_need_no_path_tricks_but_for_the_one_that_finds_the_trainer():
    for path in {*(ROOT / "scripts").glob("*.py")} - {ROOT / "scripts/require_packages.py"}:
        attributes = [
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)
        ]
        assert "sys.path" not in map(ast.unparse, attributes), path


def test_the_harness_knows_no_model():
    """Not even by name."""
    words = re.compile(r"\b(expert|router|attention|mixer|n_layer|n_embd|muon|GPT)", re.I)
    for path in HARNESS + STORE:
        tree = ast.parse(path.read_text())
        names = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
        names += [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        assert not [name for name in names if words.search(name)], path


def test_a_loop_talks_to_one_object_by_few_methods():
    public = [name for name in vars(Run) if name[0] != "_" and callable(getattr(Run, name))]
    assert len(public) <= 8, public


def test_a_foreign_package_of_the_same_name_does_no_harm(tmp_path):
    """Ours comes first, also when PYTHONPATH has packages of these names."""
    for name in ("harness", "store", "scripts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('a foreign package')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "DRY_RUN": "1"}
    for command in ([ROOT / "train_gpt.py"], ["-c", "import train_gpt; print(train_gpt.Run)"]):
        done = subprocess.run(
            [sys.executable, *command], env=env, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_the_trainer_can_be_copied(tmp_path, settings):
    """With its packages beside it, in an empty folder, it trains; the default needs no file."""
    copy = tmp_path / "elsewhere"
    for package in ("harness", "ops", "store"):
        shutil.copytree(ROOT / "scripts" / package, copy / "scripts" / package)
    shutil.copy(ROOT / "train_gpt.py", copy)
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train_gpt.py"]
    dry = subprocess.run(
        command, env=env | {"DRY_RUN": "1"}, cwd=copy, capture_output=True, text=True
    )
    assert "params_total:123568128" in dry.stdout, dry.stderr
    env |= {name: str(value) for name, value in settings.items()}
    run = subprocess.run(command, env=env, cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0 and "status: ok" in run.stdout, run.stderr
    assert (settings["LOG_DIR"] / "toy" / "model.safetensors").is_file()


# Presets


@pytest.mark.parametrize(
    "preset", sorted((ROOT / "experiments" / "presets").glob("*.env")), ids=lambda path: path.stem
)
def test_a_shell_reads_the_same_preset(preset):
    dump = f"{sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    script = f"set -a; . {preset}; {dump}"
    shell = subprocess.run(
        ["bash", "-c", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, check=True
    )
    name = {"PRESET": preset.stem}
    assert Config.from_env(json.loads(shell.stdout) | name) == Config.from_env(name)


def test_readme_axes_are_those_of_the_code():
    """Every axis is there, and what is there lives; a value that a change adds need not be."""
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


def test_readme_task_is_one():
    example = re.search(r"```python\n(class Sort.*?)```", README, re.S)[1]
    names = {"Strings": rl_tasks.Strings}
    exec(example, names)
    task = names["Sort"]()
    prompt = task.prompt(np.random.default_rng(0), 4)
    assert re.fullmatch("[a-z]{4}~", prompt) and task.answer("dacb~") == "abcd"
    assert task.reward("dacb~", "abcd") == 1 and task.reward("dacb~", "abdc") == 0
    assert task.key(prompt) == prompt[:-1] and "~" in task.characters


def test_readme_names_what_exists():
    others = ("DATA_DIR", "ALLOW_UNKNOWN", "SEEDS")  # of the fetcher, the reading, run_stage.py
    for name in re.findall(r"\b([A-Z][A-Z_]{3,})=", README):
        assert hasattr(Config, name.lower()) or name in others, name
    for axis in re.findall(
        r"^\| [^|`]+ \| `([A-Z]+)` \| [^|]*(?:class|function|Module)", README, re.M
    ):
        assert isinstance(getattr(train_gpt, axis), dict), axis
    presets = {path.stem for path in (ROOT / "experiments" / "presets").glob("*.env")}
    rows = re.findall(r"^\| ((?:`[\w.]+`[ ,]*)+)\| ", README, re.M)
    assert presets == set(re.findall(r"`([a-z][\w.]+)`", " ".join(rows)))
    for path in re.findall(r"(?:python|bash) ((?:scripts/)?\w+\.(?:py|sh))", README):
        assert (ROOT / path).is_file(), path
    assert len(README.splitlines()) <= 250


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
    state = patched.State.build(cfg, Ranks())
    tokens = torch.randint(0, 64, (2, 17))
    torch.nn.init.normal_(state.model.blocks[0].mixer.proj.weight)
    state.model(tokens[:, :-1], tokens[:, 1:])[0].backward()
    assert state.model.blocks[0].mixer.gate_output.score.weight.grad.abs().max() > 0
    assert "squared" in patched.help_text()
