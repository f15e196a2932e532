"""
Trains a GPT on token shards with Muon + AdamW; every setting is an environment variable, every run leaves a row.

    python train_gpt.py --help                                # the settings: default, choices, meaning
    DRY_RUN=1 python train_gpt.py                             # the plan: parameters, FLOPs, tokens (no GPU, no data)
    PRESET=quickstart python train_gpt.py                     # one process on whatever device is there
    torchrun --standalone --nproc_per_node=8 train_gpt.py     # the default: GPT-2 small on FineWeb-10B, 8 GPUs

Sections: Config, Layers, Gates, Mixers, FFNs, Model, Optimizers, Data, Checkpoints, Records, Training.
Shapes: B sequences, T positions, C channels (n_embd), H heads, D head size, F hidden units (d_ff), V vocabulary,
N = B * T tokens. A suffix gives the layout where it is not plain: q_BTHD.
"""

import os
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).read_text()  # before torch loads: the log must hold the text that runs, not a later edit

import concurrent.futures, contextlib, csv, ctypes, dataclasses, difflib, faulthandler, functools, glob, hashlib, io
import itertools, json, math, platform, re, resource, shlex, shutil, signal, subprocess, sys, time, traceback
from collections import deque
from datetime import datetime, timedelta, timezone

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim.adamw import adamw
from tqdm import tqdm

################ Config ################
ROOT = Path(__file__).resolve().parent
RUN_ID_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"
SYNONYMS = {"LEARNING_RATE": "LR", "OPTIMISER": "OPTIMIZER", "GRADIENT_CLIP": "GRAD_CLIP", "EPOCHS": "MAX_EPOCHS",
            "SEQ_LENGTH": "SEQUENCE_LENGTH", "BLOCK_SIZE": "SEQUENCE_LENGTH", "SEQ_LEN": "SEQUENCE_LENGTH",
            "MAX_ITERS": "NUM_ITERATIONS", "MAX_STEPS": "NUM_ITERATIONS", "NUM_STEPS": "NUM_ITERATIONS",
            "NUM_LAYERS": "N_LAYER", "NUM_HEADS": "N_HEAD", "N_LAYERS": "N_LAYER", "N_HEADS": "N_HEAD",
            "D_MODEL": "N_EMBD", "MODEL_DIM": "N_EMBD", "MICRO_BATCH_SIZE": "DEVICE_BATCH_SIZE",
            "WARMUP_STEPS": "WARMUP_ITERS", "COOLDOWN_ITERS": "WARMDOWN_ITERS"}

class ConfigError(ValueError):
    """A setting that cannot be used: says which, its value, the choices and what to do."""
    status = "config"

class DataError(ValueError):
    """Data that cannot be trained on: says which file, what was expected, what was found and what to do."""
    status = "data"

class Diverged(ArithmeticError):
    """The loss is no longer a finite number."""
    status = "diverged"

@dataclasses.dataclass(frozen=True)
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
    deterministic: bool = False  # the same bits on the same machine, also on cuda, at some cost of speed
    device: str = "auto"  # auto: cuda where there is one, else cpu
    dtype: str = "auto"  # of activations and matrix products; auto: bfloat16 on cuda, float32 on cpu
    compile: str = "auto"  # torch.compile of the blocks and the loss; auto: on cuda
    peak_tflops: float | None = None  # of one device, for mfu; blank: from the table of known devices
    # checkpoints and faults
    resume: str = "none"  # auto: from the newest valid checkpoint of RUN_ID, if there is one; or the path of one
    init_from: str = ""  # safetensors file, or folder with model.safetensors, that gives a new run its weights
    save_every: int = 500  # steps between checkpoints; 0: only when the run ends
    keep_last: int = 2  # checkpoints that stay; at least 2, since the newest may be damaged
    max_bad_steps: int = 20  # non-finite gradients in a row that are left out; more end the run as diverged
    hang_timeout: int = 300  # seconds without a step, after the first, until the ranks write their stacks and give up
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
        check_env(env, fields)
        settings = read_preset(env.get("PRESET") or cls.preset) | {name: env[name] for name in fields if env.get(name)}
        if unknown := [name for name in settings if name not in fields]:
            raise ConfigError(f"PRESET={settings['PRESET']}: its file sets {unknown[0]}, which is no setting; "
                              "see python train_gpt.py --help")
        return cls(**{fields[name].name: parse(fields[name], text) for name, text in settings.items() if text})

    def changes(self):
        """What differs from the defaults: {variable: value}."""
        return {name.upper(): value for name, value in vars(self).items() if value != getattr(Config, name)}

    def hash(self):
        """Eight hex digits that runs share when they train the same model the same way, whatever seed and labels."""
        kept = {name: value for name, value in vars(self).items() if name not in {*UNTRAINED, "seed"}}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]

LABELS = ("run_id", "stage", "variant", "note", "dry_run", "log_dir", "results_csv", "resume")
UNTRAINED = (*LABELS, "preset", "input_bin", "input_val_bin", "peak_tflops", "log_every", "save_every", "keep_last",
             "max_bad_steps", "hang_timeout")  # say nothing of what is trained and how
TILED = ("mixer", "ffn")
BOUNDS = {  # inclusive
    "batch_size device_batch_size sequence_length num_iterations n_layer n_head n_embd log_every": (1, 2**31),
    "val_every save_every max_epochs d_ff warmup_iters warmdown_iters seed max_bad_steps": (0, 2**31),
    "keep_last": (2, 2**31), "hang_timeout": (1, 2**31), "vocab_size": (0, 65536), "peak_tflops": (1e-6, 1e6),
    "lr embed_lr head_lr muon_lr": (1e-12, 1e30), "beta1 beta2 muon_momentum": (0, 0.9999999), "dropout": (0, 0.99),
    "val_tokens": (1, 2**40), "weight_decay": (0, 1e3), "grad_clip": (0, 1e6), "min_lr_frac": (0, 1)}

def check_env(env, fields):
    """Raises ConfigError for a variable that is one of ours misspelled, and for a setting that shows a secret."""
    by_letters = {name.replace("_", ""): name for name in fields}
    for name in env:
        if (ours := SYNONYMS.get(name) or by_letters.get(name.replace("_", ""), name)) != name:
            raise ConfigError(f"{name} is no setting; the name here is {ours} (unset {name})")
    for secret, value in secrets_of(env).items():
        if holders := [name for name in fields if value in env.get(name, "")]:
            raise ConfigError(f"{holders[0]} holds the value of {secret}, which no record may show; take it out")

def check(cfg):
    """Raises ConfigError for a value that no run can use."""
    for name, choices in axes().items():
        for value in getattr(cfg, name).split(",") if name in TILED else [getattr(cfg, name)]:
            if value not in choices:
                raise ConfigError(f"{name.upper()}={value}: choose one of {', '.join(choices)}")
    for names, (low, high) in BOUNDS.items():
        for name in names.split():
            if (value := getattr(cfg, name)) is not None and not low <= value <= high:
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
    if cfg.resume == "auto" and not cfg.run_id:
        found.append("RESUME=auto goes on with a RUN_ID; without one, every start is a new run")
    if cfg.lr_schedule == "trapezoid" and cfg.warmdown_iters > cfg.num_iterations:
        found.append(f"WARMDOWN_ITERS={cfg.warmdown_iters} exceeds NUM_ITERATIONS={cfg.num_iterations}: the learning "
                     f"rate starts at {lr_factor(0, cfg):.0%} of its peak")
    return found

def secrets_of(env):
    """Variables, none of them ours, whose values no file and no output may show: {name: value}."""
    return {name: value for name, value in env.items() if name.endswith(("_TOKEN", "_KEY", "_SECRET", "PASSWORD"))
            and len(value) >= 8 and name.lower() not in Config.__dataclass_fields__}

def redact(text, env):
    """text with the values of secret variables, also as Python and JSON spell them, replaced by their names."""
    hidden = {spelling: name for name, value in secrets_of(env).items()
              for spelling in (value, *(spell(value)[1:-1] for spell in (repr, ascii, json.dumps)))}
    for spelling in sorted(hidden, key=len, reverse=True):  # one may begin like another
        text = text.replace(spelling, f"[{hidden[spelling]}]")
    return text

def parse(field, text):
    """The value of a setting from its text. Raises ConfigError."""
    try:
        if field.type is bool:
            return {"0": False, "1": True, "false": False, "true": True}[text.lower()]
        return field.type(text) if field.type in (int, str) else float(text)
    except (ValueError, KeyError):
        wanted = {bool: "0 or 1", int: "a whole number"}.get(field.type, "a number")
        raise ConfigError(f"{field.name.upper()}={text!r}: must be {wanted}") from None

def read_preset(name):
    """Settings of experiments/presets/<name>.env: {variable: text}. Raises ConfigError."""
    files = {path.stem: path for path in sorted((ROOT / "experiments" / "presets").glob("*.env"))}
    if name not in files:
        raise ConfigError(f"PRESET={name}: choose one of {', '.join(files)}")
    lines = [line for line in map(str.strip, files[name].read_text().splitlines()) if line and line[0] != "#"]
    if wrong := [line for line in lines if "=" not in line]:
        raise ConfigError(f"{files[name]}: {wrong[0]!r} is no line of the form KEY=value")
    return dict(line.split("=", 1) for line in lines) | {"PRESET": name}

