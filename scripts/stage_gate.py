"""Judges a stage: which live runs to stop, and which variants to promote, to hold or to give another seed.

    python scripts/stage_gate.py stage1_cpu
    python scripts/stage_gate.py stage1_cpu --logs /big/disk/logs

Prints the verdicts and writes them with all their numbers to experiments/tables/<stage>_gate.csv. Losses are compared
at the same step only: the largest with a validation that all finished runs of a variant and the reference share; where
the batches of a stage differ in tokens, after the same tokens.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtr

from split_results import comparable, current, read_curve, read_curves, read_results, write
from stages import Stage, load_stage

RULES = {  # what the [gate] of a stage may say, with its default
    "stop_gain": 0.02,  # nats: a run goes on whose best validation loss falls by more than this in the last ...
    "stop_evals": 3,  # ... evaluations
    "flat_slope": 0.007,  # nats per evaluation interval: about stop_gain / stop_evals, so a slope below brings no gain
    "routing_gain": 0.02,  # of the load's entropy over ln E, 0 to 1: what counts as better balanced
    "violation_gain": 0.1,  # of the load's max violation, load_max * E - 1: what counts as improving in a live run
    "better": 0.05,  # nats below the reference
    "same_loss": 0.01,  # nats above the reference that still count as the same
    "efficiency_gain": 0.05,  # fraction: less train time a step, or fewer active FLOPs a token
    "half_params": 0.6,  # at most this share of the reference's parameters is the half-parameter class
    "excellent": 0.03,  # relative increase of the loss, below
    "good": 0.07,  # the same, at most
    "weak": 0.10,  # the same, above; the source has no name for what lies between good and weak: here it is fair
    "first_gap": 0.10,  # nats above the reference at the first evaluation
    "widening": 0.02,  # nats by which that gap may grow at a later evaluation
    "collapse": 0.5,  # entropy of the load below which experts have collapsed
    "target_loss": 0.0,  # nats, for the time to it; 0: the reference's mean at the matched step
    "rules": [
        "better",
        "same_loss",
        "half_params",
    ],  # which promote; first_gap only where a stage names it
    "confidence": 0.01,  # stages without any difference that promote something
}
PROMOTIONS = "better", "same_loss", "half_params", "first_gap"
FAILED = "diverged", "oom", "crash", "config", "data"
# Of 20,000 simulated stages (4 variants and the reference, 2 to 8 seeds, all paths, sd 0.05) those that promote what
# is no better, where nothing differs / where one variant's sd is four times the others' / those that promote a variant
# that is two sd better. Variance pooled over all seeds: 1.1 % / 4.7 % / 84 %; Welch's test: 0.9 % / 1.0 % / 71 %; both
# with LAST = 1. The larger of the pooled p and half of Welch's, as below: 0.9 % / 0.8 % / 81 %. Where the reference
# alone has four times the sd it is 1.3 %. LAST is above 1 where variants share a reference, since that and two tests in
# one leave some of Bonferroni's bound unspent; not with one variant, where every look counts in full.
WELCH, EARLY = 2, 1 / 30  # divisor of Welch's p; share of the confidence that an early look has
LAST = {
    1: 0.85,
    2: 1.0,
}  # the share that the last look has, by the number of variants; of more of them LAST_OF_MANY
LAST_OF_MANY = 1.2
PROMOTE, SEED, HOLD = (
    1,
    0,
    -1,
)  # of several rules the highest counts, of several conditions the lowest


class Sample(NamedTuple):
    """One figure of the seeds of several variants, arrays of one shape. The variance is NaN for one seed."""

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
    """A figure of the experts averaged over layers, by step, where it was measured; empty for a dense run."""
    columns = [
        column
        for column in curve
        if column.startswith(f"{name}_") and column[len(name) + 1 :].isdigit()
    ]
    return (
        curve.set_index("step")[columns].mean(axis=1).dropna()
        if columns
        else pd.Series(dtype=float)
    )


def change(values: pd.Series, first: int, last: int) -> float:
    """Rise of the least-squares line through the values after step `first` up to `last`; NaN for under 3 of them."""
    values = values[(values.index > first) & (values.index <= last)]
    return np.polyfit(values.index, values, 1)[0] * (last - first) if len(values) > 2 else np.nan


def stop_verdict(curve: pd.DataFrame, rules: dict, experts: int = 1) -> tuple[bool, str, dict]:
    """Whether a live run should be stopped, why, and the numbers: it should when neither validation loss nor training
    loss nor routing improves. With too few measurements to tell, it goes on. `experts` is E, the unit of max violation.
    """
    evals = curve.set_index("step").val_loss.dropna()
    span = int(rules["stop_evals"])
    if len(evals) <= span:
        return (
            False,
            f"{len(evals)} evaluations are too few to stop on",
            {"evaluations": len(evals)},
        )
    first, last = evals.index[-span - 1], evals.index[-1]
    numbers = {
        "evaluations": len(evals),
        "eval_gain": evals.iloc[:-span].min() - evals.iloc[-span:].min(),
        "train_slope": change(curve.set_index("step").train_loss.dropna(), first, last) / span,
        "entropy_change": change(layers(curve, "entropy"), first, last),
        "violation_change": change(layers(curve, "load_max"), first, last) * experts,
    }
    if numbers["eval_gain"] > rules["stop_gain"]:
        return False, f"validation gained {numbers['eval_gain']:.4f} in {span} evaluations", numbers
    if not numbers["train_slope"] > -rules["flat_slope"]:  # NaN: too few points to call it flat
        return (
            False,
            f"training loss changes by {numbers['train_slope']:.4f} an evaluation interval",
            numbers,
        )
    if any(column.startswith("entropy_") for column in curve) and not (
        numbers["entropy_change"] < rules["routing_gain"]
        and numbers["violation_change"] > -rules["violation_gain"]
    ):
        return False, f"routing improves: entropy by {numbers['entropy_change']:.4f}", numbers
    return (
        True,
        (
            f"validation gained {numbers['eval_gain']:.4f} in {span} evaluations, training loss and routing are "
            "flat"
        ),
        numbers,
    )


def compare(ours: Sample, theirs: Sample) -> Test:
    """Variants along the last axis against the reference at the same place of `theirs`.

    p is the larger of that with the variance pooled over all variants and of half of Welch's (see WELCH).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = np.maximum(ours.n - 1, 0)
        df = freedom.sum(-1, keepdims=True) + np.maximum(theirs.n - 1, 0)
        squares = np.nansum(freedom * ours.var, -1, keepdims=True) + np.nan_to_num(
            np.maximum(theirs.n - 1, 0) * theirs.var
        )
        pooled, gain = squares / df, theirs.mean - ours.mean
        a, b = ours.var / ours.n, theirs.var / theirs.n
        se_pooled, se_welch = np.sqrt(pooled * (1 / ours.n + 1 / theirs.n)), np.sqrt(a + b)
        df_welch = np.where(
            a + b > 0, (a + b) ** 2 / (a**2 / (ours.n - 1) + b**2 / (theirs.n - 1)), np.inf
        )
        p = np.maximum(stdtr(df, -gain / se_pooled), stdtr(df_welch, -gain / se_welch) / WELCH)
        return Test(gain, np.sqrt(pooled), np.fmax(se_pooled, se_welch), p)


