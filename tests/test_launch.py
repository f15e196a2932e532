"""The launchers, with torchrun itself: signals, restarts, what is not tried again, and Slurm."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Job, launch, start
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import harness.ranks
from harness.ranks import Ranks
from store.contract import EXIT_CODES, ConfigError
import train_gpt

ROOT = Path(train_gpt.__file__).parent
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
RUN_8XH100 = ["bash", ROOT / "scripts" / "run_8xh100.sh"]
SBATCH = ["bash", ROOT / "scripts" / "run_slurm.sbatch"]
LONG = {"NUM_ITERATIONS": 10**6, "SAVE_EVERY": 50}
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="finds a run's processes in /proc"
)


class Launch:
    """A command with these settings alone in its environment; on exit no process of it is left."""

    def __init__(self, command, settings, folder):
        self.output_file, self.mark = (
            folder / "output.txt",
            f"RESULTS_CSV={settings['RESULTS_CSV']}".encode(),
        )
        env = {"PATH": PATH, "HOME": os.environ.get("HOME", "/")} | {
            k: str(v) for k, v in settings.items()
        }
        with open(self.output_file, "w") as output:
            self.launcher = subprocess.Popen(
                command, env=env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()

    @property
    def output(self):
        return self.output_file.read_text()

    def pids(self):
        """Launcher and ranks: processes with this run's table in their environment, no zombies."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def wait_for(self, there, seconds=60):
        """Until there() is true."""
        deadline = time.monotonic() + seconds
        while not there():
            assert self.launcher.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def wait(self, seconds=90):
        """The launcher's exit code, once it and every rank are gone."""
        try:
            code = self.launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {self.output}") from None
        assert not self.pids(), self.output
        return code


def rows(settings):
    with open(settings["RESULTS_CSV"], newline="") as file:
        return list(csv.DictReader(file))


def curve(path):
    """Step and losses as they are written, digit for digit."""
    with open(path, newline="") as file:
        return [
            (point["step"], point["train_loss"], point["val_loss"])
            for point in csv.DictReader(file)
        ]


def checkpoints(settings):
    return [
        int(path.name[5:])
        for path in sorted((settings["LOG_DIR"] / settings["RUN_ID"]).glob("step_*"))
    ]


def last_step(settings):
    """The last step that the curve shows, 0 before there is one."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(
            (settings["LOG_DIR"] / f"{settings['RUN_ID']}.csv")
            .read_text()
            .splitlines()[-1]
            .split(",")[0]
        )
    return 0


def program(folder, fault):
    """A train_gpt.py with `fault` in it, which keeps the exit code of each rank beside itself."""
    path = folder / "faulty.py"
    path.write_text(
        f"import os, sys, time\nfrom pathlib import Path\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import train_gpt\n"
        f"FOLDER, RANK = Path({str(folder)!r}), os.environ['RANK']\n{fault}\n"
        "code = train_gpt.main([], os.environ)\n(FOLDER / f'exit{RANK}').write_text(str(code))\n"
        "sys.exit(code)\n"
    )
    return path


def executable(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_usr1_saves_and_the_same_command_goes_on(settings, tmp_path):
    settings |= LONG | {"NPROC_PER_NODE": 2, "SHARD_TAIL": "keep"}
    with Launch(RUN_8XH100, settings, tmp_path) as run:
        run.wait_for(lambda: last_step(settings) >= 5)
        torchrun = Path(f"/proc/{run.launcher.pid}/task/{run.launcher.pid}/children").read_text()
        variables = Path(f"/proc/{int(torchrun)}/environ").read_bytes().split(b"\0")
        assert b"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=180" in variables
        assert len(run.pids()) == 4  # the script, torchrun, two ranks
        os.kill(run.launcher.pid, signal.SIGUSR1)
        run.wait()
        (row,) = rows(settings)
        stopped_at = checkpoints(settings)[-1]
        assert row["status"] == "preempted" and stopped_at >= last_step(settings) >= 5, run.output
        assert "warning:" not in run.output  # no variable of the launcher is taken for a setting
    with Launch(RUN_8XH100, settings, tmp_path) as run:
        run.wait_for(lambda: last_step(settings) > stopped_at)
        assert f"resumed:{settings['LOG_DIR']}/toy/step_{stopped_at:06d}" in run.output
        (settings["LOG_DIR"] / "toy" / "stop").touch()
        assert run.wait() == 0, run.output
    (row,) = rows(settings)
    assert (
        row["status"] == "stopped"
        and row["resumes"] == "1"
        and checkpoints(settings)[-1] > stopped_at
    )
    assert (
        len(list((settings["LOG_DIR"] / "torchrun").rglob("stderr.log"))) == 4
    )  # of two runs of two ranks


def test_launches_at_once_do_not_meet(settings, tmp_path):
    """Of one rank and of two: --standalone finds a free port each time; the table takes all
    rows."""
    with contextlib.ExitStack() as stack:
        launches = []
        for ranks in (1, 2):
            folder = tmp_path / str(ranks)
            folder.mkdir()
            own = settings | {"RUN_ID": f"run{ranks}", "NUM_ITERATIONS": 2, "OMP_NUM_THREADS": 1}
            command = [*TORCHRUN[:-1], f"--nproc_per_node={ranks}", "train_gpt.py"]
            launches.append(stack.enter_context(Launch(command, own, folder)))
        assert [launch.launcher.wait(120) for launch in launches] == [0] * 2
    told = [(row["run_id"], row["status"], row["world_size"]) for row in rows(settings)]
    assert sorted(told) == [("run1", "ok", "1"), ("run2", "ok", "2")]


def test_a_second_term_does_not_disturb_the_first(settings, tmp_path):
    settings |= LONG | {"PYTHONPATH": ROOT, "SAVE_EVERY": 0}
    slow = """