def nearest_multiples(value, factor):
    """'6 or 12': the multiples of `factor` next to `value`, at least one `factor`."""
    below = value // factor * factor
    return " or ".join(str(n) for n in (below, below + factor) if n)

def help_text():
    """The table of settings, read from the source: variable, default, choices and the comment of its line."""
    comments = dict(re.findall(r"^    (\w+): [^=]+ = .*?  # (.*)$", SOURCE, re.M))
    lines = [__doc__.strip(), "", "Settings (environment variables; a blank one counts as not set):"]
    for field in dataclasses.fields(Config):
        value = int(field.default) if field.type is bool else "blank" if field.default in (None, "") else field.default
        choices = f"[{'|'.join(axes()[field.name])}] " if field.name in axes() else ""
        lines.append(f"  {field.name.upper():18} {value!s:38} {choices}{comments[field.name]}")
    presets = sorted(path.stem for path in (ROOT / "experiments" / "presets").glob("*.env"))
    return "\n".join([*lines, f"Presets: {', '.join(presets)}"])

################ Layers ################
def normal_(w, std):
    """Fills w with normal numbers, but on the meta device, where it would load seconds of code to do nothing."""
    return w if w.is_meta else nn.init.normal_(w, std=std)

INITS = {  # how a weight (..., rows, fan in) starts: (cfg, weight, whether it ends a residual branch or is the head)
    "zero_proj": lambda cfg, w, ends: (nn.init.zeros_(w) if ends or w.is_meta else  # uniform within 1 / sqrt(fan in)
                                       nn.init.uniform_(w, -w.size(-1)**-0.5, w.size(-1)**-0.5)),
    "gpt2": lambda cfg, w, ends: normal_(w, 0.02 / (2 * cfg.n_layer)**0.5 if ends else 0.02)}

CPUINFO = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
# On AMD's AVX-512 processors MKL, torch's default, runs AVX2 code: oneDNN multiplies float32 matrices twice as fast.
ONEDNN = "AuthenticAMD" in CPUINFO and torch.backends.cpu.get_cpu_capability() == "AVX512"

def product(a, b):
    """a (..., k) @ b (n, k).T by the faster of two CPU libraries; torch.compile lowers oneDNN's only for constant b."""
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
    """(..., fan_in) -> (..., parts * fan_out) in the input's dtype: one product, yet Muon takes each part by itself."""
    def __init__(self, cfg, fan_in, fan_out, parts=1, ends=False, bias=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*[parts] * (parts > 1), fan_out, fan_in))
        self.bias = nn.Parameter(torch.zeros(parts * fan_out)) if (cfg.bias if bias is None else bias) else None
        INITS[cfg.init](cfg, self.weight, ends)
        self.flops_per_token = 6 * self.weight.numel()

    def forward(self, x):
        weight = self.weight.flatten(0, -2).type_as(x)
        y = OneDNNLinear.apply(x, weight) if ONEDNN and x.is_cpu else F.linear(x, weight)
        return y if self.bias is None else y + self.bias.type_as(x)

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

class RMSNorm(nn.Identity):
    """Root mean square norm without gains (arXiv 1910.07467): (..., C) -> same."""
    def forward(self, x):
        return RMSNormFunction.apply(x)

