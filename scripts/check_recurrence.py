"""Checks that a model is the same with its blocks stacked and with one looped over banks of weights, as indexed.

    python scripts/check_recurrence.py                                # a small dense model, a small mixture of experts
    PRESET=dense_300m_indexed_smoke python scripts/check_recurrence.py         # one micro-batch a step, no data needed
    COMPILE=0 python scripts/check_recurrence.py                      # eager only; blank or auto: eager and compiled

In float32, without dropout, all weights random: logits, gradients, and parameters after some optimizer steps. The last
have no limit: Adam makes full steps of rounding errors, which are all the gradient that attention gives biases of keys.
Exit codes: 0 the same, 1 not, with the figure that says so, 2 wrong settings, 3 no data where VOCAB_SIZE=0.
"""

import argparse
import os
import sys
from dataclasses import fields, replace

import torch

from harness.contract import ConfigError, DataError, EXIT_CODES
from harness.ranks import Ranks, setup
import train_gpt

SMALL = {
    "N_LAYER": "3",
    "N_HEAD": "4",
    "N_EMBD": "64",
    "SEQUENCE_LENGTH": "32",
    "DEVICE_BATCH_SIZE": "4",
    "VOCAB_SIZE": "256",
}
MODELS = {
    "dense": SMALL,
    "moe": SMALL | {"FFN": "moe", "EXPERT": "gelu", "NORM": "layer", "BIAS": "1"},
}
MAX_LOGITS, MIN_COSINE, STEPS = 1e-5, 0.999, 10


def by_layer(model):
    """{name in a stacked model: (tensor, its gradient or None)}, the slices of banks taken apart."""
    found, seen, tensors = {}, dict.fromkeys(model.order, -1), model.state_dict(keep_vars=True)
    for layer, i in enumerate(model.order):
        seen[i] += 1
        for name, tensor in model.blocks[i].state_dict(keep_vars=True).items():
            banked = name in model.banked
            found[f"blocks.{layer}.{name}"] = [
                part if part is None or not banked else part[seen[i]]
                for part in (tensor.detach(), tensor.grad)
            ]
    return found | {
        name: [t.detach(), t.grad] for name, t in tensors.items() if not name.startswith("blocks.")
    }


def randomize(stacked, indexed):
    """Fills both with the same random numbers: zeros would hide what follows them. Keeps logits near 1."""
    ours = by_layer(indexed)
    for name, p in stacked.named_parameters():
        p.data.normal_(std=0.2 if p.ndim < 2 else p.size(-1) ** -0.5)
        p.data.add_("norm" in name and name.endswith("weight"))
        ours[name][0].copy_(p.data)


def largest(pairs, relative=False):
    """The largest difference within pairs of tensors, or the largest of those over what they hold."""
    found = [
        (a - b).abs().max() / (b.abs().max().clamp(min=1e-30) if relative else 1) for a, b in pairs
    ]
    return (
        torch.stack(found).max().item()
    )  # what is no number wins, as it would not in Python's max


def backward(model, inputs, targets):
    """The gradients, by their names in a stacked model, of the loss and the balance of experts."""
    loss, routing = model(inputs, targets)
    (loss + train_gpt.aux_loss(routing[:, 0], routing[:, 1]).sum()).backward()
    grads = {
        name: grad.double().flatten()
        for name, (_, grad) in by_layer(model).items()
        if grad is not None
    }
    model.zero_grad()
    return grads