from harness.checkpoints import Checkpoints
def publish(self, *rest, publish=Checkpoints.publish):
    (FOLDER / "saving").touch()
    time.sleep(1.5)
    publish(self, *rest)
Checkpoints.publish = publish"""
    with Launch([*TORCHRUN, program(tmp_path, slow)], settings, tmp_path) as run:
        run.wait_for(lambda: last_step(settings) >= 3)
        os.kill(run.launcher.pid, signal.SIGTERM)
        run.wait_for((tmp_path / "saving").exists)
        assert not checkpoints(settings)
        os.kill(run.launcher.pid, signal.SIGTERM)
        run.wait()
    assert [(tmp_path / f"exit{rank}").read_text() for rank in (0, 1)] == ["0", "0"], run.output
    assert [row["status"] for row in rows(settings)] == ["preempted"] and len(
        checkpoints(settings)
    ) == 1


def test_a_crash_of_one_rank_costs_a_restart_and_changes_nothing(settings, tmp_path):
    del settings["RUN_ID"]
    settings |= {"SAVE_EVERY": 3, "NPROC_PER_NODE": 2, "MAX_RESTARTS": 1}
    crash = """
def train_step(state, *rest, train_step=train_gpt.train_step):
    if state.step == 7 and RANK == "1" and not (FOLDER / "crashed").exists():
        (FOLDER / "crashed").touch()
        os.kill(os.getpid(), 9)
    return train_step(state, *rest)
