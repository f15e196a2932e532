"""
Trains a GPT on token shards with Muon + AdamW; every setting is an environment variable, every run leaves a row.

    python train_gpt.py --help                                # the settings: default, choices, meaning
    DRY_RUN=1 python train_gpt.py                             # the plan: parameters, FLOPs, tokens (no GPU, no data)
    PRESET=quickstart python train_gpt.py                     # one process on whatever device is there
    torchrun --standalone --nproc_per_node=8 train_gpt.py     # the default: GPT-2 small on FineWeb-10B, 8 GPUs

Sections: Config, Layers, Gates, Mixers, FFNs, Model, Optimizers, Data, Records, Training.
Shapes: B sequences, T positions, C channels (n_embd), H heads, D head size, F hidden units (d_ff), V vocabulary,
N = B * T tokens. A suffix gives the layout where it is not plain: q_BTHD.
"""

import os
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).read_text()  # before torch loads: the log must hold the text that runs, not a later edit

import contextlib
import csv
import ctypes
import dataclasses
import difflib
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import platform
import re
import resource
import secrets
import shlex
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn
from torch.optim.adamw import adamw
from tqdm import tqdm

########################################
#                Config                #
########################################

ROOT = Path(__file__).resolve().parent
RUN_ID_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"
SYNONYMS = {"LEARNING_RATE": "LR", "OPTIMISER": "OPTIMIZER", "GRADIENT_CLIP": "GRAD_CLIP", "EPOCHS": "MAX_EPOCHS",
            "N_LAYERS": "N_LAYER", "N_HEADS": "N_HEAD", "SEQ_LENGTH": "SEQUENCE_LENGTH", "WARMUP_STEPS": "WARMUP_ITERS",
            "BLOCK_SIZE": "SEQUENCE_LENGTH", "SEQ_LEN": "SEQUENCE_LENGTH",
            "MAX_ITERS": "NUM_ITERATIONS", "MAX_STEPS": "NUM_ITERATIONS", "NUM_STEPS": "NUM_ITERATIONS",
            "NUM_LAYERS": "N_LAYER", "NUM_HEADS": "N_HEAD", "D_MODEL": "N_EMBD", "MODEL_DIM": "N_EMBD",
            "MICRO_BATCH_SIZE": "DEVICE_BATCH_SIZE", "COOLDOWN_ITERS": "WARMDOWN_ITERS"}

class ConfigError(ValueError):
    """A setting that cannot be used: says which, its value, the choices and what to do."""
    status = "config"

class DataError(ValueError):
    """Data that cannot be trained on: says which file, what was expected, what was found and what to do."""
    status = "data"

class Diverged(ArithmeticError):
    """The loss is no longer a finite number."""
    status = "diverged"

@dataclass(frozen=True)
class Config:
    """Every setting of a run. The environment variable is the field's name in capitals."""
    # what this run is
    preset: str = "gpt2_small"  # experiments/presets/<name>.env is read first; the environment wins over it
    run_id: str = ""  # names the log, curve and row; blank: <preset>-<UTC time>-<4 hex>
    stage: str = ""  # label of a series of runs
    variant: str = ""  # label within the stage
    note: str = ""  # free text for the row
    seed: int = 0  # of initialisation, dropout and shuffling
    dry_run: bool = False  # print the plan and stop
    # data
    input_bin: str = "data/fineweb10B/fineweb_train_*.bin"  # glob of the training shards
    input_val_bin: str = "data/fineweb10B/fineweb_val_*.bin"  # glob of the validation shards
    shuffle: bool = False  # visit the samples of each epoch in a seeded random order
    # batch and length
    batch_size: int = 512  # sequences a step, over all ranks; gradient accumulation follows from it
    device_batch_size: int = 64  # sequences a forward pass, per rank
    sequence_length: int = 1024  # tokens
    num_iterations: int = 5100  # optimizer steps
    max_epochs: int = 1  # passes over the training data that NUM_ITERATIONS may take; 0: as many as it takes
    val_every: int = 125  # steps between validations; 0: only the last
    val_tokens: int = 10485760  # tokens of each validation, from the start of the validation shards
    # model
    vocab_size: int = 50304  # rows of the embedding; 0: what the dataset's index.json says
    n_layer: int = 12  # blocks
    n_head: int = 6  # attention heads; head size n_embd / n_head
    n_embd: int = 768  # channels of the residual stream
    d_ff: int = 0  # hidden units of the FFN; 0: 4 n_embd, or 8/3 n_embd up to a multiple of 64 for swiglu
    mixer: str = "attention"  # a comma list tiles over the layers
    ffn: str = "relu2"  # relu2: arXiv 2109.08668; swiglu: arXiv 2002.05202; a comma list tiles over the layers
    norm: str = "rms"  # rms has no gains; layer has a gain, and a bias if BIAS=1
    pos: str = "rotary"  # rotary: arXiv 2104.09864; learned: an embedding a position
    qk_norm: bool = True  # RMS norm of every query and key head
    bias: bool = False  # biases in linear layers and layer norms
    tie_embeddings: bool = True  # one matrix for embedding and head
    dropout: float = 0.0  # probability, on embeddings, attention weights and branches
    init: str = "zero_proj"  # zero_proj: uniform 1/sqrt(fan in), projections 0; gpt2: normal 0.02, projections scaled
    # attention gates, arXiv 2505.06708
    attngate: str = "none"  # what a gate is computed for: each channel, each head, or a learned constant
    gatepos: str = "sdpa"  # on the attention output, or on the values before it
    gateact: str = "sigmoid"  # ns_sigmoid: 0.5 + 0.5 sigmoid
    # optimization
    optimizer: str = "muon"  # of the matrices inside the blocks; AdamW has the rest
    lr: float = 0.0036  # AdamW learning rate
    embed_lr: float | None = None  # of the embedding; blank: LR
    head_lr: float | None = None  # of an untied head; blank: LR
    muon_lr: float | None = None  # blank: 0.1 LR
    muon_scale: str = "unit"  # of Muon's update: unit mean square; torch's max(1, rows/cols)^.5, .2 max(rows, cols)^.5
    muon_momentum: float = 0.95  # Nesterov momentum of Muon
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    weight_decay: float = 0.0  # decoupled, on matrices and embeddings
    grad_clip: float = 0.0  # largest global gradient norm; 0: no clipping
    lr_schedule: str = "trapezoid"  # flat then linear to zero over WARMDOWN_ITERS, or cosine over the run
    warmup_iters: int = 0  # steps of linear warm-up
    warmdown_iters: int = 1450  # steps of the trapezoid's linear decay
    min_lr_frac: float = 0.0  # fraction of the peak at which cosine ends
    # machine
    device: str = "auto"  # auto: cuda where there is one, else cpu
    dtype: str = "auto"  # of activations and matrix products; auto: bfloat16 on cuda, float32 on cpu
    compile: str = "auto"  # torch.compile of the blocks and the loss; auto: on cuda
    peak_tflops: float | None = None  # of one device, for mfu; blank: from the table of known devices
    # records
    log_dir: str = "logs"  # folder of logs, curves and summaries
    results_csv: str = "experiments/results.csv"  # the table that gets a row
    log_every: int = 10  # steps between lines of the training loss

    def __post_init__(self):
        check(self)

    @classmethod
    def from_env(cls, env):
        """Config from a mapping of environment variables, over the preset, over the defaults. Raises ConfigError."""
        fields = {field.name.upper(): field for field in dataclasses.fields(cls)}
        by_letters = {name.replace("_", ""): name for name in fields}
        for name in env:
            ours = SYNONYMS.get(name) or by_letters.get(name.replace("_", ""), name)
            if ours != name:
                raise ConfigError(f"{name} is no setting; the name here is {ours} (unset {name})")
        settings = read_preset(env.get("PRESET") or cls.preset)
        settings |= {name: env[name] for name in fields if env.get(name)}
        if unknown := [name for name in settings if name not in fields]:
            raise ConfigError(f"PRESET={settings['PRESET']}: its file sets {unknown[0]}, which is no setting; "
                              "see python train_gpt.py --help")
        return cls(**{fields[name].name: parse(fields[name], text) for name, text in settings.items() if text})

    def changes(self):
        """What differs from the defaults: {variable: value}."""
        return {name.upper(): value for name, value in vars(self).items() if value != getattr(Config, name)}

    def hash(self):
        """Eight hex digits that runs share when they train the same model the same way, whatever seed and labels."""
        others = {*LABELS, "preset", "seed", "input_bin", "input_val_bin", "peak_tflops", "log_every"}
        kept = {name: value for name, value in vars(self).items() if name not in others}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]

