"""Tasks whose answers can be checked by a program: prompts, right answers, rewards, the split.

    abc:    ->  abc     copy
    abc>    ->  cba     reverse
    3+5=    ->  8       arithmetic

A task of your own is a subclass of Task with three methods, prompt, answer and key, and an entry in
TASKS; what reverses, sorts or changes a string needs one method and a mark. What a model writes is
compared, and never run.
"""

import hashlib
import math
import string
from typing import NamedTuple

import numpy as np

HELD_OUT = 0.2  # of all keys
SHAPED = 0.5  # most that an answer which is not right may earn by the beginning of the right one


class Task:
    """What all tasks share. `characters` are all that its prompts and answers may have."""

    characters = ""
    usual_length = 1  # where --length does not say
    longest = 2**20

    def __init__(self, operators: str = "+-*"):
        self.operators = operators

    def prompt(self, rng: np.random.Generator, length: int) -> str:
        """A prompt of this difficulty; the same for the same state of rng."""
        raise NotImplementedError

    def answer(self, prompt: str) -> str:
        """The right answer, without the end token."""
        raise NotImplementedError

    def key(self, prompt: str) -> str:
        """Prompts of one key are held out together."""
        raise NotImplementedError

    def reward(self, prompt: str, text: str) -> float | None:
        """1 for what is right; None, as an exception, says that this cannot be judged."""
        return float(text == self.answer(prompt))


class Strings(Task):
    """Base of the tasks that turn a string of `length` letters before a mark into another."""

    mark = ""
    usual_length = 5

    @property
    def characters(self) -> str:
        return string.ascii_lowercase + self.mark

    def prompt(self, rng: np.random.Generator, length: int) -> str:
        letters = rng.integers(len(string.ascii_lowercase), size=length)
        return "".join(string.ascii_lowercase[i] for i in letters) + self.mark

    def key(self, prompt: str) -> str:
        """The letters: a string that is held out of copy is held out of reverse too."""
        return prompt[:-1]


class Copy(Strings):
    """abc: -> abc"""

    mark = ":"

    def answer(self, prompt: str) -> str:
        return prompt[:-1]


class Reverse(Strings):
    """abc> -> cba"""

    mark = ">"

    def answer(self, prompt: str) -> str:
        return prompt[-2::-1]


class Arithmetic(Task):
    """3+5= -> 8, with numbers of up to `length` digits and one of the operators."""

    longest = 18  # numbers are drawn as 64 bits

    operations = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
    }

    @property
    def characters(self) -> str:
        return string.digits + self.operators + "="  # negative answers need the operator -

    def prompt(self, rng: np.random.Generator, length: int) -> str:
        a, b = rng.integers(10**length, size=2)
        return f"{a}{self.operators[rng.integers(len(self.operators))]}{b}="

    def parts(self, prompt: str) -> tuple[int, str, int]:
        """3+5= as 3, +, 5."""
        at = next(i for i, character in enumerate(prompt) if character in self.operations)
        return int(prompt[:at]), prompt[at], int(prompt[at + 1 : -1])

    def answer(self, prompt: str) -> str:
        a, operator, b = self.parts(prompt)
        return str(self.operations[operator](a, b))

    def key(self, prompt: str) -> str:
        """a+b and b+a have one: who has seen the one knows the other."""
        a, operator, b = self.parts(prompt)
        return f"{min(a, b)}{operator}{max(a, b)}"


TASKS = {"copy": Copy, "reverse": Reverse, "arithmetic": Arithmetic}


def is_held_out(task: Task, prompt: str) -> bool:
    """Whether a prompt belongs to the share of HELD_OUT, by the hash of its key alone."""
    digest = hashlib.sha256(task.key(prompt).encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def training_prompt(task: Task, rng: np.random.Generator, length: int) -> str:
    """A prompt that is not held out. Raises ValueError where there seems to be none."""
    for _ in range(1000):
        prompt = task.prompt(rng, length)
        if not is_held_out(task, prompt):
            return prompt
    raise ValueError(f"all of 1000 prompts of length {length} are held out")


def held_out_prompts(task: Task, length: int, count: int) -> list[str]:
    """Up to `count` different prompts that are held out, the same ones for every seed.

    Fewer where a task has no more of this length: 100 times as many are drawn at most.
    """
    rng = np.random.default_rng(0)
    found: dict[str, None] = {}
    for _ in range(100 * count):
        prompt = task.prompt(rng, length)
        if is_held_out(task, prompt):
            found[prompt] = None
        if len(found) == count:
            break
    return list(found)


########################################
#               Rewards                #
########################################


class Score(NamedTuple):
    """What an answer earns."""

    reward: float  # nan: it cannot be judged
    exact: float  # 1 for a right answer with its end token, else 0; nan likewise


def exact_reward(task: Task, prompt: str, text: str, ended: bool) -> Score:
    """What the task gives an answer that has ended, 1 for a right one; 0 for one that has not."""
    if not ended:
        return Score(0.0, 0.0)
    try:
        reward = task.reward(prompt, text)
        is_judged = reward is not None and math.isfinite(reward)
    except Exception:
        is_judged = False  # of a task that somebody wrote: it costs this answer, not the run
    if not is_judged:
        return Score(math.nan, math.nan)
    return Score(float(reward), float(reward == 1))


def prefix_reward(task: Task, prompt: str, text: str, ended: bool) -> Score:
    """exact_reward, or where that is 0 a share of SHAPED for the beginning that is right.

    What goes on after a right answer has all its characters right, but not the end.
    """
    score = exact_reward(task, prompt, text, ended)
    if score.reward != 0:
        return score
    answer = task.answer(prompt)
    right = 0
    for ours, theirs in zip(text, answer):
        if ours != theirs:
            break
        right += 1
    return Score(SHAPED * right / (len(answer) + 1), score.exact)


REWARDS = {"none": exact_reward, "prefix": prefix_reward}
