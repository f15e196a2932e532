"""Plans a run for a budget: dollars in, the largest model and its tokens out, and the command that trains it.

    python scripts/scale_model.py --budget 5 --compare              # H100 beside B200
    python scripts/scale_model.py --budget 10 --gpu h100            # or h200, b200, a100
    python scripts/scale_model.py --budget 80 --gpus 8 --ratio 10.5 --mfu 0.5
    python scripts/scale_model.py --preset moe_1.5b --budget 5      # what a preset costs, and what a budget buys

The models are a ladder of gpt2_small's kind, 128 w channels in heads of 128 and 2 w - 1 to 2 w + 2 layers; each dense,
and as a mixture of experts that costs a token as much. The trainer itself counts their parameters and FLOPs. A model
gets --ratio tokens for each active parameter, in whole steps. The largest is taken whose cost fits the budget and whose
memory, by estimate, fits the GPU; the batch is that of gpt2_small. Time is FLOPs / (GPUs x peak x MFU), of the steps
alone: start, compilation, validation and checkpoints come on top. Whether dense or experts learn more for the money,
only training tells.
Exit codes: 0 planned, 2 a wrong argument, or a budget that buys nothing.
"""

import argparse
import bisect
import csv
import functools
import math
import shlex
import statistics
import sys
from collections import Counter, namedtuple
from dataclasses import replace

import torch

from harness.contract import ConfigError
from harness.meter import PEAK_TFLOPS
from harness.ranks import Ranks
from harness.settings import ROOT
import train_gpt
from train_gpt import Config

READ = "read Aug-Nov 2026"
# On demand, dollars an hour for a GPU. H100: Lambda 3.99, RunPod 2.69 to 3.99, Hyperstack 3.20, median of 16 providers
# on 2026-10-24 3.64 (compute-screener). B200: Hyperstack 6.00 on 2026-08-26, RunPod 5.98, Lambda 6.69. For the others
# none was read: as much a FLOP as the H100. MFU of dense models: nanochat has .46 to .50 on H100, and .35 with experts;
# none is known for B200, on which small models reach less. Memory: GB of the data sheet.
Gpu = namedtuple("Gpu", "name peak price price_source memory mfu")
GPUS = {
    name.lower(): Gpu(name, PEAK_TFLOPS[name], *rest)
    for name, *rest in (
        ("H100", 3.50, READ, 80, 0.45),
        ("H200", 3.50, "assumed, set --price", 141, 0.45),
        ("B200", 6.00, READ, 180, 0.35),
        ("A100", 1.10, "assumed, set --price", 80, 0.45),
    )
}
MOE_MFU = 0.30
# Experiment 5 names only the size of its 1.5B model: this is its recipe at that size, experts of 4 n_embd as there,
# heads of 64, and bfloat16, in which experts are fast.
PRESETS = {
    "moe_1.5b": {
        "PRESET": "moe_muon_exp5",
        "N_LAYER": "20",
        "N_EMBD": "1024",
        "N_HEAD": "16",
        "D_FF": "4096",
        "DTYPE": "bfloat16",
    }
}
FILES = sorted(path.stem for path in (ROOT / "experiments" / "presets").glob("*.env"))
BYTES_VOCAB = 257  # of scripts/prepare_data.py --tokenizer bytes: for presets that leave the vocabulary to their data
FINEWEB_TOKENS = 10.3e9  # of its 103 training shards
RUNGS = 128  # up to 66 layers of 4096 channels, 13e9 parameters
CONTEXT = 2**30  # bytes, of CUDA and its libraries: 0.5 to 2 GB are usual
MARGIN = 0.9  # of the memory may be planned with

Plan = namedtuple("Plan", "gpu kind cfg mfu mfu_source seconds dollars limit")


class TooSmall(ConfigError):
    """A budget, or a memory, that nothing fits."""


def run_cost(flops_total, gpu, mfu=None, gpus=1):
    """(seconds, dollars) of so many FLOPs on `gpus` of a GPU, a name in GPUS or a Gpu. mfu is a fraction; None: that
    assumed for dense models. Raises ConfigError."""
    if isinstance(gpu, str) and gpu not in GPUS:
        raise ConfigError(f"GPU {gpu}: choose one of {', '.join(GPUS)}")
    gpu = GPUS.get(gpu, gpu)
    seconds = flops_total / (gpus * gpu.peak * 1e12 * (mfu or gpu.mfu))
    return seconds, seconds / 3600 * gpu.price * gpus