LABELS = ("run_id", "stage", "variant", "note", "dry_run", "log_dir", "results_csv")  # say nothing of what is trained
TILED = ("mixer", "ffn")
BOUNDS = {  # inclusive
    "batch_size device_batch_size sequence_length num_iterations n_layer n_head n_embd log_every": (1, 2**31),
    "val_every max_epochs d_ff warmup_iters warmdown_iters seed": (0, 2**31), "vocab_size": (0, 65536),
    "lr embed_lr head_lr muon_lr": (1e-12, 1e30), "beta1 beta2 muon_momentum": (0, 0.9999999), "dropout": (0, 0.99),
    "val_tokens": (1, 2**40), "weight_decay": (0, 1e3), "grad_clip": (0, 1e6), "min_lr_frac": (0, 1),
    "peak_tflops": (1e-6, 1e6)}

def check(cfg):
    """Raises ConfigError for a value that no run can use."""
    for name, choices in axes().items():
        for value in getattr(cfg, name).split(",") if name in TILED else [getattr(cfg, name)]:
            if value not in choices:
                raise ConfigError(f"{name.upper()}={value}: choose one of {', '.join(choices)}")
    for names, (low, high) in BOUNDS.items():
        for name in names.split():
            value = getattr(cfg, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name.upper()}={value}: must lie between {low} and {high}")
    if cfg.run_id and not re.fullmatch(RUN_ID_PATTERN, cfg.run_id):
        raise ConfigError(f"RUN_ID={cfg.run_id!r}: use 1 to 100 letters, digits, '.', '_' and '-', "
                          "the first no '.' or '-'")
    if cfg.n_embd % cfg.n_head:
        raise ConfigError(f"N_EMBD={cfg.n_embd}: must be a multiple of N_HEAD={cfg.n_head}; "
                          f"choose {nearest_multiples(cfg.n_embd, cfg.n_head)}")
    if cfg.pos == "rotary" and cfg.n_embd // cfg.n_head % 2:
        raise ConfigError(f"N_EMBD={cfg.n_embd} / N_HEAD={cfg.n_head} gives heads of an odd size; "
                          "POS=rotary needs an even one: change either, or set POS=learned")
    if cfg.val_tokens < cfg.sequence_length:
        raise ConfigError(f"VAL_TOKENS={cfg.val_tokens}: must be at least SEQUENCE_LENGTH={cfg.sequence_length}")

def axes():
    """Choices of every setting that has a list of them: {field: names}."""
    return {"mixer": MIXERS, "ffn": FFNS, "norm": NORMS, "pos": POSITIONS, "init": INITS, "attngate": GATES,
            "gatepos": GATE_POSITIONS, "gateact": GATE_ACTS, "optimizer": OPTIMIZERS, "muon_scale": MUON_SCALES,
            "lr_schedule": SCHEDULES, "device": ("auto", "cpu", "cuda"), "dtype": ("auto", *DTYPES),
            "compile": ("auto", "0", "1")}

def cautions(env, cfg):
    """One sentence for every variable that is nearly one of ours, and for a schedule that never reaches its peak."""
    ours = [field.name.upper() for field in dataclasses.fields(Config)]
    found = [f"{name} is no setting and is ignored; did you mean {match}?" for name in env
             if len(name) > 4 and name not in ours for match in difflib.get_close_matches(name, ours, 1, 0.85)]
    if cfg.lr_schedule == "trapezoid" and cfg.warmdown_iters > cfg.num_iterations:
        found.append(f"WARMDOWN_ITERS={cfg.warmdown_iters} exceeds NUM_ITERATIONS={cfg.num_iterations}: the learning "
                     f"rate starts at {lr_factor(0, cfg):.0%} of its peak")
    return found

def parse(field, text):
    """The value of a setting from its text. Raises ConfigError."""
    kind, name = field.type, field.name.upper()
    try:
        if kind is bool:
            return {"0": False, "1": True, "false": False, "true": True}[text.lower()]
        return kind(text) if kind in (int, float, str) else float(text)
    except (ValueError, KeyError):
        wanted = {bool: "0 or 1", int: "a whole number"}.get(kind, "a number")
        raise ConfigError(f"{name}={text!r}: must be {wanted}") from None

def read_preset(name):
    """Settings of experiments/presets/<name>.env: {variable: text}. Raises ConfigError."""
    files = {path.stem: path for path in sorted((ROOT / "experiments" / "presets").glob("*.env"))}
    if name not in files:
        raise ConfigError(f"PRESET={name}: choose one of {', '.join(files)}")
    settings = {}
    for line in map(str.strip, files[name].read_text().splitlines()):
        if line and not line.startswith("#"):
            key, sign, settings[key] = line.partition("=")
            if not sign:
                raise ConfigError(f"{files[name]}: {line!r} is no line of the form KEY=value")
    return settings | {"PRESET": name}

def nearest_multiples(value, factor):
    """'6 or 12': the multiples of `factor` next to `value`, at least one `factor`."""
    below = value // factor * factor
    return " or ".join(str(n) for n in (below, below + factor) if n)

def help_text():
    """The table of settings, read from the source: variable, default, choices and the comment of its line."""
    comments = dict(re.findall(r"^    (\w+): [^=]+ = .*?  # (.*)$", SOURCE, re.M))
    lines = [__doc__.strip(), "", "Settings (environment variables; a blank one counts as not set):"]
    for field in dataclasses.fields(Config):
        default = "blank" if field.default in (None, "") else field.default
        default = int(default) if field.type is bool else default
        choices = f"[{'|'.join(axes()[field.name])}] " if field.name in axes() else ""
        lines.append(f"  {field.name.upper():18} {default!s:38} {choices}{comments[field.name]}")
    presets = sorted(path.stem for path in (ROOT / "experiments" / "presets").glob("*.env"))
    return "\n".join([*lines, f"Presets: {', '.join(presets)}"])


########################################
#                Layers                #
########################################

def normal_(w, std):
    """Fills w with normal numbers, but on the meta device, where it would load seconds of code to do nothing."""
    return w if w.is_meta else nn.init.normal_(w, std=std)

def fan_in_uniform_(w):
    """Fills w (..., rows, fan in) with uniform numbers between plus and minus 1 / sqrt(fan in)."""
    return nn.init.uniform_(w, -w.size(-1)**-0.5, w.size(-1)**-0.5)

INITS = {  # how a weight (..., rows, fan in) starts: (cfg, weight, whether it ends a residual branch or is the head)
    "zero_proj": lambda cfg, w, ends: nn.init.zeros_(w) if ends else fan_in_uniform_(w),
    "gpt2": lambda cfg, w, ends: normal_(w, 0.02 / (2 * cfg.n_layer)**0.5 if ends else 0.02)}

CPUINFO = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
# On AMD's AVX-512 processors MKL, torch's default, runs AVX2 code: oneDNN multiplies float32 matrices twice as fast.
ONEDNN = "AuthenticAMD" in CPUINFO and torch.backends.cpu.get_cpu_capability() == "AVX512"

def product(a, b):
    """a (..., k) times the transpose of b (n, k): (..., n), by the faster of the CPU's two libraries; torch.compile can
    lower this operator only for a constant b, and gets the plain product."""
    if ONEDNN and a.is_cpu and a.dtype == torch.float32 and not torch.compiler.is_compiling():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.mT

class OneDNNLinear(torch.autograd.Function):
    """F.linear without bias through `product`, forward and backward: oneDNN's operator brings no gradient."""
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return product(grad, weight.mT), product(grad.flatten(0, -2).mT, x.flatten(0, -2).mT)

class Linear(nn.Module):
    """Linear layer in its input's dtype: (..., fan_in) -> (..., parts * fan_out). `parts` matrices that read the same
    input share one product, and Muon still orthogonalises each by itself."""
    def __init__(self, cfg, fan_in, fan_out, parts=1, ends=False, bias=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*[parts] * (parts > 1), fan_out, fan_in))
        self.bias = nn.Parameter(torch.zeros(parts * fan_out)) if (cfg.bias if bias is None else bias) else None
        INITS[cfg.init](cfg, self.weight, ends)

    def forward(self, x):
        weight = self.weight.flatten(0, -2).type_as(x)
        y = OneDNNLinear.apply(x, weight) if ONEDNN and x.is_cpu else F.linear(x, weight)
        return y if self.bias is None else y + self.bias.type_as(x)

    def flops_per_token(self):
        return 6 * self.weight.numel()

class RMSNormFunction(torch.autograd.Function):
    """x / rms(x) over the last dimension. By hand, because eager PyTorch makes some 15 passes of it on a CPU."""
    @staticmethod
    def forward(ctx, x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = (norm.square() / x.size(-1) + 1e-6).rsqrt()
        y = (x * scale).type_as(x)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        return (torch.addcmul(grad, y, (grad * y).mean(-1, keepdim=True), value=-1) * scale).type_as(y)

class RMSNorm(nn.Module):
    """Root mean square norm without gains (arXiv 1910.07467): (..., C) -> same."""
    def __init__(self, cfg):
        super().__init__()

    def forward(self, x):
        return RMSNormFunction.apply(x)

class LayerNorm(nn.Module):
    """Layer norm with a gain, and a bias if cfg.bias (arXiv 1607.06450)."""
    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(cfg.n_embd))
        self.bias = nn.Parameter(torch.zeros(cfg.n_embd)) if cfg.bias else None

    def forward(self, x):
        bias = None if self.bias is None else self.bias.type_as(x)
        return F.layer_norm(x, self.weight.shape, self.weight.type_as(x), bias)

