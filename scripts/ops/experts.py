"""Rows to experts and back, how evenly these are loaded, and what evens that out.

Shapes: N tokens, k choices of each, E experts, C channels.
"""

import math

import torch


def sort_by_expert(chosen, experts):
    """The choices (N, k) of tokens, sorted by expert; n = N k of them.

    Returns the expert of each (n,), the choice that stands at each place (n,), the place of each
    choice (n,), which is the inverse permutation, and where the choices of each expert end (E,).
    """
    expert, order = chosen.flatten().sort(stable=True)
    places = torch.arange(len(order), device=order.device)
    back = torch.empty_like(order).scatter_(0, order, places)
    every_expert = torch.arange(experts, device=order.device)
    offsets = torch.searchsorted(expert, every_expert, right=True, out_int32=True)
    return expert, order, back, offsets


class Gather(torch.autograd.Function):
    """x[index], (N, C) -> (n, C), where each row of x is taken n / N times.

    The places of the first row, then of the second, and so on, are `inverse` (n,). So the gradient
    is a gather, too, and adds in a fixed order; that of indexing adds rows as they come on CUDA.
    """

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        grads = grad.index_select(0, inverse)
        if len(grads) > ctx.rows:
            grads = grads.unflatten(0, (ctx.rows, -1)).sum(1)
        return grads, None, None


# What expert_health measures.
HEALTH = ("aux", "entropy", "load_min", "load_max", "dead", "dropped")


def pooled_health(load, importance):
    """The HEALTH of routers (..., E) in one number each, the worst of loads, and max_vio."""
    health = expert_health(load, importance)
    largest = health["load_max"].max()
    figures = {
        "aux": health["aux"].mean(),
        "entropy": health["entropy"].mean(),
        "load_min": health["load_min"].min(),
        "load_max": largest,
        "dead": health["dead"].sum(),
        "dropped": health["dropped"].mean(),  # 0 as long as an expert takes whatever comes
        "max_vio": largest * load.size(-1) - 1,  # how far the largest load is above an even one
    }
    return {name: figure.item() for name, figure in figures.items()}


def aux_loss(load, importance):
    """E sum f P over the last dimension (..., E): 1 in balance, E / TOP_K where TOP_K have all."""
    return load.size(-1) * (load * importance).sum(-1)


def expert_health(load, importance):
    """HEALTH of loads and importances (..., E), each (...,); the entropy is 1 for an even load."""
    even = math.log(max(2, load.size(-1)))
    return {
        "aux": aux_loss(load, importance),
        "entropy": torch.special.entr(load).sum(-1) / even,
        "load_min": load.amin(-1),
        "load_max": load.amax(-1),
        "dead": (load == 0).sum(-1),
        "dropped": (1 - load.sum(-1)).round(decimals=5).abs(),  # of all choices
    }


# What a step leaves (E,) for the router of the next: from the step's load (E,), its probabilities
# (N, E), what the step before left (E,), and TOP_K.


def leave_load(load, p, state, k):
    """The load, against which the balance loss holds the probabilities of the next step."""
    return load


def leave_bias(load, p, state, k):
    """The bias, zero in the mean, with which k / E of the tokens would have chosen each expert.

    These are the tokens where p + bias exceeds their (k + 1)-th largest; kexue.fm/archives/11619.
    """
    N, E = p.shape
    largest_others = (p + state).topk(min(k + 1, E)).values[:, -1:]
    missing = (largest_others - p).sort(dim=0).values
    bias = missing[max(1, round(N * k / E)) - 1]
    return bias - bias.mean()


def leave_state(load, p, state, k):
    """What was there."""
    return state
