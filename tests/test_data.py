"""Data: shards are verified, and samples come in the documented order on any ranks in any epoch.

The order is checked against plain loops written here, shards come from conftest.py and by hand.
"""

import glob
import hashlib
import json
import shutil
import os
import re
import statistics
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import launch, tiny, write_shard

from harness.provenance import dataset_index, fingerprint, how_to_get
from harness.ranks import Ranks
from store.contract import DataError
from store.files import sha256sum
import train_gpt
from train_gpt import Config, ShardLoader, load_shard, preflight, resolve, shard_tokens

CPU = torch.device("cpu")
SIZES = [
    [17],
    [100, 37, 64],
    [5, 33, 3, 49, 16],
    [4, 4, 90, 4],
]  # tokens of each shard; some hold no sample


def write_shards(folder, sizes, seed=0):
    """Shards of distinct-looking random tokens below 1000; returns the glob and the tokens."""
    rng = np.random.default_rng(seed)
    shards = [rng.integers(0, 1000, size) for size in sizes]
    for i, tokens in enumerate(shards):
        write_shard(folder / f"s_{i:03d}.bin", tokens)
    return f"{folder}/s_*.bin", [tokens.tolist() for tokens in shards]


def make(pattern, T=8, shuffle=False, limit=0, **changes):
    cfg = tiny(**dict(sequence_length=T, vocab_size=1000, val_tokens=2048) | changes)
    return ShardLoader(str(pattern), cfg, shuffle, limit)


def samples_of(shards, T):
    """What the docstring of ShardLoader says, as a loop."""
    samples = []
    for tokens in shards:
        start = 0
        while start + T < len(tokens):
            samples.append(tokens[start : start + T + 1])
            start += T
    return samples


def message(call, *args):
    with pytest.raises(DataError) as error:
        call(*args)
    return str(error.value)


def header(magic=20240520, version=1, tokens=4):
    return np.array([magic, version, tokens] + [0] * 253, dtype="<i4").tobytes()


# Shards


def test_a_shard_is_read_as_it_is_specified(tmp_path):
    (tmp_path / "x.bin").write_bytes(header() + bytes([0, 0, 1, 0, 2, 1, 255, 255]))
    tokens = load_shard(tmp_path / "x.bin")
    assert (shard_tokens(str(tmp_path / "x.bin")), tokens.dtype, tokens.tolist()) == (
        4,
        np.uint16,
        [0, 1, 258, 65535],
    )


@pytest.mark.parametrize(
    "raw, sentence",
    [
        (header(magic=20240521) + bytes(8), "1032 bytes for 4, found 20240521, 1 and 1032 bytes; "),
        (header(version=2) + bytes(8), "1032 bytes for 4, found 20240520, 2 and 1032 bytes; "),
        (header() + bytes(6), "1032 bytes for 4, found 20240520, 1 and 1030 bytes; "),
        (header() + bytes(10), "1032 bytes for 4, found 20240520, 1 and 1034 bytes; "),
        (header() + bytes(7), "1032 bytes for 4, found 20240520, 1 and 1031 bytes; "),
        (header(), "1032 bytes for 4, found 20240520, 1 and 1024 bytes; "),
        (header(tokens=0), "1024 bytes for 0, found 20240520, 1 and 1024 bytes; "),
        (header(tokens=-4) + bytes(8), "1016 bytes for -4, found 20240520, 1 and 1032 bytes; "),
        (header(tokens=-4)[:1016], "1016 bytes for -4, found 20240520, 1 and 1016 bytes; "),
        (header()[:1023], "1032 bytes for 4, found 20240520, 1 and 1023 bytes; "),
        (header()[:7], "1024 bytes for 0, found 20240520, 0 and 7 bytes; "),
        (b"", "1024 bytes for 0, found 0, 0 and 0 bytes; "),
        ("a folder", "cannot be read ({path} is no regular file)"),
        ("a pipe", "cannot be read ({path} is no regular file)"),
        (None, "cannot be read (No such file or directory)"),
    ],
    ids="magic version truncated longer odd header-only zero negative fits-negative short-header "
    "stub empty directory pipe missing".split(),
)
def test_a_broken_shard_is_refused_with_what_was_expected_and_found(tmp_path, raw, sentence):
    path = tmp_path / "x.bin"
    if raw == "a folder":
        path.mkdir()
    elif raw == "a pipe":
        os.mkfifo(path)
    elif raw is not None:
        path.write_bytes(raw)
    sentence = sentence.replace("{path}", str(path))
    start = f"{path}: "
    if isinstance(raw, bytes):
        start += "expected magic 20240520, version 1, a token or more and "
        assert message(load_shard, path).endswith(
            "; it is no shard, or a damaged one: fetch or make it again"
        )
    for call in shard_tokens, load_shard:
        assert message(call, path).startswith(start + sentence)
    if raw is not None:
        assert message(make, path).startswith(start + sentence)


