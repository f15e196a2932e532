"""scripts/scale_model.py: the trainer's counts, costs by hand, never above the budget, commands
that it takes."""

import csv
import shlex
from dataclasses import replace

import pytest
import torch

import price_runs
import scale_model
from harness.ranks import Ranks
from store.contract import ConfigError
import train_gpt
from estimate_memory import count, kept_by, kept_bytes, memory, recurrent_bytes, saved_bytes
from price_runs import GPUS, run_cost
from scale_model import PRESETS, flops
from train_gpt import GPT, Config, State


def arguments(*argv):
    """Parsed arguments, blind to runs that this machine may have measured."""
    return scale_model.parse([*argv, "--results", "none.csv"])


def plan(budget, kind="dense", gpu="h100", *argv):
    return scale_model.plan_budget(arguments("--budget", str(budget), *argv), GPUS[gpu], kind)


def run(capsys, *argv):
    """(exit code, the table {row: [cells]}, the commands, standard error)."""
    code = scale_model.main([*argv, "--results", "none.csv"])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    table = {
        line[:21].strip(): [line[i : i + 27].strip() for i in range(21, len(line), 27)]
        for line in lines[:18]
    }
    return code, table, [line for line in lines if "torchrun" in line], err


def environment(command):
    words = shlex.split(command)
    assert words[words.index("torchrun") :][-1] == "train_gpt.py"
    return dict(word.split("=", 1) for word in words[: words.index("torchrun")])


def number(text):
    return int(text.replace(",", ""))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_planned_with_the_counts_of_the_real_model(capsys, name):
    code, table, (command,), err = run(capsys, "--preset", name)
    assert (code, err) == (0, "")
    cfg = Config.from_env(environment(command))
    with torch.device("meta"):
        model = GPT(cfg)
    assert number(table["params_total"][0]) == sum(p.numel() for p in model.parameters())
    assert number(table["flops_per_token"][0]) == model.flops_per_token()
    assert number(table["NUM_ITERATIONS"][0]) == cfg.num_iterations
    assert number(table["tokens"][0]) == cfg.num_iterations * cfg.batch_size * cfg.sequence_length


def test_published_counts():
    gpt2 = Config(vocab_size=50257, n_head=12, pos="learned", norm="layer", bias=False, ffn="gelu")
    assert (
        count(gpt2)["params_total"] == 124_337_664
    )  # nanoGPT's transformer_sizing.ipynb, context 1024
    assert count(Config())["params_total"] == 123_568_128
    large = Config.from_env({"PRESET": "moe_1.5b"})
    assert (
        count(large)["params_total"]
        == 1_477_780_480
        == 50304 * 1024 + 20 * (4 + 8 * 8) * 1024**2 + 20 * 8 * 1024 + 41 * 1024
    )
    assert count(large)["params_active"] == 471_147_520


def test_a_cost_by_hand(capsys):
    """gpt2_small: FLOPs a token, 5100 steps of 524,288 tokens, 445.05e12 FLOPs a second, $3.50 an
    hour."""
    total = (6 * 123_568_128 + 12 * 12 * 768 * 1024) * 5100 * 524_288
    assert flops(Config()) == total == 2_285_235_275_091_148_800
    assert run_cost(total, "h100") == pytest.approx((5134.783227, 4.992150), rel=1e-6)
    assert run_cost(total, "b200", mfu=0.5, gpus=8) == pytest.approx(
        (253.915031, 3.385534), rel=1e-6
    )
    _, table, _, _ = run(capsys, "--preset", "gpt2_small")
    assert (table["hours"], table["cost"]) == (["1.426"], ["$4.9922"])
    with pytest.raises(ConfigError, match="GPU v100: choose one of h100, h200, b200, a100"):
        run_cost(total, "v100")


