"""Lists the stages of experiments/stages/, or one of them with its variants; other scripts read and
write stages through it.

    python scripts/stages.py
    python scripts/stages.py stage1_cpu

A stage is a question put to variants and seeds. Its file, experiments/stages/<name>.toml, has

    extends = "stage1"              # a stage from which everything comes that is not said here
    question = "…"
    reference = "none"              # the variant that others are compared with
    seeds = [1, 2]                  # of every variant
    max_seeds = 8                   # so many a variant may have, where the gate asks for more
    base = {LR = 0.0036}            # settings of every run; "" leaves one to the preset
    variants.none = {}              # settings of a variant, by its label
    grid.LR = [0.0036, 0.00468]     # each variant with each value; the label says which
    axes = ["ATTNGATE", "LR"]       # columns of its table; without: in what variants differ
    gate.better = 0.05              # numbers of stage_gate.py that differ from its own
    next = [{name = "gates_5k", NUM_ITERATIONS = 5000}]   # stages after it, of what it promotes
"""

import argparse
import itertools
import json
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from harness.files import write_whole

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
# what a stage says of these adds to what it extends; the rest is replaced
MERGED = ("base", "gate")
# not a stage's to set
RESERVED = {"SEED", "RUN_ID", "STAGE", "VARIANT", "RESUME", "DRY_RUN", "LOG_DIR", "RESULTS_CSV"}


@dataclass(frozen=True)
class Stage:
    """A stage as its file describes it, with every setting as the text of an environment
    variable."""

    name: str
    question: str
    reference: str  # a label of variants
    seeds: tuple[int, ...]
    max_seeds: int
    variants: dict[str, dict[str, str]]  # by label: all settings of its runs
    axes: tuple[str, ...]  # settings that tell the variants apart, in lower case
    gate: dict
    next: tuple[dict, ...]


def stage_names() -> list[str]:
    """The stages that have a file, by name."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def text_of(value: object) -> str:
    """A value of a stage file as an environment variable has it: 1 and 0 for true and false."""
    return str(int(value) if isinstance(value, bool) else value)


def read(name: str, readers: tuple[str, ...] = ()) -> dict:
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

    extended = read(own["extends"], (*readers, name)) if "extends" in own else {}
    merged = {key: extended.get(key, {}) | own.get(key, {}) for key in MERGED}
    return extended | own | merged


def check_tables(tables: dict, path: Path) -> None:
    """Raises ValueError where something is missing, or a table holds what it cannot."""
    for key in ("question", "reference", "seeds", "variants"):
        if not tables.get(key):
            raise ValueError(f"{path} has no {key}; python scripts/stages.py --help shows a file")
    for key, kind in (("variants", dict), ("grid", list)):
        for name, value in tables.get(key, {}).items():
            if not isinstance(value, kind):
                raise ValueError(
                    f"{path}: {key}.{name} = {value!r} must be of type {kind.__name__}"
                )
    if not all(isinstance(step, dict) and step.get("name") for step in tables.get("next", ())):
        raise ValueError(f"{path}: every stage in next needs a name")
    seeds = tables["seeds"]
    are_numbers = all(isinstance(seed, int) and seed >= 0 for seed in seeds)
    if len(set(seeds)) < len(seeds) or not are_numbers:
        raise ValueError(f"{path}: seeds = {seeds} must be different whole numbers")


def variants_of(tables: dict) -> dict[str, dict[str, str]]:
    """{label: settings} of every variant with every point of the grid."""
    grid = tables.get("grid", {})
    variants = {}
    for label, own in tables["variants"].items():
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values))
            words = [f"{setting}={text_of(value)}" for setting, value in point.items()]
            settings = tables["base"] | own | point
            variants[" ".join([label, *words])] = {
                setting: text_of(value) for setting, value in settings.items()
            }
    return variants


def check_variants(variants: dict[str, dict[str, str]], reference: str, path: Path) -> None:
    """Raises ValueError where the reference is none of them, or one sets what it cannot."""
    if reference not in variants:
        raise ValueError(
            f"{path}: reference = {reference!r}: choose one of {', '.join(map(repr, variants))}"
        )
    for setting in {setting for settings in variants.values() for setting in settings}:
        if not setting.isupper() or setting in RESERVED:
            raise ValueError(
                f"{path}: {setting} is nothing a variant can set; "
                "python train_gpt.py --help says what is"
            )


def load_stage(name: str) -> Stage:
    """Reads experiments/stages/<name>.toml. Raises ValueError with what is wrong in the file and
    what it may say."""
    path = FOLDER / f"{name}.toml"
    tables = read(name)
    check_tables(tables, path)
    variants = variants_of(tables)
    check_variants(variants, tables["reference"], path)

    settings_named = [*tables["variants"].values(), tables.get("grid", {})]
    named = dict.fromkeys(setting for own in settings_named for setting in own)
    axes = tuple(
        setting.lower()
        for setting in tables.get("axes", named)
        if len({settings.get(setting) for settings in variants.values()}) > 1
    )
    seeds = tuple(tables["seeds"])
    return Stage(
        name=name,
        question=tables["question"],
        reference=tables["reference"],
        seeds=seeds,
        max_seeds=max(tables.get("max_seeds", 8), len(seeds)),
        variants=variants,
        axes=axes,
        gate=tables["gate"],
        next=tuple(tables.get("next", ())),
    )


def toml_key(name: str) -> str:
    """A key as TOML has it, in quotes where it has to be."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml_value(name)


def toml_value(value: object) -> str:
    """A text, number, list or table as TOML has it on one line."""
    if isinstance(value, str):  # JSON's strings are TOML's but for one character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        pairs = [f"{toml_key(name)} = {toml_value(one)}" for name, one in value.items()]
        return f"{{{', '.join(pairs)}}}"
    return repr(value)


def toml_text(tables: dict) -> str:
    """The text of a stage file from which `read` makes these tables."""
    blocks = [("", {})]  # (head, what stands below it); first the keys that are no table
    for key, value in tables.items():
        if key == "variants":
            blocks += [(f"[variants.{json.dumps(label)}]", own) for label, own in value.items()]
        elif key == "next" and value:
            blocks += [("[[next]]", step) for step in value]
        elif isinstance(value, dict):
            blocks.append((f"[{key}]", value))
        else:
            blocks[0][1][key] = value

    texts = []
    for head, table in blocks:
        lines = [f"{toml_key(name)} = {toml_value(value)}" for name, value in table.items()]
        texts.append("\n".join([head, *lines]).strip())
    return "\n\n".join(texts).lstrip() + "\n"


def write_stage(name: str, tables: dict) -> None:
    """Writes experiments/stages/<name>.toml, the inverse of `read`. Raises FileExistsError where it
    is there and says something else."""
    path = FOLDER / f"{name}.toml"
    text = toml_text(tables)
    if path.exists() and path.read_text() != text:
        raise FileExistsError(f"{path} is there and says something else")
    write_whole(path, text)


def show(name: str, with_variants: bool) -> None:
    """Prints a stage in a line, and its variants in a line each. Raises ValueError."""
    stage = load_stage(name)
    size = f"{len(stage.variants)} variants x {len(stage.seeds)} seeds"
    print(f"{stage.name:24} {size:24} {stage.question}")
    if not with_variants:
        return
    for label, settings in stage.variants.items():
        mark = " (reference)" if label == stage.reference else ""
        print(f"  {label}{mark}: {' '.join(f'{key}={value}' for key, value in settings.items())}")


def main(argv: list[str] | None = None) -> int:
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
            show(name, with_variants=bool(args.stage))
        except ValueError as error:
            print(f"stages.py: error: {error}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())
