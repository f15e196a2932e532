"""Optimizers against those of torch, ranks against one another, contracts over all, schedules."""

import math
import re

import numpy as np
import pytest
import torch
from conftest import VARIANTS, run_ranks, tiny

from harness.ranks import Ranks
from store.contract import ConfigError
from ops.orthogonalize import POLAR_EXPRESS, norm_rows, polar_express
import train_gpt
from train_gpt import (
    GPT,
    AdamW,
    MUON_NORMS,
    OPTIMIZERS,
    RECURRENCES,
    SCHEDULES,
    LossScale,
    Muon,
    Optimizer,
    State,
    averaged,
    build_optimizers,
    decay_factor,
    lr_factor,
    momentum_factor,
    split_params,
    train_step,
    zeropower_via_newtonschulz5,
)

ONE, GO = Ranks(), torch.zeros(())  # a single rank; the flag that no step is to be skipped
SHAPES = [(64, 64), (96, 32), (32, 96), (8, 128)]


def gradients(params, step):
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))


def build(name, params, ranks=ONE, **settings):
    """The optimizer of this name over params, whose first steps are at the peak learning rate."""
    cfg = tiny(optimizer=name, warmdown_iters=0, **settings)
    rule = OPTIMIZERS[name]
    optimizer = Optimizer(params, rule(cfg), rule.peak(cfg), cfg, ranks)
    assert all(optimizer.hyper_at(step) == rule.peak(cfg) for step in range(4))
    return optimizer


def steps(optimizer, params, n):
    for step in range(n):
        gradients(params, step)
        optimizer.reduce_grads()
        optimizer.step(step, None, GO)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_equals_torch_bit_for_bit(monkeypatch, scale, decay):
    """Single matrices of several shapes and stacks of three, four steps, in bfloat16 as torch."""

    def in_bfloat16(G, dtype):
        return zeropower_via_newtonschulz5(G, torch.bfloat16)

    monkeypatch.setitem(train_gpt.ORTHOGONALIZERS, "newton_schulz", in_bfloat16)
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
    ours = build("muon", params, muon_lr=0.02, muon_scale=scale, weight_decay=decay)
    for step in range(4):
        gradients(params, step)
        for p, parts in zip(params, slices):
            for part, grad in zip(parts, p.grad.reshape(-1, *p.shape[-2:])):
                part.grad = grad.clone()
        ours.reduce_grads()
        ours.step(step, None, GO)
        theirs.step()
    for p, parts in zip(params, slices):
        assert torch.equal(
            p.reshape(-1, *p.shape[-2:]), torch.stack([part.detach() for part in parts])
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_unit_scale_gives_updates_of_unit_mean_square(shape):
    """A step moves every weight by about the learning rate, whatever the shape: by as much as five
    iterations of the quintic make of the singular values, in float64."""
    p = torch.nn.Parameter(torch.zeros(shape))
    gradients([p], 0)
    U, singular, V = torch.linalg.svd(p.grad.double(), full_matrices=False)
    singular = singular / singular.norm()
    for _ in range(5):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    assert 0.6 < singular.square().mean() < 1.2
    steps(build("muon", [p], muon_lr=0.02, muon_scale="unit"), [p], 1)
    assert torch.allclose(p.double() / -0.02, max(shape) ** 0.5 * (U * singular) @ V, atol=2e-4)


def test_orthogonalisation_is_of_each_matrix_by_itself():
    G = torch.randn(2, 3, 24, 40) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    X = zeropower_via_newtonschulz5(G, torch.float32)
    assert torch.allclose(X[1, 2], zeropower_via_newtonschulz5(G[1, 2], torch.float32), atol=1e-5)
    singular = torch.linalg.svdvals(X)
    assert singular.min() > 0.5 and singular.max() < 1.3
    assert zeropower_via_newtonschulz5(torch.zeros(4, 8)).abs().max() == 0


def newton_schulz(G, steps):
    """The iteration as published, of one matrix in float64."""
    X = G.double().numpy()
    X = X / np.linalg.norm(X)
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return torch.from_numpy(X)


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("shape", [(32, 64), (32, 128), (128, 32), (32, 63)])
def test_flat_matrices_take_the_published_iteration(shape, steps):
    """Whatever their singular values: alike, over four decades, few."""
    U, _, V = torch.linalg.svd(torch.randn(3, *shape, dtype=torch.float64), full_matrices=False)
    rank = U.size(-1)
    few = (torch.arange(rank) < 4).double()
    singular = torch.stack([torch.ones(rank), torch.logspace(0, -4, rank), few]).unsqueeze(-2)
    G = (U * singular) @ V
    expected = torch.stack([newton_schulz(matrix, steps) for matrix in G])
    exact = zeropower_via_newtonschulz5(G, torch.float64, steps)
    assert torch.allclose(exact, expected, rtol=0, atol=1e-11)
    expected = torch.stack([newton_schulz(matrix, steps) for matrix in G.float()])
    single = zeropower_via_newtonschulz5(G.float(), torch.float32, steps)
    assert torch.allclose(single.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torch(decay):
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(300, 300), (7,), (4, 5)]]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    theirs = torch.optim.AdamW(twins, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    ours = build("adamw", params, lr=0.01, weight_decay=decay)
    for step in range(4):
        gradients(params, step)
        gradients(twins, step)
        ours.reduce_grads()
        ours.step(step, None, GO)
        theirs.step()
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(params, twins))


