"""Caches and generation: the full pass is the oracle, for every part of a model."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from conftest import VARIANTS, curve, launch, summary, tiny, write_shard
from test_model import trained_a_little
from torch.utils.flop_counter import FlopCounterMode

import tokenization
import train_gpt
from ops.generation import generate, next_logits
from ops.sampling import draw
from train_gpt import GPT


def model_of(**changes):
    return trained_a_little(tiny(**changes)).eval().requires_grad_(False)


def one_by_one(model, prompt, steps):
    """The likeliest tokens that follow a prompt, each by a full pass over all before it."""
    sequence = list(prompt)
    for _ in range(steps):
        sequence.append(model(torch.tensor([sequence]))[0, -1].argmax().item())
    return sequence[len(prompt) :]


def logits_of(model, tokens, *cached):
    x, head, _ = model.hidden(tokens, *cached)
    return model.logits(x, head)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_pieces_are_the_full_pass(variant):
    """A prompt in pieces, then token by token; and rows that are padded to different lengths."""
    model = model_of(**variant)
    tokens = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(1))
    full = model(tokens)
    cache = model.new_cache(3, 16)
    pieces = [logits_of(model, piece, cache) for piece in tokens.split([6, 1, 5, 1, 1, 2], dim=1)]
    in_pieces = torch.cat(pieces, dim=1)
    assert torch.allclose(in_pieces, full, atol=1e-4)
    assert torch.equal(in_pieces.argmax(-1), full.argmax(-1))
    assert full.std() > 0.01  # or all would be equal

    cache, seen = model.new_cache(3, 16), [0, 0, 0]
    for counts in ([2, 7, 4], [1, 1, 1], [5, 1, 3], [1, 1, 1]):
        rows = zip(tokens.tolist(), seen, counts)
        given = [row[start : start + count] for row, start, count in rows]
        logits = next_logits(model, given, cache)
        seen = [start + count for start, count in zip(seen, counts)]
        for row, length in enumerate(seen):
            assert torch.allclose(logits[row], full[row, length - 1], atol=1e-4)
    assert cache.filled.tolist() == seen


MIXED_VALUES = {"n_layer": 4, "residual": "unet", "value_residual": True, "value_embeds": 2}


@pytest.mark.parametrize(
    "variant", [{}, {"recurrence": "shared", "ffn": "moe"}, MIXED_VALUES], ids=str
)
def test_generate_is_the_likeliest_by_full_passes(variant):
    """Prompts of different lengths, several samples of each, until the context is full."""
    model = model_of(**variant)
    prompts = [[5, 9, 33], [1], [60, 2, 3, 4, 5]]
    made = list(generate(model, prompts, 11, samples=2, temperature=0))
    assert len(made) == 11 and all(len(tokens) == 6 for tokens in made)
    for i, sequence in enumerate(zip(*made)):
        assert list(sequence) == one_by_one(model, prompts[i // 2], 11), i


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_device_writes_what_the_cpu_writes(variant):
    """Dense models by a CUDA graph, whose cache is filled anew when the context is full."""
    model = model_of(**variant)
    prompts = [[5, 9, 33], [7]]
    wanted = list(generate(model, prompts, 30, samples=2, temperature=0))
    assert list(generate(model.cuda(), prompts, 30, samples=2, temperature=0)) == wanted


@pytest.mark.parametrize("variant", [{}, MIXED_VALUES], ids=str)
def test_when_the_context_is_full_its_newer_half_stays(variant):
    model = model_of(**variant)
    prompt = list(range(14))
    made = [token for (token,) in generate(model, [prompt], 6, temperature=0)]
    first = one_by_one(model, prompt, 3)  # 16 tokens are seen before the third
    rest = one_by_one(model, (prompt + first)[-8:], 3)
    assert made == first + rest
    with pytest.raises(ValueError, match="17 tokens for a cache of 16"):
        next_logits(model, [list(range(17))], model.new_cache(1, 16))
    of_one = model_of(sequence_length=1, **variant)
    assert len(list(generate(of_one, [[3]], 4))) == 4


def test_a_sample_does_not_depend_on_the_others():
    model = model_of()
    prompt = [7, 8, 9]

    def samples(count, seed=0):
        return [*zip(*generate(model, [prompt], 8, samples=count, seed=seed))]

    four = samples(4)
    assert samples(2) == four[:2] and samples(4) == four
    assert len({*four}) == 4 and samples(4, seed=1) != four
    beside = [*zip(*generate(model, [prompt, [1, 2, 3, 4, 5]], 8, samples=2))]
    assert beside[:2] == four[:2]


def test_selected_rows_do_not_share_memory():
    model = model_of()
    cache = model.new_cache(1, 16)
    next_logits(model, [[1, 2, 3]], cache)
    both = cache.select([0, 0])
    next_logits(model, [[4], [5]], both)
    assert cache.filled.tolist() == [3] and both.filled.tolist() == [4, 4]
    for tensors in both.visits:
        for tensor in tensors.values():
            assert not torch.equal(tensor[0], tensor[1])
    again = next_logits(model, [[6]], cache)
    assert torch.allclose(again, model(torch.tensor([[1, 2, 3, 6]]))[:, -1], atol=1e-5)


def shares(logits, temperature, top_k, top_p, draws=20_000):
    """How often each token is drawn, for chances spread evenly over [0, 1)."""
    chance = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens = draw(logits.expand(draws, -1), chance, temperature, top_k, top_p)
    return torch.bincount(tokens, minlength=logits.size(-1)) / draws


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.7), (5, 0.6), (99, 1.0)])
def test_draws_are_as_often_as_they_are_probable(temperature, top_k, top_p):
    """Against probabilities from numpy: top-k before the temperature, top-p after it."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0))
    scores = logits.double().numpy() / temperature
    order = np.argsort(-scores)[: top_k or None]
    p = np.exp(scores[order]) / np.exp(scores[order]).sum()
    kept = np.cumsum(p) - p < top_p  # the fewest that reach it
    wanted = np.zeros(12)
    wanted[order[kept]] = p[kept] / p[kept].sum()
    assert np.abs(shares(logits[None], temperature, top_k, top_p).numpy() - wanted).max() < 2e-4


