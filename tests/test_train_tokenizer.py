"""scripts/train_tokenizer.py: a vocabulary that is whole, the same in every run, and of the text
that is trained on alone."""

import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

import prepare_data
import train_tokenizer
from store.contract import DataError
from tokenization import END, load
from train_tokenizer import main, train

SCRIPT = Path(train_tokenizer.__file__)
TEXT = "the cat sat on the mat, the cat's mat; 12345 12345 naïve 你好 😀\n" * 40


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def run(*options, out="tokenizer.json", source=("--source", "in.txt")):
    """Run the command, expect success, and return the vocabulary."""
    assert main([*source, "--out", out, *map(str, options)]) == 0
    return load(out)


def refused(capsys, code, *argv):
    """Run the command, expect the exit code, and return its one sentence, stderr's last line."""
    capsys.readouterr()
    if code == 2:
        with pytest.raises(SystemExit) as stopped:
            main([*argv])
        assert stopped.value.code == 2
    else:
        assert main([*argv]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    if code == 3:
        assert len(captured.err.splitlines()) == 1
    return captured.err.splitlines()[-1]


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_the_vocabulary_has_every_byte_and_the_end_last(pattern):
    tokenizer = run("--vocab-size", 280, "--pattern", pattern)
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (280, 279)
    assert {bytes([byte]) for byte in range(256)} < {*tokenizer.token_bytes}
    assert b" cat" in tokenizer.token_bytes
    for text in (TEXT, "unseen: Ω\0\x7f\u2028 \U0010ffff\r\n", END):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    library = tokenizers.Tokenizer.from_file("tokenizer.json")
    assert library.get_vocab_size() == 280
    assert library.encode(TEXT).ids == tokenizer.encode(TEXT).tolist()


def test_merges_are_those_of_the_known_example():
    """aaabdaaabac becomes five tokens by three merges (Wikipedia, byte-pair encoding)."""
    Path("example.txt").write_text("aaabdaaabac\n" * 100)
    tokenizer = run("--vocab-size", 260, source=("--source", "example.txt"))
    parts = [tokenizer.token_bytes[token] for token in tokenizer.encode("aaabdaaabac")]
    assert parts == [b"aaab", b"d", b"aaab", b"a", b"c"]


def test_smallest_vocabulary_is_the_bytes():
    tokenizer = run("--vocab-size", 257)
    assert len(tokenizer.encode(TEXT)) == len(TEXT.encode())


def test_two_runs_write_the_same_file(capsys):
    run("--vocab-size", 400, out="one.json")
    run("--vocab-size", 400, out="two.json")
    assert Path("one.json").read_bytes() == Path("two.json").read_bytes()
    run("--vocab-size", 400, out="one.json")  # and over the same one


def test_a_pair_below_the_least_frequency_is_not_merged(capsys):
    Path("few.txt").write_text("abab cdcd cdcd cdcd " + "." * 5)
    merged = {}
    for least in (1, 2, 4):
        tokenizer = run("--min-frequency", least, out=f"{least}.json", source=["--source=few.txt"])
        merged[least] = {*tokenizer.token_bytes[256:]}
        assert f"fewer than the 1,024 asked for: no further pair occurs {least} times" in (
            capsys.readouterr().out
        )
    assert b"abab" in merged[1]
    assert b" cdcd" in merged[2] and b"abab" not in merged[2]
    assert b"cd" in merged[4] and b" cdcd" not in merged[4]


def test_numbers_are_cut_by_the_pattern():
    ours = {}
    for pattern in ("gpt2", "gpt4"):
        tokenizer = run("--pattern", pattern, out=f"{pattern}.json")
        ours[pattern] = max(len(raw) for raw in tokenizer.token_bytes if raw.strip().isdigit())
    assert ours == {"gpt2": len(" 12345"), "gpt4": 3}


def test_the_part_for_validation_is_not_read(capsys):
    Path("in.txt").write_text("train " * 900 + "valid " * 100)
    tokenizer = run()
    assert b" train" in tokenizer.token_bytes
    assert not [raw for raw in tokenizer.token_bytes if b"va" in raw]
    assert "text: 5,400 bytes" in capsys.readouterr().out


def test_what_is_said_is_true(capsys):
    tokenizer = run("--vocab-size", 280)
    said = capsys.readouterr().out
    part = TEXT[: int(len(TEXT) * 0.9)]
    ratio = len(part.encode()) / len(tokenizer.encode(part))
    assert (
        f"vocabulary: 280   bytes per token: {ratio:.4f}   text: {len(part.encode()):,} b" in said
    )


@pytest.mark.parametrize("source", [["--source", "in.txt"], ["--text", TEXT], ["--source", "t x"]])
def test_the_printed_command_makes_data(capsys, source):
    for number in range(30):
        path = Path("t x", f"{number}.txt")
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{number} {TEXT}")
    tokenizer = run(source=source, out="a b/tokenizer.json")
    command = capsys.readouterr().out.partition("next: ")[2]
    python, script, *argv = shlex.split(command)
    assert (python, script) == ("python", str(SCRIPT.with_name("prepare_data.py")))
    assert prepare_data.main(argv) == 0
    out = Path(argv[-1])
    index = json.loads((out / "index.json").read_bytes())
    assert index["vocab_size"] == tokenizer.vocab_size
    assert (out / "tokenizer.json").read_bytes() == Path("a b/tokenizer.json").read_bytes()


def is_train(number):
    """The documented rule for a row, at a fraction of a half."""
    digest = hashlib.sha256(f"rows.jsonl:{number + 1}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >= 2**63


def test_rows_and_the_split_are_read_as_the_printed_command_reads_them(capsys):
    """Or else a vocabulary could not be had of other fields, and would know validation's text."""
    rows = [{"body": f"{number} {'abcd' * 9}\r\n"} for number in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--source", "rows.jsonl", "--out", "t.json"]
    assert "set --text-field" in refused(capsys, 3, *argv)
    options = ["--text-field", "body", "--val-fraction", "0.5", "--newline", "lf"]
    run(*options, source=("--source", "rows.jsonl"))
    said = capsys.readouterr().out
    argv = shlex.split(said.partition("next: ")[2])[2:]
    assert prepare_data.main(argv) == 0
    index = json.loads((Path(argv[-1]) / "index.json").read_bytes())
    assert index["val_fraction"] == 0.5 and index["newline"] == "lf"
    read = int(said.partition("text: ")[2].split()[0].replace(",", ""))
    documents = index["documents"]
    assert read == sum(len(f"{n} {'abcd' * 9}\n") for n in range(40) if is_train(n)) > 0
    assert documents["train"] == sum(map(is_train, range(40))) < 40


def test_a_large_text_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "LARGE_BYTES", 1000)
    monkeypatch.setattr(train_tokenizer, "MOST_BYTES", 2000)
    monkeypatch.setattr(train_tokenizer, "MEMORY_PER_BYTE", 2**20)
    run()
    size = len(TEXT.encode())
    note, warning = capsys.readouterr().err.splitlines()
    assert note == f"{size:,} bytes of text: needs up to about {size / 1024:.1f} GiB"
    assert warning.startswith("warning: in more than 2,000 bytes")


@pytest.mark.parametrize(
    "code, argv, sentence",
    [
        (2, ["--vocab-size", "256"], "expected 257 (the 256 bytes and <|endoftext|>) to 65536"),
        (2, ["--vocab-size", "65537"], "to 65536 (ids are uint16), found 65537"),
        (2, ["--min-frequency", "0"], "--min-frequency: expected 1 or more, found 0"),
        (2, ["--pattern", "gpt3"], "invalid choice: 'gpt3'"),
        (3, ["--out", "."], "--out .: expected a file, found a folder: try tokenizer.json"),
        (3, ["--source", "missing.txt"], "missing.txt: expected package:NAME"),
        (3, ["--source", "latin.txt"], "latin.txt: expected UTF-8 text, found an invalid byte at"),
        (3, ["--source", "empty.txt"], "expected text in the part to train on, found none"),
        (3, ["--text", ""], "expected text in the part to train on, found none"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(capsys, tmp_path, code, argv, sentence):
    Path("latin.txt").write_bytes("naïve text".encode("latin-1"))
    Path("empty.txt").write_text("")
    before = sorted(tmp_path.iterdir())
    complete = argv if "--out" in argv else ["--out", "t.json", *argv]
    if "--source" not in argv and "--text" not in argv:
        complete = ["--source", "in.txt", *complete]
    assert sentence in refused(capsys, code, *complete)
    assert sorted(tmp_path.iterdir()) == before


def test_no_source_is_a_wrong_option(capsys):
    assert "--source: expected a package" in refused(capsys, 2, "--out", "t.json")


def test_another_vocabulary_is_kept_until_forced(capsys):
    run("--vocab-size", 280)
    before = Path("tokenizer.json").read_bytes()
    argv = ["--source", "in.txt", "--vocab-size", "285", "--out", "tokenizer.json"]
    assert "or --force to replace it" in refused(capsys, 3, *argv)
    assert Path("tokenizer.json").read_bytes() == before
    assert main([*argv, "--force"]) == 0
    assert load("tokenizer.json").vocab_size == 285


def test_a_full_disk_keeps_the_old_file(capsys, monkeypatch, tmp_path):
    run("--vocab-size", 280)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    argv = ["--source", "in.txt", "--out", "tokenizer.json", "--force"]
    assert "No space left on device" in refused(capsys, 3, *argv)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match="pip install tokenizers"):
        train([TEXT], 280, 2, "gpt2")


def test_the_command_runs():
    command = [sys.executable, SCRIPT, "--text", TEXT, "--vocab-size", "280", "--out", "t.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("vocabulary: 280   bytes per token: ")
