"""Config: the settings are those promised, wrong ones are refused by name, others left alone."""

import ast
import dataclasses
import re

import pytest

from store.contract import ConfigError
import harness.settings
import train_gpt
from train_gpt import Config, axes, cautions, help_text, momentum_factor

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
FOLDER = harness.settings.ROOT / "experiments/presets"
PRESETS = {path.stem: path for path in FOLDER.glob("*.env")}
ORDINARY = """
    PATH HOME HOSTNAME HOSTTYPE USER LOGNAME SHELL SHLVL PWD OLDPWD TERM TERM_PROGRAM LANG LANGUAGE
    LC_ALL LC_CTYPE TZ EDITOR VISUAL PAGER LESS LESSOPEN LESSCLOSE LS_COLORS MAIL MANPATH INFOPATH
    INPUTRC HISTSIZE HISTFILE HISTCONTROL PS1 DISPLAY XAUTHORITY XDG_RUNTIME_DIR XDG_SESSION_ID
    XDG_DATA_DIRS XDG_CONFIG_DIRS DBUS_SESSION_BUS_ADDRESS COLORTERM COLUMNS LINES TMPDIR TEMP TMP
    MACHTYPE OSTYPE SSH_CLIENT SSH_CONNECTION SSH_TTY SSH_AUTH_SOCK SSH_AGENT_PID STY TMUX TMUX_PANE
    SUDO_USER SUDO_COMMAND http_proxy https_proxy no_proxy HTTP_PROXY NO_PROXY _ LD_LIBRARY_PATH
    LD_PRELOAD LIBRARY_PATH CPATH PKG_CONFIG_PATH MAKEFLAGS CC CXX CFLAGS CXXFLAGS LDFLAGS
    DEBIAN_FRONTEND container GPG_KEY CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER
    CUDA_DEVICE_MAX_CONNECTIONS CUDA_HOME CUDA_PATH CUDA_VERSION CUDA_LAUNCH_BLOCKING
    NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NVIDIA_REQUIRE_CUDA NVIDIA_PRODUCT_NAME
    NV_CUDA_LIB_VERSION NCCL_VERSION NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_IB_DISABLE NCCL_P2P_DISABLE
    GLOO_SOCKET_IFNAME CUBLAS_WORKSPACE_CONFIG HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES
    GPU_DEVICE_ORDINAL PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF OMP_NUM_THREADS OMP_PROC_BIND
    MKL_NUM_THREADS OPENBLAS_NUM_THREADS KMP_AFFINITY TORCH_HOME TORCHINDUCTOR_CACHE_DIR TORCH_LOGS
    TRITON_CACHE_DIR TORCH_NCCL_ASYNC_ERROR_HANDLING TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS
    TORCHELASTIC_RESTART_COUNT TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE MASTER_ADDR
    MASTER_PORT RANK LOCAL_RANK GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE
    WORLD_SIZE LOCAL_WORLD_SIZE NODE_RANK WANDB_NAME WANDB_PROJECT WANDB_ENTITY WANDB_MODE WANDB_DIR
    WANDB_RUN_ID WANDB_RUN_GROUP WANDB_NOTES WANDB_TAGS HF_HOME HF_TOKEN HF_HUB_OFFLINE
    HF_DATASETS_CACHE TRANSFORMERS_CACHE TOKENIZERS_PARALLELISM TIKTOKEN_CACHE_DIR DATA_DIR
    PYTHONPATH PYTHONHOME PYTHONUNBUFFERED PYTHONHASHSEED PYTHONDONTWRITEBYTECODE PYTHON_VERSION
    PYTEST_CURRENT_TEST VIRTUAL_ENV VIRTUAL_ENV_PROMPT PYENV_ROOT PYENV_VERSION PIP_CACHE_DIR
    UV_CACHE_DIR JUPYTER_PATH MPLBACKEND CONDA_EXE CONDA_PREFIX CONDA_PREFIX_1 CONDA_DEFAULT_ENV
    CONDA_PROMPT_MODIFIER CONDA_PYTHON_EXE CONDA_SHLVL _CE_CONDA _CE_M CONDA_BUILD_SYSROOT
    CONDA_TOOLCHAIN_HOST MAMBA_EXE MAMBA_ROOT_PREFIX CMAKE_PREFIX_PATH CMAKE_ARGS MODULEPATH
    MODULESHOME LOADEDMODULES LMOD_CMD LMOD_DIR LMOD_VERSION LMOD_SYSTEM_DEFAULT_MODULES _LMFILES_
    BASH_ENV SLURM_JOB_ID SLURM_JOBID SLURM_JOB_NAME SLURM_JOB_NODELIST SLURM_NODELIST
    SLURM_JOB_NUM_NODES SLURM_NNODES SLURM_NTASKS SLURM_NPROCS SLURM_PROCID SLURM_LOCALID
    SLURM_NODEID SLURM_STEP_ID SLURM_STEPID SLURM_CPUS_PER_TASK SLURM_CPUS_ON_NODE
    SLURM_TASKS_PER_NODE SLURM_GPUS SLURM_GPUS_ON_NODE SLURM_GPUS_PER_NODE SLURM_JOB_GPUS
    SLURM_STEP_GPUS SLURM_MEM_PER_NODE SLURM_SUBMIT_DIR SLURM_SUBMIT_HOST SLURM_CLUSTER_NAME
    SLURM_JOB_PARTITION SLURM_JOB_ACCOUNT SLURM_JOB_QOS SLURM_JOB_UID SLURM_ARRAY_TASK_ID
    SLURM_ARRAY_JOB_ID SLURM_RESTART_COUNT SLURM_TMPDIR SLURM_EXPORT_ENV SLURMD_NODENAME SLURM_CONF
    SBATCH_PARTITION SRUN_DEBUG PMI_RANK PMI_SIZE PMIX_RANK OMPI_COMM_WORLD_RANK
    OMPI_COMM_WORLD_SIZE LSB_JOBID PBS_JOBID KUBERNETES_SERVICE_HOST KUBERNETES_SERVICE_PORT
    KUBERNETES_SERVICE_PORT_HTTPS KUBERNETES_PORT KUBERNETES_PORT_443_TCP
    KUBERNETES_PORT_443_TCP_PROTO KUBERNETES_PORT_443_TCP_ADDR KUBECONFIG POD_NAME POD_IP
    POD_NAMESPACE NODE_NAME JOB_NAME JOB_ID JOB_COMPLETION_INDEX TRAINER_SERVICE_HOST
    TRAINER_PORT_29500_TCP_PORT CI GITHUB_ACTIONS GITHUB_RUN_ID GITHUB_REF_NAME GITHUB_WORKSPACE
    RUNNER_OS BUILD_ID AWS_REGION AWS_DEFAULT_REGION AWS_ACCESS_KEY_ID
    GOOGLE_APPLICATION_CREDENTIALS AZURE_CLIENT_ID COLAB_GPU KAGGLE_KERNEL_RUN_TYPE RUNPOD_POD_ID
""".split()


