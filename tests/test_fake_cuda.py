"""A step of every kind of model on a GPU that is not there, by tensors of no numbers.

No device or dtype is mixed, and nothing waits for the device. Another device than the CPU takes the
place of CUDA, for without a driver torch has no backward pass on cuda tensors; it cannot be given
back, and so the steps are made in a process of their own, of which this file is the program.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import tiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from harness.ranks import Ranks
from harness.settings import ROOT
from ops import cross_entropy
from train_gpt import DTYPES, GATES, GPT, NoGate, State, axes, train_step

MIXED = (  # of these a model has any mixture, layer by layer
    "attngate gatepos gateact norm pos init residual expert balance optimizer muon_scale "
    "orthogonalize muon_norm decay_schedule lr_schedule"
).split()
SWITCHES = dict(
    bias=True,
    norm="layer",
    tie_embeddings=False,
    qk_norm=False,
    value_residual=True,
    value_embeds=1,
    logit_softcap=5.0,
    dropout=0.1,
    grad_clip=1.0,
    weight_decay=0.1,
    cautious_decay=True,
    momentum_start=0.8,
    ema_iters=4,
)


def variants():
    """Settings that together name every choice of the axes of a step."""
    choices = axes()
    n_models = max(len(choices[axis]) for axis in ("mixer", "ffn", *MIXED))
    for i in range(n_models):
        settings = {axis: [*choices[axis]][i % len(choices[axis])] for axis in MIXED}
        for axis, other in (("mixer", "attention"), ("ffn", "moe")):
            settings[axis] = f"{[*choices[axis]][i % len(choices[axis])]},{other}"
        yield settings
    for recurrence in choices["recurrence"]:
        yield {"recurrence": recurrence, "ffn": "moe", "n_layer": 4}
    own = ",".join(name for name in choices["per_visit"] if name != "none")
    own_by_visit = {"recurrence": "shared", "ffn": "moe", "n_layer": 4, "per_visit": own}
    yield SWITCHES
    yield SWITCHES | own_by_visit | {"shared_expert": True}
    yield {"carry_state": True, "mixer": "gru_rwkv,mingru"}


class OnGPU(NoGate):
    """A gate that passes through the CPU."""

    def forward(self, y, x):
        return y.cpu().to(y.device)


class OnCPU(NoGate):
    """A gate whose factor is on the CPU."""

    def forward(self, y, x):
        return y * torch.ones(y.size(-1))


class InFloat32(NoGate):
    """A gate whose product is of float32 and the model's dtype."""

    def forward(self, y, x):
        return y @ torch.eye(y.size(-1), device=y.device)


class InFloat32By2(NoGate):
    """The same with two dimensions, which torch without numbers lets pass."""

    def forward(self, y, x):
        product = y.flatten(0, -2) @ torch.eye(y.size(-1), device=y.device)
        return product.view_as(y).type_as(y)


class LeavesFloat32(NoGate):
    """A gate that returns another dtype than it was given."""

    def forward(self, y, x):
        return y.float()


class Waits(NoGate):
    """A gate that waits for a number."""

    def forward(self, y, x):
        return y * y.amax().item()


class Selects(NoGate):
    """A gate that waits for a shape."""

    def forward(self, y, x):
        return y + y[y > 0].sum()


GATES_OF_TESTS = OnGPU, OnCPU, InFloat32, InFloat32By2, LeavesFloat32, Waits, Selects
PLANTED = {gate.__name__: gate for gate in GATES_OF_TESTS}


class Watch(TorchDispatchMode):
    """Refuses copies from the device and mixed products; keeps the strides of what these read."""

    def __init__(self):
        super().__init__()
        self.strides = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_", "clone"):
            source = args[name == "copy_"]
            assert not (source.is_cuda and result.device.type == "cpu"), "a copy to the CPU"
        if name in ("mm", "addmm", "bmm", "_grouped_mm"):  # torch does not ask in all of them
            dtypes = {
                t.dtype for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()
            }
            assert len(dtypes) == 1, f"{name} of {dtypes}"
        if name in ("mm", "addmm"):
            self.strides += [max(t.stride()) for t in args[-2:]]
        return result


def stand_in_for_cuda():
    """From now on `gpu` is a device of which our code believes that it is CUDA's."""

    class Module(backend_registration._DummyBackendModule):
        def is_available(self):
            return False

    backend_registration._setup_privateuseone_for_python_backend("gpu", Module())
    FakeTensor.is_cuda = property(lambda tensor: tensor.device.type == "gpu")
    for of_devices in (cross_entropy.LOGITS_PER_CHUNK, cross_entropy.LOGITS_PER_ROW):
        of_devices["gpu"] = of_devices["cuda"]
    GPT.to = move
    dist.all_reduce = lambda tensor: None  # of one rank; gloo's wants numbers


def move(model, device):
    """What nn.Module.to does, which cannot move tensors without numbers."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(p, device=device))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    return model


class OnStandIn(Ranks):
    def device(self, cfg):
        return torch.device("gpu", 0)


def step(**changes):
    """A step of a batch, and a score of it; returns the strides of what products read."""
    cfg = tiny(dtype="bfloat16", device="cuda", batch_size=2, **changes)
    with FakeTensorMode():
        state = State.build(cfg, OnStandIn())
        batch = torch.zeros((2, 17), dtype=torch.int64, device="gpu")
        with Watch() as watch:
            stats = train_step(state, cfg, batch[:, :-1], batch[:, 1:])
            score = state.model.eval().score(batch[:, :-1], batch[:, 1:])
        found = {stats.loss, stats.grad_norm, score, *state.model.parameters()}
        assert {(t.device.type, t.dtype) for t in found} == {("gpu", torch.float32)}
        hidden, _, _ = state.model.hidden(batch)
        assert hidden.dtype == DTYPES[cfg.dtype]
    return watch.strides


def outcome(settings):
    """ "", or what was wrong in a step with these settings."""
    try:
        step(**settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return ""


def main():
    """Prints one JSON object: errors by variant and by what was planted, and strides."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    stand_in_for_cuda()
    found = {"variants": {json.dumps(settings): outcome(settings) for settings in variants()}}
    GATES.update(PLANTED)
    found["planted"] = {name: outcome({"attngate": name}) for name in PLANTED}
    found["strides"] = step(vocab_size=61)
    print(json.dumps(found))


def test_a_step_on_a_gpu_mixes_nothing_and_waits_for_nothing():
    """What is planted is found; with 61 tokens all that products read is in rows of 16 bytes."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no device in Python that could stand in for CUDA")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["variants"]) >= 10
    assert not {name: error for name, error in found["variants"].items() if error}
    assert found["planted"].keys() == PLANTED.keys() and all(found["planted"].values())
    assert len(found["strides"]) > 30 and not any(stride % 8 for stride in found["strides"])


if __name__ == "__main__":
    main()
