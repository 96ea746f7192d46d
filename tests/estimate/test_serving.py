"""Bytes of weights and cache equal those of real models, dense and pruned; limits follow from them."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from kvp.estimate.passes import weights_bytes
from kvp.estimate.serving import (
    CACHES,
    largest_batch,
    longest_context,
    measured_bytes,
    serving_bytes,
    token_bytes,
)
from kvp.measurement.count import cache_bytes
from kvp.models.surgery import apply
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.methods.kvpruner import KVPruner
from kvp.strategies.shape import expected_shape
from kvp.strategies.target import Target
from kvp.types import Budget

CACHE = {cache.name: cache for cache in CACHES}
METHOD = KVPruner(allocator=Uniform(), importance="random")


def model_of(groups):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=groups,
        head_dim=64,
        tie_word_embeddings=groups == 1,
    )
    return LlamaForCausalLM(config).bfloat16().eval()


@pytest.mark.parametrize("groups", [1, 2, 6], ids=["mqa", "gqa", "mha"])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5])
def test_bytes_are_those_of_the_real_model(groups, ratio):
    model = model_of(groups)
    config = model.config
    if ratio:
        budget = Budget(value=ratio, of="kv_cache")
        scores = METHOD.score(Target(model, None, 1, 0))
        model = apply(model, METHOD.plan(config, scores, budget, torch.zeros(3)))
        config = expected_shape(METHOD, config, budget)
    assert weights_bytes(config, 2) == sum(parameter.nbytes for parameter in model.parameters())
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(100, (2, 32)), past_key_values=cache, use_cache=True)
    found = serving_bytes(config, batch_size=2, context=32, width=2, cache=CACHE["16-bit"], device="cpu")
    assert found["cache"] == cache_bytes(cache)
    assert found["total"] == found["weights"] + found["cache"] + found["activations"]


def test_scales_are_counted_per_32_numbers_begun():
    assert [CACHE[name].row_bytes(128) for name in ("16-bit", "fp8", "q8_0", "q4_0")] == [256, 128, 136, 72]
    assert CACHE["q4_0"].row_bytes(48) == 2 * 18
    config = model_of(2).config
    assert token_bytes(config, CACHE["16-bit"]) == 3 * 2 * 2 * 64 * 2
    assert token_bytes(config, CACHE["q8_0"]) == 3 * 2 * 136


def test_limits_come_in_whole_sequences_and_blocks():
    assert largest_batch(1000, length=17, per_token=10) == 3  # 32 tokens of room each
    assert largest_batch(-5, length=17, per_token=10) == 0
    assert longest_context(1000, per_token=10, positions=64) == 64
    assert longest_context(999, per_token=10, positions=8192) == 96


def test_reading_a_long_prompt_takes_more_than_decoding_after_it():
    config = model_of(2).config
    short, long = (
        measured_bytes(config, batch_size=4, prompt_length=length, new_tokens=8, width=2)
        for length in (16, 512)
    )
    assert short["weights"] == long["weights"]
    assert long["cache"] == 4 * 520 * token_bytes(config, CACHE["16-bit"])
    assert long["activations"] > 20 * short["activations"]
