"""SparseGPT: each matrix pruned so that its outputs change least, the kept weights making up for the others.

arXiv:2301.00774 (ICML 2023), IST-DASLab/sparsegpt, which locuslab/wanda copies; `kvp.strategies.templates.surgeon`
says how.
Unstructured, int(sparsity of them) of the weights of each block of 128 columns go, chosen when the block is
reached, by the weights as updated so far; N:M is chosen as every M columns are.

Otherwise than there: exactly that many go, where the code takes one more and those that equal it; the
factorisation is in float64; an input that is always zero counts as such in the mean that damps H, where the
code sets it to one. Its `true_sequential` (off by default: q, k and v before o, before gate and up, before
down) is not here.
"""

from __future__ import annotations

from kvp.options import options
from kvp.strategies.templates.surgeon import SurgeonStrategy


@options
class SparseGPT(SurgeonStrategy):
    """SparseGPT, with the same sparsity in every matrix."""
