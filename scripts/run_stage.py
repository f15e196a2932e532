"""Runs a stage: every variant and seed of experiments/stages/<stage>.toml that has no result yet, then its tables.

    python scripts/run_stage.py smoke                     # two variants, two seeds: to table, figure, verdict
    python scripts/run_stage.py stage1 --dry-run          # the commands, one a line, with an estimate of time and cost
    python scripts/run_stage.py stage1 --nproc 8          # each run on 8 GPUs, one after another
    python scripts/run_stage.py stage1_cpu --jobs 2       # two runs at a time
    python scripts/run_stage.py moe_aux --gate            # and act on the verdicts: stop, more seeds, next stage
    python scripts/run_stage.py stage1 --nproc 8 --slurm partition=gpu time=120

A run has a result when results.csv holds one of the same settings, seed, trainer source and data. Settings that the
shell exports reach no run; --set NAME=VALUE gives one to all, and --as names the stage that this makes. Started again
after any end, kill -9 too, it goes on: runs that are still live are waited for, those that were cut short go on from
their last checkpoint.
"""

import argparse
import contextlib
import csv
import difflib
import functools
import hashlib
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

from tqdm import tqdm

import make_tables
import plot_ablation
import split_results
import stage_gate
from harness.contract import ConfigError, DataError
from harness.files import write_whole
from harness.provenance import device_name, fingerprint, utc_now
from harness.ranks import Ranks
from harness.records import update_results
from harness.settings import ROOT
import train_gpt
from scale_model import GPUS, choose_mfu, gpu_of, kind_of, run_cost
from stages import FOLDER, RESERVED, load_stage, text_of
from track import is_live
from train_gpt import Config

ENDED = (
    "ok",
    "diverged",
)  # results; with --gate also "stopped". Anything else is tried again by the next start
SETTINGS = [field.name.upper() for field in fields(Config)]
OTHERS = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC_",  # of a torchrun around this
    "WANDB_RUN_ID",
    "WANDB_NAME",
)  # of one run, not of all
POLL = 0.5  # seconds


@dataclass
class Run:
    """One run of a stage: what is to be run, and the process that runs it."""

    settings: dict[str, str]  # all of them, labels included
    cfg: Config
    plan: dict
    identity: tuple  # what a row must agree in to be this run's result
    process: subprocess.Popen | None = None
    slot: int = -1

    @property
    def run_id(self) -> str:
        return self.settings["RUN_ID"]

    @property
    def folder(self) -> Path:
        return Path(self.cfg.log_dir) / self.run_id

    def steps(self) -> int:
        """Steps that the curve has reached."""
        path = self.folder.with_name(f"{self.run_id}.csv")
        lines = re.findall(r"^(\d+),.*\n", path.read_text(), re.M) if path.exists() else []
        return int(lines[-1]) if lines else 0


IDENTITY = ("stage", "variant", "seed", "config_hash", "source_sha", "data_fingerprint")


def results() -> dict[str, dict]:
    """The rows of the table of results, by run_id."""
    path = Path(Config.results_csv)
    with open(path, newline="") if path.exists() else open(os.devnull) as file:
        return {row["run_id"]: row for row in csv.DictReader(file)}


