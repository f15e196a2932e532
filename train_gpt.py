"""
Trains a GPT on token shards with Muon + AdamW; every setting is an environment variable, every run leaves a row.
    python train_gpt.py --help                                # the settings: default, choices, meaning
    DRY_RUN=1 python train_gpt.py                             # the plan: parameters, FLOPs, tokens (no GPU, no data)
    PRESET=quickstart python train_gpt.py                     # one process on whatever device is there
    torchrun --standalone --nproc_per_node=8 train_gpt.py     # the default: GPT-2 small on FineWeb-10B, 8 GPUs

Sections: Config, Layers, Gates, Mixers, FFNs, Model, Optimizers, Data, Health, Training.
Shapes: B sequences, T positions, C channels (n_embd), H heads, D head size, F hidden units (d_ff), V vocabulary,
N = B * T tokens. A suffix gives the layout where it is not plain: q_BTHD.
"""

import sys
from pathlib import Path

SOURCE = Path(
    __file__
).read_text()  # before torch loads: the log must hold the text that runs, not a later edit
sys.path.insert(
    0, str(Path(__file__).resolve().parent / "scripts")
)  # ours comes before any other package `harness`

import concurrent.futures, contextlib, dataclasses, functools, glob, itertools, math, os, re, shlex, time
from collections import deque
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

from harness.checkpoints import Checkpoints, export_weights
from harness.contract import CURVE, RUN_ID_PATTERN, ConfigError, DataError, Diverged
from harness.failures import report
from harness.meter import Clock, model_flops_utilization, peak_memory
from harness.provenance import CPUINFO, dataset_index, device_name, fingerprint, how_to_get
from harness.ranks import Ranks, agree, setup
from harness.records import Records
from harness.settings import Settings, near_misses, settings_table
from harness.watch import Watch

################ Config ################
SYNONYMS = {
    "LEARNING_RATE": "LR",
    "EPOCHS": "MAX_EPOCHS",
    "BLOCK_SIZE": "SEQUENCE_LENGTH",
    "EXPERTS": "NUM_EXPERTS",
    "N_EXPERTS": "NUM_EXPERTS",
    "D_MODEL": "N_EMBD",
    "MAX_ITERS": "NUM_ITERATIONS",
}


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Every setting of a run. The environment variable is the field's name in capitals."""

    preset: str = (
        "gpt2_small"  # experiments/presets/<name>.env is read first; the environment wins over it
    )
    run_id: str = ""  # names the log, curve and row; blank: <preset>-<UTC time>-<4 hex>
    stage: str = ""  # label of a series of runs
    variant: str = ""  # label within the stage
    note: str = ""  # free text for the row
    seed: int = 0  # of initialisation, dropout and shuffling
    dry_run: bool = False  # print the plan and stop
    input_bin: str = "data/fineweb10B/fineweb_train_*.bin"  # glob of the training shards
    max_train_tokens: int = (
        0  # train on so many tokens from the start of the training shards; 0: on all
    )
    input_val_bin: str = "data/fineweb10B/fineweb_val_*.bin"  # glob of the validation shards
    shuffle: bool = False  # visit the samples of each epoch in a seeded random order
    batch_size: int = 512  # sequences a step, over all ranks; gradient accumulation follows from it
    device_batch_size: int = 64  # sequences a forward pass, per rank
    sequence_length: int = 1024  # tokens
    num_iterations: int = 5100  # optimizer steps
    max_epochs: int = (
        1  # passes over the training data that NUM_ITERATIONS may take; 0: as many as it takes
    )
    val_every: int = 125  # steps between validations; 0: only the last
    val_tokens: int = 10485760  # tokens of each validation, from the start of the validation shards
    vocab_size: int = 50304  # rows of the embedding; 0: what the dataset's index.json says
    n_layer: int = 12  # blocks, or visits of shared ones
    n_head: int = 6  # attention heads; head size n_embd / n_head
    n_embd: int = 768  # channels of the residual stream
    d_ff: int = 0  # hidden units of the FFN or of an expert; 0: 4 n_embd (swiglu 8/3), over all experts of a token
    mixer: str = "attention"  # a comma list tiles over the layers
    ffn: str = "relu2"  # relu2: arXiv 2109.08668; swiglu: arXiv 2002.05202; a comma list tiles over the layers
    norm: str = "rms"  # rms has no gains; rms_gain has; layer has a gain, and a bias if BIAS=1
    pos: str = "rotary"  # rotary: arXiv 2104.09864; learned: an embedding a position
    qk_norm: bool = True  # RMS norm of every query and key head
    bias: bool = False  # biases in linear layers and layer norms
    tie_embeddings: bool = True  # one matrix for embedding and head
    dropout: float = 0.0  # probability, on embeddings, attention weights and branches
    init: str = "zero_proj"  # zero_proj: uniform 1/sqrt(fan in), projections 0; gpt2: normal 0.02, projections scaled
    attngate: str = "none"  # attention gate (arXiv 2505.06708) for each channel, each head, or a learned constant
    gatepos: str = "sdpa"  # on the attention output, or on the values before it
    gateact: str = "sigmoid"  # ns_sigmoid: 0.5 + 0.5 sigmoid
    num_experts: int = 8  # with FFN=moe: experts that a router chooses from
    top_k: int = 2  # experts that it chooses for a token
    expert: str = "relu2"  # the FFN that an expert is
    shared_expert: bool = False  # one more expert, beside the router, for every token
    balance: str = "aux"  # aux: arXiv 2101.03961, a loss; quantile: a bias on the choice; none
    aux_loss_coef: float = 0.01  # of the balance loss, which is 1 in balance
    aux_loss_coef_start: float | None = (
        None  # in its place: held for AUX_WARMUP_FRAC, then linear to
    )
    aux_loss_coef_end: float | None = None  # this, which is reached at AUX_DECAY_END_FRAC
    aux_warmup_frac: float = 0.05  # fraction of the steps
    aux_decay_end_frac: float = 0.3  # fraction of the steps
    balance_log_interval: int = 20  # steps between lines on the experts' load
    router_optimizer: str = "adamw"  # of the routers' matrices
    recurrence: str = "stacked"  # indexed: the same model, one block over banks of weights; shared: one block revisited
    n_unique: int = 1  # blocks that RECURRENCE=shared visits in turn
    unshared_ends: int = 0  # blocks at either end of them that are visited once
    per_step: str = "none"  # what each visit of a shared block has for itself, a comma list: norm gains, router, scale
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
    lr_schedule: str = (
        "trapezoid"  # flat then linear to zero over WARMDOWN_ITERS, or cosine over the run
    )
    warmup_iters: int = 0  # steps of linear warm-up
    warmdown_iters: int = 1450  # steps of the trapezoid's linear decay
    min_lr_frac: float = 0.0  # fraction of the peak at which cosine ends
    deterministic: bool = (
        False  # the same bits on the same machine, also on cuda, at some cost of speed
    )
    device: str = "auto"  # auto: cuda where there is one, else cpu
    dtype: str = (
        "auto"  # of activations and matrix products; auto: bfloat16 on cuda, float32 on cpu
    )
    compile: str = "auto"  # torch.compile of the blocks and the loss; auto: on cuda
    peak_tflops: float | None = (
        None  # of one device, for mfu; blank: from the table of known devices
    )
    resume: str = "none"  # auto: from the newest valid checkpoint of RUN_ID, if there is one; or the path of one
    init_from: str = (
        ""  # safetensors file, or folder with model.safetensors, that gives a new run its weights
    )
    save_every: int = 500  # steps between checkpoints; 0: only when the run ends
    keep_last: int = 2  # checkpoints that stay; at least 2, since the newest may be damaged
    max_bad_steps: int = (
        20  # non-finite gradients in a row that are left out; more end the run as diverged
    )
    hang_timeout: int = 300  # seconds without a step, after the first, until the ranks write their stacks and give up
    log_dir: str = "logs"  # folder of logs, curves and summaries
    results_csv: str = "experiments/results.csv"  # the table that gets a row
    log_every: int = 10  # steps between lines of the training loss
    trackers: str = "none"  # a comma list: scripts/track.py shows them the run, from beside it

    def check(self):
        check(self)

    def scheduled(self, step):
        """What schedules say of a step."""
        return lr_factor(step, self), aux_coef(step, self)

    def resumable(self):
        """Settings with which a run may go on that has begun with others: what it learns does not change."""
        return {*RESUMABLE} - {"device_batch_size" * (self.balance == "quantile")}


LABELS = (
    "run_id",
    "stage",
    "variant",
    "note",
    "dry_run",
    "log_dir",
    "results_csv",
    "resume",
    "trackers",
)
UNTRAINED = (
    *LABELS,
    "preset",
    "input_bin",
    "input_val_bin",
    "peak_tflops",
    "log_every",
    "save_every",
    "keep_last",
    "max_bad_steps",
    "hang_timeout",
    "balance_log_interval",
)  # say nothing of what is trained and how
LISTS = ("mixer", "ffn", "per_step", "trackers")  # separated by commas
BOUNDS = {  # inclusive
    "batch_size device_batch_size sequence_length num_iterations n_layer n_head n_embd log_every": (
        1,
        2**31,
    ),
    "num_experts top_k balance_log_interval n_unique": (1, 2**31),
    "unshared_ends max_train_tokens": (0, 2**40),
    "aux_loss_coef aux_loss_coef_start aux_loss_coef_end": (0, 1e6),
    "aux_warmup_frac aux_decay_end_frac": (0, 1),
    "val_every save_every max_epochs d_ff warmup_iters warmdown_iters seed max_bad_steps": (
        0,
        2**31,
    ),
    "keep_last": (2, 2**31),
    "hang_timeout": (1, 2**31),
    "vocab_size": (0, 65536),
    "peak_tflops": (1e-6, 1e6),
    "lr embed_lr head_lr muon_lr": (1e-12, 1e30),
    "beta1 beta2 muon_momentum": (0, 0.9999999),
    "dropout": (0, 0.99),
    "val_tokens": (1, 2**40),
    "weight_decay": (0, 1e3),
    "grad_clip": (0, 1e6),
    "min_lr_frac": (0, 1),
}


