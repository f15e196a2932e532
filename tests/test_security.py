"""Records show no secret, a run writes in its place alone, nothing from elsewhere is unpickled."""

import ast
import contextlib
import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch  # noqa: F401  once here, not in every forked run
import torch
import torch._dynamo  # noqa: F401  makes every model on the meta device load it
from conftest import Job, launch, points, summary

from harness.checkpoints import Checkpoints, defect
from harness.settings import ROOT
from store.contract import ConfigError
from store.files import sha256sum
from store.secrets import redact, secrets_of
from load_model import load_trained
import train_gpt
from ops import sharding

MARK = "Zq7xCanary"
SECRETS = {
    name: f"{MARK}/{name.lower()}/{MARK}"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD")
}
STEP = {"SAVE_EVERY": 4}  # checkpoints after steps 4 and 8


def leaks(folder, *texts):
    """Where a part of a secret stands: in names and bytes of files below the folder, in texts."""
    found = [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if MARK in path.name or path.is_file() and MARK.encode() in path.read_bytes()
    ]
    return found + [text for text in texts if MARK in text]


def run(env, world=1):
    """(exit codes, what each rank printed)"""
    job = Job(env, world)
    codes, _ = job.wait()
    return codes, [job.output(rank) for rank in range(world)]


def tree(folder, *without):
    """{path: contents or target of a link} below the folder, without what lies below `without`."""
    return {
        str(path): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
        if not {path, *path.parents} & set(without)
    }


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return tmp_path_factory.mktemp("template") / "logs"


@pytest.fixture
def trained(settings, template):
    """The settings of a finished run, which is made once for all tests and copied."""
    if template.exists():
        shutil.copytree(template, settings["LOG_DIR"])
    else:
        codes, out = launch(settings | STEP)
        assert codes == [0], out
        shutil.copytree(settings["LOG_DIR"], template)
    return settings | STEP


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, sentinel):
        self.sentinel = str(sentinel)

    def __reduce__(self):
        return os.mkdir, (self.sentinel,)


@pytest.fixture
def bomb(tmp_path):
    """(the folder that must not appear, a pickle that makes it)"""
    sentinel = tmp_path / "sentinel"
    text = pickle.dumps(Bomb(sentinel))
    pickle.loads(text)
    sentinel.rmdir()  # it does what it should
    return sentinel, text


def hide_in_checkpoint(path, text):
    """Replaces the metadata of a checkpoint by another pickle and lists the hashes anew."""
    (path / ".metadata").write_bytes(text)
    (path / "SHA256SUMS").unlink()
    (path / "SHA256SUMS").write_text("".join(map(sha256sum, sorted(path.iterdir()))))
    assert defect(path) == ""  # to the hashes it is as good as any


def val_losses(settings):
    return [
        (int(point["step"]), float(point["val_loss"]))
        for point in points(settings)
        if point["val_loss"]
    ]


# Secrets


def test_a_run_shows_no_secret(settings, tmp_path):
    codes, out = run(settings | STEP | SECRETS, 2)
    assert codes == [0, 0], out
    assert leaks(tmp_path, *out) == []
    assert {
        "toy.txt",
        "toy.csv",
        "toy.json",
        "model.safetensors",
        "config.json",
        "__0_0.distcp",
        "__1_0.distcp",
        ".metadata",
        "run.json",
        "results.csv",
    } <= {path.name for path in tmp_path.rglob("*")}  # all were looked at


def test_short_values_and_other_names_are_no_secrets(settings, tmp_path):
    """And so a value that is none does get into row, summary and output, where it is found."""
    others = {
        "HF_TOKENS": MARK,
        "MY_TOKEN_FILE": MARK,
        "KEYS": MARK,
        "PWD": MARK,
        "A_TOKEN": MARK[:7],
        "PATH_KEY": "",
    }
    assert secrets_of(others | SECRETS | {"VAL_TOKENS": "10485760"}) == SECRETS
    assert secrets_of(
        {"A_TOKEN": "1234567", "B_TOKEN": "12345678", "PGPASSWORD": "12345678"}
    ).keys() == {"B_TOKEN", "PGPASSWORD"}
    codes, (out,) = run(
        settings | others | {"NOTE": MARK, "INPUT_BIN": f"{tmp_path}/nowhere/{MARK}*.bin"}
    )
    assert codes == [3] and MARK in out
    assert leaks(tmp_path) == ["logs/toy.json", "results.csv"]
    codes, (out,) = run(settings | others | {"NOTE": MARK, "DRY_RUN": 1})
    assert codes == [0] and f"note:{MARK}\n" in out


