"""scripts/stage_gate.py, gate_facts.py: both sides of every limit, matched steps, pairs of seeds,
and what a verdict says. How often chance promotes is in test_gate_stats.py."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_ind, ttest_rel

import gate_facts
import gate_stats
import stage_gate as gate
from stages import Stage

LABELS = "none", "a", "b"


def stage(labels=LABELS, max_seeds=8, seeds=(1, 2), references=None, **rules):
    return Stage(
        name="toy",
        question="?",
        references=references or dict.fromkeys(labels, labels[0]),
        seeds=seeds,
        max_seeds=max_seeds,
        variants={label: {} for label in labels},
        axes=(),
        gate=rules,
        next=(),
    )


def curve(losses, steps=None, seconds=1.0, train=None, **experts):
    """A validation every 100 steps, a training loss every 10; `seconds` a step."""
    steps = steps or [100 * i for i in range(1, len(losses) + 1)]
    table = pd.DataFrame({"step": sorted({*range(10, steps[-1] + 1, 10), *steps})})
    table["val_loss"] = table.step.map(dict(zip(steps, losses)))
    table["train_loss"] = np.interp(table.step, steps, losses if train is None else train)
    table["train_time"] = seconds * table.step
    return table.assign(
        **{
            f"{name}_0": np.interp(table.step, steps, np.resize(values, len(steps)))
            for name, values in experts.items()
        }
    )


def study(**variants):
    """(rows, curves) of curves by variant; a text is the status of a run without a curve."""
    rows, curves = [], {}
    for label, runs in variants.items():
        for seed, run in enumerate(runs, 1):
            run_id, status = f"{label}{seed}", run if isinstance(run, str) else "ok"
            rows.append(
                {
                    "run_id": run_id,
                    "stage": "toy",
                    "variant": label,
                    "seed": seed,
                    "status": status,
                    "started": f"{len(rows):03}",
                    "source_sha": "s",
                    "data_fingerprint": "d",
                    "device_name": "H100",
                    "changes": "",
                    "config_hash": label,
                    "tokens_per_step": 1,
                    "params_total": 100.0,
                    "flops_per_token": 10.0,
                    "num_experts": 4,
                    "bad_steps": 0,
                    "resumes": 0,
                    "sequence_length": 16,
                    "val_tokens": 64,
                    "val_fingerprint": "v",
                    "preset": "",
                }
            )
            if status == "ok":
                curves[run_id] = run
    return pd.DataFrame(rows), curves


def around(mean, n, sd=0.001, **options):
    """Curves of n seeds whose last losses, at step 200, have exactly this mean and deviation."""
    noise = np.linspace(-1, 1, n) if n > 1 else np.zeros(1)
    scale = sd / noise.std(ddof=1) if n > 1 else 0
    return [curve([mean + 1, mean + scale * x], **options) for x in noise]


def judge(made, rows, curves):
    return gate.judge(made, gate_facts.gather(made, rows, curves))


def verdicts(rows, curves, **options):
    made = stage(tuple(rows.variant.unique()), **options)
    return judge(made, rows, curves).set_index("variant")


# no evaluation gains more than 0.02, all together do
FLAT = {"losses": [3.0, 2.0, 1.981, 1.962, 1.943], "train": [3.0, 2.0, 2.0, 2.0, 2.0]}


@pytest.mark.parametrize(
    "stop, made",
    [
        (True, curve(**FLAT)),
        (False, curve(**FLAT | {"losses": [3.0, 2.0, 2.0, 2.0, 1.979]})),
        (False, curve(**FLAT | {"losses": [3.0, 2.0, 1.979, 1.979, 1.979]})),
        (True, curve(**FLAT | {"losses": [3.0, 2.0, 2.5, 2.0, 1.981]})),
        (False, curve([3.0, 2.0, 2.0])),
        (True, curve([2.0, 2.1, 2.5, 3.0])),
        (False, curve(**FLAT | {"train": [3.0, 2.0, 1.992, 1.984, 1.976]})),
        (True, curve(**FLAT | {"train": [3.0, 2.0, 1.994, 1.988, 1.982]})),
        (True, curve(**FLAT, entropy=0.5, load_max=0.5)),
        (False, curve(**FLAT, entropy=[0.5, 0.5, 0.507, 0.514, 0.521], load_max=0.5)),
        (True, curve(**FLAT, entropy=[0.5, 0.5, 0.506, 0.512, 0.518], load_max=0.5)),
        (False, curve(**FLAT, entropy=0.5, load_max=[0.5, 0.5, 0.49, 0.48, 0.47])),
        (True, curve(**FLAT, entropy=0.5, load_max=[0.5, 0.5, 0.493, 0.486, 0.479])),
    ],
)
def test_a_run_is_stopped_when_nothing_improves(stop, made):
    verdict, reason, numbers = gate_facts.stop_verdict(made, gate.RULES, 4)
    assert verdict is stop and reason and numbers["evaluations"] == made.val_loss.notna().sum()


def test_the_numbers_of_a_stop():
    numbers = gate_facts.stop_verdict(
        curve(
            [3.0, 2.0, 1.99, 1.98, 1.97],
            entropy=[0, 0.1, 0.2, 0.3, 0.4],
            load_max=[1, 0.8, 0.7, 0.6, 0.5],
        ),
        gate.RULES,
        4,
    )[2]
    assert numbers == {
        "evaluations": 5,
        "eval_gain": pytest.approx(0.01),
        "gain_2_evals": pytest.approx(0.02),
        "train_slope": pytest.approx(-0.01),
        "entropy_change": pytest.approx(0.3),
        "violation_change": pytest.approx(-1.2),
    }
    blank = curve(**FLAT).assign(train_loss=np.nan)
    assert (
        gate_facts.stop_verdict(blank, gate.RULES)[0] is False
    )  # nobody has seen the training loss being flat


@pytest.mark.parametrize(
    "gap, verdict, rule", [(-0.051, "promote", "better"), (-0.049, "hold", ""), (0.2, "hold", "")]
)
def test_better(gap, verdict, rule):
    found = verdicts(*study(none=around(3.0, 8), a=around(3.0 + gap, 8))).loc["a"]
    assert (found.verdict, found.rule) == (verdict, rule)
    assert found.difference == pytest.approx(gap) and found.seeds == found.pairs == 8
    assert found.sd == pytest.approx(0.001)


@pytest.mark.parametrize(
    "gap, seconds, verdict",
    [
        (0.009, 0.94, "promote"),
        (0.011, 0.94, "hold"),
        (0.009, 0.96, "hold"),
        (-0.03, 0.94, "promote"),
    ],
)
def test_same_loss_in_less_time(gap, seconds, verdict):
    found = verdicts(*study(none=around(3.0, 8), a=around(3.0 + gap, 8, seconds=seconds))).loc["a"]
    assert found.verdict == verdict and found.seconds_per_step == pytest.approx(seconds)
    rows, curves = study(none=around(3.0, 8), a=around(3.0 + gap, 8, seconds=seconds))
    rows.loc[rows.variant == "a", "device_name"] = "H200"  # says nothing about the variant
    assert verdicts(rows, curves).loc["a"].verdict == "hold"
    assert (
        verdicts(rows.assign(device_name="cpu: shared with others"), curves).loc["a"].verdict
        == "hold"
    )


@pytest.mark.parametrize("flops, verdict", [(9.4, "promote"), (9.6, "hold")])
def test_same_loss_with_fewer_flops(flops, verdict):
    rows, curves = study(none=around(3.0, 8), a=around(3.0, 8))
    rows.loc[rows.variant == "a", "flops_per_token"] = flops
    assert verdicts(rows, curves).loc["a"].verdict == verdict


@pytest.mark.parametrize(
    "entropy, load, verdict", [(0.83, 0.3, "promote"), (0.81, 0.3, "hold"), (0.83, 0.5, "hold")]
)
def test_same_loss_with_better_routing(entropy, load, verdict):
    found = verdicts(
        *study(
            none=around(3.0, 8, entropy=0.8, load_max=0.4),
            a=around(3.0, 8, entropy=entropy, load_max=load),
        )
    ).loc["a"]
    assert found.verdict == verdict
    assert (found.entropy, found.max_violation) == (
        pytest.approx(entropy),
        pytest.approx(4 * load - 1),
    )


@pytest.mark.parametrize(
    "loss, name, verdict",
    [
        (1.029, "excellent", "promote"),
        (1.031, "good", "promote"),
        (1.069, "good", "promote"),
        (1.071, "fair", "hold"),
        (1.099, "fair", "hold"),
        (1.101, "weak", "hold"),
    ],
)
def test_half_of_the_parameters(loss, name, verdict):
    rows, curves = study(none=around(1.0, 8, 1e-5), a=around(loss, 8, 1e-5))
    rows.loc[rows.variant == "a", "params_total"] = 60
    found = verdicts(rows, curves).loc["a"]
    assert (found["class"], found.verdict) == (name, verdict)
    rows.loc[rows.variant == "a", "params_total"] = 61
    found = verdicts(rows, curves).loc["a"]
    assert (found["class"], found.verdict) == ("", "hold")


@pytest.mark.parametrize(
    "loss, sd, verdict",
    [
        (1.065, 0.0001, "promote"),
        (1.065, 0.001, "seed"),  # so sure only at the last look
        (1.065, 0.01, "seed"),
        (1.075, 0.01, "seed"),
        (1.075, 0.001, "hold"),
    ],
)
def test_a_class_takes_noise_into_account(loss, sd, verdict):
    rows, curves = study(none=around(1.0, 3, 0), a=around(loss, 3, sd))
    rows.loc[rows.variant == "a", "params_total"] = 50
    assert verdicts(rows, curves, rules=["half_params"]).loc["a"].verdict == verdict


@pytest.mark.parametrize(
    "losses, verdict",
    [
        ([3.09, 2.09, 1.09], "promote"),
        ([3.11, 2.0, 1.0], "hold"),
        ([3.09, 2.105, 1.0], "promote"),
        ([3.09, 2.12, 1.0], "hold"),
        ([3.09, 2.0, 1.12], "hold"),
    ],
)
def test_first_gap(losses, verdict):
    rows, curves = study(none=[curve([3.0, 2.0, 1.0])] * 8, a=[curve(losses)] * 8)
    assert verdicts(rows, curves, rules=["first_gap"]).loc["a"].verdict == verdict
    assert (
        verdicts(rows, curves).loc["a"].verdict == "hold"
    )  # where it is not named it does not count
    rows.loc[9, "bad_steps"] = 1
    assert verdicts(rows, curves, rules=["first_gap"]).loc["a"].verdict == "hold"
    for collapsed in ({"entropy": 0.4, "dead": 0}, {"entropy": 0.9, "dead": 1}):
        rows, curves = study(
            none=[curve([3.0, 2.0, 1.0])] * 8, a=[curve(losses, load_max=0.3, **collapsed)] * 8
        )
        assert verdicts(rows, curves, rules=["first_gap"]).loc["a"].verdict == "hold"


def test_losses_are_compared_at_the_same_step():
    further = [curve([5.0, 4.0, 3.0, 2.0], seconds=2.0), curve([5.0, 4.1, 3.0])]
    found = verdicts(*study(none=[curve([5.0, 4.0], steps=[100, 200])] * 2, a=further)).loc["a"]
    assert (found.step, found.val_loss, found.reference_loss) == (200, pytest.approx(4.05), 4.0)
    rows, curves = study(none=[curve([5.0, 4.0])] * 2, a=[curve([5.0, 4.0], steps=[150, 350])] * 2)
    found = verdicts(rows, curves).loc["a"]
    assert found.verdict == "hold" and "shares no validated step" in found.reason
    runs = gate.judge_runs(stage(), *study(none=[curve([5.0, 4.0])], a=further)).set_index("run_id")
    assert runs.loc["a1"].step == 200 and runs.loc["a1"].difference == 0


def test_time_to_the_reference_s_loss():
    """Of the mean over the seeds, which one of two may have reached before."""
    rows, curves = study(
        none=[curve([5.0, 4.0, 3.0])] * 2,
        a=[curve([5.0, at_200, 2.8], seconds=1.5) for at_200 in (2.7, 3.4)],
        b=[curve([5.0, 4.0, 3.1])] * 2,
    )
    found = verdicts(rows, curves)
    assert found.time_to_target.tolist()[:2] == [300, 450] and np.isnan(
        found.loc["b"].time_to_target
    )
    assert (found.target_loss == 3.0).all() and (found.reference_time_to_target == 300).all()
    found = verdicts(rows, curves, target_loss=4.0)
    assert found.time_to_target[["none", "a", "b"]].tolist() == [200, 300, 200]


@pytest.mark.parametrize(
    "none, a, verdict, seed_for",
    [
        (around(3.0, 1), around(2.9, 1), "seed", "none"),
        (around(3.0, 2), around(2.9, 1), "seed", "a"),
        (around(3.0, 2), around(2.9, 3), "seed", "none"),
        (around(3.0, 3, 0), around(2.9, 3, 0.06), "seed", "a"),
        (around(3.0, 3), around(2.9, 3), "promote", ""),
        (around(3.0, 8, 0), around(2.9, 8, 0.1), "hold", ""),
        (around(3.0, 8, 0), around(2.9, 8, 0.04), "promote", ""),
        (around(3.0, 8, 0.1), around(2.9, 8, 0.1), "promote", ""),
        (around(3.0, 2), around(2.9, 2), "seed", "a"),
        (around(3.0, 2), around(3.1, 2), "hold", ""),
    ],
)
def test_seeds_are_asked_for_while_noise_could_explain_it(none, a, verdict, seed_for):
    found = verdicts(*study(none=none, a=a))
    assert (found.loc["a"].verdict, found.loc["a"].seed_for) == (verdict, seed_for)
    assert found.loc["none"].verdict == ("seed" if seed_for == "none" else "reference")


def last_losses(variants, seeds=(1, 2, 3, 4)):
    """Rows and curves of variants whose last losses are given seed by seed."""
    return study(
        **{name: [curve([9.0, loss]) for loss in losses] for name, losses in variants.items()}
    )


NOISE = np.array([0.3, -0.2, 0.1, -0.25])  # of a seed, in every variant
OWN = np.array([0.004, -0.003, 0.002, -0.001])


def test_what_seeds_share_does_not_count_as_noise():
    """Paired by seed 0.06 is sure, where Welch's test sees nothing; scipy is the judge."""
    none, a = 3 + NOISE, 2.94 + NOISE + OWN
    rows, curves = last_losses({"none": none, "a": a})
    found = verdicts(rows, curves, seeds=(1, 2, 3, 4), max_seeds=4).loc["a"]
    test = ttest_rel(a, none)
    assert [found.low, found.high] == pytest.approx([*test.confidence_interval(0.95)])
    assert found.p_one_sided == pytest.approx(ttest_rel(a, none, alternative="less").pvalue)
    assert found.verdict == "promote" and found.pairs == 4
    assert ttest_ind(a, none, equal_var=False).pvalue > 0.5

    rows.loc[rows.variant == "a", "seed"] += 10
    apart = verdicts(rows, curves, seeds=(1, 2, 3, 4), max_seeds=4).loc["a"]
    test = ttest_ind(a, none, equal_var=False)
    assert [apart.low, apart.high] == pytest.approx([*test.confidence_interval(0.95)])
    assert (
        apart.verdict == "hold"
        and np.isnan(apart.pairs)
        and "4 and 4 runs without seeds in common" in apart.reason
    )