def compare(cfg):
    """What two models of cfg differ in: a dict of figures."""
    ranks = Ranks()
    states = [
        train_gpt.State.build(replace(cfg, recurrence=kind), ranks)
        for kind in ("stacked", "indexed")
    ]
    models, device = [state.model for state in states], ranks.device(cfg)

    def pairs():
        ours, theirs = (by_layer(model) for model in models)
        return [(theirs[name][0], tensor) for name, (tensor, _) in ours.items()]

    row = {"init_diff": largest(pairs())}
    randomize(*models)
    if cfg.compile == "1":
        for model in models:
            train_gpt.compile_model(model, cfg, device)
    shape = STEPS + 1, cfg.batch_size, cfg.sequence_length + 1
    (inputs, targets), *batches = [
        (tokens[:, :-1], tokens[:, 1:])
        for tokens in torch.randint(cfg.vocab_size, shape, device=device)
    ]
    with torch.no_grad():
        row["max_abs_diff_logits"] = largest([[model.eval()(inputs) for model in models[::-1]]])
    stacked, indexed = (backward(model.train(), inputs, targets) for model in models)
    cosines = [
        torch.cosine_similarity(grad, indexed[name], dim=0, eps=1e-300).nan_to_num(-1)
        if grad.any()
        else 1.0 - indexed[name].any().double()
        for name, grad in stacked.items()
    ]
    row["grad_cosine"], row["of"] = min(
        (cosine.item(), name) for cosine, name in zip(cosines, stacked)
    )
    row["grad_rel_diff"] = largest(
        [(indexed[name], grad) for name, grad in stacked.items()], relative=True
    )
    for batch in batches:
        for state in states:
            train_gpt.train_step(state, cfg, *batch)
    return row | {f"diff_after_{STEPS}": largest(pairs())}


def failures(row):
    """What is wrong with the figures, a sentence each; one that is no number is wrong."""
    return [
        f"{name} is {row[name]:.4g}, must be {wanted}"
        for name, wanted, good in (
            ("init_diff", "0", row["init_diff"] == 0),
            (
                "max_abs_diff_logits",
                f"below {MAX_LOGITS:g}",
                row["max_abs_diff_logits"] < MAX_LOGITS,
            ),
            ("grad_cosine", f"above {MIN_COSINE}; of {row['of']}", row["grad_cosine"] > MIN_COSINE),
        )
        if not good
    ]


def configs(env):
    """{label: Config} of the settings, or of the small models where none is set. Raises ConfigError, DataError."""
    asked = {
        field.name.upper() for field in fields(train_gpt.Config) if env.get(field.name.upper())
    }
    models = {"settings": {}} if asked - {"COMPILE", "DEVICE"} else MODELS
    found = {}
    for label, settings in models.items():
        cfg = train_gpt.Config.from_env(
            settings | {name: env[name] for name in env if env[name]} | {"DRY_RUN": ""}
        )
        if cfg.recurrence == "shared":
            raise ConfigError(
                "RECURRENCE=shared: has fewer weights than a stack; set stacked or indexed"
            )
        compiled = {"auto": "01"}.get(cfg.compile, cfg.compile)
        cfg = replace(
            cfg,
            dtype="float32",
            dropout=0.0,
            batch_size=cfg.device_batch_size,
            warmup_iters=0,
            num_iterations=2**31,
        )  # the learning rate at its peak
        found |= {
            f"{label}, COMPILE={way}": train_gpt.resolve(replace(cfg, compile=way))
            for way in compiled
        }
    return found


def main(argv, env):
    """Compares, prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    try:
        found = configs(env)
        setup(next(iter(found.values())), Ranks(), {})
    except (ConfigError, DataError) as error:
        print(f"{error.status}: {error}", file=sys.stderr)
        return EXIT_CODES[error.status]
    names, wrong = (
        ("init_diff", "max_abs_diff_logits", "grad_cosine", "grad_rel_diff", f"diff_after_{STEPS}"),
        [],
    )
    print(" " * 20 + "".join(f"{name:>21}" for name in names))
    for label, cfg in found.items():
        row = compare(cfg)
        print(
            f"{label:20}"
            + "".join(f"{row[name]:>21.{10 if name == 'grad_cosine' else 3}g}" for name in names)
        )
        wrong += [f"{label}: {sentence}" for sentence in failures(row)]
    torch.distributed.destroy_process_group()
    print("".join(f"{sentence}\n" for sentence in wrong), end="", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
