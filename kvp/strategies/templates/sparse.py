"""Unstructured and N:M sparsity: single weights become zero, matrix by matrix, layer by layer.

The linear weights of the decoder blocks are pruned (embeddings, norms, biases and the head are not), every
matrix to the same sparsity unless a method says otherwise. A layer sees the calibration states that the pruned
layers before it give; its inputs are gathered in one pass, and all its matrices are pruned from them. Only the
layer at work and its statistics are on the device. What is finished lies in the stage's directory, so that a
killed run goes on at the layer it was in.

Shapes stay, and so do parameters, KV cache and speed: `kvp.models.sparsity` counts what a storage of zeros
would save.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.linears import all_linears, linears
from kvp.models.masks import edited
from kvp.models.plans import edits_file, found_or_made
from kvp.models.shapes import layer_shapes
from kvp.options import options
from kvp.strategies.base import Strategy
from kvp.strategies.signals.estimate import layerwise_bytes
from kvp.strategies.signals.moments import Moments, input_moments
from kvp.strategies.signals.walk import Visit, walk
from kvp.strategies.target import Scores, Target
from kvp.strategies.templates.selection import Pattern, lowest, share
from kvp.types import Budget, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

Prune = Callable[[Tensor, float], Tensor]


@options
class SparseStrategy(Strategy):
    """Zero single weights.

    Class attributes:
        needs_covariance: Whether the inputs' covariance is gathered, or their norms only.

    Attributes:
        compare: Which weights of a matrix compete, if `pattern` is "unstructured": those of a "row" (an
            output), of a "block" of columns, or of the whole "matrix". Each loses the same fraction.
        pattern: "unstructured", or "N:M": N of M consecutive weights of a row stay.
    """

    late: ClassVar[tuple[str, ...]] = ("compensation", "compare", "pattern")  # nothing is scored beforehand
    needs_covariance: ClassVar[bool] = False
    sparsifies: ClassVar[bool] = True
    searches: ClassVar[bool] = True  # every layer depends on the pruned layers before it

    compare: str
    pattern: str = Field(
        default="unstructured", description='"unstructured", or "N:M" in quotes, such as "2:4"'
    )

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)
        if self.compensation is not None:
            raise ValueError(
                "strategy.compensation makes up for columns that are cut; this strategy cuts none: leave it out"
            )

    @cached_property
    def groups(self) -> Pattern | None:
        """Return the N:M pattern; None if unstructured."""
        return Pattern.parse(self.pattern)

    @abstractmethod
    def pruner(self, inputs: Moments | None) -> Prune:
        """Return a function from a weight (out, in) and its sparsity to the pruned weight.

        It is called for every matrix that these inputs feed, with weights in float32 or float64.

        Args:
            inputs: Moments of what enters the matrix; None if the strategy needs no calibration.
        """

    @abstractmethod
    def workspace(self, rows: int, columns: int) -> int:
        """Return the bytes that `pruner` and its call take at most, for a weight of float32."""

    def zeros(self, scores: Tensor, ratio: float) -> Tensor:
        """Return (out, in) boolean: the lowest of `scores` among those that compete."""
        if self.groups:
            return self.groups.lowest(scores)
        pools = scores if self.compare == "row" else scores.reshape(1, -1)
        return lowest(pools, share(ratio, pools.shape[1])).view(scores.shape)

    def count(self, rows: int, columns: int, ratio: float) -> int:
        """Return how many weights of a matrix go."""
        if self.groups:
            return rows * columns // self.groups.of * (self.groups.of - self.groups.kept)
        return rows * share(ratio, columns) if self.compare == "row" else share(ratio, rows * columns)

    @override
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        """Refuse another denominator, another ratio than that of the pattern, and widths that it does not divide."""
        if budget.of != "sparsity":
            raise ValueError(
                f"{type(self).__name__} zeroes single weights, which shortens no {budget.of}: choose ratio=sparsity"
            )
        if any(shape.experts for shape in layer_shapes(config)):
            raise ValueError(
                f"{type(self).__name__} zeroes weights of matrices, and most of {config.model_type} are experts, "
                "which stay whole: choose a strategy that cuts heads, channels or blocks"
            )
        matrices = all_linears(config)
        if groups := self.groups:
            if abs(groups.sparsity - budget.value) > 1e-6:
                raise ValueError(
                    f"strategy.pattern={self.pattern} is a sparsity of {groups.sparsity:g}, ratio.value="
                    f"{budget.value:g} asks for another: set ratio.value={groups.sparsity:g} or "
                    "strategy.pattern=unstructured"
                )
            for linear in matrices:
                if linear.columns % groups.of:
                    raise ValueError(
                        f"strategy.pattern={self.pattern} needs inputs in multiples of {groups.of}; "
                        f"{linear.module} has {linear.columns}: choose another pattern"
                    )
        reached = self._reached(config, {linear.module: budget.value for linear in matrices})
        if abs(reached - budget.value) > budget.tolerance:
            raise ValueError(
                f"a sparsity of {budget.value:g} cannot be reached in matrices this small; the nearest is "
                f"{reached:g}: set ratio.value to it, or raise ratio.tolerance"
            )

    def _reached(self, config: PretrainedConfig, ratios: Mapping[str, float]) -> float:
        """Return the sparsity of all matrices together, counted in whole weights."""
        matrices = all_linears(config)
        zeros = sum(self.count(each.rows, each.columns, ratios[each.module]) for each in matrices)
        return zeros / sum(each.rows * each.columns for each in matrices)

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        return {}  # a weight's worth depends on the budget, through the layers before it

    @override
    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        batches = target.batches if self.needs_calibration else ()
        self._tell(target, batches)
        ratios = self.ratios(target, budget.value, directory)
        reached = self._reached(target.config, ratios)
        if abs(reached - budget.value) > budget.tolerance:
            raise ValueError(
                f"a sparsity of {budget.value:g} would be {reached:g}, as the part of each row is rounded down: set "
                "strategy.compare=block, or raise ratio.tolerance or strategy.block_size"
            )
        edits: dict[str, Tensor] = {}
        for visit in walk(target.model, batches, type(self).__name__, offload=True):
            file = edits_file(directory, visit.layer)
            pruned = found_or_made(file, partial(self._pruned, visit, ratios))
            visit.leaving.enter_context(edited(target.model, pruned))
            edits |= pruned
        return Plan({}, edits)

    def ratios(self, target: Target, ratio: float, directory: Path) -> dict[str, float]:
        """Return the sparsity of each matrix, by the name of the module: here the same for all."""
        return {linear.module: ratio for linear in all_linears(target.config)}

    def _pruned(self, visit: Visit, ratios: Mapping[str, float]) -> dict[str, Tensor]:
        """Return the new weights of the layer visited, by name."""
        fed = linears(visit.model.config, visit.layer)
        moments: dict[str, Moments] = {}
        if self.needs_calibration:
            moments = input_moments(visit, [group[0].module for group in fed], self.needs_covariance)
        new = {}
        for group in fed:
            prune = self.pruner(moments.pop(group[0].module, None))
            for linear in group:
                weight = visit.model.get_parameter(linear.weight).detach()
                exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
                new[linear.weight] = prune(exact, ratios[linear.module]).to(weight.dtype).cpu().contiguous()
        return new

    @override
    def peak_bytes(
        self, config: PretrainedConfig, *, samples: int, batch_size: int, length: int, on_cpu: bool
    ) -> dict[str, int]:
        return layerwise_bytes(
            config,
            tokens=samples * length * self.needs_calibration,
            batch=batch_size * length * self.needs_calibration,
            covariance=self.needs_covariance,
            workspace=self.workspace,
            on_cpu=on_cpu,
        )

    def _tell(self, target: Target, batches: Sequence[Tensor]) -> None:
        batch_size, length = batches[0].shape if batches else (0, 0)
        estimate = self.peak_bytes(
            target.config,
            samples=sum(map(len, batches)),
            batch_size=batch_size,
            length=length,
            on_cpu=target.model.device.type == "cpu",
        )
        parts = ", ".join(f"{part} {taken / 2**30:.2f}" for part, taken in estimate.items())
        log.info("%s takes at most an estimated (GiB): %s", type(self).__name__, parts)
