"""Times recurrences and mixers with states on this machine, each beside what it replaces, in turns.

    OMP_NUM_THREADS=1 python scripts/bench_mixers.py                       # all of it, some minutes
    python scripts/bench_mixers.py --only recurrences,generation,text
    python scripts/bench_mixers.py --only generation --tokens 100000       # as far as that
    python scripts/bench_mixers.py --only generation --stage mixers_cpu --csv generation.csv

recurrences: chunks against a loop over time, gru against torch.nn.GRU, forward and backward.
generation: what a token costs, and memory, after more and more tokens of one sequence.
text: characters a second of PRESET=rnn_char against the same model written as a loop over time,
with torch.optim.AdamW, after both gave the same loss from the same weights.
A ratio above 1 means that ours is faster. Figures are medians, with smallest and largest.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from harness.ranks import Ranks
from store.contract import ConfigError
from ops.generation import next_logits
from ops.recurrences import chunked_wkv, gated_delta_rule, gru
import train_gpt
from stages import load_stage
from train_gpt import GPT, MIXERS, Config, State, aux_loss

SECTIONS = ("recurrences", "generation", "text")
SHAPES = ((8, 128, 128), (8, 128, 64), (32, 128, 128), (16, 256, 256))  # batch, length, hidden
MARKS = (100, 1_000, 10_000, 100_000)  # tokens, after which the next ones are timed


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one round that is not counted."""
    seconds = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def show(title: str, seconds: Mapping[str, list[float]], ours: str, theirs: str) -> None:
    """A line: medians in ms, and how many times as fast ours is, by rounds."""
    ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs])]
    parts = [f"{name} {1000 * statistics.median(s):.2f} ms" for name, s in seconds.items()]
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{title:44} {', '.join(parts)}; {ours} {ratio} times as fast", flush=True)


def wkv_loop(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor):
    """chunked_wkv, token by token."""
    outputs = []
    for t in range(r.size(1)):
        new = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        seen = state + bonus.unsqueeze(-1) * new
        outputs.append((r[:, t].unsqueeze(-1) * seen).sum(-2))
        state = log_decay[:, t].exp().unsqueeze(-1) * state + new
    return torch.stack(outputs, dim=1), state


def delta_loop(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor):
    """gated_delta_rule, token by token."""
    outputs = []
    for t in range(q.size(1)):
        key, rate = k[:, t].unsqueeze(-1), beta[:, t, :, None, None]
        state = log_decay[:, t].exp()[..., None, None] * state
        state = state + rate * key * (v[:, t].unsqueeze(-2) - (key * state).sum(-2, keepdim=True))
        outputs.append((q[:, t].unsqueeze(-1) * state).sum(-2))
    return torch.stack(outputs, dim=1), state


def bench_recurrences(rounds: int) -> None:
    """Prints forward and backward passes of each recurrence beside its oracle."""

    def trained(function: Callable, *args: Tensor) -> Callable[[], None]:
        args = [arg.requires_grad_() for arg in args]
        return lambda: function(*args)[0].sum().backward()

    for B, H, T, D in ((4, 4, 256, 32), (8, 4, 128, 32), (2, 8, 1024, 64)):
        q, k, v = (torch.randn(B, T, H, D) for _ in range(3))
        state, bonus = torch.zeros(B, H, D, D), torch.randn(H, D)
        decay = -0.6 * torch.rand(B, T, H, D)
        size = f"B {B}, H {H}, T {T}, K {D}"
        for name, chunks, loop, args in (
            ("wkv", chunked_wkv, wkv_loop, (q, k, v, decay, bonus, state)),
            (
                "gated delta rule",
                gated_delta_rule,
                delta_loop,
                (q, F.normalize(k, dim=-1), v, decay[..., 0], torch.rand(B, T, H), state),
            ),
        ):
            assert torch.allclose(chunks(*args)[0], loop(*args)[0], atol=1e-3), name
            calls = {"chunks": trained(chunks, *args), "loop": trained(loop, *args)}
            show(f"{name}, {size}", in_turns(calls, rounds), "chunks", "loop")

    for B, T, C in SHAPES:
        theirs, x = nn.GRU(C, C, batch_first=True, bias=False), torch.randn(B, T, C)
        reads, recurs = (w.detach().clone().requires_grad_() for w in theirs.parameters())
        state = torch.zeros(B, C)

        def ours(eps: float = 0.0, x=x, reads=reads, recurs=recurs, state=state) -> None:
            gru(F.linear(x, reads), recurs, state, eps).sum().backward()

        calls = {
            "ours": ours,
            "ours, normed": lambda ours=ours: ours(1e-3),
            "torch": lambda theirs=theirs, x=x: theirs(x)[0].sum().backward(),
        }
        show(f"gru, batch {B}, T {T}, hidden {C}", in_turns(calls, rounds), "ours", "torch")


