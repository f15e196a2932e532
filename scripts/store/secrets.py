"""Values of the environment that no file and no output may show."""

import json
import re
from collections.abc import Mapping

WORDS = """
    TOKEN KEY APIKEY SECRET SECRETS PASS PASSWORD PASSWD PASSPHRASE PWD CREDENTIAL CREDENTIALS
    WEBHOOK DSN COOKIE
""".split()
PLACES = ("FILE", "PATH", "DIR")  # the last word of a name that says where one is
IN_URL = re.compile(r"://[^/@\s:]*:([^/@\s]+)@")


def secrets_of(env: Mapping[str, str]) -> dict[str, str]:
    """Variables whose values no file and no output may show: {name: value}.

    They are known by a word of their name, in any case, or by a password within a URL.
    """
    secrets = {}
    for name, value in env.items():
        words = name.upper().split("_")
        known = not {*WORDS}.isdisjoint(words) or words[-1].endswith(("PASSWORD", "TOKEN"))
        is_place = words[-1] in PLACES or name in ("PWD", "OLDPWD")
        if known and not is_place and len(value) >= 8:
            secrets[name] = value
        for password in IN_URL.findall(value):
            secrets.setdefault(name, password)
    return secrets


def redact(text: str, env: Mapping[str, str]) -> str:
    """text with the values of secrets, also as Python and JSON spell them, replaced by names.

    A password within any URL goes, too.
    """
    hidden = {}
    for name, value in secrets_of(env).items():
        spellings = [value, *(spell(value)[1:-1] for spell in (repr, ascii, json.dumps))]
        hidden |= dict.fromkeys(spellings, name)
    for spelling in sorted(hidden, key=len, reverse=True):  # one may begin like another
        text = text.replace(spelling, f"[{hidden[spelling]}]")
    return IN_URL.sub("://[hidden]@", text)