NORMS = {"rms": RMSNorm, "layer": LayerNorm}

class Rotary(nn.Module):
    """Rotary embedding, base 10000, halves paired as in GPT-NeoX, arXiv 2104.09864: (B, T, ..., D) -> same."""
    def __init__(self, cfg):
        super().__init__()
        half = cfg.n_embd // cfg.n_head // 2
        angles = torch.outer(torch.arange(cfg.sequence_length), 10000 ** -(torch.arange(half) / half)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin() * torch.tensor([1.0, -1.0]).repeat_interleave(half), persistent=False)

    def forward(self, x):
        shape = (x.size(1), *[1] * (x.ndim - 3), -1)
        cos, sin = self.cos[:x.size(1)].view(shape), self.sin[:x.size(1)].view(shape)
        x1, x2 = x.chunk(2, dim=-1)
        return torch.addcmul(x * cos, torch.cat((x2, x1), dim=-1), sin).type_as(x)

class LearnedPosition(nn.Module):
    """Adds an embedding of the position: (B, T, C) -> same."""
    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Parameter(normal_(torch.empty(cfg.sequence_length, cfg.n_embd), 0.02))

    def forward(self, x):
        return x + self.weight[:x.size(1)].type_as(x)

POSITIONS = {"rotary": (nn.Identity, Rotary), "learned": (LearnedPosition, nn.Identity)}  # (on embeddings, on q and k)


########################################
#                Gates                 #
########################################

GATE_ACTS = {"sigmoid": torch.sigmoid, "ns_sigmoid": lambda x: 0.5 + 0.5 * torch.sigmoid(x)}
GATE_POSITIONS = ("sdpa", "value")

class NoGate(nn.Identity):
    """Leaves y (B, T, H, D) as it is. Every gate takes y and the normed hidden state x (B, T, C), returns gated y."""
    def forward(self, y, x):
        return y

class ElementwiseGate(nn.Module):
    """One gate for each channel of each head, computed from x."""
    def __init__(self, cfg):
        super().__init__()
        self.act, self.score = GATE_ACTS[cfg.gateact], Linear(cfg, cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, y, x):
        return y * self.act(self.score(x)).view_as(y)

class HeadwiseGate(nn.Module):
    """One gate for each head, computed from x."""
    optim = "adamw"  # (heads, n_embd) is too flat to be orthogonalised

    def __init__(self, cfg):
        super().__init__()
        self.act, self.score = GATE_ACTS[cfg.gateact], Linear(cfg, cfg.n_embd, cfg.n_head, bias=False)

    def forward(self, y, x):
        return y * self.act(self.score(x)).unsqueeze(-1)

class ConstGate(nn.Module):
    """One learned gate for each channel of each head, the same for every input; starts at act(0)."""
    optim = "adamw"

    def __init__(self, cfg):
        super().__init__()
        self.act, self.score = GATE_ACTS[cfg.gateact], nn.Parameter(torch.zeros(cfg.n_head, cfg.n_embd // cfg.n_head))

    def forward(self, y, x):
        return y * self.act(self.score).type_as(y)

GATES = {"none": NoGate, "headwise": HeadwiseGate, "elementwise": ElementwiseGate, "const": ConstGate}


########################################
#                Mixers                #
########################################

class CausalSelfAttention(nn.Module):
    """Multi-head causal attention with optional QK norm and gate: (B, T, C) -> same."""
    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.dropout = cfg.n_head, cfg.dropout
        self.attention_flops = 12 * cfg.n_embd * cfg.sequence_length
        self.qkv = Linear(cfg, cfg.n_embd, cfg.n_embd, parts=3)
        self.proj = Linear(cfg, cfg.n_embd, cfg.n_embd, ends=True)
        self.qk_norm = RMSNorm(cfg) if cfg.qk_norm else nn.Identity()
        self.rotate = POSITIONS[cfg.pos][1](cfg)
        self.gate_value = GATES[cfg.attngate if cfg.gatepos == "value" else "none"](cfg)
        self.gate_output = GATES[cfg.attngate if cfg.gatepos == "sdpa" else "none"](cfg)

    def forward(self, x):
        B, T, C = x.shape
        qk, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).split((2, 1), dim=2)
        q, k = self.rotate(self.qk_norm(qk)).transpose(1, 3).unbind(2)  # each (B, H, T, D)
        v = self.gate_value(v.squeeze(2), x).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout).transpose(1, 2)
        return self.proj(self.gate_output(y, x).reshape(B, T, C))

    def flops_per_token(self):
        return self.attention_flops  # scores and their product with the values, forward and backward, no causal halving

MIXERS = {"attention": CausalSelfAttention}


########################################
#                 FFNs                 #
########################################

class MLP(nn.Module):
    """Two-layer FFN, the base of the kinds below: (..., C) -> same."""
    parts = 1

    def __init__(self, cfg):
        super().__init__()
        width = cfg.d_ff or self.default_width(cfg.n_embd)
        self.fc = Linear(cfg, cfg.n_embd, width, parts=self.parts)
        self.proj = Linear(cfg, width, cfg.n_embd, ends=True)

    def forward(self, x):
        return self.proj(self.act(self.fc(x)))

    def default_width(self, n_embd):
        return 4 * n_embd

class ReLU2Function(torch.autograd.Function):
    """relu(h)^2. By hand, because its gradient 2 relu(h) needs neither a comparison nor a power."""
    @staticmethod
    def forward(ctx, h):
        positive = F.relu(h)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).mul_(2)

class ReLU2(MLP):
    act = staticmethod(ReLU2Function.apply)

class GELU(MLP):
    act = staticmethod(functools.partial(F.gelu, approximate="tanh"))

class SwiGLU(MLP):
    parts = 2

    def act(self, h):
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up

    def default_width(self, n_embd):
        return 64 * math.ceil(8 * n_embd / 3 / 64)

FFNS = {"relu2": ReLU2, "gelu": GELU, "swiglu": SwiGLU}


########################################
#                Model                 #
########################################

class Block(nn.Module):
    """A mixer and an FFN, each a residual branch behind a norm: (B, T, C) -> same."""
    def __init__(self, cfg, layer):
        super().__init__()
        mixers, ffns = cfg.mixer.split(","), cfg.ffn.split(",")
        self.mixer_norm, self.mixer = NORMS[cfg.norm](cfg), MIXERS[mixers[layer % len(mixers)]](cfg)
        self.ffn_norm, self.ffn = NORMS[cfg.norm](cfg), FFNS[ffns[layer % len(ffns)]](cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x):
        x = x + self.dropout(self.mixer(self.mixer_norm(x)))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))

class GPT(nn.Module):
    """Decoder-only transformer: tokens (B, T) -> logits (B, T, V) in float32, or with targets (B, T) the mean loss ().
    The residual stream and the matrix products are in `dtype`, parameters in float32."""
    def __init__(self, cfg, dtype=torch.float32):
        super().__init__()
        self.dtype, self.loss_chunk = dtype, loss_chunk
        self.embed = nn.Parameter(torch.empty(cfg.vocab_size, cfg.n_embd))
        self.head = None if cfg.tie_embeddings else nn.Parameter(torch.empty(cfg.vocab_size, cfg.n_embd))
        if self.head is not None and cfg.init == "zero_proj":
            normal_(self.embed, 1.0)  # nothing but its own rows to reach through the first norm
        else:
            INITS[cfg.init](cfg, self.embed, False)
        if self.head is not None:
            INITS[cfg.init](cfg, self.head, cfg.init == "zero_proj")
        self.add_position = POSITIONS[cfg.pos][0](cfg)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.order = tuple(range(cfg.n_layer))
        self.norm = NORMS[cfg.norm](cfg)

    def forward(self, tokens_BT, targets_BT=None):
        x = self.dropout(self.add_position(F.embedding(tokens_BT, self.embed).to(self.dtype)))
        for i in self.order:
            x = self.blocks[i](x)
        x, head = self.norm(x), self.embed if self.head is None else self.head
        if targets_BT is None:
            return F.linear(x, head.type_as(x)).float()
        return LinearCrossEntropy.apply(x.flatten(0, 1), head, targets_BT.flatten(), self.loss_chunk)

    def flops_per_token(self):
        """Training FLOPs a token: 6 per weight of a matrix product, head included, and 12 C T per attention layer."""
        parts = [part for i in self.order for part in self.blocks[i].modules() if hasattr(part, "flops_per_token")]
        return 6 * self.embed.numel() + sum(part.flops_per_token() for part in parts)

