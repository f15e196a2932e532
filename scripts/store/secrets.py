"""Values of the environment that no file and no output may show."""

import json
from collections.abc import Mapping


def secrets_of(env: Mapping[str, str]) -> dict[str, str]:
    """Variables whose values no file and no output may show: {name: value}."""
    endings = ("_TOKEN", "_KEY", "_SECRET", "PASSWORD")
    return {n: value for n, value in env.items() if n.endswith(endings) and len(value) >= 8}


def redact(text: str, env: Mapping[str, str]) -> str:
    """text with the values of secrets, also as Python and JSON spell them, replaced by names."""
    hidden = {}
    for name, value in secrets_of(env).items():
        spellings = [value, *(spell(value)[1:-1] for spell in (repr, ascii, json.dumps))]
        hidden |= dict.fromkeys(spellings, name)
    for spelling in sorted(hidden, key=len, reverse=True):  # one may begin like another
        text = text.replace(spelling, f"[{hidden[spelling]}]")
    return text
