"""scripts/rnn_demo.py: a text is learned, what it prints, what it leaves, and what it refuses."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import rnn_demo
import rnn_rl
import tokenization
from harness.settings import ROOT
from store.contract import ConfigError, DataError
import train_rl
from train_gpt import Config, ShardLoader

PANGRAM = "the quick brown fox jumps over the lazy dog. "
EPOCH = r"Epoch +(\d+) \| Loss: (\d+\.\d{6}) \| ∇: (\d+\.\d{4}) \| Time: (\d+\.\d)s"
SMALL = ["--hidden-size", "16", "--fast-mode"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Nothing of the environment is a setting."""
    for name in Config.__dataclass_fields__:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)


def epochs(out):
    """(epoch, loss) of every line of an epoch."""
    return [(int(found[1]), float(found[2])) for found in re.finditer(f"^{EPOCH}$", out, re.M)]


def written(out):
    """The text between the rules."""
    return out.split(f"{rnn_demo.RULE}\n")[1].removesuffix("\n")


def plan(*argv):
    """The Plan of a command, and the settings that the trainer gets."""
    args = rnn_demo.parse_args(list(argv))
    made = rnn_demo.loaded_plan(args) if args.load else rnn_demo.new_plan(args, None)
    return made, Config.from_env(made.env)


def test_a_pangram_is_learned_by_heart(capsys):
    """What it writes goes on with the text, and the lines are those of the program's format."""
    Path("pangram.txt").write_text(PANGRAM * 40)
    argv = ["--file", "pangram.txt", "--epochs", "15", "--log-every", "6", "--run-id", "fox"]
    assert rnn_demo.main([*argv, "--temperature", "0.1", "--gen-length", "60"]) == 0
    out = capsys.readouterr().out
    assert [epoch for epoch, _ in epochs(out)] == [6, 12, 15]
    done = re.search(r"^Done in \d+\.\d+s \| Best loss: (\d\.\d{6})$", out, re.M)
    assert float(done[1]) == epochs(out)[-1][1] < 0.3
    assert "The text has 1,800 characters of a vocabulary of 28. Steps an epoch: 18." in out

    size = Path("logs/fox/model.safetensors").stat().st_size / 1e6
    assert f"\nSaved checkpoint to logs/fox/model.safetensors ({size:.2f} MB)\n" in out
    assert "\nTemperature: 0.1\nGenerated (60 tokens):\n" in out
    assert written(out) == (PANGRAM * 2)[:61], "the text's first character, and 60 more"
    points = Path("logs/fox.csv").read_text().splitlines()
    assert len(points) == 1 + 15 * 18, "every step is a point of the curve"


