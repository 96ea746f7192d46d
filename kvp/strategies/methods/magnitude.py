"""Magnitude: keep the units of the largest weights; a floor that is often below random.

Formula
-------
    unit   sum of |w|^p over everything it cuts,   p = 1 (norm=l1) or 2 (norm=l2, no root)

Faithful or interpreted
-----------------------
A floor of our own. The norms have no root, as in LLM-Pruner's code.

Cost
----
Nothing but reading the weights. No data, no pass through the model.
"""

from __future__ import annotations

from typing import Literal

from typing_extensions import override

from kvp.options import options
from kvp.strategies.signals.importance import Importance
from kvp.strategies.templates.channels import ImportanceStrategy


@options
class Magnitude(ImportanceStrategy):
    """Score a unit by the sum of |w|^p over everything it cuts.

    Attributes:
        norm: "l1" (p = 1) or "l2" (p = 2, no root, as in LLM-Pruner's code).
    """

    norm: Literal["l1", "l2"] = "l2"

    @property
    @override
    def criterion(self) -> Importance:
        return self.norm
