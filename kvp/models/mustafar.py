"""Mustafar (arXiv 2505.22913): of every cached key and value only the largest channels stay.

Unit: one channel of one token's key (after the rotation) or value, per KV group; score: its magnitude, higher =
kept. Nothing is learnt and no weight changes: the sparsity of the cache is an option of running a model, and
lies in the config of its checkpoint (`kvp_cache`). `kvp.models.sparse_cache` is the cache.

Every token of a group keeps the same number of channels, so a token is stored as its kept values, in the
cache's dtype, and a bitmap of one bit per channel: no offsets, no padding, no ragged rows. The released code
keeps one channel more (its threshold is itself kept), more still on ties, and stores tiles of 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor

from kvp.models.shapes import layer_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WORD = 8  # channels per word of the bitmap


@dataclass(frozen=True, kw_only=True)
class Mustafar:
    """How sparse the cache is, and where it is not.

    Attributes:
        key_sparsity: Fraction of the channels of every key that is dropped, rounded down, in [0, 1).
        value_sparsity: The same of every value.
        window: Newest tokens whose keys and values stay whole; a new token attends to these and to itself.
    """

    key_sparsity: float = 0.5
    value_sparsity: float = 0.5
    window: int = 32

    def __post_init__(self) -> None:
        for name in ("key_sparsity", "value_sparsity"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"cache.{name} must be in [0, 1), got {getattr(self, name)}: it is the fraction dropped"
                )
        if self.window < 0:
            raise ValueError(f"cache.window must be >= 0 tokens, got {self.window}")

    @classmethod
    def of(cls, config: PretrainedConfig) -> Mustafar | None:
        """What a checkpoint's config asks for; None: the ordinary, dense cache."""
        options = getattr(config, "kvp_cache", None)
        return None if options is None else cls(**options)

    def check(self, config: PretrainedConfig) -> None:
        """Refuse a model whose cache cannot be stored so; reads no weights.

        Raises:
            ValueError: A width is no multiple of a bitmap word, or a layer's attention slides.
        """
        if any(transformers.DynamicCache(config=config).is_sliding):
            raise ValueError(
                f"{config.model_type} has layers of sliding attention, whose cache forgets tokens by itself: a "
                "sparse cache is for full attention; choose cache=none"
            )
        for index, shape in enumerate(layer_shapes(config)):
            for name in ("qk_head_dim", "v_head_dim"):
                width = getattr(shape, name)
                if shape.num_key_value_heads and width % WORD:
                    raise ValueError(
                        f"layer {index} has {name}={width}, no multiple of {WORD}: the bitmap of a token is "
                        f"written in words of {WORD} channels. Set strategy.allocator.multiple_of={WORD}, or "
                        "cache=none"
                    )


def bytes_per_token(config: PretrainedConfig, itemsize: int) -> int:
    """Bytes of keys and values per token of one sequence, over all layers; outside the window if sparse."""
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
    """Channels that stay of `width`."""
    return width - int(round(sparsity * width, 6))  # 0.29 * 200 is 57.99999999999999


def pack(states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of every vector (..., width): values (..., count), in order, and bitmap (..., width / 8).

    Channel c is bit c % 8 of byte c // 8.
    """
    index = states.abs().topk(count).indices.sort().values
    stays = torch.zeros_like(states, dtype=torch.uint8).scatter_(-1, index, 1)
    words = stays.unflatten(-1, (states.shape[-1] // WORD, WORD)) << _bits(states)
    return states.gather(-1, index), words.sum(-1, dtype=torch.uint8)


def unpack(values: Tensor, bitmap: Tensor) -> Tensor:
    """The vectors (..., width) that were packed, zero where a channel was dropped."""
    stays = ((bitmap.unsqueeze(-1) >> _bits(bitmap)) & 1).bool().flatten(-2)
    return torch.zeros(stays.shape, dtype=values.dtype, device=values.device).masked_scatter_(stays, values)


def _bits(like: Tensor) -> Tensor:
    return torch.arange(WORD, dtype=torch.uint8, device=like.device)
