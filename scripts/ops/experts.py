"""How evenly the experts of a layer are loaded."""

import math

import torch

# What expert_health measures.
HEALTH = ("aux", "entropy", "load_min", "load_max", "dead", "dropped")


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
