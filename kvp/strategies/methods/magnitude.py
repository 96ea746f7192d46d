"""Magnitude: keep the units of the largest weights. No data; a floor that is often below random."""

from __future__ import annotations

from typing import Literal

from kvp.options import options
from kvp.strategies.signals.importance import Importance
from kvp.strategies.templates.channels import ImportanceStrategy


@options
class Magnitude(ImportanceStrategy):
    """Score = sum of |w|^p over everything the unit cuts.

    Attributes:
        norm: "l1" (p = 1) or "l2" (p = 2, no root, as in LLM-Pruner's code).
    """

    norm: Literal["l1", "l2"] = "l2"

    @property
    def criterion(self) -> Importance:
        """The configured norm."""
        return self.norm