DECAYING = {"lr": 0.01, "weight_decay": 0.1}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_divided_by_their_scale(name):
    plain, scaled = ([torch.nn.Parameter(torch.ones(16, 32))] for _ in range(2))
    steps(build(name, plain, **DECAYING), plain, 2)
    optimizer = build(name, scaled, **DECAYING)
    for step in range(2):
        gradients(scaled, step)
        scaled[0].grad *= 1024
        optimizer.reduce_grads()
        optimizer.step(step, torch.tensor(1024.0), GO)
    assert torch.allclose(plain[0], scaled[0], atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_no_trace(name):
    """Not in the weights and, by the next step, not in the state, which NaN must not poison."""
    params, twins = ([torch.nn.Parameter(torch.ones(16, 32))] for _ in range(2))
    ours, other = build(name, params, **DECAYING), build(name, twins, **DECAYING)
    steps(ours, params, 1)
    steps(other, twins, 1)
    before = params[0].detach().clone()
    params[0].grad = torch.full((16, 32), math.nan)
    ours.reduce_grads()
    ours.step(1, None, torch.ones(()))
    hint = f"where skip is 1, OPTIMIZERS[{name!r}].update may change no "
    assert torch.equal(params[0], before), f"{hint}parameter: torch.where(skip > 0, …)"
    steps(ours, params, 1)
    steps(other, twins, 1)
    assert torch.equal(params[0], twins[0]), f"{hint}state: a NaN stays in it for good"


BATCH = torch.randint(0, 64, (12, 17), generator=torch.Generator().manual_seed(0))


def trained(cfg, steps, state=None):
    """A state, or a new one, after so many steps on one batch; the losses."""
    state = state or State.build(cfg, ONE)
    losses = [train_step(state, cfg, BATCH[:, :-1], BATCH[:, 1:]).loss.item() for _ in range(steps)]
    return state, losses


def bits(state):
    """A copy of all that a checkpoint of this state holds."""
    return {key: tensor.clone() for key, (tensor, _) in state.tensors().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert torch.equal(tensor, b[key]), key


SWITCHES = dict(orthogonalize="polar_express", muon_norm="rows", cautious_decay=True)
SWITCHES |= dict(momentum_start=0.85, momentum_warmup_iters=3, decay_schedule="to_zero")
RULES = [(name, switches) for name in OPTIMIZERS for switches in ({}, SWITCHES)]


def of_optimizer(name, switches):
    base = dict(optimizer=name, lr=0.01, weight_decay=0.1, num_iterations=100, warmdown_iters=0)
    return tiny(**base | switches)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_loss_falls(rule, group):
    losses = trained(of_optimizer(*rule), 10)[1]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_step_whose_gradients_are_not_finite_changes_nothing(rule, group):
    """Neither parameters nor what a checkpoint holds of the optimizers, nor what follows."""
    cfg = of_optimizer(*rule)
    state, _ = trained(cfg, 2)
    before = bits(state)
    hooks = [p.register_hook(lambda grad: grad * math.nan) for p in state.model.parameters()]
    trained(cfg, 1, state)
    for hook in hooks:
        hook.remove()
    assert_equal(bits(state), before)
    state.step = 2  # schedules go by it
    assert_equal(bits(trained(cfg, 2, state)[0]), bits(trained(cfg, 4)[0]))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_checkpoint_holds_all_that_later_steps_need(rule, group):
    """What is filled from it goes on as what it was taken from."""
    cfg = of_optimizer(*rule)
    state, _ = trained(cfg, 2)
    kept, (other, _) = bits(state), trained(cfg, 0)
    for key, (tensor, _) in other.tensors().items():
        tensor.detach().copy_(kept[key])
    other.step = state.step
    assert_equal(bits(trained(cfg, 2, other)[0]), bits(trained(cfg, 2, state)[0]))


def three_steps(ranks, **settings):
    """Parameters after three steps on a rank's share of batches of six; losses, norms, routing."""
    cfg = tiny(grad_clip=0.5, weight_decay=0.1, **settings)
    state, share, stats = State.build(cfg, ranks), 6 // ranks.world_size, []
    for step in range(3):
        batch = torch.randint(0, 64, (6, 17), generator=torch.Generator().manual_seed(step))
        own = batch[ranks.rank * share :][:share]
        loss, norm, routing = train_step(state, cfg, own[:, :-1], own[:, 1:])
        stats.append(torch.cat([loss[None], norm[None], routing.flatten()]))
    held = [*state.model.parameters(), *state.averages]
    return torch.cat([p.detach().flatten() for p in held]), torch.stack(stats)


@pytest.mark.parametrize(
    "settings",
    [
        *({"optimizer": name} for name in OPTIMIZERS),
        {"tie_embeddings": False, "vocab_size": 4099, "bias": True, "norm": "layer"},
        {"attngate": "headwise", "ffn": "swiglu", "n_layer": 1},
        {"ffn": "moe", "aux_loss_coef": 1.0},
        {
            "ffn": "moe",
            "balance": "quantile",
            "recurrence": "shared",
            "bias": True,
            "device_batch_size": 1,
        },
        {"ffn": "moe", "recurrence": "indexed", "router_optimizer": "muon"},
        {"muon_norm": "rows", "residual": "x0", "value_residual": True, "ema_iters": 2},
        {"optimizer": "adamw", "value_embeds": 1, "logit_softcap": 5.0, "cautious_decay": True},
    ],
    ids=str,
)
def test_ranks_agree(settings):
    """1, 2 and 3 ranks: one batch, one model. Every rank of a group holds the same bits. The
    micro-batches may be others, but with BALANCE=quantile, which takes quantiles within each."""
    # Products with few rows go by another CPU library, and AdamW's first steps are as large for the
    # smallest gradients, which are all rounding, as for any other.
    sensitive = "optimizer" in settings or "tie_embeddings" in settings
    atol = 3e-4 if sensitive else 2e-5
    settings = {"vocab_size": 4096} | settings  # an embedding large enough to be sliced
    ((alone, stats),) = run_ranks(1, lambda ranks: three_steps(ranks, **settings))
    assert stats[:, 1].min() > 0.5, "every step is clipped"
    for world in (2, 3):
        settings["device_batch_size"] = 1
        results = run_ranks(world, lambda ranks: three_steps(ranks, **settings))
        for params, other_stats in results:
            assert torch.equal(params, results[0][0])
            assert torch.allclose(params, alone, atol=atol), (params - alone).abs().max()
            assert torch.allclose(other_stats, stats, rtol=1e-4)


def test_more_ranks_than_matrices():
    settings = dict(n_layer=1, n_embd=8, batch_size=6, device_batch_size=1)
    ((alone, _),) = run_ranks(1, lambda ranks: three_steps(ranks, **settings))
    for params, _ in run_ranks(6, lambda ranks: three_steps(ranks, **settings)):
        assert torch.allclose(params, alone, atol=2e-5)


def test_ranks_exchange_contiguous_tensors(monkeypatch):
    """nccl refuses any other, gloo takes them: tall matrices are orthogonalised transposed."""

    def gather(full, own):
        assert full.is_contiguous() and own.is_contiguous()
        full.copy_(own.repeat(2, 1, 1))

    def scatter(own, full):
        assert full.is_contiguous() and own.is_contiguous()
        own.copy_(full[: len(own)])

    monkeypatch.setattr(torch.distributed, "all_gather_single", gather, raising=False)
    monkeypatch.setattr(torch.distributed, "reduce_scatter_single", scatter, raising=False)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    steps(build("muon", params, Ranks(0, 0, 2, 2)), params, 1)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_parameter_is_in_exactly_one_group(variant):
    model = GPT(tiny(**variant))
    ids = [id(p) for group in split_params(model).values() for p in group]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize(
    "gate, its_own",
    [
        ("none", set()),
        ("headwise", {"mixer.gate_output.score.weight"}),
        ("elementwise", {"mixer.gate_output.score.weight"}),
        ("const", set()),
    ],
)
def test_which_weights_are_matrices(gate, its_own):
    model = GPT(tiny(attngate=gate, bias=True, norm="layer", tie_embeddings=False, pos="learned"))
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)].split(".", 2)[2] for p in split_params(model)["matrices"]}
    always = {"mixer.qkv.weight", "mixer.proj.weight", "ffn.fc.weight", "ffn.proj.weight"}
    assert found == always | its_own