train_gpt.train_step = train_step"""
    tree = tmp_path / "tree"  # what the script starts is the trainer with a fault
    (tree / "scripts").mkdir(parents=True)
    script = shutil.copy(RUN_8XH100[1], tree / "scripts")
    program(tree, crash).rename(tree / "train_gpt.py")
    with Launch(["bash", script], settings, tmp_path) as run:
        assert run.wait() == 0, run.output
    assert (tree / "crashed").exists() and "; restart 1 of 1\n" in run.output
    (row,) = rows(settings)
    assert row["status"] == "ok" and row["resumes"] == "1"
    assert run.output.count(f"run_id:{row['run_id']}") == 2
    assert [path.stem for path in settings["LOG_DIR"].glob("[!.]*.json")] == [row["run_id"]]
    whole = settings | {"RUN_ID": "whole", "RESULTS_CSV": tmp_path / "whole.csv"}
    assert launch(whole, world=2)[0] == [0, 0]
    names = (row["run_id"], "whole")
    resumed, uninterrupted = (curve(settings["LOG_DIR"] / f"{name}.csv") for name in names)
    assert resumed == uninterrupted and len(resumed) == 9


def test_ranks_that_torchrun_starts_again_are_refused(settings):
    """They may look for a rank that is gone; the script starts all of them again."""
    codes, out = launch(settings | {"TORCHELASTIC_RESTART_COUNT": 1})
    assert codes == [2] and "bash scripts/run_8xh100.sh starts all ranks again" in out


def test_what_would_fail_again_is_not_tried_again(settings, tmp_path):
    settings |= {"VOCAB_SIZE": 63, "NPROC_PER_NODE": 2, "MAX_RESTARTS": 1}
    with Launch(RUN_8XH100, settings, tmp_path) as run:
        assert run.wait() == EXIT_CODES["data"], run.output
    (row,) = rows(settings)
    assert row["status"] == "data", run.output
    attempts = list((settings["LOG_DIR"] / "torchrun").glob("*/attempt_*"))
    told = re.findall(r"^\[default\d\]:data: ", run.output, re.M)  # beside torchrun's table
    assert len(attempts) == len(told) == 1 and "  traceback : data: " in run.output, run.output


@pytest.mark.parametrize("status", [*EXIT_CODES, "running", ""])
def test_restarts_go_by_the_status_that_is_written(settings, tmp_path, status):
    """By a torchrun that trains nothing: it leaves a summary, or none, and fails as it always
    does, with 1."""
    (tmp_path / "tree" / "scripts").mkdir(parents=True)
    script = shutil.copy(RUN_8XH100[1], tmp_path / "tree" / "scripts")
    (tmp_path / "bin").mkdir()
    leaves = ends(status, "exit 1") if status else "exit 1"
    executable(tmp_path / "bin" / "torchrun", f'echo "$*" >> {tmp_path}/starts\n{leaves}')
    settings["LOG_DIR"].mkdir()
    settings |= {"PATH": f"{tmp_path / 'bin'}:{PATH}", "MAX_RESTARTS": 2}
    with Launch(["bash", script], settings, tmp_path) as run:
        code = run.wait()
    is_final = status in ("config", "data", "diverged", "oom")
    assert code == (EXIT_CODES[status] if is_final else 1), run.output
    starts = (tmp_path / "starts").read_text().splitlines()
    assert len(starts) == (1 if is_final else 3)
    assert run.output.count(f": status {status or 'unknown'}; restart ") == len(starts) - 1


SRUN = r"""
echo "$*" >> "$ASKED/srun"
echo $$ > "$ASKED/pid"
while [[ $1 == -* ]]; do shift; done
eval "${INSTEAD:-}"
exec "$@"
"""
SCONTROL = """
if [ "$1 $2" = "show hostnames" ]; then
    echo localhost; echo other
else
    echo "$*" >> "$ASKED/scontrol"
fi
"""


@pytest.fixture
def slurm(tmp_path):
    """The variables of a job on one node; commands on PATH note what they are asked for."""
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin" / "srun", SRUN)
    executable(tmp_path / "bin" / "scontrol", SCONTROL)
    return {
        "PATH": f"{tmp_path / 'bin'}:{PATH}",
        "ASKED": tmp_path,
        "SLURM_JOB_ID": 77,
        "SLURM_NNODES": 1,
        "SLURM_JOB_NODELIST": "local[host]",
        "SLURM_SUBMIT_DIR": ROOT,
        "SLURM_CPUS_PER_TASK": 3,
        "NPROC_PER_NODE": 2,
    }


def test_a_slurm_job_queues_itself_again_until_the_run_is_done(settings, slurm, tmp_path):
    del settings["RUN_ID"]
    asked, settings = settings | slurm | LONG, settings | {"RUN_ID": "slurm-77"}
    asked |= {"SHARD_TAIL": "keep"}  # of which nothing is warned
    with Launch(SBATCH, asked, tmp_path) as run:
        run.wait_for(lambda: last_step(settings) >= 5)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
        assert run.wait() == 0, run.output
    assert [(row["run_id"], row["status"]) for row in rows(settings)] == [
        ("slurm-77", "preempted")
    ], run.output
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"
    with Launch(SBATCH, asked | {"NUM_ITERATIONS": checkpoints(settings)[-1] + 4}, tmp_path) as run:
        assert run.wait() == 0, run.output
    (row,) = rows(settings)
    assert row["status"] == "ok" and row["resumes"] == "1" and "warning: goes on" in run.output, (
        run.output
    )
    assert run.output.count("warning:") == 1, [
        line for line in run.output.splitlines() if "warning:" in line
    ]
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"  # still the one of before
    assert "--kill-on-bad-exit=0 --wait=240 --cpus-per-task=3" in (tmp_path / "srun").read_text()


def ends(status, code):
    """A srun that starts no run, but leaves a summary with this status, unlike any before."""
    summary = f'{{\n \\"status\\": \\"{status}\\", \\"resumes\\": $$\n}}'
    return f'echo "{summary}" > "$LOG_DIR/toy.json"; {code}'


CRASH_ONCE = f"[ -e $ASKED/2 ] || {{ touch $ASKED/2; {ends('crash', 'exit 1')}; }}; "


# What srun does, the status before, exit code, starts of srun, whether the job is queued again.
ENDINGS = {
    **{
        status: (ends(status, f"exit {code}"), "", code, 1 + 2 * (status == "crash"), False)
        for status, code in EXIT_CODES.items()
        if status != "preempted"
    },
    "crash, then ok": (CRASH_ONCE + ends("ok", "exit 1"), "", 0, 2, False),
    "preempted": (ends("preempted", "exit 1"), "preempted", 0, 1, True),
    # queueing this again would never end
    "preempted before, no start": ("exit 7", "preempted", 7, 3, False),
    "no start": ("exit 7", "", 7, 3, False),
    "killed": (ends("running", "exit 0"), "", 1, 3, False),
    "crash in scancel": (ends("crash", "kill $PPID; exit 1"), "", 1, 1, False),
    "scancel": (ends("preempted", "kill $PPID; exit 1"), "", 143, 1, False),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_slurm_job_goes_by_the_status_that_is_written(settings, slurm, tmp_path, name):
    ending, before, code, starts, requeued = ENDINGS[name]
    settings["LOG_DIR"].mkdir()
    if before:
        (settings["LOG_DIR"] / "toy.json").write_text(
            json.dumps({"status": before, "resumes": -1}, indent=1)
        )
    with Launch(SBATCH, settings | slurm | {"INSTEAD": ending, "MAX_RESTARTS": 2}, tmp_path) as run:
        assert run.wait() == code, run.output
    assert len((tmp_path / "srun").read_text().splitlines()) == starts, run.output
    assert (tmp_path / "scontrol").exists() == requeued


SAYS_PLAN = """
import os, sys
if "DRY_RUN" not in os.environ:
    sys.exit("data: fetch it")
