"""Gathers what the gate judges by: of each variant its finished runs, their curves, and what these
have in common with its reference's. Losses are compared at the same step only, and by seed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import gate_stats
from gate_stats import Difference
from published import curves_path, settled
from split_results import comparable, current, is_curve, read_curve, read_curves, validation_of
from stages import Stage

FAILED = "diverged", "oom", "crash", "config", "data"
FIGURES = ("loss", "first", "drift", "seconds", "imbalance", "violation")  # of a run, see measure

Curves = Mapping[str, pd.DataFrame]  # by run_id


@dataclass
class Facts:
    """All that the rules look at: a variant's runs, its reference's, and their differences."""

    variant: str
    reference: str
    runs: pd.DataFrame  # finished ones, one a seed
    failed: list[str]  # statuses, a seed each
    stopped: int  # seeds
    lost_curves: int  # finished runs without a curve, which are left out
    last: bool  # it has no seed left
    losses: pd.DataFrame  # validation loss by step, a column a seed: steps that all runs validated
    times: pd.DataFrame  # train time (s), likewise
    steps: list[int]  # those of them that all runs of the reference validated as well
    ours: pd.DataFrame  # FIGURES by seed, at the last of these steps
    theirs: pd.DataFrame  # those of the reference
    differences: dict[str, Difference]  # ours minus theirs by figure
    test: str  # `paired`, `Welch` or ""
    same_validation: bool
    dead: bool  # it ends with experts that nobody chooses
    timed: bool  # all runs on one kind of GPU, and time is not what is equal
    flops: float  # a token, over the reference's; NaN at equal time, of which it says nothing
    params: float  # over the reference's

    @property
    def pairs(self) -> int:
        """Seeds to compare by."""
        return int(self.differences["loss"].n)

    def troubles(self, rules: Mapping) -> list[str]:
        """What makes the runs unhealthy, in words."""
        restarts = int(self.runs.resumes.fillna(0).max()) if len(self.runs) else 0
        bad_steps = int(self.runs.bad_steps.sum())
        found = {
            f"{len(self.failed)} failed": bool(self.failed),
            f"{restarts} restarts of a run": restarts > rules["restarts"],
            f"{bad_steps} skipped steps": bad_steps > 0,
            "experts collapsed": bool((self.ours.imbalance > 1 - rules["collapse"]).any()),
            "an expert that nobody chooses": self.dead,
        }
        return [words for words, is_so in found.items() if is_so]


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
    return curve[["step", *columns]].set_index("step").mean(axis=1).dropna()


def change(values: pd.Series, first: int, last: int) -> float:
    """Rise of the least-squares line through the values after step `first` up to `last`; NaN for
    under 3 of them."""
    values = values[(values.index > first) & (values.index <= last)]
    return np.polyfit(values.index, values, 1)[0] * (last - first) if len(values) > 2 else np.nan


def gain_of_two(evals: pd.Series) -> float:
    """By how much the best loss fell over the last two evaluations; NaN before the third."""
    return evals.iloc[:-2].min() - evals.min() if len(evals) > 2 else np.nan


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
    gains = (evals.cummin().shift() - evals).iloc[-span:]  # of each over the best before it
    slope = change(train_losses, first, last) / span
    entropy = change(layers(curve, "entropy"), first, last)
    violation = change(layers(curve, "load_max"), first, last) * experts
    numbers |= {
        "eval_gain": gains.max(),
        "gain_2_evals": gain_of_two(evals),
        "train_slope": slope,
        "entropy_change": entropy,
        "violation_change": violation,
    }
    if gains.max() > rules["stop_gain"]:
        reason = f"validation gained {gains.max():.4f} in one of the last {span} evaluations"
        return False, reason, numbers
    if np.isnan(slope):
        return False, "too few training losses to call them flat", numbers
    if slope <= -rules["flat_slope"]:
        return False, f"training loss changes by {slope:.4f} an evaluation interval", numbers
    if any(column.startswith("entropy_") for column in curve):
        if np.isnan(entropy) or np.isnan(violation):
            return False, "too few measurements of the routing to call it flat", numbers
        if entropy >= rules["routing_gain"] or violation <= -rules["violation_gain"]:
            reason = f"routing improves: entropy {entropy:+.4f}, max violation {violation:+.4f}"
            return False, reason, numbers
    reason = (
        f"validation gained at most {gains.max():.4f} in each of the last {span} evaluations, "
        f"{rules['stop_gain']:g} is needed; training loss and routing are flat"
    )
    return True, reason, numbers


def validations(runs: pd.DataFrame, curves: Curves) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Validation loss and train time (s) by step, a column a seed, of the steps after 0 that all
    runs validated."""
    evals = {}
    for run_id, seed in zip(runs.run_id, runs.seed):
        curve = curves[run_id][["step", "val_loss", "train_time"]]
        evals[seed] = curve[curve.val_loss.notna() & (curve.step > 0)].set_index("step")
    if not evals:
        return pd.DataFrame(), pd.DataFrame()

    def side_by_side(name: str) -> pd.DataFrame:
        return pd.concat({seed: run[name] for seed, run in evals.items()}, axis=1, join="inner")

    return side_by_side("val_loss"), side_by_side("train_time")