class Decaying(torch.nn.Module):
    """A mixer of each position and a decayed one before it, of two parameters of one shape."""

    optim = {"decay": "adamw"}

    def __init__(self, cfg):
        super().__init__()
        self.mix = torch.nn.Parameter(torch.randn(cfg.n_embd, cfg.n_embd))
        self.decay = torch.nn.Parameter(torch.randn(cfg.n_embd, cfg.n_embd))

    def forward(self, x, ctx):
        decayed = x.roll(1, dims=1) @ self.decay.type_as(x)
        decayed = decayed * (ctx.positions > 0).unsqueeze(-1).type_as(x)
        return (x + decayed) @ self.mix.type_as(x)


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_a_part_says_by_name_which_of_its_parameters_adamw_trains(monkeypatch, recurrence, group):
    monkeypatch.setitem(train_gpt.MIXERS, "decaying", Decaying)
    cfg = tiny(mixer="decaying", recurrence=recurrence)
    state, _ = trained(cfg, 1)
    groups = split_params(state.model)
    ids = [id(p) for params in groups.values() for p in params]
    assert sorted(ids) == sorted(id(p) for p in state.model.parameters())
    mixers = [block.mixer for block in state.model.blocks]
    for name, of_part in ("matrices", "mix"), ("vectors", "decay"):
        held = {id(p) for p in groups[name]}
        assert {id(getattr(mixer, of_part)) for mixer in mixers} <= held
    # What each has of a checkpoint is what its rule needs.
    kept = {key for key in state.tensors() if ".mixer." in key and not key.startswith("model.")}
    assert {re.sub(r"\d+", "0", key) for key in kept} == {
        "muon.blocks.0.mixer.mix.0.momentum",
        "adamw.blocks.0.mixer.decay.exp_avg",
        "adamw.blocks.0.mixer.decay.exp_avg_sq",
        "adamw.blocks.0.mixer.decay.step",
    }


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_a_gates_matrix_goes_to_the_optimizer_that_is_chosen(gate):
    wanted = {"auto": "matrices", "muon": "matrices", "adamw": "vectors"}
    for name, group in wanted.items():
        model = GPT(tiny(attngate=gate, gate_optimizer=name))
        groups = split_params(model)
        held = {id(p): name for name, params in groups.items() for p in params}
        assert {held[id(b.mixer.gate_output.score.weight)] for b in model.blocks} == {group}
        assert held[id(model.blocks[0].mixer.qkv.weight)] == "matrices"
    with pytest.raises(ConfigError, match="GATE_OPTIMIZER=muon needs OPTIMIZER=muon as well"):
        tiny(attngate=gate, optimizer="adamw", gate_optimizer="muon")