# What a setting needs beside it to mean something.
COMPANIONS = {
    "reset_at_eot": {"mixer": "rwkv"},
    "carry_state": {"mixer": "gru,rwkv", "batch_size": 64},
    "balance": {"ffn": "moe"},
    "n_unique": {"recurrence": "shared"},
    "unshared_ends": {"recurrence": "shared"},
    "per_visit": {"recurrence": "shared", "ffn": "moe", "norm": "layer"},
    "aux_loss_coef_start": {"aux_loss_coef_end": 0.1},
    "aux_loss_coef_end": {"aux_loss_coef_start": 0.1},
}


def beside(name, value):
    """The settings that this value of a setting needs beside it."""
    return (
        {"optimizer": value}
        if name.endswith("_optimizer") and value != "auto"
        else COMPANIONS.get(name, {})
    )


def refused(env):
    with pytest.raises(ConfigError) as error:
        Config.from_env(env)
    return str(error.value)


def another(name):
    """A valid value of a setting that is not its default."""
    default = FIELDS[name].default
    if name in axes():
        return next(
            (choice for choice in axes()[name] if choice != default), f"{default},{default}"
        )
    if isinstance(default, str):
        return f"{default}x"
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default // 2 if default > 2 else default + 1
    return default / 2 if default else 0.5


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """Writes a preset into an otherwise empty folder of presets."""

    def write(text, name="mine"):
        folder = tmp_path / "experiments/presets"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.env").write_text(text)

    monkeypatch.setattr(harness.settings, "ROOT", tmp_path)
    write("# nothing but the defaults\n", "gpt2_small")
    return write


