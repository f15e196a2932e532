"""scripts/prepare_data.py: shards hold exactly the text, split as documented; failure leaves none.

Shards are read here with struct, and splits are recomputed here, so that the script is not checked
against itself.
"""

import hashlib
import json
import socket
import struct
from importlib.metadata import version

import numpy as np
import pytest

import prepare_data
from prepare_data import main, pieces, write_shard
from harness.contract import DataError
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
    index = prepare("in.txt", "--shard-tokens", 500)
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
    assert bytes(read_split(tmp_path / "out", "train") + read_split(tmp_path / "out", "val")) == raw
    about = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert about == {"kind": "bytes", "vocab_size": 257, "eot_id": 256}
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
    prepare("in.bin", "--val-fraction", 0.25)
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
    about = json.loads((tmp_path / "out/tokenizer.json").read_text())
    chars = sorted(set(text))
    assert about == {"kind": "chars", "vocab_size": len(chars), "eot_id": None, "chars": chars}
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
    assert about["chars"] == chars
    assert about["eot_id"] == index["eot_id"] == len(chars) == index["vocab_size"] - 1
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


@pytest.mark.parametrize("damage", ["missing shard", "short shard", "other shard", "no tokenizer"])
def test_damaged_folder_of_the_same_recipe_is_written_again(tmp_path, damage):
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
    else:
        (tmp_path / "out/tokenizer.json").unlink()
    prepare("in.txt")
    assert contents(tmp_path / "out") == whole


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


