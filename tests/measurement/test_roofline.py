"""The bytes of a step from shapes are those of the real tensors."""

from __future__ import annotations

import pytest
import torch

from kvp.measurement.count import cache_bytes
from kvp.measurement.paths import Eager
from kvp.measurement.roofline import COPIED, copy_bandwidth, step_bytes
from kvp.models.spaces import available_kinds
from kvp.models.surgery import apply
from tests.conftest import random_plan, tiny_model

BATCH, PROMPT = 2, 9


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
def test_roofline_bytes_are_those_of_the_tensors(family, tied, pruned):
    model = tiny_model(family, dtype=torch.float64, tie_word_embeddings=tied)
    if pruned:
        model = apply(
            model, random_plan(model, [kind for kind in available_kinds(model.config) if kind != "block"])
        )
    decoder = Eager(model)
    with torch.inference_mode():
        decoder.read(torch.ones(BATCH, PROMPT, dtype=torch.long))
        decoder.step()
    moved = step_bytes(model.config, batch_size=BATCH, tokens=PROMPT + 1, dtype=torch.float64)
    assert moved.cache_bytes == cache_bytes(decoder.cache)
    weights = {  # two of four experts work for a token
        id(p): p.nbytes // (2 if ".experts." in name else 1) for name, p in model.named_parameters()
    }
    if not tied:  # the table is looked up, not read
        table = model.model.embed_tokens.weight
        weights[id(table)] = table[:BATCH].nbytes
    assert moved.weights_bytes == sum(weights.values())
    assert moved.total == moved.weights_bytes + moved.cache_bytes


def test_a_batch_beyond_the_vocabulary_reads_the_table_once():
    model = tiny_model()
    every = step_bytes(model.config, batch_size=96, tokens=1, dtype=torch.float32)
    assert every.weights_bytes == sum(p.nbytes for p in model.parameters())
    more = step_bytes(model.config, batch_size=500, tokens=1, dtype=torch.float32)
    assert more.weights_bytes == every.weights_bytes


def test_bandwidth_counts_reading_and_writing(monkeypatch):
    monkeypatch.setitem(COPIED, "cpu", 2**24)
    assert 1e8 < copy_bandwidth(torch.device("cpu")) < 1e13
