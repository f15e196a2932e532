"""Judges a stage: which live runs to stop; which variants to promote, hold or give another seed.

    python scripts/stage_gate.py stage1_cpu
    python scripts/stage_gate.py stage1_cpu --logs /big/disk/logs

Prints the verdicts and writes them with all their numbers to experiments/tables/<stage>_gate.csv,
and the differences at every step that a variant and its reference have both validated to
<stage>_steps.csv. Verdicts are given at the last of these; where the batches of a stage differ in
tokens, after the same tokens, and at equal time after the same share of it, in planned seconds.
A stage with another measure than final_loss is not judged, for the rules are about losses.
What p has to reach is in gate_stats.py, what is known of a variant in gate_facts.py.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from gate_facts import FAILED, Curves, Facts, curves_of, first_of, gain_of_two, gather
from gate_facts import step_table, stop_verdict, validations
from gate_stats import FEWEST, HOLD, PROMOTE, SEED, levels_at, rule_states
from split_results import comparable, has_same_code, planned_seconds, rows_of, validation_of
from split_results import write_table
from stages import Stage, load_stage

RULES = {  # what the [gate] of a stage may say, with its default
    # nats: a run goes on where one of the last `stop_evals` evaluations is below the best before it
    # by more than this
    "stop_gain": 0.02,
    "stop_evals": 3,
    "flat_slope": 0.007,  # nats per evaluation interval: training loss that falls less is flat
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
    "restarts": 0,  # of a run that still count as healthy
    "target_loss": 0.0,  # nats, for the time to it; 0: the reference's mean at the matched step
    "rules": [  # which promote; first_gap only where a stage names it
        "better",
        "same_loss",
        "half_params",
    ],
    "alpha": 0.01,  # share of stages that may promote something though no variant differs
}
PROMOTIONS = {  # each rule in words
    "better": "the loss is lower by {better:g} or more",
    "same_loss": "at most {same_loss:g} more loss, and more even, faster or cheaper",
    "half_params": "at most {half_params:g} of the parameters and {good:.0%} more loss",
    "first_gap": "at most {first_gap:g} behind at first, never {widening:g} further, healthy",
}


def rules_of(stage: Stage) -> dict:
    """RULES with what the stage says otherwise. Raises ValueError with one sentence."""
    for key, value in stage.gate.items():
        where = f"experiments/stages/{stage.name}.toml: gate.{key} = {value!r}"
        if key not in RULES:
            raise ValueError(f"{where} is no rule; choose from {', '.join(RULES)}")
        if key == "rules":
            if (
                not isinstance(value, list)
                or not value
                or any(v not in [*PROMOTIONS] for v in value)
            ):
                raise ValueError(f"{where} must be a list out of {', '.join(PROMOTIONS)}")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where} must be a number, 0 or more")
        elif not 0 <= value < math.inf:
            raise ValueError(f"{where} must be a number, 0 or more")
        elif key == "stop_evals" and (value != int(value) or value < 1):
            raise ValueError(f"{where} must be a whole number, 1 or more")
        elif key == "alpha" and not 1e-9 <= value < 1:
            raise ValueError(f"{where} must be a share, at least 1e-9 and below 1")
    return RULES | stage.gate


def looks_of(stage: Stage) -> tuple[int, ...]:
    """After how many pairs a stage is judged: with the seeds that it begins with, but no fewer than
    FEWEST, and after each one that is added."""
    return tuple(range(max(FEWEST, len(stage.seeds)), max(FEWEST, stage.max_seeds) + 1))


def level_at(stage: Stage, rules: Mapping, pairs: int) -> dict[str, float]:
    """What p has to reach with so many pairs, as levels_at has it; with fewer than the first look
    has, as there."""
    looks = looks_of(stage)
    count = sum(not stage.is_reference(label) for label in stage.variants)
    return levels_at(rules["alpha"], max(1, count), looks, min(max(pairs, looks[0]), looks[-1]))


def class_of(increase: float, rules: Mapping) -> str:
    """The source's name for a relative increase of the loss at about half of the parameters; ""
    where it was not compared."""
    if np.isnan(increase):
        return ""
    if increase < rules["excellent"]:
        return "excellent"
    if increase <= rules["good"]:
        return "good"
    return "fair" if increase <= rules["weak"] else "weak"


def time_to(target: float, losses: pd.DataFrame, times: pd.DataFrame) -> float:
    """Train time (s) at the first validation where the mean over the runs is at or below the
    target; NaN for never."""
    reached = losses.index[losses.mean(axis=1) <= target] if len(losses) else []
    return times.loc[reached[0]].mean() if len(reached) else np.nan


def line(fact: Facts, reference: Facts, rules: Mapping) -> dict:
    """The numbers of a variant, at the last step that it shares with its reference."""
    loss = fact.differences["loss"]
    target = rules["target_loss"] or fact.theirs.loss.mean()
    increase = fact.differences["increase"].mean
    evals = fact.losses.mean(axis=1) if len(fact.losses) else pd.Series(dtype=float)
    return {
        "kind": "variant",
        "variant": fact.variant,
        "against": fact.reference,
        "rule": "",
        "seeds": len(fact.runs),
        "pairs": loss.n if fact.test == "paired" else np.nan,
        "failed": len(fact.failed),
        "step": fact.steps[-1] if fact.steps else None,
        "val_loss": fact.ours.loss.mean(),
        "sd": fact.ours.loss.std(),
        "reference_loss": fact.theirs.loss.mean(),
        "difference": loss.mean,
        "low": loss.low,
        "high": loss.high,
        "p_one_sided": loss.p_below,
        "first_gap": fact.differences["first"].mean,
        "widening": fact.differences["drift"].mean,
        "gain_2_evals": gain_of_two(evals),
        "target_loss": target,
        "class": class_of(increase, rules) if fact.params <= rules["half_params"] else "",
        "time_to_target": time_to(target, fact.losses, fact.times),
        "reference_time_to_target": time_to(target, reference.losses, reference.times),
        "seconds_per_step": fact.ours.seconds.mean(),
        "entropy": 1 - fact.ours.imbalance.mean(),
        "max_violation": fact.ours.violation.mean(),
        "params_total": first_of(fact.runs, "params_total"),
        "flops_per_token": first_of(fact.runs, "flops_per_token"),
    }


def figure_text(fact: Facts, name: str) -> str:
    """A difference with its interval, as far as there is one."""
    one = fact.differences[name]
    style = "+.2%" if name in ("increase", "seconds") else "+.4f"
    text = format(one.mean, style)
    return text if np.isnan(one.low) else f"{text} ({one.low:{style}} to {one.high:{style}})"


def p_text(p: float, level: float) -> str:
    """A one-sided p and what it has to reach; "" where there is none."""
    return "" if np.isnan(p) else f", one-sided p {p:.2g} where {level:.2g} is needed"


def limit_text(fact: Facts, name: str, limit: float, level: Mapping[str, float]) -> str:
    """A difference that has a limit, and how sure it is that it is below."""
    p = fact.differences[name].p_below_limit(limit)
    return figure_text(fact, name) + p_text(p, level["limit"])


def advantage_text(fact: Facts, level: Mapping[str, float]) -> str:
    """What a variant with the same loss may have that its reference has not."""
    parts = []
    if not np.isnan(fact.flops):
        parts.append(f"FLOPs {fact.flops:.2f} of the reference's")
    if fact.timed:
        p = fact.differences["seconds"].p_below
        parts.append(f"time {figure_text(fact, 'seconds')}{p_text(p, level['seconds'])}")
    if fact.ours.imbalance.notna().any():
        p = fact.differences["imbalance"].p_below
        parts.append(f"imbalance {figure_text(fact, 'imbalance')}{p_text(p, level['imbalance'])}")
    return ", ".join(parts)


def rule_text(fact: Facts, rule: str, rules: Mapping, level: Mapping[str, float]) -> str:
    """A rule in words, and the numbers that it has looked at."""
    if rule == "better":
        loss = fact.differences["loss"]
        found = f"{figure_text(fact, 'loss')} where {-rules['better']:g} is needed"
        found += p_text(loss.p_below, level["loss"])
    elif rule == "same_loss":
        found = limit_text(fact, "loss", rules["same_loss"], level)
        found += f"; {advantage_text(fact, level)}"
    elif rule == "half_params":
        found = limit_text(fact, "increase", rules["good"], level)
        found += f"; {fact.params:.2f} of the parameters"
    else:
        found = limit_text(fact, "first", rules["first_gap"], level)
        found += f", then {limit_text(fact, 'drift', rules['widening'], level)}"
        found += f"; {', '.join(fact.troubles(rules)) or 'healthy'}"
    return f"{rule} ({PROMOTIONS[rule].format(**rules)}): {found}"


def evidence(stage: Stage, fact: Facts, reference: Facts, rules: Mapping) -> str:
    """Every rule that could apply, with its numbers, and on how much they rest."""
    could_be_the_same = fact.flops < 1 or fact.timed or fact.ours.imbalance.notna().any()
    applies = {
        "same_loss": could_be_the_same,
        "half_params": fact.params <= rules["half_params"],
    }
    level = level_at(stage, rules, fact.pairs)
    texts = [
        rule_text(fact, rule, rules, level) for rule in rules["rules"] if applies.get(rule, True)
    ]
    basis = f"{fact.pairs} pairs of seeds, of at most {stage.max_seeds}"
    if fact.test == "Welch":
        basis = f"{len(fact.runs)} and {len(reference.runs)} runs without seeds in common"
    elif fact.pairs < FEWEST:
        basis = f"{fact.pairs} of the {FEWEST} pairs of seeds that a promotion needs"
    ends = {fact.losses.index[-1], reference.losses.index[-1]}
    if ends != {fact.steps[-1]}:
        basis += f" (the table has final losses, of steps {min(ends)} and {max(ends)})"
    return f"{'; '.join(texts)}; at step {fact.steps[-1]}, {basis}"


def obstacle(stage: Stage, fact: Facts, reference: Facts) -> tuple[str, str]:
    """(why a variant cannot be judged, the label that should get a seed), each "" where not so."""
    label = repr(fact.reference)
    seeds, others = len(fact.runs), len(reference.runs)
    most = max(FEWEST, stage.max_seeds)
    if len(fact.failed) > max(1, seeds):
        return "most of its runs failed", ""
    if fact.failed.count("diverged") > reference.failed.count("diverged"):
        return f"it diverges on more seeds than {label}", ""
    if fact.stopped:
        return f"{fact.stopped} of its runs were stopped", ""
    if not seeds:
        return "no finished run", "" if fact.last else fact.variant
    if has_same_code(stage, fact.variant, pd.concat([fact.runs, reference.runs])):
        return (
            f"its code is the same as that of {label}, but for comments, layout or files that "
            "change no loss: there is nothing to promote",
            "",
        )
    if not others and reference.last:
        return f"no run of {label} has finished and no seed is left to compare with", ""
    if not fact.same_validation:
        return f"validated on other data than {label}; give both one VAL_TOKENS", ""
    if others and not fact.steps:
        return f"shares no validated step with {label}; give both one VAL_EVERY", ""
    if others < max(2, seeds) and not reference.last:
        needed = max(2, seeds)
        return f"{label} has {others} finished runs and needs {needed}, as many", fact.reference
    if fact.pairs > most:
        return (
            f"{fact.pairs} pairs where at most {most} were planned: no verdict; read the table of "
            f"the fresh seeds alone, which run_stage.py {stage.name} --seeds prints",
            "",
        )
    return "", ""


def verdict_of(
    stage: Stage, fact: Facts, reference: Facts, states: Mapping[str, int], rules: Mapping
) -> dict:
    """verdict, reason, rule and seed_for of a variant, whose states by rule are known."""
    verdict, rule = "hold", ""
    reason, seed_for = obstacle(stage, fact, reference)
    if seed_for:
        verdict = "seed"
    if not reason:
        state = max(states.values(), default=HOLD)
        if state != HOLD:
            rule = next(name for name, one in states.items() if one == state)
        if state == PROMOTE:
            verdict, outcome = "promote", f"{rule} holds"
        elif state == SEED:
            verdict, seed_for = "seed", fact.variant
            outcome = f"not yet decided: more seeds may show {rule}"
        else:
            outcome = "no rule holds"
            if fact.differences["loss"].low > 0:
                outcome = "its loss is higher, and no rule holds"
            if fact.last:
                outcome += f", and no seed is left (max_seeds = {stage.max_seeds})"
        reason = f"{outcome}; {evidence(stage, fact, reference, rules)}"

    return {"verdict": verdict, "reason": reason, "rule": rule, "seed_for": seed_for}


def losses_text(fact: Facts) -> str:
    """What of the runs of a variant is missing, behind a semicolon."""
    text = ""
    if fact.failed:
        text += f"; {len(fact.failed)} failed ({', '.join(sorted(set(fact.failed)))})"
    if fact.lost_curves:
        text += f"; {fact.lost_curves} finished without a curve, and left out"
    return text


def judge_variant(stage: Stage, fact: Facts, reference: Facts, rules: Mapping) -> dict:
    """The line of a variant with its verdict."""
    level = level_at(stage, rules, fact.pairs)
    facts = {
        "last": np.array(fact.last),
        "first_look": looks_of(stage)[0],
        "healthy": not fact.troubles(rules),
        "timed": fact.timed,
        "flops": fact.flops,
        "params": fact.params,
    }
    states = rule_states(fact.differences, facts, rules, level)
    states = {rule: int(state) for rule, state in states.items()}
    verdict = verdict_of(stage, fact, reference, states, rules)
    verdict["reason"] += losses_text(fact)
    return line(fact, reference, rules) | {"level": level["loss"]} | verdict


def judge(stage: Stage, known: Mapping[str, Facts]) -> pd.DataFrame:
    """The verdict on every variant, a row each, each reference before what is compared with it,
    best first, those without a finished run last.

    verdict is promote, hold or seed (reference: reference or seed), `seed_for` the label of the
    variant that gets the next seed. Raises ValueError.
    """
    rules = rules_of(stage)
    lines = []
    for reference in filter(stage.is_reference, stage.references_first()):
        others = [
            judge_variant(stage, known[label], known[reference], rules)
            for label in stage.references_first()
            if stage.references[label] == reference != label
        ]
        asked = any(one["seed_for"] == reference for one in others)
        first = line(known[reference], known[reference], rules)
        first |= {
            "verdict": "reference",
            "seed_for": "",
            "reason": "what others are compared with",
        }
        if asked or not len(known[reference].runs):
            first |= {"verdict": "seed", "seed_for": reference}
            first["reason"] += ", needs another seed"
        first["reason"] += losses_text(known[reference])
        table = pd.DataFrame([first, *others])
        order = table.difference.where(table.variant != reference, -np.inf)
        lines.append(table.loc[order.sort_values(kind="stable", na_position="last").index])
    return pd.concat(lines, ignore_index=True)


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
    losses = pd.Series(dtype=float)
    if curve is not None:
        losses = curve[curve.step > 0].set_index("step").val_loss.dropna()
    has_reference = len(references) > 0
    steps = losses.index.intersection(references.index) if has_reference else losses.index
    if len(steps):
        step = steps[-1]
        facts |= {"step": step, "val_loss": losses[step], "gain_2_evals": gain_of_two(losses)}
        if has_reference:
            mean = references.loc[step].mean()
            facts |= {"reference_loss": mean, "difference": losses[step] - mean}

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
    its reference; those that failed last."""
    rules = rules_of(stage)
    done = comparable(rows, stage)
    done = done[done.run_id.isin(curves)]
    losses = {
        label: validations(done[done.variant == label], curves)[0]
        for label in filter(stage.is_reference, stage.variants)
    }
    lines = []
    done_ids = set(done.run_id)
    for run in rows.itertuples():
        reference = stage.references.get(run.variant)
        theirs = done[done.variant == reference]
        own = rows[rows.run_id == run.run_id]
        is_current = run.status != "ok" or run.run_id in done_ids
        is_compared = is_current and len(validation_of(own, theirs)) < 2
        others = losses[reference] if reference and is_compared else pd.DataFrame()
        one = run_line(run, curves.get(run.run_id), others, rules)
        if not is_current:
            one["reason"] = "other trainer, data or settings"
        lines.append(one)
    table = pd.DataFrame(lines)
    order = (table.verdict == "failed").sort_values(kind="stable").index
    return table.loc[order].reset_index(drop=True)


