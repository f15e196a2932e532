"""Checkpoints: written by all ranks from copies, verified by hashes, for any number of ranks."""

import concurrent.futures
import itertools
import json
import os
import re
import shutil
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.provenance import dataset_folder
from harness.ranks import Ranks
from harness.settings import Settings
from store.contract import ConfigError
from store.files import regular, sha256sum, sync, write_whole

MAX_FAILED_SAVES = 3  # in a row
SAVE_STALL = 1.0  # seconds that the loop waits for a checkpoint; a slower one is written meanwhile
VERSION = 4  # of what a checkpoint holds; one of another version is refused

# What a checkpoint holds of a run, by key: (tensor, kind). Every rank has the same "copy"; "own" is
# held by one rank alone; each rank holds its "slice" of a flat tensor, one after another.
Held = dict[str, tuple[Tensor, str]]


def defect(folder: Path) -> str:
    """What is wrong with a checkpoint; "" where every file is what its list of hashes says."""
    try:
        lines = (folder / "SHA256SUMS").read_bytes().decode().splitlines(keepends=True)
        names = [line[66:-1] for line in lines]
        paths = (folder, *folder.iterdir())
        owners = {os.stat(path).st_uid for path in paths}
        if hasattr(os, "geteuid") and not owners <= {os.geteuid(), 0}:
            return "it belongs to another user, and what is in it would run as you"
        if any(path.is_symlink() for path in paths):
            return "it has links, which may lead to what is not of this run"
        for name, line in zip(names, lines):
            if line != sha256sum(folder / name):
                return f"{name} is not what was written there"
        if not {".metadata", "run.json"} <= set(names):
            return "SHA256SUMS is not what was written there"
        return ""
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"


