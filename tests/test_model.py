"""Layers, mixers, FFNs and the model: contracts over every entry, and oracles for the formulas."""

import dataclasses
import functools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import VARIANTS, context, run_ranks, tiny

from harness.ranks import Ranks
from store.contract import ConfigError
from ops.cross_entropy import LOGITS_PER_CHUNK, LOGITS_PER_ROW, LinearCrossEntropy, loss_chunk
from ops.cross_entropy import score_chunk
from ops.cross_entropy import soft_cap
from ops.generation import next_logits
from rollouts import Batch, token_logprobs
from scoring import Window, score
import train_gpt
from train_gpt import (
    GPT,
    Linear,
    ReLU2,
    RMSNorm,
    Rotary,
    compile_model,
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


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("chunk", [2**23, 61 * 5])
def test_a_loss_with_unused_rows_equals_torch_in_float64(monkeypatch, cap, chunk):
    """As on a GPU, whose products want rows of 64 logits: loss, both gradients and the score."""
    monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", chunk)
    monkeypatch.setitem(LOGITS_PER_ROW, "cpu", 64)
    x, head, targets = capped_inputs(vocab=61)
    shapes = set()

    def of_chunk(xs, weight, *args):
        loss, grad = loss_chunk(xs, weight, *args)
        shapes.add((len(weight), grad.size(1), grad.stride(), grad[:, 61:].abs().sum().item()))
        return loss, grad

    wanted = capped_by_torch(x, head, targets, cap)
    found = capped_by_chunks(x, head, targets, cap, of_chunk)
    assert shapes == {(64, 64, (64, 1), 0.0)} and found[2].shape == (61, 8)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    model = GPT(tiny(vocab_size=61, sequence_length=23, logit_softcap=cap))
    torch.nn.init.normal_(model.embed)
    logits, found = model(targets[None]), model.score(targets[None], targets[None])
    summed = F.cross_entropy(logits[0], targets), (logits[0].argmax(-1) == targets).float().mean()
    assert torch.allclose(found, torch.stack(summed), rtol=1e-5)


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


# A cap on logits


@pytest.mark.parametrize("cap", [0.5, 3.0])
@pytest.mark.parametrize("chunk", [2**23, 64 * 5])
def test_a_capped_loss_equals_torch_in_float64(monkeypatch, cap, chunk):
    """Loss, both gradients and the score, whatever the chunks."""
    monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", chunk)
    x, head, targets = capped_inputs()
    wanted = capped_by_torch(x, head, targets, cap)
    found = capped_by_chunks(x, head, targets, cap, loss_chunk)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    logits = cap * torch.tanh(x.double() @ head.double().T / cap)
    likeliest = (logits.argmax(-1) == targets).double().sum()
    summed = F.cross_entropy(logits, targets, reduction="sum")
    scored = score_chunk(x.detach(), head.detach(), targets, cap).double()
    assert torch.allclose(scored, torch.stack([summed, likeliest]), rtol=1e-5)


def capped_inputs(vocab=64):
    """x (23, 8), head (vocab, 8), whose logits go to 10 and more, and targets (23,)."""
    generator = torch.Generator().manual_seed(0)
    x, head = (torch.randn(n, 8, generator=generator, requires_grad=True) for n in (23, vocab))
    return x, head, torch.randint(0, vocab, (23,), generator=generator)


def capped_by_torch(x, head, targets, cap):
    """Loss and 3 times its gradients, of logits cap * tanh(z / cap), or of z where cap is 0."""
    leaves = [t.detach().double().requires_grad_() for t in (x, head)]
    logits = leaves[0] @ leaves[1].T
    loss = F.cross_entropy(cap * torch.tanh(logits / cap) if cap else logits, targets)
    return loss.detach(), *torch.autograd.grad(3 * loss, leaves)


def capped_by_chunks(x, head, targets, cap, of_chunk):
    loss = LinearCrossEntropy.apply(x, head, targets, of_chunk, cap)
    return loss.detach(), *torch.autograd.grad(3 * loss, (x, head))


def test_a_traced_capped_loss_equals_torch():
    """Cap and unused rows are constants of the graph, and no others go by it."""
    cases = [(64, 3.0), (64, 0.5), (61, 3.0)]

    def compiled(ranks):
        LOGITS_PER_ROW["cpu"] = 64
        fast = torch.compile(loss_chunk, dynamic=False, backend="eager")
        return [capped_by_chunks(*capped_inputs(vocab), cap, fast) for vocab, cap in cases]

    (found,) = run_ranks(1, compiled)
    for (vocab, cap), ours in zip(cases, found):
        for a, b in zip(ours, capped_by_torch(*capped_inputs(vocab), cap), strict=True):
            assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6)


def test_without_a_cap_logits_stay_as_they_are():
    logits = torch.randn(5, 7)
    assert soft_cap(logits, 0.0) is logits and GPT(tiny()).softcap == 0


