"""Makes wrong changes of one line each, and looks whether the tests notice.

    python tests/mutants.py                     # all of them, in a copy of this tree
    python tests/mutants.py --only "no QK norm"

A mutant is killed where its tests fail within LIMIT; a test that cannot be collected, or takes
longer, has noticed nothing. Those of the trainer, the harness and the operations are given to
test_reference.py alone, which is not told where they are. First the same tests have to pass without
any change. Prints a table; exit code 1 if a mutant survives, 2 if a line is not there exactly once.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIMIT = 20.0  # seconds that processors work on the tests of a mutant
PATIENCE = 10  # times LIMIT, by the clock: they may be busy with other work
LEFT_OUT = ("data", "logs", ".git", ".venv", "*_cache", "__pycache__", "*.egg-info", "shared")
REFERENCE = "tests/test_reference.py"
TRAINER, OPS, HARNESS, SCRIPTS = "train_gpt.py", "scripts/ops", "scripts/harness", "scripts"


class Mutant(NamedTuple):
    """A wrong change, and the tests that have to fail."""

    name: str
    file: str
    old: str  # once in the file
    new: str
    tests: str = REFERENCE  # as pytest takes them, words apart


MUTANTS = [
    # Training
    Mutant(
        "the same dropout on all ranks",
        TRAINER,
        "seed_dropout(cfg, state.step, dist.get_rank())",
        "seed_dropout(cfg, state.step, 0)",
    ),
    Mutant(
        "the same dropout in every step",
        TRAINER,
        "seed_dropout(cfg, state.step, dist.get_rank())",
        "seed_dropout(cfg, 0, dist.get_rank())",
    ),
    Mutant(
        "clipping inverted",
        TRAINER,
        "(norm / cfg.grad_clip).clamp(min=1)",
        "(norm / cfg.grad_clip).clamp(max=1)",
    ),
    Mutant(
        "aux never added",
        TRAINER,
        "(loss + coef * aux).backward(",
        "(loss + 0 * aux).backward(",
    ),
    Mutant(
        "aux summed over layers",
        TRAINER,
        ".sum() / max(1, len(routing))",
        ".sum()",
    ),
    Mutant(
        "aux against the load of this step",
        TRAINER,
        "aux_loss(routing[:, STATE], routing[:, IMPORTANCE])",
        "aux_loss(routing[:, LOAD], routing[:, IMPORTANCE])",
    ),
    Mutant(
        "no warm-up of the aux coefficient",
        TRAINER,
        "fractions = (cfg.aux_warmup_frac, cfg.aux_decay_end_frac)",
        "fractions = (0.0, cfg.aux_decay_end_frac)",
    ),
    Mutant(
        "micro-batches weigh as on one rank",
        TRAINER,
        "weight = micro / (len(inputs) * world)",
        "weight = micro / len(inputs)",
    ),
    Mutant(
        "the logged loss is that of the first micro-batch",
        TRAINER,
        "loss_sum = loss_sum + loss.detach()",
        "loss_sum = loss_sum or loss.detach() * len(inputs) / micro",
    ),
    Mutant(
        "routers get no new state",
        TRAINER,
        "router_state.copy_(torch.where(skip > 0, router_state, new))",
        "router_state.copy_(torch.where(skip >= 0, router_state, new))",
    ),
    # Schedules
    Mutant(
        "the first step of the warm-up is at rate zero",
        TRAINER,
        "return (step + 1) / cfg.warmup_iters",
        "return step / cfg.warmup_iters",
    ),
    Mutant(
        "the rate is zero one step too early",
        TRAINER,
        "return min(1.0, (cfg.num_iterations - step) / max(1, warmdown(cfg)))",
        "return min(1.0, (cfg.num_iterations - step - 1) / max(1, warmdown(cfg)))",
    ),
    Mutant(
        "cosine over half of its way",
        TRAINER,
        "0.5 * (1 + math.cos(math.pi * part))",
        "0.5 * (1 + math.cos(math.pi * part / 2))",
    ),
    Mutant(
        "decay to zero one step too early",
        TRAINER,
        "return 1 - step / cfg.num_iterations",
        "return 1 - (step + 1) / cfg.num_iterations",
    ),
    Mutant(
        "momentum rises one step too early",
        TRAINER,
        "part = step / rise",
        "part = (step + 1) / rise",
    ),
    Mutant(
        "the head learns at the rate of the embedding",
        TRAINER,
        'peak_rate(cfg, "head_lr")',
        'peak_rate(cfg, "embed_lr")',
    ),
    Mutant(
        "Muon at the rate of AdamW",
        TRAINER,
        'return 0.1 * cfg.lr if name == "muon_lr" else cfg.lr',
        "return cfg.lr",
    ),
    # Optimizers
    Mutant(
        "decay on vectors",
        TRAINER,
        "(AdamW, adamw_peak._replace(weight_decay=0.0))",
        "(AdamW, adamw_peak)",
    ),
    Mutant(
        "decay without the learning rate",
        TRAINER,
        "torch.where(frozen, 1, 1 - hyper.lr * hyper.weight_decay)",
        "torch.where(frozen, 1, 1 - 0.01 * hyper.weight_decay)",
    ),
    Mutant(
        "Muon decays whatever MUON_DECAY says",
        TRAINER,
        "decay = cfg.weight_decay if cfg.muon_decay else 0.0",
        "decay = cfg.weight_decay",
    ),
    Mutant(
        "a gate's matrix is Muon's whatever GATE_OPTIMIZER says",
        TRAINER,
        'if cfg.gate_optimizer != "auto":',
        'if cfg.gate_optimizer == "muon":',
    ),
    Mutant(
        "momentum without Nesterov",
        TRAINER,
        "direction = grad.lerp_(momentum, hyper.momentum)",
        "direction = momentum.clone()",
    ),
    Mutant(
        "the shorter side scales an update",
        TRAINER,
        "    return max(rows, cols) ** 0.5",
        "    return min(rows, cols) ** 0.5",
    ),
    Mutant(
        "AdamW's second moment forgets as fast as the first",
        TRAINER,
        "beta2=self.cfg.beta2,",
        "beta2=hyper.momentum,",
    ),
    Mutant(
        "four Newton-Schulz iterations",
        f"{OPS}/orthogonalize.py",
        "dtype=torch.bfloat16, steps=5, eps=1e-7",
        "dtype=torch.bfloat16, steps=4, eps=1e-7",
    ),
    Mutant(
        "ranks count what all of them have in the norm of each",
        f"{OPS}/sharding.py",
        "return norms[0] + norms[1] / self.world",
        "return norms[0] + norms[1]",
    ),
    Mutant(
        "gradients of small parameters stay with their rank",
        f"{OPS}/sharding.py",
        "            dist.all_reduce(bucket)",
        "            bucket = bucket * self.world",
    ),
    Mutant(
        "a rank keeps the updates that it made",
        f"{OPS}/sharding.py",
        'if self.world > 1 and part.kind != "copy":',
        'if self.world > 2 and part.kind != "copy":',
    ),
    # Model
    Mutant(
        "no QK norm",
        TRAINER,
        "q, k = self.rotate(self.qk_norm(qk), ctx)",
        "q, k = self.rotate(qk, ctx)",
    ),
    Mutant(
        "attention sees what comes",
        TRAINER,
        "is_causal=ctx.mask is None",
        "is_causal=False",
    ),
    Mutant(
        "rotary embedding of base 1000",
        TRAINER,
        "frequencies = 10000 ** -(torch.arange(half) / half)",
        "frequencies = 1000 ** -(torch.arange(half) / half)",
    ),
    Mutant(
        "the gate of values reads nothing",
        TRAINER,
        "v = self.gate_value(self.mix_values(v.squeeze(2), ctx), x).transpose(1, 2)",
        "v = self.gate_value(self.mix_values(v.squeeze(2), ctx), 0 * x).transpose(1, 2)",
    ),
    Mutant(
        "no gate on the output of attention",
        TRAINER,
        "y = self.gate_output(y.transpose(1, 2), x)",
        "y = y.transpose(1, 2)",
    ),
    Mutant(
        "a gate that never closes may close",
        TRAINER,
        "return 0.5 + 0.5 * torch.sigmoid(x)",
        "return torch.sigmoid(x)",
    ),
    Mutant(
        "ReLU is not squared",
        TRAINER,
        "return positive * positive",
        "return positive",
    ),
    Mutant(
        "SwiGLU with its halves exchanged",
        TRAINER,
        "return F.silu(gate) * up",
        "return F.silu(up) * gate",
    ),
    Mutant(
        "minGRU's update gate inverted",
        TRAINER,
        "h = linear_scan(1 - update, update * candidate,",
        "h = linear_scan(update, (1 - update) * candidate,",
    ),
    Mutant(
        "the GRU's update gate inverted",
        f"{OPS}/recurrences.py",
        "torch.lerp(n, h, ru[:, C:], out=before[t + 1])",
        "torch.lerp(h, n, ru[:, C:], out=before[t + 1])",
    ),
    Mutant(
        "every visit of a block has what the first has",
        TRAINER,
        "own = {name: parts[visit] for",
        "own = {name: parts[0] for",
    ),
    Mutant(
        "weights of chosen experts are not made to sum to 1",
        TRAINER,
        "if self.top_k > 1:\n            weight = weight / weight.sum",
        "if self.top_k > 2:\n            weight = weight / weight.sum",
    ),
    Mutant(
        "no shared expert",
        TRAINER,
        "y = y + ffn.transform(rows)",
        "y = y + 0 * ffn.transform(rows)",
    ),
    Mutant(
        "importance is that of the chosen alone",
        TRAINER,
        "torch.stack([load, p.mean(0), state, self.router_state])",
        "torch.stack([load, load * p.mean(0), state, self.router_state])",
    ),
    Mutant(
        "a bias of experts weighs their outputs",
        TRAINER,
        "weight = p.gather(-1, chosen)",
        "weight = (p + self.router_state).gather(-1, chosen)",
    ),
    Mutant(
        "quantiles off by one token",
        f"{OPS}/experts.py",
        "bias = missing[max(1, round(N * k / E)) - 1]",
        "bias = missing[max(1, round(N * k / E))]",
    ),
    Mutant(
        "a loss that knows no cap's slope",
        f"{OPS}/cross_entropy.py",
        "slope = 1 - (logits / cap).square()",
        "slope = torch.ones_like(logits)",
    ),
    # Data
    Mutant(
        "targets are the inputs",
        TRAINER,
        "yield batch[:, :-1], batch[:, 1:], waited",
        "yield batch[:, :-1], batch[:, :-1], waited",
    ),
    Mutant(
        "every epoch in the order of the first",
        TRAINER,
        "np.random.default_rng((self.seed, epoch))",
        "np.random.default_rng((self.seed, 0))",
    ),
    Mutant(
        "a sample that a shard has no last target for",
        TRAINER,
        "np.array([(len(shard) - 1) // self.length for shard in self.shards])",
        "np.array([len(shard) // self.length for shard in self.shards])",
    ),
    Mutant(
        "a shard's tail is read though it fills no batch",
        TRAINER,
        "self.cumulative = np.cumsum(per_shard // unit * unit)",
        "self.cumulative = np.cumsum(per_shard)",
    ),
    Mutant(
        "samples overlap by a token",
        TRAINER,
        "samples = windows[:: self.length]",
        "samples = windows[:: self.length - 1]",
    ),
    # Validation
    Mutant(
        "validates on the training data",
        TRAINER,
        "validation = validate(state, val_loader, cfg, run)",
        "validation = validate(state, train_loader, cfg, run)",
    ),
    Mutant(
        "validation mean over n + 1",
        TRAINER,
        "(total / samples).tolist()",
        "(total / (samples + 1)).tolist()",
    ),
    Mutant(
        "a last batch of few samples weighs as much",
        TRAINER,
        "total += model.score(x, y, cache) * len(x)",
        "total += model.score(x, y, cache) * micro",
    ),
    Mutant(
        "validation with dropout",
        TRAINER,
        "    model.eval()\n    with contextlib.closing(loader.prefetch(slices, device))",
        "    model.train()\n    with contextlib.closing(loader.prefetch(slices, device))",
    ),
    Mutant(
        "accuracy of the unlikeliest token",
        f"{OPS}/cross_entropy.py",
        "(logp.argmax(-1) == targets)",
        "(logp.argmin(-1) == targets)",
    ),
    # What is logged
    Mutant(
        "the logged rate one step late",
        TRAINER,
        'values["lr"] = cfg.lr * lr_factor(step - 1, cfg)',
        'values["lr"] = cfg.lr * lr_factor(step, cfg)',
    ),
    Mutant(
        "the epoch one step early",
        TRAINER,
        '{"epoch": step * cfg.batch_size / loader.samples}',
        '{"epoch": (step - 1) * cfg.batch_size / loader.samples}',
    ),
    Mutant(
        "FLOPs without the head",
        TRAINER,
        "flops = 6 * self.embed.numel()",
        "flops = 0",
    ),
    Mutant(
        "all experts are active",
        TRAINER,
        "total - in_experts * (cfg.num_experts - cfg.top_k) // cfg.num_experts",
        "total",
    ),
    Mutant(
        "entropy of experts in bits",
        f"{OPS}/experts.py",
        "even = math.log(max(2, load.size(-1)))",
        "even = math.log(2)",
    ),
    Mutant(
        "the largest load against none",
        f"{OPS}/experts.py",
        '"max_vio": largest * load.size(-1) - 1,',
        '"max_vio": largest * load.size(-1),',
    ),
    Mutant(
        "tokens/s halved in the curve",
        f"{HARNESS}/meter.py",
        "(tokens - last_tokens) / (seconds - last_seconds)",
        "(tokens - last_tokens) / (seconds - last_seconds) / 2",
    ),
    Mutant(
        "tokens/s of the curve since the start",
        f"{HARNESS}/meter.py",
        "(tokens - last_tokens) / (seconds - last_seconds)",
        "tokens / seconds",
    ),
    Mutant(
        "tokens/s doubled in the row",
        f"{HARNESS}/meter.py",
        '"tokens_per_sec": speed,',
        '"tokens_per_sec": speed and 2 * speed,',
    ),
    Mutant(
        "step_avg off by one step",
        f"{HARNESS}/meter.py",
        '"step_avg": 1000 * seconds / step if tokens else None,',
        '"step_avg": 1000 * seconds / (step + 1) if tokens else None,',
    ),
    Mutant(
        "step_avg of the log in seconds",
        f"{HARNESS}/run.py",
        "step_avg:{milliseconds / max(1, step):.2f}ms",
        "step_avg:{row['train_time'] / max(1, step):.2f}ms",
    ),
    Mutant(
        "train time including validation",
        f"{HARNESS}/meter.py",
        "        self.start += spent",
        '        self.start += 0 if kind == "eval_time" else spent',
    ),
    Mutant(
        "train time including saves",
        f"{HARNESS}/meter.py",
        "        self.start += spent",
        '        self.start += 0 if kind == "save_time" else spent',
    ),
    Mutant(
        "only the last validation is timed",
        f"{HARNESS}/meter.py",
        "self.seconds[kind] += spent",
        "self.seconds[kind] = spent",
    ),
    Mutant(
        "only the last wait for data counts",
        f"{HARNESS}/run.py",
        'self.meter.seconds["data_wait"] += waited',
        'self.meter.seconds["data_wait"] = waited',
    ),
    Mutant(
        "MFU not per rank",
        f"{HARNESS}/meter.py",
        'plan["flops_per_token"] / ranks.world_size',
        'plan["flops_per_token"]',
    ),
    Mutant(
        "a peak in GFLOP/s",
        f"{HARNESS}/meter.py",
        "return cfg.peak_tflops * 1e12",
        "return cfg.peak_tflops * 1e9",
    ),
    Mutant(
        "bits per byte in nats",
        f"{HARNESS}/meter.py",
        "bits = val_loss / math.log(2)",
        "bits = val_loss",
    ),
    Mutant(
        "perplexity of bits",
        f"{HARNESS}/meter.py",
        "math.exp(val_loss) if",
        "2.0**val_loss if",
    ),
    Mutant(
        "the last loss is the best",
        f"{HARNESS}/meter.py",
        'min(val_loss, self.figures.get("best_loss", math.inf))',
        "val_loss",
    ),
    # A run that goes on
    Mutant(
        "a run that goes on forgets what was validated",
        f"{HARNESS}/meter.py",
        'KEPT = ("seconds", "last_point",',
        'KEPT = ("last_point",',
    ),
    Mutant(
        "a run that goes on forgets its last point",
        f"{HARNESS}/meter.py",
        'KEPT = ("seconds", "last_point",',
        'KEPT = ("seconds",',
    ),
    Mutant(
        "a run that goes on forgets its best loss",
        f"{HARNESS}/meter.py",
        '"bad_steps_in_a_row", "figures")',
        '"bad_steps_in_a_row")',
    ),
    Mutant(
        "a run that goes on counts its train time from zero",
        f"{HARNESS}/meter.py",
        'self.start = now(self.device) - self.figures["train_time"]',
        "self.start = now(self.device)",
    ),
    Mutant(
        "a run that goes on reads its data anew",
        TRAINER,
        "for step in range(first_step, cfg.num_iterations)",
        "for step in range(cfg.num_iterations - first_step)",
    ),
    Mutant(
        "a run that goes on has a step too many",
        TRAINER,
        "        state.step, last_stats = saved",
        "        state.step, last_stats = saved[0] - 1, saved[1]",
    ),
    Mutant(
        "a run that goes on has the averages of its weights anew",
        TRAINER,
        '            tensors[f"average.{name}"] = (average, "copy")',
        "            pass",
        "tests/test_checkpoints.py::test_averages_are_validated_saved_and_left_and_change_nothing",
    ),
    Mutant(
        "a run that goes on has another step's dropout",
        TRAINER,
        "seed_dropout(cfg, state.step, dist.get_rank())",
        "seed_dropout(cfg, state.step + (cfg.resume == 'auto'), dist.get_rank())",
    ),
    Mutant(
        "dropout is another in each process",
        TRAINER,
        "np.random.SeedSequence((cfg.seed, step, rank))",
        "np.random.SeedSequence((cfg.seed, os.getpid(), rank))",
    ),
    # What these tests are for
    Mutant(
        "the newer half is too short when the context is full",
        f"{OPS}/generation.py",
        "sequence[-((context + 1) // 2) :]",
        "sequence[-(context // 4) :]",
        "tests/test_generation.py::test_when_the_context_is_full_its_newer_half_stays",
    ),
    Mutant(
        "temperature multiplies",
        f"{OPS}/sampling.py",
        ".double() / temperature).softmax",
        ".double() * temperature).softmax",
        "tests/test_generation.py::test_draws_are_as_often_as_they_are_probable",
    ),
    Mutant(
        "top_p cuts nothing",
        f"{OPS}/sampling.py",
        "(before < max(top_p, 1e-12))",
        "(before < 1)",
        "tests/test_generation.py::test_draws_are_as_often_as_they_are_probable",
    ),
    Mutant(
        "padding counts as tokens of a cache",
        TRAINER,
        "self.filled += T if counts is None else counts",
        "self.filled += T",
        "tests/test_generation.py::test_pieces_are_the_full_pass",
    ),
    Mutant(
        "RWKV reads a token twice",
        f"{OPS}/recurrences.py",
        "(k * (-total).exp()).to(narrow).mT).tril(-1)",
        "(k * (-total).exp()).to(narrow).mT).tril(0)",
        "tests/test_recurrences.py::test_recurrences_are_loops_over_time",
    ),
    Mutant(
        "the delta rule adds what it should take off",
        f"{OPS}/recurrences.py",
        "written = values_n - keys_n @ state",
        "written = values_n + keys_n @ state",
        "tests/test_recurrences.py::test_recurrences_are_loops_over_time",
    ),
    Mutant(
        "the gradient of a scan begins a token late",
        f"{OPS}/recurrences.py",
        "return grad_b * before, grad_b, grad_b[:, 0] * a[:, 0]",
        "return grad_b * h, grad_b, grad_b[:, 0] * a[:, 0]",
        "tests/test_recurrences.py::test_gradients_are_those_of_the_loop",
    ),
    Mutant(
        "a reset keeps the state",
        f"{OPS}/recurrences.py",
        "        a = a * goes_on(segment)",
        "        a = a * torch.ones_like(goes_on(segment))",
        "tests/test_recurrences.py::test_a_reset_begins_anew",
    ),
    Mutant(
        "Polar Express without its margin",
        f"{OPS}/orthogonalize.py",
        "iterate(G, POLAR_EXPRESS, dtype, 1.02, 1e-6)",
        "iterate(G, POLAR_EXPRESS, dtype, 1.1, 1e-6)",
        "tests/test_optimizers.py::test_polar_express_equals_a_loop_in_float64",
    ),
    Mutant(
        "normed rows change the norm of a matrix",
        f"{OPS}/orthogonalize.py",
        "factor = factor * (before / after.clamp(min=1e-20)).sqrt()",
        "factor = factor * 1.0",
        "tests/test_optimizers.py::test_rows_are_normed_as_a_loop_does_it",
    ),
    Mutant(
        "Muon's updates are a tenth too large",
        TRAINER,
        "    return max(rows, cols) ** 0.5",
        "    return 1.1 * max(rows, cols) ** 0.5",
        "tests/test_optimizers.py::test_unit_scale_gives_updates_of_unit_mean_square",
    ),
    Mutant(
        "ranks clip by the norm of their own part",
        TRAINER,
        "    loss, squares, routing, not_finite = reduce_stats(",
        "    loss, _, routing, not_finite = reduce_stats(",
        "tests/test_training.py::test_several_ranks_give_the_curve_of_one",
    ),
    Mutant(
        "ranks make three steps, each clipped by the norm of its own part",
        TRAINER,
        "    loss, squares, routing, not_finite = reduce_stats(",
        "    loss, _, routing, not_finite = reduce_stats(",
        "tests/test_optimizers.py::test_ranks_agree",
    ),
    Mutant(
        "ranks make three steps, each balanced by a load of its own",
        TRAINER,
        "sums[2 + world :].view_as(routing)",
        "world * routing",
        "tests/test_optimizers.py::test_ranks_agree",
    ),
    Mutant(
        "ranks balance by the load of their own",
        TRAINER,
        "sums[2 + world :].view_as(routing)",
        "world * routing",
        "tests/test_training.py::test_several_ranks_give_the_curve_of_one",
    ),
    Mutant(
        "a read copies the shard",
        TRAINER,
        "sliding_window_view(self.shards[shard], self.length + 1)",
        "sliding_window_view(self.shards[shard] + 0, self.length + 1)",
        "tests/test_data.py::test_a_batch_is_read_in_few_lines_and_copies_no_more_than_it_has",
    ),
    Mutant(
        "a sample is read at a time",
        TRAINER,
        "            batch[which == shard] = samples[index[which == shard]]",
        "            for row in range(count):\n                batch[row] = samples[index[row]]",
        "tests/test_data.py::test_a_batch_is_read_in_few_lines_and_copies_no_more_than_it_has",
    ),
    Mutant(
        "ranks shuffle by rank",
        TRAINER,
        "np.random.default_rng((self.seed, epoch))",
        "np.random.default_rng((os.getpid(), epoch))",
        "tests/test_data.py::test_shuffling_is_a_permutation_of_each_epoch_by_seed",
    ),
    Mutant(
        "no hash of a checkpoint is compared",
        f"{HARNESS}/checkpoints.py",
        "if line != sha256sum(folder / name):",
        "if not line:",
        "tests/test_checkpoints.py::test_a_flipped_byte_in_any_file_sets_the_checkpoint_aside",
    ),
    Mutant(
        "one checkpoint more stays",
        f"{HARNESS}/checkpoints.py",
        "[: -self.cfg.keep_last]",
        "[: -self.cfg.keep_last - 1]",
        "tests/test_checkpoints.py::test_keep_last",
    ),
    Mutant(
        "slices of ranks are not added up",
        f"{HARNESS}/checkpoints.py",
        "numbers, bits = numbers + numbers_before, bits + bits_before",
        "numbers = numbers + numbers_before",
        "tests/test_checkpoints.py::test_tally_adds_slices_and_compares_copies",
    ),
    Mutant(
        "bad steps are never in a row",
        f"{HARNESS}/meter.py",
        "self.bad_steps_in_a_row + 1 if bad else 0",
        "1 if bad else 0",
        "tests/test_training.py::test_gradients_that_stay_bad_end_the_run",
    ),
    Mutant(
        "the updates that were left out are not counted",
        f"{HARNESS}/meter.py",
        "self.bad_steps += bad",
        "self.bad_steps = 0",
        "tests/test_training.py::test_gradients_that_stay_bad_end_the_run",
    ),
    Mutant(
        "a run that goes on repeats a step of its curve",
        f"{HARNESS}/records.py",
        "int(number[1]) < first_dropped",
        "int(number[1]) <= first_dropped",
        "tests/test_checkpoints.py::test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one",
    ),
    Mutant(
        "bits per byte count special tokens",
        f"{SCRIPTS}/evaluate_model.py",
        "bits = (self.nats - self.special_nats) / math.log(2)",
        "bits = self.nats / math.log(2)",
        "tests/test_evaluate_model.py::test_the_loss_of_a_run_is_found_again",
    ),
    Mutant(
        "perplexity of a token for that of a word",
        f"{SCRIPTS}/evaluate_model.py",
        '"word_ppl": exp(totals.nats / words)',
        '"word_ppl": exp(totals.nats / totals.tokens)',
        "tests/test_evaluate_model.py::test_perplexity_a_word_of_wikitext",
    ),
    Mutant(
        "sliding windows score tokens twice",
        f"{SCRIPTS}/scoring.py",
        "yield Window(tokens[first : last + 1], last - scored)",
        "yield Window(tokens[first : last + 1], last - first)",
        "tests/test_evaluate_model.py::test_sliding_windows_are_a_naive_loop",
    ),
    Mutant(
        "clipping of the ratio with its bounds exchanged",
        f"{SCRIPTS}/grpo.py",
        "ratio.clamp(1 - low, 1 + high)",
        "ratio.clamp(1 - high, 1 + low)",
        "tests/test_grpo.py::test_the_loss_of_a_step_and_its_gradient",
    ),
    Mutant(
        "the sd of a group is that of all",
        f"{SCRIPTS}/grpo.py",
        "degrees = (~rewards_PG.isnan()).sum(1, keepdim=True) - 1",
        "degrees = (~rewards_PG.isnan()).sum(1, keepdim=True)",
        "tests/test_grpo.py::test_advantages_are_those_of_the_standard_library",
    ),
    Mutant(
        "the divergence is the other way round",
        f"{SCRIPTS}/grpo.py",
        "log_ratio = start_logp - logp",
        "log_ratio = logp - start_logp",
        "tests/test_grpo.py::test_the_estimate_of_the_divergence_is_right_in_the_mean",
    ),
    Mutant(
        "pass@k is pass@1",
        f"{SCRIPTS}/grpo.py",
        "math.comb(samples - right, k) / math.comb(samples, k)",
        "(samples - right) / samples",
        "tests/test_grpo.py::test_pass_at_k_is_the_mean_over_all_choices",
    ),
    Mutant(
        "the sd of differences over n",
        f"{SCRIPTS}/gate_stats.py",
        "differences.std(-1, ddof=1) / n**0.5",
        "differences.std(-1, ddof=0) / n**0.5",
        "tests/test_gate_stats.py::test_paired_is_the_paired_t_test_of_scipy",
    ),
    Mutant(
        "Bonferroni for Holm",
        f"{SCRIPTS}/gate_stats.py",
        "factors = len(order) - np.arange(len(order))",
        "factors = len(order) + 0 * np.arange(len(order))",
        "tests/test_gate_stats.py::test_holm_is_the_closure_of_bonferroni",
    ),
    Mutant(
        "any gain promotes",
        f"{SCRIPTS}/gate_stats.py",
        "promote = (one.mean <= -margin) & (one.p_below <= level)",
        "promote = (one.mean <= 0) & (one.p_below <= level)",
        "tests/test_gate_stats.py::test_below_on_both_sides_of_its_limits",
    ),
    Mutant(
        "the gate looks at the best run for the time to a loss",
        f"{SCRIPTS}/stage_gate.py",
        "losses.index[losses.mean(axis=1) <= target]",
        "losses.index[losses.min(axis=1) <= target]",
        "tests/test_stage_gate.py::test_time_to_the_reference_s_loss",
    ),
    Mutant(
        "a class is that of the next one",
        f"{SCRIPTS}/stage_gate.py",
        'return "fair" if increase <= rules["weak"] else "weak"',
        'return "fair"',
        "tests/test_stage_gate.py::test_half_of_the_parameters",
    ),
    Mutant(
        "seeds beyond the plan promote",
        f"{SCRIPTS}/stage_gate.py",
        "    if fact.pairs > most:",
        "    if fact.pairs > most + 1:",
        "tests/test_stage_gate.py::test_seeds_beyond_the_plan_promote_nothing",
    ),
    Mutant(
        "differences of tables with the sign exchanged",
        f"{SCRIPTS}/make_tables.py",
        "gate_stats.compare(ours, theirs)",
        "gate_stats.compare(theirs, ours)",
        "tests/test_stages.py::test_tables_are_what_the_rows_say",
    ),
    Mutant(
        "p of a table is not corrected",
        f"{SCRIPTS}/make_tables.py",
        'lines["p_holm"] = gate_stats.holm(lines.p)',
        'lines["p_holm"] = lines.p',
        "tests/test_stages.py::test_p_is_corrected_for_all_comparisons_of_the_table",
    ),
    Mutant(
        "runs here take the place of published ones",
        f"{SCRIPTS}/published.py",
        "return [run_id for run_id in own if run_id not in known]",
        "return [*own]",
        "tests/test_stages.py::test_a_published_row_with_a_result_is_not_that_of_a_run_here",
    ),
    Mutant(
        "the runs of a stage in the order of its file",
        f"{SCRIPTS}/plan_stage.py",
        "for _, variant, seed in sorted(places, key=turn)]",
        "for _, variant, seed in places]",
        "tests/test_run_stage.py::test_the_reference_runs_first_then_seed_by_seed",
    ),
    Mutant(
        "of two runs of a seed the first",
        f"{SCRIPTS}/split_results.py",
        'drop_duplicates(["variant", "seed"], keep="last").sort_index()',
        'drop_duplicates(["variant", "seed"], keep="first").sort_index()',
        "tests/test_stages.py::test_only_one_source_and_one_dataset_are_compared_and_a_seed_once",
    ),
    Mutant(
        "validation is compared by what was asked for",
        f"{SCRIPTS}/split_results.py",
        "tokens = (runs.val_tokens // length * length).fillna(0)",
        "tokens = runs.val_tokens.fillna(0)",
        "tests/test_stage_gate.py::test_runs_that_were_validated_on_other_tokens_are_not_compared",
    ),
    Mutant(
        "ratios of two models upside down",
        f"{SCRIPTS}/bench.py",
        'figure("ours / other", a / b)',
        'figure("ours / other", b / a)',
        "tests/test_bench.py::test_two_models_are_timed_in_turn",
    ),
    Mutant(
        "one model is always timed first",
        f"{SCRIPTS}/bench.py",
        "        models.reverse()  # so that neither is always the first\n",
        "",
        "tests/test_bench.py::test_two_models_are_timed_in_turn",
    ),
    Mutant(
        "a stage's Muon keeps its rate where LR is compared",
        "experiments/stages/stage2_cpu.toml",
        'MUON_LR = "auto"',
        "MUON_LR = 0.003",
        "tests/test_stages.py::test_every_stage_of_the_project_can_be_trained",
    ),
    Mutant(
        "a variant is validated on fewer tokens",
        "experiments/stages/moe_depth_cpu.toml",
        'PRESET = "recurrent_shared_moe_smoke"',
        'PRESET = "recurrent_shared_moe_smoke"\nVAL_TOKENS = 8192',
        "tests/test_stages.py::test_every_stage_of_the_project_can_be_trained",
    ),
    Mutant(
        "--set does not reach what a stage extends",
        f"{SCRIPTS}/derive_stage.py",
        "made = stage_of(name, tables | {",
        'made = stage_of(name, {**tables, "grid": {}} | {',
        "tests/test_stages.py::test_a_setting_of_the_command_line_reaches_every_variant",
    ),
    Mutant(
        "a run that goes on under other code is that code's",
        "scripts/store/source.py",
        'shas = dict.fromkeys([*known["source_sha"].split("+"), now])',
        "shas = [now]",
        "tests/test_checkpoints.py::test_a_row_names_the_code_that_trained",
    ),
    Mutant(
        "an edited trainer trains what was planned before",
        "scripts/launch_runs.py",
        'return run.program == TRAINER and source_now() != run.plan["source_sha"]',
        "return False",
        "tests/test_run_stage.py::test_runs_are_of_the_code_that_they_were_planned_with",
    ),
    Mutant(
        "an answer that nobody has written",
        "notebooks/stage1_cpu.ipynb",
        "`gates_cpu`): after {none|num_iterations}",
        "`gates_cpu`) Not yet written. After {none|num_iterations}",
        "tests/test_notebooks.py::test_figures_in_an_answer_are_filled_in_not_typed",
    ),
]


def misplaced(root=ROOT):
    """A sentence for each mutant whose old text is not in its file exactly once."""
    counts = {mutant: (root / mutant.file).read_text().count(mutant.old) for mutant in MUTANTS}
    return [f"{m.name}: {n} times in {m.file}: {m.old}" for m, n in counts.items() if n != 1]


def run_tests(folder, tests, out):
    """Pytest on these tests in a copy, in this process, which ends; its output goes to a file."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(out.fileno(), stream)
    os.chdir(folder)
    paths = [str(folder), str(folder / "scripts")]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests.split()]))