def surely(test: Test, margin, last, early_level, last_level) -> np.ndarray:
    """PROMOTE, SEED or HOLD for a gain of at least the margin that is no noise.

    Before the last look it must be two standard deviations and hardly ever be chance (Haybittle, 1971); where even the
    upper bound is below the margin, no more seeds are spent.
    """
    early = (test.p <= early_level) & (test.gain >= 2 * test.sd)
    promote = (test.gain >= margin) & np.where(last, test.p <= last_level, early)
    hold = last | (test.gain + 2 * test.se < margin) | np.isnan(test.gain)
    return np.where(promote, PROMOTE, np.where(hold, HOLD, SEED))


def within(value, se, limit, last) -> np.ndarray:
    """The same for a value that must not be above a limit: by its bounds, and at the last look by its mean."""
    promote = np.where(last, value <= limit, value + 2 * se <= limit)
    hold = last | (value - 2 * se > limit) | np.isnan(value)
    return np.where(promote, PROMOTE, np.where(hold, HOLD, SEED))


def levels(rules: dict, count: int) -> tuple[float, float]:
    """What p has to reach at an early look and at the last, with so many variants: Bonferroni."""
    level = rules["confidence"] / count
    return EARLY * level, LAST.get(count, LAST_OF_MANY) * level


def decide(
    ours: dict, theirs: dict, facts: dict, rules: dict
) -> tuple[np.ndarray, np.ndarray, dict, dict]:
    """(state, whether the reference's seed comes first, state by enabled rule, Test by figure) of every variant.

    ours and theirs: Samples, variants along the last axis, of loss, first, drift (nats), seconds (a step), imbalance
    (1 - entropy) and violation of the experts' load; a mean is NaN where nothing was measured. facts, by variant:
    last (it has no seed left), reference_last, healthy, timed (on one kind of GPU), flops and params (over the
    reference's).
    """
    tests, last = {name: compare(ours[name], theirs[name]) for name in ours}, facts["last"]
    early = levels(rules, ours["loss"].mean.shape[-1])
    rare = early[0], early[0]  # a side path gets the early level only
    loss, scale = tests["loss"], theirs["loss"].mean
    balanced = surely(tests["imbalance"], rules["routing_gain"], last, *rare)
    balanced = np.where(tests["violation"].gain >= 0, balanced, HOLD)
    faster = surely(
        tests["seconds"], rules["efficiency_gain"] * theirs["seconds"].mean, last, *rare
    )
    faster = np.where(facts["timed"], faster, HOLD)
    cheaper = np.where(facts["flops"] <= 1 - rules["efficiency_gain"], PROMOTE, HOLD)
    near, firm = (
        within(-tests[name].gain, tests[name].se, rules[rule], last)
        for name, rule in (("first", "first_gap"), ("drift", "widening"))
    )
    half = within(-loss.gain / scale, loss.se / scale, rules["good"], last)
    states = {
        "better": surely(loss, rules["better"], last, *early),
        "same_loss": np.minimum(
            within(-loss.gain, loss.se, rules["same_loss"], last),
            np.maximum(np.maximum(balanced, faster), cheaper),
        ),
        "half_params": np.where(facts["params"] <= rules["half_params"], half, HOLD),
        "first_gap": np.where(facts["healthy"], np.minimum(near, firm), HOLD),
    }
    states = {rule: states[rule] for rule in rules["rules"]}
    n, of = ours["loss"].n, theirs["loss"].n
    waits = ((of < 2) | (of < n)) & ~facts["reference_last"]
    state = np.maximum.reduce([np.full(n.shape, HOLD), *states.values()])
    return np.where(waits, SEED, state), waits, states, tests


