"""Checks a mixture of experts before it is trained: parameter budget, loss and routing at initialisation, gradients.

    python scripts/check_moe.py                             # the budget of recurrent_shared_moe, all of its sibling
    PRESET=moe_muon_exp5_smoke python scripts/check_moe.py                       # all of these settings, no data needed
    PRESET=moe_muon_exp5 DEVICE_BATCH_SIZE=2 python scripts/check_moe.py                          # at full size: slowly

The counts are compared with a closed formula of the settings. The rest is of one micro-batch of random tokens, in
float32 and without dropout; for the gradients, matrices that start at zero are random, since they would hide others.
Exit codes: 0 all is well, 1 a check failed, which is named, 2 wrong settings, 3 no data where VOCAB_SIZE=0.
"""

import argparse
import math
import os
import sys
from dataclasses import fields, replace

import torch

from harness.contract import ConfigError, DataError, EXIT_CODES
from harness.ranks import Ranks
import train_gpt

DEFAULT = "recurrent_shared_moe"
NEAR_LOSS, NEAR_AUX = 0.5, 0.2  # nats; of the balance loss
MIN_ENTROPY, MIN_WORST = 0.9, 0.5  # of the load, over ln E: at the first visit, at any


def ffn_counts(cfg, kind):
    """(parameters, those that no token uses at a time) of an FFN."""
    expert = cfg.expert if kind == "moe" else kind
    share, reads = (
        cfg.top_k + cfg.shared_expert if kind == "moe" else 1,
        2 if expert == "swiglu" else 1,
    )
    width = cfg.d_ff or (8 / 3 if reads == 2 else 4) * cfg.n_embd / share
    if not cfg.d_ff and reads * share > 1:
        width = 64 * math.ceil(width / 64)
    one = (reads + 1) * cfg.n_embd * int(width) + cfg.bias * (reads * int(width) + cfg.n_embd)
    if kind != "moe":
        return one, 0
    router = cfg.num_experts * cfg.n_embd
    return router + (cfg.num_experts + cfg.shared_expert) * one, (cfg.num_experts - cfg.top_k) * one


def budget(cfg):
    """(parameters, those that a token uses) by arithmetic alone. Raises ConfigError for what it does not know."""
    if cfg.attngate != "none" or cfg.mixer != "attention":
        raise ConfigError(
            f"ATTNGATE={cfg.attngate} MIXER={cfg.mixer}: this script counts plain attention "
            "only; set ATTNGATE=none MIXER=attention"
        )
    C, kinds, own, ends = cfg.n_embd, cfg.ffn.split(","), cfg.per_step.split(","), cfg.unshared_ends
    visits = dict.fromkeys(range(cfg.n_layer), 1)  # of a block, by the layer whose kind it has
    if cfg.recurrence == "shared":
        between = range(cfg.n_layer - 2 * ends)
        visits = {i: 1 for i in visits if not ends <= i < cfg.n_layer - ends}
        visits |= {ends + i: len(between[i :: cfg.n_unique]) for i in range(cfg.n_unique)}
    norm = {"rms": 0, "rms_gain": C, "layer": C + cfg.bias * C}[cfg.norm]
    embeddings = cfg.vocab_size * C * (2 - cfg.tie_embeddings) + cfg.sequence_length * C * (
        cfg.pos == "learned"
    )
    total, idle = embeddings + norm, 0
    for layer, count in visits.items():
        kind = kinds[layer % len(kinds)]
        ffn, unused = ffn_counts(cfg, kind)
        total += 4 * C * C + cfg.bias * 4 * C + 2 * norm + ffn
        more = 2 * norm * ("norm" in own) + cfg.num_experts * C * (
            "router" in own and kind == "moe"
        )
        total, idle = total + (count - 1) * more + 2 * count * ("scale" in own), idle + unused
    return total, total - idle


def check_budget(cfg):
    """(name, found, wanted, whether that is well) of each count."""
    plan, wanted = train_gpt.make_plan(cfg, Ranks()), budget(cfg)
    return [
        (name, f"{plan[name]:,}", f"{count:,}", plan[name] == count)
        for name, count in zip(("params_total", "params_active"), wanted)
    ]


