"""Mixture of experts against explicit mixtures, and its balance against the definitions."""

import math
import os
import re
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import CLOCKS, launch, points, row, run_ranks, summary, tiny
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from harness.ranks import Ranks
from ops import products
from ops.experts import Gather, sort_by_expert
from ops.products import GroupedMatmul, grouped_matmul, grouped_outer
import train_gpt
from ops import sharding
from train_gpt import (
    BALANCES,
    EXPERTS,
    HEALTH,
    IMPORTANCE,
    LOAD,
    NEXT_STATE,
    MoE,
    State,
    aux_coef,
    aux_loss,
    expert_health,
    leave_bias,
    train_step,
)

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
    expert = type(layer.experts)(cfg)
    expert.load_state_dict({name: p[number] for name, p in layer.experts.state_dict().items()})
    return expert


def mixture(layer, x):
    """The definition, token by token: every expert on every token, weighted by one-hot choices."""
    p = F.linear(x, layer.router.weight).softmax(-1)
    chosen = torch.topk(p, layer.top_k).indices
    weight = torch.zeros_like(p).scatter(-1, chosen, p.gather(-1, chosen))
    weight = weight / weight.sum(-1, keepdim=True) if layer.top_k > 1 else weight
    outputs = torch.stack(
        [dense_expert(layer, i).to(x.dtype).transform(x) for i in range(p.size(-1))], dim=-1
    )
    return (outputs * weight.unsqueeze(-2)).sum(-1) + sum(
        expert.transform(x) for expert in layer.always
    )


