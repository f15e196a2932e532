"""Layers, mixers, FFNs and the model: contracts over every entry of every axis, and oracles for the formulas."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

from harness.ranks import Ranks
import train_gpt
from train_gpt import (
    GPT,
    Linear,
    LinearCrossEntropy,
    ReLU2,
    RMSNorm,
    Rotary,
    axes,
    loss_chunk,
    make_plan,
)

VARIANTS = [
    dict(zip(("attngate", "gatepos", "gateact"), (gate, where, act)))
    for gate in train_gpt.GATES
    for where in train_gpt.GATE_POSITIONS
    for act in train_gpt.GATE_ACTS
]
VARIANTS += [
    {axis: choice} for axis in ("mixer", "ffn", "norm", "pos", "init") for choice in axes()[axis]
]
VARIANTS += [
    {"bias": True, "norm": "layer"},
    {"tie_embeddings": False},
    {"qk_norm": False},
    {"ffn": "relu2,swiglu"},
]
VARIANTS += [
    {"ffn": "moe", axis: choice}
    for axis in ("expert", "balance", "recurrence")
    for choice in axes()[axis]
]
VARIANTS += [
    {"ffn": "moe", "norm": "rms_gain", "recurrence": "shared", "n_layer": 4, "per_step": choice}
    for choice in axes()["per_step"]
]


def trained_a_little(cfg):
    """A model whose zero-initialised projections are zero no more, so that every part has a say."""
    torch.manual_seed(0)
    model = GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_contract(variant):
    """Shape and dtype, a loss and finite gradients that are not zero for every parameter, the same twice."""
    cfg = tiny(**variant)
    tokens = torch.randint(0, 64, (2, 17))
    model = trained_a_little(cfg)
    logits = model(tokens[:, :-1])
    assert logits.shape == (2, 16, 64) and logits.dtype == torch.float32
    loss, _ = model(tokens[:, :-1], tokens[:, 1:])
    assert torch.allclose(
        loss, F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), atol=1e-6
    )
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    assert torch.equal(trained_a_little(cfg)(tokens[:, :-1]), logits)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_causal_by_gradient(variant):
    """No logit at position t feels an embedding after t, and every one feels its own."""
    model, tokens = trained_a_little(tiny(**variant)), torch.arange(16)[None]
    rows = model.embed.detach().clone().requires_grad_()
    model.embed = torch.nn.Parameter(rows.detach())  # the head keeps a constant copy
    embedded = F.embedding(tokens, rows)
    x = model.add_position(embedded)
    for visit in model.visits():
        x, _ = visit(x)
    (grad,) = torch.autograd.grad(model.norm(x)[0, 7].square().sum() + x[0, 7].sum(), embedded)
    assert grad[0, 8:].abs().max() == 0 and (grad[0, :8].abs().amax(-1) > 0).all()


def test_rms_norm_equals_torch_in_values_and_gradients():
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 5, 8, dtype=torch.float64)
    ours, theirs = RMSNorm(None)(x), F.rms_norm(x, (8,), eps=1e-6)
    assert torch.allclose(ours, theirs, rtol=1e-6)
    grads = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, theirs)]
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-7)


def test_relu2():
    h, act = torch.tensor([-2.0, -0.0, 0.5, 3.0]), ReLU2(tiny()).act
    assert torch.equal(act(h), F.relu(h).square()) and act(h).tolist() == [0, 0, 0.25, 9]


def test_rotary_equals_rotating_each_pair_by_hand():
    cfg = tiny()
    x = torch.randn(1, 16, 2, 16)
    y = Rotary(cfg)(x)
    for t in (0, 1, 15):
        for i in range(8):
            angle = torch.tensor(t * 10000 ** (-i / 8))
            first, second = x[0, t, :, i], x[0, t, :, i + 8]
            assert torch.allclose(
                y[0, t, :, i], first * angle.cos() + second * angle.sin(), atol=1e-5
            )
            assert torch.allclose(
                y[0, t, :, i + 8], second * angle.cos() - first * angle.sin(), atol=1e-5
            )


def test_attention_equals_a_naive_loop():
    cfg = tiny(qk_norm=False, pos="learned")
    model = trained_a_little(cfg)
    attention, x = model.blocks[0].mixer.double(), torch.randn(1, 16, 32, dtype=torch.float64)
    q, k, v = (x[0] @ w.T for w in attention.qkv.weight)
    out = torch.zeros(16, 32, dtype=torch.float64)
    for head in range(2):
        part = slice(16 * head, 16 * head + 16)
        for t in range(16):
            weights = torch.softmax(q[t, part] @ k[: t + 1, part].T / 4, -1)
            out[t, part] = weights @ v[: t + 1, part]
    assert torch.allclose(attention(x)[0], out @ attention.proj.weight.T, atol=1e-12)


@pytest.mark.parametrize("vocab, chunk", [(64, 2**23), (64, 64 * 5), (50, 50), (17, 100)])
def test_linear_cross_entropy_equals_torch(monkeypatch, vocab, chunk):
    """Values and both gradients, whatever the chunks."""
    monkeypatch.setitem(train_gpt.LOSS_CHUNK, "cpu", chunk)
    x, head = torch.randn(23, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
    targets = torch.randint(0, vocab, (23,))
    ours = LinearCrossEntropy.apply(x, head, targets, loss_chunk)
    theirs = F.cross_entropy(x @ head.T, targets)
    assert torch.allclose(ours, theirs, rtol=1e-5)
    pairs = zip(
        torch.autograd.grad(3 * ours, (x, head)), torch.autograd.grad(3 * theirs, (x, head))
    )
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)
    with torch.no_grad():
        assert torch.allclose(
            LinearCrossEntropy.apply(x, head, targets, loss_chunk), theirs, rtol=1e-5
        )


def test_linear_parts_are_matrices_side_by_side():
    cfg = tiny(bias=True)
    layer, x = Linear(cfg, 8, 4, parts=3), torch.randn(5, 8)
    layer.bias.data.normal_()
    assert torch.allclose(
        layer(x), torch.cat([x @ w.T for w in layer.weight], -1) + layer.bias, atol=1e-6
    )


def test_half_precision_keeps_parameters_in_float32():
    cfg, tokens = tiny(), torch.randint(0, 64, (2, 16))
    full, half = GPT(cfg), GPT(cfg, torch.bfloat16)
    half.load_state_dict(full.state_dict())
    losses = full(tokens, tokens)[0], half(tokens, tokens)[0]
    losses[1].backward()
    assert abs(losses[0] - losses[1]) < 0.05
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in half.parameters())


def test_dropout_acts_in_training_only():
    model, tokens = trained_a_little(tiny(dropout=0.5)), torch.randint(0, 64, (2, 16))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


COUNTS = [  # preset, changes, parameters: published, or of the papers' definitions
    ("gpt2_small", {}, 123_568_128),
    ("dense_300m", {}, 304_438_272),
    ("gpt2_small", {"ATTNGATE": "elementwise"}, 123_568_128 + 7_077_888),
    ("gpt2_small", {"ATTNGATE": "headwise"}, 123_568_128 + 55_296),
    ("gpt2_small", {"ATTNGATE": "const"}, 123_568_128 + 9_216),
    ("gpt2_small", {"TIE_EMBEDDINGS": "0"}, 123_568_128 + 50304 * 768),
]


@pytest.mark.parametrize("preset, changes, parameters", COUNTS, ids=str)
def test_parameter_counts(preset, changes, parameters):
    cfg = train_gpt.Config.from_env({"PRESET": preset} | changes)
    assert make_plan(cfg, Ranks())["params_total"] == parameters


def test_flops_per_token_of_the_default():
    """6 per matmul parameter, head included, plus 12 per layer, width and position."""
    by_hand = 6 * 123_568_128 + 12 * 12 * 768 * 1024
    assert make_plan(train_gpt.Config(), Ranks())["flops_per_token"] == by_hand == 854_654_976
    untied = dataclasses.replace(train_gpt.Config(), tie_embeddings=False)
    assert make_plan(untied, Ranks())["flops_per_token"] == 854_654_976


def test_initial_weights():
    model = GPT(tiny())
    block = model.blocks[0]
    assert block.mixer.proj.weight.abs().max() == 0 and block.ffn.proj.weight.abs().max() == 0
    assert 0.9 * 32**-0.5 < block.ffn.fc.weight.abs().max() <= 32**-0.5
    gpt2 = GPT(tiny(init="gpt2", n_embd=64, n_head=2))
    assert abs(gpt2.blocks[0].ffn.fc.weight.std() - 0.02) < 1e-3
    assert abs(gpt2.blocks[0].ffn.proj.weight.std() - 0.02 / 2) < 1e-3  # 0.02 / sqrt(2 * 2 layers)
