"""The search for what fits, on numbers and on a real model under an artificial limit."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig

from kvp.bench.limits import find_batch, find_context, largest, predicted_batch, predicted_context
from kvp.bench.models import Subject

MIB = 2**20


@pytest.mark.parametrize("rest", [0, 3, 25, 90, 1000])
@pytest.mark.parametrize("slope", [10, 13])
def test_search_finds_the_largest(rest, slope):
    """Needs that rise faster than the cache alone, and a rest that bytes do not predict."""
    tried = []

    def need(number):
        tried.append(number)
        return slope * number + rest

    expected = max(0, (1000 - rest) // slope)
    assert largest(need, 100, 1000, unit=10) == min(expected, 100)
    assert len(tried) == len(set(tried)) <= 12


def test_search_after_running_out_of_memory():
    assert largest(lambda n: math.inf if n > 37 else n, 100, 1000, unit=1) == 37
    assert largest(lambda n: math.inf, 100, 1000, unit=1) == 0
    assert largest(lambda n: 1 / 0, 0, 1000, unit=1) == 0  # nothing can fit: nothing is tried


@pytest.fixture(scope="module")
def subject():
    """A cache of 32 KiB per token, far above all else that a step takes."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        dtype="float32",
    )
    return Subject(name="wide", config=config)


def test_search_finds_the_predicted_batch(subject):
    model = subject.load(device=torch.device("cpu"), dtype=torch.float32, seed=0)
    per_token = 8 * 8 * (64 + 64) * 4
    assert subject.cache_bytes_per_token(torch.float32) == per_token == 32 * 1024
    limit = subject.weights_bytes(torch.float32) + int(5.5 * 1024 * per_token)
    found = find_batch(subject, model, prompt_length=16, new_tokens=1008, limit=limit)
    assert found == {"found": 5, "predicted": 5}
    context = find_context(subject, model, limit=limit)
    assert context["predicted"] == int(5.5 * 1024) and context["positions"] == 8192
    assert 0.8 * context["predicted"] < context["found"] <= context["predicted"]
    assert context["found"] % 16 == 0


def test_predictions_come_in_blocks_and_stop_at_the_positions(subject):
    limit = subject.weights_bytes(torch.float32) + 100 * 32 * 1024
    options = {"limit": limit, "dtype": torch.float32}
    assert predicted_batch(subject, length=10, **options) == 6  # 16 tokens each
    assert predicted_context(subject, **options) == 96
    assert predicted_context(subject, limit=2**40, dtype=torch.float32) == 8192
    assert predicted_batch(subject, length=10, limit=5, dtype=torch.float32) == 0