def sample(table: pd.DataFrame) -> dict:
    """n, mean and variance of each column; the mean is NaN unless every run has the figure."""
    return {
        name: Sample(len(values), values.mean(skipna=False), values.var(skipna=False))
        for name, values in table.items()
    }


def validations(curves: list) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Validation loss and train time (s) by step, a column per run, of the steps after 0 that all runs validated."""
    evals = [curve[curve.val_loss.notna() & (curve.step > 0)].set_index("step") for curve in curves]
    return tuple(
        pd.concat([run[name] for run in evals], axis=1, join="inner", ignore_index=True)
        if evals
        else pd.DataFrame()
        for name in ("val_loss", "train_time")
    )


def measure(known: dict, steps: list, worst: int) -> pd.DataFrame:
    """The figures of each run at the last of the shared steps, and how its loss went from the first to the worst."""
    (losses, times), step, lines = known["evals"], steps[-1], []
    for column, (curve, count) in enumerate(zip(known["curves"], known["experts"])):
        entropy, load = (layers(curve, name).loc[:step] for name in ("entropy", "load_max"))
        lines.append(
            {
                "loss": losses[column][step],
                "first": losses[column][steps[0]],
                "drift": losses[column][worst] - losses[column][steps[0]]
                if len(steps) > 1
                else np.nan,
                "seconds": times[column][step] / step,
                "imbalance": 1 - entropy.iloc[-1] if len(entropy) else np.nan,
                "violation": load.iloc[-1] * count - 1 if len(load) else np.nan,
            }
        )
    return pd.DataFrame(lines)


def time_to(target: float, losses: pd.DataFrame, times: pd.DataFrame) -> float:
    """Train time (s) at the first validation where the mean over the runs is at or below the target; NaN for never."""
    reached = losses.index[losses.mean(axis=1) <= target] if len(losses) else []
    return times.loc[reached[0]].mean() if len(reached) else np.nan


def class_of(increase: float, rules: dict) -> str:
    """The source's name for a relative increase of the loss at about half of the parameters."""
    limits = ("excellent", increase < rules["excellent"]), ("good", increase <= rules["good"])
    return next(
        (name for name, holds in (*limits, ("fair", increase <= rules["weak"])) if holds), "weak"
    )


