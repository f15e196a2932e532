"""Whole runs of train_gpt.py on a device, on several ranks and through faults; for check_device.py.

    torchrun --nproc_per_node=2 scripts/device_runs.py    # a rank: collectives, then the trainer

What a run learns from is made here: a text in which a token follows from the last, with noise.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import contextlib
import csv
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from device_checks import write_shard
from device_report import Check, Part, held, left_out, plain_environment, torchrun_environment
from harness.files import RunFiles
from harness.ranks import Ranks
from store.contract import EXIT_CODES
from ops.sharding import collective, reduce_scatter
import train_gpt

FOLDER = "CHECK_DEVICE_FOLDER"  # a variable: who ends this process removes what is in there
PATIENCE = 120  # seconds that a run may take
NEAR_RANKS = 2e-3  # nats that losses of two numbers of ranks may lie apart
SIZES = {
    "N_LAYER": 2,
    "N_HEAD": 2,
    "N_EMBD": 64,
    "VOCAB_SIZE": 1024,  # an embedding that ranks take slices of
    "SEQUENCE_LENGTH": 64,
    "BATCH_SIZE": 4,
    "DEVICE_BATCH_SIZE": 2,
    "NUM_ITERATIONS": 16,
    "WARMDOWN_ITERS": 8,
    "LR": 0.003,
    "VAL_EVERY": 12,
    "VAL_TOKENS": 2048,
    "SAVE_EVERY": 8,
    "LOG_EVERY": 1,
    "MAX_EPOCHS": 0,
    "COMPILE": 0,
    "DTYPE": "float32",
}
EXPERTS = {"FFN": "relu2,moe", "NUM_EXPERTS": 4, "DROPOUT": 0.1, "DETERMINISTIC": 1}


class Trainer:
    """A run of train_gpt.py, or what a command makes of it, whose output goes to a file."""

    def __init__(self, folder: Path, device: torch.device, run_id: str, command=(), **settings):
        self.files = RunFiles(folder, run_id)
        self.output = folder / f"{run_id}.out"
        changes = {"INPUT_BIN": f"{folder}/a_train_*.bin", "INPUT_VAL_BIN": f"{folder}/a_val_*.bin"}
        changes |= {"LOG_DIR": folder, "RESULTS_CSV": folder / "results.csv", "RUN_ID": run_id}
        changes |= SIZES | {"DEVICE": device.type} | settings
        env = plain_environment() | {name: str(value) for name, value in changes.items()}
        with open(self.output, "a", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                [sys.executable, *(command or [train_gpt.__file__])],
                env=env,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> int:
        """The exit code. Raises TimeoutExpired."""
        code = self.process.wait(PATIENCE)
        if code:
            print(self.output.read_text("utf-8")[-2000:], file=sys.stderr)
        return code

    def reaches(self, step: int, saved: bool = False) -> bool:
        """Waits until a step is in the curve, or saved; False where the run ends before."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            there = self.files.last_step() >= step
            if saved:
                there = (self.files.folder / f"step_{step:06d}").is_dir()
            if there:
                return True
            time.sleep(0.02)
        return False

    def status(self) -> str:
        """What its summary says; "" where there is none."""
        with contextlib.suppress(OSError, ValueError):
            return self.files.summary()["status"]
        return ""

    def curve(self) -> dict[str, list[str]]:
        """Losses and gradient norms as they are written: {step: texts}."""
        names = ("train_loss", "val_loss", "grad_norm")
        rows = csv.DictReader(self.files.lines())
        return {row["step"]: [row[name] for name in names] for row in rows}

    def weights(self) -> str:
        """A hash of the model that it has left; "" where it has left none."""
        path = self.files.folder / "model.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else ""


def make_data(folder: Path) -> None:
    """Shards for training and validation."""
    rng = np.random.default_rng(0)
    for name, tokens in (("a_train_000000.bin", 100_000), ("a_val_000000.bin", 5_000)):
        write_shard(folder / name, np.cumsum(rng.integers(0, 5, tokens)) % 1024)


@contextlib.contextmanager
def data_folder() -> Iterator[Path]:
    """A folder with shards, for as long as it is needed."""
    with tempfile.TemporaryDirectory(dir=os.environ.get(FOLDER)) as name:
        make_data(Path(name))
        yield Path(name)


