"""MHA2MLA: few rope pairs of each head go on turning, the other keys share a latent with values (arXiv:2502.14837).

1. Partial RoPE. `qk_rope_head_dim` channels of every KV head go on turning: the pairs of the largest queries and keys,
   or those of the highest frequencies. Keys and queries of the other pairs stop turning.
2. Joint SVD. Those keys and the values of all heads are read from one latent of `kv_lora_rank` channels.

Formula
-------
    pair i of KV head h      sum over its query heads q of (mean over tokens of |q_i|) (mean over tokens of |k_i|)
    latent                   [W_k; W_v] = U E V^T, W_k the rows of still keys: c = (E V^T x)_1..r, read as U_1..r c

|.| is the length of a pair, which RoPE does not change.

Faithful or interpreted
-----------------------
Faithful to JT-Ushio/MHA2MLA (`src/mha2mla/2_norm.py`, `src/mha2mla/patch_func.py`): both selections, ranks within each
head, and the joint SVD of weights alone.

* The authors then train 0.3 to 1 % of the pretraining tokens. Without that, most is lost; LoRA is `recovery`'s part.
* A bias is a column of the matrices. The authors leave biases out of the SVD and add them to what the latent gives.
* The latent has at most as many channels as the values. A wider one needs more `qk_rope_head_dim`.
* The pairs of the lowest, and of evenly spaced frequencies are left out: the authors' ablations.

Cost
----
A pass through each layer in each of two walks, and an eigendecomposition of the width of all keys and values. Every
query head reads the rotated keys of all KV heads, so q_proj gets larger. `selection=high` keeps the same pairs in every
layer, which `kvp export --to mla_longrope` writes as DeepSeek's attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.shapes import CHANNELS_PER_PAIR, dense_shapes, turning_pairs
from kvp.options import options
from kvp.strategies.compensation.sequential import at_work
from kvp.strategies.signals.head_moments import Heads
from kvp.strategies.signals.walk import Visit
from kvp.strategies.templates.mla import PrincipalLatentStrategy, Turned
from kvp.types import Budget

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@options
class MHA2MLA(PrincipalLatentStrategy):
    """Partial RoPE per head, and the joint SVD of the rest.

    Attributes:
        qk_rope_head_dim: Rotated channels of each KV head; None: an eighth of them, as in the paper.
        selection: "2-norm" keeps the pairs of the largest queries times keys turning, "high" the fastest.
    """

    qk_rope_head_dim: int | None = Field(
        default=None, ge=2, multiple_of=2, description="of each KV head; null: an eighth of its channels"
    )
    selection: Literal["2-norm", "high"] = "2-norm"

    @property
    @override
    def needs_calibration(self) -> bool:
        return self.selection == "2-norm"

    @override
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        most = CHANNELS_PER_PAIR * turning_pairs(config)
        if self._pairs(config) > turning_pairs(config):
            raise ValueError(
                f"strategy.qk_rope_head_dim={self.qk_rope_head_dim} of each KV head, and {most} of its channels turn: "
                "ask for fewer"
            )
        super().check(config, budget)

    def _pairs(self, config: PretrainedConfig) -> int:
        width = self.qk_rope_head_dim or max(CHANNELS_PER_PAIR, dense_shapes(config)[0].qk_head_dim // 8)
        return width // CHANNELS_PER_PAIR

    @override
    def turned(self, visit: Visit) -> Turned:
        heads, config = Heads(visit), visit.model.config
        query, key = heads.rows("q")[0], heads.rows("k")[0, 0]
        groups = dense_shapes(config)[0].num_key_value_heads
        count = len(key) // CHANNELS_PER_PAIR // groups
        fastest = -torch.arange(count, dtype=torch.float64)
        worth = fastest.repeat(groups)
        if self.selection == "2-norm":
            worth = self._norms(visit, query, key, groups).flatten()
        return Turned(query, key, worth, torch.eye(key.shape[1], dtype=key.dtype, device=key.device))

    def _norms(self, visit: Visit, query: Tensor, key: Tensor, groups: int) -> Tensor:
        """Return (groups, pairs) the product of mean lengths, summed over the query heads of a group."""
        heads, entry = Heads(visit), Heads(visit).name("q")
        # a query head is zero but in the channels of its group: (queries, 2, pairs, in, groups)
        own = query.unflatten(1, (CHANNELS_PER_PAIR, groups, -1)).unflatten(0, (groups, -1)).diagonal(0, 0, 3)
        asks = own.permute(4, 0, 2, 1, 3).contiguous()  # (groups, queries, pairs, 2, in)
        gives = key.unflatten(0, (CHANNELS_PER_PAIR, groups, -1)).permute(1, 2, 0, 3)[:, None]
        lengths, tokens = [asks.new_zeros(rows.shape[:3]) for rows in (asks, gives)], 0
        for inputs in visit.inputs(entry):
            x = at_work(heads.extended(inputs[entry]))
            tokens += len(x)
            for total, rows in zip(lengths, (asks, gives), strict=True):
                states = (x @ rows.flatten(0, 3).T.to(x)).unflatten(1, rows.shape[:4])
                total += states.norm(dim=-1).double().sum(0)
        means = [total / tokens for total in lengths]
        return (means[0] * means[1]).sum(1).cpu()

    @override
    def turning(self, config: PretrainedConfig, worth: Tensor) -> Tensor:
        by_head = worth.view(dense_shapes(config)[0].num_key_value_heads, -1)
        best = by_head[:, : turning_pairs(config)].argsort(dim=1, descending=True, stable=True)
        starts = by_head.shape[1] * torch.arange(len(by_head))
        return (best[:, : self._pairs(config)] + starts[:, None]).flatten().sort().values