@pytest.mark.parametrize("expert, bias", KINDS)
@pytest.mark.parametrize("top_k, shared", [(1, False), (2, True), (6, False)])
def test_it_is_the_mixture_of_its_definition(expert, bias, top_k, shared):
    layer, x = (
        moe(expert=expert, bias=bias, top_k=top_k, shared_expert=shared),
        torch.randn(3, 5, 32),
    )
    torch.testing.assert_close(layer(x)[0], mixture(layer, x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("expert, bias", KINDS)
def test_gradients_are_those_of_the_definition_in_float64(expert, bias):
    layer, x = (
        moe(expert=expert, bias=bias, shared_expert=True).double(),
        torch.randn(40, 32).double(),
    )
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
        y = torch.einsum("nef,ecf->nec", layer.experts.act(h), proj.weight) + (
            proj.bias if bias else 0
        )
        return (weight.unsqueeze(-1) * y).sum(1) + layer.always[0].transform(x)

    for name, a, b in zip(
        ["x", *weights], ours, torch.autograd.grad(stacked_mixture(x), inputs, upstream)
    ):
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("expert, bias", KINDS)
def test_one_expert_is_the_dense_ffn(expert, bias):
    layer, x = moe(num_experts=1, top_k=1, expert=expert, bias=bias), torch.randn(2, 7, 32)
    torch.testing.assert_close(layer(x)[0], dense_expert(layer, 0)(x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(3, 0, 5, 1), (0, 0, 9, 0), (9, 0, 0, 0), (0, 0, 0, 9)])
def test_grouped_products_are_loops_also_over_empty_groups(sizes, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size: x.new_full(size, math.nan))
    x, w, y = torch.randn(9, 8), torch.randn(4, 12, 8), torch.randn(9, 12)
    ends, starts = torch.tensor(sizes).cumsum(0), torch.tensor((0, *sizes)).cumsum(0)
    rows = [x[a:b] @ w[i].T for i, (a, b) in enumerate(zip(starts, ends))]
    offsets = ends.int()
    torch.testing.assert_close(grouped_matmul(x, w, offsets), torch.cat(rows))
    outer = [y[a:b].T @ x[a:b] for a, b in zip(starts, ends)]
    torch.testing.assert_close(grouped_outer(y, x, offsets), torch.stack(outer))
    theirs = F.grouped_mm(x, w.mT.contiguous(), offs=offsets)
    torch.testing.assert_close(grouped_matmul(x, w, offsets), theirs)


def test_only_large_groups_are_worth_a_kernel_of_their_size(monkeypatch):
    """On processors where oneDNN multiplies faster but makes a kernel for each number of rows."""
    large = []

    def matmul_nt(a, b):
        large.append(a.numel() * len(b))
        return (a.double() @ b.double().mT).float()

    monkeypatch.setattr(products, "ONEDNN", True)
    monkeypatch.setattr(products, "matmul_nt", matmul_nt)
    x, w = torch.randn(1284, 256), torch.randn(2, 256, 256)
    offsets, groups = torch.tensor([1024, 1284]), x.split([1024, 260])
    y = grouped_matmul(x, w, offsets)
    torch.testing.assert_close(
        y, torch.cat([a @ b.T for a, b in zip(groups, w)]), rtol=0, atol=1e-3
    )
    outer = grouped_outer(x, y, offsets)
    theirs = torch.stack([a.T @ b for a, b in zip(groups, y.split([1024, 260]))])
    torch.testing.assert_close(outer, theirs, rtol=0, atol=0.1)
    assert large == [2**26, 2**26]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_rows_go_to_their_experts_and_back(k):
    """Against lists of Python, and autograd of plain indexing in float64; two experts have none."""
    chosen = torch.stack([torch.randperm(5)[:k] for _ in range(11)])
    chosen += chosen >= 2  # nobody's first choice, nor any other, is 2 or 6
    flat = chosen.flatten().tolist()
    expert, order, back, offsets = sort_by_expert(chosen, 7)
    assert order.tolist() == sorted(range(11 * k), key=lambda i: flat[i])
    assert expert.tolist() == sorted(flat) and offsets.dtype == torch.int32
    assert [order.tolist().index(i) for i in range(11 * k)] == back.tolist()
    assert offsets.tolist() == [sum(e <= i for e in flat) for i in range(7)]

    x = torch.randn(11, 4).double().requires_grad_()
    weight = torch.randn(11 * k, 4).double()
    rows, plain = Gather.apply(x, order // k, back), x[order // k]
    assert torch.equal(rows, plain)
    y, plain_y = Gather.apply(rows.tanh() * weight, back, order), (plain.tanh() * weight)[back]
    assert torch.equal(y, plain_y)
    (ours,), (theirs,) = (torch.autograd.grad((out * weight).sum(), x) for out in (y, plain_y))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: Gather.apply(x, order // k, back), x)


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
    (grad,) = torch.autograd.grad(y[1, 3].sum(), x)
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
    (routing,) = layer(x)[1]
    (grad,) = torch.autograd.grad(aux_loss(routing[LOAD], routing[IMPORTANCE]), layer.router.weight)
    p = F.linear(x.flatten(0, 1), layer.router.weight).softmax(-1)
    (expected,) = torch.autograd.grad(
        6 * (routing[LOAD].detach() * p.mean(0)).sum(), layer.router.weight
    )
    torch.testing.assert_close(grad, expected)


def test_the_schedule_of_the_coefficient():
    cfg = tiny(
        num_iterations=1000,
        aux_loss_coef_start=0.05,
        aux_loss_coef_end=0.01,
        aux_warmup_frac=0.05,
        aux_decay_end_frac=0.30,
    )
    assert [aux_coef(step, cfg) for step in (0, 49, 50, 300, 999)] == pytest.approx(
        [0.05, 0.05, 0.05, 0.01, 0.01]
    )
    assert aux_coef(175, cfg) == pytest.approx(0.03)
    assert aux_coef(3, tiny(aux_loss_coef=0.02)) == 0.02
    assert aux_coef(3, tiny(ffn="moe", balance="quantile")) == 0


def test_the_bias_of_quantiles_balances_a_skewed_router_in_a_few_steps():
    torch.manual_seed(0)
    skew, bias, worst = 2 * torch.randn(40), torch.zeros(40), []
    for _ in range(5):
        p = (torch.randn(2048, 40) + skew).softmax(-1)
        load = torch.bincount((p + bias).topk(2).indices.flatten(), minlength=40) / 4096
        worst.append(load.max().item() * 40 - 1)
        bias = leave_bias(load, p, bias, 2)
    assert worst[0] > 4 and worst[-1] < 0.5 and abs(bias.mean()) < 1e-6


def test_a_bias_changes_the_choice_and_nothing_else():
    layer, x = moe(balance="quantile", top_k=1), torch.randn(5, 32)
    layer.router_state[3] = 10.0
    p = F.linear(x, layer.router.weight).softmax(-1)
    torch.testing.assert_close(
        layer(x)[0], p[:, 3:4] * dense_expert(layer, 3).transform(x), rtol=2e-5, atol=1e-5
    )
    assert layer(x)[1][0][LOAD].tolist() == [0, 0, 0, 1, 0, 0]
    left = layer.eval()(x)[1][0][NEXT_STATE]
    assert torch.equal(left, layer.router_state), "evaluation leaves the bias alone"


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


def test_health_of_loads_that_are_known():
    routing = torch.zeros(3, 4, 8)
    routing[0, :2] = 1 / 8  # even
    routing[1, :2, :2] = 0.5  # two of eight have all
    routing[2, 0, 0], routing[2, 1] = 1.0, 1 / 8
    health = expert_health(routing[..., LOAD, :], routing[..., IMPORTANCE, :])
    assert health["entropy"].tolist() == pytest.approx([1, 1 / 3, 0]) and health[
        "dead"
    ].tolist() == [0, 6, 7]
    assert health["aux"].tolist() == pytest.approx([1, 4, 1])
    assert health["dropped"].tolist() == [0, 0, 0]
    routing[1, 0, 1] = 0.25  # a quarter of the choices reach nobody
    assert expert_health(routing[..., LOAD, :], routing[..., IMPORTANCE, :])[
        "dropped"
    ].tolist() == [0, 0.25, 0]
    assert health["load_min"].tolist() == [1 / 8, 0, 0] and health["load_max"].tolist() == [
        1 / 8,
        0.5,
        1,
    ]


MOE = {
    "FFN": "relu2,moe",
    "N_LAYER": 4,
    "BALANCE_LOG_INTERVAL": 2,
    "LOG_EVERY": 3,
    "NUM_ITERATIONS": 10,
    "AUX_LOSS_COEF_START": 0.05,
    "AUX_LOSS_COEF_END": 0.01,
    "AUX_WARMUP_FRAC": 0.2,
    "AUX_DECAY_END_FRAC": 0.8,
}
LINE = re.compile(
    r"^\[MOE\] step:(\d+)/10 coef:(\d\.\d{4}) aux:(\d+\.\d{4}) entropy:(\d\.\d{4}) "
    r"load_min:(\d\.\d{4}) load_max:(\d\.\d{4}) dead:(\d+) dropped:0$",
    re.M,
)


def test_a_run_tells_the_health_of_its_experts(settings):
    codes, out = launch(settings | MOE)
    assert codes == [0], out
    lines = {int(step): [float(value) for value in values] for step, *values in LINE.findall(out)}
    assert list(lines) == [2, 4, 6, 8, 10]
    assert [lines[step][0] for step in (2, 4, 10)] == pytest.approx([0.05, 0.0433, 0.01], abs=1e-4)
    curve = {int(point["step"]): point for point in points(settings)}
    assert [name for name in curve[2] if name.endswith(("_1", "_3"))] == [
        f"{n}_{i}" for i in (1, 3) for n in HEALTH
    ]
    for step, (coef, aux, entropy, least, most, dead) in lines.items():
        of = {name: [float(curve[step][f"{name}_{layer}"]) for layer in (1, 3)] for name in HEALTH}
        assert float(curve[step]["aux_coef"]) == pytest.approx(coef, abs=1e-4)
        assert [aux, entropy] == pytest.approx(
            [sum(of[name]) / 2 for name in ("aux", "entropy")], abs=1e-4
        )
        assert [least, most, dead] == pytest.approx(
            [min(of["load_min"]), max(of["load_max"]), sum(of["dead"])], abs=1e-4
        )
        assert least <= 1 / 8 <= most <= 1 / 2 and 0 < entropy <= 1
    assert {step for step, row in curve.items() if row["aux_1"]} == set(lines)
    told = summary(settings)
    assert told["moe_dropped"] == 0 and told["val_accuracy"] == float(curve[10]["val_accuracy"])
    assert told["moe_load_max"] == pytest.approx(lines[10][4], abs=1e-4)
    assert told["moe_max_vio"] == pytest.approx(8 * told["moe_load_max"] - 1)
    cells = row(settings)
    assert all(float(cells[f"moe_{name}"]) == told[f"moe_{name}"] for name in [*HEALTH, "max_vio"])
    dense, out = launch(settings | {"RUN_ID": "dense"})
    assert (
        dense == [0]
        and "[MOE]" not in out
        and "aux" not in (settings["LOG_DIR"] / "dense.csv").read_text()
    )


def test_a_resumed_run_goes_on_with_balance_and_schedule(settings, tmp_path, monkeypatch):
    """Killed between checkpoints, it tells each step once, and what a run never stopped tells."""
    straight = settings | MOE | {"LOG_DIR": tmp_path / "straight"}
    assert launch(straight)[0] == [0]
    original = train_gpt.train_step

    def fatal(state, *args):
        if state.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "train_step", fatal)
        assert launch(settings | MOE | {"SAVE_EVERY": 3})[0] == [-9]
    codes, out = launch(settings | MOE | {"SAVE_EVERY": 3, "RESUME": "auto"})
    assert codes == [0], out
    logs = [LINE.findall((run["LOG_DIR"] / "toy.txt").read_text()) for run in (straight, settings)]
    assert logs[0] == logs[1] and len(logs[0]) == 5
    curves = [
        [
            {name: cell for name, cell in point.items() if name not in CLOCKS}
            for point in points(run)
        ]
        for run in (straight, settings)
    ]
    assert curves[0] == curves[1]
    codes, out = launch(
        settings | MOE | {"NUM_ITERATIONS": 20, "RESUME": "auto", "WARMDOWN_ITERS": 4}
    )
    assert (
        codes == [2]
        and "AUX" not in out.split("other settings")[0]
        and "NUM_ITERATIONS 10 -> 20" in out
    )


def test_a_coefficient_of_the_past_cannot_change(settings):
    steady = settings | {"FFN": "moe", "WARMDOWN_ITERS": 0}
    assert launch(steady)[0] == [0]
    codes, out = launch(steady | {"AUX_LOSS_COEF": 0.02, "NUM_ITERATIONS": 12, "RESUME": "auto"})
    assert codes == [2] and "AUX_LOSS_COEF 0.01 -> 0.02" in out
    assert launch(steady | {"NUM_ITERATIONS": 12, "RESUME": "auto"})[0] == [0]


@pytest.mark.parametrize("balance", BALANCES)
def test_a_step_reads_nothing_from_the_device(group, balance):
    """Neither item() nor a tensor in an if; a CPU alone reads sizes of groups: nothing waits."""

    class Reads(TorchDispatchMode):
        found = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                self.found.append(function)
            return function(*args, **kwargs or {})

    cfg = tiny(ffn="moe", balance=balance, n_layer=3, recurrence="shared", unshared_ends=1)
    state, batch = State.build(cfg, Ranks()), torch.randint(0, 64, (12, 17))
    with Reads() as reads:
        train_step(state, cfg, batch[:, :-1], batch[:, 1:])
        assert reads.found == []
        batch.sum().item()
    assert len(reads.found) == 1


def test_what_a_step_left_out_does_not_reach_the_balance(group, monkeypatch):
    cfg = tiny(ffn="moe")
    state, batch = State.build(cfg, Ranks()), torch.randint(0, 64, (12, 17))
    train_step(state, cfg, batch[:, :-1], batch[:, 1:])
    before = [router_state.clone() for router_state, _ in state.model.router_states()]
    assert all(router_state.any() for router_state in before)
    for module in (train_gpt, sharding):
        monkeypatch.setattr(module, "squared_norm", lambda tensors: torch.tensor(math.nan))
    train_step(state, cfg, batch[:, :-1], batch[:, 1:])
    assert all(torch.equal(a, b) for a, (b, _) in zip(before, state.model.router_states()))


def test_widths_that_a_grouped_kernel_cannot_take_go_by_the_loop(monkeypatch):
    """Its rows must be multiples of 16 bytes; what it takes it gets."""
    taken = []
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: taken.append(args))

    class OnCuda(torch.Tensor):
        is_cuda = True

    offsets = torch.tensor([2, 4])
    for k, m, takes in (96, 8, True), (98, 8, False), (100, 8, True), (96, 6, False):  # float32
        shapes = (4, k), (2, m, k), (4, m)
        x, w, y = (torch.randn(shape).as_subclass(OnCuda) for shape in shapes)
        grouped_matmul(x, w, offsets)
        assert len(taken) == takes
        grouped_outer(y, x, offsets)
        assert len(taken) == 2 * takes
        taken.clear()


def test_bfloat16_products_on_cuda_are_traced_and_others_opaque(monkeypatch):
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "grouped" in str(function):
                found.append(str(function))
            return function(*args, **kwargs or {})

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    opaque = ["train_gpt.grouped_matmul.default"] * 2 + ["train_gpt.grouped_outer.default"]
    traced = ["aten._grouped_mm.default"] * 3
    for dtype, width, expected in (
        (torch.bfloat16, 16, traced),
        (torch.bfloat16, 12, opaque),
        (torch.float16, 16, opaque),
        (torch.float32, 16, opaque),
    ):
        found = []
        with FakeTensorMode(), torch.device("cuda"), Products():
            shapes = (9, width), (3, 8, width), (9, 8)
            x, w, y = (torch.empty(shape, dtype=dtype) for shape in shapes)
            offsets = torch.empty(3, dtype=torch.int32)
            assert grouped_matmul(x, w, offsets).shape == (9, 8)
            assert grouped_matmul(y, w.mT, offsets).shape == (9, width)
            assert grouped_outer(y, x, offsets).shape == (3, 8, width)
        assert found == expected


def test_what_is_traced_has_the_gradients_of_a_loop():
    """Of torch's own product, in bfloat16 on a CPU; one group is empty."""
    torch.manual_seed(0)
    x, w, upstream = (torch.randn(size).bfloat16() for size in ((9, 16), (3, 8, 16), (9, 8)))
    ends = [4, 4, 9]

    def work(ranks):
        seen = []

        def keep(graph, inputs):
            names = [str(node.target) for node in graph.graph.nodes]
            seen.extend(name for name in names if "grouped" in name)
            return graph.forward

        products.can_group_on_cuda = lambda *tensors: True
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        run = torch.compile(GroupedMatmul.apply, fullgraph=True, backend=backend)
        inputs = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = run(*inputs, torch.tensor(ends).int())
        return y.detach(), *torch.autograd.grad(y, inputs, upstream), seen

    ((*ours, seen),) = run_ranks(1, work)
    assert seen == ["aten._grouped_mm.default"] * 3
    plain = [x.double().requires_grad_(), w.double().requires_grad_()]
    y = torch.cat([plain[0][a:b] @ plain[1][i].T for i, (a, b) in enumerate(zip([0, 4, 4], ends))])
    theirs = y.detach(), *torch.autograd.grad(y, plain, upstream.double())
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-6)
    assert not ours[2][1].any()


def test_resuming_with_other_micro_batches_is_refused_where_they_matter(settings):
    steady = settings | {"FFN": "moe", "BALANCE": "quantile", "WARMDOWN_ITERS": 0}
    assert launch(steady)[0] == [0]
    codes, out = launch(steady | {"DEVICE_BATCH_SIZE": 1, "NUM_ITERATIONS": 9, "RESUME": "auto"})
    assert codes == [2] and "DEVICE_BATCH_SIZE 6 -> 1" in out


def test_weights_of_another_run_come_without_its_balance(settings):
    """The load of one kind of balance would be a bias of the other, and favour who had most."""
    assert launch(settings | {"FFN": "moe"})[0] == [0]
    fresh = settings | {
        "FFN": "moe",
        "BALANCE": "quantile",
        "INIT_FROM": settings["LOG_DIR"] / "toy",
        "RUN_ID": "next",
    }
    model = train_gpt.GPT(tiny(ffn="moe", balance="quantile"))
    train_gpt.import_weights(model, fresh["INIT_FROM"])
    assert model.blocks[0].ffn.router.weight.any() and not model.blocks[0].ffn.router_state.any()
    assert launch(fresh)[0] == [0]


def test_the_last_step_tells_the_health_of_experts(settings):
    codes, out = launch(settings | MOE | {"BALANCE_LOG_INTERVAL": 100})
    assert codes == [0] and [line[0] for line in LINE.findall(out)] == ["10"]
    assert summary(settings)["moe_entropy"] > 0


def test_settings_of_experts_without_experts_are_told(settings):
    codes, out = launch(settings | {"NUM_EXPERTS": 16, "AUX_LOSS_COEF": 0.5, "DRY_RUN": 1})
    assert codes == [0] and "AUX_LOSS_COEF has no effect without FFN=moe" in out
    assert (
        "NUM_EXPERTS has no effect" in out and "warning" not in launch(settings | {"DRY_RUN": 1})[1]
    )
