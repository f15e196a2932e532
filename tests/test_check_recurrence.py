"""scripts/check_recurrence.py: the two models are one, and a defect of any kind is named."""

import pytest
import torch.distributed as dist

import check_recurrence
import train_gpt
from train_gpt import GPT

TINY = {
    "COMPILE": "0",
    "DEVICE": "cpu",
    "N_LAYER": "3",
    "N_HEAD": "2",
    "N_EMBD": "32",
    "VOCAB_SIZE": "64",
    "SEQUENCE_LENGTH": "16",
    "DEVICE_BATCH_SIZE": "2",
}


@pytest.fixture(autouse=True)
def no_group_left():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_dense_and_a_sparse_model_pass(capsys):
    assert check_recurrence.main([], {"COMPILE": "0", "DEVICE": "cpu"}) == 0
    captured = capsys.readouterr()
    head, *rows = captured.out.splitlines()
    assert [row.split(",")[0] for row in rows] == ["dense", "moe"] and captured.err == ""
    assert head.split() == [
        "init_diff",
        "max_abs_diff_logits",
        "grad_cosine",
        "grad_rel_diff",
        "diff_after_10",
    ]
    for row in rows:
        init, logits, cosine, grad, later = map(float, row.split()[2:])
        assert init == 0 and logits < 1e-6
        assert cosine == pytest.approx(1) and grad < 1e-5 and later < 1e-5


def test_both_ways_of_running_have_a_row(capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        train_gpt, "compile_model", lambda model, cfg, device: compiled.append(len(model.blocks))
    )
    both = {"COMPILE": "", "FFN": "relu2,moe", "N_LAYER": "4", "DROPOUT": "0.5"}
    assert check_recurrence.main([], TINY | both) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "COMPILE=0",
        "COMPILE=1",
    ]
    assert compiled == [4, 2]


def slices(change):
    """GPT.visits with banks whose slices are those that change(unbound) gives."""

    def visits(model):
        seen = dict.fromkeys(model.order, -1)
        for i in model.order:
            seen[i] += 1
            own = {
                name: change(tensor.unbind(0))[seen[i]]
                for name, tensor in model.blocks[i].state_dict(keep_vars=True).items()
                if name in model.banked
            }
            yield model.blocks[i], own

    return visits


@pytest.mark.parametrize(
    "change, figures",
    [
        (lambda parts: parts, []),
        (lambda parts: [parts[0]] * len(parts), ["max_abs_diff_logits", "grad_cosine"]),
        (lambda parts: parts[::-1], ["max_abs_diff_logits", "grad_cosine"]),
        (lambda parts: [*parts[:-1], parts[-1].detach()], ["grad_cosine"]),
        (lambda parts: [part * (1 + 1e-3) for part in parts], ["max_abs_diff_logits"]),
        (
            lambda parts: [part * float("nan") for part in parts],
            ["max_abs_diff_logits", "grad_cosine"],
        ),
    ],
    ids=[
        "none",
        "the first for all",
        "reversed",
        "one without gradient",
        "a little larger",
        "no numbers",
    ],
)
def test_a_defect_of_the_banks_is_named(capsys, monkeypatch, change, figures):
    monkeypatch.setattr(GPT, "visits", slices(change))
    assert check_recurrence.main([], TINY) == bool(figures)
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == figures


def test_another_initialisation_is_named(capsys, monkeypatch):
    init = train_gpt.LearnedPosition.__init__

    def another(self, cfg):
        init(self, cfg)
        self.weight.data.add_(1e-6 * (cfg.recurrence == "indexed"))

    monkeypatch.setattr(train_gpt.LearnedPosition, "__init__", another)
    assert check_recurrence.main([], TINY | {"POS": "learned"}) == 1
    error = capsys.readouterr().err
    assert error.startswith("settings, COMPILE=0: init_diff is ") and error.endswith(
        ", must be 0\n"
    )


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"RECURRENCE": "shared"},
            "config: RECURRENCE=shared: has fewer weights than a stack; set stacked or indexed",
        ),
        ({"N_EMBD": "33"}, "config: N_HEAD=2 needs N_EMBD=33 to be a multiple of 4"),
        ({"LEARNING_RATE": "1"}, "config: LEARNING_RATE is no setting"),
    ],
)
def test_wrong_settings_are_refused(capsys, change, sentence):
    assert check_recurrence.main([], TINY | change) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(sentence) and captured.out == ""