@pytest.mark.parametrize("kind, gpu", [("dense", "h100"), ("moe", "b200")])
def test_more_money_never_buys_less_and_is_never_overspent(kind, gpu):
    last = (0, 0, 0)
    for budget in [0.02 * 2.6**i for i in range(18)]:
        found = plan(budget, kind, gpu)
        seconds, dollars = run_cost(flops(found.cfg), GPUS[gpu], found.mfu)
        assert dollars == found.dollars <= budget and seconds == found.seconds
        sizes = count(found.cfg)
        now = (sizes["params_active"], flops(found.cfg), found.cfg.num_iterations)
        assert all(a >= b for a, b in zip(now, last)), (budget, last, now)
        tokens = sizes["tokens_per_step"] * found.cfg.num_iterations
        assert 0 <= 20 * sizes["params_active"] - tokens < sizes["tokens_per_step"]
        assert found.cfg.warmdown_iters < found.cfg.num_iterations
        assert memory(found.cfg) <= 0.9e9 * GPUS[gpu].memory
        last = now
    assert found.limit == "memory" and plan(5, kind, gpu).limit == "budget"


@pytest.mark.parametrize("argv", [[], ["--experts", "12", "--top-k", "3"]], ids=str)
def test_every_rung_is_above_the_last(argv):
    for kind in ("dense", "moe"):
        rungs = [scale_model.rung(i, kind, arguments("--budget", "5", *argv)) for i in range(14)]
        for size in (lambda cfg: count(cfg)["params_active"], flops, memory):
            assert all(size(a) < size(b) for a, b in zip(rungs, rungs[1:]))


def test_what_a_budget_buys_of_a_preset(capsys):
    _, table, commands, _ = run(capsys, "--preset", "moe_1.5b", "--budget", "2.5", "--mfu", "0.3")
    assert (
        table["NUM_ITERATIONS"] == ["10,500", "5,257"]
        and table["limited by"][1] == "budget, 0.501 x its steps"
    )
    own, bought = sorted(
        (Config.from_env(environment(line)) for line in commands),
        key=lambda cfg: -cfg.num_iterations,
    )
    cost, step = (
        run_cost(flops(bought) / steps, "h100", 0.3)[1] for steps in (1, bought.num_iterations)
    )
    assert cost <= 2.5 < cost + step
    assert bought == scale_model.replace(
        own, num_iterations=5257, warmup_iters=262, warmdown_iters=725
    )


def test_the_head_of_the_large_preset_is_what_is_planned(capsys):
    _, table, _, _ = run(capsys, "--preset", "moe_1.5b", "--mfu", "0.3")
    head = " ".join(PRESETS["moe_1.5b"].read_text().split("\n")[:4])
    said = [table[row][0].split(" ")[0] for row in ("params_total", "params_active")]
    said += [f"{table['memory, estimate'][0].split(' of ')[0]} GiB"]
    assert all(figure in head for figure in said) and "$5 at $3.50 an hour" in head
    assert 4.9 < float(table["cost"][0].removeprefix("$")) <= 5


def test_the_vocabulary_of_a_preset(capsys):
    """That of its data is not known here: 257 or what is given."""
    for argv, size in (([], 257), (["--vocab-size", "65"], 65)):
        _, table, (command,), _ = run(capsys, "--preset", "quickstart", *argv)
        assert environment(command)["VOCAB_SIZE"] == str(size)
        assert number(table["params_total"][0]) == 192 * size + 4 * 12 * 192**2


def test_the_next_rung_is_out_of_reach():
    found = plan(5)
    index = next(
        i
        for i in range(99)
        if scale_model.rung(i, "dense", arguments("--budget", "5")).n_layer == found.cfg.n_layer
        and i // 4 + 1 == found.cfg.n_head
    )
    above = scale_model.rung(index + 1, "dense", arguments("--budget", "5"))
    assert run_cost(flops(above), "h100")[1] > 5


