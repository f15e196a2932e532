"""Plans a run for a budget: dollars in, the largest model and its tokens out, and its command.

    python scripts/scale_model.py --budget 5 --compare              # H100 beside B200
    python scripts/scale_model.py --budget 10 --gpu h100            # or h200, b200, a100
    python scripts/scale_model.py --budget 80 --gpus 8 --ratio 10.5 --mfu 0.5
    python scripts/scale_model.py --preset moe_1.5b --budget 5      # what a preset costs

The models are a ladder of gpt2_small's kind, 128 w channels in heads of 128 and 2 w - 1 to 2 w + 2
layers; each dense, and as a mixture of experts that costs a token as much. The trainer itself
counts their parameters and FLOPs. A model gets --ratio tokens for each active parameter, in whole
steps. The largest is taken whose cost fits the budget and whose memory, by estimate, fits the GPU;
the batch is that of gpt2_small. Of a preset, --budget says over how many steps it can be had. Time
is FLOPs / (GPUs x peak x MFU), of the steps alone: start, compilation, validation and checkpoints
come on top. Whether dense or experts learn more for the money, only training tells.
Exit codes: 0 planned, 2 a wrong argument, or a budget that buys nothing.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import bisect
import functools
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from harness.ranks import Ranks
from harness.settings import preset_files
from store.contract import ConfigError
import train_gpt
from estimate_memory import MARGIN, count, fits, memory
from price_runs import GPUS, Gpu, choose_mfu, kind_of, run_cost
from train_gpt import Config

PRESETS = preset_files()
# of prepare_data.py --tokenizer bytes: for presets that leave the vocabulary to their data
BYTES_VOCAB = 257
FINEWEB_TOKENS = 10.3e9  # of its 103 training shards
RUNGS = 128  # up to 66 layers of 4096 channels, 13e9 parameters


class Plan(NamedTuple):
    """A model on a GPU, and what training it takes."""

    gpu: Gpu
    kind: str  # dense, moe
    cfg: Config
    mfu: float
    mfu_source: str
    seconds: float
    dollars: float
    limit: str  # what kept the model from being larger, or its training longer


class TooSmall(ConfigError):
    """A budget, or a memory, that nothing fits."""


def flops(cfg: Config) -> int:
    """Training FLOPs of the run."""
    return count(cfg)["flops_per_token"] * count(cfg)["tokens_per_step"] * cfg.num_iterations


def with_device_batch(cfg: Config, gpu: Gpu, gpus: int) -> Config:
    """cfg with the largest DEVICE_BATCH_SIZE that fits, a power of two that divides the batch; 1
    where none does."""
    powers = [2**i for i in range(cfg.batch_size.bit_length())]
    able = [
        size
        for size in powers
        if cfg.batch_size % (size * gpus) == 0
        and fits(replace(cfg, device_batch_size=size), gpu, gpus)
    ]
    return replace(cfg, device_batch_size=max(able, default=1))


def epochs(cfg: Config) -> float | None:
    """Passes over FineWeb-10B that the run takes, None where it trains on other data."""
    tokens = cfg.num_iterations * cfg.batch_size * cfg.sequence_length
    return tokens / FINEWEB_TOKENS if "fineweb" in cfg.input_bin else None


def scheduled_steps(cfg: Config) -> list[str]:
    """The settings that count steps of a schedule."""
    names = ["warmup_iters", "warmdown_iters"]
    if cfg.momentum_start is not None:
        names += ["momentum_warmup_iters", "momentum_cooldown_iters"]
    return names


def with_steps(cfg: Config, steps: int) -> Config:
    """cfg over so many steps, of which warm-up and decay are the same fractions, and as many epochs
    as they take."""
    scaled = {
        name: getattr(cfg, name) * steps // cfg.num_iterations for name in scheduled_steps(cfg)
    }
    cfg = replace(cfg, num_iterations=steps, **scaled)
    if not cfg.max_epochs:  # no limit
        return cfg
    return replace(cfg, max_epochs=max(cfg.max_epochs, math.ceil(epochs(cfg) or 0)))


def rung(index: int, kind: str, args: argparse.Namespace) -> Config:
    """A model of the ladder over --ratio tokens for each active parameter; a higher rung is larger
    and costs more."""
    heads, extra_layers = index // 4 + 1, index % 4
    experts = {}
    if kind == "moe":
        experts = {"ffn": "moe", "num_experts": args.experts, "top_k": args.top_k}
    cfg = Config(
        n_layer=2 * heads - 1 + extra_layers,
        n_head=heads,
        n_embd=128 * heads,
        device_batch_size=1,
        vocab_size=args.vocab_size or Config.vocab_size,
        **experts,
    )
    tokens = args.ratio * count(cfg)["params_active"]
    return with_steps(cfg, max(1, int(tokens / count(cfg)["tokens_per_step"])))


def plan_budget(args: argparse.Namespace, gpu: Gpu, kind: str) -> Plan:
    """The Plan of the largest model for --budget on this GPU. Raises TooSmall."""
    mfu, source = choose_mfu(args.results, gpu, kind, args.mfu)

    @functools.cache
    def model(index: int) -> Config:
        return rung(index, kind, args)

    def cost(index: int) -> tuple[float, float]:
        return run_cost(flops(model(index)), gpu, mfu, args.gpus)

    def limit(index: int) -> str:
        """What the rung is too large for; "" for nothing."""
        if cost(index)[1] > args.budget:
            return "budget"
        return "" if fits(model(index), gpu, args.gpus) else "memory"

    def is_too_large(index: int) -> bool:
        return limit(index) != ""

    index = bisect.bisect_left(range(RUNGS), True, key=is_too_large) - 1
    if index < 0:
        value = {"budget": args.budget, "memory": gpu.memory}[limit(0)]
        needed = memory(model(0), args.gpus) / MARGIN / 1e9
        raise TooSmall(
            f"--{limit(0)} {value:g}: the smallest {kind} model costs ${cost(0)[1]:.4f} on "
            f"{gpu.name} and needs {needed:.2f} GB; raise --{limit(0)}"
        )
    cfg = with_device_batch(model(index), gpu, args.gpus)
    above = limit(index + 1) if index + 1 < RUNGS else "end of ladder"
    return Plan(gpu, kind, cfg, mfu, source, *cost(index), above)


def plan_preset(args: argparse.Namespace, gpu: Gpu, budget: float | None = None) -> Plan:
    """The Plan of --preset on this GPU over its own steps, or over those that a budget buys. Raises
    TooSmall."""
    cfg = Config.from_env({"PRESET": args.preset})
    cfg = replace(cfg, vocab_size=args.vocab_size or cfg.vocab_size or BYTES_VOCAB)
    own_steps = cfg.num_iterations
    kind = kind_of(cfg.ffn)
    mfu, source = choose_mfu(args.results, gpu, kind, args.mfu)
    limit = "its own steps"
    if budget:
        _, step_cost = run_cost(flops(replace(cfg, num_iterations=1)), gpu, mfu, args.gpus)
        if budget < step_cost:
            raise TooSmall(
                f"--budget {budget:g}: a step of {args.preset} costs ${step_cost:.4g} on "
                f"{gpu.name}, so raise it"
            )
        cfg = with_steps(cfg, int(budget / step_cost))
        limit = f"budget, {cfg.num_iterations / own_steps:.3g} x its steps"
    if cfg.batch_size % (cfg.device_batch_size * args.gpus) or not fits(cfg, gpu, args.gpus):
        cfg = with_device_batch(cfg, gpu, args.gpus)
    return Plan(gpu, kind, cfg, mfu, source, *run_cost(flops(cfg), gpu, mfu, args.gpus), limit)


def cells(plan: Plan, gpus: int) -> dict[str, str]:
    """What the table says of a Plan: {row: text}."""
    cfg = plan.cfg
    gpu = plan.gpu
    sizes = count(plan.cfg)
    need, has = memory(cfg, gpus) / 2**30, gpu.memory * 1e9 / 2**30
    verdict = "" if fits(cfg, gpu, gpus) else ", too much"
    passes = epochs(cfg)
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
        "memory, estimate": f"{need:.1f} of {has:.1f} GiB{verdict}",
        "DEVICE_BATCH_SIZE": f"{cfg.device_batch_size}",
    }


def command(cfg: Config, gpus: int) -> str:
    """The line that trains cfg: what differs from its preset, and torchrun."""
    base = Config.from_env({"PRESET": cfg.preset})
    settings = {} if cfg.preset == Config.preset else {"PRESET": cfg.preset}
    settings |= {
        name.upper(): value for name, value in vars(cfg).items() if value != getattr(base, name)
    }
    words = [f"{name}={shlex.quote(str(value))}" for name, value in settings.items()]
    return " ".join([*words, f"torchrun --standalone --nproc_per_node={gpus} train_gpt.py"])


def report(plans: list[Plan], args: argparse.Namespace) -> Iterator[str]:
    """The lines to print: a column a Plan, what to know of it, and its command, that of the largest
    model last."""
    columns = [cells(plan, args.gpus) for plan in plans]
    for row in columns[0]:
        yield f"{row:21}" + "".join(f"{column[row]:>27}" for column in columns)
    if not args.preset:
        yield (
            f"tokens: {args.ratio:g} x params_active, in whole steps: every weight that a token "
            "uses, the tied embedding counted once.\nChinchilla: about 20, by all parameters; "
            "nanochat: 10.5, by matrices and head, which are the same count here."
        )
    for column, plan in zip(columns, plans):
        passes = epochs(plan.cfg) or 0
        if passes > 1:
            yield (
                f"{column['']}: more than FineWeb-10B's {FINEWEB_TOKENS:g} tokens, {passes:.1f} "
                "epochs; up to 4 are about as good as new data (arXiv 2305.16264)"
            )

    for names in {plan.cfg.mixer for plan in plans}:
        mixers = [train_gpt.MIXERS[name] for name in names.split(",")]
        if any(getattr(mixer, "sequential", False) for mixer in mixers):
            yield (
                f"MIXER={names} goes through a sequence token by token, which takes longer than "
                "its FLOPs say; time a step with scripts/bench.py"
            )

    def size_then_price(plan: Plan) -> tuple[int, float]:
        return count(plan.cfg)["params_active"], -plan.dollars

    for plan in sorted(plans, key=size_then_price):
        yield f"\n# {plan.gpu.name} {plan.kind}, ${plan.dollars:.4f}"
        yield command(plan.cfg, args.gpus)


def positive(text: str) -> float:
    """A number above 0 from an argument."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; a wrong one ends the program with exit code 2."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=positive, help="dollars")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        metavar="NAME",
        help="plan a preset of experiments/presets, not the ladder",
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