def gpu_of(device_name):
    """The name in GPUS of what CUDA calls a device; "" where it is none of them."""
    known = next((name for name in PEAK_TFLOPS if name in device_name), "")
    return known.lower() if known.lower() in GPUS else ""


def kind_of(ffn):
    return "moe" if "moe" in ffn.split(",") else "dense"


def measured_mfu(path, gpu, kind):
    """MFU of the finished runs with this kind of FFN on this GPU, from a table of results; [] where there is none."""
    try:
        with open(path, newline="") as file:
            rows = [
                row
                for row in csv.DictReader(file)
                if row["status"] == "ok" and float(row.get("mfu") or 0)
            ]
    except FileNotFoundError:
        return []
    return [
        float(row["mfu"])
        for row in rows
        if kind_of(row["ffn"]) == kind and gpu.name.lower() == gpu_of(row["device_name"])
    ]


def choose_mfu(results, gpu, kind, given=None):
    """(MFU, where it is from): given before measured before assumed."""
    if given:
        return given, "given"
    if found := measured_mfu(results, gpu, kind):
        return statistics.median(found), f"measured, {len(found)} run{'s' * (len(found) > 1)}"
    return MOE_MFU if kind == "moe" else gpu.mfu, "assumed"


def shape(cfg):
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
def plan_shape(cfg):
    return train_gpt.make_plan(cfg, Ranks())


def count(cfg):
    """The trainer's plan: params_total, params_active, flops_per_token, tokens_per_step and more."""
    return plan_shape(shape(cfg))


@functools.cache
def layout(cfg):
    """What the memory of a shape depends on: weights in the matrices inside the blocks, in those of the most common
    shape (Muon updates them at once), in those that a forward pass casts, and hidden units of an FFN."""
    with torch.device("meta"):
        model = train_gpt.GPT(cfg)
    stacks = Counter()
    for p in train_gpt.split_params(model)["matrices"]:
        stacks[p.shape[-2:]] += p.numel()
    cast = sum(
        part.flops_per_token
        // 6
        * (cfg.num_experts if isinstance(part, train_gpt.ExpertLinear) else cfg.top_k)
        for i in model.order
        for part in model.blocks[i].modules()
        if isinstance(part, train_gpt.Linear)
    )
    width = max(
        part.proj.weight.size(-1) for part in model.modules() if isinstance(part, train_gpt.MLP)
    )
    return {
        "matrices": stacks.total(),
        "stack": max(stacks.values()),
        "cast": cast // cfg.top_k,
        "width": width,
    }


def flops(cfg):
    """Training FLOPs of the run."""
    return count(cfg)["flops_per_token"] * count(cfg)["tokens_per_step"] * cfg.num_iterations


def saved_bytes(cfg):
    """Bytes that a forward pass keeps for the backward pass, all bfloat16: by what saved_tensors_hooks counts of the
    eager trainer on a CPU; compiled blocks should need less. A visit of a block keeps, a token, 12 C (inputs of linear
    layers and, in float32, of norms; q, k, v, the output of attention) and both sides of the FFN's activation: in the
    way of arXiv 2205.05198, which has 17 C in all. And the cast weights, 3 C a token and the gradient of the head."""
    C, sizes, moe, dropout = (
        cfg.n_embd,
        layout(shape(cfg)),
        kind_of(cfg.ffn) == "moe",
        cfg.dropout > 0,
    )
    hidden = (cfg.top_k + cfg.shared_expert if moe else 1) * sizes["width"]
    visit = (
        12
        + 4 * cfg.qk_norm
        + 2 * (cfg.norm == "rms_gain")
        + 2 * dropout
        + moe * (1 + 2 * cfg.top_k)
    ) * C
    visit += hidden * (4 if "swiglu" in (cfg.expert if moe else cfg.ffn) else 2)
    tokens = cfg.device_batch_size * cfg.sequence_length
    return 2 * tokens * (cfg.n_layer * visit + 3 * C) + 2 * sizes["cast"] + 4 * cfg.vocab_size * C


