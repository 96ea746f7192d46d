"""Mean, spread and covariance of what enters a projection, over all calibration tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvp.strategies.signals.gradients import require_finite
from kvp.strategies.signals.walk import Visit

TINY = torch.finfo(torch.float32).tiny  # the least that a mean square is divided by


@dataclass
class Moments:
    """Count, mean and scatter of channels, in float64, by Chan et al.'s update, which does not cancel.

    Attributes:
        width: Channels.
        covariance: Whether channels are set against each other, which costs width^2.
        count: Tokens so far.
        mean: (width,)
        scatter: Sum of (x - mean)(x - mean)^T, (width, width); without covariance its diagonal.
    """

    width: int
    covariance: bool = False
    count: int = 0
    mean: Tensor = field(init=False)
    scatter: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mean = torch.zeros(self.width, dtype=torch.float64)
        self.scatter = self._square(self.mean[None])

    def add(self, inputs: Tensor) -> None:
        """Add inputs (tokens, width)."""
        inputs = inputs.double()
        rows, total, mean = len(inputs), self.count + len(inputs), inputs.mean(0)
        shift = mean - self.mean.to(mean.device)
        between = self._square(shift[None]) * (self.count * rows / total)
        self.scatter = self.scatter.to(mean.device).add_(self._square(inputs - mean)).add_(between)
        self.mean = self.mean.to(mean.device) + shift * (rows / total)
        self.count = total

    @property
    def gram(self) -> Tensor:
        """Return X^T X, the uncentred sum of x x^T; without covariance the diagonal: squared norms per channel."""
        return self.scatter + self.count * self._square(self.mean[None])

    @property
    def squares(self) -> Tensor:
        """Return (width,) sums of squares per channel."""
        own = self.scatter.diagonal() if self.covariance else self.scatter
        return own + self.count * self.mean.square()

    def _square(self, rows: Tensor) -> Tensor:
        return rows.T @ rows if self.covariance else rows.square().sum(0)


def input_moments(visit: Visit, names: Iterable[str], covariance: bool = False) -> dict[str, Moments]:
    """Return the moments of the inputs of the named projections of the layer visited, in one pass of the layer.

    Raises:
        FloatingPointError: An input is not finite.
    """
    width = {name: visit.model.get_parameter(f"{name}.weight").shape[1] for name in names}
    moments = {name: Moments(width[name], covariance) for name in width}
    for inputs in visit.inputs(*moments):
        for name, rows in inputs.items():
            moments[name].add(rows)
    for name, gathered in moments.items():
        require_finite(gathered.scatter.sum(), f"what enters {name}")
    return moments
