"""Plans the runs of a stage: which there are, with what settings, and which have a result.

Before anything runs it works out every setting and refuses a stage whose variants differ in less
than it says, or are validated on different data. What a variant with CODE would do that code says.
"""

import difflib
import functools
import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from harness.ranks import Ranks
from harness.settings import ROOT
from store.contract import ConfigError, DataError
from store.source import modules_text, package_text, text_hash
import code_variants
import train_gpt
from code_variants import Code
from harness.files import RunFiles
from published import HAS_RESULT, newer, own_rows, published_rows
from stages import CODE, TRAINER, Stage
from train_gpt import Config

SETTINGS = [one.name.upper() for one in fields(Config)]
OF_ONE_RUN = (  # what begins like these is of one run, not of all
    "RANK",
    "WORLD_SIZE",
    "MASTER_",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC_",  # of a torchrun around this
    "WANDB_RUN_ID",
    "WANDB_NAME",
)
IDENTITY = ("stage", "variant", "seed", "config_hash", "source_sha", "data_fingerprint")


class Checked(NamedTuple):
    """Settings that have been checked as the program will check them."""

    cfg: Config
    plan: dict[str, Any]
    data: str  # fingerprint; "" where it is not known yet
    val_data: str
    said: dict[str, Any] | None = None  # {NAME: value} of what has an effect, by other code
    cautions: tuple[str, ...] = ()  # of other code


@dataclass
class PlannedRun:
    """One run of a stage: what is to be run, and the process that runs it."""

    settings: dict[str, str]  # all of them, labels included
    cfg: Config
    plan: dict
    identity: tuple[str, ...]  # what a row must agree in to be this run's result
    val_data: str = ""  # fingerprint; "" where it is not known yet
    program: str = TRAINER  # by its whole path where it is other code than the working tree's
    options: dict[str, str] = field(default_factory=dict)  # of the program's command line
    code: str = ""  # in words; "" where the stage names none
    said: dict[str, Any] | None = None  # {NAME: value} of what has an effect, by other code
    cautions: tuple[str, ...] = ()  # of other code
    process: subprocess.Popen | None = None
    slot: int = -1
    seconds: float = 0.0  # of training, by plan; 0 where the steps were not chosen by time

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

    @property
    def words(self) -> list[str]:
        """The program and its options, as on a command line."""
        return [self.program, *option_words(self.options)]

    def resolved(self) -> dict[str, Any]:
        """{setting: value} of all that has an effect, auto worked out, and the options."""
        values = self.said
        if values is None:
            values = {name.upper(): value for name, value in self.cfg.effective().items()}
        values = ({CODE: self.code} if self.code else {}) | values
        values["INPUT_BIN"] = self.identity[-1] or self.cfg.input_bin  # by what is in the files
        return {**values, **self.options}

    def validation(self) -> tuple[str, int]:
        """The data that validate, and how many tokens of them."""
        length = self.cfg.sequence_length
        return self.val_data or self.cfg.input_val_bin, self.cfg.val_tokens // length * length

    def validated_at(self) -> set[int]:
        """The tokens after which it will be validated, but for the start."""
        steps, every = self.cfg.num_iterations, self.cfg.val_every or self.cfg.num_iterations
        per_step = self.cfg.batch_size * self.cfg.sequence_length
        return {step * per_step for step in (*range(every, steps, every), steps)}


def environment_here() -> dict[str, str]:
    """This process' environment without any setting of the trainer, or what is of one run."""
    ours = {name.replace("_", "") for name in (*SETTINGS, *Config.SYNONYMS)}
    return {
        name: value
        for name, value in os.environ.items()
        if name.replace("_", "") not in ours and not name.startswith(OF_ONE_RUN)
    }


def option_words(options: Mapping[str, str]) -> list[str]:
    """Options as on a command line; True is a switch, and False none."""
    words = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if value == "True":
            words.append(option)
        elif value != "False":
            words += [option, value]
    return words


def results(stage_name: str = "") -> dict[str, dict[str, str]]:
    """The rows of the runs here, and what is published of a stage, by run_id. Raises ValueError."""
    there = published_rows(stage_name) if stage_name else {}
    own = own_rows()
    return own | there | {run_id: own[run_id] for run_id in newer(own, there)}


