"""Settings of reinforcement learning: those of the trainer, and the options of train_rl.py.

A field below is an option, group_size is --group-size, and a column of the row.
"""

import argparse
import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from grpo import ADVANTAGES, LOSSES
from store.contract import ConfigError
from rl_tasks import REWARDS, TASKS, Arithmetic
from train_gpt import Config

PRESET = "rl_tasks"  # where there is no checkpoint to start from
RATES = ("lr", "embed_lr", "head_lr", "muon_lr")
SLOWER = 0.1  # the learning rate with a checkpoint is this part of the one that trained it
OF_TRAINER = {"steps": "num_iterations", "lr": "lr", "seed": "seed"}  # options that are settings
OPTION_NAMES = {"from_checkpoint": "from"}  # where a field cannot have the option's name
HELP = {
    "steps": "NUM_ITERATIONS: steps, each of new answers to new prompts",
    "lr": "LR: learning rate of AdamW, MUON_LR and the others in proportion; 0 leaves all as it is",
    "seed": "SEED: of prompts and answers, and of the initialisation",
}


@dataclasses.dataclass(frozen=True)
class RLConfig(Config):
    """Every setting of a run of train_rl.py."""

    task: str = "copy"  # what is learned: scripts/rl_tasks.py
    length: int = 0  # letters of a string, most digits of a number; 0: 5 letters, 1 digit
    operators: str = "+-*"  # of arithmetic
    curriculum: bool = False  # begin with length 1, one more where nine in ten answers are right
    shaping: str = "none"  # prefix: answers that begin right earn something too, at most a half
    shuffle_rewards: bool = False  # a control: rewards go to answers by chance, nothing is learned
    from_checkpoint: str = ""  # run id, or folder of a run or of its checkpoint; blank: warm-up
    warm_up_steps: int = -1  # most supervised steps on right answers; -1: 2000, with --from none
    warm_up_lr: float = 0.0  # learning rate of the warm-up; 0: ten times LR, whatever --lr says
    warm_up_until: float = 0.05  # the warm-up ends where this part of sampled answers is right
    prompts_per_step: int = 32  # prompts of a step, over all ranks
    group_size: int = 16  # answers to each prompt
    updates_per_step: int = 1  # optimizer steps on the same answers
    temperature: float = 1.0  # of drawing answers, and of the probabilities that are trained
    max_new_tokens: int = 0  # of an answer, its end token counted; 0: two more than a right one
    advantage: str = "group"  # the reward minus its group's mean; group: over its sd as well
    loss: str = "dapo"  # how tokens are weighted: dapo all alike, grpo answers alike, see grpo.py
    clip_low: float = 0.2  # a ratio of probabilities below 1 - this is clipped
    clip_high: float = 0.28  # and one above 1 + this: DAPO, arXiv 2503.14476
    kl: float = 0.0  # weight of the divergence from the start
    held_out: int = 512  # prompts of a validation, none of which is trained on

    BOUNDS = {
        names: (0, high) if "lr" in names.split() else (low, high)
        for names, (low, high) in Config.BOUNDS.items()
    } | {
        "prompts_per_step group_size updates_per_step held_out": (1, 2**20),
        "warm_up_steps": (-1, 2**31),
        "length max_new_tokens": (0, 2**20),
        "warm_up_until": (0, 1),
        "temperature": (1e-3, 1e3),
        "clip_low": (0, 1),
        "clip_high": (0, 1e6),
        "kl": (0, 1e6),
        "warm_up_lr": (0, 1e30),
    }

    NOT_HASHED = [*Config.NOT_HASHED, "from_checkpoint"]  # the hash of its weights counts

    @classmethod
    def choices(cls):
        return Config.choices() | {
            "task": TASKS,
            "shaping": REWARDS,
            "advantage": ADVANTAGES,
            "loss": LOSSES,
        }

    def check(self):
        super().check()
        known = Arithmetic.operations
        if not self.operators or not set(self.operators) <= set(known):
            raise ConfigError(f"--operators {self.operators!r}: expected some of {''.join(known)}")
        longest = TASKS[self.task].longest
        if self.length > longest:
            raise ConfigError(
                f"--length {self.length}: --task {self.task} has prompts up to length {longest}"
            )

    def spelled(self, name: str) -> str:
        """A setting as a variable, an option as an option."""
        if name in OWN:
            return f"{option_of(name)} {getattr(self, name)}"
        return super().spelled(name)

    def options(self) -> dict:
        """The options that are no settings of the trainer: {field: value}."""
        return {name: value for name, value in vars(self).items() if name in OWN}

    def changes(self) -> dict:
        """The settings of the trainer that differ from their defaults."""
        changed = super().changes()
        return {name: value for name, value in changed.items() if name.lower() not in OWN}

    def changes_text(self) -> str:
        """All that differs from the defaults, as a command line has it."""
        words = [super().changes_text()]
        for name, value in self.options().items():
            if value is True:
                words.append(option_of(name))
            elif value != getattr(RLConfig, name):
                words += [option_of(name), shlex.quote(str(value))]
        return " ".join(words).strip()


