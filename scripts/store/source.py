"""Whether two texts of a program are the same experiment. Needs no torch."""

import functools
import hashlib
import io
import keyword
import re
import tokenize
from collections.abc import Callable
from pathlib import Path


def package_text(name: str) -> str:
    """The text of all files of a package in scripts/, "" where it is not there."""
    folder = Path(__file__).parents[1] / name
    return "".join(path.read_text("utf-8") for path in sorted(folder.glob("*.py")))


HARNESS = package_text("store") + package_text("harness")
OPS = package_text("ops")  # formulas, which a program's results depend on as on its own text
KNOWN = ("harness", "store", "ops")  # packages that are always there
PLACES = (Path(__file__).parents[1], Path(__file__).parents[2])  # scripts/, and what it is in
IMPORT = re.compile(r"^[ \t]*(?:from (\w+)|import (.+))", re.M)


def read_module(name: str) -> str:
    """The text of a module or package that stands in scripts/ or beside it; "" for any other."""
    for folder in PLACES:
        if (folder / f"{name}.py").is_file():
            return (folder / f"{name}.py").read_text("utf-8")
        if (folder / name / "__init__.py").is_file():
            return "".join(path.read_text("utf-8") for path in sorted(folder.glob(f"{name}/*.py")))
    return ""


def modules_text(source: str, read: Callable[[str], str] = read_module) -> str:
    """The text of what a program imports of the project, and what that imports, but for KNOWN and
    what is in its text already."""
    texts: dict[str, str] = {}
    waiting = [source]
    while waiting:
        for one, several in IMPORT.findall(waiting.pop()):
            for words in several.split(",") if several else [one]:
                name = re.match(r"\w*", words.strip())[0]
                if name and name not in KNOWN and name not in texts:
                    texts[name] = read(name)
                    waiting.append(texts[name])
    return "".join(texts[name] for name in sorted(texts) if texts[name] not in source)


def code_tokens(source: str) -> list[str]:
    """The words of a Python text that decide what it does, the same under every Python.

    Without comments, docstrings and other strings that stand alone, blank lines, the layout within
    brackets and a comma that only ends a list there. Blocks are kept as marks; an f-string is one
    word.
    """
    lines = source.splitlines(keepends=True)
    words, statement = [], []
    brackets = []  # that are open: how many commas make something of them, how many there are
    string_start, string_depth = (0, 0), 0
    marks = {tokenize.INDENT: "<indent>", tokenize.DEDENT: "<dedent>"}

    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind, text = tokenize.tok_name[token.type], token.string
        if kind in ("FSTRING_START", "TSTRING_START"):  # Python 3.12 and later take them apart
            string_start = token.start if string_depth == 0 else string_start
            string_depth += 1
            continue
        if kind in ("FSTRING_END", "TSTRING_END"):
            string_depth -= 1
            text = text_between(lines, string_start, token.end)
        if string_depth or kind in ("COMMENT", "NL", "ENCODING", "ENDMARKER"):
            continue
        if token.type in marks:
            words.append(marks[token.type])
        elif kind == "NEWLINE":
            if any(word[-1] not in "\"'" for word in statement):  # else a docstring
                words += [*statement, "<newline>"]
            statement = []
        else:
            if text in tuple(")]}"):
                commas_needed, commas = brackets.pop()
                if statement[-1] == "," and commas > commas_needed:
                    statement.pop()
            elif text == "," and brackets:
                brackets[-1][1] += 1
            elif text in tuple("([{"):
                brackets.append([commas_that_count(text, statement), 0])
            statement.append(text)
    return words


def commas_that_count(bracket: str, before: list[str]) -> int:
    """How many commas a bracket may need to be what it is: one makes a tuple of (a,) and x[a,]."""
    last = before[-1] if before else ""
    after_operand = last.isidentifier() and not keyword.iskeyword(last)
    after_operand = after_operand or last in (")", "]")
    is_tuple = (bracket == "(" and not after_operand) or (bracket == "[" and after_operand)
    return 1 if is_tuple else 0


def text_between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The text from (line, column) to (line, column), lines counted from 1."""
    chosen = lines[start[0] - 1 : end[0]]
    chosen[-1] = chosen[-1][: end[1]]
    return "".join(chosen)[start[1] :]


def source_hash(source: str) -> str:
    """text_hash of a program, scripts/ops/ and what else it imports of the project, which decide
    together whether two runs are the same experiment."""
    return text_hash(source + OPS + modules_text(source))


def lineage(source: str, dirty: int, old: dict, step: int, steps: int) -> dict:
    """What the row of a run says of its code that is at a step, -1 for one that begins: the
    source_sha of this source; for one that goes on that of its old summary, too, joined by +, where
    they differ, so that it is compared with neither; the old alone where nothing is left to train.
    """
    now = source_hash(source)
    known = {name: old.get(name) for name in ("git", "dirty", "source_sha")}
    if step < 0 or not known["source_sha"]:
        return {"source_sha": now}
    if step >= steps:
        return known
    shas = dict.fromkeys([*known["source_sha"].split("+"), now])
    return {"source_sha": "+".join(shas), "dirty": known["dirty"] or dirty}


@functools.cache
def text_hash(source: str) -> str:
    """Twelve hex digits of a Python text without comments, docstrings and layout."""
    return hashlib.sha256("\0".join(code_tokens(source)).encode()).hexdigest()[:12]
