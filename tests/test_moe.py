"""Mixture of experts against explicit mixtures, and its balance against the definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import run_ranks, tiny

import train_gpt
from train_gpt import BALANCES, EXPERTS, MoE, aux_coef, aux_loss, grouped, quantile_bias

KINDS = [(expert, bias) for expert in EXPERTS for bias in (False, True)]


def moe(seed=0, **changes):
    """An MoE whose every weight is random, so that no branch is silent."""
    layer = MoE(tiny(**{"ffn": "moe", "num_experts": 6, "d_ff": 24} | changes))
    torch.manual_seed(seed)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return layer


def dense_expert(layer, number):
    """The same FFN as a dense one, with the weights of one expert."""
    cfg = tiny(d_ff=24, bias=layer.experts.fc.bias is not None)
    expert = EXPERTS[{cls: name for name, cls in EXPERTS.items()}[type(layer.experts)]](cfg)
    expert.load_state_dict({name: p[number] for name, p in layer.experts.state_dict().items()})
    return expert


def mixture(layer, x):
    """The definition, token by token: every expert on every token, weighted by one-hot choices."""
    p = F.linear(x, layer.router.weight).softmax(-1)
    chosen = torch.topk(p, layer.top_k).indices
    weight = torch.zeros_like(p).scatter(-1, chosen, p.gather(-1, chosen))
    weight = weight / weight.sum(-1, keepdim=True) if layer.top_k > 1 else weight
    outputs = torch.stack([dense_expert(layer, i).to(x.dtype).hidden(x) for i in range(p.size(-1))], dim=-1)
    return (outputs * weight.unsqueeze(-2)).sum(-1) + sum(expert.hidden(x) for expert in layer.always)


@pytest.mark.parametrize("expert, bias", KINDS)
@pytest.mark.parametrize("top_k, shared", [(1, False), (2, True), (6, False)])
def test_it_is_the_mixture_of_its_definition(expert, bias, top_k, shared):
    layer, x = moe(expert=expert, bias=bias, top_k=top_k, shared_expert=shared), torch.randn(3, 5, 32)
    torch.testing.assert_close(layer(x)[0], mixture(layer, x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("expert, bias", KINDS)
def test_gradients_are_those_of_the_definition_in_float64(expert, bias):
    layer, x = moe(expert=expert, bias=bias, shared_expert=True).double(), torch.randn(40, 32).double()
    upstream, x = torch.randn(40, 32).double(), x.requires_grad_()
    inputs = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x)[0], inputs, upstream)
    weights = dict(layer.named_parameters())

    def stacked_mixture(x):
        p = F.linear(x, weights["router.weight"]).softmax(-1)
        chosen = torch.topk(p, 2).indices
        weight = torch.zeros_like(p).scatter(-1, chosen, p.gather(-1, chosen))
        weight = weight / weight.sum(-1, keepdim=True)
        fc, proj = layer.experts.fc, layer.experts.proj
        h = torch.einsum("nc,efc->nef", x, fc.weight.flatten(1, -2)) + (fc.bias if bias else 0)
        y = torch.einsum("nef,ecf->nec", layer.experts.act(h), proj.weight) + (proj.bias if bias else 0)
        return (weight.unsqueeze(-1) * y).sum(1) + layer.always[0].hidden(x)

    for name, a, b in zip(["x", *weights], ours, torch.autograd.grad(stacked_mixture(x), inputs, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("expert, bias", KINDS)
def test_one_expert_is_the_dense_ffn(expert, bias):
    layer, x = moe(num_experts=1, top_k=1, expert=expert, bias=bias), torch.randn(2, 7, 32)
    torch.testing.assert_close(layer(x)[0], dense_expert(layer, 0)(x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(3, 0, 5, 1), (0, 0, 9, 0), (9, 0, 0, 0), (0, 0, 0, 9)])
def test_grouped_products_are_loops_also_over_empty_groups(sizes):
    x, w, y = torch.randn(9, 8), torch.randn(4, 12, 8), torch.randn(9, 12)
    ends, starts = torch.tensor(sizes).cumsum(0), torch.tensor((0, *sizes)).cumsum(0)
    rows = [x[a:b] @ w[i].T for i, (a, b) in enumerate(zip(starts, ends))]
    torch.testing.assert_close(grouped(x, w, ends.int()), torch.cat(rows))
    outer = [y[a:b].T @ x[a:b] for a, b in zip(starts, ends)]
    torch.testing.assert_close(grouped(y, x, ends.int()), torch.stack(outer))
    torch.testing.assert_close(grouped(x, w, ends.int()), F.grouped_mm(x, w.mT.contiguous(), offs=ends.int()))


def test_the_order_of_the_experts_does_not_matter():
    layer, x, order = moe(bias=True), torch.randn(4, 9, 32), torch.randperm(6)
    y, (routing,) = layer(x)
    for part in (layer.router, layer.experts.fc, layer.experts.proj):
        for p in part.parameters():
            p.data = p.data[order]
    torch.testing.assert_close(layer(x)[0], y)
    torch.testing.assert_close(layer(x)[1][0][:2], routing[:2, order])


def test_no_token_reads_another():
    """So it is causal, and a token decoded alone is treated as within its text."""
    layer, x = moe(shared_expert=True), torch.randn(2, 8, 32, requires_grad=True)
    y = layer(x)[0]
    grad, = torch.autograd.grad(y[1, 3].sum(), x)
    assert grad[1, 3].abs().min() > 0
    grad[1, 3] = 0
    assert not grad.any()
    torch.testing.assert_close(layer(x[1:, 3:4])[0], y[1:, 3:4])


def test_an_expert_without_tokens_has_a_zero_gradient():
    layer = moe()
    layer.router.weight.data[4] = -100.0
    layer(torch.rand(2, 8, 32))[0].sum().backward()
    assert not layer.experts.fc.weight.grad[4].any() and layer.experts.fc.weight.grad[:4].any()


@pytest.mark.parametrize("experts, k", [(40, 2), (8, 2), (4, 1)])
def test_aux_is_one_in_balance_and_E_over_k_in_collapse(experts, k):
    even, collapsed = torch.full((experts,), 1 / experts), torch.zeros(experts)
    collapsed[:k] = 1 / k
    assert aux_loss(even, even).item() == pytest.approx(1)
    assert aux_loss(collapsed, collapsed).item() == pytest.approx(experts / k)


def test_load_and_importance_are_counted_over_all_choices_and_all_experts():
    layer, x = moe(), torch.randn(3, 7, 32)
    load, importance, left, found = layer(x)[1][0]
    p = F.linear(x.flatten(0, 1), layer.router.weight).softmax(-1)
    counts = torch.bincount(p.topk(2).indices.flatten(), minlength=6)
    torch.testing.assert_close(load, counts / (21 * 2))
    torch.testing.assert_close(importance, p.mean(0))
    assert torch.equal(left, load) and not found.any()


def test_the_gradient_of_aux_goes_through_importance_only():
    layer, x = moe(), torch.randn(3, 7, 32)
    routing, = layer(x)[1]
    f = torch.rand(6)
    aux_loss(f, routing[1]).backward()
    p = F.linear(x.flatten(0, 1), layer.router.weight).softmax(-1)
    expected, = torch.autograd.grad(6 * (f * p.mean(0)).sum(), layer.router.weight)
    torch.testing.assert_close(layer.router.weight.grad, expected)
    assert not routing[0].grad_fn or layer.experts.fc.weight.grad is None


def test_the_schedule_of_the_coefficient():
    cfg = tiny(num_iterations=1000, aux_loss_coef_start=0.05, aux_loss_coef_end=0.01, aux_warmup_frac=0.05,
               aux_decay_end_frac=0.30)
    assert [aux_coef(step, cfg) for step in (0, 49, 50, 300, 999)] == pytest.approx([0.05, 0.05, 0.05, 0.01, 0.01])
    assert aux_coef(175, cfg) == pytest.approx(0.03)
    assert aux_coef(3, tiny(aux_loss_coef=0.02)) == 0.02
    assert aux_coef(3, tiny(ffn="moe", balance="quantile")) == 0


def test_quantile_bias_balances_a_skewed_router_in_a_few_steps():
    torch.manual_seed(0)
    skew, bias, worst = 2 * torch.randn(40), torch.zeros(40), []
    for _ in range(5):
        p = (torch.randn(2048, 40) + skew).softmax(-1)
        load = torch.bincount((p + bias).topk(2).indices.flatten(), minlength=40) / 4096
        worst.append(load.max().item() * 40 - 1)
        bias = quantile_bias(p, bias, 2)
    assert worst[0] > 4 and worst[-1] < 0.5 and abs(bias.mean()) < 1e-6


def test_a_bias_changes_the_choice_and_nothing_else():
    layer, x = moe(balance="quantile", top_k=1), torch.randn(5, 32)
    layer.balance[3] = 10.0
    p = F.linear(x, layer.router.weight).softmax(-1)
    torch.testing.assert_close(layer(x)[0], p[:, 3:4] * dense_expert(layer, 3).hidden(x), rtol=2e-5, atol=1e-5)
    assert layer(x)[1][0][0].tolist() == [0, 0, 0, 1, 0, 0]
    assert torch.equal(layer.eval()(x)[1][0][2], layer.balance), "evaluation leaves the bias alone"


@pytest.mark.parametrize("balance", BALANCES)
def test_it_compiles_without_a_graph_break(balance):
    layer, x = moe(balance=balance, shared_expert=True, bias=True), torch.randn(2, 8, 32)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layer(x)[0].square().sum().backward()
    grads = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    y, (routing,) = run(x)
    torch.testing.assert_close(y, layer(x)[0])
    torch.testing.assert_close(routing, layer(x)[1][0])
    y.square().sum().backward()
    for p, grad in zip(layer.parameters(), grads):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-4)
    assert math.isfinite(y.sum().item())
