"""NIRVANA's allocation: two rankings, one ratio between what they lose."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.options import options
from kvp.strategies.allocation.allocate import Global, water_fill
from kvp.strategies.allocation.pools import Pool


@options
class Tied(Global):
    """One ranking over the attention units of all layers, one over their MLP units; `gamma` ties them.

    With A and M the amounts of the budget's denominator that the units of attention and MLP hold, the
    fractions removed are s and gamma s, where A s + M gamma s is what the budget removes. If one side cannot
    give as much, the other gives the rest. Under kv_cache M is 0, and only attention gives.

    Attributes:
        gamma: Fraction of the MLP removed per fraction of the attention.
    """

    gamma: float = Field(
        default=3.36, gt=0, description="fraction of the MLP removed per fraction of the attention"
    )

    @override
    def targets(
        self, pools: Sequence[Pool], costs: Sequence[float], total: float, profile: Tensor
    ) -> list[float]:
        mlp = [pool.parts[0].space.kind in ("ffn", "mlp") for pool in pools]
        sides = [[i for i in range(len(pools)) if mlp[i] == side] for side in (False, True)]
        held = [sum(costs[i] * pools[i].units for i in side) for side in sides]
        most = [sum(costs[i] * pools[i].removable(self.max_ratio)[-1] for i in side) for side in sides]
        removed = [0.0] * len(pools)
        for side, share in zip(sides, water_fill([held[0], self.gamma * held[1]], most, total), strict=True):
            units = super().targets([pools[i] for i in side], [costs[i] for i in side], share, profile)
            for i, count in zip(side, units, strict=True):
                removed[i] = count
        return removed