def matched_by(stage: Stage, rows: pd.DataFrame) -> str:
    """What is the same where the runs of a stage are compared: step, tokens or planned_seconds."""
    if stage.seconds:
        return "planned_seconds"
    # of batches that differ one would have seen more than another at the same step
    return "tokens" if comparable(rows, stage).tokens_per_step.nunique() > 1 else "step"


def along(unit: str, curves: Curves, stage: Stage, rows: pd.DataFrame) -> Curves:
    """The curves with this unit in place of their steps."""
    if unit == "tokens":
        return {run_id: curve.assign(step=curve.tokens) for run_id, curve in curves.items()}
    if unit == "step":
        return curves
    steps = rows.set_index("run_id").num_iterations
    return {
        run_id: curve.assign(step=planned_seconds(curve, steps[run_id], stage.seconds))
        for run_id, curve in curves.items()
    }


def in_unit(
    unit: str, steps: pd.DataFrame, table: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables, with the unit named that their steps are in."""
    if unit == "step":
        return steps, table
    rate, place = {
        "tokens": ("seconds_per_token", "after tokens"),
        "planned_seconds": ("time_over_plan", "after planned seconds"),
    }[unit]
    reasons = table.reason.str.replace("at step", place)
    table = table.assign(reason=reasons)
    return (
        steps.rename(columns={"step": unit}),
        table.rename(columns={"step": unit, "seconds_per_step": rate}),
    )


def not_judged(stage: Stage) -> str:
    """Why a stage gets no verdicts; "" where it gets them."""
    if stage.compares_losses:
        return ""
    return f"the stage compares {stage.measure}, and the gate's rules are about losses"


def judged(stage: Stage, rows: pd.DataFrame, curves: Curves) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(verdicts on variants, then on runs, differences by step), with the unit of the steps
    named. Raises ValueError."""
    unit = matched_by(stage, rows)
    curves = along(unit, curves, stage, rows)
    known = gather(stage, rows, curves)
    table = pd.concat([judge(stage, known), judge_runs(stage, rows, curves)], ignore_index=True)
    steps, table = in_unit(unit, step_table(known), table)
    return table, steps


def write_gate(stage_name: str, logs: str | Path = "logs") -> pd.DataFrame:
    """Judges a stage by the files here and writes experiments/tables/<stage>_gate.csv, variants,
    then runs, and _steps.csv; returns the former. Raises ValueError."""
    stage = load_stage(stage_name)
    rows = rows_of(stage_name)
    rules_of(stage)
    if not_judged(stage):
        lines = {"kind": "variant", "verdict": "not judged", "reason": not_judged(stage)}
        table, steps = pd.DataFrame({"variant": [*stage.variants]} | lines), step_table({})
    else:
        table, steps = judged(stage, rows, curves_of(stage_name, rows, Path(logs)))
    first = ["kind", "variant", "seed", "run_id", "status", "verdict", "rule", "reason", "seed_for"]
    table = table.reindex(columns=first + [name for name in table if name not in first])
    write_table(table, Path(f"experiments/tables/{stage_name}_gate.csv"))
    write_table(steps, Path(f"experiments/tables/{stage_name}_steps.csv"))
    return table


def main(argv: list[str] | None = None) -> int:
    """Judges a stage and prints the verdicts; exit code 0, or 2 with one sentence."""
    rules = [f"  gate.{name} = {value!r}" for name, value in RULES.items()]
    parser = argparse.ArgumentParser(
        description="\n".join([__doc__, "What a stage may set, and what it is without:", *rules]),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", help="a file of experiments/stages, without .toml")
    parser.add_argument("--logs", default="logs", help="folder of the curves (logs)")
    args = parser.parse_args(argv)
    try:
        table = write_gate(args.stage, args.logs)
    except (OSError, ValueError) as error:
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