def pairs(option: str, words: list[str], name: str = "[A-Z0-9_]+") -> dict[str, str]:
    """{NAME: VALUE} of the words of an option. Raises ConfigError."""
    wrong = [word for word in words if not re.fullmatch(f"{name}=.*", word)]
    if wrong:
        raise ConfigError(f"{option} {wrong[0]}: must be NAME=VALUE")
    given = dict(word.split("=", 1) for word in words)
    for name in given:
        values = [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]
        if len(values) > 1:
            raise ConfigError(f"{option} {name}: is there twice, as {' and '.join(values)}")
    return given


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
def checked(settings: tuple[tuple[str, str], ...], world_size: int, mode: str) -> Checked:
    """Settings, checked as the trainer will check them.

    In mode `dry` the data need not be there and is blank, in `dry` and `slurm` no device need be.
    Raises ConfigError, DataError.
    """
    asked = Config.from_env(dict(settings))
    ranks = Ranks(world_size=world_size)
    identity = {"data_fingerprint": "", "val_fingerprint": ""}
    refuse_unknown(dict(settings))
    if mode != "dry":
        make_embedded_data(asked.input_bin)

    try:
        cfg = train_gpt.resolve(replace(asked, dry_run=mode != "run"))
        loaders = train_gpt.preflight(replace(cfg, device="cpu"), ranks)
        identity = train_gpt.data_identity(cfg, *loaders)
    except DataError:
        if mode != "dry":
            raise
        cfg = train_gpt.resolve(replace(asked, dry_run=True, vocab_size=asked.vocab_size or 257))

    train_gpt.check_batch(cfg, ranks)
    return Checked(cfg, train_gpt.make_plan(cfg, ranks), *identity.values())


