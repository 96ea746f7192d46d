"""One attention forward for every pruned family, and the rotary tables that it reads.

Query-key and value widths may differ, and each KV group may keep its own subset of rope pairs. Kept frequencies are
*gathered* from the dense model's rotary tables, never recomputed from the new width. The softmax scale stays
`1 / sqrt(dense head_dim)`.

A latent layer caches keys that turn, and values. Its queries read the values as further keys, through `q_latent_proj`.
So does multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) with its matrices multiplied out.

A decode step gathers the tables of all layers at once. A longer pass gathers layer by layer, because the tables of all
layers take as much memory as the keys of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvp.models.layers import resize
from kvp.models.shapes import (
    CHANNELS_PER_PAIR,
    dense_shapes,
    layer_shapes,
    projections,
    stream,
    turning_pairs,
)
from kvp.types import LayerShape


class PrunedAttention:
    """Mixin in front of a family's attention class, with the same parts in other widths.

    `cache_index` counts the layers that have an attention, because a layer without one holds no cache. A wrong index
    makes the static cache silently return other tokens.
    """

    q_proj: nn.Linear
    q_latent_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    config: PretrainedConfig
    scaling: float
    attention_dropout: float
    training: bool
    has_qk_norm: bool  # set by the twin
    joint_norm: bool  # set by the twin: that norm is over all heads together
    has_sinks: bool  # set by the twin
    eager: Callable[..., tuple[Tensor, Tensor | None]]  # set by the twin
    use_rope: bool = True  # SmolLM3 sets it per layer

    def __init__(self, config: PretrainedConfig, layer_idx: int, shape: LayerShape, cache_index: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        queries, groups = shape.num_attention_heads, shape.num_key_value_heads
        before, after, _ = stream(config, shape)
        self.projected = dense_shapes(config)[0].qk_head_dim if self.has_qk_norm else shape.qk_head_dim
        for name, rows in zip(("q_proj", "k_proj", "v_proj"), projections(config, shape), strict=True):
            resize(self, name, before, rows)
        resize(self, "o_proj", queries * shape.v_head_dim, after, bias=shape.o_bias)
        if shape.latent:
            wide, old = queries * shape.v_head_dim, self.q_proj
            placed = {"device": old.weight.device, "dtype": old.weight.dtype}
            self.q_latent_proj = nn.Linear(before, wide, bias=old.bias is not None, **placed)
        self.sinks = nn.Parameter(self.q_proj.weight.new_empty(queries)) if self.has_sinks else None
        self.layer_idx, self.latent = cache_index, shape.latent
        self.qk_head_dim, self.v_head_dim = shape.qk_head_dim, shape.v_head_dim
        self.num_key_value_groups = queries // groups
        self.rope_pairs, self.normed_groups = shape.rope_pairs, shape.normed_groups
        self._pair_index: Tensor | None = None  # built per device: __init__ runs on the meta device
        self._channel_index: dict[int, Tensor] = {}  # by the number of heads
        self.sliding_window = getattr(self, "sliding_window", getattr(config, "sliding_window", None))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Any, ...] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what the family's own forward does; hidden_states is (batch, seq_len, width of the stream)."""
        shape = hidden_states.shape[:-1]
        query, key = self._by_group(self.q_proj(hidden_states), self.k_proj(hidden_states))
        value = self.v_proj(hidden_states).view(*shape, -1, self.v_head_dim).transpose(1, 2)
        assert position_embeddings is not None
        cos, sin = self._tables(*position_embeddings)
        if self.use_rope:
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        query, key = (states.flatten(2, 3).transpose(1, 2) for states in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if self.latent:
            still = self.q_latent_proj(hidden_states).view(*shape, -1, self.v_head_dim).transpose(1, 2)
            query, key = torch.cat((query, still), -1), torch.cat((key, value), -1)
        kind = getattr(key, "reader", self.config._attn_implementation)  # a packed cache brings its own
        width = max(key.shape[-1], self.v_head_dim)
        if kind == "vllm":  # which caches keys and values in one width
            query, key, value = (
                nn.functional.pad(states, (0, width - states.shape[-1])) for states in (query, key, value)
            )
        # vLLM finds this lookup, its one call, `scaling` and `s_aux` in the source of `forward`
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(kind, self.eager)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            s_aux=self.sinks,
            **kwargs,
        )
        if kind == "vllm":
            output = output.reshape(*shape, -1, width)[..., : self.v_head_dim]
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights

    def _by_group(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys (batch, seq_len, groups, heads, qk_head_dim) from what was projected, normed and cut.

        A group of keys has one head.
        """
        if self.joint_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query = query.unflatten(-1, (-1, self.num_key_value_groups, self.projected))
        key = key.unflatten(-1, (-1, 1, self.projected))
        if not self.has_qk_norm:
            return query, key
        if not self.joint_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return self._kept(query), self._kept(key)

    def _kept(self, states: Tensor) -> Tensor:
        """Return the kept groups and channels (batch, seq_len, groups, heads, qk_head_dim) of normed heads."""
        groups, heads = states.shape[2:4]
        remain = range(groups) if self.normed_groups is None else self.normed_groups
        if self.qk_head_dim == self.projected and len(remain) == groups:
            return states
        index = self._channel_index.get(groups * heads)
        if index is None or index.device != states.device:
            pairs = self.projected // CHANNELS_PER_PAIR
            rows = self.rope_pairs or (tuple(range(pairs)),) * len(remain)
            channels = [(*row, *(pair + pairs for pair in row)) for row in rows for _ in range(heads)]
            starts = [self.projected * (group * heads + head) for group in remain for head in range(heads)]
            both = zip(starts, channels, strict=True)
            flat = [start + channel for start, row in both for channel in row]
            index = self._channel_index[groups * heads] = constant(flat, states.device)
        return states.flatten(2).index_select(-1, index).unflatten(-1, (-1, heads, self.qk_head_dim))

    def _tables(self, cos: Tensor, sin: Tensor, *gathered: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the kept pairs, (batch, seq_len, groups or 1, 1, qk_head_dim)."""
        if gathered:
            return gathered[self.layer_idx]
        if self.rope_pairs is None:
            return cos[:, :, None, None], sin[:, :, None, None]
        if self._pair_index is None or self._pair_index.device != cos.device:
            rows = [(*row, *row) for row in _rows(self.rope_pairs)]
            self._pair_index = constant(rows, cos.device)
        return cos[..., self._pair_index].unsqueeze(-2), sin[..., self._pair_index].unsqueeze(-2)


class PrunedRotary:
    """Mixin in front of a family's rotary embedding; a single token gets the tables of all layers at once."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.head_dim, self.turning = dense_shapes(config)[0].qk_head_dim, turning_pairs(config)
        every = (tuple(range(self.head_dim // CHANNELS_PER_PAIR)),)
        shapes = (shape for shape in layer_shapes(config) if shape.num_key_value_heads)
        layers = [_rows(shape.rope_pairs or every) for shape in shapes]
        self.sets = list(dict.fromkeys(layers))
        self.slots = [self.sets.index(rows) for rows in layers]
        self.widths = [CHANNELS_PER_PAIR * len(rows[0]) for rows in self.sets]
        self.cuts = self.sets != [every]
        self._index: Tensor | None = None  # built per device: __init__ runs on the meta device

    def forward(self, x: Tensor, position_ids: Tensor, *layer_type: str) -> tuple[Any, ...]:
        """Return cos and sin of the dense model, (batch, seq_len, head_dim), and gathered tables for a single token.

        A model that kept only some pairs gets a pair (cos, sin) per attention, each as `PrunedAttention._tables`
        returns it.
        """
        tables = super().forward(x, position_ids, *layer_type)  # type: ignore[misc]
        cos, sin = (self._whole(table, still) for table, still in zip(tables, (1, 0), strict=True))
        if position_ids.shape[-1] > 1 or not self.cuts:
            return cos, sin
        gathered = list(zip(self._gather(cos), self._gather(sin), strict=True))
        return cos, sin, *(gathered[slot] for slot in self.slots)

    def _whole(self, table: Tensor, still: float) -> Tensor:
        """Return a table (batch, seq_len, head_dim) from a family's, which may lack pairs that stand still.

        A family's table has the pairs that turn, once (gpt-oss) or twice.
        """
        if table.shape[-1] == self.head_dim:
            return table
        half = self.head_dim // CHANNELS_PER_PAIR
        once = nn.functional.pad(table[..., : self.turning], (0, half - self.turning), value=still)
        return torch.cat((once, once), dim=-1)

    def _gather(self, table: Tensor) -> list[Tensor]:
        """Return the columns of a table per distinct set of pairs, each (batch, 1, groups or 1, 1, width)."""
        if self._index is None or self._index.device != table.device:
            flat = [pair for rows in self.sets for row in rows for pair in (*row, *row)]
            self._index = constant(flat, table.device)
        sizes = [len(rows) * width for rows, width in zip(self.sets, self.widths, strict=True)]
        parts = zip(table[..., self._index].split(sizes, dim=-1), self.widths, strict=True)
        return [part.unflatten(-1, (-1, 1, width)) for part, width in parts]


def constant(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Return a tensor to keep, which gradients may need later, also if it is made in `torch.inference_mode()`."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def _rows(pairs: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Return one row of pairs per KV group, or a single row if all groups keep the same pairs."""
    return pairs if len(set(pairs)) > 1 else pairs[:1]


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + width / 2), the Hugging Face layout."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin
