"""Damages settings, shards and tables at random, and says what does not end in a sentence.

    python scripts/fuzz.py --count 10000 --seed 0

Of each kind so many cases: a setting at, beyond or far from its bounds is planned in a dry run; a
shard that its index.json knows is changed somewhere; a table of results is changed and given a row.
A case is a finding where it raises something else than ConfigError or DataError, takes over 5 s or
1 GB of this process, says more than a line of 600 characters, trains on damaged data, loses a row,
or leaves a file elsewhere than in LOG_DIR and beside the table.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import contextlib
import dataclasses
import io
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from harness.meter import peak_memory
from harness.ranks import Ranks
from store.contract import ConfigError, DataError
from store.files import sha256sum
from store.tables import read_table, update_results
import train_gpt
from train_gpt import Config

CPU = torch.device("cpu")
LONGEST_SENTENCE = 600  # characters
SLOWEST = 5.0  # seconds
LARGEST = 1e9 / 2**30  # GiB of this process
SETTINGS = dict(
    n_layer=2, n_head=2, n_embd=32, sequence_length=16, batch_size=4, device_batch_size=2,
    vocab_size=64, num_iterations=2, warmdown_iters=1, val_tokens=64, device="cpu", compile="0",
)  # fmt: skip
ODD = """0 1 -1 2 3 7 1e-30 1e30 1e400 nan inf -0 0x10 1_000 none auto NONE true ٣ é a,b , ; ../x /
    . ~ 2147483647 2147483648 65536 65537 99999999999999999999""".split()


def environment(folder: Path) -> dict[str, str]:
    """Settings of a tiny model on the shards of a folder."""
    env = {name.upper(): str(value) for name, value in SETTINGS.items()}
    env |= {"INPUT_BIN": f"{folder}/x_train_*.bin", "INPUT_VAL_BIN": f"{folder}/x_val_*.bin"}
    return env | {"LOG_DIR": f"{folder}/logs", "RESULTS_CSV": f"{folder}/results.csv"}


def write_shards(folder: Path) -> None:
    """Two training shards and one for validation, with an index.json that has their hashes."""
    known = []
    for name in ("x_train_000001", "x_train_000002", "x_val_000000"):
        path = folder / f"{name}.bin"
        tokens = np.random.default_rng(len(known)).integers(0, 64, 200, dtype=np.uint16)
        header = np.zeros(256, dtype="<i4")
        header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(tokens)
        path.write_bytes(header.tobytes() + tokens.tobytes())
        known.append({"name": path.name, "sha256": sha256sum(path)[:64]})
    (folder / "index.json").write_text(json.dumps({"shards": known}), "utf-8")


def changed(content: bytes, draw: random.Random) -> bytes:
    """Content with a byte changed, bytes cut out, or bytes added."""
    at = draw.randrange(len(content))
    size = draw.choice((1, 1, 2, 50))
    middle = draw.choice((b"", draw.randbytes(size), b'"', b"\n", b"\0", b"\xff"))
    return content[:at] + middle + content[at + draw.choice((0, size)) :]


def settings_case(folder: Path, draw: random.Random) -> str:
    """A dry run with a few settings drawn at random."""
    env = environment(folder) | {"DRY_RUN": "1"}
    fields = [field.name for field in dataclasses.fields(Config) if field.name != "dry_run"]
    for name in draw.sample(fields, draw.randint(1, 3)):
        values = [*ODD, "x" * 5000, *Config.choices().get(name, ())]
        for names, bounds in Config.BOUNDS.items():
            if name in names.split():
                values += [str(type(getattr(Config, name) or 0.0)(bound)) for bound in bounds] * 10
        env[name.upper()] = draw.choice(values)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = train_gpt.main([], env)
    said = err.getvalue()
    usual = environment(folder)
    told = {name: env[name][:60] for name in env if env[name] != usual.get(name)}
    if code not in (0, 2, 3) or "Traceback" in said:
        return f"exit code {code}: {said[-300:]}; {told}"
    if any(len(line) > LONGEST_SENTENCE for line in said.splitlines()):
        return f"a line of {max(map(len, said.splitlines()))} characters; {told}"
    if code and len(said.splitlines()) != 1:
        return f"{len(said.splitlines())} lines: {said[:300]!r}; {told}"
    return ""


def shards_case(folder: Path, draw: random.Random) -> str:
    """A run's checks of its data, one file of which was changed."""
    write_shards(folder)
    path = draw.choice(sorted([*folder.glob("*.bin"), folder / "index.json"]))
    before = path.read_bytes()
    after = changed(before, draw)
    path.write_bytes(after)
    cfg = train_gpt.resolve(Config.from_env(environment(folder)))
    try:
        train, val = train_gpt.preflight(cfg, Ranks())
        train_gpt.data_identity(cfg, train, val)
    except DataError as error:
        return sentence_problem(error)
    if path.suffix == ".bin" and after != before:
        return f"{path.name}: trained although changed"
    return ""


