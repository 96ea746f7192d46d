"""The shape that a strategy leaves of a model under a budget, before anything is scored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvp.models.configs import pruned_config
from kvp.models.plans import kept_blocks
from kvp.models.shapes import cut, layer_shapes
from kvp.strategies.base import PlannedStrategy, Strategy
from kvp.strategies.templates.blocks import DepthStrategy
from kvp.strategies.templates.scored import ScoreStrategy
from kvp.types import Budget, Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def after(config: PretrainedConfig, plan: Plan) -> PretrainedConfig:
    """Return the config of a model that is cut by a plan."""
    shapes = layer_shapes(config)
    return pruned_config(config, cut(shapes, plan), kept_blocks(plan, len(shapes)))


def expected_shape(strategy: Strategy, config: PretrainedConfig, budget: Budget) -> PretrainedConfig | None:
    """Return the config after a cut whose scores are random; None where the strategy must see the model to plan.

    Which channels stay changes no size. How a budget is divided among the layers changes none of its denominator.

    Raises:
        ValueError: The strategy cannot reach the budget on this model; names the nearest.
    """
    if not isinstance(strategy, PlannedStrategy) or not strategy.prunes:
        return None
    if isinstance(strategy, DepthStrategy):
        spaces = [strategy.space(config)]
    elif isinstance(strategy, ScoreStrategy):
        spaces = strategy.spaces(config)
    else:
        return None
    generator = torch.Generator().manual_seed(0)
    scores = {space: torch.rand(*space.shape, generator=generator) for space in spaces}
    return after(config, strategy.plan(config, scores, budget, torch.zeros(len(layer_shapes(config)))))
