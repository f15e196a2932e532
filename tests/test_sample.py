"""Models from what runs left, and text from them."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, launch, write_shard

import load_model
import sample
import tokenization
from store.contract import ConfigError, DataError
from ops.generation import generate

TEXT = "Old pond, a frog jumps in: the sound of wäter. 古池や蛙飛び込む水の音 \n"


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The logs of a run on bytes that has ended, with a checkpoint in its middle."""
    folder = tmp_path_factory.mktemp("text")
    tokens = np.frombuffer(TEXT.encode() * 20, np.uint8)
    write_shard(folder / "t_train_000001.bin", tokens)
    write_shard(folder / "t_val_000000.bin", tokens[:500])
    (folder / "tokenizer.json").write_text(tokenization.named("bytes").to_json())
    env = {name.upper(): int(v) if isinstance(v, bool) else v for name, v in TINY.items()}
    env |= {"INPUT_BIN": folder / "t_train_*.bin", "INPUT_VAL_BIN": folder / "t_val_*.bin"}
    env |= {"VOCAB_SIZE": 320, "NUM_ITERATIONS": 60, "MAX_EPOCHS": 0, "SAVE_EVERY": 30}
    env |= {"LOG_DIR": folder / "logs", "RESULTS_CSV": folder / "r.csv", "RUN_ID": "poem"}
    codes, output = launch(env | {"FFN": "moe", "BALANCE": "quantile", "LR": 0.01})
    assert codes == [0], output
    return folder / "logs"


def run(logs, *arguments):
    return sample.main([*map(str, arguments), "--log-dir", str(logs), "--device", "cpu"])


