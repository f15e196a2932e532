"""Lists the stages of experiments/stages/, or one of them with its variants; other scripts read and
write stages through it.

    python scripts/stages.py
    python scripts/stages.py stage1_cpu

A stage is a question put to variants and seeds. Its file, experiments/stages/<name>.toml, has

    extends = "stage1"              # a stage from which everything comes that is not said here
    question = "…"
    reference = "none"              # the variant that all others are compared with; or instead
    against = "none"                # each with this one at the same point of the grid, or
    against = {ATTNGATE = "none"}   # each with the one that has this, and else the same settings
    seeds = [1, 2, 3]               # of every variant
    max_seeds = 8                   # so many a variant may have, where the gate asks for more (8)
    base = {LR = 0.0036}            # settings of every run; "" leaves one to the preset
    variants.none = {ATTNGATE = "none"}  # settings of a variant, by its label
    grid.LR = [0.0036, 0.00468]     # each variant with each value; the label says which
    measure = "pass_at_1"           # column of rows that variants are compared in (final_loss)
    axes = ["ATTNGATE", "LR"]       # columns of its table; without: in what variants differ
    columns = ["attn_gate", "seeds"]  # with which its table begins; all others stand behind
    not_run = "…"                   # why it cannot answer at its size; told where it is listed, run
    gate.better = 0.05              # numbers of stage_gate.py that differ from its own
    variants.old = {CODE = "main"}  # runs what git has there: a ref, or a patch, "idea.patch", to
                                    # the working tree, which is what runs without it
    program = "scripts/mine.py"     # for train_gpt.py; names in small letters are its options:
                                    # group_size = 4 is --group-size 4, fast = true is --fast
    next = [{name = "gates_5k", NUM_ITERATIONS = 5000}]   # stages after it, of what it promotes
    equal_time.seconds = 60         # of training, for which each variant has as many steps as
    schedules.none = {NUM_ITERATIONS = 212}  # it says here, by label, over all other settings

A step of `next` may say `most = 2`, how many of the promoted go on, the best first, and
`around = {"20 experts" = {NUM_EXPERTS = 20}}`, variants of the best that go on beside them; where
nothing is promoted, the reference counts as the best. `equal_time` and `schedules` are written by
run_stage.py --seconds; variants are then compared at equal shares of the time.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import itertools
import json
import math
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from store.files import write_whole

FOLDER = Path("experiments/stages")
KEYS = {
    "extends": str,
    "question": str,
    "reference": str,
    "against": (dict, str),
    "program": str,
    "measure": str,
    "seeds": list,
    "max_seeds": int,
    "base": dict,
    "variants": dict,
    "grid": dict,
    "axes": list,
    "columns": list,
    "not_run": str,
    "gate": dict,
    "next": list,
    "equal_time": dict,
    "schedules": dict,
}
# what a stage says of these adds to what it extends; the rest is replaced
MERGED = ("base", "gate")
# not a stage's to set
RESERVED = {"SEED", "RUN_ID", "STAGE", "VARIANT", "RESUME", "DRY_RUN", "LOG_DIR", "RESULTS_CSV"}
TRAINER = "train_gpt.py"
CODE = "CODE"  # which code runs a variant, see code_variants.py; no setting of the trainer
THE_TREE = ("", ".", "tree")  # names of the working tree, the code that is here
MOST_SEEDS = 50
FINAL_LOSS = "final_loss"
# columns of tables by which runs are told apart, or that follow from what is measured
NO_MEASURES = "variant seed seeds run_id stage against sd difference low high pairs p".split()


class Measure(NamedTuple):
    """A column of rows that variants can be compared in."""

    words: str
    unit: str
    is_higher_better: bool | None  # None where that is not known


MEASURES = {
    FINAL_LOSS: Measure("final validation loss", "nats per token", False),
    "ema_val_loss": Measure("validation loss of averaged weights", "nats per token", False),
    "pass_at_1": Measure("greedy pass@1, held out", "fraction of prompts", True),
}


@dataclass(frozen=True)
class Stage:
    """A stage as its file describes it, with every setting as the text of an environment variable
    and every option of its program, in small letters, as the text on a command line."""

    name: str
    question: str
    references: dict[str, str]  # {label: what it is compared with}, a reference with itself
    seeds: tuple[int, ...]
    max_seeds: int
    variants: dict[str, dict[str, str]]  # by label: all settings of its runs, and options
    axes: tuple[str, ...]  # settings that tell the variants apart, in lower case
    gate: dict
    next: tuple[dict, ...]
    program: str = TRAINER
    seconds: float = 0.0  # of training that each variant's steps are to take; 0: as the file says
    measure: str = FINAL_LOSS  # the column of rows that variants are compared in
    not_run: str = ""  # why it cannot answer at its size
    columns: tuple[str, ...] = ()  # that its table begins with, as it calls them

    @property
    def compares_losses(self) -> bool:
        return self.measure == FINAL_LOSS

    @property
    def what_is_measured(self) -> Measure:
        """Words, unit and direction of its measure, as far as they are known."""
        return MEASURES.get(self.measure, Measure(self.measure, "", None))

    def code_of(self, label: str) -> str:
        """The code that a variant names; "" for the working tree."""
        name = self.variants[label].get(CODE, "")
        return "" if name in THE_TREE else name

    @property
    def names_code(self) -> bool:
        """Whether any variant runs other code than the working tree's."""
        return any(map(self.code_of, self.variants))

    def is_reference(self, label: str) -> bool:
        return self.references[label] == label

    def references_first(self) -> list[str]:
        """The labels of variants, references first."""
        return sorted(self.variants, key=lambda label: not self.is_reference(label))


