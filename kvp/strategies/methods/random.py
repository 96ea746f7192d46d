"""Random units: the floor under every criterion."""

from __future__ import annotations

from dataclasses import dataclass

from kvp.strategies.signals.importance import Importance
from kvp.strategies.templates.channels import ImportanceStrategy


@dataclass(frozen=True, kw_only=True)
class Random(ImportanceStrategy):
    """Keep units drawn uniformly under the run's seed."""

    @property
    def criterion(self) -> Importance:
        """Uniform noise."""
        return "random"
