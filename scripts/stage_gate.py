"""Judges a stage: which live runs to stop; which variants to promote, hold or give another seed.

    python scripts/stage_gate.py stage1_cpu
    python scripts/stage_gate.py stage1_cpu --logs /big/disk/logs

Prints the verdicts and writes them with all their numbers to experiments/tables/<stage>_gate.csv.
Losses are compared at the same step only: the largest with a validation that all finished runs of a
variant and the reference share; where the batches of a stage differ in tokens, after the same
tokens.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtr

from split_results import comparable, current, read_curve, read_curves, read_results, write_table
from stages import Stage, load_stage

RULES = {  # what the [gate] of a stage may say, with its default
    # nats: a run goes on whose best validation loss falls by more than this in the last ...
    "stop_gain": 0.02,
    "stop_evals": 3,  # ... evaluations
    # nats per evaluation interval: about stop_gain / stop_evals, so a slope below brings no gain
    "flat_slope": 0.007,
    "routing_gain": 0.02,  # of the load's entropy over ln E, 0 to 1: counts as better balanced
    # of the load's max violation, load_max * E - 1: counts as improving in a live run
    "violation_gain": 0.1,
    "better": 0.05,  # nats below the reference
    "same_loss": 0.01,  # nats above the reference that still count as the same
    "efficiency_gain": 0.05,  # fraction: less train time a step, or fewer active FLOPs a token
    "half_params": 0.6,  # of the reference's parameters: at most this is the half-parameter class
    "excellent": 0.03,  # relative increase of the loss, below
    "good": 0.07,  # the same, at most
    # the same, above; the source has no name for what lies between good and weak: here it is fair
    "weak": 0.10,
    "first_gap": 0.10,  # nats above the reference at the first evaluation
    "widening": 0.02,  # nats by which that gap may grow at a later evaluation
    "collapse": 0.5,  # entropy of the load below which experts have collapsed
    "target_loss": 0.0,  # nats, for the time to it; 0: the reference's mean at the matched step
    "rules": [  # which promote; first_gap only where a stage names it
        "better",
        "same_loss",
        "half_params",
    ],
    "confidence": 0.01,  # stages without any difference that promote something
}
PROMOTIONS = "better", "same_loss", "half_params", "first_gap"
FAILED = "diverged", "oom", "crash", "config", "data"
# Of 20,000 simulated stages (4 variants and the reference, 2 to 8 seeds, all paths, sd 0.05) those
# that promote what is no better, where nothing differs / where one variant's sd is four times the
# others' / those that promote a variant that is two sd better. Variance pooled over all seeds:
# 1.1 % / 4.7 % / 84 %; Welch's test: 0.9 % / 1.0 % / 71 %; both with LAST = 1. The larger of the
# pooled p and half of Welch's, as below: 0.9 % / 0.8 % / 81 %. Where the reference alone has four
# times the sd it is 1.3 %. LAST is above 1 where variants share a reference, since that and two
# tests in one leave some of Bonferroni's bound unspent; not with one variant, where every look
# counts in full.
WELCH = 2  # divisor of Welch's p
EARLY = 1 / 30  # share of the confidence that an early look has
LAST = {1: 0.85, 2: 1.0}  # the share that the last look has, by the number of variants
LAST_OF_MANY = 1.2  # the same for more of them
# of several rules the highest counts, of several conditions the lowest
PROMOTE = 1
SEED = 0
HOLD = -1
FIGURES = ("loss", "first", "drift", "seconds", "imbalance", "violation")  # of a run, see decide

Curves = Mapping[str, pd.DataFrame]  # by run_id


class Sample(NamedTuple):
    """One figure of the seeds of several variants, arrays of one shape. The variance is NaN for one
    seed."""

    n: np.ndarray
    mean: np.ndarray
    var: np.ndarray


class Test(NamedTuple):
    """How far variants are below the reference, and how sure that is."""

    gain: np.ndarray
    sd: np.ndarray  # of one run, pooled over all variants and the reference
    se: np.ndarray  # of the gain
    p: np.ndarray  # one-sided


def rules_of(stage: Stage) -> dict:
    """RULES with what the stage says otherwise. Raises ValueError with one sentence."""
    for key, value in stage.gate.items():
        where = f"experiments/stages/{stage.name}.toml: gate.{key} = {value!r}"
        if key not in RULES:
            raise ValueError(f"{where} is no rule; choose from {', '.join(RULES)}")
        if key == "rules":
            if not isinstance(value, list) or not set(value) <= set(PROMOTIONS):
                raise ValueError(f"{where} must be a list out of {', '.join(PROMOTIONS)}")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ValueError(f"{where} must be a number, 0 or more")
    return RULES | stage.gate


def layers(curve: pd.DataFrame, name: str) -> pd.Series:
    """A figure of the experts averaged over layers, by step, where it was measured; empty for a
    dense run."""
    columns = [
        column
        for column in curve
        if column.startswith(f"{name}_") and column[len(name) + 1 :].isdigit()
    ]
    if not columns:
        return pd.Series(dtype=float)
    return curve.set_index("step")[columns].mean(axis=1).dropna()


def change(values: pd.Series, first: int, last: int) -> float:
    """Rise of the least-squares line through the values after step `first` up to `last`; NaN for
    under 3 of them."""
    values = values[(values.index > first) & (values.index <= last)]
    return np.polyfit(values.index, values, 1)[0] * (last - first) if len(values) > 2 else np.nan


def stop_verdict(
    curve: pd.DataFrame, rules: Mapping, experts: int = 1
) -> tuple[bool, str, dict[str, float]]:
    """Whether a live run should be stopped, why, and the numbers: it should when neither validation
    loss nor training loss nor routing improves. With too few measurements to tell, it goes on.
    `experts` is E, the unit of max violation."""
    evals = curve.set_index("step").val_loss.dropna()
    span = int(rules["stop_evals"])
    numbers = {"evaluations": len(evals)}
    if len(evals) <= span:
        return False, f"{len(evals)} evaluations are too few to stop on", numbers

    first, last = evals.index[-span - 1], evals.index[-1]
    train_losses = curve.set_index("step").train_loss.dropna()
    gain = evals.iloc[:-span].min() - evals.iloc[-span:].min()
    slope = change(train_losses, first, last) / span
    entropy = change(layers(curve, "entropy"), first, last)
    violation = change(layers(curve, "load_max"), first, last) * experts
    numbers |= {
        "eval_gain": gain,
        "train_slope": slope,
        "entropy_change": entropy,
        "violation_change": violation,
    }
    if gain > rules["stop_gain"]:
        return False, f"validation gained {gain:.4f} in {span} evaluations", numbers
    if not slope > -rules["flat_slope"]:  # NaN: too few points to call it flat
        return False, f"training loss changes by {slope:.4f} an evaluation interval", numbers
    has_experts = any(column.startswith("entropy_") for column in curve)
    is_flat = entropy < rules["routing_gain"] and violation > -rules["violation_gain"]
    if has_experts and not is_flat:
        return False, f"routing improves: entropy by {entropy:.4f}", numbers
    reason = (
        f"validation gained {gain:.4f} in {span} evaluations, training loss and routing are flat"
    )
    return True, reason, numbers


def compare(ours: Sample, theirs: Sample) -> Test:
    """Variants along the last axis against the reference at the same place of `theirs`.

    p is the larger of that with the variance pooled over all variants and of half of Welch's (see
    WELCH).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = np.maximum(ours.n - 1, 0)
        reference_freedom = np.maximum(theirs.n - 1, 0)
        df = freedom.sum(-1, keepdims=True) + reference_freedom
        squares = np.nansum(freedom * ours.var, -1, keepdims=True)
        squares = squares + np.nan_to_num(reference_freedom * theirs.var)
        pooled = squares / df
        gain = theirs.mean - ours.mean
        se_pooled = np.sqrt(pooled * (1 / ours.n + 1 / theirs.n))

        a, b = ours.var / ours.n, theirs.var / theirs.n
        se_welch = np.sqrt(a + b)
        df_welch = (a + b) ** 2 / (a**2 / (ours.n - 1) + b**2 / (theirs.n - 1))
        df_welch = np.where(a + b > 0, df_welch, np.inf)
        p = np.maximum(stdtr(df, -gain / se_pooled), stdtr(df_welch, -gain / se_welch) / WELCH)
        return Test(gain, np.sqrt(pooled), np.fmax(se_pooled, se_welch), p)