def test_only_seeds_that_both_have_are_pairs():
    rows, curves = last_losses({"none": 3 + NOISE, "a": 2.94 + NOISE[:3] + OWN[:3]})
    found = verdicts(rows, curves).loc["a"]
    assert found.pairs == 3 and found.difference == pytest.approx(-0.06 + OWN[:3].mean())


def test_a_verdict_says_rule_number_interval_and_what_p_has_to_reach():
    none, a = 3 + NOISE, 2.94 + NOISE + OWN
    rows, curves = last_losses({"none": none, "a": a})
    made = stage(("none", "a"), seeds=(1, 2, 3, 4), max_seeds=4)
    reason = verdicts(rows, curves, seeds=(1, 2, 3, 4), max_seeds=4).reason["a"]
    low, high = ttest_rel(a, none).confidence_interval(0.95)
    p = ttest_rel(a, none, alternative="less").pvalue
    level = gate.level_at(made, gate.RULES, 4)["loss"]
    assert level == pytest.approx(0.01 * gate_stats.SHARES["loss"]), "one look has all of it"
    assert (
        f"better holds; better (the loss is lower by 0.05 or more): {np.mean(a - none):+.4f} "
        f"({low:+.4f} to {high:+.4f}) where -0.05 is needed, one-sided p {p:.2g} where {level:.2g} "
        "is needed" in reason
    )
    assert reason.endswith("; at step 200, 4 pairs of seeds, of at most 4")
    worse = verdicts(*last_losses({"none": none, "a": 6 - a}), max_seeds=4).reason["a"]
    assert not worse.startswith("its loss is higher"), "not by an interval that has zero in it"
    worse = verdicts(*last_losses({"none": a, "a": none}), max_seeds=4).reason["a"]
    assert worse.startswith("its loss is higher, and no rule holds, and no seed is left")


