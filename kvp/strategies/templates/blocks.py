"""Depth: whole blocks fall in the order of their scores.

The budget fixes nothing but how many of them fall. That number is found by counting, so it is exact for
models whose blocks differ too. Every block that falls takes its share of the KV cache along.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.masks import without
from kvp.models.shapes import cut, layer_shapes, size
from kvp.models.spaces import find_spaces
from kvp.options import options
from kvp.strategies.base import PlannedStrategy, Strategy
from kvp.strategies.signals.gradients import require_finite
from kvp.strategies.signals.losses import losses_without
from kvp.strategies.target import Scores, Target
from kvp.types import Budget, Kind, LayerShape, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BlockPart = Literal["block", "attention", "mlp"]


@options
class DepthStrategy(PlannedStrategy):
    """Remove the blocks of the lowest scores, as many as bring the model nearest to the budget.

    Leaves write `score`: (layers,), higher = kept; among equals the lower index goes first.

    Attributes:
        grouping: "block", or only its "attention" or "mlp" (no paper's default).
        protect_first: Blocks at the input that stay.
        protect_last: Blocks at the output that stay.
    """

    late: ClassVar[tuple[str, ...]] = (*Strategy.late, "protect_first", "protect_last")

    grouping: BlockPart = "block"
    protect_first: int = Field(default=0, ge=0, description="blocks at the input that stay")
    protect_last: int = Field(default=0, ge=0, description="blocks at the output that stay")

    def __post_init__(self) -> None:
        if self.compensation is not None:
            raise ValueError(
                "a removed block leaves no projection behind that could compensate for it; "
                "use strategy/compensation=none"
            )

    def kinds(self) -> tuple[Kind, ...]:
        """Return the one kind of space that is cut."""
        return (self.grouping,)

    def space(self, config: PretrainedConfig) -> Space:
        """Return the one space that is cut, of shape (layers,)."""
        return find_spaces(config, self.kinds())[0]

    def candidates(self, config: PretrainedConfig) -> list[int]:
        """Return the layers that may lose the part, ascending."""
        inner = range(self.protect_first, self.space(config).shape[0] - self.protect_last)
        return sorted(self._present(config) & set(inner))

    def most(self, config: PretrainedConfig) -> int:
        """Return how many of the candidates may go; one layer keeps the part."""
        return min(len(self.candidates(config)), len(self._present(config)) - 1)

    def _present(self, config: PretrainedConfig) -> set[int]:
        def has(shape: LayerShape) -> bool:
            attention, mlp = shape.num_key_value_heads > 0, shape.intermediate_size > 0
            return {"attention": attention, "mlp": mlp, "block": attention or mlp}[self.grouping]

        return {layer for layer, shape in enumerate(layer_shapes(config)) if has(shape)}

    def losses(self, target: Target, layers: list[int], desc: str) -> Tensor:
        """Return (len(layers),) the calibration loss without each layer's part, in nats per token.

        Raises:
            FloatingPointError: A loss is not finite.
        """
        removals = [(n, partial(without, target.model, n, self.grouping)) for n in layers]
        _, losses = losses_without(target.model, target.batches, removals, desc)
        require_finite(losses.sum(), f"a calibration loss without one {self.grouping}")
        return losses

    @override
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        if self.grouping == "attention" and len(set(getattr(config, "layer_types", None) or ())) > 1:
            raise ValueError(
                "strategy.grouping=attention is not for models that mix sliding and full attention: their "
                "cache could not tell the layers apart; use grouping=block"
            )
        space = self.space(config)
        if not self._within_reach(config, budget):
            self.plan(config, {space: torch.zeros(space.shape)}, budget, torch.zeros(space.shape))

    def _within_reach(self, config: PretrainedConfig, budget: Budget) -> bool:
        """Return whether some choice of blocks may meet the budget; which ones fall, only scores will say."""
        shapes, space = layer_shapes(config), self.space(config)
        dense = size(config, shapes).count(budget.of)
        others = [sorted({*range(space.shape[0])} - {n}) for n in self.candidates(config)]
        parts = [
            1 - size(config, cut(shapes, Plan({space: torch.tensor(kept)}))).count(budget.of) / dense
            for kept in others
        ]
        slack = budget.tolerance + 1e-9
        for count in range(self.most(config) + 1):
            least, most = (sum(sorted(parts, reverse=most)[:count]) for most in (False, True))
            if least - slack <= budget.value <= most + slack:
                return True
        return False

    @override
    def plan(self, config: PretrainedConfig, scores: Scores, budget: Budget, profile: Tensor) -> Plan:
        """Return the plan nearest to the budget, with fewer blocks gone if two are as near; the lowest scores go."""
        space, shapes, most = self.space(config), layer_shapes(config), self.most(config)
        order = sorted(self.candidates(config), key=lambda n: float(scores[space][n]))[:most]
        kept = [sorted(set(range(space.shape[0])) - set(order[:n])) for n in range(most + 1)]
        plans = [Plan({space: torch.tensor(layers)}) for layers in kept]
        dense = size(config, shapes).count(budget.of)
        removed = [1 - size(config, cut(shapes, plan)).count(budget.of) / dense for plan in plans]
        count = min(range(most + 1), key=lambda n: (round(abs(removed[n] - budget.value), 9), n))
        if abs(removed[count] - budget.value) > budget.tolerance + 1e-9:
            raise ValueError(
                f"ratio.value={budget.value} of {budget.of} cannot be reached by whole {self.grouping}s: the "
                f"nearest is {removed[count]:.4f}, {count} of {space.shape[0]}; at most {most} may go "
                f"({removed[most]:.4f}). Ask for ratio.value={removed[count]:.4f}, or change ratio.of, "
                f"ratio.tolerance or what the strategy protects (first {self.protect_first}, "
                f"last {self.protect_last})"
            )
        return plans[count]
