"""Models in Hugging Face's format and back: transformers computes what is compared here."""

import itertools
import json
import shlex

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file

import export
import tokenization
from load_model import load_trained
from harness.checkpoints import export_weights
from store.contract import ConfigError
from ops.generation import generate
from train_gpt import EXPERTS, GPT, NORMS, POSITIONS, Config, import_weights

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

AXES = {
    "norm": NORMS,
    "pos": POSITIONS,
    "ffn": EXPERTS,
    "qk_norm": (False, True),
    "bias": (False, True),
}
ALL = [dict(zip(AXES, values)) for values in itertools.product(*AXES.values())]


def is_held(change):
    """Whether there is a class for a dense model, said anew."""
    if change["ffn"] not in ("relu2", "gelu", "swiglu"):
        return False
    if change["norm"] == "layer":
        known = change["pos"] in ("rotary", "learned")
        return known and not change["qk_norm"] and change["ffn"] != "swiglu"
    both = change["bias"] and change["qk_norm"]
    return change["norm"] in ("rms", "rms_gain") and change["pos"] == "rotary" and not both


HELD = [change for change in ALL if is_held(change)]
# one model of each class
UNTIED = {export.find_kind(tiny(**change)): change | {"tie_embeddings": False} for change in HELD}
SHARED = dict(recurrence="shared", n_layer=5, n_unique=2, norm="rms_gain")


def short(change):
    return "-".join(f"{value:d}" if isinstance(value, bool) else value for value in change.values())


def randomised(model):
    """A model with no weight where it starts: projections of 0 would hide everything else."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.state_dict().items():
        is_factor = "norm" in name and name.endswith("weight") or "scale" in name
        weight.copy_(0.3 * torch.randn(weight.shape, generator=generator) + is_factor)
    return model.requires_grad_(False).eval()


def make_run(folder, tokenizer=None, **changes):
    """(cfg, model) of a folder as a finished run leaves it."""
    cfg = tiny(input_bin=f"{folder}_data/*.bin", **changes)
    if tokenizer:
        folder.with_name(f"{folder.name}_data").mkdir()
        (folder.with_name(f"{folder.name}_data") / "tokenizer.json").write_text(tokenizer.to_json())
    model = randomised(GPT(cfg))
    export_weights(model.state_dict(), cfg, folder)
    return cfg, model


def run(capsys, *argv):
    """(exit code, what it printed, on both streams) of the program."""
    code = export.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out + err


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def some_tokens(cfg):
    return torch.randint(cfg.vocab_size, (2, cfg.sequence_length), generator=torch.manual_seed(2))


def apart(ours, theirs, tokens):
    """The largest difference of the two models' logits."""
    with torch.no_grad():
        logits = ours(tokens)
        assert logits.std() > 0.1
        return (logits - theirs(tokens).logits).abs().max().item()


def same(ours, theirs, cfg, vocab_size=None):
    """Asserts equal logits, and equal tokens, the likeliest each, after a prompt."""
    assert apart(ours, theirs, some_tokens(cfg)) < 1e-4
    prompt = [3, 1, 2]
    steps = 8
    tokens = generate(ours, [prompt], steps, temperature=0, vocab_size=vocab_size)
    own = [token for [token] in tokens]
    theirs.generation_config.eos_token_id = None  # where it would end
    sequence = theirs.generate(torch.tensor([prompt]), max_new_tokens=steps, do_sample=False)
    assert sequence[0].tolist() == prompt + own


def settings(output):
    """The variables of the last line that the program printed, a command."""
    *variables, python, program = shlex.split(output.splitlines()[-1])
    assert (python, program) == ("python", "train_gpt.py")
    return dict(variable.split("=", 1) for variable in variables)


def imported(output):
    """(cfg, model) as train_gpt.py would start them with the printed command."""
    cfg = Config.from_env(settings(output) | {"DEVICE": "cpu"})
    model = GPT(cfg)
    import_weights(model, cfg.init_from)
    return cfg, model.eval()


