"""A small checkpoint and text to recover with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvp.data.corpora import FileCorpus
from tests.helpers.recovery import (
    TEXT,
    save_checkpoint,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, FileCorpus]:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return {"text": FileCorpus(path=str(path))}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("pruned"))