# Names and defaults


def test_settings_keep_their_names():
    """Scripts and shells rely on them; a setting that a change adds need not be here."""
    names = """
        PRESET RUN_ID STAGE VARIANT NOTE SEED DRY_RUN INPUT_BIN MAX_TRAIN_TOKENS INPUT_VAL_BIN
        SHUFFLE BATCH_SIZE DEVICE_BATCH_SIZE SEQUENCE_LENGTH NUM_ITERATIONS MAX_EPOCHS VAL_EVERY
        VAL_TOKENS VOCAB_SIZE N_LAYER N_HEAD N_EMBD D_FF MIXER FFN NORM POS QK_NORM BIAS
        TIE_EMBEDDINGS DROPOUT INIT ATTNGATE GATEPOS GATEACT NUM_EXPERTS TOP_K EXPERT SHARED_EXPERT
        BALANCE AUX_LOSS_COEF AUX_LOSS_COEF_START AUX_LOSS_COEF_END AUX_WARMUP_FRAC
        AUX_DECAY_END_FRAC BALANCE_LOG_INTERVAL ROUTER_OPTIMIZER RECURRENCE N_UNIQUE UNSHARED_ENDS
        PER_VISIT OPTIMIZER LR EMBED_LR HEAD_LR MUON_LR MUON_SCALE MUON_MOMENTUM BETA1 BETA2
        WEIGHT_DECAY GRAD_CLIP LR_SCHEDULE WARMUP_ITERS WARMDOWN_ITERS MIN_LR_FRAC DETERMINISTIC
        DEVICE DTYPE COMPILE PEAK_TFLOPS RESUME INIT_FROM SAVE_EVERY KEEP_LAST MAX_BAD_STEPS
        HANG_TIMEOUT LOG_DIR RESULTS_CSV LOG_EVERY TRACKERS""".split()
    assert not set(names) - {name.upper() for name in FIELDS}


def test_every_number_has_a_range():
    ranges = {name for names in Config.BOUNDS for name in names.split()}
    numbers = {name for name, field in FIELDS.items() if field.type not in (str, bool)}
    assert ranges == numbers, f"give {ranges ^ numbers} a range in Config.BOUNDS"


def lines_of(preset):
    lines = [line.strip() for line in PRESETS[preset].read_text().splitlines()]
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_the_default_preset_spells_out_the_defaults():
    for name, text in lines_of("gpt2_small").items():
        assert Config.from_env({name: text}) == Config() and name.lower() in FIELDS, name
    assert Config.from_env({}) == Config.from_env({"PRESET": "gpt2_small"}) == Config()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_the_same_as_its_lines_in_the_environment(name):
    cfg = Config.from_env({"PRESET": name})
    assert cfg == dataclasses.replace(Config.from_env(lines_of(name) | {"PRESET": ""}), preset=name)


def test_the_promised_choices_are_there():
    promised = {
        "mixer": "attention gru rwkv gru_rwkv mingru gated_deltanet",
        "ffn": "none relu2 gelu swiglu moe",
        "norm": "rms rms_gain layer",
        "pos": "rotary learned",
        "init": "zero_proj gpt2",
        "attngate": "none headwise elementwise const",
        "gatepos": "sdpa value",
        "gateact": "sigmoid ns_sigmoid",
        "optimizer": "muon adamw",
        "muon_scale": "unit original match_rms_adamw",
        "lr_schedule": "trapezoid cosine",
        "expert": "relu2 gelu swiglu",
        "balance": "aux quantile none",
        "router_optimizer": "adamw muon",
        "gate_optimizer": "auto muon adamw",
        "shard_tail": "drop keep",
        "recurrence": "stacked indexed shared",
        "per_visit": "none norm router scale",
        "device": "auto cpu cuda",
        "dtype": "auto float32 bfloat16 float16",
        "compile": "auto 0 1",
        "trackers": "none tensorboard wandb",
        "residual": "plain x0 unet",
        "orthogonalize": "newton_schulz polar_express",
        "muon_norm": "none rows",
        "decay_schedule": "constant follow_lr to_zero",
    }
    missing = {
        (axis, name)
        for axis, names in promised.items()
        for name in names.split()
        if name not in axes()[axis]
    }
    assert promised.keys() == axes().keys() and not missing