def resident() -> float:
    """MiB of memory that this process holds; 0 where /proc does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def configs(stage: str) -> dict[str, Config]:
    """{label: what is timed in generation}: the variants of a stage, or every mixer where it is
    blank; windows have 1,024 tokens. Raises ValueError."""
    if stage:
        variants = load_stage(stage).variants
        settings = {name: dict(of, VOCAB_SIZE="257") for name, of in variants.items()}
        found = {name: Config.from_env(of) for name, of in settings.items()}
    else:
        sizes = dict(vocab_size=257, n_layer=4, n_head=4, n_embd=128)
        found = {name: Config(mixer=name, **sizes) for name in MIXERS}
    return {name: replace(cfg, sequence_length=1024) for name, cfg in found.items()}


@torch.no_grad()
def bench_generation(cfgs: Mapping[str, Config], tokens: int) -> list[dict[str, str]]:
    """Prints what a token costs after MARKS of one sequence, and the memory that is held; returns
    the rows, blank where the window is shorter."""
    rows = []
    for name, cfg in cfgs.items():
        model = GPT(cfg).eval().requires_grad_(False)
        limit = int(min(model.context, tokens))
        cache, length = model.new_cache(1, model.context), 0
        size = sum(t.numel() * t.element_size() for t in cache.tensors()) / 1024
        row = {"variant": name, "state_kib": f"{size:.1f}"}
        row |= {f"ms_after_{mark}": "" for mark in MARKS}
        cells = []
        for mark in [mark for mark in MARKS if mark <= limit]:
            while length < mark:
                count = min(mark - length, 1000)
                next_logits(model, [[1] * count], cache)
                length += count
            costs = []
            for _ in range(20):  # a window of attention has room for as many
                began = time.perf_counter()
                next_logits(model, [[1]], cache)
                costs.append(1000 * time.perf_counter() - 1000 * began)
                length += 1
            row[f"ms_after_{mark}"] = f"{statistics.median(costs):.2f}"
            cells.append(f"{mark:,}: {statistics.median(costs):.2f} ms, {resident():.0f} MiB")
        print(f"{name:26} state {size:,.1f} KiB a sequence; after {'; '.join(cells)}", flush=True)
        rows.append(row)
    return rows


def plain_experts(ffn: nn.Module, x: Tensor) -> Tensor:
    """The mixture of a token (B, C) with every expert computed, one after another."""
    p = F.linear(x, ffn.router.weight).softmax(-1)
    weight, chosen = p.topk(ffn.top_k)
    if ffn.top_k > 1:
        weight = weight / weight.sum(-1, keepdim=True)

    def swiglu(first: Tensor, second: Tensor) -> Tensor:
        gate, up = F.linear(x, first.flatten(0, 1)).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, second)

    y = sum(swiglu(one.fc.weight, one.proj.weight) for one in ffn.always)
    for i in range(len(ffn.router.weight)):
        share = (weight * (chosen == i)).sum(-1, keepdim=True)
        y = y + share * swiglu(ffn.experts.fc.weight[i], ffn.experts.proj.weight[i])
    return y


def plain_step(block: nn.Module, x: Tensor, held: dict[str, Tensor]) -> Tensor:
    """A block of gru_rwkv and experts for one token (B, C) of each sequence, as a textbook has it;
    `held` is what it remembers, and changes."""
    cell, mix = block.mixer.gru, block.mixer.rwkv
    n = block.mixer_norm(x)
    h = held["h"]
    normed = h * (h.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    r, z, c = F.linear(n, cell.gates.weight.flatten(0, 1), cell.gates.bias).chunk(3, dim=-1)
    ur, uz, uc = F.linear(normed, cell.recurrent.flatten(0, 1)).chunk(3, dim=-1)
    z = torch.sigmoid(z + uz)
    h = (1 - z) * torch.tanh(c + torch.sigmoid(r + ur) * uc) + z * h

    mixed = [n + m * (held["past"] - n) for m in mix.mix]
    heads = (-1, *mix.bonus.shape)
    low = torch.tanh(F.linear(mixed[3], mix.decay_in.weight))
    rate = torch.sigmoid(mix.decay + F.linear(low, mix.decay_out.weight))
    decay = torch.exp(-(torch.e**-0.5) * rate).view(heads)
    projections = zip(mixed, (mix.receptance, mix.key, mix.value))
    rr, k, v = (F.linear(m, part.weight).view(heads) for m, part in projections)
    new = k.unsqueeze(-1) * v.unsqueeze(-2)
    y = (rr.unsqueeze(-1) * (held["S"] + mix.bonus.unsqueeze(-1) * new)).sum(-2).flatten(1)
    held |= {"h": h, "past": n, "S": decay.unsqueeze(-1) * held["S"] + new}

    x = x + F.linear(h, cell.proj.weight) + F.linear(mix.norm(y), mix.proj.weight)
    return x + plain_experts(block.ffn, block.ffn_norm(x))


def plain_loss(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The loss of a model of gru_rwkv and experts, token by token and layer by layer."""
    B = len(tokens)
    H, D = model.blocks[0].mixer.rwkv.bonus.shape
    zeros = [{"h": (B, H * D), "past": (B, H * D), "S": (B, H, D, D)} for _ in model.blocks]
    held = [{name: torch.zeros(shape) for name, shape in of.items()} for of in zeros]
    logits = []
    for t in range(tokens.size(1)):
        x = F.embedding(tokens[:, t], model.embed)
        for block, of_block in zip(model.blocks, held):
            x = plain_step(block, x, of_block)
        logits.append(F.linear(model.norm(x), model.head))
    return F.cross_entropy(torch.stack(logits, dim=1).flatten(0, 1), targets.flatten())


