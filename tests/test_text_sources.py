"""scripts/text_sources.py: what is text, which documents it has, and in which split each is."""

import collections
import gzip
import hashlib
import http.server
import json
import os
import random
import subprocess
import sys
import tarfile
import threading

import pytest

import prepare_data
import text_sources
from harness.settings import ROOT
from store.contract import DataError
from text_sources import Reading, articles, fetch, looks_like, open_source, survey


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, content):
    """A file with text, rows (a list of dicts) or bytes, packed and made as its name says."""
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(content), name, row_group_size=7)
        return
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    raw = content if isinstance(content, bytes) else content.encode()
    if name.endswith(".gz"):
        raw = gzip.compress(raw)
    if name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        half = len(raw) // 2  # two frames, as parallel packers write
        raw = b"".join(map(zstandard.ZstdCompressor().compress, (raw[:half], raw[half:])))
    with open(name, "wb") as file:
        file.write(raw)


PLAIN = Reading()


def documents(source, split, reading):
    """{name: text} of a split."""
    texts = collections.defaultdict(list)
    for piece in source.pieces(split, reading):
        assert piece.starts == (piece.name not in texts)
        texts[piece.name].append(piece.text)
    joined = "" if reading.as_text else b""
    return {name: joined.join(parts) for name, parts in texts.items()}


def read(spec, reading=PLAIN):
    """A source that was looked at, and its documents by split."""
    source = open_source(spec, reading)
    fetch(source)
    survey(source, reading, with_alphabet=False)
    return source, {split: documents(source, split, reading) for split in source.splits()}


def in_val(name):
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) < 0.1 * 2**64


# Files, folders, text


def test_a_folder_is_its_text_files_without_hidden_ones(capsys):
    write("texts/a.txt", "first")
    write("texts/deep/er/b.md", "second")
    write("texts/no_ending", "third")
    write("texts/.hidden", "no")
    write("texts/.git/c.txt", "no")
    write("texts/picture.png", b"\x89PNG\r\n\x1a\n" + bytes(100))
    source, splits = read("texts")
    found = splits["train"] | splits["val"]
    assert found == {"a.txt": "first", "deep/er/b.md": "second", "no_ending": "third"}
    assert all(in_val(name) for name in splits["val"])
    assert source.notes == [
        "1 file(s) look like other data and are left out, such as picture.png (a PNG picture)"
    ]


def test_links_in_a_circle_end_and_equal_files_count_once():
    write("texts/a.txt", "same")
    write("texts/b.txt", "other")
    write("texts/c.txt", "same")
    write("texts/e1.txt", "")
    write("texts/e2.txt", "")
    os.symlink("b.txt", "texts/d.txt")
    os.symlink("..", "texts/up")
    os.makedirs("elsewhere")
    write("elsewhere/f.txt", "far")
    os.symlink("../elsewhere", "texts/link")
    source, splits = read("texts")
    found = splits["train"] | splits["val"]
    expected = {"a.txt": "same", "b.txt": "other", "e1.txt": "", "e2.txt": "", "link/f.txt": "far"}
    assert found == expected
    assert source.notes == [
        "2 file(s) have the content of another and are left out, such as c.txt, which is a.txt"
    ]


@pytest.mark.parametrize("folder", ["plain", "with [1] bracket", "[a-c]"])
def test_brackets_in_names_are_no_wildcards(folder):
    write(f"{folder}/x [2].txt", "text of x")
    write(f"{folder}/y.txt", "text of y")
    for spec in (folder, f"{folder}/*.txt", f"{folder}/**"):
        _, splits = read(spec)
        assert {*splits["train"], *splits["val"]} == {"x [2].txt", "y.txt"}
    source, splits = read(f"{folder}/x [2].txt")
    assert splits == {"val": {"x [2].txt": "x"}, "train": {"x [2].txt": "text of "}}


def test_text_itself_is_a_source():
    source, splits = read("text:0123456789")
    assert splits == {"val": {"text": "9"}, "train": {"text": "012345678"}}
    assert source.names() == ["text"]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("as_text", [True, False])
