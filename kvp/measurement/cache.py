"""A KV cache of fixed size, written in place: no step copies what it holds, and a CUDA graph can replay it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from kvp.estimate.serving import room
from kvp.models.mustafar import Mustafar
from kvp.models.shapes import layer_shapes
from kvp.types import LayerShape


@dataclass
class Cursor:
    """Where a forward pass writes and reads, the same in all layers.

    Attributes:
        positions: (tokens,) of its tokens, on the device: a captured pass reads them when it is replayed.
        visible: Tokens attended to, from the first.
        rows: Sequences of this pass.
    """

    positions: Tensor
    visible: int = 0
    rows: slice = field(default_factory=lambda: slice(None))


class FixedLayer(CacheLayerMixin):
    """Keys (batch, groups, length, qk_head_dim) and values of one layer; all latents are the channels of one head."""

    is_sliding = False

    def __init__(
        self, shape: LayerShape, cursor: Cursor, *, batch_size: int, length: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.cursor, device = cursor, cursor.positions.device
        heads = 1 if shape.k_latents else shape.num_key_value_heads
        self.keys, self.values = (
            torch.zeros(batch_size, heads, length, channels // heads, dtype=dtype, device=device)
            for channels in shape.cached
        )
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Done at once instead."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the pass's tokens at its positions; returns views of the visible ones."""
        at = self.cursor
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys[at.rows], self.values[at.rows]
        keys.index_copy_(2, at.positions, key_states)
        values.index_copy_(2, at.positions, value_states)
        return keys[:, :, : at.visible], values[:, :, : at.visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens attended to, and the first of them."""
        return self.cursor.visible, 0

    def get_seq_length(self) -> int:
        """Tokens before this pass."""
        return self.cursor.visible - len(self.cursor.positions)

    def get_max_length(self) -> int:
        """Tokens there is room for."""
        assert self.keys is not None
        return self.keys.shape[-2]


def check_whole_cache(config: PretrainedConfig, length: int) -> None:
    """Refuse a model whose cache would not hold `length` tokens as they are; reads no weights.

    Raises:
        ValueError: Its attention slides over fewer tokens, or its cache is sparse.
    """
    window = getattr(config, "sliding_window", None)
    if window is not None and length > window:
        raise ValueError(
            f"this model attends to {window} tokens only (sliding_window), a cache for {length} would keep more "
            "than it reads: use shorter sequences"
        )
    if Mustafar.of(config):
        raise ValueError(
            "this checkpoint decodes with a sparse cache (kvp_cache), which only grows: measure it with "
            "`python -m kvp`, measure=..."
        )


def fixed_cache(
    config: PretrainedConfig, *, batch_size: int, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Cache, Cursor]:
    """An empty cache with `room` for `length` tokens, and what steers it."""
    cursor = Cursor(torch.zeros(1, dtype=torch.long, device=device))
    layers = [
        FixedLayer(shape, cursor, batch_size=batch_size, length=room(length), dtype=dtype)
        for shape in layer_shapes(config)
        if shape.num_key_value_heads
    ]
    return Cache(layers=list(layers)), cursor
