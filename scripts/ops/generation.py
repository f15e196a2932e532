"""Text that a model writes, token by token, from a cache of what it has read.

Of the model this asks `hidden`, `logits` and `new_cache`, as train_gpt.GPT has them, the tokens it
can see (`context`), and whether no step waits for the device (`is_dense`). B sequences, T
positions, V vocabulary.
"""

import numpy as np
import torch

from ops.cuda_graph import Replay
from ops.sampling import draw


def next_logits(model, pieces, cache):
    """Float32 logits (B, V) of what follows the lists of tokens, which are put into the cache."""
    device, counts = model.embed.device, [len(piece) for piece in pieces]
    longest = max(counts)
    padded = [piece + [0] * (longest - len(piece)) for piece in pieces]
    tokens, counts = torch.tensor(padded, device=device), torch.tensor(counts, device=device)
    return last_logits(model, tokens, cache, counts)


def last_logits(model, tokens_BT, cache, counts=None):
    """As next_logits, of rows with counts (B,) tokens, or all T, before their padding."""
    x, head, _ = model.hidden(tokens_BT, cache, counts)
    last = x[:, -1] if counts is None else x[torch.arange(len(x), device=x.device), counts - 1]
    return model.logits(last, head)


def replayed_step(model, cache):
    """A function from tokens (B,), a list, to what next_logits has for them, by a CUDA graph.

    Kernel by kernel the device would wait for the host most of the time.
    """
    tokens = torch.zeros(len(cache.filled), 1, dtype=torch.int64, device=cache.filled.device)

    def record():
        cache.longest = 0
        return last_logits(model, tokens, cache)

    longest, cache.static = cache.longest, True
    replay = Replay(record, cache.tensors())
    cache.longest, cache.static = longest, False

    def step(new):
        tokens.copy_(torch.tensor(new)[:, None])
        cache.longest += 1
        return replay()

    return step


@torch.no_grad()
def continuations(
    model, prompts, rows, chances, temperature=1.0, top_k=0, top_p=1.0, vocab_size=None
):
    """Yields the next token of each sequence, a list of ints, for each column of chances.

    Sequence i goes on with prompts[rows[i]], a list of tokens, by chances[i] in [0, 1), until the
    longest has SEQUENCE_LENGTH tokens, all that attention sees: then the newer half of each stays.
    The model is in eval mode. Tokens are below `vocab_size`.
    """
    steps = chances.shape[1]
    context = min(model.context, max(map(len, prompts)) + steps)
    sequences = [list(prompts[row]) for row in rows]
    chances = torch.tensor(chances, device=model.embed.device)
    cache = model.new_cache(len(prompts), context)
    logits = next_logits(model, prompts, cache)[rows]
    cache = cache.select(rows)
    replay = replayed_step(model, cache) if model.embed.is_cuda and model.is_dense else None
    tokens = []
    for step in range(steps):
        if step and cache.longest == context:
            cache.clear()
            newer = [sequence[-((context + 1) // 2) :] for sequence in sequences]
            logits = next_logits(model, newer, cache)
        elif step and replay:
            logits = replay(tokens)
        elif step:
            logits = next_logits(model, [[token] for token in tokens], cache)
        tokens = draw(logits[:, :vocab_size], chances[:, step], temperature, top_k, top_p).tolist()
        for sequence, token in zip(sequences, tokens):
            sequence.append(token)
        yield tokens


def generate(model, prompts, steps, samples=1, seed=0, **options):
    """Yields `steps` times the next token of each sequence, a list of ints.

    There are `samples` sequences of each prompt, a list of tokens, and prompts[0]'s come first.
    What is drawn for a sequence depends on `seed` and its index alone; `options` are those of
    continuations.
    """
    rows = np.arange(len(prompts)).repeat(samples).tolist()
    chances = [np.random.default_rng((seed, i)).random(steps) for i in range(len(rows))]
    return continuations(model, prompts, rows, np.array(chances), **options)
