"""SVD-LLM v2: whitened SVD of keys and values, with ratios by truncation loss (arXiv:2503.12340, NAACL 2025).

All KV heads of a layer share one latent of keys and one of values.

Formula
-------
With C the second moment of the inputs and C = U_s D U_s^T (`signals/low_rank.py`):

    W U_s D^(1/2) = U E V^T                 the first r of U E^(1/2) and of E^(1/2) V^T D^(-1/2) U_s^T stay
    L = (sum of E_j^2 of the last R n)^(1/2)    over all calibration tokens; n channels, R the budget's ratio
    ratio of a layer's keys, or values      R (1 / log(1 + L)) / mean over the layers of 1 / log(1 + L)

The two SVDs take the place of SVD-LLM's Cholesky factor (arXiv:2403.07378), which fails on a singular C.

Faithful or interpreted
-----------------------
Interpreted: v2 has no public code, and its text was out of reach. Its rule of ratios is written from memory, unchecked.

* The paper compresses all matrices under a budget of parameters. Here only keys and values, under one of the cache.
* The paper has 1 / log(L). One is added to L, because the logarithm of a small loss is negative.
* The factors are those of AIoT-MLSys-Lab/SVD-LLM (`SVDLLM.py`, `whitening`), without its parameter update.

Cost
----
Two walks with an eigendecomposition of hidden_size per layer, no gradient. Decoding saves bytes only: every step
expands the keys of the whole cache (`kvp/models/latent_attention.py`).
"""

from __future__ import annotations

from pydantic import Field

from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator
from kvp.strategies.allocation.ranks import TruncationLoss
from kvp.strategies.templates.latent import LatentStrategy


@options
class SVDLLMv2(LatentStrategy):
    """SVD-LLM v2 on keys and values."""

    allocator: Allocator = TruncationLoss(max_ratio=0.95)
    key_heads: int | None = Field(default=None, ge=1, description="KV heads per latent; null: all of a layer")
    value_heads: int | None = Field(
        default=None, ge=1, description="KV heads per latent; null: all of a layer"
    )