def surely(
    test: Test, margin: float | np.ndarray, last: np.ndarray, early_level: float, last_level: float
) -> np.ndarray:
    """PROMOTE, SEED or HOLD for a gain of at least the margin that is no noise; `last` is where a
    variant has no look left.

    Before the last look it must be two standard deviations and hardly ever be chance (Haybittle,
    1971); where even the upper bound is below the margin, no more seeds are spent.
    """
    early = (test.p <= early_level) & (test.gain >= 2 * test.sd)
    promote = (test.gain >= margin) & np.where(last, test.p <= last_level, early)
    hold = last | (test.gain + 2 * test.se < margin) | np.isnan(test.gain)
    return np.where(promote, PROMOTE, np.where(hold, HOLD, SEED))


def within(value: np.ndarray, se: np.ndarray, limit: float, last: np.ndarray) -> np.ndarray:
    """The same for a value that must not be above a limit: by its bounds, and at the last look by
    its mean."""
    promote = np.where(last, value <= limit, value + 2 * se <= limit)
    hold = last | (value - 2 * se > limit) | np.isnan(value)
    return np.where(promote, PROMOTE, np.where(hold, HOLD, SEED))


def levels(rules: Mapping, count: int) -> tuple[float, float]:
    """What p has to reach at an early look and at the last, with so many variants: Bonferroni."""
    level = rules["confidence"] / count
    return EARLY * level, LAST.get(count, LAST_OF_MANY) * level