def test_all_who_read_logits_read_capped_ones():
    """Passes, pieces, scores and the log-probabilities of reinforcement learning."""
    model, cap = trained_a_little(tiny(logit_softcap=0.3)).requires_grad_(False), 0.3
    tokens = torch.randint(0, 64, (3, 13), generator=torch.Generator().manual_seed(1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    hidden, head, _ = model.hidden(x)
    z = hidden.double() @ head.double().T
    logits = cap * torch.tanh(z / cap)
    assert z.abs().max() > 3 * cap
    assert torch.allclose(model(x).double(), logits, atol=1e-6)
    assert torch.allclose(
        next_logits(model, x.tolist(), model.new_cache(3, 12)).double(), logits[:, -1], atol=1e-6
    )
    logp = logits.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)
    hits = (logits.argmax(-1) == y).double().mean()
    assert torch.allclose(model.score(x, y).double(), torch.stack([-logp.mean(), hits]), atol=1e-6)
    assert torch.allclose(model(x, y)[0].double(), -logp.mean(), atol=1e-6)
    for row, scores in enumerate(score(model, [Window(row, 12) for row in tokens.numpy()], 2)):
        assert torch.allclose(torch.from_numpy(scores.logp).double(), logp[row], atol=1e-6)
    everything = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))
    of_policy, _, _ = token_logprobs(model, everything, 0.7, 64)
    wanted = (logits / 0.7).log_softmax(-1).gather(-1, y[..., None]).flatten()
    assert torch.allclose(of_policy.double(), wanted, atol=1e-5)


# What blocks and values read of earlier visits


def in_float64(**changes):
    """A model in float64 whose every part has a say, and the blocks that it visits in turn."""
    model = trained_a_little(tiny(**SMALL | changes), torch.float64).double().requires_grad_(False)
    return model, [model.blocks[index] for index in model.order]


def normed(x):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def embedding_loop(model, blocks, x):
    """Before each block x is a sum of x and the embeddings, with two factors of its own."""
    embeddings = x
    for (own, of_embeddings), block in zip(model.residual.factors, blocks, strict=True):
        x, _ = block(own * x + of_embeddings * embeddings, context(8))
    return x


def unet_loop(model, blocks, x):
    """As modded-nanogpt has it: an encoder pushes, a decoder pops, one in the middle neither."""
    half, left = len(blocks) // 2, []
    for block in blocks[:half]:
        x, _ = block(x, context(8))
        left.append(x)
    for block in blocks[half : len(blocks) - half]:
        x, _ = block(x, context(8))
    for factor, block in zip(model.residual.factors, blocks[len(blocks) - half :], strict=True):
        x, _ = block(x + factor * left.pop(), context(8))
    return x


@pytest.mark.parametrize("recurrence", ["stacked", "shared"])
@pytest.mark.parametrize("n_layer", [2, 4, 5])
@pytest.mark.parametrize("residual, loop", [("x0", embedding_loop), ("unet", unet_loop)])
def test_residuals_equal_a_naive_loop(residual, loop, n_layer, recurrence):
    """Every visit has its factors, of a shared block too."""
    model, blocks = in_float64(residual=residual, n_layer=n_layer, recurrence=recurrence)
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))
    x, _, _ = model.hidden(tokens)
    wanted = loop(model, blocks, F.embedding(tokens, model.embed))
    assert torch.allclose(x, normed(wanted), rtol=1e-10, atol=1e-10)
    plain, _ = in_float64(n_layer=n_layer, recurrence=recurrence)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(x, plain.hidden(tokens)[0], atol=1e-2)


def test_residuals_start_as_published():
    """With the embeddings' part at 0 a model is the plain one, to the bit; skips have factors 1."""
    tokens, logits = torch.randint(0, 64, (2, 16)), []
    for residual in ("plain", "x0"):
        torch.manual_seed(0)
        logits.append(GPT(tiny(residual=residual, init="gpt2", n_layer=4))(tokens))
    assert torch.equal(*logits)
    assert GPT(tiny(residual="unet", n_layer=5)).residual.factors.tolist() == [1, 1]
    assert GPT(tiny(value_residual=True, n_layer=3)).value_mix.tolist() == [0.5, 0.5]


def values_of(model, visit, mixer, x, first, tokens):
    """The values (B, T, C) of a visit, and those before embeddings; first is None in the first."""
    v = x @ mixer.qkv.weight[2].T
    if first is not None and model.value_mix is not None:
        part = model.value_mix[visit - 1]
        v = (1 - part) * v + part * first
    own, n_tables = v, len(model.value_embeds)
    if visit < n_tables:
        v = v + model.value_embeds[visit][tokens]
    if visit >= len(model.order) - n_tables:
        v = v + model.value_embeds[visit - (len(model.order) - n_tables)][tokens]
    return v, own


