"""Optimizers against those of torch, ranks against one another, contracts over all, schedules."""

import math
import re

import pytest
import torch
from conftest import VARIANTS, run_ranks, tiny

from harness.ranks import Ranks
import train_gpt
from train_gpt import (
    GPT,
    AdamW,
    OPTIMIZERS,
    RECURRENCES,
    SCHEDULES,
    LossScale,
    Muon,
    Optimizer,
    State,
    build_optimizers,
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
    """A step moves every weight by about the learning rate, whatever the shape."""
    p = torch.nn.Parameter(torch.zeros(shape))
    steps(build("muon", [p], muon_lr=0.02, muon_scale="unit"), [p], 1)
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


def of_optimizer(name):
    return tiny(optimizer=name, lr=0.01, weight_decay=0.1, num_iterations=100, warmdown_iters=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_falls(name, group):
    losses = trained(of_optimizer(name), 10)[1]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_whose_gradients_are_not_finite_changes_nothing(name, group):
    """Neither parameters nor what a checkpoint holds of the optimizers, nor what follows."""
    cfg = of_optimizer(name)
    state, _ = trained(cfg, 2)
    before = bits(state)
    hooks = [p.register_hook(lambda grad: grad * math.nan) for p in state.model.parameters()]
    trained(cfg, 1, state)
    for hook in hooks:
        hook.remove()
    assert_equal(bits(state), before)
    assert_equal(bits(trained(cfg, 2, state)[0]), bits(trained(cfg, 4)[0]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_holds_all_that_later_steps_need(name, group):
    """What is filled from it goes on as what it was taken from."""
    cfg = of_optimizer(name)
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
    return torch.cat([p.detach().flatten() for p in state.model.parameters()]), torch.stack(stats)


@pytest.mark.parametrize(
    "settings",
    [
        *({"optimizer": name} for name in OPTIMIZERS),
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
    """1, 2 and 3 ranks: one batch, one model. Every rank of a group holds the same bits. The
    micro-batches may be others, but with BALANCE=quantile, which takes quantiles within each."""
    # Products with few rows go by another CPU library, and AdamW's first steps are as large for the
    # smallest gradients, which are all rounding, as for any other.
    sensitive = "optimizer" in settings or "tie_embeddings" in settings
    atol = 3e-4 if sensitive else 2e-5
    settings = {"vocab_size": 4096} | settings  # an embedding large enough to be sliced
    ((alone, stats),) = run_ranks(1, lambda ranks: three_steps(ranks, **settings))
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
        ("headwise", set()),
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


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_expert_without_tokens_keeps_weights_and_momentum(decay):
    """An update has one size however old the momentum is; other experts move as ever."""
    bank = torch.nn.Parameter(torch.randn(2, 3, 8, 16))
    twin, optimizers = torch.nn.Parameter(bank.detach().clone()), []
    for p in (bank, twin):
        optimizers.append(build("muon", [p], muon_lr=0.02, weight_decay=decay))
        steps(optimizers[-1], [p], 1)
    state = optimizers[0].partitions[0].state
    before, momentum = bank.detach().clone(), state["momentum"].clone()
    for optimizer, p in zip(optimizers, (bank, twin)):
        gradients([p], 1)
        if p is bank:
            p.grad[1, 2] = 0
        optimizer.reduce_grads()
        optimizer.step(1, None, GO)
    assert torch.equal(bank[1, 2], before[1, 2])
    assert torch.equal(state["momentum"][5], momentum[5])
    assert not torch.equal(twin[1, 2], before[1, 2])
    assert torch.equal(bank.flatten(0, 1)[:5], twin.flatten(0, 1)[:5])