def decide(
    ours: Mapping[str, Sample], theirs: Mapping[str, Sample], facts: Mapping, rules: Mapping
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], dict[str, Test]]:
    """(state, whether the reference's seed comes first, state by enabled rule, Test by figure) of
    every variant.

    ours and theirs: Samples, variants along the last axis, of loss, first, drift (nats), seconds (a
    step), imbalance (1 - entropy) and violation of the experts' load; a mean is NaN where nothing
    was measured. facts, by variant: last (it has no seed left), reference_last, healthy, timed (on
    one kind of GPU), flops and params (over the reference's).
    """
    tests = {name: compare(ours[name], theirs[name]) for name in ours}
    last = facts["last"]
    loss = tests["loss"]
    scale = theirs["loss"].mean
    early_level, last_level = levels(rules, ours["loss"].mean.shape[-1])

    def side_path(figure: str, margin: float | np.ndarray) -> np.ndarray:
        """A side path gets the early level only."""
        return surely(tests[figure], margin, last, early_level, early_level)

    def gap(figure: str, rule: str) -> np.ndarray:
        """By how many nats a variant is above the reference, against the limit of a rule."""
        return within(-tests[figure].gain, tests[figure].se, rules[rule], last)

    efficiency = rules["efficiency_gain"]
    balanced = side_path("imbalance", rules["routing_gain"])
    balanced = np.where(tests["violation"].gain >= 0, balanced, HOLD)
    faster = side_path("seconds", efficiency * theirs["seconds"].mean)
    faster = np.where(facts["timed"], faster, HOLD)
    cheaper = np.where(facts["flops"] <= 1 - efficiency, PROMOTE, HOLD)
    advantage = np.maximum(np.maximum(balanced, faster), cheaper)

    half = within(-loss.gain / scale, loss.se / scale, rules["good"], last)
    near_and_firm = np.minimum(gap("first", "first_gap"), gap("drift", "widening"))
    states = {
        "better": surely(loss, rules["better"], last, early_level, last_level),
        "same_loss": np.minimum(gap("loss", "same_loss"), advantage),
        "half_params": np.where(facts["params"] <= rules["half_params"], half, HOLD),
        "first_gap": np.where(facts["healthy"], near_and_firm, HOLD),
    }
    states = {rule: states[rule] for rule in rules["rules"]}
    seeds, reference_seeds = ours["loss"].n, theirs["loss"].n
    waits = ((reference_seeds < 2) | (reference_seeds < seeds)) & ~facts["reference_last"]
    state = np.maximum.reduce([np.full(seeds.shape, HOLD), *states.values()])
    return np.where(waits, SEED, state), waits, states, tests


def sample(table: pd.DataFrame) -> dict[str, Sample]:
    """n, mean and variance of each column; the mean is NaN unless every run has the figure."""
    return {
        name: Sample(len(values), values.mean(skipna=False), values.var(skipna=False))
        for name, values in table.items()
    }


