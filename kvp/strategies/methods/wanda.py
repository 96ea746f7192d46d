"""Wanda: weights times the norms of their inputs, compared within each output row.

arXiv:2306.11695 (ICLR 2024); `prune_wanda` in locuslab/wanda, `lib/prune.py`. With the inputs X (tokens, in)
of a matrix W (out, in), the score of a weight is |W_ij| ||X_j||_2. Of each row the int(sparsity in) lowest
become zero, or by N:M the lowest of M consecutive inputs. No update of what stays, no gradient, one pass.

The code's norm is a root mean square over sequences, which is the same order. Its `use_variant` (a share of
each row's total score in place of a count) is not here.
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
