"""A rule for how much each layer gives."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator, water_fill
from kvp.strategies.allocation.pools import Pool


@options
class Ramp(Allocator):
    """Let late layers give more: the last one `steepness` times the share of the first."""

    steepness: float = Field(default=3.0, gt=0, description="share of the last layer over that of the first")

    def targets(
        self, pools: Sequence[Pool], costs: Sequence[float], total: float, profile: Tensor
    ) -> list[float]:
        """Return the units to remove per pool, before rounding."""
        last = max(len(profile) - 1, 1)
        rise = [1 + (self.steepness - 1) * (pool.layer or 0) / last for pool in pools]
        held = [cost * pool.units for cost, pool in zip(costs, pools, strict=True)]
        most = [cost * pool.removable(self.max_ratio)[-1] for cost, pool in zip(costs, pools, strict=True)]
        shares = water_fill([r * h for r, h in zip(rise, held, strict=True)], most, total)
        return [share / cost if cost else 0.0 for share, cost in zip(shares, costs, strict=True)]
