"""What is damaged at random ends in a sentence: a small share of scripts/fuzz.py's cases."""

import random

import pytest

import fuzz
import train_gpt


@pytest.mark.parametrize("kind, count", [("settings", 100), ("shards", 100), ("tables", 100)])
def test_what_is_damaged_at_random_ends_in_a_sentence(kind, count):
    assert list(fuzz.findings(kind, fuzz.CASES[kind], count, seed=0)) == []


def test_the_cases_can_fail(tmp_path, monkeypatch):
    """Without the comparison of hashes, changed data are found to train."""
    monkeypatch.setattr("harness.provenance.check_hash", lambda file, found: None)
    assert any(
        "trained although changed" in found
        for found in fuzz.findings("shards", fuzz.shards_case, 30, seed=0)
    )
    monkeypatch.setattr(train_gpt, "check_batch", lambda cfg, ranks: 1 / 0)
    fuzz.write_shards(tmp_path)
    assert any(fuzz.settings_case(tmp_path, random.Random(n)) for n in range(20))
