"""Configs of published models, and the parameters that a plan leaves of them."""

from __future__ import annotations

from transformers import LlamaConfig

from kvp.models.shapes import cut, layer_shapes, size

LLAMA_7B = LlamaConfig()

LLAMA3_8B = LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)

TINYLLAMA = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
)


def params(config, plan):
    return size(config, cut(layer_shapes(config), plan)).params
