"""What strategies have in common that hold another one, `first`, and go on from its scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvp.strategies.base import Scores, Strategy, Target
from kvp.types import Budget, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class Wrapper(Strategy):
    """Scores and probes as `first` does, then looks for the plan with the model at hand.

    Attributes:
        first: The strategy that it goes on from.
    """

    first: Strategy

    @property
    def probes(self) -> bool:
        """If the first does."""
        return self.first.probes

    @property
    def joins(self) -> int | None:
        """As the first does."""
        return self.first.joins

    @property
    def searches(self) -> bool:
        """It needs the model that the first leaves."""
        return True

    def score(self, target: Target) -> dict[Space, Tensor]:
        """The first's."""
        return self.first.score(target)

    def sensitivity(self, target: Target, scores: Scores) -> Tensor:
        """The first's."""
        return self.first.sensitivity(target, scores)

    @property
    def probes_by_score(self) -> bool:
        """As the first does."""
        return self.first.probes_by_score

    def probe_inputs(self) -> dict[str, Any]:
        """The first's."""
        return self.first.probe_inputs()

    def plan(self, config: PretrainedConfig, scores: Scores, budget: Budget, profile: Tensor) -> Plan:
        """Not to be had without the model: see `search`."""
        raise AssertionError(f"{type(self).__name__} plans with the model at hand")