def test_a_budget_for_nothing_is_one_sentence(capsys):
    assert scale_model.main(["--budget", "0.001", "--compare", "--results", "none.csv"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert (
        "--budget 0.001: the smallest dense model costs $0.0120 on H100 and needs" in captured.err
    )
    assert run(capsys, "--preset", "moe_1.5b", "--budget", "1e-9")[1]["limited by"] == [
        "its own steps"
    ]
    assert scale_model.main(["--budget", "5", "--memory", "1", "--results", "none.csv"]) == 2
    assert "--memory 1: the smallest dense model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--budget", "0"],
        ["--budget", "nan"],
        ["--budget", "five"],
        [],
        ["--gpu", "v100"],
        ["--budget", "5", "--compare", "--price", "1"],
        ["--budget", "5", "--mfu", "45"],
        ["--budget", "5", "--compare", "--gpu", "a100"],
        ["--preset", "gpt5"],
        ["--budget", "5", "--gpus", "9"],
    ],
    ids=" ".join,
)
def test_wrong_arguments(capsys, argv):
    with pytest.raises(SystemExit) as exit:
        scale_model.main(argv)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    assert (
        captured.err.splitlines()[-1].startswith("scale_model.py: error: ")
        or "usage" in captured.err
    )


def test_settings_that_cannot_be_are_refused(capsys):
    assert scale_model.main(["--budget", "5", "--gpus", "3"]) == 2
    assert "BATCH_SIZE=512: must be a multiple of" in capsys.readouterr().err
    assert scale_model.main(["--budget", "5", "--top-k", "9"]) == 2
    assert capsys.readouterr().err == "scale_model.py: error: TOP_K=9 needs at most NUM_EXPERTS=8\n"


def test_compare_shows_both_side_by_side(capsys):
    code, table, commands, _ = run(capsys, "--budget", "5", "--compare")
    assert code == 0 and table[""] == ["H100 dense", "H100 moe", "B200 dense", "B200 moe"]
    assert table["GPUs"] == ["1 x $3.50/h"] * 2 + ["1 x $6.00/h"] * 2
    assert table["MFU"] == ["45.0% assumed", "30.0% assumed", "35.0% assumed", "30.0% assumed"]
    assert (
        table["peak, bfloat16"] == ["989 TFLOP/s"] * 2 + ["2250 TFLOP/s"] * 2 and len(commands) == 4
    )
    sizes = [count(Config.from_env(environment(command)))["params_active"] for command in commands]
    assert (
        sizes == sorted(sizes) and sizes[2] == sizes[3]
    )  # the largest is last, and of equals the cheaper
    assert environment(commands[3])["DEVICE_BATCH_SIZE"] == table["DEVICE_BATCH_SIZE"][2] == "256"
    assert run(capsys, "--budget", "5", "--gpu", "h200")[1]["price"] == ["assumed, set --price"] * 2


def test_another_gpu_changes_time_and_cost_alone(capsys):
    _, table, _, _ = run(capsys, "--preset", "gpt2_small", "--compare")
    other = {row for row, (h100, b200) in table.items() if h100 != b200}
    assert other == {"", "GPUs", "peak, bfloat16", "MFU", "hours", "cost", "memory, estimate"}
    assert float(table["hours"][0]) / float(table["hours"][1]) == pytest.approx(
        2250 * 0.35 / (989 * 0.45), rel=1e-3
    )
    same = [
        plan(5, "dense", gpu, "--mfu", "0.4") for gpu in ("h100", "h200")
    ]  # the same but for memory
    assert same[0].cfg.num_iterations == same[1].cfg.num_iterations