def test_what_p_has_to_reach_follows_looks_and_variants():
    for seeds, most, looks in (((1, 2), 8, range(3, 9)), ((1, 2, 3, 4, 5), 5, [5]), ((1,), 2, [3])):
        for labels in (("none", "a"), LABELS):
            made = stage(labels, seeds=seeds, max_seeds=most)
            alpha = 0.01 * gate_stats.SHARES["loss"] / (len(labels) - 1)
            for look in looks:
                expected = gate_stats.levels(alpha, tuple(looks))[look]
                assert gate.level_at(made, gate.RULES, look)["loss"] == expected
    early, last = (gate.level_at(stage(), gate.RULES, n)["loss"] for n in (4, 8))
    assert gate.level_at(stage(), gate.RULES, 2) == gate.level_at(stage(), gate.RULES, 3)
    assert gate.level_at(stage(), gate.RULES, 9)["loss"] == last > 10 * early


def test_an_early_look_needs_more_than_the_last():
    losses = {"none": 3 + NOISE, "a": 2.9 + NOISE + 5 * OWN}  # t = 13.0
    assert verdicts(*last_losses(losses), max_seeds=8).verdict["a"] == "seed"
    assert verdicts(*last_losses(losses), max_seeds=4).verdict["a"] == "promote"


@pytest.mark.parametrize("rules", [["better"], ["same_loss"], ["half_params"], ["first_gap"]])
def test_nothing_is_promoted_on_fewer_than_three_seeds(rules):
    """Every rule would hold: the loss is lower, for less work, and with fewer parameters."""
    for n, verdict in ((2, "hold"), (3, "promote")):
        rows, curves = study(none=around(3.0, n), a=around(2.9, n))
        rows.loc[rows.variant == "a", ["params_total", "flops_per_token"]] = 40, 5
        found = verdicts(rows, curves, rules=rules, max_seeds=n).loc["a"]
        assert found.verdict == verdict
        assert ("2 of the 3 pairs of seeds that a promotion needs" in found.reason) == (n == 2)


