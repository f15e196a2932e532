"""GRPO against plain loops in float64: advantages, losses, gradients of a step however split."""

import contextlib
import dataclasses
import itertools
import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import run_ranks
from scipy import stats
from test_model import trained_a_little
from test_rollouts import lesson_of, policy_of

import grpo
import train_gpt
import train_rl
from grpo import ADVANTAGES, LOSSES
from harness.ranks import Ranks
from rollouts import Batch, Rollouts
from train_gpt import LossScale, ShardLoader, State, StepStats

LOW, HIGH, KL = 0.2, 0.28, 0.3
MOST = 9  # tokens of an answer; none below has so many
NAN = math.nan


########################################
#              Advantages              #
########################################


def advantages_of(rewards, name):
    """Of the rewards of a group, by the standard library: 0 for nan, and where all are equal."""
    known = [reward for reward in rewards if not math.isnan(reward)]
    if len({*known}) < 2:
        return [0.0 for _ in rewards]
    scale = statistics.stdev(known) + 1e-4 if name == "group" else 1
    mean = statistics.fmean(known)
    return [0.0 if math.isnan(reward) else (reward - mean) / scale for reward in rewards]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_are_those_of_the_standard_library(name):
    rng = np.random.default_rng(0)
    groups = rng.choice([0, 0.25, 1, NAN], (50, 5)).tolist()
    groups += [[1, 0, 0, 0, 0], [1, NAN, NAN, NAN, 0], [NAN, 1, NAN, NAN, NAN], [NAN] * 5]
    found = ADVANTAGES[name](torch.tensor(groups, dtype=torch.float64))
    wanted = torch.tensor([advantages_of(group, name) for group in groups], dtype=torch.float64)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert (wanted != 0).sum() > 100


@pytest.mark.parametrize("name", ADVANTAGES)
def test_equal_rewards_and_groups_of_one_have_no_advantage(name):
    """Exactly: a mean of seven times 0.1 is not 0.1 in float32."""
    same = torch.full((3, 7), 0.1)
    assert same[0].sum() / 7 != same[0, 0]
    same[1, 3:] = NAN
    for rewards in (same, same.double(), torch.rand(4, 1), torch.full((2, 3), NAN)):
        found = ADVANTAGES[name](rewards)
        assert torch.equal(found, torch.zeros_like(found))
        assert not grpo.has_signal(rewards).any()
    mixed = torch.tensor([[0, 1, NAN], [1, 1, NAN], [NAN, 0, NAN]])
    assert grpo.has_signal(mixed).tolist() == [True, False, False]


########################################
#                Losses                #
########################################


def token_loss(advantage, new, old, start):
    """The loss of one token, a float64 scalar."""
    ratio = (new - old).exp()
    limited = min(max(ratio, 1 - LOW), 1 + HIGH)
    gain = min(ratio * advantage, limited * advantage)
    divergence = (start - new).exp() - (start - new) - 1
    return KL * divergence - gain


def mean(values):
    return sum(values) / len(values)


# Of the losses of tokens of the answers of each group that count: groups[p][answer][token].
FORMULAS = {
    "dapo": lambda groups: mean([loss for group in groups for answer in group for loss in answer]),
    "grpo": lambda groups: mean([mean(answer) for group in groups for answer in group]),
    "dr_grpo": lambda groups: (
        sum(loss for group in groups for answer in group for loss in answer)
        / (sum(len(group) for group in groups) * MOST)
    ),
    "bnpo": lambda groups: mean(
        [mean([loss for answer in group for loss in answer]) for group in groups if group]
    ),
}


def loss_of_step(name, advantages, rewards, logprobs):
    """The loss of a step as a plain loop. logprobs[p][g]: (new, old, start), (n,) float64 each."""
    groups = []
    for p, group in enumerate(rewards):
        answers = []
        for g, reward in enumerate(group):
            if not math.isnan(reward):
                tokens = zip(*logprobs[p][g])
                answers.append([token_loss(advantages[p][g], *token) for token in tokens])
        groups.append(answers)
    return FORMULAS[name](groups)