def test_run_that_dies_while_it_replaces_data_leaves_no_index(tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("some text " * 50)
    prepare("in.txt")
    real_replace = prepare_data.os.replace

    def die_at_train(source, target):
        if str(target) == "out/out_train_000001.bin":
            raise KeyboardInterrupt
        real_replace(source, target)

    monkeypatch.setattr(prepare_data.os, "replace", die_at_train)
    with pytest.raises(KeyboardInterrupt):
        prepare("in.txt", "--tokenizer", "chars", "--force")
    assert not list((tmp_path / "out").iterdir())


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
            "sha256": "edea12951ca6e5fe50260b7dde873e7b3f85a831c905c3aac52828af194894cb",
        },
        {
            "name": "sympy_train_000001.bin",
            "split": "train",
            "tokens": 14_688_625,
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
        "INPUT_VAL_BIN='sympy/sympy_val_*.bin' VOCAB_SIZE=0 python train_gpt.py",
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
    monkeypatch.setattr(prepare_data.metadata, "version", {"sympy": "1.13.3"}.__getitem__)
    index = prepare("package:sympy")
    assert capsys.readouterr().err == (
        "warning: sympy 1.13.3 is installed, not 1.14.0: losses on this data "
        "cannot be compared with those of others; run pip install sympy==1.14.0\n"
    )
    assert index["source_version"] == "1.13.3"


# GPT-2


def gpt2_like_encoding():
    """tiktoken with GPT-2's pattern, but bytes and a few merges: nothing is to be downloaded."""
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken_ext.openai_public import r50k_pat_str

    merges = [b"\n\n", b"  ", b"    ", b" t", b"th", b" th", b"ab", b"abab", b"'s", b"!!"]
    ranks = {token: rank for rank, token in enumerate([*(bytes([i]) for i in range(256)), *merges])}
    return tiktoken.Encoding(
        "gpt2-like", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )


def messy_text(seed, count=4000):
    words, spaces = (
        ["the", "abab", "it's", "é", "日本", "42", "!!"],
        [" ", "  ", "\n", "\n\n", "\r\n", "\t"],
    )
    parts = [*words, *spaces, "\u2003", "\x85", "\x1c"]  # the last is white space to Python only
    return "".join(np.random.default_rng(seed).choice(parts, count))


@pytest.mark.parametrize("seed", range(5))
def test_pieces_have_the_tokens_of_the_whole(monkeypatch, seed):
    monkeypatch.setattr(prepare_data, "PIECE_CHARS", 7)
    encoding, text = gpt2_like_encoding(), messy_text(seed)
    parts = list(pieces(text))
    assert "".join(parts) == text
    assert len(parts) > 300
    tokens = [token for part in parts for token in encoding.encode_ordinary(part)]
    assert tokens == encoding.encode_ordinary(text)


def test_gpt2_takes_a_large_file_in_pieces(tmp_path, monkeypatch):
    encoding, lengths = gpt2_like_encoding(), []

    class Recorder:
        def encode_ordinary(self, text):
            lengths.append(len(text))
            return encoding.encode_ordinary(text)

    monkeypatch.setattr("tiktoken.get_encoding", {"gpt2": Recorder()}.__getitem__)
    text = "the line\n" * 300_000
    (tmp_path / "in.txt").write_text(text)
    index = prepare("in.txt", "--tokenizer", "gpt2")
    assert (
        max(lengths) < 1_050_000 and len(lengths) == 4
    )  # 2.43 million characters of train, 0.27 million of val
    assert (index["vocab_size"], index["eot_id"]) == (50257, 50256)
    cut = len(text) * 9 // 10
    assert read_split(tmp_path / "out", "train") == encoding.encode_ordinary(text[:cut])
    assert read_split(tmp_path / "out", "val") == encoding.encode_ordinary(text[cut:])


def test_gpt2_corpus_begins_each_document_with_end_of_text(tmp_path, monkeypatch):
    encoding = gpt2_like_encoding()
    monkeypatch.setattr("tiktoken.get_encoding", {"gpt2": encoding}.__getitem__)
    write_corpus(tmp_path)
    names = [name for name in sorted(FILES) if expected_split(name, 0.1) == "val"]
    (tmp_path / "texts" / names[0]).write_text(
        "<|endoftext|>"
    )  # in a text it is text, not the special token
    (tmp_path / "texts" / names[1]).write_text("")
    prepare("texts/**/*.txt", "--tokenizer", "gpt2")
    expected = []
    for name in names:
        expected += [50256, *encoding.encode_ordinary((tmp_path / "texts" / name).read_text())]
    assert read_split(tmp_path / "out", "val") == expected


def test_gpt2_without_network_says_what_to_do(tmp_path, monkeypatch, capsys):
    registry = pytest.importorskip("tiktoken.registry")

    def no_network(*args, **kwargs):
        raise OSError("network is blocked by the test")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.delitem(registry.ENCODINGS, "gpt2", raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    (tmp_path / "in.txt").write_text("some text " * 50)
    line = refused(capsys, 3, "in.txt", "--tokenizer", "gpt2")
    assert line.startswith(
        "prepare_data.py: error: --tokenizer gpt2: tiktoken could not get its vocabulary ("
    )
    assert line.endswith(
        "run once online with TIKTOKEN_CACHE_DIR=FOLDER set, or use --tokenizer bytes"
    )
    assert not (tmp_path / "out").exists()


# Refusals

TEXT_KINDS = "expected package:NAME, a file, or a quoted glob like 'texts/**/*.txt'"


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
        (3, ["texts"], f"--source texts: {TEXT_KINDS}, found a folder: correct the path"),
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
        (3, ["package:os.path"], "found no package: install it"),
        (3, ["package:__main__"], "found no package: install it"),
        (3, ["package:socket"], "found no such files: install it"),
        (
            3,
            ["texts/a/0.tx?"],
            "--val-fraction 0.1: expected files in train and in val, found all 1 in train: "
            "give more files, another fraction, or just one FILE",
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
            2,
            ["five.txt", "--tokenizer", "words"],
            "argument --tokenizer: invalid choice: 'words' (choose from ",
        ),
    ],
)
def test_refused_with_one_sentence_and_nothing_written(tmp_path, capsys, code, options, sentence):
    write_corpus(tmp_path)
    (tmp_path / "empty.txt").write_bytes(b"")
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
        "prepare_data.py: error: --tokenizer chars: expected a vocabulary of at most 65536, "
        "found 65537: use --tokenizer bytes"
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


def test_file_named_like_a_glob_is_one_file(tmp_path):
    (tmp_path / "draft[1].txt").write_text("some text " * 50)
    assert prepare("draft[1].txt")["split"].startswith("contiguous")
