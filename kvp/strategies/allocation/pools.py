"""Pools: sets of units that compete for one width.

The rope pairs of a layer, its FFN channels, all blocks of the model: a strategy says which units
compete, an allocator how many of them stay, and the pool which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvp.types import Space


def _same(indices: Tensor) -> Tensor:
    return indices


@dataclass(frozen=True)
class Part:
    """One space of a pool: the best `per_unit` of `scores` stay per unit kept.

    Attributes:
        space: The space that is cut.
        scores: (rows, candidates) higher = kept; one row per KV group, or a single row.
        per_unit: Candidates kept with one unit of the pool.
        expand: Maps kept candidates (rows, kept) to the indices of the space, where they differ.
    """

    space: Space
    scores: Tensor
    per_unit: int = 1
    expand: Callable[[Tensor], Tensor] = _same

    def keep(self, units: int) -> Tensor:
        """Return the sorted indices of the space that stay; among equals the lower index stays."""
        order = self.scores.argsort(dim=-1, descending=True, stable=True)
        kept = self.expand(order[:, : units * self.per_unit]).sort(dim=-1).values
        return kept if len(self.space.shape) > 1 else kept[0]


@dataclass(frozen=True)
class Pool:
    """Units that compete for one width, possibly of several spaces at once.

    Attributes:
        parts: The spaces cut; all of them keep the same number of units.
        units: Number of units.
        step: Kept units are a multiple of this (or all of them).
        layer: The layer they belong to, None if the pool lies across layers.
        least: Number of units that stay at least.
    """

    parts: tuple[Part, ...]
    units: int
    step: int = 1
    layer: int | None = None
    least: int = 1

    def keep(self, units: int) -> dict[Space, Tensor]:
        """Return the indices that stay when `units` units are kept."""
        return {part.space: part.keep(units) for part in self.parts}

    def losses(self) -> Tensor:
        """Return (units,) what the first, second, ... removed unit costs in score: ascending."""
        total = torch.zeros(self.units)
        for part in self.parts:
            ascending = part.scores.float().sort(dim=-1).values
            total += ascending.view(len(ascending), self.units, -1).sum(dim=(0, 2)).cpu()
        return total

    def removable(self, max_ratio: float) -> list[int]:
        """Return the numbers of units that may be removed, ascending from 0."""
        least = max(self.units * (1 - max_ratio) - 1e-9, self.least)
        kept = [k for k in range(self.step, self.units, self.step) if k >= least]
        return [0] + [self.units - k for k in reversed(kept)]
