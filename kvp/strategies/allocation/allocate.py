"""Allocators: units to keep in each pool, so that the whole meets the budget.

An allocator turns the budget into a number of units per pool. The scores then say which units stay (`Pool.keep`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.shapes import cut, layer_shapes, size
from kvp.options import options
from kvp.strategies.allocation.pools import Pool
from kvp.types import Budget, Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LEAST_WEIGHT = 1e-30  # of the largest


@options
class Allocator(ABC):
    """Turn a budget into a number of units to keep per pool: exactly, or not at all.

    Attributes:
        multiple_of: Channel widths (qk, vo, ffn) are multiples of this; attention kernels want 8.
        max_ratio: No pool loses more than this fraction.
    """

    node: ClassVar[str] = "strategy.allocator"

    multiple_of: int = Field(default=8, ge=1, description="widths are multiples of it")
    max_ratio: float = Field(default=0.75, gt=0, le=1, description="the fraction that a pool may lose")

    @abstractmethod
    def targets(
        self, pools: Sequence[Pool], costs: Sequence[float], total: float, profile: Tensor
    ) -> list[float]:
        """Return the units to remove per pool, before rounding.

        Args:
            pools: The pools.
            costs: Amount of the denominator that one unit of each pool removes.
            total: Amount to remove.
            profile: (layers,) sensitivity of each layer, higher = more is lost without it; zeros if
                the allocator asks for none.
        """

    def allocate(
        self, config: PretrainedConfig, pools: Sequence[Pool], budget: Budget, profile: Tensor
    ) -> list[int]:
        """Return the units to keep per pool.

        Raises:
            ValueError: The budget cannot be met within its tolerance; names the nearest that can.
        """
        dense = size(config, layer_shapes(config)).count(budget.of)
        costs = [unit_cost(config, pool, budget) for pool in pools]
        choices = [pool.removable(self.max_ratio) for pool in pools]
        total = budget.value * dense
        limit = sum(cost * allowed[-1] for cost, allowed in zip(costs, choices, strict=True))
        wanted = self.targets(pools, costs, min(total, limit), profile)
        removed = rounded_to_budget(wanted, choices, costs, total, [pool.losses() for pool in pools])
        achieved = sum(cost * n for cost, n in zip(costs, removed, strict=True)) / dense
        if abs(achieved - budget.value) > budget.tolerance:
            reachable = limit / dense
            ask = f"Ask for ratio.value={achieved:.4f}, or change" if achieved else "Change"
            raise ValueError(
                f"ratio.value={budget.value} of {budget.of} cannot be reached by this strategy on this "
                f"model: the nearest is {achieved:.4f} (at most {reachable:.4f}; max_ratio={self.max_ratio}, "
                f"multiple_of={self.multiple_of}). {ask} ratio.of, "
                "strategy.allocator.max_ratio, strategy.allocator.multiple_of or ratio.tolerance"
            )
        return [pool.units - n for pool, n in zip(pools, removed, strict=True)]


def unit_cost(config: PretrainedConfig, pool: Pool, budget: Budget) -> float:
    """Return how much of the denominator one unit of a pool removes. It is exact: sizes are linear in each width."""
    shapes = layer_shapes(config)
    fewest = min(pool.step, pool.units)
    smaller = size(config, cut(shapes, Plan(pool.keep(fewest)))).count(budget.of)
    return (size(config, shapes).count(budget.of) - smaller) / max(pool.units - fewest, 1)


def water_fill(weights: Sequence[float], capacities: Sequence[float], total: float) -> list[float]:
    """Return shares proportional to `weights`, clipped at `capacities`, that sum to `total`.

    What a clipped pool cannot take goes to the others; the level is found by bisection.
    """
    if total >= sum(capacities):
        return list(capacities)

    def filled(level: float) -> list[float]:
        return [min(level * w, c) for w, c in zip(weights, capacities, strict=True)]

    low, high = 0.0, max(c / w for w, c in zip(weights, capacities, strict=True) if w > 0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(filled(middle)) < total else (low, middle)
    return filled(high)


def rounded_to_budget(
    wanted: Sequence[float],
    choices: Sequence[Sequence[int]],
    costs: Sequence[float],
    total: float,
    losses: Sequence[Tensor],
) -> list[int]:
    """Round `wanted` removals to allowed ones so that their cost comes as near to `total` as steps allow.

    Every pool starts at the allowed number below its target; further steps go to the pool that is
    furthest below its target, and among equals to the one whose next step costs the least score.
    """
    at = [  # per pool, the place in `choices`
        max(i for i, n in enumerate(allowed) if n <= want + 1e-6)
        for want, allowed in zip(wanted, choices, strict=True)
    ]
    spent = sum(cost * allowed[i] for cost, allowed, i in zip(costs, choices, at, strict=True))
    while True:
        steps = []
        for pool, (want, allowed) in enumerate(zip(wanted, choices, strict=True)):
            if at[pool] + 1 < len(allowed):
                now, after = allowed[at[pool]], allowed[at[pool] + 1]
                cost = costs[pool] * (after - now)
                if (
                    cost > 0 and spent + cost / 2 <= total + 1e-6
                ):  # the step brings the sum nearer to the total
                    deficit = round((want - now) / (after - now), 9)
                    steps.append((-deficit, float(losses[pool][now:after].sum()), pool, cost))
        if not steps:
            return [allowed[i] for allowed, i in zip(choices, at, strict=True)]
        _, _, pool, cost = min(steps)
        at[pool] += 1
        spent += cost


@options
class Uniform(Allocator):
    """Remove one fraction everywhere."""

    @override
    def targets(
        self, pools: Sequence[Pool], costs: Sequence[float], total: float, profile: Tensor
    ) -> list[float]:
        return _by_weight([1.0] * len(pools), self, pools, costs, total)


@options
class Global(Allocator):
    """One ranking over all pools: the units of the lowest score go first.

    Attributes:
        per_cost: Rank by score per amount of the budget that a unit removes; false: by the score itself,
            whatever the unit (LLM-Pruner's `global_pruning`).
    """

    per_cost: bool = True

    @override
    def targets(
        self, pools: Sequence[Pool], costs: Sequence[float], total: float, profile: Tensor
    ) -> list[float]:
        units = [
            (loss / (cost if self.per_cost else 1), pool, cost)
            for pool, cost in enumerate(costs)
            if cost > 0
            for loss in pools[pool].losses()[: pools[pool].removable(self.max_ratio)[-1]].tolist()
        ]
        removed = [0.0] * len(pools)
        for _, pool, cost in sorted(units):
            if total < cost:
                break
            removed[pool] += 1
            total -= cost
        return removed


@options
class Sensitivity(Allocator):
    """KVPruner's phase A: a block gives up less if the loss rises more without its KV.

    The paper (arXiv 2409.11057, figures 2 and 3) says that perplexity is the signal, and that the probe removes the
    KV of one block. The rule from sensitivities to ratios is our reconstruction:
    `r_n = clip(level * w_n, 0, max_ratio)`, with `w_n = (S_n + epsilon) ** -temperature` ("inverse") or
    `softmax(-S_n / temperature)` ("softmax"), and the level that meets the budget.

    Attributes:
        rule: "inverse" or "softmax".
        temperature: Exponent of "inverse" (0 = uniform), temperature of "softmax" (large = uniform).
        epsilon: Added to S (nats per token), for blocks whose removal costs nothing.
        probe: "attention" removes the whole attention of one block, "partial" only `probe_ratio` of
            its units, those of the lowest score.
        probe_ratio: Fraction removed by the partial probe.
        probe_samples: Calibration samples to probe on, the first ones; None for all.
    """

    rule: Literal["inverse", "softmax"] = "inverse"
    temperature: float = Field(default=0.75, ge=0, description="0 is uniform with rule=inverse")
    epsilon: float = Field(default=0.01, gt=0, description="nats per token, added to every sensitivity")
    probe: Literal["attention", "partial"] = "attention"
    probe_ratio: float = Field(
        default=0.5, gt=0, le=1, description="the fraction that the partial probe removes"
    )
    probe_samples: int | None = Field(
        default=None, ge=1, description="null probes on all calibration samples"
    )

    def __post_init__(self) -> None:
        if self.rule == "softmax" and self.temperature == 0:
            raise ValueError(
                "strategy.allocator.temperature must be > 0 with strategy.allocator.rule=softmax, got 0: it divides"
            )

    def weights(self, profile: Tensor) -> list[float]:
        """Return (layers,) weights from sensitivities S_n = NLL without block n - NLL, in nats per token.

        The largest is 1, and none is 0: where the others are full, the rest of a budget has a place to go.
        """
        sensitivity = profile.double().clamp(min=0)
        if self.rule == "softmax":
            logs = -sensitivity / self.temperature
        else:
            logs = -self.temperature * (sensitivity + self.epsilon).log()
        return (logs - logs.max()).exp().clamp(min=LEAST_WEIGHT).tolist()

    @override
    def targets(
        self, pools: Sequence[Pool], costs: Sequence[float], total: float, profile: Tensor
    ) -> list[float]:
        weights = self.weights(profile)
        by_pool = [math.fsum(weights) / len(weights) if p.layer is None else weights[p.layer] for p in pools]
        return _by_weight(by_pool, self, pools, costs, total)


def _by_weight(
    weights: Sequence[float],
    allocator: Allocator,
    pools: Sequence[Pool],
    costs: Sequence[float],
    total: float,
) -> list[float]:
    """Return the units to remove so that the *ratio* of each pool is proportional to its weight."""
    amounts = [cost * pool.units for cost, pool in zip(costs, pools, strict=True)]
    capacities = [c * p.removable(allocator.max_ratio)[-1] for c, p in zip(costs, pools, strict=True)]
    shares = water_fill([w * a for w, a in zip(weights, amounts, strict=True)], capacities, total)
    return [share / cost if cost else 0.0 for share, cost in zip(shares, costs, strict=True)]