def test_each_variant_is_judged_against_its_own_reference():
    labels = "none", "a", "none 2", "a 2"
    references = {"none": "none", "a": "none", "none 2": "none 2", "a 2": "none 2"}
    rows, curves = study(
        **{
            "none": around(3.0, 4),
            "a": around(2.9, 4),
            "none 2": around(2.8, 4),
            "a 2": around(2.81, 4),
        }
    )
    made = stage(labels, references=references)
    found = judge(made, rows, curves)
    assert found.variant.tolist() == ["none", "a", "none 2", "a 2"]
    found = found.set_index("variant")
    assert found.verdict.tolist() == ["reference", "promote", "reference", "hold"]
    assert found.against["a 2"] == "none 2"
    assert found.difference["a 2"] == pytest.approx(0.01) and found.level["a"] == pytest.approx(
        gate.level_at(stage(LABELS), gate.RULES, 4)["loss"]
    )
    runs = gate.judge_runs(made, rows, curves).set_index("run_id")
    assert runs.difference["a 21"] == pytest.approx(curves["a 21"].val_loss.iloc[-1] - 2.8)


def test_a_restart_is_not_healthy_unless_the_stage_says_so():
    rows, curves = study(none=around(3.0, 4), a=around(3.0, 4))
    assert verdicts(rows, curves, rules=["first_gap"]).verdict["a"] == "promote"
    rows.loc[rows.run_id == "a2", "resumes"] = 1
    assert verdicts(rows, curves, rules=["first_gap"]).verdict["a"] == "hold"
    assert verdicts(rows, curves, rules=["first_gap"], restarts=1).verdict["a"] == "promote"


