"""Lists the stages of experiments/stages/, or one of them with its variants; other scripts read stages through it.

    python scripts/stages.py
    python scripts/stages.py stage1_cpu

A stage is a question put to variants and seeds. Its file, experiments/stages/<name>.toml, has

    extends = "stage1"              # a stage from which everything comes that is not said here
    question = "…"
    reference = "none"              # the variant that others are compared with
    seeds = [1, 2]                  # of every variant
    max_seeds = 8                   # so many a variant may come to have, where the gate asks for more
    base = {LR = 0.0036}            # settings of every run; "" leaves one to the preset
    variants.none = {}              # settings of a variant, by its label
    grid.LR = [0.0036, 0.00468]     # each variant with each value; the label says which
    axes = ["ATTNGATE", "LR"]       # columns of its table; without: the settings in which variants differ
    gate.better = 0.05              # numbers of stage_gate.py that differ from its own
    next = [{name = "gates_5k", NUM_ITERATIONS = 5000}]   # the stages after it, of what it promotes
"""

import argparse
import itertools
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("experiments/stages")
KEYS = {
    "extends": str,
    "question": str,
    "reference": str,
    "seeds": list,
    "max_seeds": int,
    "base": dict,
    "variants": dict,
    "grid": dict,
    "axes": list,
    "gate": dict,
    "next": list,
}
MERGED = (
    "base",
    "gate",
)  # what a stage says of these adds to what it extends; the rest is replaced
RESERVED = {
    "SEED",
    "RUN_ID",
    "STAGE",
    "VARIANT",
    "RESUME",
    "DRY_RUN",
    "LOG_DIR",
    "RESULTS_CSV",
}  # not a stage's to set


@dataclass(frozen=True)
class Stage:
    """A stage as its file describes it, with every setting as the text of an environment variable."""

    name: str
    question: str
    reference: str  # a label of variants
    seeds: tuple[int, ...]
    max_seeds: int
    variants: dict[
        str, dict[str, str]
    ]  # by label: all settings of its runs, those of every run included
    axes: tuple[str, ...]  # settings that tell the variants apart, in lower case
    gate: dict
    next: tuple[dict, ...]


def stage_names() -> list[str]:
    """The stages that have a file, by name."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def text_of(value) -> str:
    """A value of a stage file as an environment variable has it: 1 and 0 for true and false."""
    return str(int(value) if isinstance(value, bool) else value)


def read(name: str, readers: tuple = ()) -> dict:
    """The tables of a stage file, over those of the stage that it extends. Raises ValueError."""
    if not FOLDER.is_dir():
        raise ValueError(f"{FOLDER} is not here; run this from the project's folder")
    if name not in stage_names():
        raise ValueError(
            f"STAGE {name}: choose one of {', '.join(stage_names())}; "
            "python scripts/stages.py says what they ask"
        )
    if name in readers:
        raise ValueError(f"STAGE {name} extends itself, by way of {', '.join(readers)}")
    path = FOLDER / f"{name}.toml"
    try:
        own = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    for key, value in own.items():
        if key not in KEYS:
            raise ValueError(f"{path}: {key} is no key of a stage; choose from {', '.join(KEYS)}")
        if not isinstance(value, KEYS[key]):
            raise ValueError(f"{path}: {key} = {value!r} must be of type {KEYS[key].__name__}")
    whole = read(own["extends"], (*readers, name)) if "extends" in own else {}
    return whole | own | {key: whole.get(key, {}) | own.get(key, {}) for key in MERGED}


def load_stage(name: str) -> Stage:
    """Reads experiments/stages/<name>.toml. Raises ValueError with what is wrong in the file and what it may say."""
    tables, path = read(name), FOLDER / f"{name}.toml"
    if missing := [
        key for key in ("question", "reference", "seeds", "variants") if not tables.get(key)
    ]:
        raise ValueError(
            f"{path} has no {missing[0]}; python scripts/stages.py --help shows a file"
        )
    grid, variants = tables.get("grid", {}), {}
    for key, table, kind in (("variants", tables["variants"], dict), ("grid", grid, list)):
        if wrong := [name for name, value in table.items() if not isinstance(value, kind)]:
            raise ValueError(
                f"{path}: {key}.{wrong[0]} = {table[wrong[0]]!r} must be of type {kind.__name__}"
            )
    if not all(isinstance(step, dict) and step.get("name") for step in tables.get("next", ())):
        raise ValueError(f"{path}: every stage in next needs a name")
    for label, own in tables["variants"].items():
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values))
            words = [label, *(f"{setting}={text_of(value)}" for setting, value in point.items())]
            settings = tables["base"] | own | point
            variants[" ".join(words)] = {
                setting: text_of(value) for setting, value in settings.items()
            }
    if tables["reference"] not in variants:
        raise ValueError(
            f"{path}: reference = {tables['reference']!r}: choose one of {', '.join(map(repr, variants))}"
        )
    for setting in {setting for settings in variants.values() for setting in settings}:
        if not setting.isupper() or setting in RESERVED:
            raise ValueError(
                f"{path}: {setting} is nothing a variant can set; python train_gpt.py --help says what is"
            )
    seeds, most = tuple(tables["seeds"]), tables.get("max_seeds", 8)
    if len(set(seeds)) < len(seeds) or not all(
        isinstance(seed, int) and seed >= 0 for seed in seeds
    ):
        raise ValueError(f"{path}: seeds = {list(seeds)} must be different whole numbers")
    named = dict.fromkeys(
        setting for own in (*tables["variants"].values(), grid) for setting in own
    )
    axes = [
        setting.lower()
        for setting in tables.get("axes", named)
        if len({settings.get(setting) for settings in variants.values()}) > 1
    ]
    return Stage(
        name,
        tables["question"],
        tables["reference"],
        seeds,
        max(most, len(seeds)),
        variants,
        tuple(axes),
        tables["gate"],
        tuple(tables.get("next", ())),
    )


def main(argv=None) -> int:
    """Prints the stages, or one; exit code 0, or 2 with one sentence where a file is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "stage", nargs="?", help="show its variants; without, all stages in a line each"
    )
    args = parser.parse_args(argv)
    code = 0
    for name in [args.stage] if args.stage else stage_names() or ["smoke"]:
        try:
            stage = load_stage(name)
            size = f"{len(stage.variants)} variants x {len(stage.seeds)} seeds"
            print(f"{stage.name:24} {size:24} {stage.question}")
            for label, settings in stage.variants.items() if args.stage else ():
                mark = " (reference)" * (label == stage.reference)
                print(
                    f"  {label}{mark}: {' '.join(f'{setting}={value}' for setting, value in settings.items())}"
                )
        except ValueError as error:
            print(f"stages.py: error: {error}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())