def make_embedded_data(pattern: str):
    """The embedded dataset, where a run wants it and it is not there yet."""
    if os.path.dirname(pattern) == "data/sympy" and not Path("data/sympy/index.json").exists():
        print("making the embedded dataset in data/sympy")
        subprocess.run(
            [
                sys.executable,
                ROOT / "scripts" / "prepare_data.py",
                "--source",
                "package:sympy",
                "--tokenizer",
                "bytes",
                "--out",
                "data/sympy",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )


def refuse_unknown(settings: dict):
    """Raises ConfigError for a name that is no setting, which the trainer would only warn of."""
    for name in set(settings) - set(SETTINGS):
        near = "".join(
            f"did you mean {close}?" for close in difflib.get_close_matches(name, SETTINGS, 1)
        )
        raise ConfigError(
            f"{name} is no setting; {near or 'python train_gpt.py --help lists them'}"
        )


@functools.cache
def checked(settings: tuple, world_size: int, mode: str) -> tuple[Config, dict, str]:
    """(Config, plan, fingerprint of the data) of settings, checked as the trainer will check them; in mode `dry` the
    data need not be there and is blank, in `dry` and `slurm` no device need be. Raises ConfigError, DataError."""
    asked, ranks, data = Config.from_env(dict(settings)), Ranks(world_size=world_size), ""
    refuse_unknown(dict(settings))
    if mode != "dry":
        make_embedded_data(asked.input_bin)
    try:
        cfg = train_gpt.resolve(replace(asked, dry_run=mode != "run"))
        loaders = train_gpt.preflight(replace(cfg, device="cpu"), ranks)
        data = fingerprint(loaders, Path(cfg.log_dir))
    except DataError:
        if mode != "dry":
            raise
        cfg = train_gpt.resolve(replace(asked, dry_run=True, vocab_size=asked.vocab_size or 257))
    train_gpt.check_batch(cfg, ranks)
    return cfg, train_gpt.make_plan(cfg, ranks), data


def make_run(stage, variant: str, seed: int, world_size: int, mode: str) -> Run:
    """The run of a variant with a seed. Raises ConfigError, DataError."""
    settings = ({"DEVICE": "cuda"} if mode == "slurm" else {}) | stage.variants[variant]
    try:
        cfg, plan, data = checked(tuple(settings.items()), world_size, mode)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{stage.name}, {variant}: {error}") from None
    source = hashlib.sha256((ROOT / "train_gpt.py").read_text().encode()).hexdigest()[:12]
    identity = (stage.name, variant, str(seed), cfg.hash(), source, data)
    settings |= {"SEED": str(seed), "STAGE": stage.name, "VARIANT": variant}
    if data:  # without, it is not yet known what it will be called
        label = re.sub(r"[^A-Za-z0-9.]+", "-", f"{stage.name}-{variant}").strip("-.")[:80]
        digest = hashlib.sha256("".join(identity[3:]).encode()).hexdigest()[:6]
        settings |= {"RUN_ID": f"{label}-s{seed}-{digest}", "RESUME": "auto"}
    return Run(settings, cfg, plan, identity)


def plan_runs(stage, seeds: dict[str, tuple], world_size: int, mode: str) -> list[Run]:
    """All runs of a stage: the reference's first, then seed by seed, so that what is there can be compared."""
    order = [(stage.reference, seed) for seed in seeds[stage.reference]]
    others = [
        (seeds[variant].index(seed), variant, seed) for variant in seeds for seed in seeds[variant]
    ]
    order += [
        run[1:] for run in sorted(others, key=lambda run: run[0]) if run[1] != stage.reference
    ]
    runs, hashes = [make_run(stage, variant, seed, world_size, mode) for variant, seed in order], {}
    for run in runs:
        if (other := hashes.setdefault(run.cfg.hash(), run.settings["VARIANT"])) != run.settings[
            "VARIANT"
        ]:
            raise ConfigError(
                f"variants {other} and {run.settings['VARIANT']} of {stage.name} have the same settings"
            )
    return runs


def status_of(run: Run, rows: dict) -> str:
    """The status of the run's row; "" where there is none of the same settings, seed, source and data."""
    same = [
        row
        for row in rows.values()
        if tuple(row.get(name) or "" for name in IDENTITY) == run.identity
    ]
    return next(
        (status for status in (*ENDED, "stopped") if status in [row["status"] for row in same]),
        same[-1]["status"] if same else "",
    )


def estimate(run: Run, rows: dict, gpu: str) -> tuple[float | None, float | None]:
    """(seconds, dollars) of a run, by the speed of finished ones on this device, or by the planner's table; or None."""
    here = train_gpt.torch.cuda.is_available() or run.cfg.device == "cpu"
    here = device_name(Ranks().device(run.cfg)) if here else ""
    flops, world = run.plan["flops_per_token"] * run.plan["tokens_needed"], run.plan["world_size"]
    if not gpu or gpu == gpu_of(here):
        alike = [
            row
            for row in rows.values()
            if row["status"] == "ok"
            and row.get("device_name") == here
            and row["ffn"] == run.cfg.ffn
            and int(row["world_size"]) == world
        ]
        rates = [
            float(row["flops_per_token"]) * float(row["tokens"]) / float(row["train_time"])
            for row in alike
        ]
        if rates:
            seconds, gpu = flops / statistics.median(rates[-20:]), gpu_of(here)
            return seconds, seconds / 3600 * world * GPUS[gpu].price if gpu else None
    if not (gpu := gpu or gpu_of(here)):
        return None, None
    mfu, _ = choose_mfu(Config.results_csv, GPUS[gpu], kind_of(run.cfg.ffn))
    return run_cost(flops, gpu, mfu, world)


def told(seconds: float | None) -> str:
    """A time as people say it."""
    if seconds is None:
        return "unknown time"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{hours} h " * bool(hours) + f"{minutes} min"


def command(world_size: int) -> list[str]:
    """What starts a run, whose settings are the environment."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={world_size}",
        str(ROOT / "train_gpt.py"),
    ]


def devices() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    all_of_them = ",".join(map(str, range(train_gpt.torch.cuda.device_count())))
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", all_of_them).split(",") if name]


def environment(
    settings: dict, device: str, world_size: int, jobs: int = 1, slot: int = 0
) -> dict[str, str]:
    """This process' environment without any setting of the trainer, with these, and a share of this machine."""
    ours = {name.replace("_", "") for name in (*SETTINGS, *train_gpt.SYNONYMS)}
    env = {
        name: value
        for name, value in os.environ.items()
        if name.replace("_", "") not in ours and not name.startswith(OTHERS)
    }
    if device == "cpu":
        env.setdefault(
            "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // (jobs * world_size)))
        )
    elif jobs > 1:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(
            devices()[slot * world_size : (slot + 1) * world_size]
        )
    return env | settings


def dry_run(runs: list[Run], args, rows: dict):
    """Prints what would be run, a command a line, and what it would take."""
    total, left = [0.0, 0.0], 0
    for run in runs:
        status = status_of(run, rows) if run.identity[-1] else ""
        seconds, dollars = estimate(run, rows, args.gpu)
        cost = f", ${dollars:.2f}" if dollars else ""
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in run.settings.items())
        flops = run.plan["flops_per_token"] * run.plan["tokens_needed"]
        note = (
            f"has a result: {status}"
            if status in ENDED
            else f"{flops:.2g} FLOPs, {told(seconds)}{cost}"
        )
        mark = "# " * (status in ENDED)
        print(
            f"{mark}{settings} torchrun --standalone --nproc_per_node={args.nproc} train_gpt.py  # {note}"
        )
        if not mark:
            left += 1
            total = [
                had if more is None else had + more for had, more in zip(total, (seconds, dollars))
            ]
    cost = f", ${total[1]:.2f}" * bool(total[1])
    print(
        f"# {left} of {len(runs)} runs to do"
        + (
            f", {told(total[0] and total[0] / args.jobs)} of training with --jobs {args.jobs}{cost}; start, compilation, "
            "validation and checkpoints come on top"
            if left
            else ""
        )
    )