@pytest.mark.parametrize("change", [*HELD, *UNTIED.values()], ids=short)
def test_there_and_back(change, tmp_path, capsys):
    """The same logits and tokens there; the same bits and settings on the way back."""
    cfg, model = make_run(tmp_path / "run", n_head=4, **change)
    code, output = run(capsys, tmp_path / "run", "--to", "hf", "--out", tmp_path / "hf")
    assert code == 0, output
    same(model, load(tmp_path / "hf"), cfg)

    code, output = run(capsys, tmp_path / "hf", "--from", "hf", "--out", tmp_path / "back")
    assert code == 0, output
    back, _ = imported(output)
    names = [
        *AXES,
        "tie_embeddings",
        "n_layer",
        "n_head",
        "n_embd",
        "d_ff",
        "vocab_size",
        "sequence_length",
    ]
    assert {name: getattr(back, name) for name in names} == {
        name: getattr(cfg, name) for name in names
    }
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("change", [change for change in ALL if not is_held(change)], ids=short)
def test_no_other_dense_model_is_held(change):
    sentence = "no Hugging Face class holds these together.* needs |cannot be exported"
    with pytest.raises(ConfigError, match=sentence):
        export.find_kind(tiny(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"recurrence": "indexed", "bias": True, "qk_norm": False},
        SHARED | {"unshared_ends": 1},
        SHARED | {"per_visit": "norm,scale"},
        SHARED | {"per_visit": "scale", "bias": True, "qk_norm": False},
        {"d_ff": 24, "ffn": "swiglu,swiglu", "dropout": 0.1},
        {"n_head": 1},
    ],
    ids=str,
)
def test_other_forms_of_held_models(change, tmp_path, capsys):
    """Banks, shared depth and its factors become layers; widths are taken as they are."""
    cfg, model = make_run(tmp_path / "run", **change)
    code, output = run(capsys, tmp_path / "run", "--to", "hf", "--out", tmp_path / "hf")
    assert code == 0, output
    same(model, load(tmp_path / "hf"), cfg)


def test_the_default_model_is_held():
    assert export.find_kind(Config()) == "apertus"


def test_a_long_context(tmp_path, capsys):
    """Rotary angles grow with the position, and with them what float32 gets wrong."""
    cfg, model = make_run(tmp_path / "run", sequence_length=1024, val_tokens=1024, n_layer=1)
    assert run(capsys, tmp_path / "run", "--to", "hf", "--out", tmp_path / "hf")[0] == 0
    assert apart(model, load(tmp_path / "hf"), some_tokens(cfg)) < 1e-4


def test_bfloat16(tmp_path, capsys):
    """Every number is the nearest one that bfloat16 has."""
    make_run(tmp_path / "run")
    for dtype in ("float32", "bfloat16"):
        argv = tmp_path / "run", "--to", "hf", "--out", tmp_path / dtype, "--dtype", dtype
        assert run(capsys, *argv)[0] == 0
    assert load(tmp_path / "bfloat16").dtype == torch.bfloat16
    exact, rounded = (
        load_file(tmp_path / name / "model.safetensors") for name in ("float32", "bfloat16")
    )
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
    code, output = run(capsys, tmp_path / "bfloat16", "--from", "hf", "--out", tmp_path / "back")
    assert code == 0, output


