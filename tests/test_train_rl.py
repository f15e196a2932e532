"""Whole runs of train_rl.py: what they learn, leave behind, survive and refuse."""

import functools
import math
import os
import re
import signal

import pytest
import torch
from conftest import Job, launch, points, row, summary, write_shard
from safetensors.torch import load_file

import rl_tasks
import train_gpt
import train_rl
from load_model import load_trained
from rl_tasks import Strings
from train_rl import Progress, next_length

OPTIONS = {  # of a run of a second
    "task": "copy",
    "length": 3,
    "steps": 4,
    "prompts-per-step": 3,
    "group-size": 5,
    "warm-up-steps": 3,
    "held-out": 12,
}
CLOCKS = ("train_time", "tokens_per_sec", "data_wait")


@pytest.fixture
def env(tmp_path, monkeypatch):
    """The settings of a tiny run that leaves everything below tmp_path."""
    monkeypatch.chdir(tmp_path)
    return {
        "N_LAYER": 2,
        "N_EMBD": 32,
        "N_HEAD": 2,
        "SEQUENCE_LENGTH": 24,
        "BATCH_SIZE": 8,
        "DEVICE_BATCH_SIZE": 4,
        "LR": 0.003,
        "LOG_EVERY": 1,
        "VAL_EVERY": 2,
        "SAVE_EVERY": 2,
        "DEVICE": "cpu",
        "RUN_ID": "toy",
        "LOG_DIR": tmp_path / "logs",
        "RESULTS_CSV": tmp_path / "results.csv",
    }


def main(options):
    """What a Job calls: train_rl.main with these options over those above."""
    words = []
    for name, value in (OPTIONS | options).items():
        if value is not None:
            words += [f"--{name}", str(value)] if value is not True else [f"--{name}"]
    return functools.partial(train_rl.main, words)


def run(env, world=1, **options):
    """A run with these options; its summary."""
    codes, output = launch(env, world, main(options))
    assert codes == [0] * world, output
    return summary(env)


def curve(env, run_id=None):
    """The curve without what a clock has measured."""
    return [
        {name: text for name, text in point.items() if name not in CLOCKS}
        for point in points(env, run_id)
    ]


def weights(env, run_id="toy"):
    return load_file(env["LOG_DIR"] / run_id / "model.safetensors")


# What is learned


def test_it_learns_to_copy(env):
    env |= {"BATCH_SIZE": 64, "DEVICE_BATCH_SIZE": 64, "VAL_EVERY": 0, "LR": 0.004}
    options = {"length": 2, "steps": 30, "prompts-per-step": 16, "group-size": 8}
    options |= {"warm-up-steps": 400, "warm-up-until": 0.1, "held-out": 100, "temperature": 0.5}
    learned = run(env, **options)
    assert learned["pass_at_1"] - learned["pass_at_1_before"] > 0.25


def test_rate_zero_has_the_same_warm_up_and_changes_nothing(env):
    learned = run(env, shaping="prefix")
    run(env | {"RUN_ID": "still"}, lr=0, shaping="prefix")
    load_trained("still", str(env["LOG_DIR"]))  # as any run
    losses = [point["val_loss"] for point in points(env, "still") if point["val_loss"]]
    assert len(losses) == 3 and set(losses) == {points(env)[0]["val_loss"]}
    assert learned["final_loss"] != learned["val_loss_before"]
    assert any(float(point["grad_norm"] or 0) > 0 for point in points(env, "still"))


@pytest.mark.parametrize(
    "settings, options",
    [
        ({"FFN": "moe", "RECURRENCE": "shared", "N_LAYER": 3}, {"loss": "grpo"}),
        ({"FFN": "moe", "BALANCE": "quantile", "MIXER": "gru_rwkv"}, {"loss": "dr_grpo"}),
        ({"DROPOUT": 0.3, "OPTIMIZER": "adamw"}, {"loss": "bnpo", "advantage": "centered"}),
        ({"MIXER": "mingru,attention"}, {"updates-per-step": 3, "kl": 0.1, "curriculum": True}),
    ],
)
def test_models_and_losses(env, settings, options):
    """A figure of every kind is there and finite."""
    made = run(env | settings, **options, shaping="prefix")
    assert made["status"] == "ok" and made["bad_steps"] == 0
    last = points(env)[-1]
    assert all(math.isfinite(float(last[name])) for name in train_rl.COLUMNS if last[name])
    learned = {name for point in points(env) for name in point if point[name]}
    assert learned >= {*train_rl.COLUMNS, "grad_norm", "train_loss"}
    assert made["tokens"] == sum_of_lengths(env)
    clipped = [float(point["clip_fraction"] or 0) for point in points(env)]
    assert max(clipped) == 0 or options.get("updates-per-step", 1) > 1