class LayerNorm(nn.LayerNorm):
    """Layer norm in its input's dtype with a gain, and a bias if cfg.bias (arXiv 1607.06450): (..., C) -> same."""
    def __init__(self, cfg):
        super().__init__(cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        bias = None if self.bias is None else self.bias.type_as(x)
        return F.layer_norm(x, self.weight.shape, self.weight.type_as(x), bias)

NORMS = {"rms": RMSNorm, "layer": LayerNorm}

class Rotary(nn.Module):
    """Rotary embedding, base 10000, halves paired as in GPT-NeoX, arXiv 2104.09864: (B, T, ..., D) -> same."""
    def __init__(self, cfg):
        super().__init__()
        half = cfg.n_embd // cfg.n_head // 2
        with torch.device("cpu"):  # on the meta device, these operators would load seconds of code
            angles = torch.outer(torch.arange(cfg.sequence_length), 10000 ** -(torch.arange(half) / half)).repeat(1, 2)
            signs = torch.tensor([1.0, -1.0]).repeat_interleave(half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin() * signs, persistent=False)

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

################ Gates #################
GATE_ACTS = {"sigmoid": torch.sigmoid, "ns_sigmoid": lambda x: 0.5 + 0.5 * torch.sigmoid(x)}
GATE_POSITIONS = ("sdpa", "value")

class NoGate(nn.Identity):
    """Leaves y (B, T, H, D) as it is. Every gate takes y and the normed hidden state x (B, T, C), returns gated y."""
    def forward(self, y, x):
        return y

class ElementwiseGate(nn.Module):
    """One gate for each channel of each head, computed from x."""
    def __init__(self, cfg, gates=None):
        super().__init__()
        self.act, self.score = GATE_ACTS[cfg.gateact], Linear(cfg, cfg.n_embd, gates or cfg.n_embd, bias=False)

    def forward(self, y, x):
        return y * self.act(self.score(x)).view(*y.shape[:3], -1)

class HeadwiseGate(ElementwiseGate):
    """One gate for each head, computed from x."""
    optim = "adamw"  # (heads, n_embd) is too flat to be orthogonalised
    def __init__(self, cfg):
        super().__init__(cfg, cfg.n_head)

class ConstGate(nn.Module):
    """One learned gate for each channel of each head, the same for every input; starts at act(0)."""
    optim = "adamw"
    def __init__(self, cfg):
        super().__init__()
        self.act, self.score = GATE_ACTS[cfg.gateact], nn.Parameter(torch.zeros(cfg.n_head, cfg.n_embd // cfg.n_head))

    def forward(self, y, x):
        return y * self.act(self.score).type_as(y)

GATES = {"none": NoGate, "headwise": HeadwiseGate, "elementwise": ElementwiseGate, "const": ConstGate}

################ Mixers ################
class CausalSelfAttention(nn.Module):
    """Multi-head causal attention with optional QK norm and gate: (B, T, C) -> same."""
    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.dropout = cfg.n_head, cfg.dropout
        self.flops_per_token = 12 * cfg.n_embd * cfg.sequence_length  # scores and values, both ways, no causal halving
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
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(self.gate_output(y.transpose(1, 2), x).reshape(B, T, C))

MIXERS = {"attention": CausalSelfAttention}

################# FFNs #################
class MLP(nn.Module):
    """Two-layer FFN, the base of the kinds below: (..., C) -> same."""
    parts = 1  # matrices that read the input
    def __init__(self, cfg):
        super().__init__()
        width = cfg.d_ff or (4 * cfg.n_embd if self.parts == 1 else 64 * math.ceil(8 * cfg.n_embd / 3 / 64))
        self.fc = Linear(cfg, cfg.n_embd, width, parts=self.parts)
        self.proj = Linear(cfg, width, cfg.n_embd, ends=True)

    def forward(self, x):
        return self.proj(self.act(self.fc(x)))

class ReLU2(MLP):
    def act(self, h):
        positive = F.relu(h)
        return positive * positive  # several times faster on a CPU than a power, whose gradient is another

class GELU(MLP):
    act = staticmethod(functools.partial(F.gelu, approximate="tanh"))

class SwiGLU(MLP):
    parts = 2
    def act(self, h):
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up

FFNS = {"relu2": ReLU2, "gelu": GELU, "swiglu": SwiGLU}

################ Model #################
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
    """Decoder-only transformer, activations in `dtype`: tokens (B, T) -> float32 logits (B, T, V), or mean loss ()."""
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
        return 6 * self.embed.numel() + sum(part.flops_per_token for part in parts)

LOSS_CHUNK = {"cuda": 2**28, "cpu": 2**23}  # logits at a time: a large product on a GPU, the last-level cache on a CPU

def loss_chunk(x, head, targets):
    """Summed loss () of x (n, C) against targets (n,), and its gradient softmax - onehot for the logits (n, V)."""
    logp = F.log_softmax(product(x, head).float(), dim=-1)
    target_logp = logp.gather(-1, targets[:, None])
    grad = logp.exp_().type_as(x)
    return -target_logp.sum(), grad.scatter_(-1, targets[:, None], target_logp.expm1().type_as(x))

class LinearCrossEntropy(torch.autograd.Function):
    """Mean loss () of x (N, C), head (V, C), targets (N,); gradients by chunk as in Liger-Kernel, arXiv 2410.10989."""
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

############## Optimizers ##############
MUON_SCALES = {  # factor on the orthogonalised update of a matrix (rows, cols)
    "unit": lambda rows, cols: max(rows, cols)**0.5,  # unit mean square; modded-nanogpt, record of 2024-10-14
    "original": lambda rows, cols: max(1, rows / cols)**0.5,  # torch.optim.Muon
    "match_rms_adamw": lambda rows, cols: 0.2 * max(rows, cols)**0.5}  # Moonlight, arXiv 2502.16982; torch.optim.Muon

def zeropower_via_newtonschulz5(G, dtype=torch.bfloat16, steps=5, eps=1e-7):
    """Matrices (..., m, n) made nearly orthogonal, singular values 0.7 to 1.2; in bfloat16 torch's Muon bit for bit."""
    a, b, c = 3.4445, -4.7750, 2.0315  # quintic, steepest slope at zero: kellerjordan.github.io/posts/muon
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
        self.cfg, self.base_lr, self.world, self.rank, self.stacks = cfg, lr, ranks.world_size, ranks.rank, []
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
            for p, u in zip(stack["params"], all_gather(update, self.world).split(stack["sizes"])):
                if self.cfg.weight_decay:
                    p.mul_(decay)
                p.add_(u.view_as(p), alpha=-lr * scale)
            stack["grad"] = None  # its memory is for the next backward pass

    def tensors(self, names):
        """For checkpoints: {key: (momentum of a matrix, "own")}, since one rank alone holds it."""
        found = {}
        for stack in self.stacks:
            keys = [f"muon.{names[p]}.{i}" for p, size in zip(stack["params"], stack["sizes"]) for i in range(size)]
            first = self.rank * len(stack["momentum"])
            found |= {key: (momentum, "own") for key, momentum in zip(keys[first:], stack["momentum"])}
        return found

class AdamW:
    """AdamW (arXiv 1711.05101) as torch computes it, fused, sharded over ranks.

    A large parameter whose size the ranks divide is updated in slices: its gradient is reduce-scattered, each rank
    holds the moments of its slice, and the slices are all-gathered. Any other is updated whole on every rank."""
    def __init__(self, params, cfg, lr, ranks, weight_decay=0.0):
        self.cfg, self.base_lr, self.world, self.weight_decay = cfg, lr, ranks.world_size, weight_decay
        self.sliced = [p for p in params if p.numel() >= 2**16 and p.numel() % self.world == 0]
        self.whole = [p for p in params if p.numel() < 2**16 or p.numel() % self.world]
        self.own = [p.data.view(-1).chunk(self.world)[ranks.rank] for p in self.sliced] + [p.data for p in self.whole]
        self.exp_avg, self.exp_avg_sq = ([torch.zeros_like(p) for p in self.own] for _ in range(2))
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

    def tensors(self, names):
        """For checkpoints: {key: (flat moment, "slice" or, where every rank has all of it, "copy")}."""
        found = {}
        for i, p in enumerate(self.sliced + self.whole):
            kind = "slice" if i < len(self.sliced) else "copy"
            found[f"adamw.{names[p]}.exp_avg"] = self.exp_avg[i].view(-1), kind
            found[f"adamw.{names[p]}.exp_avg_sq"] = self.exp_avg_sq[i].view(-1), kind
            found[f"adamw.{names[p]}.step"] = self.steps[i], "copy"
        return found

OPTIMIZERS = {  # of the matrices inside the blocks
    "muon": lambda params, cfg, ranks: Muon(params, cfg, 0.1 * cfg.lr if cfg.muon_lr is None else cfg.muon_lr, ranks),
    "adamw": lambda params, cfg, ranks: AdamW(params, cfg, cfg.lr, ranks, cfg.weight_decay)}

def split_params(model):
    """{"matrices", "embed", "head", "vectors": [Parameter]}; matrices of a class with optim = "adamw" are vectors."""
    opted_out = {id(p) for m in model.modules() if getattr(m, "optim", "") == "adamw" for p in m.parameters()}
    matrices = [p for p in model.blocks.parameters() if p.ndim >= 2 and id(p) not in opted_out]
    groups = {"matrices": matrices, "embed": [model.embed], "head": [] if model.head is None else [model.head]}
    taken = {id(p) for group in groups.values() for p in group}
    groups["vectors"] = [p for p in model.parameters() if id(p) not in taken]
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

def cosine(step, cfg):
    progress = (step - cfg.warmup_iters) / max(1, cfg.num_iterations - cfg.warmup_iters)
    return cfg.min_lr_frac + (1 - cfg.min_lr_frac) * 0.5 * (1 + math.cos(math.pi * progress))

SCHEDULES = {
    "trapezoid": lambda step, cfg: min(1.0, (cfg.num_iterations - step) / max(1, cfg.warmdown_iters)),
    "cosine": cosine}

def lr_factor(step, cfg):
    """Fraction of the peak learning rate for the update that follows `step` updates."""
    return (step + 1) / cfg.warmup_iters if step < cfg.warmup_iters else SCHEDULES[cfg.lr_schedule](step, cfg)

class LossScale:
    """Factor on a float16 loss (arXiv 1710.03740), on the device: halved on overflow, doubled after 2000 good steps."""
    def __init__(self, dtype, device):
        self.active = dtype == torch.float16
        self.value = torch.tensor(2.0**16 if self.active else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, skip):
        if self.active:
            torch._amp_update_scale_(self.value, self.good_steps, skip, 2.0, 0.5, 2000)

################# Data #################
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
    """Samples of T + 1 tokens, each from i * T of a shard, in a glob's order, epoch after epoch. Raises DataError."""
    def __init__(self, pattern, cfg, shuffle=False):
        self.files = sorted(glob.glob(pattern))
        if not self.files:
            shards = math.ceil(cfg.num_iterations * cfg.batch_size * cfg.sequence_length / 1e8)  # as FineWeb's are
            raise DataError(f"no file matches {pattern} (looked from {os.getcwd()}); {how_to_get(pattern, shards)}")
        self.shards = [load_shard(file) for file in self.files]
        self.length, self.vocab_size, self.seed, self.shuffle = cfg.sequence_length, cfg.vocab_size, cfg.seed, shuffle
        self.ends = np.cumsum([(len(shard) - 1) // self.length for shard in self.shards])
        self.samples, self.tokens = int(self.ends[-1]), sum(len(shard) for shard in self.shards)
        self.order = functools.lru_cache(1)(
            lambda epoch: np.random.default_rng((self.seed, int(epoch))).permutation(self.samples))

    def read(self, first, count):
        """Samples first .. first + count - 1 of the global index: (count, T + 1) int64. Raises DataError."""
        which, index = self.place(first, count)
        batch = np.empty((count, self.length + 1), dtype=np.int64)
        for shard in np.unique(which):
            windows = np.lib.stride_tricks.sliding_window_view(self.shards[shard], self.length + 1)[::self.length]
            batch[which == shard] = windows[index[which == shard]]
        if batch.max() >= self.vocab_size:
            self.check_tokens(np.unique(which))
        return batch

    def place(self, first, count):
        """Where these samples of the global index are: (number of the shard, index within it), (count,) each."""
        epochs, index = np.divmod(np.arange(first, first + count), self.samples)
        if self.shuffle:
            index = np.concatenate([self.order(epoch)[index[epochs == epoch]] for epoch in np.unique(epochs)])
        which = np.searchsorted(self.ends, index, side="right")
        return which, index - np.concatenate(([0], self.ends))[which]

    def require(self, name, value, samples):
        """Raises DataError where there are fewer samples than the setting `name` needs."""
        if self.samples < (samples := max(1, samples)):
            shards = math.ceil(len(self.shards) * samples / max(1, self.samples))
            more = f", or set MAX_EPOCHS=0 to repeat the data, or get more; {how_to_get(self.files[0], shards)}"
            more *= name == "NUM_ITERATIONS"
            raise DataError(f"{name}={value} needs {samples:,} samples of {self.length} tokens, but {self.files[0]} "
                            f"and what else matches has {self.samples:,}; lower {name}{more}")

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
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
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
    cache = folder / ".shard_hashes.json"
    known, hashes = {}, []
    with contextlib.suppress(OSError, ValueError):  # no cache yet, or a damaged one
        known = json.loads(cache.read_text())
    for file in itertools.chain.from_iterable(loader.files for loader in loaders):
        stat = os.stat(file)
        key = f"{os.path.realpath(file)}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in known:
            known[key] = sha256sum(Path(file))[:64]
        hashes.append((os.path.basename(file), known[key]))
    with contextlib.suppress(OSError):  # Records.open says what is wrong with the folder
        write_whole(cache, json.dumps(known))
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

############# Checkpoints ##############
MAX_FAILED_SAVES = 3  # in a row
SAVE_STALL = 1.0  # seconds that the loop waits for a checkpoint to be written; a slower one is written while it goes on
SCHEDULED = ("num_iterations", "lr_schedule", "warmup_iters", "warmdown_iters", "min_lr_frac")
RESUMABLE = (*UNTRAINED, "device_batch_size", "val_every", "val_tokens", "max_epochs", "device", "compile",
             "deterministic", "init_from")  # a run may go on with other values: what it learns does not change

def sha256sum(path):
    """The line that `sha256sum` prints for a file."""
    with open(path, "rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n"

def defect(folder):
    """What is wrong with a checkpoint; "" where every file is what its list of hashes says."""
    try:
        lines = (folder / "SHA256SUMS").read_bytes().decode().splitlines(keepends=True)
        wrong = [line[66:-1] for line in lines if line != sha256sum(folder / line[66:-1])]
        if wrong or folder.is_symlink() or not {".metadata", "run.json"} <= {line[66:-1] for line in lines}:
            return f"{(wrong or ['SHA256SUMS'])[0]} is not what was written there"
        step = json.loads((folder / "run.json").read_text())["step"]
        return "" if step == int(folder.name[5:]) else f"it is that of step {step}"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"

def step_folders(folder):
    """The checkpoints of a run, {step: path} from old to new; whatever else lies there is not ours."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name) and path.is_dir()]
    return dict(sorted((int(path.name[5:]), path) for path in found))

def set_aside(path, why):
    """Renames a checkpoint that must not be resumed but is not ours to delete."""
    names = (path.with_name(f"{path.name}.{why}{i or ''}") for i in itertools.count())
    path.rename(next(name for name in names if not name.exists()))

def find_checkpoint(cfg, folder, restarted, warnings):
    """The checkpoint that a run of cfg goes on from, or None. Damaged ones are set aside. Raises ConfigError."""
    for path in reversed(step_folders(folder).values()) if restarted or cfg.resume == "auto" else ():
        if not (problem := defect(path)):
            return path
        warnings.append(f"{path} is set aside: {problem}")
        set_aside(path, "corrupt")
    if cfg.resume in ("none", "auto"):
        return None
    path, home = Path(cfg.resume), Path(cfg.log_dir).resolve()
    inside = home in path.resolve().parents
    there = [*step_folders(path.parent).values(), *step_folders(path).values()] if inside else []
    problem = defect(path) if path in there else "is no checkpoint"
    if path.name.startswith("step_") and not inside:
        problem = f"lies outside LOG_DIR={cfg.log_dir}; INIT_FROM takes weights from elsewhere, as safetensors"
    if problem:
        raise ConfigError(f"RESUME={path}: {problem}; choose auto, none or one of "
                          f"{', '.join(map(str, there)) or f'{cfg.log_dir}/<run_id>/step_<number>'}")
    return path

def changed_settings(saved, cfg, facts):
    """[] or a sentence on what differs from a checkpoint's run.json. Raises ConfigError where it is another run."""
    before = {name: saved["config"].get(name, getattr(Config, name)) for name in vars(cfg)}
    changed = {key: f"{key.upper()} {before[key]} -> {now}" for key, now in vars(cfg).items() if now != before[key]}
    changed |= {name: f"{name} {str(saved[name])[:12]} -> {str(facts[name])[:12]}"
                for name in ("world_size", "data_fingerprint") if saved[name] != facts[name]}
    past, steps = Config(**before), range(saved["step"])
    same_past = all(lr_factor(step, past) == lr_factor(step, cfg) for step in steps)
    harmless = {*RESUMABLE, "world_size", *SCHEDULED * same_past}
    if refused := [text for name, text in changed.items() if name not in harmless]:
        raise ConfigError(f"RUN_ID={saved['config']['run_id']} came to step {saved['step']} with other settings: "
                          f"{', '.join(refused)}" + ", which changes learning rates of the past" * (not same_past) +
                          "; set them back, or start anew, with INIT_FROM where you want the weights of a finished run")
    told = [text for name, text in changed.items() if name not in LABELS]
    return [f"goes on with other settings: {', '.join(told)}"] * bool(told)

def tally(ranks):
    """{key: [dtype, numbers, sum of bits]} of all ranks: slices add up, copies must be equal, else a RuntimeError."""
    total = {}
    for rank, held in enumerate(ranks):
        for key, (kind, *described) in held.items():
            if kind == "slice" and key in total:
                described[1:] = [a + b for a, b in zip(described[1:], total[key][1:])]
            elif total.get(key, described) != described:
                raise RuntimeError(f"the ranks have come apart: {key} of rank {rank} is not that of ranks before it")
            total[key] = described
    return total

def cpu_copy(tensors, buffers, mesh):
    """{key: (tensor, kind)} copied into CPU buffers, kept for the next time, and {key: tensor}, slices as DTensor."""
    from torch.distributed.tensor import DTensor, Shard
    for key, (tensor, _) in tensors.items():
        if key not in buffers:
            buffers[key] = torch.empty_like(tensor, device="cpu")
        buffers[key].copy_(tensor)
    held = {key: (buffers[key], kind) for key, (_, kind) in tensors.items()}
    return held, {key: DTensor.from_local(copy, mesh, [Shard(0)]) if kind == "slice" else copy
                  for key, (copy, kind) in held.items()}

class Checkpoints:
    """Saves State in the folder of a run and restores it, on any number of ranks. Every rank calls every method.

    Each rank writes what it alone holds, and its share of what all hold, through torch.distributed.checkpoint, from
    copies and in a thread, so that training can go on meanwhile. A folder gets its name when it is whole."""
    def __init__(self, cfg, ranks, records):
        self.cfg, self.rank, self.world, self.records = cfg, ranks.rank, ranks.world_size, records
        self.group = dist.new_group(backend="gloo")  # its own: the thread must not meet the collectives of the loop
        self.mesh = dist.init_device_mesh("cpu", (self.world,))
        self.pool, self.pending, self.buffers = concurrent.futures.ThreadPoolExecutor(1), None, {}
        self.step, self.failures = -1, 0  # the last step saved or loaded; failed saves in a row

    def gather(self, tensors):
        """The tally of {key: (tensor, kind)} over the ranks."""
        held = {key: (kind, str(tensor.dtype), tensor.numel(), tensor.reshape(-1).view(torch.int32).sum().item())
                for key, (tensor, kind) in tensors.items()}
        dist.all_gather_object(ranks := [None] * self.world, held, self.group)
        return tally(ranks)

    def save(self, state, facts):
        """Writes what a run needs to go on from here, and `facts` (JSON); after SAVE_STALL the loop goes on anyway."""
        self.wait()
        if state.step == self.step:
            return
        tensors, turns = state.tensors(), itertools.cycle(range(self.world))
        if self.world > 1:
            self.gather({key: held for key, held in tensors.items() if held[1] == "copy"})
        mine = {key: held for key, held in tensors.items() if held[1] != "copy" or next(turns) == self.rank}
        held, copies = cpu_copy(mine, self.buffers, self.mesh)
        facts |= {"step": state.step, "samples": state.step * self.cfg.batch_size,
                  "config": vars(self.cfg) | {"run_id": self.records.folder.name}}
        facts = json.loads(json.dumps(facts))  # the loop goes on to change some of it
        self.step, self.pending = state.step, self.pool.submit(self.write, copies, held, facts)
        concurrent.futures.wait([self.pending], SAVE_STALL)

    def write(self, copies, held, facts):
        """Writes and publishes one checkpoint; returns what went wrong, the same on every rank, or ""."""
        import torch.distributed.checkpoint as dcp
        began, problem, final = time.perf_counter(), [""], self.records.folder / f"step_{facts['step']:06d}"
        temporary = final.with_name(f".tmp_{final.name}")
        try:
            facts["entries"] = self.gather(held)
            dcp.save(copies, storage_writer=dcp.FileSystemWriter(temporary), process_group=self.group)
            if self.rank == 0:
                self.publish(temporary, final, facts)
                self.records.print(f"checkpoint:{final} write_time:{time.perf_counter() - began:.2f}s")
        except (Exception, dcp.CheckpointException) as error:  # the latter derives from BaseException
            failures = [wrapped[0] for wrapped in getattr(error, "failures", {}).values()]
            free = shutil.disk_usage(self.records.folder).free / 1e6
            problem = [f"{' '.join(str((failures or [error])[0]).split())[:200]} ({free:,.0f} MB free in LOG_DIR)"]
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                self.records.print(f"warning: no checkpoint at step {facts['step']}: {problem[0]}")
        dist.broadcast_object_list(problem, group=self.group)
        return problem[0]

    def publish(self, temporary, final, facts):
        """Lists the hashes of all files, brings everything to the disk, gives the folder its name, and prunes."""
        if missing := {f"__{rank}_0.distcp" for rank in range(self.world)} - {p.name for p in temporary.iterdir()}:
            raise OSError(f"{sorted(missing)[0]} is not there: LOG_DIR has to be one folder for all machines")
        write_whole(temporary / "run.json", json.dumps(facts))
        write_whole(temporary / "SHA256SUMS", "".join(map(sha256sum, sorted(temporary.iterdir()))))
        sync(temporary)
        os.replace(temporary, final)
        with contextlib.suppress(OSError):  # what has its name is whole
            sync(final.parent)
        for path in [*step_folders(final.parent).values()][:-self.cfg.keep_last]:
            try:  # half deleted, it must not look like a checkpoint
                shutil.rmtree(path.rename(path.with_name(f".tmp_{path.name}")))
            except OSError as error:
                self.records.print(f"warning: {path} stays: {error}")

    def wait(self, last=False):
        """Until the save under way is done. Raises OSError where too many have failed in a row, or the last one has."""
        if self.pending:
            problem, self.pending = self.pending.result(), None
            self.step, self.failures = (-1, self.failures + 1) if problem else (self.step, 0)
            if problem and (last or self.failures == MAX_FAILED_SAVES):
                raise OSError(f"{'the last checkpoint' if last else f'{self.failures} checkpoints in a row'} could not "
                              f"be written: {problem}; make room, and RESUME=auto goes on from the one before")

    def load(self, state, path):
        """Restores State; returns the facts saved with it. Raises ConfigError, RuntimeError where a tensor is wrong."""
        import torch.distributed.checkpoint as dcp
        tensors, facts = state.tensors(), json.loads((path / "run.json").read_text())
        held, copies = cpu_copy(tensors, {}, self.mesh)
        try:
            dcp.load(copies, storage_reader=dcp.FileSystemReader(path), process_group=self.group)
        except dcp.CheckpointException as error:
            raise ConfigError(f"RESUME: {path} does not fit this train_gpt.py: {error}") from None
        for key, (tensor, _) in tensors.items():
            tensor.copy_(held[key][0])
        found, saved = self.gather(tensors), facts["entries"]
        if wrong := [key for key in {**found, **saved} if found.get(key) != saved.get(key)]:
            raise RuntimeError(f"{path}: {wrong[0]} did not come back as it was saved")
        state.step = facts["step"]
        self.step = state.step if path.parent.resolve() == self.records.folder.resolve() else -1
        return facts

def export_weights(model, cfg, folder):
    """Writes model.safetensors, config.json and, where the dataset has one, tokenizer.json."""
    from safetensors.torch import save  # save_file would make a file that only its owner can read
    (temporary := folder / ".tmp_model.safetensors").write_bytes(save(model.state_dict(), {"format": "pt"}))
    sync(temporary)
    os.replace(temporary, folder / "model.safetensors")
    write_whole(folder / "config.json", json.dumps(vars(cfg), indent=1) + "\n")
    if (tokenizer := Path(cfg.input_bin).parent / "tokenizer.json").is_file():
        shutil.copy(tokenizer, folder)

def import_weights(model, path):
    """Fills model from a safetensors file, or a folder with model.safetensors. Raises ConfigError."""
    import safetensors.torch
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else path
    try:
        model.load_state_dict(safetensors.torch.load_file(file), assign=model.embed.is_meta)  # there it is a check
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise ConfigError(f"INIT_FROM={path}: expected a safetensors file (no .pt, no checkpoint) of a model of this "
                          f"shape, or the folder of a finished run; {reason}") from None

############### Records ################
CURVE = "step tokens epoch train_loss val_loss lr grad_norm train_time tokens_per_sec data_wait".split()
PEAK_TFLOPS = {  # dense bfloat16 by the name CUDA gives the device, the more particular name first; makers' data sheets
    "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H200 NVL": 836, "H200": 989, "GB200": 2500, "B200": 2250,
    "A100": 312, "L40S": 362, "RTX 4090": 165.2, "RTX 5090": 209.5, "RTX 3090": 71}

def sync(path):
    """Brings a file, or the names in a folder, to the disk."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)

def write_whole(path, text):
    """Replaces a file at one stroke, so that no reader and no crash ever sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def update_results(path, rows):
    """Merges rows into the results table, one per run_id, under a lock: columns are united, truth values 0 and 1."""
    path = Path(path).resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        table = {}
        if path.is_file():
            try:
                with open(path, newline="") as file:
                    table = {row["run_id"]: row for row in csv.DictReader(file)}
            except (KeyError, UnicodeDecodeError, csv.Error):
                raise ConfigError(f"RESULTS_CSV={path}: expected a table with a column run_id; mend it, or "
                                  "name another") from None
        for row in rows:
            cells = {k: "" if v is None else int(v) if isinstance(v, bool) else v for k, v in row.items()}
            table[row["run_id"]] = table.get(row["run_id"], {}) | cells
        columns = dict.fromkeys(column for row in table.values() for column in row)
        text = ""
        for cells in [columns, *([row.get(column) for column in columns] for row in table.values())]:
            csv.writer(line := io.StringIO(), lineterminator="\r\n").writerow(cells)  # 3.11 quotes \r only for this end
            text += line.getvalue().removesuffix("\r\n") + "\n"
        write_whole(path, text)

def output_of(*command):
    """What a command prints; "" where it fails or is not there."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return ""

def git_state():
    """(commit, whether tracked files other than records differ from it); blanks outside a repository."""
    commit = output_of("git", "-C", ROOT, "rev-parse", "--verify", "--quiet", "HEAD")
    changed = output_of("git", "-C", ROOT, "status", "--porcelain", "-uno", "--", ".", ":!experiments/*.csv", ":!logs")
    return commit, bool(changed) if commit else ""

def machine_text():
    """Versions and the device, as the log shows them: nvidia-smi where it runs, else the CPU's name."""
    device = output_of("nvidia-smi") or f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
    return (f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
            f"numpy {np.__version__}\n{device}")

def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"model name\s*: (.+)", CPUINFO)
    return f"cpu: {names[0] if names else platform.processor() or platform.machine()}"

def utc_now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

class Records:
    """What a run leaves: log, curve, summary, row. Rank 0 writes them; elsewhere no method writes."""
    def __init__(self, cfg, run_id, rank=0):
        self.cfg, self.rank, self.bar, self.lost, self.results_csv = cfg, rank, None, "", cfg.results_csv
        self.live = False  # set once the run_id is claimed
        self.log, self.curve, self.json = (Path(cfg.log_dir) / f"{run_id}.{kind}" for kind in ("txt", "csv", "json"))
        self.folder = Path(cfg.log_dir) / run_id  # checkpoints, the stop file, stacks of ranks that hang
        self.lock = FileLock(self.folder / "live.lock")
        self.summary = dataclasses.asdict(cfg) | {"run_id": run_id}

    def open(self, facts, warnings, restarted=False):
        """Claims the run_id, starts or continues its files; returns the checkpoint to resume. Raises ConfigError."""
        self.summary |= facts
        if self.rank:
            return None
        claim(self)
        warnings, step = [*warnings], -1
        if path := find_checkpoint(self.cfg, self.folder, restarted, warnings):
            saved = json.loads((path / "run.json").read_text())
            step, warnings = saved["step"], warnings + changed_settings(saved, self.cfg, facts)
        goes_on = restarted or self.cfg.resume == "auto" or path and path.parent.resolve() == self.folder.resolve()
        if goes_on and not path and (self.folder / "model.safetensors").exists():
            raise ConfigError(f"RUN_ID={self.folder.name}: the run has ended and no valid checkpoint is left to go on "
                              f"from; choose another RUN_ID (INIT_FROM={self.folder} starts it with these weights)")
        warnings += ["no valid checkpoint: starts at step 0"] * bool(goes_on and not path and self.log.exists())
        if self.log.exists() and not goes_on:
            raise ConfigError(f"RUN_ID={self.folder.name}: {self.log} exists; RESUME=auto goes on with that run, else "
                              "choose another RUN_ID or leave it blank")
        for later in [later for number, later in step_folders(self.folder).items() if number > step]:
            set_aside(later, "superseded")
        self.summary = dict.fromkeys(("run_id", "stage", "variant", "preset")) | {
            "status": "running", "started": utc_now(), **dict(zip(("git", "dirty"), git_state())),
            "source_sha": hashlib.sha256(SOURCE.encode()).hexdigest()[:12], "host": platform.node(),
            "torch": torch.__version__, "resumes": 0, "error": None} | facts | self.summary
        start_files(self, step)
        self.print("\n".join([f"run_id:{self.folder.name}", f"changes: {facts['changes'] or 'none'}",
                              *[f"resumed:{path}"] * bool(path), *(f"warning: {warning}" for warning in warnings)]))
        self.bar = tqdm(total=self.summary["num_iterations"], initial=max(0, step), unit="step", disable=None)
        return path

    def append(self, path, text):
        """Adds to a file. A disk that is full costs the record, not the run, which says so at once and at its end."""
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a") as file:
                file.write(text)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, size)  # half a line would spoil the next
            self.lost = self.lost or f"{path} is not whole: {error}"
            print(f"warning: {path}: {error}", file=sys.stderr)

    def print(self, line):
        """A line to the log and to standard output."""
        if self.rank == 0:
            line = redact(line, os.environ)
            self.append(self.log, line + "\n")
            with contextlib.suppress(OSError):  # a reader that has gone away ends no run
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()

    def point(self, values):
        """A row of the curve; what is not given stays blank."""
        if self.rank == 0:
            self.append(self.curve, ",".join(repr(values[name]) if name in values else "" for name in CURVE) + "\n")
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
        self.summary |= {"status": status} | ({"error": self.lost} if self.lost else {}) | values
        if self.bar is not None:
            self.bar.close()
            told = "status final_loss best_loss bits_per_byte tokens train_time eval_time compile_time step_avg".split()
            told += "save_time tokens_per_sec mfu peak_mem data_wait bad_steps resumes error".split()
            files = {"log": self.log, "curve": self.curve, "summary": self.json, "row": self.results_csv}
            try:
                self.save()
            except (OSError, ConfigError) as error:
                self.lost = files["row"] = f"not written ({error}); mend it, then python scripts/rebuild_results.py"
            lines = {key: self.summary[key] for key in told if self.summary.get(key) not in (None, "")} | files
            lines = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in lines.items()}
            self.print("\n".join(["---", *(f"{key}: {value}" for key, value in lines.items())]))

def claim(records):
    """Makes sure that no other live run has this RUN_ID, and clears away what a killed one left half done."""
    try:
        records.folder.mkdir(parents=True, exist_ok=True)
        if records.folder.resolve() != records.folder.parent.resolve() / records.folder.name:
            raise ConfigError(f"RUN_ID={records.folder.name}: {records.folder} leads out of LOG_DIR; remove that link")
        records.lock.acquire(timeout=1)
    except Timeout:
        raise ConfigError(f"RUN_ID={records.folder.name}: a run of that name is live; choose another RUN_ID, or end "
                          f"it first: touch {records.folder / 'stop'}") from None
    except OSError as error:
        raise ConfigError(f"LOG_DIR={records.log.parent}: cannot be written ({error}); name another folder") from None
    for path in records.folder.glob(".tmp_*"):
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path, ignore_errors=True)

def start_files(records, step):
    """Heads the log, or cuts the steps from `step` on out of log and curve, since they will be run again."""
    def before(path, pattern):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        lines = [line for line in lines if line.endswith("\n")]  # the last may be torn
        return "".join(line for line in lines if not (found := re.match(pattern, line)) or
                       int(found[1]) < step + (" bad_gradient " in line))  # that of `step` is in the checkpoint
    rule, fresh = "=" * 100, not records.log.exists()
    head = f"{rule}\n{SOURCE}\n{rule}\n{machine_text()}\nsettings: {json.dumps(records.summary, indent=1)}\n{rule}\n"
    if not fresh:
        old = json.loads(records.json.read_text()) if records.json.exists() else {}
        head = head if old.get("source_sha") != records.summary["source_sha"] else ""  # what runs now is in the log
        records.summary |= {"started": old.get("started"), "resumes": (old.get("resumes") or 0) + 1}
    (records.folder / "stop").unlink(missing_ok=True)
    if (error := records.folder / "error.txt").exists():
        error.replace(records.folder / "last_error.txt")
    try:
        write_whole(records.log, before(records.log, r"(?:\[\w+\] )?step:(\d+)/") + head)
        write_whole(records.curve, before(records.curve, r"(\d+),") or ",".join(CURVE) + "\n")
        records.save()
    except (OSError, ConfigError) as error:
        for file in (records.log, records.curve, records.json) if fresh else ():
            file.unlink(missing_ok=True)
        raise error if isinstance(error, ConfigError) else ConfigError(
            f"RESULTS_CSV={records.results_csv}: cannot be written ({error}); name another") from None

def record_failure(records, status, reason, trace):
    """Ends the records of a run that went wrong. The rank that fails first says why, for the others fail of it."""
    first = records.folder / "error.txt"
    with contextlib.suppress(OSError, ValueError):  # no disk, no record; the terminal has it
        if not first.exists():
            write_whole(first, f"{status}: {reason}\nrank {records.rank}, {utc_now()}\n{trace}")
        if records.rank:
            time.sleep(1)  # rank 0 knows more
            records.summary = json.loads(records.json.read_text())
            if records.summary["status"] == "running":  # rank 0 has not lived to say it
                records.summary |= {"status": status, "error": reason}
                records.save()
        status, _, reason = first.read_text().splitlines()[0].partition(": ")
    if records.rank == 0:
        records.append(records.log, trace)
        records.close(status, error=reason)
    return status

def refuse(env, error):
    """Leaves a summary and a row for a run that did not start, with what is known of it."""
    run_id = redact(env.get("RUN_ID", ""), env)
    run_id = run_id if re.fullmatch(RUN_ID_PATTERN, run_id) else new_run_id("refused")
    row = {name: redact(env.get(name.upper(), ""), env) for name in ("stage", "variant", "preset", "note")}
    row = {"run_id": run_id} | row | {"status": error.status, "error": redact(str(error), env),
                                      "started": utc_now(), "host": platform.node()}
    places = [env.get("LOG_DIR") or Config.log_dir, env.get("RESULTS_CSV") or Config.results_csv]
    summary = Path(places[0]) / f"{run_id}.json"
    with contextlib.suppress(OSError, ConfigError):  # where nothing can be written, the terminal has to do
        if not summary.exists() and places == [redact(place, env) for place in places]:  # no finished run is touched
            write_whole(summary, json.dumps(row, indent=1) + "\n")
            update_results(places[1], [row])

############### Training ###############
FIRST_STEP_TIMEOUT = 1800  # seconds: joining, compiling and reading may take so long
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
    return f"{preset}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"

def resolve(cfg):
    """cfg with what auto and 0 leave open: device, dtype, compile and vocab_size. Raises ConfigError, DataError."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    if device == "cuda" and not (cfg.dry_run or torch.cuda.is_available()):
        raise ConfigError("DEVICE=cuda: torch finds no CUDA device here; set DEVICE=cpu or auto")
    old = device == "cuda" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = {"cpu": "float32", "cuda": "float16" if old else "bfloat16"}[device] if cfg.dtype == "auto" else cfg.dtype
    vocab_size = cfg.vocab_size or dataset_index(cfg.input_bin).get("vocab_size")
    if not vocab_size:
        raise DataError(f"VOCAB_SIZE=0 needs index.json beside {cfg.input_bin}; set it, or {how_to_get(cfg.input_bin)}")
    if cfg.deterministic and cfg.compile == "1":
        raise ConfigError("COMPILE=1 chooses kernels by timing them, so DETERMINISTIC=1 cannot have it; set COMPILE=0")
    run_id = cfg.run_id or (Path(cfg.resume).parent.name if cfg.resume not in ("auto", "none") else "")
    compiled = str(int(device == "cuda" and not cfg.deterministic)) if cfg.compile == "auto" else cfg.compile
    return dataclasses.replace(cfg, device=device, dtype=dtype, compile=compiled, vocab_size=vocab_size, run_id=run_id)

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
    batch, micro, world = cfg.batch_size, cfg.device_batch_size, ranks.world_size
    if batch % (micro * world):
        near = [sorted((n for n in range(1, batch + 1) if batch % (n * other) == 0), key=lambda n: abs(n - now))[:4]
                for now, other in ((world, micro), (micro, world))]
        choices = [f"BATCH_SIZE={nearest_multiples(batch, micro * world)}"]
        choices += [f"DEVICE_BATCH_SIZE={' or '.join(map(str, near[1][:2]))}"] * bool(near[1])
        choices += [f"{' or '.join(map(str, sorted(near[0])))} ranks"] * bool(near[0])
        raise ConfigError(f"BATCH_SIZE={batch}: must be a multiple of DEVICE_BATCH_SIZE={micro} x {world} ranks; "
                          f"choose {', or '.join(choices)}")

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
        raise DataError(f"INPUT_BIN has {sizes[0]} kinds of token, INPUT_VAL_BIN {sizes[1]}; name one dataset in both")
    if cfg.init_from:
        with torch.device("meta"):
            import_weights(GPT(cfg), cfg.init_from)
    for loader in (train, val):
        if 2 * loader.tokens < 2**30:  # bytes; larger data is checked batch by batch
            loader.check_tokens()
    return train, val

def launcher_store(env):
    """The key-value store of torchrun, which outlives the ranks that it starts again; None without torchrun."""
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), timeout=timedelta(minutes=1))

def setup(cfg, ranks, env, store=None):
    """Joins the ranks in a process group, of one without torchrun, and agrees on the run's id, which is returned."""
    if cfg.deterministic:
        if (workspace := env.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")) not in (":4096:8", ":16:8"):
            raise ConfigError(f"CUBLAS_WORKSPACE_CONFIG={workspace}: DETERMINISTIC=1 needs :4096:8 or :16:8; unset it")
        torch.use_deterministic_algorithms(True)
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace
    if cfg.device == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    with contextlib.suppress(OSError, AttributeError):  # another system or C library
        libc, parent_death_signal, trim_threshold, mmap_max = ctypes.CDLL("libc.so.6"), 1, -1, -4
        if store:  # where the launcher is killed, its ranks are to save and end
            libc.prctl(parent_death_signal, signal.SIGTERM)
        if cfg.device == "cpu":  # keep what is freed for the next step: large tensors' pages anew take a tenth of it
            libc.mallopt(mmap_max, 0)
            libc.mallopt(trim_threshold, 2**31 - 1)
    where = {"rank": ranks.rank, "world_size": ranks.world_size}
    if "MASTER_ADDR" not in env:
        where["store"] = dist.HashStore()
    elif store and ranks.local_world_size == ranks.world_size:  # it still has the addresses of ranks that have died
        where["store"] = dist.PrefixStore(f"attempt_{env['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if cfg.device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=FIRST_STEP_TIMEOUT), **where)
    run_id = [cfg.run_id or new_run_id(cfg.preset)]
    if ranks.rank == 0 and store:
        run_id = [store.compare_set("train_gpt/run_id", "", run_id[0]).decode()]  # the same after a restart
    dist.broadcast_object_list(run_id, device=torch.device("cpu"))
    return run_id[0]

def agree(work):
    """Runs work on every rank and returns what it returned on rank 0, whose ConfigError is raised by all."""
    try:
        outcome = [work()]
    except ConfigError as error:
        outcome = [error]
    dist.broadcast_object_list(outcome, device=torch.device("cpu"))
    if isinstance(outcome[0], ConfigError):
        raise outcome[0]
    return outcome[0]

class Watch:
    """Ends a run in good order, by one decision of all ranks; ranks that make no step write where they stand."""
    def __init__(self, folder, ranks, timeout):
        self.stop_file, self.leads, self.timeout = folder / "stop", ranks.rank == 0, timeout
        self.asked, self.status, self.pending, self.flag = 0, "", None, None
        self.patience, self.longest, self.last, self.armed = FIRST_STEP_TIMEOUT, 0, 0, 0
        folder.mkdir(parents=True, exist_ok=True)  # where machines share no disk
        (stacks := folder / f"stacks_rank{ranks.rank}.txt").unlink(missing_ok=True)  # it may be a link to elsewhere
        self.stacks = open(stacks, "x")
        for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self.ask)  # to the end of the process: no signal may cut off its last words

    def ask(self, number, frame):
        self.asked = 1

    def agreed(self):
        """Status to end with, or "". Every rank calls it equally often; all learn in the next call what one asks."""
        if self.pending:
            self.pending.wait()
            self.status = self.status or ("", "preempted", "stopped")[self.flag.item()]
        self.flag = torch.tensor(2 if self.leads and self.stop_file.exists() else self.asked)
        self.pending = dist.all_reduce(self.flag, op=dist.ReduceOp.MAX, async_op=True)
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - (self.last or now)), now
        if now - self.armed > min(1, self.patience / 10):
            faulthandler.dump_traceback_later(self.patience, file=self.stacks)
            self.armed = now
        return self.status

    def hurry(self):
        """Shortens the patience, once the first step has shown how long one takes."""
        self.patience, self.armed = max(self.timeout, 10 * self.longest), 0
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1.5 * self.patience))  # first the stacks, then the end

    def close(self):
        faulthandler.cancel_dump_traceback_later()
        if not self.stacks.tell():
            Path(self.stacks.name).unlink(missing_ok=True)
        self.stop_file.unlink(missing_ok=True)  # it has been obeyed

