"""Magnitude: keep the units of the largest weights. No data; a floor that is often below random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvp.strategies.signals.importance import Importance
from kvp.strategies.templates.channels import ImportanceStrategy


@dataclass(frozen=True, kw_only=True)
class Magnitude(ImportanceStrategy):
    """Score = sum of |w|^p over everything the unit cuts.

    Attributes:
        norm: "l1" (p = 1) or "l2" (p = 2, no root, as in LLM-Pruner's code).
    """

    norm: Literal["l1", "l2"] = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("norm", ("l1", "l2"))

    @property
    def criterion(self) -> Importance:
        """The configured norm."""
        return self.norm