@pytest.mark.parametrize(
    "argv",
    [
        ["--budget", "5", "--compare"],
        ["--budget", "0.03", "--gpu", "a100"],
        ["--budget", "90", "--gpus", "8"],
        ["--budget", "4000", "--gpu", "b200"],
        ["--preset", "moe_muon_exp5", "--gpus", "8"],
        ["--preset", "quickstart"],
        ["--budget", "2", "--experts", "16", "--top-k", "1", "--vocab-size", "32768"],
    ],
    ids=" ".join,
)
def test_the_trainer_takes_the_commands(capsys, argv):
    """A dry run of each in this process says the counts that the table has."""
    _, table, commands, _ = run(capsys, *argv)
    told = []
    for command in commands:
        world = command.split("nproc_per_node=")[1].split()[0]
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        assert train_gpt.main([], environment(command) | ranks | {"DRY_RUN": "1"}) == 0
        out, err = capsys.readouterr()
        assert err == ""
        facts = dict(line.split(":", 1) for line in out.splitlines())
        told.append(
            [
                int(facts[name])
                for name in (
                    "params_total",
                    "params_active",
                    "flops_per_token",
                    "num_iterations",
                    "device_batch_size",
                )
            ]
        )
    rows = (
        "params_total",
        "params_active",
        "flops_per_token",
        "NUM_ITERATIONS",
        "DEVICE_BATCH_SIZE",
    )
    assert sorted(told) == sorted(
        [number(cell) for cell in column] for column in zip(*(table[row] for row in rows))
    )


def test_more_tokens_than_there_are(capsys):
    assert scale_model.main(["--budget", "4000", "--gpu", "b200", "--results", "none.csv"]) == 0
    out = capsys.readouterr().out
    cfg = plan(4000, "dense", "b200").cfg
    epochs = cfg.num_iterations * 2**19 / 10.3e9
    assert (
        epochs > 4
        and f"B200 dense: more than FineWeb-10B's 1.03e+10 tokens, {epochs:.1f} epochs" in out
    )
    assert cfg.max_epochs - 1 < epochs <= cfg.max_epochs and plan(5).cfg.max_epochs == 1


def test_measured_mfu_wins_over_assumed_and_given_over_both(tmp_path):
    path = tmp_path / "results.csv"
    rows = [
        ("ok", "NVIDIA H100 80GB HBM3", "relu2", mfu) for mfu in ("0.41", "0.5", "0.43", "", "0")
    ]
    rows += [
        ("crash", "NVIDIA H100 80GB HBM3", "relu2", "0.9"),
        ("ok", "NVIDIA H100 PCIe", "relu2", "0.9"),
        ("ok", "NVIDIA H100 80GB HBM3", "gelu,moe", "0.2"),
        ("ok", "NVIDIA GB200", "relu2", "0.9"),
        ("ok", "cpu: AMD EPYC", "relu2", ""),
    ]
    rows = [
        ("run_id", "status", "device_name", "ffn", "mfu"),
        *((i, *row) for i, row in enumerate(rows)),
    ]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    args = scale_model.parse(["--budget", "5", "--results", str(path)])
    assert price_runs.choose_mfu(args.results, GPUS["h100"], "dense", args.mfu) == (
        0.43,
        "measured, 3 runs",
    )
    assert price_runs.choose_mfu(args.results, GPUS["h100"], "moe", args.mfu) == (
        0.2,
        "measured, 1 run",
    )
    assert price_runs.choose_mfu(args.results, GPUS["b200"], "dense", args.mfu) == (
        0.35,
        "assumed",
    )
    args.mfu = 0.6
    assert price_runs.choose_mfu(args.results, GPUS["h100"], "dense", args.mfu) == (0.6, "given")