@pytest.mark.parametrize(
    "axis, choice", [(axis, choice) for axis, choices in axes().items() for choice in choices]
)
def test_every_named_choice_builds(axis, choice):
    env = {name.upper(): value for name, value in beside(axis, choice).items()}
    assert getattr(Config.from_env(env | {axis.upper(): choice}), axis) == choice


def test_tiled_choices_build():
    assert Config.from_env({"FFN": "relu2,swiglu,gelu"}).ffn == "relu2,swiglu,gelu"


# The environment


def test_the_environment_wins_over_the_preset_and_that_over_the_defaults(preset):
    preset("\n  # a comment\nLR=0.5\nN_LAYER=3\nNOTE=a=b # kept\n\n")
    cfg = Config.from_env({"PRESET": "mine", "N_LAYER": "4", "HOME": "/"})
    assert cfg == Config(preset="mine", lr=0.5, n_layer=4, note="a=b # kept")


def test_values_have_the_type_of_their_setting():
    cfg = Config.from_env(
        {"BIAS": "1", "QK_NORM": "False", "SEED": "7", "LR": "1e-3", "EMBED_LR": "2", "STAGE": "3"}
    )
    assert [
        repr(value) for value in (cfg.bias, cfg.qk_norm, cfg.seed, cfg.lr, cfg.embed_lr, cfg.stage)
    ] == ["True", "False", "7", "0.001", "2.0", "'3'"]


def test_a_blank_variable_counts_as_not_set(preset):
    preset("LR=0.5\n")
    assert Config.from_env({name.upper(): "" for name in FIELDS}) == Config()
    assert Config.from_env({"PRESET": "mine", "LR": ""}).lr == 0.5


def test_a_blank_line_of_a_preset_counts_as_not_set(preset):
    preset("".join(f"{name.upper()}=\n" for name in FIELDS))
    assert Config.from_env({"PRESET": "mine"}) == Config(preset="mine")


def test_auto_gives_a_setting_back_to_those_that_decide_on_it(preset):
    preset("LR=0.5\nMUON_LR=0.0018\nEMBED_LR=0.2\nD_FF=256\nAUX_LOSS_COEF_START=1\n")
    with_auto = {"PRESET": "mine", "MUON_LR": "auto", "EMBED_LR": "auto", "D_FF": "auto"}
    cfg = Config.from_env(with_auto | {"AUX_LOSS_COEF_START": "none"})
    assert cfg == Config(preset="mine", lr=0.5)
    assert cfg.resolved() == {"embed_lr": 0.5, "muon_lr": 0.05, "d_ff": 4 * 768}
    assert Config.from_env({"VOCAB_SIZE": "auto"}).vocab_size == 0
    assert refused({"MUON_LR": "none"}) == "MUON_LR='none': must be a number or auto"
    assert refused({"LR": "none"}) == "LR='none': must be a number"
    assert refused({"AUX_DECAY_END_FRAC": "none"}).endswith("must be a number")
    assert refused({"LR": "auto"}) == "LR='auto': must be a number"
    assert refused({"AUX_LOSS_COEF_END": "auto"}).endswith("must be a number")


