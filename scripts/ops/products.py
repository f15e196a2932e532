"""Matrix products that torch has slowly or not at all: of two CPU libraries the faster, and groups.

Shapes: n rows, k inputs, m outputs, E experts.
"""

import torch
import torch.nn.functional as F

from harness.provenance import CPUINFO

# On AMD's AVX-512 processors MKL, torch's default, runs AVX2 code: oneDNN is twice as fast there.
CPU_CAPABILITY = torch.backends.cpu.get_cpu_capability()
ONEDNN = "AuthenticAMD" in CPUINFO and CPU_CAPABILITY == "AVX512"


def suits_onednn(a, b, least=2**22):
    """Whether oneDNN is the faster for a (..., k) times b (n, k) transposed.

    `least` is the number of multiply-adds from which it pays; a call takes 30 us.
    """
    eager = not torch.compiler.is_compiling()  # which lowers oneDNN's only for constant b
    rows = a.numel() // max(1, a.size(-1))
    is_large = rows > 1 and rows * b.numel() >= least
    return ONEDNN and eager and a.is_cpu and a.dtype == torch.float32 and is_large


def matmul_nt(a, b):
    """a (..., k) times b (n, k) transposed: (..., n), by the faster of two CPU libraries."""
    if suits_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.mT


def matmul_nt_into(out, a, b):
    """The same of a (m, k), written into out (m, n), where m, n or k is one of many sizes.

    oneDNN makes a kernel for each size that is new, which takes 0.5 ms.
    """
    if suits_onednn(a, b, least=2**26):
        out.copy_(matmul_nt(a, b))
    else:
        torch.mm(a, b.mT, out=out)


class MatmulNT(torch.autograd.Function):
    """matmul_nt of x (..., k) and weight (n, k), with the gradient that oneDNN's operator lacks."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return matmul_nt(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_weight = matmul_nt(grad.flatten(0, -2).mT, x.flatten(0, -2).mT)
        return matmul_nt(grad, weight.mT), grad_weight


def linear(x, weight):
    """x (..., k) times weight (n, k) transposed: (..., n), with gradients."""
    return MatmulNT.apply(x, weight) if suits_onednn(x, weight) else F.linear(x, weight)


def can_group_on_cuda(*tensors):
    """Whether torch has a fast product for these: on CUDA, rows of a multiple of 16 bytes."""
    return all(t.is_cuda and t.size(-1) * t.element_size() % 16 == 0 for t in tensors)


def is_opaque(*tensors):
    """Whether torch.compile is at work and cannot trace grouped_mm of these: all but bfloat16."""
    can_trace = can_group_on_cuda(*tensors) and tensors[0].dtype == torch.bfloat16
    return torch.compiler.is_compiling() and not can_trace


def grouped_matmul(x, weight, offsets):
    """Rows x (n, k), in groups that end at offsets (E,), by weight (E, m, k) of theirs: (n, m)."""
    if is_opaque(x, weight, weight.mT):
        return grouped_matmul_op(x, weight, offsets)
    if can_group_on_cuda(x, weight, weight.mT):
        return F.grouped_mm(x, weight.mT, offs=offsets)
    y = x.new_empty(len(x), weight.size(1))
    splits = offsets[:-1].tolist()
    for rows, matrix, out in zip(x.tensor_split(splits), weight, y.tensor_split(splits)):
        matmul_nt_into(out, rows, matrix)
    return y


def grouped_outer(y, x, offsets):
    """Outer products of rows y (n, m) and x (n, k), summed over each group: (E, m, k)."""
    if is_opaque(y, x):
        return grouped_outer_op(y, x, offsets)
    if can_group_on_cuda(y, x):
        return F.grouped_mm(y.mT, x, offs=offsets)
    splits = offsets[:-1].tolist()
    groups = zip(y.tensor_split(splits), x.tensor_split(splits))
    sums = x.new_empty(len(offsets), y.size(1), x.size(1))
    for (ys, xs), out in zip(groups, sums):
        matmul_nt_into(out, ys.mT, xs.mT)
    return sums


# For torch.compile, which traces neither sizes that data decide nor grouped_mm in float32.
grouped_matmul_op = torch.library.custom_op(
    "train_gpt::grouped_matmul",
    grouped_matmul,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor offsets) -> Tensor",
)
grouped_outer_op = torch.library.custom_op(
    "train_gpt::grouped_outer",
    grouped_outer,
    mutates_args=(),
    schema="(Tensor y, Tensor x, Tensor offsets) -> Tensor",
)


@grouped_matmul_op.register_fake
def _(x, weight, offsets):
    return x.new_empty(len(x), weight.size(1))


@grouped_outer_op.register_fake
def _(y, x, offsets):
    return y.new_empty(len(offsets), y.size(1), x.size(1))


class GroupedMatmul(torch.autograd.Function):
    """grouped_matmul with its gradients, of which an expert without rows gets zeros."""

    @staticmethod
    def forward(ctx, x, weight, offsets):
        ctx.save_for_backward(x, weight, offsets)
        return grouped_matmul(x, weight, offsets)

    @staticmethod
    def backward(ctx, grad):
        x, weight, offsets = ctx.saved_tensors
        grad = grad.contiguous()  # or grouped_mm refuses it
        grad_x = grouped_matmul(grad, weight.mT, offsets)
        return grad_x, grouped_outer(grad, x, offsets), None