def measure(
    runs: pd.DataFrame,
    curves: Curves,
    losses: pd.DataFrame,
    times: pd.DataFrame,
    steps: list[int],
    worst: int | None,
) -> pd.DataFrame:
    """FIGURES by seed: loss at the last of the steps and at the first, how it went from the first
    to the worst (nats); seconds a step; 1 - entropy and max violation of the experts' load."""
    lines = {}
    for run in runs[["run_id", "seed", "num_experts"]].itertuples() if steps else ():
        curve, loss = curves[run.run_id], losses[run.seed]
        first, last = steps[0], steps[-1]
        entropy = layers(curve, "entropy").loc[:last]
        load = layers(curve, "load_max").loc[:last]
        lines[run.seed] = {
            "loss": loss[last],
            "first": loss[first],
            "drift": loss[worst] - loss[first] if len(steps) > 1 else np.nan,
            "seconds": times[run.seed][last] / last,
            "imbalance": 1 - entropy.iloc[-1] if len(entropy) else np.nan,
            "violation": load.iloc[-1] * run.num_experts - 1 if len(load) else np.nan,
        }
    return pd.DataFrame.from_dict(lines, orient="index", columns=list(FIGURES), dtype=float)


def shared_steps(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[list[int], int | None]:
    """The steps that all runs of a variant and its reference validated, from their losses, and the
    one after the first where it is furthest behind."""
    steps = ours.index.intersection(theirs.index).tolist()
    if len(steps) < 2:
        return steps, None
    gaps = (ours.mean(axis=1) - theirs.mean(axis=1)).reindex(steps[1:])
    return steps, gaps.idxmax()


def compare_figures(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[dict[str, Difference], str]:
    """(the Difference of each figure, the test of the loss): seconds and increase, which is that of
    the loss, are fractions of the reference's."""
    differences = {name: gate_stats.compare(ours[name], theirs[name])[0] for name in FIGURES}
    _, test = gate_stats.compare(ours.loss, theirs.loss)
    differences["increase"] = differences["loss"].scaled(theirs.loss.mean())
    differences["seconds"] = differences["seconds"].scaled(theirs.seconds.mean())
    return differences, test


def first_of(rows: pd.DataFrame, column: str) -> float:
    """The figure of the first of these runs; NaN where there is none."""
    return float(rows[column].iloc[0]) if len(rows) else np.nan


def gather(stage: Stage, rows: pd.DataFrame, curves: Curves) -> dict[str, Facts]:
    """Facts of each variant, by label, references first."""
    done, tried = comparable(rows, stage), current(rows, stage)
    validated = [run_id for run_id, curve in curves.items() if curve.val_loss.notna().any()]
    with_curve = done[done.run_id.isin(validated)]
    tried = tried[tried.status.isin(["stopped", *FAILED])]
    runs_of = {label: with_curve[with_curve.variant == label] for label in stage.variants}
    evals_of = {label: validations(runs, curves) for label, runs in runs_of.items()}

    known = {}
    for label in stage.references_first():
        reference = stage.references[label]
        runs, others = runs_of[label], runs_of[reference]
        lost = tried[(tried.variant == label) & ~tried.seed.isin(runs.seed)]
        lost = lost.drop_duplicates("seed", keep="last")
        same_validation = len(validation_of(runs, others)) < 2
        steps, worst = shared_steps(evals_of[label][0], evals_of[reference][0])
        steps = steps if same_validation else []
        ours = measure(runs, curves, *evals_of[label], steps, worst)
        theirs = measure(others, curves, *evals_of[reference], steps, worst)
        differences, test = compare_figures(ours, theirs)
        machines = {*runs.device_name, *others.device_name}
        on_one_gpu = len(machines) == 1 and not min(machines).startswith("cpu")
        flops = first_of(runs, "flops_per_token") / first_of(others, "flops_per_token")
        known[label] = Facts(
            variant=label,
            reference=reference,
            runs=runs,
            failed=lost[lost.status != "stopped"].status.tolist(),
            stopped=sum(lost.status == "stopped"),
            lost_curves=sum(done.variant == label) - len(runs),
            last=len(runs) + len(lost) >= stage.max_seeds,
            losses=evals_of[label][0],
            times=evals_of[label][1],
            steps=steps,
            ours=ours,
            theirs=theirs,
            differences=differences,
            test=test,
            same_validation=same_validation,
            dead=any(layers(curves[run_id], "dead").tail(1).sum() for run_id in runs.run_id),
            # at equal time what is faster or cheaper has had more steps for it
            timed=on_one_gpu and not stage.seconds,
            flops=np.nan if stage.seconds else flops,
            params=first_of(runs, "params_total") / first_of(others, "params_total"),
        )
    return known


def step_table(known: Mapping[str, Facts]) -> pd.DataFrame:
    """A line for each variant and step that it shares with its reference: mean losses of both,
    their difference and its 95 % interval."""
    lines = []
    for fact in known.values():
        theirs = known[fact.reference].losses
        for step in fact.steps if fact.variant != fact.reference else ():
            one, _ = gate_stats.compare(fact.losses.loc[step], theirs.loc[step])
            lines.append(
                {
                    "variant": fact.variant,
                    "against": fact.reference,
                    "step": step,
                    "seeds": one.n,
                    "val_loss": fact.losses.loc[step].mean(),
                    "reference_loss": theirs.loc[step].mean(),
                    "difference": one.mean,
                    "low": one.low,
                    "high": one.high,
                }
            )
    names = "variant against step seeds val_loss reference_loss difference low high".split()
    return pd.DataFrame(lines, columns=names)


def curves_of(stage_name: str, rows: pd.DataFrame, logs: Path) -> dict[str, pd.DataFrame]:
    """The curves of these runs by run_id: those of `logs`, where there is none, or the run is
    published with a result, that of experiments/log_curves_<stage>.csv. Raises ValueError."""
    curves = {}
    if curves_path(stage_name).exists():
        for run_id, curve in read_curves(stage_name).groupby("run_id"):
            curves[run_id] = curve.dropna(axis="columns", how="all")
    run_ids = set(rows.run_id) - (curves.keys() & settled(stage_name))
    for path in logs.glob("*.csv"):
        if path.stem in run_ids and is_curve(path):
            curves[path.stem] = read_curve(path)
    needed = {"val_loss", "train_loss"}
    return {run_id: curve for run_id, curve in curves.items() if needed <= set(curve)}