def test_a_shard_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "x.bin", [1, 2])
    path.chmod(0)
    if os.access(path, os.R_OK):  # nothing is denied to root

        def denied(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(np, "fromfile", denied)
    assert message(load_shard, path).startswith(f"{path}: cannot be read (Permission denied); ")


# Order


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("T", [1, 4, 8, 16])
def test_samples_are_those_of_a_plain_loop(tmp_path, T, sizes):
    pattern, shards = write_shards(tmp_path, sizes)
    loader, samples = make(pattern, T), samples_of(shards, T)
    assert (loader.samples, loader.tokens) == (len(samples), sum(sizes))
    for first in (0, 1, len(samples) - 1, len(samples), 3 * len(samples) + 2):
        for count in (1, 2, 7, 2 * len(samples) + 1):
            batch = loader.read(first, count)
            assert batch.dtype == np.int64
            assert batch.tolist() == [
                samples[i % len(samples)] for i in range(first, first + count)
            ]


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_ranks_together_read_what_one_rank_reads(tmp_path, shuffle):
    pattern, _ = write_shards(
        tmp_path, [100, 37, 64]
    )  # 23 samples, so steps of 6 straddle shards and epochs
    whole = make(pattern, shuffle=shuffle).read(0, 60).tolist()
    for world in (1, 2, 3):
        share, loaders = 6 // world, [make(pattern, shuffle=shuffle) for _ in range(world)]
        read = [
            sample
            for step in range(10)
            for rank in range(world)
            for sample in loaders[rank].read(6 * step + rank * share, share).tolist()
        ]
        assert read == whole


def test_shuffling_is_a_permutation_of_each_epoch_by_seed(tmp_path):
    pattern, shards = write_shards(tmp_path, [100, 37, 64])
    samples = samples_of(shards, 8)
    n = len(samples)

    def epochs(seed):
        read = make(pattern, shuffle=True, seed=seed).read(0, 3 * n).tolist()
        return [read[i : i + n] for i in (0, n, 2 * n)]

    orders = [*epochs(0), *epochs(1)]
    for order in orders:
        assert sorted(order) == sorted(samples) and order != samples
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert epochs(0) == orders[:3]


def test_shuffled_order_is_the_same_for_any_slicing_forwards_and_backwards(tmp_path):
    pattern, _ = write_shards(tmp_path, [100, 37, 64])
    whole, loader = make(pattern, shuffle=True).read(0, 100).tolist(), make(pattern, shuffle=True)
    for count in (1, 5, 23, 50):
        firsts = reversed(range(0, 100, count))
        pieces = {first: loader.read(first, min(count, 100 - first)).tolist() for first in firsts}
        assert [sample for first in sorted(pieces) for sample in pieces[first]] == whole


# Tokens out of the vocabulary


def test_a_token_outside_the_vocabulary_is_refused_and_the_last_one_inside_is_not(tmp_path):
    tokens = np.zeros((2, 50), int)
    tokens[1, 21] = 999
    for i in range(2):
        write_shard(tmp_path / f"s_{i}.bin", tokens[i])
    good, bad = (
        make(tmp_path / "s_*.bin", vocab_size=1000),
        make(tmp_path / "s_*.bin", vocab_size=999),
    )
    good.check_tokens(range(2))
    assert good.read(0, 12).max() == 999
    sentence = f"{tmp_path}/s_1.bin: token 999 at offset 21 is not below VOCAB_SIZE=999; set "
    sentence += "VOCAB_SIZE to the tokenizer's size (0 reads it), or make a damaged shard again"
    assert message(bad.check_tokens, range(2)) == sentence
    assert message(bad.read, 0, 12) == sentence
    bad.check_tokens([0])
    assert bad.read(0, 6).max() == 0


def test_a_vocabulary_of_all_that_uint16_holds(tmp_path):
    write_shard(tmp_path / "s.bin", [65535] * 9)
    loader = make(tmp_path / "s.bin", vocab_size=65536)
    loader.check_tokens([0])
    assert loader.read(0, 1).min() == 65535


# Reading ahead


SLICES = [(first, 3) for first in range(0, 36, 3)]


@pytest.fixture
def new_threads():
    """How many threads the test has started that do not end within a moment."""
    before = set(threading.enumerate())

    def count(moment=2.0):
        deadline = time.monotonic() + moment
        while (new := set(threading.enumerate()) - before) and time.monotonic() < deadline:
            time.sleep(0.005)
        return len(new)

    return count


@pytest.mark.parametrize("depth", [1, 4, 100])
def test_prefetch_yields_what_read_returns_in_order(tmp_path, new_threads, depth):
    pattern, _ = write_shards(tmp_path, [100, 37, 64])
    batches = list(make(pattern).prefetch(iter(SLICES), CPU, depth))
    loader = make(pattern)
    assert len(batches) == len(SLICES)
    for (inputs, targets, _), piece in zip(batches, SLICES):
        expected = loader.read(*piece)
        assert (
            inputs.tolist() == expected[:, :-1].tolist()
            and targets.tolist() == expected[:, 1:].tolist()
        )
    assert new_threads() == 0


def test_prefetch_reads_no_more_than_depth_ahead(tmp_path):
    pattern, _ = write_shards(tmp_path, [100])
    taken = []
    batches = make(pattern).prefetch((taken.append(i) or (i, 1) for i in range(1000)), CPU, 3)
    next(batches)
    next(batches)
    batches.close()
    assert taken == [0, 1, 2, 3, 4]


def test_prefetch_passes_on_a_data_error_after_the_batches_before_it(tmp_path, new_threads):
    tokens = np.zeros(200, int)
    tokens[150] = 5000
    write_shard(tmp_path / "a.bin", np.zeros(100, int))
    write_shard(tmp_path / "b.bin", tokens)
    batches, got = make(tmp_path / "?.bin").prefetch(SLICES, CPU), []
    with pytest.raises(DataError, match="b.bin: token 5000 at offset 150"):
        for inputs, _, _ in batches:
            got.append(inputs)
    assert len(got) == 10  # sample 30 holds it
    assert new_threads() == 0


def test_prefetch_closed_early_leaves_no_thread(tmp_path, new_threads):
    pattern, _ = write_shards(tmp_path, [100])
    batches = make(pattern).prefetch(((0, 1) for _ in range(10**9)), CPU)
    next(batches)
    assert new_threads(moment=0) == 1
    batches.close()
    assert new_threads() == 0


def test_a_slow_consumer_never_waits_and_a_slow_reader_is_waited_for(tmp_path):
    pattern, _ = write_shards(tmp_path, [100])
    loader, waits = make(pattern), []
    for _, _, waited in loader.prefetch(SLICES[:6], CPU):
        waits.append(waited)
        time.sleep(0.05)
    assert waits[1:] == [0.0] * 5
    read = loader.read
    loader.read = lambda first, count: time.sleep(0.02) or read(first, count)
    start = time.perf_counter()
    waits = [waited for _, _, waited in loader.prefetch(SLICES[:6], CPU)]
    assert statistics.median(waits) > 0.005 and sum(waits) <= time.perf_counter() - start


# Data that is missing


def test_a_glob_without_files_names_the_command(tmp_path):
    assert message(make, f"{tmp_path}/fineweb10B/fineweb_train_*.bin") == (
        f"no file matches {tmp_path}/fineweb10B/fineweb_train_*.bin (looked from {os.getcwd()}); "
        f"fetch it: DATA_DIR={tmp_path}/fineweb10B python cached_fineweb10B.py 1"
    )
    assert message(make, f"{tmp_path}/toy/toy_train_*.bin") == (
        f"no file matches {tmp_path}/toy/toy_train_*.bin (looked from {os.getcwd()}); make it: "
        f"python scripts/prepare_data.py --source ... --out {tmp_path}/toy"
    )
    assert "--source package:sympy --tokenizer bytes --out data/sympy" in how_to_get(
        "data/sympy/sympy_*.bin"
    )
    assert "--out ." in how_to_get("toy_*.bin")
    command = how_to_get("data/wikitext103/wikitext103_train_*.bin")
    assert "--source hf:Salesforce/wikitext/wikitext-103-raw-v1 --tokenizer gpt2 --out" in command


def test_the_index_of_a_folder_whose_name_is_a_pattern(tmp_path):
    folder = tmp_path / "it's [a] *folder* [?]"
    folder.mkdir()
    (folder / "index.json").write_text('{"vocab_size": 7}')
    assert dataset_index(f"{glob.escape(str(folder))}/x_train_*.bin") == {"vocab_size": 7}


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"[1]", "a JSON object"),
        (b"\xff{}", "a JSON object"),
        (b'{"vocab_size": "abc"}', "in vocab_size "),
        (b'{"vocab_size": 70000}', "in vocab_size "),
        (b'{"eot_id": [1]}', "in eot_id "),
        (b'{"tokenizer_sha256": 7}', "in tokenizer_sha256 "),
        (b'{"token_bytes": ["a", "b"]}', "in token_bytes "),
        (b'{"shards": "abc"}', "in shards "),
        (b'{"shards": [{"name": "x", "sha256": 7}]}', "in shards "),
    ],
)
def test_an_index_of_another_kind_is_one_sentence(tmp_path, content, expected):
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(DataError, match=f"json: expected {expected}.*; remove it and make it: "):
        dataset_index(f"{tmp_path}/x_train_*.bin")