def test_a_dry_run_shows_no_secret(settings, tmp_path):
    codes, out = run(settings | SECRETS | {"DRY_RUN": 1})
    assert codes == [0] and leaks(tmp_path, *out) == []
    codes, out = run(settings | SECRETS | {"DRY_RUN": 1, "NOTE": f"a {SECRETS['MY_SECRET']}"})
    assert codes == [2] and leaks(tmp_path, *out) == [] and not (tmp_path / "logs").exists()


def test_a_crash_shows_no_secret(settings, tmp_path, monkeypatch):
    """Neither in the message nor in what it follows from, nor in the stacks of a hang."""
    steps, step = itertools.count(), train_gpt.train_step

    def crash(*args):
        if next(steps) < 3:
            return step(*args)
        secret, deadline = SECRETS["HF_TOKEN"], time.monotonic() + 30
        while (
            not (tmp_path / "logs/toy/stacks_rank0.txt").stat().st_size
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        try:
            raise KeyError(secret)
        except KeyError:
            raise RuntimeError(
                f"no access with {secret},\nnor with {SECRETS['DB_PASSWORD']}"
            ) from None

    monkeypatch.setattr(train_gpt, "train_step", crash)
    codes, (out,) = run(settings | SECRETS | {"HANG_TIMEOUT": 1, "SAVE_EVERY": 2})
    assert codes == [1] and "no access with [HF_TOKEN],\nnor with [DB_PASSWORD]" in out
    assert leaks(tmp_path, out) == []
    assert "in crash" in (tmp_path / "logs/toy/stacks_rank0.txt").read_text()
    error = summary(settings)["error"]
    assert error == "RuntimeError: no access with [HF_TOKEN],"
    assert "[DB_PASSWORD]" in (tmp_path / "logs/toy/error.txt").read_text()
    assert "[DB_PASSWORD]" in (tmp_path / "logs/toy.txt").read_text()


def test_a_crash_of_another_rank_shows_no_secret(settings, tmp_path, monkeypatch):
    step = train_gpt.train_step

    def crash(*args):
        if train_gpt.dist.get_rank():
            raise ValueError(f"bad {SECRETS['WANDB_API_KEY']}")
        return step(*args)

    monkeypatch.setattr(train_gpt, "train_step", crash)
    codes, out = run(settings | SECRETS, 2)
    assert codes == [1, 1] and "bad [WANDB_API_KEY]" in out[1] and leaks(tmp_path, *out) == []
    assert "bad [WANDB_API_KEY]" in (tmp_path / "logs/toy/error.txt").read_text()


def test_a_checkpoint_that_cannot_be_written_shows_no_secret(settings, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(f"{SECRETS['MY_SECRET']} is refused")

    monkeypatch.setattr(Checkpoints, "publish", fail)
    codes, out = run(settings | SECRETS | STEP)
    assert codes == [1] and "no checkpoint" in out[0] and "[MY_SECRET] is refused" in out[0]
    assert leaks(tmp_path, *out) == []


@pytest.mark.parametrize(
    "name", ["NOTE", "RUN_ID", "INPUT_BIN", "LR", "PRESET", "LOG_DIR", "RESULTS_CSV"]
)
def test_a_secret_in_a_setting_is_refused(settings, tmp_path, name):
    value = SECRETS["HF_TOKEN"].replace("/", "-")
    changes = {
        "HF_TOKEN": value,
        name: f"{tmp_path}/a-{value}" if name in ("LOG_DIR", "RESULTS_CSV") else f"a-{value}",
    }
    codes, (out,) = run(settings | SECRETS | changes)
    assert codes == [2] and len(out.splitlines()) == 1 and name in out and "HF_TOKEN" in out, out
    assert leaks(tmp_path, out) == []


def test_a_secret_on_the_command_line_is_not_repeated(settings, tmp_path, monkeypatch):
    main = train_gpt.main
    given = (SECRETS["HF_TOKEN"], "[HF_TOKEN]"), (f"--x={SECRETS['MY_SECRET']}", "--x")
    for i, (argument, said) in enumerate(given):
        monkeypatch.setattr(
            train_gpt, "main", lambda argv, env, argument=argument: main([argument], env)
        )
        codes, (out,) = run(settings | SECRETS | {"RUN_ID": f"toy{i}"})
        assert codes == [2] and said in out and "is no option" in out and len(out.splitlines()) == 1
        assert leaks(tmp_path, out) == [] and (tmp_path / f"logs/toy{i}.json").exists()


@pytest.mark.parametrize("name", ["HF_TOKEN", "--hf-token"])
def test_a_secret_that_only_the_command_line_has_is_not_repeated(
    settings, tmp_path, monkeypatch, name
):
    main = train_gpt.main
    monkeypatch.setattr(train_gpt, "main", lambda argv, env: main([f"{name}={MARK}"], env))
    codes, (out,) = run(settings)
    assert codes == [2] and name in out and leaks(tmp_path, out) == []


def test_a_path_that_cannot_be_used_shows_no_secret(settings, tmp_path):
    codes, out = run(settings | SECRETS | {"INPUT_BIN": f"{tmp_path}/nowhere/*.bin"})
    assert codes == [3] and "nowhere" in out[0] and leaks(tmp_path, *out) == []
    (tmp_path / "file").write_text("in the way")
    codes, out = run(settings | SECRETS | {"LOG_DIR": tmp_path / "file"})
    assert codes == [2] and "LOG_DIR" in out[0] and leaks(tmp_path, *out) == []


def test_a_secret_that_starts_like_another_hides_it_whole():
    env = {"A_KEY": "12345678", "B_KEY": "12345678-and-more"}
    for order in (list(env), list(env)[::-1]):
        told = redact("x 12345678-and-more y 12345678 z", {name: env[name] for name in order})
        assert told == "x [B_KEY] y [A_KEY] z"


@pytest.mark.parametrize(
    "value", ["quo\"te'd-and", "back\\slash-and", "two\nlines-and", "umläut-\x1b-and"], ids=ascii
)
def test_a_secret_is_hidden_also_as_python_and_json_spell_it(value):
    """An exception often holds repr(value); KeyError does so by itself."""
    for text in (
        f"{value}",
        str(KeyError(value)),
        f"{value!r}",
        json.dumps(value),
        f"{('x' + value)!a}",
    ):
        told = redact(f"no {text}", {"DB_PASSWORD": value})
        assert "-and" not in told and "[DB_PASSWORD]" in told, text


# The repository

CREDENTIALS = {  # pattern: an example in pieces, for this file is searched too
    r"\bhf_[A-Za-z0-9]{34}": "hf_" + "aB3x" * 9,
    r"\bgh[pousr]_[A-Za-z0-9]{36}": "ghp_" + "aB3x" * 9,
    r"\bgithub_pat_\w{22}": "github_pat_" + "aB3x" * 20,
    r"\bAKIA[0-9A-Z]{16}\b": "AKIA" + "AB3X" * 4,
    r"\bsk-[A-Za-z0-9_-]{20}": "sk-" + "proj-" + "aB3x" * 10,
    r"\bxox[bap]-[A-Za-z0-9-]{10}": "xoxb-" + "1234567890-" * 2,
    r"\bAIza[A-Za-z0-9_-]{35}": "AIza" + "aB3x-" * 7,
    r"-----BEGIN [A-Z ]*PRIVATE KEY": "-----BEGIN " + "OPENSSH " + "PRIVATE " + "KEY-----",
    r"(?i)\w*(key|token)[\"']?\s*[=:]\s*[\"']?[0-9a-f]{40}\b": "WANDB_API_"
    + "KEY="
    + "0123abcd" * 5,
    r"(?i)(api_?key|token|secret|password)[\"']?\s*[=:]\s*"
    r"([\"'])(?![^\"']*(secret|example))[^\"'\s]{16,}\2": "pass" + "word: 'correct-horse-battery'",
}
HOME = r"(?<![\w.])/(?:home|Users|root)/\w"
IMAGE = r'"image/png": "[^"]*"'  # of a notebook, letters by chance


def tracked():
    """The repository's files; all that lie here where git does not know."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = subprocess.run(
            ["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True
        )
        if git.stdout:
            return sorted(
                {ROOT / name for name in git.stdout.split("\0") if (ROOT / name).is_file()}
                | {Path(__file__).resolve()}
            )
    left_out = {".git", ".venv", "logs", "data", "__pycache__", ".pytest_cache", ".ruff_cache"}
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not left_out & set(path.relative_to(ROOT).parts)
    ]


def test_the_repository_holds_no_credential_and_no_home_folder():
    files = {
        str(path.relative_to(ROOT)): re.sub(IMAGE, "", path.read_bytes().decode(errors="replace"))
        for path in tracked()
        if path.suffix != ".png"
    }
    assert {
        "train_gpt.py",
        "README.md",
        "tests/test_security.py",
        "scripts/test.sh",
    } <= files.keys()
    for pattern, example in CREDENTIALS.items():
        assert re.search(pattern, f"x = 1\n{example}\n")
        assert not [name for name, text in files.items() if re.search(pattern, text)], pattern
    assert all(
        re.search(HOME, f"see /{example}/data") for example in ("home/me", "Users/me", "root/x")
    )
    assert not [name for name, text in files.items() if re.search(HOME, text)]


CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "yaml.load",
    "np.load",
    "numpy.load",
    "torch.jit.load",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}


def dangers(source):
    """Calls and imports in a program that could run what a file or a setting says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            switches = {
                switch.arg for switch in node.keywords if getattr(switch.value, "value", True)
            }
            if ast.unparse(node.func) in CALLS or switches & {"shell", "allow_pickle"}:
                found.append(ast.unparse(node))
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if name.split(".")[0] in MODULES]
        if (
            isinstance(node, ast.ImportFrom)
            and {f"{node.module}.{alias.name}" for alias in node.names} & CALLS
        ):
            found.append(ast.unparse(node))
    return found


PROGRAMS = [
    ROOT / "train_gpt.py",
    ROOT / "cached_fineweb10B.py",
    *sorted((ROOT / "scripts").glob("*.py")),
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_programs_call_nothing_that_runs_data(path):
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(x)",
        "eval('1')",
        "exec(x)",
        "subprocess.run(x, shell=True)",
        "yaml.load(x)",
        "np.load(x, allow_pickle=True)",
        "subprocess.run(x, shell=y)",
        "from torch import load",
        "os.system(x)",
    ],
)
def test_what_looks_for_such_calls_finds_them(line):
    assert dangers(f"def f(x, y):\n    {line}\n")
    assert (
        dangers(
            "model.eval()\nre.compile('x')\ntext = 'eval(1); import pickle'\nrun(x, shell=False)"
        )
        == []
    )


