"""Optimal Brain Surgeon, column by column, with one Hessian for all rows: SparseGPT's solver.

As `fasterprune` in IST-DASLab/sparsegpt (`sparsegpt.py`, arXiv:2301.00774). The Hessian of ||X W^T - X V^T||^2 for
every row is H = X^T X (damped). With the upper Cholesky factor U of its inverse, H^-1 = U^T U, U_jj^2 is
[(H_j:,j:)^-1]_00: the inverse Hessian once the columns before j are settled. For the columns from left to right, a
weight that goes costs W_ij^2 / U_jj^2, and what it takes from the output is made up for by the columns to its
right, W_i,j: -= W_ij / U_jj U_j,j:. Kept weights of settled columns stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.options import options
from kvp.strategies.signals.moments import TINY, Moments
from kvp.strategies.templates.selection import Pattern
from kvp.strategies.templates.sparse import Prune, SparseStrategy


@options
class SurgeonStrategy(SparseStrategy):
    """Zero weights column by column, with updates of the columns that follow.

    Attributes:
        compare: Which weights compete: those of a "block" of columns, or of each "row" of a block.
        block_size: Columns of a block.
        damping: Added to the diagonal of X^T X, relative to the mean of that diagonal.
    """

    late: ClassVar[tuple[str, ...]] = (*SparseStrategy.late, "block_size", "damping")
    needs_covariance: ClassVar[bool] = True

    compare: Literal["block", "row"] = "block"
    block_size: int = Field(default=128, ge=1, description="columns")
    damping: float = Field(default=0.01, gt=0, description="relative to the mean of the diagonal of X^T X")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups and self.block_size % self.groups.of:
            raise ValueError(
                f"strategy.block_size must be a multiple of the {self.groups.of} of strategy.pattern="
                f"{self.pattern}, got {self.block_size}"
            )

    @override
    def pruner(self, inputs: Moments | None) -> Prune:
        assert inputs is not None
        gram = inputs.gram
        silent, factor = gram.diagonal() == 0, inverse_factor(gram, self.damping)
        del gram

        def prune(weight: Tensor, ratio: float) -> Tensor:
            return pruned_by_columns(
                weight.masked_fill(silent, 0),
                factor.to(weight.dtype),
                lambda scores: self.zeros(scores, ratio),
                self.groups,
                self.block_size,
            )

        return prune

    @override
    def count(self, rows: int, columns: int, ratio: float) -> int:
        widths = [min(self.block_size, columns - start) for start in range(0, columns, self.block_size)]
        return sum(super(SurgeonStrategy, self).count(rows, width, ratio) for width in widths)

    @override
    def workspace(self, rows: int, columns: int) -> int:
        """Count X^T X damped, inverted, factored and copied by LAPACK, three weights, a block, and the choice in it."""
        return 48 * columns**2 + 12 * rows * columns + 48 * rows * self.block_size


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Return U (in, in), float64, with H^-1 = U^T U.

    Args:
        gram: X^T X, (in, in) float64.
        damping: Added to its diagonal, relative to the diagonal's mean.
    """
    mean = gram.diagonal().mean().clamp(min=TINY)
    damped = gram.clone()
    damped.diagonal().add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def pruned_by_columns(
    weight: Tensor,
    factor: Tensor,
    choose: Callable[[Tensor], Tensor],
    groups: Pattern | None,
    block_size: int,
) -> Tensor:
    """Return the pruned weight (out, in).

    Args:
        weight: (out, in)
        factor: U, in the dtype of the weight.
        choose: Maps scores (out, block), or (out, M) with `groups`, to a boolean mask of those that go.
        groups: N:M, chosen as the columns are reached; None: chosen per block of columns.
        block_size: Columns per block; those after it are updated when it is settled.
    """
    weight, diagonal = weight.clone(), factor.diagonal()
    for start in range(0, weight.shape[1], block_size):
        block = slice(start, min(start + block_size, weight.shape[1]))
        columns, inner = weight[:, block], factor[block, block]
        errors, gone = torch.zeros_like(columns), torch.zeros_like(columns, dtype=torch.bool)
        if groups is None:  # choose in the whole block: cost W_ij^2 / U_jj^2
            gone = choose((columns / diagonal[block]).square())
        for j in range(columns.shape[1]):
            if groups and j % groups.of == 0:  # choose in the next M columns, by weights as updated so far
                run = slice(j, j + groups.of)
                gone[:, run] = choose((columns[:, run] / diagonal[block][run]).square())
            errors[:, j] = columns[:, j].masked_fill(~gone[:, j], 0) / inner[j, j]
            columns[:, j:].addr_(errors[:, j], inner[j, j:], alpha=-1)  # W_i,j: -= W_ij / U_jj U_j,j:
        columns.masked_fill_(gone, 0)  # rounding leaves them near zero
        weight[:, block.stop :].addmm_(errors, factor[block, block.stop :], alpha=-1)
    return weight
