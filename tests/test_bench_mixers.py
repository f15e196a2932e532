"""scripts/bench_mixers.py: its loops are the same functions, its figures are those of its runs."""

import csv
import re

import pytest
import torch
from test_model import trained_a_little

import bench_mixers
from train_gpt import MIXERS, Config


def test_a_loop_written_by_hand_is_the_model():
    """GRU, RWKV and experts token by token, from the model's weights: loss and gradients."""
    for preset in ("rnn_char", "rnn_medium"):
        cfg = Config.from_env({"PRESET": preset, "VOCAB_SIZE": "28", "N_EMBD": "32", "N_HEAD": "4"})
        model = trained_a_little(cfg)
        tokens = torch.randint(28, (3, 26), generator=torch.Generator().manual_seed(0))
        x, y = tokens[:, :-1], tokens[:, 1:]
        ours, plain = model(x, y)[0], bench_mixers.plain_loss(model, x, y)
        assert torch.allclose(ours, plain, atol=1e-5)
        params = dict(model.named_parameters())
        grads = [torch.autograd.grad(loss, params.values()) for loss in (ours, plain)]
        for name, a, b in zip(params, *grads):
            assert torch.allclose(a, b, atol=1e-5 + 1e-4 * b.abs().max()), name


def test_it_prints_what_it_times(capsys, group, monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    assert bench_mixers.main(["--only", "text", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"trainer [\d.]+ \([\d.]+ to [\d.]+\) times as fast", out)
    assert re.search(r"trainer [\d,]+ characters/s, plain loop [\d,]+ characters/s", out)


def test_generation_of_every_mixer_and_of_a_stage(capsys, tmp_path):
    file = tmp_path / "generation.csv"
    argv = ["--only", "generation", "--tokens", "100", "--csv", str(file)]
    assert bench_mixers.main(argv) == 0
    rows = list(csv.DictReader(file.open()))
    assert [row["variant"] for row in rows] == list(MIXERS)
    assert all(float(row["ms_after_100"]) > 0 and not row["ms_after_1000"] for row in rows)
    sizes = {row["variant"]: float(row["state_kib"]) for row in rows}
    assert sizes["attention"] == pytest.approx(4 * 2 * 1024 * 128 * 4 / 1024, rel=1e-3)
    assert sizes["gru"] == pytest.approx(4 * 128 * 4 / 1024, rel=0.01)
    assert bench_mixers.main([*argv, "--stage", "smoke"]) == 0
    assert len(list(csv.DictReader(file.open()))) >= 2


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--only", "speed"], "'speed': choose some of recurrences,generation,text"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--tokens", "99"], "--tokens at least 100"),
        (["--stage", "nowhere"], "nowhere"),
        (["--csv", "nowhere/x.csv"], "needs the folder nowhere"),
        (["--csv", "x.csv", "--only", "text"], "generation in --only"),
    ],
)
def test_mistakes(capsys, argv, words):
    with pytest.raises(SystemExit) as stopped:
        bench_mixers.main(argv)
    assert stopped.value.code == 2 and words in capsys.readouterr().err