def gather(stage: Stage, rows: pd.DataFrame, curves: dict, rules: dict) -> pd.DataFrame:
    """What is known of each variant, by label: finished runs, their curves, and what they share with the reference."""
    done, tried = comparable(rows, stage), current(rows, stage)
    done = done[
        done.run_id.isin(
            [run_id for run_id, curve in curves.items() if curve.val_loss.notna().any()]
        )
    ]
    tried = tried[tried.status.isin(["stopped", *FAILED])]
    facts, lines = {}, []
    for label in [
        stage.reference,
        *(label for label in stage.variants if label != stage.reference),
    ]:
        runs = done[done.variant == label]
        lost = tried[(tried.variant == label) & ~tried.seed.isin(runs.seed)].drop_duplicates(
            "seed", keep="last"
        )
        made = [curves[run_id] for run_id in runs.run_id]
        facts[label] = {
            "variant": label,
            "runs": runs,
            "curves": made,
            "evals": validations(made),
            "failed": lost[lost.status != "stopped"].status.tolist(),
            "stopped": sum(lost.status == "stopped"),
            "last": len(runs) + len(lost) >= stage.max_seeds,
            "experts": runs.num_experts.tolist(),
        }
    reference = facts[stage.reference]
    for fact in facts.values():
        losses, others = fact["evals"][0], reference["evals"][0]
        steps = losses.index.intersection(others.index).tolist()
        gaps = (
            (losses.mean(axis=1) - others.mean(axis=1)).reindex(steps[1:])
            if steps
            else pd.Series(dtype=float)
        )
        worst = gaps.idxmax() if len(gaps) else None
        figures = [
            measure(one, steps, worst)
            if steps
            else pd.DataFrame(
                columns=["loss", "first", "drift", "seconds", "imbalance", "violation"], dtype=float
            )
            for one in (fact, reference)
        ]
        machines = {*fact["runs"].device_name, *reference["runs"].device_name}
        ratio = {
            name: first_of(fact["runs"], column) / first_of(reference["runs"], column)
            for name, column in (("flops", "flops_per_token"), ("params", "params_total"))
        }
        healthy = (
            not fact["failed"]
            and not fact["runs"].bad_steps.sum()
            and not (figures[0].imbalance > 1 - rules["collapse"]).any()
            and not any(layers(curve, "dead").tail(1).sum() for curve in fact["curves"])
        )
        lines.append(
            fact
            | ratio
            | {
                "step": steps[-1] if steps else None,
                "ours": sample(figures[0]),
                "theirs": sample(figures[1]),
                "healthy": healthy,
                "timed": len(machines) == 1 and not min(machines).startswith("cpu"),
            }
        )
    return pd.DataFrame(lines).set_index("variant", drop=False)


def first_of(rows: pd.DataFrame, column: str) -> float:
    """The figure of the first of these runs; NaN where there is none."""
    return float(rows[column].iloc[0]) if len(rows) else np.nan


def stack(samples) -> dict:
    """Samples of several variants as one, by figure."""
    return {
        name: Sample(*(np.array(values, float) for values in zip(*(one[name] for one in samples))))
        for name in samples.iloc[0]
    }


