"""Every pair of choices on different axes trains and resumes in some run, or is refused by name;
every setting that is said to have no effect has none."""

import itertools
import signal

import pytest
import torch
from conftest import CLOCKS, dies_at, launch, points, tiny
from safetensors.torch import load_file

from harness.ranks import Ranks
from store.contract import ConfigError
import train_gpt
from train_gpt import Config, axes

MACHINE = ("device", "dtype", "compile", "trackers")  # axes that say nothing of what is trained
AXES = {axis: [*choices] for axis, choices in axes().items() if axis not in MACHINE}
AXES["ffn"].append("moe,relu2")  # which tile over the layers
AXES["per_visit"] = ["none", ",".join(name for name in axes()["per_visit"] if name != "none")]
PAIRS = {
    ((a, x), (b, y))
    for a, b in itertools.combinations(sorted(AXES), 2)
    for x in AXES[a]
    for y in AXES[b]
}
NEEDED = ("recurrence", "norm", "ffn", "optimizer")  # axes of what choices on others need


def meaningless(a, x, b, y):
    """Whether choice x of axis a and y of b have no meaning together, whatever the rest is."""
    chosen = {a: x, b: y}
    dense = "moe" not in chosen.get("ffn", "moe").split(",")
    own = chosen.get("per_visit", "none").split(",")
    of_parts = [chosen.get(f"{part}_optimizer", "adamw") for part in ("router", "gate")]
    return any(
        (
            dense and chosen.get("balance", "aux") != "aux",
            dense and "router" in own,
            own != ["none"] and chosen.get("recurrence", "shared") != "shared",
            "norm" in own and chosen.get("norm") == "rms",
            "muon" in of_parts and chosen.get("optimizer", "muon") != "muon",
        )
    )


def refusal(**changes):
    """The sentence that refuses these settings, "" where they are taken."""
    try:
        tiny(n_layer=4, n_unique=2 if changes.get("recurrence") == "shared" else 1, **changes)
    except ConfigError as error:
        return str(error)
    return ""


def completed(chosen):
    """Settings that extend those chosen to all axes and are taken; None where there are none."""
    needed = [axis for axis in NEEDED if axis not in chosen]
    usual = {axis: getattr(Config, axis) for axis in AXES}
    for values in itertools.product(*(AXES[axis] for axis in needed)):
        settings = usual | dict(zip(needed, values)) | chosen
        if not refusal(**settings):
            return settings
    return None


def pairs_of(settings):
    return set(itertools.combinations(sorted(settings.items()), 2))


def covering():
    """Settings that together have every pair that can be had, chosen greedily; the pairs that
    cannot be had."""
    alone = {pair for pair in PAIRS if completed(dict(pair)) is None}
    missing, rows = PAIRS - alone, []
    while missing:
        settings = completed(dict(min(missing)))
        for axis in AXES:
            for value in AXES[axis]:  # better it value by value
                other = settings | {axis: value}
                gain = len(pairs_of(other) & missing) - len(pairs_of(settings) & missing)
                if gain > 0 and not refusal(**other):
                    settings = other
        rows.append(settings)
        missing -= pairs_of(settings)
    return rows, alone


ROWS, ALONE = covering()


@pytest.mark.parametrize("combination", ROWS, ids=lambda row: " ".join(map(str, row.values())))
def test_it_trains_and_resumes(settings, tmp_path, monkeypatch, combination):
    """A run that is sent away after a step or two goes on as the one never stopped, to the bit."""
    settings |= {name.upper(): value for name, value in combination.items()}
    settings |= {"N_LAYER": 4, "N_UNIQUE": 2 if settings["RECURRENCE"] == "shared" else 1}
    settings |= {"NUM_ITERATIONS": 4, "VAL_EVERY": 0, "BALANCE_LOG_INTERVAL": 2}
    settings |= {"BATCH_SIZE": 4, "DEVICE_BATCH_SIZE": 4}
    settings["WEIGHT_DECAY"] = 0.1  # or its schedules would have no say
    with monkeypatch.context() as patch:
        dies_at(patch, 1, signal.SIGTERM)
        codes, out = launch(settings)
        assert codes == [0] and "preempted at step " in out, out
    codes, out = launch(settings | {"RESUME": "auto"})
    assert codes == [0] and "resumed:" in out, out
    straight = settings | {"LOG_DIR": tmp_path / "straight"}
    assert launch(straight)[0] == [0]
    ours, theirs = (
        load_file(run["LOG_DIR"] / "toy" / "model.safetensors") for run in (settings, straight)
    )
    assert ours.keys() == theirs.keys()
    assert not [name for name, tensor in ours.items() if not tensor.equal(theirs[name])]
    ours, theirs = (
        [{name: point[name] for name in point if name not in CLOCKS} for point in points(run)]
        for run in (settings, straight)
    )
    assert ours == theirs and len(ours) == 4


