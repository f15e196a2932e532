"""Derives stages: from a stage with settings of the command line, or with what it promotes; from
versions of the code, which are compared."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath

from harness.settings import ROOT
from store.contract import ConfigError
from plan_stage import pairs, refuse_unknown
from code_variants import PATCHES
from stages import (
    CODE,
    FOLDER,
    MOST_SEEDS,
    RESERVED,
    THE_TREE,
    TRAINER,
    Stage,
    check_free,
    check_name,
    read,
    stage_of,
    setting_text,
    write_stage,
)
from train_gpt import Config


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of run_stage.py that make a stage."""
    add = parser.add_argument
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting for every run; once for each",
    )
    add(
        "--code",
        action="append",
        default=[],
        metavar="CODE",
        help="a branch, tag, commit or patch, or . for the working tree: compare it with the first "
        "of these, or, given once, the working tree with it",
    )
    add(
        "--as",
        dest="name",
        default="",
        metavar="STAGE",
        help="the stage that --set or --code makes",
    )


def seed_list(option: str, text: str) -> tuple[int, ...]:
    """The numbers of 101,102. Raises ConfigError."""
    words = text.split(",")
    seeds = tuple(int(word) for word in words if word.isdecimal())
    if len({*seeds}) < len(words):
        raise ConfigError(f"{option} {text}: must be different whole numbers, as in 101,102")
    return seeds


def code_tables(codes: Sequence[str], words: Sequence[str], name: str) -> tuple[str, dict]:
    """(name, tables) of the stage that compares versions of the code, the first being the
    reference; the words are settings of all runs, and SEEDS, how many or which. Raises
    ConfigError."""
    if not FOLDER.is_dir():
        raise ConfigError(f"--code {codes[0]}: {FOLDER} is not here; cd {ROOT} and run this there")
    codes = [*codes, "."] if len(codes) == 1 else codes
    labels = ["tree" if code in THE_TREE else code for code in codes]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"--code {label}: is there twice; name what it is compared with")
    for word in words:
        if "=" not in word:
            raise ConfigError(
                f"{word}: with --code all words are settings, as PRESET=quickstart is; a stage "
                'names code in its file, CODE = "main"'
            )
    base = pairs("with --code", [*words], "[^=]+")
    seeds = base.pop("SEEDS", "3")
    if seeds.isdecimal() and not 1 <= int(seeds) <= MOST_SEEDS:
        raise ConfigError(f"SEEDS={seeds}: must be how many, 1 to {MOST_SEEDS}, or which, as 5,6")
    are_counted = seeds.isdecimal()
    numbers = range(1, int(seeds) + 1) if are_counted else seed_list("SEEDS", seeds)

    stems = [PurePath(label).stem if label.endswith(PATCHES) else label for label in labels]
    derived = re.sub(r"[^A-Za-z0-9_.]+", "-", "_vs_".join(stems)).strip("-.")[:60]
    reference, *others = labels
    tables = {
        "question": f"Does the code of {', '.join(others)} train better than that of {reference}?",
        "reference": reference,
        "seeds": [*numbers],
        "base": base,
        "variants": {
            label: {CODE: "." if label == "tree" else code} for label, code in zip(labels, codes)
        },
    }
    check_name(name or derived, "--as")
    return name or derived, tables


def of_codes(codes: Sequence[str], words: Sequence[str], name: str, write: bool = False) -> Stage:
    """The stage that compares versions of the code; where asked to, it writes the file. Raises
    ConfigError."""
    name, tables = code_tables(codes, words, name)
    stage = stage_of(name, {"gate": {}} | tables)
    try:
        check_free(name, tables)
    except FileExistsError as error:
        raise ConfigError(
            f"{error}; --as NAME makes another, and python scripts/run_stage.py {name} goes on "
            "with that one, with more seeds by --seeds"
        ) from None
    if write:
        write_stage(name, tables)
    return stage


