"""The loss of hidden states against targets, without all logits at once.

Shapes: N tokens, n of them in a chunk, C channels, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F

from ops.products import matmul_nt

# Logits at a time: a large product on a GPU, the last-level cache on a CPU.
LOGITS_PER_CHUNK = {"cuda": 2**28, "cpu": 2**23}
# In products a row of logits is a multiple of so many: on a GPU others take three times as long.
LOGITS_PER_ROW = {"cuda": 64, "cpu": 1}


def rows_per_chunk(x, head):
    """How many of the rows x (N, C) have their logits over head (V, C) at a time."""
    n_chunks = math.ceil(len(x) * len(head) / LOGITS_PER_CHUNK[x.device.type])
    return math.ceil(len(x) / n_chunks)


def padded(x, padding):
    """x with zeros at its end, as F.pad takes them; where there are none, which F.pad copies, x."""
    return F.pad(x, padding) if any(padding) else x


def pad_head(head):
    """A head (V, C) with rows of zeros (V + unused, C), for products with LOGITS_PER_ROW."""
    return padded(head, (0, 0, 0, -len(head) % LOGITS_PER_ROW[head.device.type]))


def soft_cap(logits, cap):
    """Logits within (-cap, cap), as Gemma 2 has them (arXiv 2408.00118); cap 0 leaves them."""
    return cap * (logits / cap).tanh() if cap else logits


def capped_logits(x, head, cap, vocab):
    """Float32 logits (n, vocab) of x (n, C) by head (V, C), whose last rows are unused."""
    return soft_cap(matmul_nt(x, head)[:, :vocab].float(), cap)


def score_chunk(x, head, targets, cap=0.0, vocab=None):
    """Summed loss of x (n, C) against targets (n,), and how many of these are likeliest: (2,)."""
    logp = F.log_softmax(capped_logits(x, head, cap, vocab), dim=-1)
    loss = -logp.gather(-1, targets[:, None]).sum()
    return torch.stack([loss, (logp.argmax(-1) == targets).sum().type_as(loss)])


def loss_chunk(x, head, targets, cap=0.0, vocab=None):
    """Summed loss () of x (n, C) against targets (n,), and its gradient for the logits (n, V).

    Rows of head from `vocab` on are unused: they have no part in the loss, and gradients of zero.
    """
    logits = capped_logits(x, head, cap, vocab)
    unused = len(head) - logits.size(-1)
    logp = F.log_softmax(logits, dim=-1)
    target_logp = logp.gather(-1, targets[:, None])
    grad, grad_target = logp.exp_(), target_logp.expm1()  # softmax - onehot
    if cap:
        slope = 1 - (logits / cap).square()  # of soft_cap
        grad, grad_target = grad * slope, grad_target * slope.gather(-1, targets[:, None])
    grad = padded(grad.type_as(x), (0, unused))
    return -target_logp.sum(), grad.scatter_(-1, targets[:, None], grad_target.type_as(x))


class LinearCrossEntropy(torch.autograd.Function):
    """Mean loss () of x (N, C), head (V, C), targets (N,), without all logits at once.

    `cap` is that of soft_cap.

    The gradients are computed with the loss, chunk by chunk, as in Liger-Kernel (arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx, x, head, targets, loss_chunk, cap=0.0):
        weight = pad_head(head.type_as(x))
        total = x.new_zeros((), dtype=torch.float32)
        training = ctx.needs_input_grad[0]
        grad_x = torch.empty_like(x) if training else x
        grad_head = torch.zeros_like(head) if training else None
        rows = rows_per_chunk(x, head)
        for xs, ts, grad_xs in zip(x.split(rows), targets.split(rows), grad_x.split(rows)):
            loss, grad_logits = loss_chunk(xs, weight, ts, cap, len(head))
            total += loss
            if training:
                grad_xs.copy_(matmul_nt(grad_logits, weight.mT))
                grad_head.add_(matmul_nt(grad_logits.mT, xs.mT)[: len(head)])
        ctx.save_for_backward(grad_x, grad_head)
        return total / len(x)

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_head = ctx.saved_tensors
        grad = grad / len(grad_x)
        return grad_x.mul_(grad), grad_head.mul_(grad), None, None, None
