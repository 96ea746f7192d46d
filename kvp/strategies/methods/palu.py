"""Palu: latents of keys and values for groups of heads, with ranks by Fisher information (arXiv:2407.21118, ICLR 2025).

Groups of four KV heads share a latent (G-LRD: less is lost than head by head, and the matrices stay smaller than with
one for all). The projections are whitened by the second moment of their inputs before the SVD.

Formula
-------
With the rows W of a group in k_proj or v_proj, and S S^T the second moment of the inputs (`signals/low_rank.py`):

    W S = U E V^T                       the first r of U E^(1/2) and of E^(1/2) V^T S^-1 stay
    r of a layer's keys, or values      in proportion to the mean over the weights of (mean over samples of g^2)^(1/2)

g is the gradient of a sample's loss by a weight of k_proj or v_proj. A rank that would exceed the width stops there.

Faithful or interpreted
-----------------------
Faithful to shadowpa0327/Palu (`palu/rank_search.py`, `palu/decomposition.py`) in factors, groups and Fisher scores.

* All groups of a layer have one rank, as with the authors' `fisher_uniform`; the paper's search is per group.
* Ranks are multiples of `multiple_of` that meet the budget. The authors round to 32 and take what comes.
* A bias is a column of W. The authors leave biases out of the SVD and expand them with the latent.
* The authors multiply values' expansions into o_proj. Here each head expands what it has read: the same function, with
  fewer parameters.
* The latents are not quantised.

Cost
----
One forward and backward pass, and two walks with an eigendecomposition of hidden_size per layer. Decoding saves bytes
only: every step expands the keys of the whole cache (`kvp/models/latent_attention.py`).
"""

from __future__ import annotations

from kvp.options import options
from kvp.strategies.templates.latent import FisherLatentStrategy


@options
class Palu(FisherLatentStrategy):
    """Palu, whose factors and ranks are those of the template."""