LOSS_CHUNK = {"cuda": 2**28, "cpu": 2**23}  # logits at a time: a large product on a GPU, the last-level cache on a CPU

def loss_chunk(x, head, targets):
    """Summed loss () of x (n, C) against targets (n,), and its gradient softmax - onehot for the logits (n, V)."""
    logp = F.log_softmax(product(x, head).float(), dim=-1)
    target_logp = logp.gather(-1, targets[:, None])
    grad = logp.exp_().type_as(x)
    return -target_logp.sum(), grad.scatter_(-1, targets[:, None], target_logp.expm1().type_as(x))

class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x (N, C) times head (V, C) against targets (N,), never holding all (N, V) logits. The
    gradients are made on the way, chunk by chunk, as in Liger-Kernel (arXiv 2410.10989)."""
    @staticmethod
    def forward(ctx, x, head, targets, chunk):
        weight, total, training = head.type_as(x), x.new_zeros((), dtype=torch.float32), ctx.needs_input_grad[0]
        grad_x, grad_head = (torch.empty_like(x), torch.zeros_like(head)) if training else (x, None)
        rows = math.ceil(len(x) / math.ceil(len(x) * len(head) / LOSS_CHUNK[x.device.type]))
        for xs, ts, grad_xs in zip(x.split(rows), targets.split(rows), grad_x.split(rows)):
            loss, grad_logits = chunk(xs, weight, ts)
            total += loss
            if training:
                grad_xs.copy_(product(grad_logits, weight.mT))
                grad_head.add_(product(grad_logits.mT, xs.mT))
        ctx.save_for_backward(grad_x, grad_head)
        return total / len(x)

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_head = ctx.saved_tensors
        grad = grad / len(grad_x)
        return grad_x.mul_(grad), grad_head.mul_(grad), None, None


########################################
#              Optimizers              #
########################################

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic, steepest slope at zero: kellerjordan.github.io/posts/muon
MUON_SCALES = {  # factor on the orthogonalised update of a matrix (rows, cols)
    "unit": lambda rows, cols: max(rows, cols)**0.5,  # unit mean square; modded-nanogpt, record of 2024-10-14
    "original": lambda rows, cols: max(1, rows / cols)**0.5,  # torch.optim.Muon
    "match_rms_adamw": lambda rows, cols: 0.2 * max(rows, cols)**0.5}  # Moonlight, arXiv 2502.16982; torch.optim.Muon

def zeropower_via_newtonschulz5(G, dtype=torch.bfloat16, steps=5, eps=1e-7):
    """Nearly the closest orthogonal matrix to each of a batch of matrices (..., m, n), in `dtype`: singular values end
    within about 0.7 to 1.2. Bit for bit torch.optim.Muon's iteration in bfloat16."""
    a, b, c = NS_COEFFICIENTS
    tall = G.size(-2) > G.size(-1)
    X = G.to(dtype).reshape(-1, *G.shape[-2:])
    X = X.mT if tall else X
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # spectral norm at most 1
    if dtype == torch.float32 and X.size(-1) >= 2 * X.size(-2):
        # the same polynomial, accumulated as a small square P, X <- P X at the end; half the work, but not for bfloat16
        identity = torch.eye(X.size(-2), device=X.device)
        A, P = X @ X.mT, identity
        for _ in range(steps):
            Q = torch.baddbmm(A, A, A, beta=b, alpha=c) + a * identity
            A, P = Q @ A @ Q, Q @ P
        X = P @ X
    else:
        for _ in range(steps):
            A = X @ X.mT
            B = torch.baddbmm(A, A, A, beta=b, alpha=c)
            X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).reshape(G.shape)

