"""Groups whose key weights are large stay; a demonstration, not a published method."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from kvp.models.spaces import fold, members
from kvp.options import options
from kvp.strategies.target import Target
from kvp.strategies.templates.scored import ScoreStrategy
from kvp.types import Kind, Space


@options
class KeyNorm(ScoreStrategy):
    """Score a KV group by the sum of |w|^power over the rows of its key projection."""

    power: float = Field(default=2.0, gt=0, description="p of sum |w|^p")
    needs_calibration: ClassVar[bool] = False

    def kinds(self) -> tuple[Kind, ...]:
        """Cut KV groups."""
        return ("kv_group",)

    def score(self, target: Target) -> dict[Space, Tensor]:
        """Return a score per group; higher = kept."""
        scores = {}
        for space in self.spaces(target.config):
            member = next(each for each in members(target.config, space) if each.name.endswith("k_proj"))
            weight = target.model.get_parameter(f"{member.name}.weight").detach().float()
            scores[space] = fold(weight.abs().pow(self.power).sum(1), member, space)
        return scores
