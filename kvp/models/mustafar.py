"""Mustafar (arXiv:2505.22913): the cache keeps only the largest channels of every key and value.

A unit is one channel of one token's value, or of its key after the rotation, per KV group. The score is the channel's
magnitude; higher = kept. Nothing is learnt and no weight changes. The checkpoint's config carries the options
(`kvp_cache`), and `kvp.models.packed_cache` is the cache.

Every token of a group keeps the same number of channels. A token is stored as its kept values, in the cache's dtype or
as integers, and a bitmap of one bit per channel: no offsets, no padding, no ragged rows. The released code keeps one
channel more, because it keeps its threshold too. It keeps still more on ties, and stores tiles of 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.cache_formats import CacheFormat
from kvp.models.codecs import Codec, Integers, Packed, Whole
from kvp.models.shapes import layer_shapes
from kvp.options import options

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WORD = 8  # channels per word of the bitmap


@options
class Mustafar(CacheFormat):
    """The sparsity of a cache; a fraction of channels is rounded down."""

    key_sparsity: float = Field(
        default=0.5, ge=0, lt=1, description="it is the fraction dropped of every key"
    )
    value_sparsity: float = Field(
        default=0.5, ge=0, lt=1, description="it is the fraction dropped of every value"
    )
    window: int = Field(default=32, ge=0, description="newest tokens whose keys and values stay whole")

    @override
    def codecs(self, qk_head_dim: int, v_head_dim: int, attention: int = 0) -> tuple[Codec, Codec]:
        return self._sparse(qk_head_dim, self.key_sparsity), self._sparse(v_head_dim, self.value_sparsity)

    def _sparse(self, width: int, sparsity: float) -> Codec:
        return Sparse(width, self.window, values=self._values(kept(width, sparsity)))

    def _values(self, count: int) -> Codec:
        """Return how the `count` values that stay of a vector are stored."""
        return Whole(count)

    @override
    def check(self, config: PretrainedConfig) -> None:
        """Refuse a model whose cache cannot be packed; no weights are read.

        Raises:
            ValueError: A width is no multiple of a bitmap word, or a layer's attention slides.
        """
        super().check(config)
        for index, shape in enumerate(layer_shapes(config)):
            for name in ("qk_head_dim", "v_head_dim"):
                width = getattr(shape, name)
                if shape.num_key_value_heads and width % WORD:
                    raise ValueError(
                        f"layer {index} has {name}={width}, no multiple of {WORD}: the bitmap of a token is "
                        f"written in words of {WORD} channels. Set strategy.allocator.multiple_of={WORD}, or "
                        "cache=none"
                    )


@options
class MustafarIntegers(Mustafar):
    """Mustafar with integers for the channels that stay."""

    format: Literal["mustafar_int"] = "mustafar_int"
    bits: int = Field(default=4, ge=1, le=8, description="bits of a kept value")
    group: int = Field(default=32, ge=1, description="kept values of a token that share a scale, at most")

    @override
    def _values(self, count: int) -> Codec:
        return Integers(count, bits=self.bits, group=self.group)


@dataclass(frozen=True, kw_only=True)
class Sparse(Codec):
    """The largest channels of a vector, and a bitmap.

    Attributes:
        values: How those that stay are stored.
    """

    values: Codec

    @override
    def pack(self, states: Tensor) -> Packed:
        values, bitmap = pack(states, self.values.width)
        return *self.values.pack(values), bitmap

    @override
    def unpack(self, packed: Packed) -> Tensor:
        *values, bitmap = packed
        return unpack(self.values.unpack(tuple(values)), bitmap)

    @override
    def bytes_per_token(self, itemsize: int) -> Fraction:
        return self.values.bytes_per_token(itemsize) + self.width // WORD


def kept(width: int, sparsity: float) -> int:
    """Return how many channels of `width` stay, at least one."""
    return max(width - int(round(sparsity * width, 6)), 1)  # 0.29 * 200 is 57.99999999999999


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
