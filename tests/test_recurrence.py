"""Recurrent depth: a loop over banks is the stacked model, a shared block a stack of equal ones."""

from collections import Counter

import pytest
import torch
from conftest import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from check_recurrence import by_layer
from harness.ranks import Ranks
from store.contract import ConfigError
from train_gpt import (
    GPT,
    IMPORTANCE,
    LOAD,
    PER_VISIT,
    Config,
    State,
    make_plan,
    split_params,
    train_step,
    visit_order,
)

KINDS = [
    {},
    {"ffn": "moe", "bias": True, "norm": "layer", "expert": "swiglu"},
    {"ffn": "moe", "attngate": "elementwise", "balance": "quantile", "shared_expert": True},
    {"ffn": "relu2,moe", "attngate": "const", "n_layer": 4},
    {"optimizer": "adamw", "weight_decay": 0.1, "pos": "learned", "attngate": "headwise"},
]


def build(**changes):
    """A state of this model with every parameter random, and a batch."""
    cfg = tiny(**{"n_layer": 3} | changes)
    state = State.build(cfg, Ranks())
    return cfg, state, torch.randint(0, 64, (12, 17), generator=torch.Generator().manual_seed(1))


def randomize(model):
    """Fills every parameter with random numbers, so that no branch is silent."""
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.data.normal_(std=0.2, generator=generator)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_indexed_is_stacked_to_the_bit(kind, group):
    """Losses, gradients, and all parameters after three optimizer steps."""
    (cfg, stacked, batch), (_, indexed, _) = build(**kind), build(**kind, recurrence="indexed")
    assert set(indexed.model.order) == set(range(len(kind.get("ffn", "").split(","))))
    inputs, targets = batch[:, :-1], batch[:, 1:]
    for model in (stacked.model, indexed.model):
        model(inputs, targets)[0].backward()
    ours = by_layer(indexed.model)
    assert set(ours) == set(stacked.model.state_dict())
    for name, p in stacked.model.named_parameters():
        assert torch.equal(ours[name][1], p.grad), name
    for state in (stacked, indexed):
        state.model.zero_grad()
    for _ in range(3):
        losses = [train_step(state, cfg, inputs, targets).loss for state in (stacked, indexed)]
        assert losses[0] == losses[1]
    for name, tensor in by_layer(indexed.model).items():
        torch.testing.assert_close(
            tensor[0],
            stacked.model.state_dict()[name],
            rtol=1e-6,
            atol=1e-7,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("kind", KINDS[:4], ids=str)
def test_one_visit_of_a_shared_block_is_the_plain_model(kind):
    kind = kind | {"n_layer": 1, "ffn": kind.get("ffn", "relu2").split(",")[-1]}
    plain, shared = GPT(tiny(**kind)), GPT(tiny(**kind, recurrence="shared"))
    shared.load_state_dict(plain.state_dict())
    tokens = torch.randint(0, 64, (2, 16))
    assert torch.equal(plain(tokens), shared(tokens))


@pytest.mark.parametrize(
    "kind",
    [
        {"n_layer": 4},
        {"n_layer": 4, "ffn": "moe", "bias": True, "norm": "layer"},
        {"n_layer": 6, "n_unique": 2, "unshared_ends": 1, "ffn": "moe,gelu"},
    ],
    ids=str,
)
def test_a_stack_of_equal_blocks_is_the_shared_one_and_its_gradients_sum(kind):
    shared = GPT(tiny(**kind, recurrence="shared"))
    plain = {
        name: value for name, value in kind.items() if name not in ("n_unique", "unshared_ends")
    }
    stacked, indexed = GPT(tiny(**plain)), GPT(tiny(**plain, recurrence="indexed"))
    randomize(shared)
    with torch.no_grad():
        for layer, i in enumerate(shared.order):
            stacked.blocks[layer].load_state_dict(shared.blocks[i].state_dict())
        for name, (tensor, _) in by_layer(indexed).items():
            if not name.startswith("blocks."):
                tensor.copy_(shared.state_dict()[name])
                stacked.state_dict()[name].copy_(tensor)
        for name, (tensor, _) in by_layer(indexed).items():
            tensor.copy_(stacked.state_dict()[name])
    tokens = torch.randint(0, 64, (2, 16))
    losses = []
    for model in (shared, stacked, indexed):
        losses.append(model(tokens, tokens)[0])
        losses[-1].backward()
    assert losses[0] == losses[1] == losses[2]
    for i, block in enumerate(shared.blocks):
        twins = [
            dict(stacked.blocks[layer].named_parameters())
            for layer, j in enumerate(shared.order)
            if i == j
        ]
        for name, p in block.named_parameters():
            torch.testing.assert_close(
                p.grad, sum(twin[name].grad for twin in twins), rtol=1e-4, atol=1e-6
            )


def test_what_each_visit_has_for_itself_starts_as_if_shared():
    kind = {"n_layer": 4, "ffn": "moe", "norm": "rms_gain", "recurrence": "shared"}
    shared, own = GPT(tiny(**kind)), GPT(tiny(**kind, per_visit="norm,router"))
    weights = shared.state_dict()
    own.load_state_dict({name: weights[name].expand_as(p) for name, p in own.state_dict().items()})
    randomize(shared)
    with torch.no_grad():
        for name, p in own.named_parameters():
            p.copy_(shared.state_dict()[name])
    tokens = torch.randint(0, 64, (2, 16))
    assert torch.equal(shared(tokens), own(tokens))
    own(tokens, tokens)[0].backward()
    banks = {name: p for name, p in own.named_parameters() if name.split(".", 2)[-1] in own.banked}
    assert {name: tuple(p.shape) for name, p in banks.items()} == {
        "blocks.0.mixer_norm.1.weight": (4, 32),
        "blocks.0.ffn_norm.1.weight": (4, 32),
        "blocks.0.ffn.router.weight": (4, 8, 32),
    }
    assert all(p.grad[0].ne(p.grad[3]).any() for p in banks.values())
    assert not {id(p) for p in banks.values()} & {id(p) for p in split_params(own)["matrices"]}


def test_the_scale_of_a_branch_starts_at_one_over_the_visits():
    model = GPT(tiny(n_layer=5, recurrence="shared", unshared_ends=1, per_visit="scale"))
    assert [block.mixer_scale.weight.tolist() for block in model.blocks] == [
        [1.0],
        [pytest.approx(1 / 3)] * 3,
        [1.0],
    ]


@pytest.mark.parametrize(
    "n_layer, n_unique, ends, order",
    [
        (4, 1, 0, (0, 0, 0, 0)),
        (5, 2, 0, (0, 1, 0, 1, 0)),
        (6, 2, 1, (0, 1, 2, 1, 2, 3)),
        (4, 1, 1, (0, 1, 1, 2)),
        (5, 1, 2, (0, 1, 2, 3, 4)),
    ],
)
def test_the_order_of_visits(n_layer, n_unique, ends, order):
    cfg = Config(recurrence="shared", n_layer=n_layer, n_unique=n_unique, unshared_ends=ends)
    assert visit_order(cfg) == order


def test_counts_are_of_weights_once_and_of_products_by_visit():
    plans = {
        name: make_plan(tiny(n_layer=4, recurrence=name), Ranks())
        for name in ("stacked", "indexed", "shared")
    }
    assert (
        plans["stacked"]["params_total"]
        == plans["indexed"]["params_total"]
        == 64 * 32 + 4 * 12 * 32 * 32
    )
    assert plans["shared"]["params_total"] == 64 * 32 + 12 * 32 * 32
    assert len({plan["flops_per_token"] for plan in plans.values()}) == 1


class Casts(TorchDispatchMode):
    """Counts casts from float32 to bfloat16, by shape."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.count[tuple(args[0].shape)] += args[0].dtype == torch.float32
        return result


def test_the_weights_of_a_block_that_is_visited_often_are_cast_once(monkeypatch):
    """In bfloat16; losses and gradients are those of a cast at each visit, to the last bit."""
    settings = dict(n_layer=4, ffn="moe", recurrence="shared", attngate="headwise", n_embd=48)
    tokens, found, shapes = torch.arange(34).view(2, 17) % 64, {}, {(8, 128, 48), (48, 48), (2, 48)}
    for kind in ("once", "at each visit"):
        if kind == "at each visit":
            monkeypatch.setattr(GPT, "cast_weights", lambda model, index: {})
        torch.manual_seed(0)
        model = GPT(tiny(**settings), torch.bfloat16)
        randomize(model)
        with Casts() as casts:
            loss, routing = model(tokens[:, :-1], tokens[:, 1:])
            (loss + routing[:, IMPORTANCE].square().sum()).backward()
        gradients = [p.grad for p in model.parameters()]
        found[kind] = [loss, *gradients], {shape: casts.count[shape] for shape in shapes}
    assert found["once"][1] == dict.fromkeys(shapes, 1)
    assert found["at each visit"][1] == dict.fromkeys(shapes, 4)
    for ours, theirs in zip(found["once"][0], found["at each visit"][0]):
        assert torch.equal(ours, theirs)


def test_the_load_is_pooled_over_the_visits_of_a_block(group):
    cfg, state, batch = build(n_layer=4, ffn="moe", recurrence="shared", unshared_ends=1)
    routing = train_step(state, cfg, batch[:, :-1], batch[:, 1:]).routing
    states = [block.ffn.router_state for block in state.model.blocks]
    for router_state, visits in zip(states, ([0], [1, 2], [3])):
        torch.testing.assert_close(router_state, routing[visits, LOAD].mean(0))
        assert router_state.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("recurrence", ["indexed", "shared"])
def test_all_visits_run_one_compiled_block(recurrence):
    """A step number passed as an integer would compile the block for each."""
    model = GPT(tiny(n_layer=4, recurrence=recurrence, ffn="moe"))
    randomize(model)
    tokens, compiled = torch.randint(0, 64, (2, 16)), []
    expected = model(tokens)
    torch._dynamo.reset()
    model.blocks[0].compile(
        backend=lambda graph, _: compiled.append(graph) or graph, fullgraph=True
    )
    torch.testing.assert_close(model(tokens), expected)
    assert len(compiled) == 1


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_unique": 2}, ["N_UNIQUE=2", "RECURRENCE=shared"]),
        ({"unshared_ends": 1}, ["UNSHARED_ENDS=1"]),
        ({"per_visit": "norm"}, ["PER_VISIT=norm", "RECURRENCE=shared"]),
        ({"recurrence": "shared", "per_visit": "norm"}, ["PER_VISIT=norm", "rms_gain or layer"]),
        (
            {"optimizer": "adamw", "router_optimizer": "muon"},
            ["ROUTER_OPTIMIZER=muon", "OPTIMIZER=muon"],
        ),
        ({"recurrence": "shared", "per_visit": "router"}, ["PER_VISIT=router", "FFN=moe"]),
        (
            {"recurrence": "shared", "per_visit": "depth"},
            ["PER_VISIT=depth", ", ".join(PER_VISIT)],
        ),
        (
            {"recurrence": "shared", "n_layer": 3, "n_unique": 2, "unshared_ends": 1},
            ["N_LAYER=3", "N_UNIQUE=2"],
        ),
        (
            {"recurrence": "shared", "ffn": "moe,relu2"},
            ["N_UNIQUE=1", "a multiple of 2", "FFN=moe,relu2"],
        ),
        ({"balance": "quantile"}, ["BALANCE=quantile", "FFN=moe"]),
        ({"ffn": "moe", "top_k": 9}, ["TOP_K=9", "NUM_EXPERTS=8"]),
        (
            {"ffn": "moe", "aux_loss_coef_end": 0.1},
            ["AUX_LOSS_COEF_START=None", "AUX_LOSS_COEF_END"],
        ),
        ({"ffn": "moe", "aux_warmup_frac": 0.5}, ["AUX_DECAY_END_FRAC=0.3", "AUX_WARMUP_FRAC"]),
    ],
)
def test_what_has_no_meaning_together_is_refused_by_name(changes, words):
    with pytest.raises(ConfigError) as refused:
        tiny(**changes)
    assert all(word in str(refused.value) for word in words), refused.value