def test_runs_that_were_validated_on_other_tokens_are_not_compared():
    for column, value in (("val_tokens", 128), ("val_fingerprint", "w"), ("sequence_length", 7)):
        rows, curves = study(none=around(3.0, 3), a=around(2.8, 3))
        rows.loc[rows.variant == "a", column] = value
        found = verdicts(rows, curves).loc["a"]
        assert found.verdict == "hold" and np.isnan(found.difference)
        assert "validated on other data than 'none'" in found.reason
    rows.loc[rows.variant == "a", ["sequence_length", "val_tokens"]] = 8, 64
    assert verdicts(rows, curves).verdict["a"] == "promote"


def test_a_verdict_on_the_same_loss_says_what_the_advantage_is():
    made = study(none=around(3.0, 8), a=around(3.0, 8, seconds=0.8))
    reason = verdicts(*made).reason["a"]
    assert (
        "same_loss holds" in reason and "time -20.00% (-20.00% to -20.00%), one-sided p" in reason
    )
    rows, curves = study(none=around(3.0, 8, entropy=0.8), a=around(3.0, 8, entropy=0.9))
    rows["flops_per_token"], rows["device_name"] = [10] * 8 + [9] * 8, "cpu"
    reason = verdicts(rows, curves).reason["a"]
    assert "FLOPs 0.90 of the reference's, imbalance -0.1000" in reason and "time" not in reason


@pytest.mark.parametrize(
    "column, value, words",
    [("resumes", 2, "2 restarts of a run"), ("bad_steps", 1, "1 skipped steps")],
)
def test_a_verdict_says_what_is_not_healthy(column, value, words):
    rows, curves = study(none=around(3.0, 4), a=around(3.0, 4))
    rows.loc[rows.run_id == "a2", column] = value
    reason = verdicts(rows, curves, rules=["first_gap"]).reason["a"]
    assert reason.startswith("no rule holds; first_gap") and f"; {words}; at step" in reason


def test_what_diverges_where_its_reference_does_not_is_not_promoted():
    """Those that are left say how good it is, not how safe."""
    some = [*around(2.8, 4), "diverged"]
    rows, curves = study(none=[*around(3.0, 4), "crash"], a=some)
    found = verdicts(rows, curves, max_seeds=5).loc["a"]
    assert found.verdict == "hold" and found.reason == (
        "it diverges on more seeds than 'none'; 1 failed (diverged)"
    )
    rows, curves = study(none=[*around(3.0, 4), "diverged"], a=some)
    found = verdicts(rows, curves, max_seeds=5)
    assert found.verdict["a"] == "promote"
    assert found.reason["none"] == "what others are compared with; 1 failed (diverged)"


def test_a_verdict_before_the_end_of_a_run_says_that_the_table_has_the_end():
    rows, curves = study(none=[curve([5.0, 3.0])] * 3, a=[curve([5.0, 3.5, 3.0, 2.5])] * 3)
    reason = verdicts(rows, curves).reason["a"]
    assert "; at step 200, 3 pairs of seeds, of at most 8 (the table has final losses, of" in reason
    assert reason.endswith("of steps 200 and 400)")


def test_a_finished_run_without_a_curve_is_told():
    rows, curves = study(none=around(3.0, 4), a=around(2.8, 4))
    del curves["a2"]
    found = verdicts(rows, curves, max_seeds=4).loc["a"]
    assert found.pairs == 3 and found.reason.endswith("; 1 finished without a curve, and left out")


def test_a_reference_that_never_finished_leaves_nothing_to_compare_with():
    rows, curves = study(none=["diverged", "diverged"], a=around(2.8, 2))
    found = verdicts(rows, curves, max_seeds=2)
    assert found.verdict["a"] == "hold"
    assert "no run of 'none' has finished and no seed is left" in found.reason["a"]
    assert verdicts(rows, curves, max_seeds=3).seed_for["a"] == "none"


