"""The parts of a decoder layer that pruning puts in the place of others."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class NoAttention(nn.Module):
    """A removed attention: adds nothing to the residual stream and holds no cache."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """A zero that broadcasts."""
        return hidden_states.new_zeros(()), None


class NoMLP(nn.Module):
    """A removed feed-forward network."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """A zero that broadcasts."""
        return hidden_states.new_zeros(())


def resize(module: Any, name: str, in_features: int, out_features: int, *, bias: bool = False) -> None:
    """Replace a Linear by one of other widths, or with `bias` (same device and dtype, not initialised)."""
    old = getattr(module, name)
    bias = bias or old.bias is not None
    if (old.in_features, old.out_features, old.bias is not None) != (in_features, out_features, bias):
        factory = {"device": old.weight.device, "dtype": old.weight.dtype}
        setattr(module, name, nn.Linear(in_features, out_features, bias=bias, **factory))
