"""scripts/gate_stats.py against scipy, published boundaries and simulated stages."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm, t, ttest_ind, ttest_rel

import gate_stats
import simulate_gate
from gate_stats import HOLD, PROMOTE, SEED, Difference, below, not_above, paired
from simulate_gate import MANY, Case, Result
from stage_gate import RULES

LEVEL = {"loss": 0.008, "imbalance": 0.001, "seconds": 0.001, "limit": 0.025}
HEALTHY = {"last": False, "first_look": 3, "healthy": True, "timed": True}
HEALTHY |= {"flops": 1.0, "params": 1.0}
ALL_RULES = {**RULES, "rules": ["better", "same_loss", "half_params", "first_gap"]}


def runs(count, shift=0.0, first_seed=1, spread=0.05):
    """Losses of so many runs, by seed; with another shift other noise."""
    rng = np.random.default_rng([first_seed, count, shift > 0])
    values = 3 + shift + spread * rng.normal(size=count)
    return pd.Series(values, index=range(first_seed, first_seed + count))


def check(one, oracle, one_sided, mean):
    """That a Difference is what scipy says."""
    interval = oracle.confidence_interval(0.95)
    expected = mean, interval.low, interval.high, oracle.pvalue, one_sided.pvalue
    np.testing.assert_allclose(one[1:6], expected, rtol=1e-9, atol=1e-12)


# Tests of one difference


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("shift", [-0.3, 0.0, 0.3])
def test_paired_is_the_paired_t_test_of_scipy(n, shift):
    """For every element of an array of differences."""
    rng = np.random.default_rng(n)
    ours, theirs = rng.normal(size=(2, 4, 5, n))
    ours = ours + shift
    found = paired(ours - theirs)
    assert found.n == n and found.mean.shape == (4, 5)
    check(
        found,
        ttest_rel(ours, theirs, axis=-1),
        ttest_rel(ours, theirs, axis=-1, alternative="less"),
        ours.mean(-1) - theirs.mean(-1),
    )


@pytest.mark.parametrize("ours, theirs", [(2, 2), (3, 8), (7, 2)])
@pytest.mark.parametrize("shift", [-0.3, 0.3])
def test_welch_is_welchs_test_of_scipy(ours, theirs, shift):
    a = runs(ours, shift, spread=0.2).to_numpy()
    b = runs(theirs, first_seed=50).to_numpy()
    found = gate_stats.welch(a, b)
    assert found.n == min(ours, theirs)
    check(
        found,
        ttest_ind(a, b, equal_var=False),
        ttest_ind(a, b, equal_var=False, alternative="less"),
        a.mean() - b.mean(),
    )


@pytest.mark.parametrize("ours, theirs, shared", [(5, 5, 5), (5, 3, 3), (3, 5, 3), (2, 8, 2)])
def test_compare_pairs_the_seeds_that_both_have(ours, theirs, shared):
    """Whatever the order of the runs."""
    a, b = runs(ours, -0.1), runs(theirs, 0.1).iloc[::-1]
    found, test = gate_stats.compare(a, b)
    both = range(1, shared + 1)
    assert (test, found.n) == ("paired", shared)
    check(
        found,
        ttest_rel(a[both], b[both]),
        ttest_rel(a[both], b[both], alternative="less"),
        a[both].mean() - b[both].mean(),
    )


def test_compare_leaves_out_the_seeds_that_only_one_has():
    a, b = runs(5), runs(5, 0.1, first_seed=3)  # seeds 1 to 5 and 3 to 7
    found, test = gate_stats.compare(a, b)
    assert (test, found.n) == ("paired", 3)
    assert found.p == pytest.approx(ttest_rel(a[[3, 4, 5]], b[[3, 4, 5]]).pvalue)


@pytest.mark.parametrize("first_seed", [5, 6], ids=["one shared", "none shared"])
def test_compare_without_pairs_is_welchs_test(first_seed):
    a, b = runs(5, -0.1), runs(4, first_seed=first_seed)
    found, test = gate_stats.compare(a, b)
    assert (test, found.n) == ("Welch", 4)
    check(
        found,
        ttest_ind(a, b, equal_var=False),
        ttest_ind(a, b, equal_var=False, alternative="less"),
        a.mean() - b.mean(),
    )


@pytest.mark.parametrize(
    "a, b, gap",
    [
        (pd.Series({1: 2.5}), pd.Series({1: 3.0}), -0.5),
        (pd.Series({1: 2.5}), pd.Series({1: 3.0, 2: 9.0}), -0.5),  # the pair alone
        (pd.Series({1: 2.5}), pd.Series({2: 3.0, 3: 4.0}), np.nan),  # no pair, no test
        (pd.Series(dtype=float), pd.Series({2: 3.0, 3: 4.0}), np.nan),
    ],
)
def test_one_run_has_a_mean_and_no_test(a, b, gap):
    found, test = gate_stats.compare(a, b)
    assert test == "" and found.n == len(a)
    np.testing.assert_allclose(found.mean, gap)
    assert np.isnan([found.low, found.high, found.p, found.p_below]).all()


# Several differences, several looks


def closed_testing(p):
    """The closure of Bonferroni's tests: for each p the largest of all subsets that contain it."""
    measured = [i for i in range(len(p)) if not np.isnan(p[i])]
    corrected = np.full(len(p), np.nan)
    for size in range(1, len(measured) + 1):
        for subset in itertools.combinations(measured, size):
            joint = min(1, size * min(p[i] for i in subset))
            for i in subset:
                corrected[i] = np.fmax(corrected[i], joint)
    return corrected


