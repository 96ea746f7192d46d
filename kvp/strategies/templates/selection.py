"""Selection of the weights of a matrix that go, among those they are compared with.

An N:M pattern keeps N of every M consecutive inputs of a row: N counts the *nonzeros*, as in 2:4 (Wanda's and
SparseGPT's `prune_n` counts those removed, ALPS' `nm_n` those kept).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class Pattern:
    """An N:M pattern: `kept` of every `of` consecutive inputs of a row stay."""

    kept: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        """Return the pattern of a text such as "2:4"; None for "unstructured".

        Raises:
            ValueError: It is neither.
        """
        if text == UNSTRUCTURED:
            return None
        found = re.fullmatch(r"(\d+):(\d+)", str(text))
        if not found or not 0 < int(found[1]) < int(found[2]):
            raise ValueError(
                f'strategy.pattern must be {UNSTRUCTURED}, or "N:M" in quotes with 0 < N < M, such as "2:4": N of '
                f"M consecutive weights stay; got {text!r}"
            )
        return cls(int(found[1]), int(found[2]))

    @property
    def sparsity(self) -> float:
        """Return the fraction of zeros."""
        return 1 - self.kept / self.of

    def lowest(self, scores: Tensor) -> Tensor:
        """Return (rows, columns) boolean: what goes of each run of `of` columns."""
        return lowest(scores.unflatten(-1, (-1, self.of)), self.of - self.kept).flatten(-2)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return a boolean mask of the `count` lowest along the last axis; of equal ones the first."""
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = scores.kthvalue(count, dim=-1, keepdim=True).values  # five times as fast as sorting
    lower, equal = scores < last, scores == last
    return lower | (equal & (equal.cumsum(-1) <= count - lower.sum(-1, keepdim=True)))


def share(ratio: float, count: int) -> int:
    """Return int(ratio * count), safe from rounding: 0.29 * 100 is 29, not 28."""
    return int(ratio * count + 1e-6)
