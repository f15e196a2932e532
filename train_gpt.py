"""
Trains a GPT on token shards with Muon + AdamW; every setting is an environment variable.
    python train_gpt.py --help                              # settings: default, choices, meaning
    DRY_RUN=1 python train_gpt.py                           # the plan: parameters, FLOPs, tokens
    PRESET=quickstart python train_gpt.py                   # one process on the device there is
    torchrun --standalone --nproc_per_node=8 train_gpt.py   # the default: GPT-2 small, 8 GPUs

Sections: Config, Layers, Gates, Mixers, FFNs, Model, Optimizers, Data, Training. Beside this file
lie scripts/harness/, which keeps a run, its log, checkpoints and records, on scripts/store/, which
keeps files, and scripts/ops/: products, the loss and recurrences, each a formula that another
library could compute, what the ranks share of an update, and the drawing of text from a model.
Shapes: B sequences, T positions, C channels (n_embd), H heads, D head size, F hidden units (d_ff),
V vocabulary, E experts, N = B * T tokens. A suffix gives the layout where it is not plain: q_BTHD.
"""

import sys
from pathlib import Path

# Before torch loads: the log has the text that runs.
SOURCE = Path(__file__).read_text("utf-8")
sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))  # our harness, no other

import os

from store.process import before_torch

if __name__ == "__main__":  # who only imports this file keeps the environment as it is
    before_torch(os.environ)

import concurrent.futures
import contextlib
import dataclasses
import glob
import itertools
import math
import re
import time
from collections import Counter, deque
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

from harness.checkpoints import export_weights, import_weights
from harness.provenance import bytes_per_token, check_tokenizers, dataset_folder, dataset_index
from harness.provenance import fingerprint, how_to_get
from harness.run import Run
from harness.settings import Settings, settings_table
from store.contract import RUN_ID_PATTERN, RUN_ID_RULE, ConfigError, DataError
from store.files import quoted, regular
from store.source import source_hash
from ops.averages import averaged
from ops.cross_entropy import LinearCrossEntropy, loss_chunk, pad_head, rows_per_chunk, score_chunk
from ops.cross_entropy import soft_cap
from ops.experts import HEALTH, Gather, aux_loss, expert_health, leave_bias, leave_load
from ops.experts import leave_state, pooled_health, sort_by_expert
from ops.generation import generate
from ops.loss_scale import LossScale
from ops.orthogonalize import keep_rows, norm_rows, polar_express
from ops.orthogonalize import zeropower_via_newtonschulz5
from ops.products import GroupedMatmul, linear
from ops.recurrences import chunked_wkv, gated_delta_rule, gru, linear_scan, with_past
from ops.sharding import Optimizer, squared_norm

########################################
#                Config                #
########################################


class Rules(Settings):
    """Which values the settings of Config may have, and which of them matter when."""

    SYNONYMS = {
        "LEARNING_RATE": "LR",
        "EPOCHS": "MAX_EPOCHS",
        "BLOCK_SIZE": "SEQUENCE_LENGTH",
        "EXPERTS": "NUM_EXPERTS",
        "N_EXPERTS": "NUM_EXPERTS",
        "D_MODEL": "N_EMBD",
        "MAX_ITERS": "NUM_ITERATIONS",
        "PER_STEP": "PER_VISIT",  # its name in earlier versions
        "SOFTCAP": "LOGIT_SOFTCAP",
        "COOLDOWN_FRAC": "WARMDOWN_FRAC",
        "CAUTIOUS_WEIGHT_DECAY": "CAUTIOUS_DECAY",
        "EMA_STEPS": "EMA_ITERS",
        "EMA": "EMA_ITERS",
        "EMA_DECAY": "EMA_ITERS",
        "MOMENTUM_WARMUP": "MOMENTUM_WARMUP_ITERS",
        "WD_SCHEDULE": "DECAY_SCHEDULE",
        "NUM_LAYERS": "N_LAYER",
        "NUM_HEADS": "N_HEAD",
        "HIDDEN_SIZE": "N_EMBD",
        "SEQ_LEN": "SEQUENCE_LENGTH",
        "MAX_STEPS": "NUM_ITERATIONS",
    }
    LISTS = ("mixer", "ffn", "per_visit", "trackers")
    BOUNDS = {  # inclusive
        "batch_size device_batch_size sequence_length num_iterations log_every": (1, 2**31),
        "balance_log_interval hang_timeout": (1, 2**31),
        "n_layer n_unique": (1, 512),
        "n_head n_embd num_experts top_k": (1, 2**16),
        "val_every save_every max_epochs warmup_iters warmdown_iters": (0, 2**31),
        "d_ff": (0, 2**20),
        "momentum_warmup_iters momentum_cooldown_iters ema_iters value_embeds": (0, 2**31),
        "seed max_bad_steps sample_every unshared_ends max_train_tokens": (0, 2**40),
        "keep_last": (2, 2**31),
        "val_tokens": (1, 2**40),
        "vocab_size": (0, 65536),
        "lr embed_lr head_lr muon_lr peak_tflops": (1e-12, 1e30),
        "dropout beta1 beta2 muon_momentum momentum_start": (0, 0.9999999),
        "aux_warmup_frac aux_decay_end_frac min_lr_frac warmdown_frac": (0, 1),
        "aux_loss_coef aux_loss_coef_start aux_loss_coef_end grad_clip weight_decay": (0, 1e6),
        "logit_softcap": (0, 1e6),
    }
    LABELS = "run_id stage variant note dry_run log_dir results_csv resume trackers".split()
    NOT_HASHED = """
        preset run_id stage variant note dry_run input_bin input_val_bin peak_tflops resume
        save_every keep_last max_bad_steps hang_timeout balance_log_interval log_dir results_csv
        log_every sample_every trackers
    """.split()
    SCHEDULED = """
        num_iterations lr_schedule warmup_iters warmdown_iters warmdown_frac min_lr_frac
        decay_schedule momentum_start momentum_warmup_iters momentum_cooldown_iters
        aux_loss_coef aux_loss_coef_start aux_loss_coef_end aux_warmup_frac aux_decay_end_frac
    """.split()
    AUTO = {  # settings that may say auto, and the setting that they follow then
        "embed_lr": "lr",
        "head_lr": "lr",
        "muon_lr": "lr",
        "d_ff": "n_embd",
        "vocab_size": "input_bin",
        "peak_tflops": "device",
    }
    NEEDS = {  # what must hold, or else these settings have no effect
        "FFN=moe": """num_experts top_k expert shared_expert router_optimizer aux_loss_coef
            aux_loss_coef_start aux_loss_coef_end aux_warmup_frac aux_decay_end_frac""",
        "BALANCE=aux": """aux_loss_coef aux_loss_coef_start aux_loss_coef_end aux_warmup_frac
            aux_decay_end_frac""",
        "AUX_LOSS_COEF_START=none": "aux_loss_coef",
        "AUX_LOSS_COEF_START!=none": "aux_warmup_frac aux_decay_end_frac",
        "MIXER=attention": "attngate gatepos gateact gate_optimizer qk_norm",
        "ATTNGATE!=none": "gatepos gateact gate_optimizer",
        "ATTNGATE!=const": "gate_optimizer",
        "OPTIMIZER=muon": """muon_lr muon_scale muon_momentum orthogonalize muon_norm
            muon_decay momentum_start momentum_warmup_iters momentum_cooldown_iters""",
        "MOMENTUM_START!=none": "momentum_warmup_iters momentum_cooldown_iters",
        "WEIGHT_DECAY!=0.0": "muon_decay decay_schedule cautious_decay",
        "LR_SCHEDULE=trapezoid": "warmdown_iters warmdown_frac",
        "WARMDOWN_FRAC=none": "warmdown_iters",
        "LR_SCHEDULE=cosine": "min_lr_frac",
        "TIE_EMBEDDINGS=0": "head_lr",
        "SHUFFLE=0": "shard_tail",
        "CARRY_STATE=0": "shard_tail",
    }


@dataclasses.dataclass(frozen=True)
class Config(Rules):
    """Every setting of a run. The environment variable is the field's name in capitals."""

    preset: str = "gpt2_small"  # experiments/presets/<name>.env is read first; the environment wins
    run_id: str = ""  # names the log, curve and row; blank: <preset>-<UTC time>-<4 hex>
    stage: str = ""  # label of a series of runs
    variant: str = ""  # label within the stage
    note: str = ""  # free text for the row
    seed: int = 0  # of initialisation, dropout and shuffling
    dry_run: bool = False  # print the plan and stop
    input_bin: str = "data/fineweb10B/fineweb_train_*.bin"  # glob of the training shards
    max_train_tokens: int = 0  # train on so many tokens, from the start of the shards; 0: on all
    input_val_bin: str = "data/fineweb10B/fineweb_val_*.bin"  # glob of the validation shards
    shuffle: bool = False  # visit the samples of each epoch in a seeded random order
    shard_tail: str = "drop"  # samples at a shard's end that fill no batch: as modded-nanogpt; keep
    batch_size: int = 512  # sequences a step, over all ranks; gradient accumulation follows from it
    device_batch_size: int = 64  # sequences a forward pass, per rank
    sequence_length: int = 1024  # tokens
    num_iterations: int = 5100  # optimizer steps
    max_epochs: int = 1  # passes over the data that NUM_ITERATIONS may take; 0: as many as it takes
    val_every: int = 125  # steps between validations; 0: only the last
    val_tokens: int = 10485760  # tokens of each validation, from the start of the validation shards
    vocab_size: int = 50304  # rows of the embedding; auto or 0: what the data's index.json says
    n_layer: int = 12  # blocks, or visits of shared ones
    n_head: int = 6  # attention heads; head size n_embd / n_head
    n_embd: int = 768  # channels of the residual stream
    d_ff: int = 0  # hidden units of an FFN or expert; auto: 4 n_embd (swiglu 8/3), experts share it
    mixer: str = "attention"  # a comma list tiles over the layers
    ffn: str = "relu2"  # relu2: 2109.08668; swiglu: 2002.05202; a comma list tiles over the layers
    norm: str = "rms"  # rms has no gains; rms_gain has; layer has a gain, and a bias if BIAS=1
    pos: str = "rotary"  # rotary: arXiv 2104.09864; learned: an embedding a position
    qk_norm: bool = True  # RMS norm of every query and key head
    bias: bool = False  # biases in linear layers and layer norms
    tie_embeddings: bool = True  # one matrix for embedding and head
    residual: str = "plain"  # x0: blocks read the embeddings too; unet: later ones, earlier outputs
    value_residual: bool = False  # values are mixed with the first layer's (2410.17897), learned
    value_embeds: int = 0  # so many first layers, and last, add embeddings of tokens to the values
    logit_softcap: float = 0.0  # logits stay within -this and this (2408.00118); 0: as they are
    dropout: float = 0.0  # probability, on embeddings, attention weights and branches
    init: str = "zero_proj"  # uniform 1/sqrt(fan in), projections 0; gpt2: normal, they scaled
    attngate: str = "none"  # attention gate (2505.06708): for each channel, each head, or constant
    gatepos: str = "sdpa"  # on the attention output, or on the values before it
    gateact: str = "sigmoid"  # ns_sigmoid: 0.5 + 0.5 sigmoid
    gate_optimizer: str = "auto"  # of the matrix that computes the gate; auto: OPTIMIZER
    num_experts: int = 8  # with FFN=moe: experts that a router chooses from
    top_k: int = 2  # experts that it chooses for a token
    expert: str = "relu2"  # the FFN that an expert is
    shared_expert: bool = False  # one more expert, beside the router, for every token
    balance: str = "aux"  # aux: arXiv 2101.03961, a loss; quantile: a bias on the choice; none
    aux_loss_coef: float = 0.01  # of the balance loss, which is 1 in balance
    aux_loss_coef_start: float | None = None  # instead: until AUX_WARMUP_FRAC, then linear to
    aux_loss_coef_end: float | None = None  # this, which is reached at AUX_DECAY_END_FRAC
    aux_warmup_frac: float = 0.05  # fraction of the steps
    aux_decay_end_frac: float = 0.3  # fraction of the steps
    balance_log_interval: int = 20  # steps between lines on the experts' load
    router_optimizer: str = "adamw"  # of the routers' matrices
    reset_at_eot: bool = False  # an end-of-text token resets the states of recurrent mixers
    carry_state: bool = False  # truncated BPTT: a step goes on with text and states of the last one
    recurrence: str = "stacked"  # indexed: the same, one block over banks; shared: blocks revisited
    n_unique: int = 1  # blocks that RECURRENCE=shared visits in turn
    unshared_ends: int = 0  # blocks at either end of them that are visited once
    per_visit: str = "none"  # what each visit of a shared block has for itself, a comma list
    optimizer: str = "muon"  # of the matrices inside the blocks; AdamW has the rest
    lr: float = 0.0036  # AdamW learning rate
    embed_lr: float | None = None  # of the embedding; auto: LR
    head_lr: float | None = None  # of an untied head; auto: LR
    muon_lr: float | None = None  # of Muon; auto: 0.1 LR
    muon_scale: str = "unit"  # of Muon's update: unit mean square, or one of torch.optim.Muon's two
    orthogonalize: str = "newton_schulz"  # how Muon does it; polar_express: 2505.16932
    muon_norm: str = "none"  # rows: each row of an update by its size of late, NorMuon (2510.05491)
    muon_momentum: float = 0.95  # Nesterov momentum of Muon
    momentum_start: float | None = None  # from this it rises at first, and falls back at the end
    momentum_warmup_iters: int = 300  # steps of its rise
    momentum_cooldown_iters: int = 50  # steps of its fall
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    weight_decay: float = 0.0  # decoupled, on matrices and embeddings
    muon_decay: bool = True  # whether Muon's matrices are decayed, or AdamW's and embeddings alone
    decay_schedule: str = "constant"  # follow_lr: times LR's fraction of its peak; to_zero: linear
    cautious_decay: bool = False  # only of weights that the update shrinks, too (2510.12402)
    ema_iters: int = 0  # steps that a moving average of the weights, validated too, spans; 0: none
    grad_clip: float = 0.0  # largest global gradient norm; 0: no clipping
    lr_schedule: str = "trapezoid"  # flat, then linear to zero over WARMDOWN_ITERS; or cosine
    warmup_iters: int = 0  # steps of linear warm-up
    warmdown_iters: int = 1450  # steps of the trapezoid's linear decay
    warmdown_frac: float | None = None  # instead: the fraction of the run that it takes
    min_lr_frac: float = 0.0  # fraction of the peak at which cosine ends
    deterministic: bool = False  # the same bits on the same machine, on cuda at some cost of speed
    device: str = "auto"  # auto: cuda where there is one, else cpu
    dtype: str = "auto"  # of activations and products; auto: bfloat16 on cuda, float32 on cpu
    compile: str = "auto"  # torch.compile of the blocks and the loss; auto: on cuda
    peak_tflops: float | None = None  # of one device, for mfu; auto: from a table of devices
    resume: str = "none"  # auto: from the newest valid checkpoint of RUN_ID, if any; or a path
    init_from: str = ""  # safetensors file, or folder with model.safetensors: weights to start with
    save_every: int = 500  # steps between checkpoints; 0: only when the run ends
    keep_last: int = 2  # checkpoints that stay; at least 2, since the newest may be damaged
    max_bad_steps: int = 20  # non-finite gradients in a row that are left out; more: diverged
    hang_timeout: int = 300  # seconds without a step, after the first, until stacks are written
    log_dir: str = "logs"  # folder of logs, curves and summaries
    results_csv: str = "experiments/results.csv"  # the table that gets a row; none: no table
    log_every: int = 10  # steps between lines of the training loss
    sample_every: int = 0  # steps between samples of text in the log; 0: never
    trackers: str = "none"  # a comma list: scripts/track.py shows them the run, from beside it

    @classmethod
    def choices(cls):
        return axes()

    def check(self):
        check_run(self)
        check_model(self)
        check_moe(self)
        check_depth(self)

    def scheduled(self, step):
        rates = lr_factor(step, self), decay_factor(step, self), momentum_factor(step, self)
        return *rates, aux_coef(step, self)

    def resumable(self):
        free = {"val_every", "val_tokens", "max_epochs", "device", "compile", "deterministic"}
        free |= {"init_from", *self.NOT_HASHED}
        if self.balance != "quantile":  # which takes its quantiles within a micro-batch
            free.add("device_batch_size")
        return free

    def advice(self, status):
        if status == "diverged":
            return "lower LR or MUON_LR, or set GRAD_CLIP=1"
        size = self.device_batch_size
        ways = (
            f"lower DEVICE_BATCH_SIZE={size}, which leaves the result as it is, or SEQUENCE_LENGTH"
        )
        return f"{ways}, or N_LAYER"

    def has_moe(self):
        return self.holds("FFN=moe")

    def resolved(self):
        return resolved_settings(self)