def reduce_scatter(full, world):
    """Sum over the ranks of full (world * n, ...), of which each keeps its own n rows. One rank keeps what it has."""
    if world == 1:
        return full
    own = full.new_empty(len(full) // world, *full.shape[1:])
    (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(own, full)  # torch 2.13 renames both
    return own

def all_gather(own, world):
    """The ranks' own (n, ...) one after another: (world * n, ...)."""
    if world == 1:
        return own
    full = own.new_empty(len(own) * world, *own.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(full, own.contiguous())  # nccl refuses the transposed strides that Newton-Schulz leaves on tall matrices
    return full

def squared_norm(tensors):
    """Sum of squares () over a list of tensors, 0.0 for none."""
    return torch.stack(torch._foreach_norm(tensors)).square().sum() if tensors else 0.0

class Muon:
    """MomentUm Orthogonalized by Newton-Schulz (kellerjordan.github.io/posts/muon) for matrices, sharded over ranks.

    Parameters (..., m, n) of one shape form a stack. Its gradients are reduce-scattered, each rank orthogonalises its
    share in one batched product and keeps only that share's momentum, and the updates are all-gathered."""
    def __init__(self, params, cfg, lr, ranks):
        self.cfg, self.base_lr, self.world, self.stacks = cfg, lr, ranks.world_size, []
        for shape in dict.fromkeys(p.shape[-2:] for p in params):
            members = [p for p in params if p.shape[-2:] == shape]
            sizes = [p[..., 0, 0].numel() for p in members]
            share = math.ceil(sum(sizes) / self.world)
            padding = members[0].new_zeros(share * self.world - sum(sizes), *shape)
            self.stacks.append({"params": members, "sizes": [*sizes, len(padding)], "padding": padding,
                                "momentum": members[0].new_zeros(share, *shape), "grad": None})
        self.dtype = torch.bfloat16 if params[0].is_cuda else torch.float32  # few CPUs multiply bfloat16 fast

    def reduce_grads(self):
        """Sums the gradients over the ranks; returns the squared norm () of this rank's share."""
        for stack in self.stacks:
            grads = [p.grad.view(-1, *p.shape[-2:]) for p in stack["params"]]
            stack["grad"] = reduce_scatter(torch.cat([*grads, stack["padding"]]), self.world)
        return squared_norm([stack["grad"] for stack in self.stacks])

    @torch.no_grad()
    def step(self, factor, grad_scale, skip):
        """One update at `factor` of the learning rate, of gradients over grad_scale (), none where skip () is 1."""
        lr, mu = self.base_lr * factor, self.cfg.muon_momentum
        decay = 1 - lr * self.cfg.weight_decay * (1 - skip.double())
        for stack in self.stacks:
            momentum = stack["momentum"]
            grad = stack["grad"] if grad_scale is None else stack["grad"] / grad_scale
            grad = torch.where(skip > 0, momentum, grad)  # a non-finite one would poison the momentum for good
            momentum.lerp_(grad, 1 - mu)
            update = zeropower_via_newtonschulz5(grad.lerp_(momentum, mu), self.dtype) * (1 - skip)
            scale = MUON_SCALES[self.cfg.muon_scale](*momentum.shape[-2:])
            updates = all_gather(update, self.world).split(stack["sizes"])
            for p, u in zip(stack["params"], updates):
                if self.cfg.weight_decay:
                    p.mul_(decay)
                p.add_(u.view_as(p), alpha=-lr * scale)
            stack["grad"] = None  # its memory is for the next backward pass

class AdamW:
    """AdamW (arXiv 1711.05101) as torch computes it, fused, sharded over ranks.

    A large parameter whose size the ranks divide is updated in slices: its gradient is reduce-scattered, each rank
    holds the moments of its slice, and the slices are all-gathered. Any other is updated whole on every rank."""
    def __init__(self, params, cfg, lr, ranks, weight_decay=0.0):
        self.cfg, self.base_lr, self.world, self.weight_decay = cfg, lr, ranks.world_size, weight_decay
        self.sliced = [p for p in params if p.numel() >= 2**16 and p.numel() % self.world == 0]
        self.whole = [p for p in params if p.numel() < 2**16 or p.numel() % self.world]
        self.own = [p.data.view(-1).chunk(self.world)[ranks.rank] for p in self.sliced] + [p.data for p in self.whole]
        self.exp_avg = [torch.zeros_like(p) for p in self.own]
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.own]
        self.steps = [torch.zeros((), device=p.device) for p in self.own]
        self.grads = []

    def reduce_grads(self):
        """Sums the gradients over the ranks; returns the squared norm () of this rank's share."""
        sliced = [reduce_scatter(p.grad.view(-1), self.world) for p in self.sliced]
        whole = [p.grad for p in self.whole]
        if self.whole and self.world > 1:
            bucket = torch.cat([g.view(-1) for g in whole])
            dist.all_reduce(bucket)
            whole = [g.view_as(p) for g, p in zip(bucket.split([p.numel() for p in whole]), whole)]
        self.grads = sliced + whole
        return squared_norm(sliced) + squared_norm(whole) / self.world

    @torch.no_grad()
    def step(self, factor, grad_scale, skip):
        """One update at `factor` of the learning rate, of gradients over grad_scale (), none where skip () is 1."""
        adamw(self.own, self.grads, self.exp_avg, self.exp_avg_sq, [], self.steps, fused=True, amsgrad=False,
              maximize=False, beta1=self.cfg.beta1, beta2=self.cfg.beta2, eps=1e-8, lr=self.base_lr * factor,
              weight_decay=self.weight_decay, grad_scale=grad_scale, found_inf=skip)
        self.grads = []  # their memory is for the next backward pass
        if self.world > 1:
            for p, own in zip(self.sliced, self.own):
                p.data.view(-1).copy_(all_gather(own, self.world))

OPTIMIZERS = {  # of the matrices inside the blocks
    "muon": lambda params, cfg, ranks: Muon(params, cfg, 0.1 * cfg.lr if cfg.muon_lr is None else cfg.muon_lr, ranks),
    "adamw": lambda params, cfg, ranks: AdamW(params, cfg, cfg.lr, ranks, cfg.weight_decay)}

def split_params(model):
    """Every parameter in exactly one group: {"matrices", "embed", "head", "vectors": [Parameter]}. Matrices are what
    the blocks hold with two dimensions or more, but for modules whose class says optim = "adamw"."""
    opted_out = {id(p) for m in model.modules() if getattr(m, "optim", "") == "adamw" for p in m.parameters()}
    matrices = [p for p in model.blocks.parameters() if p.ndim >= 2 and id(p) not in opted_out]
    groups = {"matrices": matrices, "embed": [model.embed], "head": [] if model.head is None else [model.head]}
    taken = {id(p) for group in groups.values() for p in group}
    groups["vectors"] = [p for p in model.parameters() if id(p) not in taken]
    assert sum(len(group) for group in groups.values()) == len(list(model.parameters()))
    return groups

def build_optimizers(model, cfg, ranks):
    """The optimizers of cfg over the groups of split_params, learning rates as in the settings."""
    groups = split_params(model)
    optimizers = [OPTIMIZERS[cfg.optimizer](groups["matrices"], cfg, ranks)]
    for name, lr in ("embed", cfg.embed_lr), ("head", cfg.head_lr), ("vectors", None):
        if groups[name]:
            decay = 0 if name == "vectors" else cfg.weight_decay
            optimizers.append(AdamW(groups[name], cfg, cfg.lr if lr is None else lr, ranks, decay))
    return optimizers

def trapezoid(step, cfg):
    return min(1.0, (cfg.num_iterations - step) / max(1, cfg.warmdown_iters))

def cosine(step, cfg):
    progress = (step - cfg.warmup_iters) / max(1, cfg.num_iterations - cfg.warmup_iters)
    return cfg.min_lr_frac + (1 - cfg.min_lr_frac) * 0.5 * (1 + math.cos(math.pi * progress))

SCHEDULES = {"trapezoid": trapezoid, "cosine": cosine}

def lr_factor(step, cfg):
    """Fraction of the peak learning rate for the update that follows `step` updates."""
    if step < cfg.warmup_iters:
        return (step + 1) / cfg.warmup_iters
    return SCHEDULES[cfg.lr_schedule](step, cfg)

class LossScale:
    """Factor on the loss that keeps float16 gradients from vanishing (arXiv 1710.03740): halved when they overflow,
    doubled after 2000 good steps; 1 for other dtypes. Lives on the device, so that no step waits for it."""
    def __init__(self, dtype, device):
        self.active = dtype == torch.float16
        self.value = torch.tensor(2.0**16 if self.active else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, skip):
        if self.active:
            self.good_steps = (self.good_steps + 1) * (1 - skip)
            doubles = self.good_steps >= 2000
            self.value *= torch.where(skip > 0, 0.5, 1.0 + doubles)
            self.good_steps *= ~doubles


########################################
#                 Data                 #
########################################

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256  # the shard format of llm.c and modded-nanogpt

def shard_tokens(path):
    """Number of tokens of a shard, after its header and size are verified. Raises DataError."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: expected a shard file, found {'a directory' if path.is_dir() else 'nothing'}")
    try:
        header, size = np.fromfile(path, dtype="<i4", count=HEADER_INTS), path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(header) < HEADER_INTS:
        raise DataError(f"{path}: expected a header of {4 * HEADER_INTS} bytes, found a file of {size}")
    for name, expected, found in ("magic", SHARD_MAGIC, header[0]), ("version", SHARD_VERSION, header[1]):
        if found != expected:
            raise DataError(f"{path}: expected {name} {expected}, found {found}; make the shard again")
    if (tokens := int(header[2])) <= 0:
        raise DataError(f"{path}: expected at least one token, found {tokens} in the header")
    if size != 4 * HEADER_INTS + 2 * tokens:
        raise DataError(f"{path}: expected {4 * HEADER_INTS + 2 * tokens} bytes for the {tokens} tokens of its header, "
                        f"found {size}; fetch or make the shard again")
    return tokens

def load_shard(path):
    """Memory map of a shard's tokens, (n,) uint16. Raises DataError."""
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(shard_tokens(path),))

class ShardLoader:
    """Samples of sequence_length + 1 tokens from the shards that match a glob, in one order for any number of ranks.

    Sample i of a shard starts at token i * sequence_length; a tail too short for a sample is dropped. A global sample
    index runs through all shards and on into the next epoch. Raises DataError."""
    def __init__(self, pattern, cfg, shuffle=False):
        self.files = sorted(glob.glob(pattern))
        if not self.files:
            shards = math.ceil(cfg.num_iterations * cfg.batch_size * cfg.sequence_length / 1e8)  # as FineWeb's are
            raise DataError(f"no file matches {pattern} (looked from {os.getcwd()}); {how_to_get(pattern, shards)}")
        self.shards = [load_shard(file) for file in self.files]
        self.length, self.vocab_size, self.seed, self.shuffle = cfg.sequence_length, cfg.vocab_size, cfg.seed, shuffle
        self.ends = np.cumsum([(len(shard) - 1) // self.length for shard in self.shards])
        self.samples, self.tokens = int(self.ends[-1]), sum(len(shard) for shard in self.shards)
        self.permutation = (-1, None)  # (epoch, its order)

    def read(self, first, count):
        """Samples first .. first + count - 1 of the global index: (count, T + 1) int64. Raises DataError."""
        epochs, index = np.divmod(np.arange(first, first + count), self.samples)
        if self.shuffle:
            index = np.concatenate([self.order(epoch)[index[epochs == epoch]] for epoch in np.unique(epochs)])
        which = np.searchsorted(self.ends, index, side="right")
        batch = np.empty((count, self.length + 1), dtype=np.int64)
        for shard in np.unique(which):
            windows = np.lib.stride_tricks.sliding_window_view(self.shards[shard], self.length + 1)[::self.length]
            batch[which == shard] = windows[index[which == shard] - (self.ends[shard - 1] if shard else 0)]
        if batch.max() >= self.vocab_size:
            self.check_tokens(np.unique(which))
        return batch

    def require(self, name, value, samples):
        """Raises DataError where there are fewer samples than the setting `name` needs."""
        if self.samples < (samples := max(1, samples)):
            shards = math.ceil(len(self.shards) * samples / max(1, self.samples))
            more = f", or set MAX_EPOCHS=0 to repeat the data, or get more; {how_to_get(self.files[0], shards)}"
            more *= name == "NUM_ITERATIONS"
            raise DataError(f"{name}={value} needs {samples:,} samples of {self.length} tokens, but {self.files[0]} "
                            f"and what else matches has {self.samples:,}; lower {name}{more}")

    def order(self, epoch):
        if self.permutation[0] != epoch:
            self.permutation = epoch, np.random.default_rng((self.seed, int(epoch))).permutation(self.samples)
        return self.permutation[1]

    def check_tokens(self, shards=None):
        """Scans every token of the shards with these numbers, or of all. Raises DataError."""
        for shard in range(len(self.shards)) if shards is None else shards:
            tokens = self.shards[shard]
            if tokens.max() >= self.vocab_size:
                bad = np.argmax(tokens >= self.vocab_size)
                raise DataError(f"{self.files[shard]}: token {tokens[bad]} at offset {bad} is not below VOCAB_SIZE="
                                f"{self.vocab_size}; set VOCAB_SIZE to the tokenizer's size, or 0 to read it")

    def prefetch(self, slices, device, depth=4):
        """Yields (inputs (n, T), targets (n, T), seconds waited) for each (first, count), read ahead by a thread."""
        def load(first, count):
            batch = torch.from_numpy(self.read(first, count))
            return batch.pin_memory() if device.type == "cuda" else batch

        slices = iter(slices)
        with ThreadPoolExecutor(1) as pool:
            ahead = deque(pool.submit(load, *piece) for piece in itertools.islice(slices, depth))
            while ahead:
                start, ready = time.perf_counter(), ahead[0].done()
                batch = ahead.popleft().result()
                waited = 0.0 if ready else time.perf_counter() - start
                ahead.extend(pool.submit(load, *piece) for piece in itertools.islice(slices, 1))
                batch = batch.to(device, non_blocking=True)
                yield batch[:, :-1], batch[:, 1:], waited

def how_to_get(pattern, shards=9):
    """What makes or fetches the data of a glob."""
    folder = os.path.dirname(pattern) or "."
    if "fineweb" in pattern:
        return f"fetch it: DATA_DIR={folder} python cached_fineweb10B.py {min(max(shards, 1), 103)}"
    if os.path.basename(folder) == "sympy":
        return f"make it: python scripts/prepare_data.py --source package:sympy --tokenizer bytes --out {folder}"
    return f"make it from your text: python scripts/prepare_data.py --source ... --out {folder}"

def dataset_index(pattern):
    """index.json of the folder of a glob, {} where there is none. Raises DataError."""
    path = Path(pattern).parent / "index.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        raise DataError(f"{path}: expected JSON, found something else; {how_to_get(pattern)}") from None

def fingerprint(loaders, folder):
    """SHA-256 over names and contents of the loaders' shards, hex; they are cached in folder by path, size and time."""
    cache = folder / "shard_hashes.json"
    known, hashes = {}, []
    with contextlib.suppress(OSError, ValueError):  # no cache yet, or a damaged one
        known = json.loads(cache.read_text())
    for file in itertools.chain.from_iterable(loader.files for loader in loaders):
        stat = os.stat(file)
        key = f"{os.path.realpath(file)}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in known:
            with open(file, "rb") as shard:
                known[key] = hashlib.file_digest(shard, "sha256").hexdigest()
        hashes.append((os.path.basename(file), known[key]))
    with contextlib.suppress(OSError):  # Records.open says what is wrong with the folder
        write_whole(cache, json.dumps(known))
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


########################################
#               Records                #
########################################

CURVE = "step tokens epoch train_loss val_loss lr grad_norm train_time tokens_per_sec data_wait".split()
PEAK_TFLOPS = {  # dense bfloat16 by the name CUDA gives the device, the more particular name first; makers' data sheets
    "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H200 NVL": 836, "H200": 989, "GB200": 2500, "B200": 2250,
    "A100": 312, "L40S": 362, "RTX 4090": 165.2, "RTX 5090": 209.5, "RTX 3090": 71}

def write_whole(path, text):
    """Replaces a file at one stroke, so that no reader and no crash ever sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def update_results(path, rows):
    """Merges rows into the results table, one per run_id, under a lock: columns are united, nothing is lost. None is a
    blank, truth values are 0 and 1."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        table = {}
        if path.is_file():
            try:
                with open(path, newline="") as file:
                    table = {row["run_id"]: row for row in csv.DictReader(file)}
            except (KeyError, UnicodeDecodeError, csv.Error):
                raise ConfigError(f"RESULTS_CSV={path}: expected a table with a column run_id; mend it, or "
                                  "name another RESULTS_CSV") from None
        for row in rows:
            cells = {k: "" if v is None else int(v) if isinstance(v, bool) else v for k, v in row.items()}
            table[row["run_id"]] = table.get(row["run_id"], {}) | cells
        columns = dict.fromkeys(column for row in table.values() for column in row)
        lines = [columns, *([row.get(column) for column in columns] for row in table.values())]
        write_whole(path, "".join(map(csv_line, lines)))

def csv_line(cells):
    """A line of a table. Python 3.11 quotes a carriage return only where lines end in one."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue().removesuffix("\r\n") + "\n"

def git_state():
    """(commit, whether tracked files other than records differ from it); blanks outside a repository."""
    def git(*words):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout.strip()
    try:
        commit = git("rev-parse", "--verify", "--quiet", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!experiments/*.csv", ":!logs")
        return commit, bool(changed) if commit else ""
    except OSError:  # no git here
        return "", ""

def machine_text():
    """Versions and the device, as the log shows them: nvidia-smi where it runs, else the CPU's name."""
    versions = (f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
                f"numpy {np.__version__}")
    try:
        return f"{versions}\n{subprocess.run(['nvidia-smi'], capture_output=True, text=True, check=True).stdout}"
    except (OSError, subprocess.CalledProcessError):
        return f"{versions}\n{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"

def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"model name\s*: (.+)", CPUINFO)
    return f"cpu: {names[0] if names else platform.processor() or platform.machine()}"

def utc_now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

class Records:
    """What a run leaves: log, curve, summary and row. Rank 0 writes them; on other ranks every method does nothing."""
    def __init__(self, cfg, run_id, writes):
        self.writes, self.bar, self.results_csv = writes, None, cfg.results_csv
        self.log, self.curve, self.json = (Path(cfg.log_dir) / f"{run_id}.{kind}" for kind in ("txt", "csv", "json"))
        self.summary = dataclasses.asdict(cfg) | {"run_id": run_id}

    def open(self, facts, warnings):
        """Starts the files of the run. Raises ConfigError where they exist or cannot be written."""
        self.summary |= facts
        if not self.writes:
            return
        commit, dirty = git_state()
        self.summary = dict.fromkeys(("run_id", "stage", "variant", "preset")) | {
            "status": "running", "started": utc_now(), "git": commit, "dirty": dirty,
            "source_sha": hashlib.sha256(SOURCE.encode()).hexdigest()[:12], "host": socket.gethostname(),
            "torch": torch.__version__} | facts | self.summary
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            rule, settings = "=" * 100, json.dumps(self.summary, indent=1)
            with open(self.log, "x") as log:  # of two runs that start at once, one owns the id
                log.write("\n".join([rule, SOURCE, rule, machine_text(), f"settings: {settings}", rule, ""]))
        except OSError as error:
            if self.log.exists():
                raise ConfigError(f"RUN_ID={self.summary['run_id']}: {self.log} exists; choose another RUN_ID or "
                                  "leave it blank") from None
            raise ConfigError(f"LOG_DIR={self.log.parent}: cannot be written ({error}); name another folder") from None
        try:
            self.curve.write_text(",".join(CURVE) + "\n")
            self.save()
        except (OSError, ConfigError) as error:
            for file in (self.log, self.curve, self.json):
                file.unlink(missing_ok=True)
            raise ConfigError(f"RESULTS_CSV={self.results_csv}: cannot be written ({error}); name another") from None
        self.print("\n".join([f"run_id:{self.summary['run_id']}", f"changes: {facts['changes'] or 'none'}",
                              *(f"warning: {warning}" for warning in warnings)]))
        self.bar = tqdm(total=self.summary["num_iterations"], unit="step", disable=not sys.stderr.isatty())

    def print(self, line):
        """A line to the log and to standard output."""
        if self.writes:
            with open(self.log, "a") as log:
                log.write(line + "\n")
            with contextlib.suppress(OSError):  # a reader that has gone away ends no run
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()

    def point(self, values):
        """A row of the curve; what is not given stays blank."""
        if self.writes:
            with open(self.curve, "a") as curve:
                curve.write(",".join(repr(values[name]) if name in values else "" for name in CURVE) + "\n")
            if "train_loss" in values:
                loss, speed = values["train_loss"], values["tokens_per_sec"]
                self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
                self.bar.update(values["step"] - self.bar.n)

    def save(self):
        """Writes summary and row; in both a number that is not finite is a blank, for JSON has none."""
        summary = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in self.summary.items()}
        write_whole(self.json, json.dumps(summary, indent=1) + "\n")
        update_results(self.results_csv, [summary])

    def close(self, status, **values):
        """The run's last words: a block of figures and files, the summary, the row."""
        self.summary |= {"status": status} | values
        if self.bar is not None:
            self.bar.close()
            told = "status final_loss best_loss bits_per_byte tokens train_time eval_time compile_time step_avg".split()
            told += "tokens_per_sec mfu peak_mem data_wait bad_steps error".split()
            files = {"log": self.log, "curve": self.curve, "summary": self.json, "row": self.results_csv}
            try:
                self.save()
            except (OSError, ConfigError) as error:
                files["row"] = f"not written ({error}); mend the table and run python scripts/rebuild_results.py"
            lines = {key: self.summary[key] for key in told if self.summary.get(key) not in (None, "")} | files
            lines = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in lines.items()}
            self.print("\n".join(["---", *(f"{key}: {value}" for key, value in lines.items())]))

