"""scripts/run_stage.py: what is run, in what environment, what counts as done; kills, failures, the
gate, Slurm."""

import contextlib
import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock

import derive_stage
import launch_runs
import plan_stage
import run_stage
import stages
import submit_slurm
import time_stage
from harness.provenance import device_name
from harness.settings import ROOT
from store.contract import ConfigError
from store.source import source_hash
from store.tables import update_results
import train_gpt
from conftest import TINY
from stages import load_stage
from train_gpt import Config


@pytest.fixture
def project(shards, tmp_path, monkeypatch):
    """A stage `toy` of two variants and two seeds that train in no time, below tmp_path."""
    monkeypatch.chdir(tmp_path)
    base = {name.upper(): value for name, value in (TINY | shards).items()} | {
        "MAX_EPOCHS": 0,
        "LR": 0.01,
    }
    Path("experiments/stages").mkdir(parents=True)
    write_stage(base, {"plain": {}, "gated": {"ATTNGATE": "headwise"}})
    for name in list(os.environ):
        if hasattr(Config, name.lower()):
            monkeypatch.delenv(name)
    return base


def write_stage(base, variants, name="toy", **more):
    tables = {"question": "Is it so?", "reference": "plain", "seeds": [1, 2]} | more
    lines = [
        f"{key} = {json.dumps(value)}"
        for key, value in tables.items()
        if not isinstance(value, dict)
    ]
    lines += ["[base]", *(f"{key} = {json.dumps(value)}" for key, value in base.items())]
    for label, own in variants.items():
        lines += [
            f"[variants.{json.dumps(label)}]",
            *(f"{key} = {json.dumps(value)}" for key, value in own.items()),
        ]
    for key, value in tables.items():
        lines += (
            [f"[{key}]", *(f"{k} = {stages.toml_value(v)}" for k, v in value.items())]
            if isinstance(value, dict)
            else []
        )
    Path(f"experiments/stages/{name}.toml").write_text("\n".join(lines))


def plan(seeds=(1, 2), mode="run", name="toy"):
    plan_stage.checked.cache_clear()
    stage = load_stage(name)
    return plan_stage.plan_runs(stage, dict.fromkeys(stage.variants, seeds), 1, mode)


def rows():
    with open("experiments/results.csv", newline="") as file:
        return list(csv.DictReader(file))


def script(*arguments, **env):
    return [sys.executable, str(ROOT / "scripts" / "run_stage.py"), *arguments], dict(
        os.environ
    ) | env


def test_a_stage_killed_in_the_middle_ends_with_the_same_rows_none_twice(
    project, monkeypatch, capfd
):
    """kill -9 of the script while a run is live; the run goes on, the next start waits for it and
    does the rest."""
    write_stage(
        project | {"NUM_ITERATIONS": 300, "DEVICE_BATCH_SIZE": 12},
        {"plain": {}, "hot": {"LR": 1e20, "MUON_LR": 1e20, "MAX_BAD_STEPS": 2}},
        seeds=[1],
    )
    for name, value in {"LR": "99", "RANK": "0", "SEED": "7"}.items():
        monkeypatch.setenv(name, value)
    command, env = script("toy")
    first = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (
        not Path("experiments/results.csv").exists()
        or "running" not in Path("experiments/results.csv").read_text()
    ):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    live = rows()[0]
    assert live["status"] == "running" and live["variant"] == "plain"
    assert run_stage.main(["toy"]) == 0, capfd.readouterr()
    assert "not passed on to the runs: SEED, LR" in capfd.readouterr().err
    found = {row["run_id"]: row for row in rows()}
    assert len(found) == 2 == len(rows()) and found[live["run_id"]]["resumes"] == "0"
    assert {row["variant"]: row["status"] for row in rows()} == {"plain": "ok", "hot": "diverged"}
    assert {(row["seed"], row["lr"]) for row in rows()} == {("1", "0.01"), ("1", "1e+20")}
    tables = "tables/toy.csv tables/toy.md tables/toy_gate.csv tables/toy_steps.csv"
    for path in f"{tables} figures/toy.png results_toy.csv log_curves_toy.csv".split():
        assert Path("experiments", path).stat().st_size, path
    assert "1 diverged" in Path("experiments/tables/toy.md").read_text()
    before = Path("experiments/results.csv").read_bytes()
    assert run_stage.main(["toy"]) == 0 and Path("experiments/results.csv").read_bytes() == before


def test_the_reference_runs_first_then_seed_by_seed(project):
    assert [(run.settings["VARIANT"], run.settings["SEED"]) for run in plan()] == [
        ("plain", "1"),
        ("plain", "2"),
        ("gated", "1"),
        ("gated", "2"),
    ]
    write_stage(project, {"a": {"LR": 0.1}, "plain": {}, "b": {"LR": 0.2}})
    assert [run.settings["VARIANT"] + run.settings["SEED"] for run in plan()] == [
        "plain1",
        "plain2",
        "a1",
        "b1",
        "a2",
        "b2",
    ]


def test_no_exported_setting_reaches_a_run(project, monkeypatch):
    exported = {
        "LR": "9",
        "SEED": "9",
        "PRESET": "quickstart",
        "RUN_ID": "x",
        "LEARNING_RATE": "9",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "elsewhere",
        "TORCHELASTIC_RESTART_COUNT": "1",
        "MY_OWN": "stays",
        "ATTN_GATE": "none",
        "WANDB_RUN_ID": "one for all",
        "WANDB_PROJECT": "stays",
    }
    for name, value in exported.items():
        monkeypatch.setenv(name, value)
    run = plan()[0]
    env = launch_runs.environment(run.settings, "cpu", 1, 2)
    assert {name: env[name] for name in exported if name in env} == {
        "LR": "0.01",
        "SEED": "1",
        "RUN_ID": run.run_id,
        "MY_OWN": "stays",
        "WANDB_PROJECT": "stays",
    }
    assert Config.from_env(env).changes() == Config.from_env(run.settings).changes()
    assert env["OMP_NUM_THREADS"] == os.environ.get(
        "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2))
    )