def axes():
    """Choices of every setting that has a list of them: {field: names}."""
    return {
        "mixer": MIXERS,
        "ffn": FFNS,
        "norm": NORMS,
        "pos": POSITIONS,
        "init": INITS,
        "residual": RESIDUALS,
        "attngate": GATES,
        "gatepos": GATE_POSITIONS,
        "gateact": GATE_ACTS,
        "gate_optimizer": ("auto", *OPTIMIZERS),
        "shard_tail": ("drop", "keep"),
        "expert": EXPERTS,
        "balance": BALANCES,
        "recurrence": RECURRENCES,
        "per_visit": PER_VISIT,
        "optimizer": OPTIMIZERS,
        "router_optimizer": OPTIMIZERS,
        "muon_scale": MUON_SCALES,
        "orthogonalize": ORTHOGONALIZERS,
        "muon_norm": MUON_NORMS,
        "decay_schedule": DECAY_SCHEDULES,
        "lr_schedule": SCHEDULES,
        "device": ("auto", "cpu", "cuda"),
        "dtype": ("auto", *DTYPES),
        "compile": ("auto", "0", "1"),
        "trackers": ("none", "tensorboard", "wandb"),
    }


def peak_rate(cfg, name):
    """The peak of a learning rate: lr, embed_lr, head_lr or muon_lr."""
    own = getattr(cfg, name)
    if own is not None:
        return own
    return 0.1 * cfg.lr if name == "muon_lr" else cfg.lr


def resolved_settings(cfg):
    """{field: value} of the rates, and of D_FF where all FFNs have the same, auto worked out."""
    values = {name: peak_rate(cfg, name) for name in ("embed_lr", "head_lr", "muon_lr")}
    widths = {ffn_width(cfg, *shape) for shape in ffn_shapes(cfg)}
    if len(widths) == 1:
        values["d_ff"] = widths.pop()
    return {name: value for name, value in values.items() if name not in cfg.idle()}


def check_run(cfg):
    cfg.require(re.fullmatch(f"({RUN_ID_PATTERN})?", cfg.run_id), "run_id", RUN_ID_RULE)
    cfg.require(
        cfg.val_tokens >= cfg.sequence_length,
        "val_tokens",
        f"at least SEQUENCE_LENGTH={cfg.sequence_length}",
    )
    cfg.require(
        not (cfg.deterministic and cfg.compile == "1"),
        "deterministic",
        "COMPILE=0 or auto: 1 times its kernels",
    )
    may_rise = cfg.momentum_start is None or cfg.muon_momentum > 0
    cfg.require(may_rise, "momentum_start", "MUON_MOMENTUM above 0")
    for name in ("router_optimizer", "gate_optimizer"):
        choice = getattr(cfg, name)
        is_there = choice in ("auto", "adamw", cfg.optimizer)
        cfg.require(is_there, name, f"OPTIMIZER={choice} as well")


def check_model(cfg):
    unit = cfg.n_head
    if cfg.pos == "rotary":
        unit *= 2  # it turns the channels of a head in pairs
    lower = max(unit, cfg.n_embd - cfg.n_embd % unit)
    multiple = (
        f"N_EMBD={cfg.n_embd} to be a multiple of {unit} with POS={cfg.pos}: {lower} or "
        f"{lower + unit}, or another N_HEAD"
    )
    cfg.require(cfg.n_embd % unit == 0, "n_head", multiple)
    smallest = RESIDUALS[cfg.residual].least_visits
    cfg.require(cfg.n_layer >= smallest, "residual", f"N_LAYER={smallest} or more")
    has_values = set(cfg.mixer.split(",")) == {"attention"} and cfg.n_layer > 1
    for name in ("value_residual", "value_embeds"):
        cfg.require(
            has_values or not getattr(cfg, name), name, "MIXER=attention, N_LAYER=2 or more"
        )
    most = cfg.n_layer // 2
    cfg.require(cfg.value_embeds <= most, "value_embeds", f"at most half of N_LAYER, {most}")
    has_state = [issubclass(MIXERS[name], Recurrent) for name in cfg.mixer.split(",")]
    cfg.require(any(has_state) or not cfg.reset_at_eot, "reset_at_eot", "a recurrent MIXER")
    if cfg.carry_state:
        cfg.require(all(has_state), "carry_state", "recurrent mixers alone, as MIXER=gru_rwkv")
        cfg.require(
            cfg.pos != "learned", "carry_state", "POS=rotary: learned positions have an end"
        )
        cfg.require(not cfg.shuffle, "carry_state", "SHUFFLE=0: it follows the text")
        least = cfg.batch_size * cfg.sequence_length
        streams = f"at least {least}: a sample for each of BATCH_SIZE={cfg.batch_size} streams"
        cfg.require(cfg.val_tokens >= least, "val_tokens", streams)


def check_moe(cfg):
    if cfg.has_moe():
        cfg.require(cfg.top_k <= cfg.num_experts, "top_k", f"at most NUM_EXPERTS={cfg.num_experts}")
    else:
        cfg.require(cfg.balance == Config.balance, "balance", "FFN=moe, or the default aux")
    both = (cfg.aux_loss_coef_start is None) == (cfg.aux_loss_coef_end is None)
    cfg.require(both, "aux_loss_coef_start", "AUX_LOSS_COEF_END beside it")
    cfg.require(
        cfg.aux_warmup_frac <= cfg.aux_decay_end_frac,
        "aux_decay_end_frac",
        "at least AUX_WARMUP_FRAC",
    )


def check_depth(cfg):
    if cfg.recurrence != "shared":
        for name in ("n_unique", "unshared_ends", "per_visit"):
            default = getattr(Config, name)
            cfg.require(getattr(cfg, name) == default, name, "RECURRENCE=shared")
        return

    own = cfg.per_visit.split(",")
    cfg.require("router" not in own or cfg.has_moe(), "per_visit", "FFN=moe")
    has_gains = cfg.norm != "rms"
    cfg.require("norm" not in own or has_gains, "per_visit", "a NORM with gains: rms_gain or layer")
    cfg.require(
        cfg.n_layer >= cfg.n_unique + 2 * cfg.unshared_ends,
        "n_layer",
        f"at least N_UNIQUE={cfg.n_unique} + 2 UNSHARED_ENDS={cfg.unshared_ends}",
    )
    # A block has one mixer and one FFN, so the layers that visit it must agree in both.
    order = visit_order(cfg)
    for layer, block in enumerate(order):
        layers_since_first = layer - order.index(block)
        cfg.require(
            layers_since_first % period(cfg) == 0,
            "n_unique",
            f"a multiple of {period(cfg)}, the layers after which MIXER={cfg.mixer} and "
            f"FFN={cfg.ffn} repeat",
        )


def cautions(cfg):
    """A sentence for everything that is allowed and hardly meant."""
    sentences = []
    if cfg.resume == "auto" and not cfg.run_id:
        sentences.append("RESUME=auto goes on with a RUN_ID; without, every start is a new run")
    if cfg.lr_schedule == "trapezoid" and warmdown(cfg) > cfg.num_iterations:
        sentences.append(
            f"WARMDOWN_ITERS={cfg.warmdown_iters} > NUM_ITERATIONS: LR starts at "
            f"{lr_factor(0, cfg):.0%}; set WARMDOWN_FRAC=0.3"
        )
    ramps = cfg.momentum_warmup_iters + cfg.momentum_cooldown_iters
    if cfg.momentum_start is not None and ramps > cfg.num_iterations:
        sentences.append(
            f"MOMENTUM_WARMUP_ITERS + MOMENTUM_COOLDOWN_ITERS = {ramps} > NUM_ITERATIONS: Muon's "
            "momentum does not get to MUON_MOMENTUM"
        )
    in_data = dataset_index(cfg.input_bin).get("vocab_size") or cfg.vocab_size
    if cfg.vocab_size > 1.3 * in_data + 128:
        sentences.append(
            f"VOCAB_SIZE={cfg.vocab_size}, the data have {in_data} ids; VOCAB_SIZE=0 takes these"
        )
    if cfg.dtype == "float16" and cfg.has_moe() and cfg.device == "cuda":
        sentences.append(
            "DTYPE=float16: experts wait for the host on CUDA; DTYPE=bfloat16 is twice as fast"
        )
    idle = cfg.idle()
    for name in cfg.changes():
        if name.lower() in idle:
            sentences.append(
                f"{name} has no effect without {idle[name.lower()].replace('!=', ' other than ')}"
            )
    return sentences


def help_text():
    """What `--help` prints: the head of this file and a line for each setting."""
    head = "Settings (environment variables; a blank one counts as not set):"
    return "\n".join([__doc__.strip(), "", head, settings_table(Config, SOURCE)])


########################################
#                Layers                #
########################################


def init_zero_proj(cfg, weight, to_residual):
    """Uniform within 1 / sqrt(fan in); zeros where the output is added to the residual stream."""
    bound = 0.0 if to_residual else weight.size(-1) ** -0.5
    if bound:
        nn.init.uniform_(weight, -bound, bound)
    else:
        nn.init.zeros_(weight)


def init_gpt2(cfg, weight, to_residual):
    """Normal; less where 2 n_layer outputs are added up in the residual stream."""
    nn.init.normal_(weight, std=0.02 / (2 * cfg.n_layer) ** 0.5 if to_residual else 0.02)


INITS = {"zero_proj": init_zero_proj, "gpt2": init_gpt2}


def init_weight(cfg, weight, to_residual=False):
    """Fills weight (..., rows, fan_in) as INIT says, and returns it."""
    if not weight.is_meta:  # where it would load seconds of code to do nothing
        INITS[cfg.init](cfg, weight, to_residual)
    return weight


def parameter_of(values):
    """A Parameter that starts with these values, which were made on the CPU."""
    return nn.Parameter(values.to(torch.get_default_device()))


def normal_(weight, std):
    """Fills weight with normal numbers, and returns it."""
    return weight if weight.is_meta else nn.init.normal_(weight, std=std)


class Linear(nn.Module):
    """(..., fan_in) -> (..., parts * fan_out) in the input's dtype.

    One product, yet Muon takes each of the parts by itself: their weights are (parts, fan_out,
    fan_in). `to_residual` says that the output is added to the residual stream.
    """

    in_float32 = False  # whether its input is in float32 whatever the model's dtype

    def __init__(self, cfg, fan_in, fan_out, parts=1, to_residual=False, bias=None, experts=()):
        super().__init__()
        shape = (fan_out, fan_in) if parts == 1 else (parts, fan_out, fan_in)
        has_bias = cfg.bias if bias is None else bias
        self.weight = nn.Parameter(torch.empty(*experts, *shape))
        self.bias = nn.Parameter(torch.zeros(*experts, parts * fan_out)) if has_bias else None
        init_weight(cfg, self.weight, to_residual)
        self.flops_per_token = 6 * self.weight.numel()

    def forward(self, x):
        weight = self.weight.flatten(0, -2).type_as(x)
        y = linear(x, weight)
        return y if self.bias is None else y + self.bias.type_as(x)


