"""Layers, mixers, FFNs and the model: contracts over every entry, and oracles for the formulas."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import VARIANTS, context, tiny

from harness.ranks import Ranks
from ops.cross_entropy import LOGITS_PER_CHUNK, LinearCrossEntropy, loss_chunk
import train_gpt
from train_gpt import (
    GPT,
    Linear,
    ReLU2,
    RMSNorm,
    Rotary,
    make_plan,
)

SMALL = {"n_embd": 16, "sequence_length": 8, "d_ff": 32}  # for what takes long


def trained_a_little(cfg, dtype=torch.float32):
    """A model whose zero-initialised projections are zero no more, so that every part has a say."""
    torch.manual_seed(0)
    model = GPT(cfg, dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_contract(variant):
    """Shape, dtype, loss, gradients finite and not zero for every parameter, twice the same."""
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

    scored = model.score(tokens[:, :-1], tokens[:, 1:])
    hits = (logits.argmax(-1) == tokens[:, 1:]).float().mean()
    assert torch.allclose(scored, torch.stack([loss.detach(), hits]), atol=1e-6)
    assert not scored.requires_grad


def test_scores_in_chunks_are_those_of_all_at_once(monkeypatch):
    """Accuracy and loss against plain logits, where the last chunk is shorter than the others."""
    model = trained_a_little(tiny())
    tokens = torch.randint(0, 64, (3, 17), generator=torch.Generator().manual_seed(1))
    x, y = tokens[:, :-1], tokens[:, 1:].clone()
    y[:, ::2] = model(x).argmax(-1)[:, ::2]  # half of them are right
    whole = model.score(x, y)
    assert whole[1] >= 0.5
    monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", 64 * 7)
    assert torch.allclose(model.score(x, y), whole)
    logits = model(x).double().flatten(0, 1)
    right = (logits.argmax(-1) == y.flatten()).double().mean()
    loss = F.cross_entropy(logits, y.flatten())
    assert torch.allclose(whole.double(), torch.stack([loss, right]), atol=1e-6)


def gradients(variant, dtype):
    """{name: gradient} of a small model whose blocks take and give this dtype."""
    model = trained_a_little(tiny(**SMALL | variant), dtype)
    found = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, outputs: found.append(outputs[0].dtype))
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    model(tokens[:, :-1], tokens[:, 1:])[0].backward()
    assert set(found) == {dtype}, f"a block gives {found[0]}"
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_bfloat16(variant):
    """What trains in float32 trains with activations in bfloat16, its gradients in float32."""
    wanted = gradients(variant, torch.float32)
    try:
        found = gradients(variant, torch.bfloat16)
    except (RuntimeError, AssertionError) as error:
        raise AssertionError(
            f"{variant} runs in float32 but not with activations in bfloat16; "
            f"cast with type_as ({error})"
        ) from error
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_contract_in_bfloat16(variant):
    check_bfloat16(variant)


def check_causal(variant):
    """No logit feels an embedding of a later position, and every one feels those of its own."""
    model = trained_a_little(tiny(**SMALL | variant))
    if model.head is None:  # tied: another matrix, for here the embedding is to be the input alone
        model.head = torch.nn.Parameter(model.embed.detach().clone())
    logits = model(torch.arange(8)[None])[0]  # the row of an embedding is its position
    weights = torch.randn(64, generator=torch.Generator().manual_seed(0))
    for t in (0, 5):  # neither is the last in a chunk of two, four or eight positions
        tables = [model.embed, *model.value_embeds]
        for grad in torch.autograd.grad(logits[t] @ weights, tables, retain_graph=True):
            feels = grad[:8].abs().amax(-1) > 0
            assert not feels[t + 1 :].any(), f"{variant}: position {t} feels the future"
            assert feels[t], f"{variant}: position {t} does not feel itself"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_causal_by_gradient(variant):
    check_causal(variant)


class Neighbours(torch.nn.Module):
    """A mixer of each position and the one before it, by an ordinary layer: (B, T, C) -> same."""

    padding = (1, 0)

    def __init__(self, cfg):
        super().__init__()
        self.conv = torch.nn.Conv1d(cfg.n_embd, cfg.n_embd, 2)

    def forward(self, x, ctx):
        return self.conv(F.pad(x.mT, self.padding)).mT


class NeighboursAhead(Neighbours):
    """The same of each position and the one after it."""

    padding = (0, 1)


class NeighboursInAnyType(Neighbours):
    """The same, whose weights go by the type of the input."""

    def forward(self, x, ctx):
        x = F.pad(x.mT, self.padding)
        return F.conv1d(x, self.conv.weight.type_as(x), self.conv.bias.type_as(x)).mT


class InFloat32(NeighboursInAnyType):
    """The same, whose output stays in float32 whatever comes in."""

    def forward(self, x, ctx):
        return super().forward(x.float(), ctx)


def test_a_mixer_may_be_local_but_may_not_look_ahead(monkeypatch):
    monkeypatch.setitem(train_gpt.MIXERS, "neighbours", Neighbours)
    check_causal({"mixer": "neighbours"})
    monkeypatch.setitem(train_gpt.MIXERS, "neighbours", NeighboursAhead)
    with pytest.raises(AssertionError, match="position 0 feels the future"):
        check_causal({"mixer": "neighbours"})


def test_a_mixer_that_does_not_cast_its_weights_is_told_how(monkeypatch):
    monkeypatch.setitem(train_gpt.MIXERS, "neighbours", NeighboursInAnyType)
    check_bfloat16({"mixer": "neighbours"})
    monkeypatch.setitem(train_gpt.MIXERS, "neighbours", Neighbours)
    with pytest.raises(AssertionError, match="cast with type_as"):
        check_bfloat16({"mixer": "neighbours"})


def test_a_mixer_that_gives_another_type_than_it_takes_is_told_how(monkeypatch):
    monkeypatch.setitem(train_gpt.MIXERS, "neighbours", InFloat32)
    with pytest.raises(AssertionError, match=r"cast with type_as \(a block gives torch.float32"):
        check_bfloat16({"mixer": "neighbours"})


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
    y = Rotary(cfg)(x, context(16))
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
    middle = context(3)._replace(positions=torch.arange(5, 8))
    assert torch.equal(Rotary(cfg)(x[:, 5:8], middle), y[:, 5:8])


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
    y = attention(x, context(16))[0]
    assert torch.allclose(y, out @ attention.proj.weight.T, atol=1e-12)


@pytest.mark.parametrize("vocab, chunk", [(64, 2**23), (64, 64 * 5), (50, 50), (17, 100)])
def test_linear_cross_entropy_equals_torch(monkeypatch, vocab, chunk):
    """Values and both gradients, whatever the chunks."""
    monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", chunk)
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
