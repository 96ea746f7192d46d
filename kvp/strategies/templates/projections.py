"""Methods that judge KV groups and neurons by what leaves through o_proj and down_proj.

A KV group leaves through the columns of its query heads in o_proj, a neuron through one column of
down_proj; what is lost with them is lost at these two outputs. The inputs are the dense model's, taken
layer by layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from kvp.models.spaces import fold, members
from kvp.options import options
from kvp.strategies.allocation.pools import Pool
from kvp.strategies.signals.moments import TINY, Moments, input_moments
from kvp.strategies.signals.walk import Visit, walk
from kvp.strategies.target import Target
from kvp.strategies.templates.scored import ScoreStrategy
from kvp.types import Kind, Space


@options
class LayerwiseStrategy(ScoreStrategy):
    """Cut KV groups with their query heads, and neurons, scored by one walk through the layers.

    Leaves write `layer_scores`.
    """

    @override
    def kinds(self) -> tuple[Kind, ...]:
        return ("kv_group", "ffn")

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        spaces = self.spaces(target.config)
        scores: dict[Space, Tensor] = {}
        for visit in walk(target.model, target.batches, type(self).__name__):
            scores |= self.layer_scores(visit, [s for s in spaces if s.layer == visit.layer])
        return scores

    @abstractmethod
    def layer_scores(self, visit: Visit, spaces: Sequence[Space]) -> dict[Space, Tensor]:
        """Return (units,) per space of the layer visited, float64; higher = kept."""


@options
class ProjectionStrategy(LayerwiseStrategy):
    """Score a unit by the mean over its columns of o_proj or down_proj.

    Leaves write `columns`, and set `needs_covariance` if the inputs' variances do not do.
    """

    needs_covariance: ClassVar[bool] = False

    @abstractmethod
    def columns(self, kind: Kind, weight: Tensor, inputs: Moments) -> Tensor:
        """Return (in,) what each column of a projection is worth; higher = kept.

        Args:
            kind: "kv_group" for o_proj, "ffn" for down_proj.
            weight: (out, in), float64.
            inputs: Moments of what enters the projection.
        """

    @override
    def layer_scores(self, visit: Visit, spaces: Sequence[Space]) -> dict[Space, Tensor]:
        projections = {space: members(visit.model.config, space)[-1] for space in spaces}
        moments = input_moments(visit, [m.name for m in projections.values()], self.needs_covariance)
        scores = {}
        for space, member in projections.items():
            weight = visit.model.get_parameter(f"{member.name}.weight").detach().double()
            columns = self.columns(space.kind, weight, moments[member.name]).cpu()
            scores[space] = fold(columns, member, space) / fold(torch.ones_like(columns), member, space)
        return scores


def shares(pools: Sequence[Pool]) -> list[Pool]:
    """Return the pools with scores as shares of their sum: layers compare by what part of theirs they lose.

    For scores that follow the size of the activations and so grow with depth. It decides only where widths do
    not come out even: which layers lose a unit more than others.
    """
    return [
        replace(
            pool,
            parts=tuple(
                replace(part, scores=part.scores / part.scores.sum().clamp(min=TINY)) for part in pool.parts
            ),
        )
        for pool in pools
    ]
