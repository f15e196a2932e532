"""Every pair of choices on different axes trains and resumes in some run, or is refused by name."""

import csv
import itertools

import pytest
from conftest import launch, tiny
from safetensors.torch import load_file
from harness.contract import ConfigError


AXES = {
    "attngate": ["none", "headwise", "elementwise", "const"],
    "pos": ["rotary", "learned"],
    "norm": ["rms", "rms_gain", "layer"],
    "ffn": ["relu2", "gelu", "swiglu", "moe", "moe,relu2"],
    "balance": ["aux", "quantile", "none"],
    "recurrence": ["stacked", "indexed", "shared"],
    "per_step": ["none", "norm", "router,scale"],
    "optimizer": ["muon", "adamw"],
}


def refusal(**changes):
    """The sentence that refuses these settings, "" where they are taken."""
    try:
        tiny(n_layer=4, n_unique=2 if changes.get("recurrence") == "shared" else 1, **changes)
    except ConfigError as error:
        return str(error)
    return ""


def completed(chosen):
    """The first settings that extend those chosen to all axes and are taken; None where there are none."""
    free = [axis for axis in AXES if axis not in chosen]
    order = sorted(
        free, key=lambda axis: axis not in ("recurrence", "norm", "ffn")
    )  # those that others need
    for values in itertools.product(*(reversed(AXES[axis]) for axis in order[:3])):
        settings = (
            chosen | dict(zip(order[:3], values)) | {axis: AXES[axis][0] for axis in order[3:]}
        )
        if not refusal(**settings):
            return settings
    return None


def pairs_of(settings):
    return set(itertools.combinations(sorted(settings.items()), 2))


def covering():
    """Settings that together have every pair that can be had, chosen greedily; the pairs that cannot be had."""
    open_pairs = [
        tuple(sorted(((a, x), (b, y))))
        for a, b in itertools.combinations(AXES, 2)
        for x in AXES[a]
        for y in AXES[b]
    ]
    alone = {pair for pair in open_pairs if completed(dict(pair)) is None}
    open_pairs, rows = set(open_pairs) - alone, []
    while open_pairs:
        settings = completed(dict(min(open_pairs)))
        for axis, value in itertools.product(AXES, [*range(5)]):  # better it value by value
            if value < len(AXES[axis]):
                other = settings | {axis: AXES[axis][value]}
                gain = len(pairs_of(other) & open_pairs) - len(pairs_of(settings) & open_pairs)
                settings = other if gain > 0 and not refusal(**other) else settings
        rows.append(settings)
        open_pairs -= pairs_of(settings)
    return rows, alone


ROWS, ALONE = covering()


def curve(settings):
    with open(settings["LOG_DIR"] / "toy.csv", newline="") as file:
        return [
            [row[name] for name in row if name not in ("train_time", "tokens_per_sec", "data_wait")]
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("combination", ROWS, ids=lambda row: " ".join(map(str, row.values())))
def test_it_trains_three_steps_and_resumes(settings, tmp_path, combination):
    """A run of three steps goes on to five; it is the run of five steps, to the last bit."""
    settings |= {name.upper(): value for name, value in combination.items()} | {
        "N_LAYER": 4,
        "WARMDOWN_ITERS": 0,
    }
    settings |= {"VAL_EVERY": 0, "BALANCE_LOG_INTERVAL": 2}
    settings |= {"N_UNIQUE": 2} if settings["RECURRENCE"] == "shared" else {}
    five = settings | {"NUM_ITERATIONS": 5}
    for run in (settings | {"NUM_ITERATIONS": 3}, five | {"RESUME": "auto"}):
        codes, out = launch(run)
        assert codes == [0], out
    straight = five | {"LOG_DIR": tmp_path / "straight"}
    assert launch(straight)[0] == [0]
    models = [load_file(run["LOG_DIR"] / "toy" / "model.safetensors") for run in (five, straight)]
    assert models[0].keys() == models[1].keys()
    assert not [name for name, tensor in models[0].items() if not tensor.equal(models[1][name])]
    assert [point for point in curve(five) if point[0] != "3"] == [
        point for point in curve(straight) if point[0] != "3"
    ]  # after the last step there is a validation


@pytest.mark.parametrize(
    "pair", sorted(ALONE), ids=lambda pair: " ".join("=".join(part) for part in pair)
)
def test_a_pair_without_meaning_is_refused_by_name(pair):
    """Whatever the rest is, the sentence names one of the two and what it needs."""
    sentence = refusal(**dict(pair))
    assert any(f"{axis.upper()}={value}" in sentence for axis, value in pair), sentence
    assert " needs " in sentence


def test_few_runs_cover_all_pairs():
    assert len(ROWS) < 40 and {pair for pair in map(frozenset, ALONE)} == {
        frozenset((("ffn", dense), other))
        for dense in ("relu2", "gelu", "swiglu")
        for other in (("balance", "quantile"), ("balance", "none"), ("per_step", "router,scale"))
    } | {
        frozenset((("recurrence", depth), ("per_step", own)))
        for depth in ("stacked", "indexed")
        for own in ("norm", "router,scale")
    } | {frozenset((("norm", "rms"), ("per_step", "norm")))}