REWARDS = [[1.0, 0.0, 0.0], [NAN, 1.0, 0.5], [0.25, 0.25, 0.25], [NAN, NAN, NAN]]
LENGTHS = [[6, 1, 3], [5, 7, 4], [2, 4, 1], [1, 3, 2]]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_the_loss_of_a_step_and_its_gradient(loss, advantage):
    """Ratios on both sides of both clips, with both signs; derivatives by finite differences."""
    rng = np.random.default_rng(0)
    logprobs = [
        [torch.tensor(rng.normal(-1, 0.8, (3, n))).unbind() for n in lengths] for lengths in LENGTHS
    ]
    of_answers = list(itertools.chain(*logprobs))
    new, old, start = (torch.cat(parts) for parts in zip(*of_answers))
    advantages = [advantages_of(group, advantage) for group in REWARDS]

    def by_loop():
        return loss_of_step(loss, advantages, REWARDS, logprobs)

    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    counted = torch.tensor(LENGTHS, dtype=torch.float64) * ~rewards.isnan()
    lengths = torch.tensor(LENGTHS).flatten()
    weight = LOSSES[loss](counted, MOST).flatten().repeat_interleave(lengths)
    of_token = ADVANTAGES[advantage](rewards).flatten().repeat_interleave(lengths)
    new.requires_grad_()
    losses, clipped = grpo.policy_loss(new, old, of_token, LOW, HIGH)
    total = ((losses + KL * grpo.kl_estimate(new, start)) * weight).sum()
    total.backward()
    assert total.item() == pytest.approx(by_loop().item(), rel=1e-12)

    sides = [(clipped & (of_token > 0)).sum(), (clipped & (of_token < 0)).sum()]
    ratio = (new - old).exp()
    too_far = torch.where(of_token > 0, ratio > 1 + HIGH, ratio < 1 - LOW) & (of_token != 0)
    assert min(sides) > 1 and torch.equal(clipped, too_far)
    kept = (of_token != 0) & ~clipped & ((ratio < 1 - LOW) | (ratio > 1 + HIGH))
    assert kept.sum() > 1  # beyond a clip, but on the side where it would lose

    step, at = 1e-6, 0
    for own, *_ in of_answers:
        for i in range(len(own)):
            own[i] += step
            above = by_loop()
            own[i] -= 2 * step
            slope = (above - by_loop()) / (2 * step)
            own[i] += step
            assert new.grad[at].item() == pytest.approx(slope.item(), abs=1e-8)
            at += 1
    is_unscored = rewards.isnan().flatten().repeat_interleave(lengths)
    assert (new.grad[is_unscored] == 0).all() and (new.grad[~is_unscored] != 0).sum() > 10


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_without_any_answer_are_zeros(loss):
    assert torch.equal(LOSSES[loss](torch.zeros(2, 3), MOST), torch.zeros(2, 3).double())


def test_the_estimate_of_the_divergence_is_right_in_the_mean():
    """Of two distributions, in closed form; never negative, and 0 for the same."""
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    new, start = logits.log_softmax(-1)
    estimate = grpo.kl_estimate(new, start)
    wanted = torch.nn.functional.kl_div(start, new, log_target=True, reduction="sum")
    assert (new.exp() * estimate).sum().item() == pytest.approx(wanted.item(), rel=1e-12)
    assert (estimate >= 0).all()
    assert torch.equal(grpo.kl_estimate(new, new), torch.zeros_like(new))


########################################
#               Of a step              #
########################################

PROMPTS = [[1, 2, 3], [4], [5, 6]]
SCORED = [[1.0, 0.0, 0.0], [NAN, 1.0, 0.5], [0.25, 0.25, 0.25]]