def test_data_that_are_half_in_their_place_are_refused(tmp_path):
    (tmp_path / ".partial").mkdir()
    with pytest.raises(DataError, match="its data are not whole: .* run the same command again"):
        dataset_index(f"{tmp_path}/x_train_*.bin")
    (tmp_path / "index.json").write_text('{"vocab_size": 7}')  # while other data are made
    assert dataset_index(f"{tmp_path}/x_train_*.bin") == {"vocab_size": 7}


def test_a_shortfall_names_the_setting_and_the_number_of_shards_to_fetch(tmp_path):
    for i in range(2):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", np.zeros(81, int))
    loader = make(tmp_path / "fineweb_train_*.bin")  # 10 samples a shard
    assert loader.shortfall("NUM_ITERATIONS", 5, 20) == ""
    for samples, shards in (21, 3), (30, 3), (31, 4), (10**6, 103):  # there are no more than 103
        sentence = loader.shortfall("NUM_ITERATIONS", 5, samples)
        assert sentence.startswith(f"NUM_ITERATIONS=5 needs {samples:,} samples of 8 tokens; ")
        assert "have 20; lower NUM_ITERATIONS, set MAX_EPOCHS=0, or get more; fetch" in sentence
        assert sentence.endswith(f"DATA_DIR={tmp_path} python cached_fineweb10B.py {shards}")
    limited = make(tmp_path / "fineweb_train_*.bin", limit=80)
    assert "MAX_EPOCHS=0, raise MAX_TRAIN_TOKENS, or" in limited.shortfall("NUM_ITERATIONS", 5, 21)
    assert loader.shortfall("VAL_TOKENS", 800, 100).endswith("; lower VAL_TOKENS to 160")


def test_data_without_a_single_sample(tmp_path):
    write_shard(tmp_path / "s.bin", [1] * 8)
    sentence = make(tmp_path / "s.bin").shortfall("NUM_ITERATIONS", 5, 0)
    assert "needs 1 samples of 8 tokens" in sentence and "; lower SEQUENCE_LENGTH, " in sentence


def test_data_of_two_tokenizers_a_folder_and_a_vocabulary_that_is_too_large(settings, tmp_path):
    """The typical mistakes, before any step."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tmp_path / "toy_val_000000.bin", other)
    for folder, name in ((tmp_path, "a"), (other, "b")):
        (folder / "index.json").write_text(json.dumps({"tokenizer_sha256": name, "vocab_size": 64}))
    codes, output = launch(settings | {"INPUT_VAL_BIN": other / "toy_val_*.bin"})
    assert codes == [3] and "other/toy_val_*.bin are of different tokenizers; set both" in output
    codes, output = launch(settings | {"INPUT_BIN": tmp_path})
    assert codes == [3] and "is no regular file); name shards, as data/x/x_train_*.bin" in output
    codes, output = launch(settings | {"VOCAB_SIZE": 50304, "NUM_ITERATIONS": 1})
    assert codes == [0] and "VOCAB_SIZE=50304, the data have 64 ids; VOCAB_SIZE=0 takes" in output
    (other / "index.json").unlink()
    old = {"INPUT_VAL_BIN": other / "toy_val_*.bin", "RUN_ID": "old", "SHARD_TAIL": "keep"}
    codes, output = launch(settings | old)
    assert codes == [0] and "warning" not in output


def test_all_that_is_too_little_is_told_at_once(settings):
    """And what the sentences say is enough."""
    codes, output = launch(settings | {"MAX_EPOCHS": 1, "NUM_ITERATIONS": 30, "VAL_TOKENS": 9999})
    assert codes == [3] and "MAX_TRAIN_TOKENS" not in output
    assert (
        "data: NUM_ITERATIONS=30 needs 360 samples" in output and ". And VAL_TOKENS=9999" in output
    )
    most = int(re.search(r"lower VAL_TOKENS to (\d+)", output)[1])
    changed = {"MAX_EPOCHS": 0, "NUM_ITERATIONS": 30, "VAL_TOKENS": most, "RUN_ID": "enough"}
    assert launch(settings | changed)[0] == [0]


# Fingerprints


def files_of(folder, changes=()):
    """The names of two shards, written anew."""
    folder.mkdir(exist_ok=True)
    for name in ("a.bin", "b.bin"):
        write_shard(folder / name, [dict(changes).get(name, 0)] * 9)
    return [f"{folder}/a.bin", f"{folder}/b.bin"]


def test_fingerprint_is_of_names_and_contents_not_of_folders(tmp_path):
    one = fingerprint(files_of(tmp_path / "one"), tmp_path)
    assert fingerprint(files_of(tmp_path / "two"), tmp_path) == one
    assert fingerprint(files_of(tmp_path / "one"), tmp_path / "another cache") == one
    others = [
        fingerprint(files_of(tmp_path / name, {name: 1}), tmp_path) for name in ("a.bin", "b.bin")
    ]
    assert len({one, *others}) == 3
    (tmp_path / "two/b.bin").rename(tmp_path / "two/c.bin")
    renamed = [f"{tmp_path}/two/a.bin", f"{tmp_path}/two/c.bin"]
    assert fingerprint(renamed, tmp_path) not in {one, *others}


def test_fingerprint_covers_files_of_one_name_in_two_folders(tmp_path):
    def of(train):
        for folder, token in ("train", train), ("val", 7):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_shard(tmp_path / folder / "0.bin", [token] * 9)
        files = [tmp_path / "train/0.bin", tmp_path / "val/0.bin"]
        return fingerprint(files, tmp_path / str(train))

    assert of(1) != of(2)


def test_fingerprint_reads_a_file_again_only_when_it_has_changed(tmp_path, monkeypatch):
    files, digest, read = files_of(tmp_path / "data"), hashlib.file_digest, []
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind)
    )
    first = fingerprint(files, tmp_path)
    assert [os.path.basename(name) for name in read] == ["a.bin", "b.bin"]
    assert fingerprint(files, tmp_path) == first and len(read) == 2
    files_of(tmp_path / "data", {"b.bin": 1})  # writes both anew, of the size they had
    for name in "a.bin", "b.bin":
        os.utime(tmp_path / "data" / name, (10, 10))
    second = fingerprint(files, tmp_path)
    assert second != first and len(read) == 4
    os.utime(tmp_path / "data/b.bin", (30, 30))
    assert fingerprint(files, tmp_path) == second and len(read) == 5


# Speed


@pytest.mark.parametrize("T, shuffle", [(1024, False), (1024, True), (64, False)])
def test_a_batch_is_read_in_few_lines_and_copies_no_more_than_it_has(tmp_path, T, shuffle):
    """As many lines are run for 512 samples as for 64, and little memory is taken beside theirs."""
    tokens = np.random.default_rng(0).integers(0, 50000, 2_000_000, dtype=np.uint16)
    loader, counts = make(write_shard(tmp_path / "s.bin", tokens), T, shuffle, vocab_size=50304), []
    loader.read(0, 64)  # the order of an epoch is made once
    for samples in (64, 512):
        lines = []

        def count(frame, event, arg, lines=lines):
            if event == "line":
                lines.append(frame.f_lineno)
            return count

        before = sys.gettrace()
        sys.settrace(count)
        loader.read(0, samples)
        sys.settrace(before)
        counts.append(len(lines))
    assert 0 < counts[0] == counts[1]
    tracemalloc.start()
    batch = loader.read(0, 512)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * batch.nbytes + 2**16


def test_a_limit_keeps_the_first_samples(tmp_path):
    """MAX_TRAIN_TOKENS ends within a shard or before one; the rest is shuffled and repeated."""
    for i, size in enumerate((35, 20, 50)):
        write_shard(tmp_path / f"{i}.bin", 100 * i + np.arange(size))
    cfg = tiny(sequence_length=10, vocab_size=1000)
    everything = ShardLoader(f"{tmp_path}/*.bin", cfg)
    assert everything.samples == 3 + 1 + 4
    for limit, samples in (39, 3), (40, 4), (65, 6), (10**6, 8):
        loader = ShardLoader(f"{tmp_path}/*.bin", cfg, limit=limit)
        assert loader.samples == samples
        assert (loader.read(0, samples) == everything.read(0, samples)).all()
        assert (loader.read(samples, 1) == everything.read(0, 1)).all()
    shuffled = ShardLoader(f"{tmp_path}/*.bin", cfg, shuffle=True, limit=40).read(0, 8)
    assert sorted(shuffled[:4, 0]) == sorted(shuffled[4:, 0]) == [0, 10, 20, 100]


def test_a_limit_below_what_is_needed_is_refused(settings):
    codes, out = launch(settings | {"MAX_TRAIN_TOKENS": 100, "MAX_EPOCHS": 1})
    assert codes == [3] and "NUM_ITERATIONS=8 needs 96 samples" in out and "MAX_TRAIN_TOKENS" in out
    codes, out = launch(settings | {"MAX_TRAIN_TOKENS": 10, "RUN_ID": "none"})
    assert codes == [3] and "needs 1 samples" in out
    some = settings | {"MAX_TRAIN_TOKENS": 100, "RUN_ID": "some"}
    codes, out = launch(some)
    assert codes == [3] and "have 0; lower BATCH_SIZE, set" in out and "SHARD_TAIL=keep" in out
    assert launch(some | {"SHARD_TAIL": "keep"})[0] == [0]


def test_a_shard_that_its_index_knows_otherwise_is_refused(settings, tmp_path):
    """Also where a changed byte left the token in the vocabulary, and the file its time."""
    shards = sorted(tmp_path.glob("toy_*.bin"))
    known = [{"name": path.name, "sha256": sha256sum(path)[:64]} for path in shards]
    (tmp_path / "index.json").write_text(json.dumps({"shards": known}))
    assert launch(settings | {"RUN_ID": "whole"})[0] == [0]

    stat, content = shards[0].stat(), bytearray(shards[0].read_bytes())
    content[1024] ^= 1
    shards[0].write_bytes(content)
    os.utime(shards[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    codes, out = launch(settings | {"RUN_ID": "damaged"})
    assert codes == [3] and f"data: {shards[0]}: damaged or changed: expected SHA-256" in out, out


def test_a_shard_cut_short_while_it_is_read_is_told(tmp_path):
    """Not by the system's signal that ends the process."""
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(50_000) % 64)
    loader = ShardLoader(str(path), tiny())
    moved = path.rename(tmp_path / "moved")
    loader.read(0, 1)  # a file that is gone does no harm
    moved.rename(path)
    os.truncate(path, 1024 + 100)
    with pytest.raises(DataError, match=r"a.bin: expected magic .* bytes for 50000"):
        loader.read(2000, 1)