def check(cfg):
    """Raises ConfigError for a value that no run can use, and for values that have no meaning together."""
    for name, choices in axes().items():
        for value in getattr(cfg, name).split(",") if name in LISTS else [getattr(cfg, name)]:
            if value not in choices:
                raise ConfigError(f"{name.upper()}={value}: choose one of {', '.join(choices)}")
    for names, (low, high) in BOUNDS.items():
        for name in names.split():
            if (value := getattr(cfg, name)) is not None and not low <= value <= high:
                raise ConfigError(f"{name.upper()}={value}: must lie between {low} and {high}")
    unit = cfg.n_head * (
        2 if cfg.pos == "rotary" else 1
    )  # rotary turns the channels of a head in pairs
    moe, shared, own = (
        "moe" in cfg.ffn.split(","),
        cfg.recurrence == "shared",
        cfg.per_step.split(","),
    )
    ends, order = (cfg.aux_loss_coef_start, cfg.aux_loss_coef_end), RECURRENCES[cfg.recurrence](cfg)
    for name, sound, needed in (
        (
            "run_id",
            re.fullmatch(f"({RUN_ID_PATTERN})?", cfg.run_id),
            "1 to 100 letters, digits, _, and within . -",
        ),
        (
            "n_embd",
            cfg.n_embd % unit == 0,
            f"a multiple of {unit}, for N_HEAD={cfg.n_head} and POS={cfg.pos}: "
            f"{max(unit, cfg.n_embd - cfg.n_embd % unit)} or {max(unit, cfg.n_embd - cfg.n_embd % unit) + unit}",
        ),
        (
            "val_tokens",
            cfg.val_tokens >= cfg.sequence_length,
            f"at least SEQUENCE_LENGTH={cfg.sequence_length}",
        ),
        (
            "router_optimizer",
            cfg.router_optimizer in ("adamw", cfg.optimizer),
            "OPTIMIZER=muon as well",
        ),
        (
            "deterministic",
            cfg.compile != "1" or not cfg.deterministic,
            "COMPILE=0 or auto: 1 times its kernels",
        ),
        (
            "top_k",
            cfg.top_k <= cfg.num_experts or not moe,
            f"at most NUM_EXPERTS={cfg.num_experts}",
        ),
        ("balance", moe or cfg.balance == "aux", "FFN=moe, or the default aux"),
        (
            "aux_loss_coef_start",
            ends == (None, None) or None not in ends,
            "AUX_LOSS_COEF_END beside it",
        ),
        (
            "aux_decay_end_frac",
            cfg.aux_warmup_frac <= cfg.aux_decay_end_frac,
            "at least AUX_WARMUP_FRAC",
        ),
        *(
            (name, shared or getattr(cfg, name) == getattr(Config, name), "RECURRENCE=shared")
            for name in ("n_unique", "unshared_ends", "per_step")
        ),
        ("per_step", "router" not in own or moe, "FFN=moe"),
        (
            "per_step",
            "norm" not in own or cfg.norm != "rms",
            "a NORM with gains: rms_gain or layer",
        ),
        (
            "n_layer",
            not shared or cfg.n_layer >= cfg.n_unique + 2 * cfg.unshared_ends,
            f"at least N_UNIQUE={cfg.n_unique} + 2 UNSHARED_ENDS={cfg.unshared_ends}",
        ),
        (
            "n_unique",
            not any((layer - order.index(i)) % period(cfg) for layer, i in enumerate(order)),
            f"a multiple of {period(cfg)}, the layers after which MIXER={cfg.mixer} and FFN={cfg.ffn} repeat",
        ),
    ):
        if not sound:
            raise ConfigError(
                f"{name.upper()}={repr(str(getattr(cfg, name)))[1:-1]} needs {needed}"
            )


SCHEDULED = (
    "num_iterations",
    "lr_schedule",
    "warmup_iters",
    "warmdown_iters",
    "min_lr_frac",
    "aux_loss_coef",
    "aux_loss_coef_start",
    "aux_loss_coef_end",
    "aux_warmup_frac",
    "aux_decay_end_frac",
)
RESUMABLE = (
    *UNTRAINED,
    "device_batch_size",
    "val_every",
    "val_tokens",
    "max_epochs",
    "device",
    "compile",
    "deterministic",
    "init_from",
)  # a run may go on with other values: what it learns does not change
Config.SYNONYMS, Config.LABELS, Config.UNTRAINED, Config.SCHEDULED = (
    SYNONYMS,
    LABELS,
    UNTRAINED,
    SCHEDULED,
)


def axes():
    """Choices of every setting that has a list of them: {field: names}."""
    return {
        "mixer": MIXERS,
        "ffn": FFNS,
        "norm": NORMS,
        "pos": POSITIONS,
        "init": INITS,
        "attngate": GATES,
        "gatepos": GATE_POSITIONS,
        "gateact": GATE_ACTS,
        "expert": EXPERTS,
        "balance": BALANCES,
        "recurrence": RECURRENCES,
        "per_step": PER_STEP,
        "optimizer": OPTIMIZERS,
        "router_optimizer": OPTIMIZERS,
        "muon_scale": MUON_SCALES,
        "lr_schedule": SCHEDULES,
        "device": ("auto", "cpu", "cuda"),
        "dtype": ("auto", *DTYPES),
        "compile": ("auto", "0", "1"),
        "trackers": ("none", "tensorboard", "wandb"),
    }


def cautions(env, cfg):
    """One sentence for every variable that is nearly one of ours, and for a schedule that never reaches its peak."""
    found = near_misses(env, Config)
    if cfg.resume == "auto" and not cfg.run_id:
        found.append("RESUME=auto goes on with a RUN_ID; without one, every start is a new run")
    if cfg.lr_schedule == "trapezoid" and cfg.warmdown_iters > cfg.num_iterations:
        found.append(
            f"WARMDOWN_ITERS={cfg.warmdown_iters} > NUM_ITERATIONS: LR starts at {lr_factor(0, cfg):.0%}"
        )
    return found + [
        f"{name} has no effect without FFN=moe"
        for name in cfg.changes()
        if "moe" not in cfg.ffn and re.search("EXPERT|TOP_K|^AUX_|ROUTER", name)
    ]


def help_text():
    """The table of settings, read from the source."""
    return settings_table(Config, __doc__, SOURCE, axes())


################ Layers ################
def normal_(w, std):
    """Fills w with normal numbers, but on the meta device, where it would load seconds of code to do nothing."""
    return w if w.is_meta else nn.init.normal_(w, std=std)


INITS = {  # how a weight (..., rows, fan in) starts: (cfg, weight, whether it ends a residual branch or is the head)
    "zero_proj": lambda cfg, w, ends: (
        nn.init.zeros_(w)
        if ends or w.is_meta
        # uniform within 1 / sqrt(fan in)
        else nn.init.uniform_(w, -(w.size(-1) ** -0.5), w.size(-1) ** -0.5)
    ),
    "gpt2": lambda cfg, w, ends: normal_(w, 0.02 / (2 * cfg.n_layer) ** 0.5 if ends else 0.02),
}

# On AMD's AVX-512 processors MKL, torch's default, runs AVX2 code: oneDNN multiplies float32 matrices twice as fast.
ONEDNN = "AuthenticAMD" in CPUINFO and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(a, b):
    """a (..., k) @ b (n, k).T by the faster of two CPU libraries; torch.compile lowers oneDNN's only for constant b."""
    if (
        ONEDNN
        and a.is_cpu
        and a.dtype == torch.float32
        and a.numel()
        and not torch.compiler.is_compiling()
    ):
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.mT


def grouped(a, b, ends):
    """Rows a (..., k) by b (m, k), or, in groups ending at `ends` (E,), each's by its own of b (E, m, k): (..., m).
    Outer products of rows a (n, m) and b (n, k), summed over each group, zero where it is empty: (E, m, k)."""
    if ends is None:
        return product(a, b)
    if torch.compiler.is_compiling():
        return grouped_op(a, b, ends)
    if (
        a.is_cuda and not (a.size(-1) | b.size(1) | b.size(-1)) * a.element_size() % 16
    ):  # bytes, as its rows must be
        return F.grouped_mm(a, b.mT, offs=ends) if b.ndim == 3 else F.grouped_mm(a.mT, b, offs=ends)
    splits = ends[:-1].tolist()
    if b.ndim == 3:
        return torch.cat([product(rows, matrix) for rows, matrix in zip(a.tensor_split(splits), b)])
    return torch.stack(
        [product(x.mT, y.mT) for x, y in zip(a.tensor_split(splits), b.tensor_split(splits))]
    )


