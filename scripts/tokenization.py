"""Text to token ids and back: bytes, characters, or byte-level BPE as GPT-2 and GPT-4 have it.

    tokenizer = named("gpt2")               # or "bytes", or load("data/shakespeare")
    ids = tokenizer.encode("Hello, world")  # (n,) uint16
    assert tokenizer.decode(ids) == "Hello, world"

Files are those of Hugging Face's `tokenizers` library, which gives the same ids for them.
"""

import base64
import codecs
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib import util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from store.contract import DataError
from store.files import regular

MAX_VOCAB = 1 << 16  # shards store uint16
END = "<|endoftext|>"
PIECE_CHARS = 1 << 18

# One file with GPT-2's ranks, and the older one with its merges, as tiktoken fetches and caches
# them (openai/tiktoken, tiktoken_ext/openai_public.py and tiktoken/load.py).
RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
MERGES_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


class Split(NamedTuple):
    """Where text is cut before byte pairs are merged: one regular expression in two dialects."""

    written: str | None  # in tokenizer.json, where $ would end a line; None: ByteLevel's own
    fast: str  # the same for tiktoken, with possessive quantifiers
    line_ends: bool  # white space up to its last newline is a token


def gpt4_split(digits: str) -> Split:
    """GPT-4's (cl100k_base) with as many digits a token as the quantifier says."""
    written = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    # tiktoken has \s++$ before \s*[\r\n], which at the end of a text is not the original
    fast = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}DIGITS"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s++$|\s+(?!\S)|\s"
    )
    return Split(written.replace("DIGITS", digits), fast.replace("DIGITS", digits), True)


SPLITS = {
    "gpt2": Split(
        None,
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        False,
    ),
    "gpt4": gpt4_split("{1,3}"),
    "gpt4-2digits": gpt4_split("{1,2}"),  # karpathy/nanochat
    "gpt4-1digit": gpt4_split(""),  # Qwen2
}


#######################################################################
# Bytes as characters
#######################################################################


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in GPT-2's files (openai/gpt-2,
    src/encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in range(256)]
    for index, byte in enumerate(others):
        characters[byte] = chr(256 + index)
    return characters


CHARACTER_OF_BYTE = byte_characters()
BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}


def written(token: bytes) -> str:
    """A token as tokenizer.json and vocab.bpe write it."""
    return "".join(CHARACTER_OF_BYTE[byte] for byte in token)


def unwritten(text: str) -> bytes:
    """The bytes of a written token. Raises KeyError for a character that stands for none."""
    return bytes(BYTE_OF_CHARACTER[character] for character in text)


#######################################################################
# Tokenizers
#######################################################################


def text_of(text: str | bytes) -> str:
    """The text as characters. Raises DataError if it is not UTF-8."""
    try:
        if isinstance(text, bytes):
            return text.decode("utf-8")
        text.encode("utf-8")  # fails for half of a surrogate pair
    except UnicodeError as error:
        raise DataError(
            f"text: expected UTF-8, found {error.reason} at offset {error.start}: convert the "
            "text, or use the tokenizer bytes"
        ) from None
    return text


