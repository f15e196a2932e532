"""Takes trained models to Hugging Face's classes, and models of those classes to this trainer.

    python scripts/export.py mine --to hf --out mine_hf      # a run, its folder, or a checkpoint
    python scripts/export.py gpt2 --from hf --out gpt2_here  # a folder in Hugging Face's format

AutoModelForCausalLM.from_pretrained reads the first folder without code from here. The second has
the model.safetensors that INIT_FROM takes, and config.json; the settings to train it with are
printed. Where transformers is installed, which --from needs, a folder gets its name only after the
logits of both models were compared.
Classes: GPT2, Llama, Qwen3, Arcee, Apertus (it holds the default model) and Starcoder2. A model
that none of them computes is refused. RECURRENCE=indexed and shared become a stack of layers.
Exit codes: 0 written, 2 a wrong argument or a model that cannot be held, 3 files that cannot be
read or written.
"""

import require_packages  # noqa: F401  first: it says what to run where one is missing
import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from store.contract import ConfigError, DataError
from store.files import sync, write_whole
from load_model import Trained, load_trained
import tokenization
from train_gpt import EXPERTS, GPT, Config, ffn_width

Tensors = dict[str, Tensor]
# {name of a tensor: the parts that are its rows}. Both sides are taken apart into the same parts,
# of which a layer has norm1, q, k, v, o, norm2, up, down, and a gate where its FFN has one.
Names = dict[str, list[str]]