def loss_gap(a: Mapping[str, list[str]], b: Mapping[str, list[str]]) -> float:
    """How far two losses of a step lie apart at most; inf where the steps differ."""
    if not a or a.keys() != b.keys():
        return float("inf")
    gaps = [0.0]
    for step, texts in a.items():
        for one, other in list(zip(texts, b[step]))[:2]:
            if one and other:
                gaps.append(abs(float(one) - float(other)))
    return max(gaps)


########################################
#                Ranks                 #
########################################


def check_collectives(store: dist.Store, device_type: str) -> str:
    """What the ranks get from the collectives of a step, rank 0's sentence; "" where all is well.

    Every rank gives its number plus one times 1, 2, 3, …
    """
    ranks = Ranks.from_env(os.environ)
    rank, world = ranks.rank, ranks.world_size
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        store=dist.PrefixStore("collectives", store),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    values = torch.arange(1.0, 1 + 4 * world, device=device)
    total = values * (world * (world + 1) / 2)
    summed = values * (rank + 1)
    dist.all_reduce(summed)
    own = reduce_scatter(values * (rank + 1), world)
    gathered = torch.empty_like(values)
    collective("all_gather_single", "all_gather_into_tensor", gathered, values[4 * rank :][:4])
    dist.barrier()
    results = {
        "all_reduce": torch.equal(summed, total),
        "reduce_scatter": torch.equal(own, total[4 * rank :][:4]),
        "all_gather": torch.equal(gathered, values),
    }
    dist.destroy_process_group()
    store.set(f"wrong{rank}", " ".join(name for name, good in results.items() if not good))
    wrong = [store.get(f"wrong{other}").decode() for other in range(world)]
    return "; ".join(f"rank {other}: {names}" for other, names in enumerate(wrong) if names)


def be_a_rank(env: Mapping[str, str]) -> int:
    """Checks the collectives among the ranks that torchrun started, then trains as they are set."""
    address = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False, timeout=datetime.timedelta(seconds=PATIENCE))
    wrong = check_collectives(store, env["DEVICE"])
    if env["RANK"] == "0":
        Path(env["LOG_DIR"], "collectives.json").write_text(json.dumps(wrong), encoding="utf-8")
    return train_gpt.main([], env)


def shared_folder(env: Mapping[str, str], folder: Path) -> Path:
    """Rank 0's folder, on all ranks that torchrun started."""
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    if env["RANK"] == "0":
        store.set("check_device_folder", str(folder))
    return Path(store.get("check_device_folder").decode())


def ranks_agree(device: torch.device) -> Iterator[Check]:
    """One rank against several: those of torchrun, or else two, or one a CUDA device."""
    launched = "RANK" in os.environ
    world = int(os.environ["WORLD_SIZE"]) if launched else 2
    if not launched and device.type == "cuda":
        world = torch.cuda.device_count()
    if world == 1:
        yield left_out("ranks", "one rank, or one CUDA device")
        return
    rank_command = [__file__]
    # Norms and biases make parameters that are copied, beside slices and stacks.
    settings = {"BATCH_SIZE": 4 * world, "NORM": "layer", "BIAS": 1}
    with data_folder() as folder:
        if launched:
            folder = shared_folder(os.environ, folder)
            torchrun = torchrun_environment()
        else:
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            rank_command = [*launcher, f"--nproc_per_node={world}", __file__]
            torchrun = {}
        several = Trainer(folder, device, "several", rank_command, **settings | torchrun)
        if launched and os.environ["RANK"] != "0":
            several.wait()
            return
        alone = Trainer(folder, device, "alone", **settings)
        codes = [several.wait(), alone.wait()]

        report = folder / "collectives.json"
        wrong = json.loads(report.read_text("utf-8")) if report.exists() else "no result"
        yield held("collectives", wrong or f"sums and shares of {world} ranks exact", not wrong)
        gap = loss_gap(several.curve(), alone.curve())
        text = f"{world} ranks against one: losses {gap:.1e} apart, exit codes {codes}"
        yield held("losses", text, gap < NEAR_RANKS and codes == [0, 0])
        # At each checkpoint the program compares the ranks' weights; it ends where they differ.
        good = several.status() == "ok" and bool(several.weights())
        yield held("weights_of_ranks", f"status {several.status() or 'none'}", good)


########################################
#                Faults                #
########################################


