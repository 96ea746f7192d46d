"""No pruning: the dense baseline, and with a recovery the dense control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from kvp.strategies.base import Scores, Strategy, Target
from kvp.types import Budget, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class NoPruning(Strategy):
    """Keeps everything, whatever the ratio."""

    prunes: ClassVar[bool] = False

    @property
    def needs_calibration(self) -> bool:
        """Nothing is scored."""
        return False

    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        """Every model can be left as it is."""

    def score(self, target: Target) -> dict[Space, Tensor]:
        """No spaces, no scores."""
        return {}

    def plan(self, config: PretrainedConfig, scores: Scores, budget: Budget, profile: Tensor) -> Plan:
        """The empty plan."""
        return Plan({})