def test_each_of_several_jobs_has_devices_of_its_own_or_nothing_starts(
    project, monkeypatch, capsys
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,4,5")
    for slot, devices in enumerate(("0,1", "4,5")):
        assert launch_runs.environment({}, "cuda", 2, 2, slot)["CUDA_VISIBLE_DEVICES"] == devices
    assert launch_runs.environment({}, "cuda", 2)["CUDA_VISIBLE_DEVICES"] == "0,1,4,5"
    on_cuda = [replace(run, cfg=replace(run.cfg, device="cuda")) for run in plan(mode="slurm")]
    monkeypatch.setattr(run_stage, "plan_runs", lambda *_: on_cuda)
    assert run_stage.main(["toy", "--jobs", "5"]) == 2
    assert "--jobs 5 x --nproc 1: there are 4 CUDA devices" in capsys.readouterr().err


def finished(run, **more):
    names = dict(zip(plan_stage.IDENTITY, run.identity))
    return names | {"run_id": run.run_id, "status": "ok", "started": "2026"} | more


def test_done_is_what_has_the_same_settings_seed_source_and_data(project, monkeypatch, tmp_path):
    run = plan()[0]
    table = {"one": finished(run, run_id="one")}
    assert plan_stage.status_of(run, table) == "ok"
    for name in plan_stage.IDENTITY:
        assert plan_stage.status_of(run, {"one": table["one"] | {name: "other"}}) == ""
    assert (
        plan_stage.status_of(run, table | {"two": finished(run, run_id="two", status="crash")})
        == "ok"
    )
    assert plan_stage.status_of(run, {"two": finished(run, status="crash")}) == "crash"
    write_stage(project | {"N_EMBD": 64}, {"plain": {}})
    other = plan()[0]
    assert other.run_id != run.run_id and plan_stage.status_of(other, table) == ""
    write_stage(project | {"LOG_EVERY": 7}, {"plain": {}})
    assert plan()[0].run_id == run.run_id, "how often a line is logged changes no result"
    for edited in ("train_gpt.py", "shards"):
        if edited == "shards":
            shard = next(tmp_path.glob("toy_train_*1.bin"))
            shard.write_bytes(shard.read_bytes()[:-2] + b"\1\0")
        else:
            root = tmp_path / "clone"
            root.mkdir()
            monkeypatch.setattr(plan_stage, "ROOT", root)
            (root / "train_gpt.py").write_text(f"# a comment\n{train_gpt.SOURCE}")
            assert plan()[0].run_id == run.run_id, "a comment makes no other experiment"
            (root / "train_gpt.py").write_text(f"{train_gpt.SOURCE}\nEDITED = True\n")
        assert plan()[0].run_id != run.run_id and plan_stage.status_of(plan()[0], table) == "", (
            edited
        )
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)


def pretend(monkeypatch, body):
    """Has every run be this Python program, in the run's environment, in place of the trainer."""
    head = "import json, os, sys, time; from pathlib import Path\nenv = os.environ\n"
    monkeypatch.setattr(
        launch_runs, "command", lambda world, words: [sys.executable, "-c", head + body]
    )
    monkeypatch.setattr(launch_runs, "POLL", 0.02)


def pool(jobs=1, gate=None, keep_stopped=False):
    return launch_runs.Pool(jobs, gate, keep_stopped)


@contextlib.contextmanager
def signals_kept():
    kept = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def signals():
    with signals_kept():
        yield


def test_a_run_that_cannot_say_why_it_ended_gets_a_row_and_the_next_is_run(
    project, monkeypatch, capsys
):
    pretend(monkeypatch, "print('a word on', env['VARIANT']); sys.exit(9)")
    failed = pool().work(plan((1,)))
    assert [run.settings["VARIANT"] for run in failed] == ["plain", "gated"]
    for row, run in zip(rows(), failed):
        assert (row["run_id"], row["status"], row["seed"]) == (run.run_id, "crash", "1")
        assert "exit code 9" in row["error"]
        assert "a word on" in (run.files.folder / "output.txt").read_text()
        assert json.loads(Path(f"logs/{run.run_id}.json").read_text())["status"] == "crash"
    assert "0/2 " in capsys.readouterr().out


def test_what_the_trainer_has_said_last_is_the_truth(project, monkeypatch):
    """Of a table that it could not write the summary knows better; a refusal to go on does not
    change an old status."""
    run = plan((1,))[0]
    summary = finished(run, status="ok", final_loss=2.5)
    Path("logs").mkdir(exist_ok=True)
    pretend(
        monkeypatch,
        f"Path('logs', env['RUN_ID'] + '.json').write_text({json.dumps(summary)!r}); sys.exit(1)",
    )
    assert pool().work([run]) == [] and (rows()[0]["status"], rows()[0]["final_loss"]) == (
        "ok",
        "2.5",
    )
    update_results("experiments/results.csv", [summary | {"status": "preempted"}])
    Path(f"logs/{run.run_id}.json").write_text(json.dumps(summary | {"status": "preempted"}))
    pretend(monkeypatch, "print('config: it came to step 5 with other settings'); sys.exit(2)")
    assert pool().work([run]) == [run] and rows()[0]["status"] == "crash"
    assert rows()[0]["error"].startswith(
        "config: it came to step 5 with other settings (exit code 2; "
    )


def test_jobs_go_on_side_by_side_and_no_more_of_them(project, monkeypatch):
    pretend(
        monkeypatch,
        "Path('at', env['RUN_ID']).touch(); time.sleep(1)\n"
        "Path('seen', env['RUN_ID']).write_text(str(len(list(Path('at').iterdir()))))\n"
        "Path('at', env['RUN_ID']).unlink()",
    )
    Path("at").mkdir(), Path("seen").mkdir()
    pool(jobs=2).work(plan((1, 2)))
    seen = [path.read_text() for path in Path("seen").iterdir()]
    assert max(seen) == "2" and len(seen) == 4


def test_a_stage_of_which_nothing_finishes_says_so_and_can_go_on(project, monkeypatch, capsys):
    pretend(monkeypatch, "sys.exit(9)")
    assert run_stage.main(["toy"]) == 1
    out = capsys.readouterr().out
    assert (
        "some runs have no result yet; the same command goes on with them" in out
        and "no figure: " in out
    )
    assert [row["status"] for row in rows()] == ["crash"] * 4
    pretend(
        monkeypatch,
        f"row = json.loads({json.dumps(finished(plan()[0]))!r}) | dict(status='diverged')\n"
        "row |= {name: env[name.upper()] for name in ('run_id', 'variant', 'seed')}\n"
        "Path('logs', env['RUN_ID'] + '.json').write_text(json.dumps(row))",
    )
    assert run_stage.main(["toy", "--gate"]) == 0 and {row["status"] for row in rows()} == {
        "diverged"
    }
    assert "2 diverged" in Path("experiments/tables/toy.md").read_text()


def test_a_run_that_is_live_elsewhere_is_waited_for_and_not_started(project, monkeypatch):
    pretend(monkeypatch, "Path('started').write_text('twice')")
    run = plan((1,))[0]
    run.files.folder.mkdir(parents=True)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"""if True:
        import csv, time; from filelock import FileLock
        with FileLock({str(run.files.folder / "live.lock")!r}):
            print(flush=True); time.sleep(0.5)
            row = {finished(run)!r}
            with open('experiments/results.csv', 'w', newline='') as file:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader(); writer.writerow(row)""",
        ],
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    assert run.files.is_live() and pool().work([run]) == [] and not Path("started").exists()
    assert not run.files.is_live() and holder.wait() == 0
    FileLock(run.files.folder / "live.lock").acquire(
        timeout=0
    ).lock.release()  # looking has not taken it