def check_init(cfg, model, batch):
    """Likewise of the loss and the routing of a new model at its first visit of experts, and the worst of the visits:
    a block that is revisited adds the same to all tokens each time, and so sends more and more of them the same way."""
    loss, routing = model(*batch)
    load, chance, E = routing[:, 0], math.log(cfg.vocab_size), cfg.num_experts
    entropy = 1 - (load * (E * load).clamp(min=1e-30).log()).sum(-1) / math.log(max(2, E))
    aux, least, most = train_gpt.aux_loss(load, routing[:, 1])[0], load[0].min(), load[0].max()
    return [
        (
            "loss",
            f"{loss:.4f}",
            f"within {NEAR_LOSS} of ln V = {chance:.4f}",
            abs(loss - chance) < NEAR_LOSS,
        ),
        (
            "load_entropy",
            f"{entropy[0]:.4f}",
            f"above {MIN_ENTROPY}, 1 is even",
            entropy[0] > MIN_ENTROPY,
        ),
        (
            "load_entropy_worst",
            f"{entropy.min():.4f}",
            f"above {MIN_WORST}",
            entropy.min() > MIN_WORST,
        ),
        ("load_min", f"{least:.4f}", f"above 0, {1 / E:g} is even", least > 0),
        ("load_max", f"{most:.4f}", f"at most {1 / cfg.top_k:g}", most <= 1.0001 / cfg.top_k),
        ("aux", f"{aux:.4f}", f"within {NEAR_AUX} of 1", abs(aux - 1) < NEAR_AUX),
    ]


def check_gradients(model, batch):
    """Likewise of the gradients: all there and finite, none of them zero, and one on every expert."""
    for name, p in model.named_parameters():
        if not p.any() and not name.endswith(
            "bias"
        ):  # random biases would send all tokens to the same experts
            torch.nn.init.normal_(p, std=0.02)
    loss, routing = model(*batch)
    (loss + train_gpt.aux_loss(routing[:, 0], routing[:, 1]).mean()).backward()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    experts = {
        f"{name}[{i}]": grad
        for name, bank in grads.items()
        if ".experts." in name
        for i, grad in enumerate(
            bank.flatten(0, 1) if name.split(".", 2)[2] in model.banked else bank
        )
    }
    return [
        (name, f"{len(bad)} {' '.join(bad[:1])}".strip(), f"0 of {of}", not bad)
        for name, bad, of in (
            (
                "grads_not_finite",
                [name for name, grad in grads.items() if not grad.isfinite().all()],
                len(grads),
            ),
            ("grads_zero", [name for name, grad in grads.items() if not grad.any()], len(grads)),
            (
                "experts_without_grad",
                [name for name, grad in experts.items() if not grad.any()],
                len(experts),
            ),
        )
    ]


def check_model(cfg):
    """Likewise of all that takes a real model."""
    device = Ranks().device(cfg)
    torch.manual_seed(cfg.seed)
    model = train_gpt.GPT(cfg).to(device)
    tokens = torch.randint(
        cfg.vocab_size, (cfg.device_batch_size, cfg.sequence_length + 1), device=device
    )
    batch = tokens[:, :-1], tokens[:, 1:]
    return check_init(cfg, model, batch) + check_gradients(model, batch)


def config(settings):
    """What is checked with these settings. Raises ConfigError, DataError."""
    cfg = train_gpt.resolve(train_gpt.Config.from_env(settings | {"DRY_RUN": ""}))
    if "moe" not in cfg.ffn.split(","):
        raise ConfigError(f"FFN={cfg.ffn}: has no mixture of experts to check; set FFN=moe")
    return replace(cfg, dropout=0.0, dtype="float32")


def main(argv, env):
    """Checks, prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    ours = [field.name.upper() for field in fields(train_gpt.Config) if env.get(field.name.upper())]
    try:
        if set(ours) - {"DEVICE"}:
            cfg = config(env)
            checks = {cfg.preset: lambda: check_budget(cfg) + check_model(cfg)}
        else:
            whole, small = (
                config(env | {"PRESET": name}) for name in (DEFAULT, f"{DEFAULT}_smoke")
            )
            checks = {
                whole.preset: lambda: check_budget(whole),
                small.preset: lambda: check_budget(small) + check_model(small),
            }
        tables = {label: check() for label, check in checks.items()}
    except (ConfigError, DataError) as error:
        print(f"{error.status}: {error}", file=sys.stderr)
        return EXIT_CODES[error.status]
    wrong = []
    for label, rows in tables.items():
        print(label)
        for name, found, wanted, good in rows:
            print(f"  {name:22}{found:>16}  {'ok' if good else 'FAIL':6}{wanted}")
            wrong += [] if good else [f"{label}: {name} is {found}, must be {wanted}"]
    print("".join(f"{sentence}\n" for sentence in wrong), end="", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
