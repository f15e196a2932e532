"""Recurrences and the mixers that are made of them, against loops over time and torch.nn.GRU."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import context, run_ranks, tiny
from test_model import trained_a_little

from ops.recurrences import CHUNK, chunked_wkv, gated_delta_rule, gru, linear_scan, with_past
from ops.generation import generate, next_logits
from train_gpt import GPT, MIXERS, Recurrent

STATEFUL = [name for name, kind in MIXERS.items() if issubclass(kind, Recurrent)]
LENGTHS = (1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7, 1100)
FLOOR = -math.exp(-0.5)  # of RWKV's log decay
B, H, K, V = 2, 3, 4, 5


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def segments(T, kind):
    """None, or resets at random places, the first and the last token among them."""
    if not kind:
        return None
    resets = random(B, T, seed=9) > 1
    resets[0, 0] = resets[1, -1] = True
    return resets.cumsum(1)


def wkv_inputs(T, decay="any"):
    spread = {"any": 4 * random(B, T, H, K, seed=4), "fast": 40.0, "slow": -40.0}[decay]
    log_decay = FLOOR * torch.sigmoid(spread + random(B, T, H, K, seed=5))
    r, k = random(B, T, H, K, seed=1), random(B, T, H, K, seed=2)
    v, state = random(B, T, H, V, seed=3), random(B, H, K, V, seed=7)
    return r, k, v, log_decay, random(H, K, seed=6), state


def delta_inputs(T, decay="any"):
    rate = {"any": 3 * random(B, T, H, seed=4).exp(), "fast": 30.0, "slow": 1e-9}[decay]
    log_decay = -rate * torch.sigmoid(random(B, T, H, seed=5))
    q, k = random(B, T, H, K, seed=1), F.normalize(random(B, T, H, K, seed=2), dim=-1)
    v, beta = random(B, T, H, V, seed=3), torch.sigmoid(random(B, T, H, seed=6))
    return q, k, v, log_decay, beta, random(B, H, K, V, seed=7)


def gru_inputs(T, decay="any"):
    shift = {"any": 0.0, "fast": -6.0, "slow": 6.0}[decay]
    gates = random(B, T, 3 * K, seed=1) + torch.tensor([0.0, shift, 0.0]).repeat_interleave(K)
    return gates, random(3 * K, K, seed=2) / 2, random(B, K, seed=3)


def scan_inputs(T, decay="any"):
    shift = {"any": 0.0, "fast": -20.0, "slow": 6.0}[decay]
    return torch.sigmoid(random(B, T, K, seed=1) + shift), random(B, T, K, seed=2), random(B, K)


def over_time(step, inputs, state, segment):
    """Outputs (B, T, ...) and last state of a step for each token, with the resets of segments."""
    outputs, last = [], 0
    for t in range(inputs[0].size(1)):
        if segment is not None:
            goes_on = (segment[:, t] == last).view(-1, *[1] * (state.ndim - 1))
            state, last = state * goes_on, segment[:, t]
        output, state = step(state, *(x[:, t] for x in inputs))
        outputs.append(output)
    return torch.stack(outputs, dim=1), state


def wkv_loop(r, k, v, log_decay, bonus, state, segment=None):
    def step(state, r, k, v, log_decay):
        new = k.unsqueeze(-1) * v.unsqueeze(-2)
        output = torch.einsum("bhk,bhkv->bhv", r, state + bonus.unsqueeze(-1) * new)
        return output, log_decay.exp().unsqueeze(-1) * state + new

    return over_time(step, (r, k, v, log_decay), state, segment)


def delta_loop(q, k, v, log_decay, beta, state, segment=None):
    identity = torch.eye(K, dtype=q.dtype)

    def step(state, q, k, v, log_decay, beta):
        beta = beta[..., None, None]
        forgets = identity - beta * k.unsqueeze(-1) * k.unsqueeze(-2)
        new = beta * k.unsqueeze(-1) * v.unsqueeze(-2)
        state = log_decay.exp()[..., None, None] * (forgets @ state) + new
        return torch.einsum("bhk,bhkv->bhv", q, state), state

    return over_time(step, (q, k, v, log_decay, beta), state, segment)


def gru_loop(gates, weight, state, eps=0.0, segment=None):
    def step(h, gates):
        normed = F.rms_norm(h, h.shape[-1:], eps=eps) if eps else h
        (r, z, n), (ur, uz, un) = gates.chunk(3, -1), F.linear(normed, weight).chunk(3, -1)
        z = torch.sigmoid(z + uz)
        h = (1 - z) * torch.tanh(n + torch.sigmoid(r + ur) * un) + z * h
        return h, h

    return over_time(step, (gates,), state, segment)[0]


def scan_loop(a, b, state, segment=None):
    return over_time(lambda h, a, b: (a * h + b,) * 2, (a, b), state, segment)[0]


def with_eps(function, eps):
    return lambda gates, weight, state, segment=None: function(gates, weight, state, eps, segment)


RECURRENCES = {
    "wkv": (chunked_wkv, wkv_loop, wkv_inputs),
    "delta": (gated_delta_rule, delta_loop, delta_inputs),
    "gru": (with_eps(gru, 0.0), with_eps(gru_loop, 0.0), gru_inputs),
    "normed gru": (with_eps(gru, 1e-3), with_eps(gru_loop, 1e-3), gru_inputs),
    "scan": (linear_scan, scan_loop, scan_inputs),
}


def results(function, *args):
    made = function(*args)
    return made if isinstance(made, tuple) else (made,)


@pytest.mark.parametrize("kind", [None, "segments"])
@pytest.mark.parametrize("decay", ["any", "fast", "slow"])
@pytest.mark.parametrize("name", RECURRENCES)
def test_recurrences_are_loops_over_time(name, decay, kind):
    """In float64, in float32, with a state from before, at any length."""
    fast, loop, inputs = RECURRENCES[name]
    for T in LENGTHS:
        args, segment = inputs(T, decay), segments(T, kind)
        wanted = results(loop, *args, segment)
        found = results(fast, *args, segment)
        assert len(wanted) == len(found)
        for a, b in zip(found, wanted):
            assert a.shape == b.shape and (a - b).abs().max() <= 1e-9 * (1 + b.abs().max())
        for a, b in zip(results(fast, *(x.float() for x in args), segment), wanted):
            assert a.dtype == torch.float32 and (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("kind", [None, "segments"])
@pytest.mark.parametrize("name", RECURRENCES)
def test_gradients(name, kind, monkeypatch):
    """Of every input, the state among them, against finite differences."""
    monkeypatch.setattr("ops.recurrences.CHUNK", 4)
    fast, _, inputs = RECURRENCES[name]
    args = [x.requires_grad_() for x in inputs(7)]
    segment = segments(7, kind)
    assert torch.autograd.gradcheck(lambda *args: fast(*args, segment), args)


@pytest.mark.parametrize("name", RECURRENCES)
def test_gradients_are_those_of_the_loop(name):
    """In float32, over several chunks, at decays at both ends."""
    fast, loop, inputs = RECURRENCES[name]
    for decay in ("any", "fast", "slow"):
        args = [x.requires_grad_() for x in inputs(70, decay)]
        wanted = torch.autograd.grad(results(loop, *args)[0].square().sum(), args)
        args = [x.detach().float().requires_grad_() for x in args]
        found = torch.autograd.grad(results(fast, *args)[0].square().sum(), args)
        for a, b in zip(found, wanted):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-30, decay


@pytest.mark.parametrize("name", ["wkv", "delta"])
def test_decays_that_change_along_a_long_sequence(name):
    """From forgetting at once to forgetting nothing: no sum over the sequence loses digits, only
    one over a chunk, of which the delta rule's may be large."""
    tolerance = {"wkv": 1e-5, "delta": 1e-4}[name]
    fast, loop, inputs = RECURRENCES[name]
    args = inputs(4000)
    args[3][:, :2000] = args[3].min()
    args[3][:, 2000:] *= 1e-3
    wanted, state = loop(*args)
    found, last = fast(*(x.float() for x in args))
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert (last - state).abs().max() <= tolerance * state.abs().max()


