"""Plays simulated stages to their end: how often the gate promotes by chance, and what it misses.

    python scripts/simulate_gate.py
    python scripts/simulate_gate.py --stages 2000   # quicker, less sure

A stage has a reference and some variants, all with the same seeds. They are judged at every look
with what is known so far; a variant is out as soon as it is promoted or held. Prints a Markdown
table, a row a case. Exit code 1 where chance promotes too often or too much is missed.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import nct, t

from gate_stats import CONFIDENCE, PROMOTE, SEED, SHARES, levels_at, paired, rule_states, student
from stage_gate import RULES

NOISE = {  # sd of the loss of one run, nats: of the reference, of the first variant, of the others
    "equal": (0.05, 0.05, 0.05),
    "first variant 4 times": (0.05, 0.20, 0.05),
    "reference 4 times": (0.20, 0.05, 0.05),
    "small": (0.005, 0.005, 0.005),
    "large": (0.20, 0.20, 0.20),
}
# sd of one run: seconds as a fraction of the reference's. Runs of one seed share no such noise.
SIDE_NOISE = {"seconds": 0.05, "imbalance": 0.05, "violation": 0.2}
EFFECT = 2  # sd of the difference of one seed: how much better the variant is that shall be found
POWER = 0.8  # share of stages that must find it
MOST = 8  # seeds: with fewer to spend, POWER is not asked for
ERRORS = 3  # binomial standard errors by which a share of stages may be off


class Case(NamedTuple):
    """What a simulated stage is like."""

    variants: int
    noise: str  # of NOISE
    correlation: float  # of the losses of one seed
    looks: tuple[int, ...]  # after so many seeds


class Result(NamedTuple):
    """What came of the stages of one case."""

    chance: float  # share that promotes anything where nothing differs
    chance_seeds: float  # a variant, mean
    at_limit: float  # share that promotes one whose loss is just no more the same, for less work
    found: float  # share that promotes the variant that is better
    found_seeds: float  # of that variant, mean
    fixed_seeds: int  # with one look only, to find it in the same share


MANY = tuple(range(3, MOST + 1))
CASES = [
    *(Case(m, noise, rho, MANY) for m in (1, 2, 4) for noise in NOISE for rho in (0, 0.5, 0.9)),
    *(Case(m, "equal", 0.5, looks) for m in (1, 2, 4) for looks in ((3, 4, 5), (5,))),
]


def draw(case: Case, stages: int, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], float]:
    """(differences (stages, variants, seeds) by figure where nothing differs, sd of one difference
    of the first variant's loss)."""
    shape = stages, 1 + case.variants, case.looks[-1]
    reference, first, others = NOISE[case.noise]
    sds = np.array([reference, first, *[others] * (case.variants - 1)])
    rho = case.correlation

    common = rng.normal(size=(stages, 1, shape[-1]))
    own = rng.normal(size=shape)
    runs = {"loss": sds[:, None] * (rho**0.5 * common + (1 - rho) ** 0.5 * own)}
    for name, sd in SIDE_NOISE.items():
        runs[name] = sd * rng.normal(size=shape)
    differences = {name: values[:, 1:] - values[:, :1] for name, values in runs.items()}
    return differences, (reference**2 + first**2 - 2 * rho * reference * first) ** 0.5


def play(
    differences: Mapping[str, np.ndarray],
    looks: tuple[int, ...],
    rules: Mapping,
    flops: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """(whether it was promoted, its seeds) of every variant, (stages, variants) each.

    differences: (stages, variants, seeds) by figure; flops: over the reference's.
    """
    shape = differences["loss"].shape[:2]
    not_measured = student(looks[-1], np.full(shape, np.nan), np.nan, np.nan)
    promoted = np.zeros(shape, bool)
    seeds = np.zeros(shape, int)
    live = np.ones(shape, bool)
    for n in looks:
        figures = dict.fromkeys(("first", "drift", "increase"), not_measured)
        figures |= {name: paired(values[..., :n]) for name, values in differences.items()}
        facts = {"last": n == looks[-1], "first_look": looks[0], "healthy": True, "timed": True}
        facts |= {"flops": np.full(shape, flops), "params": np.ones(shape)}
        level = levels_at(rules["alpha"], shape[1], looks, n)
        state = np.maximum.reduce(list(rule_states(figures, facts, rules, level).values()))
        seeds[live] = n
        promoted |= live & (state == PROMOTE)
        live &= state == SEED
    return promoted, seeds


def fixed_plan(power: float, alpha: float) -> int:
    """The fewest seeds with which one paired t-test at alpha finds EFFECT with this power."""
    n = 2
    while nct.sf(t.isf(alpha, n - 1), n - 1, EFFECT * n**0.5) < power:
        n += 1
    return n


def simulate(case: Case, stages: int = 20_000, seed: int = 0, rules: Mapping = RULES) -> Result:
    """Plays the stages of a case where nothing differs; where all variants work less for a loss
    that is higher by `same_loss`; and with a better first variant.

    There the margin is at most half of what it is better by, so that noise alone is in the way.
    """
    differences, sd = draw(case, stages, np.random.default_rng(seed))
    chance, chance_seeds = play(differences, case.looks, rules)
    higher = differences | {"loss": differences["loss"] + rules["same_loss"]}
    at_limit, _ = play(higher, case.looks, rules, flops=0.5)

    differences["loss"][:, 0] -= EFFECT * sd
    margin = min(rules["better"], EFFECT * sd / 2)
    found, found_seeds = play(differences, case.looks, {**rules, "better": margin})
    power = found[:, 0].mean()
    least_power = power - ERRORS * (power * (1 - power) / stages) ** 0.5
    alpha = rules["alpha"] * SHARES["loss"] / case.variants
    return Result(
        chance=chance.any(1).mean(),
        chance_seeds=chance_seeds.mean(),
        at_limit=at_limit.any(1).mean(),
        found=power,
        found_seeds=found_seeds[:, 0].mean(),
        # no plan finds it always; so many stages cannot tell that from always
        fixed_seeds=fixed_plan(min(least_power, 1 - 1 / stages), alpha),
    )


def name_of(case: Case) -> str:
    """A case as a cell of the table and in a sentence."""
    seeds = f"{case.looks[0]} to {case.looks[-1]}" if len(case.looks) > 1 else f"{case.looks[0]}"
    variants = "1 variant" if case.variants == 1 else f"{case.variants} variants"
    return f"{variants}, noise {case.noise}, correlation {case.correlation:g}, {seeds} seeds"


def complaints(case: Case, result: Result, stages: int, alpha: float) -> list[str]:
    """A sentence for each thing that is not as it must be."""
    found = []
    limit_alpha = alpha + 1.15 * (1 - CONFIDENCE) / 2  # see gate_stats.py
    for share, wanted, what in (
        (result.chance, alpha, "by chance"),
        (result.at_limit, limit_alpha, "at the limit of same_loss"),
    ):
        allowed = wanted + ERRORS * (wanted * (1 - wanted) / stages) ** 0.5
        if share > allowed:
            found.append(f"{name_of(case)}: {share:.2%} promote {what}, over {allowed:.2%}")
    if case.looks[-1] >= MOST and result.found < POWER:
        found.append(f"{name_of(case)}: {result.found:.1%} find {EFFECT} sd, under {POWER:.0%}")
    return found


def main(argv: Sequence[str]) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--stages", type=int, default=20_000, help="a case")
    args = parser.parse_args(argv)
    if args.stages < 1:
        parser.error("--stages must be 1 or more")

    wrong = []
    print(
        "| case | by chance | mean seeds | at the limit | two sd found | mean seeds | fixed plan |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for seed, case in enumerate(CASES):
        result = simulate(case, args.stages, seed)
        print(
            f"| {name_of(case)} | {result.chance:.2%} | {result.chance_seeds:.2f} "
            f"| {result.at_limit:.2%} "
            f"| {result.found:.1%} | {result.found_seeds:.2f} | {result.fixed_seeds} |",
            flush=True,
        )
        wrong += complaints(case, result, args.stages, RULES["alpha"])
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
