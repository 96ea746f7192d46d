"""The parts of a decoder whose residual stream is sliced (SliceGPT, arXiv:2401.15024).

The stream has coordinates of its own before every attention and every MLP, fewer than `hidden_size`. A shortcut matrix
around each sublayer maps the coordinates before it to those after it. Norms divide by the root mean square over the
*original* width, and their weights are folded into the projections that follow. Heads, and so the KV cache, keep the
widths of the given model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from kvp.models.shapes import stream
from kvp.types import LayerShape


class StreamNorm(nn.Module):
    """The norm x / sqrt(|x|^2 / hidden_size + eps) for x of any width; cut channels count as zero."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.hidden_size, self.eps = config.hidden_size, config.rms_norm_eps

    def forward(self, states: Tensor) -> Tensor:
        """Return the normed states in the given shape (..., width), computed in float32 at least."""
        exact = states.to(torch.promote_types(states.dtype, torch.float32))
        mean_square = exact.square().sum(-1, keepdim=True) / self.hidden_size
        return (exact * torch.rsqrt(mean_square + self.eps)).to(states.dtype)


class SlicedLayer:
    """Mixin in front of a family's decoder layer; the twin resizes attention and MLP."""

    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    attention_shortcut: nn.Module
    mlp_shortcut: nn.Module

    def __init__(self, config: PretrainedConfig, layer_idx: int, shape: LayerShape) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        before, between, after = stream(config, shape)
        self.input_layernorm, self.post_attention_layernorm = StreamNorm(config), StreamNorm(config)
        self.attention_shortcut = nn.Linear(before, between, bias=False)
        self.mlp_shortcut = nn.Linear(between, after, bias=False)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map (batch, seq_len, width before) to (batch, seq_len, width after)."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = self.attention_shortcut(hidden_states) + attended
        return self.mlp_shortcut(hidden_states) + self.mlp(self.post_attention_layernorm(hidden_states))


class SharedEmbedding(nn.Embedding):
    """An embedding that shares its matrix with the head; the head is not sliced, so a basis follows."""

    def __init__(self, vocab_size: int, hidden_size: int, width: int, padding_idx: int | None) -> None:
        super().__init__(vocab_size, hidden_size, padding_idx)
        self.basis = nn.Linear(hidden_size, width, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map ids (batch, seq_len) to states (batch, seq_len, width)."""
        return self.basis(super().forward(input))


def sliced_embedding(config: PretrainedConfig, shape: LayerShape) -> nn.Embedding:
    """Return the embedding of a sliced model whose first layer has this shape."""
    width = stream(config, shape)[0]
    if config.tie_word_embeddings:
        return SharedEmbedding(config.vocab_size, config.hidden_size, width, config.pad_token_id)
    return nn.Embedding(config.vocab_size, width, config.pad_token_id)
