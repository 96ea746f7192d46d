"""SparseGPT: each matrix pruned so that its outputs change least, the kept weights making up for the others.

arXiv:2301.00774 (ICML 2023); `fasterprune` in IST-DASLab/sparsegpt (`sparsegpt.py`), which locuslab/wanda
copies; `kvp.strategies.obs` says how. Unstructured, int(sparsity) of all weights of each block of 128 columns
go, chosen when the block is reached, by the weights as updated so far; N:M is chosen as every M columns are.

Otherwise than there: exactly that many go, where the code takes one more and those that equal it; the
factorisation is in float64; an input that is always zero counts as such in the mean that damps H, where the
code sets it to one. The order (q, k, v), o, (gate, up), down of `true_sequential`, off by default, is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvp.strategies.moments import Moments
from kvp.strategies.obs import inverse_factor, settle
from kvp.strategies.sparse import Prune, SparseStrategy


@dataclass(frozen=True, kw_only=True)
class SparseGPT(SparseStrategy):
    """Zeroes weights column by column, with updates.

    Attributes:
        block_size: Columns whose weights compete (`compare=row`: within each row).
        damping: Of X^T X, relative to the mean of its diagonal.
    """

    late: ClassVar[tuple[str, ...]] = (*SparseStrategy.late, "block_size", "damping")
    comparisons: ClassVar[tuple[str, ...]] = ("block", "row")
    needs_covariance: ClassVar[bool] = True

    compare: str = "block"
    block_size: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1:
            raise ValueError(f"strategy.block_size must be >= 1, got {self.block_size}")
        if self.groups and self.block_size % self.groups.of:
            raise ValueError(
                f"strategy.block_size must be a multiple of the {self.groups.of} of strategy.pattern="
                f"{self.pattern}, got {self.block_size}"
            )
        if not self.damping > 0:
            raise ValueError(f"strategy.damping must be > 0, got {self.damping}")

    def pruner(self, inputs: Moments | None) -> Prune:
        """With one factor for all matrices that these inputs feed."""
        assert inputs is not None
        gram = inputs.gram
        silent, factor = gram.diagonal() == 0, inverse_factor(gram, self.damping)
        del gram

        def prune(weight: Tensor, ratio: float) -> Tensor:
            weight = weight.masked_fill(silent, 0)
            return settle(
                weight,
                factor.to(weight.dtype),
                lambda scores: self.zeros(scores, ratio),
                self.groups,
                self.block_size,
            )

        return prune

    def count(self, rows: int, columns: int, ratio: float) -> int:
        """Of each block its share."""
        widths = [min(self.block_size, columns - start) for start in range(0, columns, self.block_size)]
        return sum(super(SparseGPT, self).count(rows, width, ratio) for width in widths)

    def workspace(self, rows: int, columns: int) -> int:
        """X^T X, damped, inverted, factored and LAPACK's copies in float64; three weights; a block and its order."""
        return 48 * columns**2 + 12 * rows * columns + 48 * rows * self.block_size
