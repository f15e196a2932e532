"""Tokens drawn from what a model says of the next one."""

import torch


def draw(logits, chance, temperature, top_k, top_p):
    """Tokens (B,) from logits (B, V) by chance (B,), uniform in [0, 1).

    The TOP_K likeliest, of these the fewest whose probability reaches TOP_P; 0 and 1 leave all.
    Temperature 0 takes the likeliest.
    """
    if temperature == 0:
        return logits.argmax(-1)
    k = min(top_k or logits.size(-1), logits.size(-1))
    logits, tokens = logits.topk(k)  # the likeliest first
    p = ((logits - logits[:, :1]).double() / temperature).softmax(-1)
    before = p.cumsum(-1) - p
    upto = (p * (before < max(top_p, 1e-12))).cumsum(-1)  # never none
    choice = torch.searchsorted(upto, chance[:, None] * upto[:, -1:], right=True)
    return tokens.gather(-1, choice.clamp(max=k - 1)).squeeze(-1)