def test_extremes_of_draw():
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [9.0, -9.0, 0.0, 0.0]])
    chance = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, chance, 0, 0, 1.0).tolist() == [1, 0]
    assert draw(logits, chance, 1.0, 0, 0.0).tolist() == [1, 0]  # never none
    assert draw(logits, chance, 1e-3, 2, 0.5)[1] == draw(logits, chance, 1e-320, 0, 1.0)[1] == 0
    assert (shares(logits[:1], 1.0, 1, 1.0) > 0).sum() == 1  # of equals too
    last = draw(logits, chance, 1.0, 0, 1.0)
    assert last[1] == 1  # the least likely, and no index beyond


def test_padded_ids_are_never_drawn():
    model = model_of()
    with torch.no_grad():
        model.embed[50:] *= 100  # so that they are the likeliest
    assert max(itertools.chain(*generate(model, [[1]], 10, samples=20))) >= 50
    assert max(itertools.chain(*generate(model, [[1]], 10, samples=20, vocab_size=50))) < 50


def test_a_step_costs_the_same_after_any_prompt_but_for_attention():
    """Counted, not timed: products with weights, and products of attention."""
    cfg = tiny(sequence_length=512, n_embd=64, val_tokens=512)
    model = GPT(cfg).eval()

    def flops(length):
        cache = model.new_cache(1, 512)
        next_logits(model, [[1] * length], cache)
        with FlopCounterMode(display=False) as counter:
            next_logits(model, [[1]], cache)
        return counter.get_flop_counts()["Global"]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        short, long = flops(10), flops(400)
    products = {torch.ops.aten.bmm}
    assert short.keys() == long.keys() >= products
    for operator in short.keys() - products:
        assert short[operator] == long[operator], operator
    n_keys = {length: 2 * 2 * length * 64 * cfg.n_layer for length in (11, 401)}  # scores, values
    assert (short[torch.ops.aten.bmm], long[torch.ops.aten.bmm]) == (n_keys[11], n_keys[401])


def test_samples_in_the_log_change_nothing(settings, tmp_path):
    """SAMPLE_EVERY prints text, the curve is the same; without a tokenizer it costs a warning."""
    launch(settings)
    plain = curve(settings)
    asked = settings | {"SAMPLE_EVERY": 4, "RUN_ID": "told", "DROPOUT": 0}
    codes, output = launch(asked)
    assert codes == [0] and output.count("warning: no sample at step") == 2
    assert "scripts/prepare_data.py writes" in output

    chars = tokenization.from_chars([chr(ord("0") + i) for i in range(64)], has_eot=False)
    (tmp_path / "tokenizer.json").write_text(chars.to_json())
    for name, world in (("shown", 1), ("shown by two", 2)):
        run_id = name.replace(" ", "_")
        codes, output = launch(asked | {"RUN_ID": run_id}, world)
        assert codes == [0] * world and "warning: no sample" not in output
        shown = re.findall(r"^step:[48]/8 (prompt|sample):\n\| (.*)$", output, re.M)
        assert [(name, len(text)) for name, text in shown] == [
            ("prompt", 16),
            ("sample", train_gpt.SAMPLE_TOKENS),
        ] * 2
        assert shown[0] == shown[2]
        if world == 1:
            assert curve(asked, run_id) == plain


def test_bits_per_byte_are_those_of_the_validated_tokens(settings, tmp_path):
    """Tokens that validation has many of, long ones, would be misjudged by a mean of all data."""
    sizes = [1 + 3 * (token % 2) for token in range(60)]  # the model has 64 rows
    index = {"vocab_size": 60, "token_bytes": sizes, "bytes_per_token": 99.0}
    (tmp_path / "index.json").write_text(json.dumps(index))
    val = np.resize([1, 3, 5, 7, 9, 11, 2], 100)
    write_shard(tmp_path / "toy_val_000000.bin", val)
    assert launch(settings | {"VAL_TOKENS": 48})[0] == [0]
    measured = summary(settings)
    mean = np.mean([sizes[token] for token in val[1:49]])
    assert measured["val_bytes_per_token"] == pytest.approx(mean, rel=1e-12)
    assert measured["bits_per_byte"] == pytest.approx(
        measured["final_loss"] / np.log(2) / mean, rel=1e-12
    )
    for unknown in (None, [*sizes[:3], None, *sizes[4:]], sizes[:9]):
        (tmp_path / "index.json").write_text(json.dumps(index | {"token_bytes": unknown}))
        run_id = f"unknown{len(unknown or [])}"
        assert launch(settings | {"RUN_ID": run_id})[0] == [0]
        assert summary(settings, run_id)["bits_per_byte"] is None