@pytest.mark.parametrize("missing", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_holm_is_the_closure_of_bonferroni(count, missing):
    rng = np.random.default_rng(count)
    for power in (1, 4):  # of a high power most p are small
        for _ in range(30):
            p = rng.uniform(size=count) ** power
            p[rng.permutation(count)[:missing]] = np.nan
            np.testing.assert_allclose(gate_stats.holm(p), closed_testing(p))


def test_levels_are_the_published_boundaries():
    """Lan and DeMets' of the form of O'Brien and Fleming, five equal looks, one-sided 2.5 %."""
    found = gate_stats.levels(0.025, (1, 2, 3, 4, 5))
    boundaries = [4.8769, 3.3569, 2.6803, 2.2898, 2.0310]
    np.testing.assert_allclose(norm.isf(list(found.values())), boundaries, atol=2e-3)


@pytest.mark.parametrize("looks", [MANY, (3, 5, 8), (5,)], ids=str)
def test_a_brownian_motion_crosses_as_often_as_is_spent(looks):
    """Up to each look, alpha 1 %."""
    alpha, count = 0.01, 1_000_000
    found = gate_stats.levels(alpha, looks)
    assert tuple(found) == looks
    rng = np.random.default_rng(0)
    total, seen, crossed = np.zeros(count), 0, np.zeros(count, bool)
    for look in looks:
        total += (look - seen) ** 0.5 * rng.normal(size=count)
        seen = look
        crossed |= total / look**0.5 >= norm.isf(found[look])
        spent = 2 * norm.sf(norm.isf(alpha / 2) / (look / looks[-1]) ** 0.5)
        assert abs(crossed.mean() - spent) <= 4 * (spent / count) ** 0.5
    assert spent == pytest.approx(alpha)


# Verdicts


def difference(mean=0.0, low=-1.0, high=1.0, p_below=0.5, n=5):
    error = (high - mean) / t.ppf(0.975, n - 1)  # as the upper end has it
    values = (mean, low, high, 2 * p_below, p_below, error, n - 1)
    return Difference(n, *(np.asarray(value, float) for value in values))


@pytest.mark.parametrize(
    "one, last, state",
    [
        (difference(-0.05, -0.09, p_below=0.01), False, PROMOTE),
        (difference(-0.05, -0.09, p_below=0.01), True, PROMOTE),
        (difference(-0.0499, -0.09, p_below=0.01), False, SEED),
        (difference(-0.0499, -0.09, p_below=0.01), True, HOLD),
        (difference(-0.05, -0.09, p_below=0.0101), False, SEED),
        (difference(-0.05, -0.09, p_below=0.0101), True, HOLD),
        (difference(-0.001, -0.05, p_below=0.4), False, SEED),
        (difference(-0.001, -0.0499, p_below=0.4), False, HOLD),
        (difference(0.0, -0.05, p_below=0.5, n=3), False, HOLD),
        (difference(0.02, -0.05, p_below=0.5, n=2), False, SEED),
        (difference(-0.06, np.nan, np.nan, np.nan), False, SEED),  # one run
        (difference(-0.06, np.nan, np.nan, np.nan), True, HOLD),
        (difference(*[np.nan] * 4), False, HOLD),
    ],
)
def test_below_on_both_sides_of_its_limits(one, last, state):
    assert below(one, 0.05, 0.01, last) == state


@pytest.mark.parametrize(
    "one, last, state",
    [
        (difference(0.0, -0.02, 0.00999), False, PROMOTE),
        (difference(0.0, -0.02, 0.00999), True, PROMOTE),
        (difference(0.0, -0.02, 0.0101), False, SEED),
        (difference(0.0, -0.02, 0.0101), True, HOLD),
        (difference(0.02, 0.01, 0.03), False, SEED),
        (difference(0.02, 0.0101, 0.03), False, HOLD),
        (difference(-0.02, np.nan, np.nan, np.nan), False, SEED),  # one run
        (difference(-0.02, np.nan, np.nan, np.nan), True, HOLD),
        (difference(*[np.nan] * 4), False, HOLD),
    ],
)
def test_not_above_on_both_sides_of_its_limit(one, last, state):
    assert not_above(one, 0.01, 0.025, last) == state  # the level of a 95 % interval


GOOD = {  # enough for every rule
    "loss": difference(-0.06, -0.07, -0.05, 0.0),
    "first": difference(0.0, -0.01, 0.01),
    "drift": difference(0.0, -0.01, 0.01),
    "increase": difference(-0.02, -0.03, -0.01),
    "seconds": difference(-0.06, -0.07, -0.05, 0.0),
    "imbalance": difference(-0.03, -0.04, -0.02, 0.0),
    "violation": difference(-0.1, -0.2, 0.0),
}


def states(figures=GOOD, rules=ALL_RULES, **facts):
    found = gate_stats.rule_states(figures, {**HEALTHY, "params": 0.5, **facts}, rules, LEVEL)
    return {name: int(state) for name, state in found.items()}


def test_every_rule_promotes_where_its_conditions_hold():
    assert states() == dict.fromkeys(ALL_RULES["rules"], PROMOTE)
    assert list(states(rules={**RULES, "rules": ["same_loss"]})) == ["same_loss"]


def good_but(**others):
    """GOOD with other means; their intervals are as narrow as before."""
    return GOOD | {
        name: difference(mean, mean - 0.01, mean + 0.01, 0.0) for name, mean in others.items()
    }


SLOW = {"seconds": -0.04}
UNEVEN = {"imbalance": -0.01}


@pytest.mark.parametrize(
    "rule, figures, facts",
    [
        ("better", good_but(loss=-0.03), {}),
        ("same_loss", good_but(loss=0.03), {}),
        ("same_loss", good_but(**SLOW, **UNEVEN), {"flops": 0.951}),
        ("same_loss", good_but(violation=0.001, **SLOW), {}),
        ("same_loss", good_but(**UNEVEN), {"timed": False}),
        ("half_params", GOOD, {"params": 0.601}),
        ("half_params", good_but(increase=0.09), {}),
        ("first_gap", good_but(first=0.12), {}),
        ("first_gap", good_but(drift=0.04), {}),
        ("first_gap", GOOD, {"healthy": False}),
    ],
)
def test_a_rule_does_not_promote_where_one_condition_fails(rule, figures, facts):
    found = states(figures, **facts, last=True)
    assert found.pop(rule) == HOLD
    assert PROMOTE in found.values()


@pytest.mark.parametrize(
    "figures, facts",
    [
        (good_but(**SLOW, **UNEVEN), {"flops": 0.95}),
        (good_but(**UNEVEN), {}),
        (good_but(violation=0.0, **SLOW), {"timed": False}),
    ],
    ids=["cheaper", "faster", "balanced"],
)
def test_one_advantage_is_enough(figures, facts):
    assert states(figures, **facts)["same_loss"] == PROMOTE


@pytest.mark.parametrize("name", ["imbalance", "seconds"])
def test_every_figure_has_a_level_of_its_own(name):
    other = {"imbalance": SLOW, "seconds": UNEVEN}[name]
    for p, state in ((LEVEL[name], PROMOTE), (LEVEL[name] * 1.01, SEED)):
        figures = good_but(**other)
        figures[name] = figures[name]._replace(p_below=np.asarray(p))
        assert states(figures)["same_loss"] == state
    figures = GOOD | {"loss": GOOD["loss"]._replace(p_below=np.asarray(LEVEL["loss"]))}
    assert states(figures)["better"] == PROMOTE


@pytest.mark.parametrize("last, state", [(False, SEED), (True, HOLD)])
def test_fewer_than_three_pairs_never_promote(last, state):
    """Not even two that agree to the last digit."""
    enough = {name: one.mean for name, one in GOOD.items()}
    for n, expected in ((1, state), (2, state), (3, PROMOTE)):
        figures = {name: paired(np.full(n, mean)) for name, mean in enough.items()}
        assert states(figures, last=last) == dict.fromkeys(ALL_RULES["rules"], expected)


@pytest.mark.parametrize(
    "missing, rules",
    [
        (["loss"], ["better", "same_loss"]),
        (["increase"], ["half_params"]),
        (["first"], ["first_gap"]),
        (["drift"], ["first_gap"]),
        (["seconds", "imbalance"], ["same_loss"]),
        (["seconds", "violation"], ["same_loss"]),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_what_was_not_measured_never_promotes(missing, rules, last):
    figures = GOOD | {name: difference(*[np.nan] * 4) for name in missing}
    assert states(figures, last=last) == {
        name: HOLD if name in rules else PROMOTE for name in ALL_RULES["rules"]
    }


@pytest.mark.parametrize(
    "fact, known, rule", [("flops", 0.9, "same_loss"), ("params", 0.5, "half_params")]
)
def test_a_size_that_is_not_known_never_promotes(fact, known, rule):
    figures = good_but(**SLOW, **UNEVEN)
    assert states(figures, **{fact: known}, last=True)[rule] == PROMOTE
    assert states(figures, **{fact: np.nan}, last=True)[rule] == HOLD


def test_arrays_are_judged_element_by_element():
    rng = np.random.default_rng(0)
    many = {name: rng.normal(one.mean, 0.01, (6, 2, 4)) for name, one in GOOD.items()}
    found = gate_stats.rule_states(
        {name: paired(values) for name, values in many.items()},
        {**HEALTHY, "params": np.full((6, 2), 0.5)},
        ALL_RULES,
        LEVEL,
    )
    for i in np.ndindex(6, 2):
        alone = states({name: paired(values[i]) for name, values in many.items()})
        assert alone == {name: state[i] for name, state in found.items()}
    assert len(np.unique(found["same_loss"])) > 1


# Stages played to their end


@pytest.mark.parametrize(
    "case",
    [
        Case(1, "large", 0, MANY),
        Case(2, "large", 0, MANY),
        Case(4, "large", 0.5, MANY),
        Case(1, "first variant 4 times", 0.5, MANY),
        Case(1, "reference 4 times", 0.9, MANY),
        Case(2, "large", 0, (3, 4, 5)),
        Case(2, "small", 0.5, MANY),
    ],
    ids=simulate_gate.name_of,
)
def test_chance_promotes_in_at_most_one_stage_of_a_hundred(case):
    stages = 10_000
    found = simulate_gate.simulate(case, stages)
    assert 0 < found.chance <= 0.01 + 3 * (0.01 * 0.99 / stages) ** 0.5
    assert found.at_limit <= 0.039 + 3 * (0.039 * 0.961 / stages) ** 0.5
    assert 3 <= found.chance_seeds <= case.looks[-1]


@pytest.mark.parametrize("variants", [1, 2, 4])
@pytest.mark.parametrize("noise", ["equal", "first variant 4 times"])
def test_a_difference_of_two_standard_deviations_is_promoted(variants, noise):
    """With fewer seeds than a plan of one look takes."""
    found = simulate_gate.simulate(Case(variants, noise, 0.5, MANY), 4000)
    assert found.found >= 0.80
    assert found.found_seeds < found.fixed_seeds <= 8


def test_a_simulated_stage_correlates_as_its_case_says():
    """The losses of a seed, and so their differences; sd is that of the differences."""
    case = Case(2, "first variant 4 times", 0.5, (8,))
    differences, sd = simulate_gate.draw(case, 20_000, np.random.default_rng(0))
    first, second = differences["loss"].swapaxes(0, 1).reshape(2, -1)
    assert first.std() == pytest.approx(sd, rel=0.02)
    assert sd == pytest.approx((0.05**2 + 0.2**2 - 2 * 0.5 * 0.05 * 0.2) ** 0.5)
    assert second.std() == pytest.approx(0.05, rel=0.02)
    shared = 0.5 * 0.2 * 0.05 - 0.5 * 0.05 * 0.05 - 0.5 * 0.2 * 0.05 + 0.05**2
    assert np.cov(first, second)[0, 1] == pytest.approx(shared, rel=0.05)


def test_a_variant_that_was_held_gets_no_more_seeds():
    rng = np.random.default_rng(0)
    differences = {name: rng.normal(1, 0.001, (10, 2, 8)) for name in simulate_gate.SIDE_NOISE}
    differences["loss"] = differences["seconds"] * [[1], [-1]]  # one is worse, one is better
    promoted, seeds = simulate_gate.play(differences, MANY, RULES)
    assert (promoted == [False, True]).all()
    assert (seeds[:, 0] == 3).all()


def test_one_look_needs_as_many_seeds_as_the_fixed_plan_says():
    """Its power is that of the t-tests of scipy on simulated seeds."""
    n = simulate_gate.fixed_plan(0.8, 0.008)
    rng = np.random.default_rng(0)

    def power(seeds):
        x = rng.normal(-2, 1, size=(20_000, seeds))
        return (ttest_rel(x, np.zeros_like(x), axis=1, alternative="less").pvalue <= 0.008).mean()

    assert power(n) >= 0.8 > power(n - 1)


@pytest.mark.parametrize(
    "result, code, sentence",
    [
        (Result(0.0130, 7, 0.04, 0.80, 6, 8), 0, ""),
        (Result(0.0132, 7, 0.04, 0.80, 6, 8), 1, "1.32% promote by chance, over 1.31%\n"),
        (Result(0.0130, 7, 0.04, 0.79, 6, 8), 1, "79.0% find 2 sd, under 80%\n"),
        (Result(0.0130, 7, 0.05, 0.80, 6, 8), 1, "5.00% promote at the limit of same_loss, over"),
    ],
)
def test_the_simulation_complains(monkeypatch, capsys, result, code, sentence):
    monkeypatch.setattr(simulate_gate, "CASES", [Case(1, "equal", 0.5, MANY)])
    monkeypatch.setattr(simulate_gate, "simulate", lambda *_: result)
    assert simulate_gate.main(["--stages", "9300"]) == code
    out, err = capsys.readouterr()
    assert "| 1 variant, noise equal, correlation 0.5, 3 to 8 seeds | 1.3" in out
    assert sentence in err and err.count("\n") == code