# Paths


def test_a_run_id_is_no_path(settings, tmp_path, monkeypatch):
    logs, here = tmp_path / "deep/logs", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = tree(tmp_path, logs.parent, settings["RESULTS_CSV"])
    ids = [
        "../x",
        "../../x",
        "..",
        ".",
        "a/b",
        "a/../../x",
        f"{tmp_path}/x",
        "-x",
        ".x",
        "a\nb",
        "x\n",
        "x" * 101,
        "a b",
        "é",
        "a;b",
        "$x",
    ]
    for run_id in ids:
        codes, out = launch(settings | {"LOG_DIR": logs, "RUN_ID": run_id})
        assert codes == [2] and "RUN_ID=" in out and len(out.splitlines()) == 1, (run_id, out)
    after = tree(
        tmp_path,
        logs,
        logs.parent,
        settings["RESULTS_CSV"],
        Path(f"{settings['RESULTS_CSV']}.lock"),
    )
    assert after == before and [path.name for path in logs.parent.iterdir()] == ["logs"]
    names = {path.name for path in logs.iterdir()}
    assert all(re.fullmatch(r"refused-[\d-]+-[0-9a-f]{4}\.json", name) for name in names) and len(
        names
    ) == len(ids)


def test_a_run_folder_that_is_a_link_is_refused(settings, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "stop").write_text("mine")
    settings["LOG_DIR"].mkdir()
    (settings["LOG_DIR"] / "toy").symlink_to(elsewhere)
    codes, out = launch(settings)
    assert codes == [2] and "RUN_ID=toy" in out and "leads out of LOG_DIR" in out, out
    assert tree(elsewhere) == {str(elsewhere / "stop"): b"mine"}
    assert not (tmp_path / "logs/toy.txt").exists()


