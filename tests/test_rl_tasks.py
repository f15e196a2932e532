"""Tasks of reinforcement learning: formats, right answers, what is held out, and rewards."""

import math
import re
import string

import numpy as np
import pytest

from rl_tasks import REWARDS, SHAPED, TASKS, Arithmetic, Task
from rl_tasks import exact_reward, held_out_prompts, prefix_reward, training_prompt

LETTERS = len(string.ascii_lowercase)


def drawn(task, count, length, seed=1):
    """Prompts as training draws them, one after the other."""
    rng = np.random.default_rng(seed)
    return [training_prompt(task, rng, length) for _ in range(count)]


@pytest.mark.parametrize(
    "task, prompt, answer",
    [
        ("copy", "abc:", "abc"),
        ("copy", "z:", "z"),
        ("reverse", "abc>", "cba"),
        ("reverse", "z>", "z"),
        ("arithmetic", "3+5=", "8"),
        ("arithmetic", "3-5=", "-2"),
        ("arithmetic", "12-7=", "5"),
        ("arithmetic", "12*30=", "360"),
        ("arithmetic", "0*9=", "0"),
    ],
)
def test_answers_are_those_of_the_documentation(task, prompt, answer):
    task = TASKS[task]()
    assert task.answer(prompt) == answer
    assert task.reward(prompt, answer) == 1
    assert task.reward(prompt, answer + "0") == task.reward(prompt, "") == 0


@pytest.mark.parametrize("length", [1, 2, 5])
def test_strings_have_their_length_and_all_letters(length):
    for name, mark in (("copy", ":"), ("reverse", ">")):
        prompts = drawn(TASKS[name](), 500, length)
        assert {len(prompt) for prompt in prompts} == {length + 1}
        assert {prompt[-1] for prompt in prompts} == {mark}
        assert {*"".join(prompts)} == {*string.ascii_lowercase, mark} if length > 1 else True


@pytest.mark.parametrize("operators", ["+", "-", "*", "+-*"])
@pytest.mark.parametrize("length", [1, 3])
def test_arithmetic_is_that_of_python(operators, length):
    prompts = drawn(Arithmetic(operators), 300, length)
    pattern = rf"\d{{1,{length}}}[{re.escape(operators)}]\d{{1,{length}}}="
    negative = 0
    for prompt in prompts:
        assert re.fullmatch(pattern, prompt)
        wanted = str(eval(prompt[:-1]))
        assert Arithmetic(operators).answer(prompt) == wanted
        negative += wanted[0] == "-"
    assert {c for prompt in prompts for c in prompt if c in "+-*"} == {*operators}
    assert (negative > 20) == ("-" in operators)


@pytest.mark.parametrize("operators", ["+", "-", "*", "+-*"])
@pytest.mark.parametrize("name", TASKS)
def test_characters_are_those_of_prompts_and_answers(name, operators):
    task = TASKS[name](operators)
    text = "".join(prompt + task.answer(prompt) for prompt in drawn(task, 300, 3))
    assert {*text} == {*task.characters}


########################################
#            What is held out          #
########################################


@pytest.mark.parametrize("name, length", [("copy", 2), ("reverse", 2), ("arithmetic", 1)])
def test_no_training_prompt_is_held_out(name, length):
    """Of spaces so small that 10,000 draws see all of them; and a+b goes with b+a."""
    task = TASKS[name]()
    trained = {*drawn(task, 10_000, length)}
    held_out = {*held_out_prompts(task, length, 200)}
    assert not trained & held_out
    everything = LETTERS**2 if length == 2 else 10 * 10 * 3
    assert 20 < len(held_out) < 200  # all that there are
    assert len(trained | held_out) == everything
    if name == "arithmetic":
        for prompt in trained:
            a, operator, b = prompt[0], prompt[1], prompt[2]
            assert b + operator + a + "=" not in held_out


@pytest.mark.parametrize("name, length", [("copy", 5), ("reverse", 3), ("arithmetic", 4)])
def test_a_fifth_is_held_out(name, length):
    """Of 10,000 prompts, hundreds of thousands of which there are, within five sigma."""
    task, rng = TASKS[name](), np.random.default_rng(3)
    prompts = {task.prompt(rng, length) for _ in range(10_000)}
    held_out = {*held_out_prompts(task, length, 20)}
    kept = {*drawn(task, 10_000, length, seed=3)}  # the same draws, less what is held out
    share = len(prompts - kept) / len(prompts)
    sigma = math.sqrt(0.2 * 0.8 / len(prompts))
    assert abs(share - 0.2) < 5 * sigma
    assert held_out and not held_out & kept


