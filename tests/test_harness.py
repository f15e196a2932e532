"""The harness by itself: any settings, the hash of a source, older rows, older checkpoints."""

import csv
import dataclasses
import json
import re
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import launch, rows, run_ranks

import published
import split_results
import train_gpt
from store import source
from harness.meter import model_of
from harness.ranks import Ranks, setup
from harness.records import truncate_to_step
from harness.run import command_of
from harness.settings import Settings
from store.tables import update_results
from store.contract import ConfigError
from store.files import sha256sum
from store.source import code_tokens, source_hash, text_hash
from train_gpt import Config

TEXT = '''"""A program."""

import math


class Shape:
    """Has an area."""

    sides: int = 4  # how many

    def name(self, *, short=False):
        """How it is called."""
        label = f"{'sq' if short else 'square'}: {self.sides!r:>{8}}"
        return [
            label,
            math.pi,
        ]
'''
SAME = {
    "comments": TEXT.replace("  # how many", "").replace("import math", "# for pi\nimport math"),
    "docstrings": TEXT.replace('"""Has an area."""', '"""Another\n    sentence."""'),
    "no docstring": TEXT.replace('        """How it is called."""\n', ""),
    "blank lines": TEXT.replace("\n\n", "\n\n\n").replace("return [", "\n        return ["),
    "layout": TEXT.replace(
        "[\n            label,\n            math.pi,\n        ]", "[label, math.pi]"
    ),
    "indentation": TEXT.replace("    ", "  "),
}
OTHER = {
    "a number": TEXT.replace("= 4", "= 5"),
    "text in an f-string": TEXT.replace("'sq'", "'sqr'"),
    "a space in an f-string": TEXT.replace(": {self", ":  {self"),
    "the order": TEXT.replace("label,\n            math.pi", "math.pi,\n            label"),
    "a block": TEXT.replace("        return [", "    return ["),
    "a string that is used": TEXT.replace("label = f", "label = '' f"),
}


@pytest.mark.parametrize("change", SAME)
def test_what_does_nothing_is_the_same_source(change):
    assert SAME[change] != TEXT and code_tokens(SAME[change]) == code_tokens(TEXT)


@pytest.mark.parametrize("change", OTHER)
def test_what_does_something_is_another_source(change):
    assert OTHER[change] != TEXT and source_hash(OTHER[change]) != source_hash(TEXT)


def test_a_comma_that_makes_a_tuple_counts_and_no_other():
    for one, exploded in (("f(x)", "f(\n    x,\n)"), ("[x]", "[x,]"), ("{x}", "{x,}")):
        assert code_tokens(one) == code_tokens(exploded)
    assert code_tokens("x[1]") != code_tokens("x[1,]") and code_tokens("return (x)") != code_tokens(
        "return (x,)"
    )
    assert code_tokens("x = (1,)") != code_tokens("x = (1)")
    assert code_tokens("x = (1, 2,)") == code_tokens("x = (1, 2)")
    assert code_tokens("f(a, (b,), )") == code_tokens("f(a, (b,))") != code_tokens("f(a, (b))")


def test_every_python_hashes_alike():
    """Written down under Python 3.11, which has an f-string as one token; 3.12 takes it apart."""
    assert text_hash(TEXT) == "5898df1958c9"


def test_formulas_are_part_of_the_source(monkeypatch):
    """Of whatever program: scripts/ops/ decides on its results as its own text does."""
    before = source_hash(TEXT)
    monkeypatch.setattr(source, "OPS", f"# a comment\n{source.OPS}")
    assert source_hash(TEXT) == before
    monkeypatch.setattr(source, "OPS", source.OPS.replace("3.4445", "3.4446"))
    assert source_hash(TEXT) != before


