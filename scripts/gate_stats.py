"""Statistics of a stage: differences paired by seed, Holm's correction, and when to stop looking.

The gate adds seeds one by one and looks after each, so what p has to reach at a look follows an
alpha-spending function (Lan and DeMets 1983, doi 10.1093/biomet/70.3.659) in the form of O'Brien
and Fleming. Its boundaries hold for a Brownian motion; like Jennison and Turnbull (2000, ch. 4) we
compare Student's p with them, which at 3 to 8 seeds promotes 1.15 times as often as planned: SHARES
leave room for that. simulate_gate.py measures what comes of it.

Numbers may be arrays of one shape, an element a variant or a simulated stage.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri, stdtr, stdtrit

FEWEST = 3  # seeds: with fewer nothing is promoted
CONFIDENCE = 0.95  # of intervals
# What a stage may promote by chance is shared by what its variants may promote by: a lower loss, a
# more even load, a shorter step (a weighted Bonferroni); 0.85 in all, 1 / 1.15 of the whole. FLOPs
# and parameters have no noise.
SHARES = {"loss": 0.7, "imbalance": 0.075, "seconds": 0.075}

# of several rules the highest counts, of several conditions the lowest
PROMOTE, SEED, HOLD = 1, 0, -1


class Difference(NamedTuple):
    """A variant minus its reference, over seeds: mean, its 95 % interval, and how sure it is."""

    n: np.ndarray  # pairs; of Welch's test the fewer runs of the two
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray  # two-sided
    p_below: np.ndarray  # one-sided, that it is not below 0
    error: np.ndarray  # standard error of the mean
    df: np.ndarray  # of Student's t

    def p_below_limit(self, limit: float) -> np.ndarray:
        """One-sided p that it is not below a limit."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return stdtr(self.df, (self.mean - limit) / self.error)

    def scaled(self, scale: float) -> "Difference":
        """The difference as a fraction of `scale`."""
        changed = {name: getattr(self, name) / scale for name in ("mean", "low", "high", "error")}
        return self._replace(**changed)


def student(n: np.ndarray, mean: np.ndarray, error: np.ndarray, df: np.ndarray) -> Difference:
    """What Student's t says of a mean with this standard error; NaN where that is not known."""
    with np.errstate(divide="ignore", invalid="ignore"):
        half = stdtrit(df, (1 + CONFIDENCE) / 2) * error
        p_below = stdtr(df, mean / error)
    p = 2 * np.minimum(p_below, 1 - p_below)
    return Difference(n, mean, mean - half, mean + half, p, p_below, error, df)


def paired(differences: np.ndarray) -> Difference:
    """The paired t-test of differences (..., n), one a seed."""
    n = differences.shape[-1]
    mean = differences.mean(-1)
    if n < 2:
        return student(n, mean, mean * np.nan, np.nan)
    return student(n, mean, differences.std(-1, ddof=1) / n**0.5, n - 1)


def welch(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Welch's t-test of runs (n,) and (m,) on seeds of their own."""
    fewer, mean = min(len(ours), len(theirs)), ours.mean() - theirs.mean()
    if fewer < 2:
        return student(fewer, mean, np.nan, np.nan)
    a, b = ours.var(ddof=1) / len(ours), theirs.var(ddof=1) / len(theirs)
    df = np.inf
    if a + b > 0:
        df = (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (len(theirs) - 1))
    return student(fewer, mean, (a + b) ** 0.5, df)


def compare(ours: pd.Series, theirs: pd.Series) -> tuple[Difference, str]:
    """(the Difference, its test) of figures by seed: paired where two or more seeds are shared.

    The test is `paired`, `Welch`, or "" where there is too little for either.
    """
    shared = ours.index.intersection(theirs.index)
    if len(shared) > 1:
        return paired((ours[shared] - theirs[shared]).to_numpy(float)), "paired"
    if min(len(ours), len(theirs)) > 1:
        return welch(ours.to_numpy(float), theirs.to_numpy(float)), "Welch"
    if len(shared) == 1:
        return paired((ours[shared] - theirs[shared]).to_numpy(float)), ""
    return student(min(len(ours), len(theirs)), np.nan, np.nan, np.nan), ""


def holm(p: Sequence[float]) -> np.ndarray:
    """Each p so corrected that all of them may be looked at (Holm 1979); NaN stays, and is none."""
    p = np.asarray(p, float)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN comes last
    corrected = np.full(len(p), np.nan)
    factors = len(order) - np.arange(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * p[order]))
    return corrected


def density_of(z: np.ndarray) -> np.ndarray:
    """The density of a standard normal variable."""
    return np.exp(-(z**2) / 2) / (2 * np.pi) ** 0.5


