"""Plans the runs of a stage: which there are, with what settings, and which have a result."""

import csv
import difflib
import functools
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from harness.contract import ConfigError, DataError
from harness.provenance import fingerprint
from harness.ranks import Ranks
from harness.settings import ROOT
from harness.source import source_hash
import train_gpt
from harness.files import RunFiles
from stages import Stage
from train_gpt import Config

# With --gate a stopped run has a result, too. Anything else is tried again by the next start.
HAS_RESULT = ("ok", "diverged")
SETTINGS = [field.name.upper() for field in fields(Config)]
IDENTITY = ("stage", "variant", "seed", "config_hash", "source_sha", "data_fingerprint")


@dataclass
class PlannedRun:
    """One run of a stage: what is to be run, and the process that runs it."""

    settings: dict[str, str]  # all of them, labels included
    cfg: Config
    plan: dict
    identity: tuple[str, ...]  # what a row must agree in to be this run's result
    process: subprocess.Popen | None = None
    slot: int = -1

    @property
    def run_id(self) -> str:
        return self.settings["RUN_ID"]

    @property
    def files(self) -> RunFiles:
        return RunFiles(Path(self.cfg.log_dir), self.run_id)

    @property
    def flops(self) -> int:
        """Training FLOPs of the whole run."""
        return self.plan["flops_per_token"] * self.plan["tokens_needed"]


def results() -> dict[str, dict[str, str]]:
    """The rows of the table of results, by run_id."""
    path = Path(Config.results_csv)
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {row["run_id"]: row for row in csv.DictReader(file)}


def pairs(option: str, words: list[str], name: str = "[A-Z0-9_]+") -> dict[str, str]:
    """{NAME: VALUE} of the words of an option. Raises ConfigError."""
    wrong = [word for word in words if not re.fullmatch(f"{name}=.*", word)]
    if wrong:
        raise ConfigError(f"{option} {wrong[0]}: must be NAME=VALUE")
    return dict(word.split("=", 1) for word in words)


def make_embedded_data(pattern: str) -> None:
    """The embedded dataset, where a run wants it and it is not there yet."""
    if os.path.dirname(pattern) != "data/sympy" or Path("data/sympy/index.json").exists():
        return
    print("making the embedded dataset in data/sympy")
    script = ROOT / "scripts" / "prepare_data.py"
    options = ["--source", "package:sympy", "--tokenizer", "bytes", "--out", "data/sympy"]
    subprocess.run([sys.executable, script, *options], check=True, stdout=subprocess.DEVNULL)


def refuse_unknown(settings: Mapping[str, str]) -> None:
    """Raises ConfigError for a name that is no setting, which the trainer would only warn of."""
    for name in set(settings) - set(SETTINGS):
        close = difflib.get_close_matches(name, SETTINGS, 1)
        hint = f"did you mean {close[0]}?" if close else "python train_gpt.py --help lists them"
        raise ConfigError(f"{name} is no setting; {hint}")


@functools.cache
def checked(
    settings: tuple[tuple[str, str], ...], world_size: int, mode: str
) -> tuple[Config, dict, str]:
    """(Config, plan, fingerprint of the data) of settings, checked as the trainer will check them.

    In mode `dry` the data need not be there and is blank, in `dry` and `slurm` no device need be.
    Raises ConfigError, DataError.
    """
    asked = Config.from_env(dict(settings))
    ranks = Ranks(world_size=world_size)
    data = ""
    refuse_unknown(dict(settings))
    if mode != "dry":
        make_embedded_data(asked.input_bin)

    try:
        cfg = train_gpt.resolve(replace(asked, dry_run=mode != "run"))
        train, val = train_gpt.preflight(replace(cfg, device="cpu"), ranks)
        data = fingerprint(train.files + val.files, Path(cfg.log_dir))
    except DataError:
        if mode != "dry":
            raise
        cfg = train_gpt.resolve(replace(asked, dry_run=True, vocab_size=asked.vocab_size or 257))

    train_gpt.check_batch(cfg, ranks)
    return cfg, train_gpt.make_plan(cfg, ranks), data


def make_run(stage: Stage, variant: str, seed: int, world_size: int, mode: str) -> PlannedRun:
    """The run of a variant with a seed. Raises ConfigError, DataError."""
    settings = ({"DEVICE": "cuda"} if mode == "slurm" else {}) | stage.variants[variant]
    try:
        cfg, plan, data = checked(tuple(settings.items()), world_size, mode)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{stage.name}, {variant}: {error}") from None

    source = source_hash((ROOT / "train_gpt.py").read_text())
    identity = (stage.name, variant, str(seed), cfg.hash(), source, data)
    settings |= {"SEED": str(seed), "STAGE": stage.name, "VARIANT": variant}
    if data:  # without, it is not yet known what it will be called
        label = re.sub(r"[^A-Za-z0-9.]+", "-", f"{stage.name}-{variant}").strip("-.")[:80]
        digest = hashlib.sha256("".join(identity[3:]).encode()).hexdigest()[:6]
        settings |= {"RUN_ID": f"{label}-s{seed}-{digest}", "RESUME": "auto"}
    return PlannedRun(settings, cfg, plan, identity)


def plan_runs(
    stage: Stage, seeds: Mapping[str, Sequence[int]], world_size: int, mode: str
) -> list[PlannedRun]:
    """All runs of a stage: the reference's first, then seed by seed, so that what is there can be
    compared. Raises ConfigError, also where two variants are the same; DataError."""
    places = [
        (place, variant, seed)
        for variant in seeds
        for place, seed in enumerate(seeds[variant])
        if variant != stage.reference
    ]
    places.sort(key=lambda run: run[0])
    order = [(stage.reference, seed) for seed in seeds[stage.reference]]
    order += [(variant, seed) for _, variant, seed in places]

    runs = [make_run(stage, variant, seed, world_size, mode) for variant, seed in order]
    variant_of = {}
    for run in runs:
        variant = run.settings["VARIANT"]
        other = variant_of.setdefault(run.cfg.hash(), variant)
        if other != variant:
            raise ConfigError(
                f"variants {other} and {variant} of {stage.name} have the same settings"
            )
    return runs


def status_of(run: PlannedRun, rows: Mapping[str, dict[str, str]]) -> str:
    """The status of the run's row; "" where there is none of the same settings, seed, source and
    data."""
    statuses = [
        row["status"]
        for row in rows.values()
        if tuple(row.get(name) or "" for name in IDENTITY) == run.identity
    ]
    for status in (*HAS_RESULT, "stopped"):
        if status in statuses:
            return status
    return statuses[-1] if statuses else ""