def test_what_is_resolved_is_what_the_optimizers_and_the_model_get():
    swiglu = {"FFN": "swiglu", "N_EMBD": "96", "TIE_EMBEDDINGS": "0", "LR": "0.02"}
    cfg = Config.from_env(swiglu)
    assert cfg.resolved() == {"embed_lr": 0.02, "head_lr": 0.02, "muon_lr": 0.002, "d_ff": 256}
    both = Config.from_env({"FFN": "relu2,swiglu", "OPTIMIZER": "adamw", "EMBED_LR": "0.1"})
    assert both.resolved() == {"embed_lr": 0.1}, "two widths are no number, no Muon no rate of it"
    experts = Config.from_env({"FFN": "moe", "TOP_K": "2", "N_EMBD": "96", "N_HEAD": "2"})
    assert experts.resolved()["d_ff"] == 192


@pytest.mark.parametrize(
    "settings, name, need",
    [
        ("OPTIMIZER=adamw MUON_LR=1", "MUON_LR", "OPTIMIZER=muon"),
        ("LR_SCHEDULE=cosine WARMDOWN_ITERS=9", "WARMDOWN_ITERS", "LR_SCHEDULE=trapezoid"),
        ("MIN_LR_FRAC=0.1", "MIN_LR_FRAC", "LR_SCHEDULE=cosine"),
        ("GATEACT=ns_sigmoid", "GATEACT", "ATTNGATE!=none"),
        ("HEAD_LR=1", "HEAD_LR", "TIE_EMBEDDINGS=0"),
        ("TOP_K=3", "TOP_K", "FFN=moe"),
        ("FFN=moe BALANCE=none AUX_LOSS_COEF=1", "AUX_LOSS_COEF", "BALANCE=aux"),
        ("FFN=moe AUX_WARMUP_FRAC=0.1", "AUX_WARMUP_FRAC", "AUX_LOSS_COEF_START!=none"),
        (
            "FFN=moe AUX_LOSS_COEF=1 AUX_LOSS_COEF_START=1 AUX_LOSS_COEF_END=0",
            "AUX_LOSS_COEF",
            "AUX_LOSS_COEF_START=none",
        ),
        ("OPTIMIZER=adamw MUON_NORM=rows", "MUON_NORM", "OPTIMIZER=muon"),
        ("OPTIMIZER=adamw ORTHOGONALIZE=polar_express", "ORTHOGONALIZE", "OPTIMIZER=muon"),
        ("OPTIMIZER=adamw MOMENTUM_START=0.8", "MOMENTUM_START", "OPTIMIZER=muon"),
        ("MOMENTUM_WARMUP_ITERS=9", "MOMENTUM_WARMUP_ITERS", "MOMENTUM_START!=none"),
        ("MOMENTUM_COOLDOWN_ITERS=9", "MOMENTUM_COOLDOWN_ITERS", "MOMENTUM_START!=none"),
        ("CAUTIOUS_DECAY=1", "CAUTIOUS_DECAY", "WEIGHT_DECAY!=0.0"),
        ("DECAY_SCHEDULE=to_zero", "DECAY_SCHEDULE", "WEIGHT_DECAY!=0.0"),
        ("WARMDOWN_ITERS=9 WARMDOWN_FRAC=0.5", "WARMDOWN_ITERS", "WARMDOWN_FRAC=none"),
        ("LR_SCHEDULE=cosine WARMDOWN_FRAC=0.5", "WARMDOWN_FRAC", "LR_SCHEDULE=trapezoid"),
    ],
)
def test_a_setting_without_effect_is_told_and_counts_for_nothing(settings, name, need):
    env = dict(word.split("=") for word in settings.split())
    cfg, without = Config.from_env(env), Config.from_env(env | {name: ""})
    assert f"{name} has no effect without {need.replace('!=', ' other than ')}" in cautions(cfg)
    assert cfg.effective() == without.effective() and cfg.hash() != without.hash()
    assert name.lower() not in cfg.effective()
    met = need.replace("GATE!=none", "GATE=const").replace("!=none", "=0.5")
    met = dict([met.replace("!=0.0", "=0.5").split("=")])
    if need.startswith("AUX_LOSS_COEF_START"):
        met["AUX_LOSS_COEF_END"] = met["AUX_LOSS_COEF_START"]
    if "FFN" in env:
        met["FFN"] = "moe"
    assert name.lower() in Config.from_env(env | met).effective()