def stage_names() -> list[str]:
    """The stages that have a file, by name."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def text_of(value: object) -> str:
    """A value of a stage file as an environment variable has it: 1 and 0 for true and false."""
    return str(int(value) if isinstance(value, bool) else value)


def setting_text(name: str, value: object) -> str:
    """A setting as an environment variable has it; an option, in small letters, may be a switch."""
    return text_of(value) if name.isupper() else str(value)


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
        own = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    for key, value in own.items():
        if key not in KEYS:
            raise ValueError(f"{path}: {key} is no key of a stage; choose from {', '.join(KEYS)}")
        if not isinstance(value, KEYS[key]):
            kind = getattr(KEYS[key], "__name__", "dict or str")
            raise ValueError(f"{path}: {key} = {value!r} must be of type {kind}")

    extended = read(own["extends"], (*readers, name)) if "extends" in own else {}
    if {"reference", "against"} & set(own):  # one of them, and that takes the other's place
        extended = {key: extended[key] for key in extended if key not in ("reference", "against")}
    merged = {key: extended.get(key, {}) | own.get(key, {}) for key in MERGED}
    return extended | own | merged


def check_tables(tables: dict, path: Path) -> None:
    """Raises ValueError where something is missing, or a table holds what it cannot."""
    for key in ("question", "seeds", "variants"):
        if not tables.get(key):
            raise ValueError(f"{path} has no {key}; python scripts/stages.py --help shows a file")
    if bool(tables.get("reference")) == bool(tables.get("against")):
        raise ValueError(
            f'{path} needs one of reference = "LABEL", against = "LABEL" and against = '
            "{SETTING = value}"
        )
    for key, kind in (("variants", dict), ("grid", list)):
        for name, value in tables.get(key, {}).items():
            if not isinstance(value, kind):
                raise ValueError(
                    f"{path}: {key}.{name} = {value!r} must be of type {kind.__name__}"
                )
    for step in tables.get("next", ()):
        check_step(step, tables.get("program", TRAINER), path)
    measure = tables.get("measure", FINAL_LOSS)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", measure):
        raise ValueError(
            f"{path}: measure = {measure!r} must be a column of rows, in small letters, digits and "
            "_, as pass_at_1 is"
        )
    columns = tables.get("columns", [])
    are_names = all(isinstance(name, str) for name in columns)
    if not are_names or len(set(columns)) < len(columns):
        raise ValueError(f"{path}: columns = {columns} must be different names")
    seeds, most = tables["seeds"], tables.get("max_seeds", 1)
    are_numbers = all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)
    if not are_numbers or len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: seeds = {seeds} must be different whole numbers")
    if type(most) is not int or not 1 <= most <= MOST_SEEDS:
        raise ValueError(f"{path}: max_seeds = {most} must be a whole number up to {MOST_SEEDS}")
    for name, values in tables.get("grid", {}).items():
        if not values or len({str(value) for value in values}) < len(values):
            raise ValueError(f"{path}: grid.{name} = {values} must have different values")


def check_name(name: object, where: str) -> None:
    """Raises ValueError where a stage cannot be called so."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,60}", name):
        raise ValueError(f"{where} {name!r}: must be letters, digits, _, and within . -")