# opaque to torch.compile, which traces neither sizes that data decide nor grouped_mm in float32
grouped_op = torch.library.custom_op(
    f"{__name__}::grouped",
    grouped,
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor ends) -> Tensor",
)
grouped_op.register_fake(
    lambda a, b, ends: a.new_empty(
        (len(a), b.size(1)) if b.ndim == 3 else (len(ends), a.size(1), b.size(1))
    )
)


class Product(torch.autograd.Function):
    """`grouped` of x and weight with the gradient that oneDNN's operator lacks and grouped_mm wants contiguous."""

    @staticmethod
    def forward(ctx, x, weight, ends=None):
        ctx.save_for_backward(x, weight, ends)
        return grouped(x, weight, ends)

    @staticmethod
    def backward(ctx, grad):
        (x, weight, ends), grad = ctx.saved_tensors, grad.contiguous()
        grad_x, y, x = grouped(grad, weight.mT, ends), grad.flatten(0, -2), x.flatten(0, -2)
        return grad_x, product(y.mT, x.mT) if ends is None else grouped(y, x, ends), None


class Linear(nn.Module):
    """(..., fan_in) -> (..., parts * fan_out) in the input's dtype: one product, yet Muon takes each part by itself."""

    def __init__(self, cfg, fan_in, fan_out, parts=1, ends=False, bias=None, experts=()):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*experts, *[parts] * (parts > 1), fan_out, fan_in))
        self.bias = (
            nn.Parameter(torch.zeros(*experts, parts * fan_out))
            if bias or bias is None and cfg.bias
            else None
        )
        INITS[cfg.init](cfg, self.weight, ends)
        self.flops_per_token = 6 * self.weight.numel()

    def forward(self, x):
        weight = self.weight.flatten(0, -2).type_as(x)
        y = Product.apply(x, weight) if ONEDNN and x.is_cpu else F.linear(x, weight)
        return y if self.bias is None else y + self.bias.type_as(x)


