"""Counts of what a model costs: multiply-accumulates from shapes, bytes of a real cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import Cache

from kvp.models.shapes import active_width, projections, stream
from kvp.models.sparse_cache import SparseLayer
from kvp.types import LayerShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def macs(config: PretrainedConfig, shapes: Sequence[LayerShape], *, prompt_length: int) -> int:
    """Return multiply-accumulates of one forward pass over a prompt, batch 1, logits at every position.

    Matrix products only: projections, QK^T, AV, FFN, lm_head. As the field's counters (ptflops in
    LLM-Pruner, arXiv:2305.11627; torch's FlopCounterMode, which reports 2 FLOPs each) do, causal
    attention counts in full, L * L per head, and norms, rotations and the softmax count nothing.
    """
    per_token = config.vocab_size * config.hidden_size + sum(
        _layer_weights(config, layer) for layer in shapes
    )
    if shapes[0].stream and config.tie_word_embeddings:
        per_token += config.hidden_size * shapes[0].stream[0]  # the basis behind the embedding
    per_pair = sum(layer.num_attention_heads * (layer.query_head_dim + layer.v_head_dim) for layer in shapes)
    return prompt_length * (per_token + prompt_length * per_pair)


def _layer_weights(config: PretrainedConfig, layer: LayerShape) -> int:
    """Count the entries that a token meets: q, k, v, o, gate, up and down, router, shortcuts of a sliced stream."""
    before, between, after = stream(config, layer)
    (queries, keys), outputs = projections(config, layer), layer.num_attention_heads * layer.v_head_dim
    rows = queries + keys + layer.latent * outputs + layer.num_key_value_heads * layer.v_head_dim
    shortcuts = between * (before + after) if layer.stream else 0
    attention = before * rows + between * outputs
    return (
        attention + (2 * between + after) * active_width(config, layer) + between * layer.experts + shortcuts
    )


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of keys and values that `cache` holds for the whole batch, with the bitmaps of a sparse one."""
    return sum(tensor.nbytes for layer in _filled(cache) for tensor in _stored(layer))


def cache_bytes_per_token(cache: Cache) -> int:
    """Return the bytes of keys and values per token of one sequence, over all layers, as stored.

    A sliding window layer counts what a token costs while it is inside the window, a sparse layer what one
    costs that has left it (0 if none has).
    """
    return sum(
        tensor.nbytes // (tensor.shape[0] * max(1, tensor.shape[-2]))
        for layer in _filled(cache)
        for tensor in (layer.packed() if isinstance(layer, SparseLayer) else _stored(layer))
    )


def _filled(cache: Cache) -> list[Any]:
    """Return the cache layers that were written; a decoder layer without attention writes none."""
    layers: list[Any] = cache.layers
    return [layer for layer in layers if layer.is_initialized]


def _stored(layer: Any) -> list[Tensor]:
    """Return the tensors that a layer keeps, each of shape (batch, groups, tokens, ...)."""
    return layer.tensors() if isinstance(layer, SparseLayer) else [layer.keys, layer.values]
