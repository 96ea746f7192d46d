"""LLM-Pruner's coupled structures (arXiv 2305.11627, section 3.1), in the layers that may lose some."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.shapes import cut, layer_shapes, size
from kvp.options import options
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.allocation.pools import Pool
from kvp.strategies.target import Scores
from kvp.strategies.templates.reductions import channels_per_unit
from kvp.strategies.templates.scored import ScoreStrategy
from kvp.types import Budget, Kind, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig

StructureGrouping = Literal["both", "kv_group", "ffn"]


@options
class CoupledStrategy(ScoreStrategy):
    """Cut whole KV groups and FFN neurons of the middle layers.

    Attributes:
        grouping: "both", or only "kv_group" or "ffn".
        protect_first: Layers at the input that stay whole.
        protect_last: Layers at the output that stay whole: 4 and 2 are the reference's [4, 30) of 32.
        unit_ratio: The reference's `pruning_ratio`, the fraction of groups and of neurons that goes in each
            of the other layers; a budget that it misses is refused. None: the budget decides.
    """

    late: ClassVar[tuple[str, ...]] = (*ScoreStrategy.late, "unit_ratio")

    grouping: StructureGrouping = "both"
    protect_first: int = Field(default=4, ge=0, description="layers at the input that stay")
    protect_last: int = Field(default=2, ge=0, description="layers at the output that stay")
    unit_ratio: float | None = Field(default=None, ge=0, lt=1, description="null lets the budget decide")

    def __post_init__(self) -> None:
        if self.unit_ratio is not None and not isinstance(self.allocator, Uniform):
            raise ValueError(
                "strategy.unit_ratio says how many units go in each layer, and so does the allocator: use "
                "strategy/allocator=uniform, or strategy.unit_ratio=null"
            )
        if self.unit_ratio is not None and self.unit_ratio > self.allocator.max_ratio:
            raise ValueError(
                f"strategy.unit_ratio must be <= strategy.allocator.max_ratio={self.allocator.max_ratio:g}, got "
                f"{self.unit_ratio:g}: no layer loses more than that; raise max_ratio too"
            )

    @override
    def kinds(self) -> tuple[Kind, ...]:
        return ("kv_group", "ffn") if self.grouping == "both" else (self.grouping,)

    @override
    def spaces(self, config: PretrainedConfig) -> list[Space]:
        num_layers = len(layer_shapes(config))
        chosen = range(self.protect_first, num_layers - self.protect_last)
        if not chosen:
            raise ValueError(
                f"strategy.protect_first={self.protect_first} and protect_last={self.protect_last} protect all "
                f"{num_layers} layers of this model; lower them"
            )
        return [space for space in super().spaces(config) if space.layer in chosen]

    @override
    def plan(self, config: PretrainedConfig, scores: Scores, budget: Budget, profile: Tensor) -> Plan:
        if self.unit_ratio is None:
            return super().plan(config, scores, budget, profile)
        pools = self.pools(config, scores)
        plan = Plan({s: keep for pool in pools for s, keep in pool.keep(self._kept(config, pool)).items()})
        shapes = layer_shapes(config)
        dense, left = (size(config, widths).count(budget.of) for widths in (shapes, cut(shapes, plan)))
        if abs(1 - left / dense - budget.value) > budget.tolerance:
            raise ValueError(
                f"strategy.unit_ratio={self.unit_ratio} removes {1 - left / dense:.6f} of {budget.of} here, not "
                f"ratio.value={budget.value}: ask for ratio.value={1 - left / dense:.6f}, or let the budget "
                "decide with strategy.unit_ratio=null"
            )
        return plan

    def _kept(self, config: PretrainedConfig, pool: Pool) -> int:
        """Return how many units the reference keeps: it cuts ceil(ratio * channels), of which only whole units go."""
        assert self.unit_ratio is not None
        width = channels_per_unit(config, pool.parts[0].space)
        removed = (pool.units * width - int(pool.units * width * (1 - self.unit_ratio))) // width
        return pool.units - max(n for n in pool.removable(self.allocator.max_ratio) if n <= removed)
