"""Checkpoints: saved by all ranks from copies, restored on any number of ranks, verified by hashes."""

import concurrent.futures, itertools, json, os, re, shutil, time, traceback
from pathlib import Path

import torch
import torch.distributed as dist

from harness.contract import ConfigError
from harness.files import sha256sum, sync, write_whole

MAX_FAILED_SAVES = 3  # in a row


SAVE_STALL = 1.0  # seconds that the loop waits for a checkpoint to be written; a slower one is written while it goes on


def defect(folder):
    """What is wrong with a checkpoint; "" where every file is what its list of hashes says."""
    try:
        lines = (folder / "SHA256SUMS").read_bytes().decode().splitlines(keepends=True)
        wrong = [line[66:-1] for line in lines if line != sha256sum(folder / line[66:-1])]
        if folder.is_symlink() or not {".metadata", "run.json"} <= {line[66:-1] for line in lines}:
            wrong.append("SHA256SUMS")
        return f"{wrong[0]} is not what was written there" if wrong else ""
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"


def step_folders(folder):
    """The checkpoints of a run, {step: path} from old to new; whatever else lies there is not ours."""
    found = [
        path
        for path in folder.glob("step_*")
        if re.fullmatch(r"step_\d{6,}", path.name) and path.is_dir()
    ]
    return dict(sorted((int(path.name[5:]), path) for path in found))


def set_aside(path, why):
    """Renames a checkpoint that must not be resumed but is not ours to delete."""
    names = (path.with_name(f"{path.name}.{why}{i or ''}") for i in itertools.count())
    path.rename(next(name for name in names if not name.exists()))


def find_checkpoint(cfg, folder, restarted, warnings):
    """The checkpoint that a run of cfg goes on from, or None. Damaged ones are set aside. Raises ConfigError."""
    for path in (
        reversed(step_folders(folder).values()) if restarted or cfg.resume == "auto" else ()
    ):
        if not (problem := defect(path)):
            return path
        warnings.append(f"{path} is set aside: {problem}")
        set_aside(path, "corrupt")
    if cfg.resume in ("none", "auto"):
        return None
    path = Path(cfg.resume)
    inside = Path(cfg.log_dir).resolve() in path.resolve().parents
    there = [*step_folders(path.parent).values(), *step_folders(path).values()] if inside else []
    outside = f"lies outside LOG_DIR={cfg.log_dir}; INIT_FROM takes weights from elsewhere, as safetensors"
    if problem := defect(path) if path in there else "is no checkpoint" if inside else outside:
        raise ConfigError(
            f"RESUME={path}: {problem}; choose auto, none or one of "
            f"{', '.join(map(str, there)) or f'{cfg.log_dir}/<run_id>/step_<number>'}"
        )
    return path


def changed_settings(saved, cfg, facts):
    """[] or a sentence on what differs from a checkpoint's run.json. Raises ConfigError where it is another run."""
    past = type(cfg)(
        **{name: value for name, value in saved["config"].items() if name in vars(cfg)}
    )
    before, now = vars(past) | saved, vars(cfg) | facts
    changed = {
        name: f"{name.upper()} {before[name]} -> {now[name]}"
        for name in (*vars(cfg), "world_size", "data_fingerprint")
        if before[name] != now[name]
    }
    same_past = all(past.scheduled(step) == cfg.scheduled(step) for step in range(saved["step"]))
    harmless = {*cfg.resumable(), "world_size", *cfg.SCHEDULED * same_past}
    if refused := [text for name, text in changed.items() if name not in harmless]:
        raise ConfigError(
            f"RUN_ID={past.run_id} came to step {saved['step']} with other settings or learning rates: "
            f"{', '.join(refused)}; set them back, or start anew, with INIT_FROM for its final weights"
        )
    told = [text for name, text in changed.items() if name not in cfg.LABELS]
    return [f"goes on with other settings: {', '.join(told)}"] * bool(told)


def tally(ranks):
    """{key: [dtype, numbers, sum of bits]} of all ranks: slices add up, copies must be equal, else a RuntimeError."""
    total = {}
    for rank, held in enumerate(ranks):
        for key, (kind, *described) in held.items():
            if kind == "slice" and key in total:
                described[1:] = [a + b for a, b in zip(described[1:], total[key][1:])]
            elif total.get(key, described) != described:
                raise RuntimeError(
                    f"the ranks have come apart: {key} of rank {rank} is not that of ranks before it"
                )
            total[key] = described
    return total


def cpu_copy(tensors, buffers, mesh):
    """{key: (tensor, kind)} copied into CPU buffers, kept for the next time, and {key: tensor}, slices as DTensor."""
    from torch.distributed.tensor import DTensor, Shard

    for key, (tensor, _) in tensors.items():
        buffers[key] = buffers[key] if key in buffers else torch.empty_like(tensor, device="cpu")
        buffers[key].copy_(tensor)
    held = {key: (buffers[key], kind) for key, (_, kind) in tensors.items()}
    return held, {
        key: DTensor.from_local(copy, mesh, [Shard(0)]) if kind == "slice" else copy
        for key, (copy, kind) in held.items()
    }


