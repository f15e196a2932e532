"""Whole runs against tests/reference_trainer.py, which is another program: the numbers of curve,
row, summary with its history, and of the log's lines on losses, and the final weights.

The runs are in float32, the reference in float64: after 12 steps rounding makes them differ by up
to 2e-6, with AVX2 and without. tests/mutants.py has wrong lines that have to make them differ by
more than TOLERANCE.
"""

import contextlib
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import reference_trainer
import safetensors.torch
import torch
from conftest import Job, dies_at, launch, points, row, summary, write_shard

from harness import checkpoints, meter
from harness.files import HISTORY
import train_gpt

TOLERANCE = 2e-5  # of numbers about 1, and relative for larger ones
DURATIONS = reference_trainer.Durations(read=0.125, validation=8.0, save=64.0)
VOCAB = 29
TOKEN_BYTES = [1 + token % 5 for token in range(VOCAB)]
BASE = dict(
    n_layer=2,
    n_head=2,
    n_embd=16,
    sequence_length=8,
    batch_size=4,
    device_batch_size=2,
    vocab_size=VOCAB,
    num_iterations=12,
    lr=0.03,
    warmup_iters=3,
    warmdown_iters=6,
    weight_decay=0.5,
    grad_clip=2.0,
    val_tokens=43,  # five samples of eight, and three tokens more
    val_every=5,
    log_every=1,
    save_every=5,
    max_epochs=0,
    peak_tflops=1e-6,
    device="cpu",
    dtype="float32",
    compile="0",
)
RUNS = {  # (changes, ranks)
    "two ranks": (
        {
            "mixer": "gru,attention",
            "ffn": "moe",
            "num_experts": 4,
            "d_ff": 12,
            "device_batch_size": 1,
            "aux_loss_coef": 2.0,
            "balance_log_interval": 1,
            "dropout": 0.2,
            "shard_tail": "keep",
        },
        2,
    ),
    "dense": ({}, 1),
    "dense with AdamW": (
        {
            "optimizer": "adamw",
            "init": "gpt2",
            "seed": 3,
            "norm": "layer",
            "bias": True,
            "pos": "learned",
            "ffn": "gelu",
            "tie_embeddings": False,
            "logit_softcap": 6.0,
            "embed_lr": 0.05,
            "head_lr": 0.01,
            "lr_schedule": "cosine",
            "min_lr_frac": 0.1,
            "decay_schedule": "follow_lr",
            "grad_clip": 0.0,
            "ema_iters": 4,
            "shuffle": True,
        },
        1,
    ),
    "gate of each channel": (
        {
            "attngate": "elementwise",
            "gate_optimizer": "adamw",
            "muon_decay": False,
            "ffn": "swiglu",
            "norm": "rms_gain",
            "muon_lr": 0.02,
            "muon_scale": "original",
            "momentum_start": 0.7,
            "momentum_warmup_iters": 4,
            "momentum_cooldown_iters": 3,
            "decay_schedule": "to_zero",
            "grad_clip": 1000.0,
        },
        1,
    ),
    "gate of each head, recurrent": (
        {
            "n_layer": 3,
            "mixer": "attention,gru,mingru",
            "attngate": "headwise",
            "gatepos": "value",
            "gateact": "ns_sigmoid",
            "qk_norm": False,
        },
        1,
    ),
    "experts": (
        {
            "ffn": "moe",
            "num_experts": 4,
            "d_ff": 12,
            "shared_expert": True,
            "aux_loss_coef_start": 3.0,
            "aux_loss_coef_end": 1.0,
            "log_every": 5,
            "balance_log_interval": 3,
        },
        1,
    ),
    "experts by quantiles": (
        {
            "attngate": "elementwise",
            "ffn": "relu2,moe",
            "expert": "swiglu",
            "num_experts": 3,
            "top_k": 1,
            "d_ff": 12,
            "balance": "quantile",
            "router_optimizer": "muon",
            "balance_log_interval": 1,
        },
        1,
    ),
    "shared depth": (
        {
            "recurrence": "shared",
            "n_layer": 4,
            "unshared_ends": 1,
            "per_visit": "scale",
            "attngate": "const",
        },
        1,
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset of three training shards with tails, and two for validation, half unlike them."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, VOCAB, 61)
    for i, size in enumerate((152, 95, 77)):
        write_shard(folder / f"toy_train_{i + 1:06d}.bin", np.resize(np.roll(pattern, i), size))
    unlike = rng.integers(0, VOCAB, 60)
    write_shard(folder / "toy_val_000000.bin", pattern[:22])
    write_shard(folder / "toy_val_000001.bin", unlike)
    index = {"vocab_size": VOCAB, "token_bytes": TOKEN_BYTES}
    (folder / "index.json").write_text(json.dumps(index))
    return {
        "input_bin": f"{folder}/toy_train_*.bin",
        "input_val_bin": f"{folder}/toy_val_*.bin",
    }


def start_weights(cfg):
    """{name: tensor}: those of INIT=gpt2 by SEED, or such that all of them matter from the start.

    Routers begin with every expert in use: of one without tokens AdamW would make a whole step
    along what rounding leaves of a gradient of zero.
    """
    torch.manual_seed(cfg.seed)
    weights, generator = {}, torch.Generator().manual_seed(1)
    for name, parameter in train_gpt.GPT(cfg).named_parameters():
        if cfg.init == "gpt2":
            weights[name] = parameter.detach()
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        is_matrix = parameter.ndim > 1
        weights[name] = noise * parameter.size(-1) ** -0.5 if is_matrix else 1 + 0.3 * noise
        if name.endswith("router.weight"):
            weights[name] *= 0.3
    return weights


class Clock:
    """A clock that goes on only where something is said to take time."""

    def __init__(self):
        self.seconds = 0.0

    def perf_counter(self):
        return self.seconds

    def slow(self, owner, name, seconds):
        """A call of owner's function takes seconds(its first argument)."""
        original = getattr(owner, name)

        def slowed(first, *args):
            self.seconds += seconds(first)
            return original(first, *args)

        setattr(owner, name, slowed)

    def pool(self, workers):
        """Reads nothing ahead, so that each batch is waited for."""
        return contextlib.nullcontext(SimpleNamespace(submit=self.submit))

    def submit(self, load, *args):
        def result():
            self.seconds += DURATIONS.read
            return load(*args)

        return SimpleNamespace(done=lambda: False, result=result)


def run_by_the_clock(env):
    """The program, in a process of its own, with a Clock."""
    clock = Clock()
    meter.time = train_gpt.time = clock
    futures = SimpleNamespace(ThreadPoolExecutor=clock.pool)
    train_gpt.concurrent = SimpleNamespace(futures=futures)
    clock.slow(train_gpt, "train_step", lambda state: DURATIONS.step(state.step))
    clock.slow(train_gpt, "evaluate", lambda model: DURATIONS.validation)
    clock.slow(checkpoints.Checkpoints, "save", lambda checkpoints: DURATIONS.save)
    return train_gpt.main([], env)


def close(number):
    """What equals a number: a count exactly."""
    return (
        number if isinstance(number, int) else pytest.approx(number, rel=TOLERANCE, abs=TOLERANCE)
    )


def settings_of(cfg, start, folder):
    """The environment of a run of cfg from these weights, which leaves everything in a folder."""
    safetensors.torch.save_file(start, folder / "start.safetensors")
    values = {name.upper(): value for name, value in cfg.changes().items()}
    return {name: int(v) if isinstance(v, bool) else v for name, v in values.items()} | {
        "INIT_FROM": "" if cfg.init == "gpt2" else folder / "start.safetensors",
        "LOG_DIR": folder / "logs",
        "RESULTS_CSV": folder / "results.csv",
        "RUN_ID": "toy",
    }


def compare(settings, curve, figures, weights):
    """What a run has left with what the reference says."""
    found = [{k: float(v) for k, v in point.items() if v} for point in points(settings)]
    assert len(found) == len(curve)
    for point, expected in zip(found, curve):
        assert point == {column: close(number) for column, number in expected.items()}
    expected = {name: close(number) for name, number in figures.items()}
    told = row(settings)
    assert {name: float(told[name]) for name in figures} == expected
    told = summary(settings)
    assert {name: told[name] for name in figures} == expected
    assert told["history"] == {
        name: [close(point[name]) if name in point else None for point in curve] for name in HISTORY
    }
    assert log_points(settings) == [*expected_log(curve)]
    final = safetensors.torch.load_file(settings["LOG_DIR"] / "toy/model.safetensors")
    for name, expected in weights.p.items():
        assert torch.allclose(final[name].double(), expected, rtol=TOLERANCE, atol=TOLERANCE), name


@pytest.mark.parametrize("name", RUNS)
def test_a_run_equals_the_reference(name, data, tmp_path):
    """Curve, row, summary, log and weights of 12 steps."""
    changes, world = RUNS[name]
    cfg = train_gpt.Config(**BASE | changes | data)
    start = start_weights(cfg)
    settings = settings_of(cfg, start, tmp_path)
    job = Job(settings, world, run_by_the_clock)  # beside it, the reference
    curve, figures, weights = reference_trainer.train(cfg, start, world, DURATIONS, TOKEN_BYTES)
    codes, out = job.wait()
    assert codes == [0] * world, out
    norms = [point["grad_norm"] for point in curve if "grad_norm" in point]
    assert name not in ("dense", "two ranks") or min(norms) < cfg.grad_clip < max(norms)
    assert name != "two ranks" or figures["best_loss"] < figures["final_loss"]
    compare(settings, curve, figures, weights)


def test_a_run_that_is_killed_and_goes_on_equals_the_reference(data, tmp_path, monkeypatch):
    """From step 5, and is killed at 7; what the save at 5 took is in no checkpoint."""
    more = {"dropout": 0.2, "shuffle": True, "ema_iters": 4}
    cfg = train_gpt.Config(**BASE | RUNS["experts"][0] | more | data)
    start = start_weights(cfg)
    settings = settings_of(cfg, start, tmp_path)
    with monkeypatch.context() as patch:
        dies_at(patch, 7)
        assert launch(settings, 1, run_by_the_clock)[0] == [-9]
    job = Job(settings | {"RESUME": "auto"}, 1, run_by_the_clock)
    curve, figures, weights = reference_trainer.train(cfg, start, 1, DURATIONS, TOKEN_BYTES)
    codes, out = job.wait()
    assert codes == [0] and "resumed:" in out, out
    compare(settings, curve, figures | {"save_time": 2 * DURATIONS.save}, weights)


LINE = re.compile(  # of the log
    r"^step:(\d+)/12 (train|val)_loss:(\S+) train_time:(\d+)ms step_avg:(\d+\.\d\d)ms"
    r"(?: tokens_per_sec:(\d+))?$",
    re.M,
)


def log_points(settings):
    """(step, kind of loss, loss, train time and a step's in ms, tokens/s or None) of each line."""
    found = LINE.findall((settings["LOG_DIR"] / "toy.txt").read_text())
    return [
        (int(step), kind, *map(float, numbers), float(speed) if speed else None)
        for step, kind, *numbers, speed in found
    ]


def expected_log(curve):
    for point in curve:
        milliseconds, step, speed = 1000 * point["train_time"], point["step"], None
        times = milliseconds, pytest.approx(milliseconds / max(1, step), abs=0.006)
        for kind in ("train", "val"):
            if kind == "val" and step:
                speed = pytest.approx(point["tokens_per_sec"], abs=0.51)
            if f"{kind}_loss" in point:
                yield step, kind, pytest.approx(point[f"{kind}_loss"], abs=7e-5), *times, speed