print("tokens_on_disk:" + os.environ["SHARDS"])
print("world", os.environ["WORLD_SIZE"])
"""


def baseline(tree, env):
    """(exit code, what it says) of run_baseline.sh in a tree where the trainer and the launcher
    print what reaches them; `env` may ask for GPUs."""
    (tree / "scripts").mkdir(exist_ok=True)
    (tree / "scripts" / "run_8xh100.sh").write_text('echo "$NPROC_PER_NODE" "$RUN_ID" "$LR" "$@"\n')
    (tree / "train_gpt.py").write_text(SAYS_PLAN)
    count = f"device_count = staticmethod(lambda: {env.pop('GPUS', 0)})"
    (tree / "torch.py").write_text(f"class cuda: {count}\n")
    script = shutil.copy(ROOT / "scripts" / "run_baseline.sh", tree / "scripts")
    env = {"PATH": f"{tree}:{PATH}", "SHARDS": 5, "PYTHONDONTWRITEBYTECODE": 1} | env
    env = {name: str(value) for name, value in env.items()}
    done = subprocess.run(["bash", script, "x y"], env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_baseline_takes_all_gpus_and_passes_settings_on(tmp_path):
    settings = {"GPUS": 8, "RUN_ID": "mine", "LR": 0.004}
    assert baseline(tmp_path, dict(settings)) == (0, "8 mine 0.004 x y\n")
    for change, count in (({"GPUS": 2}, 2), ({"NPROC_PER_NODE": 4}, 4)):
        assert baseline(tmp_path, settings | change) == (0, f"{count} mine 0.004 x y\n")
    assert baseline(tmp_path, {"GPUS": 8, "SHARDS": 0}) == (1, "data: fetch it\n")
    code, said = baseline(tmp_path, {"GPUS": 8, "DRY_RUN": 1})
    assert code == 0 and said.startswith(
        "tokens_on_disk:5\nworld 8\nNPROC_PER_NODE=8 RUN_ID=baseline-"
    )
    code, said = baseline(tmp_path, {"NPROC_PER_NODE": 8, "DRY_RUN": 1})
    assert code == 0 and "world 8\n" in said, "a plan needs no GPU"
    code, said = baseline(tmp_path, {})
    assert code == 2 and said.startswith("run_baseline.sh: error: torch finds no GPU, and")
    for asked in {"PRESET": "quickstart"}, {"DEVICE": "cpu", "GPUS": 8}:
        assert baseline(tmp_path, asked | {"RUN_ID": "slow"}) == (0, "1 slow  x y\n")


def test_scripts_parse_and_options_of_sbatch_are_read():
    for script in RUN_8XH100[1], SBATCH[1], ROOT / "scripts" / "run_baseline.sh":
        assert subprocess.run(["bash", "-n", script]).returncode == 0
    lines = SBATCH[1].read_text().splitlines()
    options = [line for line in lines if line.startswith("#SBATCH ")]
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert set(options) == {
        line for line in lines[:first] if "SBATCH --" in line
    }  # Slurm reads none after a command
    assert {"#SBATCH --signal=USR1@300", "#SBATCH --requeue"} <= set(options)


@pytest.mark.parametrize(
    "ranks, sentence",
    [
        ({"WORLD_SIZE": 2}, "config: WORLD_SIZE=2 without MASTER_ADDR; start ranks with torchrun"),
        ({"RANK": "abc"}, "config: RANK='abc': must be a whole number; start ranks with torchrun"),
        ({"RANK": 1}, "config: RANK=1: must be below WORLD_SIZE=1; start ranks with torchrun"),
        (
            {"LOCAL_RANK": 5},
            "config: LOCAL_RANK=5: must be below LOCAL_WORLD_SIZE=1; start ranks with torchrun",
        ),
    ],
)
def test_ranks_that_nobody_started_are_told_at_once(settings, ranks, sentence):
    codes, out = launch(settings | ranks)
    assert codes == [2] and out.startswith(sentence), out


@pytest.mark.parametrize(
    "env, sentence",
    [
        ({}, "MASTER_PORT='': must be 1 to 65535; start ranks with torchrun"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT='x': must be 1 to 65535; start ranks with torchrun"),
        (
            {"MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            "TORCHELASTIC_USE_AGENT_STORE without torchrun: every rank would wait",
        ),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=3: must be below"),
    ],
)
def test_ranks_that_could_not_meet_are_told_before_they_wait(env, sentence):
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"} | env
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}"):
        Ranks.from_env(env).check(env)


def lonely_rank(settings, output, rank=0):
    """The id of a forked rank of two; the other never comes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = settings | ranks | address
    return start({name: str(value) for name, value in env.items()}, output), port


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_ends_a_rank_that_waits_for_others(settings, monkeypatch, tmp_path, rank):
    monkeypatch.setattr(harness.ranks, "JOIN_PATIENCE", 0.2)
    output = tmp_path / "output.txt"
    pid, port = lonely_rank(settings, output, rank)
    words = f"rank {rank} waits for the 2 ranks to meet at 127.0.0.1:{port}; Ctrl-C ends it\n"
    deadline = time.monotonic() + 20
    while not (output.exists() and words in output.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(pid, signal.SIGINT)
    ended = 0
    while not ended and time.monotonic() < deadline:
        time.sleep(0.02)
        ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    assert ended and os.waitstatus_to_exitcode(status) == -signal.SIGINT
    assert not list(settings["LOG_DIR"].glob("toy*"))


def test_a_rank_whose_others_never_come_says_so_last(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(harness.ranks, "FIRST_STEP_TIMEOUT", 1)
    output = tmp_path / "output.txt"
    pid, port = lonely_rank(settings, output)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == EXIT_CODES["crash"]
    last = output.read_text().splitlines()[-1] or output.read_text().splitlines()[-2]
    told = f"RuntimeError: rank 0 waits for the 2 ranks to meet at 127.0.0.1:{port}: Timed out"
    assert last.startswith(told) and last.endswith("start all of them, with one address")


def test_a_refusal_stands_in_the_table_of_torchrun(settings, tmp_path):
    """Which torchrun prints last, below traces of its own."""
    error_file = tmp_path / "error.json"
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_ERROR_FILE": error_file}
    codes, out = launch(settings | torchrun | {"LR": "abc"})
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=codes[0], error_file=str(error_file))
    table = str(ChildFailedError("train_gpt.py", {0: failure}))
    assert "  traceback : config: LR='abc': must be a number\n" in table, table


def test_what_an_interrupted_run_prints_goes_on_when_it_is_pasted(settings, monkeypatch, tmp_path):
    """Into a shell where nothing is set; with values that a shell would take apart."""
    settings |= {"NUM_ITERATIONS": 150, "VAL_EVERY": 0, "NOTE": "it's a $note", "SAVE_EVERY": 0}
    settings |= {"RESULTS_CSV": tmp_path / "my results.csv"}
    monkeypatch.setattr(sys, "argv", ["train_gpt.py"])
    job = Job(settings)
    job.wait_for("step:9/")
    job.kill(signal.SIGINT)
    codes, out = job.wait()
    (command,) = re.findall(r"^preempted at step \d+; this goes on: (.*)$", out, re.M)
    pasted = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env={"PATH": PATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert codes == [0] and pasted.returncode == 0, out + pasted.stderr
    (row,) = rows(settings)
    assert (row["status"], row["resumes"], row["note"]) == ("ok", "1", "it's a $note")
    assert "warning" not in pasted.stderr