def test_seeds_beyond_the_plan_promote_nothing():
    """Each is one more chance to be fooled that the levels know nothing of."""
    made = study(none=around(3.0, 6), a=around(2.8, 6))
    assert verdicts(*made, max_seeds=6).verdict["a"] == "promote"
    found = verdicts(*made, max_seeds=5).loc["a"]
    assert found.verdict == "hold" and found.reason.startswith("6 pairs where at most 5 were")


def test_before_the_first_planned_look_nothing_is_promoted():
    made = study(none=around(3.0, 4), a=around(2.8, 4))
    assert verdicts(*made, seeds=(1, 2, 3, 4, 5), max_seeds=8).verdict["a"] == "seed"
    rows, curves = study(none=around(3.0, 5), a=[*around(2.8, 4), "crash"])
    assert verdicts(rows, curves, seeds=(1, 2, 3, 4, 5), max_seeds=5).verdict["a"] == "promote"


def test_what_was_not_compared_has_no_class_and_no_difference():
    rows, curves = study(none=around(1.0, 3), a=around(1.01, 3))
    rows.loc[rows.variant == "a", ["params_total", "val_tokens"]] = 50, 128
    assert verdicts(rows, curves)["class"]["a"] == ""
    runs = gate.judge_runs(stage(("none", "a")), rows, curves).set_index("run_id")
    assert runs.difference[["a1", "a2"]].isna().all() and runs.difference.notna()["none1"]
    rows.loc[rows.run_id == "none3", ["source_sha", "started"]] = "old", "00"
    runs = gate.judge_runs(stage(("none", "a")), rows, curves).set_index("run_id")
    assert np.isnan(runs.difference["none3"]) and "other trainer" in runs.reason["none3"]


def test_no_shared_step_leaves_an_empty_table_with_a_head():
    made = study(none=[curve([5.0, 4.0])] * 2, a=[curve([5.0, 4.0], steps=[150, 350])] * 2)
    steps = gate_facts.step_table(gate_facts.gather(stage(("none", "a")), *made))
    assert steps.empty and "difference" in steps


def test_the_routing_s_reasons_to_go_on():
    rare = curve(**FLAT, entropy=0.5, load_max=0.5)
    rare.loc[rare.step % 400 > 0, ["entropy_0", "load_max_0"]] = np.nan
    stop, reason, _ = gate_facts.stop_verdict(rare, gate.RULES, 4)
    assert not stop and reason == "too few measurements of the routing to call it flat"
    uneven = curve(**FLAT, entropy=0.5, load_max=[0.5, 0.5, 0.49, 0.48, 0.47])
    _, reason, _ = gate_facts.stop_verdict(uneven, gate.RULES, 4)
    assert reason.endswith("0.0000, max violation -0.1200") and "routing improves" in reason


def test_differences_at_every_shared_step():
    none = [curve([5.0, 4.0, 3.0]), curve([5.1, 4.2, 3.1])]
    a = [curve([5.2, 4.1, 2.9]), curve([5.1, 4.2, 3.05], steps=[100, 200, 400])]
    made = stage(("none", "a"))
    steps = gate_facts.step_table(gate_facts.gather(made, *study(none=none, a=a)))
    assert steps.step.tolist() == [100, 200] and steps.seeds.tolist() == [2, 2]
    assert steps.difference.tolist() == pytest.approx([0.1, 0.05])
    low, high = ttest_rel([4.1, 4.2], [4.0, 4.2]).confidence_interval(0.95)
    assert [steps.low[1], steps.high[1]] == pytest.approx([low, high])


def test_failures_are_told_and_last():
    rows, curves = study(none=around(3.0, 3), a=[*around(2.8, 3), "crash"], b=["oom", "crash"])
    table = judge(stage(), rows, curves)
    assert table.variant.tolist() == ["none", "a", "b"] and table.failed.tolist() == [0, 1, 2]
    assert table.verdict.tolist() == ["reference", "promote", "hold"]
    few = verdicts(*study(none=around(3.0, 3), a=[*around(2.8, 3), *["diverged"] * 4], b=["oom"]))
    assert few.verdict[["a", "b"]].tolist() == ["hold", "seed"], (
        "those that survive say nothing of the rest"
    )
    assert few.reason["a"].startswith("most of its runs failed")
    assert table.reason[1].endswith("; 1 failed (crash)") and table.reason[2].endswith(
        "; 2 failed (crash, oom)"
    )
    assert verdicts(rows, curves, max_seeds=2).verdict["b"] == "hold"
    runs = gate.judge_runs(stage(), rows, curves)
    assert runs.verdict.tolist() == ["finished"] * 6 + ["failed"] * 3
    rows, curves = study(none=around(3.0, 3), a=[*around(2.8, 3), "stopped"])
    assert verdicts(rows, curves).verdict["a"] == "hold"


