"""Muon against torch.optim.Muon bit for bit, AdamW against torch.optim.AdamW, ranks against one another, schedules."""

import math

import pytest
import torch
from conftest import run_ranks, tiny

from harness.ranks import Ranks
import train_gpt
from train_gpt import (
    GPT,
    AdamW,
    LossScale,
    Muon,
    State,
    lr_factor,
    split_params,
    train_step,
    zeropower_via_newtonschulz5,
)

ONE, GO = Ranks(), torch.zeros(())  # a single rank; the flag that no step is to be skipped
SHAPES = [(64, 64), (96, 32), (32, 96), (8, 128)]


def gradients(params, step):
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))


def muon(params, dtype=torch.bfloat16, **settings):
    optimizer = Muon(params, tiny(**settings), 0.02, ONE)
    optimizer.dtype = dtype
    return optimizer


def steps(optimizer, params, n, grad_scale=None, skip=GO):
    for step in range(n):
        gradients(params, step)
        optimizer.reduce_grads()
        optimizer.step(1.0, grad_scale, skip)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_equals_torch_bit_for_bit(scale, decay):
    """Single matrices of several shapes and stacks of three, four steps, in torch's own bfloat16."""
    params = [
        torch.nn.Parameter(torch.randn(shape))
        for shape in SHAPES + [(3, *shape) for shape in SHAPES]
    ]
    slices = [
        [torch.nn.Parameter(m.detach().clone()) for m in p.reshape(-1, *p.shape[-2:])]
        for p in params
    ]
    theirs = torch.optim.Muon(
        sum(slices, []), lr=0.02, weight_decay=decay, momentum=0.95, adjust_lr_fn=scale
    )
    ours = muon(params, muon_scale=scale, weight_decay=decay)
    for step in range(4):
        gradients(params, step)
        for p, parts in zip(params, slices):
            for part, grad in zip(parts, p.grad.reshape(-1, *p.shape[-2:])):
                part.grad = grad.clone()
        ours.reduce_grads()
        ours.step(1.0, None, GO)
        theirs.step()
    for p, parts in zip(params, slices):
        assert torch.equal(
            p.reshape(-1, *p.shape[-2:]), torch.stack([part.detach() for part in parts])
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_unit_scale_gives_updates_of_unit_mean_square(shape):
    """The record's rule: a step moves every weight by about the learning rate, whatever the shape."""
    p = torch.nn.Parameter(torch.zeros(shape))
    steps(muon([p], torch.float32, muon_scale="unit"), [p], 1)
    assert 0.6 < (p / 0.02).square().mean() < 1.2


def test_orthogonalisation_is_of_each_matrix_by_itself():
    G = torch.randn(2, 3, 24, 40) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    X = zeropower_via_newtonschulz5(G, torch.float32)
    assert torch.allclose(X[1, 2], zeropower_via_newtonschulz5(G[1, 2], torch.float32), atol=1e-5)
    singular = torch.linalg.svdvals(X)
    assert singular.min() > 0.5 and singular.max() < 1.3
    assert zeropower_via_newtonschulz5(torch.zeros(4, 8)).abs().max() == 0


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torch(decay):
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(300, 300), (7,), (4, 5)]]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    theirs = torch.optim.AdamW(twins, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    ours = AdamW(params, tiny(), 0.01, ONE, decay)
    for step in range(4):
        gradients(params, step)
        gradients(twins, step)
        ours.reduce_grads()
        ours.step(1.0, None, GO)
        theirs.step()
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(params, twins))


BUILD = {
    "muon": lambda p: muon(p, torch.float32, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, tiny(), 0.01, ONE, 0.1),
}


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_gradients_are_divided_by_their_scale(build):
    plain, scaled = ([torch.nn.Parameter(torch.ones(16, 32))] for _ in range(2))
    steps(build(plain), plain, 2)
    optimizer = build(scaled)
    for step in range(2):
        gradients(scaled, step)
        scaled[0].grad *= 1024
        optimizer.reduce_grads()
        optimizer.step(1.0, torch.tensor(1024.0), GO)
    assert torch.allclose(plain[0], scaled[0], atol=1e-6)


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_a_skipped_step_leaves_no_trace(build):
    """Not in the weights and, by the next step, not in the state: a gradient that is not finite must not poison it."""
    params, twins = ([torch.nn.Parameter(torch.ones(16, 32))] for _ in range(2))
    ours, other = build(params), build(twins)
    steps(ours, params, 1)
    steps(other, twins, 1)
    before = params[0].detach().clone()
    params[0].grad = torch.full((16, 32), math.nan)
    ours.reduce_grads()
    ours.step(1.0, None, torch.ones(()))
    assert torch.equal(params[0], before)
    steps(ours, params, 1)
    steps(other, twins, 1)
    assert torch.equal(params[0], twins[0])