def judge(stage: Stage, rows: pd.DataFrame, curves: dict) -> pd.DataFrame:
    """The verdict on every variant, a row each, reference first, then best first, those without a finished run last.

    rows: of results.csv, of this stage, unfinished runs too; curves: by run_id. verdict is promote, hold or seed
    (reference: reference or seed), `seed_for` the label of the variant that gets the next seed. Raises ValueError.
    """
    rules = rules_of(stage)
    known = gather(stage, rows, curves, rules)
    others = known.drop(stage.reference)
    facts = {
        name: others[name].to_numpy(dtype)
        for name, dtype in (
            ("last", bool),
            ("healthy", bool),
            ("timed", bool),
            ("flops", float),
            ("params", float),
        )
    }
    facts["reference_last"] = known["last"][stage.reference]
    verdicts = (
        decide(stack(others.ours), stack(others.theirs), facts, rules) if len(others) else None
    )
    reference = known.loc[stage.reference]
    lines = [line(reference, reference, rules)]
    for i, label in enumerate(others.index):
        state, waits, states, tests = verdicts
        level = levels(rules, len(others))[bool(others["last"][label])]
        lines.append(
            line(known.loc[label], reference, rules)
            | verdict_of(
                known.loc[label],
                reference,
                level,
                int(state[i]),
                bool(waits[i]),
                {rule: int(one[i]) for rule, one in states.items()},
                {name: Test(*(x[i] for x in test)) for name, test in tests.items()},
            )
        )
    asked = any(one.get("seed_for") == stage.reference for one in lines) or not len(reference.runs)
    lines[0] |= {
        "verdict": "seed" if asked else "reference",
        "seed_for": stage.reference if asked else "",
        "reason": "what the others are compared with" + ", needs another seed" * asked,
    }
    table = pd.DataFrame(lines)
    order = table["gap"].where(table.variant != stage.reference, -np.inf)
    return table.loc[order.sort_values(kind="stable", na_position="last").index].reset_index(
        drop=True
    )


def line(known: pd.Series, reference: pd.Series, rules: dict) -> dict:
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


def verdict_of(
    known, reference, level: float, state: int, waits: bool, states: dict, tests: dict
) -> dict:
    """verdict, reason, rule, seed_for, se and p of a variant that `decide` has judged; level is what p has to reach."""
    loss, n = tests["loss"], len(known.runs)
    rule = (
        next((rule for rule, one in states.items() if one == state), "")
        if state != HOLD and not waits
        else ""
    )
    verdict, seed_for = {PROMOTE: "promote", SEED: "seed", HOLD: "hold"}[state], ""
    told = f"gap {-loss.gain:+.4f} at step {'-' if pd.isna(known.step) else int(known.step)}, {n} seed{'s' * (n > 1)}"
    told += f", se {loss.se:.4f}, one-sided p {loss.p:.2g}" if n > 1 else ""
    told += f" (better: {level:.2g})" * bool(
        "better" in states and state != PROMOTE and loss.gain > 0
    )
    if len(known.failed) > max(1, n):
        verdict, rule, reason = "hold", "", "most of its runs failed"
    elif known.stopped:
        verdict, rule, reason = "hold", "", f"{known.stopped} of its runs were stopped"
    elif not n:
        verdict, rule, seed_for = ("hold", "", "") if known["last"] else ("seed", "", known.variant)
        reason = "no finished run"
    elif pd.isna(known.step) and len(reference.runs):
        verdict, rule, reason = (
            "hold",
            "",
            "shares no validated step with the reference; give both one VAL_EVERY",
        )
    elif waits:
        seed_for = reference.variant
        reason = f"the reference must have two finished runs and no fewer than this; {told}"
    elif state == SEED:
        seed_for, reason = (
            known.variant,
            f"{rule} is possible, within the noise of the seeds so far; {told}",
        )
    else:
        reason = f"{rule} holds; {told}" if state == PROMOTE else f"no rule holds; {told}"
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