OWN = [
    field.name
    for field in dataclasses.fields(RLConfig)
    if field.name not in Config.__dataclass_fields__
]


def option_of(name: str) -> str:
    """group_size as --group-size."""
    return "--" + OPTION_NAMES.get(name, name).replace("_", "-")


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option for each field of RLConfig's own, and for those settings that have one."""
    comments = dict(
        re.findall(r"^    (\w+): .*?  # (.*)$", Path(__file__).read_text(encoding="utf-8"), re.M)
    )
    for name, field in OF_TRAINER.items():
        kind = Config.__dataclass_fields__[field].type
        parser.add_argument(f"--{name}", dest=field, type=kind, metavar="N", help=HELP[name])
    for name in OWN:
        field = RLConfig.__dataclass_fields__[name]
        shown = {"help": f"{comments[name]} ({field.default})", "dest": name}
        if field.type is bool:
            shown |= {"action": "store_true", "help": comments[name]}
        elif name in RLConfig.choices():
            shown |= {"choices": list(RLConfig.choices()[name])}
        else:
            metavar = {int: "N", float: "X"}.get(field.type, "TEXT")
            shown |= {"type": field.type, "metavar": metavar}
        parser.add_argument(option_of(name), default=argparse.SUPPRESS, **shown)


def scaled_rates(cfg: Config, factor: float) -> Config:
    """With all learning rates times a factor; those that follow LR go on to follow it."""
    rates = {name: getattr(cfg, name) for name in RATES}
    return dataclasses.replace(
        cfg, **{name: rate * factor for name, rate in rates.items() if rate is not None}
    )


def with_options(cfg: Config, given: Mapping[str, object]) -> RLConfig:
    """Settings of the trainer and the options of a command line together. Raises ConfigError."""
    settings = {name: given.get(name) for name in OF_TRAINER.values()}
    options = {name: value for name, value in given.items() if name in OWN}
    rl = RLConfig(**vars(cfg) | options)
    changed = {name: value for name, value in settings.items() if value is not None}
    changed["length"] = rl.length or TASKS[rl.task].usual_length
    changed["warm_up_lr"] = rl.warm_up_lr or cfg.lr / SLOWER
    if "lr" in changed:
        rl = scaled_rates(rl, changed.pop("lr") / rl.lr)
    return dataclasses.replace(rl, **changed)


def supervised(cfg: Config, rl: RLConfig) -> RLConfig:
    """The settings of the warm-up: its rates are those of `cfg`, the trainer's settings, so that
    --lr 0 has the same warm-up as any other."""
    rates = {name: getattr(cfg, name) for name in RATES}
    rates = vars(scaled_rates(dataclasses.replace(rl, **rates), rl.warm_up_lr / cfg.lr))
    forever = {"num_iterations": 2**31, "warmup_iters": 0, "warmdown_iters": 0}
    forever["warmdown_frac"] = None
    return RLConfig(**rates | forever | {"lr_schedule": "trapezoid"})