def test_one_file_is_cut_at_a_character_or_a_byte(monkeypatch, ending, as_text):
    monkeypatch.setattr(text_sources, "CHUNK", 7)
    monkeypatch.setattr(text_sources, "PIECE_CHARS", 5)
    text = "é lines, 日本語\n" * 30 + "an end"
    write("in.txt" + ending, text)
    _, splits = read("in.txt" + ending, Reading(as_text=as_text, val_fraction=0.25))
    whole = text if as_text else text.encode()
    cut = len(whole) * 3 // 4
    name = "in.txt" + ending
    assert splits == {"train": {name: whole[:cut]}, "val": {name: whole[cut:]}}


def test_newline_lf_wherever_a_chunk_ends(monkeypatch):
    raw = b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\rfour\r"
    write("in.txt", raw)
    for chunk in range(3, 12):
        monkeypatch.setattr(text_sources, "CHUNK", chunk)
        source, splits = read("in.txt", Reading(newline="lf", val_fraction=0.5))
        assert splits["train"]["in.txt"] + splits["val"]["in.txt"] == "one\ntwo\n\nthree\rfour\r"
    assert source.notes == []
    source, splits = read("in.txt")
    assert (splits["train"]["in.txt"] + splits["val"]["in.txt"]).encode() == raw
    kept = "which is kept: --newline lf takes it out of the text"
    assert source.notes == [
        f"1 file(s) begin with a byte-order mark, {kept}",
        rf"1 file(s) have \r\n, {kept}",
    ]


# Rows


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.ndjson.zst", "r.parquet"])
def test_each_row_is_a_document(name):
    rows = [{"id": i, "text": f"row {i} of é"} for i in range(40)]
    rows[3]["text"], rows[5]["text"] = "", None
    write(f"data/{name}", rows)
    for spec in (f"data/{name}", "data", "data/*"):
        _, splits = read(spec)
        for split in ("train", "val"):
            assert splits[split] == {
                f"{name}:{i + 1}": f"row {i} of é"
                for i in range(40)
                if i not in (3, 5) and in_val(f"{name}:{i + 1}") == (split == "val")
            }
        assert splits["val"]
    _, as_bytes = read("data", PLAIN._replace(as_text=False))
    for split, texts in splits.items():
        assert as_bytes[split] == {key: text.encode() for key, text in texts.items()}


def test_another_field_is_named():
    write("r.jsonl", [{"body": "a"}, {"body": "b"}])
    write("r.parquet", [{"body": "a"}, {"body": "b"}])
    for name in ("r.jsonl", "r.parquet"):
        _, splits = read(name, Reading(text_field="body"))
        assert [*(splits["train"] | splits["val"]).values()] == ["a", "b"]
        with pytest.raises(DataError, match=r"found the (fields|columns) body: set --text-field"):
            read(name)[1]


