"""What a model costs, counted rather than timed: multiply-accumulates from shapes, bytes of a real cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import Cache

from kvp.types import LayerShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def macs(config: PretrainedConfig, shapes: Sequence[LayerShape], *, prompt_length: int) -> int:
    """Multiply-accumulates of one forward pass over a prompt, batch 1, logits at every position.

    Matrix products only: projections, QK^T, AV, FFN, lm_head. As the field's counters (ptflops in
    LLM-Pruner, arXiv:2305.11627; torch's FlopCounterMode, which reports 2 FLOPs each) do, causal
    attention counts in full, L * L per head, and norms, rotations and the softmax count nothing.
    """
    per_token = config.vocab_size * config.hidden_size + sum(
        _layer_weights(config, layer) for layer in shapes
    )
    per_pair = sum(layer.num_attention_heads * (layer.qk_head_dim + layer.v_head_dim) for layer in shapes)
    return prompt_length * (per_token + prompt_length * per_pair)


def _layer_weights(config: PretrainedConfig, layer: LayerShape) -> int:
    """Entries of a layer's matrices: q, k, v, o, and the gate, up and down of the FFN."""
    query_and_output = layer.num_attention_heads * (layer.qk_head_dim + layer.v_head_dim)
    return config.hidden_size * (query_and_output + layer.kv_width + 3 * layer.intermediate_size)


def cache_bytes(cache: Cache) -> int:
    """Bytes of keys and values that `cache` holds now, for the whole batch."""
    return sum(keys.nbytes + values.nbytes for keys, values in _filled(cache))


def cache_bytes_per_token(cache: Cache) -> int:
    """Bytes of keys and values per token of one sequence, over all layers: exact, as stored.

    A sliding window layer counts what a token costs while it is inside the window.
    """
    return sum(
        (keys.nbytes + values.nbytes) // (keys.shape[0] * keys.shape[-2]) for keys, values in _filled(cache)
    )


def _filled(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys (batch, groups, tokens, qk_head_dim) and values of the layers that were written.

    A decoder layer without attention leaves a cache layer behind that was not.
    """
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers if layer.is_initialized]