def check_step(step: object, program: str, path: Path) -> None:
    """Raises ValueError where an entry of `next` is none."""
    if not isinstance(step, dict) or not step.get("name"):
        raise ValueError(f"{path}: every stage in next needs a name")
    check_name(step["name"], f"{path}: name of next")
    most, around = step.get("most", 1), step.get("around", {})
    if not isinstance(most, int) or most < 1:
        raise ValueError(f"{path}: most = {most!r} of next must be a whole number, 1 or more")
    if not isinstance(around, dict) or not all(isinstance(own, dict) for own in around.values()):
        raise ValueError(f"{path}: around of next must be tables of settings by label")
    for name in step:
        is_setting = name.isupper() or (program != TRAINER and name.islower())
        if name not in ("name", "most", "around") and not is_setting:
            raise ValueError(
                f"{path}: {name} of next is no key; choose from name, most, around, or a setting"
            )


def points_of(tables: dict) -> list[dict]:
    """The points of the grid, {setting: value} each; without a grid one that sets nothing."""
    grid = tables.get("grid", {})
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def label_at(label: str, point: dict) -> str:
    """The label of a variant at a point of the grid."""
    return " ".join([label, *(f"{setting}={text_of(value)}" for setting, value in point.items())])


def variants_of(tables: dict) -> dict[str, dict[str, str]]:
    """{label: settings} of every variant with every point of the grid."""
    variants = {}
    for label, own in tables["variants"].items():
        twice = own.keys() & tables.get("grid", {}).keys()
        if twice:
            raise ValueError(
                f"variants.{label} and grid both set {min(twice)}; take it out of one of them"
            )
        for point in points_of(tables):
            settings = tables["base"] | own | point
            variants[label_at(label, point)] = {
                name: setting_text(name, value) for name, value in settings.items()
            }
    return variants


def check_variants(variants: dict[str, dict[str, str]], program: str, path: Path) -> None:
    """Raises ValueError where a variant sets what it cannot."""
    for setting in {setting for settings in variants.values() for setting in settings}:
        is_option = setting.islower() and program != TRAINER
        if not (setting.isupper() or is_option) or setting in RESERVED:
            raise ValueError(
                f"{path}: {setting} is nothing a variant can set; "
                "python train_gpt.py --help says what is"
            )


def references_of(
    variants: dict[str, dict[str, str]], named: list[str], tables: dict, path: Path
) -> dict[str, str]:
    """{label: the label that it is compared with}; `named` settings tell variants apart. Raises
    ValueError."""
    if "reference" in tables:
        reference = tables["reference"]
        if reference not in variants:
            raise ValueError(
                f"{path}: reference = {reference!r}: choose one of {', '.join(map(repr, variants))}"
            )
        return dict.fromkeys(variants, reference)

    if isinstance(tables["against"], str):
        if tables["against"] not in tables["variants"]:
            labels = ", ".join(map(repr, tables["variants"]))
            raise ValueError(f"{path}: against = {tables['against']!r}: choose one of {labels}")
        return {
            label_at(label, point): label_at(tables["against"], point)
            for label in tables["variants"]
            for point in points_of(tables)
        }

    against = {setting: text_of(value) for setting, value in tables["against"].items()}
    references = {}
    for label, settings in variants.items():
        unsaid = [setting for setting in against if setting not in settings]
        if unsaid:
            raise ValueError(
                f"{path}: against {unsaid[0]}: variant {label!r} does not set it, as every variant "
                'has to then; a label goes too, against = "LABEL"'
            )
        wanted = settings | against
        others = [
            other
            for other in variants
            if all(variants[other].get(setting) == wanted.get(setting) for setting in named)
        ]
        if len(others) != 1:
            raise ValueError(
                f"{path}: against {tables['against']}: {len(others)} variants are so and otherwise "
                f"as {label!r}; one has to be"
            )
        references[label] = others[0]
    return references