def test_a_short_text_is_repeated_and_nothing_is_kept(capsys, tmp_path, monkeypatch):
    """Fewer tokens than a sample has, in a vocabulary of four; temporary folders go as well."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(rnn_demo.tempfile, "tempdir", str(tmp_path / "temporary"))
    argv = ["ab😀 ", "--epochs", "30", "--log-every", "10", "--no-save", "--gen-length", "9"]
    assert rnn_demo.main([*argv, *SMALL]) == 0
    out, err = capsys.readouterr()
    assert "The text has 4 characters of a vocabulary of 4. It is repeated 25 times, to" in out
    assert [epoch for epoch, _ in epochs(out)] == [10, 20, 30]
    assert len(written(out)) == 10 and set(written(out)) <= set("ab😀 ")
    assert "Nothing is kept" in out and "--load" not in out
    assert err == "", "that experts are idle is what the option is for"
    assert [*tmp_path.rglob("*")] == [tmp_path / "temporary"]


def test_interrupted_it_says_how_to_go_on_and_goes_on(capsys, monkeypatch):
    original = rnn_demo.Report.end_epoch

    def interrupt(report, step):
        original(report, step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    argv = [PANGRAM, "--epochs", "100000", "--log-every", "1", "--run-id", "cut", "--no-rwkv"]
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(rnn_demo.Report, "end_epoch", interrupt)
        assert rnn_demo.main([*argv, *SMALL, "--log-dir", "runs"]) == 130
    assert signal.getsignal(signal.SIGINT) == before
    out, err = capsys.readouterr()
    kept = int(re.search(r"^interrupted: step (\d+) of 100,000 is kept; ", err)[1])
    assert epochs(out)[0][0] == 1 and "Done" not in out
    assert epochs(out)[-1][0] == kept - 1, "the last one is left to who goes on"
    assert err.endswith("rnn_demo.sh --load cut --epochs 100000 --log-dir runs goes on\n")

    first, last = 2 * (kept // 2 + 1), 2 * (kept // 2 + 2)
    argv = ["--load", "runs/cut", "--epochs", str(last), "--log-every", "1", "--save-every", "2"]
    assert rnn_demo.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [epoch for epoch, _ in epochs(out)] == [*range(kept, last + 1)]
    for epoch in (first, last):
        assert f"\n  after epoch {epoch}: runs/cut/step_{epoch:06d}\n" in out
    names = load_file("runs/cut/model.safetensors").keys()
    assert any("gates" in name for name in names)
    assert not any("rwkv" in name or "router" in name for name in names)
    assert rnn_demo.main(argv) == 2
    assert f"--epochs {last}: expected more than the {last} that" in capsys.readouterr().err


def test_options_are_settings(monkeypatch):
    """Also those that stand for several; the environment's stay."""
    argv = "--hidden-size 24 --layers 2 --heads 3 --experts 5 --top-k 2 --lr 0.01 --weight-decay 0"
    argv += " --batch-size 3 --seq-length 10 --seed 7 --epochs 6 --save-every 2 --run-id mine"
    monkeypatch.setenv("NORM", "layer")
    made, cfg = plan(PANGRAM, *argv.split())
    found = (cfg.n_embd, cfg.n_layer, cfg.n_head, cfg.num_experts, cfg.shared_expert, cfg.top_k)
    assert found == (24, 2, 3, 4, True, 2)
    assert (cfg.lr, cfg.weight_decay, cfg.batch_size, cfg.device_batch_size) == (0.01, 0, 3, 3)
    assert (cfg.sequence_length, cfg.seed, cfg.run_id, cfg.norm) == (10, 7, "mine", "layer")
    assert made.steps == 2, "of 30 tokens, 45 characters"
    assert (cfg.num_iterations, cfg.save_every, cfg.keep_last) == (12, 4, 5)
    assert cfg.ffn == "moe" and plan(PANGRAM, *SMALL)[1].ffn == "none"
    assert plan(PANGRAM, "--no-rwkv")[1].mixer == "gru" != plan(PANGRAM)[1].mixer
    assert plan(PANGRAM)[1].save_every == 0