def refuse(env, error):
    """Leaves a summary and a row for a run that did not start, with what is known of it."""
    run_id = env.get("RUN_ID", "")
    run_id = run_id if re.fullmatch(RUN_ID_PATTERN, run_id) else new_run_id("refused")
    row = {"run_id": run_id} | {name: env.get(name.upper(), "") for name in ("stage", "variant", "preset", "note")}
    row |= {"status": error.status, "error": str(error), "started": utc_now(), "host": socket.gethostname()}
    summary = Path(env.get("LOG_DIR") or Config.log_dir) / f"{run_id}.json"
    with contextlib.suppress(OSError, ConfigError):  # where nothing can be written, the terminal has to do
        if not summary.exists():  # the record of a finished run stays what it is
            write_whole(summary, json.dumps(row, indent=1) + "\n")
            update_results(env.get("RESULTS_CSV") or Config.results_csv, [row])


########################################
#               Training               #
########################################

MAX_BAD_STEPS = 20  # in a row; more end the run as diverged
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXIT_CODES = {"ok": 0, "stopped": 0, "preempted": 0, "crash": 1, "config": 2, "data": 3, "diverged": 4, "oom": 5}

class Ranks(NamedTuple):
    """Where this process stands among those that torchrun started; alone without torchrun."""
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @classmethod
    def from_env(cls, env):
        return cls(**{name: int(env[name.upper()]) for name in cls._fields if name.upper() in env})

    def device(self, cfg):
        return torch.device("cuda", self.local_rank) if cfg.device == "cuda" else torch.device("cpu")