def tables_case(folder: Path, draw: random.Random) -> str:
    """A table that was changed in one place takes a row and keeps the rows elsewhere."""
    path = folder / "table.csv"
    for old in folder.glob("table.csv*"):
        old.unlink()
    notes = ("", "a,b", 'x"y', "é", "two\nlines")
    rows = [{"run_id": f"run{i}", "note": draw.choice(notes), "loss": i} for i in range(6)]
    update_results(path, rows)
    after = changed(path.read_bytes(), draw)
    path.write_bytes(after)
    text, unread = "", [after]
    with contextlib.suppress(ValueError):
        text, unread = read_table(path)
    read = text.encode() + b"".join(unread)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            update_results(path, [{"run_id": "new", "note": "fine"}])
    except ConfigError as error:
        return sentence_problem(error)
    aside = path.with_name("table.csv.unread")
    kept = path.read_bytes() + (aside.read_bytes() if aside.exists() else b"")
    names = [f"run{i}".encode() for i in range(6)]
    lost = [name for name in names if name in after and not (name in kept and name in read)]
    if lost or b"\nnew," not in kept:
        return f"rows {lost} are lost: {kept!r}"
    return ""


def sentence_problem(error: Exception) -> str:
    """What is wrong with the words of an error; "" where they are one short line."""
    text = str(error)
    if len(text) > LONGEST_SENTENCE or len(text.splitlines()) != 1:
        return f"{len(text)} characters in {len(text.splitlines())} lines: {text[:200]!r}"
    return ""


CASES = {"settings": settings_case, "shards": shards_case, "tables": tables_case}


def findings(
    kind: str, case: Callable[[Path, random.Random], str], count: int, seed: int
) -> Iterator[str]:
    """What was found in so many cases of a kind, each with the seed that draws it again."""
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as here:
        folder = Path(name)
        write_shards(folder)
        places = {*folder.iterdir()}
        for number in range(seed, seed + count):
            began, before = time.process_time(), peak_memory(CPU) or 0
            try:
                with contextlib.chdir(here):
                    problem = case(folder, random.Random(number))
            except Exception:
                problem = traceback.format_exc()[-600:]
            seconds = time.process_time() - began
            if not problem and seconds > SLOWEST:
                problem = f"{seconds:.1f} s"
            peak = peak_memory(CPU) or 0
            if not problem and peak > max(before, LARGEST):  # which only grows
                problem = f"a peak of {peak:.1f} GiB"
            expected = {*places, folder / "logs", *folder.glob("*.csv*")}
            strays = [*Path(here).iterdir(), *({*folder.iterdir()} - expected)]
            if not problem and strays:
                problem = f"left {strays[0].name[:100]}"
            if problem:
                yield f"{kind} --seed {number} --count 1: {problem}"


def main(argv: list[str] | None = None) -> int:
    """Tries cases; exit code 0, 1 where one was a finding, 2 with a sentence on bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(CASES)}; none: all")
    parser.add_argument("--count", type=int, default=100, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    args = parser.parse_args(argv)
    unknown = {*args.kinds} - {*CASES}
    if unknown:
        parser.error(f"{min(unknown)}: choose of {', '.join(CASES)}")
    found = Counter()
    for kind in args.kinds or CASES:
        for finding in findings(kind, CASES[kind], args.count, args.seed):
            found[kind] += 1
            print(finding, flush=True)
        print(f"{kind}: {args.count} cases, {found[kind]} findings", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
