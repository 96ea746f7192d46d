"""Numerical Pruning: ask how much of a column its layer's output needs, by Newton's method (arXiv:2412.12441).

The paper relaxes the mask z of the D columns of o_proj and of down_proj. A head is worth the mean z of its columns, a
neuron its z. One threshold over all layers cuts units, and least squares refit the kept columns.

Formula
-------
The mask asks for the least change of the output, with a penalty on the number of columns kept (ratio rho removed):

    min_z  1/2 sum_i ||X W_i - X (z * W_i)||^2 + lambda/2 (1^T z - (1 - rho) D)^2,   W_i row i of W

In the paper 50 Newton steps solve it. The problem is quadratic, so one exact step does:

    gradient   K (z - 1) + lambda (1^T z - (1 - rho) D) 1,   K = (W^T W) o (X^T X)
    solution   z = 1 - rho D lambda u / (1 + lambda 1^T u),   u = K^-1 1

Faithful or interpreted
-----------------------
The formulas are faithful; details are interpreted. There is no public code. Ours, where the paper says nothing we could
read:

* lambda: infinity, at which the constraint holds exactly and neither lambda nor the scale of X matters.
  The score is then (z - 1) / rho = -D u / 1^T u: every projection's mean is -1, and rho, common to all,
  changes no ranking. The box 0 <= z <= 1 is not enforced, as the paper's update does not enforce it.
* The threshold: the paper's alpha = 4 d_h / 3 is read as how many neurons a head counts for
  (`allocator=threshold`). As a factor of its score it would protect all attention. KV groups take the place of heads,
  the ratio's denominator that of parameters (under kv_cache, neurons stay).
* K is damped by 1e-6 of its diagonal and of the diagonal's mean; the ridge of the refit is
  `compensation.ridge` (the paper adds gamma I if singular). X is the dense model's. The refit has no intercept
  (`compensation=least_squares_no_bias`).

Cost
----
One forward pass, layer by layer, and one Cholesky factorisation of the size of the MLP per layer. The refit takes a
second pass. A layer's X^T X is in memory in float64. No gradient.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator, Global
from kvp.strategies.compensation.compensate import Compensation, LeastSquares
from kvp.strategies.signals.moments import TINY, Moments
from kvp.strategies.templates.projections import ProjectionStrategy
from kvp.types import Kind

DAMPING = 1e-6  # of K's diagonal, and of its mean


@options
class Numerical(ProjectionStrategy):
    """Cut KV groups and neurons by the optimal soft mask of the columns of o_proj and down_proj."""

    needs_covariance: ClassVar[bool] = True

    allocator: Allocator = Global(multiple_of=1, max_ratio=1.0, per_cost=False)
    compensation: Compensation | None = LeastSquares(intercept=False)

    @override
    def columns(self, kind: Kind, weight: Tensor, inputs: Moments) -> Tensor:
        """Return (in,) (z - 1) / rho, whose mean is -1."""
        curvature = (weight.T @ weight) * (inputs.gram / inputs.count)
        diagonal = curvature.diagonal()
        damping = DAMPING * (diagonal + diagonal.mean()).clamp(min=TINY)  # of a layer that writes nothing
        ones = torch.ones_like(diagonal)[:, None]
        needless = torch.cholesky_solve(ones, torch.linalg.cholesky(curvature + damping.diag()))[:, 0]
        return -needless / needless.mean()
