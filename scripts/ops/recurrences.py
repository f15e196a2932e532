"""Linear and gated recurrences over time, each as fast as plain torch has it and exact.

Shapes: B sequences, T positions, H heads, K channels of a key, V of a value, C channels. A state
is what a recurrence knows of the tokens until now. `segment` (B, T), where given, counts the resets
of a sequence until each token, which then sees no token and no state of another segment; the state
that is given belongs to segment 0.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32  # tokens; on a CPU 16 to 64 differ little


def in_chunks(x):
    """x (B, T, H, ...) as (B, H, N, size, ...), zeros at the end where T is no multiple."""
    B, T = x.shape[:2]
    size = min(CHUNK, T)
    x = F.pad(x, (*[0, 0] * (x.ndim - 2), 0, -T % size))
    return x.view(B, -1, size, *x.shape[2:]).movedim(3, 1)


def from_chunks(x, length):
    """(B, H, N, size, V) as (B, T, H, V), the first `length` tokens."""
    return x.movedim(1, 3).flatten(1, 2)[:, :length]


class Segments:
    """Which tokens and states may see each other, from segment (B, T): masks that broadcast."""

    def __init__(self, segment):
        B, T = segment.shape
        size = min(CHUNK, T)
        last = segment[:, -1:].expand(B, -T % size)
        own = torch.cat([segment, last], dim=1).view(B, 1, -1, size)  # of each token
        ends = F.pad(own[..., -1], (1, 0))  # of the state before each chunk, and after the last
        self.same = own.unsqueeze(-1) == own.unsqueeze(-2)  # (B, 1, N, size, size): of two tokens
        self.starts = (own == ends[..., :-1, None]).unsqueeze(-1)  # the token sees the state before
        self.ends = (own == ends[..., 1:, None]).unsqueeze(-1)  # the state after has the token
        self.kept = (ends[..., :-1] == ends[..., 1:])[..., None, None]  # both states are of one


def with_past(x, past, valid=None, segment=None):
    """[x (B, T, C) of n tokens before, ..., of one before, x]; past (B, n, C) was before it.

    What is of another segment is zero. Leaves in past the last n tokens, of their segment alone,
    without those at the end where valid (B, T) is false.
    """
    n, T = past.size(1), x.size(1)
    x = torch.cat([past, x], dim=1)
    taps = [x[:, i : i + T] for i in range(n + 1)]
    count = torch.full((1, 1), T, device=x.device) if valid is None else valid.sum(1, keepdim=True)
    index = count + torch.arange(n, device=x.device)
    last = x.take_along_dim(index.unsqueeze(-1), dim=1)
    if segment is not None:
        segments = F.pad(segment, (n, 0))
        for i, tap in enumerate(taps):
            taps[i] = tap * (segments[:, i : i + T] == segment).unsqueeze(-1)
        of_last = segments.take_along_dim(index, dim=1)
        last = last * (of_last == of_last[:, -1:]).unsqueeze(-1)
    past.copy_(last.detach())
    return taps


def goes_on(segment):
    """(B, T, 1): whether a token is of the same segment as the one before it."""
    return (segment == F.pad(segment[:, :-1], (1, 0))).unsqueeze(-1)


def linear_scan(a, b, state, segment=None):
    """h_t = a_t h_(t-1) + b_t of a, b (B, T, C), from a state (B, C): h (B, T, C)."""
    if segment is not None:
        a = a * goes_on(segment)
    return LinearScan.apply(a, b, state)


class LinearScan(torch.autograd.Function):
    """linear_scan without segments, whose gradient is a scan from the end."""

    @staticmethod
    def forward(ctx, a, b, state):
        h = chunked_scan(a, b, state)
        ctx.save_for_backward(a, h, state)
        return h

    @staticmethod
    def backward(ctx, grad):
        a, h, state = ctx.saved_tensors
        later = F.pad(a[:, 1:], (0, 0, 0, 1))
        grad_b = chunked_scan(later.flip(1), grad.flip(1), torch.zeros_like(state)).flip(1)
        before = torch.cat([state.unsqueeze(1), h[:, :-1]], dim=1)
        return grad_b * before, grad_b, grad_b[:, 0] * a[:, 0]


def chunked_scan(a, b, state):
    """linear_scan, step by step in all chunks at once, then from chunk to chunk."""
    length = a.size(1)
    size = math.ceil(length**0.5)
    a, b = (F.pad(x, (0, 0, 0, -length % size)) for x in (a, b))
    a, b = (x.unflatten(1, (-1, size)).unbind(2) for x in (a, b))
    products, sums = [a[0]], [b[0]]  # from the beginning of the chunk
    for a_t, b_t in zip(a[1:], b[1:]):
        sums.append(torch.addcmul(b_t, a_t, sums[-1]))
        products.append(a_t * products[-1])
    states = [state]  # before each chunk
    for product, total in zip(products[-1].unbind(1), sums[-1].unbind(1)):
        states.append(torch.addcmul(total, product, states[-1]))
    before = torch.stack(states[:-1], dim=1).unsqueeze(2)
    h = torch.addcmul(torch.stack(sums, dim=2), torch.stack(products, dim=2), before)
    return h.flatten(1, 2)[:, :length]


def cumulative(log_decay):
    """Sums (..., size, K) over the tokens until each, with its own: cumsum has no deterministic
    form on CUDA."""
    size = log_decay.size(-2)
    return torch.ones(size, size, dtype=log_decay.dtype, device=log_decay.device).tril() @ log_decay


def chunked_wkv(r, k, v, log_decay, bonus, state, segment=None):
    """RWKV's linear attention with a decay for each token and channel (RWKV-6, arXiv 2404.05892).

    o_t = r_t (S_(t-1) + diag(bonus) k_t v_t),  S_t = diag(exp(log_decay_t)) S_(t-1) + k_t v_t

    r, k, log_decay (B, T, H, K), v (B, T, H, V), bonus (H, K), state (B, H, K, V) -> o (B, T, H, V)
    and the last state, in float32. log_decay must lie in (-1, 0): exp(CHUNK) has to be a number.
    Products within a chunk are in the dtype of v, unless that is float16, whose range is too small.
    """
    length = v.size(1)
    wide = torch.promote_types(v.dtype, torch.float32)
    narrow = wide if v.dtype == torch.float16 else v.dtype
    r, k, v, log_decay = (in_chunks(x.to(wide)) for x in (r, k, v, log_decay))
    total = cumulative(log_decay)  # of a chunk until each token
    last = total[..., -1:, :]
    from_start = r * (total - log_decay).exp()  # reads the state before the chunk
    to_end = k * (last - total).exp()  # as the state after the chunk has it
    kept = last.exp().mT  # of the state before the chunk in that after it
    scores = (from_start.to(narrow) @ (k * (-total).exp()).to(narrow).mT).tril(-1)
    own = (r * bonus.to(wide)[:, None, None] * k).sum(-1, keepdim=True)
    if segment is not None:
        masks = Segments(segment)
        scores = scores * masks.same
        from_start, to_end = from_start * masks.starts, to_end * masks.ends
        kept = kept * masks.kept

    added = (to_end.mT.to(narrow) @ v.to(narrow)).to(wide)
    states = [state.to(wide)]
    for kept_n, added_n in zip(kept.unbind(2), added.unbind(2)):
        states.append(kept_n * states[-1] + added_n)
    before = torch.stack(states[:-1], dim=2)
    y = scores @ v.to(narrow) + from_start.to(narrow) @ before.to(narrow)
    return from_chunks(y.to(wide) + own * v, length), states[-1]


def gated_delta_rule(q, k, v, log_decay, beta, state, segment=None):
    """The gated delta rule (arXiv 2412.06464), chunk by chunk in its WY form.

    S_t = exp(log_decay_t) (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T,  o_t = S_t^T q_t

    q, k (B, T, H, K), k of unit length, v (B, T, H, V), log_decay < 0 and beta in [0, 1] (B, T, H),
    state (B, H, K, V) -> o (B, T, H, V) and the last state. All in float32.
    """
    length = v.size(1)
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, v, beta, log_decay = (in_chunks(x.to(wide)) for x in (q, k, v, beta, log_decay))
    total, beta = cumulative(log_decay.unsqueeze(-1)).squeeze(-1), beta.unsqueeze(-1)
    visible = torch.ones_like(total[0, 0, 0, :, None] * total[0, 0, 0], dtype=torch.bool).tril()
    from_start = total.exp().unsqueeze(-1)  # of the state before the chunk, as each token sees it
    to_end = (total[..., -1:] - total).exp().unsqueeze(-1)
    kept = total[..., -1].exp()[..., None, None]  # of that state after the chunk
    if segment is not None:
        masks = Segments(segment)
        visible = visible & masks.same
        from_start, to_end = from_start * masks.starts, to_end * masks.ends
        kept = kept * masks.kept
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~visible, -torch.inf).exp()

    # What each token writes depends on what those before it in the chunk wrote: (I + A) w = ...
    writes = (beta * (k @ k.mT) * between).tril(-1)
    identity = torch.eye(total.size(-1), dtype=wide, device=v.device)
    rows = torch.cat([beta * v, beta * from_start * k], dim=-1)
    rows = torch.linalg.solve_triangular(writes + identity, rows, upper=False, unitriangular=True)
    values, keys = rows.split((v.size(-1), k.size(-1)), dim=-1)
    scores = q @ k.mT * between
    state, outputs = state.to(wide), []
    parts = (q * from_start, (k * to_end).mT, scores, values, keys, kept)
    for q_n, k_n, scores_n, values_n, keys_n, kept_n in zip(*(x.unbind(2) for x in parts)):
        written = values_n - keys_n @ state
        outputs.append(q_n @ state + scores_n @ written)
        state = kept_n * state + k_n @ written
    return from_chunks(torch.stack(outputs, dim=2), length), state


@torch.library.custom_op("train_gpt::gru_forward", mutates_args=())
def gru_forward(
    gates: Tensor, weight: Tensor, state: Tensor, keep: Tensor | None, eps: float
) -> list[Tensor]:
    """The loop of `gru` over time, and what its gradient needs, all (T, B, ...).

    h before each step and after the last, reset and update gates, candidates, what these got from
    h, and the factor that normalised h.
    """
    T, B, C = *gates.shape[:2], state.size(-1)
    before = gates.new_empty(T + 1, B, C)
    before[0] = state
    from_h = gates.new_empty(T, B, C)
    candidate = gates.new_empty(T, B, C)
    reset_update = gates.new_empty(T, B, 2 * C)
    scale = gates.new_ones(T, B, 1)
    weight_ru, weight_n = weight.t().split((2 * C, C), dim=1)
    for t in range(T):
        s, u, n, ru = scale[t], from_h[t], candidate[t], reset_update[t]
        h = before[t] if keep is None else before[t] * keep[t]
        if eps:
            torch.linalg.vecdot(h, h, out=s[:, 0])
            s.mul_(1 / C).add_(eps).rsqrt_()
        normed = h * s if eps else h
        torch.addmm(gates[t, :, : 2 * C], normed, weight_ru, out=ru).sigmoid_()
        torch.mm(normed, weight_n, out=u)
        torch.addcmul(gates[t, :, 2 * C :], ru[:, :C], u, out=n).tanh_()
        torch.lerp(n, h, ru[:, C:], out=before[t + 1])
    return [before, reset_update, candidate, from_h, scale]


@gru_forward.register_fake
def _(gates, weight, state, keep, eps):
    T, B, C = *gates.shape[:2], state.size(-1)
    shapes = (T + 1, B, C), (T, B, 2 * C), (T, B, C), (T, B, C), (T, B, 1)
    return [gates.new_empty(shape) for shape in shapes]


@torch.library.custom_op("train_gpt::gru_backward", mutates_args=())
def gru_backward(
    grad: Tensor, weight: Tensor, keep: Tensor | None, eps: float, saved: list[Tensor]
) -> list[Tensor]:
    """Gradients of gates, weight and state from that of h after each step, (T, B, C).

    All that is linear in the gradient of h is worked out for all steps at once: the loop has only
    what one step needs from the next.
    """
    before, reset_update, n, from_h, scale = saved
    r, z = reset_update.chunk(2, dim=-1)
    h = before[:-1] if keep is None else before[:-1] * keep
    T, B, C = grad.shape
    to_n = (1 - z) * (1 - n * n)
    factors = grad.new_empty(T, B, 3, C)  # of the gradient of h in those of the products with h
    factors[:, :, 0] = to_n * from_h * r * (1 - r)
    factors[:, :, 1] = (h - n) * z * (1 - z)
    factors[:, :, 2] = to_n * r
    normed = h * scale
    grad_h, grad_products = torch.empty_like(grad), grad.new_empty(T, B, 3, C)
    later = grad.new_zeros(B, C)
    for t in reversed(range(T)):
        torch.add(grad[t], later, out=grad_h[t])
        torch.mul(factors[t], grad_h[t].unsqueeze(1), out=grad_products[t])
        back = grad_products[t].flatten(1) @ weight
        if eps:  # through the norm
            along = torch.linalg.vecdot(back, normed[t]).unsqueeze(1)
            back = torch.addcmul(back, normed[t], along, value=-1 / C).mul_(scale[t])
        later = torch.addcmul(back, grad_h[t], z[t])
        if keep is not None:
            later.mul_(keep[t])
    flat = grad_products.flatten(2)
    grad_weight = flat.flatten(0, 1).t() @ normed.flatten(0, 1)
    grad_gates = torch.cat([flat[..., : 2 * C], grad_h * to_n], dim=-1)
    return [grad_gates, grad_weight, later]


@gru_backward.register_fake
def _(grad, weight, keep, eps, saved):
    B, C = grad.shape[1:]
    shapes = (*grad.shape[:2], 3 * C), weight.shape, (B, C)
    return [grad.new_empty(shape) for shape in shapes]


def save_gru(ctx, inputs, output):
    _, weight, _, keep, ctx.eps = inputs
    ctx.save_for_backward(weight, keep, *output)


def differentiate_gru(ctx, grads):
    weight, keep, *saved = ctx.saved_tensors
    grad = grads[0]
    grad_gates, grad_weight, grad_state = gru_backward(
        grad[1:].contiguous(), weight, keep, ctx.eps, saved
    )
    return grad_gates, grad_weight, grad_state + grad[0], None, None


torch.library.register_autograd("train_gpt::gru_forward", differentiate_gru, setup_context=save_gru)


def gru(gates, weight, state, eps=0.0, segment=None):
    """A gated recurrent unit (arXiv 1406.1078), its reset gate behind the product as in cuDNN.

    r, z = sigmoid(gates + weight h'), n = tanh(gates + r (weight h')), h_t = (1 - z) n + z h_(t-1)

    h' is h_(t-1), with eps > 0 over its root mean square. gates (B, T, 3 C) are what r, z and n get
    from the input, weight (3 C, C), state (B, C) -> h (B, T, C), in float32 or float64.
    """
    wide = torch.promote_types(gates.dtype, torch.float32)
    keep = None
    if segment is not None:
        keep = goes_on(segment).to(wide).transpose(0, 1).contiguous()
    gates = gates.to(wide).transpose(0, 1).contiguous()
    h = gru_forward(gates, weight.to(wide), state.to(wide), keep, eps)[0]
    return h[1:].transpose(0, 1)