@pytest.mark.parametrize("way", ["absolute", "dots", "link", "linked folder"])
def test_a_checkpoint_outside_log_dir_is_not_read(trained, tmp_path, bomb, way):
    (sentinel, text), logs, outside = bomb, trained["LOG_DIR"], tmp_path / "outside"
    shutil.copytree(logs / "toy/step_000008", outside / "step_000008")
    hide_in_checkpoint(outside / "step_000008", text)
    (logs / "toy/step_000099").symlink_to(outside / "step_000008")
    (logs / "linked").symlink_to(outside)
    path = {
        "absolute": outside / "step_000008",
        "dots": f"{logs}/../outside/step_000008",
        "link": logs / "toy/step_000099",
        "linked folder": logs / "linked/step_000008",
    }[way]
    before = tree(outside)
    codes, out = launch(trained | {"RUN_ID": "new", "RESUME": path})
    assert codes == [2] and f"RESUME={path}: lies outside LOG_DIR" in out and "INIT_FROM" in out, (
        out
    )
    assert not sentinel.exists() and tree(outside) == before


def test_resume_auto_does_not_follow_a_link_out_of_log_dir(trained, tmp_path, bomb):
    (sentinel, text), logs, outside = bomb, trained["LOG_DIR"], tmp_path / "outside/step_000008"
    outside.parent.mkdir()
    (logs / "toy/step_000008").rename(outside)
    hide_in_checkpoint(outside, text)
    (logs / "toy/step_000008").symlink_to(outside)
    before = tree(outside)
    codes, out = launch(trained | {"RESUME": "auto"})
    assert not sentinel.exists() and tree(outside) == before
    assert codes == [0] and f"resumed:{logs}/toy/step_000004" in out, out


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(trained):
    folder = trained["LOG_DIR"] / "toy"
    for name in "step_000007", "model.safetensors":
        codes, out = launch(trained | {"RUN_ID": "new", "RESUME": folder / name})
        assert codes == [2] and f"RESUME={folder / name}" in out, out
        assert all(str(folder / there) in out for there in ("step_000004", "step_000008"))