@pytest.mark.parametrize("fall, told", [(3, False), (4, True)])
def test_a_momentum_that_the_run_is_too_short_for_is_told(fall, told):
    ramps = {"momentum_warmup_iters": 7, "momentum_cooldown_iters": fall}
    cfg = Config(momentum_start=0.5, num_iterations=10, warmdown_iters=5, **ramps)
    assert (max(momentum_factor(step, cfg) for step in range(10)) < 1) == told
    sentences = [words for words in cautions(cfg) if "does not get to" in words]
    assert len(sentences) == told and all(" = 11 > NUM_ITERATIONS" in words for words in sentences)
    without = dataclasses.replace(cfg, momentum_start=None)
    assert not any("does not get to" in words for words in cautions(without))


def test_experts_in_float16_on_cuda_are_told_to_be_slow():
    slow = Config(ffn="relu2,moe", dtype="float16", device="cuda")
    assert "DTYPE=bfloat16 is twice as fast" in cautions(slow)[0]
    for change in ({"ffn": "relu2"}, {"dtype": "bfloat16"}, {"device": "cpu"}):
        assert not any(
            "float16" in words for words in cautions(dataclasses.replace(slow, **change))
        )


def test_what_settings_need_names_settings_and_choices():
    for need, names in Config.NEEDS.items():
        setting, value = need.replace("!", "").split("=")
        assert {setting.lower(), *names.split()} <= FIELDS.keys()
        choices = Config.choices().get(setting.lower())
        if choices is None:
            off = dict.fromkeys(("TIE_EMBEDDINGS", "SHUFFLE", "CARRY_STATE"), "0")
            off = (off | {"WEIGHT_DECAY": "0.0"}).get(setting, "none")
            assert value == off and Config.from_env({setting: off}).holds(f"{setting}={off}")
        else:
            assert value in choices
    assert {*Config.AUTO, *Config.AUTO.values()} <= FIELDS.keys()


# Refusals


@pytest.mark.parametrize(
    "setting, sentence",
    [
        ("ATTNGATE=foo", f"ATTNGATE=foo: choose one of {', '.join(train_gpt.GATES)}"),
        ("FFN=relu2,foo", f"FFN=foo: choose one of {', '.join(train_gpt.FFNS)}"),
        ("FFN=relu2,", f"FFN=: choose one of {', '.join(train_gpt.FFNS)}"),
        ("NORM=rms,layer", f"NORM=rms,layer: choose one of {', '.join(train_gpt.NORMS)}"),
        ("PRESET=nope", f"PRESET=nope: choose one of {', '.join(sorted(PRESETS))}"),
        ("LR=abc", "LR='abc': must be a number"),
        ("LR=-1", "LR=-1.0: must lie between 1e-12 and "),
        ("LR=nan", "LR=nan: must lie between 1e-12 and "),
        ("MUON_LR=inf", "MUON_LR=inf: must lie between 1e-12 and "),
        ("BIAS=2", "BIAS='2': must be 0 or 1"),
        ("N_LAYER=0", "N_LAYER=0: must lie between 1 and "),
        ("N_LAYER=1.5", "N_LAYER='1.5': must be a whole number"),
        ("DROPOUT=1", "DROPOUT=1.0: must lie between 0 and 0.99"),
        ("BETA2=1", "BETA2=1.0: must lie between 0 and 0.9999999"),
        ("RUN_ID=../x", "RUN_ID=../x needs 1 to 100 letters, digits, _, and within . -"),
        ("RUN_ID=a/b", "RUN_ID=a/b needs 1 to 100 letters"),
        ("RUN_ID=-x", "RUN_ID=-x needs 1 to 100 letters"),
        ("RUN_ID=x\n", r"RUN_ID=x\n needs 1 to 100 letters"),
        (f"RUN_ID={'x' * 101}", f"RUN_ID={'x' * 101} needs 1 to 100 letters"),
        (
            "N_EMBD=100",
            "N_HEAD=6 needs N_EMBD=100 to be a multiple of 12 with POS=rotary: 96 or 108",
        ),
        ("N_EMBD=4", "N_HEAD=6 needs N_EMBD=4 to be a multiple of 12 with POS=rotary: 12 or 24"),
        ("N_EMBD=18", "N_HEAD=6 needs N_EMBD=18 to be a multiple of 12 with POS=rotary: 12 or 24"),
        ("N_EMBD=30", "N_HEAD=6 needs N_EMBD=30 to be a multiple of 12 with POS=rotary: 24 or 36"),
        ("RESIDUAL=skip", "RESIDUAL=skip: choose one of plain, x0, unet"),
        ("LOGIT_SOFTCAP=-1", "LOGIT_SOFTCAP=-1.0: must lie between 0 and "),
        ("VALUE_EMBEDS=7", "VALUE_EMBEDS=7 needs at most half of N_LAYER, 6"),
        ("MOMENTUM_START=1", "MOMENTUM_START=1.0: must lie between 0 and 0.9999999"),
        ("WARMDOWN_FRAC=1.5", "WARMDOWN_FRAC=1.5: must lie between 0 and 1"),
        ("EMA_ITERS=-1", "EMA_ITERS=-1: must lie between 0 and "),
        ("VAL_TOKENS=1023", "VAL_TOKENS=1023 needs at least SEQUENCE_LENGTH=1024"),
    ],
)
def test_a_wrong_value_is_refused_by_name_and_choices(setting, sentence):
    name, _, text = setting.partition("=")
    assert refused({name: text}).startswith(sentence)


