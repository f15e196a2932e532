"""Checks a mixture of experts before it is trained: parameter budget, first loss and routing,
gradients.

    python scripts/check_moe.py             # the budget of recurrent_shared_moe, all of its sibling
    PRESET=moe_muon_exp5_smoke python scripts/check_moe.py    # all of these settings; no data
    PRESET=moe_muon_exp5 DEVICE_BATCH_SIZE=2 python scripts/check_moe.py      # at full size: slowly

The counts are compared with a closed formula of the settings, in which a mixer has the parameters
that it makes. The rest is of one micro-batch of random tokens, in float32 and without dropout; for
the gradients, matrices that start at zero are random, since they would hide others.
Exit codes: 0 all is well, 1 a check failed, which is named, 2 wrong settings, 3 no data where
VOCAB_SIZE=0.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from harness.ranks import Ranks
from store.contract import EXIT_CODES, ConfigError, DataError
import train_gpt
from train_gpt import GPT, IMPORTANCE, LOAD, Config

DEFAULT = "recurrent_shared_moe"
NEAR_LOSS = 0.5  # nats
NEAR_AUX = 0.2  # of the balance loss
MIN_ENTROPY = 0.9  # of the load, over ln E, at the first visit
MIN_WORST = 0.5  # the same, at any visit


class Check(NamedTuple):
    """A figure, as the table shows it."""

    name: str
    value: str
    wanted: str
    good: bool | Tensor


def ffn_counts(cfg: Config, kind: str) -> tuple[int, int]:
    """(parameters, those that no token uses at a time) of an FFN."""
    activation = kind
    experts_a_token = 1
    if kind == "moe":
        activation = cfg.expert
        experts_a_token = cfg.top_k + cfg.shared_expert
    reads = 2 if activation == "swiglu" else 1  # matrices from n_embd to the hidden width
    width = cfg.d_ff or (8 / 3 if reads == 2 else 4) * cfg.n_embd / experts_a_token
    if not cfg.d_ff and reads * experts_a_token > 1:
        width = 64 * math.ceil(width / 64)

    one = (reads + 1) * cfg.n_embd * int(width)
    if cfg.bias:
        one += reads * int(width) + cfg.n_embd
    if kind == "none":
        return 0, 0
    if kind != "moe":
        return one, 0
    router = cfg.num_experts * cfg.n_embd
    return router + (cfg.num_experts + cfg.shared_expert) * one, (cfg.num_experts - cfg.top_k) * one


def visits_of_blocks(cfg: Config) -> dict[int, int]:
    """How often each block is visited, by the layer whose kind it has."""
    visits = dict.fromkeys(range(cfg.n_layer), 1)
    if cfg.recurrence == "shared":
        kept = cfg.unshared_ends  # blocks at each end that are visited once
        between = range(cfg.n_layer - 2 * kept)
        visits = {i: 1 for i in visits if not kept <= i < cfg.n_layer - kept}
        visits |= {kept + i: len(between[i :: cfg.n_unique]) for i in range(cfg.n_unique)}
    return visits


def mixer_count(cfg: Config, layer: int) -> int:
    """Parameters of the mixer of a layer, by what it says of itself."""
    with torch.device("meta"):
        mixer = train_gpt.MIXERS[train_gpt.tiled(cfg.mixer, layer)](cfg)
    return sum(p.numel() for p in mixer.parameters())


def budget(cfg: Config) -> tuple[int, int]:
    """(parameters, those that a token uses) by arithmetic, mixers aside."""
    C = cfg.n_embd
    kinds = cfg.ffn.split(",")
    per_visit = cfg.per_visit.split(",")
    bias = int(cfg.bias)
    norm = {"rms": 0, "rms_gain": C, "layer": C + bias * C}[cfg.norm]
    tables = 1 if cfg.tie_embeddings else 2
    positions = cfg.sequence_length if cfg.pos == "learned" else 0
    total = tables * cfg.vocab_size * C + positions * C + norm
    idle = 0

    for layer, visits in visits_of_blocks(cfg).items():
        kind = kinds[layer % len(kinds)]
        ffn, unused = ffn_counts(cfg, kind)
        total += mixer_count(cfg, layer) + 2 * norm + ffn
        idle += unused
        again = 0  # what each further visit has of its own
        if "norm" in per_visit:
            again += 2 * norm
        if "router" in per_visit and kind == "moe":
            again += cfg.num_experts * C
        total += (visits - 1) * again
        if "scale" in per_visit:
            total += 2 * visits
    return total, total - idle


def check_budget(cfg: Config) -> list[Check]:
    """Checks of the counts of parameters."""
    plan = train_gpt.make_plan(cfg, Ranks())
    return [
        Check(name, f"{plan[name]:,}", f"{count:,}", plan[name] == count)
        for name, count in zip(("params_total", "params_active"), budget(cfg))
    ]


def check_init(cfg: Config, model: GPT, batch: tuple[Tensor, Tensor]) -> list[Check]:
    """Checks of the loss and the routing of a new model at its first visit of experts, and of the
    worst of the visits: a block that is revisited adds the same to all tokens each time, and so
    sends more and more of them the same way. batch: inputs and targets, (B, T) each."""
    loss, routing = model(*batch)
    load = routing[:, LOAD]
    chance = math.log(cfg.vocab_size)
    E = cfg.num_experts
    entropy = 1 - (load * (E * load).clamp(min=1e-30).log()).sum(-1) / math.log(max(2, E))
    aux = train_gpt.aux_loss(load, routing[:, IMPORTANCE])[0]
    first, worst = entropy[0], entropy.min()
    least, most = load[0].min(), load[0].max()
    return [
        Check(
            "loss",
            f"{loss:.4f}",
            f"within {NEAR_LOSS} of ln V = {chance:.4f}",
            abs(loss - chance) < NEAR_LOSS,
        ),
        Check(
            "load_entropy",
            f"{first:.4f}",
            f"above {MIN_ENTROPY}, 1 is even",
            first > MIN_ENTROPY,
        ),
        Check("load_entropy_worst", f"{worst:.4f}", f"above {MIN_WORST}", worst > MIN_WORST),
        Check("load_min", f"{least:.4f}", f"above 0, {1 / E:g} is even", least > 0),
        Check("load_max", f"{most:.4f}", f"at most {1 / cfg.top_k:g}", most <= 1.0001 / cfg.top_k),
        Check("aux", f"{aux:.4f}", f"within {NEAR_AUX} of 1", abs(aux - 1) < NEAR_AUX),
    ]


def check_gradients(model: GPT, batch: tuple[Tensor, Tensor]) -> list[Check]:
    """Checks of the gradients: all there and finite, none of them zero, and one on every expert.
    batch: inputs and targets, (B, T) each."""
    for name, p in model.named_parameters():
        # random biases would send all tokens to the same experts
        if not p.any() and not name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.02)
    loss, routing = model(*batch)
    (loss + train_gpt.aux_loss(routing[:, LOAD], routing[:, IMPORTANCE]).mean()).backward()

    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    experts = {}
    for name, bank in grads.items():
        if ".experts." in name:
            is_banked = name.split(".", 2)[2] in model.banked
            for i, grad in enumerate(bank.flatten(0, 1) if is_banked else bank):
                experts[f"{name}[{i}]"] = grad

    not_finite = [name for name, grad in grads.items() if not grad.isfinite().all()]
    zero = [name for name, grad in grads.items() if not grad.any()]
    without = [name for name, grad in experts.items() if not grad.any()]
    return [
        Check(name, " ".join([str(len(bad)), *bad[:1]]), f"0 of {total}", not bad)
        for name, bad, total in (
            ("grads_not_finite", not_finite, len(grads)),
            ("grads_zero", zero, len(grads)),
            ("experts_without_grad", without, len(experts)),
        )
    ]


def check_model(cfg: Config) -> list[Check]:
    """Checks of all that takes a real model."""
    device = Ranks().device(cfg)
    torch.manual_seed(cfg.seed)
    model = GPT(cfg).to(device)
    shape = cfg.device_batch_size, cfg.sequence_length + 1
    tokens = torch.randint(cfg.vocab_size, shape, device=device)
    batch = tokens[:, :-1], tokens[:, 1:]
    return check_init(cfg, model, batch) + check_gradients(model, batch)


def config(settings: Mapping[str, str]) -> Config:
    """What is checked with these settings. Raises ConfigError, DataError."""
    cfg = train_gpt.resolve(Config.from_env({**settings, "DRY_RUN": ""}))
    if not cfg.has_moe():
        raise ConfigError(f"FFN={cfg.ffn}: has no mixture of experts to check; set FFN=moe")
    return replace(cfg, dropout=0.0, dtype="float32")


def check_all(env: Mapping[str, str]) -> dict[str, list[Check]]:
    """{preset: its checks} of the settings, or of the default where none is set. Raises
    ConfigError, DataError."""
    asked = {field.name.upper() for field in fields(Config) if env.get(field.name.upper())}
    if asked - {"DEVICE"}:
        cfg = config(env)
        return {cfg.preset: check_budget(cfg) + check_model(cfg)}
    whole, small = (config({**env, "PRESET": name}) for name in (DEFAULT, f"{DEFAULT}_smoke"))
    return {
        whole.preset: check_budget(whole),
        small.preset: check_budget(small) + check_model(small),
    }


def main(argv: list[str], env: Mapping[str, str]) -> int:
    """Checks, prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    try:
        tables = check_all(env)
    except (ConfigError, DataError) as error:
        print(f"{error.status}: {error}", file=sys.stderr)
        return EXIT_CODES[error.status]

    wrong = []
    for label, checks in tables.items():
        print(label)
        for name, value, wanted, good in checks:
            print(f"  {name:22}{value:>16}  {'ok' if good else 'FAIL':6}{wanted}")
            if not good:
                wrong.append(f"{label}: {name} is {value}, must be {wanted}")
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