@dataclasses.dataclass
class State:
    """What a step changes."""
    model: GPT
    optimizers: list
    loss_scale: LossScale
    step: int = 0  # updates made
    skipped: list = dataclasses.field(default_factory=list)  # (1 + ranks,) a step: update left out, ranks not finite

    @classmethod
    def build(cls, cfg, ranks):
        """Model and optimizers, the same on every rank because the seed is."""
        torch.manual_seed(cfg.seed)
        dtype, device = DTYPES[cfg.dtype], ranks.device(cfg)
        model = GPT(cfg, dtype).to(device)
        return cls(model, build_optimizers(model, cfg, ranks), LossScale(dtype, device))

    def tensors(self):
        """What a checkpoint holds: {key: (tensor, "copy" where every rank has the same, else "own" or "slice")}."""
        names = {p: name for name, p in self.model.named_parameters()}
        found = {f"model.{name}": (p.data, "copy") for p, name in names.items()}
        for optimizer in self.optimizers:
            found |= optimizer.tensors(names)
        return found | {f"loss_scale.{n}": (getattr(self.loss_scale, n), "copy") for n in ("value", "good_steps")}

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
    """One update from this rank's (n, T) of the batch: its mean loss () and gradient norm (), still on the device."""
    micro, scale, rank, world = cfg.device_batch_size, state.loss_scale.value, dist.get_rank(), dist.get_world_size()
    if cfg.dropout:  # no generator has a state to save: every step and rank has its own seed
        torch.manual_seed(int(np.random.SeedSequence((cfg.seed, state.step, rank)).generate_state(1, np.uint64)[0]))
    weight, losses = micro / (len(inputs) * world), []
    for x, y in zip(inputs.split(micro), targets.split(micro)):
        losses.append(state.model(x, y))
        losses[-1].backward(scale * weight)
    loss, guilty = sum(losses).detach() * weight, torch.zeros(world, device=scale.device)
    squares = sum(optimizer.reduce_grads() for optimizer in state.optimizers)
    own = squares if world == 1 else squared_norm([p.grad for p in state.model.parameters()])
    guilty[rank] = ~torch.isfinite(loss + own)
    stats = torch.cat([torch.stack([loss, squares]), guilty])
    dist.all_reduce(stats)
    loss, norm = stats[0], stats[1].sqrt() / scale
    skip, lost = (~torch.isfinite(norm + loss)).float(), (~torch.isfinite(loss)).float()
    clip = (norm / cfg.grad_clip).clamp(min=1) if cfg.grad_clip else 1
    grad_scale = scale * clip if cfg.grad_clip or state.loss_scale.active else None
    for optimizer in state.optimizers:
        optimizer.step(lr_factor(state.step, cfg), grad_scale, skip)
    state.model.zero_grad()
    bad = torch.where(scale > 1, lost, skip)  # an overflow is how a scale finds out how far it can go
    state.skipped.append(torch.cat([bad.view(1), stats[2:]]))
    state.loss_scale.update(skip)
    state.step += 1
    return loss, norm

