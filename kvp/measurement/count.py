"""Counts of what a model costs: multiply-accumulates from shapes, bytes of a real cache."""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import Cache

from kvp.models.shapes import expansion_rows, key_value_rows, projected, stream
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
    """Count the entries of q, k, v, o, of the gate, up and down of the FFN, and of a sliced stream's shortcuts.

    Expansions of latents count, too, once per token, as a prompt computes them.
    """
    before, between, after = stream(config, layer)
    width, latent = projected(config, layer), layer.latent * layer.v_head_dim
    queries, outputs = (layer.num_attention_heads * d for d in (width + latent, layer.v_head_dim))
    kv_width = sum(key_value_rows(config, layer))
    shortcuts = between * (before + after) if layer.stream else 0
    attention = before * (queries + kv_width) + between * outputs
    attention += sum(map(mul, layer.cached, expansion_rows(config, layer)))
    return attention + (2 * between + after) * layer.intermediate_size + shortcuts


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
