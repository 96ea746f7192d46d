"""Attention that caches latents in place of keys and values, for methods of low rank (Palu, arXiv:2407.21118).

    token  ->  latent c = A x, cached  ->  B c  ->  norm, RoPE at the token's own position  ->  ordinary keys

Keys are expanded for the whole cache on every step, because RoPE stands between B and the queries. So these methods
save bytes and add work. A single query attends to latents of values, and each head expands what it has read, because
the sum over tokens and B commute. A prompt expands its values first, which is less work for many queries.

| step of one token    | further multiply-accumulates per layer, n tokens in the cache |
| -------------------- | ------------------------------------------------------------- |
| keys                 | n * KV heads * head_dim * key latent's width                  |
| values, in attention | n * query heads * (value latent's width - head_dim)           |
| values, after it     | query heads * head_dim * value latent's width                 |

All latents of a layer are cached as the channels of one head, because a static cache has as many heads of keys as of
values. The position of a cached token follows from the mask and the position of the last query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvp.models.attention import PrunedAttention, rotate
from kvp.models.layers import resize
from kvp.models.shapes import stream
from kvp.types import LayerShape


class Expansion(nn.Module):
    """Matrices B (rows, width) of several latents side by side: weight (rows, latents * width)."""

    def __init__(self, latents: int, width: int, rows: int, like: Tensor) -> None:
        super().__init__()
        self.latents = latents
        self.weight = nn.Parameter(torch.empty(rows, latents * width, device=like.device, dtype=like.dtype))
        nn.init.normal_(self.weight, std=(latents * width) ** -0.5)

    def forward(self, states: Tensor) -> Tensor:
        """Return B c of each latent, (..., latents * rows), of latents (..., latents * width)."""
        matrices = self.weight.unflatten(1, (self.latents, -1))
        parts = states.unflatten(-1, (self.latents, -1))
        return torch.einsum("...gc,rgc->...gr", parts, matrices).flatten(-2)

    def by_head(self, read: Tensor) -> Tensor:
        """Return each head's own rows of B times what it has read of its latent.

        Args:
            read: (..., latents, KV heads of a latent, queries of a KV head, width).

        Returns:
            The same shape, with head_dim in the place of the width.
        """
        matrices = self.weight.unflatten(1, (self.latents, -1)).unflatten(0, (read.shape[-3], -1))
        return torch.einsum("...ghqc,hdgc->...ghqd", read, matrices)


class LatentAttention(PrunedAttention):
    """Mixin in front of a family's attention class, for a layer with latents of keys and of values.

    Attributes:
        rotary: The model's rotary embedding, which turns the keys of cached tokens. It is no submodule of this one.
    """

    k_up_proj: Expansion
    v_up_proj: Expansion
    rotary: nn.Module

    def __init__(
        self, config: PretrainedConfig, layer_idx: int, shape: LayerShape, cache_index: int, rotary: nn.Module
    ) -> None:
        super().__init__(config, layer_idx, shape, cache_index)
        assert shape.k_latents is not None
        assert shape.v_latents is not None
        (keys, key_width), (values, value_width) = shape.k_latents, shape.v_latents
        self.num_key_value_heads, self.v_latents = shape.num_key_value_heads, values
        before, like = stream(config, shape)[0], self.q_proj.weight
        resize(self, "k_proj", before, keys * key_width)
        resize(self, "v_proj", before, values * value_width)
        rows = self.num_key_value_heads * self.projected // keys
        self.k_up_proj = Expansion(keys, key_width, rows, like)
        rows = self.num_key_value_heads * self.v_head_dim // values
        self.v_up_proj = Expansion(values, value_width, rows, like)
        self.layer_type = getattr(config, "layer_types", None) and config.layer_types[layer_idx]
        self.__dict__["rotary"] = rotary  # not registered: its buffers belong to the model

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Any, ...] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what the family's own forward does; hidden_states is (batch, seq_len, width of the stream)."""
        assert position_embeddings is not None
        shape = hidden_states.shape[:-1]
        tables = position_embeddings[:2]
        latents = self.k_proj(hidden_states)[:, None], self.v_proj(hidden_states)[:, None]  # of one head
        key_tables = tables
        if past_key_values is not None:
            key_tables = self._tables_of_cache(
                past_key_values, tables, shape[1], kwargs.get("position_ids"), attention_mask
            )
            latents = past_key_values.update(*latents, self.layer_idx)
        query, key = self._by_group(self.q_proj(hidden_states), self.k_up_proj(latents[0][:, 0]))
        if self.use_rope:
            query = rotate(query, *self._tables(*tables))
            key = rotate(key, *self._tables(*key_tables))
        query, key = (states.flatten(2, 3).transpose(1, 2) for states in (query, key))
        one, (heads, queries) = shape[1] == 1, (self.num_key_value_heads, self.num_key_value_groups)
        per_latent = heads // self.v_latents
        if one:  # attends to latents, and expands what it has read
            value = latents[1][:, 0].unflatten(-1, (self.v_latents, -1)).transpose(1, 2)
            value = value.repeat_interleave(per_latent, dim=1)
        else:
            value = self.v_up_proj(latents[1][:, 0]).unflatten(-1, (heads, -1)).transpose(1, 2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
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
        if one:
            output = self.v_up_proj.by_head(output.reshape(*shape, self.v_latents, per_latent, queries, -1))
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights

    def _tables_of_cache(
        self,
        cache: Cache,
        tables: tuple[Tensor, Tensor],
        tokens: int,
        positions: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return cos and sin for the keys that the cache gives back with `tokens` more in it.

        A padded sequence has positions that are not its slots: then as many tokens lie between a key and the last
        query as the mask shows. No key lies behind that query, for an empty slot of a static cache would pass for a
        longer text.
        """
        length, first = cache.get_mask_sizes(tokens, self.layer_idx)
        if length == tokens:  # nothing is cached yet
            return tables
        device = tables[0].device
        slots = torch.arange(length, device=device) + first
        last = cache.get_seq_length(self.layer_idx) + tokens - 1  # the slot of the last query
        at = torch.full((1, 1), last, device=device) if positions is None else positions[:, -1:]
        places = slots.expand(len(at), -1)
        if mask is not None and mask.dim() == 4:
            seen = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] >= 0
            places = torch.where(at == last, places, at - (seen.sum(-1, keepdim=True) - seen.cumsum(-1)))
        elif positions is not None:
            places = places - last + at
        places = torch.minimum(places, at)
        several = () if self.layer_type is None or not self._ropes_differ else (self.layer_type,)
        turned: tuple[Tensor, Tensor] = self.rotary(tables[0], places, *several)[:2]
        return turned

    @property
    def _ropes_differ(self) -> bool:
        """Tell whether each type of layer has a rotary embedding of its own (Gemma 3)."""
        return any(isinstance(rope, dict) for rope in self.config.rope_parameters.values())