def record_batches(sizes, batch, length, ranks, count):
    """Where each rank starts to read, (shard, position), in batches 0 .. count - 1: the rule of
    modded-nanogpt's record of 2024-10-14, whose rank goes on to the next shard when the batch after
    this one would not fit behind its own position."""
    per_rank = batch // ranks * length
    starts = []
    for rank in range(ranks):
        shard, position = 0, rank * per_rank
        for _ in range(count):
            starts.append((shard, position))
            position += batch * length
            if position + batch * length >= sizes[shard]:
                shard, position = (shard + 1) % len(sizes), rank * per_rank
    return np.array(starts).reshape(ranks, count, 2).swapaxes(0, 1)


@pytest.mark.parametrize("sizes", [[81, 100, 64, 97], [65, 65], [1017, 33]])
def test_a_shards_tail_is_dropped_as_in_the_record(tmp_path, sizes):
    """On one rank batch for batch; a batch is 4 samples of 8 tokens."""
    write_shards(tmp_path, sizes)
    cfg = tiny(sequence_length=8, batch_size=4, vocab_size=1000)
    loader = ShardLoader(f"{tmp_path}/s_*.bin", cfg, unit=4)
    batches = min(2 * loader.samples // 4, 40)
    wanted = record_batches(sizes, 4, 8, 1, batches)[:, 0]
    shard, index = loader.place(0, 4 * batches)
    assert (shard[::4] == wanted[:, 0]).all() and (8 * index[::4] == wanted[:, 1]).all()
    assert (shard.reshape(-1, 4) == shard[::4, None]).all(), "no batch is of two shards"
    kept = ShardLoader(f"{tmp_path}/s_*.bin", cfg)
    assert kept.samples > loader.samples or sizes == [65, 65]


def test_a_limit_is_within_the_first_tokens_and_batches_within_a_shard(tmp_path):
    """Of shards of 11 and 12 samples the first 16 are allowed: two batches of four, then one."""
    write_shards(tmp_path, [89, 100])
    cfg = tiny(sequence_length=8, batch_size=4, vocab_size=1000)
    for limit, batches in ((128, [0, 0, 1]), (88, [0, 0]), (0, [0, 0, 1, 1, 1])):
        loader = ShardLoader(f"{tmp_path}/s_*.bin", cfg, limit=limit, unit=4)
        shard, index = loader.place(0, loader.samples)
        assert shard.tolist() == np.repeat(batches, 4).tolist()
        first = np.where(shard == 0, 0, 11)  # sample of its shard
        assert not limit or (8 * (first + index) < limit).all()
        assert loader.dropped == (limit or 8 * 23) // 8 - loader.samples


def test_fineweb_in_the_records_order_but_for_two_ranks(monkeypatch):
    """190 batches of 524,288 tokens of a shard of 100 million. There the record's ranks 6 and 7 of
    8 go on after 189, since their own position counts; here no rank reads another shard."""
    sizes = [100_000_000] * 3
    of_rank = record_batches(sizes, 512, 1024, 8, 191)
    assert [int(np.argmax(of_rank[:, rank, 0] == 1)) for rank in range(8)] == [190] * 6 + [189] * 2
    monkeypatch.setattr(train_gpt, "load_shard", lambda _: np.broadcast_to(np.uint16(0), sizes[0]))
    monkeypatch.setattr(train_gpt.glob, "glob", lambda _: ["a", "b", "c"])
    loader = ShardLoader("*", tiny(sequence_length=1024, val_tokens=1024), unit=512)
    shard, index = loader.place(0, 512 * 191)
    assert shard.reshape(191, 512)[:, 0].tolist() == [0] * 190 + [1] and index[512 * 190] == 0


@pytest.mark.parametrize(
    "changes, samples",
    [
        ({}, 24),
        ({"SHARD_TAIL": "keep"}, 30),
        ({"SHUFFLE": 1}, 30),
        ({"CARRY_STATE": 1, "MIXER": "mingru", "VAL_TOKENS": 192}, 24),
    ],
)
def test_a_run_drops_the_tail_where_it_reads_in_order(settings, tmp_path, changes, samples):
    """Two shards of 15 samples, batches of 12; streams of text go on across shards."""
    for path in tmp_path.glob("toy_train_*.bin"):
        path.unlink()
    for i in range(2):
        write_shard(tmp_path / f"toy_train_{i:06d}.bin", np.arange(15 * 16 + 1) % 64)
    env = settings | {"MAX_EPOCHS": 0} | changes
    cfg = resolve(Config.from_env({name: str(value) for name, value in env.items()}))
    train, _ = preflight(cfg, Ranks())
    assert train.samples == samples


def test_shards_smaller_than_a_batch_name_the_setting(settings, tmp_path):
    for path in tmp_path.glob("toy_train_*.bin"):
        write_shard(path, np.arange(8 * 16 + 1) % 64)
    codes, out = launch(settings | {"MAX_EPOCHS": 0})
    assert codes == [3] and "have 0; lower BATCH_SIZE, " in out and "SHARD_TAIL=keep" in out, out


def test_what_is_dropped_is_told_where_it_is_much(settings, tmp_path):
    for path in tmp_path.glob("toy_train_*.bin"):
        write_shard(path, np.arange(20 * 16 + 1) % 64)
    _, out = launch(settings | {"MAX_EPOCHS": 0})
    words = r"warning: SHARD_TAIL=drop leaves out (\d+) samples, .* of (\d+); SHARD_TAIL=keep reads"
    dropped, samples = map(int, re.search(words, out).groups())
    assert 20 * dropped == 8 * samples > 0, "of 20 samples a batch of 12 is read"
    _, out = launch(settings | {"MAX_EPOCHS": 0, "SHARD_TAIL": "keep", "RUN_ID": "kept"})
    assert "leaves out" not in out