def kept_bytes(cfg, gpus=1):
    """Bytes of float32 weights, their gradients, and the ranks' share of the optimizers: 4 B a weight of Muon's, which
    has one momentum, 8 B of AdamW's."""
    total, muon = (
        count(cfg)["params_total"],
        layout(shape(cfg))["matrices"] * (cfg.optimizer == "muon"),
    )
    return 8 * total + (4 * muon + 8 * (total - muon)) / gpus


def memory(cfg, gpus=1):
    """Bytes on each of `gpus` GPUs, an estimate: what is kept, and the larger of what a forward and backward pass and
    Muon's update need besides."""
    sizes, tokens = layout(shape(cfg)), cfg.device_batch_size * cfg.sequence_length
    logits = 12 * min(
        tokens * cfg.vocab_size, train_gpt.LOSS_CHUNK["cuda"]
    )  # 2 + 4 + 4 + 2 B: raw, float32, log, grad
    gradients = (
        saved_bytes(cfg) + logits + 2 * cfg.vocab_size * cfg.n_embd
    )  # the head is cast as well
    update = (
        4 * sizes["matrices"] + 12 * sizes["stack"] / gpus
    )  # gradients side by side; float32 and bfloat16 copies
    return kept_bytes(cfg, gpus) + max(gradients, update * (cfg.optimizer == "muon")) + CONTEXT


def fits(cfg, gpu, gpus):
    return memory(cfg, gpus) <= MARGIN * gpu.memory * 1e9


def with_device_batch(cfg, gpu, gpus):
    """cfg with the largest DEVICE_BATCH_SIZE that fits, a power of two that divides the batch; 1 where none does."""
    powers = [
        2**i for i in range(cfg.batch_size.bit_length()) if cfg.batch_size % (2**i * gpus) == 0
    ]
    able = [size for size in powers if fits(replace(cfg, device_batch_size=size), gpu, gpus)]
    return replace(cfg, device_batch_size=max(able, default=1))


def epochs(cfg):
    """Passes over FineWeb-10B that the run takes, None where it trains on other data."""
    tokens = cfg.num_iterations * cfg.batch_size * cfg.sequence_length
    return tokens / FINEWEB_TOKENS if "fineweb" in cfg.input_bin else None


def with_steps(cfg, steps):
    """cfg over so many steps, of which warm-up and decay are the same fractions, and as many epochs as they take."""
    scaled = {
        name: getattr(cfg, name) * steps // cfg.num_iterations
        for name in ("warmup_iters", "warmdown_iters")
    }
    cfg = replace(cfg, num_iterations=steps, **scaled)
    return replace(
        cfg, max_epochs=cfg.max_epochs and max(cfg.max_epochs, math.ceil(epochs(cfg) or 0))
    )


def rung(index, kind, args):
    """A model of the ladder over --ratio tokens for each active parameter; a higher rung is larger and costs more."""
    heads, extra = index // 4 + 1, index % 4
    experts = (
        {"ffn": "moe", "num_experts": args.experts, "top_k": args.top_k} if kind == "moe" else {}
    )
    cfg = Config(
        n_layer=2 * heads - 1 + extra,
        n_head=heads,
        n_embd=128 * heads,
        device_batch_size=1,
        vocab_size=args.vocab_size or Config.vocab_size,
        **experts,
    )
    tokens = args.ratio * count(cfg)["params_active"]
    return with_steps(cfg, max(1, int(tokens / count(cfg)["tokens_per_step"])))


def plan_budget(args, gpu, kind):
    """The Plan of the largest model for --budget on this GPU. Raises TooSmall."""
    mfu, source = choose_mfu(args.results, gpu, kind, args.mfu)

    @functools.cache
    def model(index):
        return rung(index, kind, args)

    def cost(index):
        return run_cost(flops(model(index)), gpu, mfu, args.gpus)

    def limit(index):
        return (
            "budget"
            if cost(index)[1] > args.budget
            else ""
            if fits(model(index), gpu, args.gpus)
            else "memory"
        )

    index = bisect.bisect_left(range(RUNGS), True, key=lambda index: limit(index) != "") - 1
    if index < 0:
        value = {"budget": args.budget, "memory": gpu.memory}[limit(0)]
        raise TooSmall(
            f"--{limit(0)} {value:g}: the smallest {kind} model costs ${cost(0)[1]:.4f} on {gpu.name} and "
            f"needs {memory(model(0), args.gpus) / MARGIN / 1e9:.2f} GB; raise --{limit(0)}"
        )
    cfg = with_device_batch(model(index), gpu, args.gpus)
    return Plan(
        gpu,
        kind,
        cfg,
        mfu,
        source,
        *cost(index),
        limit(index + 1) if index + 1 < RUNGS else "end of ladder",
    )


