"""Wanda: zero the weights of the smallest weight times input norm, within each output row (arXiv:2306.11695).

No update of what stays, no gradient, one pass (ICLR 2024; `prune_wanda` in locuslab/wanda, `lib/prune.py`).

Formula
-------
    weight   |W_ij| ||X_j||_2,   X (tokens, in) the inputs of the matrix W (out, in)

In each row the int(sparsity in) lowest become zero, or by N:M the lowest of M consecutive inputs.

Faithful or interpreted
-----------------------
Faithful. Side by side, no mask differed, unstructured or N:M.

* The code's norm is a root mean square over sequences, which is one order with the norm.
* The code's `use_variant`, a share of each row's total score in place of a count, is not offered.

Cost
----
One forward pass, layer by layer, on the model pruned so far. Only a layer and the norms of its inputs are at work.
Shapes and bytes stay; only a storage of zeros saves memory.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from typing_extensions import override

from kvp.options import options
from kvp.strategies.signals.moments import Moments
from kvp.strategies.templates.sparse import Prune, SparseStrategy


@options
class Wanda(SparseStrategy):
    """Zero the weights that move their output least."""

    compare: Literal["row", "matrix"] = "row"

    @override
    def pruner(self, inputs: Moments | None) -> Prune:
        assert inputs is not None
        norms = inputs.squares.sqrt()

        def prune(weight: Tensor, ratio: float) -> Tensor:
            return weight.masked_fill(self.zeros(weight.abs() * norms, ratio), 0)

        return prune

    @override
    def workspace(self, rows: int, columns: int) -> int:
        """Count weight and result in float32, the score in float64, and what choosing takes."""
        return 48 * rows * columns
