"""Replacements for parts of a decoder layer: empty sublayers and resized projections."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class NoAttention(nn.Module):
    """A removed attention, which adds nothing to the residual stream and holds no cache."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Return a zero that broadcasts."""
        return hidden_states.new_zeros(()), None


class NoMLP(nn.Module):
    """A removed feed-forward network, which adds nothing to the residual stream.

    Attributes:
        scored: Whether the network returned the scores of its router as well.
    """

    def __init__(self, scored: bool = False) -> None:
        super().__init__()
        self.scored = scored

    def forward(self, hidden_states: Tensor) -> Any:
        """Return a zero that broadcasts; with `scored` in the place of a router's scores, too."""
        zero = hidden_states.new_zeros(())
        return (zero, zero) if self.scored else zero


def resize(module: Any, name: str, in_features: int, out_features: int, *, bias: bool = False) -> None:
    """Replace a Linear of a module by one of other widths or with a bias, on its device and in its dtype.

    The new Linear is not initialised. A bias that is there stays.
    """
    old = getattr(module, name)
    bias = bias or old.bias is not None
    if (old.in_features, old.out_features, old.bias is not None) != (in_features, out_features, bias):
        factory = {"device": old.weight.device, "dtype": old.weight.dtype}
        setattr(module, name, nn.Linear(in_features, out_features, bias=bias, **factory))