def test_copy_and_reverse_hold_out_the_same_strings():
    held_out = [{p[:-1] for p in held_out_prompts(TASKS[n](), 2, 200)} for n in ("copy", "reverse")]
    assert held_out[0] == held_out[1]
    assert 50 < len(held_out[0]) < 200


@pytest.mark.parametrize("name", TASKS)
def test_held_out_prompts_are_distinct_and_always_the_same(name):
    task = TASKS[name]()
    prompts = held_out_prompts(task, 4, 300)
    np.random.default_rng(5).random(3)
    np.random.seed(6)
    assert prompts == held_out_prompts(TASKS[name](), 4, 300)
    assert len({*prompts}) == len(prompts) == 300
    assert held_out_prompts(task, 4, 100) == prompts[:100]


def test_a_task_of_which_all_is_held_out_says_so():
    class OnePrompt(Task):
        def prompt(self, rng, length):
            return held_out_prompts(TASKS["copy"](), 3, 1)[0]

        def key(self, prompt):
            return prompt[:-1]

    with pytest.raises(ValueError, match="all of 1000 prompts of length 3 are held out"):
        training_prompt(OnePrompt(), np.random.default_rng(0), 3)


########################################
#               Rewards                #
########################################


@pytest.mark.parametrize("reward", REWARDS.values())
@pytest.mark.parametrize("name", TASKS)
def test_the_right_answer_earns_all_and_only_with_its_end(name, reward):
    task = TASKS[name]()
    for prompt in drawn(task, 50, 3):
        answer = task.answer(prompt)
        assert reward(task, prompt, answer, True) == (1, 1)
        cut = reward(task, prompt, answer, False)
        assert cut.exact == 0 and cut.reward < 1
        for text in (answer + answer, answer + " ", answer + "0", answer[:-1], " " + answer, ""):
            for ended in (True, False):
                score = reward(task, prompt, text, ended)
                assert score.exact == 0 and 0 <= score.reward <= SHAPED, (text, ended)


@pytest.mark.parametrize("name", TASKS)
def test_shaping_never_beats_a_right_answer(name):
    """Random strings that begin as the right one does, up to all of it and beyond."""
    task, rng = TASKS[name](), np.random.default_rng(0)
    characters, earned = [*task.characters], set()
    for prompt in drawn(task, 200, 4):
        answer = task.answer(prompt)
        for _ in range(10):
            begins = answer[: rng.integers(len(answer) + 1)]
            text = begins + "".join(rng.choice(characters, rng.integers(4)))
            ended = bool(rng.integers(2))
            score = prefix_reward(task, prompt, text, ended)
            if text == answer and ended:
                assert score == (1, 1)
                continue
            assert score.reward < 1 and score.exact == 0
            assert score.reward >= SHAPED * len(begins) / (len(answer) + 1)  # more is never less
            earned.add(score.reward)
    assert len(earned) > 4


def test_a_prefix_earns_its_share():
    task = TASKS["copy"]()
    texts = ["", "x", "xbc", "a", "ax", "axc", "ab", "abx", "abc", "abcx", "xabc", "abcabc"]
    right = [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 0, 3]
    for text, n in zip(texts, right):
        score = prefix_reward(task, "abc:", text, text != "abc")
        assert score.reward == pytest.approx(0.5 * n / 4, abs=1e-12)


@pytest.mark.parametrize("shape", REWARDS.values())
@pytest.mark.parametrize("judged", [None, math.nan, math.inf, -math.inf, "yes", "raises"])
def test_what_cannot_be_judged_is_unscored(judged, shape):
    """The task's own reward raises, or has no number."""

    class Broken(TASKS["copy"]):
        def reward(self, prompt, text):
            if judged == "raises":
                raise RuntimeError("no judge")
            return judged

    score = shape(Broken(), "abc:", "abc", True)
    assert math.isnan(score.reward) and math.isnan(score.exact)


def test_a_part_of_a_reward_is_not_an_exact_answer():
    class Half(TASKS["copy"]):
        def reward(self, prompt, text):
            return 0.25

    assert exact_reward(Half(), "abc:", "abd", True) == (0.25, 0)
    assert prefix_reward(Half(), "abc:", "abd", True) == (0.25, 0)
