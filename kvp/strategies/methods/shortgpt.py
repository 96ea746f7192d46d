"""ShortGPT: remove the blocks that turn the hidden states least (arXiv:2403.03853).

The blocks of the lowest block influence go, all at once. Nothing is protected, nothing tuned.

Formula
-------
    BI_n = 1 - mean over tokens cos(h_n, h_n+1)      distance=cosine
    BI_n = mean over tokens arccos(cos) / pi         distance=angular

h_n and h_n+1 are the residual stream before and after block n. Among equals, the lower index goes first.

Faithful or interpreted
-----------------------
Faithful to the formula. The code (`block_influence` in icip-cas/ShortGPT) has both distances.

* That code reads the `hidden_states` of Hugging Face, whose last entry has passed the final norm. The BI of the last
  block includes that norm there; here it is the formula's.
* The `calibration` group chooses the text. The authors read windows of 256 tokens of PG19.
* BI of `grouping=attention` or mlp is that of the sublayer with its residual addition: our extension.

Cost
----
One forward pass over the calibration text, layer by layer. No gradient, no second model.
"""

from __future__ import annotations

from math import pi
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from kvp.models.masks import without
from kvp.options import options
from kvp.strategies.signals.gradients import require_finite
from kvp.strategies.signals.walk import Visit, walk
from kvp.strategies.target import Target
from kvp.strategies.templates.blocks import DepthStrategy
from kvp.types import Space

Distance = Literal["cosine", "angular"]


@options
class ShortGPT(DepthStrategy):
    """Depth pruning by block influence.

    Attributes:
        distance: Distance of the states around a block: "cosine" (1 - cos, in [0, 2]) or "angular" (in [0, 1]).
    """

    distance: Distance = "cosine"

    @override
    @torch.no_grad()
    def score(self, target: Target) -> dict[Space, Tensor]:
        space = self.space(target.config)
        influence = torch.zeros(space.shape, dtype=torch.float64)
        for visit in walk(target.model, target.batches, "block influence"):
            pairs = zip(*self._around(visit), strict=True)
            tokens = torch.cat([self._distances(before, after).flatten() for before, after in pairs])
            influence[visit.layer] = tokens.double().mean()
        require_finite(influence.sum(), "the block influence")
        return {space: influence}

    def _around(self, visit: Visit) -> tuple[list[Tensor], list[Tensor]]:
        """Return the states before and after the part, per batch."""
        if self.grouping == "block":
            return visit.states, visit.outputs()
        with without(visit.model, visit.layer, "mlp"):
            between = visit.outputs()
        return (visit.states, between) if self.grouping == "attention" else (between, visit.outputs())

    def _distances(self, before: Tensor, after: Tensor) -> Tensor:
        """Return (batch, seq_len) distances in float32."""
        similarity = F.cosine_similarity(before.float(), after.float(), dim=-1)
        return 1 - similarity if self.distance == "cosine" else similarity.clamp(-1, 1).arccos() / pi