def test_a_momentum_of_nothing_cannot_rise():
    sentence = refused({"MOMENTUM_START": "0.5", "MUON_MOMENTUM": "0"})
    assert sentence == "MOMENTUM_START=0.5 needs MUON_MOMENTUM above 0"


def test_the_longest_run_id_and_an_odd_head_with_learned_positions_are_taken():
    assert Config.from_env({"RUN_ID": "x" * 100}).run_id == "x" * 100
    assert Config.from_env({"N_EMBD": "30", "POS": "learned"}).n_embd == 30
    assert "to be a multiple of 6 with POS=learned: 30 or 36" in refused(
        {"N_EMBD": "32", "POS": "learned"}
    )


def test_of_a_head_size_that_cannot_be_both_settings_are_named():
    """Either may have been set, the other by a preset."""
    for env in {"PRESET": "quickstart", "N_HEAD": "5"}, {"N_HEAD": "5", "N_EMBD": "192"}:
        assert refused(env) == (
            "N_HEAD=5 needs N_EMBD=192 to be a multiple of 10 with POS=rotary: 190 or 200, or "
            "another N_HEAD"
        )


@pytest.mark.parametrize(
    "name, ours",
    [
        ("ATTN_GATE", "ATTNGATE"),
        ("GATE_ACT", "GATEACT"),
        ("NUMITERATIONS", "NUM_ITERATIONS"),
        ("NLAYER", "N_LAYER"),
        *Config.SYNONYMS.items(),
    ],
)
def test_another_spelling_is_refused_and_ours_named(name, ours):
    sentence = f"{name} is no setting; the name here is {ours} (unset {name}, or set "
    assert refused({name: "1"}) == sentence + "ALLOW_UNKNOWN=1)"
    assert ours.lower() in FIELDS


@pytest.mark.parametrize(
    "text, parts",
    [
        ("N_LAYER 3\n", ["PRESET=mine", "'N_LAYER 3' in ", "mine.env is no NAME=value"]),
        ("N_LAYER\n", ["PRESET=mine", "'N_LAYER' in ", "mine.env is no NAME=value"]),
        ("N_LAYERS=3\n", ["PRESET=mine", "'N_LAYERS=3' in ", "mine.env is no NAME=value"]),
        (
            "LEARNING_RATE=3\n",
            ["PRESET=mine", "'LEARNING_RATE=3' in ", "mine.env is no NAME=value"],
        ),
        ("LR=fast\n", ["LR='fast': must be a number"]),
    ],
)
def test_a_wrong_line_of_a_preset_is_refused_by_name(preset, text, parts):
    preset(text)
    message = refused({"PRESET": "mine"})
    assert all(part in message for part in parts), message
    assert Config.from_env({}) == Config()