def test_what_has_the_code_of_its_reference_is_never_promoted():
    """Whatever its numbers, which are then of something else."""
    rows, curves = study(none=around(3, 3), a=around(2.5, 3))

    def verdict(code, source_sha, config_hash="h"):
        made = replace(stage(("none", "a")), variants={"none": {}, "a": {"CODE": code}})
        ours = rows.assign(
            source_sha=rows.source_sha.where(rows.variant != "a", source_sha),
            config_hash=rows.variant.map({"none": "h", "a": config_hash}),
        )
        return judge(made, ours, curves).set_index("variant").loc["a"]

    assert verdict("idea.patch", "another").verdict == "promote"
    assert verdict(".", "s").verdict == "promote", "it names no other code"
    assert verdict("idea.patch", "s", "other").verdict == "promote", "its settings differ"
    same = verdict("idea.patch", "s")
    assert (same.verdict, same.seed_for) == ("hold", "")
    assert same.reason.startswith("its code is the same as that of 'none', but for comments")


def test_the_stage_may_say_otherwise():
    made = study(none=around(3.0, 8), a=around(2.96, 8))
    assert verdicts(*made).verdict["a"] == "hold"
    assert verdicts(*made, better=0.03).verdict["a"] == "promote"
    assert verdicts(*made, better=0.03, rules=["same_loss"]).verdict["a"] == "hold"
    for key, value, sentence in (
        ("alpha", 0, "gate.alpha = 0 must be a share"),
        ("alpha", 1, "gate.alpha = 1 must be a share"),
        ("better", float("inf"), "gate.better = inf must be a number"),
        ("stop_evals", 0.5, "gate.stop_evals = 0.5 must be a whole number, 1 or more"),
        ("rules", [], r"gate.rules = \[\] must be a list out of better"),
        ("rules", [["x"]], "must be a list out of better"),
        ("better", float("nan"), "gate.better = nan must be a number"),
        ("bettr", 1, "gate.bettr = 1 is no rule; choose from stop_gain"),
        ("better", "x", "gate.better = 'x' must be a number"),
        ("rules", ["best"], r"gate.rules = \['best'\] must be a list out of better"),
    ):
        with pytest.raises(ValueError, match=sentence):
            verdicts(*made, **{key: value})