SMALL = dict(
    n_head=2,
    n_embd=128,
    sequence_length=128,
    vocab_size=512,
    batch_size=2,
    device_batch_size=2,
    val_tokens=1024,
    n_layer=3,
    device="cpu",
)
CHANGES = [
    {},
    {"ffn": "gelu", "qk_norm": False},
    {"ffn": "swiglu", "tie_embeddings": False},
    {"norm": "rms_gain"},
    {"norm": "layer", "pos": "learned", "bias": True},
    {"ffn": "moe"},
    {"recurrence": "shared", "ffn": "moe"},
    {"ffn": "moe", "expert": "swiglu", "top_k": 3},
    {"recurrence": "indexed", "optimizer": "adamw"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_memory_is_what_the_trainer_holds(change):
    """Weights, gradients and optimizers exactly; what a bfloat16 pass saves within 3 % (0.986 to
    0.997 of it seen)."""
    cfg = Config(**SMALL | change, dtype="bfloat16", compile="0")
    state, seen = State.build(cfg, Ranks()), {}
    own = {
        t.untyped_storage().data_ptr() for t in (*state.model.parameters(), *state.model.buffers())
    }

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = (
            tensor  # held, so that no other gets the address
        )
        return tensor

    tokens = torch.randint(512, (2, 129))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        state.model(tokens[:, :-1], tokens[:, 1:])
    saved = sum(
        tensor.untyped_storage().nbytes() for address, tensor in seen.items() if address not in own
    )
    assert saved_bytes(cfg) == pytest.approx(saved, rel=0.03)
    weights = sum(4 * p.numel() for p in state.model.parameters())
    moments = sum(
        tensor.nbytes
        for optimizer in state.optimizers
        for key, (tensor, _) in optimizer.tensors(
            {p: name for name, p in state.model.named_parameters()}
        ).items()
        if not key.endswith(".step")
    )
    assert kept_bytes(cfg) == 2 * weights + moments


def test_a_device_batch_fits_and_twice_as_much_does_not():
    cfg = plan(5).cfg
    twice = scale_model.replace(cfg, device_batch_size=2 * cfg.device_batch_size)
    assert memory(cfg) <= 0.9 * 80e9 < memory(twice)
    assert memory(cfg, gpus=8) < memory(cfg)
    assert (
        scale_model.make_plans(arguments("--budget", "5", "--memory", "40"))[0][
            0
        ].cfg.device_batch_size
        == 64
    )


def test_a_loop_over_time_is_told(capsys):
    """By what the mixer says of itself; memory is by what it keeps."""
    assert scale_model.main(["--preset", "rnn_50m"]) == 0
    out = capsys.readouterr().out
    assert out.count("MIXER=gru_rwkv goes through a sequence token by token") == 1
    assert scale_model.main(["--preset", "gpt2_small"]) == 0
    assert "token by token" not in capsys.readouterr().out


def test_recurrent_mixers_keep_more_than_attention_and_as_much_a_token_at_any_length():
    cfg = Config(n_layer=2, device_batch_size=4)
    kept = {name: saved_bytes(replace(cfg, mixer=name)) for name in train_gpt.MIXERS}
    assert kept["attention"] < kept["rwkv"] < kept["gru_rwkv"]
    both = saved_bytes(replace(cfg, mixer="attention,rwkv"))
    assert both == pytest.approx((kept["attention"] + kept["rwkv"]) / 2, rel=0.01)
    half = saved_bytes(replace(cfg, mixer="rwkv", sequence_length=512, device_batch_size=8))
    assert half == pytest.approx(kept["rwkv"], rel=0.01)
    layer = train_gpt.RWKV(replace(cfg, mixer="rwkv")).to("meta")
    a_token = recurrent_bytes(replace(cfg, mixer="rwkv"))[0]
    long = kept_by(layer, 8192, cfg.n_embd) - kept_by(layer, 4096, cfg.n_embd)
    assert long / 4096 == pytest.approx(a_token, rel=0.01)


def test_carried_states_take_memory():
    cfg = Config(mixer="rwkv", n_layer=2, max_epochs=0)
    carried = kept_bytes(replace(cfg, carry_state=True)) - kept_bytes(cfg)
    heads = 512 * 2 * 6 * 128 * 128 * 4  # sequences, layers, heads, their states
    assert heads < carried < 1.05 * heads
    assert kept_bytes(replace(cfg, carry_state=True), 8) < kept_bytes(cfg, 8) + carried / 7
