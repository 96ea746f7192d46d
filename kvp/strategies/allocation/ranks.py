"""Allocators of ranks: how methods of low rank divide a budget among the layers' keys and values.

A unit is one channel of every latent of a layer, and a pool's scores are the squares E_j^2 of `LatentStrategy`.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Iterator, Sequence

from torch import Tensor
from typing_extensions import override

from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator, water_fill
from kvp.strategies.allocation.pools import Pool

TINY = 1e-12  # of a pool's energy, and of a logarithm: the least that is divided by


@options
class Proportional(Allocator):
    """Keep units in proportion to the sum of a pool's scores, as Palu divides ranks by Fisher information."""

    @override
    def targets(
        self, pools: Sequence[Pool], costs: Sequence[float], total: float, profile: Tensor
    ) -> list[float]:
        amounts = [cost * pool.units for cost, pool in zip(costs, pools, strict=True)]
        weights = [float(pool.losses().double().sum()) for pool in pools]
        if not any(weights):  # nothing tells the pools apart
            weights = amounts
        kept = water_fill(weights, amounts, sum(amounts) - total)
        return [
            (amount - stays) / cost if cost else 0.0
            for amount, stays, cost in zip(amounts, kept, costs, strict=True)
        ]


@options
class TruncationLoss(Allocator):
    """SVD-LLM v2's rule: a pool's ratio is inverse to the logarithm of what it would lose under the average one.

    Pools of one kind share the budget's ratio R. With L the root of the energy that R takes from a pool, the ratio of
    the pool is in proportion to 1 / log(1 + L).
    """

    @override
    def targets(
        self, pools: Sequence[Pool], costs: Sequence[float], total: float, profile: Tensor
    ) -> list[float]:
        removed = [0.0] * len(pools)
        for alike, amount in _kinds(pools, costs, total):
            held = [costs[i] * pools[i].units for i in alike]
            ratio = amount / sum(held)
            losses = [float(pools[i].losses()[: round(ratio * pools[i].units)].sum()) for i in alike]
            weights = [
                each / max(math.log1p(math.sqrt(loss)), TINY) for each, loss in zip(held, losses, strict=True)
            ]
            most = [costs[i] * pools[i].removable(self.max_ratio)[-1] for i in alike]
            for i, share in zip(alike, water_fill(weights, most, amount), strict=True):
                removed[i] = share / costs[i]
        return removed


@options
class Residual(Allocator):
    """CARE-E's rule: rank by rank to the layer whose residual falls most, early layers and low ranks first.

    Keys and values share the budget's ratio. Every pool begins with half of the average rank and ends below twice of
    it. The gain of rank r + 1 in layer n of N is E_r+1^2 / (energy beyond r) * (2 (N - n) / (N + 1))^(1/2) /
    (r / first rank)^(1/2), with n from 0.
    """

    @override
    def targets(
        self, pools: Sequence[Pool], costs: Sequence[float], total: float, profile: Tensor
    ) -> list[float]:
        removed = [0.0] * len(pools)
        for alike, amount in _kinds(pools, costs, total):
            held = sum(costs[i] * pools[i].units for i in alike)
            left, ratio = held - amount, 1 - amount / held
            least = {i: max(1, int(pools[i].units * ratio) // 2) for i in alike}
            gains = {i: self._gains(pools[i], least[i], len(profile)) for i in alike}
            ranks, waiting = dict(least), list[tuple[float, int]]()
            for i in alike:
                left -= costs[i] * least[i]
                heapq.heappush(waiting, (-next(gains[i]), i))
            while waiting and left > 0:
                _, i = heapq.heappop(waiting)
                if ranks[i] >= min(pools[i].units, 2 * int(pools[i].units * ratio)):
                    continue
                ranks[i] += 1
                left -= costs[i]
                heapq.heappush(waiting, (-next(gains[i], 0.0), i))
            for i in alike:
                removed[i] = pools[i].units - ranks[i]
        return [float(units) for units in removed]

    def _gains(self, pool: Pool, first: int, layers: int) -> Iterator[float]:
        """Yield what each rank after `first` gains."""
        ascending = pool.losses().double()
        energies, beyond = ascending.flip(0), ascending.cumsum(0).flip(0)  # of each rank, and from it on
        assert pool.layer is not None
        horizon = math.sqrt(2 * (layers - pool.layer) / (layers + 1))
        least = max(TINY * beyond[0].item(), sys.float_info.min)  # no energy is no gain
        gains = energies / beyond.clamp(min=least) * horizon
        for rank in range(first, pool.units):
            yield gains[rank].item() / math.sqrt(rank / first)


def _kinds(pools: Sequence[Pool], costs: Sequence[float], total: float) -> Iterator[tuple[list[int], float]]:
    """Yield the pools of each kind that cost something, with their part of the amount to remove."""
    paid = [i for i, cost in enumerate(costs) if cost > 0]
    held = sum(costs[i] * pools[i].units for i in paid)
    for kind in dict.fromkeys(pools[i].parts[0].space.kind for i in paid):
        alike = [i for i in paid if pools[i].parts[0].space.kind == kind]
        yield alike, total * sum(costs[i] * pools[i].units for i in alike) / held
