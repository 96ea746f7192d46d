"""Bytes of serving: weights, cache and the pass at work; the batch and the context that a memory holds.

Eight and four bits are arithmetic of what engines store; kvp itself decodes with caches of 16 or 32 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvp.estimate.passes import Parts, expanded_channels, weights_bytes, with_total, working_bytes
from kvp.models.shapes import layer_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BLOCK = 16  # tokens; engines hand out caches in such blocks, and kernels want masks of a multiple of it
SLICE = {  # tokens of a prompt read at a time, at least one sequence: bounds activations
    "cpu": 1024,
    "cuda": 8192,
}


@dataclass(frozen=True)
class CacheType:
    """A way to store keys and values.

    Attributes:
        name: Its name on the command line.
        words: Who stores it so.
        bits: Bits of a number.
        per_scale: Numbers that share a float16 scale; 0: a scale per tensor, which weighs nothing.
    """

    name: str
    words: str
    bits: int
    per_scale: int = 0

    def row_bytes(self, numbers: int) -> int:
        """Return the bytes of the keys or the values of one token in one layer."""
        blocks = -(-numbers // self.per_scale) if self.per_scale else 0
        return -(-(blocks * self.per_scale or numbers) * self.bits // 8) + 2 * blocks


CACHES = (
    CacheType("16-bit", "bfloat16 or float16; kvp runs it", 16),
    CacheType("fp8", "vLLM's, one scale per tensor", 8),
    CacheType("q8_0", "llama.cpp's int8, a float16 scale per 32 numbers", 8, 32),
    CacheType("q4_0", "llama.cpp's int4, a float16 scale per 32 numbers", 4, 32),
)
FLOAT32_CACHE = CacheType("32-bit", "float32; kvp runs it", 32)


def room(length: int) -> int:
    """Return how many tokens a cache for `length` tokens has room for."""
    return -(-length // BLOCK) * BLOCK


def token_bytes(config: PretrainedConfig, cache: CacheType) -> int:
    """Return the bytes of keys and values per token of one sequence, over all layers."""
    return sum(cache.row_bytes(channels) for shape in layer_shapes(config) for channels in shape.cached)


def largest_batch(left: int, *, length: int, per_token: int) -> int:
    """Return how many sequences of `length` tokens have a cache that fits into what is left beside the weights."""
    return max(0, left) // (room(length) * per_token)


def longest_context(left: int, *, per_token: int, positions: int) -> int:
    """Return how many tokens per sequence fit, in blocks, within the model's positions."""
    return min(max(0, left) // per_token, positions) // BLOCK * BLOCK


def serving_bytes(
    config: PretrainedConfig, *, batch_size: int, context: int, width: int, cache: CacheType, device: str
) -> Parts:
    """Return the peak of serving a batch whose prompts are read in slices: weights, cache, activations, total."""
    tokens = min(batch_size * context, max(context, SLICE[device]))
    return with_total(
        {
            "weights": weights_bytes(config, width),
            "cache": batch_size * room(context) * token_bytes(config, cache),
            "activations": _activations(config, tokens=tokens, batch_size=batch_size, width=width),
        }
    )


def measured_bytes(
    config: PretrainedConfig, *, batch_size: int, prompt_length: int, new_tokens: int, width: int
) -> Parts:
    """Return the peak of `kvp.measurement.measure`: prompts read at once, then a cache that grows by copies."""
    shapes, length = layer_shapes(config), prompt_length + new_tokens
    per_token = width * sum(shape.kv_width for shape in shapes)
    copied = width * max(s.cached[0] + expanded_channels(s) for s in shapes)
    reading = batch_size * prompt_length * per_token + _activations(
        config, tokens=batch_size * prompt_length, batch_size=batch_size, width=width
    )
    cache = batch_size * length * per_token
    decoding = (
        cache
        + batch_size * length * copied
        + _activations(config, tokens=batch_size, batch_size=batch_size, width=width)
    )
    return with_total(
        {
            "weights": weights_bytes(config, width),
            "cache": cache,
            "activations": max(reading, decoding) - cache,
        }
    )


def _activations(config: PretrainedConfig, *, tokens: int, batch_size: int, width: int) -> int:
    """Return the larger of a layer's work and of the logits of one position per sequence."""
    return max(working_bytes(config, tokens=tokens, width=width), batch_size * config.vocab_size * width)