class Checkpoints:
    """Saves State, each rank its share, in a thread and from copies, and restores it on any number of ranks."""

    def __init__(self, cfg, ranks, records):
        self.cfg, self.rank, self.world, self.records = cfg, ranks.rank, ranks.world_size, records
        self.group = dist.new_group(
            backend="gloo"
        )  # its own: the thread must not meet the collectives of the loop
        self.mesh = dist.init_device_mesh("cpu", (self.world,))
        self.pool, self.pending, self.buffers = concurrent.futures.ThreadPoolExecutor(1), None, {}
        self.step, self.failures = -1, 0  # the last step saved or loaded; failed saves in a row

    def gather(self, tensors):
        """The tally of {key: (tensor, kind)} over the ranks."""
        held = {
            key: (
                kind,
                str(tensor.dtype),
                tensor.numel(),
                tensor.reshape(-1).view(torch.int32).sum().item(),
            )
            for key, (tensor, kind) in tensors.items()
        }
        dist.all_gather_object(ranks := [None] * self.world, held, self.group)
        return tally(ranks)

    def save(self, state, facts):
        """Writes what a run needs to go on from here, and `facts` (JSON); after SAVE_STALL the loop goes on anyway."""
        self.wait()
        if state.step == self.step:
            return
        tensors, turns = state.tensors(), itertools.cycle(range(self.world))
        if self.world > 1:
            self.gather({key: held for key, held in tensors.items() if held[1] == "copy"})
        mine = {
            key: held
            for key, held in tensors.items()
            if held[1] != "copy" or next(turns) == self.rank
        }
        held, copies = cpu_copy(mine, self.buffers, self.mesh)
        facts |= {
            "step": state.step,
            "config": vars(self.cfg) | {"run_id": self.records.folder.name},
            **{name: self.records.summary.get(name) for name in ("world_size", "data_fingerprint")},
        }
        facts = json.loads(json.dumps(facts))  # the loop goes on to change some of it
        self.step, self.pending = state.step, self.pool.submit(self.write, copies, held, facts)
        concurrent.futures.wait([self.pending], SAVE_STALL)

    def write(self, copies, held, facts):
        """Writes and publishes one checkpoint; returns what went wrong, the same on every rank, or ""."""
        import torch.distributed.checkpoint as dcp

        began, problem, final = (
            time.perf_counter(),
            [""],
            self.records.folder / f"step_{facts['step']:06d}",
        )
        temporary = final.with_name(f".tmp_{final.name}")
        try:
            facts["entries"] = self.gather(held)
            dcp.save(
                copies, storage_writer=dcp.FileSystemWriter(temporary), process_group=self.group
            )
            if self.rank == 0:
                self.publish(temporary, final, facts)
                self.records.print(
                    f"checkpoint:{final} write_time:{time.perf_counter() - began:.2f}s"
                )
        except (
            Exception,
            dcp.CheckpointException,
        ) as error:  # the latter derives from BaseException
            problem = [traceback.format_exception_only(error)[-1].strip().splitlines()[-1]]
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                self.records.print(f"warning: no checkpoint at step {facts['step']}: {problem[0]}")
        dist.broadcast_object_list(problem, group=self.group)
        return problem[0]

    def publish(self, temporary, final, facts):
        """Lists the hashes of all files, brings everything to the disk, gives the folder its name, and prunes."""
        if len([*temporary.glob("*.distcp")]) < self.world:
            raise OSError(
                "files of some ranks are not there: LOG_DIR has to be one folder for all machines"
            )
        write_whole(temporary / "run.json", json.dumps(facts))
        write_whole(temporary / "SHA256SUMS", "".join(map(sha256sum, sorted(temporary.iterdir()))))
        sync(temporary)
        os.replace(temporary, final)
        sync(final.parent)
        for path in [*step_folders(final.parent).values()][: -self.cfg.keep_last]:
            try:  # half deleted, it must not look like a checkpoint
                shutil.rmtree(path.rename(path.with_name(f".tmp_{path.name}")))
            except OSError as error:
                self.records.print(f"warning: {path} stays: {error}")

    def wait(self, last=False):
        """Until the save under way is done. Raises OSError where too many have failed in a row, or the last one has."""
        if self.pending:
            problem, self.pending = self.pending.result(), None
            self.step, self.failures = (-1, self.failures + 1) if problem else (self.step, 0)
            if problem and (last or self.failures == MAX_FAILED_SAVES):
                raise OSError(
                    f"{'the last checkpoint' if last else f'{self.failures} checkpoints in a row'} could not "
                    f"be written: {problem}; make room, and RESUME=auto goes on from the one before"
                )

    def load(self, state, path):
        """Restores State; returns the facts saved with it. Raises ConfigError, RuntimeError where a tensor is wrong."""
        import torch.distributed.checkpoint as dcp

        tensors, facts = state.tensors(), json.loads((path / "run.json").read_text())
        held, copies = cpu_copy(tensors, {}, self.mesh)
        try:
            dcp.load(copies, storage_reader=dcp.FileSystemReader(path), process_group=self.group)
        except dcp.CheckpointException as error:
            raise ConfigError(f"RESUME: {path} does not fit this train_gpt.py: {error}") from None
        for key, (tensor, _) in tensors.items():
            tensor.copy_(held[key][0])
        found, saved = self.gather(tensors), facts["entries"]
        if wrong := [key for key in {**found, **saved} if found.get(key) != saved.get(key)]:
            raise RuntimeError(f"{path}: {wrong[0]} did not come back as it was saved")
        state.step = facts["step"]
        self.step = state.step if path.parent.resolve() == self.records.folder.resolve() else -1
        return facts


def export_weights(model, cfg, folder):
    """Writes model.safetensors, config.json and, where the dataset has one, tokenizer.json."""
    from safetensors.torch import save

    write_whole(folder / "model.safetensors", save(model.state_dict(), {"format": "pt"}))
    write_whole(folder / "config.json", json.dumps(vars(cfg), indent=1) + "\n")
    if (tokenizer := Path(cfg.input_bin).parent / "tokenizer.json").is_file():
        write_whole(folder / "tokenizer.json", tokenizer.read_bytes())
