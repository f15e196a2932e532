"""Single operations of train_gpt.py on a device, each against an oracle; for check_device.py.

Shapes: n rows, k inputs, m outputs, E experts, B sequences, T positions, H heads, D head size.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from device_report import Check, Part, config, held, left_out, relative_error, scale_error
from harness.ranks import Ranks
from ops import cross_entropy
from ops.products import GroupedMatmul
from ops.sharding import collective
import train_gpt
from train_gpt import Context

# Most that an error may be of the largest value, and a factor off 1: a few times what was measured.
TOLERANCES = {
    torch.float32: (1e-4, 1e-5),
    torch.float16: (3e-3, 1e-3),
    torch.bfloat16: (2e-2, 4e-3),
}
DROPOUT = 0.1
NEAR_RATE = 0.01  # of it; a rate of 1/16 too much is 0.1625
OTHER_SUMS = 0.04  # in Newton-Schulz; another order of sums makes 0.016, a factor 1 % off 0.06


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def judged(name: str, dtype: torch.dtype, pairs: list[tuple[Tensor, Tensor]], extra=()) -> Check:
    """A check of (got, wanted) tensors by the TOLERANCES of a dtype, and of `extra` conditions."""
    most, most_scale = TOLERANCES[dtype]
    error = max(relative_error(got, want) for got, want in pairs)
    scale = max(scale_error(got, want) for got, want in pairs)
    good = error < most and scale < most_scale and all(extra)
    return held(name, f"error {error:.1e}, factor off by {scale:.1e}", good)


def grouped_case(device: torch.device, dtype: torch.dtype, n: int, k: int, m: int) -> Check:
    """GroupedMatmul and its gradients for n rows of eight experts, of which four get none."""
    ends = [0, n // 13, n // 13, n // 2, n - 1, n, n, n]
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    x = torch.randn(n, k, device=device).to(dtype).requires_grad_()
    w = (torch.randn(8, m, k, device=device) / k**0.5).to(dtype).requires_grad_()
    grad = torch.randn(n, m, device=device).to(dtype)
    # What a product does not write shows: freed memory full of nan is used again.
    for shape in ((8, m, k), (n, m), (n, k)):
        torch.full(shape, float("nan"), device=device, dtype=dtype)
    y = GroupedMatmul.apply(x, w, offsets)
    y.backward(grad)

    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, w))
    rows = exact_x.tensor_split(ends[:-1])
    exact = torch.cat([group @ matrix.T for group, matrix in zip(rows, exact_w)])
    exact.backward(grad.double())

    pairs = [(y, exact), (x.grad, exact_x.grad), (w.grad, exact_w.grad)]
    without_rows = [expert for expert in range(8) if ends[expert] == ([0] + ends)[expert]]
    no_gradient = not w.grad[without_rows].any()
    return judged(f"grouped_{dtype_name(dtype)}_{n}x{k}x{m}", dtype, pairs, [no_gradient])


def grouped_products(device: torch.device) -> Iterator[Check]:
    """Widths of a multiple of 16 bytes and others."""
    if device.type == "cuda":
        for dtype in TOLERANCES:
            for k, m in ((128, 256), (120, 200), (100, 36)):
                yield grouped_case(device, dtype, 512, k, m)
    else:
        for k, m in ((128, 256), (100, 36), (17, 5)):
            yield grouped_case(device, torch.float32, 512, k, m)
        yield grouped_case(device, torch.bfloat16, 64, 16, 12)


def loss_case(device, dtype: torch.dtype, n: int, vocab: int, cap: float) -> Check:
    """The loss in three chunks, and its gradients, beside torch's own of all logits in float64."""
    channels = 256 if device.type == "cuda" else 32
    x = torch.randn(n, channels, device=device).to(dtype).requires_grad_()
    head = (3 * torch.randn(vocab, channels, device=device) / channels**0.5).requires_grad_()
    targets = torch.randint(vocab, (n,), device=device)
    chunk = {device.type: n * vocab // 3 + vocab}
    with mock.patch.dict(cross_entropy.LOGITS_PER_CHUNK, chunk):
        args = x, head, targets, cross_entropy.loss_chunk, cap
        loss = cross_entropy.LinearCrossEntropy.apply(*args)
    (2 * loss).backward()

    exact_x = x.detach().double().requires_grad_()
    exact_head = head.detach().to(dtype).double().requires_grad_()
    logits = exact_x @ exact_head.T
    if cap:
        logits = cap * (logits / cap).tanh()
    exact = F.cross_entropy(logits, targets)
    (2 * exact).backward()
    pairs = [(loss, exact), (x.grad, exact_x.grad), (head.grad, exact_head.grad)]
    return judged(f"loss_{dtype_name(dtype)}_{vocab}_cap{cap:g}", dtype, pairs)


def chunked_loss(device: torch.device) -> Iterator[Check]:
    """GPT-2's vocabulary, padded and as it is, with and without a soft cap."""
    if device.type == "cuda":
        for dtype in (torch.float32, torch.bfloat16):
            for vocab, cap in ((50304, 0.0), (50257, 0.0), (50304, 15.0)):
                yield loss_case(device, dtype, 3000, vocab, cap)
    else:
        for vocab, cap in ((512, 0.0), (257, 0.0), (257, 15.0)):
            yield loss_case(device, torch.float32, 100, vocab, cap)
        yield loss_case(device, torch.bfloat16, 30, 67, 0.0)


def newton_schulz(device: torch.device) -> Iterator[Check]:
    """Near torch.optim.Muon's, or its bits; all ORTHOGONALIZERS by their singular values."""
    try:
        from torch.optim._muon import _zeropower_via_newtonschulz as theirs
    except ImportError:
        yield left_out("newton_schulz", "this torch has no torch.optim.Muon")
    else:
        rows, cols = (64, 160) if device.type == "cuda" else (12, 20)
        stack = torch.randn(3, rows, cols, device=device)
        ours = train_gpt.ORTHOGONALIZERS["newton_schulz"](stack, torch.bfloat16)
        quintic = (3.4445, -4.7750, 2.0315)
        wanted = torch.stack([theirs(matrix, quintic, 5, 1e-7) for matrix in stack])
        equal = sum(torch.equal(one, other) for one, other in zip(ours, wanted))
        error = relative_error(ours, wanted)
        text = f"{equal} of 3 matrices bit for bit torch's, error {error:.1e}"
        yield held("newton_schulz", text, error < OTHER_SUMS)

    for name, orthogonalize in train_gpt.ORTHOGONALIZERS.items():
        values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 48, 96, device=device)).float())
        low, high = values.min().item(), values.max().item()
        good = 0.5 < low and high < 1.4
        yield held(f"singular_values_{name}", f"{low:.2f} to {high:.2f}", good)