def sum_of_lengths(env):
    """The tokens of all answers, from the mean lengths of the curve."""
    answers = OPTIONS["prompts-per-step"] * OPTIONS["group-size"]
    lengths = [float(point["answer_length"]) for point in points(env) if point["answer_length"]]
    return round(sum(lengths) * answers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{}, {"FFN": "moe"}, {"MIXER": "gru_rwkv"}], ids=str)
def test_cuda_draws_and_learns_as_a_cpu(env, settings):
    options = {"shaping": "prefix", "lr": 1e-4}
    run(env | settings, **options)
    run(env | settings | {"RUN_ID": "cuda", "DEVICE": "cuda", "DTYPE": "float32"}, **options)
    for ours, theirs in zip(curve(env, "cuda"), curve(env), strict=True):
        for name in ("reward", "answer_length", "val_loss", "train_loss"):
            assert ours[name] == theirs[name] or float(ours[name]) == pytest.approx(
                float(theirs[name]), abs=1e-2
            )


def test_a_curriculum_goes_on_and_back():
    progress = Progress(length=1)
    for exact, length in [(1.0, 1)] * 4 + [(0.6, 2), (1.0, 2), *[(None, 2)] * 3, (0.0, 2)]:
        next_length(progress, exact, most=3)
        assert progress.length == length
    next_length(progress, 0.0, most=3)
    assert progress.length == 1
    progress = Progress(length=3, recent=[1.0] * 4)
    next_length(progress, 1.0, most=3)
    assert progress.length == 3


class Broken(Strings):
    """Its rewards: one that cannot be judged, one that is no number, one that raises."""

    mark = ":"

    def answer(self, prompt):
        return prompt[:-1]

    def reward(self, prompt, text):
        return {0: None, 1: math.nan}[ord(prompt[0]) % 3]


@pytest.mark.parametrize(
    "options, why",
    [
        ({"max-new-tokens": 1}, "answers earn nothing, or all the same; raise"),
        ({"task": "broken", "max-new-tokens": 9}, "no answer that ended could be judged"),
        ({"group-size": 1, "shaping": "prefix"}, "answers earn nothing, or all the same; raise"),
    ],
)
def test_a_run_says_when_nothing_can_be_learned(env, monkeypatch, options, why):
    """All truncated, all unscored, groups of one: nothing changes, all is finite and counted."""
    monkeypatch.setitem(rl_tasks.TASKS, "broken", Broken)
    monkeypatch.setattr(train_rl, "PATIENCE", 3)
    codes, output = launch(env, main=main({"warm-up-steps": 20} | options))
    assert codes == [0], output
    (warning,) = [line for line in output.splitlines() if "no group had a signal" in line]
    assert "warning: no group had a signal in 3 steps: " + why in warning
    first, *_, last = points(env)
    assert first["val_loss"] == last["val_loss"] and not last["grad_norm"]
    assert float(last["no_signal"]) == 1
    answers = OPTIONS["prompts-per-step"] * options.get("group-size", OPTIONS["group-size"])
    # What is truncated earns 0, whatever the task says.
    unscored = float(last["ended"]) * answers if "task" in options else 0
    assert float(last["unscored"]) == pytest.approx(unscored)


@pytest.mark.parametrize(
    "figures, why",
    [
        ({"ended": 1}, "no answer that ended could be judged; see the task's method reward"),
        ({"ended": 1, "exact": 1}, "all answers are right, nothing is left to learn"),
        ({"ended": 0, "exact": 0}, "no answer comes to its end; raise --max-new-tokens"),
        ({"ended": 1, "exact": 0}, "answers earn nothing, or all the same; raise"),
    ],
)
def test_what_is_said_of_silence(figures, why):
    assert train_rl.silence(figures).startswith(why)


# What is left behind


def test_records(env):
    made = run(env | {"STAGE": "rl", "VARIANT": "copy"})
    cells = row(env)
    assert cells["stage"] == "rl" and cells["status"] == "ok" and cells["task"] == "copy"
    assert float(cells["pass_at_1"]) == made["pass_at_1"] and cells["kl"] == "0.0"
    assert cells["config_hash"] == made["config_hash"] and len(made["val_fingerprint"]) == 64
    assert made["pass_at_1_low"] <= made["pass_at_1"] <= made["pass_at_1_high"]
    assert {"pass_at_1_before", "sampled_pass_at_8_before", "val_loss_before"} <= made.keys()
    assert "--length 3" in made["changes"] and "--group-size 5" in made["changes"]
    text = (env["LOG_DIR"] / "toy.txt").read_text()
    for file in ("train_gpt", "train_rl", "rl_settings", "rollouts", "grpo", "rl_tasks"):
        (path,) = train_rl.ROOT.rglob(f"{file}.py")
        assert path.read_text() in text
    shown = re.findall(r"^answer: '\w{3}:' -> '.*' (?:right|wrong)$", text, re.M)
    assert len(shown) == 6  # three at the beginning, three at the end


