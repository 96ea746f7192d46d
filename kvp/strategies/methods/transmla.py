"""TransMLA: one head of rotated principal keys, and a balanced latent of other keys and values (arXiv:2502.07864).

1. RoRoPE. Pairs of one frequency turn alike in all KV heads, so an orthogonal matrix may mix them across heads. The
   principal components of the keys go to the first head; queries follow, and the function stays.
2. FreqFold. `freqfold` neighbouring frequencies count as one in step 1. More of the keys then fits into the first
   head, and its pairs turn a little off.
3. The first `qk_rope_head_dim` channels of that head go on turning. All other keys stop.
4. Balanced joint PCA. Those keys and the values of all heads are read from one latent of `kv_lora_rank` channels.

Formula
-------
With M = `freqfold`, the dense pairs 0 .. P - 1, p rotated pairs and C the second moment of the inputs x:

    step 1    U = eigenvectors of the sum, over both channels c of a pair, of K_c C K_c^T: all rows of
              frequencies iM .. iM + M - 1. K_c' = U^T K_c, Q_c' = U^T Q_c
    step 3    component m of fold i turns at frequency iM + m P / p, for m < M p / P
    step 4    latent = first r eigenvectors of the second moment of [V x; K x / b]
              b the mean root mean square of the channels of K x, over that of V x

Faithful or interpreted
-----------------------
Faithful to MuLabPKU/TransMLA (`transmla/partial_rope.py`, `transmla/lora_qkv.py`) in all four steps.

* The authors search `freqfold` by perplexity on the test set. Here it is an option; they publish 4 and 8.
* b is taken over all values. The authors leave out as many values as there are rotated keys.
* A bias is a column of the matrices, as with the authors. Their low rank of queries is left out.
* The latent has at most as many channels as the values. The authors' may be wider.
* The softmax scale stays that of the dense head. The authors scale queries to the same effect.

Cost
----
A pass through each layer in each of two walks, and an eigendecomposition of the width of all keys and values.
`kvp export --to mla` writes the outcome as DeepSeek's attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.shapes import CHANNELS_PER_PAIR, dense_shapes, turning_pairs
from kvp.options import options
from kvp.strategies.signals.head_moments import Heads
from kvp.strategies.signals.low_rank import input_moments_of
from kvp.strategies.signals.walk import Visit
from kvp.strategies.templates.mla import PrincipalLatentStrategy, Turned
from kvp.types import Budget

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@options
class TransMLA(PrincipalLatentStrategy):
    """RoRoPE, FreqFold and the balanced joint PCA.

    Attributes:
        qk_rope_head_dim: Rotated channels beside the latent; None: half a dense head.
        freqfold: Neighbouring frequencies that count as one; 1: none do.
    """

    balanced: ClassVar[bool] = True

    qk_rope_head_dim: int | None = Field(
        default=None, ge=2, multiple_of=2, description="null: half a dense head"
    )
    freqfold: int = Field(default=4, ge=1, description="frequencies")

    @override
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        pairs, kept = turning_pairs(config), self._pairs(config)
        if pairs % self.freqfold or pairs % kept or self.freqfold % (pairs // kept):
            raise ValueError(
                f"strategy.freqfold={self.freqfold} must divide the {pairs} frequencies of a head, and be a multiple "
                f"of the {pairs / kept:g} frequencies for each of the {kept} rotated pairs: change it, or "
                f"strategy.qk_rope_head_dim={self.qk_rope_head_dim}"
            )
        super().check(config, budget)

    def _pairs(self, config: PretrainedConfig) -> int:
        width = self.qk_rope_head_dim or dense_shapes(config)[0].qk_head_dim // 2
        return width // CHANNELS_PER_PAIR

    @override
    def turned(self, visit: Visit) -> Turned:
        heads, moments, config = Heads(visit), input_moments_of(visit), visit.model.config
        query, key, moment = heads.rows("q")[0], heads.rows("k")[0, 0], moments.gram / moments.count
        slots = torch.arange(len(key) // CHANNELS_PER_PAIR)
        by_head = slots.view(dense_shapes(config)[0].num_key_value_heads, -1)
        worth, first = torch.zeros(len(slots), dtype=key.dtype), self.turning(config, slots)
        for start in range(0, turning_pairs(config), self.freqfold):
            alike = by_head[:, start : start + self.freqfold].flatten()
            front = torch.isin(alike, first)
            places = torch.cat([alike[front], alike[~front]])  # of the components, best first
            channels = [alike + second for second in (0, len(slots))]
            moved = [places + second for second in (0, len(slots))]
            total = sum(key[each] @ moment @ key[each].T for each in channels)
            energies, basis = (best.flip(-1) for best in torch.linalg.eigh(total))
            for old, new in zip(channels, moved, strict=True):
                key[new], query[:, new] = basis.T @ key[old], basis.T @ query[:, old]
            worth[places] = energies.clamp(min=0).cpu()
        return Turned(query, key, worth, moment)

    @override
    def turning(self, config: PretrainedConfig, worth: Tensor) -> Tensor:
        pairs = turning_pairs(config)
        return torch.arange(0, pairs, pairs // self._pairs(config))