class CastBefore(torch.autograd.Function):
    """A weight in another dtype, of which there is a copy; gradients add up in the weight's own."""

    @staticmethod
    def forward(ctx, weight, copy):
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


class RMSNorm(nn.Identity):
    """Root mean square norm without gains (arXiv 1910.07467): (..., C) -> same."""

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class LayerNorm(nn.LayerNorm):
    """Layer norm with a gain, and a bias if BIAS=1, in float32 (1607.06450): (..., C) -> same."""

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


def rms_norm_with_gain(cfg):
    return nn.Sequential(RMSNorm(cfg), Scale(torch.ones(cfg.n_embd)))


NORMS = {"rms": RMSNorm, "rms_gain": rms_norm_with_gain, "layer": LayerNorm}


class Context(NamedTuple):
    """What blocks and mixers are given beside the hidden state."""

    positions: Tensor  # (T,) or (B, T), of the tokens in their sequences
    cache: dict | None = None  # of this visit, where x goes on with sequences: {name: (B, ...)}
    mask: Tensor | None = None  # with it, (B, 1, T, S): cached positions that each token may see
    valid: Tensor | None = None  # with it, (B, T): whether it is a token, and no padding
    segment: Tensor | None = None  # (B, T) resets of the states until each token, its own included
    shared: dict | None = None  # of a pass, where the first visit leaves its values for the others
    value_mix: Tensor | None = None  # (), the part of those in the values of this visit
    value_embed: Tensor | None = None  # (B, T, C), of the tokens, added to the values


class NoPosition(nn.Identity):
    """Leaves its input as it is."""

    def forward(self, x, ctx):
        return x


class Rotary(nn.Module):
    """Rotary embedding (arXiv 2104.09864) of (B, T, ..., D), base 10000, paired as in GPT-NeoX."""

    def __init__(self, cfg):
        super().__init__()
        half = cfg.n_embd // cfg.n_head // 2
        cos_sin = torch.empty(2, cfg.sequence_length, 2 * half)
        if not cos_sin.is_meta:  # where it would load seconds of code to do nothing
            frequencies = 10000 ** -(torch.arange(half) / half)
            angles = torch.outer(torch.arange(cfg.sequence_length), frequencies).repeat(1, 2)
            signs = torch.tensor([1.0, -1.0]).repeat_interleave(half)
            cos_sin = torch.stack((angles.cos(), angles.sin() * signs))
        self.register_buffer("cos_sin", cos_sin, persistent=False)  # (2, T, D)

    def forward(self, x, ctx):
        shape = (*ctx.positions.shape, *[1] * (x.ndim - 3), x.size(-1))
        cos, sin = self.cos_sin[:, ctx.positions].view(2, *shape)
        return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin).type_as(x)


class LearnedPosition(nn.Module):
    """Adds an embedding of the position: (B, T, C) -> same."""

    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Parameter(normal_(torch.empty(cfg.sequence_length, cfg.n_embd), 0.02))

    def forward(self, x, ctx):
        return x + F.embedding(ctx.positions, self.weight).type_as(x)


POSITIONS = {  # (what embeddings go through, what queries and keys go through)
    "rotary": (NoPosition, Rotary),
    "learned": (LearnedPosition, NoPosition),
}


########################################
#                Gates                 #
########################################

# Every gate takes y (B, T, H, D) and the normed hidden state x (B, T, C), and returns gated y.


def ns_sigmoid(x):
    """A sigmoid that never closes: between 0.5 and 1."""
    return 0.5 + 0.5 * torch.sigmoid(x)


GATE_ACTS = {"sigmoid": torch.sigmoid, "ns_sigmoid": ns_sigmoid}
GATE_POSITIONS = ("sdpa", "value")


class NoGate(nn.Identity):
    """Leaves y as it is."""

    def forward(self, y, x):
        return y


class ElementwiseGate(nn.Module):
    """One gate for each channel of each head, computed from x."""

    def __init__(self, cfg):
        super().__init__()
        self.act = GATE_ACTS[cfg.gateact]
        self.score = Linear(cfg, cfg.n_embd, self.n_gates(cfg), bias=False)
        if cfg.gate_optimizer != "auto":
            self.score.optim = cfg.gate_optimizer

    def n_gates(self, cfg):
        return cfg.n_embd

    def forward(self, y, x):
        B, T, H, D = y.shape
        return y * self.act(self.score(x)).view(B, T, H, -1)


class HeadwiseGate(ElementwiseGate):
    """One gate for each head, computed from x."""

    def n_gates(self, cfg):
        return cfg.n_head


class ConstGate(nn.Module):
    """One learned gate for each channel of each head, the same for every x; starts at act(0)."""

    optim = "adamw"

    def __init__(self, cfg):
        super().__init__()
        self.act = GATE_ACTS[cfg.gateact]
        self.score = nn.Parameter(torch.zeros(cfg.n_head, cfg.n_embd // cfg.n_head))

    def forward(self, y, x):
        return y * self.act(self.score).type_as(y)


GATES = {
    "none": NoGate,
    "headwise": HeadwiseGate,
    "elementwise": ElementwiseGate,
    "const": ConstGate,
}


########################################
#                Mixers                #
########################################

# Every mixer takes the normed hidden state x (B, T, C) and a Context, and returns (B, T, C). Where
# the Context has a cache, which new_cache made, x goes on with the sequences that it has seen, and
# the cache's tensors are changed in place.


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention with optional QK norm and gate."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.dropout = cfg.dropout
        # Scores and values, forward and backward; causality is not taken into account.
        self.flops_per_token = 12 * cfg.n_embd * cfg.sequence_length
        self.qkv = Linear(cfg, cfg.n_embd, cfg.n_embd, parts=3)
        self.proj = Linear(cfg, cfg.n_embd, cfg.n_embd, to_residual=True)
        self.qk_norm = RMSNorm(cfg) if cfg.qk_norm else nn.Identity()
        self.rotate = POSITIONS[cfg.pos][1](cfg)
        gates = dict.fromkeys(GATE_POSITIONS, "none") | {cfg.gatepos: cfg.attngate}
        self.gate_value = GATES[gates["value"]](cfg)
        self.gate_output = GATES[gates["sdpa"]](cfg)

    def new_cache(self, batch, length, like):
        """{name: (batch, ...)} for sequences of `length` tokens; `like` (..., C) is like x."""
        shape = batch, length, self.n_head, like.size(-1) // self.n_head
        return {"keys": like.new_zeros(shape), "values": like.new_zeros(shape)}

    def remember(self, k, v, ctx):
        """Caches keys and values (B, H, T, D); returns all that are there, (B, H, S, D)."""
        row = torch.arange(len(k), device=k.device)[:, None]
        ctx.cache["keys"][row, ctx.positions] = k.transpose(1, 2)
        ctx.cache["values"][row, ctx.positions] = v.transpose(1, 2)
        length = ctx.mask.size(-1)
        return (ctx.cache[name][:, :length].transpose(1, 2) for name in ("keys", "values"))

    def mix_values(self, v, ctx):
        """The values v (B, T, H, D) with those of the first visit and the embeddings of tokens."""
        if ctx.shared is not None:
            first = ctx.shared.setdefault("values", v)
            v = v if ctx.value_mix is None else torch.lerp(v, first, ctx.value_mix.type_as(v))
        return v if ctx.value_embed is None else v + ctx.value_embed.view_as(v)

    def forward(self, x, ctx):
        B, T, C = x.shape
        qk, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).split((2, 1), dim=2)
        q, k = self.rotate(self.qk_norm(qk), ctx).transpose(1, 3).unbind(2)  # (B, H, T, D) each
        v = self.gate_value(self.mix_values(v.squeeze(2), ctx), x).transpose(1, 2)
        if ctx.cache is not None:
            k, v = self.remember(k, v, ctx)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=ctx.mask, is_causal=ctx.mask is None, dropout_p=dropout
        )
        y = self.gate_output(y.transpose(1, 2), x)  # (B, T, H, D)
        return self.proj(y.reshape(B, T, C))


class Recurrent(nn.Module):
    """A mixer that remembers a sequence in states, whose size does not grow with it."""

    def new_cache(self, batch, length, like):
        return {"hidden": zero_state(like, batch, like.size(-1))}

    def memory(self, x, ctx):
        """The cache that x goes on with, or an empty one."""
        return self.new_cache(len(x), 0, x) if ctx.cache is None else ctx.cache


def zero_state(like, *shape):
    """Zeros for what is added up over time, in float32 at least."""
    return like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def unless_padding(x, ctx, value=0.0):
    """x (B, T, C), or `value` where there is no token, by which a state stays as it is."""
    return x if ctx.valid is None else x.masked_fill(~ctx.valid.unsqueeze(-1), value)


class GRU(Recurrent):
    """Gated recurrent unit (arXiv 1406.1078), whose gates read a normed hidden state.

    The norm's epsilon is large, or the gradient of a state near zero would be. The update gate
    says how much of the old state stays, 73 % at first.
    """

    sequential = True  # over time, which no count of FLOPs shows

    def __init__(self, cfg):
        super().__init__()
        C = cfg.n_embd
        self.flops_per_token = 6 * 3 * C * C  # of the recurrent matrices
        self.gates = Linear(cfg, C, C, parts=3, bias=True)  # reset, update, candidate
        nn.init.ones_(self.gates.bias[C : 2 * C])
        self.recurrent = nn.Parameter(torch.empty(3, C, C))
        if not self.recurrent.is_meta:
            for matrix in self.recurrent:
                nn.init.orthogonal_(matrix)
        self.proj = Linear(cfg, C, C, to_residual=True)

    def forward(self, x, ctx):
        hidden = self.memory(x, ctx)["hidden"]
        gates = unless_padding(self.gates(x), ctx, math.inf)  # sigmoid(inf) of the state stays
        h = gru(gates, self.recurrent.flatten(0, 1), hidden.clone(), 1e-3, ctx.segment)
        hidden.copy_(h[:, -1].detach())
        return self.proj(h.type_as(x))


class MinGRU(Recurrent):
    """minGRU (arXiv 2410.01201): gates that read the input alone. No GRU, but a parallel scan.

    Its update gate says how much of the state is new, 27 % at first.
    """

    def __init__(self, cfg):
        super().__init__()
        C = cfg.n_embd
        self.gates = Linear(cfg, C, C, parts=2, bias=True)  # update, candidate
        nn.init.constant_(self.gates.bias[:C], -1)
        self.proj = Linear(cfg, C, C, to_residual=True)

    def forward(self, x, ctx):
        hidden = self.memory(x, ctx)["hidden"]
        update, candidate = self.gates(x).type_as(hidden).chunk(2, dim=-1)
        update = unless_padding(update.sigmoid(), ctx)
        h = linear_scan(1 - update, update * candidate, hidden.clone(), ctx.segment)
        hidden.copy_(h[:, -1].detach())
        return self.proj(h.type_as(x))