@pytest.mark.parametrize(
    "pair", sorted(ALONE), ids=lambda pair: " ".join("=".join(part) for part in pair)
)
def test_a_pair_without_meaning_is_refused_by_name(pair):
    """Whatever the rest is, the sentence names one of the two and what it needs."""
    sentence = refusal(**dict(pair))
    assert any(f"{axis.upper()}={value}" in sentence for axis, value in pair), sentence
    assert " needs " in sentence


def test_few_runs_cover_all_pairs():
    assert ALONE == {(a, b) for a, b in PAIRS if meaningless(*a, *b)}
    assert set().union(*map(pairs_of, ROWS)) == PAIRS - ALONE
    longest, second = sorted(map(len, AXES.values()), reverse=True)[:2]
    assert len(ROWS) <= 2 * longest * second


BASES = [  # every setting that may have no effect has one in some of these and none in others
    {},
    {"ffn": "moe"},
    {"ffn": "moe", "aux_loss_coef_start": 0.3, "aux_loss_coef_end": 0.1},
    {"ffn": "moe", "balance": "quantile"},
    {"mixer": "gru", "attngate": "elementwise"},
    {"optimizer": "adamw", "attngate": "elementwise", "tie_embeddings": False},
    {"lr_schedule": "cosine", "momentum_start": 0.5, "momentum_warmup_iters": 1}
    | {"momentum_cooldown_iters": 1},
    {"warmdown_frac": 0.5, "weight_decay": 0.1, "attngate": "elementwise"},
    {"attngate": "const"},
]
OTHER = {  # where neither 0.9 nor the next choice will do
    "num_experts": 4,
    "gate_optimizer": "adamw",
    "top_k": 1,
    "momentum_warmup_iters": 2,
    "momentum_cooldown_iters": 3,
    "aux_warmup_frac": 0.3,
    "warmdown_iters": 2,
    "muon_momentum": 0.5,
}


def other_value(name, value):
    """One that a setting of this value may have instead."""
    if isinstance(value, bool):
        return not value
    choices = [choice for choice in axes().get(name, ()) if choice != value]
    return OTHER.get(name, choices[0] if choices else 0.9)


def trained(cfg):
    """Losses and weights of four updates."""
    state, losses = train_gpt.State.build(cfg, Ranks()), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(cfg.num_iterations):
        batch = torch.randint(64, (4, 17), generator=generator)
        losses.append(train_gpt.train_step(state, cfg, batch[:, :-1], batch[:, 1:]).loss)
    return [*losses, *state.model.parameters()]


NEEDY = {*" ".join(Config.NEEDS.values()).split()} - {"shard_tail"}  # which test_data.py has


@pytest.mark.parametrize("name", sorted(NEEDY))
def test_a_setting_is_said_to_have_no_effect_exactly_where_it_has_none(group, name):
    """Bits of a short training, with it and without, tell: on one of BASES where it has an effect
    and on one where it has none, for time's sake."""
    seen = set()
    for base in BASES:
        base = base | {"num_iterations": 4, "warmdown_iters": 3, "n_embd": 16}
        base = base | {"batch_size": 4, "device_batch_size": 2}
        changed = base | {name: other_value(name, getattr(tiny(**base), name))}
        if name.startswith("aux_loss_coef_"):
            changed |= {"aux_loss_coef_start": 0.7, "aux_loss_coef_end": 0.6}
        if name.endswith("_optimizer") and base.get("optimizer") == "adamw":
            continue  # no other can be chosen
        cfg = tiny(**changed)
        has_effect = name not in cfg.idle()
        if has_effect not in seen:
            seen.add(has_effect)
            a, b = trained(tiny(**base)), trained(cfg)
            is_same = len(a) == len(b) and all(map(torch.equal, a, b))
            assert is_same != has_effect, (base, changed)
    assert seen == {True, False}
