"""CARE: SVD of keys and values under the root of the covariance, with ranks by residual (arXiv:2603.17946, ICLR 2026).

All KV heads of a layer share one latent of keys and one of values. `allocator=residual` is the paper's CARE-E,
`allocator=uniform` its CARE-U.

Formula
-------
With C the second moment of the inputs plus `damping` times its mean diagonal (`signals/low_rank.py`):

    W C^(1/2) = U E V^T                 the first r of U E^(1/2) and of E^(1/2) V^T C^(-1/2) stay
    gain of rank r + 1 in layer n       E_r+1^2 / (sum of E_j^2, j > r) * (2 (N - n) / (N + 1))^(1/2) / (r / r_0)^(1/2)

Ranks are given one by one to the layer that gains most, for keys and for values alike. Each starts at r_0, half of the
average rank, and ends at twice the average.

Faithful or interpreted
-----------------------
Faithful to the rank study of FutureMLS-Lab/CARE (`src/zeroshot/convert.py`, `src/lora_qkv.py`): factors, damping and
gains.

* The study multiplies the factors and evaluates a dense model. Here the latents are cached.
* A bias is a column of W. The authors leave biases out of the SVD.
* The conversion to partial RoPE (TransMLA's, with CARE's factors) and its healing are not part of it.

Cost
----
Two walks with an eigendecomposition of hidden_size per layer, no gradient. Decoding saves bytes only: every step
expands the keys of the whole cache (`kvp/models/latent_attention.py`).
"""

from __future__ import annotations

from pydantic import Field

from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator
from kvp.strategies.allocation.ranks import Residual
from kvp.strategies.templates.latent import LatentStrategy


@options
class CARE(LatentStrategy):
    """CARE-E, or CARE-U with `allocator=uniform`."""

    allocator: Allocator = Residual(max_ratio=0.95)
    key_heads: int | None = Field(default=None, ge=1, description="KV heads per latent; null: all of a layer")
    value_heads: int | None = Field(
        default=None, ge=1, description="KV heads per latent; null: all of a layer"
    )
    damping: float = Field(default=0.1, ge=0, description="relative to the mean of the diagonal")