def test_what_a_program_imports_of_the_project_is_part_of_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "PLACES", (tmp_path / "scripts", tmp_path))
    for name in ("idea.py", "of_idea.py", "parts/__init__.py", "parts/one.py"):
        (tmp_path / "scripts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "scripts" / name).write_text("FACTOR = 1\n")
    (tmp_path / "beside.py").write_text("import json, of_idea as other\n")
    programs = {
        "idea.py": f"{TEXT}\nfrom idea import FACTOR\n",
        "parts/one.py": f"{TEXT}\ndef late():\n    import math, parts.one as one\n",
        "of_idea.py": f"{TEXT}\nimport beside\n",
    }
    before = {name: source_hash(program) for name, program in programs.items()}
    assert len({*before.values()}) == 3
    for changed in programs:
        path = tmp_path / "scripts" / changed
        path.write_text("FACTOR = 1  # as before\n")
        assert {name: source_hash(program) for name, program in programs.items()} == before
        path.write_text("FACTOR = 2\n")
        after = {name: source_hash(program) for name, program in programs.items()}
        assert [name for name in programs if after[name] != before[name]] == [changed]
        path.write_text("FACTOR = 1\n")
    assert source.modules_text(train_gpt.SOURCE) == "", "of the trainer all is counted elsewhere"
    assert source.modules_text("import idea", lambda _: "") == ""
    whole = programs["idea.py"] + "FACTOR = 1\n"
    assert source_hash(whole) == text_hash(whole + source.OPS), "what is there counts once"


def test_a_run_says_which_source_and_harness_it_had(settings):
    assert launch(settings | {"NUM_ITERATIONS": 1, "WARMDOWN_ITERS": 0})[0] == [0]
    (row,) = rows(settings)
    assert row["source_sha"] == source_hash(train_gpt.SOURCE)
    assert len(row["harness_sha"]) == 12 and row["harness_sha"] != row["source_sha"]
    log = (settings["LOG_DIR"] / "toy.txt").read_text()
    assert train_gpt.SOURCE in log and "class Records:" in log and "def chunked_wkv(" in log


@dataclasses.dataclass(frozen=True)
class Own(Settings):
    """Settings of another program."""

    preset: str = "own"  # is the default, and needs no file
    width: int = 3  # of something
    kind: str = "round"  # one of two
    shapes: str = "round"  # several of them

    LISTS = ("shapes",)
    BOUNDS = {"width": (1, 9)}
    SYNONYMS = {"SIZE": "WIDTH"}
    NOT_HASHED = ("preset",)

    @classmethod
    def choices(cls):
        return {"kind": ("round", "square"), "shapes": ("round", "square")}

    def check(self):
        self.require(self.kind == "round" or self.width > 1, "width", "2 or more for KIND=square")


def test_any_dataclass_is_read_from_the_environment():
    cfg = Own.from_env({"WIDTH": "4", "SHAPES": "round,square", "PATH": "/bin"})
    assert (cfg.width, cfg.shapes, cfg.preset) == (4, "round,square", "own")
    assert cfg.changes() == {"WIDTH": 4, "SHAPES": "round,square"}
    assert cfg.hash() != Own().hash() == Own(preset="own").hash()


@pytest.mark.parametrize(
    "env, sentence",
    [
        ({"WIDTH": "x"}, "WIDTH='x': must be a whole number"),
        ({"WIDTH": "10"}, "WIDTH=10: must lie between 1 and 9"),
        ({"KIND": "flat"}, "KIND=flat: choose one of round, square"),
        ({"SHAPES": "round,flat"}, "SHAPES=flat: choose one of round, square"),
        (
            {"SIZE": "2"},
            "SIZE is no setting; the name here is WIDTH (unset SIZE, or set ALLOW_UNKNOWN=1)",
        ),
        ({"KIND": "square", "WIDTH": "1"}, "WIDTH=1 needs 2 or more for KIND=square"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(env, sentence):
    with pytest.raises(ConfigError) as error:
        Own.from_env(env)
    assert str(error.value) == sentence


def test_a_column_that_was_renamed_is_read_under_both_names(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "RESULTS", tmp_path / "results.csv")
    table = tmp_path / "results.csv"
    table.write_text("run_id,per_step,stage\nold,norm,s\n")
    assert list(split_results.read_results(table).per_visit) == ["norm"]
    update_results(table, [{"run_id": "rebuilt", "per_step": "norm", "stage": "s"}])
    update_results(table, [{"run_id": "new", "per_visit": "scale", "stage": "s"}])
    with open(table, newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["run_id"], row["per_visit"]) for row in written] == [
        ("old", "norm"),
        ("rebuilt", "norm"),
        ("new", "scale"),
    ]
    assert "per_step" not in written[0]


def test_a_checkpoint_of_an_earlier_version_is_refused(settings):
    settings |= {"NUM_ITERATIONS": 2, "WARMDOWN_ITERS": 0}
    assert launch(settings)[0] == [0]
    about = settings["LOG_DIR"] / "toy" / "step_000002" / "run.json"
    saved = json.loads(about.read_text())
    del saved["version"]
    about.write_text(json.dumps(saved))
    sums = about.with_name("SHA256SUMS")
    lines = [line for line in sums.read_text().splitlines(keepends=True) if "run.json" not in line]
    sums.write_text("".join(lines) + sha256sum(about))
    codes, out = launch(settings | {"RESUME": "auto"})
    assert (
        codes == [2] and "is of an earlier version of the trainer; go on with that version" in out
    )


def test_lines_of_steps_that_are_run_again_are_left_out(tmp_path):
    log = tmp_path / "x.txt"
    kept = "run_id:x\nstep:1/9 train_loss:2.0\n[MOE] step:2/9 coef:0.1\n"
    kept += "step:3/9 bad_gradient rank:0\n"  # which is in the checkpoint of step 3
    log.write_text(kept + "step:3/9 train_loss:1.0\n[MOE] step:3/9 coef:0.1\nstep:4/9 val_lo")
    assert truncate_to_step(log, 3) == kept
    assert truncate_to_step(tmp_path / "none", 3) == ""


def test_nccl_is_set_up_before_the_first_step(monkeypatch):
    """A barrier without a device would go to gloo, and leave that to the first step."""
    calls = []
    fakes = {
        (dist, "init_process_group"): lambda *args, **options: calls.append(args[0]),
        (dist, "barrier"): lambda **options: calls.append(options),
        (dist, "broadcast_object_list"): lambda *args, **options: None,
        (torch.cuda, "set_device"): calls.append,
    }
    for (module, name), fake in fakes.items():
        monkeypatch.setattr(module, name, fake)
    ranks = Ranks(rank=3, local_rank=1, world_size=4, local_world_size=2)
    setup(Config(device="cuda", run_id="x"), ranks, {})
    assert calls == [1, "cpu:gloo,cuda:nccl", {"device_ids": [1]}]


def say_tf32(way):
    """What another program of the process may have said before, in torch's old or new words."""
    if way in ("old", "both"):
        torch.set_float32_matmul_precision("high")
    if way == "new":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    if way == "new, all":
        torch.backends.fp32_precision = "tf32"
    if way == "both":  # of which torch refuses to tell
        torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.mark.parametrize("way", ["nothing", "old", "new", "new, all", "both"])
def test_float32_is_float32_whatever_was_said_before(way):
    """All that torch.compile asks agrees, and its advice to take TF32 is not heard."""
    compiler = Path(torch.__file__).parent / "_inductor" / "compile_fx.py"
    advice = re.search(r'"(TensorFloat32 .*?)"', compiler.read_text())[1]

    def work(ranks):
        dist.destroy_process_group()
        say_tf32(way)
        setup(Config(device="cpu", run_id="x"), ranks, {})
        cuda = torch.backends.cuda.matmul
        asked = cuda.fp32_precision, cuda.allow_tf32, torch.get_float32_matmul_precision()
        with warnings.catch_warnings(record=True) as heard:
            warnings.warn(advice, stacklevel=1)
        return asked, len(heard)

    assert run_ranks(1, work) == [(("ieee", False, "highest"), 0)]


@pytest.mark.parametrize(
    "device, model",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", ""),
        ("NVIDIA GeForce RTX 3090 Ti", ""),
        ("NVIDIA RTX A1000", ""),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""),
        ("NVIDIA H100 80GB HBM2e", ""),
        ("NVIDIA GH200 480GB", ""),
        ("NVIDIA L40", ""),
    ],
)
def test_the_peak_of_a_device_is_that_of_its_whole_name(device, model):
    """A card of another model has no peak, and so a run on it no MFU."""
    assert model_of(device) == model


def test_the_command_that_goes_on_is_whole(monkeypatch):
    """A shell takes it as it stands."""
    monkeypatch.setattr(sys, "argv", ["my dir/train.py", "--steps", "3"])
    cfg = Config(log_dir="my logs", note="it's")
    words = shlex.split(command_of(cfg, "WIDTH=3", "r", Ranks(0, 0, 2, 2)))
    assert words == [
        *("WIDTH=3", "NOTE=it's", "LOG_DIR=my logs", "RUN_ID=r", "RESUME=auto"),
        *("torchrun", "--standalone", "--nproc_per_node=2", "my dir/train.py", "--steps", "3"),
    ]
    for settings in "WIDTH=3", "", """A='it'"'"'s --steps 3' WIDTH=3""":
        command = command_of(cfg, f"{settings} --steps 3".strip(), "r", Ranks())
        assert command.startswith(settings) and command.endswith("' --steps 3")
        assert " --steps" not in command.removeprefix(settings).partition("RUN_ID=r")[0]
    assert " RUN_ID=r RESUME=auto python 'my dir/train.py'" in command_of(cfg, "", "r", Ranks())
    command = command_of(cfg, "", "r", Ranks(0, 0, 16, 8))
    assert "RESUME=auto torchrun <as before, on every machine> 'my dir/" in command