class Pool:
    """Runs that go on at the same time, up to `jobs` of them; it starts them, watches them and ends them in order."""

    def __init__(self, jobs: int, gate, keep_stopped: bool):
        self.jobs, self.gate, self.ended = jobs, gate, ENDED + ("stopped",) * keep_stopped
        self.asked_to_end, self.checked = False, {}
        for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, lambda *_: setattr(self, "asked_to_end", True))

    def work(self, runs: list[Run]) -> list[Run]:
        """Brings every run to its end; returns those that have failed. Ends early where a signal asks for it."""
        rows, going, failed, ending, began = results(), [], [], False, time.time()
        waiting = [run for run in runs if status_of(run, rows) not in self.ended]
        todo, done = len(waiting), len(runs) - len(waiting)
        with tqdm(total=len(runs), initial=done, bar_format="{desc} |{bar}|", disable=None) as bar:
            while waiting or going:
                if self.asked_to_end and not ending:
                    ending, waiting, going = (
                        True,
                        [],
                        [run for run in going if run.process],
                    )  # ours alone are to end
                    for run in going:
                        with contextlib.suppress(ProcessLookupError):  # it may have ended
                            os.killpg(
                                run.process.pid, signal.SIGTERM
                            )  # torchrun, and the ranks: they save and end
                    tqdm.write(f"interrupted: {len(going)} runs save and end")
                while waiting and len(going) < self.jobs:
                    going.append(self.start(waiting.pop(0), going))
                for run in [run for run in going if self.over(run)]:
                    going.remove(run)
                    status = self.close(run)
                    done += status in self.ended
                    failed += [run] * (status not in self.ended)
                    tqdm.write(f"{done}/{len(runs)} {run.run_id}: {status}")
                part = sum(run.steps() / run.cfg.num_iterations for run in going)
                bar.n, spent = done + part, time.time() - began
                so_far = todo - len(waiting) - len(going) + part
                end = began + spent * todo / so_far if so_far > 0.05 else None
                clock = time.strftime("%H:%M", time.localtime(end)) if end else "…"
                bar.set_description_str(
                    f"{done}/{len(runs)} done, {len(going)} running, ends about {clock}"
                )
                time.sleep(POLL if going else 0)
        return failed

    def start(self, run: Run, going: list[Run]) -> Run:
        """Starts a run in a session of its own, so that it outlives us, unless another run_stage.py has done so."""
        run.slot = min(set(range(self.jobs)) - {other.slot for other in going})
        if not is_live(run.folder) and status_of(run, results()) not in self.ended:
            run.folder.mkdir(parents=True, exist_ok=True)
            env = environment(
                run.settings, run.cfg.device, run.plan["world_size"], self.jobs, run.slot
            )
            with open(run.folder / "output.txt", "a") as out:
                run.process = subprocess.Popen(
                    command(run.plan["world_size"]),
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
        return run

    def over(self, run: Run) -> bool:
        """Whether the run has come to its end; on the way there the gate may stop it."""
        steps = run.steps()
        if self.gate and steps > self.checked.get(run.run_id, 0):
            self.checked[run.run_id] = steps
            self.gate(run)
        return (run.process is None or run.process.poll() is not None) and not is_live(run.folder)

    def close(self, run: Run) -> str:
        """The status that the run's row ends with; one that could not say why it ended gets a row all the same."""
        if (status := status_of(run, results())) in self.ended:
            return status
        path, code = (
            run.folder.with_name(f"{run.run_id}.json"),
            run.process.returncode if run.process else None,
        )
        known = (
            json.loads(path.read_text())
            if path.exists()
            else {
                name.lower(): run.settings[name] for name in ("RUN_ID", "STAGE", "VARIANT", "SEED")
            }
        )
        if self.asked_to_end:
            known |= {"status": known.get("status", "running").replace("running", "preempted")}
        elif (
            known.get("status", "running") == "running"
            or code
            and known["status"] in ("preempted", "stopped")
        ):
            out = (
                (run.folder / "output.txt").read_text()
                if (run.folder / "output.txt").exists()
                else ""
            )
            said = re.findall(r"^(?:config|data|crash|oom|diverged): .*", out, re.M) or [
                "it ended without a word"
            ]
            known |= {
                "status": "crash",
                "started": known.get("started", utc_now()),
                "error": f"{said[-1]} (exit code {code}; {run.folder}/output.txt)",
            }
        write_whole(path, json.dumps(known, indent=1) + "\n")
        update_results(Config.results_csv, [known])  # which the trainer may have failed to do
        if known["status"] not in self.ended and not self.asked_to_end:
            tqdm.write(f"{run.run_id}: {known.get('error') or 'can go on'}")
        return known["status"]


class Task:
    """A run as an element of a Slurm array; preempted or out of time, it saves, ends, and is queued again."""

    def __call__(self, settings: dict[str, str], device: str, world_size: int) -> int:
        self.process = (
            subprocess.Popen(  # Slurm tells the whole step by USR2, of which torchrun would die
                command(world_size),
                env=environment(settings, device, world_size),
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            )
        )
        while (
            self.process.poll() is None
        ):  # inside wait(), `checkpoint`, a signal's handler, could not wait
            time.sleep(POLL)
        return self.process.returncode

    def checkpoint(self, *arguments):
        """What submitit calls before the job is taken away."""
        from submitit.helpers import DelayedSubmission

        self.process.terminate()
        self.process.wait()
        return DelayedSubmission(Task(), *arguments)


def submit(stage, args) -> int:
    """Submits what has no result as one array, --jobs at a time, with options of sbatch. Raises ConfigError."""
    import submitit

    options = pairs("--slurm", args.slurm, r"\w+")
    cluster = options.pop("cluster", "slurm")
    if args.gate or cluster == "slurm" and "time" not in options:
        raise ConfigError(
            "--slurm needs time=MINUTES and cannot have --gate, which watches runs; run_stage.py "
            f"{stage.name} --no-run judges them when they have ended"
        )
    rows = results()
    runs = plan_runs(stage, dict.fromkeys(stage.variants, stage.seeds), args.nproc, "slurm")
    runs = [run for run in runs if status_of(run, rows) not in ENDED and not is_live(run.folder)]
    try:
        executor = submitit.AutoExecutor(folder="logs/slurm", cluster=cluster)
    except RuntimeError as error:
        raise ConfigError(f"--slurm: {error}; cluster=local tries it on this machine") from None
    executor.update_parameters(
        name=stage.name,
        slurm_array_parallelism=args.jobs,
        tasks_per_node=1,
        **{
            f"slurm_{name}": int(value) if value.isdigit() else value
            for name, value in options.items()
        },
    )
    if runs and runs[0].cfg.device == "cuda":
        executor.update_parameters(gpus_per_node=args.nproc)
    if runs:
        executor.map_array(
            Task(), *zip(*((run.settings, run.cfg.device, args.nproc) for run in runs))
        )
    print(
        f"submitted {len(runs)} runs; when they have ended: python scripts/run_stage.py {stage.name} --no-run"
    )
    return 0


def finish(stage):
    """Tables, figure and verdicts of the stage from what is there; returns the verdicts. Raises ValueError."""
    split_results.split(stage.name, split_results.read_results(), Path(Config.log_dir))
    verdicts = stage_gate.write_gate(stage.name).query("kind == 'variant'")
    print(make_tables.write_tables(stage.name))
    for one in verdicts.itertuples():
        print(f"{one.variant}: {one.verdict}, {one.reason}")
    print(f"experiments/tables/{stage.name}.md .csv _gate.csv")
    try:
        plot_ablation.write_figures(stage.name)
    except ValueError as error:
        print(f"no figure: {error}")
    return verdicts


def build_next(stage, promoted: list[str]) -> str:
    """Writes the file of the stage that follows, of the reference and the promoted variants; says what came of it."""
    if not stage.next or not promoted:
        return "no next stage: " + (
            "no variant is promoted" if stage.next else f"{stage.name} names none"
        )
    first, *later = stage.next
    changes = {name: text_of(value) for name, value in first.items() if name != "name"}
    kept = {
        label: stage.variants[label] | changes
        for label in dict.fromkeys((stage.reference, *promoted))
    }
    base = {
        name: value
        for name, value in kept[stage.reference].items()
        if all(settings.get(name) == value for settings in kept.values())
    }
    tables = {
        "": {
            "question": stage.question,
            "reference": stage.reference,
            "seeds": stage.seeds,
            "max_seeds": stage.max_seeds,
            "axes": [name.upper() for name in stage.axes],
        },
        "[base]": base,
    }
    for label, settings in kept.items():
        own = {name: value for name, value in settings.items() if name not in base}
        tables[f"[variants.{json.dumps(label)}]"] = own
    tables["[gate]"] = stage.gate
    parts = [*tables.items(), *(("[[next]]", step) for step in later)]
    text = (
        "\n\n".join(
            "\n".join(
                [head, *(f"{name} = {json.dumps(value)}" for name, value in table.items())]
            ).strip()
            for head, table in parts
        )
        + "\n"
    )
    path = FOLDER / f"{first['name']}.toml"
    if path.exists() and path.read_text() != text:
        return f"{path} is there and says something else; it is left as it is"
    write_whole(path, text)
    return (
        f"next stage: {path} with {', '.join(promoted)} beside {stage.reference}; "
        f"python scripts/run_stage.py {first['name']}"
    )


def overridden(stage, changes: list[str], name: str):
    """The stage with NAME=VALUE for every run; where that changes what is trained, as a stage `name`, which has a file
    of its own, so that no table mixes the two. Raises ConfigError."""
    given = pairs("--set", changes)
    if taken := RESERVED.intersection(given):
        raise ConfigError(f"--set {min(taken)}: is not for a stage to set")
    refuse_unknown(given)
    Config.from_env(stage.variants[stage.reference] | given)
    if trained := sorted(set(given) - {setting.upper() for setting in train_gpt.UNTRAINED}):
        if not name:
            raise ConfigError(
                f"--set {trained[0]} makes another stage of {stage.name}; give it a name by --as"
            )
        if varied := [setting for setting in trained if setting.lower() in stage.axes]:
            raise ConfigError(
                f"--set {varied[0]}: in that the variants of {stage.name} differ; write a stage for it"
            )
        text = f'extends = "{stage.name}"\n\n[base]\n' + "".join(
            f"{setting} = {json.dumps(value)}\n" for setting, value in given.items()
        )
        if (path := FOLDER / f"{name}.toml").exists() and path.read_text() != text:
            raise ConfigError(
                f"--as {name}: {path} is there and says something else; choose another name"
            )
        write_whole(path, text)
        return load_stage(name)
    return replace(
        stage, variants={label: settings | given for label, settings in stage.variants.items()}
    )


def pairs(option: str, words: list[str], name: str = "[A-Z0-9_]+") -> dict[str, str]:
    """{NAME: VALUE} of the words of an option. Raises ConfigError."""
    if wrong := [word for word in words if not re.fullmatch(f"{name}=.*", word)]:
        raise ConfigError(f"{option} {wrong[0]}: must be NAME=VALUE")
    return dict(word.split("=", 1) for word in words)


def stopper(stage):
    """What stops a live run by the rules of the stage: the file `stop`, so that it can go on later."""
    rules = stage_gate.rules_of(stage)

    def look(run: Run):
        curve = split_results.read_curve(run.folder.with_name(f"{run.run_id}.csv"))
        stop, reason, _ = stage_gate.stop_verdict(curve, rules, run.cfg.num_experts)
        if (
            stop and run.settings["VARIANT"] != stage.reference
        ):  # others are compared with it, at their steps
            (run.folder / "stop").touch()
            tqdm.write(f"{run.run_id}: stopped by the gate: {reason}")

    return look


def ask(stage, seeds: dict[str, list], verdicts) -> list[tuple[str, int]]:
    """(variant, seed) of what the gate wants to see next: the reference has to have as many as any other."""
    asking = set(verdicts[verdicts.verdict == "seed"].seed_for)
    more = {
        variant: int(variant in asking and len(known) < stage.max_seeds)
        for variant, known in seeds.items()
    }
    most = max(len(known) + more[variant] for variant, known in seeds.items())
    more[stage.reference] = most - len(seeds[stage.reference])
    return [
        (variant, max(seeds[variant]) + 1 + i)
        for variant, count in more.items()
        for i in range(count)
    ]


def work_through(stage, args) -> int:
    """Runs all that has no result, adds seeds as the gate asks for them, then builds the next stage; the exit code."""
    pool, seeds = Pool(args.jobs, stopper(stage) if args.gate else None, args.gate), {}
    wanted = [(variant, seed) for variant in stage.variants for seed in stage.seeds]
    while wanted:
        for variant, seed in wanted:
            seeds.setdefault(variant, []).append(seed)
        runs = plan_runs(stage, seeds, args.nproc, "run")
        if runs[0].cfg.device == "cuda" and args.jobs * args.nproc > len(devices()):
            raise ConfigError(
                f"--jobs {args.jobs} x --nproc {args.nproc}: there are {len(devices())} CUDA devices"
            )
        failed = pool.work(runs)
        verdicts = None if pool.asked_to_end else finish(stage)
        if pool.asked_to_end or failed:
            print("some runs have no result yet; the same command goes on with them")
            return 1
        wanted = ask(stage, seeds, verdicts) if args.gate else []
        for variant, seed in wanted:
            print(f"the gate asks for another seed: {variant}, seed {seed}")
    if args.gate:
        print(build_next(stage, list(verdicts[verdicts.verdict == "promote"].variant)))
    return 0


def main(argv=None) -> int:
    """Runs, submits or prints a stage; exit code 0, 1 where runs failed or are left, 2 with a sentence on bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "stage", help="a file of experiments/stages; python scripts/stages.py lists them"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument(
        "--nproc", type=int, default=1, help="processes, and GPUs where there are any, of each run"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting for every run"
    )
    parser.add_argument(
        "--as", dest="name", default="", metavar="STAGE", help="the stage that --set makes of it"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands; needs no data and no GPU"
    )
    parser.add_argument(
        "--gpu", default="", choices=["", *GPUS], help="estimate for this GPU, not for the one here"
    )
    parser.add_argument(
        "--gate", action="store_true", help="stop, add seeds and build the next stage by the rules"
    )
    parser.add_argument(
        "--slurm",
        nargs="*",
        metavar="NAME=VALUE",
        help="submit as an array, with options of sbatch",
    )
    parser.add_argument(
        "--no-run",
        action="store_true",
        help="only make tables, figure and verdicts of what is there",
    )
    args = parser.parse_args(argv)
    try:
        if min(args.jobs, args.nproc) < 1:
            raise ConfigError(f"--jobs {args.jobs} --nproc {args.nproc}: both must be at least 1")
        stage = overridden(load_stage(args.stage), args.set, args.name)
        stage_gate.rules_of(stage)
        if leaks := [name for name in SETTINGS if os.environ.get(name)]:
            print(
                f"not passed on to the runs: {', '.join(leaks)}; --set {leaks[0]}=… would be",
                file=sys.stderr,
            )
        if args.dry_run:
            runs = plan_runs(stage, dict.fromkeys(stage.variants, stage.seeds), args.nproc, "dry")
            dry_run(runs, args, results())
        elif args.no_run:
            finish(stage)
        else:
            return work_through(stage, args) if args.slurm is None else submit(stage, args)
        return 0
    except (ConfigError, DataError, ValueError) as error:
        print(f"run_stage.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
