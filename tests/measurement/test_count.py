"""Counts from shapes against hand formulas and torch's counter; bytes of real caches."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig

from kvp.measurement.count import cache_bytes, cache_bytes_per_token, macs
from kvp.models.shapes import layer_shapes
from kvp.models.surgery import apply
from kvp.types import LayerShape
from tests.conftest import random_plan, tiny_config, tiny_model

FLOPS_PER_MAC = 2
KINDS = ["attention", "mlp", "kv_group", "qk", "vo", "ffn"]


def pruned_model():
    model = tiny_model()
    return apply(model, random_plan(model, KINDS))


def filled_cache(model, batch, length):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(batch, length, dtype=torch.long), past_key_values=cache)
    return cache


def test_macs_by_hand():
    config = tiny_config()  # hidden 48, vocabulary 96
    layer = LayerShape(
        num_attention_heads=6, num_key_value_heads=2, qk_head_dim=4, v_head_dim=8, intermediate_size=10
    )
    projections = 48 * 24 + 48 * 8 + 48 * 16 + 48 * 48  # q, k, v, o
    attention = 6 * (4 + 8) * 5 * 5
    ffn = 3 * 48 * 10
    assert macs(config, [layer], prompt_length=5) == 5 * (projections + ffn + 48 * 96) + attention


def test_removed_sublayers_cost_nothing():
    gone = LayerShape(
        num_attention_heads=0, num_key_value_heads=0, qk_head_dim=8, v_head_dim=8, intermediate_size=0
    )
    assert macs(tiny_config(), [gone], prompt_length=7) == 7 * 48 * 96


@pytest.mark.parametrize("length", [1, 13])
@pytest.mark.parametrize(
    "build", [lambda: tiny_model(heads="mha"), tiny_model, pruned_model], ids=["mha", "gqa", "pruned"]
)
def test_macs_as_torch_counts_them(build, length):
    model = build()
    model.set_attn_implementation("eager")
    tokens = torch.ones(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    assert counter.get_total_flops() == FLOPS_PER_MAC * macs(
        model.config, layer_shapes(model.config), prompt_length=length
    )


def test_macs_of_llama_7b_as_published():
    """LLM-Pruner (arXiv:2305.11627) gives 424.02G at 64 tokens; ptflops adds 0.02 % of norms and rotations."""
    config = LlamaConfig(intermediate_size=11008)  # the other defaults are LLaMA-7B's
    assert macs(config, layer_shapes(config), prompt_length=64) / 1e9 == pytest.approx(424.02, rel=5e-4)


def test_cache_bytes_of_a_dense_model():
    model = tiny_model(dtype=torch.bfloat16)  # 3 layers, 2 groups, keys and values of width 8
    per_token = 3 * 2 * (8 + 8) * 2
    assert cache_bytes_per_token(filled_cache(model, 2, 5)) == per_token
    assert cache_bytes(filled_cache(model, 2, 5)) == 2 * 5 * per_token


def test_cache_bytes_of_unequal_layers_one_without_attention():
    model = pruned_model()
    widths = [layer.kv_width for layer in layer_shapes(model.config)]
    assert 0 in widths and len(set(widths)) > 2
    cache = filled_cache(model, 2, 5)
    assert cache_bytes_per_token(cache) == 4 * sum(widths)
    assert cache_bytes(cache) == 2 * 5 * 4 * sum(widths)


def test_a_sliding_window_holds_less_than_its_tokens():
    model = tiny_model("mistral", sliding_window=4)
    cache = filled_cache(model, 1, 20)
    per_token = 3 * 2 * (8 + 8) * 4
    assert cache_bytes_per_token(cache) == per_token
    assert cache_bytes(cache) < 20 * per_token


def test_an_unused_cache_is_empty():
    assert cache_bytes(DynamicCache(config=tiny_config())) == 0