def killed_and_resumed(device: torch.device) -> Iterator[Check]:
    """kill -9 in the middle, then RESUME=auto: the bits of a run never stopped."""
    kinds = {"experts": EXPERTS}
    if device.type == "cuda":
        kinds |= {"dense": {"DETERMINISTIC": 1}}
    with data_folder() as folder:
        for kind, settings in kinds.items():
            settings = settings | {"NUM_ITERATIONS": 60, "VAL_EVERY": 30, "SAVE_EVERY": 20}
            whole = Trainer(folder, device, f"{kind}_whole", **settings)
            first = Trainer(folder, device, f"{kind}_killed", **settings)
            saved = first.reaches(20, saved=True) and first.reaches(22)
            first.process.kill()
            killed = first.process.wait()
            reached = first.files.last_step()
            second = Trainer(folder, device, f"{kind}_killed", RESUME="auto", **settings)
            codes = [whole.wait(), second.wait()]
            curves = whole.curve() == second.curve() and len(whole.curve()) > 60
            weights = whole.weights() == second.weights() != ""
            text = f"killed after step {reached}: curve {'equal' if curves else 'DIFFERS'}, "
            text += f"weights {'equal' if weights else 'DIFFER'}, exit codes {codes}"
            in_time = saved and killed == -signal.SIGKILL
            yield held(f"kill_{kind}", text, in_time and curves and weights and codes == [0, 0])


def terminated(device: torch.device) -> Iterator[Check]:
    """SIGTERM: the run saves and ends as preempted, exit code 0."""
    with data_folder() as folder:
        run = Trainer(folder, device, "term", NUM_ITERATIONS=100_000, SAVE_EVERY=0, VAL_EVERY=0)
        started = run.reaches(3)
        run.process.terminate()
        code = run.wait()
        good = started and code == 0 and run.status() == "preempted"
        yield held("sigterm", f"status {run.status() or 'none'}, exit code {code}", good)


LIMITED = """
import os, pathlib, resource, sys
import train_gpt
pages = int(pathlib.Path("/proc/self/statm").read_text("utf-8").split()[0])
most = pages * os.sysconf("SC_PAGE_SIZE") + 2**31
resource.setrlimit(resource.RLIMIT_AS, (most, most))
sys.exit(train_gpt.main([], os.environ))
"""


def out_of_memory(device: torch.device) -> Iterator[Check]:
    """A batch that cannot fit: status oom, its exit code, and which settings to lower."""
    width = 2048
    command = []
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).total_memory
    elif sys.platform == "linux":
        size = 2**32
        command = ["-c", LIMITED]  # 2 GiB more than it has at its start
    else:
        yield left_out("out_of_memory", "a limit on memory needs Linux or CUDA")
        return
    batch = size // (width * 4 * 1024) + 1  # float32 activations of as much
    sizes = {"N_EMBD": width, "N_LAYER": 1, "SEQUENCE_LENGTH": 1024, "VAL_EVERY": 0}
    sizes |= {"BATCH_SIZE": batch, "DEVICE_BATCH_SIZE": batch, "NUM_ITERATIONS": 2}
    with data_folder() as folder:
        run = Trainer(folder, device, "oom", command, **sizes)
        code = run.process.wait(PATIENCE)
        said = run.output.read_text("utf-8")
        advice = f"lower DEVICE_BATCH_SIZE={batch}" in said
        good = code == EXIT_CODES["oom"] and run.status() == "oom" and advice
        text = f"status {run.status() or 'none'}, exit code {code}"
        if not good:
            print(said[-2000:], file=sys.stderr)
        yield held("out_of_memory", f"{text}, {'with' if advice else 'WITHOUT'} advice", good)


def failed_allocation(device: torch.device) -> Iterator[Check]:
    """An allocation that fails leaves the process and the device usable."""
    refused = False
    try:
        torch.empty(2**50, dtype=torch.uint8, device=device)
    except RuntimeError:  # OutOfMemoryError is one
        refused = True
    x = torch.arange(64.0, device=device).view(8, 8)
    sum_after = (x @ torch.eye(8, device=device)).sum().item()
    text = f"2^50 bytes {'refused' if refused else 'GRANTED'}, a product afterwards"
    yield held("failed_allocation", text, refused and sum_after == 2016)


RANKS: dict[str, Part] = {"ranks": ranks_agree}
FAULTS: dict[str, Part] = {
    "kill": killed_and_resumed,
    "sigterm": terminated,
    "memory": out_of_memory,
    "allocation": failed_allocation,
}
PARTS = RANKS | FAULTS


if __name__ == "__main__":
    if "MASTER_ADDR" not in os.environ:  # not below torchrun
        sys.exit("device_runs.py: torchrun starts it, or python scripts/check_device.py")
    sys.exit(be_a_rank(dict(os.environ)))