def step_of(lesson, rank=0, world=1, rewards=SCORED, rows=None):
    """Nine answers of random tokens to three prompts, and of these a rank's."""
    rng = np.random.default_rng(0)
    lengths = [n for group in LENGTHS[:3] for n in group]
    answers = [rng.integers(0, lesson.tokenizer.vocab_size, n).tolist() for n in lengths]
    if rows is None:
        rows = np.array_split(np.arange(9), world)[rank].tolist()
    prompts = [PROMPTS[row // 3] for row in rows]
    batch = Batch.of(prompts, [answers[row] for row in rows], lesson.end, "cpu")
    rewards = torch.tensor(rewards, dtype=torch.float64)
    lengths = torch.tensor(lengths, dtype=torch.float64).view(3, 3)
    ended = torch.zeros(3, 3, dtype=torch.float64)
    return Rollouts(["", "", ""], rows, batch, rewards, ended, ended, lengths), answers


def grpo_lesson(**options):
    small = {"prompts_per_step": 3, "group_size": 3, "max_new_tokens": MOST, "updates_per_step": 2}
    clips = {"clip_low": LOW, "clip_high": HIGH, "kl": KL, "temperature": 0.7}
    return lesson_of(**small | clips | options)


def learner_of(lesson):
    """A policy, without optimizers, and another one for the start."""
    model, start = policy_of(lesson).requires_grad_(True), moved(policy_of(lesson), 5)
    state = State(model, [], LossScale(torch.float32, "cpu"))
    return train_rl.Learner(state, start, train_rl.Progress(3))


@torch.no_grad()
def moved(model, seed):
    """The model after an update that is a random one."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture
def updates(monkeypatch):
    """(loss, gradient) of each update, summed over the ranks; what is made of it is random."""
    seen = []

    def update(state, cfg, loss, routing):
        gradient, loss = gradient_of(state.model), loss.clone()
        dist.all_reduce(gradient)
        dist.all_reduce(loss)
        seen.append((loss, gradient))
        state.model.zero_grad()
        moved(state.model, 1)
        return StepStats(loss, torch.tensor(1.0), routing), torch.tensor(0.0)

    monkeypatch.setattr(train_gpt, "update", update)
    return seen


def step_by_loop(lesson, answers):
    """[(loss, gradient)] of two updates on the same answers, by a model in float64."""
    cfg, size = lesson.cfg, lesson.tokenizer.vocab_size

    def logprobs(model, row):
        prompt, answer = PROMPTS[row // 3], answers[row]
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1, :size]
        return (logits.double() / cfg.temperature).log_softmax(-1)[range(len(answer)), answer]

    def in_double():
        model = trained_a_little(cfg, torch.float64).eval().double()
        model.load_state_dict(policy_of(lesson).state_dict())
        return model

    model, start, old = in_double(), moved(in_double(), 5), in_double()
    advantages = [advantages_of(group, cfg.advantage) for group in SCORED]
    found = []
    for _ in range(2):
        table = [
            [
                [logprobs(model, row), logprobs(old, row).detach(), logprobs(start, row).detach()]
                for row in range(3 * p, 3 * p + 3)
            ]
            for p in range(3)
        ]
        loss = loss_of_step(cfg.loss, advantages, SCORED, table)
        loss.backward()
        found.append((loss.detach(), gradient_of(model)))
        model.zero_grad()
        moved(model, 1)
    return found


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_a_loop_however_a_step_is_split(updates, loss):
    """Nine answers, one of them unscored, in micro-batches of 9, 4 and 2 and on two ranks."""
    lesson = grpo_lesson(loss=loss)
    wanted = step_by_loop(lesson, step_of(lesson)[1])
    norms = [gradient.norm() for _, gradient in wanted]
    assert (wanted[0][1] - wanted[1][1]).norm() > 0.05 * norms[0]  # ratios have a say
    figures = []
    for micro, world in ((9, 1), (4, 1), (2, 1), (2, 2)):
        split = grpo_lesson(loss=loss, device_batch_size=micro)

        def work(ranks, split=split):
            mine, _ = step_of(split, ranks.rank, ranks.world_size)
            run = SimpleNamespace(step=0)
            return train_rl.improve(learner_of(split), split, mine, run), updates

        for measured, seen in run_ranks(world, work):
            figures.append(measured)
            assert len(seen) == 2
            for (loss_of, gradient), (wanted_loss, wanted_gradient) in zip(seen, wanted):
                assert loss_of.item() == pytest.approx(wanted_loss.item(), rel=1e-5, abs=1e-6)
                assert (gradient - wanted_gradient).norm() < 1e-4 * wanted_gradient.norm()
    for measured in figures[1:]:
        assert measured == pytest.approx(figures[0], rel=1e-5)
    assert 0 < figures[0]["clip_fraction"] < 1


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_not_scored_has_no_gradient_and_no_place(group, updates, loss):
    """Exactly 0 on a rank that has nothing else; and the others' do not depend on its tokens."""
    lesson = grpo_lesson(loss=loss)
    run = SimpleNamespace(step=0)
    figures = train_rl.improve(learner_of(lesson), lesson, step_of(lesson, rows=[3])[0], run)
    assert len(updates) == 2
    for _, gradient in updates:
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["clip_fraction"] == figures["kl_to_start"] == figures["entropy"] == 0

    updates.clear()
    rollouts, _ = step_of(lesson)
    others = [row for row in range(9) if row != 3]
    train_rl.improve(learner_of(lesson), lesson, rollouts, run)
    train_rl.improve(learner_of(lesson), lesson, step_of(lesson, rows=others)[0], run)
    for (_, with_it), (_, without) in zip(updates[:2], updates[2:]):
        assert (with_it - without).norm() < 1e-5 * without.norm()


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_where_nothing_is_scored_nothing_changes(group, monkeypatch, kl):
    """Nor by the moments that an update before has left."""
    lesson = grpo_lesson(kl=kl, lr=0.01)
    learner = learner_of(lesson)
    ranks = Ranks(0, 0, 1, 1)
    learner.state.optimizers = train_gpt.build_optimizers(learner.state.model, lesson.cfg, ranks)
    run = SimpleNamespace(step=0, ranks=ranks, print=lambda line: None)
    weights = []
    for rewards in (SCORED, [[NAN] * 3] * 3):
        rollouts, _ = step_of(lesson, rewards=rewards)
        monkeypatch.setattr(train_rl, "roll_out", lambda *args, of_step=rollouts: of_step)
        train_rl.take_step(learner, lesson, run)
        weights.append([p.detach().clone() for p in learner.state.model.parameters()])
        run.step += 1
    fresh = policy_of(lesson)
    assert not all(map(torch.equal, weights[0], fresh.parameters()))
    assert all(map(torch.equal, weights[0], weights[1]))
    figures = learner.progress.last
    assert figures["unscored"] == 9 and figures["no_signal"] == 1
    assert all(math.isfinite(value) for value in figures.values())
    assert learner.progress.silent == 1


def test_what_is_rewarded_becomes_likelier(group, updates):
    """A small step against the gradient: the right answer up, the wrong one down."""
    lesson = grpo_lesson(kl=0.0, updates_per_step=1)
    rewards = [[1.0, 0.0, 0.5]] * 3
    rollouts, _ = step_of(lesson, rewards=rewards)
    learner = learner_of(lesson)
    train_rl.improve(learner, lesson, rollouts, SimpleNamespace(step=0))

    def logprobs(model):
        drawn_by = lesson.cfg.temperature, lesson.tokenizer.vocab_size
        logp, *_ = train_rl.token_logprobs(model, rollouts.batch, *drawn_by)
        of_answer = rollouts.batch.is_answer[:, 1:].nonzero()[:, 0]
        return torch.zeros(9).index_add(0, of_answer, logp.detach()).view(3, 3)

    model, (_, gradient) = policy_of(lesson), updates[0]
    before = logprobs(model)
    sizes = [p.numel() for p in model.parameters()]
    for p, own in zip(model.parameters(), gradient.split(sizes)):
        p.sub_(1e-4 * own.view_as(p))
    change = (logprobs(model) - before).sum(0)
    assert change[0] > 1e-5 and change[1] < -1e-5


@pytest.mark.parametrize("micro", [9, 2])
def test_updates_begin_with_a_ratio_of_one(group, monkeypatch, micro):
    """To the bit; the second update knows by what the answers were drawn."""
    lesson = grpo_lesson(device_batch_size=micro, lr=0.05)
    learner, seen = learner_of(lesson), []
    ranks = Ranks(0, 0, 1, 1)
    learner.state.optimizers = train_gpt.build_optimizers(learner.state.model, lesson.cfg, ranks)
    original = grpo.policy_loss

    def noted(logp, old_logp, *args):
        seen.append((logp.detach().clone(), old_logp.clone()))
        return original(logp, old_logp, *args)

    monkeypatch.setattr(grpo, "policy_loss", noted)
    train_rl.improve(learner, lesson, step_of(lesson)[0], SimpleNamespace(step=0))
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for (logp, old), (later, same_old) in zip(first, second):
        assert torch.equal(logp, old) and torch.equal(old, same_old)
        assert not torch.allclose(later, old, atol=1e-3)


@pytest.mark.parametrize("warm_up_steps", [0, 2])
def test_the_policy_that_learns_is_the_one_that_draws(group, shards, warm_up_steps):
    """Dropout does not come in, neither after a warm-up nor after a validation."""
    options = {"dropout": 0.5, "warm_up_steps": warm_up_steps, "warm_up_until": 1.0, "held_out": 3}
    options |= {"num_iterations": 2, "sequence_length": 16, "input_val_bin": ""}
    lesson = grpo_lesson(**options)
    run = SimpleNamespace(
        cfg=lesson.cfg,
        first_step=0,
        meter=SimpleNamespace(seconds={}),
        poll=lambda step: None,
        print=lambda line: None,
        ranks=Ranks(0, 0, 1, 1),
        restore=lambda tensors: None,
        save=lambda *args: None,
        status=None,
        step=0,
        timed=lambda name: contextlib.nullcontext(),
    )
    cfg = dataclasses.replace(lesson.cfg, input_val_bin=shards["input_val_bin"])
    loader = ShardLoader(cfg.input_val_bin, cfg, limit=cfg.val_tokens)
    start = train_rl.Start(lesson, None, loader, lesson.cfg)
    learner = train_rl.begin(start, run)
    assert not learner.start.training
    batch = step_of(lesson)[0].batch
    drawn_by = lesson.cfg.temperature, lesson.tokenizer.vocab_size
    for thoroughly in (False, True):
        assert not any(module.training for module in learner.state.model.modules())
        ours, theirs = (
            train_rl.token_logprobs(model, batch, *drawn_by)[0].detach()
            for model in (learner.state.model, learner.start)
        )
        assert torch.equal(ours, theirs)
        train_rl.validate(learner, start, run, thoroughly)
    assert not any(module.training for module in learner.state.model.modules())


########################################
#               Figures                #
########################################


def test_pass_at_k_is_the_mean_over_all_choices():
    for n in range(1, 8):
        for right in range(n + 1):
            answers = [True] * right + [False] * (n - right)
            for k in range(1, n + 1):
                chosen = [any(some) for some in itertools.combinations(answers, k)]
                wanted = sum(chosen) / len(chosen)
                assert grpo.pass_at_k(n, right, k) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("n", [1, 7, 40, 512])
def test_wilson_is_that_of_scipy(n):
    for right in sorted({0, 1, n // 3, n - 1, n}):
        interval = stats.binomtest(right, n).proportion_ci(method="wilson")
        found = grpo.wilson(right / n, n)
        assert found == pytest.approx((interval.low, interval.high), abs=1e-6)
        assert 0 <= found[0] <= right / n + 1e-12 and right / n - 1e-12 <= found[1] <= 1
    assert all(map(math.isnan, grpo.wilson(NAN, 0)))