def outcome(folder, tests):
    """(exit code of pytest, seconds, output) of tests in a copy, in a fork that has torch loaded.

    The seconds are those that processors worked, which others on the machine do not make more. The
    code is None where these are more than LIMIT, or no end is in sight.
    """
    began, code = time.perf_counter(), None
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if not child:
            run_tests(folder, tests, out)
        done = 0
        while not done:
            time.sleep(0.05)
            if time.perf_counter() - began > PATIENCE * LIMIT:
                os.killpg(child, signal.SIGKILL)
            done, status, usage = os.wait4(child, os.WNOHANG)
        seconds = usage.ru_utime + usage.ru_stime
        if seconds <= LIMIT and not os.WIFSIGNALED(status):
            code = os.waitstatus_to_exitcode(status)
        out.seek(0)
        return code, seconds, out.read()


def verdict(code):
    """What an exit code of pytest says of a mutant."""
    return {1: "killed", 0: "survived", None: "too slow"}.get(code, "not run")


def mutated(folder, mutant):
    """The outcome of a mutant's tests in a copy that has its line, which is then as it was."""
    path = folder / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    compiled = path.parent / "__pycache__"  # it may be of the same second and size
    shutil.rmtree(compiled, ignore_errors=True)
    try:
        return outcome(folder, mutant.tests)
    finally:
        path.write_text(text)
        shutil.rmtree(compiled, ignore_errors=True)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="WORDS", help="mutants with these in name, file or tests")
    args = parser.parse_args(argv)
    if misplaced():
        print("\n".join(misplaced()), file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    mutants = [m for m in MUTANTS if (args.only or "") in f"{m.name} {m.file} {m.tests}"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for tests in dict.fromkeys(mutant.tests for mutant in mutants):
            code, seconds, out = outcome(folder, tests)
            if code != 0:
                print(f"{tests}: fails without any change ({seconds:.1f} s)\n{out[-3000:]}")
                return 2
        print("| wrong line | file | tests | outcome | s |\n|-|-|-|-|-|")
        alive = 0
        for mutant in mutants:
            code, seconds, out = mutated(folder, mutant)
            alive += code != 1
            cells = [mutant.name, mutant.file, mutant.tests, verdict(code), f"{seconds:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
            if code not in (0, 1, None):
                print(out[-2000:], file=sys.stderr)
    print(f"{len(mutants) - alive} of {len(mutants)} killed")
    return 1 if alive else 0


if __name__ == "__main__":
    # What every test loads: once here, not in every process.
    import pandas  # noqa: F401
    import pytest
    import scipy.stats  # noqa: F401
    import torch
    import torch._dynamo
    import torch.distributed.checkpoint  # noqa: F401

    sys.exit(main())
