"""SECURITY.md: each promise names tests that exist; data that hold code are refused and not executed."""

from __future__ import annotations

import ast
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

from kvp.data.corpora import FileCorpus
from kvp.models.load import load_model
from kvp.recovery.journal import Journal
from kvp.recovery.training import train
from tests.helpers.recovery import TEXT, make, save_checkpoint
from tests.process import ROOT

NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())


class Code:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_every_promise_has_its_test():
    promises = (ROOT / "SECURITY.md").read_text().partition("## Promised")[2].partition("##")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10 and all("`tests/" in row for row in rows)
    for file, name in NAMED:
        functions = [
            node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")
        ]
        assert name in functions, f"{file} has no {name}"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_checkpoint_of_pickles_is_refused_and_not_executed(tmp_path, name):
    directory, mark = save_checkpoint(tmp_path / "model"), tmp_path / "executed"
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps({"lm_head.weight": Code(mark)}))
    with pytest.raises((OSError, ValueError)):
        load_model(directory, dtype=torch.float32, device="cpu")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_an_unfinished_training_is_refused_and_not_executed(tmp_path, monkeypatch, name):
    (tmp_path / "text.txt").write_text(TEXT)
    corpora, checkpoint = (
        {"text": FileCorpus(path=str(tmp_path / "text.txt"))},
        save_checkpoint(tmp_path / "model"),
    )
    directory, mark = tmp_path / "work", tmp_path / "executed"
    directory.mkdir()

    def go() -> None:
        recipe = make(max_steps=2, save_steps=1)
        train(recipe, checkpoint, directory, corpora=corpora, seed=0, device="cpu")

    def kill(*args, **kwargs) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Journal, "on_train_end", kill)
        with pytest.raises(KeyboardInterrupt):
            go()
    newest = max(directory.glob("trainer/checkpoint-*"))
    (newest / name).write_bytes(pickle.dumps(Code(mark)))
    with pytest.raises(
        RuntimeError, match=rf"{newest.name} is damaged, or no checkpoint .* delete {directory}"
    ):
        go()
    assert not mark.exists()