@pytest.mark.parametrize(
    "line, found",
    [
        ("{", "no JSON"),
        ("[1]", "list"),
        ('"words"', "str"),
        ('{"text": 1}', "the fields text"),
        ('{"text": "\\ud800"}', "the fields text"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_line_that_is_no_row_is_named(line, found):
    write("r.jsonl", f'{{"text": "a"}}\n\n{line}\n')
    with pytest.raises(DataError, match=f"text in its field text on line 3, found {found}: set"):
        read("r.jsonl")


# What is no text

WORDS = "The same words again, and a number: 42.\n" * 50
OTHER = {
    "gzip": gzip.compress(WORDS.encode(), mtime=0),  # it is in a test's name
    "zstd": b"\x28\xb5\x2f\xfd" + random.Random(0).randbytes(50),
    "a zip archive": b"PK\x03\x04" + bytes(40),
    "UTF-16": WORDS.encode("utf-16"),
    "binary data": random.Random(1).randbytes(4000),
    "a shard of tokens": (20240520).to_bytes(4, "little") + bytes(2000),
    "parquet": b"PAR1" + bytes(40),
}


@pytest.mark.parametrize("kind, raw", [*OTHER.items(), ("UTF-16", WORDS.encode("utf-16-le"))])
def test_other_data_is_told_from_text(kind, raw):
    assert looks_like(raw) == kind
    write("in.txt", raw)
    for spec in ("in.txt", "*.txt"):
        with pytest.raises(
            DataError, match=f"^in.txt: expected text, found what looks like {kind}"
        ):
            open_source(spec, PLAIN)
    source = open_source("in.txt", Reading(as_text=False, binary=True))
    assert source.files.keys() == {"in.txt"}


def test_text_of_many_kinds_is_text():
    for text in (
        WORDS,
        "日本語。" * 500,
        "\x1b[1mbold\x1b[0m\f\n" * 9,
        "a\0b" * 9 + WORDS,
        "ü",
        "",
    ):
        assert looks_like(text.encode()) is None
    assert looks_like(("Grüße, naïve café\n" * 20).encode("latin-1")) is None
    assert looks_like("日本語".encode()[:-1]) is None


def test_a_tar_archive_in_gzip_is_no_text(tmp_path):
    write("a.txt", WORDS)
    with tarfile.open("t.tar.gz", "w:gz") as archive:
        archive.add("a.txt")
    with pytest.raises(DataError, match="found what looks like a tar archive"):
        open_source("t.tar.gz", PLAIN)


@pytest.mark.parametrize("name", ["in.txt.gz", "in.txt.zst"])
def test_a_file_that_ends_too_early_is_told(name):
    write(name, random.Random(0).randbytes(3000).hex())
    with open(name, "rb+") as file:
        file.truncate(1000)
    with pytest.raises(
        DataError, match=f"^{name}: expected what .* packs, found .*: fetch or make"
    ):
        read(name)


def test_a_file_that_is_not_readable_is_named(monkeypatch):
    write("in.txt", WORDS)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "in.txt")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(OSError, match="Permission denied: 'in.txt'"):
        open_source("in.txt", PLAIN)


@pytest.mark.parametrize(
    "module, name", [("zstandard", "x.txt.zst"), ("pyarrow", "x.parquet")], ids=str
)
def test_a_library_that_is_missing_is_named(monkeypatch, module, name):
    write(name, [{"text": "a"}] if name.endswith("parquet") else "text")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "compression", None)
    with pytest.raises(DataError, match=f"^{name}: .* needs {module}: run pip install {module}"):
        read(name)


# WikiText

PAGES = {
    "train": [
        " = First page = \n \n Words of it . \n \n = = A part = = \n \n More . \n \n",
        " = E = MC² = \n \n x = 1 \n = no heading , after text = \n \n",
        " = Third = \n \n Last words . \n",
    ],
    "val": [" = Fourth = \n \n Four . \n \n", " = Fifth = \n \n Five . \n"],
    "test": [" = Sixth = \n \n Six . \n"],
}


def rows_of(pages):
    """As the hub's files have them: a line is a row, a blank line is empty."""
    lines = "".join([" \n", *pages]).splitlines(keepends=True)
    return [{"text": line if line.strip() else ""} for line in lines]


def from_top(pages):
    """Pages as a file has them: its first line, which is blank, belongs to the first."""
    return [" \n" + pages[0], *pages[1:]]


def test_articles_are_the_pages():
    for pages in PAGES.values():
        lines = "".join(pages).splitlines(keepends=True)
        assert [*articles(lines)] == pages
        assert [*articles([" \n", *lines])] == from_top(pages)


@pytest.mark.parametrize("spec", ["wikitext", "wikitext/*", "wikitext/*.raw"])
def test_wikitext_files_are_known_by_name(spec):
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        write(f"wikitext/wiki.{name}.raw", " \n" + "".join(PAGES[split]))
    source, splits = read(spec)
    assert source.split_rule(PLAIN).startswith("as published")
    for split, pages in PAGES.items():
        assert [*splits[split].values()] == from_top(pages)
    os.remove("wikitext/wiki.valid.raw")
    source, _ = read(spec)
    assert source.split_rule(PLAIN).startswith("by file")


# The hub


class Hub:
    """The part of the hub that its client asks for files of a dataset."""

    COMMIT = "c" * 40

    def __init__(self, repo, files):
        self.repo, self.files, self.log = repo, files, []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request):
        path = request.path.split("?")[0]
        self.log.append(f"{request.command} {path}")
        name = path.removeprefix(f"/datasets/{self.repo}/resolve/{self.COMMIT}/")
        headers = {"X-Repo-Commit": self.COMMIT}
        if path.startswith(f"/api/datasets/{self.repo}/revision/") or (
            path == f"/api/datasets/{self.repo}"
        ):
            siblings = [
                {
                    "rfilename": file,
                    "size": len(raw),
                    "blobId": "0",
                    "lfs": {
                        "size": len(raw),
                        "sha256": hashlib.sha256(raw).hexdigest(),
                        "pointerSize": 1,
                    },
                }
                for file, raw in self.files.items()
            ]
            body = json.dumps({"id": self.repo, "sha": self.COMMIT, "siblings": siblings}).encode()
            headers["Content-Type"] = "application/json"
        elif name in self.files:
            body = self.files[name]
            headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        else:
            request.send_response(404)
            request.send_header("X-Error-Code", "RepoNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """A function from a repository's name and its files, as `write` takes them, to a Hub."""
    constants = pytest.importorskip("huggingface_hub.constants")
    hubs = []

    def start(repo, files):
        raws = {}
        for name, content in files.items():
            write(f"made/{name}", content)
            raws[name] = (tmp_path / "made" / name).read_bytes()
        hubs.append(Hub(repo, raws))
        monkeypatch.setenv("HF_ENDPOINT", hubs[-1].endpoint)
        return hubs[-1]

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield start
    for hub in hubs:
        hub.close()


def wikitext_files():
    folder = "wikitext-103-raw-v1"
    train = rows_of(PAGES["train"])
    assert "MC²" in train[9]["text"]
    return {
        f"{folder}/train-00000-of-00002.parquet": train[:11],  # within the second page
        f"{folder}/train-00001-of-00002.parquet": train[11:],
        f"{folder}/validation-00000-of-00001.parquet": rows_of(PAGES["val"]),
        f"{folder}/test-00000-of-00001.parquet": rows_of(PAGES["test"]),
        "wikitext-2-raw-v1/train-00000-of-00001.parquet": [{"text": "another config"}],
        "README.md": "about",
    }


def test_wikitext_of_the_hub_becomes_shards(serve, tmp_path):
    """The same as of its files: the blank lines, which rows have without their white space."""
    hub = serve("Salesforce/wikitext", wikitext_files())
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, str(ROOT / "scripts/prepare_data.py")]
    command += ["--source", "hf:Salesforce/wikitext/wikitext-103-raw-v1"]
    command += ["--tokenizer", "bytes", "--out", "data/wikitext103"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "data/wikitext103/index.json").read_text())
    assert index["source_version"] == hub.COMMIT
    assert index["documents"] == {"train": 3, "val": 2, "test": 1}
    assert index["split"] == "as published: the source's own train, validation and test"
    shards = {
        "val": "wikitext103_val_000000.bin",
        "train": "wikitext103_train_000001.bin",
        "test": "wikitext103_test_000000.bin",
    }
    assert {shard["split"]: shard["name"] for shard in index["shards"]} == shards
    for split, name in shards.items():
        raw = (tmp_path / "data/wikitext103" / name).read_bytes()[1024:]
        expected = b"".join(
            (256).to_bytes(2, "little") + b"".join(bytes([byte, 0]) for byte in page.encode())
            for page in from_top(PAGES[split])
        )
        assert raw == expected

    hub.close()
    hub.log.clear()
    again = subprocess.run(command, env=env, capture_output=True, text=True)
    assert again.returncode == 0 and "already there" in again.stdout, again.stderr
    changed = subprocess.run([*command, "--newline", "lf"], env=env, capture_output=True, text=True)
    assert changed.returncode == 3
    assert "expected an answer of the Hugging Face hub, found " in changed.stderr
    assert len(changed.stderr.splitlines()) == 1