def overridden(stage: Stage, changes: list[str], name: str, write: bool = True) -> Stage:
    """The stage with NAME=VALUE for every run; where that changes what is trained, as a stage
    `name`, which has a file of its own, so that no table mixes the two. Raises ConfigError."""
    given = pairs("--set", changes)
    reserved = RESERVED.intersection(given)
    if reserved:
        raise ConfigError(
            f"--set {min(reserved)}: is not for a stage to set; --seeds takes seeds, run_stage.py "
            "gives the rest, and keeps runs in logs/ and rows in experiments/results.csv"
        )
    refuse_unknown({setting: text for setting, text in given.items() if setting != CODE})
    for label, settings in stage.variants.items() if given else ():
        if stage.code_of(label) or given.get(CODE):  # that code knows, when all is planned
            continue
        own = {setting: text for setting, text in settings.items() if setting.isupper()}
        own.pop(CODE, None)
        try:
            Config.from_env(own | given)
        except ConfigError as error:
            raise ConfigError(f"{stage.name}, {label}: {error}") from None

    untrained = {setting.upper() for setting in Config.NOT_HASHED}
    trained = sorted(set(given) - untrained)
    if name and not trained:
        raise ConfigError(f"--as {name}: --set changes nothing that is trained; leave --as out")
    if not trained:
        variants = {label: settings | given for label, settings in stage.variants.items()}
        return replace(stage, variants=variants)
    if stage.seconds:
        raise ConfigError(
            f"--set {trained[0]}: {stage.name} has step times of its settings; make a stage of the "
            "one that it extends, by --set and --as, with --seconds"
        )
    if not name:
        raise ConfigError(
            f"--set {trained[0]} makes another stage of {stage.name}; give it a name by --as"
        )
    check_name(name, "--as")
    tables = read(stage.name)
    made = stage_of(name, tables | {"base": tables["base"] | given})
    for setting in given:
        values = {settings[setting] for settings in made.variants.values()}
        if values != {given[setting]}:
            raise ConfigError(
                f"--set {setting}={given[setting]}: variants of {stage.name} have their own, "
                f"{', '.join(sorted(values))}; write a stage for it"
            )
    file = {"extends": stage.name, "base": given}
    try:
        check_free(name, file)
    except FileExistsError as error:
        raise ConfigError(f"--as {name}: {error}; choose another name") from None
    if write:
        write_stage(name, file)
    return made


def variants_after(
    stage: Stage, promoted: list[str], best_reference: str
) -> dict[str, dict[str, str]]:
    """{label: settings} of what goes on: the reference of the best promoted, it and others with
    the same reference, as many as the step says, and variants around the best; with none promoted
    that is the best reference."""
    step = stage.next[0]
    changes = {
        name: setting_text(name, value)
        for name, value in step.items()
        if name not in ("name", "most", "around")
    }
    best = promoted[0] if promoted else best_reference
    reference = stage.references[best]
    going_on = [label for label in promoted if stage.references[label] == reference]
    going_on = going_on[: step.get("most", len(going_on))]
    kept = {label: stage.variants[label] | changes for label in (reference, *going_on)}
    for label, own in step.get("around", {}).items():
        own = {name: setting_text(name, value) for name, value in own.items()}
        kept[f"{best}, {label}"] = kept[best] | own
    return kept


def next_tables(stage: Stage, promoted: list[str], best_reference: str) -> dict:
    """The tables of the stage that follows."""
    kept = variants_after(stage, promoted, best_reference)
    first, *later = kept.values()
    base = {
        name: value
        for name, value in first.items()
        if all(settings.get(name) == value for settings in later)
    }
    varied = {name for settings in kept.values() for name in settings if name not in base}
    tables = {
        "question": stage.question,
        "reference": next(iter(kept)),
        "seeds": stage.seeds,
        "max_seeds": stage.max_seeds,
        "axes": sorted(varied | {name.upper() for name in stage.axes} - base.keys()),
        "base": base,
        "variants": {
            label: {name: value for name, value in settings.items() if name not in base}
            for label, settings in kept.items()
        },
        "gate": stage.gate,
    }
    if stage.program != TRAINER:
        tables["program"] = stage.program
    if not stage.compares_losses:
        tables["measure"] = stage.measure
    return tables | ({"next": list(stage.next[1:])} if stage.next[1:] else {})


def build_next(stage: Stage, promoted: list[str], best_reference: str = "") -> str:
    """Writes the file of the stage that follows what is promoted, the best first; says what came of
    it. Without a best reference the first is taken for it."""
    if not stage.next:
        return f"no next stage: {stage.name} names none"
    if not promoted and not stage.next[0].get("around"):
        return "no next stage: no variant is promoted"
    name = stage.next[0]["name"]
    tables = next_tables(stage, promoted, best_reference or stage.references_first()[0])
    try:
        stage_of(name, tables)
        write_stage(name, tables)
    except FileExistsError as error:
        return f"{error}; it is left as it is"
    except ValueError as error:
        return f"no next stage: {error}"
    reference, *others = tables["variants"]
    left = [label for label in promoted if label not in others]
    rest = f", without {', '.join(map(repr, left))}" if left else ""
    return (
        f"next stage: {FOLDER / f'{name}.toml'} with {', '.join(map(repr, others))} beside "
        f"{reference!r}{rest}; "
        f"python scripts/run_stage.py {name}"
    )
