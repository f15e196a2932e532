"""What other programs rely on: names, columns, exit codes and the errors that lead to them. Needs no torch."""

RUN_ID_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"


class ConfigError(ValueError):
    """A setting that cannot be used: says which, its value, the choices and what to do."""

    status = "config"


class DataError(ValueError):
    """Data that cannot be trained on: says which file, what was expected, what was found and what to do."""

    status = "data"


class Diverged(ArithmeticError):
    """The loss is no longer a finite number."""

    status = "diverged"


CURVE = (
    "step tokens epoch train_loss val_loss lr grad_norm train_time tokens_per_sec data_wait".split()
)


EXIT_CODES = {
    "ok": 0,
    "stopped": 0,
    "preempted": 0,
    "crash": 1,
    "config": 2,
    "data": 3,
    "diverged": 4,
    "oom": 5,
}
