"""Figures of a trained model against the run's own, naive loops, and lm-evaluation-harness."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, launch, summary, write_shard

import evaluate_model
import load_model
import tokenization
from evaluate_model import articles, count_words, is_wikitext
from harness.settings import ROOT
from scoring import Window, score, windows
from ops.generation import generate
from train_gpt import GPT

TEXT = "the old pond: then a frog leaps in, the sound of wäter there. 古池や "
WIKI = (
    " \n = Valkyria = \n \n Senjō no Valkyria 3 is a game . \n = = Gameplay = = \n \n A = B = .\n"
    " \n = = = Story = = = \n x\n = Tower = \n \n The tower stands . \n"
)
ARTICLES = [
    " = Valkyria = \n \n Senjō no Valkyria 3 is a game . \n = = Gameplay = = \n \n A = B = .\n \n"
    " = = = Story = = = \n x",
    " = Tower = \n \n The tower stands . \n",
]
CONTEXT = TINY["sequence_length"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on bytes, its documents behind end tokens, its validation shards with tails."""
    folder = tmp_path_factory.mktemp("evaluation")
    document = [256, *TEXT.encode()]
    write_shard(folder / "t_train_000001.bin", document * 20)
    write_shard(folder / "t_val_000000.bin", (document * 3)[:101])
    write_shard(folder / "t_val_000001.bin", (document * 4)[50:])
    tokenizer = tokenization.named("bytes")
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    sizes = [len(token) for token in tokenizer.token_bytes]
    (folder / "index.json").write_text(json.dumps({"token_bytes": sizes}))
    env = {name.upper(): int(v) if isinstance(v, bool) else v for name, v in TINY.items()}
    env |= {"INPUT_BIN": folder / "t_train_*.bin", "INPUT_VAL_BIN": folder / "t_val_*.bin"}
    env |= {"VOCAB_SIZE": 320, "NUM_ITERATIONS": 24, "MAX_EPOCHS": 0, "VAL_TOKENS": 250}
    env |= {"LOG_DIR": folder / "logs", "RESULTS_CSV": folder / "r.csv", "RUN_ID": "poem"}
    codes, output = launch(env | {"FFN": "moe", "BALANCE": "quantile", "LR": 0.01, "VAL_EVERY": 0})
    assert codes == [0], output
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return load_model.load_trained("poem", folder / "logs", "cpu")


@pytest.fixture(scope="module")
def exact(trained):
    """The model in float64."""
    model = GPT(trained.cfg, torch.float64)
    model.load_state_dict(trained.model.state_dict())
    return model.double().eval()