def test_a_wrong_line_of_the_default_preset_is_refused_by_name(preset):
    preset("N_LAYERS=3\n", "gpt2_small")
    assert "PRESET=gpt2_small" in refused({})


# Near misses


@pytest.mark.parametrize(
    "name, ours",
    [
        ("GRAD_CLIPP", "GRAD_CLIP"),
        ("ATTNGATES", "ATTNGATE"),
        ("SHUFFLES", "SHUFFLE"),
        ("BATCH_SIZES", "BATCH_SIZE"),
        ("DROPUOT", "DROPOUT"),
        ("WARMDOWN_ITER", "WARMDOWN_ITERS"),
        ("N_LAYERS", "N_LAYER"),
        ("NUM_LAYERS", "N_LAYER"),
        ("attngate", "ATTNGATE"),
        ("Attn_Gates", "ATTNGATE"),
    ],
)
def test_a_near_miss_in_any_case_is_refused(name, ours):
    assert refused({name: "1"}).startswith(f"{name} is no setting; the name here is {ours} (unset")
    assert Config.from_env({name: "1", "ALLOW_UNKNOWN": "1"}) == Config()


def test_ordinary_variables_are_left_alone():
    env = dict.fromkeys(ORDINARY, "1")
    assert Config.from_env(env) == Config()


# What a Config tells


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lr = 1.0


@pytest.mark.parametrize("name", FIELDS)
def test_changes_are_exactly_what_differs(name):
    settings = beside(name, another(name)) | {name: another(name)}
    assert Config(**settings).changes() == {
        key.upper(): value for key, value in settings.items() if value != FIELDS[key].default
    }


def test_defaults_have_no_changes():
    assert (
        Config().changes()
        == Config.from_env({"LR": "3.6e-3", "N_EMBD": "768", "RUN_ID": ""}).changes()
        == {}
    )


def test_hash_ignores_seed_labels_paths_and_logging_and_nothing_else():
    same = set()
    for name in FIELDS:
        needed = beside(name, another(name))
        if name in ("aux_loss_coef_start", "aux_loss_coef_end"):
            needed = needed | {name: 0.1}  # neither is without the other
        if Config(**needed | {name: another(name)}).hash() == Config(**needed).hash():
            same.add(name)
    assert same == set(
        """preset run_id stage variant note seed dry_run input_bin input_val_bin peak_tflops
        log_dir results_csv log_every resume save_every keep_last max_bad_steps hang_timeout
        balance_log_interval sample_every trackers""".split()
    )
    assert re.fullmatch("[0-9a-f]{8}", Config().hash())
    hashes = {
        Config(lr=lr, embed_lr=embed_lr).hash()
        for lr in (0.1, 0.2)
        for embed_lr in (None, 0.1, 0.2)
    }
    assert len(hashes) == 6


def test_help_lists_every_setting_with_default_choices_and_comment():
    body = next(
        node for node in ast.parse(train_gpt.SOURCE).body if getattr(node, "name", "") == "Config"
    ).body
    source = train_gpt.SOURCE.splitlines()
    comments = {
        node.target.id: source[node.end_lineno - 1].split("  # ")[1]
        for node in body
        if isinstance(node, ast.AnnAssign)
    }
    lines = {
        line.split()[0]: line for line in help_text().splitlines() if re.match("  [A-Z]", line)
    }
    assert lines.keys() == {name.upper() for name in FIELDS}
    for name, line in lines.items():
        default = FIELDS[name.lower()].default
        said = line.split()[1]
        if said != "blank":
            assert getattr(Config.from_env({name: said}), name.lower()) == default
        assert (said == "blank") == (default == "")
        assert line.endswith(f" {comments[name.lower()]}")
        choices = re.findall(r"\[(\S+)\]", line.removesuffix(comments[name.lower()]))
        assert choices == (["|".join(axes()[name.lower()])] if name.lower() in axes() else [])
    assert help_text().splitlines()[-1] == f"Presets: {', '.join(sorted(PRESETS))}"
