"""Subnets within a budget: what a search over widths and masks draws, mutates and crosses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TypeVar

import torch
from torch import Tensor

from kvp.strategies.allocation.pools import Pool
from kvp.types import Plan, Space

T = TypeVar("T")
Subnet = tuple[Tensor, ...]  # per pool (rows, units) boolean: what stays, equally many in every row


@dataclass(frozen=True)
class Subnets:
    """The subnets of some pools that remove an amount, as near as steps of the widths come to it.

    Attributes:
        pools: Units that compete; the first part of a pool scores them, per row.
        costs: Amount of the budget that one unit of each pool removes; a pool of cost 0 stays whole.
        widths: Units that each pool may keep, ascending.
        total: Amount to remove.
        generator: Draws everything.
    """

    pools: Sequence[Pool]
    costs: Sequence[float]
    widths: Sequence[Sequence[int]]
    total: float
    generator: torch.Generator

    def by_importance(self, widths: Sequence[int]) -> Subnet:
        """Return the subnet of the best units of every pool."""
        return tuple(
            resize(torch.zeros_like(pool.parts[0].scores, dtype=torch.bool), width, pool.parts[0].scores)
            for pool, width in zip(self.pools, widths, strict=True)
        )

    def mutate(
        self,
        subnet: Subnet,
        mask_probability: float,
        ratio_probability: float,
        *,
        overlap: float,
        redraw: bool,
    ) -> Subnet:
        """Return a subnet with new widths for some pools, and other units for some.

        Args:
            subnet: The subnet to mutate.
            mask_probability: Per pool, of other units (see `_other_units`).
            ratio_probability: Per pool, of a width drawn from all it may have.
            overlap: Least part of the units that new and old masks share.
            redraw: Whether a pool of a new width draws its units too; otherwise it loses those of the
                lowest importance, or gets back those of the highest.
        """
        old = _widths(subnet)
        wanted = [
            self.pick(allowed) if self._happens(ratio_probability) else width
            for width, allowed in zip(old, self.widths, strict=True)
        ]
        fitted = self._resized(subnet, self._fit(wanted))
        return tuple(
            self._other_units(mask, after, overlap)
            if (redraw and want != width) or self._happens(mask_probability)
            else after
            for mask, after, want, width in zip(subnet, fitted, wanted, old, strict=True)
        )

    def cross(self, first: Subnet, second: Subnet) -> Subnet:
        """Return a subnet that takes each pool from either parent."""
        child = tuple(a if self._happens(0.5) else b for a, b in zip(first, second, strict=True))
        return self._resized(child, self._fit(_widths(child)))

    def pick(self, options: Sequence[T]) -> T:
        """Return one of the options, drawn evenly."""
        return options[int(torch.randint(len(options), (), generator=self.generator))]

    def plan(self, subnet: Subnet) -> Plan:
        """Return the plan that keeps a subnet."""
        kept: dict[Space, Tensor] = {}
        for pool, mask in zip(self.pools, subnet, strict=True):
            if not mask.all():
                parts = tuple(replace(part, scores=mask.float()) for part in pool.parts)
                kept |= replace(pool, parts=parts).keep(int(mask[0].sum()))
        return Plan(kept)

    def _fit(self, widths: Sequence[int]) -> list[int]:
        """Bring widths to the budget by single steps of pools drawn at random."""
        found = list(widths)
        while True:
            removed = sum(c * (p.units - w) for c, p, w in zip(self.costs, self.pools, found, strict=True))
            missing = self.total - removed
            steps = []
            for pool, (width, allowed) in enumerate(zip(found, self.widths, strict=True)):
                place = allowed.index(width) + (-1 if missing > 0 else 1)
                if 0 <= place < len(allowed):
                    change = abs(self.costs[pool] * (width - allowed[place]))
                    if 1e-9 < change < 2 * abs(missing):  # nearer than before
                        steps.append((pool, allowed[place]))
            if not steps:
                return found
            pool, width = self.pick(steps)
            found[pool] = width

    def _resized(self, subnet: Subnet, widths: Sequence[int]) -> Subnet:
        return tuple(
            resize(mask, width, pool.parts[0].scores)
            for mask, width, pool in zip(subnet, widths, self.pools, strict=True)
        )

    def _other_units(self, old: Tensor, new: Tensor, overlap: float) -> Tensor:
        """Draw as many units per row as `new` has; they share at least `overlap` of what they could with `old`."""
        width = int(new[0].sum())
        return torch.stack([self._drawn(row, width, overlap) for row in old])

    def _drawn(self, old: Tensor, width: int, overlap: float) -> Tensor:
        inside, outside = int(old.sum()), int((~old).sum())
        # How many units old and new share is drawn first, as often as a uniform draw under the bound would give it:
        # in proportion to the number of masks that share so many.
        most = min(inside, width)
        shared = torch.arange(max(width - outside, math.ceil(overlap * most - 1e-9)), most + 1)
        ways = _log_binomial(inside, shared) + _log_binomial(outside, width - shared)
        kept = int(shared[torch.softmax(ways, 0).multinomial(1, generator=self.generator)])
        # Then which: a random order of the units inside the old mask, and one of those outside.
        order = torch.rand(len(old), generator=self.generator)
        row = torch.zeros_like(old)
        row[order.masked_fill(~old, -1).topk(kept).indices] = True
        row[order.masked_fill(old, -1).topk(width - kept).indices] = True
        return row

    def _happens(self, probability: float) -> bool:
        return torch.rand((), generator=self.generator).item() < probability


def name_of(subnet: Subnet) -> str:
    """Return a name that is the same for equal masks, and different for others."""
    return sha256(b"".join(mask.numpy().tobytes() for mask in subnet)).hexdigest()[:32]


def resize(mask: Tensor, width: int, scores: Tensor) -> Tensor:
    """Return a mask with `width` per row: without the units of the lowest scores, or with the highest again."""
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    order = (rank + mask.shape[-1] * ~mask).argsort(dim=-1)
    return torch.zeros_like(mask).scatter(-1, order[:, :width], True)


def _widths(subnet: Subnet) -> list[int]:
    return [int(mask[0].sum()) for mask in subnet]


def _log_binomial(n: int, k: Tensor) -> Tensor:
    k = k.double()
    return math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