def trained_bpe(folder):
    """A tokenizer as the `tokenizers` library trains it, with <|endoftext|> last."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet)
    bpe.train_from_iterator(["bad cab bad cab"], trainer)
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save(f"{folder}/bpe.json")
    return tokenization.load(folder / "bpe.json")


@pytest.mark.parametrize(
    "kind, family",
    [
        ("bytes", {"ffn": "swiglu", "qk_norm": False}),  # transformers has tokenizers of its own
        ("chars", {}),
        ("bpe", {"norm": "layer", "pos": "learned", "qk_norm": False}),  # for some of its models
    ],
)
def test_tokenizer_and_padded_vocabulary(kind, family, tmp_path, capsys):
    """The same ids for a text, and none of the rows that stand for no token are generated."""
    makers = {
        "bytes": lambda: tokenization.named("bytes"),
        "chars": lambda: tokenization.from_chars("\n Nabcdé", True),
        "bpe": lambda: trained_bpe(tmp_path),
    }
    own = makers[kind]()
    cfg, model = make_run(tmp_path / "run", own, vocab_size=512, **family)
    model.embed[own.vocab_size :] *= 5
    export_weights(model.state_dict(), cfg, tmp_path / "run")
    assert run(capsys, tmp_path / "run", "--to", "hf", "--out", tmp_path / "hf")[0] == 0

    theirs = load(tmp_path / "hf")
    likeliest = model(some_tokens(cfg)).argmax(-1)
    assert (likeliest >= own.vocab_size).float().mean() > 0.9
    tokenizer, text = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), "bad cab\n\n Né"
    ids = tokenizer(text)["input_ids"]
    assert ids == own.encode(text).tolist() and tokenizer.decode(ids) == text
    ends = [side.eos_token_id for side in (tokenizer, theirs.config, theirs.generation_config)]
    assert ends == [own.eot_id] * 3
    same(model, theirs, cfg, own.vocab_size)

    code, output = run(capsys, tmp_path / "hf", "--from", "hf", "--out", tmp_path / "back")
    assert code == 0 and "without a tokenizer" not in output
    assert load_trained(str(tmp_path / "back"), device="cpu").tokenizer.to_json() == own.to_json()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ffn": "moe"}, "FFN=moe cannot be exported"),
        ({"ffn": "relu2,gelu"}, "FFN=relu2,gelu cannot be exported"),
        ({"attngate": "headwise"}, "ATTNGATE=headwise cannot be exported"),
        ({"residual": "x0"}, "RESIDUAL=x0 cannot be exported"),
        ({"value_residual": True}, "VALUE_RESIDUAL=1 cannot be exported"),
        ({"value_embeds": 1}, "VALUE_EMBEDS=1 cannot be exported"),
        ({"logit_softcap": 15.0}, "LOGIT_SOFTCAP=15.0 cannot be exported"),
        ({"norm": "layer"}, "ApertusForCausalLM, needs NORM=rms"),
        ({"pos": "learned", "qk_norm": False}, "GPT2LMHeadModel, needs NORM=layer"),
    ],
    ids=str,
)
def test_refused_models_are_named(change, words, tmp_path, capsys):
    make_run(tmp_path / "run", **change)
    before = sorted(tmp_path.iterdir())
    code, output = run(capsys, tmp_path / "run", "--to", "hf", "--out", tmp_path / "hf")
    assert code == 2 and words in output and output.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_parts_that_no_class_has_are_refused():
    """Also where a setting is not known to be one of them."""
    cfg = tiny(attngate="const")
    with pytest.raises(ConfigError, match="blocks.0.mixer.gate_output.score: Apertus.* nothing"):
        export.to_theirs(GPT(cfg), cfg, export.KINDS["apertus"])


def their_config(model_type, **options):
    """The config of a small model of theirs that this trainer has too."""
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(max_position_embeddings=16, bos_token_id=1, eos_token_id=2)
    if model_type != "gpt2":
        sizes |= dict(intermediate_size=48, num_key_value_heads=4, head_dim=8, rms_norm_eps=1e-6)
        sizes |= dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    return transformers.AutoConfig.for_model(model_type, **sizes | options)


def make_theirs(model_type, **options):
    """A model of theirs with random weights and biases."""
    torch.manual_seed(0)
    config = their_config(model_type, **options)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    for name, weight in theirs.named_parameters():
        if "q_norm" not in name and "k_norm" not in name:
            weight.data += 0.2 * torch.randn_like(weight)
    return theirs.eval()


@pytest.mark.parametrize(
    "model_type, options",
    [
        ("gpt2", {}),
        ("gpt2", {"n_inner": 40, "tie_word_embeddings": False}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True, "tie_word_embeddings": True}),
        ("qwen3", {}),
        ("arcee", {}),
        ("apertus", {"hidden_act": "gelu_new", "pad_token_id": None}),
        ("starcoder2", {}),
    ],
    ids=str,
)
def test_their_models_come_here(model_type, options, tmp_path, capsys):
    """Weights that transformers made, in several files, give the same logits and tokens here."""
    theirs = make_theirs(model_type, **options)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len([*(tmp_path / "hf").glob("*.safetensors")]) > 1
    code, output = run(capsys, tmp_path / "hf", "--from", "hf", "--out", tmp_path / "ours")
    assert code == 0, output
    cfg, model = imported(output)
    same(model, theirs, cfg)
    # scripts read the folder as that of a run
    trained = load_trained(str(tmp_path / "ours"), device="cpu")
    assert torch.equal(trained.model(some_tokens(cfg)), model(some_tokens(cfg)))


def test_gpt2_as_its_authors_saved_it(tmp_path, capsys):
    """Names without a prefix, and masks among the weights."""
    theirs = make_theirs("gpt2")
    theirs.save_pretrained(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights = {name.removeprefix("transformer."): t for name, t in weights.items()}
    weights |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in (0, 1)}
    export.save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    code, output = run(capsys, tmp_path / "hf", "--from", "hf", "--out", tmp_path / "ours")
    assert code == 0, output
    cfg, model = imported(output)
    same(model, theirs, cfg)


@pytest.mark.parametrize(
    "model_type, options, words",
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function=relu"),
        ("gpt2", {"vocab_size": 70000}, "VOCAB_SIZE=70000"),
        ("llama", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ("llama", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
        ("llama", {"head_dim": 16}, "head_dim=16"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_par"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4}, "use_sliding_window=True"),
        ("apertus", {"hidden_act": "xielu"}, "hidden_act=xielu"),
        ("starcoder2", {"sliding_window": 4}, "sliding_window=4"),
        ("gpt_neox", {}, "model_type=gpt_neox"),
    ],
    ids=str,
)
def test_what_this_model_has_not_is_refused(model_type, options, words, tmp_path, capsys):
    their_config(model_type, **options).save_pretrained(tmp_path / "hf")
    code, output = run(capsys, tmp_path / "hf", "--from", "hf", "--out", tmp_path / "ours")
    assert code == 2 and words in output and output.count("\n") == 1, output
    assert not (tmp_path / "ours").exists()


def test_gains_of_qk_norm_are_refused(tmp_path, capsys):
    theirs = make_theirs("qwen3")
    theirs.model.layers[1].self_attn.k_norm.weight.data[3] = 1.5
    theirs.save_pretrained(tmp_path / "hf")
    code, output = run(capsys, tmp_path / "hf", "--from", "hf", "--out", tmp_path / "ours")
    assert code == 2 and "1.k_norm.weight" in output and not (tmp_path / "ours").exists()


def test_files_that_cannot_be_read(tmp_path, capsys):
    """One sentence and exit code 3 for no folder, other JSON, no weights, half of them, and cut."""
    hf, argv = tmp_path / "hf", (tmp_path / "hf", "--from", "hf", "--out", tmp_path / "ours")

    def refused(words):
        code, output = run(capsys, *argv)
        assert code == 3 and words in output and output.count("\n") == 1, output
        assert not (tmp_path / "ours").exists()

    refused("found no config.json; fetch one, as with hf download")
    hf.mkdir()
    for text in (json.dumps(vars(tiny())), "{", "null", '{"model_type": "gpt2", "n_layer": "a"}'):
        (hf / "config.json").write_text(text)
        refused("expected one that transformers reads")
    theirs = make_theirs("gpt2")
    theirs.config.save_pretrained(hf)
    refused("expected weights in safetensors")
    theirs.save_pretrained(hf)
    weights = load_file(hf / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    export.save_file(weights, hf / "model.safetensors", {"format": "pt"})
    refused("lack 1 tensors, as transformer.h.1.mlp.c_fc.weight")
    whole = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("expected weights in safetensors")


def test_nothing_is_overwritten_or_half_written(tmp_path, capsys, monkeypatch):
    """A folder with files stays as it is, an empty one is used, a failure leaves nothing."""
    make_run(tmp_path / "run")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").write_text("mine")
    argv = tmp_path / "run", "--to", "hf", "--out", tmp_path / "hf"
    code, output = run(capsys, *argv)
    assert code == 2 and "is no empty folder" in output
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["mine"]

    (tmp_path / "hf" / "mine").unlink()
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:  # what is written is another model
        patch.setattr(export, "turn", lambda parts, cfg: parts)
        code, output = run(capsys, *argv)
    assert code == 2 and "not within 0.0001" in output
    assert sorted(tmp_path.iterdir()) == before and not any((tmp_path / "hf").iterdir())

    assert run(capsys, *argv)[0] == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def test_without_transformers(tmp_path, capsys, monkeypatch):
    """A model is exported all the same, without comparison; reading one needs the library."""
    cfg, model = make_run(tmp_path / "run")
    monkeypatch.setattr(export, "import_transformers", lambda: None)
    code, output = run(capsys, tmp_path / "run", "--to", "hf", "--out", tmp_path / "hf")
    assert code == 0 and "not compared" in output
    same(model, load(tmp_path / "hf"), cfg)
    code, output = run(capsys, tmp_path / "hf", "--from", "hf", "--out", tmp_path / "back")
    assert code == 2 and "pip install transformers" in output


def test_wrong_arguments(tmp_path, capsys):
    for argv in (["run", "--out", "x"], ["a", "--from", "hf", "--out", "x", "--dtype", "bfloat16"]):
        with pytest.raises(SystemExit) as end:
            export.main(argv)
        assert end.value.code == 2
    code, output = run(capsys, "none", "--to", "hf", "--out", tmp_path / "hf")
    assert code == 2 and "found no weights there" in output