def overshoot(
    bound: float, points: np.ndarray, density: np.ndarray, step: float, wanted: float
) -> float:
    """How much more than wanted is above the bound after a step of a Brownian motion that starts at
    these points with this density."""
    return density @ ndtr((points - bound) / step) - wanted


@functools.cache
def levels(alpha: float, looks: tuple[int, ...]) -> dict[int, float]:
    """{seeds: what a one-sided p has to reach} at looks after so many seeds, in ascending order.

    With no difference one of them or another is reached with probability alpha.
    """
    z_half = -ndtri(alpha / 2)
    points, spent, time = np.zeros(1), 0.0, 0.0
    density = np.ones(1)  # at these points, times their distance: of those not yet decided
    found = {}
    for look in looks:
        step = (look / looks[-1] - time) ** 0.5
        time = look / looks[-1]
        to_spend = 2 * ndtr(-z_half / time**0.5) - spent
        spent += to_spend

        bound = brentq(overshoot, -10, 40, args=(points, density, step, to_spend))
        found[look] = float(ndtr(-bound / time**0.5))
        grid = np.linspace(-8, bound, 1500)
        weight = np.full(len(grid), grid[1] - grid[0])
        weight[[0, -1]] /= 2
        transition = density_of((grid[:, None] - points) / step) / step
        points, density = grid, (transition @ density) * weight
    return found


def levels_at(alpha: float, count: int, looks: tuple[int, ...], look: int) -> dict[str, float]:
    """What p has to reach at a look of a stage with `count` variants, by the names of SHARES, and
    for `limit`, that something does not exceed one: there the error is that of a 95 % interval."""
    errors = {name: alpha * share for name, share in SHARES.items()}
    errors["limit"] = (1 - CONFIDENCE) / 2
    return {name: levels(error / count, looks)[look] for name, error in errors.items()}


def below(one: Difference, margin: float, level: float, last: np.ndarray) -> np.ndarray:
    """PROMOTE where it is below 0 by the margin and that is no chance, HOLD where more seeds will
    not show it, else SEED: `last` is where no seed is left.

    No seed is spent on what the interval leaves out, nor on what is not below 0 after FEWEST, as
    Wieand and others have it (1994, Statistics in Medicine 13): chance gains nothing by a HOLD.
    """
    promote = (one.mean <= -margin) & (one.p_below <= level)
    not_below = (one.mean >= 0) & (one.n >= FEWEST)
    hold = last | (one.low > -margin) | not_below | np.isnan(one.mean)
    return np.where(promote, PROMOTE, np.where(hold, HOLD, SEED))


def not_above(one: Difference, limit: float, level: float, last: np.ndarray) -> np.ndarray:
    """The same for what must not exceed a limit."""
    hold = last | (one.low > limit) | np.isnan(one.mean)
    promote = one.p_below_limit(limit) <= level
    return np.where(promote, PROMOTE, np.where(hold, HOLD, SEED))


def rule_states(
    figures: Mapping[str, Difference], facts: Mapping, rules: Mapping, level: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """PROMOTE, SEED or HOLD by each rule that a stage has enabled.

    figures: Differences of loss, first and drift (nats), increase (of the loss, a fraction),
    seconds (a step, a fraction), imbalance (1 - entropy) and violation of the load. facts: last (no
    seed is left), first_look (with fewer pairs nothing is promoted unless it is the last), healthy,
    timed (on one kind of GPU), flops and params (over the reference's). level: of levels_at.
    """
    last, limit_level = facts["last"], level["limit"]
    enough = figures["loss"].n >= np.where(last, FEWEST, facts["first_look"])
    efficiency = rules["efficiency_gain"]

    balanced = below(figures["imbalance"], rules["routing_gain"], level["imbalance"], last)
    balanced = np.where(figures["violation"].mean <= 0, balanced, HOLD)
    faster = below(figures["seconds"], efficiency, level["seconds"], last)
    faster = np.where(facts["timed"], faster, HOLD)
    cheaper = np.where(facts["flops"] <= 1 - efficiency, PROMOTE, HOLD)
    advantage = np.maximum(np.maximum(balanced, faster), cheaper)

    same = not_above(figures["loss"], rules["same_loss"], limit_level, last)
    half = not_above(figures["increase"], rules["good"], limit_level, last)
    near = not_above(figures["first"], rules["first_gap"], limit_level, last)
    firm = not_above(figures["drift"], rules["widening"], limit_level, last)
    states = {
        "better": below(figures["loss"], rules["better"], level["loss"], last),
        "same_loss": np.minimum(same, advantage),
        "half_params": np.where(facts["params"] <= rules["half_params"], half, HOLD),
        "first_gap": np.where(facts["healthy"], np.minimum(near, firm), HOLD),
    }
    too_few = np.where(last, HOLD, SEED)
    return {
        name: np.where((states[name] == HOLD) | enough, states[name], too_few)
        for name in rules["rules"]
    }
