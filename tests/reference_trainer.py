"""A second trainer, written to be read and not to be fast: one file, float64, loops.

It has of train_gpt.py a Config, whose values it reads, and the weights to start with; everything
else is written anew from what README.md and `--help` promise. `train` returns what the program has
to log and to leave. Shapes: B sequences of a micro-batch, T positions, C channels, D head size, H
heads, E experts, V vocabulary.
"""

import glob
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class Durations(NamedTuple):
    """Seconds that each kind of work takes, on a clock that knows no other."""

    read: float  # of a micro-batch of validation, or of a rank's batch of training
    validation: float  # beside its reading
    save: float

    def step(self, step):
        """Seconds of the update that follows `step` updates: no two are alike."""
        return 1.0 + 0.25 * step


########################################
#                 Data                 #
########################################


def samples_of(pattern, T, unit=1):
    """The samples, T + 1 tokens each, of the shards of a glob: of each a multiple of the unit."""
    samples = []
    for file in sorted(glob.glob(pattern)):
        tokens = np.fromfile(file, "<u2")[512:].astype(np.int64)  # behind 256 int32
        of_shard = [tokens[i : i + T + 1] for i in range(0, len(tokens) - T, T)]
        samples += of_shard[: len(of_shard) // unit * unit]
    return torch.tensor(np.array(samples))


def training_sample(cfg, samples, number):
    """Sample `number` of all epochs."""
    epoch, index = divmod(number, len(samples))
    if cfg.shuffle:
        index = np.random.default_rng((cfg.seed, epoch)).permutation(len(samples))[index]
    return samples[index]


########################################
#                Model                 #
########################################


class Dropout:
    """Masks in the order in which a pass asks for them; none where p is 0."""

    def __init__(self, p=0.0):
        self.p = p

    def __call__(self, x):
        return x * F.dropout(torch.ones(x.shape), self.p).double() if self.p else x


def rms(x, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def norm(cfg, p, name, x):
    if cfg.norm == "rms":
        return rms(x)
    if cfg.norm == "rms_gain":
        return rms(x) * p[f"{name}.1.weight"]
    centred = x - x.mean(-1, keepdim=True)
    y = rms(centred, eps=1e-5) * p[f"{name}.weight"]
    return y + p[f"{name}.bias"] if cfg.bias else y


def linear(p, name, x):
    weight = p[f"{name}.weight"]
    y = x @ weight.reshape(-1, weight.shape[-1]).T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def rotate(head):
    """(T, D), whose channels i and i + D / 2 are a point that turns with the position."""
    T, D = head.shape
    a, b = head.chunk(2, dim=-1)
    angles = [[t * 10000 ** (-2 * i / D) for i in range(D // 2)] for t in range(T)]
    angles = torch.tensor(angles, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def gate(cfg, p, name, y, x):
    """y (T, C) times a gate for each channel, each head, or the same for every x (T, C)."""
    T, C = y.shape
    if cfg.attngate == "const":
        score = p[f"{name}.score"].reshape(1, C)
    else:
        score = linear(p, f"{name}.score", x)
    opening = torch.sigmoid(score)
    if cfg.gateact == "ns_sigmoid":
        opening = 0.5 + 0.5 * opening
    if cfg.attngate == "headwise":
        opening = opening.repeat_interleave(C // cfg.n_head, dim=-1)
    return y * opening


def attention(cfg, p, name, x, drop):
    """x (B, T, C) -> (B, T, C), head by head."""
    B, T, C = x.shape
    D = C // cfg.n_head
    kept = drop(torch.ones(B, cfg.n_head, T, T, dtype=torch.float64))
    comes_later = torch.ones(T, T).triu(1) > 0
    outputs = []
    for b in range(B):
        q, k, v = linear(p, f"{name}.qkv", x[b]).chunk(3, dim=-1)
        if cfg.attngate != "none" and cfg.gatepos == "value":
            v = gate(cfg, p, f"{name}.gate_value", v, x[b])
        heads = []
        for h in range(cfg.n_head):
            q_h, k_h, v_h = (t[:, h * D : (h + 1) * D] for t in (q, k, v))
            if cfg.qk_norm:
                q_h, k_h = rms(q_h), rms(k_h)
            if cfg.pos == "rotary":
                q_h, k_h = rotate(q_h), rotate(k_h)
            scores = (q_h @ k_h.T / math.sqrt(D)).masked_fill(comes_later, -math.inf)
            heads.append((torch.softmax(scores, dim=-1) * kept[b, h]) @ v_h)
        y = torch.cat(heads, dim=-1)
        if cfg.attngate != "none" and cfg.gatepos == "sdpa":
            y = gate(cfg, p, f"{name}.gate_output", y, x[b])
        outputs.append(linear(p, f"{name}.proj", y))
    return torch.stack(outputs)


def gru(cfg, p, name, x, drop):
    """x (B, T, C) -> (B, T, C): token by token, from a state of zeros that gates read normed."""
    reset_w, update_w, candidate_w = p[f"{name}.recurrent"]
    h, states = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        reset_x, update_x, candidate_x = linear(p, f"{name}.gates", x[:, t]).chunk(3, dim=-1)
        seen = rms(h, eps=1e-3)
        reset = torch.sigmoid(reset_x + seen @ reset_w.T)
        update = torch.sigmoid(update_x + seen @ update_w.T)
        candidate = torch.tanh(candidate_x + reset * (seen @ candidate_w.T))
        h = (1 - update) * candidate + update * h
        states.append(h)
    return linear(p, f"{name}.proj", torch.stack(states, dim=1))


def mingru(cfg, p, name, x, drop):
    """x (B, T, C) -> (B, T, C), whose gates read the input alone."""
    h, states = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        update, candidate = linear(p, f"{name}.gates", x[:, t]).chunk(2, dim=-1)
        update = torch.sigmoid(update)
        h = (1 - update) * h + update * candidate
        states.append(h)
    return linear(p, f"{name}.proj", torch.stack(states, dim=1))


MIXERS = {"attention": attention, "gru": gru, "mingru": mingru}


def activate(kind, h):
    if kind == "relu2":
        return h.clamp(min=0) ** 2
    if kind == "gelu":
        return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    opened, up = h.chunk(2, dim=-1)
    return opened * torch.sigmoid(opened) * up


def mlp(p, name, kind, x):
    """x (..., C) -> (..., C) by the weights whose names begin so."""
    return linear(p, f"{name}proj", activate(kind, linear(p, f"{name}fc", x)))


class Routing(NamedTuple):
    """What a router did in a visit."""

    load: torch.Tensor  # (E,), fraction of all choices
    importance: torch.Tensor  # (E,), mean probability
    left: torch.Tensor  # (E,), what the router of the next step finds


def experts(cfg, p, name, x, state):
    """x (B, T, C) -> (B, T, C) and a Routing; state (E,) is what the step before has left.

    Every expert reads every token, and weighs nothing where it was not chosen.
    """
    E, k = cfg.num_experts, cfg.top_k
    rows = x.flatten(0, 1)
    chances = torch.softmax(linear(p, f"{name}.router", rows), dim=-1)
    is_chosen = torch.zeros_like(chances)
    for n, chance in enumerate(chances):
        liked = chance + state if cfg.balance == "quantile" else chance
        is_chosen[n, liked.argsort(descending=True)[:k]] = 1
    weights = chances * is_chosen
    if k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    y = 0
    for e in range(E):
        own = {f"{part}.weight": p[f"{name}.experts.{part}.weight"][e] for part in ("fc", "proj")}
        y = y + weights[:, e : e + 1] * mlp(own, "", cfg.expert, rows)
    if cfg.shared_expert:
        y = y + mlp(p, f"{name}.always.0.", cfg.expert, rows)
    load = is_chosen.mean(0) / k
    left = even_bias(chances.detach(), state, k) if cfg.balance == "quantile" else load
    return y.view_as(x), Routing(load, chances.mean(0), left)


def even_bias(chances, state, k):
    """(E,): what each expert lacks to be among the first k of k / E of all tokens (N, E)."""
    N, E = chances.shape
    lacks = []
    for e in range(E):
        missing = []
        for chance in chances:
            first_loser = sorted((chance + state).tolist(), reverse=True)[min(k, E - 1)]
            missing.append(first_loser - chance[e].item())
        lacks.append(sorted(missing)[max(1, round(N * k / E)) - 1])
    lacks = torch.tensor(lacks, dtype=torch.float64)
    return lacks - lacks.mean()


def visits(cfg):
    """The number of the block that each layer is."""
    if cfg.recurrence != "shared":
        return [*range(cfg.n_layer)]
    ends = cfg.unshared_ends
    between = [ends + i % cfg.n_unique for i in range(cfg.n_layer - 2 * ends)]
    return [*range(ends), *between, *range(ends + cfg.n_unique, 2 * ends + cfg.n_unique)]


def kind_of(names, layer):
    names = names.split(",")
    return names[layer % len(names)]


def visit_weights(cfg, p, layer):
    """{name within the block: tensor} of a layer; SCALE has a slice for each visit of a block."""
    order = visits(cfg)
    block, nth = order[layer], order[:layer].count(order[layer])
    prefix = f"blocks.{block}."
    own = {name.removeprefix(prefix): t for name, t in p.items() if name.startswith(prefix)}
    return {name: t[nth] if "_scale." in name else t for name, t in own.items()}


def hidden(cfg, p, tokens, drop, router_states):
    """Tokens (B, T) -> what the head reads (B, T, C), and {layer: Routing}."""
    x = p["embed"][tokens]
    if cfg.pos == "learned":
        x = x + p["add_position.weight"][: tokens.shape[1]]
    x, routings = drop(x), {}
    for layer, block in enumerate(visits(cfg)):
        own = visit_weights(cfg, p, layer)
        scales = own.get("mixer_scale.weight", 1.0), own.get("ffn_scale.weight", 1.0)
        mixer = MIXERS[kind_of(cfg.mixer, layer)]
        y = mixer(cfg, own, "mixer", norm(cfg, own, "mixer_norm", x), drop)
        x = x + scales[0] * drop(y)
        kind, read = kind_of(cfg.ffn, layer), norm(cfg, own, "ffn_norm", x)
        if kind == "moe":
            y, routings[layer] = experts(cfg, own, "ffn", read, router_states[block])
        else:
            y = mlp(own, "ffn.", kind, read)
        x = x + scales[1] * drop(y)
    return norm(cfg, p, "norm", x), routings


def logits_of(cfg, p, x):
    logits = x @ p["embed" if cfg.tie_embeddings else "head"].T
    cap = cfg.logit_softcap
    return cap * torch.tanh(logits / cap) if cap else logits


def losses(logits, targets):
    """Nats of each token, logits (B, T, V) and targets (B, T)."""
    wanted = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return torch.logsumexp(logits, dim=-1) - wanted


def balance_loss(cfg, routings, router_states):
    """The mean over the layers of E sum f P, of the load that the step before had."""
    terms = []
    for layer, routing in routings.items():
        state = router_states[visits(cfg)[layer]]
        terms.append(cfg.num_experts * (state * routing.importance).sum())
    return sum(terms) / len(terms) if terms else 0.0


########################################
#                 Step                 #
########################################


def accumulate(cfg, p, batch, step, world, router_states):
    """Mean loss and gradients of a batch (n, T + 1), and {layer: mean Routing} of it.

    Rank after rank has its rows in micro-batches. Each rank and step draws its own dropout.
    """
    names, grads = list(p), {name: torch.zeros_like(t) for name, t in p.items()}
    per_rank = cfg.batch_size // world
    parts, total, means = cfg.batch_size // cfg.device_batch_size, 0.0, {}
    for rank in range(world):
        if cfg.dropout:
            sequence = np.random.SeedSequence((cfg.seed, step, rank))
            torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        for first in range(rank * per_rank, (rank + 1) * per_rank, cfg.device_batch_size):
            rows = batch[first : first + cfg.device_batch_size]
            drop = Dropout(cfg.dropout)
            x, routings = hidden(cfg, p, rows[:, :-1], drop, router_states)
            loss = losses(logits_of(cfg, p, x), rows[:, 1:]).mean()
            aux = aux_coef(cfg, step) * balance_loss(cfg, routings, router_states)
            own = torch.autograd.grad(loss + aux, p.values(), allow_unused=True)
            for name, grad in zip(names, own):
                if grad is not None:
                    grads[name] += grad / parts
            total += loss.item() / parts
            for layer, routing in routings.items():
                share = [t.detach() / parts for t in routing]
                means[layer] = [a + b for a, b in zip(means.get(layer, (0, 0, 0)), share)]
    return total, grads, {layer: Routing(*mean) for layer, mean in means.items()}


def lr_fraction(cfg, step):
    """Of the peak rate, for the update that follows `step` updates."""
    if step < cfg.warmup_iters:
        return (step + 1) / cfg.warmup_iters
    if cfg.lr_schedule == "cosine":
        done = (step - cfg.warmup_iters) / (cfg.num_iterations - cfg.warmup_iters)
        return cfg.min_lr_frac + (1 - cfg.min_lr_frac) * (1 + math.cos(math.pi * done)) / 2
    return min(1.0, (cfg.num_iterations - step) / cfg.warmdown_iters)


def decay_fraction(cfg, step):
    if cfg.decay_schedule == "to_zero":
        return 1 - step / cfg.num_iterations
    return lr_fraction(cfg, step) if cfg.decay_schedule == "follow_lr" else 1.0


def muon_momentum(cfg, step):
    if cfg.momentum_start is None:
        return cfg.muon_momentum
    rise = min(1.0, step / cfg.momentum_warmup_iters)
    fall = min(1.0, (cfg.num_iterations - step) / cfg.momentum_cooldown_iters)
    return cfg.momentum_start + min(rise, fall) * (cfg.muon_momentum - cfg.momentum_start)


def aux_coef(cfg, step):
    if cfg.balance != "aux":
        return 0.0
    if cfg.aux_loss_coef_start is None:
        return cfg.aux_loss_coef
    start, end = cfg.aux_loss_coef_start, cfg.aux_loss_coef_end
    first, last = cfg.aux_warmup_frac, cfg.aux_decay_end_frac
    part = (step / cfg.num_iterations - first) / (last - first)
    return start + min(max(part, 0.0), 1.0) * (end - start)


def group_of(cfg, name, tensor):
    """Matrices inside the blocks are OPTIMIZER's, but for those that are AdamW's, undecayed."""
    if name in ("embed", "head"):
        return name
    if not name.startswith("blocks.") or tensor.ndim < 2 or name.endswith(".bias"):
        return "vectors"
    asked = ""
    if name.endswith("router.weight"):
        asked = cfg.router_optimizer
    elif ".gate_" in name:
        asked = "adamw" if cfg.attngate == "const" else cfg.gate_optimizer
    return "vectors" if asked == "adamw" else "matrices"


def orthogonal(G):
    """Five quintic Newton-Schulz iterations on a matrix over its norm."""
    X = G / G.norm()
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
    return X


def muon(cfg, matrix, grad, momentum, rate, decay, mu):
    """One matrix (rows, cols) and its momentum after an update; without a gradient it stays."""
    if not grad.any():
        return matrix, momentum
    momentum = mu * momentum + (1 - mu) * grad
    direction = orthogonal(mu * momentum + (1 - mu) * grad)
    rows, cols = matrix.shape
    scale = {
        "unit": max(rows, cols) ** 0.5,
        "original": max(1, rows / cols) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, cols) ** 0.5,
    }[cfg.muon_scale]
    return matrix * (1 - rate * decay) - rate * scale * direction, momentum


class Weights:
    """The parameters and what their optimizers remember."""

    def __init__(self, cfg, start):
        self.cfg = cfg
        self.p = {name: t.double().requires_grad_() for name, t in start.items()}
        self.first = {name: torch.zeros_like(t) for name, t in self.p.items()}
        self.second = {name: torch.zeros_like(t) for name, t in self.p.items()}
        self.average = {name: t.detach().clone() for name, t in self.p.items()}

    def update(self, grads, step):
        cfg, fraction = self.cfg, lr_fraction(self.cfg, step)
        decay = cfg.weight_decay * decay_fraction(cfg, step)
        own = {"embed": cfg.embed_lr, "head": cfg.head_lr}
        new = {}
        for name, t in self.p.items():
            group, old = group_of(cfg, name, t), t.detach()
            if group == "matrices" and cfg.optimizer == "muon":
                peak = 0.1 * cfg.lr if cfg.muon_lr is None else cfg.muon_lr
                args = fraction * peak, decay * cfg.muon_decay, muon_momentum(cfg, step)
                new[name] = self.muon_all(name, old, grads[name], args)
                continue
            rate = fraction * (cfg.lr if own.get(group) is None else own[group])
            kept = 1.0 if group == "vectors" else 1 - rate * decay
            new[name] = kept * old - rate * self.adam(name, grads[name], step)
        self.p = {name: t.requires_grad_() for name, t in new.items()}
        if cfg.ema_iters:
            part = max(1 / cfg.ema_iters, 1 / (step + 1))
            for name, t in self.p.items():
                self.average[name] += part * (t.detach() - self.average[name])

    def muon_all(self, name, old, grad, args):
        """A parameter (..., rows, cols) after the update of each of its matrices."""
        shape = old.shape
        triples = (t.reshape(-1, *shape[-2:]) for t in (old, grad, self.first[name]))
        results = [muon(self.cfg, *triple, *args) for triple in zip(*triples)]
        self.first[name] = torch.stack([momentum for _, momentum in results]).view(shape)
        return torch.stack([matrix for matrix, _ in results]).view(shape)

    def adam(self, name, grad, step):
        """Adam's direction, its moments without bias."""
        b1, b2 = self.cfg.beta1, self.cfg.beta2
        self.first[name] = b1 * self.first[name] + (1 - b1) * grad
        self.second[name] = b2 * self.second[name] + (1 - b2) * grad**2
        mean, square = self.first[name] / (1 - b1 ** (step + 1)), self.second[name]
        return mean / ((square / (1 - b2 ** (step + 1))).sqrt() + 1e-8)


########################################
#                 Run                  #
########################################


@torch.no_grad()
def validate(cfg, p, samples, router_states):
    """Mean nats and accuracy of the tokens of these samples, one sample after another."""
    nats, right, count = 0.0, 0, 0
    for sample in samples:
        inputs, targets = sample[None, :-1], sample[None, 1:]
        x, _ = hidden(cfg, p, inputs, Dropout(), router_states)
        logits = logits_of(cfg, p, x)
        nats += losses(logits, targets).sum().item()
        right += (logits.argmax(-1) == targets).sum().item()
        count += targets.numel()
    return nats / count, right / count


def health(cfg, load, importance):
    """{column: number} of one router."""
    shares = [share for share in load.tolist() if share > 0]
    return {
        "aux": cfg.num_experts * (load * importance).sum().item(),
        "entropy": -sum(share * math.log(share) for share in shares) / math.log(cfg.num_experts),
        "load_min": load.min().item(),
        "load_max": load.max().item(),
        "dead": cfg.num_experts - len(shares),
        "dropped": 0.0,
    }


def pooled_health(cfg, routings):
    """Figures of the summary: all layers of a block are one router."""
    of_blocks = {}
    for layer, routing in routings.items():
        of_blocks.setdefault(visits(cfg)[layer], []).append(routing)
    each = []
    for some in of_blocks.values():
        mean = [sum(r.load for r in some) / len(some), sum(r.importance for r in some) / len(some)]
        each.append(health(cfg, *mean))
    column = {name: [of_block[name] for of_block in each] for name in each[0]}
    return {
        "moe_aux": sum(column["aux"]) / len(each),
        "moe_entropy": sum(column["entropy"]) / len(each),
        "moe_load_min": min(column["load_min"]),
        "moe_load_max": max(column["load_max"]),
        "moe_dead": sum(column["dead"]),
        "moe_dropped": 0.0,
        "moe_max_vio": max(column["load_max"]) * cfg.num_experts - 1,
    }


def plan(cfg, start, world):
    """What is known before the start: counts of parameters and FLOPs, by the names of weights."""
    total = sum(t.numel() for t in start.values())
    idle = sum(t.numel() for name, t in start.items() if ".experts." in name)
    idle = idle * (cfg.num_experts - cfg.top_k) // cfg.num_experts
    flops = 6 * cfg.vocab_size * cfg.n_embd  # of the head
    for layer in range(cfg.n_layer):
        for name, t in visit_weights(cfg, start, layer).items():
            is_product = name.endswith(("weight", "recurrent")) and t.ndim >= 2
            active = t.numel()
            if ".experts." in name:
                active = active * cfg.top_k // cfg.num_experts
            flops += 6 * active if is_product else 0
        if kind_of(cfg.mixer, layer) == "attention":
            flops += 12 * cfg.n_embd * cfg.sequence_length
    return {
        "params_total": total,
        "params_active": total - idle,
        "flops_per_token": flops,
        "tokens_per_step": cfg.batch_size * cfg.sequence_length,
        "tokens_needed": cfg.num_iterations * cfg.batch_size * cfg.sequence_length + 1,
        "grad_accumulation": cfg.batch_size // cfg.device_batch_size // world,
        "world_size": world,
    }


class Book:
    """The curve and the figures of a run, and its clock."""

    def __init__(self, cfg, world, durations, token_bytes, figures):
        self.cfg = cfg
        self.world = world
        self.durations = durations
        self.token_bytes = token_bytes
        self.curve = []  # {column: number} of each point
        self.figures = figures | {"eval_time": 0.0, "save_time": 0.0, "bad_steps": 0}
        self.train_time = self.data_wait = 0.0
        self.last = (0, 0.0)

    def trained(self, step):
        self.data_wait += self.durations.read
        self.train_time += self.durations.read + self.durations.step(step)

    def saved(self):
        self.figures["save_time"] += self.durations.save

    def validated(self, samples):
        """One pass over so many samples, of which this is the first rank's time."""
        cfg = self.cfg
        micro_batches = math.ceil(samples / cfg.device_batch_size)
        reads = math.ceil(micro_batches / self.world)
        self.figures["eval_time"] += self.durations.validation + reads * self.durations.read

    def point(self, step, values, validation):
        """A row of the curve after `step` updates, and the figures as they are then."""
        tokens = step * self.cfg.batch_size * self.cfg.sequence_length
        row = {"step": step, "tokens": tokens, "train_time": self.train_time}
        row |= {"data_wait": self.data_wait} | values | validation
        if step:
            row["tokens_per_sec"] = (tokens - self.last[0]) / (self.train_time - self.last[1])
        self.last = tokens, self.train_time
        self.curve.append(row)
        self.figures |= {name: row[name] for name in ("tokens", "train_time", "data_wait")}
        self.figures |= {name: validation[name] for name in validation if name != "val_loss"}
        if step:
            speed = tokens / self.train_time
            flops = speed * self.figures["flops_per_token"] / self.world
            self.figures |= {
                "tokens_per_sec": speed,
                "step_avg": 1000 * self.train_time / step,
                "mfu": flops / (self.cfg.peak_tflops * 1e12),
            }
        if validation:
            self.losses(validation["val_loss"], step)

    def losses(self, nats, step):
        best = min(nats, self.figures.get("best_loss", math.inf))
        self.figures |= {"final_loss": nats, "best_loss": best, "val_step": step}
        self.figures["ppl"] = math.e**nats
        self.figures["bits_per_byte"] = nats / math.log(2) / self.token_bytes


def log_due(cfg, step):
    """(whether the training loss is logged, whether the routers are)."""
    has_experts = "moe" in cfg.ffn.split(",") and step > 0
    routers = has_experts and (step % cfg.balance_log_interval == 0 or step == cfg.num_iterations)
    return step == 1 or (step > 0 and step % cfg.log_every == 0) or routers, routers


def router_columns(cfg, step, routings):
    columns = {"aux_coef": aux_coef(cfg, step - 1)}
    for layer, routing in routings.items():
        of_layer = health(cfg, routing.load, routing.importance)
        columns |= {f"{name}_{layer}": value for name, value in of_layer.items()}
    return columns


def train(cfg, start, world, durations, token_bytes):
    """(curve, figures, final weights) of a run of cfg from weights {name: tensor}.

    token_bytes[i] are the bytes of token i.
    """
    T = cfg.sequence_length
    keeps_tails = cfg.shard_tail == "keep" or cfg.shuffle
    samples = samples_of(cfg.input_bin, T, 1 if keeps_tails else cfg.batch_size)
    val_samples = samples_of(cfg.input_val_bin, T)[: cfg.val_tokens // T]
    mean_bytes = np.mean([token_bytes[t] for sample in val_samples for t in sample[1:]])
    weights = Weights(cfg, start)
    book = Book(cfg, world, durations, mean_bytes, plan(cfg, start, world))
    nothing = torch.zeros(cfg.num_experts, dtype=torch.float64)
    states, seen, routings = dict.fromkeys(visits(cfg), nothing), {}, {}
    for step in range(cfg.num_iterations + 1):
        is_last = step == cfg.num_iterations
        if is_last or (cfg.save_every and step and step % cfg.save_every == 0):
            book.saved()
        validation = {}
        if is_last or (cfg.val_every and step % cfg.val_every == 0):
            nats, right = validate(cfg, weights.p, val_samples, states)
            validation = {"val_loss": nats, "val_accuracy": right}
            book.validated(len(val_samples))
            if cfg.ema_iters:
                validation["ema_val_loss"], _ = validate(cfg, weights.average, val_samples, states)
                book.validated(len(val_samples))
        loss_due, routers_due = log_due(cfg, step)
        if loss_due or validation:
            values = seen | {"epoch": step * cfg.batch_size / len(samples)}
            if routers_due:
                values |= router_columns(cfg, step, routings)
                book.figures |= pooled_health(cfg, routings)
            book.point(step, values, validation)
        if is_last:
            return book.curve, book.figures, weights

        numbers = range(step * cfg.batch_size, (step + 1) * cfg.batch_size)
        batch = torch.stack([training_sample(cfg, samples, n) for n in numbers])
        loss, grads, routings = accumulate(cfg, weights.p, batch, step, world, states)
        grad_norm = math.sqrt(sum(grad.square().sum().item() for grad in grads.values()))
        if cfg.grad_clip and grad_norm > cfg.grad_clip:
            grads = {name: grad * cfg.grad_clip / grad_norm for name, grad in grads.items()}
        weights.update(grads, step)
        for block in set(visits(cfg)):
            of_block = [r.left for layer, r in routings.items() if visits(cfg)[layer] == block]
            states[block] = sum(of_block) / len(of_block) if of_block else states[block]
        rate = cfg.lr * lr_fraction(cfg, step)
        seen = {"train_loss": loss, "grad_norm": grad_norm, "lr": rate}
        book.trained(step)
