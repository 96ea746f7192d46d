"""Training in two CPU processes: the record of one, and nobody left behind."""

from __future__ import annotations

import json
import time

import pytest
import torch

from kvp.data.text import PackedText
from kvp.recovery.journal import newest_checkpoint
from tests.helpers.recovery import adapter, make, recover, train_until_killed

STEPS = 60  # less than an epoch
DATA = PackedText(corpora=["text"], length=4)


def rows(directory):
    return [json.loads(line) for line in (directory / "losses.jsonl").open()]


@pytest.mark.slow
def test_two_processes_train_as_one_does_even_when_killed(checkpoint, corpora, tmp_path):
    killed, losses = tmp_path / "killed", tmp_path / "killed" / "losses.jsonl"
    train_until_killed(checkpoint, killed, corpora, num_processes=2, dropout=0.0, data=DATA)
    time.sleep(0.5)
    lines = losses.read_text()
    assert newest_checkpoint(killed / "trainer")
    time.sleep(1)
    assert losses.read_text() == lines  # its processes died with it

    result = recover(
        make(max_steps=STEPS, dropout=0.0, data=DATA, num_processes=2), checkpoint, killed, corpora, seed=3
    )
    alone = recover(
        make(max_steps=STEPS, dropout=0.0, data=DATA), checkpoint, tmp_path / "alone", corpora, seed=3
    )
    assert result["num_processes"] == 2
    assert alone["num_processes"] == 1
    assert {key: result[key] for key in ("steps", "epochs", "tokens_seen", "trainable_params")} == {
        key: alone[key] for key in ("steps", "epochs", "tokens_seen", "trainable_params")
    }
    assert [row["step"] for row in rows(killed)] == list(range(1, STEPS + 1))
    for one, other in zip(rows(killed), rows(tmp_path / "alone"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-3)
    found, expected = adapter(killed), adapter(tmp_path / "alone")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-2, rtol=1e-2)


@pytest.mark.slow
def test_a_process_that_fails_is_heard(checkpoint, corpora, tmp_path):
    with pytest.raises(RuntimeError, match=r"lower recovery.learning_rate"):
        recover(make(max_steps=4, num_processes=2, learning_rate=1e30), checkpoint, tmp_path / "x", corpora)


def test_batches_must_divide():
    message = r"multiple of recovery.micro_batch_size \* recovery.num_processes, got 4, 2 and 3"
    with pytest.raises(ValueError, match=message):
        make(num_processes=3)
