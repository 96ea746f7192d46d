"""ALPS: find the best sparse weights for a layer's outputs by ADMM, then least squares (arXiv:2406.07831).

ADMM finds a support, and conjugate gradients refit the weights on it (NeurIPS 2024, with the constants of
mazumder-lab/ALPS, `alps.py`).

Formula
-------
The weights V of a matrix W (out, in) with inputs X (tokens, in) minimise, with the wanted zeros,

    ||X V^T - X W^T||^2 + damping d ||V - W||^2,   d the mean of the diagonal of X^T X

With H = X^T X + damping d I scaled to a diagonal of ones, W alike, and P keeping the largest weights of the matrix:

    B = (W H - V + rho D) (H + rho I)^-1,    D = P(B + V / rho),    V = V + rho (B - D)

from D = P(W), V = 0 and rho = 0.1, by one eigendecomposition of H. Every 3 steps rho grows by a factor that depends
on how much of the support has changed:

    more than 10 %   1.3
    more than 0.5 %  1.2
    any              1.1
    none             the end

While no such change was seen, rho was too large: it falls to a fifth, and a support that moved starts anew. The
iteration also ends after 300 steps, or after 30 once the change is below 0.03 %. On the support of P(B), 10 steps of
conjugate gradients for all rows at once lower the same objective.

Faithful or interpreted
-----------------------
Faithful to the code. In float64 the masks agree; in float32 both sides differ from their own float64 by as much.

* The paper damps by the trace of X^T X, the code by the mean of its diagonal: here the code's.
* The paper's preconditioner is the diagonal of H, here one.
* The number of zeros is rounded down. The code rounds the number kept, which can differ by one weight.
* The code's stop of the conjugate gradients, which waits for the residual outside the support too, is left out.
* Equal weights go in the order of their columns.

Cost
----
One forward pass, layer by layer, on the model pruned so far. One eigendecomposition and up to 300 products of matrices
for each matrix. Shapes and bytes stay; only a storage of zeros saves memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.options import options
from kvp.strategies.signals.moments import TINY, Moments
from kvp.strategies.templates.sparse import Prune, SparseStrategy

INTERVAL = 3  # steps between two looks at the support
GROWTH = ((0.1, 1.3), (0.005, 1.2))  # more than this part of the support changed: rho times that
SLOW_GROWTH, FALL = 1.1, 1 / 5
LARGEST_RHO = 1e6
SETTLED = 30, 3e-4  # steps, and the change of the support after them that ends it


@options
class ALPS(SparseStrategy):
    """Zero weights by ADMM, and refit the others.

    Attributes:
        damping: Added to the diagonal of X^T X, relative to the mean of that diagonal.
        rho: Weight of the constraint at the start.
        max_steps: Steps of ADMM at most.
        refit_steps: Steps of conjugate gradients.
    """

    late: ClassVar[tuple[str, ...]] = (*SparseStrategy.late, "damping", "rho", "max_steps", "refit_steps")
    needs_covariance: ClassVar[bool] = True

    compare: Literal["matrix", "row"] = "matrix"
    damping: float = Field(default=0.01, gt=0, description="relative to the mean of the diagonal of X^T X")
    rho: float = Field(default=0.1, gt=0, description="the weight of the constraint at the start")
    max_steps: int = Field(default=300, ge=0, description="steps of ADMM")
    refit_steps: int = Field(default=10, ge=0, description="steps of conjugate gradients")

    @override
    def pruner(self, inputs: Moments | None) -> Prune:
        assert inputs is not None
        hessian = inputs.gram
        hessian.diagonal().add_(self.damping * hessian.diagonal().mean().clamp(min=TINY))
        scale = hessian.diagonal().sqrt()
        hessian /= scale * scale[:, None]
        values, vectors = torch.linalg.eigh(hessian)

        def prune(weight: Tensor, ratio: float) -> Tensor:
            problem = Problem(*(part.to(weight.dtype) for part in (weight * scale, hessian, values, vectors)))
            dense = self._admm(problem, ratio)
            keep = ~self.zeros(dense.abs(), ratio)
            return problem.refit(dense * keep, keep, self.refit_steps) / scale.to(weight.dtype)

        return prune

    @override
    def workspace(self, rows: int, columns: int) -> int:
        """Count H, LAPACK's decomposition and workspace in float64, H and inverses in float32, the steps' weights."""
        return 72 * columns**2 + 84 * rows * columns

    def _admm(self, problem: Problem, ratio: float) -> Tensor:
        """Return B after the last step of ADMM."""

        def project(weight: Tensor) -> tuple[Tensor, Tensor]:
            keep = ~self.zeros(weight.abs(), ratio)
            return weight * keep, keep

        rho, grown = self.rho, False
        dense = problem.weight
        sparse, support = project(dense)
        dual, inverse = torch.zeros_like(dense), problem.inverse(rho)
        start, size = sparse, max(1, int(support.sum()))
        for step in range(1, self.max_steps + 1):
            dense = (problem.goal - dual + rho * sparse) @ inverse  # B = (W H - V + rho D) (H + rho I)^-1
            sparse, keep = project(dense + dual / rho)  # D = P(B + V / rho)
            dual = dual + rho * (dense - sparse)  # V = V + rho (B - D)
            if step % INTERVAL:
                continue
            change, support = int((support != keep).sum()) / size, keep
            if grown and not change:  # the support stands
                break
            factor = next((f for part, f in GROWTH if change > part), SLOW_GROWTH if grown else FALL)
            if factor == FALL and change:  # rho began too large, and moved the support: start anew
                sparse, dual = start, torch.zeros_like(dual)
            grown = factor != FALL
            rho = min(rho * factor, LARGEST_RHO)
            inverse = problem.inverse(rho)
            if step > SETTLED[0] and change < SETTLED[1]:
                break
        return dense


@dataclass(frozen=True)
class Problem:
    """The problem min over V of tr (V - W) H (V - W)^T.

    Attributes:
        weight: W, (out, in).
        hessian: H, (in, in) of diagonal one.
        values: (in,) its eigenvalues.
        vectors: (in, in) its eigenvectors, columns.
    """

    weight: Tensor
    hessian: Tensor
    values: Tensor
    vectors: Tensor

    @cached_property
    def goal(self) -> Tensor:
        """Return W H."""
        return self.weight @ self.hessian

    def inverse(self, rho: float) -> Tensor:
        """Return (H + rho I)^-1."""
        return (self.vectors / (self.values + rho)) @ self.vectors.T

    def refit(self, start: Tensor, keep: Tensor, steps: int) -> Tensor:
        """Return `start` after `steps` of conjugate gradients on the support `keep`, row by row."""
        solution, residual = start, (self.goal - start @ self.hessian) * keep
        direction, square = residual, residual.square().sum(1, keepdim=True)
        for _ in range(steps):
            image = direction @ self.hessian
            length = square / (direction * image).sum(1, keepdim=True).clamp(min=TINY)
            solution = solution + length * direction
            residual = (residual - length * image) * keep
            before, square = square, residual.square().sum(1, keepdim=True)
            direction = residual + square / before.clamp(min=TINY) * direction
        return solution
