"""SLEB: remove one block after the other, each time the one without which the loss is lowest (arXiv:2402.09025).

Every step tries each block that is left, on the model that has lost the earlier ones already. The first and the last
block stay.

Formula
-------
    step k:   b_k = argmin over blocks b that are left   loss of the model without b_1, ..., b_k-1 and b

A block's score is its place in that order. A step depends on the steps before it, not on how many follow, so the order
is one for all budgets.

Faithful or interpreted
-----------------------
Faithful to `sleb.py` of jiwonsong-dev/SLEB. Side by side, the order of removal was identical.

* The `calibration` group chooses the text. The authors read the first 128 rows of a shuffled WikiText-2, joined.
* The authors remove 7 of 32 blocks. `max_ratio` bounds how many are ranked.

Cost
----
A step costs half a pass of the remaining model per remaining block, since the variants share the hidden states before
their block, which is exact. The time grows with the square of the number of blocks. `samples` bounds it. No gradient.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from kvp.models.masks import without
from kvp.options import options
from kvp.strategies.base import Strategy
from kvp.strategies.target import Target
from kvp.strategies.templates.blocks import DepthStrategy
from kvp.types import Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)


@options
class SLEB(DepthStrategy):
    """Greedy depth pruning.

    Attributes:
        max_ratio: Fraction of the blocks that are ranked; budgets beyond it are refused. A step costs
            half a pass of the remaining model per remaining block.
        samples: Calibration samples that a step is decided on, the first ones; None: all, as the authors.
    """

    late: ClassVar[tuple[str, ...]] = Strategy.late  # what is protected is never tried

    protect_first: int = Field(default=1, ge=0, description="blocks at the input that stay")
    protect_last: int = Field(default=1, ge=0, description="blocks at the output that stay")
    max_ratio: float = Field(default=0.5, gt=0, le=1, description="fraction of the blocks that is ranked")
    samples: int | None = Field(default=None, ge=1, description="null decides on all calibration samples")

    @override
    def most(self, config: PretrainedConfig) -> int:
        return min(super().most(config), int(self.max_ratio * self.space(config).shape[0] + 1e-9))

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        """Return the place in the order of removal, from 0; the number of places for all blocks that stay."""
        space, steps = self.space(target.config), self.most(target.config)
        assert target.calibration is not None
        target = replace(target, calibration=target.calibration[: self.samples])
        place, left = torch.full(space.shape, float(steps)), self.candidates(target.config)
        with ExitStack() as removed:
            for step in tqdm(range(steps), desc="SLEB", unit=self.grouping):
                losses = self.losses(target, left, f"step {step + 1} of {steps}")
                least = int(losses.argmin())
                layer = left.pop(least)
                place[layer] = step
                removed.enter_context(without(target.model, layer, self.grouping))
                log.info("%s %d goes: %.4f nats per token without", self.grouping, layer, losses[least])
        return {space: place}