def write_stage(monkeypatch, tmp_path, rows, curves, text=""):
    monkeypatch.chdir(tmp_path)
    for folder in ("experiments/stages", "logs"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    Path("experiments/stages/toy.toml").write_text(
        'question = "?"\nreference = "none"\nseeds = [1, 2]\n'
        f"variants.none = {{}}\nvariants.a = {{LR = 1}}\n{text}"
    )
    rows.to_csv("experiments/results.csv", index=False)
    for run_id, one in curves.items():
        one.to_csv(f"logs/{run_id}.csv", index=False)


def test_the_table(monkeypatch, tmp_path, capsys):
    rows, curves = study(
        none=around(3.0, 3), a=[*around(2.9, 3), curve(**FLAT), curve([3.0, 2.0]), "oom"]
    )
    rows.loc[rows.run_id.isin(["a4", "a5"]), "status"] = "running"
    write_stage(monkeypatch, tmp_path, rows, curves)
    with open("logs/a5.csv", "a") as file:
        file.write("210,2.")  # of a line that is being written
    assert gate.main(["toy"]) == 0
    out = capsys.readouterr().out
    assert (
        "a: promote, better holds; better (the loss is lower by 0.05 or more): -0.1000" in out
        and "a4: stop, validation gained at most 0.0190 in each of the last 3 evaluations" in out
    )
    table = pd.read_csv("experiments/tables/toy_gate.csv")
    assert table.kind.tolist() == ["variant"] * 2 + ["run"] * 9
    variant = table.set_index("variant").iloc[1]
    assert (variant.verdict, variant.rule) == ("promote", "better")
    assert (variant.seeds, variant.step, variant.failed) == (3, 200, 1)
    assert (
        variant.difference == pytest.approx(-0.1)
        and variant.params_total == 100
        and variant.time_to_target == 200
    )
    runs = table[table.kind == "run"].set_index("run_id")
    assert runs.verdict[["none1", "a1", "a4", "a5", "a6"]].tolist() == [
        "finished",
        "finished",
        "stop",
        "continue",
        "failed",
    ]
    assert (runs.step["a4"], runs.difference["a4"]) == (200, pytest.approx(-1.0))
    assert runs.gain_2_evals["a4"] == pytest.approx(0.038) and table.iloc[-1].run_id == "a6"
    steps = pd.read_csv("experiments/tables/toy_steps.csv")
    assert steps.step.tolist() == [100, 200] and steps.against.tolist() == ["none", "none"]


def test_curves_without_logs(monkeypatch, tmp_path):
    rows, curves = study(
        none=around(3.0, 3), a=around(2.9, 3, entropy=0.9, load_max=0.3), b=[curve(**FLAT)]
    )
    rows.loc[rows.variant == "b", "status"] = "stopped"
    write_stage(monkeypatch, tmp_path, rows, {})
    pd.concat([one.assign(run_id=run_id) for run_id, one in curves.items()]).to_csv(
        "experiments/log_curves_toy.csv", index=False
    )
    table = gate.write_gate("toy")
    assert table.verdict[1] == "promote"
    assert table.reason.iloc[-1].endswith(
        "routing are flat"
    )  # columns of other runs' experts are none of this one's


def test_unequal_batches_are_compared_after_the_same_tokens(monkeypatch, tmp_path):
    """Half the tokens a step, twice the steps: at a step, a has learned from half the data."""
    rows, curves = study(
        none=[curve([4.0, 3.0]), curve([4.0, 3.01])],
        a=[curve([4.5, 3.9, 3.5, 2.7]), curve([4.5, 3.9, 3.5, 2.71])],
    )
    for run_id, one in curves.items():
        curves[run_id] = one.assign(tokens=one.step * (2 if "none" in run_id else 1))
    rows["tokens_per_step"] = [2, 2, 1, 1]
    write_stage(monkeypatch, tmp_path, rows, curves)
    table = gate.write_gate("toy").set_index("variant")
    assert (table.tokens["a"].iloc[0], table.difference["a"].iloc[0]) == (
        400,
        pytest.approx(-0.3),
    ) and "step" not in table
    assert "after tokens 400" in table.reason["a"].iloc[0]
    write_stage(monkeypatch, tmp_path, rows.assign(tokens_per_step=1), curves)
    assert gate.write_gate("toy").set_index("variant").difference["a"].iloc[0] == pytest.approx(
        0.895
    )


@pytest.mark.parametrize(
    "args, text, sentence",
    [
        (["other"], "", "STAGE other"),
        (["toy"], "gate.bettr = 1\n", "gate.bettr = 1 is no rule"),
        (["toy"], "", "STAGE toy has no run"),
    ],
)
def test_errors_are_one_sentence(monkeypatch, tmp_path, capsys, args, text, sentence):
    rows, curves = study(none=around(3.0, 2))
    write_stage(
        monkeypatch, tmp_path, rows.assign(stage="toy" if text else "elsewhere"), curves, text
    )
    assert gate.main(args) == 2
    error = capsys.readouterr().err
    assert (
        sentence in error and error.startswith("stage_gate.py: error: ") and error.count("\n") == 1
    )


def test_a_stage_that_compares_something_else_is_not_judged(monkeypatch, tmp_path, capsys):
    """However far its losses are apart; what was said of losses before is gone."""
    rows, curves = study(none=around(3.0, 3), a=around(2.0, 3))
    write_stage(monkeypatch, tmp_path, rows, curves)
    assert gate.write_gate("toy").verdict[1] == "promote"
    write_stage(monkeypatch, tmp_path, rows, curves, 'measure = "pass_at_1"\n')
    assert gate.main(["toy"]) == 0
    said = "not judged, the stage compares pass_at_1, and the gate's rules are about losses"
    assert capsys.readouterr().out.splitlines() == [
        f"none: {said}",
        f"a: {said}",
        "experiments/tables/toy_gate.csv",
    ]
    table = pd.read_csv("experiments/tables/toy_gate.csv")
    assert table.variant.tolist() == ["none", "a"] and {*table.kind} == {"variant"}
    assert {*table.verdict} == {"not judged"} and "difference" not in table
    assert len(pd.read_csv("experiments/tables/toy_steps.csv")) == 0
    with pytest.raises(ValueError, match="gate.bettr = 1 is no rule"):
        text = 'measure = "pass_at_1"\ngate.bettr = 1\n'
        write_stage(monkeypatch, tmp_path, rows, curves, text)
        gate.write_gate("toy")


def test_at_equal_time_nothing_is_faster_or_cheaper():
    """What has fewer FLOPs a token or shorter steps has had more of them for the same time."""
    rows, curves = study(none=around(2.0, 4), a=around(2.0, 4, seconds=0.5))
    rows.loc[rows.variant == "a", "flops_per_token"] = 5.0
    reason = verdicts(rows, curves).reason["a"]
    assert "same_loss holds" in reason and "FLOPs 0.50" in reason
    timed = replace(stage(("none", "a")), seconds=60.0)
    table = judge(timed, rows, curves).set_index("variant")
    assert table.verdict["a"] == "hold" and "FLOPs" not in table.reason["a"]


def test_at_equal_time_curves_are_matched_by_their_shares_of_it():
    rows, curves = study(none=[curve([3.0, 2.0])], a=[curve([3.0, 2.5], [61, 122])])
    rows["num_iterations"] = [200, 122]
    timed = replace(stage(("none", "a")), seconds=60.0)
    assert gate.matched_by(timed, rows) == "planned_seconds"
    moved = gate.along("planned_seconds", curves, timed, rows)
    fact = gate_facts.gather(timed, rows, moved)["a"]
    assert fact.steps == [30.0, 60.0] and fact.differences["loss"].mean == 0.5