def test_data_may_lie_anywhere_and_be_called_anything(settings, tmp_path, monkeypatch):
    """It is only read. A name with line ends makes no lines of its own."""
    for module in (train_gpt, sharding):  # lines that name a shard
        monkeypatch.setattr(module, "squared_norm", lambda tensors: torch.tensor(np.nan))
    folder = tmp_path / "my data"
    folder.mkdir()
    for i in "123":
        (tmp_path / f"toy_train_00000{i}.bin").rename(folder / f"toy {i}\nstep:7 train_loss:0.bin")
    before = tree(folder)
    codes, out = launch(settings | {"INPUT_BIN": f"{tmp_path}/my data/../my data/toy*.bin"})
    assert codes == [0] and tree(folder) == before, out
    lines = (settings["LOG_DIR"] / "toy.txt").read_text().split("=" * 100)[-1].splitlines()
    assert sum("bad_gradient" in line for line in lines) == 8
    assert [
        line for line in lines if line.startswith("step:") and not re.match(r"step:\d/8 ", line)
    ] == []


def test_records_that_are_links_do_not_lead_elsewhere(trained, tmp_path):
    """A resumed run goes on with log and curve of its own; what they led to stays as it is."""
    logs, elsewhere = trained["LOG_DIR"], tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in "toy.txt", "toy.csv", "toy.json":
        (logs / name).rename(elsewhere / name)
        (logs / name).symlink_to(elsewhere / name)
    shutil.rmtree(logs / "toy/step_000008")
    before = tree(elsewhere)
    codes, out = launch(trained | {"RESUME": "auto"})
    assert codes == [0] and "resumed:" in out, out
    assert tree(elsewhere) == before
    assert [step for step, _ in val_losses(trained)] == [0, 4, 8] and not (
        logs / "toy.csv"
    ).is_symlink()