def refused(capsys, logs, code, *arguments):
    """The one sentence of a refusal."""
    assert run(logs, *arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sample.py: error: ") and err.count("\n") == 1
    return err


def test_all_names_of_a_checkpoint_are_the_same_model(logs):
    """A run's id, its folder, and its last checkpoint; the one in the middle is another."""
    tokens = torch.tensor([list(TEXT.encode())[:16]])
    last = load_model.load_trained("poem", logs)
    wanted = last.model(tokens)
    names = [logs / "poem", logs / "poem/step_000060"]
    for name in names:
        trained = load_model.load_trained(str(name), logs)
        assert torch.equal(trained.model(tokens), wanted), name
        assert trained.folder == name and trained.tokenizer.decode(TEXT.encode()) == TEXT
        assert not trained.model.training
    middle = load_model.load_trained(str(logs / "poem/step_000030"), logs)
    assert not torch.allclose(middle.model(tokens), wanted, atol=1e-3)
    state = last.model.blocks[0].ffn.router_state
    assert state.abs().max() > 0, "routers keep the bias that they were trained with"


def test_a_run_that_did_not_finish_and_only_its_folder(logs, tmp_path):
    """Only step folders are there; the newest that is whole counts, and one alone is enough."""
    shutil.copytree(logs / "poem", tmp_path / "logs/cut")
    (tmp_path / "logs/cut/model.safetensors").unlink()
    assert load_model.find_folder("cut", tmp_path / "logs").name == "step_000060"
    damaged = tmp_path / "logs/cut/step_000060/__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert load_model.find_folder("cut", tmp_path / "logs").name == "step_000030"
    with pytest.raises(ConfigError, match="step_000060 is damaged: __0_0.distcp is not what was"):
        load_model.load_trained(str(damaged.parent), tmp_path / "logs")

    alone = tmp_path / "logs/alone"
    shutil.copytree(logs / "poem/step_000030", alone)
    trained = load_model.load_trained("alone", tmp_path / "logs")
    assert trained.tokenizer.encode("ab").tolist() == [97, 98]


def test_a_tokenizer_that_cannot_be_had_is_needed_by_text_alone(
    logs, capsys, monkeypatch, tmp_path
):
    """As the record that names GPT-2's, on a machine without a network."""
    shutil.copytree(logs / "poem", tmp_path / "copy", ignore=shutil.ignore_patterns("step_*"))
    (tmp_path / "copy/tokenizer.json").write_text('{"kind": "gpt2"}')

    def no_network():
        raise DataError("tokenizer gpt2: its vocabulary could not be fetched")

    monkeypatch.setattr(tokenization, "gpt2", no_network)
    trained = load_model.load_trained(str(tmp_path / "copy"))
    assert trained.tokenizer is None
    assert "tokenizer.json is left out: tokenizer gpt2: its voc" in capsys.readouterr().err
    assert run(logs, tmp_path / "copy", "--tokenizer", "bytes", "--max-new-tokens", 2) == 0
    assert run(logs, tmp_path / "copy") == 2
    assert "has no tokenizer.json that can be read" in capsys.readouterr().err


@pytest.mark.parametrize("at", ["read_settings", "read_weights", "GPT", "cast_weights"])
def test_a_live_run_removes_a_checkpoint_that_is_being_read(logs, tmp_path, monkeypatch, at):
    """What it has then is read; of a step that was named, that it cannot be read is said."""
    run_folder = tmp_path / "logs/live"
    shutil.copytree(logs / "poem", run_folder)
    (run_folder / "model.safetensors").unlink()
    (run_folder / "step_000060").rename(tmp_path / "newer")
    real = getattr(load_model, at)

    def act(*arguments):
        if (tmp_path / "newer").exists():
            (tmp_path / "newer").rename(run_folder / "step_000060")
            shutil.rmtree(run_folder / "step_000030")
            raise ConfigError("a file is not there")
        return real(*arguments)

    monkeypatch.setattr(load_model, at, act)
    trained = load_model.load_trained("live", tmp_path / "logs")
    assert trained.folder == run_folder / "step_000060"
    with pytest.raises(ConfigError):
        load_model.load_trained("live/step_000030", tmp_path / "logs")


def test_casting_weights_once_is_casting_them_at_each_product(logs):
    trained = load_model.load_trained("poem", logs)
    tokens = torch.tensor([list(TEXT.encode())[:16]])
    trained.model.dtype = torch.bfloat16
    wanted = trained.model(tokens)
    load_model.cast_weights(trained.model, torch.bfloat16)
    ffn = trained.model.blocks[0].ffn
    assert ffn.experts.fc.weight.dtype == torch.bfloat16 == trained.model.embed.dtype
    assert ffn.router.weight.dtype == torch.float32
    assert torch.equal(trained.model(tokens), wanted)


def test_text_of_one_and_of_many(logs, capsys):
    """What is printed is what generate makes; sample 1 stays when there are more."""
    trained = load_model.load_trained("poem", logs)
    prompt = list(b"Old pond")
    tokens = [t for (t,) in generate(trained.model, [prompt], 40, temperature=0, vocab_size=257)]
    tokens = tokens[: tokens.index(256)] if 256 in tokens else tokens
    arguments = ["poem", "--prompt", "Old pond", "--max-new-tokens", 40]
    assert run(logs, *arguments, "--temperature", 0) == 0
    out, err = capsys.readouterr()
    assert out == bytes(tokens).decode(errors="replace") + "\n"
    assert "40 tokens in" in err and "tokens/s" in err and "prompt (8 tokens)" in err

    assert run(logs, *arguments) == 0
    one = capsys.readouterr().out
    assert run(logs, *arguments, "--num-samples", 3, "--echo") == 0
    first, second, third = capsys.readouterr().out.split("\n--- sample ")
    assert first == "Old pond" + one.removesuffix("\n")
    assert second.startswith("2 of 3 ---\n") and third.startswith("3 of 3 ---\n")
    assert second[11:] != third[11:]
    assert run(logs, *arguments, "--seed", 1) == 0
    assert capsys.readouterr().out != one


def answers(stops, tokens, tokenizer=None):
    """The pieces that an Answer shows as these tokens come."""
    answer = sample.Answer(tokenizer or tokenization.named("bytes"), stops)
    pieces = [answer.feed(token) for token in tokens]
    return pieces, answer.end(), answer


def test_an_answer_is_shown_as_far_as_it_is_certain():
    pieces, rest, _ = answers((), "aä古!".encode())
    assert pieces == ["a", "", "ä", "", "", "古", "!"] and rest == ""
    pieces, rest, _ = answers((), "a古".encode()[:-1])
    assert pieces[0] == "a" and set(pieces[1:]) == {""} and rest == "\ufffd"
    pieces, rest, answer = answers(("\n\n", "User:"), b"a\nb Use U\n\nmore")
    assert "".join(pieces) + rest == "a\nb Use U" and answer.ended
    assert pieces[:4] == ["a", "", "\nb", " "]  # the new line waits for what follows
    pieces, rest, answer = answers(("aab",), b"aaaab")
    assert "".join(pieces) + rest == "aa" and answer.ended
    pieces, rest, answer = answers(("xyz",), b"wxy")
    assert pieces == ["w", "", ""] and rest == "xy"
    pieces, rest, answer = answers((), [97, 256, 98])
    assert pieces == ["a", "", ""] and rest == "" and answer.ended


def test_stop_and_prompt_file(logs, capsys, tmp_path):
    """--stop ends before the string; a file's bytes are the prompt; nothing begins a document."""
    (tmp_path / "prompt.txt").write_text("Old pond, ä")
    arguments = ["poem", "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 30]
    assert run(logs, *arguments, "--temperature", 0) == 0
    whole = capsys.readouterr().out
    middle = whole[3:5]
    assert run(logs, *arguments, "--temperature", 0, "--stop", middle, "--stop", "") == 0
    out, err = capsys.readouterr()
    assert out == whole[: whole.index(middle)] + "\n" and "prompt (12 tokens)" in err
    assert run(logs, "poem", "--max-new-tokens", 3) == 0
    assert "prompt (1 tokens)" in capsys.readouterr().err


def test_conversation(logs, capsys, monkeypatch):
    """Ctrl-C ends an answer, bad prompts a sentence, Ctrl-D the session."""
    real, calls = sample.generate, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        for i, tokens in enumerate(real(*arguments, **options)):
            if len(calls) == 1 and i == 3:
                raise KeyboardInterrupt
            yield tokens

    monkeypatch.setattr(sample, "generate", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Old\n" + "x" * 17 + "\npond\n"))
    assert run(logs, "poem", "--interactive", "--max-new-tokens", 5) == 0
    out, err = capsys.readouterr()
    assert err.count("> ") == 4 and "> " not in out and len(calls) == 2
    assert "3 tokens in" in err and "5 tokens in" in err
    assert "the prompt has 17 tokens, the model sees SEQUENCE_LENGTH=16; shorten" in err


def test_nobody_reads_or_writes(logs, capsys, monkeypatch, tmp_path):
    """As in sample.py ... | head, and with standard input or output closed."""

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def reconfigure(self, **options): ...

        def fileno(self):
            return file.fileno()

    with open(tmp_path / "stdout", "w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone())
        assert run(logs, "poem") == 0
    assert capsys.readouterr().err.count("\n") <= 1
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert run(logs, "poem", "--max-new-tokens", 2) == 0
    monkeypatch.setattr(sys, "stdin", None)
    assert run(logs, "poem", "--interactive") == 0


def test_ctrl_c_without_a_session(logs, capsys, monkeypatch):
    def interrupted(*_, **__):
        yield [97]
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate", interrupted)
    assert run(logs, "poem", "--prompt", "O") == 130
    out, err = capsys.readouterr()
    assert out == "a\n" and "1 tokens in" in err


def test_bad_input_is_one_sentence(logs, capsys, tmp_path):
    def says(*words, code=2):
        return refused(capsys, logs, code, *words)

    assert "found no weights there; the newest runs that have some in" in says("nothing")
    assert "did you mean poem?" in says("p")
    assert "did you mean poem?" in says("poems")
    (tmp_path / "empty").mkdir()
    assert sample.main(["poem", "--log-dir", str(tmp_path / "empty")]) == 2
    assert "--log-dir names another folder" in capsys.readouterr().err
    assert "is a file; name the folder" in says(logs / "poem/model.safetensors")
    assert "17 tokens, the model sees SEQUENCE_LENGTH=16" in says("poem", "--prompt", "x" * 17)
    missing = says("poem", "--prompt-file", tmp_path / "none", code=3)
    assert "none: cannot be read (No such file or directory); name a text file" in missing
    (tmp_path / "other.json").write_text(tokenization.from_chars("ab", has_eot=True).to_json())
    assert "is not that of" in says("poem", "--tokenizer", tmp_path / "other.json")
    folder = tmp_path / "copy"
    shutil.copytree(logs / "poem", folder, ignore=shutil.ignore_patterns("step_*"))
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json that can be read; copy that of its" in says(folder)
    assert run(logs, folder, "--tokenizer", "bytes", "--max-new-tokens", 2) == 0
    capsys.readouterr()
    chars = tokenization.from_chars("abc", has_eot=False)
    (folder / "tokenizer.json").write_text(chars.to_json())
    assert "'z'" in says(folder, "--prompt", "az", code=3)
    many = tokenization.from_chars(map(chr, range(32, 400)), has_eot=False)
    (folder / "tokenizer.json").write_text(many.to_json())
    assert "the tokenizer has 368 tokens, the model VOCAB_SIZE=320" in says(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"per_step": 1}))
    assert "of another version of the trainer, with settings unknown" in says(folder)
    (folder / "config.json").write_text(json.dumps(settings | {"n_embd": 64}))
    assert "does not hold the weights of this train_gpt.py's model" in says(folder)
    (folder / "config.json").write_text("{")
    assert "its settings cannot be read" in says(folder)
    with pytest.raises(SystemExit):
        run(logs, "poem", "--top-p", "1.5")
    assert "argument --top-p: expected 0 to 1, found 1.5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(logs, "poem", "--num-samples", "0")
    assert "argument --num-samples: expected 1 to 10000, found 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        ([1], "cannot be read (AttributeError)"),
        ("[" * 100_000, "cannot be read (RecursionError)"),
        ({"n_layer": "2"}, "its settings have N_LAYER='2', which cannot be"),
        ({"n_head": 2.0}, "its settings have N_HEAD=2.0"),
        ({"mixer": None}, "its settings have MIXER=None"),
        ({"norm": []}, "its settings have NORM=[]"),
        ({"run_id": 7}, "its settings have RUN_ID=7"),
        ({"note": 10**400}, "its settings have NOTE="),
        ({"lr": float("nan")}, "LR=nan: must lie between"),
    ],
)
def test_settings_that_no_run_has_written(logs, capsys, tmp_path, change, words):
    folder = tmp_path / "odd"
    shutil.copytree(logs / "poem", folder)
    settings = json.loads((folder / "config.json").read_text())
    if isinstance(change, dict):
        change = settings | change
    text = change if isinstance(change, str) else json.dumps(change)
    (folder / "config.json").write_text(text)
    assert words in refused(capsys, logs, 2, folder)


