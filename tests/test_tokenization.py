"""scripts/tokenization.py: text comes back, and ids are those of the `tokenizers` library.

Vocabularies are trained here by that library; nothing is downloaded.
"""

import base64
import functools
import hashlib
import http.server
import json
import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken.load
import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

import tokenization
from store.contract import DataError
from text_sources import find_package
from tokenization import END, SPLITS, from_chars, load, named, parse, pieces

# Letters, digits and white space of several kinds, and what the patterns look for
WORDS = [
    *"abZ0é\u017f\u212aİß1٣½²Ⅷ中日のア。、'!./_^\0\x7f\x1c\x1f",
    *" \n\r\t\x0b\x0c\x85\xa0\u1680\u2003\u200b\u2028\u3000\ufeff\u0301",
    *[" ", "  ", "    ", "\n\n", "\r\n", "'s", "'S", "'\u017f", "'ll", "'VE", "'re", "n't"],
    *["the", " the", "return", "123", "😀", "👨\u200d👩\u200d👧", "\u0e01\u0e33", END],
]


def fuzzed(count, seed, longest=30):
    """Strings of those words, and every fourth of any characters."""
    rng = random.Random(seed)
    planes = [(0x20, 0x7F), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x110000)]
    for number in range(count):
        if number % 4:
            yield "".join(rng.choices(WORDS, k=rng.randrange(longest)))
        else:
            yield "".join(
                chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randrange(longest))
            )


