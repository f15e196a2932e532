"""CARRY_STATE and RESET_AT_EOT: the order of the text, states over steps, ranks and resumes."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import assert_same, curve, dies_at, folder, launch, summary, tensors, tiny
from conftest import write_shard
from safetensors.torch import load_file
from test_model import trained_a_little

from harness.ranks import Ranks
import train_gpt
from train_gpt import GPT, MIXERS, Recurrent, ShardLoader, State, load_shard, train_step

STATEFUL = [name for name, kind in MIXERS.items() if issubclass(kind, Recurrent)]
CARRIED = {
    "CARRY_STATE": 1,
    "MIXER": ",".join(STATEFUL),
    "N_LAYER": len(STATEFUL),
    "SAVE_EVERY": 4,
    "VAL_TOKENS": 200,
}


def numbered(tmp_path, sizes):
    """Shards whose tokens count on, and a loader of four streams of samples of eight tokens."""
    first = 0
    for i, size in enumerate(sizes):
        write_shard(tmp_path / f"n_train_{i + 1:06d}.bin", np.arange(first, first + size))
        first += size
    cfg = tiny(sequence_length=8, vocab_size=65536, batch_size=4)
    return ShardLoader(f"{tmp_path}/n_train_*.bin", cfg, streams=4)


def test_each_row_goes_on_where_it_was(tmp_path):
    """But at the beginning, at the border of two shards, and where an epoch begins anew."""
    loader = numbered(tmp_path, [8 * 21 + 1, 8 * 10 + 3, 8 * 17 + 1])  # 48 samples, 12 a stream
    last, breaks = None, []
    for step in range(30):
        batch, begins = loader.read(4 * step, 4), loader.begins(4 * step, 4)
        for row in range(4):
            goes_on = last is not None and batch[row, 0] == last[row, -1]
            assert begins[row] == (not goes_on), (step, row)
            if begins[row]:
                breaks.append((step, row))
        last = batch
    at_border = [(9, 1), (7, 2)]  # samples 21 and 31
    wraps = [(step, row) for step in (0, 12, 24) for row in range(4)]
    again = [(step + 12 * epoch, row) for epoch in range(3) for step, row in at_border]
    assert sorted(breaks) == sorted(wraps + [place for place in again if place[0] < 30])


def test_an_epoch_has_every_sample_of_the_streams_once(tmp_path):
    loader = numbered(tmp_path, [8 * 21 + 1, 8 * 10 + 3])  # 31 samples: three are left out
    assert loader.samples == 28
    first = loader.read(0, 28)[:, 0].tolist()
    assert len({*first}) == 28
    assert loader.read(28, 28)[:, 0].tolist() == first
    parts = np.concatenate([loader.read(start, 2) for start in range(0, 28, 2)])
    assert parts[:, 0].tolist() == first  # whoever reads which rows


@pytest.mark.parametrize("name", STATEFUL)
def test_two_windows_that_carry_states_are_one_window(name):
    """Losses, and the states after; gradients end where a window begins."""
    model = trained_a_little(tiny(mixer=name))
    tokens = torch.randint(0, 64, (3, 33), generator=torch.Generator().manual_seed(0))
    x, y = tokens[:, :-1], tokens[:, 1:]
    whole, parts = model.new_cache(3, math.inf), model.new_cache(3, math.inf)
    loss = model(x, y, whole)[0]
    losses = [model(*pair, parts)[0] for pair in zip(x.split(16, 1), y.split(16, 1))]
    assert torch.allclose(sum(losses) / 2, loss, atol=1e-5)
    for a, b in zip(whole.tensors(), parts.tensors()):
        assert torch.allclose(a, b, atol=1e-4) and not b.requires_grad
    assert not torch.allclose(model(x[:, 16:], y[:, 16:])[0], losses[1], atol=1e-4)
    losses[1].backward()  # with the states in place that the first window left


def test_a_run_reads_the_text_and_carries_its_states(settings, tmp_path, monkeypatch):
    """On two ranks: every token is the number of its sample, of 94 in three shards, 7 a stream."""
    for i, (first, last) in enumerate(((0, 40), (40, 70), (70, 94))):
        tokens = [*np.repeat(np.arange(first, last), 16), 0]
        write_shard(tmp_path / f"toy_train_{i + 1:06d}.bin", tokens)
    original = train_gpt.train_step

    def recording(state, cfg, inputs, targets):
        empty = [not any(t[row].any() for t in state.carried.tensors()) for row in range(6)]
        with open(tmp_path / f"seen_{torch.distributed.get_rank()}.txt", "a") as file:
            print(json.dumps([state.step, inputs[:, 0].tolist(), empty]), file=file)
        return original(state, cfg, inputs, targets)

    monkeypatch.setattr(train_gpt, "train_step", recording)
    settings |= CARRIED | {"VOCAB_SIZE": 128, "NUM_ITERATIONS": 9, "VAL_EVERY": 0}
    assert launch(settings, 2)[0] == [0, 0]
    for rank in range(2):
        for line in (tmp_path / f"seen_{rank}.txt").read_text().splitlines():
            step, samples, empty = json.loads(line)
            rows = range(6 * rank, 6 * rank + 6)
            assert samples == [7 * row + step % 7 for row in rows]
            begin = [step % 7 == 0 or sample in (40, 70) for sample in samples]
            assert empty == begin, (rank, step)


@pytest.mark.parametrize("micro", [2, 12])
def test_validation_carries_states_too(settings, micro):
    """In twelve streams, whatever the micro-batch is, against one pass over each stream."""
    settings |= CARRIED | {"DEVICE_BATCH_SIZE": micro, "NUM_ITERATIONS": 2, "VAL_TOKENS": 400}
    assert launch(settings)[0] == [0]
    weights = load_file(settings["LOG_DIR"] / "toy" / "model.safetensors")
    names = ("MIXER", "N_LAYER", "CARRY_STATE", "VAL_TOKENS")
    cfg = tiny(**{name.lower(): settings[name] for name in names})
    model = GPT(cfg)
    model.load_state_dict(weights)
    tokens = load_shard(str(settings["INPUT_VAL_BIN"]).replace("*", "000000"))
    assert (len(tokens) - 1) // 16 // 12 * 12 == 24  # of VAL_TOKENS' 25 samples two a stream
    losses = []
    for row in range(12):
        stream = torch.from_numpy(tokens[32 * row : 32 * row + 33].astype(np.int64))[None]
        losses.append(model(stream[:, :-1], stream[:, 1:])[0].item())
    assert summary(settings)["final_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_a_resumed_run_carries_the_states_that_it_had(settings, monkeypatch):
    """On two ranks, bit for bit; the states are in the checkpoint."""
    settings |= CARRIED | {"NUM_ITERATIONS": 11}
    assert launch(settings | {"RUN_ID": "whole"}, 2)[0] == [0, 0]
    with monkeypatch.context() as patch:
        dies_at(patch, 6)
        launch(settings, 2)
    codes, out = launch(settings | {"RESUME": "auto"}, 2)
    assert codes == [0, 0], out
    assert curve(settings) == curve(settings, "whole")
    assert_same(folder(settings, 11), folder(settings, 11, "whole"))
    states = {key: t for key, t in tensors(folder(settings, 8)).items() if "carried" in key}
    assert len(states) >= len(STATEFUL) and all(t.any() for t in states.values())


@pytest.mark.parametrize("world", [1, 3])
def test_the_states_of_two_ranks_go_on_on_others(settings, monkeypatch, world):
    settings |= CARRIED | {"NUM_ITERATIONS": 7, "LR": 0.001, "DEVICE_BATCH_SIZE": 2}
    assert launch(settings | {"RUN_ID": "whole"}, 1)[0] == [0]
    with monkeypatch.context() as patch:
        dies_at(patch, 5)
        launch(settings, 2)
    codes, out = launch(settings | {"RESUME": "auto"}, world)
    assert codes == [0] * world, out
    for name in ("train_loss", "grad_norm"):
        ours, whole = (
            np.array([float.fromhex(x) for (x,) in curve(settings, run_id, (name,)) if x])
            for run_id in ("toy", "whole")
        )
        assert np.allclose(ours, whole, rtol=2e-3), name
    wrong = settings | {"RUN_ID": "wrong", "CARRY_STATE": 0}
    launch(wrong)
    assert curve(wrong) != curve(settings)


def test_too_little_text_for_the_streams_is_told(settings):
    codes, out = launch(settings | CARRIED | {"MAX_TRAIN_TOKENS": 100})
    assert codes == [3]
    assert "have 6 samples of 16 tokens for BATCH_SIZE=12 streams; lower it or" in out


def test_states_that_are_not_finite_are_not_carried(group):
    cfg = tiny(mixer="gru,rwkv", carry_state=True, batch_size=2)
    state = State.build(cfg, Ranks())
    batch = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(0))
    train_step(state, cfg, batch[:, :-1], batch[:, 1:])
    assert all(t.any() for t in state.carried.tensors())
    hook = state.model.blocks[0].mixer.gates.weight.register_hook(lambda grad: grad * math.inf)
    train_step(state, cfg, batch[:, :-1], batch[:, 1:])
    hook.remove()
    assert all(t.any() for t in state.carried.tensors())  # which are right: a gradient overflowed
    state.carried.visits[0]["hidden"][0] = math.nan
    train_step(state, cfg, batch[:, :-1], batch[:, 1:])
    assert not any(t.any() for t in state.carried.tensors())
    stats = train_step(state, cfg, batch[:, :-1], batch[:, 1:])
    assert stats.loss.isfinite() and stats.grad_norm.isfinite()


def test_resets_need_to_know_the_token(settings, tmp_path):
    """From index.json, into the checkpoint; a run on data without such a token is refused."""
    settings |= {"RESET_AT_EOT": 1, "MIXER": "gru", "NUM_ITERATIONS": 2}
    codes, out = launch(settings)
    assert codes == [3] and "RESET_AT_EOT=1 needs eot_id in index.json of " in out
    (tmp_path / "index.json").write_text(json.dumps({"vocab_size": 64, "eot_id": "x"}))
    codes, out = launch(settings | {"RUN_ID": "no_number"})
    assert codes == [3] and "index.json: expected in eot_id an id" in out
    (tmp_path / "index.json").write_text(json.dumps({"vocab_size": 64, "eot_id": 5}))
    codes, out = launch(settings | {"RUN_ID": "told"})
    assert codes == [0], out
    assert tensors(folder(settings, 2, "told"))["model.eot"] == 5
    plain = settings | {"RUN_ID": "plain", "RESET_AT_EOT": 0}
    launch(plain)
    assert curve(plain) != curve(settings, "told")


REFUSED = [
    (
        {"CARRY_STATE": 1, "MIXER": "gru", "VAL_TOKENS": 191},
        "VAL_TOKENS=191 needs at least 192: a sample for each of BATCH_SIZE=12 streams",
    ),
    ({"CARRY_STATE": 1}, "CARRY_STATE=1 needs recurrent mixers alone, as MIXER=gru_rwkv"),
    ({"CARRY_STATE": 1, "MIXER": "gru,attention"}, "needs recurrent mixers alone"),
    ({"CARRY_STATE": 1, "MIXER": "gru", "POS": "learned"}, "needs POS=rotary"),
    ({"CARRY_STATE": 1, "MIXER": "gru", "SHUFFLE": 1}, "needs SHUFFLE=0"),
    ({"RESET_AT_EOT": 1}, "RESET_AT_EOT=1 needs a recurrent MIXER"),
    ({"MIXER": "lstm"}, "choose one of attention, gru, rwkv, gru_rwkv, mingru, gated_deltanet"),
]


@pytest.mark.parametrize("changes, words", REFUSED, ids=str)
def test_what_has_no_meaning_is_refused(settings, changes, words):
    codes, out = launch(settings | changes)
    assert codes == [2] and words in out
