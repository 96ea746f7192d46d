"""What strategies have in common that hold another one, `first`, and go on from its scores."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from kvp.options import options
from kvp.strategies.base import Strategy
from kvp.strategies.target import Scores, Target
from kvp.types import Space


@options
class Wrapper(Strategy):
    """Scores and probes as `first` does, then looks for the plan with the model at hand.

    Attributes:
        first: The strategy that it goes on from.
    """

    searches: ClassVar[bool] = True  # looks at the model that the first leaves

    first: Strategy

    @property
    def probes(self) -> bool:
        """If the first does."""
        return self.first.probes

    @property
    def joins(self) -> int | None:
        """As the first does."""
        return self.first.joins

    def score(self, target: Target) -> dict[Space, Tensor]:
        """The first's."""
        return self.first.score(target)

    def sensitivity(self, target: Target, scores: Scores) -> Tensor:
        """The first's."""
        return self.first.sensitivity(target, scores)

    @property
    @override
    def probes_by_score(self) -> bool:
        return self.first.probes_by_score

    @override
    def probe_inputs(self) -> dict[str, Any]:
        return self.first.probe_inputs()
