"""Counts of what a model costs: multiply-accumulates from shapes, bytes of a real cache."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil
from operator import mul
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import Cache

from kvp.measurement.cache import SparseLayer
from kvp.models.packed_cache import PackedLayer
from kvp.models.shapes import active_width, expansion_rows, projections, stream
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
    """Count the entries that a token meets: q, k, v, o, gate, up and down, router, shortcuts of a sliced stream.

    Expansions of latents count, too, once per token, as a prompt computes them.
    """
    before, between, after = stream(config, layer)
    rows, outputs = sum(projections(config, layer)), layer.num_attention_heads * layer.v_head_dim
    shortcuts = between * (before + after) if layer.stream else 0
    attention = before * (rows + layer.latent * outputs) + between * outputs
    attention += sum(map(mul, layer.cached, expansion_rows(config, layer)))
    mlp = (2 * between + after) * active_width(config, layer) + between * layer.experts
    return attention + mlp + shortcuts


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of keys and values that `cache` holds for the whole batch, scales and bitmaps included."""
    return sum(tensor.nbytes for layer in _filled(cache) for tensor in _stored(layer))


def cache_bytes_per_token(cache: Cache) -> int:
    """Return the bytes of keys and values per token of one sequence, over all layers, as stored, rounded up.

    A sliding window layer counts what a token costs while it is inside the window, a packed layer what one
    costs that has left it (0 if none has).
    """
    return ceil(sum(map(_bytes_per_token, _filled(cache))))


def _bytes_per_token(layer: Any) -> Fraction:
    if isinstance(layer, PackedLayer | SparseLayer):
        return layer.bytes_per_token()
    return sum((Fraction(x.nbytes, x.shape[0] * max(1, x.shape[-2])) for x in _stored(layer)), Fraction(0))


def _filled(cache: Cache) -> list[Any]:
    """Return the cache layers that were written; a decoder layer without attention writes none."""
    layers: list[Any] = cache.layers
    return [layer for layer in layers if layer.is_initialized]


def _stored(layer: Any) -> list[Tensor]:
    """Return the tensors that a layer keeps."""
    packed = isinstance(layer, PackedLayer | SparseLayer)
    return layer.tensors() if packed else [layer.keys, layer.values]