def test_whole_numbers_are_numbers(logs, tmp_path):
    shutil.copytree(logs / "poem", tmp_path / "poem")
    settings = json.loads((tmp_path / "poem/config.json").read_text())
    (tmp_path / "poem/config.json").write_text(json.dumps(settings | {"lr": 1, "muon_lr": 1}))
    assert load_model.load_trained(str(tmp_path / "poem")).cfg.lr == 1


def test_more_than_memory_holds(logs, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        run(logs, "poem", "--max-new-tokens", 10**14)
    assert "expected 1 to 10000000, found 1" in capsys.readouterr().err

    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(sample, "generate", fail)
    assert run(logs, "poem") == 5
    assert "out of memory; lower --num-samples" in capsys.readouterr().err
    monkeypatch.setattr(load_model, "GPT", fail)
    assert "there is no memory for a model of N_LAYER=" in refused(capsys, logs, 2, "poem")


def test_characters_that_a_tokenizer_lacks(logs):
    trained = load_model.load_trained("poem", logs)
    chars = tokenization.from_chars("ab\n", has_eot=False)
    with pytest.raises(DataError, match="'c'"):
        sample.encode_prompt(trained._replace(tokenizer=chars), "abc")
    assert sample.encode_prompt(trained._replace(tokenizer=chars), "") == [0]


def test_a_model_with_states_alone_takes_any_prompt(logs, capsys, tmp_path):
    """And writes past SEQUENCE_LENGTH; a hybrid keeps its window."""
    env = json.loads((logs / "poem" / "config.json").read_text())
    names = ("input_bin", "input_val_bin", "vocab_size", "sequence_length", "n_layer", "n_embd")
    env = {name.upper(): env[name] for name in (*names, "n_head", "batch_size", "val_tokens")}
    env |= {"LOG_DIR": tmp_path, "RESULTS_CSV": tmp_path / "r.csv", "NUM_ITERATIONS": 2}
    env |= {"DEVICE_BATCH_SIZE": 2, "MAX_EPOCHS": 0, "WARMDOWN_ITERS": 1, "DEVICE": "cpu"}
    for mixer, code in (("gru", 0), ("gru,attention", 2)):
        assert launch(env | {"MIXER": mixer, "RUN_ID": mixer.replace(",", "_")})[0] == [0]
        run_id = mixer.replace(",", "_")
        assert run(tmp_path, run_id, "--prompt", "x" * 40, "--max-new-tokens", 30) == code
    assert "the model sees SEQUENCE_LENGTH=16" in capsys.readouterr().err