class RMSNorm(nn.Identity):
    """Root mean square norm without gains (arXiv 1910.07467): (..., C) -> same."""

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class LayerNorm(nn.LayerNorm):
    """Layer norm with a gain, and a bias if cfg.bias, computed in float32 (arXiv 1607.06450): (..., C) -> same."""

    def __init__(self, cfg):
        super().__init__(cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        return super().forward(x.float()).type_as(x)


class Scale(nn.Module):
    """A learned factor on its input, () or (C,), which starts as given."""

    def __init__(self, start):
        super().__init__()
        self.weight = nn.Parameter(start)

    def forward(self, x):
        return x * self.weight.type_as(x)


NORMS = {
    "rms": RMSNorm,
    "layer": LayerNorm,
    "rms_gain": lambda cfg: nn.Sequential(RMSNorm(cfg), Scale(torch.ones(cfg.n_embd))),
}


class Rotary(nn.Module):
    """Rotary embedding, base 10000, halves paired as in GPT-NeoX, arXiv 2104.09864: (B, T, ..., D) -> same."""

    def __init__(self, cfg):
        super().__init__()
        half = cfg.n_embd // cfg.n_head // 2
        with torch.device("cpu"):  # on the meta device, these operators would load seconds of code
            angles = torch.outer(
                torch.arange(cfg.sequence_length), 10000 ** -(torch.arange(half) / half)
            ).repeat(1, 2)
            signs = torch.tensor([1.0, -1.0]).repeat_interleave(half)
        self.register_buffer(
            "turn", torch.stack((angles.cos(), angles.sin() * signs)), persistent=False
        )

    def forward(self, x):
        cos, sin = self.turn[:, : x.size(1)].view(2, x.size(1), *[1] * (x.ndim - 3), -1)
        x1, x2 = x.chunk(2, dim=-1)
        return torch.addcmul(x * cos, torch.cat((x2, x1), dim=-1), sin).type_as(x)


class LearnedPosition(nn.Module):
    """Adds an embedding of the position: (B, T, C) -> same."""

    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Parameter(normal_(torch.empty(cfg.sequence_length, cfg.n_embd), 0.02))

    def forward(self, x):
        return x + self.weight[: x.size(1)].type_as(x)


POSITIONS = {
    "rotary": (nn.Identity, Rotary),
    "learned": (LearnedPosition, nn.Identity),
}  # (on embeddings, on q and k)
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
        self.act, self.score = (
            GATE_ACTS[cfg.gateact],
            Linear(cfg, cfg.n_embd, gates or cfg.n_embd, bias=False),
        )

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
        self.act, self.score = (
            GATE_ACTS[cfg.gateact],
            nn.Parameter(torch.zeros(cfg.n_head, cfg.n_embd // cfg.n_head)),
        )

    def forward(self, y, x):
        return y * self.act(self.score).type_as(y)


GATES = {
    "none": NoGate,
    "headwise": HeadwiseGate,
    "elementwise": ElementwiseGate,
    "const": ConstGate,
}


################ Mixers ################
class CausalSelfAttention(nn.Module):
    """Multi-head causal attention with optional QK norm and gate: (B, T, C) -> same."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.dropout = cfg.n_head, cfg.dropout
        self.flops_per_token = (
            12 * cfg.n_embd * cfg.sequence_length
        )  # scores and values, both ways, no causal halving
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
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return self.proj(self.gate_output(y.transpose(1, 2), x).reshape(B, T, C))


MIXERS = {"attention": CausalSelfAttention}


################# FFNs #################
class MLP(nn.Module):
    """Two-layer FFN, the base of the kinds below: (..., C) -> same, and the list of its routings, which is empty."""

    parts = 1  # matrices that read the input

    def __init__(self, cfg, linear=Linear, share=1):
        super().__init__()
        width, multiple = (
            (4 if self.parts == 1 else 8 / 3) * cfg.n_embd,
            1 if self.parts == share == 1 else 64,
        )
        width = cfg.d_ff or multiple * math.ceil(width / share / multiple)
        self.fc = linear(cfg, cfg.n_embd, width, parts=self.parts)
        self.proj = linear(cfg, width, cfg.n_embd, ends=True)

    def transform(self, x, *groups):
        return self.proj(self.act(self.fc(x, *groups)), *groups)

    def forward(self, x):
        return self.transform(x), []


class ReLU2(MLP):
    def act(self, h):
        positive = F.relu(h)
        return (
            positive * positive
        )  # several times faster on a CPU than a power, whose gradient is another


class GELU(MLP):
    act = staticmethod(functools.partial(F.gelu, approximate="tanh"))


class SwiGLU(MLP):
    parts = 2

    def act(self, h):
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up


EXPERTS = {"relu2": ReLU2, "gelu": GELU, "swiglu": SwiGLU}


class ExpertLinear(Linear):
    """One linear layer an expert: rows (n, fan_in) sorted by their expert (n,) -> (n, parts * fan_out)."""

    def __init__(self, cfg, *sizes, **kinds):
        super().__init__(cfg, *sizes, **kinds, experts=(cfg.num_experts,))
        self.flops_per_token = self.flops_per_token * cfg.top_k // cfg.num_experts

    def forward(self, x, expert, ends):
        y = Product.apply(x, self.weight.flatten(1, -2).type_as(x), ends)
        return (
            y
            if self.bias is None
            else y + F.one_hot(expert, len(ends)).type_as(x) @ self.bias.type_as(x)
        )


def quantile_bias(p, bias, k):
    """The bias (E,), zero in the mean, with which k / E of the tokens, given their p (N, E), choose each expert: those
    where p + bias exceeds their (k + 1)-th largest; kexue.fm/archives/11619."""
    missing = (p + bias).topk(min(k + 1, p.size(1))).values[:, -1:] - p
    bias = missing.sort(dim=0).values[max(1, round(p.size(0) * k / p.size(1))) - 1]
    return bias - bias.mean()


BALANCES = {  # what a step leaves (E,) for the next, from its load (E,), its p (N, E), what it found (E,) and TOP_K
    "aux": lambda load, p, found, k: load,  # to which the loss holds the next p
    "quantile": lambda load, p, found, k: quantile_bias(
        p, found, k
    ),  # which the next choice adds to p
    "none": lambda load, p, found, k: found,
}


class MoE(nn.Module):
    """Token-choice mixture of experts without capacity: (..., C) -> same, and a list of its routing (4, E).
    A token's TOP_K experts are those of the highest probability p, a softmax over all E, which also weights their
    outputs; if TOP_K > 1 these weights are made to sum to 1 (arXiv 2101.03961, 2401.04088). The routing's rows: load f,
    the share of all choices; importance P, the mean p, with its gradient; what is left in `balance`; what was there."""

    def __init__(self, cfg):
        super().__init__()
        self.top_k, self.biased, self.left = (
            cfg.top_k,
            cfg.balance == "quantile",
            BALANCES[cfg.balance],
        )
        kind, share = EXPERTS[cfg.expert], cfg.top_k + cfg.shared_expert
        self.router = Linear(cfg, cfg.n_embd, cfg.num_experts, bias=False)
        self.router.optim = cfg.router_optimizer
        self.experts = kind(cfg, ExpertLinear, share)
        self.always = nn.ModuleList(kind(cfg, share=share) for _ in range(cfg.shared_expert))
        self.register_buffer("balance", torch.zeros(cfg.num_experts))

    def forward(self, x):
        rows = x.flatten(0, -2)
        N, E, k = len(rows), len(self.balance), self.top_k
        p = self.router(rows.to(torch.promote_types(x.dtype, torch.float32))).softmax(-1)
        chosen = (p + self.balance if self.biased else p).topk(k).indices
        weight = p.gather(-1, chosen)
        weight = weight / weight.sum(-1, keepdim=True) if k > 1 else weight
        expert, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(
            expert, torch.arange(E, device=x.device), right=True, out_int32=True
        )
        y = self.experts.transform(rows.index_select(0, order // k), expert, ends).index_select(
            0, order.argsort()
        )
        y = (y.view(N, k, -1) * weight.unsqueeze(-1).type_as(y)).sum(1)
        y = sum((each.transform(rows) for each in self.always), y)
        load = ends.diff(prepend=ends.new_zeros(1)) / (N * k)
        left = self.left(load, p.detach(), self.balance, k) if self.training else self.balance
        return y.view_as(x), [torch.stack([load, p.mean(0), left, self.balance])]


FFNS = {**EXPERTS, "moe": MoE}


def expert_health(routing):
    """What a routing (..., 4, E) says of the load: each (...,), the entropy in units of that of an even one."""
    load, importance = routing[..., 0, :], routing[..., 1, :]
    entropy = torch.special.entr(load).sum(-1) / math.log(max(2, load.size(-1)))
    return {
        "aux": aux_loss(load, importance),
        "entropy": entropy,
        "load_min": load.amin(-1),
        "load_max": load.amax(-1),
        "dead": (load == 0).sum(-1),
    }


def aux_loss(load, importance):
    """E sum f P over the last dimension (..., E): 1 in balance, E / TOP_K where TOP_K experts have all; 2101.03961."""
    return load.size(-1) * (load * importance).sum(-1)


################ Model #################
class Block(nn.Module):
    """A mixer and an FFN, each a residual branch behind a norm: (B, T, C) -> same, and the routing of the FFN."""

    def __init__(self, cfg, layer):
        super().__init__()
        mixers, ffns, order = (
            cfg.mixer.split(","),
            cfg.ffn.split(","),
            RECURRENCES[cfg.recurrence](cfg),
        )
        self.mixer_norm, self.mixer = NORMS[cfg.norm](cfg), MIXERS[mixers[layer % len(mixers)]](cfg)
        self.ffn_norm, self.ffn = NORMS[cfg.norm](cfg), FFNS[ffns[layer % len(ffns)]](cfg)
        self.dropout = nn.Dropout(cfg.dropout)
        start, scaled = (
            torch.tensor(1 / order.count(order[layer])),
            "scale" in cfg.per_step.split(","),
        )
        self.mixer_scale, self.ffn_scale = (
            Scale(start.clone()) if scaled else nn.Identity() for _ in range(2)
        )

    def forward(self, x):
        x = x + self.mixer_scale(self.dropout(self.mixer(self.mixer_norm(x))))
        y, routing = self.ffn(self.ffn_norm(x))
        return x + self.ffn_scale(self.dropout(y)), routing


def period(cfg):
    """Layers after which the lists of mixers and FFNs repeat together."""
    return math.lcm(len(cfg.mixer.split(",")), len(cfg.ffn.split(",")))


def revisits(cfg):
    """Blocks in the order in which RECURRENCE=shared visits them: ends once, and in turn those between."""
    ends, between = cfg.unshared_ends, range(cfg.n_layer - 2 * cfg.unshared_ends)
    return (
        *range(ends),
        *(ends + i % cfg.n_unique for i in between),
        *(ends + cfg.n_unique + i for i in range(ends)),
    )


RECURRENCES = {  # the block of each visit
    "stacked": lambda cfg: tuple(range(cfg.n_layer)),
    "indexed": lambda cfg: tuple(
        i % period(cfg) for i in range(cfg.n_layer)
    ),  # the same model: all weights in banks
    "shared": revisits,
}
PER_STEP = {
    "none": "?",
    "norm": "_norm.",
    "router": ".router.",
    "scale": "_scale.",
}  # in the names of what it banks


class GPT(nn.Module):
    """Decoder-only transformer, activations in `dtype`: tokens (B, T) -> float32 logits (B, T, V); with targets (B, T),
    mean loss () and the routing (visits of an MoE, 4, E). The blocks are visited in `order`; a tensor named in `banked`
    has a slice for each visit of its block."""

    def __init__(self, cfg, dtype=torch.float32):
        super().__init__()
        self.dtype, self.loss_chunk = dtype, loss_chunk
        self.embed = nn.Parameter(torch.empty(cfg.vocab_size, cfg.n_embd))
        self.head = (
            None if cfg.tie_embeddings else nn.Parameter(torch.empty(cfg.vocab_size, cfg.n_embd))
        )
        INITS[cfg.init](cfg, self.embed, False)
        if self.head is not None:
            INITS[cfg.init](cfg, self.head, cfg.init == "zero_proj")
            normal_(
                self.embed, 1.0 if cfg.init == "zero_proj" else 0.02
            )  # rows that only a norm will read
        self.add_position = POSITIONS[cfg.pos][0](cfg)
        self.dropout = nn.Dropout(cfg.dropout)
        self.order = RECURRENCES[cfg.recurrence](cfg)
        self.blocks, self.banked = self.build_blocks(cfg)
        self.norm = NORMS[cfg.norm](cfg)

    def build_blocks(self, cfg):
        """The blocks, and the names of those of their tensors that are banks: (visits of the block, ...)."""
        firsts, indexed, banked = (
            [self.order.index(i) for i in self.order],
            cfg.recurrence == "indexed",
            set(),
        )
        visits = [
            Block(cfg, i) if indexed or i == first else None for i, first in enumerate(firsts)
        ]
        marks = ["."] if indexed else [PER_STEP[name] for name in cfg.per_step.split(",")]
        for first in set(firsts):
            alike = [
                visits[i if indexed else first].state_dict()
                for i in range(cfg.n_layer)
                if firsts[i] == first
            ]
            for name in [name for name in alike[0] if any(mark in name for mark in marks)]:
                part, _, leaf = name.rpartition(".")
                module, bank = (
                    visits[first].get_submodule(part),
                    torch.stack([tensors[name] for tensors in alike]),
                )
                setattr(module, leaf, bank if leaf in module._buffers else nn.Parameter(bank))
                banked.add(name)
        return nn.ModuleList(visits[first] for first in dict.fromkeys(firsts)), banked

    def visits(self):
        """The blocks in order, as functions; banks are read by one unbind each, whose gradient is written once."""
        banks = [
            {
                name: iter(tensor.unbind(0))
                for name, tensor in block.state_dict(keep_vars=True).items()
                if name in self.banked
            }
            if self.banked
            else {}
            for block in self.blocks
        ]
        for i in self.order:
            own = {name: next(slices) for name, slices in banks[i].items()}
            yield (
                functools.partial(torch.func.functional_call, self.blocks[i], own)
                if own
                else self.blocks[i]
            )

    def forward(self, tokens_BT, targets_BT=None):
        x, routings = (
            self.dropout(self.add_position(F.embedding(tokens_BT, self.embed).to(self.dtype))),
            [],
        )
        for visit in self.visits():
            x, routing = visit(x)
            routings += routing
        x, head = self.norm(x), self.embed if self.head is None else self.head
        if targets_BT is None:
            return F.linear(x, head.type_as(x)).float()
        loss = LinearCrossEntropy.apply(
            x.flatten(0, 1), head, targets_BT.flatten(), self.loss_chunk
        )
        return loss, torch.stack(routings) if routings else loss.new_zeros(0, 4, 0)

    def balances(self):
        """[(balance (E,) of an MoE, which of the visits of MoEs are its own)]: all those of a shared block."""
        moe, found = [i for i in self.order if isinstance(self.blocks[i].ffn, MoE)], {}
        for visit, i in enumerate(moe):
            balance, turn = self.blocks[i].ffn.balance, moe[:visit].count(i)
            turn, balance = (0, balance) if balance.ndim == 1 else (turn, balance[turn])
            found.setdefault((i, turn), (balance, []))[1].append(visit)
        return [*found.values()]

    def flops_per_token(self):
        """Training FLOPs a token: 6 per weight of a matrix product, head included, and 12 C T per attention layer."""
        parts = [
            part
            for i in self.order
            for part in self.blocks[i].modules()
            if hasattr(part, "flops_per_token")
        ]
        return 6 * self.embed.numel() + sum(part.flops_per_token for part in parts)


LOSS_CHUNK = {
    "cuda": 2**28,
    "cpu": 2**23,
}  # logits at a time: a large product on a GPU, the last-level cache on a CPU


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
        weight, total, training = (
            head.type_as(x),
            x.new_zeros((), dtype=torch.float32),
            ctx.needs_input_grad[0],
        )
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


def import_weights(model, path):
    """Fills model from a safetensors file, or a folder with model.safetensors. Raises ConfigError."""
    import safetensors.torch

    file = Path(path) / "model.safetensors" if Path(path).is_dir() else path
    try:
        new = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name.endswith("ffn.balance")
        }  # as is
        model.load_state_dict(
            safetensors.torch.load_file(file) | new, assign=model.embed.is_meta
        )  # there a check
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise ConfigError(
            f"INIT_FROM={path}: expected a safetensors file (no .pt, no checkpoint) of a model of this "
            f"shape, or the folder of a finished run; {' '.join(str(error)[:300].split())}"
        ) from None


############## Optimizers ##############
MUON_SCALES = {  # factor on the orthogonalised update of a matrix (rows, cols)
    "unit": lambda rows, cols: (
        max(rows, cols) ** 0.5
    ),  # unit mean square; modded-nanogpt, record of 2024-10-14
    "original": lambda rows, cols: max(1, rows / cols) ** 0.5,  # torch.optim.Muon
    "match_rms_adamw": lambda rows, cols: 0.2 * max(rows, cols) ** 0.5,
}  # Moonlight, arXiv 2502.16982; torch.optim.Muon


def zeropower_via_newtonschulz5(G, dtype=torch.bfloat16, steps=5, eps=1e-7):
    """Matrices (..., m, n) made nearly orthogonal, singular values 0.7 to 1.2; in bfloat16 torch's Muon bit for bit."""
    a, b, c = (
        3.4445,
        -4.7750,
        2.0315,
    )  # quintic, steepest slope at zero: kellerjordan.github.io/posts/muon
    tall = G.size(-2) > G.size(-1)
    X = G.to(dtype).reshape(-1, *G.shape[-2:])
    X = X.mT if tall else X
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # spectral norm at most 1
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).reshape(G.shape)


def exchange(names, tensor, rows, world):
    """A collective by the first of these names that this torch has: tensor (n, ...) -> (rows, ...)."""
    if world == 1:
        return tensor
    result = tensor.new_empty(rows, *tensor.shape[1:])
    next(getattr(dist, name) for name in names if hasattr(dist, name))(
        result, tensor.contiguous()
    )  # or nccl refuses
    return result


def reduce_scatter(full, world):
    """Sum over the ranks of full (world * n, ...), of which each keeps its own n rows."""
    return exchange(
        ("reduce_scatter_single", "reduce_scatter_tensor"), full, len(full) // world, world
    )


def all_gather(own, world):
    """The ranks' own (n, ...) one after another: (world * n, ...)."""
    return exchange(("all_gather_single", "all_gather_into_tensor"), own, len(own) * world, world)


def squared_norm(tensors):
    """Sum of squares () over a list of tensors, 0.0 for none."""
    return torch.stack(torch._foreach_norm(tensors)).square().sum() if tensors else 0.0


def largest(matrices):
    """Largest magnitude in each of the matrices (..., m, n): (..., 1, 1)."""
    return torch.linalg.vector_norm(matrices, math.inf, (-2, -1), keepdim=True)


class Muon:
    """MomentUm Orthogonalized by Newton-Schulz (kellerjordan.github.io/posts/muon) for matrices, sharded over ranks: of
    those of one shape (..., m, n), each rank orthogonalises a share in one batched product and keeps its momentum."""

    def __init__(self, params, cfg, lr, ranks):
        self.cfg, self.base_lr, self.world, self.rank, self.stacks = (
            cfg,
            lr,
            ranks.world_size,
            ranks.rank,
            [],
        )
        for shape in dict.fromkeys(p.shape[-2:] for p in params):
            members = [p for p in params if p.shape[-2:] == shape]
            sizes = [p[..., 0, 0].numel() for p in members]
            share = math.ceil(sum(sizes) / self.world)
            padding = members[0].new_zeros(share * self.world - sum(sizes), *shape)
            self.stacks.append(
                {
                    "params": members,
                    "sizes": [*sizes, len(padding)],
                    "padding": padding,
                    "momentum": members[0].new_zeros(share, *shape),
                    "grad": None,
                }
            )
        self.dtype = (
            torch.bfloat16 if params[0].is_cuda else torch.float32
        )  # few CPUs multiply bfloat16 fast

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
        for stack in self.stacks:
            momentum = stack["momentum"]
            grad = stack["grad"] if grad_scale is None else stack["grad"] / grad_scale
            # a non-finite one would poison the momentum for good; an expert without tokens would go on along an old one
            still = (skip > 0) | (largest(grad) == 0)
            grad = torch.where(still, momentum, grad)
            momentum.lerp_(grad, 1 - mu)
            update = zeropower_via_newtonschulz5(grad.lerp_(momentum, mu), self.dtype).masked_fill_(
                still, 0
            )
            scale = MUON_SCALES[self.cfg.muon_scale](*momentum.shape[-2:])
            for p, u in zip(stack["params"], all_gather(update, self.world).split(stack["sizes"])):
                if self.cfg.weight_decay:
                    p.view_as(u).mul_(
                        torch.where(largest(u) == 0, 1, 1 - lr * self.cfg.weight_decay)
                    )
                p.add_(u.view_as(p), alpha=-lr * scale)
            stack["grad"] = None  # its memory is for the next backward pass

    def tensors(self, names):
        """For checkpoints: {key: (momentum of a matrix, "own")}, since one rank alone holds it."""
        found = {}
        for stack in self.stacks:
            keys = [
                f"muon.{names[p]}.{i}"
                for p, size in zip(stack["params"], stack["sizes"])
                for i in range(size)
            ]
            first = self.rank * len(stack["momentum"])
            found |= {
                key: (momentum, "own") for key, momentum in zip(keys[first:], stack["momentum"])
            }
        return found


class AdamW:
    """AdamW (arXiv 1711.05101) as torch computes it, fused, sharded over ranks, with the methods of Muon. Of a large
    parameter whose size the ranks divide, each rank holds the moments of a slice; any other is whole on every rank."""

    def __init__(self, params, cfg, lr, ranks, weight_decay=0.0):
        self.cfg, self.base_lr, self.world, self.weight_decay = (
            cfg,
            lr,
            ranks.world_size,
            weight_decay,
        )
        self.sliced = [p for p in params if p.numel() >= 2**16 and p.numel() % self.world == 0]
        self.whole = [p for p in params if p.numel() < 2**16 or p.numel() % self.world]
        self.own = [p.data.view(-1).chunk(self.world)[ranks.rank] for p in self.sliced] + [
            p.data for p in self.whole
        ]
        self.exp_avg, self.exp_avg_sq = ([torch.zeros_like(p) for p in self.own] for _ in range(2))
        self.steps = [torch.zeros((), device=p.device) for p in self.own]
        self.grads = []

    def reduce_grads(self):
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
        adamw(
            self.own,
            self.grads,
            self.exp_avg,
            self.exp_avg_sq,
            [],
            self.steps,
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=self.cfg.beta1,
            beta2=self.cfg.beta2,
            eps=1e-8,
            lr=self.base_lr * factor,
            weight_decay=self.weight_decay,
            grad_scale=grad_scale,
            found_inf=skip,
        )
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
    "muon": lambda params, cfg, ranks: Muon(
        params, cfg, 0.1 * cfg.lr if cfg.muon_lr is None else cfg.muon_lr, ranks
    ),
    "adamw": lambda params, cfg, ranks: AdamW(params, cfg, cfg.lr, ranks, cfg.weight_decay),
}


def split_params(model):
    """{"matrices", "embed", "head", "vectors": [Parameter]}; matrices of a module with optim = "adamw" are vectors."""
    opted_out = {
        id(p) for m in model.modules() if getattr(m, "optim", "") == "adamw" for p in m.parameters()
    }
    named = [
        (name.partition(".")[2], p)
        for name, p in model.blocks.named_parameters()
        if id(p) not in opted_out
    ]
    matrices = [
        p
        for name, p in named
        if p.ndim - (name in model.banked) >= 2 and not name.endswith(".bias")
    ]
    groups = {
        "matrices": matrices,
        "embed": [model.embed],
        "head": [] if model.head is None else [model.head],
    }
    taken = {id(p) for group in groups.values() for p in group}
    groups["vectors"] = [p for p in model.parameters() if id(p) not in taken]
    return groups


def build_optimizers(model, cfg, ranks):
    """The optimizers of cfg over the groups of split_params, learning rates as in the settings."""
    groups = split_params(model)
    optimizers = [OPTIMIZERS[cfg.optimizer](groups["matrices"], cfg, ranks)]
    for name, lr in ("embed", cfg.embed_lr), ("head", cfg.head_lr), ("vectors", None):
        if groups[name]:
            decay = cfg.weight_decay * (name != "vectors")
            optimizers.append(AdamW(groups[name], cfg, cfg.lr if lr is None else lr, ranks, decay))
    return optimizers


SCHEDULES = {  # fraction of the peak after the warm-up
    "trapezoid": lambda step, cfg: min(
        1.0, (cfg.num_iterations - step) / max(1, cfg.warmdown_iters)
    ),
    "cosine": lambda step, cfg: (
        cfg.min_lr_frac
        + (1 - cfg.min_lr_frac)
        * 0.5
        * (
            1
            + math.cos(
                math.pi * (step - cfg.warmup_iters) / max(1, cfg.num_iterations - cfg.warmup_iters)
            )
        )
    ),
}


def lr_factor(step, cfg):
    """Fraction of the peak learning rate for the update that follows `step` updates."""
    return (
        (step + 1) / cfg.warmup_iters
        if step < cfg.warmup_iters
        else SCHEDULES[cfg.lr_schedule](step, cfg)
    )


def aux_coef(step, cfg):
    """Weight of the balance loss in the step that follows `step` updates, 0 where BALANCE is another."""
    ends = cfg.aux_loss_coef_start, cfg.aux_loss_coef_end
    ends = (cfg.aux_loss_coef, cfg.aux_loss_coef) if None in ends else ends
    fractions = cfg.aux_warmup_frac, cfg.aux_decay_end_frac
    return float(np.interp(step / cfg.num_iterations, fractions, ends)) * (cfg.balance == "aux")


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
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = (
    20240520,
    1,
    256,
)  # the shard format of llm.c and modded-nanogpt


def shard_tokens(path):
    """Number of tokens of a shard, after its header and size are verified. Raises DataError."""
    try:
        header, size = np.fromfile(path, dtype="<i4", count=HEADER_INTS), os.path.getsize(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    magic, version, tokens = [*header[:3].tolist(), 0, 0, 0][:3]  # a file may be shorter
    whole = 4 * HEADER_INTS + 2 * tokens
    if (magic, version, size) != (SHARD_MAGIC, SHARD_VERSION, whole) or tokens < 1:
        raise DataError(
            f"{path}: expected magic {SHARD_MAGIC}, version {SHARD_VERSION}, a token or more and {whole} "
            f"bytes for {tokens}, found {magic}, {version} and {size} bytes; fetch or make the shard again"
        )
    return tokens


def load_shard(path):
    """Memory map of a shard's tokens, (n,) uint16. Raises DataError."""
    return np.memmap(
        path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(shard_tokens(path),)
    )


class ShardLoader:
    """Samples of T + 1 tokens, each from i * T of a shard, in a glob's order, epoch after epoch. Raises DataError."""

    def __init__(self, pattern, cfg, shuffle=False, limit=0):
        self.files = sorted(glob.glob(pattern))
        if not self.files:
            shards = math.ceil(
                cfg.num_iterations * cfg.batch_size * cfg.sequence_length / 1e8
            )  # as FineWeb's are
            raise DataError(
                f"no file matches {pattern} (looked from {os.getcwd()}); {how_to_get(pattern, shards)}"
            )
        self.shards = [load_shard(file) for file in self.files]
        self.length, self.vocab_size, self.seed, self.shuffle = (
            cfg.sequence_length,
            cfg.vocab_size,
            cfg.seed,
            shuffle,
        )
        ends = np.cumsum([(len(shard) - 1) // self.length for shard in self.shards])
        self.ends = np.minimum(ends, limit // self.length) if limit else ends
        self.samples, self.tokens = int(self.ends[-1]), sum(len(shard) for shard in self.shards)
        self.order = functools.lru_cache(1)(
            lambda epoch: np.random.default_rng((self.seed, int(epoch))).permutation(self.samples)
        )

    def read(self, first, count):
        """Samples first .. first + count - 1 of the global index: (count, T + 1) int64. Raises DataError."""
        which, index = self.place(first, count)
        batch = np.empty((count, self.length + 1), dtype=np.int64)
        for shard in np.unique(which):
            windows = np.lib.stride_tricks.sliding_window_view(self.shards[shard], self.length + 1)[
                :: self.length
            ]
            batch[which == shard] = windows[index[which == shard]]
        if batch.max() >= self.vocab_size:
            self.check_tokens({*which})
        return batch

    def place(self, first, count):
        """Where these samples of the global index are: (number of the shard, index within it), (count,) each."""
        epochs, index = np.divmod(np.arange(first, first + count), self.samples)
        if self.shuffle:
            index = np.concatenate(
                [self.order(epoch)[index[epochs == epoch]] for epoch in np.unique(epochs)]
            )
        which = np.searchsorted(self.ends, index, side="right")
        return which, index - np.concatenate(([0], self.ends))[which]

    def require(self, name, value, samples):
        """Raises DataError where there are fewer samples than the setting `name` needs."""
        if self.samples < (samples := max(1, samples)):
            shards = math.ceil(len(self.shards) * samples / max(1, self.samples))
            more = f", set MAX_EPOCHS=0, raise MAX_TRAIN_TOKENS, or get more; {how_to_get(self.files[0], shards)}"
            raise DataError(
                f"{name}={value} needs {samples:,} samples of {self.length} tokens; {self.files[0]} "
                f"and its like have {self.samples:,}; lower {name}{more * (name == 'NUM_ITERATIONS')}"
            )

    def check_tokens(self, shards=()):
        """Scans every token of the shards with these numbers, or of all. Raises DataError."""
        for shard in shards or range(len(self.shards)):
            bad = np.argmax(self.shards[shard] >= self.vocab_size)
            if (token := self.shards[shard][bad]) >= self.vocab_size:
                raise DataError(
                    f"{self.files[shard]}: token {token} at offset {bad} is not below VOCAB_SIZE="
                    f"{self.vocab_size}; set VOCAB_SIZE to the tokenizer's size, or 0 to read it"
                )

    def prefetch(self, slices, device, depth=4):
        """Yields (inputs (n, T), targets (n, T), seconds waited) for each (first, count), read ahead by a thread."""

        def load(first, count):
            batch = torch.from_numpy(self.read(first, count))
            return batch.pin_memory() if device.type == "cuda" else batch

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            batches = (pool.submit(load, *piece) for piece in slices)
            ahead = deque(itertools.islice(batches, depth))
            while ahead:
                start, ready = time.perf_counter(), ahead[0].done()
                batch = ahead.popleft().result()
                waited = 0.0 if ready else time.perf_counter() - start
                ahead.extend(itertools.islice(batches, 1))
                batch = batch.to(device, non_blocking=True)
                yield batch[:, :-1], batch[:, 1:], waited


################ Health ################
HEALTH = "aux entropy load_min load_max dead".split()  # of each layer with experts


def curve_columns(cfg):
    """Names of the columns of the curve: those of every run, and of experts the coefficient and each layer's health."""
    ffns = itertools.islice(itertools.cycle(cfg.ffn.split(",")), cfg.n_layer)
    names = [f"{name}_{layer}" for layer, ffn in enumerate(ffns) if ffn == "moe" for name in HEALTH]
    return CURVE + ["aux_coef"] * bool(names) + names


############### Training ###############
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(cfg):
    """cfg with what auto and 0 leave open: device, dtype, compile and vocab_size. Raises ConfigError, DataError."""
    device = (
        ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    )
    if device == "cuda" and not (cfg.dry_run or torch.cuda.is_available()):
        raise ConfigError("DEVICE=cuda: torch finds no CUDA device here; set DEVICE=cpu or auto")
    old = (
        device == "cuda"
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    )
    dtype = (
        {"cpu": "float32", "cuda": "float16" if old else "bfloat16"}[device]
        if cfg.dtype == "auto"
        else cfg.dtype
    )
    vocab_size = cfg.vocab_size or dataset_index(cfg.input_bin).get("vocab_size")
    if not vocab_size:
        raise DataError(
            f"VOCAB_SIZE=0 needs index.json beside {cfg.input_bin}; set it, or {how_to_get(cfg.input_bin)}"
        )
    run_id = cfg.run_id or (
        Path(cfg.resume).parent.name if cfg.resume not in ("auto", "none") else ""
    )
    compiled = (
        str(int(device == "cuda" and not cfg.deterministic))
        if cfg.compile == "auto"
        else cfg.compile
    )
    return dataclasses.replace(
        cfg, device=device, dtype=dtype, compile=compiled, vocab_size=vocab_size, run_id=run_id
    )


def make_plan(cfg, ranks):
    """What a run of cfg on these ranks will be, without touching a device: counts as plain integers."""
    with torch.device("meta"):
        model = GPT(cfg)
    total, E = sum(p.numel() for p in model.parameters()), cfg.num_experts
    experts = sum(
        p.numel()
        for part in model.modules()
        if isinstance(part, ExpertLinear)
        for p in part.parameters()
    )
    return {
        "world_size": ranks.world_size,
        "config_hash": cfg.hash(),
        "params_total": total,
        "params_active": total - experts * (E - cfg.top_k) // E,
        "flops_per_token": model.flops_per_token(),
        "tokens_per_step": cfg.batch_size * cfg.sequence_length,
        "tokens_needed": cfg.num_iterations * cfg.batch_size * cfg.sequence_length + 1,
        "tokens_on_disk": sum(shard_tokens(file) for file in glob.glob(cfg.input_bin)),
        "grad_accumulation": cfg.batch_size // (cfg.device_batch_size * ranks.world_size),
    }


def check_batch(cfg, ranks):
    """Raises ConfigError where the ranks cannot share the batch in whole micro-batches."""
    batch, micro, world = cfg.batch_size, cfg.device_batch_size, ranks.world_size
    if batch % (micro * world):
        able = " or ".join(str(n) for n in range(1, batch // micro + 1) if batch % (n * micro) == 0)
        near = " or ".join(
            str(n) for n in (batch - batch % (micro * world), batch + -batch % (micro * world)) if n
        )
        raise ConfigError(
            f"BATCH_SIZE={batch}: must be a multiple of DEVICE_BATCH_SIZE={micro} x {world} ranks; "
            f"choose {near}" + f", or {able} ranks" * bool(able)
        )


def preflight(cfg, ranks):
    """Loaders for training and validation, after all that can be checked has been. Raises ConfigError, DataError."""
    if cfg.device == "cuda" and ranks.local_world_size > (devices := torch.cuda.device_count()):
        raise ConfigError(
            f"{ranks.local_world_size} ranks on this machine but {devices} CUDA devices; start torchrun "
            f"with --nproc_per_node={devices}, or set DEVICE=cpu"
        )
    train, val = (
        ShardLoader(cfg.input_bin, cfg, cfg.shuffle, cfg.max_train_tokens),
        ShardLoader(cfg.input_val_bin, cfg),
    )
    samples = cfg.num_iterations * cfg.batch_size
    train.require(
        "NUM_ITERATIONS", cfg.num_iterations, math.ceil(samples / (cfg.max_epochs or math.inf))
    )
    val.require("VAL_TOKENS", cfg.val_tokens, cfg.val_tokens // cfg.sequence_length)
    if both := {*map(os.path.realpath, train.files)} & {*map(os.path.realpath, val.files)}:
        raise DataError(f"{min(both)} matches INPUT_BIN and INPUT_VAL_BIN; validate on other data")
    if cfg.init_from:
        with torch.device("meta"):
            import_weights(GPT(cfg), cfg.init_from)
    for loader in (train, val):
        if 2 * loader.tokens < 2**30:  # bytes; larger data is checked batch by batch
            loader.check_tokens()
    return train, val


@dataclasses.dataclass
class State:
    """What a step changes."""

    model: GPT
    optimizers: list
    loss_scale: LossScale
    step: int = 0  # updates made
    skipped: list = dataclasses.field(
        default_factory=list
    )  # (1 + ranks,) a step: update left out, ranks not finite

    @classmethod
    def build(cls, cfg, ranks):
        """Model and optimizers, the same on every rank because the seed is."""
        torch.manual_seed(cfg.seed)
        model = GPT(cfg, DTYPES[cfg.dtype]).to(ranks.device(cfg))
        return cls(
            model,
            build_optimizers(model, cfg, ranks),
            LossScale(DTYPES[cfg.dtype], ranks.device(cfg)),
        )

    def tensors(self):
        """What a checkpoint holds: {key: (tensor, "copy" where every rank has the same, else "own" or "slice")}."""
        names = {p: name for name, p in self.model.named_parameters()}
        found = {
            f"model.{name}": (tensor, "copy") for name, tensor in self.model.state_dict().items()
        }
        for optimizer in self.optimizers:
            found |= optimizer.tensors(names)
        return found | {
            f"loss_scale.{n}": (getattr(self.loss_scale, n), "copy")
            for n in ("value", "good_steps")
        }


def compile_model(model, cfg, device):
    """Compiles blocks and loss, runs them once forward, backward and in evaluation, so that no step waits for it."""
    for block in model.blocks:
        block.compile()
    model.loss_chunk = torch.compile(
        loss_chunk, dynamic=False
    )  # two sizes, of which the last chunk has its own
    tokens = torch.zeros(
        cfg.device_batch_size, cfg.sequence_length, dtype=torch.int64, device=device
    )
    model(tokens, tokens)[0].backward()
    model.zero_grad()
    with torch.no_grad():
        model.eval()(tokens, tokens)
    model.train()
    dist.barrier()


def train_step(state, cfg, inputs, targets):
    """One update from this rank's (n, T) of the batch: its mean loss, gradient norm, routing, still on the device."""
    micro, scale, rank, world = (
        cfg.device_batch_size,
        state.loss_scale.value,
        dist.get_rank(),
        dist.get_world_size(),
    )
    if cfg.dropout:  # no generator has a state to save: every step and rank has its own seed
        torch.manual_seed(
            int(
                np.random.SeedSequence((cfg.seed, state.step, rank)).generate_state(1, np.uint64)[0]
            )
        )
    weight, losses, routings, coef = (
        micro / (len(inputs) * world),
        [],
        [],
        aux_coef(state.step, cfg),
    )
    for x, y in zip(inputs.split(micro), targets.split(micro)):
        loss, routing = state.model(x, y)
        aux = aux_loss(routing[:, 3], routing[:, 1]).sum() / max(1, len(routing))
        (loss + coef * aux).backward(scale * weight)
        losses.append(loss.detach())
        routings.append(routing.detach())
    loss, routing, guilty = (
        sum(losses) * weight,
        sum(routings) * weight,
        torch.zeros(world, device=scale.device),
    )
    squares = sum(optimizer.reduce_grads() for optimizer in state.optimizers)
    own = squares if world == 1 else squared_norm([p.grad for p in state.model.parameters()])
    guilty[rank] = ~torch.isfinite(loss + own)
    stats = torch.cat([torch.stack([loss, squares]), guilty, routing.flatten()])
    dist.all_reduce(stats)
    guilty, routing = stats[2 : 2 + world], stats[2 + world :].view_as(routing)
    loss, norm = stats[0], stats[1].sqrt() / scale
    skip, lost = (~torch.isfinite(norm + loss)).float(), (~torch.isfinite(loss)).float()
    clip = (norm / cfg.grad_clip).clamp(min=1) if cfg.grad_clip else 1
    grad_scale = scale * clip if cfg.grad_clip or state.loss_scale.active else None
    for optimizer in state.optimizers:
        optimizer.step(lr_factor(state.step, cfg), grad_scale, skip)
    state.model.zero_grad()
    for balance, visits in state.model.balances():
        balance.copy_(
            torch.where(skip > 0, balance, sum(routing[visit, 2] for visit in visits) / len(visits))
        )
    bad = torch.where(
        scale > 1, lost, skip
    )  # an overflow is how a scale finds out how far it can go
    state.skipped.append(torch.cat([bad.view(1), guilty]))
    state.loss_scale.update(skip)
    state.step += 1
    return loss, norm, routing


@torch.no_grad()
def evaluate(model, loader, cfg, ranks, watch):
    """Mean loss of the first VAL_TOKENS, each rank taking a share of the samples; None where the run is to end."""
    samples, device, micro = (
        cfg.val_tokens // cfg.sequence_length,
        ranks.device(cfg),
        cfg.device_batch_size,
    )
    slices = [
        (i, min(micro, samples - i))
        for i in range(micro * ranks.rank, samples, micro * ranks.world_size)
    ]
    total = torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    with contextlib.closing(loader.prefetch(slices, device)) as batches:
        for i, (x, y, _) in enumerate(batches):
            if (
                i < samples // (micro * ranks.world_size) and watch.agreed()
            ):  # as often as every rank comes by here
                break
            odd = cfg.compile == "1" and len(x) < micro  # not worth a compilation
            with torch.compiler.set_stance("force_eager") if odd else contextlib.nullcontext():
                total += model(x, y)[0] * len(x)
    model.train()
    dist.all_reduce(total)
    return None if watch.status else total.item() / samples


class Meter(Clock):
    """Turns what the loop measures into lines, points of the curve and the summary."""

    def __init__(self, cfg, ranks, records, loader):
        super().__init__(ranks.device(cfg))
        self.cfg, self.records, self.loader = cfg, records, loader
        self.flops = records.summary["flops_per_token"] / ranks.world_size
        self.bytes_per_token = dataset_index(cfg.input_val_bin).get("bytes_per_token")
        self.last = 0, 0.0  # tokens and train time of the last point
        self.bad_steps, self.figures = (
            [0, 0],
            {"train_time": 0.0},
        )  # updates left out: in all, in a row until now

    def facts(self, state, stats):
        """What a checkpoint has to know of the measurements, and stats, which are those of the last step."""
        self.count_bad_steps(state)
        self.sum_up(state)
        kept = {name: getattr(self, name) for name in ("seconds", "last", "bad_steps", "figures")}
        return {"stats": stats and [stat.tolist() for stat in stats], "meter": kept}

    def resume(self, facts):
        """Goes on from facts; returns the stats of the step before."""
        vars(self).update(facts["meter"])
        self.records.summary |= self.figures
        return facts["stats"] and [torch.tensor(stat) for stat in facts["stats"]]

    def count_bad_steps(self, state):
        """Logs whose gradient was not finite since the last call, and on what data. Raises Diverged after too many."""
        steps, most = torch.stack(state.skipped).tolist() if state.skipped else [], 0
        for step, (skipped, *ranks) in enumerate(steps, state.step - len(steps)):
            self.bad_steps = [
                self.bad_steps[0] + bool(skipped),
                self.bad_steps[1] + 1 if skipped else 0,
            ]
            most, share = max(most, self.bad_steps[1]), self.cfg.batch_size // len(ranks)
            for rank in (
                [rank for rank, bad in enumerate(ranks) if bad or not any(ranks)] if skipped else []
            ):
                (shard,), (index,) = self.loader.place(step * self.cfg.batch_size + rank * share, 1)
                self.records.print(
                    f"step:{step + 1}/{self.cfg.num_iterations} bad_gradient rank:{rank} shard:"
                    f"{self.loader.files[shard]!r} offset:{index * self.loader.length} samples:{share}"
                )
        state.skipped.clear()
        if most > self.cfg.max_bad_steps:
            self.sum_up(state)
            raise Diverged(
                f"loss or gradients were not finite {most} times in a row until step {state.step}; "
                "lower LR or MUON_LR, or set GRAD_CLIP=1"
            )

    def point(self, state, stats, val_loss):
        """Logs a step: stats (loss, gradient norm) of its update or None, and the validation loss after it or None."""
        self.count_bad_steps(state)
        cfg, step, seconds = self.cfg, state.step, self.now() - self.start if state.step else 0.0
        tokens = step * cfg.batch_size * cfg.sequence_length
        values = {
            "step": step,
            "tokens": tokens,
            "epoch": step * cfg.batch_size / self.loader.samples,
            "train_time": seconds,
            "data_wait": self.seconds["data_wait"],
        }
        times = f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(1, step):.2f}ms"
        if stats is not None:
            loss, norm, routing = (
                stats[0].item(),
                stats[1].item(),
                stats[2].cpu(),
            )  # here alone the loop waits
            values |= {
                "train_loss": loss,
                "grad_norm": norm,
                "lr": cfg.lr * lr_factor(step - 1, cfg),
                "tokens_per_sec": (tokens - self.last[0]) / (seconds - self.last[1]),
            }
            self.records.print(f"step:{step}/{cfg.num_iterations} train_loss:{loss:.4f} {times}")
            if len(routing) and (
                step % cfg.balance_log_interval == 0 or step == cfg.num_iterations
            ):
                values |= self.experts(state, routing)
        if val_loss is not None:
            values["val_loss"] = val_loss
            self.records.print(f"step:{step}/{cfg.num_iterations} val_loss:{val_loss:.4f} {times}")
        self.last = tokens, seconds
        self.records.point(values)
        self.sum_up(state, val_loss)
        if not math.isfinite(val_loss or 0) or values.get("grad_norm") == 0:
            raise Diverged(
                f"val_loss is {val_loss}, the gradient's norm {values.get('grad_norm')} at step {step}; "
                "lower LR or MUON_LR, or set GRAD_CLIP=1"
            )

    def experts(self, state, routing):
        """Logs the load of the experts, pooled over the visits of each; returns that of each visit, for the curve."""
        pooled = expert_health(
            torch.stack([routing[visits].mean(0) for _, visits in state.model.balances()])
        )
        reduce = {
            "aux": Tensor.mean,
            "entropy": Tensor.mean,
            "load_min": Tensor.min,
            "load_max": Tensor.max,
        }
        figures = {name: how(pooled[name]).item() for name, how in reduce.items()}
        told = " ".join(f"{name}:{value:.4f}" for name, value in figures.items())
        coef, dead = aux_coef(state.step - 1, self.cfg), pooled["dead"].sum().item()
        self.records.print(
            f"[MOE] step:{state.step}/{self.cfg.num_iterations} coef:{coef:.4f} {told} dead:{dead} "
            "dropped:0"
        )  # for an expert takes whatever comes
        figures |= {"dead": dead, "max_vio": figures["load_max"] * self.cfg.num_experts - 1}
        self.figures |= {f"moe_{name}": value for name, value in figures.items()}
        each = expert_health(routing)
        cells = torch.stack([each[name] for name in HEALTH], dim=-1).flatten().tolist()
        return dict(zip(self.records.columns[len(CURVE) :], [coef, *cells]))

    def sum_up(self, state, val_loss=None):
        """Brings the summary's figures up to this step."""
        tokens = state.step * self.cfg.batch_size * self.cfg.sequence_length
        seconds = self.now() - self.start if state.step else 0.0
        speed = tokens / seconds if tokens else None
        self.figures |= self.seconds | {
            "bad_steps": self.bad_steps[0],
            "tokens": tokens,
            "train_time": seconds,
            "tokens_per_sec": speed,
            "step_avg": 1000 * seconds / state.step if tokens else None,
            "peak_mem": peak_memory(self.device),
            "mfu": model_flops_utilization(self.cfg, self.device, speed * self.flops)
            if tokens
            else None,
            "compile_time": self.seconds["compile_time"] or None,
        }
        if val_loss is not None:
            bits = val_loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None
            best = min(val_loss, self.figures.get("best_loss", math.inf))
            self.figures |= {
                "final_loss": val_loss,
                "best_loss": best,
                "bits_per_byte": bits,
                "ppl": math.exp(val_loss) if val_loss < 700 else None,
            }
        self.records.summary |= self.figures


def train(cfg, ranks, loaders, records, watch, path):
    """The run from its beginning or the checkpoint at `path`, records.summary kept current; returns its status."""
    train_loader, val_loader = loaders
    checkpoints, stats = Checkpoints(cfg, ranks, records), None
    meter, state = Meter(cfg, ranks, records, train_loader), State.build(cfg, ranks)
    if path:
        stats = meter.resume(facts := checkpoints.load(state, path))
        checkpoints.save(state, facts)  # where that was another run's: now it is this one's too
    elif cfg.init_from:
        import_weights(state.model, cfg.init_from)
    if cfg.compile == "1":
        records.print("compiling blocks and loss: a minute or two the first time on a machine")
        with meter.off_the_clock("compile_time"):
            compile_model(state.model, cfg, meter.device)
    first, share, due = state.step, cfg.batch_size // ranks.world_size, False
    meter.start = meter.now() - meter.figures["train_time"]
    slices = (
        (step * cfg.batch_size + ranks.rank * share, share)
        for step in range(first, cfg.num_iterations)
    )
    with contextlib.closing(train_loader.prefetch(slices, meter.device)) as batches:
        while True:  # `step` updates have been made, of which the last is not yet logged: a resumed run enters here
            step, last = state.step, state.step == cfg.num_iterations
            due |= last or cfg.save_every > 0 and step > first and step % cfg.save_every == 0
            if (
                watch.agreed()
                or due
                and (
                    not stats
                    or stats[0].isfinite()
                    and stats[1] != 0
                    and (last or stats[1].isfinite())
                )
            ):  # else it has diverged, or may have
                with meter.off_the_clock("save_time"):  # before the validation, which may fail
                    checkpoints.save(state, meter.facts(state, stats))
                due = False
            if step == first + 1:
                watch.hurry()
            validating = last or cfg.val_every and step % cfg.val_every == 0
            logging = stats and (
                step == 1
                or step % cfg.log_every == 0
                or len(stats[2])
                and step % cfg.balance_log_interval == 0
            )
            if not watch.status and (validating or logging):
                with meter.off_the_clock("eval_time"):
                    val_loss = (
                        evaluate(state.model, val_loader, cfg, ranks, watch) if validating else None
                    )
                if watch.status:
                    continue  # the validation was cut short: save, and leave the point to who goes on
                meter.point(state, stats, val_loss)
            if watch.status:
                records.print(
                    f"{watch.status} at step {step}: RUN_ID={records.folder.name} RESUME=auto goes on here"
                )
            if watch.status or last:
                break
            inputs, targets, waited = next(batches)
            stats = train_step(state, cfg, inputs, targets)
            meter.seconds["data_wait"] += waited
    checkpoints.wait(last=True)
    if not watch.status and ranks.rank == 0:
        export_weights(state.model, cfg, records.folder)
    return watch.status or "ok"


def main(argv, env):
    """One run as the environment sets it; returns the exit code."""
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return 0
    ranks, records, store = Ranks.from_env(env), None, None
    if (
        env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    ):  # the launcher's outlives the ranks that it starts again
        store = dist.TCPStore(
            env["MASTER_ADDR"], int(env["MASTER_PORT"]), timeout=timedelta(minutes=1)
        )
    try:
        if (
            env.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
            and store
            and store.check(["train_gpt/exit"])
        ):
            return int(store.get("train_gpt/exit"))  # it would fail again
        restarted = bool(store) and store.check(["train_gpt/claimed"])
        if argv:
            raise ConfigError(
                f"{argv[0].partition('=')[0]} is no option; settings go so: LR=0.003 python train_gpt.py"
            )
        asked = Config.from_env(env)
        cfg = resolve(asked)
        check_batch(cfg, ranks)
        plan, warnings = make_plan(cfg, ranks), cautions(env, cfg)
        if cfg.dry_run:
            print("".join(f"warning: {warning}\n" for warning in warnings), end="", file=sys.stderr)
            print(
                "\n".join(
                    f"{key}:{value}" for key, value in (dataclasses.asdict(cfg) | plan).items()
                )
            )
            return 0
        loaders = preflight(cfg, ranks)
        data = (
            fingerprint(loaders, Path(cfg.log_dir)) if ranks.rank == 0 else ""
        )  # before others wait in the group
        records = Records(
            cfg, setup(cfg, ranks, env, store), ranks.rank, curve_columns(cfg), SOURCE
        )
        changes = " ".join(
            f"{name}={shlex.quote(str(int(value) if value is True or value is False else value))}"
            for name, value in asked.changes().items()
            if name.lower() not in LABELS
        )
        facts = plan | {
            "device_name": device_name(ranks.device(cfg)),
            "changes": changes,
            "data_fingerprint": data,
        }
        path = agree(lambda: records.open(facts, warnings, restarted))
        records.live = True
        if store:
            store.set("train_gpt/claimed", "1")
        with contextlib.closing(Watch(records.folder, ranks, cfg.hang_timeout)) as watch:
            records.close(train(cfg, ranks, loaders, records, watch, path))
            dist.barrier()  # until rank 0 has written everything, no signal may end another
        dist.destroy_process_group()
        return 1 if records.lost else 0
    except (Exception, KeyboardInterrupt) as error:
        return report(error, ranks, records, env, store, Config)


if __name__ == "__main__":
    code = main(sys.argv[1:], os.environ)
    with contextlib.suppress(OSError):  # who reads may be gone
        sys.stdout.flush()
    os._exit(code)  # sys.exit would wait for a save that waits for a rank that hangs