def test_gru_is_torchs():
    """Without norms; ours adds both biases to the input's gates, but for the candidate's."""
    torch.manual_seed(0)
    theirs = torch.nn.GRU(6, 8, batch_first=True).float()
    with torch.no_grad():
        theirs.bias_hh_l0[16:] = 0
    x, state = torch.randn(3, 40, 6), torch.randn(3, 8)
    gates = F.linear(x, theirs.weight_ih_l0, theirs.bias_ih_l0 + theirs.bias_hh_l0)
    ours = gru(gates, theirs.weight_hh_l0, state)
    wanted, _ = theirs(x, state.unsqueeze(0))
    assert torch.allclose(ours, wanted, atol=1e-6) and wanted.std() > 0.1
    params = [theirs.weight_ih_l0, theirs.weight_hh_l0]
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), params),
        torch.autograd.grad(wanted.square().sum(), params),
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def count_graph_breaks(cases):
    """{name: how many torch.compile would make} of {name: (function, *args)}: in a process of its
    own, for what is forked from one that has traced something may wait for ever."""

    def count(ranks):
        explain = torch._dynamo.explain
        return {name: explain(f)(*args).graph_break_count for name, (f, *args) in cases.items()}

    (found,) = run_ranks(1, count)
    return found


def test_recurrences_and_blocks_are_one_graph():
    """With states from step to step, too."""

    def broken(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    cases = {"broken": (broken, torch.ones(2))}
    for name, (fast, _, inputs) in RECURRENCES.items():
        cases[name] = (lambda *args, fast=fast: fast(*args), *inputs(40))
    for name in STATEFUL:
        model = trained_a_little(tiny(mixer=name))
        x = torch.randn(B, 16, 32)
        for cache in (None, model.new_cache(B, math.inf).visits[0]):
            case = f"block of {name}{'' if cache is None else ', carried'}"
            cases[case] = (model.blocks[0], x, context(16, cache=cache))
    counts = count_graph_breaks(cases)
    assert counts.pop("broken") == 1
    assert len(counts) == len(RECURRENCES) + 2 * len(STATEFUL) and not any(counts.values()), counts


def test_the_past_is_before_each_token():
    x, past = random(B, 6, K), random(B, 3, K, seed=1)
    full = torch.cat([past, x], dim=1)
    kept = past.clone()
    taps = with_past(x, kept)
    assert all(torch.equal(tap, full[:, i : i + 6]) for i, tap in enumerate(taps))
    assert torch.equal(kept, x[:, 3:])

    valid = torch.arange(6) < torch.tensor([[2], [0]])
    kept = past.clone()
    with_past(x, kept, valid)
    assert torch.equal(kept[0], full[0, 2:5]) and torch.equal(kept[1], past[1])

    segment = torch.tensor([[0, 0, 1, 1, 1, 2], [1, 1, 1, 1, 1, 1]])
    kept = past.clone()
    taps = with_past(x, kept, None, segment)
    assert not kept[0, :2].any() and torch.equal(kept[0, 2], x[0, 5])
    assert torch.equal(kept[1], x[1, 3:])
    before = F.pad(segment, (3, 0))
    for row, t, i in itertools.product(range(B), range(6), range(4)):
        wanted = full[row, t + i] * (before[row, t + i] == segment[row, t])
        assert torch.equal(taps[i][row, t], wanted)


# Mixers


def mixer_of(name, **changes):
    """A mixer whose every weight has a say, with little memory and with much."""
    mixer = trained_a_little(tiny(mixer=name, n_layer=1, **changes)).blocks[0].mixer.double()
    return mixer.eval()


def test_there_are_mixers_with_states():
    assert len(STATEFUL) >= 5 and "attention" not in STATEFUL


@pytest.mark.parametrize("name", STATEFUL)
def test_a_sequence_may_be_split_anywhere(name):
    mixer, x = mixer_of(name), random(B, 12, 32)
    full = mixer(x, context(12))
    for cut in range(1, 12):
        cache = mixer.new_cache(B, 12, x)
        parts = [
            mixer(part, context(part.size(1), cache=cache)) for part in x.split([cut, 12 - cut], 1)
        ]
        assert torch.allclose(torch.cat(parts, dim=1), full, atol=1e-10), cut


@pytest.mark.parametrize("name", STATEFUL)
def test_rows_do_not_touch_each_other(name):
    mixer, x = mixer_of(name), random(3, 9, 32)
    alone = torch.cat([mixer(row, context(9)) for row in x.split(1)])
    assert torch.allclose(mixer(x, context(9)), alone, atol=1e-10)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_reset_begins_anew(name):
    """An end-of-text token and those after it are a sequence of their own."""
    cfg = tiny(mixer=name, reset_at_eot=True, n_layer=2)
    model = trained_a_little(cfg).double().eval()
    model.dtype = torch.float64
    model.eot.fill_(63)
    tokens = torch.randint(0, 63, (2, 16), generator=torch.Generator().manual_seed(0))
    tokens[:, 6] = 63
    tokens[1, 11] = 63
    full = model(tokens)
    assert torch.allclose(full[:, 6:11], model(tokens[:, 6:11]), atol=1e-6)
    assert torch.allclose(full[1:, 11:], model(tokens[1:, 11:]), atol=1e-6)
    model.eot.fill_(-1)
    assert not torch.allclose(full[:, 6:11], model(tokens)[:, 6:11], atol=1e-3)

    model.eot.fill_(63)
    cache = model.new_cache(2, 16)
    for start, stop in itertools.pairwise([0, 3, 6, 7, 12, 16]):
        rows = tokens[:, start:stop].tolist()
        logits = next_logits(model, rows, cache)
    assert torch.allclose(logits, full[:, -1], atol=1e-5)


@pytest.mark.parametrize("name", STATEFUL)
def test_padding_with_the_end_of_text_resets_nothing(name):
    """Rows are padded with id 0, which may be the end of a text."""
    model = trained_a_little(tiny(mixer=name, reset_at_eot=True)).eval()
    model.eot.fill_(0)
    cache = model.new_cache(2, 16)
    next_logits(model, [[5, 6, 7, 8, 9], [4]], cache)
    after = next_logits(model, [[3], [3]], cache)
    assert torch.allclose(after[1], model(torch.tensor([[4, 3]]))[0, -1], atol=1e-4)


@pytest.mark.parametrize("name", STATEFUL)
def test_states_stay_bounded(name):
    """Over 10,000 tokens, of random text and of one token again and again."""
    model = trained_a_little(tiny(mixer=name, n_layer=1)).eval().requires_grad_(False)
    for tokens in (torch.randint(0, 64, (1, 10_000)), torch.full((1, 10_000), 7)):
        cache, norms = model.new_cache(1, math.inf), []
        for piece in tokens.split(1000, dim=1):
            model.hidden(piece, cache)
            norms.append(max(t.norm().item() for t in cache.tensors()[1:]))
        assert max(norms[1:]) < 1.5 * norms[0]


@pytest.mark.parametrize("name", STATEFUL)
def test_bfloat16_stays_near_float32(name):
    """The states are in float32, so what differs does not grow along a sequence."""
    x = random(1, 4000, 32, dtype=torch.float32)
    mixer = mixer_of(name).float()
    exact, pieces = mixer(x, context(4000)), []
    cache = mixer.new_cache(1, 0, x.bfloat16())
    assert all(cache[name].dtype == torch.float32 for name in {*cache} - {"past"})
    for piece in x.bfloat16().split(100, dim=1):
        pieces.append(mixer(piece, context(100, cache=cache)).float())
    error = (torch.cat(pieces, dim=1) - exact).square().mean(-1).sqrt()
    error = error / exact.square().mean().sqrt()
    assert error[0, :100].mean() < 0.05 and error[0, -100:].mean() < 0.05


@pytest.mark.parametrize("name", STATEFUL)
def test_a_text_has_no_end(name):
    """The memory of a model without attention does not grow, and it writes past SEQUENCE_LENGTH."""
    model = trained_a_little(tiny(mixer=name)).eval().requires_grad_(False)
    assert model.context == math.inf
    prompt = [[5, 9, 33]]
    made = [token for (token,) in generate(model, prompt, 40, temperature=0)]
    sequence = prompt[0] + made
    for i in range(3, 43):
        logits = model(torch.tensor([sequence[:i]]))[0, -1]
        assert logits.max() - logits[sequence[i]] < 1e-4
    cache = model.new_cache(1, math.inf)
    sizes = set()
    for _ in range(3):
        next_logits(model, [[1] * 50], cache)
        sizes.add(sum(t.numel() for t in cache.tensors()))
    assert len(sizes) == 1


def test_a_model_with_attention_keeps_its_window():
    assert GPT(tiny(mixer="attention,gru")).context == 16
    assert GPT(tiny(mixer="gru", pos="learned")).context == 16