@pytest.mark.parametrize("size", [9, 45, 100, 101, 1234])
def test_an_epoch_reads_the_whole_text(size):
    """Streams side by side, one after another, are the text, and then its beginning."""
    text = "".join(chr(0x4E00 + i) for i in range(size))
    made, cfg = plan(text)
    cfg = dataclasses.replace(cfg, vocab_size=size)
    loader = ShardLoader(cfg.input_bin, cfg, streams=cfg.batch_size)
    assert loader.samples == made.steps * 4 and made.steps == -(-size // 100)
    rows = loader.read(0, loader.samples)[:, :-1].reshape(made.steps, 4, 25)
    read = rows.swapaxes(0, 1).flatten().tolist()
    assert read == [i % size for i in range(made.steps * 100)]
    assert ShardLoader(cfg.input_val_bin, cfg).samples * 25 >= cfg.val_tokens


@pytest.mark.parametrize("streams", [5, 16, 101, 300])
def test_any_number_of_streams_has_what_validates_it(streams):
    """A sample of each of them, however few the preset has; a text this short is repeated."""
    made, cfg = plan(PANGRAM, "--batch-size", str(streams))
    assert (cfg.batch_size, made.steps) == (streams, 1)
    assert cfg.val_tokens >= streams * cfg.sequence_length
    assert ShardLoader(cfg.input_val_bin, cfg, streams=streams).samples == streams


def test_two_texts_do_not_mix_and_the_same_one_is_shared():
    folders = [Path(plan(text)[1].input_bin).parent for text in (PANGRAM, "abc", PANGRAM)]
    assert folders[0] == folders[2] != folders[1]
    assert {folder.parent for folder in folders} == {rnn_demo.DATA}
    index = json.loads((folders[1] / "index.json").read_text())
    assert index["vocab_size"] == 3 and index["token_bytes"] == [1, 1, 1]


def test_a_bpe_is_taken():
    """Any that prepare_data.py takes."""
    Path("bpe.json").write_text(tokenization.named("bytes").to_json())
    made, cfg = plan("héllo", "--tokenizer", "bpe.json")
    shard = next(Path(cfg.input_bin).parent.glob("*_train_*.bin")).read_bytes()
    assert shard[1024:1036:2] == "héllo".encode()


def test_long_runs_have_few_points_and_say_how_long_they_take(capsys):
    def points(epochs, steps):
        args = rnn_demo.parse_args(["--epochs", str(epochs)])
        return int(rnn_demo.course(args, steps)["LOG_EVERY"])

    assert points(500, 40) == 1 and points(500, 80) == 2 and points(500, 10_000) == 250
    assert points(500, 9973) == 9973, "a prime: one point an epoch"

    long = rnn_demo.Plan({}, None, epochs=10, steps=1000, shown=0)
    report = rnn_demo.Report(long, 1)
    for step in (1, 2, 20, 40):
        report.add({"step": step, "train_time": 5 + step, "train_loss": 1.0, "grad_norm": 1.0})
    assert capsys.readouterr().out.startswith("This will take about 2.8 hours; ")


def test_a_line_is_the_mean_of_its_epoch_and_the_best_is_the_lowest(capsys):
    report = rnn_demo.Report(rnn_demo.Plan({}, None, epochs=3, steps=2, shown=2), 2)
    for step, loss in enumerate((9.0, 1.0, 0.5, 1.5, 2.0, 4.0), start=1):
        report.add({"step": step, "train_time": step / 4, "train_loss": loss, "grad_norm": 2.0})
    assert capsys.readouterr().out == (
        "Epoch    2 | Loss: 1.000000 | ∇: 2.0000 | Time: 1.0s\n"
        "Epoch    3 | Loss: 3.000000 | ∇: 2.0000 | Time: 1.5s\n"
    )
    assert report.best == 1.0, "the first epoch, of an earlier start, counts too"


def test_a_curve_is_read_as_it_grows(tmp_path):
    path = tmp_path / "curve.csv"
    path.write_text("step,train_loss,val_loss\n1,2.5,\n2,2")
    curve = rnn_demo.Curve(path)
    assert [*curve.new(1)] == [{"step": 1, "train_loss": 2.5}]
    with path.open("a") as file:
        file.write(".25,\n3,2.0,1.0\n")
    assert [*curve.new(3)] == [
        {"step": 2, "train_loss": 2.25},
        {"step": 3, "train_loss": 2.0, "val_loss": 1.0},
    ]


STEP = r"^Step +(\d+) \| Reward: (\d\.\d{4}) \| Right: \d+\.\d% \| Time: \d+\.\ds$"


def held_out(out):
    """[(when, percent that is right, its interval's ends, prompts)] as they were printed."""
    percent = r"(\d+\.\d)%"
    line = rf"^Held out, (\w+): {percent} right \({percent} to {percent}\) of (\d+) prompts"
    return re.findall(line, out, re.M)


def test_a_task_is_learned_after_the_text(capsys, monkeypatch):
    """Interrupted on the way; what is printed is what the run's records have."""
    monkeypatch.setattr(rnn_rl, "WARM_UP", ["--warm-up-steps", "0", "--held-out", "30"])
    monkeypatch.setattr(rnn_rl, "PROMPTS", 2)
    original = rnn_rl.Report.add

    def interrupt(report, point):
        original(report, point)
        if point["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    argv = [PANGRAM + ":\n", *SMALL, "--epochs", "2", "--run-id", "fox", "--log-dir", "runs"]
    options = ["--do-rl", "--rl-length", "1", "--rl-episodes", "59", "--rl-learning-rate", "0.002"]
    with monkeypatch.context() as patch:
        patch.setattr(rnn_rl.Report, "add", interrupt)
        assert rnn_demo.main([*argv, *options]) == 130
    out, err = capsys.readouterr()
    kept = int(re.search(r"^interrupted: step (\d+) of 30 is kept; ", err, re.M)[1])
    assert err.endswith(f"rnn_demo.sh --load fox --log-dir runs {' '.join(options)} goes on\n")
    assert [epoch for epoch, _ in epochs(out)] == [2] and out.count("\nGenerated (100 ") == 1
    assert "next:" not in out and out.index("Done") < out.index("Held out, before")

    argv = ["--load", "fox", "--epochs", "0", "--log-dir", "runs", *options]
    assert rnn_demo.main(argv) == 0
    out += capsys.readouterr().out
    assert len(epochs(out)) == 1 and out.count("\nGenerated (100 tokens):\n") == 2
    steps = re.findall(STEP, out, re.M)
    assert [int(step) for step, _ in steps] == [s for s in range(3, 31, 3) if s != kept]
    points = csv.DictReader(Path("runs/fox-rl.csv").read_text().splitlines())
    rewards = [float(point["reward"]) for point in points if point["reward"]]
    for step, reward in steps[1:]:
        assert float(reward) == pytest.approx(sum(rewards[int(step) - 3 : int(step)]) / 3, abs=1e-4)

    summary = json.loads(Path("runs/fox-rl.json").read_text())
    assert (summary["task"], summary["length"], summary["lr"]) == ("copy", 1, 0.002)
    assert (summary["from_checkpoint"], summary["num_iterations"]) == ("runs/fox", 30)
    assert [when for when, *_ in held_out(out)] == ["before", "after"]
    for (_, *percents, prompts), suffix in zip(held_out(out), ("_before", "")):
        names = ("pass_at_1", "pass_at_1_low", "pass_at_1_high")
        assert percents == [f"{100 * summary[name + suffix]:.1f}" for name in names]
        assert int(prompts) == summary["val_prompts"]
    answers = re.findall(r"^  ([a-z]): -> '(.*?)' +(right$|wrong, \1 is right$)", out, re.M)
    assert len(answers) == min(5, summary["val_prompts"])
    assert all((prompt == text) == (verdict == "right") for prompt, text, verdict in answers)
    assert rnn_demo.main(argv) == 2
    assert "--do-rl: runs/fox-rl.txt has finished; --run-id" in capsys.readouterr().err


def test_settings_of_the_text_are_not_those_of_the_task(monkeypatch):
    """They come with the weights; a machine's, labels and where records go are both runs'."""
    for name, value in {"LR": "0.03", "N_EMBD": "48", "BATCH_SIZE": "2", "NOTE": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("INIT_FROM", "other")
    made, cfg = plan("abc", "--tokenizer", "bytes", "--do-rl", "--run-id", "both")
    env = made.task.env
    assert cfg.init_from == "other" and cfg.n_embd == 48
    assert not {"LR", "N_EMBD", "INIT_FROM", "PRESET", "INPUT_BIN"} & env.keys()
    assert (env["DEVICE"], env["NOTE"], env["BATCH_SIZE"]) == ("cpu", "x", "64")
    assert (env["RUN_ID"], env["LOG_DIR"]) == ("both-rl", "logs")
    words = made.task.words
    assert words[words.index("--lr") + 1] == "0.015" and made.task.steps == 100


def test_what_is_not_kept_lies_in_one_folder(tmp_path):
    """Also the vocabulary, which train_rl.py writes into a folder where it runs."""
    place = tmp_path / "place"
    args = rnn_demo.parse_args(["abc", "--tokenizer", "bytes", "--no-save", "--do-rl"])
    task = rnn_demo.new_plan(args, place).task
    assert task.place == place and task.words[1].startswith(f"{place}/logs/")
    assert {task.env["LOG_DIR"], task.env["RESULTS_CSV"]} == {
        f"{place}/logs",
        f"{place}/results.csv",
    }
    assert not train_rl.DATA.is_absolute()


def test_lines_of_a_task_are_means_of_their_steps(capsys):
    report = rnn_rl.Report(rnn_rl.Plan(None, 15, 2, None, [], {}, None))
    for line in ("warm_up:0/9 right:0.000", "warm_up:1/9 loss:2.5 right:0.25"):
        assert report.read(line) is None
    report.read("[RL] step:0/15 held_out:20 pass@1:0.5000 (0.2993 to 0.7007) sampled_pass@1:0.1")
    for step, right in enumerate((1.0, 1.0, 0.25, 0.5, 0.0), start=1):
        assert report.read(f"[RL] step:{step}/15 reward:{right}") == step
        report.add({"step": step, "train_time": step / 2, "reward": right / 2, "exact": right})
    assert capsys.readouterr().out == (
        "Warm-up    0 | Right: 0.0%\n"
        "Warm-up    1 | Loss: 2.500000 | Right: 25.0%\n"
        "Held out, before: 50.0% right (29.9% to 70.1%) of 20 prompts that are never trained on\n"
        "Step     4 | Reward: 0.1875 | Right: 37.5% | Time: 2.0s\n"
    )


MISTAKES = [
    ([""], "expected two different characters or more, found none"),
    (["aaaa"], "expected two different characters or more, found only 'a'"),
    (["hello", "world"], "argument TEXT: expected one, in quotes, found 2"),
    (["ab\udcff"], "expected UTF-8"),
    (["abc", "--file", "x"], "expected no TEXT beside it"),
    (["--file", "nowhere.txt"], "--file nowhere.txt: expected a text, found none"),
    (["--file", "."], "Is a directory"),
    (["abc", "--tokenizer", "nowhere.json"], "tokenizer nowhere.json: expected"),
    (["abc", "--epochs", "0"], "argument --epochs: expected 1 to 10000000, found 0"),
    (["abc", "--epochs", "nan"], "argument --epochs: invalid int value: 'nan'"),
    (["abc", "--lr", "nan"], "argument --lr: expected 0 or more, found nan"),
    (["abc", "--lr", "0"], "LR=0.0: must lie between"),
    (["abc", "--hidden-size", "17"], "N_EMBD=17 to be a multiple of 8"),
    (["abc", "--experts", "1"], "argument --experts: expected 2 or more, found 1"),
    (["abc", "--top-k", "4"], "TOP_K=4 needs at most NUM_EXPERTS=3"),
    (["abc", "--fast-mode", "--top-k", "1"], "argument --fast-mode: expected no --experts"),
    (["abc", "--run-id", "a/b"], "RUN_ID=a/b needs"),
    (["abc", "--bogus"], "unrecognized arguments: --bogus"),
    (["--load", "nowhere"], "nowhere: expected a run id"),
    (["abc", "--load", "nowhere"], "argument --load: expected no TEXT"),
    (["--load", "nowhere", "--no-save"], "argument --load: expected no --no-save"),
    (["--load", "nowhere", "--epochs", "0"], "argument --epochs: expected 1 to 10000000, found 0"),
    (["--load", "nowhere", "--do-rl", "--no-save"], "argument --load: expected no --no-save"),
    (["--load", "nowhere", "--do-rl"], "nowhere: expected a run id"),
    (["abc", "--rl-episodes", "9"], "argument --rl-episodes: expected --do-rl beside it"),
    (["--do-rl", "--rl-task", "arithmetic"], "--rl-task arithmetic: the vocabulary has no '012345"),
    (["--do-rl", "--rl-task", "sorting"], "argument --rl-task: invalid choice: 'sorting'"),
    (["abc", "--do-rl", "--tokenizer", "bytes", "--run-id", 98 * "a"], "RUN_ID=aaa"),
    ([PANGRAM + ":", "--do-rl"], "neither an end token nor a new line"),
]


@pytest.mark.parametrize("argv, sentence", MISTAKES)
def test_mistakes_are_one_sentence_and_leave_nothing(argv, sentence, capsys, tmp_path):
    try:
        code = rnn_demo.main(argv)
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert code == 2 and out == "" and "Traceback" not in err
    assert ".py: error: " in last and sentence in last
    assert not [*tmp_path.iterdir()]


def test_what_is_set_elsewhere_and_what_is_taken_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("NUM_ITERATIONS", "3")
    with pytest.raises(ConfigError, match="NUM_ITERATIONS=3: expected it not to be set, for --ep"):
        rnn_demo.check_environment()
    monkeypatch.delenv("NUM_ITERATIONS")
    Path("logs").mkdir()
    Path("logs/taken.txt").touch()
    with pytest.raises(ConfigError, match="--load taken goes on with it, or choose another"):
        plan("abc", "--run-id", "taken")
    assert not Path("data").exists()


def test_a_trainer_that_refuses_is_quoted(monkeypatch, capsys):
    """By its own sentence and exit code."""
    monkeypatch.setenv("INIT_FROM", "nowhere")
    assert rnn_demo.main([PANGRAM, *SMALL]) == 2
    assert capsys.readouterr().err.startswith("rnn_demo.py: error: config: INIT_FROM=nowhere: ")


def test_a_checkpoint_goes_on_as_a_run_of_its_own(monkeypatch):
    """With the settings and data of the run, whatever the environment's preset says."""
    _, cfg = plan(PANGRAM, "--hidden-size", "24", "--seed", "5", "--run-id", "old")
    folder = Path("logs/old/step_000004")
    folder.mkdir(parents=True)
    saved = vars(cfg) | {"vocab_size": 28, "device": "cpu", "dtype": "float32"}
    (folder / "run.json").write_text(json.dumps({"config": saved}))
    monkeypatch.setenv("PRESET", "rnn_medium")
    monkeypatch.setenv("SAVE_EVERY", "7")
    made, new = plan("--load", str(folder), "--run-id", "new", "--epochs", "9")
    assert (made.shown, made.steps, made.last_step) == (4, 1, 9)
    assert (new.resume, new.run_id, new.n_embd, new.seed) == (str(folder), "new", 24, 5)
    assert (new.preset, new.save_every) == ("rnn_char", 7)
    kept = ("n_layer", "mixer", "lr", "embed_lr", "aux_loss_coef_start", "input_bin", "carry_state")
    assert [getattr(new, name) for name in kept] == [getattr(cfg, name) for name in kept]
    with pytest.raises(ConfigError, match="--epochs 4: expected more than the 4 that logs/old"):
        plan("--load", str(folder), "--epochs", "4")
    shutil.rmtree("data")
    with pytest.raises(DataError, match="expected its text in data/rnn_demo/.*, found none: call"):
        plan("--load", str(folder), "--epochs", "9")


def test_the_shell_script_runs_where_it_is_called(tmp_path):
    """With paths from there, on one thread, and its arguments as they are."""
    python = tmp_path / "tree/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$PWD|$OMP_NUM_THREADS|$1|$2|$3"\n')
    python.chmod(0o755)
    for name in ("requirements.txt", "pyproject.toml", "scripts/rnn_demo.sh", "scripts/venv.sh"):
        target = tmp_path / "tree" / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    listed = "{ cat requirements.txt pyproject.toml; printf '%s\\n'; } | cksum > .venv/installed"
    subprocess.run(["bash", "-c", listed], cwd=tmp_path / "tree", check=True)
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable}
    (tmp_path / "here").mkdir()
    command = ["bash", "../tree/scripts/rnn_demo.sh", "two words", "--epochs"]
    done = subprocess.run(
        command, cwd=tmp_path / "here", env=env, capture_output=True, text=True, check=True
    )
    script = tmp_path / "tree/scripts/rnn_demo.py"
    assert done.stdout == f"{tmp_path}/here|1|{script}|two words|--epochs\n"