@pytest.mark.parametrize(
    "names",
    [
        "stacks_rank0.txt",
        "live.lock",
        ".tmp_step_000004",
        ".tmp_model.safetensors model.safetensors config.json error.txt stop",
    ],
)
def test_a_link_in_the_run_folder_is_not_written_through(settings, tmp_path, names):
    folder, elsewhere = settings["LOG_DIR"] / "toy", tmp_path / "elsewhere"
    folder.mkdir(parents=True)
    elsewhere.mkdir()
    for name in names.split():
        (elsewhere / name).mkdir() if "step" in name else (elsewhere / name).write_text("mine")
        (folder / name).symlink_to(elsewhere / name)
    before = tree(elsewhere)
    codes, out = launch(settings | {"NUM_ITERATIONS": 4, "N_LAYER": 1})
    assert tree(elsewhere) == before and codes in ([0], [2]), out  # done or refused


# Pickles


@pytest.mark.parametrize("kind", ["torch.save", "safetensors in a folder", "checkpoint"])
def test_init_from_unpickles_nothing(settings, tmp_path, bomb, kind):
    (sentinel, text), folder = bomb, tmp_path / "weights"
    folder.mkdir()
    path = {
        "torch.save": folder / "x.pt",
        "checkpoint": folder / ".metadata",
        "safetensors in a folder": folder / "model.safetensors",
    }[kind]
    path.write_bytes(text)
    if kind == "torch.save":
        torch.save(Bomb(sentinel), path)
        torch.load(path, weights_only=False)
        sentinel.rmdir()
    given = path if path.suffix == ".pt" else folder
    codes, out = launch(settings | {"INIT_FROM": given})
    assert codes == [2] and f"config: INIT_FROM={given}: expected a safetensors file" in out, out
    assert not sentinel.exists() and "Traceback" not in out


def test_init_from_takes_the_weights_of_a_run_and_nothing_else(trained, monkeypatch):
    """The loss goes on where it was; optimizer and steps begin anew."""
    step, weights = train_gpt.train_step, trained["LOG_DIR"] / "toy"
    last, loss = val_losses(trained)[-1]
    assert last == 8 and abs(val_losses(trained)[0][1] - loss) > 0.01

    def fresh(state, *args):
        kept = {
            key: tensor
            for key, (tensor, _) in state.tensors().items()
            if not re.match("model|loss_scale", key)
        }
        assert kept and (state.step > 0) == any(tensor.any() for tensor in kept.values())
        return step(state, *args)

    monkeypatch.setattr(train_gpt, "train_step", fresh)
    for run_id, path in ("by-file", weights / "model.safetensors"), ("by-folder", weights):
        codes, out = launch(
            trained | {"RUN_ID": run_id, "INIT_FROM": path, "NUM_ITERATIONS": 2, "SEED": 1}
        )
        assert codes == [0], out
        (first, begun), *_ = val_losses(trained | {"RUN_ID": run_id})
        assert first == 0 and abs(begun - loss) < 1e-6


def test_init_from_weights_of_another_size_is_refused(trained):
    weights = trained["LOG_DIR"] / "toy/model.safetensors"
    codes, out = launch(trained | {"RUN_ID": "new", "INIT_FROM": weights, "N_EMBD": 64})
    (said,) = [line for line in out.splitlines() if line.startswith("config: ")]
    assert codes == [2] and f"INIT_FROM={weights}: expected" in said and "size mismatch" in said
    assert "Traceback" not in out


