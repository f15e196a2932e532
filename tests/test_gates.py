"""Attention gates (arXiv 2505.06708): what each kind is, against the others and against no gate."""

import pytest
import torch
from conftest import context, tiny

from train_gpt import GATE_ACTS, GATE_POSITIONS, CausalSelfAttention


def attention(**settings):
    torch.manual_seed(0)
    mixer = CausalSelfAttention(tiny(**settings))
    torch.nn.init.normal_(mixer.proj.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    return mixer


def twin(plain, **settings):
    """The same attention with a gate."""
    gated = attention(**settings)
    gated.load_state_dict(plain.state_dict(), strict=False)
    return gated


X = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(2))
CTX = context(16)


@pytest.mark.parametrize("gate", ["headwise", "elementwise", "const"])
@pytest.mark.parametrize("where", GATE_POSITIONS)
@pytest.mark.parametrize("act, half", [("sigmoid", 0.5), ("ns_sigmoid", 0.75)])
def test_zero_score_scales_the_output(gate, where, act, half):
    """A linear map of the values commutes with a constant: W_g = 0 is act(0) times no gate."""
    plain = attention()
    gated = twin(plain, attngate=gate, gatepos=where, gateact=act)
    for name, p in gated.named_parameters():
        if "gate" in name:
            torch.nn.init.zeros_(p)
    assert torch.allclose(gated(X, CTX), half * plain(X, CTX), atol=1e-6)


def test_headwise_is_elementwise_with_repeated_rows():
    plain = attention()
    headwise, elementwise = (twin(plain, attngate=gate) for gate in ("headwise", "elementwise"))
    elementwise.gate_output.score.weight.data = (
        headwise.gate_output.score.weight.data.repeat_interleave(16, 0)
    )
    assert torch.allclose(headwise(X, CTX), elementwise(X, CTX), atol=1e-6)


def test_gate_on_values_equals_attention_over_gated_values():
    plain = attention()
    gated = twin(plain, attngate="elementwise", gatepos="value")
    y = torch.randn(2, 16, 2, 16)
    expected = y * torch.sigmoid(X @ gated.gate_value.score.weight.T).view(2, 16, 2, 16)
    assert torch.allclose(gated.gate_value(y, X), expected, atol=1e-6)
    assert not any("gate" in name for name, _ in gated.gate_output.named_parameters())


def test_the_gate_reads_the_input_of_attention_at_the_same_position():
    """Changing x at t changes the gate at t alone."""
    gate = attention(attngate="headwise").gate_output
    y, other = torch.ones(2, 16, 2, 16), X.clone()
    other[:, 5] += 1
    changed = (gate(y, X) - gate(y, other)).abs().amax((0, 2, 3)) > 0
    assert changed.nonzero().flatten().tolist() == [5]


def test_ns_sigmoid_lies_between_a_half_and_one():
    values = GATE_ACTS["ns_sigmoid"](torch.linspace(-20, 20, 101))
    assert values.min() >= 0.5 and values.max() <= 1 and abs(values[50] - 0.75) < 1e-6


@pytest.mark.parametrize("gate", ["headwise", "elementwise", "const"])
def test_gate_weights_are_two_dimensional_without_bias(gate):
    weights = dict(attention(attngate=gate, bias=True).gate_output.named_parameters())
    assert [p.ndim for p in weights.values()] == [2]
