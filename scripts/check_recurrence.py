"""Checks that a model is the same with its blocks stacked and with one looped over banks, indexed.

    python scripts/check_recurrence.py              # a small dense model, a small mixture
    PRESET=dense_300m_indexed_smoke python scripts/check_recurrence.py   # one micro-batch a step
    COMPILE=0 python scripts/check_recurrence.py    # eager only; blank or auto: eager and compiled

No data is needed. In float32, without dropout, all weights random: logits, gradients, and
parameters after some optimizer steps. The last have no limit: Adam makes full steps of rounding
errors, which are all the gradient that attention gives biases of keys.
Exit codes: 0 the same, 1 not, with the figure that says so, 2 wrong settings, 3 no data where
VOCAB_SIZE=0.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from harness.ranks import Ranks, setup
from store.contract import EXIT_CODES, ConfigError, DataError
import train_gpt
from train_gpt import GPT, IMPORTANCE, LOAD, Config

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
MAX_LOGITS = 1e-5
MIN_COSINE = 0.999
STEPS = 10
FIGURES = (
    "init_diff",
    "max_abs_diff_logits",
    "grad_cosine",
    "grad_rel_diff",
    f"diff_after_{STEPS}",
)


def by_layer(model: GPT) -> dict[str, tuple[Tensor, Tensor | None]]:
    """{name in a stacked model: (tensor, its gradient or None)}, the slices of banks taken
    apart."""
    layers = {}
    visit = dict.fromkeys(model.order, -1)  # of each block
    for layer, i in enumerate(model.order):
        visit[i] += 1
        for name, tensor in model.blocks[i].state_dict(keep_vars=True).items():
            value, grad = tensor.detach(), tensor.grad
            if name in model.banked:
                value = value[visit[i]]
                grad = None if grad is None else grad[visit[i]]
            layers[f"blocks.{layer}.{name}"] = value, grad
    others = {
        name: (tensor.detach(), tensor.grad)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not name.startswith("blocks.")
    }
    return layers | others


def randomize(stacked: GPT, indexed: GPT) -> None:
    """Fills both with the same random numbers: zeros would hide what follows them. Keeps logits
    near 1."""
    of_indexed = by_layer(indexed)
    for name, p in stacked.named_parameters():
        p.data.normal_(std=0.2 if p.ndim < 2 else p.size(-1) ** -0.5)
        if "norm" in name and name.endswith("weight"):
            p.data.add_(1)
        of_indexed[name][0].copy_(p.data)


def largest(pairs: Iterable[tuple[Tensor, Tensor]], relative: bool = False) -> float:
    """The largest difference within pairs of tensors, or the largest of those over what they
    hold."""
    differences = []
    for ours, theirs in pairs:
        scale = theirs.abs().max().clamp(min=1e-30) if relative else 1
        differences.append((ours - theirs).abs().max() / scale)
    # what is no number wins, as it would not in Python's max
    return torch.stack(differences).max().item()


def backward(model: GPT, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The gradients, by their names in a stacked model, of the loss and the balance of experts.
    inputs, targets: (B, T)."""
    loss, routing = model(inputs, targets)
    (loss + train_gpt.aux_loss(routing[:, LOAD], routing[:, IMPORTANCE]).sum()).backward()
    grads = {
        name: grad.double().flatten()
        for name, (_, grad) in by_layer(model).items()
        if grad is not None
    }
    model.zero_grad()
    return grads


def cosine_of(ours: Tensor, theirs: Tensor) -> float:
    """The cosine between two gradients; 1 where both are zero, 0 or less where one is."""
    if not ours.any():
        return 0.0 if theirs.any() else 1.0
    return torch.cosine_similarity(ours, theirs, dim=0, eps=1e-300).nan_to_num(-1).item()