@functools.cache
def trained(split):
    """A small vocabulary as the library makes and writes it; "none": its tokens cross every cut."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=split == "gpt2"
    )
    if split in SPLITS and split != "gpt2":
        cut = pre_tokenizers.Split(Regex(SPLITS[split].written), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=999,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [Path(tokenization.__file__).read_text(), *fuzzed(2000, 99)]
    library.train_from_iterator(texts, trainer)
    library.add_special_tokens([END])
    return library.to_str()


@functools.cache
def tokenizer_of(kind):
    """One of each: "bytes", "chars", and the names of the splits."""
    if kind == "bytes":
        return named("bytes")
    if kind == "chars":
        return from_chars("".join(fuzzed(4000, 0)), has_eot=True)
    return parse(trained(kind), kind)


@functools.cache
def crossing(split):
    """A tokenizer whose ids change wherever text is cut in another place."""
    vocab = json.loads(trained("none"))["model"]["vocab"]
    ranks = {tokenization.unwritten(name): token for name, token in vocab.items()}
    return tokenization.BpeTokenizer(ranks, {END: len(ranks)}, split, "crossing")


KINDS = ["bytes", "chars", *SPLITS]
kinds = pytest.mark.parametrize("kind", KINDS)
splits = pytest.mark.parametrize("split", SPLITS)


def as_library(tokenizer):
    """What the `tokenizers` library makes of the file that we write."""
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    library.encode_special_tokens = True  # as data must be encoded: text is text
    return library


# Text comes back


@kinds
def test_text_comes_back_whole_and_id_by_id(kind):
    tokenizer = tokenizer_of(kind)
    for text in ["", *fuzzed(1000, 0)]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16 and ids.ndim == 1
        assert ids.tolist() == tokenizer.encode(text.encode()).tolist()
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.token_bytes[token] for token in ids) == text.encode()
        decoder = tokenizer.decoder()
        assert "".join(map(decoder.feed, ids)) + decoder.flush() == text


def test_any_bytes_come_back_as_bytes():
    raw = random.Random(0).randbytes(100_000)
    ids = named("bytes").encode(raw)
    assert ids.tolist() == [*raw]
    assert named("bytes").decode(ids) == raw.decode(errors="replace")


@kinds
def test_every_id_has_bytes_and_the_end_has_none(kind):
    tokenizer = tokenizer_of(kind)
    end = tokenizer.eot_id
    assert end == tokenizer.vocab_size - 1 == len(tokenizer.token_bytes) - 1
    assert [token for token, raw in enumerate(tokenizer.token_bytes) if not raw] == [end]
    assert tokenizer.decode([end]) == tokenizer.decoder().feed(end) == ""


@kinds
def test_the_written_end_is_text(kind):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(f"a{END}b")
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == f"a{END}b"


@pytest.mark.parametrize("kind", ["bytes", "gpt2"])
def test_a_decoder_never_gives_a_broken_character(kind):
    tokenizer = tokenizer_of(kind)
    text = "é日😀\u0e01" * 50
    decoder = tokenizer.decoder()
    parts = [decoder.feed(token) for token in tokenizer.encode(text)]
    assert len(set(parts)) > 3 and "" in parts  # some characters take several ids
    assert all(part in text for part in parts) and "".join(parts) == text
    for token in tokenizer.encode("😀".encode()[:2]) if kind == "bytes" else [240]:
        decoder.feed(token)
    assert decoder.flush() in ("\ufffd", "")


def test_broken_characters_are_marked_in_both_ways_of_decoding():
    ids = [*"é".encode()[:1], 97, 256, 0xF0, 0x9F]
    decoder = named("bytes").decoder()
    assert [*map(decoder.feed, ids), decoder.flush()] == ["", "\ufffda", "", "", "", "\ufffd"]
    assert named("bytes").decode(ids) == "\ufffda\ufffd"


@pytest.mark.parametrize("token", [-1, 257, 65_535])
def test_an_id_outside_the_vocabulary_is_refused(token):
    sentence = rf"token {token}: expected an id in 0\.\.256"
    with pytest.raises(DataError, match=sentence):
        named("bytes").decode(np.array([1, token]))
    with pytest.raises(DataError, match=sentence):
        named("bytes").decoder().feed(token)


@pytest.mark.parametrize("kind", ["chars", "gpt2"])
def test_what_is_not_utf8_is_refused(kind):
    with pytest.raises(DataError, match="expected UTF-8.* at offset 1"):
        tokenizer_of(kind).encode(b"a\xff")
    with pytest.raises(DataError, match="surrogates not allowed at offset 2"):
        tokenizer_of(kind).encode("aa\ud800")


# The same ids as the library


@pytest.mark.parametrize("vocabulary", [tokenizer_of, crossing])
@splits
def test_ids_are_those_of_the_library(split, vocabulary):
    tokenizer, texts = vocabulary(split), [*fuzzed(20_000 if split == "gpt2" else 8_000, 1)]
    library = as_library(tokenizer)
    encodings = library.encode_batch(texts)
    for text, encoding in zip(texts, encodings):
        assert tokenizer.encode(text).tolist() == encoding.ids, text
    ids = [encoding.ids for encoding in encodings]
    assert library.decode_batch(ids, skip_special_tokens=False) == texts


def test_splits_differ_in_the_digits_of_a_token():
    found = {split: regex.findall(SPLITS[split].fast, "12345") for split in SPLITS}
    assert found == {
        "gpt2": ["12345"],
        "gpt4": ["123", "45"],
        "gpt4-2digits": ["12", "34", "5"],
        "gpt4-1digit": [*"12345"],
    }


@pytest.mark.parametrize("split", ["gpt2", "gpt4"])
def test_ids_of_files_are_those_of_the_library(split):
    tokenizer = tokenizer_of(split)
    files = sorted(find_package("package:sympy")[0].values())[::60]
    texts = [path.read_text() for path in files]
    encodings = as_library(tokenizer).encode_batch(texts)
    assert len(texts) > 10
    for text, encoding in zip(texts, encodings):
        assert tokenizer.encode(text).tolist() == encoding.ids


@pytest.mark.parametrize("kind", ["bytes", "chars"])
def test_ids_without_merges_are_those_of_the_library(kind):
    tokenizer, texts = tokenizer_of(kind), [*fuzzed(1000, 0)]
    library = as_library(tokenizer)
    assert library.get_vocab_size() == tokenizer.vocab_size
    for text, encoding in zip(texts, library.encode_batch(texts)):
        assert tokenizer.encode(text).tolist() == encoding.ids
        assert library.decode(encoding.ids, skip_special_tokens=False) == text


@kinds
def test_the_library_knows_the_end(kind):
    tokenizer = tokenizer_of(kind)
    library = as_library(tokenizer)
    library.encode_special_tokens = False
    assert library.token_to_id(END) == tokenizer.eot_id
    assert library.encode(END).ids == [tokenizer.eot_id]
    assert library.decode([tokenizer.eot_id]) == ""  # special tokens are skipped


@kinds
def test_what_is_written_is_read_as_the_same(kind, tmp_path):
    tokenizer = tokenizer_of(kind)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    for again in (load(tmp_path), load(tmp_path / "tokenizer.json"), named(str(tmp_path))):
        assert type(again) is type(tokenizer)
        assert again.to_json() == tokenizer.to_json()
        assert again.token_bytes == tokenizer.token_bytes


# Files of others


@splits
def test_merges_are_recovered_from_the_order_of_ids(split):
    theirs = json.loads(trained(split))["model"]["merges"]
    ours = json.loads(tokenizer_of(split).to_json())["model"]["merges"]
    assert len(theirs) > 500 and ours == theirs


def edited(split="gpt2", **changes):
    """The library's file with other values at the top level, or of `model` by model_NAME."""
    about = json.loads(trained(split))
    for name, value in changes.items():
        if name.startswith("model_"):
            about["model"][name.removeprefix("model_")] = value
        else:
            about[name] = value
    return about