def test_weight_decay_can_be_adamws_alone():
    for muon_decay, wanted in ((True, [0.1, 0.1, 0.0]), (False, [0.0, 0.1, 0.0])):
        cfg = tiny(weight_decay=0.1, muon_decay=muon_decay, norm="rms_gain")
        peaks = [optimizer.peak for optimizer in build_optimizers(GPT(cfg), cfg, ONE)]
        assert [peak.weight_decay for peak in peaks] == wanted


def test_learning_rates_go_where_they_are_set():
    cfg = tiny(lr=0.01, embed_lr=0.02, head_lr=0.03, tie_embeddings=False, norm="layer")
    rates = [optimizer.peak.lr for optimizer in build_optimizers(GPT(cfg), cfg, ONE)]
    assert rates == [pytest.approx(0.001), 0.02, 0.03, 0.01]
    assert build_optimizers(GPT(tiny()), tiny(muon_lr=0.5), ONE)[0].peak.lr == 0.5


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_warms_up_and_stays_within_its_peak(name):
    cfg = tiny(lr_schedule=name, num_iterations=100, warmup_iters=10, warmdown_iters=40)
    factors = [lr_factor(step, cfg) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    for step, factor in enumerate(factors):
        assert 0 <= factor <= 1, f"SCHEDULES[{name!r}] gives {factor} at step {step}, not 0 to 1"
    assert factors == [lr_factor(step, cfg) for step in range(100)]


def test_trapezoid():
    cfg = tiny(num_iterations=100, warmup_iters=10, warmdown_iters=40)
    factors = [lr_factor(step, cfg) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == factors[60] == 1
    assert factors[80] == 0.5 and factors[99] == pytest.approx(1 / 40)


def test_cosine():
    cfg = tiny(num_iterations=110, warmup_iters=10, lr_schedule="cosine", min_lr_frac=0.1)
    assert lr_factor(4, cfg) == 0.5 and lr_factor(10, cfg) == 1
    assert lr_factor(60, cfg) == pytest.approx(0.55) and lr_factor(110, cfg) == pytest.approx(0.1)


def test_a_warm_up_of_the_momentum_is_an_entry(monkeypatch):
    """Of Muon.factors: it changes Muon's momentum in its step, and nothing else."""
    cfg = tiny(warmup_iters=2, warmdown_iters=4, weight_decay=0.1)
    p = torch.nn.Parameter(torch.randn(16, 32))
    optimizer, expected = Optimizer([p], Muon(cfg), Muon.peak(cfg), cfg, ONE), torch.zeros(16, 32)
    other = Optimizer([], AdamW(cfg), AdamW.peak(cfg), cfg, ONE)
    plain, plain_other = ([o.hyper_at(step) for step in range(8)] for o in (optimizer, other))
    factors = {1: 0.5}
    warm_up = {"momentum": lambda step, cfg: factors.get(step, 1.0)}
    monkeypatch.setattr(Muon, "factors", Muon.factors | warm_up)
    warm = [optimizer.hyper_at(step) for step in range(8)]
    assert warm[1] == plain[1]._replace(momentum=0.475)
    assert [warm[0], *warm[2:]] == [plain[0], *plain[2:]]
    assert [other.hyper_at(step) for step in range(8)] == plain_other

    for step, momentum in enumerate((0.95, 0.475, 0.95)):
        gradients([p], step)
        expected.lerp_(p.grad, 1 - momentum)
        optimizer.reduce_grads()
        optimizer.step(step, None, GO)
        assert torch.equal(optimizer.partitions[0].state["momentum"][0], expected)


@pytest.mark.parametrize("wish", [{"qkvv.weight": "adamw"}, {"proj.weight": "no_such"}, "none"])
def test_a_wish_for_what_is_not_there_is_an_error(monkeypatch, wish):
    monkeypatch.setattr(train_gpt.CausalSelfAttention, "optim", wish, raising=False)
    with pytest.raises(ValueError, match="CausalSelfAttention.optim has"):
        split_params(GPT(tiny()))


def test_a_model_may_have_no_matrix_for_muon(monkeypatch, group):
    monkeypatch.setattr(train_gpt.Block, "optim", "adamw", raising=False)
    cfg = tiny(grad_clip=1.0)
    state, tokens = State.build(cfg, ONE), torch.randint(0, 64, (12, 17))
    assert {type(optimizer.rule) for optimizer in state.optimizers} == {AdamW}
    assert train_step(state, cfg, tokens[:, :-1], tokens[:, 1:]).grad_norm > 0


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


@pytest.mark.parametrize("norm", MUON_NORMS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_expert_without_tokens_keeps_weights_and_state(decay, norm):
    """An update has one size however old the momentum is; other experts move as ever."""
    bank = torch.nn.Parameter(torch.randn(2, 3, 8, 16))
    twin, optimizers = torch.nn.Parameter(bank.detach().clone()), []
    for p in (bank, twin):
        optimizers.append(build("muon", [p], muon_lr=0.02, weight_decay=decay, muon_norm=norm))
        steps(optimizers[-1], [p], 1)
    state = optimizers[0].partitions[0].state
    before, kept = bank.detach().clone(), {name: t.clone() for name, t in state.items()}
    for optimizer, p in zip(optimizers, (bank, twin)):
        gradients([p], 1)
        if p is bank:
            p.grad[1, 2] = 0
        optimizer.reduce_grads()
        optimizer.step(1, None, GO)
    assert torch.equal(bank[1, 2], before[1, 2])
    for name, tensor in state.items():
        assert torch.equal(tensor[5], kept[name][5]), name
        assert not torch.equal(tensor[4], kept[name][4]), name
    assert not torch.equal(twin[1, 2], before[1, 2])
    assert torch.equal(bank.flatten(0, 1)[:5], twin.flatten(0, 1)[:5])


# Orthogonalisers and what follows them


def quintic(lower, upper):
    """(a, b, c) of the a x + b x^3 + c x^5 that is closest to 1 on [lower, upper], by Remez."""
    inner = np.array([(3 * lower + upper) / 4, (lower + 3 * upper) / 4])
    for _ in range(60):
        x = np.array([lower, *inner, upper])
        equations = np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1)
        a, b, c, _ = np.linalg.solve(equations, np.ones(4))
        inner = np.sort(np.roots([5 * c, 3 * b, a]).real ** 0.5)  # where its slope is 0
    return np.array([a, b, c])


def published_coefficients(lower=1e-3, n=5, safety=1.02, cushion=0.02):
    """The greedy composition of arXiv 2505.16932, algorithm 1 with what its section 4.4 adds.

    Each quintic but the last is over x / safety. A narrow interval is taken as wider, by cushion,
    and the result put into the middle of what it does to the true one.
    """
    found, upper = [], 1.0
    for _ in range(n):
        p = quintic(max(lower, cushion * upper), upper)
        ends = [x * p[0] + x**3 * p[1] + x**5 * p[2] for x in (lower, upper)]
        p = p * 2 / sum(ends)
        safe = p / [safety, safety**3, safety**5]
        found.append(safe)
        lower = lower * safe[0] + lower**3 * safe[1] + lower**5 * safe[2]
        upper = 2 - lower
    found[-1] = p
    return found


def test_the_coefficients_of_polar_express_are_the_published_minimax():
    assert np.allclose(POLAR_EXPRESS, published_coefficients(), rtol=1e-9, atol=0)


def iterated(G, coefficients, margin):
    """Float64 matrices (n, rows, cols), one after another, by the odd polynomials one by one."""
    made = []
    for matrix in G.double():
        X = matrix / (margin * matrix.square().sum().sqrt())
        for a, b, c in coefficients:
            cubic = X @ X.T @ X
            X = a * X + b * cubic + c * X @ X.T @ cubic
        made.append(X)
    return torch.stack(made)


@pytest.mark.parametrize("shape", [(2, 24, 40), (2, 40, 24), (1, 8, 8)])
def test_polar_express_equals_a_loop_in_float64(shape):
    G = torch.randn(shape) * torch.tensor([1e-3, 1e3])[: shape[0], None, None]
    wanted = iterated(G, POLAR_EXPRESS, 1.02)
    assert torch.allclose(polar_express(G, torch.float32).double(), wanted, atol=2e-5)
    assert polar_express(torch.zeros(shape), torch.float32).abs().max() == 0


def test_polar_express_is_closer_to_orthogonal_than_newton_schulz():
    """Singular values as its docstring has them, against U V^T of a decomposition."""
    G = torch.randn(4, 128, 256, generator=torch.Generator().manual_seed(0))
    U, _, V = torch.linalg.svd(G.double(), full_matrices=False)
    away = {}
    for f in (polar_express, zeropower_via_newtonschulz5):
        X = f(G, torch.float32)
        away[f] = torch.linalg.matrix_norm(X - U @ V).mean()
        if f is polar_express:
            singular = torch.linalg.svdvals(X)
            assert singular.min() > 0.855 and singular.max() < 1.145
    assert away[polar_express] < 0.7 * away[zeropower_via_newtonschulz5]


def normed_rows(update, kept):
    """NorMuon of one matrix, row after row, in numpy; kept (rows,) changes in place."""
    scaled = np.zeros_like(update)
    for row in range(len(update)):
        kept[row] = 0.95 * kept[row] + 0.05 * np.mean(update[row] ** 2)
        scaled[row] = update[row] / np.sqrt(kept[row])
    return scaled * np.sqrt((update**2).sum() / (scaled**2).sum())


def test_rows_are_normed_as_a_loop_does_it():
    """Over steps, of matrices apart; one that is frozen keeps what is known of its rows."""
    squares, kept = torch.zeros(3, 6, 1), np.zeros((3, 6))
    sizes = torch.logspace(-3, 1, 6)[:, None]
    for step in range(4):
        update = torch.randn(3, 6, 10) * sizes
        frozen = torch.tensor([False, step == 2, step == 0])
        before = update.clone()
        ours = norm_rows(update, squares, frozen.view(3, 1, 1))
        for i in range(3):
            if not frozen[i]:
                wanted = normed_rows(before[i].double().numpy(), kept[i])
                assert np.allclose(ours[i].numpy(), wanted, rtol=1e-4, atol=1e-5)
        assert ours.isfinite().all() and np.allclose(squares[..., 0].numpy(), kept, rtol=1e-5)
    norms = [torch.linalg.matrix_norm(m) for m in (ours, before)]
    assert torch.allclose(*norms, rtol=1e-5)
    nothing = norm_rows(torch.zeros(1, 6, 10), torch.zeros(1, 6, 1), torch.zeros(1, 1, 1).bool())
    assert nothing.abs().max() == 0


def test_normed_rows_keep_the_norm_of_their_matrix_in_bfloat16():
    """Within what rounding adds; a factor in bfloat16 would be off by up to 0.4 %."""
    generator, squares = torch.Generator().manual_seed(0), torch.zeros(8, 32, 1)
    for _ in range(3):
        update = torch.randn(8, 32, 64, generator=generator).bfloat16()
        ours = norm_rows(update, squares, torch.zeros(8, 1, 1).bool())
        norms = [m.double().square().sum((-2, -1)).sqrt() for m in (ours, update)]
        assert ours.dtype == torch.bfloat16 and torch.allclose(*norms, rtol=2e-3)


# Decay and momentum


def muon_loop(p, cfg, n_steps, factors):
    """Weights (n, rows, cols) after steps of Muon by `gradients`, in float64 one by one.

    factors: for each step its learning rate, momentum and decay.
    """
    p, kept = p.detach().double(), np.zeros(p.shape[:2])
    momentum, coefficients, margin = torch.zeros_like(p), [(3.4445, -4.7750, 2.0315)] * 5, 1
    if cfg.orthogonalize == "polar_express":
        coefficients, margin = published_coefficients(), 1.02
    for step in range(n_steps):
        lr, mu, decay = factors[step]
        holder = torch.nn.Parameter(torch.empty(p.shape))
        gradients([holder], step)
        grad = holder.grad.double()
        momentum = mu * momentum + (1 - mu) * grad
        direction = iterated(mu * momentum + (1 - mu) * grad, coefficients, margin)
        for i in range(len(p)):
            if cfg.muon_norm == "rows":
                normed = normed_rows(direction[i].numpy(), kept[i])
                direction[i] = torch.from_numpy(normed)
        agrees = (direction * p >= 0).double() if cfg.cautious_decay else torch.ones_like(p)
        p = p - lr * decay * agrees * p - lr * max(p.shape[1:]) ** 0.5 * direction
    return p


@pytest.mark.parametrize("orthogonalize", ["newton_schulz", "polar_express"])
@pytest.mark.parametrize("norm", ["none", "rows"])
@pytest.mark.parametrize("cautious", [False, True])
def test_muon_equals_a_loop_in_float64(orthogonalize, norm, cautious):
    """Four steps of a stack, with every switch, each step at its momentum and decay."""
    cfg = tiny(
        orthogonalize=orthogonalize,
        muon_norm=norm,
        cautious_decay=cautious,
        weight_decay=2.0,
        muon_lr=0.02,
        decay_schedule="to_zero",
        momentum_start=0.8,
        momentum_warmup_iters=2,
        momentum_cooldown_iters=2,
        num_iterations=4,
        warmdown_iters=2,
    )
    rates, momenta = (0.02, 0.02, 0.02, 0.01), (0.8, 0.875, 0.95, 0.875)
    factors = list(zip(rates, momenta, (2.0, 1.5, 1.0, 0.5)))
    p = torch.nn.Parameter(torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(7)))
    wanted = muon_loop(p, cfg, 4, factors)
    optimizer = Optimizer([p], Muon(cfg), Muon.peak(cfg), cfg, ONE)
    steps(optimizer, [p], 4)
    assert torch.allclose(p.double(), wanted, atol=1e-5), (p - wanted).abs().max()
    assert np.allclose([optimizer.hyper_at(step) for step in range(4)], factors)


def test_cautious_adamw_equals_torch_and_a_mask():
    """torch's takes the step without decay; only what it shrinks decays besides."""
    shapes, generator = [(300, 300), (7,), (4, 5)], torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    twins = [torch.nn.Parameter(p.detach().double()) for p in params]
    theirs = torch.optim.AdamW(twins, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    ours = build("adamw", params, lr=0.01, weight_decay=2.0, cautious_decay=True)
    for step in range(4):
        gradients(params, step)
        for p, twin in zip(params, twins):
            twin.grad = p.grad.double()
        before = [twin.detach().clone() for twin in twins]
        ours.reduce_grads()
        ours.step(step, None, GO)
        theirs.step()
        for twin, old in zip(twins, before):
            shrinks = (old - twin.detach()) * old >= 0
            twin.data -= 0.01 * 2.0 * shrinks * old
    for p, twin in zip(params, twins):
        away = (p - twin).abs().detach()
        assert (away < 1e-5).double().mean() > 0.9999  # but where a sign is one of rounding


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sign", [1, 0, -1])
def test_cautious_decay_is_plain_where_all_agree_and_none_where_none_does(name, sign):
    """A direction of 0, as of tokens that a batch has not, speaks against nothing."""
    p = torch.randn(3, 4, 8)
    rules = [OPTIMIZERS[name](tiny(optimizer=name, cautious_decay=on)) for on in (True, False)]
    cautious, plain = p.clone(), p.clone()
    hyper, no = train_gpt.Hyper(0.1, 0.9, 0.5), torch.tensor(False)
    rules[0].decay(cautious, sign * p, hyper, no)
    if sign >= 0:
        rules[1].decay(plain, sign * p, hyper, no)
        assert torch.allclose(plain, p * (1 - 0.1 * 0.5), rtol=1e-6)
    assert torch.equal(cautious, plain)
    rules[0].decay(cautious, cautious, hyper, torch.tensor(True))
    assert torch.equal(cautious, plain)


def test_cautious_adamw_decays_nothing_in_a_skipped_step():
    for grad in (torch.ones(3, 4), torch.full((3, 4), math.nan)):
        p = torch.nn.Parameter(torch.ones(3, 4))
        optimizer = build("adamw", [p], cautious_decay=True, **DECAYING)
        p.grad = grad
        optimizer.reduce_grads()
        optimizer.step(0, None, torch.ones(()))
        assert torch.equal(p, torch.ones(3, 4))


def test_schedules_of_the_decay():
    base = dict(num_iterations=10, warmup_iters=2, warmdown_iters=4, weight_decay=0.3)
    wanted = {
        "constant": [1.0] * 10,
        "follow_lr": [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25],
        "to_zero": [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
    }
    assert wanted.keys() == train_gpt.DECAY_SCHEDULES.keys()
    for name, factors in wanted.items():
        cfg = tiny(decay_schedule=name, **base)
        assert [decay_factor(step, cfg) for step in range(10)] == pytest.approx(factors)
        for rule in OPTIMIZERS.values():
            optimizer = Optimizer([], rule(cfg), rule.peak(cfg), cfg, ONE)
            decays = [optimizer.hyper_at(step).weight_decay for step in range(10)]
            assert decays == pytest.approx([0.3 * factor for factor in factors])


@pytest.mark.parametrize("start", [0.85, 0.99])
def test_momentum_rises_to_its_value_and_falls_at_the_end(start):
    """Or the other way round, where it starts above. Only Muon's."""
    cfg = tiny(
        momentum_start=start,
        muon_momentum=0.95,
        momentum_warmup_iters=4,
        momentum_cooldown_iters=2,
        num_iterations=10,
    )
    muon = Optimizer([], Muon(cfg), Muon.peak(cfg), cfg, ONE)
    found = [muon.hyper_at(step).momentum for step in range(10)]
    way = 0.95 - start
    rise = [start + way * part for part in (0, 0.25, 0.5, 0.75)]
    assert found == pytest.approx([*rise, *[0.95] * 5, start + way / 2])
    assert found[4:9] == [0.95] * 5
    adamw = Optimizer([], AdamW(cfg), AdamW.peak(cfg), cfg, ONE)
    assert {adamw.hyper_at(step).momentum for step in range(10)} == {cfg.beta1}
    assert {momentum_factor(step, tiny()) for step in range(8)} == {1.0}
    no_ramp = dict(momentum_start=start, momentum_warmup_iters=0, momentum_cooldown_iters=0)
    assert {momentum_factor(step, tiny(**no_ramp)) for step in range(8)} == {1.0}


@pytest.mark.parametrize("n, fraction, iters", [(100, 0.5, 50), (7, 0.4, 3), (10, 0, 0), (9, 1, 9)])
def test_a_fraction_of_the_run_for_the_warm_down(n, fraction, iters):
    by_fraction = tiny(num_iterations=n, warmdown_frac=fraction, warmdown_iters=5)
    by_steps = tiny(num_iterations=n, warmdown_iters=iters)
    for step in range(n):
        assert lr_factor(step, by_fraction) == lr_factor(step, by_steps)


# Moving averages of the weights


def test_averages_equal_a_recurrence_in_float64(group):
    """A mean of all weights so far, then exponential; a step that is left out counts as one."""
    cfg = of_optimizer("muon", {"ema_iters": 3, "num_iterations": 8})
    state, seen = State.build(cfg, ONE), []
    for step in range(7):
        left_out = step == 4
        scale = math.nan if left_out else 1.0
        hook = state.model.embed.register_hook(lambda grad, scale=scale: grad * scale)
        before = [p.detach().clone() for p in state.model.parameters()]
        trained(cfg, 1, state)
        hook.remove()
        weights = [p.detach().clone() for p in state.model.parameters()]
        assert left_out == all(map(torch.equal, before, weights))
        if step < 3:
            seen.append(weights)
            wanted = [torch.stack(same).double().mean(0) for same in zip(*seen)]
        else:
            wanted = [w + (p.double() - w) / 3 for w, p in zip(wanted, weights)]
        for ours, theirs in zip(state.averages, wanted, strict=True):
            assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-7)


def test_within_averaged_the_model_has_the_averages_and_after_it_its_weights(group):
    state, _ = trained(of_optimizer("muon", {"ema_iters": 3}), 3)
    kept = [p.detach().clone() for p in state.model.parameters()]
    tokens = BATCH[:, :-1]
    raw = state.model(tokens)
    with pytest.raises(KeyError), averaged(state.model, state.averages) as model:
        for p, average in zip(model.parameters(), state.averages, strict=True):
            assert torch.equal(p, average)
        assert not torch.equal(model(tokens), raw)
        raise KeyError
    assert all(map(torch.equal, state.model.parameters(), kept))
    other, _ = trained(of_optimizer("muon", {}), 3)
    trained(of_optimizer("muon", {"ema_iters": 3}), 1, state)
    trained(of_optimizer("muon", {}), 1, other)
    assert all(map(torch.equal, state.model.parameters(), other.model.parameters()))
    assert other.averages == [] and not [key for key in other.tensors() if "average" in key]