@pytest.fixture(scope="module")
def bpe(folder):
    """The path of a tokenizer of bytes and a few merges."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in (b"th", b"the", b" the", b"wa"):
        ranks[token] = len(ranks)
    tokenizer = tokenization.BpeTokenizer(ranks, {tokenization.END: len(ranks)}, "gpt2", "test")
    (folder / "bpe.json").write_text(tokenizer.to_json())
    return folder / "bpe.json"


def run(folder, *arguments):
    head = ["poem", "--log-dir", folder / "logs", "--device", "cpu"]
    return evaluate_model.main([*map(str, [*head, *arguments])])


def figures(folder, tmp_path, *arguments):
    """The JSON of an evaluation that ended well."""
    assert run(folder, *arguments, "--json", tmp_path / "out.json") == 0
    return json.loads((tmp_path / "out.json").read_text())


def without_tokenizer(folder, tmp_path):
    """A folder with the run alone, whose tokenizer is unknown."""
    ignored = shutil.ignore_patterns("tokenizer.json", "step_*")
    shutil.copytree(folder / "logs/poem", tmp_path / "untold/logs/poem", ignore=ignored)
    return tmp_path / "untold"


def refused(capsys, folder, code, *arguments):
    """The one sentence of a refusal."""
    assert run(folder, *arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("evaluate_model.py: error: ") and err.count("\n") == 1
    return err


@torch.no_grad()
def naive(exact, tokens, context, stride):
    """logp of each token but the first and whether it is likeliest, one forward pass a token."""
    logps, likeliest = [], []
    for target in range(1, len(tokens)):
        window = max(0, math.ceil((target - context) / stride))  # the first that reaches it
        seen = torch.tensor(tokens[window * stride : target])[None]
        logits = exact(seen)[0, -1].double()
        logps.append(logits.log_softmax(-1)[tokens[target]].item())
        likeliest.append(logits.argmax().item() == tokens[target])
    return np.array(logps), np.array(likeliest)


def test_the_loss_of_a_run_is_found_again(folder, trained, exact, tmp_path, capsys):
    """Loss, accuracy and ppl are those that it logged; its bits per byte count end tokens too."""
    found = figures(folder, tmp_path)
    logged = summary({"LOG_DIR": folder / "logs", "RUN_ID": "poem"})
    assert found["loss"] == pytest.approx(logged["final_loss"], abs=1e-5)
    assert found["ppl"] == pytest.approx(logged["ppl"], rel=1e-5)
    assert found["accuracy"] == pytest.approx(logged["val_accuracy"], abs=1e-6)
    assert (found["tokens"], found["context"], found["stride"]) == (240, CONTEXT, CONTEXT)

    shards = [np.fromfile(file, "<u2")[512:] for file in sorted(folder.glob("t_val_*"))]
    shards = [shard[: (len(shard) - 1) // CONTEXT * CONTEXT + 1].tolist() for shard in shards]
    logps = [naive(exact, shard, CONTEXT, CONTEXT)[0] for shard in shards]
    targets = np.concatenate([shard[1:] for shard in shards])[:240]
    nats = -np.concatenate(logps)[:240]
    is_text = targets != 256
    assert found["special_tokens"] == (~is_text).sum() > 0
    assert found["bytes"] == is_text.sum()
    bits = nats[is_text].sum() / math.log(2) / is_text.sum()
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)

    lines = capsys.readouterr().out
    assert lines.startswith("---\ncheckpoint: ") and f"\nloss: {found['loss']:.6g}\n" in lines
    assert "\ncontext: 16\nstride: 16\n" in lines and "is not scored: nothing is before" in lines


@pytest.mark.parametrize(
    "length, context, stride", [(2, 16, 16), (16, 16, 5), (17, 16, 16), (50, 16, 1), (45, 7, 3)]
)
def test_sliding_windows_are_a_naive_loop(trained, exact, length, context, stride):
    tokens = (list(TEXT.encode()) * 2)[:length]
    rows = list(windows(np.array(tokens), context, stride))
    assert sum(row.new for row in rows) == length - 1
    parts = list(score(trained.model, rows, 3))
    logp, likeliest = naive(exact, tokens, context, stride)
    assert np.concatenate([part.targets for part in parts]).tolist() == tokens[1:]
    np.testing.assert_allclose(np.concatenate([p.logp for p in parts]), logp, atol=1e-5)
    assert np.array_equal(np.concatenate([p.is_likeliest for p in parts]), likeliest)


def test_padding_changes_no_score(trained):
    """Rows of every length, with all or the last targets new: alone as in a batch."""
    tokens = np.array(list(TEXT.encode()))
    rows = [Window(tokens[i : i + 2 + i], 1 + i // 2) for i in range(15)]
    together = list(score(trained.model, rows, 15))
    for row, scores in zip(rows, together):
        [alone] = score(trained.model, [row], 1)
        assert scores.targets.tolist() == row.tokens[-row.new :].tolist()
        np.testing.assert_allclose(scores.logp, alone.logp, atol=1e-5)
        assert np.array_equal(scores.is_likeliest, alone.is_likeliest)


def test_shards_count_in_whole_windows_up_to_a_limit(folder, exact, tmp_path):
    pattern = f"{folder}/t_val_*.bin"
    everything = figures(folder, tmp_path, "--data", pattern)
    lengths = [101, 4 * (len(TEXT.encode()) + 1) - 50]
    assert everything["tokens"] == sum((length - 1) // 16 * 16 for length in lengths)
    some = figures(folder, tmp_path, "--data", pattern, "--max-tokens", 47)
    assert some["tokens"] == 32 and some["max_tokens"] == 47
    own = figures(folder, tmp_path, "--max-tokens", 47)
    assert own["loss"] == some["loss"] != everything["loss"]

    arguments = ["--context", 10, "--stride", 4, "--batch-size", 2]
    slid = figures(folder, tmp_path, "--data", f"{folder}/t_val_000000.bin", *arguments)
    shard = [256, *TEXT.encode(), 256, *TEXT.encode()][:101]
    whole = 10 + (100 - 10) // 4 * 4
    logp, likeliest = naive(exact, shard[: whole + 1], 10, 4)
    assert slid["tokens"] == whole and slid["accuracy"] == likeliest.mean()
    assert slid["loss"] == pytest.approx(-logp.mean(), abs=1e-5)


def test_a_text_is_scored_from_its_first_byte(folder, exact, tmp_path, capsys):
    """With an end token before it; bytes are those of the file, whatever characters it has."""
    (tmp_path / "a.txt").write_bytes(TEXT.encode() + b"\r\n")
    found = figures(folder, tmp_path, "--text", tmp_path / "a.txt")
    logp, likeliest = naive(exact, [256, *TEXT.encode(), 13, 10], CONTEXT, CONTEXT)
    assert found["tokens"] == found["bytes"] == len(TEXT.encode()) + 2
    assert found["loss"] == pytest.approx(-logp.mean(), abs=1e-5)
    assert found["accuracy"] == likeliest.mean() and found["special_tokens"] == 0
    assert found["bits_per_byte"] == pytest.approx(-logp.mean() / math.log(2), abs=1e-5)
    assert "first_token: of a text is scored, after the end token" in capsys.readouterr().out
    assert "word_ppl" not in found
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")  # any bytes, for this tokenizer
    assert figures(folder, tmp_path, "--text", tmp_path / "b.txt")["bytes"] == 3


def test_a_text_without_an_end_token(folder, exact, tmp_path):
    """Its first character is neither scored nor counted."""
    tokenizer = tokenization.from_chars(TEXT, has_eot=False)
    (tmp_path / "chars.json").write_text(tokenizer.to_json())
    (tmp_path / "a.txt").write_text("池" + TEXT)
    arguments = ["--text", tmp_path / "a.txt", "--tokenizer", tmp_path / "chars.json"]
    found = figures(without_tokenizer(folder, tmp_path), tmp_path, *arguments)
    logp, _ = naive(exact, tokenizer.encode("池" + TEXT).tolist(), CONTEXT, CONTEXT)
    assert found["tokens"] == len(TEXT) and found["bytes"] == len(TEXT.encode())
    bits = -logp.sum() / math.log(2) / len(TEXT.encode())
    assert found["bits_per_byte"] == pytest.approx(bits, abs=1e-5)
    assert "not scored" in found["first_token"]


def test_articles_are_those_of_wikitext():
    assert articles(WIKI) == ARTICLES
    assert is_wikitext(WIKI) and not is_wikitext(TEXT) and not is_wikitext("")
    assert not is_wikitext("x\n = Title = \n") and not is_wikitext(" = = Part = = \n")
    assert [count_words(text) for text in (" a b \n", "a", "a\n\nb")] == [4, 1, 2]


def test_perplexity_a_word_of_wikitext(folder, exact, tmp_path):
    """Articles by themselves, words of the text as it is."""
    (tmp_path / "wiki.test.raw").write_text(WIKI)
    found = figures(folder, tmp_path, "--text", tmp_path / "wiki.test.raw")
    logp, words = 0.0, 0
    for article in ARTICLES:
        logp += naive(exact, [256, *article.encode()], CONTEXT, CONTEXT)[0].sum()
        words += len(re.split(r"\s+", article))
    assert (found["texts"], found["words"], found["detokenizer"]) == (2, words, "none")
    assert found["word_ppl"] == pytest.approx(math.exp(-logp / words), rel=1e-4)
    assert found["bytes"] == sum(len(article.encode()) for article in ARTICLES)

    (tmp_path / "a.txt").write_text(TEXT)
    found = figures(folder, tmp_path, "--text", tmp_path / "a.txt", "--words")
    logp = naive(exact, [256, *TEXT.encode()], CONTEXT, CONTEXT)[0].sum()
    assert found["words"] == len(TEXT.split()) + 1  # it ends with white space
    assert found["word_ppl"] == pytest.approx(math.exp(-logp / found["words"]), rel=1e-4)


def test_bytes_that_are_not_known_stay_blank(folder, tmp_path, capsys):
    """Without notes or tokenizer, or with a null in the notes for an id that occurs."""
    for where in ("bare", "noted"):
        shutil.copytree(folder / "logs", tmp_path / where / "logs")
        shutil.copy(folder / "t_val_000001.bin", tmp_path / where)
    (tmp_path / "bare/logs/poem/tokenizer.json").unlink()
    pattern = f"{tmp_path}/bare/*.bin"
    found = figures(tmp_path / "bare", tmp_path, "--data", pattern)
    assert found["bytes"] is found["bits_per_byte"] is None and found["loss"] > 0
    assert "bits_per_byte:  (not known" in capsys.readouterr().out
    known = figures(tmp_path / "bare", tmp_path, "--data", pattern, "--tokenizer", "bytes")
    assert known["bits_per_byte"] > 0 and known["loss"] == found["loss"]

    pattern = f"{tmp_path}/noted/*.bin"
    sizes = [1] * 256 + [0]
    for e_has, expected in ((1, known["bits_per_byte"]), (None, None)):
        sizes[ord("e")] = e_has
        (tmp_path / "noted/index.json").write_text(json.dumps({"token_bytes": sizes}))
        found = figures(tmp_path / "noted", tmp_path, "--data", pattern)
        assert found["bits_per_byte"] == expected


@pytest.mark.parametrize("sizes", [5, "ab", {"a": 1}, ["1"], [[1]], [-1], [10**30], [0.5]])
def test_notes_of_bytes_that_cannot_be(folder, tmp_path, capsys, sizes):
    shutil.copy(folder / "t_val_000001.bin", tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"token_bytes": sizes}))
    err = refused(capsys, folder, 3, "--data", tmp_path / "*.bin")
    assert "index.json: expected in token_bytes the bytes of each id" in err


def test_bad_input_is_one_sentence(folder, bpe, tmp_path, capsys):
    def says(code, words, *arguments):
        err = refused(capsys, folder, code, *arguments)
        assert words in err, err

    says(3, "no file matches", "--data", tmp_path / "none_*.bin")
    says(3, "expected a text file, found none", "--text", tmp_path / "none.txt")
    says(2, "--context 17: the model was trained on SEQUENCE_LENGTH=16", "--context", 17)
    says(2, "--stride 9: tokens between windows", "--context", 8, "--stride", 9)
    says(2, "expected the name of a file in a folder", "--json", tmp_path / "none/a.json")
    says(2, "expected the name of a file in a folder", "--json", tmp_path)

    shard = write_shard(tmp_path / "big.bin", [1, 2, 320] * 20)
    says(3, "token 320 at offset 2 is not below VOCAB_SIZE=320", "--data", shard)
    shard = write_shard(tmp_path / "small.bin", [1] * 16)
    says(3, "a window of 16 tokens and one more, found 16 tokens", "--data", shard)
    shutil.copy(bpe, tmp_path / "tokenizer.json")
    says(3, "is another tokenizer than the model's", "--data", shard)

    (tmp_path / "a.txt").write_text("")
    says(3, "expected 2 tokens or more", "--text", tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"a\xff")
    says(3, "expected UTF-8", "--text", tmp_path / "a.txt", "--words")
    (tmp_path / "chars.json").write_text(tokenization.from_chars("ab", False).to_json())
    (tmp_path / "a.txt").write_text("abc")
    chars = ["--text", tmp_path / "a.txt", "--tokenizer", tmp_path / "chars.json"]
    says(2, "is not that of", *chars)
    untold = without_tokenizer(folder, tmp_path)
    assert "found 'c' at offset 2" in refused(capsys, untold, 3, *chars)
    for text, words in (("--text", "a.txt"), ("--tasks", "x")):
        with pytest.raises(SystemExit) as error:
            run(folder, text, words, "--max-tokens", 3)
        assert error.value.code == 2 and "has no effect with" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        run(folder, "--words")
    assert error.value.code == 2 and "--words: needs --text" in capsys.readouterr().err
    assert evaluate_model.main(["nobody", "--log-dir", str(folder / "logs")]) == 2
    assert "runs that have some in" in capsys.readouterr().err


def test_weights_that_are_no_numbers(folder, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "logs", tmp_path / "logs")
    file = tmp_path / "logs/poem/model.safetensors"
    weights = load_file(file)
    weights["embed"][0, 0] = torch.nan
    save_file(weights, file)
    assert "the loss is nan" in refused(capsys, tmp_path, 2)


# lm-evaluation-harness


def test_tasks_need_lm_eval(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval_adapter", raising=False)
    assert "no lm_eval: pip install -U lm-eval" in refused(capsys, folder, 2, "--tasks", "arc_easy")


@pytest.fixture
def adapter(trained, bpe):
    """The model for lm-eval, with byte pairs, in batches of 3."""
    pytest.importorskip("lm_eval")
    from lm_eval_adapter import OurModel

    return OurModel(trained._replace(tokenizer=tokenization.load(bpe)), 3)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


@torch.no_grad()
def full_pass(exact, tokens, count):
    """Summed logp of the last tokens, and whether each is likeliest, from one pass over all."""
    logits = exact(torch.tensor([tokens[:-1]]))[0, -count:].double()
    targets = torch.tensor(tokens[-count:])
    logp = logits.log_softmax(-1).gather(-1, targets[:, None])
    return logp.sum().item(), torch.equal(logits.argmax(-1), targets)


def test_loglikelihood_is_a_full_pass(adapter, exact):
    """Also where a token goes across the boundary, with no context, or with more than fits.

    The continuation is what the whole has more tokens than the context, as in lm-eval's own models.
    """
    encode = adapter.tok_encode
    assert encode("old the") == [*b"old", 258] and len(encode("then")) == 2
    pairs = [
        ("old", " the pond"),
        ("in t", "he sound"),  # " the" is one token of the whole, in the place of " "
        ("in ", "the sound"),  # the blank belongs to the continuation
        ("", "the old"),
        (TEXT, "the old pond"),
    ]
    expected = [
        (encode("old the pond"), len(encode(" the pond"))),
        (encode("in t") + encode("in the sound")[4:], 5),
        (encode("in the sound"), len(encode(" the sound"))),
        ([260, *encode("the old")], len(encode("the old"))),
        (encode(TEXT + "the old pond")[-17:], len(encode(" the old pond"))),
    ]
    found = adapter.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (logp, greedy), (tokens, count) in zip(found, expected, strict=True):
        wanted, is_greedy = full_pass(exact, tokens, count)
        assert logp == pytest.approx(wanted, abs=1e-4) and greedy == is_greedy


def test_what_greedy_generation_makes_is_greedy(adapter):
    """And what it makes is the text up to the first stop string, in a batch as alone."""
    options = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    prompts = ["the old p", "a frog leaps in, the sound of w", "", "then"]
    made = adapter.generate_until(requests("g", *[(text, dict(options)) for text in prompts]))
    for prompt, text in zip(prompts, made):
        assert adapter.generate_until(requests("g", (prompt, dict(options)))) == [text]
    context = adapter.tok_encode("the old p")
    steps = generate(adapter.trained.model, [context], 6, temperature=0, vocab_size=261)
    tokens = [token for (token,) in steps]
    assert made[0] == adapter.trained.tokenizer.decode(tokens) and len(made[0]) > 3
    other = [*tokens[:-1], (tokens[-1] + 1) % 256]
    both = [(("", ""), context, tokens), (("", ""), context, other)]
    assert [greedy for _, greedy in adapter._loglikelihood_tokens(both)] == [True, False]
    stopped = dict(options, until=[made[0][2:4]])
    assert adapter.generate_until(requests("g", ("the old p", stopped))) == [made[0][:2]]


def test_rolling_windows_are_those_of_lm_eval(adapter, exact):
    """The last window of a text reaches back, so that it is full."""
    tokens = [260, *adapter.tok_encode(TEXT)]
    rest = (len(tokens) - 1) % CONTEXT
    assert rest
    logp = naive(exact, tokens[: len(tokens) - rest], CONTEXT, CONTEXT)[0].sum()
    logp += full_pass(exact, tokens[-CONTEXT - 1 :], rest)[0]
    short = full_pass(exact, [260, *adapter.tok_encode("old")], 3)[0]
    found = adapter.loglikelihood_rolling(requests("r", (TEXT,), ("old",)), disable_tqdm=True)
    assert found == pytest.approx([logp, short], abs=1e-4)


TASK = """
task: toy_{name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
metric_list:
{metrics}
"""


ANSWER = {"until": [" "], "max_gen_toks": 4}


def write_tasks(folder, first_reply):
    """Three tasks of lm-eval on two lines of data: choices, whole texts, and replies."""
    lines = [
        {"question": "the old", "answers": [" pond", " zzzz"], "gold": 0, "text": "the pond"},
        {"question": "a frog", "answers": [" qqqqq", " leaps"], "gold": 1, "text": "a frog in"},
    ]
    lines[0]["reply"], lines[1]["reply"] = first_reply, "no reply"
    data = folder / "toy.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kinds = {
        "choice": ("multiple_choice", "gold", ["acc"]),
        "rolling": ("loglikelihood_rolling", '"{{text}}"', ["word_perplexity", "bits_per_byte"]),
        "answer": ("generate_until", '"{{reply}}"', ["exact_match"]),
    }
    for name, (kind, target, metrics) in kinds.items():
        listed = "\n".join(f"  - metric: {metric}" for metric in metrics)
        text = TASK.format(name=name, data=data, kind=kind, target=target, metrics=listed)
        if name == "choice":
            text += "doc_to_choice: answers\n"
        elif name == "answer":
            text += f"generation_kwargs: {json.dumps(ANSWER)}\n"
        else:
            text = text.replace('doc_to_text: "{{question}}"', 'doc_to_text: ""')
        (folder / f"{name}.yaml").write_text(text)
    return lines


def test_tasks_from_the_command_line(folder, trained, exact, tmp_path):
    """Tasks of a folder, without a network."""
    pytest.importorskip("lm_eval")
    from lm_eval_adapter import OurModel

    [reply] = OurModel(trained, 1).generate_until(requests("g", ("the old", ANSWER)))
    lines = write_tasks(tmp_path, reply)
    command = [sys.executable, "scripts/evaluate_model.py", "poem", "--log-dir", folder / "logs"]
    command += ["--tasks", "toy_choice,toy_rolling,toy_answer", "--include-path", tmp_path]
    command += ["--device", "cpu", "--json", tmp_path / "out.json"]
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    right, nats, words = 0, 0.0, 0
    for line in lines:
        scores = []
        for answer in line["answers"]:
            tokens = list((line["question"] + answer).encode())
            scores.append(full_pass(exact, tokens, len(answer))[0])
        right += scores.index(max(scores)) == line["gold"]
        nats -= full_pass(exact, [256, *line["text"].encode()], len(line["text"]))[0]
        words += len(line["text"].split())
    assert found["toy_choice"]["acc"] == right / 2
    rolling = found["toy_rolling"]
    assert rolling["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    size = sum(len(line["text"]) for line in lines)
    assert rolling["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert found["toy_answer"]["exact_match"] == 0.5
    assert f"\ntoy_choice acc: {right / 2:.6g}\n" in done.stdout
    assert found["toy_choice"]["examples"] == 2 and found["toy_choice"]["n_shot"] == 0
