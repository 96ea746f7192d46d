"""Mustafar (arXiv:2505.22913): the cache keeps only the largest channels of every key and value.

A unit is one channel of one token's value, or of its key after the rotation, per KV group. The score is the channel's
magnitude; higher = kept. Nothing is learnt and no weight changes. The checkpoint's config carries the options
(`kvp_cache`), and `kvp.models.sparse_cache` is the cache.

Every token of a group keeps the same number of channels. A token is stored as its kept values, in the cache's dtype,
and a bitmap of one bit per channel: no offsets, no padding, no ragged rows. The released code keeps one channel more,
because it keeps its threshold too. It keeps still more on ties, and stores tiles of 64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import transformers
from pydantic import Field
from torch import Tensor

from kvp.models.shapes import layer_shapes
from kvp.options import options

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WORD = 8  # channels per word of the bitmap


@options
class Mustafar:
    """The sparsity of a cache; a fraction of channels is rounded down."""

    node: ClassVar[str] = "cache"
    key_sparsity: float = Field(
        default=0.5, ge=0, lt=1, description="it is the fraction dropped of every key"
    )
    value_sparsity: float = Field(
        default=0.5, ge=0, lt=1, description="it is the fraction dropped of every value"
    )
    window: int = Field(default=32, ge=0, description="newest tokens whose keys and values stay whole")

    @classmethod
    def of(cls, config: PretrainedConfig) -> Mustafar | None:
        """Return the options in a checkpoint's config; None: the ordinary, dense cache."""
        options = getattr(config, "kvp_cache", None)
        return None if options is None else cls(**options)

    def check(self, config: PretrainedConfig) -> None:
        """Refuse a model whose cache cannot be packed; no weights are read.

        Raises:
            ValueError: A width is no multiple of a bitmap word, or a layer's attention slides.
        """
        if any(transformers.DynamicCache(config=config).is_sliding):
            raise ValueError(
                f"{config.model_type} has layers of sliding attention, whose cache forgets tokens by itself: a "
                "sparse cache is for full attention; choose cache=none"
            )
        for index, shape in enumerate(layer_shapes(config)):
            if shape.k_latents:
                raise ValueError(
                    f"layer {index} caches latents, of which no channel is small by itself: choose cache=none"
                )
            for name in ("qk_head_dim", "v_head_dim"):
                width = getattr(shape, name)
                if shape.num_key_value_heads and width % WORD:
                    raise ValueError(
                        f"layer {index} has {name}={width}, no multiple of {WORD}: the bitmap of a token is "
                        f"written in words of {WORD} channels. Set strategy.allocator.multiple_of={WORD}, or "
                        "cache=none"
                    )


def bytes_per_token(config: PretrainedConfig, itemsize: int) -> int:
    """Return the bytes of keys and values per token of one sequence, over all layers.

    In a sparse cache this is a token outside the window.
    """
    sparse, shapes = Mustafar.of(config), layer_shapes(config)
    if sparse is None:
        return itemsize * sum(shape.kv_width for shape in shapes)

    def stored(width: int, sparsity: float) -> int:
        return kept(width, sparsity) * itemsize + width // WORD

    return sum(
        shape.num_key_value_heads
        * (stored(shape.qk_head_dim, sparse.key_sparsity) + stored(shape.v_head_dim, sparse.value_sparsity))
        for shape in shapes
    )


def kept(width: int, sparsity: float) -> int:
    """Return how many channels of `width` stay."""
    return width - int(round(sparsity * width, 6))  # 0.29 * 200 is 57.99999999999999


def pack(states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest channels of every vector (..., width), in order, and their bitmap.

    Values are (..., count). The bitmap is (..., width / 8) bytes; channel c is bit c % 8 of byte c // 8.
    """
    index = states.abs().topk(count).indices.sort().values  # the paper's per-token magnitude pruning
    stays = torch.zeros_like(states, dtype=torch.uint8).scatter_(-1, index, 1)
    words = stays.unflatten(-1, (states.shape[-1] // WORD, WORD)) << _bits(states)
    return states.gather(-1, index), words.sum(-1, dtype=torch.uint8)


def unpack(values: Tensor, bitmap: Tensor) -> Tensor:
    """Return the packed vectors (..., width), zero where a channel was dropped."""
    stays = ((bitmap.unsqueeze(-1) >> _bits(bitmap)) & 1).bool().flatten(-2)
    return torch.zeros(stays.shape, dtype=values.dtype, device=values.device).masked_scatter_(stays, values)


def _bits(like: Tensor) -> Tensor:
    return torch.arange(WORD, dtype=torch.uint8, device=like.device)
