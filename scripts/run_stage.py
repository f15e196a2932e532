"""Runs a stage: every variant and seed of experiments/stages/<stage>.toml that has no result yet, then its tables.

    python scripts/run_stage.py smoke                     # two variants, two seeds: to table, figure, verdict
    python scripts/run_stage.py stage1 --dry-run          # the commands, one a line, with an estimate of time and cost
    python scripts/run_stage.py stage1 --nproc 8          # each run on 8 GPUs, one after another
    python scripts/run_stage.py stage1_cpu --jobs 2       # two runs at a time
    python scripts/run_stage.py moe_aux --gate            # and act on the verdicts: stop, more seeds, next stage
    python scripts/run_stage.py stage1 --nproc 8 --slurm partition=gpu time=120

A run has a result when results.csv holds one of the same settings, seed, trainer source and data. Settings that the
shell exports reach no run; --set NAME=VALUE gives one to all. Started again after any end, kill -9 too, it goes on:
runs that are still live are waited for, those that were cut short go on from their last checkpoint.
"""
import argparse
import contextlib
import csv
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

from filelock import FileLock, Timeout
from tqdm import tqdm

import train_gpt
from scale_model import GPUS, run_cost
from stages import FOLDER, RESERVED, load_stage, text_of
from train_gpt import ROOT, Config, ConfigError, DataError, Ranks

ENDED = ("ok", "diverged")  # results; with --gate also "stopped". Anything else is tried again by the next start
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")  # of a torchrun around this
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

    def live(self) -> bool:
        """Whether a trainer has claimed the run_id, be it ours or that of a run_stage.py that was killed."""
        try:
            with FileLock(self.folder / "live.lock", timeout=0) if self.folder.exists() else contextlib.nullcontext():
                return False
        except Timeout:
            return True

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
        subprocess.run([sys.executable, ROOT / "scripts" / "prepare_data.py", "--source", "package:sympy",
                        "--tokenizer", "bytes", "--out", "data/sympy"], check=True, stdout=subprocess.DEVNULL)


def make_run(stage, variant: str, seed: int, world_size: int, dry_run: bool) -> Run:
    """The run of a variant with a seed, checked as the trainer will check it. Raises ConfigError, DataError."""
    settings = stage.variants[variant] | {"SEED": str(seed), "STAGE": stage.name, "VARIANT": variant}
    asked, ranks = Config.from_env(settings), Ranks(world_size=world_size, local_world_size=world_size)
    if not dry_run:
        make_embedded_data(asked.input_bin)
    data = ""
    try:
        cfg = train_gpt.resolve(replace(asked, dry_run=dry_run))
        train_gpt.check_batch(cfg, ranks)
        data = train_gpt.fingerprint(train_gpt.preflight(cfg, Ranks()), Path(cfg.log_dir))
    except DataError:
        if not dry_run:
            raise
        cfg = train_gpt.resolve(replace(asked, dry_run=True, vocab_size=asked.vocab_size or 257))
    plan = train_gpt.make_plan(cfg, ranks)
    source = hashlib.sha256((ROOT / "train_gpt.py").read_text().encode()).hexdigest()[:12]
    identity = (stage.name, variant, str(seed), cfg.hash(), source, data)
    label = re.sub(r"[^A-Za-z0-9.]+", "-", f"{stage.name}-{variant}").strip("-.")[:80]
    digest = hashlib.sha256("".join(identity[3:]).encode()).hexdigest()[:6]
    names = {"RUN_ID": f"{label}-s{seed}-{digest}", "RESUME": "auto"} if data else {}
    return Run(settings | names, cfg, plan, identity)


def plan_runs(stage, seeds: dict[str, tuple], world_size: int, dry_run: bool) -> list[Run]:
    """All runs of a stage: the reference's first, then seed by seed, so that what is there can be compared."""
    order = [(stage.reference, seed) for seed in seeds[stage.reference]]
    others = [(seeds[variant].index(seed), variant, seed) for variant in seeds for seed in seeds[variant]]
    order += [run[1:] for run in sorted(others, key=lambda run: run[0]) if run[1] != stage.reference]
    return [make_run(stage, variant, seed, world_size, dry_run) for variant, seed in order]


