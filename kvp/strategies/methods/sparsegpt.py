"""SparseGPT: zero weights so that each matrix's outputs change least, and let the kept ones make up (arXiv:2301.00774).

Columns are settled from left to right, and the columns that follow make up for what goes
(ICML 2023, IST-DASLab/sparsegpt, which locuslab/wanda copies).

Formula
-------
    weight   W_ij^2 / U_jj^2,   H^-1 = U^T U, H = X^T X damped
    update   W_i,j: -= W_ij / U_jj U_j,j:    for a weight that goes

Unstructured, int(sparsity of them) of the weights of each block of 128 columns go, chosen when the block is
reached, by the weights as updated so far. N:M is chosen as every M columns are. `kvp.strategies.templates.surgeon`
derives both lines.

Faithful or interpreted
-----------------------
Faithful. Side by side, N:M gave the same masks; unstructured did once the code's `<=` is `<`.

* Exactly that many weights go, where the code takes one more and those that equal it.
* The factorisation is in float64.
* An input that is always zero counts as such in the mean that damps H, where the code sets it to one.
* `true_sequential` (off by default there: q, k and v before o, before gate and up, before down) is not offered.

Cost
----
One forward pass, layer by layer, on the model pruned so far, and one inverse per matrix. A layer's X^T X is in memory.
Shapes and bytes stay; only a storage of zeros saves memory.
"""

from __future__ import annotations

from kvp.options import options
from kvp.strategies.templates.surgeon import SurgeonStrategy


@options
class SparseGPT(SurgeonStrategy):
    """SparseGPT, with the same sparsity in every matrix."""
