"""Random units: the floor under every criterion.

Formula
-------
    unit   uniform noise under the run's seed

Faithful or interpreted
-----------------------
A floor of our own. Every comparison should hold it.

Cost
----
Nothing. No data, no pass through the model.
"""

from __future__ import annotations

from typing_extensions import override

from kvp.options import options
from kvp.strategies.signals.importance import Importance
from kvp.strategies.templates.channels import ImportanceStrategy


@options
class Random(ImportanceStrategy):
    """Keep units drawn uniformly under the run's seed."""

    @property
    @override
    def criterion(self) -> Importance:
        return "random"
