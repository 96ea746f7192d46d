"""No pruning: the dense baseline, and with a recovery the dense control.

Formula
-------
    every unit stays, whatever the ratio

Faithful or interpreted
-----------------------
A control of our own. Tuning on text lowers perplexity by itself, so a recovered model needs it beside it.

Cost
----
Nothing before the recovery.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from typing_extensions import override

from kvp.options import options
from kvp.strategies.base import PlannedStrategy
from kvp.strategies.target import Scores, Target
from kvp.types import Budget, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@options
class NoPruning(PlannedStrategy):
    """Keep everything, whatever the ratio."""

    needs_calibration: ClassVar[bool] = False
    prunes: ClassVar[bool] = False

    @override
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        pass

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        return {}

    @override
    def plan(self, config: PretrainedConfig, scores: Scores, budget: Budget, profile: Tensor) -> Plan:
        return Plan({})