def plan_preset(args, gpu, budget=None):
    """The Plan of --preset on this GPU over its own steps, or over those that a budget buys. Raises TooSmall."""
    cfg = Config.from_env(PRESETS.get(args.preset, {"PRESET": args.preset}))
    cfg = replace(cfg, vocab_size=args.vocab_size or cfg.vocab_size or BYTES_VOCAB)
    own, kind = cfg.num_iterations, kind_of(cfg.ffn)
    mfu, source = choose_mfu(args.results, gpu, kind, args.mfu)
    if budget:
        step = run_cost(flops(replace(cfg, num_iterations=1)), gpu, mfu, args.gpus)[1]
        if budget < step:
            raise TooSmall(
                f"--budget {budget:g}: a step of {args.preset} costs ${step:.4g} on {gpu.name}, so raise it"
            )
        cfg = with_steps(cfg, int(budget / step))
    if cfg.batch_size % (cfg.device_batch_size * args.gpus) or not fits(cfg, gpu, args.gpus):
        cfg = with_device_batch(cfg, gpu, args.gpus)
    limit = f"budget, {cfg.num_iterations / own:.3g} x its steps" if budget else "its own steps"
    return Plan(gpu, kind, cfg, mfu, source, *run_cost(flops(cfg), gpu, mfu, args.gpus), limit)


def cells(plan, gpus):
    """What the table says of a Plan: {row: text}."""
    cfg, gpu, sizes = plan.cfg, plan.gpu, count(plan.cfg)
    need, has, passes = memory(cfg, gpus) / 2**30, gpu.memory * 1e9 / 2**30, epochs(cfg)
    return {
        "": f"{gpu.name} {plan.kind}",
        "GPUs": f"{gpus} x ${gpu.price:.2f}/h",
        "price": gpu.price_source,
        "peak, bfloat16": f"{gpu.peak:g} TFLOP/s",
        "MFU": f"{plan.mfu:.1%} {plan.mfu_source}",
        "layers x channels": f"{cfg.n_layer} x {cfg.n_embd}",
        "params_total": f"{sizes['params_total']:,}",
        "params_active": f"{sizes['params_active']:,}",
        "flops_per_token": f"{sizes['flops_per_token']:,}",
        "NUM_ITERATIONS": f"{cfg.num_iterations:,}",
        "limited by": plan.limit,
        "tokens": f"{cfg.num_iterations * sizes['tokens_per_step']:,}",
        "epochs of FineWeb-10B": "-" if passes is None else f"{passes:.3f}",
        "FLOPs": f"{flops(cfg):.4g}",
        "hours": f"{plan.seconds / 3600:.4g}",
        "cost": f"${plan.dollars:.4f}" if plan.dollars > 0.001 else f"${plan.dollars:.2g}",
        "memory, estimate": f"{need:.1f} of {has:.1f} GiB{'' if fits(cfg, gpu, gpus) else ', too much'}",
        "DEVICE_BATCH_SIZE": f"{cfg.device_batch_size}",
    }


def command(cfg, gpus):
    """The line that trains cfg: what differs from its preset, and torchrun."""
    base = Config.from_env({"PRESET": cfg.preset})
    settings = {} if cfg.preset == Config.preset else {"PRESET": cfg.preset}
    settings |= {
        name.upper(): value for name, value in vars(cfg).items() if value != getattr(base, name)
    }
    words = [f"{name}={shlex.quote(str(value))}" for name, value in settings.items()]
    return " ".join([*words, f"torchrun --standalone --nproc_per_node={gpus} train_gpt.py"])