def compare(cfg: Config) -> dict[str, float | str]:
    """What two models of cfg differ in: figures, and in `of` the parameter of the worst cosine."""
    ranks = Ranks()
    device = ranks.device(cfg)
    states = [
        train_gpt.State.build(replace(cfg, recurrence=kind), ranks)
        for kind in ("stacked", "indexed")
    ]
    models = [state.model for state in states]

    def parameters() -> list[tuple[Tensor, Tensor]]:
        of_stacked, of_indexed = (by_layer(model) for model in models)
        return [(of_indexed[name][0], tensor) for name, (tensor, _) in of_stacked.items()]

    row = {"init_diff": largest(parameters())}
    randomize(*models)
    if cfg.compile == "1":
        for model in models:
            train_gpt.compile_model(model, cfg, device)

    shape = STEPS + 1, cfg.batch_size, cfg.sequence_length + 1
    tokens = torch.randint(cfg.vocab_size, shape, device=device)
    (inputs, targets), *batches = [(batch[:, :-1], batch[:, 1:]) for batch in tokens]
    with torch.no_grad():
        of_stacked, of_indexed = (model.eval()(inputs) for model in models)
        row["max_abs_diff_logits"] = largest([(of_indexed, of_stacked)])

    stacked, indexed = (backward(model.train(), inputs, targets) for model in models)
    cosines = [(cosine_of(grad, indexed[name]), name) for name, grad in stacked.items()]
    row["grad_cosine"], row["of"] = min(cosines)
    grads = [(indexed[name], grad) for name, grad in stacked.items()]
    row["grad_rel_diff"] = largest(grads, relative=True)

    for batch in batches:
        for state in states:
            train_gpt.train_step(state, cfg, *batch)
    row[f"diff_after_{STEPS}"] = largest(parameters())
    return row


def failures(row: Mapping[str, float | str]) -> list[str]:
    """What is wrong with the figures, a sentence each; one that is no number is wrong."""
    logits, cosine = row["max_abs_diff_logits"], row["grad_cosine"]
    checks = (
        ("init_diff", "0", row["init_diff"] == 0),
        ("max_abs_diff_logits", f"below {MAX_LOGITS:g}", logits < MAX_LOGITS),
        ("grad_cosine", f"above {MIN_COSINE}; of {row['of']}", cosine > MIN_COSINE),
    )
    return [
        f"{name} is {row[name]:.4g}, must be {wanted}" for name, wanted, good in checks if not good
    ]


def config(settings: Mapping[str, str]) -> Config:
    """The Config that is compared with these settings. Raises ConfigError."""
    cfg = Config.from_env(settings)
    if cfg.recurrence == "shared":
        raise ConfigError(
            "RECURRENCE=shared: has fewer weights than a stack; set stacked or indexed"
        )
    return replace(
        cfg,
        dtype="float32",
        dropout=0.0,
        batch_size=cfg.device_batch_size,
        warmup_iters=0,  # the learning rate at its peak
        num_iterations=2**31,
    )


def configs(env: Mapping[str, str]) -> dict[str, Config]:
    """{label: Config} of the settings, or of the small models where none is set. Raises
    ConfigError, DataError."""
    names = [field.name.upper() for field in fields(Config)]
    asked = {name for name in names if env.get(name)}
    models = {"settings": {}} if asked - {"COMPILE", "DEVICE"} else MODELS
    given = {name: value for name, value in env.items() if value} | {"DRY_RUN": ""}
    made = {}
    for label, settings in models.items():
        cfg = config(settings | given)
        for way in ("0", "1") if cfg.compile == "auto" else (cfg.compile,):
            made[f"{label}, COMPILE={way}"] = train_gpt.resolve(replace(cfg, compile=way))
    return made


def line(label: str, row: Mapping[str, float | str]) -> str:
    """A row of the table."""
    digits = {name: 10 if name == "grad_cosine" else 3 for name in FIGURES}
    return f"{label:20}" + "".join(f"{row[name]:>21.{digits[name]}g}" for name in FIGURES)


def main(argv: list[str], env: Mapping[str, str]) -> int:
    """Compares, prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    try:
        cfgs = configs(env)
        setup(next(iter(cfgs.values())), Ranks(), {})
    except (ConfigError, DataError) as error:
        print(f"{error.status}: {error}", file=sys.stderr)
        return EXIT_CODES[error.status]

    wrong = []
    print(" " * 20 + "".join(f"{name:>21}" for name in FIGURES))
    for label, cfg in cfgs.items():
        row = compare(cfg)
        print(line(label, row))
        wrong += [f"{label}: {sentence}" for sentence in failures(row)]
    torch.distributed.destroy_process_group()
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
