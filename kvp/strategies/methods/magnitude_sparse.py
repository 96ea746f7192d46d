"""Magnitude, sparse: set the smallest weights of each matrix to zero.

This is the usual baseline, `prune_magnitude` in locuslab/wanda (`lib/prune.py`): one threshold per matrix, the same
sparsity in all; N:M in each row. No data, no update.

Formula
-------
    weight   |W_ij|,   the int(sparsity numel) smallest of a matrix (compare=row: of a row) become zero

`compare=row` is the better known variant (LLaMA-7B at 50 %: 13.4 in place of 17.3 on WikiText-2).

Faithful or interpreted
-----------------------
Faithful. Exactly int(sparsity numel) weights go, where the code also takes those that equal the threshold; a
dequantised model has many equal ones.

Cost
----
Nothing but sorting the weights, a matrix at a time. Shapes and bytes stay; only a storage of zeros saves memory.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from kvp.options import options
from kvp.strategies.signals.moments import Moments
from kvp.strategies.templates.sparse import Prune, SparseStrategy


@options
class MagnitudeSparse(SparseStrategy):
    """Zero the smallest weights."""

    needs_calibration: ClassVar[bool] = False

    compare: Literal["matrix", "row"] = "matrix"

    @override
    def pruner(self, inputs: Moments | None) -> Prune:

        def prune(weight: Tensor, ratio: float) -> Tensor:
            return weight.masked_fill(self.zeros(weight.abs(), ratio), 0)

        return prune

    @override
    def workspace(self, rows: int, columns: int) -> int:
        """Count weight, score and result in float32, and what choosing takes."""
        return 40 * rows * columns