def answers_of(
    program: Path, settings: Mapping[str, str], options: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """What a program says that it would do, and what it warns of: run with DRY_RUN=1 it prints
    lines `name:value`, among them config_hash and source_sha. Raises ConfigError, DataError."""
    done = subprocess.run(
        [sys.executable, program, *option_words(options)],
        env=environment_here() | dict(settings) | {"DRY_RUN": "1"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    said = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    missing = {name for name in ("config_hash", "source_sha") if not said.get(name)}
    if done.returncode or missing:
        needed = f"prints no {min(missing, default='')}, which a stage needs"
        reason = (done.stderr.strip().splitlines() or [needed])[-1]
        error = DataError if done.returncode == 3 else ConfigError
        raise error(f"{program.name} with DRY_RUN=1: {reason}")
    warned = re.findall("^warning: (.*)", done.stderr, re.M)
    return said, warned


def plan_of(said: Mapping[str, str], program: str) -> dict[str, Any]:
    """What a program says, with its counts as numbers, 0 where it has none. Raises ConfigError."""
    plan: dict[str, Any] = {"flops_per_token": 0, "tokens_needed": 0, "tokens_on_disk": 0} | said
    for name in ("flops_per_token", "tokens_needed", "tokens_on_disk"):
        if not str(plan[name]).isdecimal():
            raise ConfigError(f"{program} with DRY_RUN=1: {name}:{plan[name]} is no whole number")
        plan[name] = int(plan[name])
    return plan


@functools.cache
def asked_of(
    root: Path,
    program: str,
    settings: tuple[tuple[str, str], ...],
    options: tuple[tuple[str, str], ...],
) -> Checked:
    """Settings and options as another program below `root` resolves them. Raises ConfigError,
    DataError."""
    refuse_unknown(dict(settings))
    path = (root / program).resolve()
    if not path.is_file() or not path.is_relative_to(root.resolve()):
        raise ConfigError(f"program = {program!r}: is no file of the project, below {root}")
    said, _ = answers_of(path, dict(settings), dict(options))
    asked = Config.from_env(dict(settings))
    cfg = train_gpt.resolve(replace(asked, dry_run=True, vocab_size=asked.vocab_size or 257))
    steps = int(said.get("num_iterations", cfg.num_iterations))
    data = said.get("data_fingerprint", "none"), said.get("val_fingerprint", "none")
    plan = plan_of(said, program)
    return Checked(replace(cfg, num_iterations=steps, dry_run=False), plan, *data)


def config_of(said: Mapping[str, str]) -> Config:
    """The settings that a train_gpt.py of other code prints, in the form of the one here. They are
    not checked, for other code may have other choices; what it has not is at its default, but that
    it drops nothing."""
    values = {"shard_tail": "keep"} | {
        name: None if said[name] == "None" else Config.parse(name, said[name])
        for name in Config.__dataclass_fields__
        if said.get(name)
    }
    cfg = object.__new__(Config)
    vars(cfg).update(vars(Config()) | values | {"dry_run": False})
    return cfg


def effect_of(said: Mapping[str, str], cfg: Config) -> dict[str, Any]:
    """{NAME: value} of the settings that a train_gpt.py of other code prints and that have an
    effect, as far as is known here."""
    names = [*said]
    of_config = names[: names.index("world_size")] if "world_size" in said else []
    without = {*Config.NOT_HASHED, *cfg.idle()}
    values = dict(said) | vars(cfg)
    return {name.upper(): values[name] for name in of_config if name not in without}


@functools.cache
def asked_of_code(
    root: Path, settings: tuple[tuple[str, str], ...], world_size: int, mode: str
) -> Checked:
    """Settings as the train_gpt.py below `root` will resolve and check them, which is other code
    than the one here; data as `checked` has them. Raises ConfigError, DataError."""
    given, program = dict(settings), root / TRAINER
    try:
        said, warned = answers_of(program, given, {})
    except DataError:  # VOCAB_SIZE=0 asks the data, which may not be there
        said, warned = answers_of(program, given | {"VOCAB_SIZE": "257"}, {})
        if mode != "dry":
            make_embedded_data(config_of(said).input_bin)
            said, warned = answers_of(program, given, {})
    unknown = [name for name in given if name.lower() not in said]
    if unknown:
        raise ConfigError(f"{unknown[0]} is no setting of that code")

    cfg, ranks, identity = config_of(said), Ranks(world_size=world_size), ["", ""]
    try:
        loaders = train_gpt.preflight(config_of(dict(said) | {"device": "cpu"}), ranks)
        identity = train_gpt.data_identity(cfg, *loaders).values()
    except DataError:
        if mode != "dry":
            raise
    train_gpt.check_batch(cfg, ranks)
    plan = plan_of(said, TRAINER)
    return Checked(cfg, plan, *identity, effect_of(said, cfg), tuple(warned))


def resolved_by_its_code(
    stage: Stage,
    code: Code | None,
    settings: Mapping[str, str],
    options: Mapping[str, str],
    world_size: int,
    mode: str,
) -> Checked:
    """Settings and options as what runs them resolves them. Raises ConfigError, DataError."""
    given = tuple(settings.items())
    if code is None and stage.program == TRAINER:
        return checked(given, world_size, mode)
    if code is None:
        return asked_of(ROOT, stage.program, given, tuple(options.items()))

    root = code_variants.root_of(code)
    try:
        if stage.program == TRAINER:
            known = asked_of_code(root, given, world_size, mode)
        else:
            known = asked_of(root, stage.program, given, tuple(options.items()))
    except (ConfigError, DataError) as error:
        raise type(error)(f"CODE={code}: {error}") from None
    code_variants.keep_source(code, stage.program, known.plan["source_sha"])
    return known


def source_now() -> str:
    """The source_sha of the trainer as its files are at this moment."""
    source = (ROOT / TRAINER).read_text("utf-8")
    return text_hash(source + package_text("ops") + modules_text(source))


def make_run(stage: Stage, variant: str, seed: int, world_size: int, mode: str) -> PlannedRun:
    """The run of a variant with a seed. Raises ConfigError, DataError."""
    given = ({"DEVICE": "cuda"} if mode == "slurm" else {}) | stage.variants[variant]
    settings = {name: value for name, value in given.items() if name.isupper() and name != CODE}
    options = {name: value for name, value in given.items() if name.islower()}
    try:
        code = code_variants.found(stage.code_of(variant)) if stage.code_of(variant) else None
        known = resolved_by_its_code(stage, code, settings, options, world_size, mode)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{stage.name}, {variant}: {error}") from None

    plan = known.plan | {"world_size": world_size}
    program = stage.program
    if code:
        program = str(code_variants.root_of(code) / program)
    elif program == TRAINER:  # as it is now, which the runs will read
        plan["source_sha"] = source_now()
    data = "" if known.data == "none" else known.data
    identity = (stage.name, variant, str(seed), plan["config_hash"], plan["source_sha"], data)
    settings |= {"SEED": str(seed), "STAGE": stage.name, "VARIANT": variant}
    if known.data:  # without, it is not yet known what it will be called
        label = re.sub(r"[^A-Za-z0-9.]+", "-", f"{stage.name}-{variant}").strip("-.")[:80]
        told_apart = [variant] if stage.names_code else []  # by name: code may be the same
        digest = hashlib.sha256("".join([*told_apart, *identity[3:]]).encode()).hexdigest()[:6]
        settings |= {"RUN_ID": f"{label}-s{seed}-{digest}", "RESUME": "auto"}
    run = PlannedRun(settings, known.cfg, plan, identity, known.val_data, program, options)
    return replace(
        run,
        seconds=stage.seconds,
        code=str(code or ".") if stage.names_code else "",
        said=known.said,
        cautions=known.cautions,
    )


def run_order(stage: Stage, seeds: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
    """(variant, seed) as they are run: the references' first, then seed by seed, so that what is
    there can be compared. Where code varies each seed is run with all of it before the next, so
    that whoever stops early, to edit it, has whole pairs."""
    places = [
        (place, variant, seed)
        for variant in stage.references_first()
        if variant in seeds
        for place, seed in enumerate(seeds[variant])
    ]

    def turn(run: tuple[int, str, int]) -> int:
        place, variant, _ = run
        is_first = stage.is_reference(variant) and not stage.names_code
        return -1 if is_first else place

    return [(variant, seed) for _, variant, seed in sorted(places, key=turn)]


def plan_runs(
    stage: Stage, seeds: Mapping[str, Sequence[int]], world_size: int, mode: str
) -> list[PlannedRun]:
    """All runs of a stage, in order. Raises ConfigError, also where variants do not differ as the
    stage says; DataError."""
    order = run_order(stage, seeds)
    runs = [make_run(stage, variant, seed, world_size, mode) for variant, seed in order]
    check_differences(stage, {run.settings["VARIANT"]: run for run in runs})
    return runs


def check_differences(stage: Stage, of_variants: Mapping[str, PlannedRun]) -> None:
    """Raises ConfigError where two variants differ in less than the stage says, once everything is
    resolved, or are compared and were validated on something else."""
    for one, other in itertools.combinations(of_variants, 2):
        runs = of_variants[one], of_variants[other]
        both = f"variants {one} and {other} of {stage.name}"
        are_compared = stage.references[one] == other or stage.references[other] == one
        ours, theirs = (run.resolved() for run in runs)
        for name in said_to_differ(stage, one, other, are_compared):
            if ours.get(name) == theirs.get(name):
                idle = runs[0].cfg.idle().get(name.lower())
                reason = f"is {ours.get(name)} in both"
                if idle:
                    reason = f"has no effect without {idle.replace('!=', ' other than ')}"
                raise ConfigError(f"{both} are said to differ in {name}, which {reason}")
            for run in runs:
                check_followers(stage, name, run)
        are_the_same = ours == theirs or runs[0].identity[3:] == runs[1].identity[3:]
        if are_the_same and runs[0].code == runs[1].code:  # by name: code is compared with itself
            raise ConfigError(
                f"{both} have the same settings once everything is resolved; take one out or "
                "change it"
            )
        if are_compared and runs[0].validation() != runs[1].validation():
            told = [f"{run.validation()[1]} tokens of {run.cfg.input_val_bin}" for run in runs]
            raise ConfigError(
                f"{both} are validated on different data or amounts, {' and '.join(told)}; set one "
                "INPUT_VAL_BIN and one VAL_TOKENS in the stage's base, a multiple of every "
                "SEQUENCE_LENGTH"
            )
        if stage.seconds:  # at equal time, where tokens differ on purpose; all end together
            continue
        if are_compared and not runs[0].validated_at() & runs[1].validated_at():
            raise ConfigError(
                f"{both} are never validated after the same tokens; set VAL_EVERY or "
                "NUM_ITERATIONS so that they are"
            )


def said_to_differ(stage: Stage, one: str, other: str, are_compared: bool) -> list[str]:
    """The settings in which the stage says that two variants differ: both give them a value, or
    one of the two where they are compared."""
    ours, theirs = (
        {name: text for name, text in stage.variants[label].items() if text}
        for label in (one, other)
    )
    untrained = {name.upper() for name in Config.NOT_HASHED}  # PRESET is one: it may say little
    untrained = (untrained - {"INPUT_BIN"}) | {CODE}  # which cautions_of_code tells
    return [
        name
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
        and name not in untrained
        and (are_compared or (name in ours and name in theirs))
    ]


def check_followers(stage: Stage, name: str, run: PlannedRun) -> None:
    """Raises ConfigError where a preset holds a setting that would follow one that varies."""
    variant, cfg = run.settings["VARIANT"], run.cfg
    if run.said is not None:  # other code says what it resolves, not what it was asked
        try:
            cfg = Config.from_env(run.settings)
        except ConfigError:
            return
    for follower in cfg.resolved():
        value = getattr(cfg, follower)
        held_by_stage = stage.variants[variant].get(follower.upper())
        if Config.AUTO[follower] == name.lower() and value and not held_by_stage:
            raise ConfigError(
                f"{stage.name} varies {name}, but {follower.upper()} stays at {value:g}, as the "
                f'preset has it, and does not follow; {follower.upper()} = "auto" in the stage '
                f"lets it, {follower.upper()} = {value:g} holds it on purpose"
            )


def change_text(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """How a resolved setting differs from that of the reference, which may have no use for it."""
    new, old = (
        f"{values.get(name):g}" if isinstance(values.get(name), float) else str(values.get(name))
        for values in (ours, theirs)
    )
    if name not in theirs:
        return f"{name}={new}"
    return f"{name} {old} -> {new}" if name in ours else f"no {name}"


def description(stage: Stage, runs: Sequence[PlannedRun]) -> list[str]:
    """For every variant in a line what differs from its reference after everything is resolved, for
    further references from the first one; then warnings."""
    of_variants = {run.settings["VARIANT"]: run for run in runs}
    first = stage.references_first()[0]
    lines = []
    for variant, run in of_variants.items():
        beside = first if stage.is_reference(variant) else stage.references[variant]
        ours, theirs = run.resolved(), of_variants[beside].resolved()
        differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        changes = ", ".join(change_text(name, ours, theirs) for name in differing)
        text = f"against {beside}: {changes}"
        if stage.is_reference(variant):
            code = f", CODE {run.code}" if run.code else ""
            text = f"the reference{code}"
            if changes:
                text = f"another reference; from {beside}: {changes}"
        lines.append(f"{variant}: {text}")
    sentences = cautions_of(runs) + cautions_of_code(stage, of_variants)
    return lines + [f"warning: {sentence}" for sentence in sentences]


def cautions_of_code(stage: Stage, of_variants: Mapping[str, PlannedRun]) -> list[str]:
    """A sentence on each variant that names other code than its reference, and has the same, with
    the same settings and data."""
    sentences = []
    for variant, run in of_variants.items():
        beside = stage.references[variant]
        is_other = stage.code_of(variant) != stage.code_of(beside)
        if is_other and run.identity[3:] == of_variants[beside].identity[3:]:
            whose = repr(beside) if stage.code_of(beside) else f"{beside!r}, the working tree"
            sentences.append(
                f"{variant!r}: its code is the same as that of {whose}, but for comments, layout "
                "or files that change no loss; it is run, and never promoted"
            )
    return sentences


def cautions_of(runs: Sequence[PlannedRun]) -> list[str]:
    """What the runs of a stage are allowed and hardly meant to do, each sentence once."""
    sentences = []
    for run in runs:
        sentences += train_gpt.cautions(run.cfg) if run.said is None else run.cautions
        if run.cfg.val_every > run.cfg.num_iterations:
            sentences.append(f"VAL_EVERY={run.cfg.val_every} leaves only the last validation")
        cfg, on_disk = run.cfg, run.plan["tokens_on_disk"]
        there = min(on_disk, cfg.max_train_tokens or on_disk)
        if not cfg.shuffle and run.plan["tokens_needed"] < there:
            part = run.plan["tokens_needed"] / there
            sentences.append(
                f"{run.settings['VARIANT']} trains on the first {part:.1%} of the data in file "
                "order, the same batches for every seed; SHUFFLE=1 draws them from all of it"
            )
    return list(dict.fromkeys(sentences))


def status_of(run: PlannedRun, rows: Mapping[str, dict[str, str]]) -> str:
    """The status of the run's row; "" where there is none of the same settings, seed, source and
    data."""
    statuses = [
        row["status"]
        for row in rows.values()
        if tuple(row.get(name) or "" for name in IDENTITY) == run.identity
    ]
    for status in (*HAS_RESULT, "stopped"):  # which has a result with --gate; others do not
        if status in statuses:
            return status
    return statuses[-1] if statuses else ""
