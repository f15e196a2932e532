"""A trained model from what its run left, for scripts that use models.

CHECKPOINT of these scripts is a run id, a run's folder, or one of its step_<number> folders.
"""

import dataclasses
import difflib
import json
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

import tokenization
from harness.checkpoints import defect, step_folders
from store.contract import ConfigError, DataError
from rl_settings import OWN, RATES
from train_gpt import DTYPES, GPT, Config, Linear, MoE, resolve


class Trained(NamedTuple):
    """A model that is ready to use, and what belongs to it."""

    model: GPT  # in eval mode, on `device`
    cfg: Config  # the settings it was trained with, but device, dtype and compile
    tokenizer: tokenization.Tokenizer | None  # None where the folder has none that can be read
    folder: Path  # that it was read from
    device: torch.device


def find_folder(checkpoint: str, log_dir: str = "logs") -> Path:
    """The folder with the weights that a run id, a run's folder or a step's folder stands for.

    Of a run these are those of its end, else of its newest checkpoint that is whole. Raises
    ConfigError.
    """
    for path in (Path(checkpoint), Path(log_dir) / checkpoint):
        if path.is_file():
            raise ConfigError(f"{path} is a file; name the folder that it lies in")
        if (path / "model.safetensors").is_file() or (path / "run.json").is_file():
            return path
        for step in reversed(step_folders(path).values()):  # of a run that has not finished
            if not defect(step):
                return step
    raise ConfigError(
        f"{checkpoint}: expected a run id, a run's folder or one of its step_<number> folders, "
        f"found no weights there; {choices(checkpoint, Path(log_dir))}"
    )


def find_trusted(checkpoint: str, log_dir: str = "logs") -> Path:
    """What find_folder finds, for weights to be read from.

    Raises ConfigError for a checkpoint outside `log_dir` too, since it holds a pickle.
    """
    folder = find_folder(checkpoint, log_dir)
    is_safe = (folder / "model.safetensors").is_file()
    if is_safe or Path(log_dir).resolve() in folder.resolve().parents:
        return folder
    raise ConfigError(
        f"{folder} lies outside LOG_DIR={log_dir}, and from elsewhere only model.safetensors is "
        "read; if you trust it, name the folder of its runs as LOG_DIR, or by --log-dir"
    )


def choices(checkpoint: str, log_dir: Path) -> str:
    """What a user who named this may have meant, or else the newest runs that have weights."""
    folders = [path for path in log_dir.glob("*") if path.is_dir()]
    folders = [f for f in folders if step_folders(f) or (f / "model.safetensors").is_file()]
    runs = [path.name for path in sorted(folders, key=lambda path: path.stat().st_mtime)]
    near = [run for run in runs if run.startswith(checkpoint)][-5:]
    near = near or difflib.get_close_matches(checkpoint, runs)
    if near and checkpoint:
        return f"did you mean {' or '.join(near)}?"
    if not runs:
        return f"no run in {log_dir.absolute()} has any: --log-dir names another folder"
    return f"the newest runs that have some in {log_dir.absolute()}: {', '.join(runs[-5:])}"


def read_settings(folder: Path, device: str) -> Config:
    """The Config that the weights in a folder were trained with, resolved for a device.

    Raises ConfigError for settings that this train_gpt.py does not have.
    """
    try:
        if (folder / "config.json").is_file():
            values = json.loads((folder / "config.json").read_text("utf-8"))
        else:
            values = json.loads((folder / "run.json").read_text("utf-8"))["config"]
        kinds = {field.name: field.type for field in dataclasses.fields(Config)}
        # Options of train_rl.py say nothing of the model, nor do the rates of its control --lr 0,
        # which train_gpt.py does not have.
        left_out = {*OWN} | {name for name in RATES if values.get(name) == 0}
        values = {name: value for name, value in values.items() if name not in left_out}
        unknown = sorted(values.keys() - kinds)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{folder}: its settings cannot be read ({type(error).__name__}); copy config.json of "
            "the run into it"
        ) from None
    if unknown:
        raise ConfigError(
            f"{folder} is of another version of the trainer, with settings unknown to this one: "
            f"{', '.join(unknown)}; use it with the train_gpt.py in the run's log"
        )
    for name, value in values.items():
        is_whole_number = kinds[name] in (float, float | None) and isinstance(value, int)
        if not isinstance(value, kinds[name]) and not is_whole_number:
            raise ConfigError(
                f"{folder}: its settings have {name.upper()}={value!r:.50}, which cannot be; copy "
                "config.json of the run into it"
            )
    here = {"device": device, "dtype": "auto", "compile": "0", "dry_run": False}
    return resolve(Config(**values | here))


def as_environment(cfg: Config) -> dict[str, str]:
    """The variables that give this Config, whatever the preset says."""
    env = {}
    for name, value in vars(cfg).items():
        if value is None:
            env[name.upper()] = "auto" if name in Config.AUTO else "none"
        elif value != "":
            env[name.upper()] = str(int(value) if isinstance(value, bool) else value)
    return env


def read_weights(model: GPT, folder: Path) -> None:
    """Fills a model from a folder that find_folder has found. Raises ConfigError.

    Of a model on the meta device it is only known then that this can be done.
    """
    import torch.distributed.checkpoint as dcp
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    is_check = next(model.parameters()).is_meta
    try:
        if (folder / "model.safetensors").is_file():
            model.load_state_dict(load_file(folder / "model.safetensors"), assign=is_check)
            return
        problem = defect(folder)
        if problem:
            raise ConfigError(f"{folder} is damaged: {problem}; name another checkpoint")
        weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        if is_check:
            weights = {n: torch.empty_like(t, device="cpu") for n, t in weights.items()}
        with warnings.catch_warnings(action="ignore"):  # that this process is alone
            dcp.load(weights, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    except (OSError, SafetensorError, RuntimeError, dcp.CheckpointException) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{folder} does not hold the weights of this train_gpt.py's model: {reason}; use it "
            "with the train_gpt.py in the run's log"
        ) from None


def cast_weights(model: GPT, dtype: torch.dtype) -> None:
    """Casts the weights of products once, as every product would: the same numbers, sooner."""
    in_float32 = {module.router for module in model.modules() if isinstance(module, MoE)}
    for module in model.modules():
        if isinstance(module, Linear) and module not in in_float32:
            module.weight.data = module.weight.data.to(dtype)
    model.embed.data = model.embed.data.to(dtype)
    if model.head is not None:
        model.head.data = model.head.data.to(dtype)


def read_tokenizer(folder: Path) -> tokenization.Tokenizer | None:
    """That of a folder; None where it has none, or, with a warning, where it cannot be read: the
    model may do without, and GPT-2's vocabulary may have to be fetched."""
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return tokenization.load(folder)
    except DataError as error:
        print(f"warning: {folder / 'tokenizer.json'} is left out: {error}", file=sys.stderr)
        return None


def load_trained(checkpoint: str, log_dir: str = "logs", device: str = "auto") -> Trained:
    """The model of a checkpoint, in float32 on a CPU. Raises ConfigError, DataError."""
    folder = find_trusted(checkpoint, log_dir)
    while True:
        try:
            return load_folder(folder, device)
        except (ConfigError, DataError):
            newer = find_trusted(checkpoint, log_dir)
            if newer == folder:
                raise
            folder = newer  # of a run that goes on, and has removed the other meanwhile


def load_folder(folder: Path, device: str) -> Trained:
    """The model that a folder holds. Raises ConfigError, DataError."""
    cfg = read_settings(folder, device)
    try:
        model = GPT(cfg, DTYPES[cfg.dtype])
    except (RuntimeError, MemoryError):
        raise ConfigError(
            f"{folder}: there is no memory for a model of N_LAYER={cfg.n_layer} N_EMBD="
            f"{cfg.n_embd}; name another, or use a larger machine"
        ) from None
    read_weights(model, folder)
    model.requires_grad_(False).eval()
    cast_weights(model, DTYPES[cfg.dtype])
    tokenizer = read_tokenizer(folder)
    return Trained(model.to(cfg.device), cfg, tokenizer, folder, torch.device(cfg.device))
