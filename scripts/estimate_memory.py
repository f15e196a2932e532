"""Estimates the memory that a run takes on each GPU, from the counts that the trainer makes."""

import functools
import math
from collections import Counter
from dataclasses import replace

import torch

from harness.ranks import Ranks
from ops.cross_entropy import LOGITS_PER_CHUNK
import train_gpt
from price_runs import Gpu, kind_of
from train_gpt import Config

CONTEXT = 2**30  # bytes, of CUDA and its libraries: 0.5 to 2 GB are usual
MARGIN = 0.9  # of the memory may be planned with


def shape(cfg: Config) -> Config:
    """cfg without what changes no count, so that runs of one model share them."""
    return replace(
        cfg,
        input_bin="",
        num_iterations=1,
        warmup_iters=0,
        warmdown_iters=0,
        max_epochs=0,
        device_batch_size=1,
    )


@functools.cache
def plan_shape(cfg: Config) -> dict:
    """The trainer's plan of a shape."""
    return train_gpt.make_plan(cfg, Ranks())


def count(cfg: Config) -> dict:
    """The trainer's plan: params_total, params_active, flops_per_token, tokens_per_step, …"""
    return plan_shape(shape(cfg))


@functools.cache
def layout(cfg: Config) -> dict[str, int]:
    """What the memory of a shape depends on: weights in the matrices inside the blocks, in those of
    the most common shape (Muon updates them at once), in those that a forward pass casts, and
    hidden units of an FFN."""
    with torch.device("meta"):
        model = train_gpt.GPT(cfg)

    stacks = Counter()
    for p in train_gpt.split_params(model)["matrices"]:
        stacks[p.shape[-2:]] += p.numel()

    cast = 0  # times top_k
    for i in model.order if cfg.recurrence == "indexed" else {*model.order}:
        for part in model.blocks[i].modules():
            if isinstance(part, train_gpt.Linear):
                is_experts = isinstance(part, train_gpt.ExpertLinear)
                copies = cfg.num_experts if is_experts else cfg.top_k
                cast += part.flops_per_token // 6 * copies

    ffns = [part for part in model.modules() if isinstance(part, train_gpt.MLP)]
    return {
        "matrices": stacks.total(),
        "stack": max(stacks.values()),
        "cast": cast // cfg.top_k,
        "width": max((ffn.proj.weight.size(-1) for ffn in ffns), default=0),
    }


@functools.cache
def recurrent_bytes(cfg: Config) -> list[float]:
    """Bytes a token that each recurrent mixer keeps for the backward pass: what
    saved_tensors_hooks counts for 512 tokens more than for 256, without computing anything."""
    found = []
    for layer in range(cfg.n_layer):
        with torch.device("meta"):
            mixer = train_gpt.MIXERS[train_gpt.tiled(cfg.mixer, layer)](cfg)
        if isinstance(mixer, train_gpt.Recurrent):
            short, long = (kept_by(mixer, length, cfg.n_embd) for length in (256, 512))
            found.append((long - short) / 256)
    return found


def kept_by(mixer: torch.nn.Module, length: int, channels: int) -> int:
    """Bytes that a mixer on the meta device keeps of a sequence, and of its weights."""
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    x = torch.empty(1, length, channels, dtype=torch.bfloat16, device="meta", requires_grad=True)
    positions = torch.arange(length, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mixer(x, train_gpt.Context(positions))
    return sum(storage.nbytes() for storage in storages.values())


def saved_bytes(cfg: Config) -> int:
    """Bytes that a forward pass keeps for the backward pass, all bfloat16: by what
    saved_tensors_hooks counts of the eager trainer on a CPU; compiled blocks should need less.

    A visit of a block keeps, a token, 12 C (inputs of linear layers and, in float32, of norms; q,
    k, v, the output of attention) and both sides of the FFN's activation: in the way of arXiv
    2205.05198, which has 17 C in all. And the cast weights, 3 C a token and the gradient of the
    head. A recurrent mixer keeps what it says in place of the attention's part.
    """
    C = cfg.n_embd
    sizes = layout(shape(cfg))
    is_moe = kind_of(cfg.ffn) == "moe"

    channels = 12  # of C, a visit and token
    attention = 8 if cfg.qk_norm else 4  # of them: q, k, v, their norms, the output
    channels += attention - 4
    if cfg.norm == "rms_gain":
        channels += 2
    if cfg.dropout > 0:
        channels += 2
    if is_moe:
        channels += 1 + 2 * cfg.top_k

    experts = cfg.top_k + cfg.shared_expert if is_moe else 1
    activation = cfg.expert if is_moe else cfg.ffn
    sides = 4 if "swiglu" in activation else 2
    visit = channels * C + sides * experts * sizes["width"]
    tokens = cfg.device_batch_size * cfg.sequence_length
    rotary = 0  # cosines and sines in float32, a visit
    if cfg.pos == "rotary":
        rotary = 8 * cfg.sequence_length * C // cfg.n_head
    weights = 2 * sizes["cast"] + 4 * cfg.vocab_size * C
    recurrent = recurrent_bytes(shape(cfg))
    saved = 2 * (cfg.n_layer * visit + 3 * C - len(recurrent) * attention * C) + sum(recurrent)
    return int(tokens * saved) + (cfg.n_layer - len(recurrent)) * rotary + weights


def kept_bytes(cfg: Config, gpus: int = 1) -> float:
    """Bytes of float32 weights, their gradients, and the ranks' share of the optimizers: 4 B a
    weight of Muon's, which has one momentum, 8 B of AdamW's; of moving averages; and of the states
    that are carried."""
    total = count(cfg)["params_total"]
    muon = layout(shape(cfg))["matrices"] if cfg.optimizer == "muon" else 0
    averages = 4 * total if cfg.ema_iters else 0
    return 8 * total + averages + (4 * muon + 8 * (total - muon) + carried_bytes(cfg)) / gpus


@functools.cache
def carried_bytes(cfg: Config) -> int:
    """Bytes of the states of all ranks that go from step to step, with CARRY_STATE=1."""
    if not cfg.carry_state:
        return 0
    with torch.device("meta"):
        cache = train_gpt.GPT(cfg, torch.bfloat16).new_cache(cfg.batch_size, math.inf)
    return sum(tensor.numel() * tensor.element_size() for tensor in cache.tensors())


def memory(cfg: Config, gpus: int = 1) -> float:
    """Bytes on each of `gpus` GPUs, an estimate: what is kept, and the larger of what a forward and
    backward pass and Muon's update need besides."""
    sizes = layout(shape(cfg))
    tokens = cfg.device_batch_size * cfg.sequence_length
    # 2 + 4 + 4 + 2 B: raw, float32, log, gradient; and 4 of what the softcap has left
    bytes_of_logit = 16 if cfg.logit_softcap else 12
    logits = bytes_of_logit * min(tokens * cfg.vocab_size, LOGITS_PER_CHUNK["cuda"])
    cast_head = 2 * cfg.vocab_size * cfg.n_embd
    passes = saved_bytes(cfg) + logits + cast_head

    update = 0
    if cfg.optimizer == "muon":  # gradients side by side; float32 and bfloat16 copies
        update = 4 * sizes["matrices"] + 12 * sizes["stack"] / gpus
    return kept_bytes(cfg, gpus) + max(passes, update) + CONTEXT


def fits(cfg: Config, gpu: Gpu, gpus: int) -> bool:
    """Whether cfg may be planned on so many of the GPU."""
    return memory(cfg, gpus) <= MARGIN * gpu.memory * 1e9
