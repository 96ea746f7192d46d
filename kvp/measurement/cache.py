"""A KV cache of fixed size, written in place: no step copies what it holds, and a CUDA graph can replay it.

Keys and values lie in it as they are, or as Mustafar keeps them. A sparse one stores prompts; steps are for the kernel
of all layers (`kvp.models.decode_layers`), which writes and reads it.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from kvp.estimate.serving import room
from kvp.models.caches import cache_format
from kvp.models.codecs import Codec
from kvp.models.decode_layers import has_layers_of
from kvp.models.fixed_sparse import FixedSparse
from kvp.models.mustafar import Mustafar, Sparse
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


class InPlace(CacheLayerMixin, ABC):
    """Base of a layer with room for `length` tokens."""

    is_sliding = False

    def __init__(self, cursor: Cursor, length: int) -> None:
        super().__init__()
        self.cursor, self.length, self.is_initialized = cursor, length, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Done at once instead."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens attended to, and the first of them."""
        return self.cursor.visible, 0

    def get_seq_length(self) -> int:
        """Tokens before this pass."""
        return self.cursor.visible - len(self.cursor.positions)

    def get_max_length(self) -> int:
        """Tokens there is room for."""
        return self.length


class FixedLayer(InPlace):
    """Keys (batch, groups, length, qk_head_dim) and values of one layer; all latents are the channels of one head."""

    def __init__(
        self, shape: LayerShape, cursor: Cursor, *, batch_size: int, length: int, dtype: torch.dtype
    ) -> None:
        super().__init__(cursor, length)
        heads, device = 1 if shape.k_latents else shape.num_key_value_heads, cursor.positions.device
        self.keys, self.values = (
            torch.zeros(batch_size, heads, length, channels // heads, dtype=dtype, device=device)
            for channels in shape.cached
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the pass's tokens at its positions; returns views of the visible ones."""
        at = self.cursor
        keys, values = (states[at.rows] for states in self.states)
        keys.index_copy_(2, at.positions, key_states)
        values.index_copy_(2, at.positions, value_states)
        return keys[:, :, : at.visible], values[:, :, : at.visible]

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """Return keys and values, those of all places."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values


class SparseLayer(InPlace):
    """Keys and values of one layer as Mustafar keeps them.

    Attributes:
        states: Keys, values.
    """

    def __init__(
        self,
        shape: LayerShape,
        codecs: Sequence[Codec],
        cursor: Cursor,
        *,
        batch_size: int,
        length: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(cursor, length)
        self.states: list[FixedSparse] = []
        for codec in codecs:
            assert isinstance(codec, Sparse), "`check_cache` refuses others"
            self.states.append(
                FixedSparse(
                    codec,
                    batch_size=batch_size,
                    groups=shape.num_key_value_heads,
                    length=length,
                    dtype=dtype,
                    device=cursor.positions.device,
                )
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the first tokens of the pass's sequences, which attend to one another as they are."""
        assert not self.get_seq_length(), "steps are for the kernel"
        for states, new in zip(self.states, (key_states, value_states), strict=True):
            states.store(new, self.cursor.rows)
        return key_states, value_states

    def tensors(self) -> list[Tensor]:
        """Return every stored tensor."""
        return [tensor for states in self.states for tensor in states.tensors()]

    def bytes_per_token(self) -> Fraction:
        """Return the bytes of a packed token of one sequence."""
        return sum((states.bytes_per_token() for states in self.states), Fraction(0))


def check_cache(config: PretrainedConfig, length: int, *, path: str) -> None:
    """Refuse a model whose cache cannot be held for `length` tokens on a path; reads no weights.

    Args:
        config: The config of a model.
        length: Tokens of a sequence.
        path: How it decodes. Eager takes the cache that the checkpoint asks for, the others hold one in place;
            kernels for this CPU (native), one of which reads a sparse cache, hold that, too.

    Raises:
        ValueError: Its attention slides over fewer tokens, or its cache is packed, and no kernel reads it in place.
    """
    window = getattr(config, "sliding_window", None)
    if window is not None and length > window:
        raise ValueError(
            f"this model attends to {window} tokens only (sliding_window), a cache for {length} would keep more "
            "than it reads: use shorter sequences"
        )
    if packed := cache_format(config):
        packed.check(config)
        served = type(packed) is Mustafar and has_layers_of(config)
        if not (path == "eager" or (served and path == "native")):
            others = "native or eager" if served else "eager"
            raise ValueError(
                "this checkpoint decodes with a packed cache (kvp_cache), which no kernel of this path reads in place: "
                f"give --path {others} alone, or measure it with `python -m kvp`, measure=..."
            )


def fixed_cache(
    config: PretrainedConfig, *, batch_size: int, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Cache, Cursor]:
    """An empty cache with `room` for `length` tokens, and what steers it."""
    cursor, packed = Cursor(torch.zeros(1, dtype=torch.long, device=device)), cache_format(config)
    options: Any = {"batch_size": batch_size, "length": room(length), "dtype": dtype}
    shapes = [shape for shape in layer_shapes(config) if shape.num_key_value_heads]
    layers = [
        SparseLayer(shape, packed.codecs(shape.qk_head_dim, shape.v_head_dim), cursor, **options)
        if packed
        else FixedLayer(shape, cursor, **options)
        for shape in shapes
    ]
    return Cache(layers=list(layers)), cursor