def test_merges_of_older_files_are_read():
    merges = [" ".join(pair) for pair in edited()["model"]["merges"]]
    old = parse(json.dumps(edited(model_merges=merges)), "old")
    assert old.to_json() == tokenizer_of("gpt2").to_json()


def test_special_tokens_may_come_first():
    about = edited()
    first = ["<s>", END, "</s>"]
    about["added_tokens"] = [
        about["added_tokens"][0] | {"id": token, "content": content}
        for token, content in enumerate(first)
    ]
    vocab = {name: token + 3 for name, token in about["model"]["vocab"].items()}
    about["model"]["vocab"] = dict(zip(first, range(3))) | vocab
    tokenizer = parse(json.dumps(about), "first")
    assert (tokenizer.eot_id, tokenizer.vocab_size) == (1, len(vocab) + 3)
    library = as_library(tokenizer)
    for text in fuzzed(300, 2):
        ids = tokenizer.encode(text).tolist()
        assert ids == [token + 3 for token in tokenizer_of("gpt2").encode(text)]
        assert ids == library.encode(text).ids
    assert tokenizer.decode([0, 1, 2]) == ""


def tiktoken_lines(ranks):
    """A *.tiktoken file."""
    ordered = sorted(ranks, key=ranks.get)
    return b"".join(base64.b64encode(token) + b" %d\n" % ranks[token] for token in ordered)


def merge_lines():
    """A vocab.bpe of the small vocabulary."""
    merges = edited()["model"]["merges"]
    return "\n".join(["#version: 0.2", *map(" ".join, merges), ""]).encode()


def test_tiktoken_and_bpe_files_are_read_as_tiktoken_reads_them(tmp_path):
    tokenizer = tokenizer_of("gpt2")
    (tmp_path / "x.tiktoken").write_bytes(tiktoken_lines(tokenizer.ranks))
    (tmp_path / "vocab.bpe").write_bytes(merge_lines())
    (tmp_path / "encoder.json").write_text(json.dumps(edited()["model"]["vocab"]))
    theirs = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "x.tiktoken"))
    assert load(tmp_path / "x.tiktoken").ranks == theirs
    theirs = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        str(tmp_path / "vocab.bpe"), str(tmp_path / "encoder.json")
    )
    assert load(tmp_path / "vocab.bpe").ranks == theirs
    assert load(tmp_path / "x.tiktoken").to_json() == tokenizer.to_json()
    assert load(tmp_path / "vocab.bpe").to_json() == tokenizer.to_json()


def test_a_gap_in_tiktoken_ranks_is_the_end(tmp_path):
    ranks = {
        token: rank + (rank >= 300) for token, rank in tokenizer_of("gpt2").ranks.items()
    }  # as p50k_base has it
    (tmp_path / "x.tiktoken").write_bytes(tiktoken_lines(ranks))
    assert load(tmp_path / "x.tiktoken").eot_id == 300


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPLIT = {
    "type": "Split",
    "pattern": {"Regex": r"\w+|\W+"},
    "behavior": "Isolated",
    "invert": False,
}