def judge_runs(stage: Stage, rows: pd.DataFrame, curves: dict) -> pd.DataFrame:
    """A row a run: continue, stop, finished or failed, with its loss at the last step shared with the reference."""
    rules, done, lines = rules_of(stage), comparable(rows, stage), []
    references = done[done.variant == stage.reference].run_id
    others = validations([curves[run_id] for run_id in references if run_id in curves])[0]
    for run in rows.itertuples():
        curve = curves.get(run.run_id)
        one = {
            "kind": "run",
            "variant": run.variant,
            "seed": run.seed,
            "run_id": run.run_id,
            "status": run.status,
        }
        one |= {"params_total": run.params_total}
        losses = validations([curve])[0][0] if curve is not None else pd.Series(dtype=float)
        steps = losses.index.intersection(others.index) if len(others) else losses.index
        if len(steps):
            one |= {"step": steps[-1], "val_loss": losses[steps[-1]]}
            one |= (
                {
                    "reference_loss": (mean := others.loc[steps[-1]].mean()),
                    "gap": losses[steps[-1]] - mean,
                }
                if len(others)
                else {}
            )
        if run.status == "ok":
            verdict = (
                "finished",
                "" if run.run_id in set(done.run_id) else "other trainer, data or settings",
            )
        elif run.status in FAILED:
            verdict = "failed", run.status
        elif curve is None:
            verdict = "continue", "no curve yet"
        else:
            stop, reason, numbers = stop_verdict(curve, rules, int(run.num_experts))
            verdict = "stop" if stop or run.status == "stopped" else "continue", reason
            one |= numbers
        lines.append(one | dict(zip(("verdict", "reason"), verdict)))
    table = pd.DataFrame(lines)
    return table.loc[(table.verdict == "failed").sort_values(kind="stable").index].reset_index(
        drop=True
    )


def write_gate(stage_name: str, logs="logs") -> pd.DataFrame:
    """Judges a stage by the files here and writes experiments/tables/<stage>_gate.csv: variants, then runs; returns it.

    Curves are those of `logs`, where there is none that of experiments/log_curves_<stage>.csv. Raises ValueError.
    """
    stage, rows = load_stage(stage_name), read_results()
    rows = rows[rows.stage == stage_name]
    if rows.empty:
        raise ValueError(
            f"STAGE {stage_name} has no run in experiments/results.csv; "
            f"python scripts/run_stage.py {stage_name}"
        )
    kept = Path(f"experiments/log_curves_{stage_name}.csv").is_file()
    curves = dict(list(read_curves(stage_name).groupby("run_id"))) if kept else {}
    curves = {run_id: curve.dropna(axis="columns", how="all") for run_id, curve in curves.items()}
    curves |= {
        path.stem: read_curve(path)
        for path in Path(logs).glob("*.csv")
        if path.stem in set(rows.run_id)
    }
    curves = {
        run_id: curve
        for run_id, curve in curves.items()
        if {"val_loss", "train_loss"} <= set(curve)
    }
    if unequal := comparable(rows, stage).tokens_per_step.nunique() > 1:
        curves = {run_id: curve.assign(step=curve.tokens) for run_id, curve in curves.items()}
    table = pd.concat(
        [judge(stage, rows, curves), judge_runs(stage, rows, curves)], ignore_index=True
    )
    if unequal:  # batches: at the same step one would have seen more than another
        table = table.rename(columns={"step": "tokens", "seconds_per_step": "seconds_per_token"})
        table["reason"] = table.reason.str.replace("at step", "after tokens")
    first = ["kind", "variant", "seed", "run_id", "status", "verdict", "rule", "reason", "seed_for"]
    path = Path(f"experiments/tables/{stage_name}_gate.csv")
    table = table.reindex(columns=first + [name for name in table if name not in first])
    write(table, path)
    return table


def main(argv=None) -> int:
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
        name = (
            one.variant
            if one.kind == "variant"
            else f"  {one.variant} seed {one.seed:g} {one.run_id}"
        )
        print(f"{name}: {one.verdict}{f', {one.reason}' if one.reason else ''}")
    print(f"experiments/tables/{args.stage}_gate.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
