"""Attention of one token without copies of keys and values.

While torch compiles, transformers' own function repeats the keys and values of a group for each of its query
heads: a model with 32 heads in 8 groups would read four times its cache in every step. Outside of a compiler
its heads read their group's keys one after the other (a few per cent of a step on a CPU, see experiments/speed).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

GROUPED = "kvp_grouped"


def grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(batch, 1, heads, v_head_dim): the heads of a group attend as its queries; prompts as transformers does."""
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    queries = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    output = scaled_dot_product_attention(queries, key, value, attn_mask=attention_mask, scale=scaling)
    return output.flatten(1, 2).unsqueeze(1), None


AttentionInterface.register(GROUPED, grouped)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
