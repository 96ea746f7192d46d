"""Shortened-LLM: remove blocks by what a calibration pass says of each (arXiv:2402.02834).

Every block is scored once, on the dense model, and the lowest go. The first four and the last two stay.

Formula
-------
    ppl         the loss without the block      the authors rank its exponential, the perplexity: one order
    taylor      sum |w g|                       "Taylor+", over the seven projections and two norms of the block
    magnitude   sum |w|                         "Magnitude+", over the same

Embeddings, output head, final norm and biases have no say.

Faithful or interpreted
-----------------------
Faithful; several batches are interpreted. Formulas and defaults are those of the scripts `anal_block_sensitivity_*` and
`block_prune` of Nota-NetsPresso/shortened-llm. Side by side, 12 of 12 comparisons removed the same blocks.

* The "+" protects the first four and last two blocks. The code protects them under `ppl` too, and so does this.
* Over several batches the authors add w g before the absolute value, so their scores depend on the split. Here the
  absolute values are averaged. In one batch, their default of ten samples, both are equal.
* Their other reductions (mean, max, prod) are not offered.

Cost
----
`ppl` runs the model once for each block, and all variants share the hidden states before their block, which is exact
(`kvp.strategies.signals.losses`). That halves the passes. `taylor` is one forward and backward pass, with gradients in
memory. `magnitude` reads no data.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.family import family_of
from kvp.models.spaces import Member, fold, members
from kvp.options import options
from kvp.strategies.signals.importance import Importance, row_sums
from kvp.strategies.target import Target
from kvp.strategies.templates.blocks import DepthStrategy
from kvp.types import Budget, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BlockCriterion = Literal["ppl", "taylor", "magnitude"]
SUMMED: dict[str, Importance] = {"taylor": "taylor_element", "magnitude": "l1"}


@options
class ShortenedLLM(DepthStrategy):
    """One-shot depth pruning.

    Attributes:
        criterion: "ppl", "taylor" or "magnitude".
        gradient_checkpointing: Trade time for activation memory in `taylor`.
    """

    late: ClassVar[tuple[str, ...]] = (*DepthStrategy.late, "gradient_checkpointing")

    criterion: BlockCriterion = "ppl"
    protect_first: int = Field(default=4, ge=0, description="blocks at the input that stay")
    protect_last: int = Field(default=2, ge=0, description="blocks at the output that stay")
    gradient_checkpointing: bool = False

    @property
    @override
    def needs_calibration(self) -> bool:
        return self.criterion != "magnitude"

    @override
    def backward(self) -> Mapping[str, Collection[str]] | None:
        return None if self.criterion in ("ppl", "magnitude") else super().backward()

    @override
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        if self.criterion != "ppl":
            self._weights(config, self.space(config))  # which experts have none of
        super().check(config, budget)

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        """Return the loss without each block, in nats per token, or a sum over the weights of each."""
        space = self.space(target.config)
        if self.criterion == "ppl":
            return {space: self.losses(target, list(range(space.shape[0])), "perplexity without a block")}
        group = self._weights(target.config, space)
        sums = row_sums(target, group, SUMMED[self.criterion], self.gradient_checkpointing)
        return {space: torch.stack([fold(sums[m.name, 0], m, space) for m in group]).sum(0)}

    def _weights(self, config: PretrainedConfig, space: Space) -> list[Member]:
        """Return all that goes with a layer's part: the projections, and the norms of a whole block."""
        family, projections = family_of(config), members(config, space)
        norms = [
            Member(f"{family.layers}.{n}.{norm}", 0, torch.full((config.hidden_size,), n))
            for n in range(space.shape[0])
            for norm in family.layer_norms + family.post_norms
        ]
        return projections + norms if self.grouping == "block" else projections
