"""scripts/check_moe.py: sound experts pass, a defect is named, its arithmetic is the model's."""

import pytest
import torch
from conftest import tiny

import check_moe
from harness.ranks import Ranks
from ops import products
import train_gpt
from train_gpt import CausalSelfAttention, Linear, MoE, axes, make_plan

TINY = {
    "DEVICE": "cpu",
    "FFN": "moe",
    "N_LAYER": "2",
    "N_HEAD": "2",
    "N_EMBD": "32",
    "VOCAB_SIZE": "64",
    "SEQUENCE_LENGTH": "32",
    "DEVICE_BATCH_SIZE": "16",
}


def test_the_preset_keeps_its_budget_and_its_sibling_is_sound(capsys):
    assert check_moe.main([], {"DEVICE": "cpu"}) == 0
    captured = capsys.readouterr()
    lines = [line.split() for line in captured.out.splitlines()]
    assert lines[:3] == [
        ["recurrent_shared_moe"],
        ["params_total", "276,115,456", "ok", "276,115,456"],
        ["params_active", "116,615,168", "ok", "116,615,168"],
    ]
    assert [line[0] for line in lines[3:]] == [
        "recurrent_shared_moe_smoke",
        "params_total",
        "params_active",
        "loss",
        "load_entropy",
        "load_entropy_worst",
        "load_min",
        "load_max",
        "aux",
        "grads_not_finite",
        "grads_zero",
        "experts_without_grad",
    ]
    assert captured.err == "" and "FAIL" not in captured.out


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"INIT": "gpt2", "TIE_EMBEDDINGS": "0", "BIAS": "1", "RECURRENCE": "indexed"},
        {"TIE_EMBEDDINGS": "0", "FFN": "relu2,moe", "BALANCE": "quantile"},
    ],
    ids=str,
)
def test_settings_are_checked_whatever_starts_at_zero(capsys, change):
    assert check_moe.main([], TINY | change) == 0, capsys.readouterr().err


def collapsed(monkeypatch):
    forward, skew = Linear.forward, 9.0 * torch.arange(8).clamp(max=4)
    monkeypatch.setattr(
        Linear, "forward", lambda self, x: forward(self, x) - (skew if len(self.weight) == 8 else 0)
    )


def an_expert_is_not_trained(monkeypatch):
    outer = products.grouped_outer

    def without_one(y, x, offsets):
        return outer(y, x, offsets).index_fill(0, torch.tensor([5]), 0.0)

    monkeypatch.setattr(products, "grouped_outer", without_one)


def no_number(monkeypatch):
    monkeypatch.setattr(
        train_gpt, "aux_loss", lambda load, importance: float("nan") * importance.sum(-1)
    )


def a_branch_is_cut(monkeypatch):
    forward = MoE.forward
    monkeypatch.setattr(MoE, "forward", lambda self, x: forward(self, x.detach()))
    monkeypatch.setattr(CausalSelfAttention, "forward", lambda self, x, ctx: x.detach())


def a_parameter_too_many(monkeypatch):
    init = MoE.__init__

    def with_gain(self, cfg):
        init(self, cfg)
        self.gain = torch.nn.Parameter(torch.ones(3))

    monkeypatch.setattr(MoE, "__init__", with_gain)


def a_loud_start(monkeypatch):
    def normal(cfg, weight, to_residual):
        torch.nn.init.normal_(weight)

    monkeypatch.setitem(train_gpt.INITS, "zero_proj", normal)


@pytest.mark.parametrize(
    "defect, names",
    [
        (
            collapsed,
            ["load_entropy", "load_entropy_worst", "load_min", "aux", "experts_without_grad"],
        ),
        (an_expert_is_not_trained, ["experts_without_grad"]),
        (no_number, ["aux", "grads_not_finite"]),
        (a_branch_is_cut, ["grads_zero"]),
        (a_parameter_too_many, ["params_total", "params_active", "grads_zero"]),
        (a_loud_start, ["loss"]),
    ],
)
def test_a_defect_is_named(capsys, monkeypatch, defect, names):
    defect(monkeypatch)
    assert check_moe.main([], TINY) == 1
    captured = capsys.readouterr()
    assert [line.split()[1] for line in captured.err.splitlines()] == names
    assert captured.out.count("FAIL") == len(names)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"bias": True, "norm": "layer", "expert": "swiglu"},
        {"d_ff": 24, "pos": "learned", "tie_embeddings": False},
        {"expert": "swiglu", "shared_expert": True, "norm": "rms_gain", "top_k": 1},
        {"ffn": "gelu,moe,swiglu"},
        {"ffn": "swiglu,moe", "recurrence": "indexed", "n_layer": 5, "bias": True},
        {
            "recurrence": "shared",
            "n_layer": 7,
            "n_unique": 2,
            "unshared_ends": 1,
            "ffn": "moe,gelu",
            "norm": "layer",
        },
        {
            "recurrence": "shared",
            "n_layer": 7,
            "n_unique": 3,
            "unshared_ends": 1,
            "norm": "rms_gain",
            "per_visit": "norm,router,scale",
        },
        {"ffn": "moe,none", "mixer": "attention,gru"},
        *({axis: choice} for axis in ("mixer", "attngate") for choice in axes()[axis]),
    ],
    ids=str,
)
def test_the_arithmetic_is_that_of_the_model(kind):
    cfg = tiny(**{"ffn": "moe", "n_layer": 4} | kind)
    plan = make_plan(cfg, Ranks())
    assert check_moe.budget(cfg) == (plan["params_total"], plan["params_active"])


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"FFN": "relu2"}, "config: FFN=relu2: has no mixture of experts to check; set FFN=moe"),
        ({"TOP_K": "9"}, "config: TOP_K=9 needs at most NUM_EXPERTS=8"),
    ],
)
def test_wrong_settings_are_refused(capsys, change, sentence):
    assert check_moe.main([], TINY | change) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(sentence) and captured.out == ""