def fused_adamw(device: torch.device) -> Iterator[Check]:
    """grad_scale and found_inf through Optimizer, against the published rule in float64."""
    cfg, ranks = config(device, optimizer="adamw"), Ranks()
    p = torch.full((70_000,), 2.0, device=device).requires_grad_()
    rule = train_gpt.OPTIMIZERS["adamw"](cfg)
    optimizer = train_gpt.Optimizer([p], rule, rule.peak(cfg), cfg, ranks)
    (part,) = optimizer.partitions

    def step(grad: float, scale: float, skip: float) -> None:
        p.grad = torch.full_like(p, grad)
        optimizer.reduce_grads()
        optimizer.step(
            0, torch.tensor(scale, device=device), torch.tensor(float(skip), device=device)
        )

    step(float("inf"), 1.0, skip=1)
    untouched = bool((p == 2).all()) and not any(t.any() for t in part.state.values())
    value = "no update made" if untouched else "an update MADE"
    yield held("adamw_found_inf", value, untouched)

    wanted, first, second = 2.0, 0.0, 0.0
    for count, (grad, scale) in enumerate(((3.0, 2.0), (-1.0, 8.0)), 1):
        step(scale * grad, scale, skip=0)
        first = cfg.beta1 * first + (1 - cfg.beta1) * grad
        second = cfg.beta2 * second + (1 - cfg.beta2) * grad**2
        unbiased = first / (1 - cfg.beta1**count), second / (1 - cfg.beta2**count)
        wanted -= cfg.lr * unbiased[0] / (unbiased[1] ** 0.5 + 1e-8)
    moved = (p.detach() - wanted).abs().max().item() / abs(wanted - 2)
    yield held("adamw_grad_scale", f"two steps off by {moved:.1e} of their length", moved < 1e-3)


def loss_scale(device: torch.device) -> Iterator[Check]:
    """Halved by an overflow, else as it is until 2000 good steps, which double it."""
    scale = train_gpt.LossScale(torch.float16, device)
    values = [scale.value.item()]
    bad, good = torch.ones((), device=device), torch.zeros((), device=device)
    scale.update(bad)
    values.append(scale.value.item())
    for _ in range(1999):
        scale.update(good)
    values.append(scale.value.item())
    scale.update(good)
    values.append(scale.value.item())
    text = " ".join(f"{value:g}" for value in values)
    yield held("loss_scale", text, values == [2.0**16, 2.0**15, 2.0**15, 2.0**16])