def bench_text(rounds: int) -> None:
    """Prints characters a second of training steps of PRESET=rnn_char, and of a plain loop."""
    settings = {"PRESET": "rnn_char", "VOCAB_SIZE": "28", "DEVICE": "cpu"}
    cfg = train_gpt.resolve(Config.from_env(settings))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state, other = State.build(cfg, Ranks()), State.build(cfg, Ranks())
    batch = torch.randint(28, (cfg.batch_size, cfg.sequence_length + 1))
    x, y = batch[:, :-1], batch[:, 1:]
    theirs = torch.optim.AdamW(
        other.model.parameters(), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=0.01
    )

    def plain() -> None:
        plain_loss(other.model, x, y).backward()
        theirs.step()
        theirs.zero_grad()

    for model in (state.model, other.model):
        torch.manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    loss, routing = state.model(x, y)
    assert torch.allclose(loss, plain_loss(other.model, x, y), atol=1e-4) and len(routing)
    assert aux_loss(routing[:, 0], routing[:, 1]).isfinite().all()
    calls = {"trainer": lambda: train_gpt.train_step(state, cfg, x, y), "plain loop": plain}
    seconds = in_turns(calls, rounds)
    rates = {name: x.numel() / statistics.median(s) for name, s in seconds.items()}
    show("rnn_char, a step of 100 characters", seconds, "trainer", "plain loop")
    print(", ".join(f"{name} {rate:,.0f} characters/s" for name, rate in rates.items()))
    dist.destroy_process_group()


def sections(text: str) -> list[str]:
    """A list with commas from an argument."""
    asked = text.split(",")
    wrong = [name for name in asked if name not in SECTIONS]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r}: choose some of {','.join(SECTIONS)}")
    return asked


def main(argv: list[str]) -> int:
    """Measures and prints; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=sections, default=SECTIONS, help=",".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=15, help="of each comparison (%(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=10_000, help="longest sequence of generation (%(default)s)"
    )
    parser.add_argument("--stage", default="", help="generation: its variants, not every mixer")
    parser.add_argument("--csv", help="generation: a file for its figures")
    args = parser.parse_args(argv)
    folder = Path(args.csv or ".").parent
    if args.csv and ("generation" not in args.only or not folder.is_dir()):
        parser.error(f"--csv {args.csv}: needs the folder {folder}, and generation in --only")
    if args.rounds < 1 or args.tokens < MARKS[0]:
        parser.error(f"--rounds must be at least 1 and --tokens at least {MARKS[0]}")
    try:
        cfgs = configs(args.stage)
    except (ConfigError, ValueError) as error:
        parser.error(str(error))
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if "recurrences" in args.only:
        bench_recurrences(args.rounds)
    if "generation" in args.only:
        rows = bench_generation(cfgs, args.tokens)
        if args.csv:
            with open(args.csv, "w", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, rows[0], lineterminator="\n")
                table.writeheader()
                table.writerows(rows)
    if "text" in args.only:
        bench_text(args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
