"""Wanda-sp: cut whole structures by Wanda's weight times input norm (arXiv:2306.11695, CASIA-IVA-Lab/FLAP).

FLAP's authors made a structural baseline of Wanda (`prune_wanda_sp`). Every layer loses the same fraction of heads and
of neurons (`allocator=uniform`). Nothing is compensated.

Formula
-------
    column j   ||X_j||_2 mean_i |W_ij|    of o_proj or down_proj; X_j its inputs over all calibration tokens
    head       sum over its columns
    neuron     its column

A layer is measured on what comes out of the layers before it after their cut (`sequential`). Layers are never compared.
Where the widths of few KV groups do not come out even, `by_share` decides.

Faithful or interpreted
-----------------------
Faithful to the code; GQA is ours. Side by side, no unit differed at 25 and 50 %.

* KV groups take the place of heads.
* A unit is worth the mean of its columns, which is one order with the sum within a layer.
* Each layer loses as much of each as the budget asks; the code takes int(ratio n) of n.

Cost
----
One forward pass, layer by layer, on the model cut so far. No gradient. `sequential=false` scores once for all ratios.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from typing_extensions import override

from kvp.models.masks import masked
from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator, Uniform
from kvp.strategies.allocation.pools import Pool
from kvp.strategies.signals.moments import Moments
from kvp.strategies.signals.walk import walk
from kvp.strategies.target import Scores, Target
from kvp.strategies.templates.projections import ProjectionStrategy, shares
from kvp.types import Budget, Kind, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@options
class WandaSP(ProjectionStrategy):
    """Cut KV groups and neurons by weight times activation norm.

    Attributes:
        sequential: Choose a layer's units on the states that the cut layers before it give; false: on the
            dense model's.
        by_share: Where layers cannot all lose the same number of units, those lose one more whose next unit is
            the smallest share of its layer's score; false: the smallest score, which is in the first layers.
    """

    late: ClassVar[tuple[str, ...]] = (*ProjectionStrategy.late, "sequential", "by_share")

    allocator: Allocator = Uniform(multiple_of=1, max_ratio=1.0)
    sequential: bool = True
    by_share: bool = True

    @property
    @override
    def searches(self) -> bool:
        return self.sequential

    @override
    def columns(self, kind: Kind, weight: Tensor, inputs: Moments) -> Tensor:
        return inputs.gram.sqrt() * weight.abs().mean(0)

    @override
    def pools(self, config: PretrainedConfig, scores: Scores) -> list[Pool]:
        pools = super().pools(config, scores)
        return shares(pools) if self.by_share else pools

    @override
    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        config, keep = target.config, dict(self.plan(target.config, scores, budget, profile).keep)
        with ExitStack() as cut:
            for visit in walk(target.model, target.batches, "Wanda-sp, cut so far"):
                cut.close()  # the states after the layer before are taken
                chosen: dict[Space, Tensor] = {}
                spaces = [space for space in keep if space.layer == visit.layer]
                for pool in self.pools(config, self.layer_scores(visit, spaces)):
                    chosen |= pool.keep(len(keep[pool.parts[0].space]))
                cut.enter_context(masked(target.model, Plan(chosen)))
                keep |= chosen
        return Plan(keep)
