"""How ranks share gradients, parameters and the state of an update rule."""

import dataclasses
import math

import torch
import torch.distributed as dist
from torch import Tensor


def collective(newer, older, result, tensor):
    """Calls the collective of torch.distributed that this torch has; returns the result."""
    call = getattr(dist, newer, None) or getattr(dist, older)
    call(result, tensor.contiguous())  # nccl refuses others
    return result


def reduce_scatter(full, world):
    """Sum over the ranks of full (world * n, ...), of which each keeps its own n rows."""
    if world == 1:
        return full
    own = full.new_empty(len(full) // world, *full.shape[1:])
    return collective("reduce_scatter_single", "reduce_scatter_tensor", own, full)


def squared_norm(tensors):
    """Sum of squares () over a list of tensors, 0.0 for none."""
    return torch.stack(torch._foreach_norm(tensors)).square().sum() if tensors else 0.0


@dataclasses.dataclass
class Partition:
    """Parameters that the ranks reduce and gather together, and what this rank updates of them."""

    params: list  # Parameters
    kind: str  # "own": a stack of matrices, "slice": one flat parameter, "copy": one, on all ranks
    full: Tensor  # (world * n, ...): the parameters one after another, in the memory that they use
    own: Tensor  # (n, ...): the rows of full that this rank updates
    state: dict = dataclasses.field(default_factory=dict)  # of the rule, for own
    grad: Tensor | None = None  # of own, summed over the ranks

    @classmethod
    def stack(cls, params, ranks):
        """Of matrices (..., rows, cols) of one shape; zeros fill up the last rank's share."""
        matrices = [p.data.view(-1, *p.shape[-2:]) for p in params]
        n_rows = sum(map(len, matrices))
        n_own = math.ceil(n_rows / ranks.world_size)
        padding = matrices[0].new_zeros(n_own * ranks.world_size - n_rows, *params[0].shape[-2:])
        full = torch.cat([*matrices, padding])
        for p, rows in zip(params, full.split([*map(len, matrices), len(padding)])):
            p.data = rows.view(p.shape)
        return cls(params, "own", full, full[ranks.rank * n_own :][:n_own])

    @classmethod
    def single(cls, p, ranks):
        """A slice of a large parameter whose size the ranks divide, the whole of any other."""
        flat = p.data.view(-1)
        if len(flat) >= 2**16 and len(flat) % ranks.world_size == 0:
            return cls([p], "slice", flat, flat.chunk(ranks.world_size)[ranks.rank])
        return cls([p], "copy", p.data, p.data)

    def full_grad(self):
        """The gradients of the parameters, laid out as `full`."""
        if self.kind != "own":
            return self.params[0].grad.view(self.full.shape)
        grads = [p.grad.view(-1, *self.full.shape[1:]) for p in self.params]
        padding = self.full.new_zeros(len(self.full) - sum(map(len, grads)), *self.full.shape[1:])
        return torch.cat([*grads, padding])

    def tensors(self, rank, names):
        """For checkpoints: {name of the parameter and of its state: (tensor, kind)}."""
        if self.kind != "own":
            name = names[self.params[0]]
            return {
                f"{name}.{state}": (tensor.view(-1), self.kind) if tensor.ndim else (tensor, "copy")
                for state, tensor in self.state.items()
            }
        matrices = []
        for p in self.params:
            matrices += [f"{names[p]}.{i}" for i in range(p[..., 0, 0].numel())]
        own = matrices[rank * len(self.own) :]
        return {
            f"{name}.{state}": (row, "own")
            for state, tensor in self.state.items()
            for name, row in zip(own, tensor)
        }


class Optimizer:
    """An update rule for some parameters, whose state and work the ranks share.

    Gradients are reduce-scattered, each rank updates its part, parameters are all-gathered.
    """

    def __init__(self, params, rule, peak, cfg, ranks):
        """`peak` is the Hyper that the rule's factors are applied to."""
        self.rule = rule
        self.peak = peak
        self.cfg = cfg
        self.rank, self.world = ranks.rank, ranks.world_size
        if rule.stacked:
            by_shape = {}
            for p in params:
                by_shape.setdefault(p.shape[-2:], []).append(p)
            self.partitions = [Partition.stack(alike, ranks) for alike in by_shape.values()]
        else:
            partitions = [Partition.single(p, ranks) for p in params]
            self.partitions = sorted(partitions, key=lambda part: part.kind == "copy")
        for part in self.partitions:
            part.state = rule.new_state(part.own)

    def hyper_at(self, step):
        """The Hyper for the update that follows `step` updates."""
        now = self.peak._asdict()
        for name, factor in self.rule.factors.items():
            now[name] *= factor(step, self.cfg)
        return type(self.peak)(**now)

    def reduce_grads(self):
        """Sums the gradients over the ranks; returns the squared norm () of this rank's part."""
        split = [part for part in self.partitions if part.kind != "copy"]
        copies = [part for part in self.partitions if part.kind == "copy"]
        for part in split:
            part.grad = reduce_scatter(part.full_grad(), self.world)
        for part in copies:
            part.grad = part.full_grad()
        if copies and self.world > 1:
            bucket = torch.cat([part.grad.view(-1) for part in copies])
            dist.all_reduce(bucket)
            for part, grad in zip(copies, bucket.split([part.own.numel() for part in copies])):
                part.grad = grad.view(part.own.shape)
        norms = [squared_norm([part.grad for part in partitions]) for partitions in (split, copies)]
        return norms[0] + norms[1] / self.world

    @torch.no_grad()
    def step(self, step, grad_scale, skip):
        """The update that follows `step` updates, of gradients over grad_scale () or None.

        None is made where skip () is 1.
        """
        params = [part.own for part in self.partitions]
        grads = [part.grad for part in self.partitions]
        if grad_scale is not None:
            torch._foreach_div_(grads, grad_scale)
        names = self.partitions[0].state
        state = {name: [part.state[name] for part in self.partitions] for name in names}
        self.rule.update(params, grads, state, self.hyper_at(step), skip)
        for part in self.partitions:
            part.grad = None  # its memory is for the next backward pass
            if self.world > 1 and part.kind != "copy":  # own is where it belongs in full
                collective("all_gather_single", "all_gather_into_tensor", part.full, part.own)

    def tensors(self, names):
        """For checkpoints: {key: (tensor, kind)}, from {parameter: its name}."""
        rule = type(self.rule).__name__.lower()
        tensors = {}
        for part in self.partitions:
            for name, held in part.tensors(self.rank, names).items():
                tensors[f"{rule}.{name}"] = held
        return tensors
