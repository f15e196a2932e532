"""Presets of experts, recurrent depth and recurrent networks: exact sizes, small siblings."""

import dataclasses

import pytest

from harness.ranks import Ranks
from train_gpt import Config, make_plan

COUNTS = {  # preset: (parameters, those that a token uses)
    "recurrent_shared_moe": (276_115_456, 116_615_168),
    "recurrent_shared_moe_auxsched": (276_115_456, 116_615_168),
    "recurrent_shared_moe_half": (137_050_112, 57_261_056),
    "recurrent_shared_moe_midsize": (206_320_640, 86_675_968),
    "recurrent_shared_moe_half_aux003": (137_050_112, 57_261_056),
    "moe_muon_exp5": (79_502_208, 37_034_880),
    "moe_1.5b": (1_477_780_480, 471_147_520),
    "dense_300m": (304_438_272, 304_438_272),
    "dense_300m_indexed": (304_438_272, 304_438_272),
    "recurrent_shared_moe_smoke": (677_376, 281_856),
    "recurrent_shared_moe_auxsched_smoke": (677_376, 281_856),
    "dense_300m_indexed_smoke": (842_624, 842_624),
    "moe_muon_exp5_smoke": (1_133_184, 346_752),
    # without embedding and head, which have a row for each character of the text
    "rnn_char": (36_640, 24_352),
    "rnn_medium": (1_142_912, 995_456),
}

SIBLINGS = {  # preset: (its small sibling, what else is different)
    "recurrent_shared_moe": ("recurrent_shared_moe_smoke", {}),
    "recurrent_shared_moe_auxsched": ("recurrent_shared_moe_auxsched_smoke", {}),
    "recurrent_shared_moe_half": ("recurrent_shared_moe_auxsched_smoke", {}),
    "recurrent_shared_moe_half_aux003": (
        "recurrent_shared_moe_auxsched_smoke",
        {"aux_loss_coef_start"},
    ),
    "recurrent_shared_moe_midsize": ("recurrent_shared_moe_auxsched_smoke", {}),
    "dense_300m_indexed": ("dense_300m_indexed_smoke", {}),
    "dense_300m": ("dense_300m_indexed_smoke", {"recurrence"}),
    "moe_muon_exp5": ("moe_muon_exp5_smoke", {}),
    "moe_1.5b": ("moe_muon_exp5_smoke", {}),
}
SIZES = """
    preset input_bin input_val_bin vocab_size n_layer n_head n_embd d_ff num_experts sequence_length
    batch_size device_batch_size num_iterations warmup_iters lr val_every val_tokens
    max_train_tokens dtype balance_log_interval shuffle shard_tail
""".split()


@pytest.mark.parametrize("preset", COUNTS)
def test_sizes(preset):
    plan = make_plan(Config.from_env({"PRESET": preset}), Ranks())
    assert (plan["params_total"], plan["params_active"]) == COUNTS[preset]


def test_midsize_by_hand():
    C, V, T, E, F = 768, 50257, 1024, 40, 2048
    block = (
        4 * C * C + 4 * C + 2 * 2 * C + E * C + E * (2 * C * F + F + C)
    )  # attention, norms, router, experts
    assert 2 * V * C + T * C + block + 2 * C == COUNTS["recurrent_shared_moe_midsize"][0]


@pytest.mark.parametrize(
    "preset, C, layers, top_k, F, rank",
    [("rnn_char", 32, 1, 1, 64, 4), ("rnn_medium", 128, 3, 2, 128, 8)],
)
def test_recurrent_presets_by_hand(preset, C, layers, top_k, F, rank):
    """F hidden units of each expert, `rank` of the part of the decay that depends on the token."""
    V, E = 28, 3
    gru = 3 * C * C + 3 * C + 3 * C * C + C * C  # gates and biases, recurrent, projection
    rwkv = 4 * C + C + C + 2 * rank * C + 3 * C * C + 2 * C + C * C
    expert = 3 * C * F
    block = gru + rwkv + E * C + (E + 1) * expert + 2 * C  # router, one expert for all, norms
    total = layers * block + C
    assert COUNTS[preset] == (total, total - layers * (E - top_k) * expert)
    plan = make_plan(Config.from_env({"PRESET": preset, "VOCAB_SIZE": str(V)}), Ranks())
    assert plan["params_total"] == total + 2 * V * C, "the head has a matrix of its own"


@pytest.mark.parametrize("preset", SIBLINGS)
def test_the_small_sibling_is_of_the_same_kind(preset):
    name, other = SIBLINGS[preset]
    big, small = (dataclasses.asdict(Config.from_env({"PRESET": each})) for each in (preset, name))
    assert {key for key in big if big[key] != small[key]} - {*SIZES} == set(other)
    assert (
        small["shuffle"]
        and small["num_iterations"] == 50
        and small["n_layer"] == 4
        and small["dtype"] == "auto"
    )
    plans = [make_plan(Config.from_env({"PRESET": each}), Ranks()) for each in (preset, name)]
    assert plans[0]["grad_accumulation"] > 1 and plans[1]["grad_accumulation"] > 1


def test_the_schedules_are_those_of_their_source():
    read = {preset: Config.from_env({"PRESET": preset}) for preset in COUNTS}
    assert {
        preset: (cfg.aux_loss_coef_start, cfg.aux_loss_coef_end)
        for preset, cfg in read.items()
        if cfg.aux_loss_coef_start is not None and "smoke" not in preset
    } == {
        "recurrent_shared_moe_auxsched": (0.05, 0.01),
        "recurrent_shared_moe_half": (0.05, 0.01),
        "recurrent_shared_moe_half_aux003": (0.03, 0.01),
        "recurrent_shared_moe_midsize": (0.05, 0.01),
    }
    for preset in ("half", "half_aux003", "midsize"):
        cfg = read[f"recurrent_shared_moe_{preset}"]
        assert (cfg.num_iterations, cfg.val_every) == (2000, 500)