def with_vocab(change):
    """The library's file after a change to its vocabulary."""
    about = edited()
    change(about["model"]["vocab"])
    return about


REFUSED = {
    "the model WordPiece": lambda: edited(model_type="WordPiece"),
    "the model Unigram": lambda: edited(model_type="Unigram", model_vocab=[["a", 0.0]]),
    "byte_fallback True": lambda: edited(model_byte_fallback=True),
    "dropout 0.1": lambda: edited(model_dropout=0.1),
    "end_of_word_suffix '</w>'": lambda: edited(model_end_of_word_suffix="</w>"),
    "the normalizer NFC": lambda: edited(normalizer={"type": "NFC"}),
    "without prefix space": lambda: edited(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}),
    "none of gpt2": lambda: edited(pre_tokenizer={"type": "Whitespace"}),
    "pre_tokenizer that is none": lambda: edited(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [SPLIT, BYTE_LEVEL | {"use_regex": False}],
        }
    ),
    "which is not special": lambda: edited(
        added_tokens=[edited()["added_tokens"][0] | {"special": False}]
    ),
    "not in the order of their ids": lambda: edited(model_merges=edited()["model"]["merges"][::-1]),
    "ids that are not 0 to": lambda: with_vocab(lambda vocab: vocab.update({"Ġthe": 5000})),
    "no token for 1 of the 256 bytes (0x61)": lambda: with_vocab(lambda vocab: vocab.pop("a")),
    "that no two earlier ones make": lambda: edited(
        model_vocab=edited()["model"]["vocab"] | {"qqqq": 1000}
    ),
    "a vocabulary of 70,256, more than": lambda: edited(
        model_vocab=dict(zip(map(tokenization.written, map(bytes, all_bytes())), range(256)))
        | {f"a{number:x}": 256 + number for number in range(70_000)},
        added_tokens=[],
    ),
    "other contents (KeyError": lambda: {"version": "1.0"},
    "other contents (ValueError: kind 'x'": lambda: {"kind": "x"},
    "other contents (TypeError": lambda: [1, 2],
    "of characters that are not 0, 1": lambda: edited(
        pre_tokenizer=None, model_merges=[], model_vocab={"a": 1, "b": 0, "c": 3}
    ),
    "of bytes that are not their values": lambda: edited(
        pre_tokenizer=BYTE_LEVEL | {"use_regex": False},
        model_merges=[],
        model_vocab=dict(zip("ab", range(2))),
    ),
}


def all_bytes():
    return [[byte] for byte in range(256)]


@pytest.mark.parametrize("found", REFUSED)
def test_what_cannot_be_held_exactly_is_refused_in_one_sentence(found, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(REFUSED[found]()))
    with pytest.raises(DataError) as refused:
        load(tmp_path)
    sentence = str(refused.value)
    assert found in sentence and str(tmp_path) in sentence and "\n" not in sentence
    assert "use the tokenizer bytes" in sentence


@pytest.mark.parametrize(
    "name, content, found",
    [
        ("tokenizer.json", b"{", "not JSON"),
        ("tokenizer.json", b"\xff\xfe", "not JSON"),
        ("tokenizer.json", b"[" * 100_000, "not JSON"),
        ("x.tiktoken", b"YQ== 0\nb\n", "line 2, which is not 'base64 rank'"),
        ("x.tiktoken", b"YQ== 0\n", "no token for 255 of the 256 bytes"),
        ("vocab.bpe", b"#version: 0.2\na b c\n", "lines that are not merges"),
        ("vocab.bpe", "a \u4e2d\n".encode(), "lines that are not merges"),
    ],
)
def test_other_contents_are_refused(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=found):
        load(tmp_path / name)


@pytest.mark.parametrize("name", ["gpt3", ".", "missing/tokenizer.json"])
def test_a_name_that_is_none_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="expected bytes, gpt2, a tokenizer.json, a folder with"):
        named(name)