def test_a_checkpoint_whose_metadata_was_replaced_is_set_aside_unread(trained, bomb):
    (sentinel, text), folder = bomb, trained["LOG_DIR"] / "toy"
    (folder / "step_000008/.metadata").write_bytes(text)
    codes, out = launch(trained | {"RUN_ID": "new", "RESUME": folder / "step_000008"})
    assert codes == [2] and "RESUME=" in out and ".metadata is not what was written" in out, out
    codes, out = launch(trained | {"RESUME": "auto"})
    assert codes == [0] and "step_000008 is set aside: .metadata" in out and "resumed:" in out, out
    assert (folder / "step_000008.corrupt/.metadata").read_bytes() == text
    assert f"resumed:{folder}/step_000004" in out and not sentinel.exists()
    assert (
        hashlib.sha256((folder / "step_000008/.metadata").read_bytes()).digest()
        != hashlib.sha256(text).digest()
    )


@pytest.mark.parametrize("kind", ["checkpoint", "run", "link", "weights"])
def test_scripts_unpickle_nothing_from_outside_log_dir(trained, tmp_path, bomb, kind):
    """What sample.py, evaluate_model.py, export.py, rnn_demo.py and train_rl.py read models by."""
    sentinel, text = bomb
    run = shutil.copytree(trained["LOG_DIR"] / "toy", tmp_path / "elsewhere")
    step = max(run.glob("step_*"))
    hide_in_checkpoint(step, text)
    (run / "model.safetensors").write_bytes(text)
    name = step
    if kind == "run":
        (run / "model.safetensors").unlink()
        name = run
    elif kind == "link":
        name = trained["LOG_DIR"] / "link"
        name.symlink_to(step)
    elif kind == "weights":
        name = run
    words = "does not hold the weights" if kind == "weights" else "lies outside LOG_DIR="
    with pytest.raises(ConfigError, match=words):
        load_trained(str(name), trained["LOG_DIR"], "cpu")
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "name, value, shown",
    [
        ("DB_PASS", MARK, "it is [DB_PASS]"),
        ("token", MARK, "it is [token]"),
        ("SECRET", MARK, "it is [SECRET]"),
        ("APIKEY", MARK, "it is [APIKEY]"),
        ("MYSQL_PWD", MARK, "it is [MYSQL_PWD]"),
        ("SLACK_WEBHOOK_URL", MARK, "it is [SLACK_WEBHOOK_URL]"),
        ("DATABASE_URL", f"postgres://me:{MARK}@host/db", "it is [DATABASE_URL]"),
        ("MY_TOKEN_FILE", MARK, f"it is {MARK}"),
    ],
)
def test_secrets_are_known_by_words_of_their_names_and_within_urls(name, value, shown):
    assert redact(f"it is {MARK}", {name: value}) == shown
    assert redact("https://me:hunter22@host/x", {}) == "https://[hidden]@host/x"


@pytest.mark.parametrize("what", ["a link", "another owner"])
def test_a_checkpoint_with_a_link_or_of_another_user_is_not_loaded(trained, tmp_path, what):
    """Its .metadata is a pickle: whoever writes it could run code as who resumes."""
    newest = trained["LOG_DIR"] / "toy/step_000008"
    if what == "a link":
        (newest / ".metadata").unlink()
        os.mkfifo(tmp_path / "elsewhere")  # which nobody may read: that would wait for ever
        (newest / ".metadata").symlink_to(tmp_path / "elsewhere")
        reason = "it has links, which may lead to what is not of this run"
    else:
        if os.geteuid():
            pytest.skip("only root gives files away")
        os.chown(newest / ".metadata", 12345, -1)
        reason = "it belongs to another user"
    codes, out = launch(trained | {"RESUME": "auto"})
    assert codes == [0] and f"{newest} is set aside: {reason}" in out, out
    assert f"resumed:{trained['LOG_DIR']}/toy/step_000004" in out