class RWKV(Recurrent):
    """RWKV's time mixing: RWKV-6 (arXiv 2404.05892) with the bounded decay of RWKV-7 (2503.14456).

    Token shift: each channel of receptance, key, value and decay reads a learned mixture of the
    token and the one before; a low-rank part makes the decay depend on it. Without RWKV-6's gate.
    """

    optim = dict.fromkeys(("mix", "bonus", "decay_in.weight", "decay_out.weight"), "adamw")

    def __init__(self, cfg):
        super().__init__()
        C, H = cfg.n_embd, cfg.n_head
        self.n_head = H
        self.flops_per_token = 12 * C * C // H  # the state's update and its reading
        with torch.device("cpu"):
            channel = torch.linspace(0, 1, C)
            powers = torch.tensor([[0.2], [0.7], [0.7], [0.9]])
            mix = 1 - channel**powers  # the token's own part is larger in later channels
            decay = 6 * channel**1.5 - 5.5  # memories of 400 to 3 tokens
            bonus = torch.ones(H, C // H)
        self.mix, self.decay, self.bonus = (
            parameter_of(mix),
            parameter_of(decay),
            parameter_of(bonus),
        )
        rank = max(4, C // 16)
        self.decay_in = Linear(cfg, C, rank, bias=False)
        self.decay_out = Linear(cfg, rank, C, to_residual=True, bias=False)  # small at first
        self.receptance = Linear(cfg, C, C)
        self.key = Linear(cfg, C, C)
        self.value = Linear(cfg, C, C)
        self.norm = nn.GroupNorm(H, C, eps=64e-5)
        self.proj = Linear(cfg, C, C, to_residual=True)

    def new_cache(self, batch, length, like):
        H, D = self.n_head, like.size(-1) // self.n_head
        past = like.new_zeros(batch, 1, H * D)
        return {"past": past, "state": zero_state(like, batch, H, D, D)}

    def forward(self, x, ctx):
        memory = self.memory(x, ctx)
        before, x = with_past(x, memory["past"], ctx.valid, ctx.segment)
        r, k, v, w = (torch.lerp(x, before, mix) for mix in self.mix.type_as(x))
        k = unless_padding(self.key(k), ctx)
        w = self.decay + self.decay_out(self.decay_in(w).tanh()).type_as(memory["state"])
        log_decay = unless_padding(-math.exp(-0.5) * w.sigmoid(), ctx)
        heads = (self.receptance(r), k, self.value(v), log_decay)
        heads = (t.unflatten(-1, (self.n_head, -1)) for t in heads)
        y, state = chunked_wkv(*heads, self.bonus, memory["state"].clone(), ctx.segment)
        memory["state"].copy_(state.detach())
        y = self.norm(y.flatten(0, 1).flatten(1).type_as(self.norm.weight))
        return self.proj(y.view_as(x).type_as(x))


class GRURWKV(Recurrent):
    """A GRU and RWKV's linear attention side by side, each with its projection."""

    sequential = True

    def __init__(self, cfg):
        super().__init__()
        self.gru = GRU(cfg)
        self.rwkv = RWKV(cfg)

    def new_cache(self, *args):
        return self.gru.new_cache(*args) | self.rwkv.new_cache(*args)

    def forward(self, x, ctx):
        return self.gru(x, ctx) + self.rwkv(x, ctx)


class GatedDeltaNet(Recurrent):
    """Gated DeltaNet (arXiv 2412.06464): a state that is written over where keys are alike.

    With its short convolution over four tokens and its output gate; keys and values have one size.
    """

    optim = {"conv": "adamw", "rates.weight": "adamw"}

    def __init__(self, cfg):
        super().__init__()
        C, H = cfg.n_embd, cfg.n_head
        self.n_head = H
        self.flops_per_token = 18 * C * C // H  # the state's reading for update and output, update
        self.qkv = Linear(cfg, C, C, parts=3)
        with torch.device("cpu"):
            conv = torch.empty(4, 3 * C).uniform_(-0.5, 0.5)
            decay = torch.empty(H).uniform_(1, 16).log()
            step = torch.empty(H).uniform_(math.log(1e-3), math.log(0.1)).exp()
            step = step + (-torch.expm1(-step)).log()  # the inverse of softplus
        self.conv, self.decay, self.step = (
            parameter_of(conv),
            parameter_of(decay),
            parameter_of(step),
        )
        self.rates = Linear(cfg, C, 2 * H, bias=False)  # beta and decay
        self.gate = Linear(cfg, C, C)
        self.gain = nn.Parameter(torch.ones(C // H))
        self.proj = Linear(cfg, C, C, to_residual=True)

    def new_cache(self, batch, length, like):
        H, D = self.n_head, like.size(-1) // self.n_head
        past = like.new_zeros(batch, 3, 3 * H * D)
        return {"past": past, "state": zero_state(like, batch, H, D, D)}

    def forward(self, x, ctx):
        memory = self.memory(x, ctx)
        taps = with_past(self.qkv(x), memory["past"], ctx.valid, ctx.segment)
        qkv = F.silu(sum(tap * weight for tap, weight in zip(taps, self.conv.type_as(x))))
        q, k, v = qkv.unflatten(-1, (3, self.n_head, -1)).unbind(2)
        q, k = (F.normalize(t.type_as(memory["state"]), dim=-1) for t in (q, k))
        beta, step = self.rates(x).type_as(q).chunk(2, dim=-1)
        beta = unless_padding(beta.sigmoid(), ctx)
        log_decay = unless_padding(-self.decay.exp() * F.softplus(step + self.step), ctx)
        state = memory["state"].clone()
        y, state = gated_delta_rule(q, k, v, log_decay, beta, state, ctx.segment)
        memory["state"].copy_(state.detach())
        # Without 1 / sqrt(D) on q, which this norm would take away.
        y = F.rms_norm(y, self.gain.shape, self.gain, eps=1e-6).flatten(2)
        return self.proj(y.type_as(x) * F.silu(self.gate(x)))


MIXERS = {
    "attention": CausalSelfAttention,
    "gru": GRU,
    "rwkv": RWKV,
    "gru_rwkv": GRURWKV,
    "mingru": MinGRU,
    "gated_deltanet": GatedDeltaNet,
}


########################################
#                 FFNs                 #
########################################

# Every FFN takes the normed hidden state x (..., C); it returns (..., C) and a list of routings.


def ffn_width(cfg, parts, active=1):
    """Hidden units of an FFN with `parts` input matrices: D_FF, or 4 C, 8/3 C with two of them.

    `active` experts that see the same token share these, in multiples of 64.
    """
    if cfg.d_ff:
        return cfg.d_ff
    width = (4 if parts == 1 else 8 / 3) * cfg.n_embd
    if parts == active == 1:
        return width
    return 64 * math.ceil(width / active / 64)


def ffn_shapes(cfg):
    """(parts, active), as ffn_width takes them, of the kinds of FFN that have a D_FF."""
    shapes = []
    for kind in cfg.ffn.split(","):
        active = 1
        if kind == "moe":
            kind, active = cfg.expert, cfg.top_k + cfg.shared_expert
        if kind in EXPERTS:
            shapes.append((EXPERTS[kind].parts, active))
    return shapes


class MLP(nn.Module):
    """Two-layer FFN, the base of the kinds below. Experts are built with another `linear`."""

    parts = 1  # matrices that read the input

    def __init__(self, cfg, linear=Linear, active=1):
        super().__init__()
        width = ffn_width(cfg, self.parts, active)
        self.fc = linear(cfg, cfg.n_embd, width, parts=self.parts)
        self.proj = linear(cfg, width, cfg.n_embd, to_residual=True)

    def transform(self, x, *groups):
        return self.proj(self.act(self.fc(x, *groups)), *groups)

    def forward(self, x):
        return self.transform(x), []


class ReLU2(MLP):
    """Squared ReLU, arXiv 2109.08668."""

    def act(self, h):
        positive = F.relu(h)
        return positive * positive  # on a CPU several times faster than a power


class GELU(MLP):
    """GELU in its tanh form, as GPT-2 has it."""

    def act(self, h):
        return F.gelu(h, approximate="tanh")


class SwiGLU(MLP):
    """Gated by SiLU, arXiv 2002.05202."""

    parts = 2

    def act(self, h):
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up


EXPERTS = {"relu2": ReLU2, "gelu": GELU, "swiglu": SwiGLU}


class ExpertLinear(Linear):
    """A linear layer for each expert: rows (n, fan_in), sorted by it -> (n, parts * fan_out)."""

    def __init__(self, cfg, fan_in, fan_out, **kinds):
        super().__init__(cfg, fan_in, fan_out, **kinds, experts=(cfg.num_experts,))
        self.flops_per_token = self.flops_per_token * cfg.top_k // cfg.num_experts

    def forward(self, x, expert, offsets):
        """`expert` (n,) is that of each row; the rows of each expert end at `offsets` (E,)."""
        y = GroupedMatmul.apply(x, self.weight.flatten(1, -2).type_as(x), offsets)
        if self.bias is not None:
            y = y + F.one_hot(expert, len(offsets)).type_as(x) @ self.bias.type_as(x)
        return y


BALANCES = {"aux": leave_load, "quantile": leave_bias, "none": leave_state}
LOAD, IMPORTANCE, NEXT_STATE, STATE = range(4)  # the rows of a routing (4, E)


class MoE(nn.Module):
    """Token-choice mixture of experts without capacity (arXiv 2101.03961, 2401.04088).

    A token's TOP_K experts are those of the highest probability p, a softmax over all E, which also
    weights their outputs; if TOP_K > 1 these weights are made to sum to 1. Its routing (4, E) has
    the load f, a fraction of all choices; the importance P, the mean p, with its gradient; what it
    leaves in router_state; and what it found there.
    """

    def __init__(self, cfg):
        super().__init__()
        self.top_k = cfg.top_k
        self.biases_choice = cfg.balance == "quantile"
        self.next_state = BALANCES[cfg.balance]
        self.router = Linear(cfg, cfg.n_embd, cfg.num_experts, bias=False)
        self.router.optim, self.router.in_float32 = cfg.router_optimizer, True
        active = cfg.top_k + cfg.shared_expert
        self.experts = EXPERTS[cfg.expert](cfg, ExpertLinear, active)
        self.always = nn.ModuleList()
        if cfg.shared_expert:
            self.always.append(EXPERTS[cfg.expert](cfg, active=active))
        self.register_buffer("router_state", torch.zeros(cfg.num_experts))

    def route(self, x):
        """Of rows (N, C): probabilities (N, E), chosen experts (N, k), their weights (N, k)."""
        p = self.router(x.to(torch.promote_types(x.dtype, torch.float32))).softmax(-1)
        chosen = (p + self.router_state if self.biases_choice else p).topk(self.top_k).indices
        weight = p.gather(-1, chosen)
        if self.top_k > 1:
            weight = weight / weight.sum(-1, keepdim=True)
        return p, chosen, weight

    def forward(self, x):
        rows = x.flatten(0, -2)
        p, chosen, weight = self.route(rows)
        N, E = p.shape

        # Each expert on its rows, and back into the order of the tokens.
        expert, order, back, offsets = sort_by_expert(chosen, E)
        y = Gather.apply(rows, order // self.top_k, back)
        y = self.experts.transform(y, expert, offsets)
        y = Gather.apply(y, back, order).view(N, self.top_k, -1)
        y = (y * weight.unsqueeze(-1).type_as(y)).sum(1)
        for ffn in self.always:
            y = y + ffn.transform(rows)

        load = offsets.diff(prepend=offsets.new_zeros(1)) / (N * self.top_k)
        state = self.router_state
        if self.training:
            state = self.next_state(load, p.detach(), state, self.top_k)
        return y.view_as(x), [torch.stack([load, p.mean(0), state, self.router_state])]


class NoFFN(nn.Identity):
    """Adds nothing to what the mixer has made."""

    def forward(self, x):
        return 0 * x, []  # not zeros: gains of the norm before would have no gradient


FFNS = {"none": NoFFN, **EXPERTS, "moe": MoE}


def health_columns(cfg):
    """Columns of the curve: the coefficient, then HEALTH of each layer with experts."""
    layers = [layer for layer in range(cfg.n_layer) if tiled(cfg.ffn, layer) == "moe"]
    columns = [f"{name}_{layer}" for layer in layers for name in HEALTH]
    return ["aux_coef", *columns] if columns else []


########################################
#                Model                 #
########################################


def tiled(names, layer):
    """The name that a comma list has for a layer."""
    names = names.split(",")
    return names[layer % len(names)]


def period(cfg):
    """Layers after which the lists of mixers and FFNs repeat together."""
    return math.lcm(len(cfg.mixer.split(",")), len(cfg.ffn.split(",")))


def stacked(cfg):
    return tuple(range(cfg.n_layer))


def indexed(cfg):
    """The same model as stacked: one block a period, all weights in banks."""
    return tuple(layer % period(cfg) for layer in range(cfg.n_layer))


def shared(cfg):
    """Blocks at both ends once, and between them N_UNIQUE blocks in turn."""
    n_ends = cfg.unshared_ends
    first = range(n_ends)
    between = [n_ends + i % cfg.n_unique for i in range(cfg.n_layer - 2 * n_ends)]
    last = range(n_ends + cfg.n_unique, 2 * n_ends + cfg.n_unique)
    return (*first, *between, *last)


RECURRENCES = {"stacked": stacked, "indexed": indexed, "shared": shared}
PER_VISIT = {  # the modules of a block of which each visit has its own
    "none": (),
    "norm": ("mixer_norm", "ffn_norm"),
    "router": ("router",),
    "scale": ("mixer_scale", "ffn_scale"),
}


def visit_order(cfg):
    """The index of the block of each visit, (n_layer,)."""
    return RECURRENCES[cfg.recurrence](cfg)


def is_banked(cfg, name):
    """Whether a block has a slice of its tensor `name` for each visit."""
    if cfg.recurrence == "indexed":
        return True
    modules = {module for kind in cfg.per_visit.split(",") for module in PER_VISIT[kind]}
    return not modules.isdisjoint(name.split("."))


class Block(nn.Module):
    """A mixer and an FFN, each a residual branch behind a norm."""

    def __init__(self, cfg, layer):
        super().__init__()
        order = visit_order(cfg)
        self.mixer_norm = NORMS[cfg.norm](cfg)
        self.mixer = MIXERS[tiled(cfg.mixer, layer)](cfg)
        self.ffn_norm = NORMS[cfg.norm](cfg)
        self.ffn = FFNS[tiled(cfg.ffn, layer)](cfg)
        self.dropout = nn.Dropout(cfg.dropout)
        self.mixer_scale = self.ffn_scale = nn.Identity()
        if "scale" in cfg.per_visit.split(","):
            start = 1 / order.count(order[layer])  # all visits together add as much as one
            self.mixer_scale = Scale(torch.tensor(start))
            self.ffn_scale = Scale(torch.tensor(start))

    def forward(self, x, ctx):
        """x (B, T, C), Context -> (B, T, C) and the list of routings of the FFN."""
        x = x + self.mixer_scale(self.dropout(self.mixer(self.mixer_norm(x), ctx)))
        y, routings = self.ffn(self.ffn_norm(x))
        return x + self.ffn_scale(self.dropout(y)), routings


class PlainResidual(nn.Identity):
    """A block reads what the one before has left."""

    least_visits = 1

    def forward(self, x, visit, kept):
        """x (B, T, C), number of the visit, a list of what a pass keeps -> what the visit reads."""
        return x


class EmbeddingResidual(nn.Module):
    """A block reads a sum of that and of the embeddings, with learned factors, 1 and 0 at first.

    github.com/KellerJordan/modded-nanogpt, record of 2024-11-10.
    """

    least_visits = 1

    def __init__(self, cfg):
        super().__init__()
        self.factors = nn.Parameter(torch.tensor([[1.0, 0.0]]).repeat(cfg.n_layer, 1))

    def forward(self, x, visit, kept):
        if visit == 0:
            kept.append(x)
        before, embedding = self.factors[visit].type_as(x)
        return before * x + embedding * kept[0]


class UNetResidual(nn.Module):
    """A block of the second half adds what its mirror image in the first has left, factors of 1.

    arXiv 1505.04597; github.com/KellerJordan/modded-nanogpt, record of 2024-11-10.
    """

    least_visits = 2

    def __init__(self, cfg):
        super().__init__()
        self.n_layer = cfg.n_layer
        self.factors = nn.Parameter(torch.ones(cfg.n_layer // 2))

    def forward(self, x, visit, kept):
        n_mirrored = len(self.factors)
        if 1 <= visit <= n_mirrored:
            kept.append(x)
        later = visit - (self.n_layer - n_mirrored)
        return x if later < 0 else x + self.factors[later].type_as(x) * kept.pop()


# Learned for each visit.
RESIDUALS = {"plain": PlainResidual, "x0": EmbeddingResidual, "unet": UNetResidual}


@dataclasses.dataclass
class Cache:
    """What the visits of a model keep of sequences that it is given piece by piece."""

    visits: list  # for each visit {name: tensor (B, ...)}, which its mixer reads and writes
    filled: Tensor  # (B,) tokens of each sequence until now
    capacity: float  # most tokens of a sequence; inf where all visits have states alone
    longest: int = 0  # tokens that the sequences have been given, padding included
    static: bool = False  # all shapes stay, as a CUDA graph needs it

    def tensors(self):
        return [self.filled, *(t for of_visit in self.visits for t in of_visit.values())]

    def advance(self, tokens_BT, counts):
        """The Context of the next tokens, of which the sequences grow by counts (B,), or by all T.

        What padding leaves in a cache of attention is overwritten before a token may see it.
        Raises ValueError.
        """
        T, device = tokens_BT.size(1), tokens_BT.device
        if self.longest + T > self.capacity:
            raise ValueError(f"{self.longest + T} tokens for a cache of {self.capacity}")
        self.longest += T
        positions, mask = self.filled[:, None] + torch.arange(T, device=device), None
        if self.capacity < math.inf:
            span = self.capacity if self.static else self.longest
            mask = torch.arange(span, device=device) <= positions[:, None, :, None]
        self.filled += T if counts is None else counts
        valid = None if counts is None else torch.arange(T, device=device) < counts[:, None]
        return Context(positions, mask=mask, valid=valid)

    def select(self, rows):
        """A Cache of the sequences with these indices, each as often as it is named.

        Of a slice of them it is a view.
        """
        visits = [{name: t[rows] for name, t in of_visit.items()} for of_visit in self.visits]
        return Cache(visits, self.filled[rows], self.capacity, self.longest)

    def clear(self):
        for tensor in self.tensors():
            tensor.zero_()
        self.longest = 0

    def reset(self, which):
        """Empties the sequences of which (B,) is true, or all by which (1,)."""
        for tensor in self.tensors():
            tensor.masked_fill_(which.view(-1, *[1] * (tensor.ndim - 1)), 0)


def end_token(cfg):
    """The id () that ends the texts of the training data, -1 where they say none."""
    eot_id = dataset_index(cfg.input_bin).get("eot_id")
    return torch.tensor(eot_id if isinstance(eot_id, int) else -1)


class GPT(nn.Module):
    """Decoder-only transformer, activations in `dtype`.

    Tokens (B, T) -> float32 logits (B, T, V); with targets (B, T): mean loss () and the routing
    (visits of an MoE, 4, E). With a cache they go on with its sequences. The blocks are visited in
    `order`; a tensor whose name is in `banked` has a slice for each visit of its block.
    """

    def __init__(self, cfg, dtype=torch.float32):
        super().__init__()
        self.dtype = dtype
        # In the state, so that who reads a checkpoint needs no data.
        self.register_buffer("eot", end_token(cfg) if cfg.reset_at_eot else None)
        self.loss_chunk, self.score_chunk = loss_chunk, score_chunk
        self.embed = nn.Parameter(torch.empty(cfg.vocab_size, cfg.n_embd))
        self.head = None  # the embedding
        init_weight(cfg, self.embed)
        if not cfg.tie_embeddings:
            self.head = nn.Parameter(torch.empty(cfg.vocab_size, cfg.n_embd))
            init_weight(cfg, self.head, to_residual=cfg.init == "zero_proj")
            # Only a norm reads the rows of the embedding.
            normal_(self.embed, 1.0 if cfg.init == "zero_proj" else 0.02)
        self.softcap = cfg.logit_softcap
        self.add_position = POSITIONS[cfg.pos][0](cfg)
        self.dropout = nn.Dropout(cfg.dropout)
        self.order = visit_order(cfg)
        self.residual = RESIDUALS[cfg.residual](cfg)
        n_mixes = cfg.n_layer - 1 if cfg.value_residual else 0
        self.value_mix = nn.Parameter(torch.full((n_mixes,), 0.5)) if n_mixes else None
        tables = [torch.empty(cfg.vocab_size, cfg.n_embd) for _ in range(cfg.value_embeds)]
        self.value_embeds = nn.ParameterList(normal_(table, 0.02) for table in tables)
        self.blocks, self.banked = build_blocks(cfg, self.order)
        self.norm = NORMS[cfg.norm](cfg)
        has_states_alone = all(isinstance(block.mixer, Recurrent) for block in self.blocks)
        is_endless = has_states_alone and cfg.pos != "learned"
        self.context = math.inf if is_endless else cfg.sequence_length  # tokens it can see
        self.is_dense = not any(isinstance(block.ffn, MoE) for block in self.blocks)

    def cast_weights(self, index):
        """{name: (weight, its copy in `dtype`)} of what each visit of a block would cast anew."""
        casts = {}
        if self.dtype != self.embed.dtype and self.order.count(index) > 1:
            for name, part in self.blocks[index].named_modules():
                is_cast = isinstance(part, Linear) and not part.in_float32
                if is_cast and f"{name}.weight" not in self.banked:
                    weight = part.weight
                    casts[f"{name}.weight"] = weight, weight.detach().to(self.dtype)
        return casts

    def visits(self):
        """For each visit its block, and tensors that are not the block's own: {name: tensor}."""
        banks, casts = [], []
        for index, block in enumerate(self.blocks):
            tensors = block.state_dict(keep_vars=True) if self.banked else {}
            # One unbind for all visits: its gradient is written once.
            banks.append({name: t.unbind(0) for name, t in tensors.items() if name in self.banked})
            casts.append(self.cast_weights(index))
        visits_until_now = Counter()
        for index in self.order:
            visit = visits_until_now[index]
            visits_until_now[index] += 1
            own = {name: parts[visit] for name, parts in banks[index].items()}
            own |= {name: CastBefore.apply(*pair) for name, pair in casts[index].items()}
            yield self.blocks[index], own

    def values_at(self, visit, tokens_BT):
        """The fields of a visit's Context that are for its values: {name: tensor}."""
        fields = {}
        if self.value_mix is not None and visit:
            fields["value_mix"] = self.value_mix[visit - 1]
        n_tables, to_last = len(self.value_embeds), len(self.order) - visit
        if visit < n_tables or to_last <= n_tables:
            table = self.value_embeds[visit if visit < n_tables else -to_last]
            fields["value_embed"] = F.embedding(tokens_BT, table).to(self.dtype)
        return fields

    def new_cache(self, batch, length):
        """An empty Cache for `batch` sequences of up to `length` tokens."""
        like = self.embed.new_empty(0, self.embed.size(-1), dtype=self.dtype)
        visits = [self.blocks[i].mixer.new_cache(batch, length, like) for i in self.order]
        return Cache(visits, like.new_zeros(batch, dtype=torch.int64), length)

    def hidden(self, tokens_BT, cache=None, counts=None):
        """Normed output (B, T, C) of the last visit, the head (V, C), and a list of routings.

        With a cache the tokens go on with its sequences: of row b all, or the first counts[b] where
        the rest is padding.
        """
        if cache is None:
            caches = itertools.repeat(None)
            ctx = Context(positions=torch.arange(tokens_BT.size(1), device=tokens_BT.device))
        else:
            caches = cache.visits
            ctx = cache.advance(tokens_BT, counts)
        if self.eot is not None:
            resets = tokens_BT == self.eot
            resets = resets if ctx.valid is None else resets & ctx.valid
            ctx = ctx._replace(segment=resets.cumsum(1))
        if self.value_mix is not None:
            ctx = ctx._replace(shared={})
        x = F.embedding(tokens_BT, self.embed).to(self.dtype)
        x = self.dropout(self.add_position(x, ctx))
        kept, routings = [], []
        for visit, ((block, own), of_visit) in enumerate(zip(self.visits(), caches)):
            x = self.residual(x, visit, kept)
            args = x, ctx._replace(cache=of_visit, **self.values_at(visit, tokens_BT))
            x, of_block = torch.func.functional_call(block, own, args) if own else block(*args)
            routings += of_block
        return self.norm(x), self.embed if self.head is None else self.head, routings

    def logits(self, x, head):
        """Float32 logits (..., V) of normed outputs (..., C), by the head (V, C) or rows of it."""
        return soft_cap(linear(x, head.type_as(x)).float(), self.softcap)

    def forward(self, tokens_BT, targets_BT=None, cache=None):
        x, head, routings = self.hidden(tokens_BT, cache)
        if targets_BT is None:
            return self.logits(x, head)
        args = x.flatten(0, 1), head, targets_BT.flatten(), self.loss_chunk, self.softcap
        loss = LinearCrossEntropy.apply(*args)
        return loss, torch.stack(routings) if routings else loss.new_zeros(0, 4, 0)

    @torch.no_grad()
    def score(self, tokens_BT, targets_BT, cache=None):
        """Mean loss and accuracy, (2,), of the likeliest token, of tokens against targets."""
        x, head, _ = self.hidden(tokens_BT, cache)
        x, weight, targets = x.flatten(0, 1), pad_head(head.type_as(x)), targets_BT.flatten()
        rows = rows_per_chunk(x, head)
        chunks = zip(x.split(rows), targets.split(rows))
        options = self.softcap, len(head)
        sums = sum(self.score_chunk(xs, weight, ts, *options) for xs, ts in chunks)
        return sums / len(x)

    def router_states(self):
        """[(router_state (E,) of an MoE, its visits among those of all MoEs)].

        A block that is visited often pools its visits, unless its state is a bank.
        """
        blocks_of_visits = [i for i in self.order if isinstance(self.blocks[i].ffn, MoE)]
        states = []
        for index in dict.fromkeys(blocks_of_visits):
            state = self.blocks[index].ffn.router_state
            visits = [visit for visit, i in enumerate(blocks_of_visits) if i == index]
            if state.ndim == 1:
                states.append((state, visits))
            else:
                states += [(own, [visit]) for own, visit in zip(state, visits)]
        return states

    def flops_per_token(self):
        """Training FLOPs a token: 6 per weight of a product, head included, and what mixers add."""
        flops = 6 * self.embed.numel()
        for index in self.order:
            for part in self.blocks[index].modules():
                flops += getattr(part, "flops_per_token", 0)
        return flops


def build_blocks(cfg, order):
    """The blocks of a GPT, and the names of those of their tensors that are banks."""
    blocks, sources = {}, {}  # by index; for each visit the block that its slices start as
    for layer, index in enumerate(order):
        source = blocks.get(index)
        if source is None or cfg.recurrence == "indexed":
            source = Block(cfg, layer)  # indexed: each layer starts as it would in a stack
        blocks.setdefault(index, source)
        sources.setdefault(index, []).append(source)

    banked = set()
    for index, block in blocks.items():
        tensors = [source.state_dict() for source in sources[index]]
        for name in tensors[0]:
            if is_banked(cfg, name):
                make_bank(block, name, [of_visit[name] for of_visit in tensors])
                banked.add(name)
    return nn.ModuleList(blocks.values()), banked


def make_bank(block, name, slices):
    """Puts a bank of these slices in the place of a block's tensor."""
    module_name, _, leaf = name.rpartition(".")
    module, bank = block.get_submodule(module_name), torch.stack(slices)
    is_parameter = leaf in module._parameters
    setattr(module, leaf, nn.Parameter(bank) if is_parameter else bank)


########################################
#              Optimizers              #
########################################


class Hyper(NamedTuple):
    """What may change from step to step for an update rule."""

    lr: float  # learning rate
    momentum: float  # of the first moment: AdamW's beta1, Muon's mu
    weight_decay: float  # decoupled: a step takes lr * weight_decay of a weight


def warmdown(cfg):
    """Steps of the trapezoid's decay."""
    if cfg.warmdown_frac is None:
        return cfg.warmdown_iters
    return round(cfg.warmdown_frac * cfg.num_iterations)


def trapezoid(step, cfg):
    return min(1.0, (cfg.num_iterations - step) / max(1, warmdown(cfg)))


def cosine(step, cfg):
    part = (step - cfg.warmup_iters) / max(1, cfg.num_iterations - cfg.warmup_iters)
    return cfg.min_lr_frac + (1 - cfg.min_lr_frac) * 0.5 * (1 + math.cos(math.pi * part))


# Of (step, cfg): fraction of the peak learning rate, 0 to 1, in steps after the warm-up.
SCHEDULES = {"trapezoid": trapezoid, "cosine": cosine}


def lr_factor(step, cfg):
    """Fraction of the peak learning rate for the update that follows `step` updates."""
    if step < cfg.warmup_iters:
        return (step + 1) / cfg.warmup_iters
    return SCHEDULES[cfg.lr_schedule](step, cfg)


def constant(step, cfg):
    return 1.0


def to_zero(step, cfg):
    return 1 - step / cfg.num_iterations


# Of (step, cfg): the fraction of WEIGHT_DECAY, which is times the learning rate besides.
DECAY_SCHEDULES = {"constant": constant, "follow_lr": lr_factor, "to_zero": to_zero}


def decay_factor(step, cfg):
    return DECAY_SCHEDULES[cfg.decay_schedule](step, cfg)


def momentum_factor(step, cfg):
    """Fraction of MUON_MOMENTUM: MOMENTUM_START's at both ends, linear between that and 1."""
    if cfg.momentum_start is None:
        return 1.0
    rise, fall, part = cfg.momentum_warmup_iters, cfg.momentum_cooldown_iters, 1.0
    if rise:
        part = step / rise
    if fall:
        part = min(part, (cfg.num_iterations - step) / fall)
    return float(np.interp(part, (0, 1), (cfg.momentum_start / cfg.muon_momentum, 1)))


def aux_coef(step, cfg):
    """Weight of the balance loss in the step that follows `step` updates, 0 where there is none."""
    if cfg.balance != "aux":
        return 0.0
    start, end = cfg.aux_loss_coef_start, cfg.aux_loss_coef_end
    if start is None:
        start = end = cfg.aux_loss_coef
    fractions = (cfg.aux_warmup_frac, cfg.aux_decay_end_frac)
    return float(np.interp(step / cfg.num_iterations, fractions, (start, end)))


def unit_scale(rows, cols):
    """A unit mean square; modded-nanogpt, record of 2024-10-14."""
    return max(rows, cols) ** 0.5


def original_scale(rows, cols):
    """As Muon was published, and torch.optim.Muon's default."""
    return max(1, rows / cols) ** 0.5


def match_rms_adamw_scale(rows, cols):
    """As large as AdamW's: Moonlight, arXiv 2502.16982; also in torch.optim.Muon."""
    return 0.2 * max(rows, cols) ** 0.5


MUON_SCALES = {  # factor on the orthogonalised update of a matrix
    "unit": unit_scale,
    "original": original_scale,
    "match_rms_adamw": match_rms_adamw_scale,
}


ORTHOGONALIZERS = {"newton_schulz": zeropower_via_newtonschulz5, "polar_express": polar_express}
MUON_NORMS = {"none": keep_rows, "rows": norm_rows}


class UpdateRule:
    """How parameters change in a step; the ranks' shares of work and state are Optimizer's."""

    stacked = False  # True: params are stacks (n, rows, cols) of all matrices of one shape
    factors = {"lr": lr_factor, "weight_decay": decay_factor}  # of Hyper, from (step, cfg)

    def __init__(self, cfg):
        self.cfg = cfg

    @staticmethod
    def peak(cfg):
        """The Hyper that `factors` are applied to."""
        return Hyper(cfg.lr, cfg.beta1, cfg.weight_decay)

    def new_state(self, param):
        """{name: tensor} for a tensor of parameters."""
        return {"momentum": torch.zeros_like(param)}

    def decay(self, p, direction, hyper, frozen):
        """Takes lr * weight_decay of p (...), but where `frozen` is true.

        With CAUTIOUS_DECAY only where p and the direction (...) that will be taken off agree.
        """
        if not hyper.weight_decay:
            return
        kept = torch.where(frozen, 1, 1 - hyper.lr * hyper.weight_decay)
        if self.cfg.cautious_decay:
            kept = torch.where(direction * p >= 0, kept, 1)
        p.mul_(kept)

    def update(self, params, grads, state, hyper, skip):
        """Changes params, a list of tensors, and state, {name: list}, in place; hyper is a Hyper.

        Where skip () is 1, since a gradient is not finite, nothing may change.
        """


class Muon(UpdateRule):
    """MomentUm Orthogonalized by Newton-Schulz (kellerjordan.github.io/posts/muon)."""

    stacked = True
    factors = UpdateRule.factors | {"momentum": momentum_factor}

    @staticmethod
    def peak(cfg):
        decay = cfg.weight_decay if cfg.muon_decay else 0.0
        return Hyper(peak_rate(cfg, "muon_lr"), cfg.muon_momentum, decay)

    def new_state(self, param):
        state = super().new_state(param)
        if self.cfg.muon_norm != "none":
            state["row_squares"] = param.new_zeros(*param.shape[:-1], 1)
        return state

    def update(self, params, grads, state, hyper, skip):
        scale = MUON_SCALES[self.cfg.muon_scale]
        orthogonalize = ORTHOGONALIZERS[self.cfg.orthogonalize]
        norm = MUON_NORMS[self.cfg.muon_norm]
        row_squares = state.get("row_squares", itertools.repeat(None))
        for p, grad, momentum, squares in zip(params, grads, state["momentum"], row_squares):
            # A non-finite gradient would poison the momentum for good; an expert without tokens,
            # whose gradient is zero, would go on along an old one.
            largest = torch.linalg.vector_norm(grad, math.inf, (-2, -1), keepdim=True)
            frozen = (skip > 0) | (largest == 0)
            grad = torch.where(frozen, momentum, grad)
            momentum.lerp_(grad, 1 - hyper.momentum)
            direction = grad.lerp_(momentum, hyper.momentum)
            dtype = torch.bfloat16 if p.is_cuda else torch.float32  # few CPUs are fast in bfloat16
            direction = norm(orthogonalize(direction, dtype), squares, frozen)
            direction = direction.masked_fill_(frozen, 0)
            self.decay(p, direction, hyper, frozen)
            p.add_(direction, alpha=-hyper.lr * scale(*p.shape[-2:]))


class AdamW(UpdateRule):
    """AdamW (arXiv 1711.05101) as torch computes it, fused."""

    def new_state(self, param):
        moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
        return moments | {"step": torch.zeros((), device=param.device)}

    def update(self, params, grads, state, hyper, skip):
        if self.cfg.cautious_decay:  # torch's decays all
            for p, grad, momentum in zip(params, grads, state["exp_avg"]):
                direction = torch.lerp(grad, momentum, hyper.momentum)  # its sign
                self.decay(p, direction, hyper, skip > 0)
            hyper = hyper._replace(weight_decay=0.0)
        adamw(
            params,
            grads,
            state["exp_avg"],
            state["exp_avg_sq"],
            [],
            state["step"],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=hyper.momentum,
            beta2=self.cfg.beta2,
            eps=1e-8,
            lr=hyper.lr,
            weight_decay=hyper.weight_decay,
            found_inf=skip,
        )


# Of the matrices inside the blocks.
OPTIMIZERS = {"muon": Muon, "adamw": AdamW}


def optimizer_choices(model):
    """{id of a parameter: optimizer} where a part says so, by `optim`: the innermost part counts.

    `optim` is a name for all parameters of the part, or {name of a parameter within it: name}:
    "adamw", or another for those that OPTIMIZER is to have after all.
    """
    wanted = {}
    for module in model.modules():
        optim, params = getattr(module, "optim", {}), dict(module.named_parameters())
        if isinstance(optim, str):
            optim = dict.fromkeys(params, optim)
        for name, choice in optim.items():
            if name not in params or choice not in OPTIMIZERS:
                raise ValueError(
                    f"{type(module).__name__}.optim has {name}: {choice}; its parameters are "
                    f"{', '.join(params)}, and optimizers {', '.join(OPTIMIZERS)}"
                )
            wanted[id(params[name])] = choice
    return wanted


def split_params(model):
    """{"matrices", "embed", "head", "vectors": [Parameter]}, each parameter in one of them.

    Matrices are those inside the blocks, banks of them too, that no part wants AdamW to have.
    """
    wanted = optimizer_choices(model)
    embeddings = [model.embed, *model.value_embeds]
    groups = {"matrices": [], "embed": embeddings, "head": [], "vectors": []}
    if model.head is not None:
        groups["head"].append(model.head)
    for block in model.blocks:
        for name, p in block.named_parameters():
            n_dims = p.ndim - 1 if name in model.banked else p.ndim
            is_matrix = n_dims >= 2 and not name.endswith(".bias")
            if is_matrix and wanted.get(id(p)) != "adamw":
                groups["matrices"].append(p)
    taken = {id(p) for group in groups.values() for p in group}
    groups["vectors"] = [p for p in model.parameters() if id(p) not in taken]
    return groups


def build_optimizers(model, cfg, ranks):
    """The optimizers of cfg over the groups of split_params, learning rates as in the settings."""
    rule, adamw_peak = OPTIMIZERS[cfg.optimizer], AdamW.peak(cfg)
    kinds = {
        "matrices": (rule, rule.peak(cfg)),
        "embed": (AdamW, adamw_peak._replace(lr=peak_rate(cfg, "embed_lr"))),
        "head": (AdamW, adamw_peak._replace(lr=peak_rate(cfg, "head_lr"))),
        "vectors": (AdamW, adamw_peak._replace(weight_decay=0.0)),
    }
    return [
        Optimizer(params, kinds[name][0](cfg), kinds[name][1], cfg, ranks)
        for name, params in split_params(model).items()
        if params
    ]


########################################
#                 Data                 #
########################################

# The shard format of llm.c and modded-nanogpt: 256 int32, then tokens as uint16.
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


def shard_tokens(path):
    """Number of tokens of a shard, after its header and size are verified. Raises DataError."""
    try:
        header = np.fromfile(regular(path), dtype="<i4", count=HEADER_INTS)
        size = os.path.getsize(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); name shards, as "
            "data/x/x_train_*.bin"
        ) from None
    magic, version, tokens = [*header[:3].tolist(), 0, 0, 0][:3]  # a file may be shorter
    expected_size = 4 * HEADER_INTS + 2 * tokens
    good_header = magic == SHARD_MAGIC and version == SHARD_VERSION and tokens >= 1
    if not good_header or size != expected_size:
        raise DataError(
            f"{path}: expected magic {SHARD_MAGIC}, version {SHARD_VERSION}, a token or more and "
            f"{expected_size} bytes for {tokens}, found {magic}, {version} and {size} bytes; "
            "it is no shard, or a damaged one: fetch or make it again"
        )
    return tokens


def load_shard(path):
    """Memory map of a shard's tokens, (n,) uint16. Raises DataError."""
    shape = (shard_tokens(path),)
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=shape)


class ShardLoader:
    """Samples of T + 1 tokens, each from i * T of a shard, in a glob's order, epoch after epoch.

    With `limit`, only samples within the first so many tokens. With `streams`, so many sequences of
    samples, which a batch of as many rows has side by side. With `unit`, as many samples of a shard
    as are a multiple of it; `dropped` are the others. Raises DataError.
    """

    def __init__(self, pattern, cfg, shuffle=False, limit=0, streams=1, unit=1):
        self.files = sorted(glob.glob(pattern))
        if not self.files:
            tokens = cfg.num_iterations * cfg.batch_size * cfg.sequence_length
            raise DataError(
                f"no file matches {pattern} (looked from {os.getcwd()}); "
                + how_to_get(pattern, math.ceil(tokens / 1e8))  # FineWeb's shards have so many
            )
        self.shards = [load_shard(file) for file in self.files]
        self.length = cfg.sequence_length
        self.vocab_size = cfg.vocab_size
        self.seed = cfg.seed
        self.shuffle = shuffle
        self.limit = limit
        per_shard = np.array([(len(shard) - 1) // self.length for shard in self.shards])
        if limit:
            ends = np.minimum(np.cumsum(per_shard), limit // self.length)
            per_shard = np.diff(ends, prepend=0)
        # The number of samples in this shard and all before it.
        self.cumulative = np.cumsum(per_shard // unit * unit)
        self.streams = streams
        samples = int(self.cumulative[-1])
        self.dropped = per_shard.sum() - samples
        self.samples = samples // streams * streams
        if samples < streams > 1:
            raise DataError(
                f"{self.files[0]} and its like have {samples} samples of {self.length} tokens for "
                f"BATCH_SIZE={streams} streams; lower it or SEQUENCE_LENGTH, or get more"
            )
        self.tokens = sum(len(shard) for shard in self.shards)
        self.permutation = (-1, None)  # an epoch and the order of its samples

    def read(self, first, count):
        """Samples first .. first + count - 1 of all epochs: (count, T + 1) int64; or DataError."""
        which, index = self.place(first, count)
        batch = np.empty((count, self.length + 1), dtype=np.int64)
        for shard in np.unique(which):
            self.check_length(shard)
            windows = np.lib.stride_tricks.sliding_window_view(self.shards[shard], self.length + 1)
            samples = windows[:: self.length]
            batch[which == shard] = samples[index[which == shard]]
        if batch.max() >= self.vocab_size:
            self.check_tokens(np.unique(which))
        return batch

    def check_length(self, shard):
        """Raises DataError for a shard cut short since, whose mapped pages would end the process.

        A file that is gone does no harm: what is mapped stays.
        """
        file, size = self.files[shard], 4 * HEADER_INTS + 2 * len(self.shards[shard])
        with contextlib.suppress(FileNotFoundError):
            if os.path.getsize(file) < size:
                shard_tokens(file)

    def place(self, first, count):
        """Where these samples are: (number of the shard, index within it), (count,) each."""
        epochs, index = np.divmod(np.arange(first, first + count), self.samples)
        if self.shuffle:
            for epoch in np.unique(epochs):
                index[epochs == epoch] = self.epoch_order(int(epoch))[index[epochs == epoch]]
        step, row = np.divmod(index, self.streams)
        index = row * (self.samples // self.streams) + step
        which = np.searchsorted(self.cumulative, index, side="right")
        first_of_shard = np.concatenate(([0], self.cumulative))
        return which, index - first_of_shard[which]

    def begins(self, first, count):
        """Which samples, (count,), do not go on where the one before in their stream ended."""
        shard, index = self.place(first, count)
        if first < self.streams:
            return np.ones(count, dtype=bool)
        last_shard, last_index = self.place(first - self.streams, count)
        return (shard != last_shard) | (index != last_index + 1)

    def epoch_order(self, epoch):
        """The samples in the order of an epoch, (samples,); that of the last call is kept."""
        kept_epoch, order = self.permutation  # read once: the prefetching thread sets it too
        if kept_epoch != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.samples)
            self.permutation = (epoch, order)
        return order

    def shortfall(self, name, value, samples):
        """ "", or a sentence where there are fewer samples than the setting `name` needs."""
        samples = max(1, samples)
        if self.samples >= samples:
            return ""
        lower = "BATCH_SIZE" if self.dropped else "SEQUENCE_LENGTH"
        if self.samples:
            lower = name if name == "NUM_ITERATIONS" else f"{name} to {self.samples * self.length}"
        ways = f"lower {lower}"
        if name == "NUM_ITERATIONS":
            shards = math.ceil(len(self.shards) * samples / max(1, self.samples))
            more = how_to_get(self.files[0], shards)
            limit = ", raise MAX_TRAIN_TOKENS" if self.limit else ""
            tail = ", set SHARD_TAIL=keep" if self.dropped else ""
            ways += f", set MAX_EPOCHS=0{limit}{tail}, or get more; {more}"
        return (
            f"{name}={value} needs {samples:,} samples of {self.length} tokens; {self.files[0]} "
            f"and its like have {self.samples:,}; {ways}"
        )

    def check_tokens(self, shards):
        """Scans every token of the shards with these numbers. Raises DataError."""
        for shard in shards:
            offset = np.argmax(self.shards[shard] >= self.vocab_size)
            token = self.shards[shard][offset]
            if token >= self.vocab_size:
                raise DataError(
                    f"{self.files[shard]}: token {token} at offset {offset} is not below "
                    f"VOCAB_SIZE={self.vocab_size}; set VOCAB_SIZE to the tokenizer's size (0 "
                    "reads it), or make a damaged shard again"
                )

    def prefetch(self, slices, device, depth=4):
        """Yields (inputs (n, T), targets (n, T), seconds waited) for each (first, count).

        A thread reads ahead.
        """

        def load(first, count):
            batch = torch.from_numpy(self.read(first, count))
            return batch.pin_memory() if device.type == "cuda" else batch

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            batches = (pool.submit(load, *piece) for piece in slices)
            ahead = deque(itertools.islice(batches, depth))
            while ahead:
                began, ready = time.perf_counter(), ahead[0].done()
                batch = ahead.popleft().result()
                waited = 0.0 if ready else time.perf_counter() - began
                ahead.extend(itertools.islice(batches, 1))
                batch = batch.to(device, non_blocking=True)
                yield batch[:, :-1], batch[:, 1:], waited


########################################
#               Training               #
########################################

SAMPLE_PROMPT, SAMPLE_TOKENS = 32, 128  # of a sample in the log: tokens given, and made
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(cfg):
    """cfg with what auto and 0 leave open: device, dtype, compile, vocab_size and run_id.

    Raises ConfigError, DataError.
    """
    has_cuda = torch.cuda.is_available()
    device = cfg.device
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    if device == "cuda" and not (cfg.dry_run or has_cuda):
        raise ConfigError("DEVICE=cuda: torch finds no CUDA device here; set DEVICE=cpu or auto")

    dtype = cfg.dtype
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    elif dtype == "auto":
        old_gpu = has_cuda and not torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "float16" if old_gpu else "bfloat16"

    compiled = cfg.compile
    if compiled == "auto":
        compiled = "1" if device == "cuda" and not cfg.deterministic else "0"

    vocab_size = cfg.vocab_size or dataset_index(cfg.input_bin).get("vocab_size")
    if not vocab_size:
        raise DataError(
            f"VOCAB_SIZE=0 needs index.json beside the shards that match INPUT_BIN={cfg.input_bin} "
            f"(looked from {os.getcwd()}); set VOCAB_SIZE, or {how_to_get(cfg.input_bin)}"
        )

    run_id = cfg.run_id
    if not run_id and cfg.resume not in ("auto", "none"):
        run_id = Path(cfg.resume).parent.name
    return dataclasses.replace(
        cfg, device=device, dtype=dtype, compile=compiled, vocab_size=vocab_size, run_id=run_id
    )


def make_plan(cfg, ranks):
    """What a run of cfg on these ranks will be, without touching a device: counts as integers."""
    with torch.device("meta"):
        model = GPT(cfg)
    total = sum(p.numel() for p in model.parameters())
    in_experts = 0
    for part in model.modules():
        if isinstance(part, ExpertLinear):
            in_experts += sum(p.numel() for p in part.parameters())
    tokens_per_step = cfg.batch_size * cfg.sequence_length
    return {
        "world_size": ranks.world_size,
        "config_hash": cfg.hash(),
        "source_sha": source_hash(SOURCE),
        "params_total": total,
        "params_active": total - in_experts * (cfg.num_experts - cfg.top_k) // cfg.num_experts,
        "flops_per_token": model.flops_per_token(),
        "tokens_per_step": tokens_per_step,
        "tokens_needed": cfg.num_iterations * tokens_per_step + 1,
        "tokens_on_disk": sum(shard_tokens(file) for file in glob.glob(cfg.input_bin)),
        "grad_accumulation": cfg.batch_size // (cfg.device_batch_size * ranks.world_size),
    }


def check_batch(cfg, ranks):
    """Raises ConfigError where the ranks cannot share the batch in whole micro-batches."""
    batch, micro, world = cfg.batch_size, cfg.device_batch_size, ranks.world_size
    step = micro * world
    if batch % step == 0:
        return
    near = [size for size in (batch - batch % step, batch - batch % step + step) if size]
    choices = " or ".join(map(str, near))
    most = min(batch // micro, 1024)
    worlds = [str(n) for n in range(1, most + 1) if batch % (n * micro) == 0]
    if worlds:
        choices += f", or {' or '.join(worlds)} ranks"
    raise ConfigError(
        f"BATCH_SIZE={batch}: must be a multiple of DEVICE_BATCH_SIZE={micro} x {world} ranks; "
        f"choose {choices}"
    )


def preflight(cfg, ranks):
    """Loaders for training and validation, after all that can be checked has been.

    Raises ConfigError, DataError.
    """
    devices = torch.cuda.device_count()
    if cfg.device == "cuda" and ranks.local_world_size > devices:
        raise ConfigError(
            f"{ranks.local_world_size} ranks on this machine but {devices} CUDA devices; start "
            f"torchrun with --nproc_per_node={devices}, or set DEVICE=cpu"
        )
    check_tokenizers(cfg.input_bin, cfg.input_val_bin)
    streams = cfg.batch_size if cfg.carry_state else 1
    unit = 1 if cfg.shard_tail == "keep" or "shard_tail" in cfg.idle() else cfg.batch_size
    train = ShardLoader(cfg.input_bin, cfg, cfg.shuffle, cfg.max_train_tokens, streams, unit)
    val = ShardLoader(cfg.input_val_bin, cfg, limit=cfg.val_tokens, streams=streams)
    samples = cfg.num_iterations * cfg.batch_size
    per_epoch = math.ceil(samples / cfg.max_epochs) if cfg.max_epochs else 1
    val_samples = cfg.val_tokens // cfg.sequence_length
    too_few = [
        train.shortfall("NUM_ITERATIONS", cfg.num_iterations, per_epoch),
        val.shortfall("VAL_TOKENS", cfg.val_tokens, val_samples // streams * streams),
    ]
    if any(too_few):
        raise DataError(". And ".join(filter(None, too_few)))
    in_both = {*map(os.path.realpath, train.files)} & {*map(os.path.realpath, val.files)}
    if in_both:
        raise DataError(
            f"{min(in_both)} matches INPUT_BIN and INPUT_VAL_BIN; validate on other data"
        )
    if cfg.reset_at_eot and end_token(cfg) < 0:
        raise DataError(
            f"RESET_AT_EOT=1 needs eot_id in index.json of {dataset_folder(cfg.input_bin)}, which "
            "prepare_data.py writes where there are several documents; set RESET_AT_EOT=0"
        )
    if cfg.init_from:
        with torch.device("meta"):
            import_weights(GPT(cfg), cfg.init_from)
    for loader in (train, val):
        if 2 * loader.tokens < 2**30:  # bytes; larger data is checked batch by batch
            loader.check_tokens(range(len(loader.shards)))
    return train, val


def data_identity(cfg, train, val):
    """Fingerprints of all data of a run and of what it is validated on."""
    files, log_dir = train.files + val.files, Path(cfg.log_dir)
    return {
        "data_fingerprint": fingerprint(files, log_dir),
        "val_fingerprint": fingerprint(val.files, log_dir),
    }


@dataclasses.dataclass
class State:
    """What a step changes."""

    model: GPT
    optimizers: list
    loss_scale: LossScale
    step: int = 0  # updates made
    bad: list = dataclasses.field(default_factory=list)  # (1 + ranks,) a step, see update
    carried: Cache | None = None  # of this rank's rows, with CARRY_STATE=1
    averages: list = dataclasses.field(default_factory=list)  # of the parameters, with EMA_ITERS

    @classmethod
    def build(cls, cfg, ranks):
        """Model and optimizers, the same on every rank because the seed is."""
        torch.manual_seed(cfg.seed)
        device, dtype = ranks.device(cfg), DTYPES[cfg.dtype]
        model = GPT(cfg, dtype).to(device)
        rows = cfg.batch_size // ranks.world_size
        carried = model.new_cache(rows, math.inf) if cfg.carry_state else None
        optimizers = build_optimizers(model, cfg, ranks)
        state = cls(model, optimizers, LossScale(dtype, device), carried=carried)
        if cfg.ema_iters:
            state.averages = [p.detach().clone() for p in model.parameters()]
        return state

    def tensors(self):
        """What a checkpoint holds: {key: (tensor, kind)}, kinds as in harness.checkpoints."""
        names = {p: name for name, p in self.model.named_parameters()}
        tensors = {}
        for name, tensor in self.model.state_dict().items():
            tensors[f"model.{name}"] = (tensor, "copy")
        for name, average in zip(names.values(), self.averages):
            tensors[f"average.{name}"] = (average, "copy")
        for optimizer in self.optimizers:
            tensors |= optimizer.tensors(names)
        for name, tensor in self.loss_scale.tensors().items():
            tensors[f"loss_scale.{name}"] = (tensor, "copy")
        for visit, of_visit in enumerate(self.carried.visits if self.carried else []):
            for name, tensor in of_visit.items():
                tensors[f"carried.{visit}.{name}"] = (tensor.view(-1), "slice")
        return tensors


class StepStats(NamedTuple):
    """What a step measured, still on the device."""

    loss: Tensor  # (), mean over the batch
    grad_norm: Tensor  # ()
    routing: Tensor  # (visits of an MoE, 4, E), mean over the batch


def compile_model(model, cfg, device):
    """Compiles blocks and loss, and runs them once, so that no step waits for it."""
    torch._dynamo.config.recompile_limit = 64  # visits differ in kind: first, last, mixer, FFN
    for block in model.blocks:
        block.compile()
    # Two sizes, since the last chunk has its own.
    model.loss_chunk = torch.compile(loss_chunk, dynamic=False)
    model.score_chunk = torch.compile(score_chunk, dynamic=False)
    shape = cfg.device_batch_size, cfg.sequence_length
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    cache = model.new_cache(len(tokens), math.inf) if cfg.carry_state else None
    model(tokens, tokens, cache)[0].backward()
    model.zero_grad()
    model.eval().score(tokens, tokens)
    model.train()
    dist.barrier()


def uncompiled(odd_size):
    """Within it compiled modules run as they are written, for sizes not worth a compilation."""
    return torch.compiler.set_stance("force_eager") if odd_size else contextlib.nullcontext()


def seed_dropout(cfg, step, rank):
    """Every step and rank has its own seed, so that no generator has a state to save."""
    if cfg.dropout:
        seed = np.random.SeedSequence((cfg.seed, step, rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))


def accumulate_gradients(state, cfg, inputs, targets):
    """Forward and backward of this rank's (n, T) of the batch.

    Returns its part of the mean loss () and of the mean routing.
    """
    micro, world = cfg.device_batch_size, dist.get_world_size()
    weight = micro / (len(inputs) * world)  # of a micro-batch in the batch
    coef = aux_coef(state.step, cfg)
    loss_sum = routing_sum = 0.0
    for i, (x, y) in enumerate(zip(inputs.split(micro), targets.split(micro))):
        rows = slice(i * micro, (i + 1) * micro)
        loss, routing = state.model(x, y, state.carried and state.carried.select(rows))
        # The load that the probabilities are held against is that of the step before, of all ranks.
        aux = aux_loss(routing[:, STATE], routing[:, IMPORTANCE]).sum() / max(1, len(routing))
        (loss + coef * aux).backward(state.loss_scale.value * weight)
        loss_sum = loss_sum + loss.detach()
        routing_sum = routing_sum + routing.detach()
    return loss_sum * weight, routing_sum * weight


def reduce_stats(loss, squares, routing, model):
    """Sums of loss (), squares (), routing over the ranks, and whose were not finite (ranks,)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    own = squares
    if world > 1:  # squares are of gradients that were summed over the ranks
        own = squared_norm([p.grad for p in model.parameters()])
    not_finite = torch.zeros(world, device=loss.device)
    not_finite[rank] = ~torch.isfinite(loss + own)
    sums = torch.cat([torch.stack([loss, squares]), not_finite, routing.flatten()])
    dist.all_reduce(sums)
    loss, squares = sums[:2]
    return loss, squares, sums[2 + world :].view_as(routing), sums[2 : 2 + world]


def update(state, cfg, loss, routing):
    """The update by the gradients that the ranks have; loss () and routing are this rank's parts.

    Returns StepStats and whether it was left out, since loss or gradient is not finite: 1 or 0.
    state.bad gets (1 + ranks,): whether it was, and on which ranks.
    """
    squares = sum(optimizer.reduce_grads() for optimizer in state.optimizers)
    loss, squares, routing, not_finite = reduce_stats(loss, squares, routing, state.model)

    scale = state.loss_scale.value
    norm = squares.sqrt() / scale
    skip = (~torch.isfinite(norm + loss)).float()
    grad_scale = None
    if cfg.grad_clip:
        grad_scale = scale * (norm / cfg.grad_clip).clamp(min=1)
    elif state.loss_scale.active:
        grad_scale = scale
    for optimizer in state.optimizers:
        optimizer.step(state.step, grad_scale, skip)
    state.model.zero_grad()
    if state.averages:  # at first a mean of all weights until now
        part = max(1 / cfg.ema_iters, 1 / (state.step + 1))
        torch._foreach_lerp_(state.averages, [p.data for p in state.model.parameters()], part)

    # An overflow is how a loss scale finds out how far it can go; at 1 it is none.
    bad = torch.where(scale > 1, (~torch.isfinite(loss)).float(), skip)
    state.bad.append(torch.cat([bad.view(1), not_finite]))
    state.loss_scale.update(skip)
    state.step += 1
    return StepStats(loss, norm, routing), skip


def train_step(state, cfg, inputs, targets):
    """One update from this rank's (n, T) of the batch; returns its StepStats."""
    seed_dropout(cfg, state.step, dist.get_rank())
    loss, routing = accumulate_gradients(state, cfg, inputs, targets)
    stats, skip = update(state, cfg, loss, routing)
    if state.carried:  # what was not finite is in the states
        state.carried.reset(~torch.isfinite(stats.loss).view(1))
    for router_state, visits in state.model.router_states():
        new = sum(stats.routing[visit, NEXT_STATE] for visit in visits) / len(visits)
        router_state.copy_(torch.where(skip > 0, router_state, new))
    return stats


def go_on(cache, loader, first):
    """Resets those sequences of a cache whose samples, from `first` on, begin anew."""
    begins = loader.begins(first, len(cache.filled))
    if begins.any():
        cache.reset(torch.from_numpy(begins).to(cache.filled.device))


@torch.no_grad()
def evaluate(model, loader, cfg, run, step):
    """Mean loss and accuracy of the first VAL_TOKENS; None where the run is to end.

    Each rank takes its share of the samples. With CARRY_STATE=1 these are streams, too.
    """
    samples = cfg.val_tokens // cfg.sequence_length // loader.streams * loader.streams
    micro, world = cfg.device_batch_size, run.ranks.world_size
    device = run.ranks.device(cfg)
    starts = range(micro * run.ranks.rank, samples, micro * world)
    slices = [(start, min(micro, samples - start)) for start in starts]
    batches_of_every_rank = samples // (micro * world)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    carried = model.new_cache(loader.streams, math.inf) if cfg.carry_state else None
    cache = None
    model.eval()
    with contextlib.closing(loader.prefetch(slices, device)) as batches:
        for i, (x, y, _) in enumerate(batches):
            if i < batches_of_every_rank:
                status = run.poll(step)
                if status:
                    break
            if carried:
                row = slices[i][0] % loader.streams
                cache = carried.select(slice(row, row + micro))
                go_on(cache, loader, slices[i][0])
            with uncompiled(cfg.compile == "1" and len(x) < micro):
                total += model.score(x, y, cache) * len(x)
    model.train()
    dist.all_reduce(total)
    return None if run.status else (total / samples).tolist()


def validate(state, loader, cfg, run):
    """Columns of the curve by `evaluate`; None where the run is to end."""
    loss_accuracy = evaluate(state.model, loader, cfg, run, state.step)
    if run.status:
        return None
    columns = dict(zip(("val_loss", "val_accuracy"), loss_accuracy))
    if state.averages:
        with averaged(state.model, state.averages) as model:
            loss_accuracy = evaluate(model, loader, cfg, run, state.step)
        if run.status:
            return None
        columns["ema_val_loss"], _ = loss_accuracy
    return columns


def bad_step_lines(step, flags, cfg, loader):
    """A line for each rank whose gradient was not finite; flags (1 + ranks,) are of train_step."""
    left_out, *not_finite = flags
    if not left_out:
        return []
    world = len(not_finite)
    ranks = [rank for rank in range(world) if not_finite[rank]]
    if not ranks:  # the gradients overflowed where they were added up
        ranks = range(world)
    per_rank = cfg.batch_size // world
    lines = []
    for rank in ranks:
        (shard,), (index,) = loader.place(step * cfg.batch_size + rank * per_rank, 1)
        lines.append(
            f"step:{step + 1}/{cfg.num_iterations} bad_gradient rank:{rank} "
            f"shard:{loader.files[shard]!r} offset:{index * loader.length} samples:{per_rank}"
        )
    return lines


def take_bad_steps(state, cfg, loader):
    """For each step since the last call its bad_step_lines. Here the loop waits for the device."""
    steps = torch.stack(state.bad).tolist() if state.bad else []
    state.bad.clear()
    first = state.step - len(steps)
    return [bad_step_lines(first + i, flags, cfg, loader) for i, flags in enumerate(steps)]


def expert_report(state, cfg, routing):
    """The load of the experts: a line, figures of the summary, and columns of the curve.

    Line and figures pool the visits of a router; the columns are of each visit.
    """
    step, pooled = state.step, []
    for _, visits in state.model.router_states():
        pooled.append(routing[visits].mean(0))
    pooled = torch.stack(pooled)
    figures, coef = pooled_health(pooled[:, LOAD], pooled[:, IMPORTANCE]), aux_coef(step - 1, cfg)
    words = " ".join(f"{name}:{figures[name]:.4f}" for name in HEALTH[:4])
    line = (
        f"[MOE] step:{step}/{cfg.num_iterations} coef:{coef:.4f} {words} dead:{figures['dead']} "
        f"dropped:{figures['dropped']:g}"
    )
    of_visits = expert_health(routing[:, LOAD], routing[:, IMPORTANCE])
    cells = torch.stack([of_visits[name] for name in HEALTH], dim=-1).flatten().tolist()
    columns = dict(zip(health_columns(cfg), [coef, *cells]))
    return line, {f"moe_{name}": value for name, value in figures.items()}, columns


def log_point(run, state, cfg, stats, validation, loader):
    """Logs the last step, whose StepStats may be None, and what `validate` found, likewise."""
    step = state.step
    values, lines, figures = {"epoch": step * cfg.batch_size / loader.samples}, [], {}
    bad_steps = take_bad_steps(state, cfg, loader)
    if stats is not None:
        values["train_loss"] = stats.loss.item()
        values["grad_norm"] = stats.grad_norm.item()
        values["lr"] = cfg.lr * lr_factor(step - 1, cfg)
        if moe_log_due(step, cfg, stats) or (len(stats.routing) and step == cfg.num_iterations):
            line, figures, columns = expert_report(state, cfg, stats.routing.cpu())
            lines.append(line)
            values |= columns
    if validation is not None:
        values |= validation
        figures |= {name: value for name, value in validation.items() if name != "val_loss"}
    run.point(values, lines, figures, bad_steps)


def print_sample(run, state, cfg, loader):
    """Prints the first tokens of the validation data, and how the model goes on."""
    state.model.eval()
    try:
        import tokenizers

        file = dataset_folder(cfg.input_bin) / "tokenizer.json"
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        prompt = loader.read(0, 1)[0, :-1][:SAMPLE_PROMPT].tolist()
        size = tokenizer.get_vocab_size()
        with uncompiled(cfg.compile == "1"):
            made = generate(state.model, [prompt], SAMPLE_TOKENS, temperature=0.8, vocab_size=size)
            made = [token for (token,) in made]
        for name, tokens in (("prompt", prompt), ("sample", made)):
            text = tokenizer.decode(tokens, skip_special_tokens=False)
            run.print(f"step:{state.step}/{cfg.num_iterations} {name}:{quoted(text)}")
    except Exception as error:  # it is worth no run
        reason = " ".join(str(error).split())
        run.print(
            f"warning: no sample at step {state.step}: {type(error).__name__}: {reason}; it needs "
            "the tokenizer.json that scripts/prepare_data.py writes beside the shards"
        )
    state.model.train()


def moe_log_due(step, cfg, stats):
    return len(stats.routing) > 0 and step % cfg.balance_log_interval == 0


def log_due(step, cfg, stats):
    """Whether the training loss of the last step is to be logged."""
    if stats is None:
        return False
    return step == 1 or step % cfg.log_every == 0 or moe_log_due(step, cfg, stats)


def worth_saving(stats, last):
    """Whether the last step left a state to go on from: it has not diverged, and may not have."""
    if stats is None:
        return True
    if not stats.loss.isfinite() or stats.grad_norm == 0:
        return False
    return last or bool(stats.grad_norm.isfinite())


def begin(run, cfg):
    """(State, StepStats of the last step or None) at the start, or as a checkpoint has them."""
    state, stats = State.build(cfg, run.ranks), None
    saved = run.restore(state.tensors())
    if saved:
        state.step, last_stats = saved
        if last_stats:
            stats = StepStats(*(torch.tensor(stat) for stat in last_stats))
    elif cfg.init_from:
        import_weights(state.model, cfg.init_from)
        for average, p in zip(state.averages, state.model.parameters()):
            average.copy_(p.data)
    if cfg.compile == "1":
        run.print("compiling blocks and loss: a minute or two the first time on a machine")
        with run.timed("compile_time"):
            compile_model(state.model, cfg, run.ranks.device(cfg))
    return state, stats


def train(cfg, run, train_loader, val_loader):
    """The run from its beginning or its checkpoint to its end; returns the State."""
    state, stats = begin(run, cfg)
    first_step = state.step
    per_rank = cfg.batch_size // run.ranks.world_size
    slices = (
        (step * cfg.batch_size + run.ranks.rank * per_rank, per_rank)
        for step in range(first_step, cfg.num_iterations)
    )
    save_due, waited = False, 0.0
    with contextlib.closing(train_loader.prefetch(slices, run.ranks.device(cfg))) as batches:
        while True:
            # state.step updates are made; the last is not yet logged. A resumed run enters here.
            step, last = state.step, state.step == cfg.num_iterations
            status = run.poll(step, waited)
            waited = 0.0

            if last or (cfg.save_every and step > first_step and step % cfg.save_every == 0):
                save_due = True
            if status or (save_due and worth_saving(stats, last)):
                # Before the validation, which may fail.
                extra = [stat.tolist() for stat in stats] if stats else None
                run.save(state.tensors(), extra, take_bad_steps(state, cfg, train_loader))
                save_due = False
            if status:
                break

            validation = None
            if last or (cfg.val_every and step % cfg.val_every == 0):
                with run.timed("eval_time"):
                    validation = validate(state, val_loader, cfg, run)
                if run.status:
                    continue  # it was cut short: save, and leave the point to who goes on
            if validation is not None or log_due(step, cfg, stats):
                log_point(run, state, cfg, stats, validation, train_loader)
            if cfg.sample_every and step and step % cfg.sample_every == 0:
                with run.timed("eval_time"):
                    print_sample(run, state, cfg, val_loader)
            if last:
                break

            inputs, targets, waited = next(batches)
            if state.carried:
                go_on(
                    state.carried, train_loader, step * cfg.batch_size + run.ranks.rank * per_rank
                )
            stats = train_step(state, cfg, inputs, targets)
    return state


def export_averages(state, cfg, run):
    """Writes the moving averages of a run that has come to its end as weights of their own."""
    if state.averages and run.ranks.rank == 0 and not run.status:
        with averaged(state.model, state.averages) as model:
            export_weights(model.state_dict(), cfg, run.records.files.folder / "averages")


def main(argv, env):
    """One run as the environment sets it; returns the exit code."""
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return 0
    with Run(Config, env, SOURCE) as run:
        run.ranks.check(env)
        if argv:
            option = argv[0].partition("=")[0]
            raise ConfigError(
                f"{option} is no option; settings go so: LR=0.003 python train_gpt.py"
            )
        asked = Config.from_env(env)
        cfg = resolve(asked)
        check_batch(cfg, run.ranks)
        plan, warnings = make_plan(cfg, run.ranks), cautions(cfg)
        if cfg.dry_run:
            for warning in warnings:
                print(f"warning: {warning}", file=sys.stderr)
            for key, value in (vars(cfg) | cfg.resolved() | plan).items():
                print(f"{key}:{value}")
            return 0

        train_loader, val_loader = preflight(cfg, run.ranks)
        if train_loader.dropped > train_loader.samples / 50:
            warnings.append(
                f"SHARD_TAIL=drop leaves out {train_loader.dropped:,} samples, which fill no batch "
                f"of a shard, of {train_loader.dropped + train_loader.samples:,}; "
                "SHARD_TAIL=keep reads all"
            )
        plan |= {"data_fingerprint": "", "val_fingerprint": ""}
        if run.ranks.rank == 0:  # before the other ranks wait for it
            plan |= data_identity(cfg, train_loader, val_loader)
            targets = val_loader.read(0, val_loader.samples)[:, 1:]
            plan["val_bytes_per_token"] = bytes_per_token(cfg.input_val_bin, targets)
        columns = ["val_accuracy", *health_columns(cfg)]
        if cfg.ema_iters:
            columns.append("ema_val_loss")
        run.open(cfg, asked.changes_text(), plan, warnings, columns)
        state = train(cfg, run, train_loader, val_loader)
        export_averages(state, cfg, run)
        run.close(state.model.state_dict())
    return run.exit_code


if __name__ == "__main__":
    code = main(sys.argv[1:], os.environ)
    with contextlib.suppress(OSError):  # who reads may be gone
        sys.stdout.flush()
    os._exit(code)  # sys.exit would wait for a save that waits for a rank that hangs
