"""Answers that a model draws: by which chances, on which rank, and how probable they were."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY, run_ranks
from scipy import stats
from test_model import trained_a_little

import rollouts
import tokenization
from rl_settings import RLConfig
from rl_tasks import REWARDS, TASKS, Score
from rollouts import ANSWER, Batch, answer_held_out, chances_of, draw_answers, make_lesson
from rollouts import roll_out, step_prompt, token_logprobs
from ops.generation import next_logits
from train_gpt import axes

POLICIES = [{"mixer": choice} for choice in axes()["mixer"]]
POLICIES += [
    {"ffn": "moe"},
    {"ffn": "moe", "recurrence": "shared", "n_layer": 4, "norm": "rms_gain", "per_visit": "norm"},
    {"mixer": ",".join(axes()["mixer"]), "n_layer": len(axes()["mixer"])},
    {"pos": "learned", "tie_embeddings": False},
]


def lesson_of(**options):
    """A lesson for tiny models, which have room for more tokens than its vocabulary has."""
    small = {"length": 3, "prompts_per_step": 2, "group_size": 4, "held_out": 20}
    cfg = RLConfig(**TINY | small | options)
    characters = {character for task in TASKS.values() for character in task().characters}
    tokenizer = tokenization.from_chars(characters, has_eot=True)
    assert tokenizer.vocab_size < cfg.vocab_size
    return make_lesson(cfg, tokenizer, cfg.sequence_length)


def policy_of(lesson, seed=0):
    """A model in eval mode that has seen no token beyond the vocabulary, but would like to."""
    torch.manual_seed(seed)
    model = trained_a_little(lesson.cfg).eval().requires_grad_(False)
    head = model.embed if model.head is None else model.head
    head[lesson.tokenizer.vocab_size :] *= 10
    return model


def logprobs_by_decoding(model, prompt, answer, temperature, size):
    """Of each token of an answer, (n,) float64, by a cache that grows token by token."""
    cache = model.new_cache(1, len(prompt) + len(answer))
    logits, found = next_logits(model, [prompt], cache), []
    for token in answer:
        scores = logits[0, :size].double() / temperature
        found.append(scores[token] - scores.logsumexp(0))
        logits = next_logits(model, [[token]], cache)
    return torch.stack(found)


########################################
#               Answers                #
########################################


@pytest.mark.parametrize("variant", POLICIES, ids=str)
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_log_probabilities_are_those_of_decoding(variant, temperature):
    """Token by token, of prompts and answers of different lengths side by side."""
    lesson = lesson_of(temperature=temperature, max_new_tokens=7, **variant)
    model, size = policy_of(lesson), lesson.tokenizer.vocab_size
    prompts = [lesson.encode(text) for text in ("ab:", "c:", "3+5=", "xyzxyz>")]
    rows = [2, 0, 0, 1, 3, 3, 2, 1]
    chances = chances_of(lesson, *[(ANSWER, 0, 0, i) for i in range(len(rows))])
    answers = draw_answers(model, lesson, prompts, rows, chances)
    for i in (3, 2):  # the shortest prompts, for themselves
        own = draw_answers(model, lesson, [prompts[rows[i]]], [0], chances[i : i + 1])
        assert own == [answers[i]]
    answers[1] = [*answers[1][:2], lesson.end]
    batch = Batch.of([prompts[row] for row in rows], answers, lesson.end, "cpu")
    logp, entropy, _ = token_logprobs(model, batch, temperature, size)
    wanted = [
        logprobs_by_decoding(model, prompts[row], answer, temperature, size)
        for row, answer in zip(rows, answers)
    ]
    assert torch.allclose(logp.double(), torch.cat(wanted), atol=1e-4)
    assert logp.std() > 0.05 and (entropy > 0).all() and (entropy < math.log(size)).all()
    assert max(max(answer) for answer in answers) < size


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_answers_are_drawn_as_often_as_they_are_probable(temperature):
    """20,000 first tokens against the softmax of a full pass in float64, within five sigma."""
    lesson = lesson_of(temperature=temperature, max_new_tokens=1)
    model, draws = policy_of(lesson), 20_000
    prompt, size = lesson.encode("abc:"), lesson.tokenizer.vocab_size
    chances = chances_of(lesson, *[(ANSWER, 7, 1, i) for i in range(draws)])
    drawn = draw_answers(model, lesson, [prompt], [0] * draws, chances)
    counts = np.bincount([token for (token,) in drawn], minlength=size)
    logits = model(torch.tensor([prompt]))[0, -1, :size].double()
    p = (logits / temperature).softmax(-1).numpy()
    sigma = np.sqrt(p * (1 - p) / draws)
    assert (np.abs(counts / draws - p) < 5 * sigma).all() and counts.sum() == draws
    assert stats.chisquare(counts, p * draws).pvalue > 1e-4
    assert p.max() > 2 / size  # or all would be alike


def test_without_chances_the_likeliest_are_taken():
    lesson = lesson_of(max_new_tokens=6, temperature=5.0)
    model, size = policy_of(lesson), lesson.tokenizer.vocab_size
    prompts = [lesson.encode(text) for text in ("ab:", "3+5=")]
    answers = draw_answers(model, lesson, prompts, [1, 0], np.zeros((2, 0)))
    for prompt, answer in zip(reversed(prompts), answers):
        sequence = list(prompt)
        for token in answer:
            likeliest = model(torch.tensor([sequence]))[0, -1, :size].argmax().item()
            assert token == likeliest
            sequence.append(token)
        assert answer[-1] == lesson.end or len(answer) == 6


def test_an_answer_ends_with_its_end_token_or_has_the_most_tokens():
    lesson = lesson_of(max_new_tokens=6, temperature=4.0)  # so that any token comes
    chances = chances_of(lesson, *[(ANSWER, 0, 0, i) for i in range(600)])
    prompts = [lesson.encode("ab:")]
    answers = draw_answers(policy_of(lesson), lesson, prompts, [0] * 600, chances)
    assert {len(answer) for answer in answers} == {1, 2, 3, 4, 5, 6}
    for answer in answers:
        assert lesson.end not in answer[:-1]
        assert answer[-1] == lesson.end or len(answer) == 6
    assert any(answer[-1] != lesson.end for answer in answers)


def test_the_end_token_counts_and_padding_of_the_same_id_does_not():
    """Nor does an end token of the prompt."""
    end = 9
    prompts = [[1, 2], [3], [end, 4, 5], [6]]
    answers = [[7, end], [8, 8, 8, 8], [end], [7, 7, end]]
    batch = Batch.of(prompts, answers, end, "cpu")
    assert batch.tokens.tolist() == [
        [1, 2, 7, end, end],
        [3, 8, 8, 8, 8],
        [end, 4, 5, end, end],
        [6, 7, 7, end, end],
    ]
    assert batch.is_answer.int().tolist() == [
        [0, 0, 1, 1, 0],
        [0, 1, 1, 1, 1],
        [0, 0, 0, 1, 0],
        [0, 1, 1, 1, 0],
    ]
    assert batch.rows(slice(1, 3)).is_answer.sum().item() == 5

    lesson = lesson_of()
    model = policy_of(lesson)
    logits = model(batch.tokens)[:, :, : lesson.tokenizer.vocab_size].log_softmax(-1)
    wanted = [
        logits[row, len(prompt) + i - 1, token]
        for row, (prompt, answer) in enumerate(zip(prompts, answers))
        for i, token in enumerate(answer)
    ]
    logp, *_ = token_logprobs(model, batch, 1.0, lesson.tokenizer.vocab_size)
    assert torch.allclose(logp, torch.stack(wanted), atol=1e-5)


########################################
#              Of a step               #
########################################


def rolled(lesson, step, rank=0, world=1):
    """What a rank rolls out, in tensors that can be sent."""
    return roll_out(policy_of(lesson), lesson, step, lesson.cfg.length, rank, world)


def texts_of(rolled_out):
    """[(prompt and answer without padding)] of the rows of a rank."""
    batch, found = rolled_out.batch, []
    for tokens, is_answer in zip(batch.tokens.tolist(), batch.is_answer.tolist()):
        last = len(is_answer) - is_answer[::-1].index(True)
        first = is_answer.index(True)
        assert all(is_answer[first:last])
        found.append((tokens[:first], tokens[first:last]))
    return found


def judged_by_letters(task, prompt, text, ended):
    """A reward that differs from answer to answer, and now and then is none."""
    number = sum(map(ord, text)) % 7
    return Score(number / 7 if number else math.nan, float(number > 3))


def test_the_same_answers_on_one_two_and_three_ranks(monkeypatch):
    """Two prompts of four answers, so that a rank of three begins within a group."""
    monkeypatch.setitem(REWARDS, "none", judged_by_letters)
    lesson = lesson_of(max_new_tokens=5)

    def work(ranks):
        return rolled(lesson, 3, ranks.rank, ranks.world_size)

    (alone,) = run_ranks(1, work)
    assert alone.rewards.shape == (2, 4) and alone.rewards.unique().numel() > 3
    wanted = texts_of(alone)
    assert len({tuple(answer) for _, answer in wanted}) > 4
    for world in (2, 3):
        by_rank = run_ranks(world, work)
        assert [text for part in by_rank for text in texts_of(part)] == wanted
        assert [row for part in by_rank for row in part.rows] == list(range(8))
        for part in by_rank:
            assert part.prompts == alone.prompts
            for name in ("rewards", "exact", "ended", "lengths"):
                ours, theirs = getattr(part, name), getattr(alone, name)
                assert torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1)), name
    assert by_rank[1].rows == [3, 4, 5]


@pytest.mark.parametrize("P, G", [(2, 4), (3, 3), (1, 7)])
def test_no_answer_is_dropped_and_each_belongs_to_its_prompt(group, P, G):
    """Any number of ranks, one after the other in this process: sums over them are the whole."""
    lesson = lesson_of(prompts_per_step=P, group_size=G, max_new_tokens=4)
    whole = rolled(lesson, 0)
    for world in range(1, P * G + 1):
        parts = [rolled(lesson, 0, rank, world) for rank in range(world)]
        rows = [row for part in parts for row in part.rows]
        assert rows == list(range(P * G))
        assert torch.equal(sum(part.lengths for part in parts), whole.lengths)
        for part in parts:
            for row, (prompt, answer) in zip(part.rows, texts_of(part)):
                place = row // G
                assert prompt == lesson.encode(whole.prompts[place])
                assert len(answer) == part.lengths[place, row % G]
                assert part.ended[place, row % G] == (answer[-1] == lesson.end)
    assert len({*whole.prompts}) == P


def test_rewards_are_those_of_the_answers(group, monkeypatch):
    """In the place of the answer that earns them."""
    lesson = lesson_of(max_new_tokens=5, shaping="prefix", prompts_per_step=3, group_size=5)
    end = lesson.end

    def answers_of(model, lesson, prompts, rows, chances):
        kinds = []
        for row in rows:
            right = prompts[row][:-1]
            kinds.append([[*right, end], [*right, right[0], end], right, [right[0]], [end]])
        return [of_prompt[i % 5] for i, of_prompt in enumerate(kinds)]

    monkeypatch.setattr(rollouts, "draw_answers", answers_of)
    rolled_out = rolled(lesson, 0)
    wanted = torch.tensor([1, 0.5 * 3 / 4, 0.5 * 3 / 4, 0.5 / 4, 0], dtype=torch.float64)
    assert torch.equal(rolled_out.rewards, wanted.expand(3, 5))
    assert rolled_out.exact.tolist() == [[1, 0, 0, 0, 0]] * 3
    assert rolled_out.ended.tolist() == [[1, 1, 0, 0, 1]] * 3
    assert rolled_out.lengths.tolist() == [[4, 5, 3, 1, 1]] * 3


def test_steps_places_and_seeds_have_their_own_prompts(group):
    """And a step has the same ones whatever was drawn before, so that a run can go on."""
    lesson = lesson_of(prompts_per_step=5, group_size=2, max_new_tokens=3)
    steps = [rolled(lesson, step) for step in range(4)]
    prompts = [prompt for of_step in steps for prompt in of_step.prompts]
    assert len({*prompts}) == len(prompts)
    again = rolled(lesson, 3)
    assert again.prompts == steps[3].prompts and texts_of(again) == texts_of(steps[3])
    other = rolled(lesson_of(prompts_per_step=5, group_size=2, max_new_tokens=3, seed=5), 3)
    assert not {*other.prompts} & {*again.prompts}


def test_random_numbers_are_all_different():
    """Of steps, prompts, answers, purposes and seeds."""
    keys = [(kind, *rest) for kind in range(6) for rest in np.ndindex(4, 3, 5)]
    rows = [chances_of(lesson_of(seed=seed), *keys) for seed in (0, 1, 2)]
    numbers = np.concatenate(rows)
    assert numbers.shape == (3 * 6 * 60, lesson_of().most)
    assert len(np.unique(numbers)) == numbers.size
    assert 0 <= numbers.min() and numbers.max() < 1 and abs(numbers.mean() - 0.5) < 0.02


@pytest.mark.parametrize("task, length", [("copy", 2), ("reverse", 2), ("arithmetic", 1)])
def test_no_step_asks_what_is_held_out(task, length):
    """Of so few that most are seen; what is held out does not depend on the seed."""
    lesson = lesson_of(task=task, length=length, held_out=60)
    asked = {step_prompt(lesson, 16, step, i, length) for step in range(50) for i in range(10)}
    assert len(asked) > 150 and not asked & {*lesson.held_out}
    assert lesson_of(task=task, length=length, held_out=60, seed=9).held_out == lesson.held_out


@pytest.mark.parametrize("samples", [0, 3])
def test_every_held_out_prompt_is_answered_once_on_any_number_of_ranks(monkeypatch, samples):
    """However many answers are drawn at once."""
    lesson = lesson_of(max_new_tokens=4)
    model = policy_of(lesson)
    alone = answer_held_out(model, lesson, samples, 0, 1)
    assert [*alone] == list(range(20))
    assert {len(answers) for answers in alone.values()} == {max(1, samples)}
    monkeypatch.setattr(rollouts, "MOST_ROWS", 7)
    together = {}
    for rank in range(3):
        mine = answer_held_out(model, lesson, samples, rank, 3)
        assert not mine.keys() & together.keys()
        together |= mine
    assert together == alone