def new_run_id(preset):
    return f"{preset}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"

def resolve(cfg):
    """cfg with what auto and 0 leave open: device, dtype, compile and vocab_size. Raises ConfigError, DataError."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    if device == "cuda" and not (cfg.dry_run or torch.cuda.is_available()):
        raise ConfigError("DEVICE=cuda: torch finds no CUDA device here; set DEVICE=cpu or auto")
    old = device == "cuda" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = {"cpu": "float32", "cuda": "float16" if old else "bfloat16"}[device] if cfg.dtype == "auto" else cfg.dtype
    vocab_size = cfg.vocab_size or dataset_index(cfg.input_bin).get("vocab_size")
    if not vocab_size:
        raise DataError(f"VOCAB_SIZE=0 is read from index.json beside {cfg.input_bin}, which is not there; "
                        f"set VOCAB_SIZE, or {how_to_get(cfg.input_bin)}")
    compiled = str(int(device == "cuda")) if cfg.compile == "auto" else cfg.compile
    return dataclasses.replace(cfg, device=device, dtype=dtype, compile=compiled, vocab_size=vocab_size)

def make_plan(cfg, ranks):
    """What a run of cfg on these ranks will be, without touching a device: counts as plain integers."""
    with torch.device("meta"):
        model = GPT(cfg)
    total = sum(p.numel() for p in model.parameters())
    return {"world_size": ranks.world_size, "config_hash": cfg.hash(), "params_total": total, "params_active": total,
            "flops_per_token": model.flops_per_token(), "tokens_per_step": cfg.batch_size * cfg.sequence_length,
            "tokens_needed": cfg.num_iterations * cfg.batch_size * cfg.sequence_length + 1,
            "tokens_on_disk": sum(shard_tokens(file) for file in glob.glob(cfg.input_bin)),
            "grad_accumulation": cfg.batch_size // (cfg.device_batch_size * ranks.world_size)}

def check_batch(cfg, ranks):
    """Raises ConfigError where the ranks cannot share the batch in whole micro-batches."""
    at_once = cfg.device_batch_size * ranks.world_size
    if cfg.batch_size % at_once:
        fits = [n for n in range(1, cfg.batch_size + 1) if cfg.batch_size % (n * ranks.world_size) == 0]
        near = sorted(fits, key=lambda n: abs(n - cfg.device_batch_size))[:2]
        raise ConfigError(f"BATCH_SIZE={cfg.batch_size}: must be a multiple of DEVICE_BATCH_SIZE="
                          f"{cfg.device_batch_size} x {ranks.world_size} ranks; "
                          f"set BATCH_SIZE={nearest_multiples(cfg.batch_size, at_once)}"
                          + f" or DEVICE_BATCH_SIZE={' or '.join(map(str, near))}" * bool(near))

def preflight(cfg, ranks):
    """Loaders for training and validation, after all that can be checked has been. Raises ConfigError, DataError."""
    if cfg.device == "cuda" and ranks.local_world_size > (devices := torch.cuda.device_count()):
        raise ConfigError(f"{ranks.local_world_size} ranks on this machine but {devices} CUDA devices; "
                          f"start torchrun with --nproc_per_node={devices} or set DEVICE=cpu")
    train, val = ShardLoader(cfg.input_bin, cfg, cfg.shuffle), ShardLoader(cfg.input_val_bin, cfg)
    epochs = cfg.max_epochs or math.inf
    train.require("NUM_ITERATIONS", cfg.num_iterations, math.ceil(cfg.num_iterations * cfg.batch_size / epochs))
    val.require("VAL_TOKENS", cfg.val_tokens, cfg.val_tokens // cfg.sequence_length)
    if both := {os.path.realpath(file) for file in train.files} & {os.path.realpath(file) for file in val.files}:
        raise DataError(f"{sorted(both)[0]} matches INPUT_BIN and INPUT_VAL_BIN; validate on other data")
    sizes = [dataset_index(pattern).get("vocab_size") for pattern in (cfg.input_bin, cfg.input_val_bin)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise DataError(f"INPUT_BIN has a vocabulary of {sizes[0]} tokens, INPUT_VAL_BIN one of {sizes[1]}; "
                        "name shards of one dataset in both")
    for loader in (train, val):
        if 2 * loader.tokens < 2**30:  # bytes; larger data is checked batch by batch
            loader.check_tokens()
    return train, val

def setup(cfg, ranks):
    """Joins the ranks in a process group, of one without torchrun, and agrees on the run's id, which is returned."""
    if cfg.device == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    else:
        keep_freed_memory()
    backend = "cpu:gloo,cuda:nccl" if cfg.device == "cuda" else "gloo"
    alone = {} if "MASTER_ADDR" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **alone)
    run_id = [cfg.run_id or new_run_id(cfg.preset)]
    dist.broadcast_object_list(run_id, device=torch.device("cpu"))
    return run_id[0]

def agree(work):
    """Runs work on every rank; a ConfigError of rank 0 is raised by all."""
    problem = [None]
    try:
        work()
    except ConfigError as error:
        problem = [str(error)]
    dist.broadcast_object_list(problem, device=torch.device("cpu"))
    if problem[0]:
        raise ConfigError(problem[0])

def keep_freed_memory():
    """Lets glibc keep what is freed for the next step: getting large tensors' pages anew takes a tenth of a step."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt, trim_threshold, mmap_max = ctypes.CDLL("libc.so.6").mallopt, -1, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)

@dataclass
class State:
    """What a step changes."""
    model: GPT
    optimizers: list
    loss_scale: LossScale
    bad_steps: Tensor  # (2,): updates left out because a gradient was not finite, in all and in a row until now
    step: int = 0  # updates made

    @classmethod
    def build(cls, cfg, ranks):
        """Model and optimizers, the same on every rank because the seed is."""
        torch.manual_seed(cfg.seed)
        dtype, device = DTYPES[cfg.dtype], ranks.device(cfg)
        model = GPT(cfg, dtype).to(device)
        return cls(model, build_optimizers(model, cfg, ranks), LossScale(dtype, device), torch.zeros(2, device=device))

def compile_model(model, cfg, device):
    """Compiles blocks and loss, runs them once forward, backward and in evaluation, so that no step waits for it."""
    for block in model.blocks:
        block.compile()
    model.loss_chunk = torch.compile(loss_chunk, dynamic=False)  # two sizes, of which the last chunk has its own
    tokens = torch.zeros(cfg.device_batch_size, cfg.sequence_length, dtype=torch.int64, device=device)
    model(tokens, tokens).backward()
    model.zero_grad()
    with torch.no_grad():
        model.eval()(tokens, tokens)
    model.train()
    dist.barrier()

def train_step(state, cfg, inputs, targets):
    """One update from this rank's part of the global batch, inputs and targets (n, T). Returns the mean loss () over
    the batch and the global gradient norm (), on the device; nothing here waits for it."""
    micro, scale = cfg.device_batch_size, state.loss_scale.value
    weight = micro / (len(inputs) * dist.get_world_size())
    losses = []
    for x, y in zip(inputs.split(micro), targets.split(micro)):
        losses.append(state.model(x, y))
        losses[-1].backward(scale * weight)
    squares = sum(optimizer.reduce_grads() for optimizer in state.optimizers)
    stats = torch.stack([sum(losses).detach() * weight, squares])
    dist.all_reduce(stats)
    loss, norm = stats[0], stats[1].sqrt() / scale
    skip = (~torch.isfinite(norm)).float()
    clip = (norm / cfg.grad_clip).clamp(min=1) if cfg.grad_clip else 1
    grad_scale = scale * clip if cfg.grad_clip or state.loss_scale.active else None
    for optimizer in state.optimizers:
        optimizer.step(lr_factor(state.step, cfg), grad_scale, skip)
    state.model.zero_grad()
    state.loss_scale.update(skip)
    if not state.loss_scale.active:  # where it is, an overflow is its way to find out how far it can go
        state.bad_steps = (state.bad_steps + skip) * torch.stack((torch.ones_like(skip), skip))
    state.step += 1
    return loss, norm

@torch.no_grad()
def evaluate(model, loader, cfg, ranks):
    """Mean loss over the first VAL_TOKENS of the validation shards, each rank taking a share of the samples."""
    samples, device, micro = cfg.val_tokens // cfg.sequence_length, ranks.device(cfg), cfg.device_batch_size
    first, last = (samples * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
    total = torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    for x, y, _ in loader.prefetch([(i, min(micro, last - i)) for i in range(first, last, micro)], device):
        odd = cfg.compile == "1" and len(x) < micro  # not worth a compilation
        with torch.compiler.set_stance("force_eager") if odd else contextlib.nullcontext():
            total += model(x, y) * len(x)
    model.train()
    dist.all_reduce(total)
    return total.item() / samples

def peak_memory(device):
    """Most memory in use at once, GiB: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)

