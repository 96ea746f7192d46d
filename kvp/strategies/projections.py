"""Methods that judge a unit by its columns of o_proj or down_proj, and by what enters them.

A KV group leaves through the columns of its query heads in o_proj, a neuron through one column of
down_proj; what is lost with them is lost at these two outputs. The inputs are the dense model's, taken
layer by layer.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvp.models.spaces import fold, members
from kvp.strategies.base import ScoreStrategy, Target
from kvp.strategies.moments import Moments, input_moments
from kvp.strategies.walk import Visit, walk
from kvp.types import Kind, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class ProjectionStrategy(ScoreStrategy):
    """Cut KV groups with their query heads, and neurons; a unit's score is the mean of its columns'.

    Leaves write `columns`, and set `needs_covariance` if the inputs' variances do not do.
    """

    needs_covariance: ClassVar[bool] = False

    @abstractmethod
    def columns(self, kind: Kind, weight: Tensor, inputs: Moments) -> Tensor:
        """(in,) what each column of a projection is worth; higher = kept.

        Args:
            kind: "kv_group" for o_proj, "ffn" for down_proj.
            weight: (out, in), float64.
            inputs: Of the projection.
        """

    def kinds(self) -> tuple[Kind, ...]:
        """Whole KV groups, and neurons."""
        return ("kv_group", "ffn")

    def score(self, target: Target) -> dict[Space, Tensor]:
        """Of every KV group and neuron, float64."""
        spaces = self.spaces(target.config)
        visits = walk(target.model, target.batches, type(self).__name__)
        scores = [self.layer_scores(target.config, visit, spaces) for visit in visits]
        return {space: score for layer in scores for space, score in layer.items()}

    def layer_scores(
        self, config: PretrainedConfig, visit: Visit, spaces: list[Space]
    ) -> dict[Space, Tensor]:
        """Of those of `spaces` that lie in the layer visited."""
        projections = {space: members(config, space)[-1] for space in spaces if space.layer == visit.layer}
        moments = input_moments(visit, [m.name for m in projections.values()], self.needs_covariance)
        scores = {}
        for space, member in projections.items():
            weight = visit.model.get_parameter(f"{member.name}.weight").detach().double()
            columns = self.columns(space.kind, weight, moments[member.name]).cpu()
            scores[space] = fold(columns, member, space) / fold(torch.ones_like(columns), member, space)
        return scores