def validations(curves: list[pd.DataFrame]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Validation loss and train time (s) by step, a column per run, of the steps after 0 that all
    runs validated."""
    evals = [curve[curve.val_loss.notna() & (curve.step > 0)].set_index("step") for curve in curves]
    if not evals:
        return pd.DataFrame(), pd.DataFrame()

    def side_by_side(name: str) -> pd.DataFrame:
        return pd.concat([run[name] for run in evals], axis=1, join="inner", ignore_index=True)

    return side_by_side("val_loss"), side_by_side("train_time")


def measure(known: Mapping, steps: list[int], worst: int | None) -> pd.DataFrame:
    """The figures of each run at the last of the shared steps, and how its loss went from the first
    to the worst; without a shared step no row."""
    if not steps:
        return pd.DataFrame(columns=list(FIGURES), dtype=float)
    losses, times = known["evals"]
    first, last = steps[0], steps[-1]
    lines = []
    for column, (curve, experts) in enumerate(zip(known["curves"], known["experts"])):
        entropy = layers(curve, "entropy").loc[:last]
        load = layers(curve, "load_max").loc[:last]
        drift = losses[column][worst] - losses[column][first] if len(steps) > 1 else np.nan
        lines.append(
            {
                "loss": losses[column][last],
                "first": losses[column][first],
                "drift": drift,
                "seconds": times[column][last] / last,
                "imbalance": 1 - entropy.iloc[-1] if len(entropy) else np.nan,
                "violation": load.iloc[-1] * experts - 1 if len(load) else np.nan,
            }
        )
    return pd.DataFrame(lines)


def time_to(target: float, losses: pd.DataFrame, times: pd.DataFrame) -> float:
    """Train time (s) at the first validation where the mean over the runs is at or below the
    target; NaN for never."""
    reached = losses.index[losses.mean(axis=1) <= target] if len(losses) else []
    return times.loc[reached[0]].mean() if len(reached) else np.nan


def class_of(increase: float, rules: Mapping) -> str:
    """The source's name for a relative increase of the loss at about half of the parameters."""
    if increase < rules["excellent"]:
        return "excellent"
    if increase <= rules["good"]:
        return "good"
    return "fair" if increase <= rules["weak"] else "weak"


def facts_of(
    stage: Stage, label: str, done: pd.DataFrame, tried: pd.DataFrame, curves: Curves
) -> dict:
    """What a variant alone has: its finished runs out of `done`, their curves and validations, and
    which seeds have failed or were stopped out of `tried`."""
    runs = done[done.variant == label]
    lost = tried[(tried.variant == label) & ~tried.seed.isin(runs.seed)]
    lost = lost.drop_duplicates("seed", keep="last")
    own_curves = [curves[run_id] for run_id in runs.run_id]
    return {
        "variant": label,
        "runs": runs,
        "curves": own_curves,
        "evals": validations(own_curves),
        "failed": lost[lost.status != "stopped"].status.tolist(),
        "stopped": sum(lost.status == "stopped"),
        "last": len(runs) + len(lost) >= stage.max_seeds,
        "experts": runs.num_experts.tolist(),
    }


def shared_steps(fact: Mapping, reference: Mapping) -> tuple[list[int], int | None]:
    """The steps that all runs of a variant and the reference validated, and the one after the first
    where it is furthest behind."""
    losses, others = fact["evals"][0], reference["evals"][0]
    steps = losses.index.intersection(others.index).tolist()
    if len(steps) < 2:
        return steps, None
    gaps = (losses.mean(axis=1) - others.mean(axis=1)).reindex(steps[1:])
    return steps, gaps.idxmax()


def is_healthy(fact: Mapping, figures: pd.DataFrame, rules: Mapping) -> bool:
    """Whether no run of a variant has failed, skipped a step or has experts that went dead."""
    return (
        not fact["failed"]
        and not fact["runs"].bad_steps.sum()
        and not (figures.imbalance > 1 - rules["collapse"]).any()
        and not any(layers(curve, "dead").tail(1).sum() for curve in fact["curves"])
    )


def gather(stage: Stage, rows: pd.DataFrame, curves: Curves, rules: Mapping) -> pd.DataFrame:
    """What is known of each variant, by label: finished runs, their curves, and what they share
    with the reference."""
    done, tried = comparable(rows, stage), current(rows, stage)
    validated = [run_id for run_id, curve in curves.items() if curve.val_loss.notna().any()]
    done = done[done.run_id.isin(validated)]
    tried = tried[tried.status.isin(["stopped", *FAILED])]
    labels = [stage.reference, *(label for label in stage.variants if label != stage.reference)]
    facts = {label: facts_of(stage, label, done, tried, curves) for label in labels}

    reference = facts[stage.reference]
    lines = []
    for fact in facts.values():
        steps, worst = shared_steps(fact, reference)
        ours, theirs = (measure(one, steps, worst) for one in (fact, reference))
        machines = {*fact["runs"].device_name, *reference["runs"].device_name}
        shared = {
            "step": steps[-1] if steps else None,
            "ours": sample(ours),
            "theirs": sample(theirs),
            "healthy": is_healthy(fact, ours, rules),
            "timed": len(machines) == 1 and not min(machines).startswith("cpu"),
        }
        for name, column in (("flops", "flops_per_token"), ("params", "params_total")):
            shared[name] = first_of(fact["runs"], column) / first_of(reference["runs"], column)
        lines.append(fact | shared)
    return pd.DataFrame(lines).set_index("variant", drop=False)


def first_of(rows: pd.DataFrame, column: str) -> float:
    """The figure of the first of these runs; NaN where there is none."""
    return float(rows[column].iloc[0]) if len(rows) else np.nan


def stack(samples: pd.Series) -> dict[str, Sample]:
    """Samples of several variants as one, by figure."""
    return {
        name: Sample(*(np.array(values, float) for values in zip(*(one[name] for one in samples))))
        for name in samples.iloc[0]
    }


def verdicts_of(known: pd.DataFrame, reference: pd.Series, rules: Mapping) -> list[dict]:
    """The line of each variant but the reference, with its verdict."""
    others = known.drop(reference.variant)
    if not len(others):
        return []
    kinds = {"last": bool, "healthy": bool, "timed": bool, "flops": float, "params": float}
    facts = {name: others[name].to_numpy(kind) for name, kind in kinds.items()}
    facts["reference_last"] = reference["last"]
    state, waits, states, tests = decide(stack(others.ours), stack(others.theirs), facts, rules)

    lines = []
    early_level, last_level = levels(rules, len(others))
    for i, label in enumerate(others.index):
        verdict = verdict_of(
            known.loc[label],
            reference,
            level=last_level if others["last"][label] else early_level,
            state=int(state[i]),
            waits=bool(waits[i]),
            states={rule: int(one[i]) for rule, one in states.items()},
            loss=Test(*(values[i] for values in tests["loss"])),
        )
        lines.append(line(known.loc[label], reference, rules) | verdict)
    return lines


def judge(stage: Stage, rows: pd.DataFrame, curves: Curves) -> pd.DataFrame:
    """The verdict on every variant, a row each, reference first, then best first, those without a
    finished run last.

    rows: of results.csv, of this stage, unfinished runs too; curves: by run_id. verdict is promote,
    hold or seed (reference: reference or seed), `seed_for` the label of the variant that gets the
    next seed. Raises ValueError.
    """
    rules = rules_of(stage)
    known = gather(stage, rows, curves, rules)
    reference = known.loc[stage.reference]
    others = verdicts_of(known, reference, rules)

    asked = any(one["seed_for"] == stage.reference for one in others) or not len(reference.runs)
    first = line(reference, reference, rules)
    if asked:
        first |= {
            "verdict": "seed",
            "seed_for": stage.reference,
            "reason": "what the others are compared with, needs another seed",
        }
    else:
        first |= {
            "verdict": "reference",
            "seed_for": "",
            "reason": "what the others are compared with",
        }

    table = pd.DataFrame([first, *others])
    order = table["gap"].where(table.variant != stage.reference, -np.inf)
    order = order.sort_values(kind="stable", na_position="last").index
    return table.loc[order].reset_index(drop=True)


def line(known: pd.Series, reference: pd.Series, rules: Mapping) -> dict:
    """The numbers of a variant, at the step it shares with the reference."""
    ours, theirs = known.ours, known.theirs
    target = rules["target_loss"] or theirs["loss"].mean
    increase = ours["loss"].mean / theirs["loss"].mean - 1
    gaps = {name: ours[name].mean - theirs[name].mean for name in ("loss", "first", "drift")}
    return {
        "kind": "variant",
        "variant": known.variant,
        "rule": "",
        "seeds": len(known.runs),
        "failed": len(known.failed),
        "step": known.step,
        "val_loss": ours["loss"].mean,
        "sd": np.sqrt(ours["loss"].var),
        "reference_loss": theirs["loss"].mean,
        "gap": gaps["loss"],
        "first_gap": gaps["first"],
        "widening": gaps["drift"],
        "target_loss": target,
        "class": class_of(increase, rules) if known.params <= rules["half_params"] else "",
        "time_to_target": time_to(target, *known.evals),
        "reference_time_to_target": time_to(target, *reference.evals),
        "seconds_per_step": ours["seconds"].mean,
        "entropy": 1 - ours["imbalance"].mean,
        "max_violation": ours["violation"].mean,
        "params_total": first_of(known.runs, "params_total"),
        "flops_per_token": first_of(known.runs, "flops_per_token"),
    }


def numbers_text(known: pd.Series, state: int, states: Mapping, level: float, loss: Test) -> str:
    """The gap of a variant to the reference, and how sure it is."""
    seeds = len(known.runs)
    step = "-" if pd.isna(known.step) else int(known.step)
    text = f"gap {-loss.gain:+.4f} at step {step}, {seeds} seed{'s' if seeds > 1 else ''}"
    if seeds > 1:
        text += f", se {loss.se:.4f}, one-sided p {loss.p:.2g}"
    if "better" in states and state != PROMOTE and loss.gain > 0:
        text += f" (better: {level:.2g})"
    return text


def verdict_of(
    known: pd.Series,
    reference: pd.Series,
    *,
    level: float,
    state: int,
    waits: bool,
    states: Mapping[str, int],
    loss: Test,
) -> dict:
    """verdict, reason, rule, seed_for, se and p of a variant that `decide` has judged; level is
    what p has to reach."""
    seeds = len(known.runs)
    numbers = numbers_text(known, state, states, level, loss)
    rule = ""
    seed_for = ""
    if state != HOLD and not waits:
        rule = next((rule for rule, one in states.items() if one == state), "")

    verdict = "hold"
    if len(known.failed) > max(1, seeds):
        rule = ""
        reason = "most of its runs failed"
    elif known.stopped:
        rule = ""
        reason = f"{known.stopped} of its runs were stopped"
    elif not seeds:
        rule = ""
        reason = "no finished run"
        if not known["last"]:
            verdict = "seed"
            seed_for = known.variant
    elif pd.isna(known.step) and len(reference.runs):
        rule = ""
        reason = "shares no validated step with the reference; give both one VAL_EVERY"
    elif waits:
        verdict = "seed"
        seed_for = reference.variant
        reason = f"the reference must have two finished runs and no fewer than this; {numbers}"
    elif state == SEED:
        verdict = "seed"
        seed_for = known.variant
        reason = f"{rule} is possible, within the noise of the seeds so far; {numbers}"
    elif state == PROMOTE:
        verdict, reason = "promote", f"{rule} holds; {numbers}"
    else:
        reason = f"no rule holds; {numbers}"

    if known.failed:
        reason += f"; {len(known.failed)} failed ({', '.join(sorted(set(known.failed)))})"
    return {
        "verdict": verdict,
        "reason": reason,
        "rule": rule,
        "seed_for": seed_for,
        "se": loss.se,
        "p_one_sided": loss.p,
    }


def run_line(
    run: NamedTuple, curve: pd.DataFrame | None, references: pd.DataFrame, rules: Mapping
) -> dict:
    """The line of a run: its loss at the last step shared with the reference, whose validation
    losses are `references`, and a verdict."""
    facts = {
        "kind": "run",
        "variant": run.variant,
        "seed": run.seed,
        "run_id": run.run_id,
        "status": run.status,
        "params_total": run.params_total,
    }
    losses = pd.Series(dtype=float) if curve is None else validations([curve])[0][0]
    has_reference = len(references) > 0
    steps = losses.index.intersection(references.index) if has_reference else losses.index
    if len(steps):
        step = steps[-1]
        facts |= {"step": step, "val_loss": losses[step]}
        if has_reference:
            mean = references.loc[step].mean()
            facts |= {"reference_loss": mean, "gap": losses[step] - mean}

    if run.status == "ok":
        verdict, reason = "finished", ""
    elif run.status in FAILED:
        verdict, reason = "failed", run.status
    elif curve is None:
        verdict, reason = "continue", "no curve yet"
    else:
        stop, reason, numbers = stop_verdict(curve, rules, int(run.num_experts))
        verdict = "stop" if stop or run.status == "stopped" else "continue"
        facts |= numbers
    return facts | {"verdict": verdict, "reason": reason}


def judge_runs(stage: Stage, rows: pd.DataFrame, curves: Curves) -> pd.DataFrame:
    """A row a run: continue, stop, finished or failed, with its loss at the last step shared with
    the reference; those that failed last."""
    rules = rules_of(stage)
    done = comparable(rows, stage)
    reference_ids = done[done.variant == stage.reference].run_id
    references, _ = validations([curves[run_id] for run_id in reference_ids if run_id in curves])
    lines = []
    for run in rows.itertuples():
        one = run_line(run, curves.get(run.run_id), references, rules)
        if one["verdict"] == "finished" and run.run_id not in set(done.run_id):
            one["reason"] = "other trainer, data or settings"
        lines.append(one)
    table = pd.DataFrame(lines)
    order = (table.verdict == "failed").sort_values(kind="stable").index
    return table.loc[order].reset_index(drop=True)


def curves_of(stage_name: str, rows: pd.DataFrame, logs: Path) -> dict[str, pd.DataFrame]:
    """The curves of these runs by run_id: those of `logs`, where there is none that of
    experiments/log_curves_<stage>.csv."""
    curves = {}
    if Path(f"experiments/log_curves_{stage_name}.csv").is_file():
        for run_id, curve in read_curves(stage_name).groupby("run_id"):
            curves[run_id] = curve.dropna(axis="columns", how="all")
    run_ids = set(rows.run_id)
    for path in logs.glob("*.csv"):
        if path.stem in run_ids:
            curves[path.stem] = read_curve(path)
    needed = {"val_loss", "train_loss"}
    return {run_id: curve for run_id, curve in curves.items() if needed <= set(curve)}


def write_gate(stage_name: str, logs: str | Path = "logs") -> pd.DataFrame:
    """Judges a stage by the files here and writes experiments/tables/<stage>_gate.csv: variants,
    then runs; returns it. Raises ValueError."""
    stage = load_stage(stage_name)
    rows = read_results()
    rows = rows[rows.stage == stage_name]
    if rows.empty:
        raise ValueError(
            f"STAGE {stage_name} has no run in experiments/results.csv; "
            f"python scripts/run_stage.py {stage_name}"
        )
    curves = curves_of(stage_name, rows, Path(logs))
    # of batches that differ one would have seen more than another at the same step
    by_tokens = comparable(rows, stage).tokens_per_step.nunique() > 1
    if by_tokens:
        curves = {run_id: curve.assign(step=curve.tokens) for run_id, curve in curves.items()}
    verdicts = [judge(stage, rows, curves), judge_runs(stage, rows, curves)]
    table = pd.concat(verdicts, ignore_index=True)
    if by_tokens:
        table = table.rename(columns={"step": "tokens", "seconds_per_step": "seconds_per_token"})
        table["reason"] = table.reason.str.replace("at step", "after tokens")

    first = ["kind", "variant", "seed", "run_id", "status", "verdict", "rule", "reason", "seed_for"]
    table = table.reindex(columns=first + [name for name in table if name not in first])
    write_table(table, Path(f"experiments/tables/{stage_name}_gate.csv"))
    return table


def main(argv: list[str] | None = None) -> int:
    """Judges a stage and prints the verdicts; exit code 0, or 2 with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("stage", help="a file of experiments/stages, without .toml")
    parser.add_argument("--logs", default="logs", help="folder of the curves (logs)")
    args = parser.parse_args(argv)
    try:
        table = write_gate(args.stage, args.logs)
    except ValueError as error:
        print(f"stage_gate.py: error: {error}", file=sys.stderr)
        return 2
    for one in table.itertuples():
        name = one.variant
        if one.kind == "run":
            name = f"  {one.variant} seed {one.seed:g} {one.run_id}"
        print(", ".join([f"{name}: {one.verdict}", *filter(None, [one.reason])]))
    print(f"experiments/tables/{args.stage}_gate.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
