"""scripts/prepare_data.py: shards hold exactly the text, split as documented; failure leaves none.

Shards are read here with struct, and splits are recomputed here, so that the script is not checked
against itself.
"""

import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import encode_shards
import prepare_data
import text_sources
import tokenization
from encode_shards import write_shard
from prepare_data import main
from harness.settings import ROOT, preset_files
from store.contract import DataError
import train_gpt
from harness.ranks import Ranks
from train_gpt import load_shard

FILES = [f"{folder}/{number}.txt" for folder in ("a", "b", "b/c") for number in range(20)]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(source, *options, out="out"):
    """Run the command, expect success, and return index.json."""
    assert main(["--source", str(source), "--out", out, *map(str, options)]) == 0
    with open(f"{out}/index.json", "rb") as file:
        return json.load(file)


def refused(capsys, code, source, *options, out="out"):
    """Run the command, expect the exit code, and return its one sentence, stderr's last line."""
    argv = ["--source", str(source), "--out", out, *map(str, options)]
    capsys.readouterr()
    if code == 2:
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
    else:
        assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


def read_shard(path):
    """Tokens of one shard, by the written specification of the format."""
    raw = path.read_bytes()
    magic, shard_version, count = struct.unpack("<3i", raw[:12])
    assert (magic, shard_version) == (20240520, 1)
    assert raw[12:1024] == bytes(1012)
    assert len(raw) == 1024 + 2 * count
    return list(struct.unpack(f"<{count}H", raw[1024:]))


def read_split(folder, split):
    """Tokens of all shards of one split, in the order of their names."""
    return [token for path in sorted(folder.glob(f"*_{split}_*.bin")) for token in read_shard(path)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_corpus(root, names=FILES):
    for name in names:
        path = root / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{name}: ".encode() * (1 + len(name) % 3))


def expected_split(name, val_fraction):
    first = hashlib.sha256(name.encode()).hexdigest()[:16]
    return "val" if int(first, 16) < val_fraction * 2**64 else "train"


# The format


def test_shard_is_the_specified_bytes_and_the_trainer_reads_it(tmp_path):
    tokens = np.array([0, 1, 258, 65535])
    write_shard(tmp_path / "x.bin", tokens)
    header = struct.pack("<256i", 20240520, 1, 4, *[0] * 253)
    assert (tmp_path / "x.bin").read_bytes() == header + bytes([0, 0, 1, 0, 2, 1, 255, 255])
    assert load_shard(tmp_path / "x.bin").tolist() == tokens.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


@pytest.mark.parametrize(
    "tokens", [np.array([65536]), np.array([-1]), np.array([], int), np.zeros((2, 2), int)]
)
def test_write_shard_refuses_what_the_format_cannot_hold(tmp_path, tokens):
    with pytest.raises(DataError, match=r"x\.bin: expected tokens \(n,\) in 0\.\.65535"):
        write_shard(tmp_path / "x.bin", tokens)
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_old_file_and_leaves_no_temporary_one(tmp_path, monkeypatch):
    write_shard(tmp_path / "x.bin", np.array([1, 2]))
    before = contents(tmp_path)

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / "x.bin", np.array([3, 4]))
    assert contents(tmp_path) == before


def test_index_describes_the_shards(tmp_path):
    raw = bytes(range(256)) * 5
    (tmp_path / "in.txt").write_bytes(raw)
    index = prepare("in.txt", "--binary", "--shard-tokens", 500)
    assert [(shard["name"], shard["split"], shard["tokens"]) for shard in index["shards"]] == [
        ("out_val_000000.bin", "val", 128),
        ("out_train_000001.bin", "train", 500),
        ("out_train_000002.bin", "train", 500),
        ("out_train_000003.bin", "train", 152),
    ]
    for shard in index["shards"]:
        path = tmp_path / "out" / shard["name"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        assert len(read_shard(path)) == shard["tokens"]
        assert path.stat().st_size == shard["bytes"]
    assert bytes(read_split(tmp_path / "out", "train") + read_split(tmp_path / "out", "val")) == raw
    content = (tmp_path / "out/tokenizer.json").read_bytes()
    assert content.decode() == tokenization.named("bytes").to_json()
    assert index["tokenizer_sha256"] == hashlib.sha256(content).hexdigest()
    assert index["token_bytes"] == [1] * 256 + [0]
    assert {
        key: index[key]
        for key in (
            "source",
            "source_version",
            "tokenizer",
            "vocab_size",
            "eot_id",
            "val_fraction",
            "documents",
            "bytes_per_token",
            "shard_tokens",
        )
    } == {
        "source": "in.txt",
        "source_version": None,
        "tokenizer": "bytes",
        "vocab_size": 257,
        "eot_id": 256,
        "val_fraction": 0.1,
        "documents": {"train": 1, "val": 1},
        "bytes_per_token": 1.0,
        "shard_tokens": 500,
    }
    assert index["split"].startswith("contiguous")
    assert sorted(contents(tmp_path / "out")) == sorted(
        ["index.json", "tokenizer.json", *(shard["name"] for shard in index["shards"])]
    )


# One file


def test_bytes_of_one_file_come_back_in_order(tmp_path):
    raw = np.random.default_rng(0).integers(0, 256, 12345).astype(np.uint8).tobytes()
    (tmp_path / "in.bin").write_bytes(raw)
    prepare("in.bin", "--binary", "--val-fraction", 0.25)
    train, val = (bytes(read_split(tmp_path / "out", split)) for split in ("train", "val"))
    assert train + val == raw
    assert len(train) == 9258


def test_characters_are_split_as_in_nanogpt(tmp_path):
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 1_115_393))) + "é"
    (tmp_path / "in.txt").write_text(text, encoding="utf-8")
    index = prepare("in.txt", "--tokenizer", "chars")
    assert {shard["split"]: shard["tokens"] for shard in index["shards"]} == {
        "train": 1_003_854,
        "val": 111_540,
    }
    assert index["bytes_per_token"] == 1_115_395 / 1_115_394


def test_split_is_exact_where_float_arithmetic_is_not(tmp_path):
    (tmp_path / "in.txt").write_text("x" * 100)
    index = prepare("in.txt", "--val-fraction", 0.9)  # int(100 * (1 - 0.9)) is 9
    assert {shard["split"]: shard["tokens"] for shard in index["shards"]} == {
        "train": 10,
        "val": 90,
    }