def test_runs_are_of_the_code_that_they_were_planned_with(project, monkeypatch, tmp_path, capsys):
    """A trainer that is edited while a stage is run trains no other run of it, and a run that other
    code has trained is not called its result."""
    monkeypatch.setattr(plan_stage, "ROOT", tmp_path)
    trainer = tmp_path / "train_gpt.py"
    trainer.write_text(train_gpt.SOURCE)
    pretend(
        monkeypatch,
        f"open({str(trainer)!r}, 'a').write('EDITED = True\\n'); Path('started').write_text('')",
    )
    runs = plan((1,))
    assert pool().work(runs) == runs and Path("started").exists()
    out = capsys.readouterr().out
    assert "it ended without a word" in out
    assert "train_gpt.py or what it imports was edited since these runs were planned: 1 are" in out

    trainer.write_text(train_gpt.SOURCE)
    run = plan((2,))[0]
    summary = finished(run) | {"source_sha": "of_another"}
    pretend(
        monkeypatch,
        f"Path({str(run.files.json)!r}).write_text({json.dumps(json.dumps(summary))})",
    )
    assert pool().work([run]) == [run]
    out = capsys.readouterr().out
    assert (
        f"{run.run_id}: was trained by other code, source_sha of_another, than was planned" in out
    )
    assert f"{run.run_id}: of other code" in out
    assert run.run_id not in {row["run_id"] for row in rows()}


def test_a_signal_has_the_runs_save_and_nothing_else_start(project, monkeypatch):
    pretend(
        monkeypatch,
        "import signal; told = []; signal.signal(15, lambda *_: told.append(1))\n"
        "Path('up').touch(); time.sleep(1); Path('told').write_text(str(len(told)))",
    )
    runs, one = plan((1, 2)), pool()
    timer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"""if True:
        import os, time
        while not os.path.exists('up'): time.sleep(0.02)
        os.kill({os.getpid()}, 15)""",
        ]
    )
    failed = one.work(runs)
    assert (
        timer.wait() == 0
        and one.asked_to_end
        and Path("told").read_text() == "1"
        and len(failed) == 1
    )


CURVE = "step,tokens,train_loss,val_loss\n" + "".join(
    f"{step},{step},3.0,3.0\n" for step in range(0, 90, 10)
)


def test_the_gate_stops_live_runs_by_the_stop_file_but_never_the_reference(
    project, monkeypatch, capsys
):
    pretend(
        monkeypatch,
        "Path('logs', env['RUN_ID'] + '.csv').write_text(" + repr(CURVE) + ")\n"
        "stop = Path('logs', env['RUN_ID'], 'stop')\n"
        "for _ in range(100): time.sleep(0.02 * (not stop.exists()))\n"
        "Path('said', env['VARIANT']).write_text(str(stop.exists()))",
    )
    Path("said").mkdir()
    stage = load_stage("toy")
    pool(2, run_stage.stopper(stage), True).work(plan((1,)))
    assert Path("said/gated").read_text() == "True" and Path("said/plain").read_text() == "False"
    assert "stopped by the gate: " in capsys.readouterr().out


def test_stopped_runs_go_on_unless_the_gate_is_asked(project, monkeypatch):
    pretend(monkeypatch, "Path('started').touch()")
    run = plan((1,))[0]
    update_results("experiments/results.csv", [finished(run, status="stopped")])
    assert pool(keep_stopped=True).work([run]) == [] and not Path("started").exists()
    pool().work([run])
    assert Path("started").exists()


class Args:
    jobs, nproc, gate, seeds = 1, 1, True, ""


def test_the_gate_asks_for_seeds_until_it_can_tell_then_builds_the_next_stage(
    project, monkeypatch, capsys
):
    write_stage(
        project,
        {"plain": {}, "gated": {"ATTNGATE": "headwise"}, "off": {"ATTNGATE": "const"}},
        max_seeds=3,
    )
    with open("experiments/stages/toy.toml", "a") as file:
        file.write(
            '\n[gate]\nbetter = 0.2\n[[next]]\nname = "toy_5k"\nNUM_ITERATIONS = 5000\n'
            '[[next]]\nname = "toy_long"\nNUM_ITERATIONS = 9000\n'
        )
    asked = []
    monkeypatch.setattr(
        launch_runs.Pool,
        "work",
        lambda self, runs: (
            asked.append([run.settings["VARIANT"] + run.settings["SEED"] for run in runs]) or []
        ),
    )
    verdicts = iter(
        [
            {"plain": ("reference", ""), "gated": ("seed", "gated"), "off": ("hold", "")},
            {"plain": ("reference", ""), "gated": ("promote", ""), "off": ("hold", "")},
        ]
    )
    monkeypatch.setattr(
        run_stage,
        "finish",
        lambda stage, fresh_seeds: pd.DataFrame(
            [(name, *verdict, 2.5) for name, verdict in next(verdicts).items()],
            columns=["variant", "verdict", "seed_for", "val_loss"],
        ),
    )
    assert run_stage.work_through(load_stage("toy"), Args) == 0
    new = [run for run in asked[1] if run not in asked[0]]
    assert new == ["plain3", "gated3"], "the reference has as many, and first"
    table = pd.DataFrame(
        {"variant": ["gated", "off"], "verdict": "seed", "seed_for": ["gated", "plain"]}
    )
    seeds = {"plain": [1, 2], "gated": [1, 2], "off": [1, 2, 3]}
    assert run_stage.ask(load_stage("toy"), seeds, table) == [("plain", 3), ("gated", 3)]
    seeds = {"plain": [1, 2, 3], "gated": [1, 2, 3], "off": [1]}
    assert run_stage.ask(load_stage("toy"), seeds, table) == [], "max_seeds is 3"
    told = capsys.readouterr().out
    assert "next stage: experiments/stages/toy_5k.toml with 'gated' beside 'plain'" in told
    after = load_stage("toy_5k")
    assert list(after.variants) == ["plain", "gated"] and after.gate == {"better": 0.2}
    assert after.variants["gated"] == load_stage("toy").variants["gated"] | {
        "NUM_ITERATIONS": "5000"
    }
    assert after.next == ({"name": "toy_long", "NUM_ITERATIONS": 9000},) and after.axes == (
        "attngate",
    )
    assert "next stage: " in derive_stage.build_next(load_stage("toy"), ["gated"])
    assert "is left as it is" in derive_stage.build_next(load_stage("toy"), ["off"])
    assert "no variant is promoted" in derive_stage.build_next(load_stage("toy"), [])


