"""Derives stages from a stage: with settings of the command line, or with what it promotes."""

from dataclasses import replace

from harness.contract import ConfigError
from plan_stage import pairs, refuse_unknown
from stages import FOLDER, RESERVED, Stage, load_stage, text_of, write_stage
from train_gpt import Config


def overridden(stage: Stage, changes: list[str], name: str) -> Stage:
    """The stage with NAME=VALUE for every run; where that changes what is trained, as a stage
    `name`, which has a file of its own, so that no table mixes the two. Raises ConfigError."""
    given = pairs("--set", changes)
    reserved = RESERVED.intersection(given)
    if reserved:
        raise ConfigError(f"--set {min(reserved)}: is not for a stage to set")
    refuse_unknown(given)
    Config.from_env(stage.variants[stage.reference] | given)

    untrained = {setting.upper() for setting in Config.NOT_HASHED}
    trained = sorted(set(given) - untrained)
    if not trained:
        variants = {label: settings | given for label, settings in stage.variants.items()}
        return replace(stage, variants=variants)
    if not name:
        raise ConfigError(
            f"--set {trained[0]} makes another stage of {stage.name}; give it a name by --as"
        )
    varied = [setting for setting in trained if setting.lower() in stage.axes]
    if varied:
        raise ConfigError(
            f"--set {varied[0]}: in that the variants of {stage.name} differ; write a stage for it"
        )
    try:
        write_stage(name, {"extends": stage.name, "base": given})
    except FileExistsError as error:
        raise ConfigError(f"--as {name}: {error}; choose another name") from None
    return load_stage(name)


def next_tables(stage: Stage, promoted: list[str]) -> dict:
    """The tables of the stage that follows, of the reference and the promoted variants."""
    first, *later = stage.next
    changes = {name: text_of(value) for name, value in first.items() if name != "name"}
    kept = {label: stage.variants[label] | changes for label in (stage.reference, *promoted)}
    base = {
        name: value
        for name, value in kept[stage.reference].items()
        if all(settings.get(name) == value for settings in kept.values())
    }
    tables = {
        "question": stage.question,
        "reference": stage.reference,
        "seeds": stage.seeds,
        "max_seeds": stage.max_seeds,
        "axes": [name.upper() for name in stage.axes],
        "base": base,
        "variants": {
            label: {name: value for name, value in settings.items() if name not in base}
            for label, settings in kept.items()
        },
        "gate": stage.gate,
    }
    return tables | ({"next": later} if later else {})


def build_next(stage: Stage, promoted: list[str]) -> str:
    """Writes the file of the stage that follows; says what came of it."""
    if not stage.next:
        return f"no next stage: {stage.name} names none"
    if not promoted:
        return "no next stage: no variant is promoted"
    name = stage.next[0]["name"]
    try:
        write_stage(name, next_tables(stage, promoted))
    except FileExistsError as error:
        return f"{error}; it is left as it is"
    return (
        f"next stage: {FOLDER / f'{name}.toml'} with {', '.join(promoted)} beside "
        f"{stage.reference}; python scripts/run_stage.py {name}"
    )