def seconds_of(tables: dict, path: Path) -> float:
    """The seconds of training of a stage at equal time; 0 for any other. Raises ValueError."""
    if "equal_time" not in tables:
        return 0.0
    seconds = tables["equal_time"].get("seconds")
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not 0 < seconds < math.inf:
        raise ValueError(f"{path}: equal_time.seconds = {seconds!r} must be a number above 0")
    return float(seconds)


def scheduled(
    variants: dict[str, dict[str, str]], tables: dict, path: Path
) -> dict[str, dict[str, str]]:
    """The variants with their own schedules over all other settings. Raises ValueError."""
    schedules = tables.get("schedules", {})
    is_timed = "equal_time" in tables
    if (is_timed or schedules) and (not is_timed or schedules.keys() != variants.keys()):
        raise ValueError(
            f"{path}: schedules goes with equal_time, and has to name each variant, "
            f"{', '.join(map(repr, variants))}; run_stage.py --seconds writes both"
        )
    changed = {}
    for label, settings in variants.items():
        own = schedules.get(label, {})
        if not isinstance(own, dict):
            raise ValueError(f"{path}: schedules.{label} = {own!r} must be of type dict")
        changed[label] = settings | {name: text_of(value) for name, value in own.items()}
    return changed


def load_stage(name: str) -> Stage:
    """Reads experiments/stages/<name>.toml. Raises ValueError with what is wrong in the file and
    what it may say."""
    return stage_of(name, read(name))


def stage_of(name: str, tables: dict) -> Stage:
    """The stage that the tables of a file are. Raises ValueError."""
    path = FOLDER / f"{name}.toml"
    check_tables(tables, path)
    variants = variants_of(tables)
    program = tables.get("program", TRAINER)
    if tables.get("measure") in NO_MEASURES:
        raise ValueError(
            f"{path}: measure = {tables['measure']!r}: is no figure of a run; choose one of "
            f"{', '.join([FINAL_LOSS, *MEASURES])}, or another column of results that has numbers"
        )
    with_schedules = scheduled(variants, tables, path)
    check_variants(with_schedules, program, path)

    settings_named = [*tables["variants"].values(), tables.get("grid", {})]
    named = list(dict.fromkeys(setting for own in settings_named for setting in own))
    axes = tuple(
        setting.lower()
        for setting in tables.get("axes", named)
        if len({settings.get(setting) for settings in variants.values()}) > 1
    )
    seeds = tuple(tables["seeds"])
    return Stage(
        name=name,
        question=tables["question"],
        references=references_of(variants, named, tables, path),
        seeds=seeds,
        max_seeds=max(tables.get("max_seeds", 8), len(seeds)),
        variants=with_schedules,
        axes=axes,
        gate=tables["gate"],
        next=tuple(tables.get("next", ())),
        program=program,
        seconds=seconds_of(tables, path),
        measure=tables.get("measure", FINAL_LOSS),
        columns=tuple(tables.get("columns", ())),
        not_run=tables.get("not_run", ""),
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
            blocks += [(f"[variants.{toml_value(label)}]", own) for label, own in value.items()]
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


def check_free(name: str, tables: dict) -> None:
    """Raises FileExistsError where experiments/stages/<name>.toml is there and says something
    else."""
    path = FOLDER / f"{name}.toml"
    if path.exists() and path.read_text("utf-8") != toml_text(tables):
        raise FileExistsError(f"{path} is there and says something else")


def write_stage(name: str, tables: dict) -> None:
    """Writes experiments/stages/<name>.toml, the inverse of `read`. Raises FileExistsError."""
    check_free(name, tables)
    write_whole(FOLDER / f"{name}.toml", toml_text(tables))


def show(name: str, with_variants: bool) -> None:
    """Prints a stage in a line, and its variants in a line each. Raises ValueError."""
    stage = load_stage(name)
    size = f"{len(stage.variants)} variants x {len(stage.seeds)} seeds"
    print(f"{stage.name:24} {size:24} {stage.question}")
    if stage.not_run:
        print(f"{'':49} Not run: {stage.not_run}")
    if not with_variants:
        return
    for label, settings in stage.variants.items():
        reference = stage.references[label]
        mark = " (reference)" if label == reference else f" (against {reference})"
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