def attended(mixer, x, v):
    """Causal attention of learned positions without QK norm, over values (B, T, C), gated."""
    q, k = x @ mixer.qkv.weight[0].T, x @ mixer.qkv.weight[1].T
    open_ = torch.sigmoid(x @ mixer.gate_value.score.weight.T)  # (B, T, heads)
    y, n_heads = torch.zeros_like(x), open_.size(-1)
    size = x.size(-1) // n_heads
    for head in range(n_heads):
        part = slice(size * head, size * head + size)
        gated = v[..., part] * open_[..., head, None]
        for t in range(x.size(1)):
            scores = k[:, : t + 1, part] @ q[:, t, part, None] / size**0.5
            y[:, t, part] = (scores.softmax(1) * gated[:, : t + 1]).sum(1)
    return y @ mixer.proj.weight.T


def values_loop(model, blocks, tokens):
    """The normed output of a model whose values are mixed, added to and gated, in this order."""
    x, first = model.embed[tokens] + model.add_position.weight, None
    for visit, block in enumerate(blocks):
        v, own = values_of(model, visit, block.mixer, normed(x), first, tokens)
        first = own if first is None else first
        x = x + attended(block.mixer, normed(x), v)
        h = normed(x) @ block.ffn.fc.weight.T
        x = x + h.clamp(min=0).square() @ block.ffn.proj.weight.T
    return normed(x)


@pytest.mark.parametrize(
    "changes",
    [
        {"value_residual": True},
        {"value_embeds": 2},
        {"value_residual": True, "value_embeds": 2, "n_layer": 5},
        {"value_residual": True, "value_embeds": 1, "recurrence": "shared", "n_layer": 3},
    ],
    ids=str,
)
def test_values_of_the_first_visit_and_of_tokens_equal_a_naive_loop(changes):
    gate = {"attngate": "headwise", "gatepos": "value", "pos": "learned", "qk_norm": False}
    model, blocks = in_float64(**{"n_layer": 4} | gate | changes)
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))
    x, _, _ = model.hidden(tokens)
    wanted = values_loop(model, blocks, tokens)
    assert torch.allclose(x, wanted, rtol=1e-9, atol=1e-9), (x - wanted).abs().max()


def compiled_values(ranks):
    """Of a deep model with mixed values: losses and gradients, plain and compiled, and graphs."""
    cfg = tiny(**SMALL | dict(n_layer=5, value_residual=True, value_embeds=1, residual="unet"))
    model, graphs, found = trained_a_little(cfg), [], []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    for is_compiled in (False, True):
        for block in model.blocks if is_compiled else ():
            block.compile(backend=backend, fullgraph=True)
        loss, _ = model(tokens[:, :-1], tokens[:, 1:])
        grads = torch.autograd.grad(loss, [*model.parameters()])
        found.append([loss.detach(), *grads])
    return found, len(graphs)


def test_compiled_blocks_mix_values_without_a_break():
    """A graph each for the first visit, the last with its embeddings and those between: not one for
    each visit, of which torch would give up after eight."""
    (((plain, compiled), n_graphs),) = run_ranks(1, compiled_values)
    for a, b in zip(plain, compiled, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert n_graphs == 3


def all_compiled(ranks):
    """Losses of a model of two kinds of blocks, plain and after compile_model, with an error where
    a graph is one too many; torch takes eight at first, here one."""
    cfg = tiny(**SMALL | {"ffn": "relu2,gelu"})
    model, found = trained_a_little(cfg), []
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    args = tokens[:, :-1], tokens[:, 1:]
    in_eager = functools.partial(torch.compile, backend="eager")
    strict = torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
    with mock.patch.object(torch, "compile", in_eager), strict:
        for is_compiled in (False, True):
            if is_compiled:
                compile_model(model, cfg, torch.device("cpu"))
            found.append([model(*args)[0].item(), *model.score(*args).tolist()])
    return found


def test_blocks_of_several_kinds_are_all_compiled():
    """torch counts the graphs of all blocks together, and leaves the rest as it is written."""
    ((plain, compiled),) = run_ranks(1, all_compiled)
    assert compiled == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"value_residual": True, "mixer": "attention,gru"}, "VALUE_RESIDUAL=1 needs MIXER="),
        ({"value_embeds": 1, "mixer": "rwkv"}, "VALUE_EMBEDS=1 needs MIXER=attention"),
        ({"value_residual": True, "n_layer": 1}, "MIXER=attention, N_LAYER=2 or more"),
        ({"value_embeds": 1, "n_layer": 1}, "MIXER=attention, N_LAYER=2 or more"),
        ({"value_embeds": 3, "n_layer": 5}, "VALUE_EMBEDS=3 needs at most half of N_LAYER, 2"),
        ({"residual": "unet", "n_layer": 1}, "RESIDUAL=unet needs N_LAYER=2 or more"),
    ],
    ids=str,
)
def test_what_has_no_earlier_visit_or_no_values_is_refused(changes, sentence):
    with pytest.raises(ConfigError) as error:
        tiny(**changes)
    assert sentence in str(error.value)