def next_of(project, promoted, step, **more):
    """What `build_next` says, and the stage that it leaves, for three variants and one step."""
    variants = {"plain": {}, "gated": {"ATTNGATE": "headwise"}, "off": {"ATTNGATE": "const"}}
    write_stage(project, variants, **more)
    with open("experiments/stages/toy.toml", "a") as file:
        file.write(f"\n[[next]]\nname = 'after'\n{step}\n")
    Path("experiments/stages/after.toml").unlink(missing_ok=True)
    told = derive_stage.build_next(load_stage("toy"), promoted)
    exists = Path("experiments/stages/after.toml").exists()
    return told, load_stage("after") if exists else None


def test_a_step_says_how_many_go_on_and_what_is_tried_around_the_best(project):
    told, after = next_of(project, ["off", "gated"], "most = 1")
    assert list(after.variants) == ["plain", "off"] and "with 'off' beside 'plain'" in told
    _, after = next_of(project, ["off", "gated"], "most = 5")
    assert list(after.variants) == ["plain", "off", "gated"]

    around = 'most = 1\nLR = 0.5\naround."two heads" = {N_HEAD = 2, LR = 0.2}'
    _, after = next_of(project, ["off", "gated"], around)
    assert list(after.variants) == ["plain", "off", "off, two heads"]
    changed = {"N_HEAD": "2", "LR": "0.2"}
    assert after.variants["off, two heads"] == after.variants["off"] | changed
    assert after.variants["off"]["LR"] == "0.5" and {*after.references.values()} == {"plain"}
    runs = plan((1,), name="after")
    assert [run.cfg.attngate for run in runs] == ["none", "const", "const"]

    told, after = next_of(project, [], around)
    assert list(after.variants) == ["plain", "plain, two heads"], "the reference is the best"
    assert next_of(project, [], "most = 1") == ("no next stage: no variant is promoted", None)


def test_what_follows_a_stage_is_compared_in_the_same(project):
    step = 'LR = 0.5\naround."two heads" = {N_HEAD = 2}'
    assert next_of(project, ["gated"], step)[1].measure == "final_loss"
    assert "measure" not in Path("experiments/stages/after.toml").read_text()
    _, after = next_of(project, ["gated"], step, measure="pass_at_1")
    assert after.measure == "pass_at_1" and list(after.variants)[-1] == "gated, two heads"


def test_with_several_references_what_has_that_of_the_best_goes_on(project):
    write_stage(project, {"plain": {}, "gated": {"ATTNGATE": "headwise"}}, reference="")
    text = Path("experiments/stages/toy.toml").read_text().replace('reference = ""', "")
    tail = "\n[grid]\nLR = [0.1, 0.2]\n[[next]]\nname = 'after'\n"
    Path("experiments/stages/toy.toml").write_text('against = "plain"\n' + text + tail)
    told = derive_stage.build_next(load_stage("toy"), ["gated LR=0.2", "gated LR=0.1"])
    assert "beside 'plain LR=0.2', without 'gated LR=0.1'; python" in told
    after = load_stage("after")
    assert after.references == {"plain LR=0.2": "plain LR=0.2", "gated LR=0.2": "plain LR=0.2"}