# Records of earlier versions


def test_records_of_earlier_versions_are_read(monkeypatch):
    def old(**about):
        return parse(json.dumps(about), "old")

    assert old(kind="bytes", vocab_size=257, eot_id=256).to_json() == named("bytes").to_json()
    chars = ["\n", "a", "日"]
    tokenizer = old(kind="chars", vocab_size=4, eot_id=3, chars=chars)
    assert tokenizer.to_json() == from_chars("日a\n", has_eot=True).to_json()
    tokenizer = old(kind="chars", vocab_size=3, eot_id=None, chars=chars)
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (3, None)
    monkeypatch.setattr(tokenization, "gpt2", lambda: "GPT-2's")
    assert old(kind="gpt2", vocab_size=50257, eot_id=50256) == "GPT-2's"


# Characters


def test_characters_are_sorted_and_the_end_is_last():
    tokenizer = from_chars("ba\u4e2da", has_eot=True)
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (4, 3)
    assert tokenizer.encode("ab\u4e2d").tolist() == [0, 1, 2]
    assert from_chars("ab", has_eot=False).eot_id is None


@pytest.mark.parametrize("char", ["c", "\0", "\U0010ffff", "\x60"])
def test_a_character_without_an_id_is_refused(char):
    with pytest.raises(DataError) as refused:
        from_chars("ab", has_eot=True).encode("abba" + char + "a")
    assert f"found {char!r} at offset 4" in str(refused.value)


def test_a_vocabulary_of_characters_has_limits():
    many = "".join(map(chr, range(0x10000, 0x20000)))
    assert from_chars(many, has_eot=False).vocab_size == 65_536
    with pytest.raises(DataError, match="expected a vocabulary of 1 to 65536, found 65537"):
        from_chars(many, has_eot=True)
    with pytest.raises(DataError, match="found 0"):
        from_chars("", has_eot=False)


# Pieces


@splits
@pytest.mark.parametrize("length", [1, 3, 8])
def test_pieces_have_the_tokens_of_the_whole(monkeypatch, split, length):
    monkeypatch.setattr(tokenization, "PIECE_CHARS", length)
    tokenizer, texts = crossing(split), [*fuzzed(1000, length, longest=60)]
    rng = random.Random(length)
    texts += ["".join(rng.choices([" ", "\n", "\t", "x", "!"], k=80)) for _ in range(300)]
    cuts = 0
    for text, encoding in zip(texts, as_library(tokenizer).encode_batch(texts)):
        parts = [*pieces(text, SPLITS[split].line_ends)]
        cuts += len(parts)
        assert "".join(parts) == text
        assert tokenizer.encode(text).tolist() == encoding.ids, text
    assert cuts > 3 * len(texts) / length


@pytest.mark.parametrize(
    "split, unit", [("gpt2", " \n"), ("gpt2", "  "), ("gpt4", "  "), ("gpt4", "\n ")]
)
def test_long_white_space_before_a_word_is_encoded_all_the_same(split, unit):
    """There tiktoken's search gives up, which it does for one piece."""
    tokenizer = crossing(split)
    text = "a\n" + unit * 525_000 + "x"
    with pytest.raises(ValueError, match="Max stack size exceeded"):
        tokenizer_of("gpt2").encoding.encode_to_numpy(text)
    assert tokenizer.encode(text).tolist() == as_library(tokenizer).encode(text).ids


@pytest.mark.parametrize("split", ["gpt2", "gpt4"])
@pytest.mark.parametrize("char", ["^", "a", " ", "1"])
def test_two_million_equal_characters_are_encoded(split, char):
    tokenizer = tokenizer_of(split)
    lengths = np.array([*map(len, tokenizer.token_bytes)])
    ids = tokenizer.encode(char * 2_000_000)
    assert lengths[ids].sum() == 2_000_000
    assert {*b"".join(tokenizer.token_bytes[token] for token in {*ids})} == {ord(char)}


# GPT-2