class Decoder:
    """Text of ids that come one by one; characters appear when their last byte is there."""

    def __init__(self, token_bytes: list[bytes]):
        self.token_bytes = token_bytes
        self.bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The characters that this id completes, often one word, sometimes none."""
        return self.bytes.decode(known_bytes(self.token_bytes, int(token)))

    def flush(self) -> str:
        """What is left at the end: a broken character as U+FFFD, else nothing."""
        return self.bytes.decode(b"", final=True)


def known_bytes(token_bytes: list[bytes], token: int) -> bytes:
    """The bytes of one id. Raises DataError for an id outside the vocabulary."""
    if not 0 <= token < len(token_bytes):
        raise DataError(
            f"token {token}: expected an id in 0..{len(token_bytes) - 1}, the vocabulary of the "
            "tokenizer: give the tokenizer that the ids were made with"
        )
    return token_bytes[token]


class Tokenizer:
    """What every kind has: ids below vocab_size, and the bytes that each id stands for."""

    kind: str  # "bytes", "chars" or "bpe"

    def __init__(self, token_bytes: list[bytes], specials: dict[str, int]):
        self.token_bytes = token_bytes  # b"" for a special token
        self.specials = specials
        self.vocab_size = len(token_bytes)
        self.eot_id = specials.get(END)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of a text, (n,) uint16, none of them special: a written <|endoftext|> is text. Raises
        DataError for what the vocabulary does not have."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, with U+FFFD for broken UTF-8 and nothing for special tokens. Raises
        DataError for ids outside the vocabulary."""
        tokens = [*map(int, ids)]
        if tokens:
            known_bytes(self.token_bytes, min(tokens))
            known_bytes(self.token_bytes, max(tokens))
        whole = b"".join([self.token_bytes[token] for token in tokens])
        return whole.decode("utf-8", errors="replace")

    def decoder(self) -> Decoder:
        """For ids that come one by one."""
        return Decoder(self.token_bytes)

    def to_json(self) -> str:
        """Content of a tokenizer.json for the `tokenizers` library, the same in every run."""
        about = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                added_token(content, token)
                for content, token in sorted(self.specials.items(), key=lambda item: item[1])
            ],
            "normalizer": None,
            "pre_tokenizer": self._pre_tokenizer(),
            "post_processor": None,
            "decoder": self._decoder(),
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": self._vocabulary(),
                "merges": self._merges(),
            },
        }
        return json.dumps(about, indent=2, ensure_ascii=False) + "\n"

    def _vocabulary(self) -> dict[str, int]:
        names = {token: content for content, token in self.specials.items()}
        for token, raw in enumerate(self.token_bytes):
            if token not in names:
                names[token] = self._written(raw)
        return {names[token]: token for token in sorted(names)}

    def _written(self, raw: bytes) -> str:
        return written(raw)

    def _merges(self) -> list[list[str]]:
        return []

    def _pre_tokenizer(self) -> dict | None:
        return byte_level(use_regex=False)

    def _decoder(self) -> dict:
        return byte_level(use_regex=True)


def added_token(content: str, token: int) -> dict:
    """A special token in tokenizer.json."""
    return {
        "id": token,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def byte_level(use_regex: bool) -> dict:
    """The part of tokenizer.json that turns text to written bytes and back; use_regex: and cuts it
    as GPT-2 does."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


class BytesTokenizer(Tokenizer):
    """The id of a byte is its value; <|endoftext|> is 256. Takes any bytes."""

    kind = "bytes"

    def __init__(self):
        super().__init__([bytes([byte]) for byte in range(256)] + [b""], {END: 256})

    def encode(self, text: str | bytes) -> np.ndarray:
        raw = text if isinstance(text, bytes) else text_of(text).encode("utf-8")
        return np.frombuffer(raw, np.uint8).astype(np.uint16)


class CharsTokenizer(Tokenizer):
    """Characters in a given order, then <|endoftext|> where there is one."""

    kind = "chars"

    def __init__(self, chars: list[str], has_eot: bool):
        if not 1 <= len(chars) + has_eot <= MAX_VOCAB:
            raise DataError(
                f"tokenizer chars: expected a vocabulary of 1 to {MAX_VOCAB}, found "
                f"{len(chars) + has_eot}: use the tokenizer bytes"
            )
        specials = {END: len(chars)} if has_eot else {}
        super().__init__([char.encode("utf-8") for char in chars] + [b""] * has_eot, specials)
        self.chars = chars
        codes = [ord(char) for char in chars]
        # one entry more than the largest code stands for all larger ones
        self.id_of_code = np.full(max(codes, default=0) + 2, -1, np.int32)
        self.id_of_code[codes] = np.arange(len(chars))

    def encode(self, text: str | bytes) -> np.ndarray:
        text = text_of(text)
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        ids = self.id_of_code[np.minimum(codes, len(self.id_of_code) - 1)]
        if (ids < 0).any():
            offset = int(np.argmax(ids < 0))
            raise DataError(
                f"text: expected the {len(self.chars)} characters of the vocabulary, found "
                f"{text[offset]!r} at offset {offset}: remove it, or use the tokenizer bytes"
            )
        return ids.astype(np.uint16)

    def _written(self, raw: bytes) -> str:
        return raw.decode("utf-8")

    def _pre_tokenizer(self) -> None:
        return None

    def _decoder(self) -> dict:
        return {"type": "Fuse"}


class BpeTokenizer(Tokenizer):
    """Byte-level BPE: ids are the order in which byte pairs merge. Encodes with tiktoken."""

    kind = "bpe"

    def __init__(self, ranks: dict[bytes, int], specials: dict[str, int], split: str, where: str):
        check_ids(ranks, specials, where)
        token_bytes = [b""] * (len(ranks) + len(specials))
        for token, rank in ranks.items():
            token_bytes[rank] = token
        super().__init__(token_bytes, specials)
        self.ranks = ranks
        self.split = split
        self.pairs = merges_of(ranks, where)

    @cached_property
    def encoding(self):
        """The tiktoken.Encoding of the text, to be used without special tokens."""
        try:
            import tiktoken
        except ImportError:
            raise DataError("tokenizer: needs tiktoken to encode: pip install tiktoken") from None
        return tiktoken.Encoding(
            "bpe",
            pat_str=SPLITS[self.split].fast,
            mergeable_ranks=self.ranks,
            special_tokens={END: self.vocab_size},  # never given; tiktoken is slow with none at all
        )

    def encode(self, text: str | bytes) -> np.ndarray:
        parts = [
            self.encoding.encode_to_numpy(piece, disallowed_special=()).astype(np.uint16)
            for piece in pieces(text_of(text), SPLITS[self.split].line_ends)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint16)

    def _merges(self) -> list[list[str]]:
        return [[written(left), written(right)] for left, right in self.pairs]

    def _pre_tokenizer(self) -> dict:
        pattern = SPLITS[self.split].written
        if pattern is None:
            return byte_level(use_regex=True)
        split = {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        return {"type": "Sequence", "pretokenizers": [split, byte_level(use_regex=False)]}


#######################################################################
# Pieces of text
#######################################################################

# No token of SPLITS goes on from anything else to a space, nor from a letter or digit to
# punctuation or a new line. Characters of scripts without spaces are named one by one, for which
# characters are letters depends on the version of Unicode.
CUT = re.compile(
    r"\S(?=[ \t])|[0-9A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff](?=[\r\n!-/:-@\[-`{-~、。])"
)
WHITE = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]++")


def pieces(text: str, line_ends: bool) -> Iterator[str]:
    """Consecutive pieces of a text, mostly of PIECE_CHARS characters, whose tokens are those of the
    whole text."""
    start = 0
    while start < len(text):
        cut = CUT.search(text, start + PIECE_CHARS)
        end = cut.end() if cut else len(text)
        piece = text[start:end]
        if len(piece) <= 2 * PIECE_CHARS:
            yield piece
        else:
            yield from cut_white_space(piece, line_ends)
        start = end


def cut_white_space(text: str, line_ends: bool) -> Iterator[str]:
    """Pieces without long white space before a word: there tiktoken's search would use up its
    stack of a million characters. Other text without a cut it takes at any length."""
    start = 0
    for white in WHITE.finditer(text):
        is_long = len(white[0]) >= PIECE_CHARS and white.end() < len(text)
        is_token = line_ends and white[0][-1] in "\r\n"
        if is_long and not is_token:
            end = white.end() - 1  # the last character may belong to the word
            yield text[start:end]
            start = end
    yield text[start:]


#######################################################################
# Vocabularies
#######################################################################


def check_ids(ranks: dict[bytes, int], specials: dict[str, int], where: str) -> None:
    """Raises DataError unless ids are 0..V-1, each once, V fits a shard and every byte has one."""
    size = len(ranks) + len(specials)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if size > MAX_VOCAB:
        raise refusal(where, f"a vocabulary of {size:,}, more than the {MAX_VOCAB:,} of uint16")
    if missing:
        raise refusal(where, f"no token for {len(missing)} of the 256 bytes ({missing[0]:#04x})")
    if sorted([*ranks.values(), *specials.values()]) != list(range(size)):
        raise refusal(where, f"ids that are not 0 to {size - 1}, each once")


def refusal(where: str, found: str) -> DataError:
    """For a file whose ids could not be given exactly."""
    return DataError(
        f"{where}: expected a byte-level BPE vocabulary as scripts/train_tokenizer.py writes it, "
        f"found {found}: train one with it, or use the tokenizer bytes"
    )


def merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts of a token when pairs merge in the order of ranks, up to those below its own."""
    limit = ranks[token]
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 1:
        pairs = [ranks.get(left + right, limit) for left, right in zip(parts, parts[1:])]
        lowest = min(pairs)
        if lowest >= limit:
            break
        index = pairs.index(lowest)
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts


def merges_of(ranks: dict[bytes, int], where: str) -> list[tuple[bytes, bytes]]:
    """The merges in order, recovered: a token's last merge joins the two parts that those before
    it leave. Raises DataError where there are not two: then ids would depend on the library."""
    pairs = []
    for token in sorted(ranks, key=ranks.get):
        if len(token) > 1:
            parts = merge(token, ranks)
            if len(parts) != 2:
                raise refusal(where, f"token {ranks[token]} that no two earlier ones make")
            pairs.append((parts[0], parts[1]))
    return pairs


#######################################################################
# tokenizer.json
#######################################################################


def parse(content: str | bytes, where: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json's content, ours of earlier versions too; `where` names it
    in errors. Raises DataError for anything that would give other ids or other text."""
    try:
        about = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise refusal(where, f"a file that is not JSON ({error})") from None
    try:
        if "kind" in about:
            return from_record(about)
        return from_model(about, where)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise refusal(where, f"other contents ({type(error).__name__}: {error})") from None


def from_record(about: dict) -> Tokenizer:
    """The tokenizer of a record {"kind": ...} of earlier versions."""
    if about["kind"] == "bytes":
        return BytesTokenizer()
    if about["kind"] == "gpt2":
        return gpt2()
    if about["kind"] == "chars":
        return CharsTokenizer(list(about["chars"]), about["eot_id"] is not None)
    raise ValueError(f"kind {about['kind']!r}")


def from_model(about: dict, where: str) -> Tokenizer:
    """The tokenizer of a file of the `tokenizers` library."""
    model = about["model"]
    found = unsupported(about, model)
    if found:
        raise refusal(where, found)
    specials = {token["content"]: token["id"] for token in about.get("added_tokens") or []}
    # GPT-2's own file has its special token in the vocabulary too
    vocab = {name: token for name, token in model["vocab"].items() if name not in specials}
    split = split_name(about["pre_tokenizer"])
    if split == "chars" and not model["merges"]:
        return chars_of(vocab, specials, where)
    if split == "bytes" and not model["merges"]:
        return bytes_of(vocab, specials, where)
    if split not in SPLITS:
        raise refusal(
            where, f"a pre_tokenizer that is none of {', '.join(SPLITS)}, all without prefix space"
        )
    ranks = {unwritten(name): token for name, token in vocab.items()}
    tokenizer = BpeTokenizer(ranks, specials, split, where)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if merges != tokenizer._merges():
        raise refusal(where, "merges that are not in the order of their ids")
    return tokenizer


def unsupported(about: dict, model: dict) -> str | None:
    """What of the file is not held here, if anything."""
    if model.get("type", "BPE") != "BPE":
        return f"the model {model['type']}"
    for name in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            return f"{name} {model[name]!r}"
    if about.get("normalizer"):
        return f"the normalizer {about['normalizer'].get('type')}, which changes the text"
    for token in about.get("added_tokens") or []:
        if not token.get("special"):
            return f"the added token {token['content']!r}, which is not special"
    return None


def split_name(pre_tokenizer: dict | None) -> str | None:
    """Key of SPLITS, "bytes" or "chars" for text that is not cut, None for anything else."""
    if pre_tokenizer is None:
        return "chars"
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(steps) > 2:
        return None
    cuts = last.get("use_regex", True)
    if len(steps) == 1:
        return "gpt2" if cuts else "bytes"
    first = steps[0]
    if cuts or first["type"] != "Split" or first["behavior"] != "Isolated" or first["invert"]:
        return None
    pattern = first["pattern"].get("Regex")
    return next((name for name, split in SPLITS.items() if split.written == pattern), None)


def chars_of(vocab: dict[str, int], specials: dict[str, int], where: str) -> Tokenizer:
    """The tokenizer of a vocabulary of single characters."""
    chars = sorted(vocab, key=vocab.get)
    tokenizer = CharsTokenizer(chars, END in specials)
    if [vocab[char] for char in chars] != list(range(len(chars))) or (
        specials != tokenizer.specials
    ):
        raise refusal(where, "ids of characters that are not 0, 1, ... and <|endoftext|> last")
    return tokenizer


def bytes_of(vocab: dict[str, int], specials: dict[str, int], where: str) -> Tokenizer:
    """The tokenizer of a vocabulary of the 256 bytes."""
    if vocab != {written(bytes([byte])): byte for byte in range(256)} or specials != {END: 256}:
        raise refusal(where, "ids of bytes that are not their values and <|endoftext|> last")
    return BytesTokenizer()


#######################################################################
# Files and names
#######################################################################


def read_tiktoken(raw: bytes, where: str) -> Tokenizer:
    """The tokenizer of a file of lines "base64 rank". It holds no pattern and no special token:
    GPT-2's pattern is taken, and <|endoftext|> for the first id that is free."""
    ranks = {}
    for number, line in enumerate(raw.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise refusal(where, f"line {number}, which is not 'base64 rank'") from None
    free = min(set(range(len(ranks) + 1)) - set(ranks.values()))
    return BpeTokenizer(ranks, {END: free}, "gpt2", where)


def read_merges(raw: bytes, where: str) -> Tokenizer:
    """The tokenizer of GPT-2's vocab.bpe: the bytes, the merges in order, then <|endoftext|>."""
    tokens = [BYTE_OF_CHARACTER[character] for character in sorted(BYTE_OF_CHARACTER)]
    ranks = {bytes([byte]): rank for rank, byte in enumerate(tokens)}
    try:
        lines = raw.decode("utf-8").split("\n")
        for line in lines[1:] if lines[0].startswith("#version") else lines:
            if line:
                left, right = line.split(" ")
                ranks[unwritten(left) + unwritten(right)] = len(ranks)
    except (KeyError, ValueError) as error:
        raise refusal(where, f"lines that are not merges ({error})") from None
    return BpeTokenizer(ranks, {END: len(ranks)}, "gpt2", where)


def load(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a tokenizer.json, a folder with one, a *.tiktoken file or GPT-2's vocab.bpe.
    Raises DataError."""
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        raw = regular(path).read_bytes()
    except OSError as error:
        found = error.strerror or error
        raise DataError(
            f"tokenizer {path}: expected bytes, gpt2, a tokenizer.json, a folder with one, a "
            f"*.tiktoken file or GPT-2's vocab.bpe, found none ({found}): correct the "
            "path, or make one with scripts/train_tokenizer.py"
        ) from None
    where = f"tokenizer {path}"
    if path.suffix == ".tiktoken":
        return read_tiktoken(raw, where)
    if path.suffix == ".bpe":
        return read_merges(raw, where)
    return parse(raw, where)


def named(name: str) -> Tokenizer:
    """The tokenizer "bytes", "gpt2", or of a path as load takes it. Raises DataError."""
    if name == "bytes":
        return BytesTokenizer()
    if name == "gpt2":
        return gpt2()
    return load(name)


def from_chars(chars: Iterable[str], has_eot: bool) -> Tokenizer:
    """Ids of sorted characters, and after them <|endoftext|> if asked for. Raises DataError."""
    return CharsTokenizer(sorted(set(chars)), has_eot)


#######################################################################
# GPT-2's vocabulary
#######################################################################


def cache_folder() -> Path | None:
    """Where tiktoken keeps what it fetched (tiktoken/load.py); None if it keeps nothing."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    return Path(folder) if folder else None


def whisper_file() -> Path | None:
    """GPT-2's ranks in the package openai-whisper, if installed; the package is not imported."""
    spec = util.find_spec("whisper")
    folders = (spec and spec.submodule_search_locations) or []
    return next((Path(folder, "assets", "gpt2.tiktoken") for folder in folders), None)


def verified(path: Path | None, sha256: str) -> bytes | None:
    """Contents of a file if it is there and has this hash."""
    try:
        raw = path.read_bytes() if path else b""
    except OSError:
        return None
    return raw if hashlib.sha256(raw).hexdigest() == sha256 else None


def gpt2() -> Tokenizer:
    """GPT-2's own: from tiktoken's cache, the package openai-whisper or the network, each checked
    by its hash. Raises DataError."""
    cache = cache_folder()
    if cache:
        for url, sha256, read in (
            (RANKS_URL, RANKS_SHA256, read_tiktoken),
            (MERGES_URL, MERGES_SHA256, read_merges),
        ):
            raw = verified(cache / hashlib.sha1(url.encode()).hexdigest(), sha256)
            if raw:
                return read(raw, "tokenizer gpt2")
    raw = verified(whisper_file(), RANKS_SHA256) or fetch_ranks()
    return read_tiktoken(raw, "tokenizer gpt2")


def fetch_ranks() -> bytes:
    """GPT-2's ranks from the network, into tiktoken's cache. Raises DataError."""
    try:
        from tiktoken.load import read_file_cached

        return read_file_cached(RANKS_URL, RANKS_SHA256)
    except (ImportError, OSError, ValueError) as error:
        raise DataError(
            "tokenizer gpt2: its vocabulary is neither in tiktoken's cache nor could be fetched "
            f"({type(error).__name__}): run once online with TIKTOKEN_CACHE_DIR=FOLDER set, or pip "
            "install --no-deps openai-whisper, which has the file, or name a copy of "
            "gpt2.tiktoken, vocab.bpe or tokenizer.json as the tokenizer"
        ) from None