def test_two_tokens_are_enough_for_a_split(tmp_path):
    (tmp_path / "in.txt").write_text("abcd")
    index = prepare("in.txt", "--val-fraction", 0.5)
    assert {shard["split"]: shard["tokens"] for shard in index["shards"]} == {"train": 2, "val": 2}


def test_chars_of_one_file_come_back_and_the_vocabulary_is_sorted(tmp_path):
    text = (
        "Grüße\r\n\ttabs, 日本語, \U0001f600 and a last line\u2028" * 40 + "\U0010ffff\0"
    )  # two in val only
    (tmp_path / "in.txt").write_bytes(text.encode())
    index = prepare("in.txt", "--tokenizer", "chars")
    chars = sorted(set(text))
    about = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert about["model"]["vocab"] == {char: token for token, char in enumerate(chars)}
    assert about["added_tokens"] == []
    assert index["token_bytes"] == [len(char.encode()) for char in chars]
    assert (index["vocab_size"], index["eot_id"]) == (len(chars), None)
    tokens = read_split(tmp_path / "out", "train") + read_split(tmp_path / "out", "val")
    assert "".join(chars[token] for token in tokens) == text
    assert index["bytes_per_token"] == len(text.encode()) / len(text)


# A corpus


@pytest.mark.parametrize("val_fraction", [0.1, 0.5])
def test_corpus_is_split_by_the_hash_of_each_path(tmp_path, val_fraction):
    write_corpus(tmp_path)
    index = prepare("texts/**/*.txt", "--val-fraction", val_fraction)
    for split in ("train", "val"):
        names = [name for name in sorted(FILES) if expected_split(name, val_fraction) == split]
        expected = []
        for name in names:
            expected += [256, *(tmp_path / "texts" / name).read_bytes()]
        assert read_split(tmp_path / "out", split) == expected
        assert index["documents"][split] == len(names) > 0
    size = sum(path.stat().st_size for path in (tmp_path / "texts").rglob("*.txt"))
    assert index["bytes_per_token"] == size / (size + len(FILES))
    assert index["split"].startswith("by file")


def test_another_file_moves_no_file_to_the_other_split(tmp_path):
    def val_documents(out):
        tokens = read_split(tmp_path / out, "val")
        return bytes(token if token < 256 else 0 for token in tokens).split(b"\0")[1:]

    write_corpus(tmp_path)
    prepare("texts/**/*.txt", out="before")
    new = next(
        name for name in (f"0{i}.txt" for i in range(1000)) if expected_split(name, 0.1) == "val"
    )
    write_corpus(tmp_path, [new])
    prepare("texts/**/*.txt", out="after")
    assert val_documents("after") == [
        f"{new}: ".encode() * (1 + len(new) % 3),
        *val_documents("before"),
    ]


def test_split_is_the_same_wherever_the_folder_is(tmp_path):
    write_corpus(tmp_path)
    prepare("texts/**/*.txt", out="here/same")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "texts").rename(tmp_path / "elsewhere/moved")
    prepare(tmp_path / "elsewhere/moved/**/*.txt", out="there/same")
    here, there = contents(tmp_path / "here/same"), contents(tmp_path / "there/same")
    assert here.pop("index.json") != there.pop("index.json")  # each records its --source as given
    assert here == there


def test_glob_of_everything_takes_the_files_only(tmp_path):
    write_corpus(tmp_path)
    prepare("texts/**/*.txt", out="one/same")
    prepare("texts/**", out="two/same")
    for split in ("train", "val"):
        assert read_split(tmp_path / "one/same", split) == read_split(tmp_path / "two/same", split)


def test_empty_file_of_a_corpus_is_an_end_of_text_alone(tmp_path):
    write_corpus(tmp_path)
    empty = next(name for name in FILES if expected_split(name, 0.1) == "val")
    (tmp_path / "texts" / empty).write_bytes(b"")
    prepare("texts/**/*.txt")
    val = [name for name in sorted(FILES) if expected_split(name, 0.1) == "val"]
    assert read_split(tmp_path / "out", "val").count(256) == len(val)


def test_chars_of_a_corpus_have_end_of_text_as_last_id(tmp_path):
    write_corpus(tmp_path)
    index = prepare("texts/**/*.txt", "--tokenizer", "chars")
    about = json.loads((tmp_path / "out/tokenizer.json").read_text())
    chars = sorted(set("".join(path.read_text() for path in (tmp_path / "texts").rglob("*.txt"))))
    assert list(about["model"]["vocab"]) == [*chars, "<|endoftext|>"]
    assert about["added_tokens"][0]["id"] == index["eot_id"] == len(chars)
    assert index["vocab_size"] == len(chars) + 1
    names = [name for name in sorted(FILES) if expected_split(name, 0.1) == "val"]
    decoded = "".join([*chars, "|"][token] for token in read_split(tmp_path / "out", "val"))
    assert decoded == "".join("|" + (tmp_path / "texts" / name).read_text() for name in names)


# Repeated runs


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
def test_two_runs_write_the_same_bytes_and_no_absolute_path(tmp_path, tokenizer):
    write_corpus(tmp_path)
    for parent in ("one", "two"):
        prepare("texts/**/*.txt", "--tokenizer", tokenizer, out=f"{parent}/data")
    one = contents(tmp_path / "one/data")
    assert one == contents(tmp_path / "two/data")
    assert str(tmp_path) not in (one["index.json"] + one["tokenizer.json"]).decode()


def test_second_run_writes_nothing(tmp_path, capsys):
    write_corpus(tmp_path)
    prepare("texts/**/*.txt")
    first = {
        path: path.stat().st_mtime_ns for path in [tmp_path / "out", *(tmp_path / "out").iterdir()]
    }
    assert "already there" not in capsys.readouterr().out
    prepare("texts/**/*.txt")
    assert {path: path.stat().st_mtime_ns for path in first} == first
    output = capsys.readouterr().out
    assert "already there: out" in output
    assert (
        "INPUT_BIN='out/out_train_*.bin' INPUT_VAL_BIN='out/out_val_*.bin' VOCAB_SIZE=0" in output
    )


