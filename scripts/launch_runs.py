"""Launches the runs of a stage on this machine, watches them and brings each to its end."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

from harness.files import summary_text
from harness.provenance import utc_now
from harness.settings import ROOT
from store.files import write_whole
from store.process import ENDINGS, usable_cores
from store.tables import update_results
import train_gpt
from plan_stage import HAS_RESULT, PlannedRun, environment_here, results, source_now, status_of
from stages import TRAINER
from train_gpt import Config

POLL = 0.5  # seconds


def command(world_size: int, words: Sequence[str]) -> list[str]:
    """What starts a program and its options, `words`, whose settings are the environment.

    One rank needs no torchrun, which would take seconds to start and hide the exit code.
    """
    launcher = [sys.executable, "-u"]  # what a run has said is in its file at once
    if world_size > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={world_size}"]
    program, *options = words
    return [*launcher, str(ROOT / program), *options]


def devices() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    all_of_them = ",".join(map(str, range(train_gpt.torch.cuda.device_count())))
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", all_of_them).split(",") if name]


def environment(
    settings: Mapping[str, str], device: str, world_size: int, jobs: int = 1, slot: int = 0
) -> dict[str, str]:
    """This process' environment without any setting of the trainer, with these, and a share of
    this machine."""
    env = environment_here()
    if device == "cpu":
        threads = max(1, usable_cores() // (jobs * world_size))
        env.setdefault("OMP_NUM_THREADS", str(threads))
    elif jobs > 1:
        own_devices = devices()[slot * world_size : (slot + 1) * world_size]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(own_devices)
    return env | dict(settings)


def clock_at_end(began: float, ran: float, to_do: int) -> str:
    """The time of day at which `to_do` runs will have ended, by how many ran since `began`."""
    if ran <= 0.05:
        return "…"
    spent = time.time() - began
    return time.strftime("%H:%M", time.localtime(began + spent * to_do / ran))


def is_edited(run: PlannedRun) -> bool:
    """Whether the trainer here is another than the run was planned with, which it would read."""
    return run.program == TRAINER and source_now() != run.plan["source_sha"]


class Pool:
    """Runs that go on at the same time, up to `jobs` of them; it starts them, watches them and
    ends them in order."""

    def __init__(
        self, jobs: int, gate: Callable[[PlannedRun], None] | None, keep_stopped: bool
    ) -> None:
        self.jobs = jobs
        self.gate = gate
        self.has_result = (*HAS_RESULT, "stopped") if keep_stopped else HAS_RESULT
        self.asked_to_end = False
        self.gated_at: dict[str, int] = {}  # the step at which the gate last saw a run, by run_id
        for number in ENDINGS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self.ask_to_end)

    def ask_to_end(self, *_: object) -> None:
        """The handler of the signals."""
        self.asked_to_end = True

    def work(self, runs: list[PlannedRun]) -> list[PlannedRun]:
        """Brings every run to its end; returns those that have failed. Ends early where a signal
        asks for it."""
        rows = results(runs[0].settings["STAGE"])
        began = time.time()
        ending = False
        waiting = [run for run in runs if status_of(run, rows) not in self.has_result]
        to_do = len(waiting)
        done = len(runs) - to_do
        if done:
            print(f"{done} of {len(runs)} runs have a result already")
        going: list[PlannedRun] = []
        failed: list[PlannedRun] = []

        with tqdm(total=len(runs), initial=done, bar_format="{desc} |{bar}|", disable=None) as bar:
            while waiting or going:
                if self.asked_to_end and not ending:
                    ending = True
                    waiting = []
                    going = self.end_own(going)
                if waiting and len(going) < self.jobs and is_edited(waiting[0]):
                    tqdm.write(
                        f"{TRAINER} or what it imports was edited since these runs were planned: "
                        f"{len(waiting)} are not started"
                    )
                    failed, waiting = [*failed, *waiting], []
                while waiting and len(going) < self.jobs:
                    going.append(self.start(waiting.pop(0), going))

                for run in [run for run in going if self.is_over(run)]:
                    going.remove(run)
                    status = self.close(run)
                    if status in self.has_result:
                        done += 1
                    else:
                        failed.append(run)
                    tqdm.write(f"{done}/{len(runs)} {run.run_id}: {status}")

                part = sum(run.files.last_step() / run.cfg.num_iterations for run in going)
                clock = clock_at_end(began, to_do - len(waiting) - len(going) + part, to_do)
                bar.n = done + part
                bar.set_description_str(
                    f"{done}/{len(runs)} done, {len(going)} running, ends about {clock}"
                )
                time.sleep(POLL if going else 0)
        return failed

    def end_own(self, going: list[PlannedRun]) -> list[PlannedRun]:
        """Has the runs that were started here save and end; returns them."""
        own = [run for run in going if run.process]
        for run in own:
            with contextlib.suppress(ProcessLookupError):  # it may have ended
                os.killpg(run.process.pid, signal.SIGTERM)  # torchrun, if any, and the ranks
        tqdm.write(f"interrupted: {len(own)} runs save and end")
        return own

    def start(self, run: PlannedRun, going: list[PlannedRun]) -> PlannedRun:
        """Starts a run in a session of its own, so that it outlives us, unless another run_stage.py
        has done so."""
        run.slot = min(set(range(self.jobs)) - {other.slot for other in going})
        if run.files.is_live() or status_of(run, results(run.settings["STAGE"])) in self.has_result:
            return run

        run.files.folder.mkdir(parents=True, exist_ok=True)
        world_size = run.plan["world_size"]
        env = environment(run.settings, run.cfg.device, world_size, self.jobs, run.slot)
        with open(run.files.output, "a", encoding="utf-8") as out:
            run.process = subprocess.Popen(
                command(world_size, run.words),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        return run

    def is_over(self, run: PlannedRun) -> bool:
        """Whether the run has come to its end; on the way there the gate may stop it."""
        step = run.files.last_step()
        if self.gate and step > self.gated_at.get(run.run_id, 0):
            self.gated_at[run.run_id] = step
            self.gate(run)
        has_ended = run.process is None or run.process.poll() is not None
        return has_ended and not run.files.is_live()

    def close(self, run: PlannedRun) -> str:
        """The status that the run's row ends with; one that could not say why it ended gets a row
        all the same."""
        status = status_of(run, results(run.settings["STAGE"]))
        if status in self.has_result:
            return status

        summary = self.last_summary(run)
        trained_by = summary.get("source_sha") or run.identity[4]
        if trained_by != run.identity[4]:
            tqdm.write(
                f"{run.run_id}: was trained by other code, source_sha {trained_by}, than was "
                f"planned, {run.identity[4]}; mv {run.files.folder}* elsewhere to train it anew"
            )
            return "of other code"
        write_whole(run.files.json, summary_text(summary))
        # the trainer may have failed to do this
        update_results(Config.results_csv, [summary])
        if summary["status"] not in self.has_result and not self.asked_to_end:
            tqdm.write(f"{run.run_id}: {summary.get('error') or 'can go on'}")
        return summary["status"]

    def last_summary(self, run: PlannedRun) -> dict:
        """The summary of a run that has ended, which says why: a crash where the trainer did not
        come to say so."""
        if run.files.json.exists():
            summary = json.loads(run.files.json.read_text("utf-8"))
        else:
            labels = ("RUN_ID", "STAGE", "VARIANT", "SEED")
            summary = {name.lower(): run.settings[name] for name in labels}
        status = summary.get("status", "running")
        if self.asked_to_end:
            return summary | {"status": status.replace("running", "preempted")}

        code = run.process.returncode if run.process else None
        refused_to_go_on = code and status in ("preempted", "stopped")
        if status != "running" and not refused_to_go_on:
            return summary
        output = run.files.output.read_text("utf-8") if run.files.output.exists() else ""
        sentences = re.findall(r"^(?:config|data|crash|oom|diverged): .*", output, re.M)
        reason = sentences[-1] if sentences else "it ended without a word"
        return summary | {
            "status": "crash",
            "started": summary.get("started", utc_now()),
            "error": f"{reason} (exit code {code}; {run.files.output})",
        }