@torch.no_grad()
def evaluate(model, loader, cfg, ranks, watch):
    """Mean loss of the first VAL_TOKENS, each rank taking a share of the samples; None where the run is to end."""
    samples, device, micro = cfg.val_tokens // cfg.sequence_length, ranks.device(cfg), cfg.device_batch_size
    first, last = (samples * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
    slices = [(i, min(micro, last - i)) for i in range(first, last, micro)]
    total = torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    with contextlib.closing(loader.prefetch(slices, device)) as batches:
        for i, (x, y, _) in enumerate(batches):
            if i < samples // ranks.world_size // micro and watch.agreed():  # as often as every rank comes by here
                break
            odd = cfg.compile == "1" and len(x) < micro  # not worth a compilation
            with torch.compiler.set_stance("force_eager") if odd else contextlib.nullcontext():
                total += model(x, y) * len(x)
    model.train()
    dist.all_reduce(total)
    return None if watch.status else total.item() / samples

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
    def __init__(self, cfg, ranks, records, loader):
        self.cfg, self.device, self.ranks, self.records, self.loader = cfg, ranks.device(cfg), ranks, records, loader
        self.waits, self.start = [], 0.0  # seconds each step has waited for data; where the clock of training began
        self.flops = records.summary["flops_per_token"] / ranks.world_size
        self.bytes_per_token = dataset_index(cfg.input_val_bin).get("bytes_per_token")
        # what a resumed run goes on with; last: (tokens, train time) of the last point
        self.seconds, self.last = dict.fromkeys(("data_wait", "eval_time", "save_time", "compile_time"), 0.0), (0, 0.0)
        self.bad_steps, self.figures, self.train_time = [0, 0], {}, 0.0  # updates left out: in all, in a row until now

    def facts(self, state, stats):
        """What a checkpoint has to know of the measurements, and stats, which are those of the last step."""
        self.count_bad_steps(state)
        self.train_time = self.now() - self.start
        kept = {name: getattr(self, name) for name in ("seconds", "last", "bad_steps", "figures", "train_time")}
        known = {name: self.records.summary[name] for name in ("world_size", "data_fingerprint")}
        return known | {"stats": stats and torch.stack(tuple(stats)).tolist(), "meter": kept}

    def resume(self, facts):
        """Goes on from facts; returns the stats of the step before."""
        vars(self).update(facts["meter"])
        self.records.summary |= self.figures
        return facts["stats"] and [torch.tensor(stat) for stat in facts["stats"]]

    def count_bad_steps(self, state):
        """Logs whose gradient was not finite since the last call, and on what data. Raises Diverged after too many."""
        most = 0
        for i, (skipped, *ranks) in enumerate(torch.stack(state.skipped).tolist() if state.skipped else []):
            total, row = self.bad_steps
            self.bad_steps = [total + bool(skipped), row + 1 if skipped else 0]
            step, most = state.step - len(state.skipped) + i, max(most, self.bad_steps[1])
            for rank in [rank for rank, bad in enumerate(ranks) if bad or not any(ranks)] if skipped else []:
                share = self.cfg.batch_size // len(ranks)
                (shard,), (index,) = self.loader.place(step * self.cfg.batch_size + rank * share, 1)
                self.records.print(f"step:{step + 1}/{self.cfg.num_iterations} bad_gradient rank:{rank} shard:"
                                   f"{self.loader.files[shard]!r} offset:{index * self.loader.length} samples:{share}")
        state.skipped.clear()
        if most > self.cfg.max_bad_steps:
            self.sum_up(state)
            raise Diverged(f"loss or gradients were not finite {most} times in a row until step {state.step}; "
                           "lower LR or MUON_LR, or set GRAD_CLIP=1")

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
        self.count_bad_steps(state)
        cfg, step, seconds = self.cfg, state.step, self.now() - self.start if state.step else 0.0
        tokens = step * cfg.batch_size * cfg.sequence_length
        values = {"step": step, "tokens": tokens, "epoch": step * cfg.batch_size / self.loader.samples,
                  "train_time": seconds, "data_wait": self.seconds["data_wait"]}
        times = f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(1, step):.2f}ms"
        if stats is not None:
            loss, norm = (stat.item() for stat in stats)  # here alone the loop waits for the device
            values |= {"train_loss": loss, "grad_norm": norm, "lr": cfg.lr * lr_factor(step - 1, cfg),
                       "tokens_per_sec": (tokens - self.last[0]) / (seconds - self.last[1])}
            self.records.print(f"step:{step}/{cfg.num_iterations} train_loss:{loss:.4f} {times}")
        if val_loss is not None:
            values["val_loss"] = val_loss
            self.records.print(f"step:{step}/{cfg.num_iterations} val_loss:{val_loss:.4f} {times}")
        self.last = tokens, seconds
        self.records.point(values)
        self.sum_up(state, val_loss)
        bad = [f"val_loss is {val_loss}"] * (val_loss is not None and not math.isfinite(val_loss))
        bad += ["no gradient reaches any parameter"] * (values.get("grad_norm") == 0)
        if bad:
            raise Diverged(f"{' and '.join(bad)} at step {step}; lower LR or MUON_LR, or set GRAD_CLIP=1")

    def sum_up(self, state, val_loss=None):
        """Brings the summary's figures up to this step."""
        tokens = state.step * self.cfg.batch_size * self.cfg.sequence_length
        seconds = self.now() - self.start if state.step else 0.0
        speed = tokens / seconds if tokens else None
        figures = {
            "bad_steps": self.bad_steps[0], "tokens": tokens, "train_time": seconds, "tokens_per_sec": speed,
            **self.seconds, "compile_time": self.seconds["compile_time"] if self.cfg.compile == "1" else None,
            "step_avg": 1000 * seconds / state.step if tokens else None, "peak_mem": peak_memory(self.device),
            "data_wait_p99": float(np.percentile(self.waits, 99)) if self.waits else None,
            "mfu": model_flops_utilization(self.cfg, self.device, speed * self.flops) if tokens else None}
        if val_loss is not None:
            bits = val_loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None
            figures |= {"final_loss": val_loss, "best_loss": min(val_loss, self.figures.get("best_loss", math.inf)),
                        "bits_per_byte": bits, "ppl": math.exp(val_loss) if val_loss < 700 else None}
        self.figures |= figures
        self.records.summary |= self.figures