def asked_gpus(args: argparse.Namespace) -> list[Gpu]:
    """The GPUs to plan for, with what the arguments say of them."""
    given = {
        "peak": args.peak_tflops,
        "price": args.price,
        "price_source": "given" if args.price else None,
        "memory": args.memory,
    }
    given = {name: value for name, value in given.items() if value}
    names = ("h100", "b200") if args.compare else (args.gpu,)
    return [GPUS[name]._replace(**given) for name in names]


def planners(args: argparse.Namespace, gpu: Gpu) -> list[Callable[[], Plan]]:
    """What makes the plans that are asked for on a GPU."""
    if args.preset:
        budgets = dict.fromkeys((None, args.budget))
        return [functools.partial(plan_preset, args, gpu, budget) for budget in budgets]
    return [functools.partial(plan_budget, args, gpu, kind) for kind in ("dense", "moe")]


def make_plans(args: argparse.Namespace) -> tuple[list[Plan], list[str]]:
    """(Plans, sentences on what has none). Raises ConfigError."""
    plans, problems = [], []
    for gpu in asked_gpus(args):
        for planner in planners(args, gpu):
            try:
                plans.append(planner())
            except TooSmall as error:
                problems.append(str(error))
    for plan in plans:
        train_gpt.check_batch(plan.cfg, Ranks(0, 0, args.gpus, args.gpus))
    return plans, problems


def main(argv: list[str] | None = None) -> int:
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
