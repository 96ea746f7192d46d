"""Shortened-LLM: remove blocks by what a calibration pass says of each (arXiv:2402.02834).

Three criteria, each scored once on the dense model (formulas and defaults as in the scripts
`anal_block_sensitivity_*` and `block_prune` of Nota-NetsPresso/shortened-llm):

* `ppl`: the loss without the block. The authors rank its exponential, the perplexity: the same order.
* `taylor` (Taylor+): sum of |w g| over the seven projections and two norms of the block.
* `magnitude` (Magnitude+): sum of |w| over the same.

The "+" says that the first four and the last two blocks stay; their code protects them under every
criterion, `ppl` included. Embeddings, output head, final norm and biases have no say.

Where this differs: over several batches the authors add w g before the absolute value, so that their
scores depend on the split; here absolute values are averaged over the batches. In one batch, their
default (ten samples), both are the same. Their other reductions (mean, max, prod) are not offered. All
variants of `ppl` share the hidden states before their block (`kvp.strategies.signals.losses`), which is exact.
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
from kvp.types import Space

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
            for norm in family.layer_norms
        ]
        return projections + norms if self.grouping == "block" else projections