def report(plans, args):
    """The lines to print: a column a Plan, what to know of it, and its command, that of the largest model last."""
    columns = [cells(plan, args.gpus) for plan in plans]
    yield from (
        f"{row:21}" + "".join(f"{column[row]:>27}" for column in columns) for row in columns[0]
    )
    if not args.preset:
        yield (
            f"tokens: {args.ratio:g} x params_active, in whole steps: every weight that a token uses, the tied "
            "embedding counted once.\nChinchilla: about 20, by all parameters; nanochat: 10.5, by matrices and "
            "head, which are the same count here."
        )
    for column, plan in zip(columns, plans):
        if (epochs(plan.cfg) or 0) > 1:
            yield (
                f"{column['']}: more than FineWeb-10B's {FINEWEB_TOKENS:g} tokens, {epochs(plan.cfg):.1f} epochs; "
                "up to 4 are about as good as new data (arXiv 2305.16264)"
            )
    for plan in sorted(plans, key=lambda plan: (count(plan.cfg)["params_active"], -plan.dollars)):
        yield f"\n# {plan.gpu.name} {plan.kind}, ${plan.dollars:.4f}\n{command(plan.cfg, args.gpus)}"


def positive(text):
    """A number above 0 from an argument."""
    try:
        if 0 < (value := float(text)) < math.inf:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")


def parse(argv):
    """The arguments; a wrong one ends the program with exit code 2."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=positive, help="dollars")
    parser.add_argument(
        "--preset",
        choices=[*PRESETS, *FILES],
        metavar="NAME",
        help=f"plan {', '.join(PRESETS)} or a preset of experiments/presets, not the ladder",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--gpu", choices=GPUS, default="h100", help="(default %(default)s)")
    which.add_argument("--compare", action="store_true", help="h100 beside b200")
    parser.add_argument(
        "--gpus",
        type=int,
        choices=range(1, 9),
        default=1,
        help="of one machine (default %(default)s)",
    )
    parser.add_argument(
        "--ratio", type=positive, default=20.0, help="tokens a parameter (default %(default)g)"
    )
    parser.add_argument("--experts", type=int, default=8, help="of a mixture (default %(default)s)")
    parser.add_argument(
        "--top-k", type=int, default=2, help="experts of a token (default %(default)s)"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        help=f"(default: of the settings; where they say 0, {BYTES_VOCAB})",
    )
    parser.add_argument("--price", type=positive, help="dollars an hour for a GPU")
    parser.add_argument("--peak-tflops", type=positive, help="of a GPU, dense bfloat16")
    parser.add_argument("--memory", type=positive, help="GB of a GPU")
    parser.add_argument(
        "--mfu", type=positive, help="fraction of the peak (default: measured, else assumed)"
    )
    parser.add_argument(
        "--results", default=Config.results_csv, help="where MFU is measured (default %(default)s)"
    )
    args = parser.parse_args(argv)
    if not (args.budget or args.preset):
        parser.error("give a --budget in dollars or a --preset")
    if args.compare and (args.price or args.peak_tflops or args.memory):
        parser.error(
            "--price, --peak-tflops and --memory are of one GPU; name it with --gpu, not --compare"
        )
    if args.mfu and args.mfu > 1:
        parser.error(f"argument --mfu: {args.mfu:g} must be a fraction, as 0.45")
    return args


def make_plans(args):
    """(Plans, sentences on what has none). Raises ConfigError."""
    plans, problems = [], []
    for name in ("h100", "b200") if args.compare else (args.gpu,):
        gpu = GPUS[name]._replace(
            **{
                key: value
                for key, value in (
                    ("peak", args.peak_tflops),
                    ("price", args.price),
                    ("memory", args.memory),
                    ("price_source", "given" if args.price else None),
                )
                if value
            }
        )
        calls = (
            [
                functools.partial(plan_preset, args, gpu, budget)
                for budget in dict.fromkeys((None, args.budget))
            ]
            if args.preset
            else [functools.partial(plan_budget, args, gpu, kind) for kind in ("dense", "moe")]
        )
        for call in calls:
            try:
                plans.append(call())
            except TooSmall as error:
                problems.append(str(error))
    for plan in plans:
        train_gpt.check_batch(plan.cfg, Ranks(0, 0, args.gpus, args.gpus))
    return plans, problems


def main(argv=None) -> int:
    """Plan and print the report; returns the exit code."""
    args = parse(argv)
    try:
        plans, problems = make_plans(args)
        if not plans:
            raise ConfigError(problems[0])
    except ConfigError as error:
        print(f"scale_model.py: error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*report(plans, args), *(f"\nleft out: {problem}" for problem in problems)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