def test_a_dry_run_prints_commands_that_are_the_runs(project, capsys):
    runs = plan()
    update_results(
        "experiments/results.csv",
        [
            finished(
                runs[0],
                train_time=2.0,
                tokens=10000,
                flops_per_token=runs[0].plan["flops_per_token"],
                ffn="relu2",
                world_size=1,
                device_name=device_name(train_gpt.torch.device("cpu")),
            )
        ],
    )
    assert run_stage.main(["toy", "--dry-run"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "# plain: the reference",
        "# gated: against plain: ATTNGATE none -> headwise, GATEPOS=sdpa, GATEACT=sigmoid, "
        "GATE_OPTIMIZER=auto",
    ]
    lines = lines[2:]
    assert len(lines) == 4 and lines[0].startswith("# ") and lines[0].endswith("# has a result: ok")
    for line, run in zip([lines[0][2:], *lines[1:]], runs):
        words = shlex.split(line, comments=True)
        env = dict(word.split("=", 1) for word in words if re.match("[A-Z_0-9]+=", word))
        assert env == run.settings
        assert words[len(env) :] == ["python", "train_gpt.py"]
    seconds = 2.0 * runs[1].plan["tokens_needed"] / 10000
    assert f"FLOPs, {seconds:.0f} s" in lines[1] and total.startswith("# 3 of 4 runs to do")
    assert run_stage.main(["toy", "--dry-run", "--gpu", "h100"]) == 0
    assert re.search(r"FLOPs, 0 s, \$\d+\.\d\d$", capsys.readouterr().out.splitlines()[3])


def test_a_dry_run_needs_no_data(project, capsys):
    write_stage(project | {"INPUT_BIN": "gone/x_train_*.bin", "VOCAB_SIZE": 0}, {"plain": {}})
    assert run_stage.main(["toy", "--dry-run"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert "RUN_ID" not in line and " python train_gpt.py " in line
    assert run_stage.main(["toy"]) == 2
    assert (
        "run_stage.py: error: toy, plain: VOCAB_SIZE=0 needs index.json" in capsys.readouterr().err
    )
    write_stage(project | {"NUM_ITERATIONS": 1000, "MAX_EPOCHS": 1}, {"plain": {}})
    assert run_stage.main(["toy", "--dry-run"]) == 0, "nor all of it"
    assert "RUN_ID" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["tou"], "STAGE tou: choose one of absent, equal, held, idle, long, never, "),
        (["toy", "--jobs", "0"], "both must be at least 1"),
        (["toy", "--set", "lr=1"], "--set lr=1: must be NAME=VALUE"),
        (["toy", "--set", "LR=1", "--set", "LR=2"], "--set LR: is there twice, as 1 and 2"),
        (["toy", "--set", "LR=x"], "LR='x': must be a number"),
        (["toy", "--nproc", "5"], "toy, plain: BATCH_SIZE=12:"),
        (
            ["toy", "--set", "LEARNING_RATE=1"],
            "LEARNING_RATE is no setting; python train_gpt.py --help",
        ),
        (["toy", "--set", "MIXER=x"], "choose one of attention"),
        (["toy", "--set", "LR=0.5"], "--set LR makes another stage of toy; give it a name by --as"),
        (
            ["toy", "--set", "ATTNGATE=const", "--as", "t"],
            "--set ATTNGATE=const: variants of toy have their own, const, headwise; write a stage",
        ),
        (
            ["toy", "--set", "LOG_DIR=x"],
            "--set LOG_DIR: is not for a stage to set; --seeds takes seeds, run_",
        ),
        (["toy", "--slurm", "partition"], "partition: must be NAME=VALUE"),
        (["toy", "--slurm"], "needs time=MINUTES"),
        (["toy", "--slurm", "time=9", "--gate"], "cannot have --gate"),
        (
            ["toy", "--set", "NUM_ITERATION=3"],
            "NUM_ITERATION is no setting; did you mean NUM_ITERATIONS?",
        ),
        (
            ["toy", "--set", "MAX_BAD_STEPS=0", "--seeds", "1,x"],
            "--seeds 1,x: must be different whole numbers, as in 101,102",
        ),
        (["toy", "--seeds", "3,3"], "3,3: must be different whole numbers"),
        (["toy", "--seeds", "3,03"], "3,03: must be different whole numbers"),
        (["toy", "--set", "LR=1", "--as", "../x"], "--as '../x': must be letters, digits, _"),
        (["toy", "--set", "LOG_EVERY=3", "--as", "x"], "--set changes nothing that is trained"),
        (["toy", "--set", "BATCH_SIZE=3", "--as", "x"], "x, plain: BATCH_SIZE=3"),
        (["toy", "--no-run"], "has no run in experiments/results.csv or results_toy.csv; python"),
        *(
            (["toy", "--seconds", text], f"argument --seconds: {text!r} must be a number above 0")
            for text in ("0", "-1", "nan", "inf", "x")
        ),
        (["toy", "--measure-again"], "--measure-again goes with --seconds"),
        (["toy", "--seconds", "9", "--slurm", "time=9"], "--seconds measures on this machine"),
        (["toy", "--seconds", "9", "--no-run"], "toy_9s.toml is not there; the same command witho"),
        (["timed", "--seconds", "9"], "--seconds: timed is a stage at equal time; its variants ha"),
        (["timed", "--set", "LR=1", "--as", "x"], "--set LR: timed has step times of its settings"),
        (["toy", "--seconds", "7"], "experiments/stages/toy_7s.toml is there and is not of toy at"),
        (["absent", "--seconds", "9"], "absent, plain: VOCAB_SIZE=0 needs index.json"),
        (["other", "--seconds", "9"], "--seconds: other runs mine.py, whose steps cannot be timed"),
        (["never"], "variants plain and gated of never are never validated after the same tokens"),
        (
            ["held", "--set", "NUM_ITERATIONS=20", "--as", "short"],
            "--set NUM_ITERATIONS=20: variants of held have their own, 4, 8; write a stage for it",
        ),
        (
            ["held"],
            "held varies LR, but MUON_LR stays at 0.0018, as the preset has it, and does not",
        ),
        (
            ["idle"],
            "variants plain and gated of idle are said to differ in GATEACT, which has no effect",
        ),
        (["equal"], "variants plain and gated of equal are said to differ in LR, which is 0.01 in"),
        (
            ["texts"],
            "variants plain and gated of texts are validated on different data or amounts, 64 "
            "tokens of ",
        ),
        (["long"], "long, plain: NUM_ITERATIONS=1000"),
        (["same"], "variants plain and gated of same have the same settings"),
        (["typo"], "ATTNGATES is no setting; the name here is ATTNGATE"),
        (["rule"], "gate.bettr = 1 is no rule"),
        *(
            (["solved", "--gate", *more], "--gate: the stage compares pass_at_1, and the gate's")
            for more in ([], ["--dry-run"], ["--set", "LR=0.5", "--as", "t"])
        ),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence_and_starts_nothing(
    project, monkeypatch, capsys, arguments, sentence
):
    monkeypatch.setattr(sys, "argv", ["run_stage.py"])  # which argparse names
    write_stage(project | {"NUM_ITERATIONS": 1000, "MAX_EPOCHS": 1}, {"plain": {}}, "long")
    write_stage(project, {"plain": {}, "gated": {}}, "same")
    write_stage(project, {"plain": {}, "gated": {"ATTNGATES": "headwise"}}, "typo")
    write_stage(project, {"plain": {}}, "rule", gate={"bettr": 1})
    held = {name: value for name, value in project.items() if name not in ("LR", "VOCAB_SIZE")}
    steps = {"plain": {"LR": 0.1, "NUM_ITERATIONS": 4}, "slow": {"LR": 0.2, "NUM_ITERATIONS": 8}}
    write_stage(held | {"PRESET": "quickstart", "VOCAB_SIZE": 64}, steps, "held")
    gated = {"ATTNGATE": "headwise"}
    act = {"GATEACT": "ns_sigmoid", "QK_NORM": 0}
    write_stage(project, {"plain": {}, "gated": act}, "idle")
    write_stage(project, {"plain": {"LR": "1e-2"}, "gated": gated | {"LR": 0.01}}, "equal")
    fewer = {"VAL_TOKENS": project["SEQUENCE_LENGTH"]}
    write_stage(project, {"plain": {}, "gated": gated | fewer}, "texts")
    often = {"plain": {"VAL_EVERY": 4}, "gated": gated | {"NUM_ITERATIONS": 6, "VAL_EVERY": 3}}
    write_stage(project, often, "never")
    timed = {"seconds": 1}, {"plain": {"NUM_ITERATIONS": 4}}
    write_stage(project, {"plain": {}}, "timed", equal_time=timed[0], schedules=timed[1])
    write_stage(project, {"plain": {}}, "toy_7s")
    write_stage(project | {"INPUT_BIN": "gone/x_*.bin", "VOCAB_SIZE": 0}, {"plain": {}}, "absent")
    write_stage(project, {"plain": {"goal": 1}}, "other", program="mine.py")
    write_stage(project, {"plain": {}}, "solved", measure="pass_at_1")
    before = sorted(Path("experiments").rglob("*"))
    try:
        code = run_stage.main(arguments)
    except SystemExit as stopped:  # argparse's own
        code = stopped.code
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and error.startswith("run_stage.py: error: ") and sentence in error
    assert sorted(Path("experiments").rglob("*")) == before, "nothing is written"


PROGRAM = """
import argparse, os, sys
sys.path.insert(0, {root!r})
import train_gpt
from harness.run import Run

SOURCE = open(__file__).read()


def main(argv, env):
    parser = argparse.ArgumentParser()
    parser.add_argument("--goal", type=float, required=True)
    parser.add_argument("--twice", action="store_true")
    options = vars(parser.parse_args(argv))
    with Run(train_gpt.Config, env, SOURCE) as run:
        cfg = train_gpt.resolve(train_gpt.Config.from_env(env))
        plan = train_gpt.make_plan(cfg, run.ranks) | options
        plan |= {{"config_hash": cfg.hash(options), "source_sha": train_gpt.source_hash(SOURCE)}}
        plan["data_fingerprint"] = plan["val_fingerprint"] = "tasks"
        if cfg.dry_run:
            print("\\n".join(f"{{name}}:{{value}}" for name, value in plan.items()))
            return 0
        run.open(cfg, cfg.changes_text(), plan, ["pass_at_1"])
        run.poll(0), run.poll(cfg.num_iterations)
        loss = options["goal"] * (1 + options["twice"]) + cfg.seed / 100
        rate = {{"pass_at_1": loss / 8}}
        losses = {{"train_loss": loss, "val_loss": loss, "grad_norm": 1.0}}
        run.point(losses | rate, [], rate, [])
        run.close({{}})
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
"""


@pytest.fixture
def program(project, tmp_path, monkeypatch):
    """A stage `toy` of a program of its own, with two options."""
    for module in (plan_stage, launch_runs):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "mine.py").write_text(PROGRAM.format(root=str(ROOT)))
    variants = {"plain": {"goal": 3.0}, "low": {"goal": 1.0, "twice": True}}
    write_stage(project, variants, program="mine.py")
    plan_stage.asked_of.cache_clear()
    return project


def test_a_stage_may_run_another_program_with_options_of_its_own(program, capsys):
    assert run_stage.main(["toy", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "# low: against plain: goal 3.0 -> 1.0, twice=True\n" in out
    assert " python mine.py --goal 1.0 --twice  # " in out
    stage = load_stage("toy")
    runs = plan_stage.plan_runs(stage, dict.fromkeys(stage.variants, (1, 2)), 1, "run")
    assert len({run.identity[3] for run in runs}) == 2, "options enter the hash"
    assert run_stage.main(["toy", "--jobs", "2"]) == 0
    table = pd.read_csv("experiments/tables/toy.csv").set_index("variant")
    assert table.goal.tolist() == [3.0, 1.0] and table.twice.tolist() == [0, 1]
    assert table.final_loss.tolist() == pytest.approx([3.015, 2.015])
    assert table.difference["low"] == pytest.approx(-1) and table.pairs["low"] == 2
    assert {row["source_sha"] for row in rows()} == {source_hash(PROGRAM.format(root=str(ROOT)))}
    before = Path("experiments/results.csv").read_bytes()
    assert run_stage.main(["toy"]) == 0 and Path("experiments/results.csv").read_bytes() == before
    capsys.readouterr()

    path = Path("experiments/stages/toy.toml")
    path.write_text('measure = "pass_at_1"\n' + path.read_text())
    assert run_stage.main(["toy", "--no-run"]) == 0
    out = capsys.readouterr().out
    assert "Compared is pass_at_1 (greedy pass@1, held out; fraction of prompts)" in out
    assert "low: not judged, the stage compares pass_at_1, and" in out and "no figure" not in out
    table = pd.read_csv("experiments/tables/toy.csv").set_index("variant")
    assert table.pass_at_1.tolist() == pytest.approx([3.015 / 8, 2.015 / 8])
    assert table.difference["low"] == pytest.approx(-1 / 8)


def test_what_the_trainer_warns_of_is_said_once_before_a_stage(project, capsys):
    idle = {"TOP_K": 3, "VAL_EVERY": 9, "WARMDOWN_ITERS": 80}
    write_stage(project | idle, {"plain": {}, "gated": {"ATTNGATE": "headwise"}})
    assert run_stage.main(["toy", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for sentence in (
        "# warning: TOP_K has no effect without FFN=moe",
        "# warning: VAL_EVERY=9 leaves only the last validation",
        "# warning: WARMDOWN_ITERS=80 > NUM_ITERATIONS: LR starts at 10%",
    ):
        assert out.count(sentence) == 1, out


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"variants": {"plain": {}}},
            "toy, plain: mine.py with DRY_RUN=1: mine.py: error: the foll",
        ),
        (
            {"variants": {"plain": {"gaol": 1}}},
            "error: the following arguments are required: --goal",
        ),
        ({"program": "gone.py"}, "program = 'gone.py': is no file of the project"),
        ({"program": "../../etc/hostname"}, "is no file of the project"),
        ({"program": "/etc/hostname"}, "is no file of the project"),
        ({"program": "wordy.py"}, "wordy.py with DRY_RUN=1: tokens_needed:many is no whole number"),
        (
            {"program": "deaf.py", "variants": {"plain": {"w": 1}, "b": {"w": 2}}},
            "the same settings",
        ),
        ({"program": "quiet.py"}, "quiet.py with DRY_RUN=1: prints no config_hash"),
        ({"base": {"LR": "x"}}, "LR='x': must be a number"),
    ],
    ids=str,
)
def test_what_another_program_refuses_is_one_sentence(program, capsys, change, sentence):
    Path("quiet.py").write_text("print('source_sha:1')")
    Path("deaf.py").write_text("print('source_sha:1\\nconfig_hash:1')")
    Path("wordy.py").write_text("print('source_sha:1\\nconfig_hash:1\\ntokens_needed:many')")
    made = {"variants": {"plain": {"goal": 1.0}}, "program": "mine.py", "base": {}} | change
    write_stage(program | made["base"], made["variants"], program=made["program"])
    assert run_stage.main(["toy"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("run_stage.py: error: ") and sentence in error
    assert error.count("\n") == 1 and not Path("experiments/results.csv").exists()


def test_a_setting_for_all_runs_reaches_all_in_a_stage_of_its_own(project):
    stage = derive_stage.overridden(load_stage("toy"), ["LOG_EVERY=5", "NOTE=two words"], "")
    assert {(settings["LOG_EVERY"], settings["NOTE"]) for settings in stage.variants.values()} == {
        ("5", "two words")
    }
    assert stage.name == "toy"
    stage = derive_stage.overridden(load_stage("toy"), ["LR=0.5"], "fast")
    assert stage == load_stage("fast") and {
        settings["LR"] for settings in stage.variants.values()
    } == {"0.5"}
    assert derive_stage.overridden(load_stage("toy"), ["LR=0.5"], "fast") == stage
    with pytest.raises(ConfigError, match="--as fast: .* says something else"):
        derive_stage.overridden(load_stage("toy"), ["LR=0.6"], "fast")
    made = derive_stage.overridden(load_stage("toy"), ["LR=0.7"], "dry", write=False)
    assert {settings["LR"] for settings in made.variants.values()} == {"0.7"}
    assert run_stage.main(["toy", "--set", "LR=0.7", "--as", "dry", "--dry-run"]) == 0
    assert not Path("experiments/stages/dry.toml").exists(), "who only looks writes nothing"


def test_slurm_gets_the_same_runs_as_one_array_and_no_secret(project, monkeypatch, capsys):
    """submitit's executor for this machine, which runs what it would submit."""
    write_stage(project, {"plain": {}, "gated": {"ATTNGATE": "headwise"}}, seeds=[1])
    command, env = script("toy", "--slurm", "cluster=local", HF_TOKEN="hf_0123456789", LR="99")
    sent = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (
        "submitted 2 runs; when they have ended: python scripts/run_stage.py toy --no-run"
        in sent.stdout
    )
    deadline = time.monotonic() + 90
    while [row["status"] for row in plan_stage.results().values()] != ["ok"] * 2:
        assert time.monotonic() < deadline, rows()
        time.sleep(0.2)
    assert {row["run_id"] for row in rows()} == {run.run_id for run in plan((1,))}
    assert {row["lr"] for row in rows()} == {"0.01"}
    pickles = list(Path("logs/slurm").glob("*.pkl"))
    assert pickles and not any(b"hf_0123456789" in path.read_bytes() for path in pickles)
    assert (
        run_stage.main(["toy", "--no-run"]) == 0
        and Path("experiments/tables/toy.md").stat().st_size
    )
    assert run_stage.main(["toy", "--slurm", "cluster=local"]) == 0
    assert "submitted 0 runs" in capsys.readouterr().out


def test_slurm_from_a_machine_without_gpus_plans_for_those_of_the_nodes(project):
    base = {
        name: value for name, value in project.items() if name not in ("DEVICE", "DTYPE", "COMPILE")
    }
    write_stage(base, {"plain": {}})
    (run,) = plan((1,), "slurm")
    assert (run.cfg.device, run.cfg.dtype, run.settings["DEVICE"]) == (
        "cuda",
        "bfloat16",
        "cuda",
    ) and run.identity[-1]


def test_a_job_that_slurm_takes_away_ends_in_order_and_is_queued_again(monkeypatch, tmp_path):
    """The signal's handler runs inside __call__, as submitit has it; the run is told by TERM, not
    by USR2 before."""
    monkeypatch.chdir(tmp_path)
    pretend(
        monkeypatch,
        "import signal; signal.signal(15, lambda *_: (Path('saved').touch(), sys.exit(0)))\n"
        "Path('up').touch(); time.sleep(30)",
    )
    task, queued = submit_slurm.Task(), []

    def taken(*_):
        os.kill(task.process.pid, signal.SIGUSR2)
        queued.append(task.checkpoint({"A": "1"}, "cpu", 1, ["train_gpt.py"]))

    kept = signal.signal(signal.SIGUSR2, taken)
    waiter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"""if True:
        import os, time
        while not os.path.exists('up'): time.sleep(0.02)
        os.kill({os.getpid()}, {int(signal.SIGUSR2)})""",
        ]
    )
    assert (
        task({"A": "1"}, "cpu", 1, ["train_gpt.py"]) == 0
        and Path("saved").exists()
        and waiter.wait() == 0
    )
    signal.signal(signal.SIGUSR2, kept)
    assert queued[0].args == ({"A": "1"}, "cpu", 1, ["train_gpt.py"]) and isinstance(
        queued[0].function, submit_slurm.Task
    )


def test_the_readmes_dry_run_of_the_published_stage(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert run_stage.main(["stage1", "--nproc", "8", "--gpu", "h100", "--dry-run"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    lines = [line for line in lines if "torchrun" in line]
    assert len(lines) == 10 and all("--nproc_per_node=8 train_gpt.py  # " in line for line in lines)
    hours = 1500 * 524288 * 854654976 / (8 * 989e12 * 0.45) / 3600  # of the reference, by hand
    assert lines[0].endswith(f"FLOPs, {round(60 * hours)} min, ${hours * 8 * 3.5:.2f}")
    assert total.startswith("# 10 of 10 runs to do")


# Equal time


@pytest.fixture
def clock(project, monkeypatch):
    """Step times of the stage `toy`, ms by label and round, and the order in which they are asked
    for. One round is slow for all, and one figure is far off."""
    warm = {"WARMUP_ITERS": 2, "MAX_EPOCHS": 0}
    write_stage(project | warm, {"plain": {}, "gated": {"ATTNGATE": "headwise"}})
    known = {"plain": [5.0, 9.0, 5.0, 4.9, 5.1], "gated": [8.0, 14.0, 8.1, 7.9, 500.0]}
    asked = []

    def step_time(stage, label, device, world_size):
        asked.append(label)
        return known[label][asked.count(label) - 1]

    monkeypatch.setattr(time_stage, "step_time", step_time)
    return known, asked


def no_run(monkeypatch):
    """Has run_stage.py plan all and run nothing; returns the plans, a list a start."""
    plans = []
    monkeypatch.setattr(launch_runs.Pool, "work", lambda self, runs: plans.append(runs) or [])
    monkeypatch.setattr(run_stage, "finish", lambda *_: None)
    return plans


TIMED = Path("experiments/stages/toy_1s.toml")


def test_each_variant_has_the_steps_that_its_time_buys_measured_in_turns_once(
    clock, monkeypatch, capsys
):
    plans, (known, asked) = no_run(monkeypatch), clock
    assert run_stage.main(["toy", "--seconds", "1"]) == 0
    assert asked == "plain gated gated plain plain gated gated plain plain gated".split()
    stage = load_stage("toy_1s")
    assert stage.seconds == 1 and stage.references == load_stage("toy").references
    assert stage.axes == ("attngate",) and not stage.next
    tables = stages.read("toy_1s")
    assert tables["equal_time"]["step_ms"] == known, "all that was measured is kept"
    # 1000 ms / 5 and / 8.1, both in two validations as before, warm-up and decay in proportion
    cfgs = {run.settings["VARIANT"]: run.cfg for run in plans[0]}
    for label, steps in {"plain": 200, "gated": 122}.items():
        cfg = cfgs[label]
        assert (cfg.num_iterations, cfg.val_every) == (steps, steps // 2)
        assert (cfg.warmup_iters, cfg.warmdown_iters) == (steps // 4, steps // 2)
    assert {run.settings["STAGE"] for run in plans[0]} == {"toy_1s"}
    assert "plain: 5 ms a step (4.9 to 9), 200 steps" in capsys.readouterr().out
    assert {run.seconds for run in plans[0]} == {1.0}

    before = TIMED.read_bytes()
    assert run_stage.main(["toy", "--seconds", "1.0"]) == 0
    assert run_stage.main(["toy", "--seconds", "1", "--seeds", "7", "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert "--jobs 2: runs share the machine and take longer" in out and "warning" not in out
    assert run_stage.main(["toy_1s"]) == 0
    assert [run.run_id for run in plans[1]] == [run.run_id for run in plans[0]]
    assert [run.run_id for run in plans[3]] == [run.run_id for run in plans[0]]
    assert [(r.settings["SEED"], r.cfg) for r in plans[2]] == [("7", cfgs[v]) for v in known]
    assert len(asked) == 10 and TIMED.read_bytes() == before, "measured once"

    asked.clear()
    known["gated"] = [10.0] * 5
    known["plain"] = [5.0, 4.4, 4.5, 5.0, 5.0]
    assert run_stage.main(["toy", "--seconds", "1", "--measure-again"]) == 0
    assert "warning: the median of 'plain' is more than 1.1 times" in capsys.readouterr().out
    assert len(asked) == 10 and load_stage("toy_1s").variants["gated"]["NUM_ITERATIONS"] == "100"


def test_a_dry_run_at_equal_time_measures_and_writes_nothing(clock, monkeypatch, capsys):
    before = sorted(Path("experiments").rglob("*"))
    assert run_stage.main(["toy", "--seconds", "1", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "# would time the steps of 2 variants in turns, 5 rounds" in out
    assert "# then write experiments/stages/toy_1s.toml and run 2 variants x 2 seeds" in out
    assert sorted(Path("experiments").rglob("*")) == before and not clock[1]
    no_run(monkeypatch)
    assert run_stage.main(["toy", "--seconds", "1"]) == 0
    before = TIMED.read_bytes()
    assert run_stage.main(["toy", "--seconds", "1", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "NUM_ITERATIONS=122" in out and "would time" not in out
    assert out.splitlines()[-1].startswith("# 4 of 4 runs to do, 4 s of training")
    assert run_stage.main(["toy", "--seconds", "1", "--dry-run", "--measure-again"]) == 0
    assert "# would time" in capsys.readouterr().out
    assert TIMED.read_bytes() == before and len(clock[1]) == 10


def test_step_times_of_something_else_are_not_used_silently(clock, project, monkeypatch, capsys):
    no_run(monkeypatch)
    again = ["toy", "--seconds", "1"]
    assert run_stage.main(again) == 0
    before = TIMED.read_bytes()

    def told(name):
        for dry in ([], ["--dry-run"]):
            assert run_stage.main([*again, *dry]) == 2
            error = capsys.readouterr().err
            assert f"toy_1s.toml has step times for {name} " in error and error.count("\n") == 1
            assert "--measure-again" in error and "python scripts/run_stage.py toy_1s" in error
        assert run_stage.main(["toy_1s"]) == 0, "who asks for its steps gets them, and is told"
        assert f"toy_1s.toml has step times for {name} " in capsys.readouterr().err
        assert TIMED.read_bytes() == before and len(clock[1]) == 10

    with monkeypatch.context() as changed:
        changed.setenv("OMP_NUM_THREADS", "7")
        told("omp_num_threads")
    with monkeypatch.context() as changed:
        changed.setattr(time_stage, "device_here", lambda cfg: "another")
        told("device")
    with monkeypatch.context() as changed:
        changed.setattr(plan_stage, "source_now", lambda: "another")
        told("source_sha")
    write_stage(project | {"N_EMBD": 64}, {"plain": {}, "gated": {"ATTNGATE": "headwise"}})
    plan_stage.checked.cache_clear()
    told("settings_sha")


def test_times_that_cannot_be_had_leave_nothing_behind(clock, project, monkeypatch, capsys):
    """A step longer than the budget, a model that cannot be timed, Ctrl-C, a run that is live."""
    before = sorted(Path("experiments").rglob("*"))

    def refused(seconds="1"):
        assert run_stage.main(["toy", "--seconds", seconds]) == 2
        assert sorted(Path("experiments").rglob("*")) == before
        error = capsys.readouterr().err.splitlines()[-1]
        return error.removeprefix("run_stage.py: error: ")

    sentence = "--seconds 0.006: a step of toy's 'gated' takes 8.1 ms; give at least 0.0081"
    assert refused("0.006").startswith(sentence)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(time_stage, "step_time", interrupted)
    assert run_stage.main(["toy", "--seconds", "1"]) == 130
    assert "interrupted while no run was going on; the same" in capsys.readouterr().err
    assert sorted(Path("experiments").rglob("*")) == before
    run = plan((1,))[0]
    run.files.folder.mkdir(parents=True)
    update_results("experiments/results.csv", [finished(run, status="running")])
    before[:] = sorted(Path("experiments").rglob("*"))
    with FileLock(run.files.lock):
        assert f"alone on the machine, and {run.run_id} is live" in refused()
    with FileLock(Path("logs/step_times.lock")):
        assert "another run_stage.py times steps here" in refused()


def test_the_steps_are_timed_by_the_bench_in_a_process_of_its_own(project, monkeypatch):
    """Of the stage's settings and no others; what it refuses is one sentence."""
    monkeypatch.setattr(time_stage, "STEPS", 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("N_EMBD", "35")  # which is refused where it arrives
    assert time_stage.step_time(load_stage("toy"), "gated", "cpu", 1) > 0
    write_stage(project | {"N_EMBD": 33}, {"plain": {}})
    with pytest.raises(
        ConfigError, match="^toy, plain: its steps cannot be timed: config: N_HEAD=2 "
    ):
        time_stage.step_time(load_stage("toy"), "plain", "cpu", 1)
    assert not Path("logs").exists() and not Path("experiments/results.csv").exists()


def test_tables_figure_and_gate_compare_at_equal_shares_of_the_time(clock, project):
    """100 and 62 steps, which share no validated number of tokens but the shares of the time."""
    write_stage(project, {"plain": {}, "gated": {"ATTNGATE": "headwise"}}, seeds=[1])
    clock[0]["plain"] = [10.0] * 5
    clock[0]["gated"] = [16.0] * 5
    assert run_stage.main(["toy", "--seconds", "1", "--jobs", "2"]) == 0
    assert {(row["stage"], row["num_iterations"], row["status"]) for row in rows()} == {
        ("toy_1s", "100", "ok"),
        ("toy_1s", "62", "ok"),
    }
    steps = pd.read_csv("experiments/tables/toy_1s_steps.csv")
    assert steps.planned_seconds.tolist() == [0.5, 1.0]
    gate = pd.read_csv("experiments/tables/toy_1s_gate.csv").set_index(["kind", "variant"])
    table = pd.read_csv("experiments/tables/toy_1s.csv").set_index("variant")
    assert table.tokens.tolist() == [100 * 12 * 16, 62 * 12 * 16] and (table.train_time > 0).all()
    assert gate.difference["variant", "gated"] == pytest.approx(table.difference["gated"])
    assert gate.planned_seconds.tolist() == [1.0] * 4 and "time_over_plan" in gate
    text = Path("experiments/tables/toy_1s.md").read_text()
    assert "| tokens | train_time |" in text and "19,200" in text
    assert "Each variant has the steps that 1 s of training take by its step time" in text
    assert Path("experiments/figures/toy_1s.png").stat().st_size
    assert run_stage.main(["toy", "--seconds", "1", "--no-run"]) == 0