@pytest.mark.parametrize("endpoint", ["http://[::", "huggingface.co", "http://a:b", "http://"])
def test_an_endpoint_that_is_no_address_is_refused(monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(DataError, match="^HF_ENDPOINT=.*: expected an address such as https://"):
        text_sources.find_on_hub("hf:someone/texts", None)


def test_any_dataset_of_the_hub(serve):
    rows = [{"text": f"document {i}"} for i in range(30)]
    serve("someone/texts", {"data/train-00000-of-00001.parquet": rows})
    for spec in ("hf:someone/texts", "hf:someone/texts/data"):
        source, splits = read(spec)
        name = "data/train-00000-of-00001.parquet"
        assert splits["train"] | splits["val"] == {
            f"{name}:{i + 1}": f"document {i}" for i in range(30)
        }
        assert all(in_val(document) for document in splits["val"]) and splits["val"]
        assert source.version == Hub.COMMIT


def test_test_of_the_hub_stays_test_where_there_is_no_validation(serve):
    rows = [{"text": f"document {i}"} for i in range(30)]
    serve("someone/texts", {"train-0.parquet": rows, "test-0.parquet": [{"text": "held out"}]})
    source, splits = read("hf:someone/texts")
    assert splits["test"] == {"test-0.parquet:1": "held out"}
    assert splits["train"] | splits["val"] == {
        f"train-0.parquet:{i + 1}": f"document {i}" for i in range(30)
    }
    assert splits["val"] and source.split_rule(PLAIN).endswith("; test as published")


def test_unfinished_data_of_the_hub_go_on_at_their_commit(serve, monkeypatch, tmp_path):
    rows = [{"text": f"document {i}"} for i in range(300)]
    hub = serve("someone/texts", {"train.parquet": rows})
    real_replace = os.replace

    def die(source, target):
        if str(target).endswith("out_train_000003.bin"):
            raise KeyboardInterrupt
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    argv = ["--source", "hf:someone/texts", "--shard-tokens", "900"]
    assert prepare_data.main([*argv, "--out", "out"]) == 130
    monkeypatch.setattr(os, "replace", real_replace)
    hub.log.clear()
    assert prepare_data.main([*argv, "--out", "out"]) == 0
    assert hub.log[0] == f"GET /api/datasets/someone/texts/revision/{Hub.COMMIT}"
    assert not any(line.startswith("GET /datasets") for line in hub.log)
    assert prepare_data.main([*argv, "--out", "whole/out"]) == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole/out").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole


@pytest.mark.parametrize(
    "spec, found",
    [
        ("hf:someone", "expected hf:OWNER/NAME or hf:OWNER/NAME/CONFIG"),
        ("hf:someone/texts", "found parquet in a, b: name a folder"),
        ("hf:someone/texts/c", "found parquet in a, b: name a folder"),
        ("hf:someone/nothing", "found HTTP 404: correct the name"),
    ],
)
def test_what_the_hub_does_not_have_is_said(serve, spec, found):
    rows = [{"text": "document"}]
    serve("someone/texts", {"a/train.parquet": rows, "b/train.parquet": rows})
    with pytest.raises(DataError, match=found):
        open_source(spec, PLAIN)


def test_a_file_that_came_wrong_is_refused(serve):
    hub = serve("someone/texts", {"train.parquet": [{"text": "document"}]})
    source = open_source("hf:someone/texts", PLAIN)
    hub.files["train.parquet"] = hub.files["train.parquet"][::-1]
    with pytest.raises(DataError, match="expected SHA-256 .*, found another: remove it"):
        fetch(source)
