"""Any frozen dataclass of settings from environment variables: parsing, presets, near misses, help, hash, secrets."""

import dataclasses, difflib, hashlib, json, re
from pathlib import Path

from harness.contract import ConfigError

ROOT = Path(__file__).resolve().parents[2]  # the folder of train_gpt.py


class Settings:
    """What a dataclass of settings can do. It has SYNONYMS, UNTRAINED (names that the hash leaves out), and check()."""

    def __post_init__(self):
        self.check()

    @classmethod
    def from_env(cls, env):
        """Settings from a mapping of environment variables, over the preset, over the defaults. Raises ConfigError."""
        fields = {field.name.upper(): field for field in dataclasses.fields(cls)}
        check_env(env, fields, cls.SYNONYMS)
        preset = read_preset(env.get("PRESET") or cls.preset, fields)
        settings = preset | {name: env[name] for name in fields if env.get(name)}
        return cls(
            **{
                fields[name].name: parse(fields[name], text)
                for name, text in settings.items()
                if text
            }
        )

    def changes(self):
        """What differs from the defaults: {variable: value}."""
        return {
            name.upper(): value
            for name, value in vars(self).items()
            if value != getattr(type(self), name)
        }

    def hash(self):
        """Eight hex digits that runs share when they train the same model the same way, whatever seed and labels."""
        kept = {
            name: value
            for name, value in vars(self).items()
            if name not in {*self.UNTRAINED, "seed"}
        }
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def check_env(env, fields, synonyms):
    """Raises ConfigError for a variable that is one of ours misspelled, and for a setting that shows a secret."""
    by_letters = {name.replace("_", ""): name for name in fields}
    for name in env:
        if (ours := synonyms.get(name) or by_letters.get(name.replace("_", ""), name)) != name:
            raise ConfigError(f"{name} is no setting; the name here is {ours} (unset {name})")
    for secret, value in secrets_of(env).items():
        if holders := [name for name in fields if value in env.get(name, "")]:
            raise ConfigError(
                f"{holders[0]} holds the value of {secret}, which no record may show; take it out"
            )


def secrets_of(env):
    """Variables whose values no file and no output may show: {name: value}."""
    return {
        n: v
        for n, v in env.items()
        if n.endswith(("_TOKEN", "_KEY", "_SECRET", "PASSWORD")) and len(v) >= 8
    }


def redact(text, env):
    """text with the values of secret variables, also as Python and JSON spell them, replaced by their names."""
    hidden = {
        spelling: name
        for name, value in secrets_of(env).items()
        for spelling in (value, *(spell(value)[1:-1] for spell in (repr, ascii, json.dumps)))
    }
    for spelling in sorted(hidden, key=len, reverse=True):  # one may begin like another
        text = text.replace(spelling, f"[{hidden[spelling]}]")
    return text


def parse(field, text):
    """The value of a setting from its text. Raises ConfigError."""
    try:
        if field.type is bool:
            return {"0": False, "1": True, "false": False, "true": True}[text.lower()]
        return field.type(text) if field.type in (int, str) else float(text)
    except (ValueError, KeyError):
        wanted = {bool: "0 or 1", int: "a whole number"}.get(field.type, "a number")
        raise ConfigError(f"{field.name.upper()}={text!r}: must be {wanted}") from None


def read_preset(name, fields):
    """Settings of experiments/presets/<name>.env: {variable: text}. Raises ConfigError."""
    files = {path.stem: path for path in sorted((ROOT / "experiments" / "presets").glob("*.env"))}
    if name not in files:
        raise ConfigError(f"PRESET={name}: choose one of {', '.join(files)}")
    lines = [
        line
        for line in map(str.strip, files[name].read_text().splitlines())
        if line and line[0] != "#"
    ]
    if bad := [line for line in lines if "=" not in line or line.split("=")[0] not in fields]:
        raise ConfigError(
            f"PRESET={name}: {bad[0]!r} in {files[name]} is no NAME=value of python train_gpt.py --help"
        )
    return dict(line.split("=", 1) for line in lines) | {"PRESET": name}


def settings_table(cls, doc, source, axes):
    """The table of settings, read from the source: variable, default, choices and the comment of its line."""
    comments = dict(re.findall(r"^    (\w+): [^=]+ = .*?  # (.*)$", source, re.M))
    lines = [doc.strip(), "", "Settings (environment variables; a blank one counts as not set):"]
    for field in dataclasses.fields(cls):
        value = (
            int(field.default)
            if field.type is bool
            else "blank"
            if field.default in (None, "")
            else field.default
        )
        choices = f"[{'|'.join(axes[field.name])}] " if field.name in axes else ""
        lines.append(f"  {field.name.upper():20} {value!s:36} {choices}{comments[field.name]}")
    presets = sorted(path.stem for path in (ROOT / "experiments" / "presets").glob("*.env"))
    return "\n".join([*lines, f"Presets: {', '.join(presets)}"])


def near_misses(env, cls):
    """One sentence for every variable that is nearly one of ours."""
    ours = [field.name.upper() for field in dataclasses.fields(cls)]
    return [
        f"{name} is no setting and is ignored; did you mean {match}?"
        for name in env
        if len(name) > 4 and name not in ours
        for match in difflib.get_close_matches(name, ours, 1, 0.85)
    ]