NOT_EXPORTED = ("attngate", "residual", "value_residual", "value_embeds", "logit_softcap")
ACTS = {"relu2": "relu2", "gelu": "gelu_pytorch_tanh", "swiglu": "silu"}  # {FFN: their name}
OTHER_NAMES = {"gelu_new": "gelu_pytorch_tanh", "swish": "silu"}
GATED = [name for name in ACTS if EXPERTS[name].parts == 2]
PLAIN = [name for name in ACTS if EXPERTS[name].parts == 1]
EPS = {"rms": 1e-6, "rms_gain": 1e-6, "layer": 1e-5}
GAINS = {"rms": "", "rms_gain": "1.weight", "layer": "weight"}  # tensor of a norm that has them
NORMS = ("norm1", "norm2", "norm")  # parts with gains; of these the first two are in a layer
QK_NORMS = ("q_norm", "k_norm")
NEVER_BIASED = ("embed", "position", "head", *QK_NORMS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = 1e-4  # of logits in float32; relative to the largest where that is above 1
CHECKED_TOKENS = 256  # length of the sequences whose logits are compared, at most


########################################
#               Classes                #
########################################


class Kind(NamedTuple):
    """A class of theirs, and what of ours it holds."""

    name: str
    holds: dict[str, list]  # {setting: values}
    layer: str  # what the names in a layer begin with
    modules: dict[str, str]  # in a layer: the parts that each joins
    outer: dict[str, str]  # likewise around the layers
    sizes: dict[str, str]  # {name of a size: what its config calls it}
    options: dict[str, Any]  # of its config, with which it computes what ours does
    biases: tuple[str, ...] = ()  # options that give linear layers biases
    always_biased: bool = False
    dropouts: tuple[str, ...] = ()  # options that together are DROPOUT
    transposed: bool = False  # the matrices of a layer


ANY_BIAS = [False, True]
LAYER_NORM = {"norm": ["layer"], "qk_norm": [False], "ffn": PLAIN, "bias": ANY_BIAS}
RMS_NORM = {"norm": ["rms", "rms_gain"], "pos": ["rotary"]}
ROTARY = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_theta": 10000.0,  # these two are read by transformers before version 5
    "rope_scaling": None,
}
ATTENTION = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
}
QK_GAINS = {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}  # ours has no gains
LAYER_NORMS = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
APERTUS_NORMS = {"attention_layernorm": "norm1", "feedforward_layernorm": "norm2"}
MLP = {"mlp.up_proj": "up", "mlp.down_proj": "down"}
GATED_MLP = {"mlp.gate_proj": "gate", **MLP}
OUTER = {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head"}
SIZES = {
    "vocab": "vocab_size",
    "layers": "num_hidden_layers",
    "channels": "hidden_size",
    "heads": "num_attention_heads",
    "key_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "hidden": "intermediate_size",
    "positions": "max_position_embeddings",
    "act": "hidden_act",
    "eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}

KINDS = {  # by model_type
    "gpt2": Kind(
        name="GPT2LMHeadModel",
        holds=LAYER_NORM | {"pos": ["learned"]},
        layer="transformer.h",
        modules={
            "ln_1": "norm1",
            "attn.c_attn": "q k v",
            "attn.c_proj": "o",
            "ln_2": "norm2",
            "mlp.c_fc": "up",
            "mlp.c_proj": "down",
        },
        outer={
            "transformer.wte": "embed",
            "transformer.wpe": "position",
            "transformer.ln_f": "norm",
            "lm_head": "head",
        },
        sizes={
            "vocab": "vocab_size",
            "layers": "n_layer",
            "channels": "n_embd",
            "heads": "n_head",
            "hidden": "n_inner",
            "positions": "n_positions",
            "act": "activation_function",
            "eps": "layer_norm_epsilon",
            "tied": "tie_word_embeddings",
        },
        options={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        always_biased=True,
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        transposed=True,
    ),
    "llama": Kind(
        name="LlamaForCausalLM",
        holds=RMS_NORM | {"qk_norm": [False], "ffn": GATED, "bias": ANY_BIAS},
        layer="model.layers",
        modules=LAYER_NORMS | ATTENTION | GATED_MLP,
        outer=OUTER,
        sizes=SIZES,
        options=ROTARY,
        biases=("attention_bias", "mlp_bias"),
    ),
    "qwen3": Kind(
        name="Qwen3ForCausalLM",
        holds=RMS_NORM | {"qk_norm": [True], "ffn": GATED, "bias": [False]},
        layer="model.layers",
        modules=LAYER_NORMS | ATTENTION | QK_GAINS | GATED_MLP,
        outer=OUTER,
        sizes=SIZES,
        options=ROTARY | {"attention_bias": False, "use_sliding_window": False},
    ),
    "arcee": Kind(
        name="ArceeForCausalLM",
        holds=RMS_NORM | {"qk_norm": [False], "ffn": PLAIN, "bias": ANY_BIAS},
        layer="model.layers",
        modules=LAYER_NORMS | ATTENTION | MLP,
        outer=OUTER,
        sizes=SIZES,
        options=ROTARY,
        biases=("attention_bias", "mlp_bias"),
    ),
    "apertus": Kind(
        name="ApertusForCausalLM",
        holds=RMS_NORM | {"qk_norm": [True], "ffn": PLAIN, "bias": [False]},
        layer="model.layers",
        modules=APERTUS_NORMS | ATTENTION | QK_GAINS | MLP,
        outer=OUTER,
        sizes=SIZES,
        options=ROTARY | {"attention_bias": False},
    ),
    "starcoder2": Kind(
        name="Starcoder2ForCausalLM",
        holds=LAYER_NORM | {"pos": ["rotary"]},
        layer="model.layers",
        modules=LAYER_NORMS | ATTENTION | {"mlp.c_fc": "up", "mlp.c_proj": "down"},
        outer=OUTER,
        sizes=SIZES | {"eps": "norm_epsilon"},
        options=ROTARY | {"sliding_window": None},
        biases=("use_bias",),
        dropouts=("attention_dropout", "residual_dropout", "embedding_dropout"),
    ),
}


def assignment(name: str, value: Any) -> str:
    """A setting as a shell has it."""
    return f"{name.upper()}={int(value) if isinstance(value, bool) else value}"


def ffn_of(cfg: Config) -> str:
    """The FFN that all layers have. Raises ConfigError."""
    kinds = sorted(set(cfg.ffn.split(",")))
    if len(kinds) > 1:
        raise ConfigError(f"FFN={cfg.ffn} cannot be exported: a class has one FFN for all layers")
    return kinds[0]


def find_kind(cfg: Config) -> str:
    """The model_type of the class that computes what cfg does. Raises ConfigError."""
    only = f"a class here has to compute the same, and they are {', '.join(KINDS)}"
    if set(cfg.mixer.split(",")) != {"attention"}:
        raise ConfigError(f"MIXER={cfg.mixer} cannot be exported, only attention: {only}")
    for name in NOT_EXPORTED:
        if getattr(cfg, name) != getattr(Config, name):
            raise ConfigError(f"{assignment(name, getattr(cfg, name))} cannot be exported: {only}")
    ffn = ffn_of(cfg)
    if ffn not in ACTS:
        raise ConfigError(f"FFN={ffn} cannot be exported, only {', '.join(ACTS)}: {only}")
    settings = vars(cfg) | {"ffn": ffn}
    misfits = {
        model_type: [name for name, values in kind.holds.items() if settings[name] not in values]
        for model_type, kind in KINDS.items()
    }
    nearest = min(misfits, key=lambda model_type: len(misfits[model_type]))
    if misfits[nearest]:
        kind = KINDS[nearest]
        have = " ".join(assignment(name, settings[name]) for name in kind.holds)
        need = " and ".join(assignment(name, kind.holds[name][0]) for name in misfits[nearest])
        raise ConfigError(
            f"{have}: no Hugging Face class holds these together; the nearest, {kind.name}, "
            f"needs {need}"
        )
    return nearest


def their_config(cfg: Config, kind: Kind) -> dict[str, Any]:
    """What the config of a class must say to compute what cfg does, biases aside."""
    ffn = ffn_of(cfg)
    values = {
        "vocab": cfg.vocab_size,
        "layers": cfg.n_layer,
        "channels": cfg.n_embd,
        "heads": cfg.n_head,
        "key_heads": cfg.n_head,
        "head_size": cfg.n_embd // cfg.n_head,
        "hidden": int(ffn_width(cfg, EXPERTS[ffn].parts)),
        "positions": cfg.sequence_length,
        "act": ACTS[ffn],
        "eps": EPS[cfg.norm],
        "tied": cfg.tie_embeddings,
    }
    return {theirs: values[name] for name, theirs in kind.sizes.items()} | kind.options


########################################
#               Tensors                #
########################################


def own_names(cfg: Config) -> Names:
    """The tensors that a stack of cfg may have, and their parts."""
    fc = "gate up" if ffn_of(cfg) in GATED else "up"
    gain = GAINS[cfg.norm]
    modules = {"mixer.qkv": "q k v", "mixer.proj": "o", "ffn.fc": fc, "ffn.proj": "down"}
    names = {
        "embed": ["embed.weight"],
        "head": ["head.weight"],
        "add_position.weight": ["position.weight"],
        f"norm.{gain}": ["norm.weight"],
        "norm.bias": ["norm.bias"],
    }
    for layer in range(cfg.n_layer):
        for module, part in {"mixer_norm": "norm1", "ffn_norm": "norm2"}.items():
            names[f"blocks.{layer}.{module}.{gain}"] = [f"{layer}.{part}.weight"]
            names[f"blocks.{layer}.{module}.bias"] = [f"{layer}.{part}.bias"]
        for module, parts in modules.items():
            for leaf in ("weight", "bias"):
                keys = [f"{layer}.{part}.{leaf}" for part in parts.split()]
                names[f"blocks.{layer}.{module}.{leaf}"] = keys
    return names


def their_names(cfg: Config, kind: Kind) -> Names:
    """The tensors that a model of this class has for cfg, and their parts."""
    has_bias = cfg.bias or kind.always_biased

    def leaves(parts: str) -> list[str]:
        if parts in NORMS:
            biased = cfg.norm == "layer"
        else:
            biased = has_bias and parts not in NEVER_BIASED
        return ["weight", "bias"] if biased else ["weight"]

    names = {
        f"{module}.{leaf}": [f"{part}.{leaf}"]
        for module, part in kind.outer.items()
        for leaf in leaves(part)
        if part != "head" or not cfg.tie_embeddings
    }
    for layer in range(cfg.n_layer):
        for module, parts in kind.modules.items():
            for leaf in leaves(parts):
                keys = [f"{layer}.{part}.{leaf}" for part in parts.split()]
                names[f"{kind.layer}.{layer}.{module}.{leaf}"] = keys
    return names


def split(names: Names, tensors: Tensors) -> Tensors:
    """The parts of tensors, whose matrices may be stacked: (parts, rows, columns)."""
    parts = {}
    for name, keys in names.items():
        if name in tensors:
            tensor = tensors[name]
            rows = tensor.flatten(0, -2) if tensor.ndim > 1 else tensor
            parts |= zip(keys, rows.chunk(len(keys)))
    return parts


def join(names: Names, parts: Tensors) -> Tensors:
    """New tensors of these parts, (rows, columns) or (rows,)."""
    return {name: torch.cat([parts[key] for key in keys]) for name, keys in names.items()}


def part_of(key: str) -> str:
    """q of 0.q.weight, norm of norm.weight."""
    return key.split(".")[-2]


def is_bias(key: str) -> bool:
    return key.endswith(".bias")


def neutral(key: str, parts: Tensors, cfg: Config) -> Tensor:
    """A part that changes nothing: gains of 1, or a bias of 0."""
    if is_bias(key):
        return torch.zeros(len(parts[key.removesuffix("bias") + "weight"]))
    return torch.ones(cfg.n_embd // cfg.n_head if part_of(key) in QK_NORMS else cfg.n_embd)


def is_neutral(key: str, tensor: Tensor) -> bool:
    """Whether a part may be left out."""
    if is_bias(key):
        return not tensor.any()
    return part_of(key) in (*NORMS, *QK_NORMS) and bool((tensor == 1).all())


def fit(parts: Tensors, names: Names, cfg: Config) -> Tensors:
    """The parts that names ask for, neutral where they are new. Raises ConfigError for one that
    would be lost."""
    wanted = [key for keys in names.values() for key in keys]
    for key in sorted(parts.keys() - set(wanted)):
        if not is_neutral(key, parts[key]):
            raise ConfigError(
                f"{key} (layer, part): the other model has none, and this one is not neutral, "
                "which is 1 for gains and 0 for a bias"
            )
    fitted = {key: parts[key] for key in wanted if key in parts}
    for key in sorted(wanted, key=is_bias):  # a bias is as long as its weight
        if key not in fitted:
            fitted[key] = neutral(key, fitted, cfg)
    return fitted


def turn(parts: Tensors, cfg: Config) -> Tensors:
    """Parts with the halves of each head of q and k exchanged, which turns the way that a rotary
    embedding goes: theirs is the inverse of ours."""
    if cfg.pos != "rotary":
        return parts

    def exchanged(tensor: Tensor) -> Tensor:
        halves = tensor.view(cfg.n_head, 2, -1, *tensor.shape[1:])
        return halves.flip(1).reshape(tensor.shape)

    turned = {key: exchanged(t) for key, t in parts.items() if part_of(key) in ("q", "k")}
    return parts | turned


def transpose(tensors: Tensors, kind: Kind) -> Tensors:
    """Tensors with the matrices of layers transposed where the class has them so."""
    return {
        name: t.mT if kind.transposed and name.startswith(kind.layer) and t.ndim == 2 else t
        for name, t in tensors.items()
    }


def stack(model: GPT) -> Tensors:
    """The tensors of a model under the names that a stack of layers has, one layer a visit."""
    tensors = {name: t for name, t in model.state_dict().items() if not name.startswith("blocks.")}
    for layer, (block, own) in enumerate(model.visits()):
        of_visit = block.state_dict() | own
        for branch in ("mixer", "ffn"):
            scale = of_visit.pop(f"{branch}_scale.weight", None)
            if scale is not None:
                for name in (f"{branch}.proj.weight", f"{branch}.proj.bias"):
                    if name in of_visit:
                        of_visit[name] = of_visit[name] * scale
        tensors |= {f"blocks.{layer}.{name}": t for name, t in of_visit.items()}
    return {name: t.detach() for name, t in tensors.items()}


def to_theirs(model: GPT, cfg: Config, kind: Kind) -> Tensors:
    """The tensors of a model of this class, float32. Raises ConfigError."""
    tensors, names = stack(model), own_names(cfg)
    strange = sorted(tensors.keys() - names)
    if strange:
        raise ConfigError(f"{strange[0]}: {kind.name} has nothing like it")
    parts = turn(split(names, tensors), cfg)
    names = their_names(cfg, kind)
    theirs = transpose(join(names, fit(parts, names, cfg)), kind)
    return {name: t.contiguous() for name, t in theirs.items()}


def to_ours(tensors: Tensors, cfg: Config, kind: Kind) -> tuple[Tensors, Config]:
    """The tensors of a GPT, and its Config: without gains and biases that are all neutral. Raises
    ConfigError."""
    parts = turn(split(their_names(cfg, kind), transpose(tensors, kind)), cfg)
    gains = [key for key in parts if part_of(key) in NORMS and not is_bias(key)]
    if cfg.norm == "rms_gain" and all(is_neutral(key, parts[key]) for key in gains):
        cfg = replace(cfg, norm="rms")
    biases = [key for key in parts if is_bias(key)]
    cfg = replace(cfg, bias=not all(is_neutral(key, parts[key]) for key in biases))
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in GPT(cfg).state_dict().items()}
    names = {name: keys for name, keys in own_names(cfg).items() if name in shapes}
    ours = join(names, fit(parts, names, cfg))
    return {name: ours[name].view(shape) for name, shape in shapes.items()}, cfg


########################################
#                Files                 #
########################################


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `out` at the end if nothing is raised."""
    out = out.absolute()
    partial = out.with_name(f".tmp_{out.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.iterdir(), partial):
            sync(path)
        os.replace(partial, out)
        sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_out(out: Path) -> None:
    """Raises ConfigError where something is there already."""
    is_empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    if not is_empty and os.path.lexists(out):
        raise ConfigError(f"--out {out}: it exists and is no empty folder; name another")


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_whole(path, json.dumps(values, indent=2) + "\n")


def write_hf(folder: Path, trained: Trained, model_type: str, dtype: str) -> None:
    """What from_pretrained needs. Raises ConfigError."""
    cfg, tokenizer, kind = trained.cfg, trained.tokenizer, KINDS[model_type]
    tensors = to_theirs(trained.model, cfg, kind)
    tensors = {name: t.to(DTYPES[dtype]) for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    end = None if tokenizer is None else tokenizer.eot_id
    config = {"architectures": [kind.name], "model_type": model_type, "dtype": dtype}
    config |= their_config(cfg, kind) | dict.fromkeys(kind.biases, cfg.bias)
    config |= dict.fromkeys(kind.dropouts, cfg.dropout)
    # some classes have other defaults
    config |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    write_json(folder / "config.json", config)

    generation = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    if tokenizer is not None and tokenizer.vocab_size < cfg.vocab_size:  # rows without a token
        generation["suppress_tokens"] = [*range(tokenizer.vocab_size, cfg.vocab_size)]
    write_json(folder / "generation_config.json", generation)
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, cfg)


def write_tokenizer(folder: Path, tokenizer: tokenization.Tokenizer, cfg: Config) -> None:
    """What AutoTokenizer needs."""
    write_whole(folder / "tokenizer.json", tokenizer.to_json())
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": cfg.sequence_length,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.eot_id is not None:
        about |= {"bos_token": tokenization.END, "eos_token": tokenization.END}
    write_json(folder / "tokenizer_config.json", about)


def import_transformers() -> Any:
    """The module, quiet, or None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_theirs(folder: Path) -> nn.Module:
    """The model of a folder in Hugging Face's format, float32. Raises DataError."""
    transformers = import_transformers()
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # of any type, as the library and its parts have them
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{folder}: expected weights in safetensors that fit its config.json, found: {reason}"
        ) from None
    missing = sorted(found["missing_keys"])
    if missing:
        raise DataError(f"{folder}: the files lack {len(missing)} tensors, as {missing[0]}")
    return model.eval()


@torch.no_grad()
def difference(ours: GPT, theirs: nn.Module, cfg: Config) -> tuple[float, float]:
    """Between the logits of both models on random tokens: the largest, and the largest logit."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, min(cfg.sequence_length, CHECKED_TOKENS))
    tokens = torch.randint(cfg.vocab_size, shape, generator=generator)
    logits = ours(tokens)
    apart = (logits - theirs(tokens, use_cache=False).logits).abs().max()
    return apart.item(), logits.abs().max().item()


def check_same(ours: GPT, theirs: nn.Module, cfg: Config) -> float:
    """The largest difference of logits. Raises ConfigError where they are not the same model."""
    apart, largest = difference(ours, theirs, cfg)
    if not apart <= TOLERANCE * max(1, largest):
        raise ConfigError(
            f"the logits of both models are {apart:.3g} apart and not within {TOLERANCE:g}: this "
            "version of transformers, or of the trainer, computes something that is not known "
            "here, so nothing was written"
        )
    return apart


########################################
#             Command line             #
########################################


def to_hf(args: argparse.Namespace) -> Iterator[str]:
    """Writes a run's model in Hugging Face's format; the lines to print. Raises ConfigError,
    DataError."""
    trained = load_trained(args.model, args.log_dir, device="cpu")
    cfg, model_type = trained.cfg, find_kind(trained.cfg)
    with new_folder(args.out) as folder:
        write_hf(folder, trained, model_type, "float32")
        compared = "logits not compared, for that pip install transformers"
        if import_transformers() is not None:
            apart = check_same(trained.model, load_theirs(folder), cfg)
            compared = f"logits at most {apart:.2g} apart in float32"
        if args.dtype != "float32":
            write_hf(folder, trained, model_type, args.dtype)
    yield f"written: {args.out}, {KINDS[model_type].name} in {args.dtype}; {compared}"
    if cfg.recurrence == "shared":
        blocks = len(trained.model.blocks)
        yield f"its {blocks} blocks are written once for each of the {cfg.n_layer} visits"
    if trained.tokenizer is None:
        yield f"without a tokenizer: {trained.folder} has no tokenizer.json that can be read"
    yield f"load it: transformers.AutoModelForCausalLM.from_pretrained({str(args.out)!r})"


def known_settings(config: Any) -> tuple[Config, Kind]:
    """The Config of the model that a config of theirs describes, with gains and biases wherever it
    may have them. Raises ConfigError."""
    kind = KINDS.get(config.model_type)
    if kind is None:
        raise ConfigError(
            f"model_type={config.model_type}: this trainer has no such model; choose one of "
            f"{', '.join(KINDS)}"
        )
    sizes = {name: getattr(config, theirs, None) for name, theirs in kind.sizes.items()}
    sizes["act"] = OTHER_NAMES.get(sizes["act"], sizes["act"])
    sizes["hidden"] = sizes["hidden"] or 4 * sizes["channels"]
    ffns = {ACTS[ffn]: ffn for ffn in kind.holds["ffn"]}
    if sizes["act"] not in ffns:
        raise ConfigError(
            f"{kind.sizes['act']}={sizes['act']}: this trainer has no such FFN; choose one of "
            f"{', '.join(ffns)}"
        )
    cfg = Config(
        vocab_size=sizes["vocab"],
        n_layer=sizes["layers"],
        n_head=sizes["heads"],
        n_embd=sizes["channels"],
        sequence_length=sizes["positions"],
        d_ff=sizes["hidden"],
        norm=kind.holds["norm"][-1],
        pos=kind.holds["pos"][0],
        qk_norm=kind.holds["qk_norm"][0],
        ffn=ffns[sizes["act"]],
        bias=kind.always_biased or any(getattr(config, name) for name in kind.biases),
        tie_embeddings=sizes["tied"],
    )
    found = vars(config) | {theirs: sizes[name] for name, theirs in kind.sizes.items()}
    for name, value in their_config(cfg, kind).items():
        if found.get(name) not in (value, None):
            raise ConfigError(
                f"{name}={found[name]}: this trainer's model has {value} there and cannot be told "
                "otherwise"
            )
    return cfg, kind


def shortened(cfg: Config) -> Config:
    """cfg with D_FF left to the trainer where it chooses the same."""
    default = replace(cfg, d_ff=0)
    same = ffn_width(default, EXPERTS[cfg.ffn].parts) == cfg.d_ff
    return default if same else cfg


def read_config(source: Path) -> Any:
    """The config of a folder in Hugging Face's format. Raises ConfigError, DataError."""
    if not (source / "config.json").is_file():
        raise DataError(
            f"{source}: expected a folder with config.json and model.safetensors, found no "
            "config.json; fetch one, as with hf download openai-community/gpt2 --local-dir gpt2"
        )
    transformers = import_transformers()
    if transformers is None:
        raise ConfigError("--from hf needs a library: pip install transformers")
    try:
        return transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    except Exception as error:  # likewise
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{source}/config.json: expected one that transformers reads, found: {reason}"
        ) from None


def copy_tokenizer(source: Path, folder: Path) -> str:
    """Copies tokenizer.json if it can be used here; else the reason why not."""
    if not (source / "tokenizer.json").is_file():
        return f"{source} has no tokenizer.json"
    try:
        tokenization.load(source)
    except DataError as error:
        return str(error)
    write_whole(folder / "tokenizer.json", (source / "tokenizer.json").read_bytes())
    return ""


def from_hf(args: argparse.Namespace) -> Iterator[str]:
    """Writes a folder that INIT_FROM takes; the lines to print. Raises ConfigError, DataError."""
    source = Path(args.model)
    cfg, kind = known_settings(read_config(source))
    theirs = load_theirs(source)
    tensors, cfg = to_ours(theirs.state_dict(), cfg, kind)
    cfg = shortened(cfg)
    model = GPT(cfg)
    model.load_state_dict(tensors)
    apart = check_same(model.eval(), theirs, cfg)
    with new_folder(args.out) as folder:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        write_json(folder / "config.json", vars(cfg))
        problem = copy_tokenizer(source, folder)
    yield f"written: {args.out}, from {kind.name}; logits at most {apart:.2g} apart in float32"
    if problem:
        yield f"without a tokenizer: {problem}"
    yield "train it with INPUT_BIN and INPUT_VAL_BIN of the same tokenizer and a smaller LR, by:"
    words = [f"INIT_FROM={shlex.quote(str(args.out))}", cfg.changes_text(), "python train_gpt.py"]
    yield " ".join(filter(None, words))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with code 2 and one sentence if it cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "model", help="with --to: a run id, a run's folder or a step's; with --from: a folder"
    )
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=["hf"], help="write Hugging Face's format")
    way.add_argument("--from", choices=["hf"], dest="origin", help="read Hugging Face's format")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights (default %(default)s)"
    )
    parser.add_argument("--log-dir", default="logs", help="of run ids (default %(default)s)")
    args = parser.parse_args(argv)
    if args.origin and args.dtype != "float32":
        parser.error("--dtype goes with --to: the trainer's own weights are in float32")
    return args


def main(argv: list[str] | None = None) -> int:
    """Converts and says what was written; returns the exit code."""
    args = parse_args(argv)
    try:
        check_out(args.out)
        for line in to_hf(args) if args.to else from_hf(args):
            print(line)
    except ConfigError as error:
        print(f"export.py: error: {error}", file=sys.stderr)
        return 2
    except (DataError, OSError, SafetensorError) as error:
        print(f"export.py: error: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