def attention_weights(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weights (B, T, H, T) of the program's attention after dropout, all even before it.

    Queries and keys are zero, values and projection pass on that one of the T = D channels of a
    head that says which token it is, so that the layer's output is the weights.
    """
    T = D = 64
    cfg = config(device, n_embd=2 * D, sequence_length=T, dropout=DROPOUT)
    layer = train_gpt.MIXERS["attention"](cfg).to(device)
    one = torch.eye(D, device=device)
    weights = {"qkv.weight": torch.zeros(3, 2 * D, 2 * D), "proj.weight": torch.eye(2 * D)}
    weights["qkv.weight"][2, :D, :D] = weights["qkv.weight"][2, D:, :D] = one.cpu()
    layer.load_state_dict(weights)
    x = torch.cat([one, torch.zeros_like(one)], dim=-1).to(dtype).repeat(16, 1, 1)
    y = layer(x, Context(positions=torch.arange(T, device=device)))
    return y.detach().float().unflatten(-1, (2, D))


def dropped(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(rate of the weights that are dropped, mean sum of a token's weights, which is to be 1)."""
    torch.manual_seed(1)
    weights = attention_weights(device, dtype)
    T = weights.size(1)
    seen = torch.ones(T, T, device=device).tril().bool()
    of_seen = weights.transpose(1, 2)[..., seen]
    rate = (of_seen == 0).float().mean().item()
    return rate, weights.sum(-1).mean().item()


def dropout_rate(device: torch.device) -> Iterator[Check]:
    """What DROPOUT drops of attention weights, by torch's own choice and by each backend."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backends = [(name, backend) for name, backend in SDPBackend.__members__.items()]
    for name, backend in [("default", None), *backends]:
        if name in ("ERROR", "OVERRIDEABLE"):
            continue
        label = f"dropout_{name.lower().removesuffix('_attention')}"
        try:
            with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                rate, total = dropped(device, dtype)
        except RuntimeError as error:
            if backend is None:
                raise
            yield left_out(label, f"not for these: {str(error).splitlines()[0][:60]}")
            continue
        good = abs(rate - DROPOUT) < NEAR_RATE and abs(total - 1) < 2 * NEAR_RATE
        yield held(label, f"{rate:.4f} of {DROPOUT} dropped, weights sum to {total:.4f}", good)


def rotary_and_norm(device: torch.device) -> Iterator[Check]:
    """Against a turn of complex numbers, and the root of a mean, in float64."""
    cfg = config(device, n_embd=64, n_head=2, sequence_length=128)
    x = torch.randn(2, 128, 2, 32, device=device)
    rotary = train_gpt.Rotary(cfg).to(device)
    got = rotary(x, Context(positions=torch.arange(128, device=device)))
    half = 16
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=device) / half)
    angles = torch.arange(128, dtype=torch.float64, device=device)[:, None] * frequencies
    turned = pairs * torch.polar(torch.ones_like(angles), -angles)[:, None]
    yield judged("rotary", torch.float32, [(got, torch.cat([turned.real, turned.imag], -1))])

    x = 5 * torch.randn(512, 768, device=device)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    for dtype in (torch.float32, torch.bfloat16):
        got = train_gpt.RMSNorm(cfg)(x.to(dtype))
        yield judged(f"rms_norm_{dtype_name(dtype)}", dtype, [(got, want)])


def collectives(device: torch.device) -> Iterator[Check]:
    """Those of a step, by this process alone over the real backend; `ranks` has several."""
    x = torch.arange(8.0, device=device)
    summed, own, gathered = x.clone(), torch.empty_like(x), torch.empty_like(x)
    dist.all_reduce(summed)
    collective("reduce_scatter_single", "reduce_scatter_tensor", own, x)
    collective("all_gather_single", "all_gather_into_tensor", gathered, x)
    dist.barrier()
    equal = all(torch.equal(x, result) for result in (summed, own, gathered))
    yield held("collectives_alone", dist.get_backend_config(), equal)


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """A shard of these tokens."""
    header = np.zeros(train_gpt.HEADER_INTS, dtype="<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def prefetched(device: torch.device) -> Iterator[Check]:
    """Batches that a thread reads ahead and pins are the tokens of the shard."""
    tokens = np.random.default_rng(0).integers(64, size=40_001)
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder, "a_train_000000.bin"), tokens)
        loader = train_gpt.ShardLoader(
            f"{folder}/a_train_*.bin", config(device, sequence_length=64)
        )
        slices = [(64 * i, 64) for i in range(9)]
        equal = []
        for i, (inputs, targets, _) in enumerate(loader.prefetch(slices, device)):
            first = 64 * 64 * i
            for offset, batch in enumerate((inputs, targets)):
                want = tokens[first + offset :][: 64 * 64].reshape(64, 64)
                equal.append(batch.device.type == device.type)
                equal.append(np.array_equal(batch.cpu().numpy(), want))
    yield held("prefetch", f"{len(equal) // 4} batches", all(equal) and len(equal) == 36)


PARTS: dict[str, Part] = {
    "grouped": grouped_products,
    "loss": chunked_loss,
    "orthogonalize": newton_schulz,
    "adamw": fused_adamw,
    "loss_scale": loss_scale,
    "dropout": dropout_rate,
    "rotary_norm": rotary_and_norm,
    "collectives": collectives,
    "prefetch": prefetched,
}