def three_steps(ranks, **settings):
    """Parameters after three real steps on this rank's share of batches of six; losses, gradient norms, routing."""
    cfg = tiny(grad_clip=0.5, weight_decay=0.1, **settings)
    state, share, stats = State.build(cfg, ranks), 6 // ranks.world_size, []
    for step in range(3):
        batch = torch.randint(0, 64, (6, 17), generator=torch.Generator().manual_seed(step))
        own = batch[ranks.rank * share :][:share]
        loss, norm, routing = train_step(state, cfg, own[:, :-1], own[:, 1:])
        stats.append(torch.cat([loss[None], norm[None], routing.flatten()]))
    return torch.cat([p.detach().flatten() for p in state.model.parameters()]), torch.stack(stats)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adamw"},
        {"tie_embeddings": False, "vocab_size": 4099, "bias": True, "norm": "layer"},
        {"attngate": "headwise", "ffn": "swiglu", "n_layer": 1},
        {"ffn": "moe", "aux_loss_coef": 0.1},
        {
            "ffn": "moe",
            "balance": "quantile",
            "recurrence": "shared",
            "bias": True,
            "device_batch_size": 1,
        },
        {"ffn": "moe", "recurrence": "indexed", "router_optimizer": "muon"},
    ],
    ids=str,
)
def test_ranks_agree(settings):
    """1, 2 and 3 ranks: one batch, one model. Every rank of a group holds the same bits. The micro-batches may be
    others, but with BALANCE=quantile, which takes quantiles within each."""
    settings = {"vocab_size": 4096} | settings  # an embedding large enough to be sliced
    ((alone, stats),) = run_ranks(1, lambda ranks: three_steps(ranks, **settings))
    for world in (2, 3):
        settings["device_batch_size"] = 1
        results = run_ranks(world, lambda ranks: three_steps(ranks, **settings))
        for params, other_stats in results:
            assert torch.equal(params, results[0][0])
            assert torch.allclose(params, alone, atol=2e-5), (params - alone).abs().max()
            assert torch.allclose(other_stats, stats, rtol=1e-4)


def test_more_ranks_than_matrices():
    settings = dict(n_layer=1, n_embd=8, batch_size=6, device_batch_size=1)
    ((alone, _),) = run_ranks(1, lambda ranks: three_steps(ranks, **settings))
    for params, _ in run_ranks(6, lambda ranks: three_steps(ranks, **settings)):
        assert torch.allclose(params, alone, atol=2e-5)


def test_ranks_exchange_contiguous_tensors(monkeypatch):
    """nccl refuses any other, gloo takes them: tall matrices come transposed out of the orthogonalisation."""

    def gather(full, own):
        assert full.is_contiguous() and own.is_contiguous()
        full.copy_(own.repeat(2, 1, 1))

    def scatter(own, full):
        assert full.is_contiguous() and own.is_contiguous()
        own.copy_(full[: len(own)])

    monkeypatch.setattr(torch.distributed, "all_gather_single", gather, raising=False)
    monkeypatch.setattr(torch.distributed, "reduce_scatter_single", scatter, raising=False)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    steps(Muon(params, tiny(), 0.02, Ranks(0, 0, 2, 2)), params, 1)


@pytest.mark.parametrize("gate", train_gpt.GATES)
def test_every_parameter_is_in_exactly_one_group(gate):
    model = GPT(tiny(attngate=gate, bias=True, norm="layer", tie_embeddings=False, pos="learned"))
    groups = split_params(model)
    ids = [id(p) for group in groups.values() for p in group]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    on_muon = {names[id(p)].split(".", 2)[2] for p in groups["matrices"]}
    expected = {"mixer.qkv.weight", "mixer.proj.weight", "ffn.fc.weight", "ffn.proj.weight"}
    assert on_muon == expected | (
        {"mixer.gate_output.score.weight"} if gate == "elementwise" else set()
    )


def test_learning_rates_go_where_they_are_set():
    cfg = tiny(lr=0.01, embed_lr=0.02, head_lr=0.03, tie_embeddings=False, norm="layer")
    rates = [optimizer.base_lr for optimizer in train_gpt.build_optimizers(GPT(cfg), cfg, ONE)]
    assert rates == [pytest.approx(0.001), 0.02, 0.03, 0.01]
    assert train_gpt.build_optimizers(GPT(tiny()), tiny(muon_lr=0.5), ONE)[0].base_lr == 0.5


def test_trapezoid():
    cfg = tiny(num_iterations=100, warmup_iters=10, warmdown_iters=40)
    factors = [lr_factor(step, cfg) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == factors[60] == 1
    assert factors[80] == 0.5 and factors[99] == pytest.approx(1 / 40)


def test_cosine():
    cfg = tiny(num_iterations=110, warmup_iters=10, lr_schedule="cosine", min_lr_frac=0.1)
    assert lr_factor(4, cfg) == 0.5 and lr_factor(10, cfg) == 1
    assert lr_factor(60, cfg) == pytest.approx(0.55) and lr_factor(110, cfg) == pytest.approx(0.1)


def test_loss_scale_halves_on_overflow_and_doubles_after_2000_good_steps():
    scale = LossScale(torch.float16, "cpu")
    scale.update(torch.ones(()))
    assert scale.value == 2**15
    for _ in range(2000):
        scale.update(GO)
    assert scale.value == 2**16
    fixed = LossScale(torch.bfloat16, "cpu")
    fixed.update(torch.ones(()))
    assert fixed.value == 1


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_expert_without_tokens_keeps_weights_and_momentum(decay):
    """An orthogonalised update has the same size however old its momentum is; the other experts move as ever."""
    bank = torch.nn.Parameter(torch.randn(2, 3, 8, 16))
    twin, optimizers = torch.nn.Parameter(bank.detach().clone()), []
    for p in (bank, twin):
        optimizers.append(muon([p], torch.float32, weight_decay=decay))
        steps(optimizers[-1], [p], 1)
    before, momentum = bank.detach().clone(), optimizers[0].stacks[0]["momentum"].clone()
    for optimizer, p in zip(optimizers, (bank, twin)):
        gradients([p], 1)
        if p is bank:
            p.grad[1, 2] = 0
        optimizer.reduce_grads()
        optimizer.step(1.0, None, GO)
    assert torch.equal(bank[1, 2], before[1, 2]) and torch.equal(
        optimizers[0].stacks[0]["momentum"][5], momentum[5]
    )
    assert not torch.equal(twin[1, 2], before[1, 2])
    assert torch.equal(bank.flatten(0, 1)[:5], twin.flatten(0, 1)[:5])