def sound(stats):
    """Whether the last update was that of a model that has not diverged. Waits for the device."""
    return not stats or bool(stats[0].isfinite() and stats[1] != 0)

def train(cfg, ranks, loaders, records, watch, path):
    """The run from its beginning or the checkpoint at `path`, records.summary kept current; returns its status."""
    train_loader, val_loader = loaders
    checkpoints, stats = Checkpoints(cfg, ranks, records), None
    meter, state = Meter(cfg, ranks, records, train_loader), State.build(cfg, ranks)
    if path:
        stats = meter.resume(checkpoints.load(state, path))
        meter.start = meter.now() - meter.train_time
        checkpoints.save(state, meter.facts(state, stats))  # where that was another run's: now it is this one's too
    elif cfg.init_from:
        import_weights(state.model, cfg.init_from)
    if cfg.compile == "1":
        records.print("compiling blocks and loss: a minute or two the first time on a machine")
        with meter.off_the_clock("compile_time"):
            compile_model(state.model, cfg, meter.device)
        records.print(f"compile_time:{meter.seconds['compile_time']:.1f}s")
    first, share, due = state.step, cfg.batch_size // ranks.world_size, False
    meter.start = meter.now() - meter.train_time
    slices = ((step * cfg.batch_size + ranks.rank * share, share) for step in range(first, cfg.num_iterations))
    with contextlib.closing(train_loader.prefetch(slices, meter.device)) as batches:
        while True:  # `step` updates have been made, of which the last is not yet logged: a resumed run enters here
            step, last = state.step, state.step == cfg.num_iterations
            due |= last or cfg.save_every > 0 and step > first and step % cfg.save_every == 0
            if watch.agreed() or due and sound(stats):  # before the validation, which may fail
                with meter.off_the_clock("save_time"):
                    checkpoints.save(state, meter.facts(state, stats))
                due = False
            if step == first + 1:
                watch.hurry()
            validating = last or cfg.val_every and step % cfg.val_every == 0
            if not watch.status and (validating or stats and (step == 1 or step % cfg.log_every == 0)):
                with meter.off_the_clock("eval_time"):
                    val_loss = evaluate(state.model, val_loader, cfg, ranks, watch) if validating else None
                if watch.status:
                    continue  # the validation was cut short: save, and leave the point to who goes on
                meter.point(state, stats, val_loss)
            if watch.status:
                meter.sum_up(state)
                records.print(f"{watch.status} at step {step}: RUN_ID={records.folder.name} RESUME=auto goes on here")
            if watch.status or last:
                break
            inputs, targets, waited = next(batches)
            stats = train_step(state, cfg, inputs, targets)
            meter.waits.append(waited)
            meter.seconds["data_wait"] += waited
    checkpoints.wait(last=True)
    if not watch.status and ranks.rank == 0:
        export_weights(state.model, cfg, records.folder)
    return watch.status or "ok"