def test_a_trained_model_serves_other_scripts_and_goes_on_with_another_task(env):
    run(env)
    trained = load_trained("toy", str(env["LOG_DIR"]))
    assert trained.tokenizer.decode(trained.tokenizer.encode("3+5=abc>")) == "3+5=abc>"
    data = env["LOG_DIR"].with_name("data") / "fineweb10B"
    data.mkdir()  # the trainer's default: of another vocabulary, and nothing to this model
    write_shard(data / "fineweb_val_000000.bin", [50_000] * 20_000)
    env |= {"LR": ""}  # as the checkpoint has it
    made = run(
        env | {"RUN_ID": "next"}, **{"from": "toy", "task": "reverse", "warm-up-steps": None}
    )
    assert made["warm_up_steps"] == 0 and made["lr"] == pytest.approx(0.1 * 0.003)
    again = run(env | {"RUN_ID": "step"}, **{"from": env["LOG_DIR"] / "toy" / "step_000004"})
    assert again["data_fingerprint"] != made["data_fingerprint"]


def test_hashes_tell_options_apart_and_not_seeds(env):
    def plan(**options):
        codes, output = launch(env | {"DRY_RUN": 1}, main=main(options))
        assert codes == [0], output
        return dict(line.split(":", 1) for line in output.splitlines())

    plain = plan()
    assert plan(seed=7)["config_hash"] == plain["config_hash"]
    assert plan(kl=0.1)["config_hash"] != plain["config_hash"]
    longer = plan(length=4)
    assert longer["val_fingerprint"] != plain["val_fingerprint"]
    assert plain["source_sha"] != train_gpt.source_hash(train_gpt.SOURCE)
    assert not env["LOG_DIR"].exists() and not env["RESULTS_CSV"].exists()


# What a run survives


@pytest.mark.parametrize("at", ["warm-up", 3])
def test_a_killed_run_goes_on_bit_for_bit(env, monkeypatch, at):
    options = {"steps": 5, "shaping": "prefix", "curriculum": True, "kl": 0.1}
    run(env, **options)
    with monkeypatch.context() as patch:
        fatal = train_rl.pass_rate if at == "warm-up" else train_rl.take_step

        def dies(*args):
            if at == "warm-up" or args[2].step == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return fatal(*args)

        patch.setattr(train_rl, "pass_rate" if at == "warm-up" else "take_step", dies)
        codes, _ = launch(env | {"RUN_ID": "killed"}, main=main(options))
        assert codes == [-signal.SIGKILL]
    made = run(env | {"RUN_ID": "killed", "RESUME": "auto"}, **options)
    assert made["status"] == "ok" and made["resumes"] == 1
    assert curve(env, "killed") == curve(env)
    ours, theirs = weights(env, "killed"), weights(env)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_signal_ends_a_run_which_goes_on(env):
    whole = run(env)
    job = Job(env | {"RUN_ID": "asked"}, main=main({}))
    job.wait_for("step:0/4 val_loss")
    job.kill(signal.SIGTERM)
    codes, output = job.wait()
    assert codes == [0] and summary(env, "asked")["status"] in ("preempted", "ok"), output
    run(env | {"RUN_ID": "asked", "RESUME": "auto"})
    assert curve(env, "asked") == curve(env) and whole["status"] == "ok"


def test_ranks_change_no_result(env):
    options = {"shaping": "prefix", "updates-per-step": 2}
    run(env, **options)
    run(env | {"RUN_ID": "two"}, world=2, **options)
    for ours, theirs in zip(curve(env, "two"), curve(env), strict=True):
        for name in theirs:
            if theirs[name]:
                assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=1e-4), name


# What is refused


@pytest.mark.parametrize(
    "settings, options, code, sentence",
    [
        ({}, {"length": 30}, 2, "do not fit into SEQUENCE_LENGTH=24; lower --length 30"),
        ({}, {"operators": "/", "task": "arithmetic"}, 2, "--operators '/': expected some of +-*"),
        ({}, {"steps": 0}, 2, "NUM_ITERATIONS=0: must lie between 1"),
        ({}, {"temperature": 0}, 2, "--temperature 0.0: must lie between 0.001"),
        ({}, {"length": 19, "task": "arithmetic"}, 2, "has prompts up to length 18"),
        ({}, {"from": "nobody"}, 2, "nobody: expected a run id"),
        ({"INPUT_BIN": "x"}, {}, 2, "INPUT_BIN=x: expected it not to be set, for --task says"),
        ({"VOCAB_SIZE": 9}, {}, 2, "VOCAB_SIZE=9: the vocabulary has 43; unset it"),
        ({"BATCH_SIZE": 7}, {}, 2, "BATCH_SIZE=7: must be a multiple of DEVICE_BATCH_SIZE=4"),
        ({"NLAYER": 7}, {}, 2, "NLAYER is no setting; the name here is N_LAYER"),
    ],
)
def test_refusals_are_one_sentence(env, settings, options, code, sentence):
    codes, output = launch(env | settings, main=main(options))
    assert codes == [code] and sentence in output and "Traceback" not in output
    assert len(output.strip().splitlines()) == 1
    assert not (env["LOG_DIR"] / "toy.txt").exists()


def test_checkpoints_that_cannot_begin_a_run(env):
    run(env)
    for settings, damaged, sentence in (
        ({}, "model.safetensors", "does not hold the weights of this train_gpt.py's model"),
        ({}, "tokenizer.json", "has no tokenizer.json that can be read; copy that of its"),
        ({"N_LAYER": 5}, "tokenizer.json", "N_LAYER=5: the model of --from has 2; unset N_LAYER"),
    ):
        (env["LOG_DIR"] / "toy" / damaged).write_bytes(b"{")
        codes, output = launch(env | {"RUN_ID": "next"} | settings, main=main({"from": "toy"}))
        assert codes == [2] and sentence in output, output
        assert not (env["LOG_DIR"] / "next.txt").exists()


def test_a_run_goes_on_with_its_own_options_only(env):
    run(env)
    codes, output = launch(env | {"RESUME": "auto"}, main=main({"group-size": 6, "kl": 0.5}))
    assert codes == [2] and "GROUP_SIZE 5 -> 6, KL 0.0 -> 0.5; set them back" in output


def texts(env):
    return {name: str(value) for name, value in env.items()}


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--steps", "many"], "argument --steps: invalid int value: 'many'; --help says which"),
        (["--task", "sort"], "invalid choice: 'sort' (choose from 'copy', 'reverse', 'arithm"),
        (["--len", "3"], "unrecognized arguments: --len 3; --help says which options there are"),
        (["LR=1"], "unrecognized arguments: LR=1; settings go before: LR=0.003 python scripts/"),
    ],
)
def test_wrong_options_are_one_line(env, capsys, words, sentence):
    with pytest.raises(SystemExit, match="2"):
        train_rl.main(words, texts(env))
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line and not env["LOG_DIR"].exists()


def test_what_is_in_vain_is_told(env, capsys):
    settings = texts(env | {"DRY_RUN": 1, "TASK": "reverse"})
    options = {"group-size": 1, "max-new-tokens": 3}
    assert main(options)(settings) == 0
    captured = capsys.readouterr()
    assert "\ntask:copy\n" in captured.out and captured.err.splitlines() == [
        "warning: TASK is no setting; the option is --task",
        "warning: --group-size 1: a group of one has no mean to exceed; nothing is learned",
        "warning: --max-new-tokens 3: a right answer with its end has 4 or more",
    ]
    del settings["TASK"]
    assert main({"group-size": 2, "max-new-tokens": 4})(settings) == 0
    assert not capsys.readouterr().err


def test_a_folder_that_cannot_be_written(env, capsys):
    env["LOG_DIR"].with_name("data").touch()
    assert main({})(texts(env)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("config: data/rl/") and line.endswith("; start from another folder")
    assert not (env["LOG_DIR"] / "toy.txt").exists()


class AllHeldOut(Strings):
    """Its prompts have one key, which is held out: there is nothing to train on."""

    mark = ":"

    def answer(self, prompt):
        return prompt[:-1]

    def key(self, prompt):
        return "c"


def test_a_task_without_prompts_to_train_on(env, capsys, monkeypatch):
    assert rl_tasks.is_held_out(AllHeldOut(), "abc:")
    monkeypatch.setitem(rl_tasks.TASKS, "all", AllHeldOut)
    assert main({"task": "all"})(texts(env)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--task all: all of 1000 prompts of length 3 are held out; choose another" in line
    assert not (env["LOG_DIR"] / "toy.txt").exists()


def test_the_stop_file_ends_a_run_which_goes_on(env, monkeypatch):
    run(env)
    original = train_rl.take_step

    def asked(learner, lesson, at):
        if at.step == 1:
            at.records.files.stop.touch()
        original(learner, lesson, at)

    with monkeypatch.context() as patch:
        patch.setattr(train_rl, "take_step", asked)
        assert run(env | {"RUN_ID": "asked"})["status"] == "stopped"
    assert run(env | {"RUN_ID": "asked", "RESUME": "auto"})["status"] == "ok"
    assert curve(env, "asked") == curve(env)
