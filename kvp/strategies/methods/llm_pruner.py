"""LLM-Pruner: cut coupled structures of the middle layers by Taylor importance (arXiv 2305.11627).

Block-wise mode: KV groups with their query heads, and FFN neurons. The first four and the last two layers stay whole.

Formula
-------
For every matrix of a structure (section 3.2; w weight, g gradient of the mean loss, F its diagonal Fisher), a row or
column of the unit counts

    taylor_vector   |sum w g|                "Vector",   code `vectorize`
    taylor_element  sum |w g|                "Element1", `param_first`
    second_order    sum w^2 F                "Element2", `param_second`, without the paper's 1/2
    mixed           sum |w g - w^2 F / 2|                `param_mix`
    l1, l2          sum |w|, sum w^2
    random          uniform noise per channel

`group_reduction` reduces that over the matrices, and a unit is worth the sum over its channels
(`kvp.strategies.templates.reductions`).

Faithful or interpreted
-----------------------
Faithful block-wise, with the GQA alignment corrected. Formulas, rounding and roots are those of the code
(`LLMPruner/pruner/hf_llama_pruner.py`, `torch_pruning/pruner/algorithms/metapruner.py`, `llama3.py`). The defaults are
those of the published recipe, which are not the script's. Side by side, 36 combinations gave the same units.

* GQA groups collect their own query heads. The code folds other groups' heads in; `reference_gqa_alignment` repeats
  that.
* With several batches, absolute values of elements are taken per batch. `calibration=llm_pruner` has one.
* `group_reduction` reduces L1 and L2 too; the reference always takes their mean. It matters only under
  `allocator=threshold`.
* Each iterative step reads the same samples; the reference draws new ones.
* Channel-wise mode, which narrows the residual stream itself, is not offered.

Cost
----
One forward and backward pass over the calibration text, again for each of `iterative_steps`. Weights, the activations
of a batch and gradients are in memory. `second_order` and `mixed` go back sample by sample.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.masks import masked
from kvp.models.spaces import keep_mask, members
from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator, Uniform
from kvp.strategies.signals.importance import row_sums
from kvp.strategies.target import Scores, Target
from kvp.strategies.templates.coupled import CoupledStrategy
from kvp.strategies.templates.reductions import Reduction, channels_per_unit, unit_scores
from kvp.types import Budget, Plan, Space

StructureImportance = Literal[
    "taylor_vector", "taylor_element", "second_order", "mixed", "l1", "l2", "random"
]


@options
class LLMPruner(CoupledStrategy):
    """LLM-Pruner in its block-wise mode.

    Attributes:
        importance: One of the table above.
        group_reduction: Over the matrices of a structure: "sum", "mean", "max", "prod", "first".
        iterative_steps: Cut so often, up to a further 1 / iterative_steps of the ratio each time, and score
            again what is left.
        reference_gqa_alignment: Score KV groups with other groups' query heads, as the reference's code does.
        gradient_checkpointing: Trade time for activation memory.
    """

    late: ClassVar[tuple[str, ...]] = (*CoupledStrategy.late, "iterative_steps", "gradient_checkpointing")

    allocator: Allocator = Uniform(multiple_of=1)
    importance: StructureImportance = "taylor_element"
    group_reduction: Reduction = "sum"
    iterative_steps: int = Field(default=1, ge=1)
    reference_gqa_alignment: bool = False
    gradient_checkpointing: bool = False

    @property
    @override
    def needs_calibration(self) -> bool:
        return self.probes or self.importance not in ("random", "l1", "l2")

    @property
    @override
    def searches(self) -> bool:
        return self.iterative_steps > 1

    @override
    def backward(self) -> Mapping[str, Collection[str]] | None:
        return None if self.importance in ("random", "l1", "l2") else super().backward()

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        config, spaces = target.config, self.spaces(target.config)
        if self.importance == "random":
            generator = torch.Generator().manual_seed(target.seed)
            width = {space: channels_per_unit(config, space) for space in spaces}
            return {s: torch.rand(*s.shape, width[s], generator=generator).sum(1) for s in spaces}
        bound = [member for space in spaces for member in members(config, space)]
        rows = row_sums(target, bound, self.importance, self.gradient_checkpointing)
        return {
            space: unit_scores(config, space, rows, self.group_reduction, self.reference_gqa_alignment)
            for space in spaces
        }

    @override
    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        """Cut a part, score what is left in the model without it, and so on; what is cut stays cut."""
        for step in range(1, self.iterative_steps):
            plan = self._up_to(step / self.iterative_steps, target, scores, budget, profile)
            with masked(target.model, plan):
                fresh = self.score(target)
            gone = {space: ~keep_mask(space, keep) for space, keep in plan.keep.items()}
            scores = {space: score.masked_fill(gone[space], -1) for space, score in fresh.items()}
        return self.plan(target.config, scores, budget, profile)

    def _up_to(self, part: float, target: Target, scores: Scores, budget: Budget, profile: Tensor) -> Plan:
        """Return the plan for a part of the ratio, as near as the widths allow."""
        ratio = self.unit_ratio and self.unit_ratio * part
        return replace(self, unit_ratio=ratio).plan(
            target.config, scores, replace(budget, value=budget.value * part, tolerance=1), profile
        )
