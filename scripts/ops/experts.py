"""How evenly the experts of a layer are loaded, and what evens that out.

Shapes: N tokens, E experts.
"""

import math

import torch

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