@pytest.mark.parametrize(
    "damage",
    ["missing shard", "short shard", "other shard", "flipped byte", "no tokenizer"],
)
def test_damaged_folder_of_the_same_recipe_is_written_again(tmp_path, damage, capsys):
    (tmp_path / "in.txt").write_text("some text " * 50)
    prepare("in.txt")
    whole = contents(tmp_path / "out")
    shard = tmp_path / "out/out_train_000001.bin"
    if damage == "missing shard":
        shard.unlink()
    elif damage == "short shard":
        shard.write_bytes(shard.read_bytes()[:-2])
    elif damage == "other shard":
        write_shard(shard, np.array([1, 2, 3]))
    elif damage == "flipped byte":
        shard.write_bytes(shard.read_bytes()[:-2] + b"\1\0")
    else:
        (tmp_path / "out/tokenizer.json").unlink()
    prepare("in.txt")
    assert contents(tmp_path / "out") == whole
    told = capsys.readouterr().err.count(f"{shard.name}: missing or damaged: is made again")
    assert told == int(damage != "no tokenizer")


def test_edited_source_is_refused_until_forced(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("some text " * 50)
    prepare("in.txt")
    before = contents(tmp_path / "out")
    (tmp_path / "in.txt").write_text("same size " * 50)
    assert refused(capsys, 3, "in.txt") == (
        "prepare_data.py: error: --out out: expected no data or that of this recipe, "
        "found another source_sha256: give another folder, or --force to replace its data"
    )
    assert contents(tmp_path / "out") == before
    prepare("in.txt", "--force")
    assert bytes(read_split(tmp_path / "out", "train")).startswith(b"same size")


@pytest.mark.parametrize(
    "options, key",
    [
        (["--tokenizer", "chars"], "tokenizer"),
        (["--val-fraction", "0.2"], "val_f"),
        (["--shard-tokens", "7"], "shard_tokens"),
    ],
)
def test_another_recipe_is_refused(tmp_path, capsys, options, key):
    (tmp_path / "in.txt").write_text("some text " * 50)
    prepare("in.txt")
    before = contents(tmp_path / "out")
    assert f"found another {key}" in refused(capsys, 3, "in.txt", *options)
    assert contents(tmp_path / "out") == before


def test_shards_without_an_index_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("some text " * 50)
    (tmp_path / "out").mkdir()
    write_shard(tmp_path / "out/out_train_000007.bin", np.array([1, 2]))
    assert "--force to replace its data" in refused(capsys, 3, "in.txt")
    assert read_shard(tmp_path / "out/out_train_000007.bin") == [1, 2]


def test_unreadable_index_is_refused_until_forced(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("some text " * 50)
    prepare("in.txt")
    whole = contents(tmp_path / "out")
    (tmp_path / "out/index.json").write_text('{"source": "in')
    assert "--force to replace its data" in refused(capsys, 3, "in.txt")
    prepare("in.txt", "--force")
    assert contents(tmp_path / "out") == whole


def test_force_removes_the_shards_of_the_old_recipe_and_nothing_else(tmp_path):
    (tmp_path / "in.txt").write_text("some text " * 50)
    prepare("in.txt", "--shard-tokens", 40)
    (tmp_path / "out/notes.bin").write_bytes(b"mine")
    assert len(contents(tmp_path / "out")) > 12
    prepare("in.txt", "--force")
    assert sorted(contents(tmp_path / "out")) == [
        "index.json",
        "notes.bin",
        "out_train_000001.bin",
        "out_val_000000.bin",
        "tokenizer.json",
    ]


def test_failed_forced_run_keeps_the_old_data(tmp_path, capsys, monkeypatch):
    (tmp_path / "in.txt").write_text("some text " * 50)
    prepare("in.txt")
    before = contents(tmp_path / "out")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    assert "No space left on device" in refused(
        capsys, 3, "in.txt", "--tokenizer", "chars", "--force"
    )
    assert contents(tmp_path / "out") == before


def test_run_that_dies_while_it_replaces_data_leaves_no_index_and_goes_on(tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("some text " * 50)
    prepare("in.txt", "--tokenizer", "chars", out="whole/out")
    prepare("in.txt")
    real_replace = prepare_data.os.replace

    def die_at_train(source, target):
        if str(target) == "out/out_train_000001.bin":
            raise KeyboardInterrupt
        real_replace(source, target)

    monkeypatch.setattr(prepare_data.os, "replace", die_at_train)
    command = ["--source", "in.txt", "--out", "out", "--tokenizer", "chars"]
    assert main([*command, "--force"]) == 130
    assert not (tmp_path / "out/index.json").exists()
    monkeypatch.setattr(prepare_data.os, "replace", real_replace)
    assert main(command) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole/out")


# Packages


def test_sympy_is_the_same_data_everywhere(tmp_path, capsys):
    assert version("sympy") == "1.14.0", (
        "pip install sympy==1.14.0: the numbers below are those of this version"
    )
    index = prepare("package:sympy", out="sympy")
    assert index["source_version"] == "1.14.0"
    assert index["documents"] == {"train": 754, "val": 100}
    assert index["shards"] == [
        {
            "name": "sympy_val_000000.bin",
            "split": "val",
            "tokens": 1_924_500,
            "bytes": 3_850_024,
            "sha256": "edea12951ca6e5fe50260b7dde873e7b3f85a831c905c3aac52828af194894cb",
        },
        {
            "name": "sympy_train_000001.bin",
            "split": "train",
            "tokens": 14_688_625,
            "bytes": 29_378_274,
            "sha256": "79e04b8db85e47905b3c4e008a3df387bbb4a594b495781a4455877f11efb93a",
        },
    ]
    for shard in index["shards"]:
        assert (
            hashlib.sha256((tmp_path / "sympy" / shard["name"]).read_bytes()).hexdigest()
            == shard["sha256"]
        )
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines() == [
        "train: 14,688,625 tokens of 754 document(s)",
        "val: 1,924,500 tokens of 100 document(s)",
        "vocabulary: 257   bytes per token: 0.9999",
        "next: PRESET=quickstart INPUT_BIN='sympy/sympy_train_*.bin' "
        f"INPUT_VAL_BIN='sympy/sympy_val_*.bin' VOCAB_SIZE=0 python {ROOT / 'train_gpt.py'}",
    ]


def make_package(root, monkeypatch, name):
    """A package that fails when imported, with a tests folder, bytecode, and 40 modules."""
    folder = root / "site" / name
    for path in [
        "__init__.py",
        "tests/test_x.py",
        "core/tests/test_y.py",
        "__pycache__/m.cpython-311.pyc",
        "data.txt",
        "tests.py",
        *(f"core/m{i}.py" for i in range(40)),
    ]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(f"raise SystemExit('{path} was imported')\n")
    monkeypatch.syspath_prepend(root / "site")


def test_package_is_its_source_without_tests_and_is_not_imported(tmp_path, monkeypatch):
    make_package(tmp_path, monkeypatch, "madeup_package")
    index = prepare("package:madeup_package")
    names = ["__init__.py", "tests.py", *(f"core/m{i}.py" for i in range(40))]
    for split in ("train", "val"):
        expected = []
        for name in sorted(names):
            if expected_split(name, 0.1) == split:
                expected += [256, *f"raise SystemExit('{name} was imported')\n".encode()]
        assert read_split(tmp_path / "out", split) == expected
    assert index["source_version"] is None
    assert sum(index["documents"].values()) == 42


def test_another_sympy_is_warned_about(monkeypatch, capsys):
    monkeypatch.setattr(text_sources.metadata, "version", {"sympy": "1.13.3"}.__getitem__)
    index = prepare("package:sympy")
    assert capsys.readouterr().err == (
        "warning: sympy 1.13.3 is installed, not 1.14.0: losses on this data "
        "cannot be compared with those of others; run pip install sympy==1.14.0\n"
    )
    assert index["source_version"] == "1.13.3"


# Byte pairs


def small_bpe():
    """GPT-2's pattern with the bytes and a few merges: nothing is to be downloaded."""
    merges = [b"\n\n", b"  ", b"    ", b" t", b"th", b" th", b"ab", b"abab", b"'s", b"!!"]
    ranks = {token: rank for rank, token in enumerate([*(bytes([i]) for i in range(256)), *merges])}
    return tokenization.BpeTokenizer(ranks, {"<|endoftext|>": len(ranks)}, "gpt2", "test")


def messy_text(seed, count=4000):
    words, spaces = (
        ["the", "abab", "it's", "é", "日本", "42", "!!"],
        [" ", "  ", "\n", "\n\n", "\r\n", "\t"],
    )
    parts = [*words, *spaces, "\u2003", "\x85", "\x1c"]  # the last is white space to Python only
    return "".join(np.random.default_rng(seed).choice(parts, count))


@pytest.fixture
def bpe(tmp_path, monkeypatch):
    """The small tokenizer, in a file and under the name gpt2."""
    tokenizer = small_bpe()
    (tmp_path / "bpe.json").write_text(tokenizer.to_json())
    monkeypatch.setattr(tokenization, "gpt2", lambda: tokenizer)
    return tokenizer


def test_a_file_in_pieces_has_the_tokens_of_the_whole(tmp_path, monkeypatch, bpe):
    monkeypatch.setattr(text_sources, "PIECE_CHARS", 7)
    monkeypatch.setattr(text_sources, "CHUNK", 11)
    text = messy_text(0)
    (tmp_path / "in.txt").write_bytes(text.encode())
    index = prepare("in.txt", "--tokenizer", "gpt2", "--val-fraction", 0.5)
    cut = len(text) // 2
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        assert read_split(tmp_path / "out", split) == bpe.encoding.encode_ordinary(part)
    assert (index["vocab_size"], index["eot_id"]) == (267, 266)
    assert index["token_bytes"][256:] == [2, 2, 4, 2, 2, 3, 2, 4, 2, 2, 0]


def test_a_corpus_begins_each_document_with_end_of_text(tmp_path, bpe):
    write_corpus(tmp_path)
    names = [name for name in sorted(FILES) if expected_split(name, 0.1) == "val"]
    # in a text it is text, not the special token
    (tmp_path / "texts" / names[0]).write_text("<|endoftext|>")
    (tmp_path / "texts" / names[1]).write_text("")
    index = prepare("texts/**/*.txt", "--tokenizer", "bpe.json")
    expected = []
    for name in names:
        text = (tmp_path / "texts" / name).read_text()
        expected += [266, *bpe.encoding.encode_ordinary(text)]
    assert read_split(tmp_path / "out", "val") == expected
    assert (tmp_path / "out/tokenizer.json").read_text() == (tmp_path / "bpe.json").read_text()
    assert index["tokenizer"] == "bpe.json"


def test_a_changed_tokenizer_file_is_another_recipe(tmp_path, capsys, bpe):
    (tmp_path / "in.txt").write_text("some text " * 50)
    prepare("in.txt", "--tokenizer", "bpe.json")
    prepare("in.txt", "--tokenizer", "bpe.json")
    assert "already there" in capsys.readouterr().out
    content = (tmp_path / "bpe.json").read_text()
    (tmp_path / "bpe.json").write_text(tokenization.named("bytes").to_json())
    line = refused(capsys, 3, "in.txt", "--tokenizer", "bpe.json")
    assert "found another tokenizer_sha256" in line
    (tmp_path / "bpe.json").write_text(content)
    prepare("in.txt", "--tokenizer", "bpe.json")


def test_gpt2_without_network_says_what_to_do(tmp_path, monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise OSError("network is blocked by the test")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(tokenization, "whisper_file", lambda: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    (tmp_path / "in.txt").write_text("some text " * 50)
    line = refused(capsys, 3, "in.txt", "--tokenizer", "gpt2")
    assert line.startswith("prepare_data.py: error: tokenizer gpt2: its vocabulary is neither in")
    assert "run once online with TIKTOKEN_CACHE_DIR=FOLDER set" in line
    assert not (tmp_path / "out").exists()


# Refusals

TEXT_KINDS = (
    "expected package:NAME, hf:OWNER/NAME, a file, a folder, or a quoted glob like 'texts/**/*.txt'"
)


@pytest.mark.parametrize(
    "code, options, sentence",
    [
        (
            3,
            ["missing.txt"],
            f"--source missing.txt: {TEXT_KINDS}, found no such file: correct the path",
        ),
        (
            3,
            ["texts/*.md"],
            f"--source texts/*.md: {TEXT_KINDS}, found no such file: correct the path",
        ),
        (
            3,
            ["hollow"],
            "--source hollow: expected a folder with text, found no file: fill it",
        ),
        (
            3,
            ["empty.txt"],
            "--source empty.txt: expected text, found 1 file(s) without any: name another",
        ),
        (
            3,
            ["package:no_such_package"],
            "--source package:no_such_package: expected an installed top-level package with "
            "*.py files, found no package: install it, or name another source",
        ),
        (
            3,
            ["packed.txt"],
            "packed.txt: expected text, found what looks like gzip: give it the ending .gz, or "
            "take its bytes as they are with --tokenizer bytes --binary",
        ),
        (
            3,
            ["wide.txt"],
            "found what looks like UTF-16: convert it: iconv -f UTF-16 -t UTF-8 wide",
        ),
        (3, ["noise.txt", "--tokenizer", "chars"], "found what looks like binary data: name text"),
        (3, ["*.txt"], "found what looks like"),
        (3, ["cut.txt.gz"], "cut.txt.gz: expected what .gz packs, found Compressed file ended bef"),
        (3, ["package:os.path"], "found no package: install it"),
        (3, ["package:__main__"], "found no package: install it"),
        (3, ["package:socket"], "found no such files: install it"),
        (
            3,
            ["texts/a/0.tx?"],
            "--val-fraction 0.1: expected files in train and in val, found all 1 in train: "
            "give more files, another fraction or just one FILE",
        ),
        (3, ["texts/**/*.txt", "--val-fraction", "0.9999"], "found all 60 in val: give more files"),
        (
            3,
            ["latin1.txt", "--tokenizer", "chars"],
            "latin1.txt: expected UTF-8 text, found an invalid byte at offset 3: "
            "convert the file, or use --tokenizer bytes",
        ),
        (3, ["latin1.txt", "--tokenizer", "gpt2"], "found an invalid byte at offset 3"),
        (
            3,
            ["five.txt"],
            "--source five.txt: expected at least 2 tokens in val, found 1: give more text, "
            "or change --val-fraction 0.1",
        ),
        (3, ["five.txt", "--val-fraction", "0.7"], "expected at least 2 tokens in train, found 1"),
        (
            2,
            ["five.txt", "--val-fraction", "0"],
            "--val-fraction: expected 0 < number < 1, such as 0.1, found 0.0",
        ),
        (
            2,
            ["five.txt", "--val-fraction", "1"],
            "--val-fraction: expected 0 < number < 1, such as 0.1, found 1.0",
        ),
        (
            2,
            ["five.txt", "--val-fraction", "1.5"],
            "--val-fraction: expected 0 < number < 1, such as 0.1, found 1.5",
        ),
        (
            2,
            ["five.txt", "--val-fraction", "nan"],
            "--val-fraction: expected 0 < number < 1, such as 0.1, found nan",
        ),
        (
            2,
            ["five.txt", "--val-fraction", "text"],
            "argument --val-fraction: invalid float value: 'text'",
        ),
        (
            2,
            ["five.txt", "--shard-tokens", "1"],
            "argument --shard-tokens: expected 2 to 2147483647, found 1",
        ),
        (
            3,
            ["five.txt", "--tokenizer", "words"],
            "tokenizer words: expected bytes, gpt2, a tokenizer.json, a folder with one",
        ),
    ],
)
def test_refused_with_one_sentence_and_nothing_written(tmp_path, capsys, code, options, sentence):
    write_corpus(tmp_path)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "packed.txt").write_bytes(gzip.compress(b"text " * 99))
    (tmp_path / "wide.txt").write_bytes(("text " * 99).encode("utf-16"))
    (tmp_path / "noise.txt").write_bytes(np.random.default_rng(0).bytes(999))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text " * 99)[:-9])
    (tmp_path / "five.txt").write_bytes(b"12345")
    (tmp_path / "latin1.txt").write_bytes("caf\xe9 and more".encode("latin-1"))
    assert sentence in refused(capsys, code, *options)
    assert not (tmp_path / "out").exists()


def test_more_symbols_than_uint16_holds_are_refused(tmp_path, capsys):
    def with_symbols(count):
        (tmp_path / "in.txt").write_text(
            "".join(map(chr, range(0x10000, 0x10000 + count))), encoding="utf-8"
        )

    with_symbols(65537)
    assert refused(capsys, 3, "in.txt", "--tokenizer", "chars") == (
        "prepare_data.py: error: tokenizer chars: expected a vocabulary of 1 to 65536, "
        "found 65537: use the tokenizer bytes"
    )
    assert not (tmp_path / "out").exists()
    with_symbols(65536)
    assert prepare("in.txt", "--tokenizer", "chars")["vocab_size"] == 65536
    assert read_split(tmp_path / "out", "val")[-1] == 65535


def test_file_that_cannot_be_a_folder_is_refused(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("some text " * 50)
    (tmp_path / "out").write_text("mine")
    assert "Not a directory" in refused(capsys, 3, "in.txt")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
@pytest.mark.parametrize("name", ["index.json", "out_val_000000.bin", "tokenizer.json", "pipe"])
def test_a_pipe_is_neither_read_nor_replaced(tmp_path, capsys, name):
    """Nobody writes to it, so that who reads it would wait for ever."""
    (tmp_path / "in.txt").write_text("some text " * 50)
    (tmp_path / "out").mkdir()
    pipe = tmp_path / "out" / name
    os.mkfifo(pipe)
    options = ["--tokenizer", "out/pipe"] if name == "pipe" else []
    assert main(["--source", "in.txt", "--out", "out", *options, "--force"]) == 3
    assert f"out/{name} is no regular file" in capsys.readouterr().err
    assert pipe.is_fifo()


def test_file_named_like_a_glob_is_one_file(tmp_path):
    (tmp_path / "draft[1].txt").write_text("some text " * 50)
    assert prepare("draft[1].txt")["split"].startswith("contiguous")


# Several sources


def write_rows(name, texts):
    with open(name, "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def cut_documents(monkeypatch):
    """Makes documents have several pieces that are small."""
    monkeypatch.setattr(text_sources, "PIECE_CHARS", 20)
    monkeypatch.setattr(text_sources, "LONGEST_PIECE", 30)


def test_documents_follow_the_weights_in_tokens(tmp_path, monkeypatch, capsys):
    cut_documents(monkeypatch)
    rng = np.random.default_rng(0)
    write_rows("a.jsonl", ["a" * n for n in rng.integers(1, 99, 900)])
    write_rows("b.jsonl", ["b" * n for n in rng.integers(1, 400, 900)])
    options = ["--weight", 0.7, "--source", "b.jsonl", "--weight", 0.3, "--tokenizer", "chars"]
    index = prepare("a.jsonl", *options)
    for split in ("train", "val"):
        # characters are 0 and 1, the end is 2
        stream = "".join("ab|"[token] for token in read_split(tmp_path / "out", split))
        texts = stream.split("|")[1:]
        tokens = {"a": 0, "b": 0}
        for text in texts:
            # whole documents, from the source that is most behind its share
            assert len(set(text)) == 1
            assert text[0] == min("ab", key=lambda s: tokens[s] / {"a": 0.7, "b": 0.3}[s])
            tokens[text[0]] += len(text) + 1
        assert abs(tokens["a"] / sum(tokens.values()) - 0.7) < 400 / sum(tokens.values())
        assert index["used"][split]["tokens"] == [*tokens.values()]
        # a is the smaller part, and all of it is used
        all_of_a = [f"a.jsonl:{i}" for i in range(1, 901)]
        wanted = sum(expected_split(name, 0.1) == split for name in all_of_a)
        assert index["used"][split]["documents"][0] == wanted
    assert index["weight"] == [0.7, 0.3] and index["source"] == ["a.jsonl", "b.jsonl"]
    output = capsys.readouterr().out
    assert re.search(r"^  (69|70)\.\d% a\.jsonl: \d+ document\(s\)$", output, re.M)


def test_sources_without_weights_follow_each_other(tmp_path):
    write_corpus(tmp_path)
    index = prepare("texts/**/*.txt", "--text", "a text of its own " * 9, out="two")
    prepare("texts/**/*.txt", out="one")
    for split, cut in (("train", slice(145)), ("val", slice(145, None))):
        end = [256, *("a text of its own " * 9).encode()[cut]]
        assert read_split(tmp_path / "two", split) == read_split(tmp_path / "one", split) + end
    assert index["split"][1].startswith("contiguous")


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--weight", 1, "--weight", 2], "expected one for each of the 1 source(s), found 2"),
        (["--weight", 0], "argument --weight: expected numbers above 0, found 0.0"),
        (["--weight", "inf"], "argument --weight: expected numbers above 0, found inf"),
        (["--workers", 0], "argument --workers: expected 1 or more, found 0"),
        (
            ["--binary", "--tokenizer", "chars"],
            "argument --binary: expected --tokenizer bytes, found chars",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(capsys, options, sentence):
    assert sentence in refused(capsys, 2, "in.txt", *options)


# Workers, and going on


def write_mixture(tmp_path):
    """Two sources, one of rows and one a long file, with byte pairs; returns the options."""
    rng = np.random.default_rng(0)
    texts = [messy_text(seed, int(count)) for seed, count in enumerate(rng.integers(1, 900, 600))]
    write_rows("rows.jsonl", texts)
    (tmp_path / "long.txt").write_bytes("".join(texts[::-1]).encode())
    (tmp_path / "bpe.json").write_text(small_bpe().to_json())
    options = ["--weight", 0.4, "--source", "long.txt", "--weight", 0.6]
    return [*options, "--tokenizer", "bpe.json", "--shard-tokens", 10_000]


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, monkeypatch):
    options = write_mixture(tmp_path)
    monkeypatch.setattr(prepare_data, "BYTES_A_WORKER", 1)
    prepare("rows.jsonl", *options, "--workers", 1, out="one/data")
    monkeypatch.setattr(encode_shards, "BATCH", 10_000)
    used, encoder = [], encode_shards.encoder

    def spy(tokenizer, with_end, workers):
        used.append(workers)
        return encoder(tokenizer, with_end, workers)

    monkeypatch.setattr(prepare_data, "encoder", spy)
    prepare("rows.jsonl", *options, "--workers", 3, out="three/data")
    assert used == [3]
    assert len(contents(tmp_path / "one/data")) > 20
    assert contents(tmp_path / "one/data") == contents(tmp_path / "three/data")


def test_a_worker_s_refusal_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    write_rows("rows.jsonl", ["abc " * 9] * 300 + ["é"])
    (tmp_path / "chars.json").write_text(tokenization.from_chars("abc ", True).to_json())
    sentence = refused(capsys, 3, "rows.jsonl", "--tokenizer", "chars.json")
    assert "rows.jsonl:301: text: expected the 4 characters of the vocabulary, found" in sentence
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_killed_goes_on(tmp_path):
    options = [*map(str, write_mixture(tmp_path)), "--workers", "2"]
    prepare("rows.jsonl", *options, out="whole/data")
    whole = contents(tmp_path / "whole/data")
    script = str(ROOT / "scripts/prepare_data.py")
    command = [sys.executable, script, "--source", "rows.jsonl", "--out", "data", *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    done = []
    while len(done) < 9 and time.monotonic() < deadline and process.poll() is None:
        done = encode_shards.read_record(tmp_path / "data/.partial").get("shards", [])
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 9 <= len(done) < len(whole) - 2
    assert not (tmp_path / "data/index.json").exists()
    index = prepare("rows.jsonl", *options, out="data")
    assert contents(tmp_path / "data") == whole
    assert len(index["shards"]) == len(whole) - 2


def test_a_run_that_ends_at_any_rename_goes_on(tmp_path, monkeypatch, capsys):
    """Some are in the middle of a document, some of the last moves."""
    cut_documents(monkeypatch)
    write_rows("a.jsonl", ["a" * n for n in (50, 3, 900, 40, 1, 7, 60, 300, 5, 5)])
    write_rows("b.jsonl", ["b" * n for n in (5, 333, 90, 40, 10, 70, 6, 30, 50, 5)])
    options = ["--weight", 2, "--source", "b.jsonl", "--weight", 1, "--val-fraction", 0.3]
    options += ["--tokenizer", "chars", "--shard-tokens", 300]
    real_replace, count, dies_at = os.replace, 0, None

    def replace(source, target):
        nonlocal count
        count += 1
        if count == dies_at:
            raise KeyboardInterrupt
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    prepare("a.jsonl", *options, out="whole/data")
    whole, renames = contents(tmp_path / "whole/data"), count
    assert renames > 15
    for number in range(1, renames + 1):
        count, dies_at, out = 0, number, f"{number}/data"
        assert main(["--source", "a.jsonl", "--out", out, *map(str, options)]) == 130
        assert not (tmp_path / out / "index.json").exists()
        dies_at = None
        prepare("a.jsonl", *options, out=out)
        assert contents(tmp_path / out) == whole, number


def test_unfinished_data_of_another_recipe_are_refused_until_forced(tmp_path, monkeypatch, capsys):
    (tmp_path / "in.txt").write_text("some text " * 50)
    real_replace = os.replace

    def die_at_train(source, target):
        if str(target).endswith("out_train_000002.bin"):
            raise KeyboardInterrupt
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", die_at_train)
    argv = ["--source", "in.txt", "--out", "out", "--shard-tokens", "40"]
    assert main(argv) == 130
    monkeypatch.setattr(os, "replace", real_replace)
    line = refused(capsys, 3, "in.txt")
    assert "found unfinished data of another shard_tokens: give another folder" in line
    prepare("in.txt", "--force")
    assert len(contents(tmp_path / "out")) == 4


def test_another_run_on_the_same_folder_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "in.txt").write_text("some text " * 50)
    (tmp_path / "out/.partial").mkdir(parents=True)
    monkeypatch.setattr(prepare_data, "LOCK_S", 0.1)
    (tmp_path / "out/.partial/progress.json").write_text("{}")
    with prepare_data.FileLock(tmp_path / "out/.partial/live.lock"):
        assert "found one that makes this data" in refused(capsys, 3, "in.txt")
        assert (tmp_path / "out/.partial/progress.json").exists()


def test_a_run_that_waited_for_another_finds_its_data(tmp_path, monkeypatch, capsys):
    """The other run removes the folder with the lock when it ends."""
    (tmp_path / "in.txt").write_text("some text " * 50)
    real_acquire, shards = prepare_data.FileLock.acquire, None

    def acquire(lock, *args, **kwargs):
        nonlocal shards
        monkeypatch.setattr(prepare_data.FileLock, "acquire", real_acquire)
        shutil.rmtree("out/.partial")
        prepare("in.txt")  # all of the other run happens here
        shards = contents(tmp_path / "out")
        raise FileNotFoundError(2, "No such file or directory", str(lock.lock_file))

    monkeypatch.setattr(prepare_data.FileLock, "acquire", acquire)
    prepare("in.txt")
    assert contents(tmp_path / "out") == shards and len(shards) == 4


def test_ctrl_c_while_it_waits_leaves_the_other_run_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "in.txt").write_text("some text " * 50)
    (tmp_path / "out/.partial").mkdir(parents=True)
    (tmp_path / "out/.partial/tokenizer.json").write_text("the other's")

    def acquire(lock, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data.FileLock, "acquire", acquire)
    assert main(["--source", "in.txt", "--out", "out"]) == 130
    assert (tmp_path / "out/.partial/tokenizer.json").read_text() == "the other's"


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: DEEP,
        lambda index: index | {"shards": 5},
        lambda index: index | {"shards": []},
        lambda index: index | {"shards": index["shards"][:1]},
        lambda index: index | {"shards": ["out_val_000000.bin", {}]},
        lambda index: index | {"shards": [s | {"tokens": "5"} for s in index["shards"]]},
        lambda index: index | {"documents": {"train": "one"}},
        lambda index: index | {"vocab_size": None},
        lambda index: index | {"bytes_per_token": "1"},
        lambda index: index | {"used": 5},
        lambda index: {name: value for name, value in index.items() if name != "documents"},
    ],
)
def test_an_index_of_other_form_is_refused_until_forced(tmp_path, capsys, damage):
    (tmp_path / "in.txt").write_text("some text " * 50)
    index = prepare("in.txt")
    whole = contents(tmp_path / "out")
    damaged = damage(index)
    text = damaged if isinstance(damaged, str) else json.dumps(damaged)
    (tmp_path / "out/index.json").write_text(text)
    assert "or --force to replace its data" in refused(capsys, 3, "in.txt")
    prepare("in.txt", "--force")
    assert contents(tmp_path / "out") == whole


def half_done(tmp_path, monkeypatch):
    """The progress.json of a run that ended before its last moves."""
    (tmp_path / "in.txt").write_text("some text " * 50)
    real_replace = os.replace

    def die(source, target):
        if Path(target) == Path("out/tokenizer.json"):
            raise KeyboardInterrupt
        real_replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        assert main(["--source", "in.txt", "--out", "out"]) == 130
    return tmp_path / "out/.partial/progress.json"


@pytest.mark.parametrize("text", ["[1]", "null", '{"recipe": 5}', DEEP, None])
def test_damaged_progress_is_no_progress(tmp_path, monkeypatch, capsys, text):
    """None: a figure in it has changed."""
    record = half_done(tmp_path, monkeypatch)
    changed = record.read_text().replace('"tokens": 450', '"tokens": 449')
    assert changed != record.read_text()
    record.write_text(changed if text is None else text)
    index = prepare("in.txt")
    assert sum(shard["tokens"] for shard in index["shards"]) == 500


def test_unfinished_data_whose_shards_are_gone_are_made_again(tmp_path, monkeypatch, capsys):
    record = half_done(tmp_path, monkeypatch)
    (record.parent / "out_val_000000.bin").unlink()
    prepare("in.txt")
    assert len(contents(tmp_path / "out")) == 4


def test_progress_moves_no_file_from_elsewhere(tmp_path, monkeypatch, capsys):
    """As of a folder that someone else has made, who can make a hash too."""
    record = half_done(tmp_path, monkeypatch)
    (tmp_path / "theirs").write_text("theirs")
    begun = encode_shards.read_record(record.parent)
    for shard in begun["index"]["shards"]:
        shard |= {"name": "../../theirs", "bytes": 6}
    begun["record_sha256"] = encode_shards.record_hash(begun)
    record.write_bytes(encode_shards.dump(begun))
    assert "index" in encode_shards.read_record(record.parent)
    prepare("in.txt")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert len(contents(tmp_path / "out")) == 4


def test_a_link_in_the_place_of_unfinished_data_is_refused(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("some text " * 50)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/file").write_text("theirs")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.partial").symlink_to(tmp_path / "theirs")
    assert "found a link, whose files would be lost" in refused(capsys, 3, "in.txt")
    assert (tmp_path / "theirs/file").read_text() == "theirs"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
def test_names_that_are_not_utf8(tmp_path):
    script = str(ROOT / "scripts/prepare_data.py")
    name, text = b"caf\xe9", b"some text \xe9" * 50
    (tmp_path / os.fsdecode(name)).write_bytes(text)
    for source in (["--source", name], ["--text", text]):
        command = [sys.executable, script, *source, "--out", b"out" + name]
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert b"out" + name + b"_train_*.bin" in done.stdout
        folder = tmp_path / os.fsdecode(b"out" + name)
        tokens = read_split(folder, "train") + read_split(folder, "val")
        assert bytes(tokens) == text
        shutil.rmtree(folder)


def test_nobody_reads_what_is_printed(tmp_path):
    (tmp_path / "in.txt").write_text("some text " * 50)
    script = str(ROOT / "scripts/prepare_data.py")
    reads, writes = os.pipe()
    os.close(reads)
    for out, stdout in (("gone", writes), ("closed", None)):
        command = [sys.executable, script, "--source", "in.txt", "--out", out]
        close = None if stdout else partial(os.close, 1)
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, preexec_fn=close)
        assert (done.returncode, done.stderr) == (0, b"")
        assert len(contents(tmp_path / out)) == 4
    os.close(writes)


def test_blank_paths_are_not_the_folder_that_one_is_in(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("some text " * 50)
    assert "--source: expected a package, file or folder, found a blank" in refused(capsys, 3, "")
    line = refused(capsys, 2, "in.txt", out="")
    assert "argument --out: expected a path, found a blank" in line
    assert os.listdir(tmp_path) == ["in.txt"]


def test_progress_is_told_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encode_shards, "PROGRESS_S", 0)
    write_corpus(tmp_path)
    prepare("texts/**/*.txt")
    line = capsys.readouterr().err.splitlines()[-2]
    assert re.fullmatch(r"text: \d+ MB, \d+\.\d MB/s, 0\.0 min left of \d+ MB", line)


def test_a_bar_is_shown_where_there_is_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    write_corpus(tmp_path)
    prepare("texts/**/*.txt")
    assert re.search(r"text: 100%.*B/s", capsys.readouterr().err)


def test_data_within_the_source_are_no_part_of_it(tmp_path, capsys):
    write_corpus(tmp_path)
    prepare(".", out="data")
    before = contents(tmp_path / "data")
    prepare(".", out="data")
    assert "already there" in capsys.readouterr().out
    assert contents(tmp_path / "data") == before


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "in.txt").write_text("some text " * 50)
    real_open = open

    def refuse(path, *args, **kwargs):
        if str(path) == "in.txt":
            raise PermissionError(13, "Permission denied", "in.txt")
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    assert refused(capsys, 3, "in.txt") == (
        "prepare_data.py: error: in.txt: expected a right to read or write it, "
        "found Permission denied: change its mode, or name another"
    )
    assert not (tmp_path / "out").exists()


# Folders that earlier versions made


def make_old(folder, tokenizer):
    """Takes from a folder what earlier versions did not write."""
    index = json.loads((folder / "index.json").read_text())
    record = {"kind": tokenizer, "vocab_size": index["vocab_size"], "eot_id": index["eot_id"]}
    if tokenizer == "chars":
        record["chars"] = tokenization.load(folder).chars
    del index["tokenizer_sha256"], index["token_bytes"]
    for shard in index["shards"]:
        del shard["bytes"]
    (folder / "index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(json.dumps(record, indent=2) + "\n")


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
def test_a_folder_of_an_earlier_version_is_brought_up_to_date(tmp_path, capsys, tokenizer):
    write_corpus(tmp_path)
    prepare("texts/**/*.txt", "--tokenizer", tokenizer)
    new = contents(tmp_path / "out")
    make_old(tmp_path / "out", tokenizer)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.bin")}
    prepare("texts/**/*.txt", "--tokenizer", tokenizer)
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    after = contents(tmp_path / "out")
    assert json.loads(after.pop("index.json")) == json.loads(new.pop("index.json"))
    assert after == new


def test_an_earlier_gpt2_folder_stays_where_the_vocabulary_is_not(tmp_path, monkeypatch, bpe):
    write_corpus(tmp_path)
    prepare("texts/**/*.txt", "--tokenizer", "gpt2")
    make_old(tmp_path / "out", "gpt2")
    old = contents(tmp_path / "out")

    def offline():
        raise DataError("no network")

    monkeypatch.setattr(tokenization, "gpt2", offline)
    prepare("texts/**/*.txt", "--tokenizer", "gpt2")
    assert contents(tmp_path / "out") == old


# What is printed


def printed_command(capsys):
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    return line.removeprefix("next: ")


@pytest.mark.parametrize("size", [5, 300, 3000, 40_000, 400_000, 2_000_000])
def test_the_printed_command_fits_the_data(tmp_path, capsys, size):
    (tmp_path / "in.txt").write_text("x" * size)
    prepare("in.txt", "--val-fraction", 0.4)
    settings, python, trainer = printed_command(capsys).rpartition(" python ")
    env = dict(word.split("=", 1) for word in shlex.split(settings))
    cfg = train_gpt.resolve(train_gpt.Config.from_env(env | {"DEVICE": "cpu"}))
    train_gpt.preflight(cfg, Ranks())
    assert trainer == str(ROOT / "train_gpt.py")
    assert ("MAX_EPOCHS" in env) == (size < 2_000_000) and ("VAL_TOKENS" in env) == (size < 1e5)
    assert ("SEQUENCE_LENGTH" in env) == (size < 3000)


def test_the_printed_command_runs_whatever_the_folder_is_called(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("x" * 900)
    prepare("in.txt", out="it's [a] *folder* & $HOME")
    command = printed_command(capsys).replace(" python ", f" {sys.executable} ")
    env = {"PATH": os.environ["PATH"], "NUM_ITERATIONS": "2", "DEVICE": "cpu"}
    env |= {"RESULTS_CSV": "results.csv", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "status: ok" in done.stdout, done.stderr


@pytest.mark.parametrize("preset", sorted(preset_files()))
def test_the_command_in_a_preset_makes_its_data(preset):
    text = preset_files()[preset].read_text()
    folders = set(re.findall(r"^INPUT_\w+=(.+)/[^/]+$", text, re.M))
    if "python scripts/train_rl.py" in text:  # which makes its own data
        assert not folders
        return
    [folder] = folders
    commands = re.findall(r"^# python scripts/prepare_data\.py (.+)$", text, re.M)
    assert len(commands) == ("fineweb" not in folder)
    for command in commands:
        args = prepare_data.parse_args(shlex.split(command))
        assert args.out == Path(folder)
        vocabulary = {"bytes": "257", "gpt2": "50257"}.get(args.tokenizer, "0")
        assert f"\nVOCAB_SIZE={vocabulary}\n" in text or "\nVOCAB_SIZE=0\n" in text


def test_python_without_the_packages_says_what_to_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "scripts/prepare_data.py"), "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("prepare_data.py: expected Python 3.11 or newer with the project's pack")
    assert "without numpy, torch, tqdm, filelock: run " in line