def status_of(run: Run, rows: dict) -> str:
    """The status of the run's row; "" where there is none of the same settings, seed, source and data."""
    same = [row for row in rows.values() if tuple(row.get(name) or "" for name in IDENTITY) == run.identity]
    return next((status for status in (*ENDED, "stopped") if status in [row["status"] for row in same]),
                same[-1]["status"] if same else "")


def estimate(run: Run, rows: dict, gpu: str) -> tuple[float | None, float | None]:
    """(seconds, dollars) of a run, by the speed of finished ones on this device, or by the planner's table; or None."""
    here = train_gpt.device_name(Ranks().device(run.cfg))
    flops = run.plan["flops_per_token"] * run.plan["tokens_needed"]
    gpu = gpu or next((name for name, known in GPUS.items() if known.name in here), "")
    rates = [float(row["flops_per_token"]) * float(row["tokens"]) / float(row["train_time"]) for row in rows.values()
             if row["status"] == "ok" and row.get("device_name") == here and row["ffn"] == run.cfg.ffn
             and int(row["world_size"]) == run.plan["world_size"]]
    seconds, dollars = run_cost(flops, gpu, gpus=run.plan["world_size"]) if gpu else (None, None)
    if rates and (not gpu or GPUS[gpu].name in here):
        measured = flops / statistics.median(rates[-20:])
        seconds, dollars = measured, dollars * measured / seconds if dollars else None
    return seconds, dollars


def told(seconds: float | None) -> str:
    """A time as people say it."""
    if seconds is None:
        return "unknown time"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{hours} h " * bool(hours) + f"{minutes} min"