def report(error, ranks, records, env, store):
    """Says why a run ended, on the terminal and in its records; returns the exit code."""
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    status = getattr(error, "status", "oom" if full else "stopped" if isinstance(error, KeyboardInterrupt) else "crash")
    reason, trace = redact(str(error) or "interrupted", env), redact(traceback.format_exc(), env)
    if full and records:
        sizes = {name: getattr(records.cfg, name) for name in ("device_batch_size", "sequence_length", "n_layer")}
        tips = ", or ".join(f"{name.upper()}={value} to {value // 2}" for name, value in sizes.items() if value > 1)
        peak = peak_memory(ranks.device(records.cfg))
        reason = f"out of memory, peak {peak:.2f} GiB; lower {tips} (the first leaves the result as it is)"
    if status == "crash":
        reason = f"{type(error).__name__}: {reason}".splitlines()[0][:300]
        reason += f"; {records.folder}/stacks_rank*.txt say where" * bool(records and "imed out" in reason)
        print(trace, file=sys.stderr)
    elif ranks.local_rank == 0 or records and status in ("data", "oom"):  # others would say the same
        print(f"{status}: {reason}", file=sys.stderr)
    if records and records.live:
        status = record_failure(records, status, reason, trace)
    elif ranks.rank == 0 and status in ("config", "data") and env.get("DRY_RUN", "0") in ("", "0"):
        refuse(env, error)
    if EXIT_CODES[status] > 1 and store:
        with contextlib.suppress(RuntimeError):  # the launcher may be gone
            store.set("train_gpt/exit", str(EXIT_CODES[status]))
    if ranks.rank and not (records and records.live):
        time.sleep(1)  # torchrun ends all ranks as soon as one is gone, and rank 0 has to say why
    return EXIT_CODES[status]