@pytest.fixture
def small_gpt2(tmp_path, monkeypatch):
    """The small vocabulary in place of GPT-2's, which is nowhere; returns its ranks and merges."""
    ranks, merges = tiktoken_lines(tokenizer_of("gpt2").ranks), merge_lines()
    monkeypatch.setattr(tokenization, "RANKS_SHA256", hashlib.sha256(ranks).hexdigest())
    monkeypatch.setattr(tokenization, "MERGES_SHA256", hashlib.sha256(merges).hexdigest())
    monkeypatch.setattr(tokenization, "RANKS_URL", "http://127.0.0.1:1/ranks")
    monkeypatch.setattr(tokenization, "MERGES_URL", "http://127.0.0.1:1/merges")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "cache").mkdir()
    return ranks, merges


def put_in_cache(folder, url, content):
    path = folder / "cache" / hashlib.sha1(url.encode()).hexdigest()
    path.write_bytes(content)
    return path


def put_in_package(folder, content):
    """openai-whisper with a file, and with an import that fails."""
    path = folder / "whisper/assets/gpt2.tiktoken"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    (folder / "whisper/__init__.py").write_text("raise ImportError('must not be imported')")


def test_gpt2_is_where_tiktoken_and_others_have_it(small_gpt2, tmp_path):
    """The file names are those that tiktoken gives to the two published addresses."""
    published = {
        "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken": "0ea1e91bbb3a60"
        "f729a8dc8f777fd2fc07cd8df4",
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe": "6d1cbeee0f20"
        "b3d9449abfede4726ed8212e3aee",
    }
    source = Path(tokenization.__file__).read_text()
    for url, name in published.items():
        assert url in source
        assert hashlib.sha1(url.encode()).hexdigest() == name


@pytest.mark.parametrize("place", ["ranks in the cache", "merges in the cache", "package"])
def test_gpt2_is_found_without_a_network(small_gpt2, tmp_path, place):
    ranks, merges = small_gpt2
    if place == "ranks in the cache":
        put_in_cache(tmp_path, tokenization.RANKS_URL, ranks)
    elif place == "merges in the cache":
        put_in_cache(tmp_path, tokenization.MERGES_URL, merges)
    else:
        put_in_package(tmp_path, ranks)
    assert named("gpt2").to_json() == tokenizer_of("gpt2").to_json()


@pytest.mark.parametrize("place", ["cache", "package", "nowhere"])
def test_another_file_is_never_taken_for_gpt2(small_gpt2, tmp_path, place):
    wrong = small_gpt2[0] + b"\n"
    if place == "cache":
        put_in_cache(tmp_path, tokenization.RANKS_URL, wrong)
        put_in_cache(tmp_path, tokenization.MERGES_URL, wrong)
    elif place == "package":
        put_in_package(tmp_path, wrong)
    with pytest.raises(DataError) as refused:
        named("gpt2")
    sentence = str(refused.value)
    assert "\n" not in sentence
    for way in ("TIKTOKEN_CACHE_DIR=FOLDER", "openai-whisper", "a copy of gpt2.tiktoken"):
        assert way in sentence


@pytest.mark.parametrize("is_right", [True, False])
def test_gpt2_is_fetched_checked_and_kept(small_gpt2, tmp_path, monkeypatch, is_right):
    content = small_gpt2[0] if is_right else b"another"

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/ranks"
        monkeypatch.setattr(tokenization, "RANKS_URL", url)
        try:
            if is_right:
                assert named("gpt2").to_json() == tokenizer_of("gpt2").to_json()
            else:
                with pytest.raises(DataError, match=r"could be fetched \(ValueError\)"):
                    named("gpt2")
        finally:
            server.shutdown()
            thread.join()
    assert len([*(tmp_path / "cache").iterdir()]) == is_right
    if is_right:
        assert named("gpt2").vocab_size == 1000  # the server has gone


def test_a_vocabulary_without_tiktoken_says_what_to_install(monkeypatch):
    tokenizer = parse(trained("gpt2"), "fresh")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(DataError, match="pip install tiktoken"):
        tokenizer.encode("text")
    assert tokenizer.decode([tokenizer.ranks[b"a"]]) == "a"