def step_folders(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run, {step: path} from old to new; what else is there is not ours."""
    checkpoints = {
        int(path.name.removeprefix("step_")): path
        for path in folder.glob("step_*")
        if re.fullmatch(r"step_\d{6,}", path.name) and path.is_dir()
    }
    return dict(sorted(checkpoints.items()))


def set_aside(path: Path, why: str) -> None:
    """Renames a checkpoint that must not be resumed but is not ours to delete."""
    for i in itertools.count():
        name = path.with_name(f"{path.name}.{why}{i or ''}")
        if not name.exists():
            path.rename(name)
            return


def find_checkpoint(cfg: Settings, folder: Path, warnings: list[str]) -> Path | None:
    """The checkpoint that a run goes on from, or None. Raises ConfigError.

    With RESUME=auto damaged ones are set aside, each with a sentence added to `warnings`.
    """
    if cfg.resume == "none":
        return None
    if cfg.resume != "auto":
        return named_checkpoint(cfg)
    for path in reversed(step_folders(folder).values()):
        problem = defect(path)
        if not problem:
            return path
        warnings.append(f"{path} is set aside: {problem}")
        set_aside(path, "corrupt")
    return None


def named_checkpoint(cfg: Settings) -> Path:
    """The checkpoint that RESUME names. Raises ConfigError where it is none that can be trusted."""
    path, log_dir = Path(cfg.resume), cfg.log_dir
    there = []
    if Path(log_dir).resolve() in path.resolve().parents:
        there = [*step_folders(path.parent).values(), *step_folders(path).values()]
        problem = defect(path) if path in there else "is no checkpoint"
    else:
        problem = (
            f"lies outside LOG_DIR={log_dir}; INIT_FROM takes weights from elsewhere, as "
            "safetensors"
        )
    if problem:
        choices = ", ".join(map(str, there)) or f"{log_dir}/<run_id>/step_<number>"
        raise ConfigError(f"RESUME={path}: {problem}; choose auto, none or one of {choices}")
    return path


def changed_settings(saved: dict, cfg: Settings, plan: dict[str, Any]) -> list[str]:
    """[] or a sentence on what differs from a checkpoint's run.json.

    Raises ConfigError where that is another run, or of another version of the trainer.
    """
    if saved.get("version") != VERSION:
        raise ConfigError(
            f"RESUME: the checkpoint at step {saved['step']} is of an earlier version of the "
            "trainer; go on with that version, or start anew, with INIT_FROM for the weights of a "
            "finished run"
        )
    past = type(cfg)(**{name: v for name, v in saved["config"].items() if name in vars(cfg)})
    old, new = vars(past) | saved, vars(cfg) | plan
    changed = {}
    for name in (*vars(cfg), "world_size", "data_fingerprint"):
        if old[name] != new[name]:
            changed[name] = f"{name.upper()} {old[name]} -> {new[name]}"

    harmless = {*cfg.resumable(), "world_size"}
    if all(past.scheduled(step) == cfg.scheduled(step) for step in range(saved["step"])):
        harmless |= {*cfg.SCHEDULED}
    refused = [text for name, text in changed.items() if name not in harmless]
    if refused:
        raise ConfigError(
            f"RUN_ID={past.run_id} came to step {saved['step']} with other settings or learning "
            f"rates: {', '.join(refused)}; set them back, or start anew, with INIT_FROM for its "
            "final weights"
        )
    worth_a_word = [text for name, text in changed.items() if name not in cfg.LABELS]
    return [f"goes on with other settings: {', '.join(worth_a_word)}"] if worth_a_word else []


def describe(tensors: Held) -> dict[str, list]:
    """{key: [kind, dtype, numbers, sum of bits]}."""
    described = {}
    for key, (tensor, kind) in tensors.items():
        bits = tensor.reshape(-1).view(torch.int32).sum().item()
        described[key] = [kind, str(tensor.dtype), tensor.numel(), bits]
    return described


def tally(ranks: Iterable[dict[str, list]]) -> dict[str, list]:
    """{key: [dtype, numbers, sum of bits]} of all ranks: slices add up, copies must be equal.

    Raises RuntimeError where they are not.
    """
    total = {}
    for rank, described in enumerate(ranks):
        for key, (kind, dtype, numbers, bits) in described.items():
            if kind == "slice" and key in total:
                _, numbers_before, bits_before = total[key]
                numbers, bits = numbers + numbers_before, bits + bits_before
            elif total.get(key, [dtype, numbers, bits]) != [dtype, numbers, bits]:
                raise RuntimeError(
                    f"the ranks have come apart: {key} of rank {rank} is not that of ranks "
                    "before it"
                )
            total[key] = [dtype, numbers, bits]
    return total


def cpu_copy(
    tensors: Held, buffers: dict[str, Tensor], mesh: Any
) -> tuple[Held, dict[str, Tensor]]:
    """Copies in CPU buffers, kept for the next time, and {key: copy} with slices as DTensor."""
    from torch.distributed.tensor import DTensor, Shard

    copies, to_write = {}, {}
    for key, (tensor, kind) in tensors.items():
        if key not in buffers:
            buffers[key] = torch.empty_like(tensor, device="cpu")
        copy = buffers[key].copy_(tensor)
        copies[key] = (copy, kind)
        to_write[key] = DTensor.from_local(copy, mesh, [Shard(0)]) if kind == "slice" else copy
    return copies, to_write


class Checkpoints:
    """Saves named tensors, each rank its share, in a thread and from copies, and restores them."""

    def __init__(self, cfg: Settings, ranks: Ranks, records: Any):
        self.cfg = cfg
        self.rank, self.world = ranks.rank, ranks.world_size
        self.records = records
        self.group = dist.new_group(backend="gloo")  # its own: the thread must not meet the loop's
        self.mesh = dist.init_device_mesh("cpu", (self.world,))
        self.pool = concurrent.futures.ThreadPoolExecutor(1)
        self.pending = None  # the save under way
        self.buffers = {}
        self.step = -1  # the last one saved or loaded
        self.failures = 0  # in a row

    def gather(self, tensors: Held) -> dict[str, list]:
        """The tally of tensors over the ranks."""
        ranks = [None] * self.world
        dist.all_gather_object(ranks, describe(tensors), self.group)
        return tally(ranks)

    def part_of_rank(self, tensors: Held) -> Held:
        """What this rank writes: what it alone has, and copies in turn with the other ranks."""
        mine, n_copies = {}, 0
        for key, (tensor, kind) in tensors.items():
            writer = self.rank
            if kind == "copy":
                writer = n_copies % self.world
                n_copies += 1
            if writer == self.rank:
                mine[key] = (tensor, kind)
        return mine

    def save(self, step: int, tensors: Held, extra: dict[str, Any]) -> None:
        """Writes what a run needs to go on from `step`, and `extra`, which JSON can hold.

        Returns when that is done, or after SAVE_STALL.
        """
        self.wait()
        if step == self.step:
            return
        if self.world > 1:
            self.gather({key: held for key, held in tensors.items() if held[1] == "copy"})
        copies, to_write = cpu_copy(self.part_of_rank(tensors), self.buffers, self.mesh)
        summary = self.records.summary
        about = {
            "version": VERSION,
            "step": step,
            "config": vars(self.cfg) | {"run_id": summary["run_id"]},
            "world_size": summary.get("world_size"),
            "data_fingerprint": summary.get("data_fingerprint"),
            **extra,
        }
        about = json.loads(json.dumps(about))  # the loop goes on to change some of it
        self.step = step
        self.pending = self.pool.submit(self.write, to_write, copies, about)
        concurrent.futures.wait([self.pending], SAVE_STALL)

    def write(self, to_write: dict[str, Tensor], copies: Held, about: dict[str, Any]) -> str:
        """Writes and publishes one checkpoint; returns what went wrong, on any rank, or ""."""
        import torch.distributed.checkpoint as dcp

        began = time.perf_counter()
        problem = [""]
        final = self.records.files.folder / f"step_{about['step']:06d}"
        temporary = final.with_name(f".tmp_{final.name}")
        try:
            about["entries"] = self.gather(copies)
            # Nothing is to be copied ahead: a loader for CUDA would open device 0 on every rank.
            writer = dcp.FileSystemWriter(temporary, per_thread_copy_ahead=0)
            dcp.save(to_write, storage_writer=writer, process_group=self.group)
            if self.rank == 0:
                self.publish(temporary, final, about)
                seconds = time.perf_counter() - began
                self.records.print(f"checkpoint:{final} write_time:{seconds:.2f}s")
        except (
            Exception,
            dcp.CheckpointException,
        ) as error:  # the latter derives from BaseException
            problem = [traceback.format_exception_only(error)[-1].strip().splitlines()[-1]]
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                self.records.print(f"warning: no checkpoint at step {about['step']}: {problem[0]}")
        dist.broadcast_object_list(problem, group=self.group)
        return problem[0]

    def publish(self, temporary: Path, final: Path, about: dict[str, Any]) -> None:
        """Lists the hashes of all files, brings all to the disk, names the folder, and prunes."""
        if len([*temporary.glob("*.distcp")]) < self.world:
            raise OSError(
                "files of some ranks are not there: LOG_DIR has to be one folder for all machines"
            )
        copy_tokenizer(self.cfg, temporary)
        write_whole(temporary / "run.json", json.dumps(about))
        write_whole(temporary / "SHA256SUMS", "".join(map(sha256sum, sorted(temporary.iterdir()))))
        sync(temporary)
        os.replace(temporary, final)
        sync(final.parent)
        for path in [*step_folders(final.parent).values()][: -self.cfg.keep_last]:
            try:  # half deleted, it must not look like a checkpoint
                shutil.rmtree(path.rename(path.with_name(f".tmp_{path.name}")))
            except OSError as error:
                self.records.print(f"warning: {path} stays: {error}")

    def wait(self, last: bool = False) -> None:
        """Until the save under way is done. Raises OSError after too many failed ones in a row.

        Where it is the last of a run, one is too many.
        """
        if not self.pending:
            return
        problem, self.pending = self.pending.result(), None
        if not problem:
            self.failures = 0
            return
        self.step = -1
        self.failures += 1
        if last or self.failures == MAX_FAILED_SAVES:
            which = "the last checkpoint" if last else f"{self.failures} checkpoints in a row"
            raise OSError(
                f"{which} could not be written: {problem}; make room, and RESUME=auto goes on from "
                "the one before"
            )

    def load(self, tensors: Held, path: Path) -> dict[str, Any]:
        """Fills the tensors; returns what was saved with them.

        Raises ConfigError for other names or shapes, RuntimeError where a tensor came back wrong.
        """
        import torch.distributed.checkpoint as dcp

        about = json.loads((path / "run.json").read_text("utf-8"))
        copies, to_read = cpu_copy(tensors, {}, self.mesh)
        try:
            dcp.load(to_read, storage_reader=dcp.FileSystemReader(path), process_group=self.group)
        except dcp.CheckpointException as error:
            raise ConfigError(f"RESUME: {path} does not fit this train_gpt.py: {error}") from None
        for key, (tensor, _) in tensors.items():
            tensor.copy_(copies[key][0])
        loaded, saved = self.gather(tensors), about["entries"]
        for key in {**loaded, **saved}:
            if loaded.get(key) != saved.get(key):
                raise RuntimeError(f"{path}: {key} did not come back as it was saved")
        own = path.parent.resolve() == self.records.files.folder.resolve()
        self.step = about["step"] if own else -1  # another run's is saved as this one's too
        return about


def export_weights(weights: Mapping[str, Tensor], cfg: Settings, folder: Path) -> None:
    """Writes model.safetensors, config.json and, where the dataset has one, tokenizer.json."""
    from safetensors.torch import save

    write_whole(folder / "model.safetensors", save(dict(weights), {"format": "pt"}))
    write_whole(folder / "config.json", json.dumps(vars(cfg), indent=1) + "\n")
    copy_tokenizer(cfg, folder)


def import_weights(model: torch.nn.Module, path: str | Path) -> None:
    """Fills model from a safetensors file, or a folder that has one. Raises ConfigError."""
    import safetensors.torch

    file = Path(path) / "model.safetensors" if Path(path).is_dir() else path
    try:
        weights = safetensors.torch.load_file(regular(file))
        # These start anew; in files of earlier versions a router_state is called balance.
        states = ("ffn.router_state", "ffn.balance", "eot")
        weights = {name: t for name, t in weights.items() if not name.endswith(states)}
        weights |= {name: t for name, t in model.state_dict().items() if name.endswith(states)}
        is_check = next(model.parameters()).is_meta
        model.load_state_dict(weights, assign=is_check)
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error)[:300].split())
        raise ConfigError(
            f"INIT_FROM={path}: expected a safetensors file (no .pt, no checkpoint) of a model of "
            f"this shape, or the folder of a finished run, as logs/<run_id>; {reason}"
        ) from None


def copy_tokenizer(cfg: Settings, folder: Path) -> None:
    """So that what a model writes can be read when its dataset is gone."""
    tokenizer = dataset_folder(cfg.input_bin) / "tokenizer.json"
    if tokenizer.is_file():
        write_whole(folder / "tokenizer.json", tokenizer.read_bytes())
