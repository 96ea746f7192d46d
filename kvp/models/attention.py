"""One attention forward for every pruned family.

Query-key and value widths may differ, and each KV group may keep its own subset of rope pairs. The
rotary tables are the dense model's: kept frequencies are *gathered*, never recomputed from the new
width, and the softmax scale stays `1 / sqrt(dense head_dim)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from kvp.models.layers import resize
from kvp.types import LayerShape


class PrunedAttention:
    """Mixin in front of a family's attention class: same parts, other widths.

    `cache_index` counts the layers that have an attention: a layer without one holds no cache, and a
    wrong index makes the static cache return other tokens without a word.
    """

    q_proj: nn.Linear
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

    def __init__(self, config: PretrainedConfig, layer_idx: int, shape: LayerShape, cache_index: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        hidden, queries, groups = config.hidden_size, shape.num_attention_heads, shape.num_key_value_heads
        resize(self, "q_proj", hidden, queries * shape.qk_head_dim)
        resize(self, "k_proj", hidden, groups * shape.qk_head_dim)
        resize(self, "v_proj", hidden, groups * shape.v_head_dim)
        resize(self, "o_proj", queries * shape.v_head_dim, hidden, bias=shape.o_bias)
        self.layer_idx = cache_index
        self.qk_head_dim, self.v_head_dim = shape.qk_head_dim, shape.v_head_dim
        self.num_key_value_groups = queries // groups
        self.rope_pairs = shape.rope_pairs
        self._pair_index: Tensor | None = None  # built per device: __init__ runs on the meta device
        self.sliding_window = getattr(self, "sliding_window", getattr(config, "sliding_window", None))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the family's own forward; hidden_states is (batch, seq_len, hidden_size)."""
        shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*shape, -1, self.qk_head_dim)
        key = self.k_proj(hidden_states).view(*shape, -1, self.qk_head_dim)
        value = self.v_proj(hidden_states).view(*shape, -1, self.v_head_dim).transpose(1, 2)
        if self.has_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        assert position_embeddings is not None
        cos, sin = (self._gather(table) for table in position_embeddings)
        key = _rotate(key, cos, sin)
        if cos.shape[1] > 1:
            cos, sin = (table.repeat_interleave(self.num_key_value_groups, dim=1) for table in (cos, sin))
        query = _rotate(query, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights

    def _gather(self, table: Tensor) -> Tensor:
        """(batch, seq_len, head_dim) of the dense model -> (batch, groups or 1, seq_len, qk_head_dim)."""
        if self.rope_pairs is None:
            return table.unsqueeze(1)
        if self._pair_index is None or self._pair_index.device != table.device:
            rows = self.rope_pairs if len(set(self.rope_pairs)) > 1 else self.rope_pairs[:1]
            self._pair_index = torch.tensor(rows, device=table.device).repeat(1, 2)
        return table[..., self._pair_index].transpose(1, 2)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + width / 2), the Hugging Face layout."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin
