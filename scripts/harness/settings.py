"""Any frozen dataclass of settings from environment variables: parsing, presets, help, secrets."""

import dataclasses
import difflib
import hashlib
import json
import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from store.contract import ConfigError
from store.secrets import secrets_of

ROOT = Path(__file__).resolve().parents[2]  # the folder that scripts/harness/ is in


class Settings:
    """What a dataclass of settings can do. A subclass says by these attributes what it knows."""

    SYNONYMS: ClassVar[dict[str, str]] = {}  # names that others use: the name here
    LISTS: ClassVar[tuple[str, ...]] = ()  # fields that hold several choices, separated by commas
    BOUNDS: ClassVar[dict[str, tuple[float, float]]] = {}  # "field field …": (lowest, highest)
    LABELS: ClassVar[tuple[str, ...]] = ()  # fields that only name and place what a run leaves
    NOT_HASHED: ClassVar[tuple[str, ...]] = ()  # fields that say nothing of what is trained and how
    SCHEDULED: ClassVar[tuple[str, ...]] = ()  # fields that matter only through `scheduled`
    AUTO: ClassVar[dict[str, str]] = {}  # fields that may say auto: the field that they follow
    NEEDS: ClassVar[dict[str, str]] = {}  # see `holds`: the fields without effect where it does not

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        """The values of every field that has a list of them."""
        return {}

    def check(self) -> None:
        """Raises ConfigError for values that have no meaning together."""

    def scheduled(self, step: int) -> tuple[float, ...]:
        """What the schedules say of the step that follows `step` steps."""
        return ()

    def resolved(self) -> dict[str, Any]:
        """The values of fields that say auto, as far as others give them."""
        return {}

    def holds(self, need: str) -> bool:
        """Whether FIELD=value is so, or FIELD!=value; of a list one value is enough."""
        name, _, wanted = need.partition("=")
        _, _, text = self.spelled(name.rstrip("!").lower()).partition("=")
        return (wanted in text.lower().split(",")) != name.endswith("!")

    def idle(self) -> dict[str, str]:
        """The fields that have no effect, and what they would need for one."""
        idle = {}
        for need, names in self.NEEDS.items():
            if not self.holds(need):
                for name in names.split():
                    idle.setdefault(name, need)
        return idle

    def effective(self) -> dict[str, Any]:
        """The values of all fields that have an effect on what is trained."""
        without = {*self.NOT_HASHED, *self.idle()}
        values = vars(self) | self.resolved()
        return {name: value for name, value in values.items() if name not in without}

    def resumable(self) -> set[str]:
        """Fields that a run may change when it goes on, since they do not change what it learns."""
        return set(self.NOT_HASHED)

    def advice(self, status: str) -> str:
        """What to do about a run that ended as `diverged` or `oom`, after a semicolon."""
        return ""

    def __post_init__(self) -> None:
        self.check_choices()
        self.check_bounds()
        self.check()

    def check_choices(self) -> None:
        for name, choices in self.choices().items():
            text = getattr(self, name)
            for value in text.split(",") if name in self.LISTS else [text]:
                if value not in choices:
                    raise ConfigError(f"{name.upper()}={value}: choose one of {', '.join(choices)}")

    def check_bounds(self) -> None:
        for names, (low, high) in self.BOUNDS.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not low <= value <= high:
                    raise ConfigError(f"{self.spelled(name)}: must lie between {low} and {high}")

    def spelled(self, name: str) -> str:
        """A field with its value as a user gives it."""
        value = getattr(self, name)
        return f"{name.upper()}={int(value) if isinstance(value, bool) else value}"

    def require(self, sound: Any, name: str, needed: str) -> None:
        """Raises ConfigError that the field `name` needs something, unless that is so."""
        if not sound:
            raise ConfigError(f"{repr(self.spelled(name))[1:-1]} needs {needed}")

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """Settings from variables, over the preset, over the defaults. Raises ConfigError."""
        fields = [*map(str.upper, cls.__dataclass_fields__)]
        check_names(env, fields, cls.SYNONYMS)
        check_secrets(env, fields)
        preset = read_preset(env.get("PRESET") or cls.preset, fields, cls.preset)
        texts = preset | {name: env[name] for name in fields if env.get(name)}
        values = {
            name.lower(): cls.parse(name.lower(), texts[name]) for name in texts if texts[name]
        }
        return cls(**values)

    @classmethod
    def parse(cls, name: str, text: str) -> Any:
        """The value of a field from its text. Raises ConfigError."""
        kind = cls.__dataclass_fields__[name].type
        is_auto, may_be_none = name in cls.AUTO, kind not in (int, float, str, bool)
        if text == "auto" and is_auto:
            return None if may_be_none else kind()
        if text == "none" and may_be_none and not is_auto:
            return None
        try:
            if kind is bool:
                return {"0": False, "1": True, "false": False, "true": True}[text.lower()]
            return kind(text) if kind in (int, str) else float(text)
        except (ValueError, KeyError):
            wanted = {bool: "0 or 1", int: "a whole number"}.get(kind, "a number")
            wanted += " or auto" if is_auto else ""
            raise ConfigError(f"{name.upper()}={text!r}: must be {wanted}") from None

    def changes(self) -> dict[str, Any]:
        """What differs from the defaults: {variable: value}."""
        return {
            name.upper(): value
            for name, value in vars(self).items()
            if value != getattr(type(self), name)
        }

    def changes_text(self) -> str:
        """What differs from the defaults, labels aside, as a shell reads it."""
        words = []
        for name, value in self.changes().items():
            if name.lower() not in self.LABELS:
                text = str(int(value)) if isinstance(value, bool) else str(value)
                words.append(f"{name}={shlex.quote(text)}")
        return " ".join(words)

    def hash(self, options: Mapping[str, Any] = {}) -> str:
        """Eight hex digits, shared by runs that train the same model the same way, on any seed.

        `options` are those of a program that has its own beside the settings.
        """
        left_out = {*self.NOT_HASHED, "seed"}
        hashed = {name: value for name, value in vars(self).items() if name not in left_out}
        hashed |= options
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:8]


def check_names(env: Mapping[str, str], fields: Collection[str], synonyms: dict[str, str]) -> None:
    """Raises ConfigError for a variable that is, or nearly is, one of ours under another name.

    ALLOW_UNKNOWN=1 lets it pass.
    """
    if env.get("ALLOW_UNKNOWN", "0") not in ("", "0"):
        return
    by_letters = {name.replace("_", ""): name for name in fields}
    for name in env:
        capitals = name.upper()
        ours = synonyms.get(capitals) or by_letters.get(capitals.replace("_", ""))
        if not ours and len(name) > 4:
            ours = "".join(difflib.get_close_matches(capitals, fields, 1, 0.85))
        if ours and ours != name:
            raise ConfigError(
                f"{name} is no setting; the name here is {ours} (unset {name}, or set "
                "ALLOW_UNKNOWN=1)"
            )


def check_secrets(env: Mapping[str, str], fields: Collection[str]) -> None:
    """Raises ConfigError for a setting that would show a secret in the records."""
    for secret, value in secrets_of(env).items():
        for name in fields:
            if value in env.get(name, ""):
                raise ConfigError(
                    f"{name} holds the value of {secret}, which no record may show; take it out"
                )


def preset_files() -> dict[str, Path]:
    """The presets that there are: {name: file}."""
    return {path.stem: path for path in sorted((ROOT / "experiments" / "presets").glob("*.env"))}


def read_preset(name: str, fields: Collection[str] | None, default: str) -> dict[str, str]:
    """Settings of experiments/presets/<name>.env: {variable: text}. Raises ConfigError.

    The default preset is what the fields say: it needs no file. Where there are `fields`, a file
    may set no other.
    """
    files = preset_files()
    if name == default and name not in files:
        return {}
    if name not in files:
        raise ConfigError(f"PRESET={name}: choose one of {', '.join(files)}")

    settings = {"PRESET": name}
    for line in map(str.strip, files[name].read_text("utf-8").splitlines()):
        if not line or line.startswith("#"):
            continue
        variable, equals, value = line.partition("=")
        if not equals or (fields and variable not in fields):
            raise ConfigError(
                f"PRESET={name}: {line!r} in {files[name]} is no NAME=value of "
                "python train_gpt.py --help"
            )
        settings[variable] = value
    return settings


def settings_table(cls: type[Settings], source: str) -> str:
    """A line for each setting, read from the source: variable, default, choices, comment."""
    comments = dict(re.findall(r"^    (\w+): [^=\n]+ = .*?  # (.*)$", source, re.M))
    axes = cls.choices()
    lines = []
    for field in dataclasses.fields(cls):
        default = "blank" if field.default == "" else field.default
        if field.name in cls.AUTO and not default:
            default = "auto"
        elif default is None:
            default = "none"
        elif field.type is bool:
            default = int(default)
        choices = f"[{'|'.join(axes[field.name])}] " if field.name in axes else ""
        lines.append(f"  {field.name.upper():20} {default!s:36} {choices}{comments[field.name]}")
    return "\n".join([*lines, f"Presets: {', '.join(preset_files())}"])