def main(argv, env):
    """One run as the environment sets it; returns the exit code."""
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return 0
    ranks, records, store = Ranks.from_env(env), None, launcher_store(env)
    try:
        if env.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and store and store.check(["train_gpt/exit"]):
            return int(store.get("train_gpt/exit"))  # it would fail again
        restarted = bool(store) and store.check(["train_gpt/claimed"])
        if argv:
            raise ConfigError(f"{argv[0].partition('=')[0]} is no option; settings go so: LR=0.003 python train_gpt.py")
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
        records = Records(cfg, setup(cfg, ranks, env, store), ranks.rank)
        changes = " ".join(f"{name}={shlex.quote(str(int(value) if value is True or value is False else value))}"
                           for name, value in asked.changes().items() if name.lower() not in LABELS)
        facts = plan | {"device_name": device_name(ranks.device(cfg)), "changes": changes, "data_fingerprint": data}
        path = agree(functools.partial(records.open, facts, warnings, restarted))
        records.live = True
        if store:
            store.set("train_gpt/claimed", "1")
        with contextlib.closing(Watch(records.folder, ranks, cfg.hang_timeout)) as watch:
            records.close(train(cfg, ranks, loaders, records, watch, path))
            dist.barrier()  # until rank 0 has written everything, no signal may end another
        dist.destroy_process_group()
        return 1 if records.lost else 0
    except (Exception, KeyboardInterrupt) as error:
        return report(error, ranks, records, env, store)

if __name__ == "__main__":
    code = main(sys.argv[1:], os.environ)
    with contextlib.suppress(OSError):  # who reads may be gone
        sys.stdout.flush()
    os._exit(code)  # sys.exit would wait for a save that waits for a rank that hangs
