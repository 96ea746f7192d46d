"""Chain: run one strategy after the other, each with a budget of its own: zeros in what a cut has left.

The first cuts the model, compensation included; the second sees nothing but the cut model. `ratio` is the first
one's budget, `strategy.ratio` the second's, a fraction of the matrices that are left.

Formula
-------
    plan = first(model, ratio),   zeros = second(cut(model, plan), strategy.ratio)

Faithful or interpreted
-----------------------
A tool of our own. `mosaic_composite` chains Wanda-sp and Mosaic (arXiv 2504.06323), whose authors have not released
the structural half.

Cost
----
Both costs, one after the other. The cut model is in memory beside the dense one on the CPU.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

from kvp.estimate.passes import weights_bytes, with_total
from kvp.models.family import family_of
from kvp.models.linears import all_linears
from kvp.models.plans import edits_file
from kvp.models.shapes import itemsize, layer_shapes
from kvp.models.uncut import uncut
from kvp.options import options
from kvp.strategies.base import Strategy
from kvp.strategies.signals.walk import move, on_cpu
from kvp.strategies.steps import Job, find_plan, in_folders
from kvp.strategies.target import Scores, Target
from kvp.strategies.templates.wrapper import Wrapper
from kvp.types import Budget, Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@options
class Chain(Wrapper):
    """Cut a model, then zero weights of what is left.

    Attributes:
        first: The strategy that cuts.
        second: The strategy that zeroes single weights.
        ratio: The budget of `second`, a sparsity of the matrices that are left.
    """

    late: ClassVar[tuple[str, ...]] = (*Wrapper.late, "second", "ratio")
    sparsifies: ClassVar[bool] = True

    second: Strategy
    ratio: Budget

    def __post_init__(self) -> None:
        if self.first.sparsifies or not self.second.sparsifies:
            raise ValueError(
                "strategy.first must cut and strategy.second zero single weights (magnitude_sparse, wanda, sparsegpt, "
                f"alps, mosaic), got {type(self.first).__name__} and {type(self.second).__name__}: zeros that are "
                "cut afterwards are no longer those that were asked for"
            )
        if self.first.slices:
            raise ValueError(
                f"strategy.first={type(self.first).__name__} slices the residual stream, after which nothing else can "
                "be pruned: choose another first"
            )
        if self.compensation is not None:
            raise ValueError("strategy.compensation belongs to what cuts: set strategy.first.compensation")

    @property
    @override
    def needs_calibration(self) -> bool:
        compensated = self.first.compensation is not None
        return self.first.needs_calibration or self.second.needs_calibration or compensated

    @property
    @override
    def then(self) -> tuple[Budget, ...]:
        return (self.ratio,)

    @override
    def peak_bytes(self, config: PretrainedConfig, **sizes: Any) -> dict[str, int]:
        """Count beside the second step, on a CPU, the dense model and its edits."""
        first, second = super().peak_bytes(config, **sizes), self.second.peak_bytes(config, **sizes)
        width, edits = itemsize(config), sum(linear.rows * linear.columns for linear in all_linears(config))
        dense = sizes["on_cpu"] * (weights_bytes(config, width) + width * edits)
        second = with_total({**second, "dense": dense})
        return max(first, second, key=lambda parts: parts["total"])

    @override
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        self.first.check(config, budget)
        self.second.check(config, self.ratio)

    @override
    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        from kvp.models.surgery import apply  # imports seconds of modelling code

        job = Job(self.first, budget, target.config, lambda: target)
        plan = find_plan(job, in_folders(directory / "first"), {"score": scores, "sensitivity": profile})
        second = directory / "second"
        second.mkdir(exist_ok=True)
        with on_cpu(target.model) as device:
            cut = apply(target.model, plan)
            self.second.check(cut.config, self.ratio)
            move(cut, device)
            none = torch.zeros(len(layer_shapes(cut.config)))
            zeroed = self.second.search(replace(target, model=cut), {}, self.ratio, none, second)
            edits = {**plan.edits, **uncut(target.model, plan, zeroed.edits)}
        for layer in range(len(layer_shapes(target.config))):
            prefix = f"{family_of(target.config).layers}.{layer}."
            own = {name: edit for name, edit in edits.items() if name.startswith(prefix)}
            save_file(own, edits_file(directory, layer))
        for place in (directory / "first", second):
            shutil.rmtree(place)
        return replace(plan, edits=edits)
