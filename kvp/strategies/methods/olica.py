"""Olica: principal components of keys, and of values times o_proj head by head (arXiv:2506.08436, ICML 2025).

This is the part of its attention. The linear calibration of pruned MLPs is left out: it saves no byte of the cache.

Formula
-------
With D_x the root mean squares of the inputs x, D_y those of o_proj's outputs and S_h the second moment of what query
head h reads:

    keys      W_k D_x = U E V^T                    the first r of E V^T D_x^-1 are the latent, U expands it
    values    D_y [O_1; ..; O_n] = U E R^T         W_v' = R^T W_v, O_h' = O_h R: a rotation of the head
              score of channel i                   |(W_v' D_x)_i| + (sum over h of (R^T S_h R)_ii |O'_h,i|^2)^(1/2)

O_1 .. O_n are the columns of o_proj of the query heads of a KV head. The channels of the highest scores stay.

Faithful or interpreted
-----------------------
Faithful to BetterTMrR/LLM-Olica (`utils/llama_utils.py`: `fast_OND`, `pruning`) in the decompositions and scores.

* The paper's product W_v W_o is decomposed by its o_proj alone, as in the authors' fast version. CLOVER's is exact.
* RoPE stands between queries and keys, so the authors take a low rank of each, W_q and W_k. Only that of W_k shortens
  the cache, so W_q stays.
* The authors cache expanded keys and save parameters. Here the latent is cached, and expanded on every step.
* Keys and values lose the same share. The authors cut k = 3 times as many parameters of queries and keys.
* A KV head with several query heads has one decomposition of all their columns; the paper has one head each. A bias is
  a column of W.
* Statistics are the dense model's. The authors take those of the layers pruned before.

Cost
----
Two walks, each with two passes through a layer, an SVD of k_proj and an eigendecomposition of head_dim per KV head.
Decoding saves bytes only: every step expands the keys of the whole cache (`kvp/models/latent_attention.py`).
"""

from __future__ import annotations

import torch
from pydantic import Field
from typing_extensions import override

from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator, Uniform
from kvp.strategies.compensation.sequential import at_work
from kvp.strategies.signals.head_moments import Heads, output_columns
from kvp.strategies.signals.low_rank import Factors, Part, factored, rows_of
from kvp.strategies.signals.moments import Moments
from kvp.strategies.signals.walk import Visit
from kvp.strategies.templates.latent import LatentStrategy


@options
class Olica(LatentStrategy):
    """Olica's decompositions of an attention."""

    allocator: Allocator = Uniform()
    key_heads: int | None = Field(default=None, ge=1, description="KV heads per latent; null: all of a layer")
    value_heads: int = Field(default=1, ge=1, le=1, description="one: o_proj is decomposed head by head")

    @override
    def factors(self, visit: Visit, part: Part, moments: Moments) -> Factors:
        squares, rows = moments.squares / moments.count, rows_of(visit, part)  # D_x^2
        if part == "k":
            return factored(rows, squares.diag(), self.damping)
        columns, name = output_columns(visit), Heads(visit).name("o")
        outputs, reads = (columns.new_zeros(()) for _ in range(2))
        for inputs in visit.inputs(name):
            outputs = outputs + visit.model.get_submodule(name)(inputs[name]).double().square().sum(0)
            states = at_work(inputs[name]).unflatten(1, (*columns.shape[:2], -1))
            reads = reads + torch.einsum("tgqi,tgqj->gqij", states, states).double()
        sizes = (outputs / moments.count).sqrt()  # D_y
        weighed = (sizes[:, None] * columns).flatten(1, 2)
        turn = torch.linalg.eigh(weighed.mT @ weighed).eigenvectors.flip(-1)  # R
        values, columns = turn.mT @ rows, columns @ turn[:, None]
        read = (turn.mT[:, None] @ (reads / moments.count) @ turn[:, None]).diagonal(dim1=2, dim2=3)
        worth = (values.square() @ squares).sqrt() + (columns.square().sum(2) * read).sum(1).sqrt()
        best = worth.argsort(dim=1, descending=True)
        return Factors(
            values.gather(1, best[..., None].expand_as(values)),
            turn.gather(2, best[:, None].expand_as(turn)),
            worth.gather(1, best),
        )