def model_flops_utilization(cfg, device, flops_per_sec):
    """Share of the device's peak; None where the peak is not known, for it is never guessed."""
    name = device_name(device) if device.type == "cuda" and cfg.dtype != "float32" else ""
    peak = cfg.peak_tflops or next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    return flops_per_sec / (peak * 1e12) if peak else None

class Meter:
    """Turns what the loop measures into lines, points of the curve and the summary."""
    def __init__(self, cfg, ranks, records, samples):
        self.cfg, self.device, self.records, self.samples = cfg, ranks.device(cfg), records, samples
        self.waits, self.best_loss, self.last = [], math.inf, (0, 0.0)  # last: (tokens, train time) of the last point
        self.seconds, self.start = {"eval": 0.0, "compile": 0.0}, time.perf_counter()
        self.flops = records.summary["flops_per_token"] / ranks.world_size
        self.bytes_per_token = dataset_index(cfg.input_val_bin).get("bytes_per_token")

    def now(self):
        """Seconds on some clock, after the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def off_the_clock(self, kind):
        """Times work of another kind, for which the clock of the training stands still."""
        began = self.now()
        yield
        spent = self.now() - began
        self.seconds[kind] += spent
        self.start += spent

    def point(self, state, stats, val_loss):
        """Logs a step: stats (loss, gradient norm) of its update or None, and the validation loss after it or None."""
        cfg, step, seconds = self.cfg, state.step, self.now() - self.start if state.step else 0.0
        tokens = step * cfg.batch_size * cfg.sequence_length
        values = {"step": step, "tokens": tokens, "epoch": step * cfg.batch_size / self.samples, "train_time": seconds,
                  "data_wait": sum(self.waits)}
        times = f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(1, step):.2f}ms"
        if stats is not None:
            loss, norm = (stat.item() for stat in stats)  # here alone the loop waits for the device
            values |= {"train_loss": loss, "grad_norm": norm, "lr": cfg.lr * lr_factor(step - 1, cfg),
                       "tokens_per_sec": (tokens - self.last[0]) / (seconds - self.last[1])}
            self.records.print(f"step:{step}/{cfg.num_iterations} train_loss:{loss:.4f} {times}")
        if val_loss is not None:
            values["val_loss"], self.best_loss = val_loss, min(self.best_loss, val_loss)
            self.records.print(f"step:{step}/{cfg.num_iterations} val_loss:{val_loss:.4f} {times}")
        self.last = tokens, seconds
        self.records.point(values)
        self.records.summary |= self.totals(state, tokens, seconds, val_loss)
        losses = {name: values[name] for name in ("train_loss", "val_loss") if name in values}
        bad = [f"{name} is {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
        bad += ["no gradient reaches any parameter"] * (values.get("grad_norm") == 0)
        bad += ["gradients were not finite for too long"] * bool(state.bad_steps[1] > MAX_BAD_STEPS)
        if bad:
            raise Diverged(f"{' and '.join(bad)} at step {step}; lower LR or MUON_LR, or set GRAD_CLIP=1")

    def totals(self, state, tokens, seconds, val_loss):
        """The summary's figures so far."""
        speed = tokens / seconds if tokens else None
        figures = {
            "tokens": tokens, "train_time": seconds, "eval_time": self.seconds["eval"], "tokens_per_sec": speed,
            "compile_time": self.seconds["compile"] if self.cfg.compile == "1" else None,
            "step_avg": 1000 * seconds / state.step if tokens else None, "data_wait": sum(self.waits),
            "data_wait_p99": float(np.percentile(self.waits, 99)) if self.waits else None,
            "mfu": model_flops_utilization(self.cfg, self.device, speed * self.flops) if tokens else None,
            "peak_mem": peak_memory(self.device), "bad_steps": int(state.bad_steps[0])}
        if val_loss is not None:
            bits = val_loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None
            figures |= {"final_loss": val_loss, "best_loss": self.best_loss, "bits_per_byte": bits,
                        "ppl": math.exp(val_loss) if val_loss < 700 else None}
        return figures

def train(cfg, ranks, loaders, records):
    """The run. What it measures is in records.summary, kept current on the way."""
    train_loader, val_loader = loaders
    meter, state = Meter(cfg, ranks, records, train_loader.samples), State.build(cfg, ranks)
    if cfg.compile == "1":
        records.print("compiling blocks and loss: a minute or two the first time on a machine")
        with meter.off_the_clock("compile"):
            compile_model(state.model, cfg, meter.device)
        records.print(f"compile_time:{meter.seconds['compile']:.1f}s")
    torch.manual_seed(cfg.seed + 1 + ranks.rank)  # dropout differs between ranks
    share = cfg.batch_size // ranks.world_size
    slices = ((step * cfg.batch_size + ranks.rank * share, share) for step in range(cfg.num_iterations))

    def validate():
        with meter.off_the_clock("eval"):
            return evaluate(state.model, val_loader, cfg, ranks)

    if cfg.val_every:
        meter.point(state, None, validate())
    meter.start = meter.now()
    with contextlib.closing(train_loader.prefetch(slices, meter.device)) as batches:
        for inputs, targets, waited in batches:
            stats = train_step(state, cfg, inputs, targets)
            meter.waits.append(waited)
            validating = state.step == cfg.num_iterations or cfg.val_every and state.step % cfg.val_every == 0
            if validating or state.step == 1 or state.step % cfg.log_every == 0:
                meter.point(state, stats, validate() if validating else None)

def main(argv, env):
    """One run as the environment sets it; returns the exit code."""
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return 0
    ranks, records = Ranks.from_env(env), None
    try:
        if argv:
            raise ConfigError(f"{argv[0]} is no option; settings go before the command: LR=0.003 python train_gpt.py")
        asked = Config.from_env(env)
        cfg = resolve(asked)
        check_batch(cfg, ranks)
        plan, warnings = make_plan(cfg, ranks), cautions(env, cfg)
        if cfg.dry_run:
            print("".join(f"warning: {warning}\n" for warning in warnings), end="", file=sys.stderr)
            print("\n".join(f"{key}:{value}" for key, value in (dataclasses.asdict(cfg) | plan).items()))
            return 0
        loaders = preflight(cfg, ranks)
        data = fingerprint(loaders, Path(cfg.log_dir)) if ranks.rank == 0 else ""  # before others wait in the group
        records = Records(cfg, setup(cfg, ranks), writes=ranks.rank == 0)
        changes = " ".join(f"{name}={shlex.quote(str(int(value) if value is True or value is False else value))}"
                           for name, value in asked.changes().items() if name.lower() not in LABELS)
        facts = plan | {"device_name": device_name(ranks.device(cfg)), "changes": changes, "data_fingerprint": data}
        agree(functools.partial(records.open, facts, warnings))
        train(cfg, ranks, loaders, records)
        records.close("ok")
        dist.destroy_process_group()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        statuses = {torch.OutOfMemoryError: "oom", KeyboardInterrupt: "stopped"}
        status = getattr(error, "status", statuses.get(type(error), "crash"))
        reason = str(error) or "interrupted"
        if status == "crash":
            reason = f"{type(error).__name__}: {reason}".splitlines()[0][:300]
            traceback.print_exc()
        elif ranks.local_rank == 0 or records is not None and status in ("data", "oom"):  # others would say the same
            print(f"{status}: {reason}", file=sys.stderr)
        if records is not None and records.bar is not None:
            with open(records.log, "a") as log:
                log.write(traceback.format_exc())
            records.close(status, error=reason)
        elif ranks.rank == 0 and status in ("config", "data") and env.get("DRY_RUN", "0") in ("", "0"):
            refuse(env, error)
        if ranks.rank:
            time.sleep(1)  # torchrun ends all ranks as soon as one is gone, and rank 0 has to say why
        return EXIT_CODES[status]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