def command(world_size: int) -> list[str]:
    """What starts a run, whose settings are the environment."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}",
            str(ROOT / "train_gpt.py")]


def environment(run: Run, jobs: int) -> dict[str, str]:
    """This process' environment without any setting of the trainer, with the run's, and its share of the devices."""
    ours = {field.name.upper() for field in fields(Config)} | set(train_gpt.SYNONYMS)
    env = {name: value for name, value in os.environ.items() if name not in ours and not name.startswith(LAUNCHER)}
    world = run.plan["world_size"]
    if run.cfg.device == "cpu":
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // (jobs * world))))
    elif jobs > 1:
        all_of_them = ",".join(map(str, range(train_gpt.torch.cuda.device_count())))
        devices = env.get("CUDA_VISIBLE_DEVICES", all_of_them).split(",")
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices[run.slot * world:(run.slot + 1) * world])
    return env | run.settings


def dry_run(runs: list[Run], args, rows: dict):
    """Prints what would be run, a command a line, and what it would take."""
    total = [0.0, 0.0]
    for run in runs:
        status = status_of(run, rows) if run.identity[-1] else ""
        seconds, dollars = estimate(run, rows, args.gpu)
        cost = f", ${dollars:.2f}" if dollars else ""
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in run.settings.items())
        flops = run.plan["flops_per_token"] * run.plan["tokens_needed"]
        note = f"has a result: {status}" if status in ENDED else f"{flops:.2g} FLOPs, {told(seconds)}{cost}"
        print(f"{settings} torchrun --standalone --nproc_per_node={args.nproc} train_gpt.py  # {note}")
        if status not in ENDED:
            total = [had if more is None else had + more for had, more in zip(total, (seconds, dollars))]
    print(f"# {len(runs)} runs, {told(total[0] / args.jobs or None)} of training with --jobs {args.jobs}"
          + f", ${total[1]:.2f}" * bool(total[1]) + "; start, compilation, validation and checkpoints come on top")


class Pool:
    """Runs that go on at the same time, up to `jobs` of them; it starts them, watches them and ends them in order."""

    def __init__(self, jobs: int, gate, keep_stopped: bool):
        self.jobs, self.gate, self.ended = jobs, gate, ENDED + ("stopped",) * keep_stopped
        self.asked_to_end, self.checked = False, {}
        for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
            signal.signal(number, lambda *_: setattr(self, "asked_to_end", True))

    def work(self, runs: list[Run]) -> list[Run]:
        """Brings every run to its end; returns those that have failed. Ends early where a signal asks for it."""
        rows, going, failed, ending, began = results(), [], [], False, time.time()
        waiting = [run for run in runs if status_of(run, rows) not in self.ended]
        todo, done = len(waiting), len(runs) - len(waiting)
        with tqdm(total=len(runs), initial=done, bar_format="{desc}|{bar}| {postfix}", disable=None) as bar:
            while waiting or going:
                if self.asked_to_end and not ending:
                    ending, waiting, going = True, [], [run for run in going if run.process]  # ours alone are to end
                    for run in going:
                        run.process.terminate()  # torchrun hands it on: the ranks save and end
                while waiting and len(going) < self.jobs:
                    going.append(self.start(waiting.pop(0), going))
                for run in [run for run in going if self.over(run)]:
                    going.remove(run)
                    done += 1
                    status = self.close(run)
                    failed += [run] * (status not in self.ended)
                    tqdm.write(f"{done}/{len(runs)} {run.run_id}: {status}")
                part = sum(run.steps() / run.cfg.num_iterations for run in going)
                bar.n, spent = done + part, time.time() - began
                so_far = todo - len(waiting) - len(going) + part
                end = began + spent * todo / so_far if so_far > 0.05 else None
                bar.set_description_str(f"{done}/{len(runs)} done, {len(going)} running ")
                bar.set_postfix_str("ends about " + (time.strftime("%H:%M", time.localtime(end)) if end else "…"))
                time.sleep(POLL if going else 0)
        return failed

    def start(self, run: Run, going: list[Run]) -> Run:
        """Starts a run in a session of its own, so that it outlives us; where a killed predecessor's is live, none."""
        run.slot = min(set(range(self.jobs)) - {other.slot for other in going})
        if not run.live():
            run.folder.mkdir(parents=True, exist_ok=True)
            with open(run.folder / "output.txt", "a") as out:
                run.process = subprocess.Popen(command(run.plan["world_size"]), env=environment(run, self.jobs),
                                               stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        return run

    def over(self, run: Run) -> bool:
        """Whether the run has come to its end; on the way there the gate may stop it."""
        steps = run.steps()
        if self.gate and steps > self.checked.get(run.run_id, 0):
            self.checked[run.run_id] = steps
            self.gate(run)
        return (run.process is None or run.process.poll() is not None) and not run.live()

    def close(self, run: Run) -> str:
        """The status that the run's row ends with; one that could not say why it ended gets a row all the same."""
        row = results().get(run.run_id, {})
        if row.get("status", "running") == "running":
            code = run.process.returncode if run.process else "no code known"
            why = f"ended without a word (exit code {code}); {run.folder / 'output.txt'} has what it printed"
            path = run.folder.with_name(f"{run.run_id}.json")
            known = json.loads(path.read_text()) if path.exists() else {
                name.lower(): run.settings[name] for name in ("RUN_ID", "STAGE", "VARIANT", "SEED")}
            known |= {"status": "crash", "error": why, "started": known.get("started", train_gpt.utc_now())}
            train_gpt.write_whole(path, json.dumps(known, indent=1) + "\n")
            train_gpt.update_results(Config.results_csv, [known])
            row = known
        if row["status"] not in self.ended:
            tqdm.write(f"{run.run_id}: {row.get('error') or 'can go on'}")
        return row["status"]


class Task:
    """A run as an element of a Slurm array; preempted or out of time, it saves, ends, and is queued again."""

    def __call__(self, arguments: list[str], env: dict[str, str]) -> int:
        self.process = subprocess.Popen(arguments, env=env)
        return self.process.wait()

    def checkpoint(self, arguments, env):
        """What submitit calls before the job is taken away."""
        from submitit.helpers import DelayedSubmission
        self.process.terminate()
        self.process.wait()
        return DelayedSubmission(Task(), arguments, env)


def submit(runs: list[Run], args) -> list:
    """Submits the runs as one array, --jobs of them at a time; NAME=VALUE are options of sbatch. Returns the jobs."""
    import submitit
    options = pairs("--slurm", args.slurm, r"\w+")
    executor = submitit.AutoExecutor(folder="logs/slurm", cluster=options.pop("cluster", "slurm"))
    executor.update_parameters(name=args.stage, slurm_array_parallelism=args.jobs, tasks_per_node=1,
                               gpus_per_node=args.nproc * (runs[0].cfg.device == "cuda"), **{
                                   f"slurm_{name}": int(value) if value.isdigit() else value
                                   for name, value in options.items()})
    commands, environments = [command(args.nproc) for _ in runs], [environment(run, 1) for run in runs]
    return executor.map_array(Task(), commands, environments)


def finish(stage_name: str):
    """Tables, figure and verdict of the stage, from what is there."""
    import make_tables, plot_ablation, split_results, stage_gate
    split_results.split(stage_name, split_results.read_results(), Path(Config.log_dir))
    verdicts = stage_gate.write_gate(stage_name)
    print(make_tables.write_tables(stage_name))
    files = plot_ablation.write_figures(stage_name)
    verdicts = verdicts[verdicts.kind == "variant"]
    for one in verdicts.itertuples():
        print(f"{one.variant}: {one.verdict}, {one.reason}")
    print(f"tables: experiments/tables/{stage_name}.csv .md _gate.csv   figures: {' '.join(map(str, files))}")
    return verdicts


def build_next(stage, promoted: list[str]) -> str:
    """Writes the file of the stage that follows, of the reference and the promoted variants; says what came of it."""
    if not stage.next or not promoted:
        return "no next stage: " + ("no variant is promoted" if stage.next else f"{stage.name} names none")
    first, *later = stage.next
    changes = {name: text_of(value) for name, value in first.items() if name != "name"}
    kept = {label: stage.variants[label] | changes for label in dict.fromkeys((stage.reference, *promoted))}
    base = {name: value for name, value in kept[stage.reference].items()
            if all(settings.get(name) == value for settings in kept.values())}
    tables = {"": {"question": stage.question, "reference": stage.reference, "seeds": stage.seeds,
                   "max_seeds": stage.max_seeds, "axes": [name.upper() for name in stage.axes]}, "[base]": base}
    for label, settings in kept.items():
        own = {name: value for name, value in settings.items() if name not in base}
        tables[f"[variants.{json.dumps(label)}]"] = own
    tables["[gate]"] = stage.gate
    parts = [*tables.items(), *(("[[next]]", step) for step in later)]
    text = "\n\n".join("\n".join([head, *(f"{name} = {json.dumps(value)}" for name, value in table.items())]).strip()
                       for head, table in parts) + "\n"
    path = FOLDER / f"{first['name']}.toml"
    if path.exists() and path.read_text() != text:
        return f"{path} is there and says something else; it is left as it is"
    train_gpt.write_whole(path, text)
    return (f"next stage: {path} with {', '.join(promoted)} beside {stage.reference}; "
            f"python scripts/run_stage.py {first['name']}")


def overridden(stage, changes: list[str]):
    """The stage with NAME=VALUE given to every variant. Raises ConfigError."""
    given = pairs("--set", changes)
    if taken := RESERVED.intersection(given):
        raise ConfigError(f"--set {min(taken)}: is not for a stage to set")
    return replace(stage, variants={label: settings | given for label, settings in stage.variants.items()})


def pairs(option: str, words: list[str], name: str = "[A-Z0-9_]+") -> dict[str, str]:
    """{NAME: VALUE} of the words of an option. Raises ConfigError."""
    if wrong := [word for word in words if not re.fullmatch(f"{name}=.*", word)]:
        raise ConfigError(f"{option} {wrong[0]}: must be NAME=VALUE")
    return dict(word.split("=", 1) for word in words)


def stopper(stage):
    """What stops a live run by the rules of the stage: the file `stop`, so that it can go on later."""
    import split_results, stage_gate
    rules = stage_gate.rules_of(stage)

    def look(run: Run):
        curve = split_results.read_curve(run.folder.with_name(f"{run.run_id}.csv"))
        stop, reason, _ = stage_gate.stop_verdict(curve, rules, run.cfg.num_experts)
        if stop and run.settings["VARIANT"] != stage.reference:  # others are compared with it, at their steps
            (run.folder / "stop").touch()
            tqdm.write(f"{run.run_id}: stopped by the gate: {reason}")
    return look


def work_through(stage, args) -> int:
    """Runs all that has no result, adds seeds as the gate asks for them, then builds the next stage; the exit code."""
    pool, seeds, failed = Pool(args.jobs, stopper(stage) if args.gate else None, args.gate), {}, []
    wanted = [(variant, seed) for variant in stage.variants for seed in stage.seeds]
    while wanted and not pool.asked_to_end:
        for variant, seed in wanted:
            seeds.setdefault(variant, []).append(seed)
        failed = pool.work(plan_runs(stage, seeds, args.nproc, False))
        if not any(row["stage"] == stage.name and row["status"] == "ok" for row in results().values()):
            break
        verdicts = finish(stage.name)
        asking = set(verdicts[verdicts.verdict == "seed"].seed_for) if args.gate and not failed else ()
        wanted = [(variant, max(seeds[variant]) + 1) for variant in seeds
                  if variant in asking and len(seeds[variant]) < stage.max_seeds]
        for variant, seed in wanted:
            print(f"the gate asks for another seed: {variant}, seed {seed}")
    if pool.asked_to_end or failed:
        print("some runs have no result yet; the same command goes on with them")
        return 1
    if args.gate:
        print(build_next(stage, list(verdicts[verdicts.verdict == "promote"].variant)))
    return 0


def main(argv=None) -> int:
    """Runs, submits or prints a stage; exit code 0, 1 where runs failed or are left, 2 with a sentence on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", help="a file of experiments/stages; python scripts/stages.py lists them")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--nproc", type=int, default=1, help="processes, and GPUs where there are any, of each run")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting for every run")
    parser.add_argument("--dry-run", action="store_true", help="print the commands; needs no data and no GPU")
    parser.add_argument("--gpu", default="", choices=["", *GPUS], help="estimate for this GPU, not for the one here")
    parser.add_argument("--gate", action="store_true", help="stop, add seeds and build the next stage by the rules")
    parser.add_argument("--slurm", nargs="*", metavar="NAME=VALUE", help="submit as an array, with options of sbatch")
    args = parser.parse_args(argv)
    try:
        if min(args.jobs, args.nproc) < 1:
            raise ConfigError(f"--jobs {args.jobs} --nproc {args.nproc}: both must be at least 1")
        stage = overridden(load_stage(args.stage), args.set)
        if leaks := [field.name.upper() for field in fields(Config) if os.environ.get(field.name.upper())]:
            print(f"not passed on to the runs: {', '.join(leaks)}; --set {leaks[0]}=… would be", file=sys.stderr)
        if not args.dry_run and args.slurm is None:
            return work_through(stage, args)
        runs, rows = plan_runs(stage, dict.fromkeys(stage.variants, stage.seeds), args.nproc, args.dry_run), results()
        if args.dry_run:
            dry_run(runs, args, rows)
            return 0
        runs = [run for run in runs if status_of(run, rows) not in ENDED and not run.live()]
        jobs = submit(runs, args) if runs else []
        print(f"submitted {len(jobs)} runs; when they have ended, python scripts/run_stage.py {stage.name} sums up")
        return 0
    except (ConfigError, DataError, ValueError) as error:
        print(f"run_stage.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
