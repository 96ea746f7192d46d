"""Mosaic's projection pruning: run SparseGPT with a sparsity of its own for every projection (arXiv:2504.06323).

Projections with more outliers keep more weights (FGCS 175, 2026).

Formula
-------
With Wanda's A = |W| ||X|| on the dense model, the outliers of a projection are

    D = fraction of its weights with A > outlier * mean A of the matrix

Within each of q, k, v, o, gate, up and down, the layer with most outliers keeps most. OWL's map (arXiv:2310.05175)
takes the fractions D of the layers to [0, 2 spread], and that, less the mean, is what a layer keeps more than others.
The targets are then shifted together to the asked mean sparsity of all weights, within `BOUNDS`.

Faithful or interpreted
-----------------------
Interpreted, because we could not read the paper's text. This is the formula of the repository (blessonvar/Mosaic;
outlier 3 and spread 0.08 are its defaults), applied per projection.

* The released code subtracts a projection's mean from the *layer's* curve, so that all projections of a layer share
  that curve; not so here.
* The structured half ("composite") is not released: `strategy=chain` puts this on top of any structural strategy.

Cost
----
SparseGPT's, and one forward pass more for the outliers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.linears import all_linears, linears
from kvp.models.plans import found_or_made
from kvp.options import options
from kvp.strategies.signals.moments import Moments, input_moments
from kvp.strategies.signals.walk import Visit, walk
from kvp.strategies.target import Target
from kvp.strategies.templates.surgeon import SurgeonStrategy

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BOUNDS = (0.01, 0.99)  # of a projection's sparsity
OUTLIERS = "outliers.safetensors"


@options
class Mosaic(SurgeonStrategy):
    """SparseGPT with a sparsity of each projection's own.

    Attributes:
        outlier: A weight is an outlier if A exceeds this many times the mean of the matrix.
        spread: The sparsity of a projection lies within about this of the mean.
    """

    late: ClassVar[tuple[str, ...]] = (*SurgeonStrategy.late, "outlier", "spread")

    outlier: float = Field(default=3.0, ge=0, description="times the mean of a matrix")
    spread: float = Field(
        default=0.08, ge=0, description="the sparsity of a projection lies within about this of the mean"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups:
            raise ValueError(
                f"strategy.pattern={self.pattern} is one sparsity for all projections, which Mosaic varies: use "
                "strategy=sparsegpt, or strategy.pattern=unstructured"
            )

    @override
    def ratios(self, target: Target, ratio: float, directory: Path) -> dict[str, float]:

        def make() -> dict[str, Tensor]:
            return {
                name: torch.tensor(part, dtype=torch.float64)
                for visit in walk(target.model, target.batches, "outliers", offload=True)
                for name, part in self._outliers(visit).items()
            }

        found = {name: part.item() for name, part in found_or_made(directory / OUTLIERS, make).items()}
        return targets(target.config, found, ratio, self.spread)

    def _outliers(self, visit: Visit) -> dict[str, float]:
        """Return the outliers of each matrix of the layer visited, by the name of the module."""
        fed = linears(visit.model.config, visit.layer)
        moments = input_moments(visit, [group[0].module for group in fed])
        return {
            linear.module: outliers(
                visit.model.get_parameter(linear.weight).detach(), moments[group[0].module], self.outlier
            )
            for group in fed
            for linear in group
        }


def outliers(weight: Tensor, inputs: Moments, times: float) -> float:
    """Return the fraction of weights whose |W_ij| ||X_j|| exceeds `times` the mean."""
    scores = weight.abs() * inputs.squares.sqrt()
    return (scores > times * scores.mean()).double().mean().item()


def targets(
    config: PretrainedConfig, found: Mapping[str, float], ratio: float, spread: float
) -> dict[str, float]:
    """Return the sparsity of each matrix, by the name of the module.

    Args:
        config: The config of the model.
        found: The outliers of each matrix.
        ratio: The mean over all weights.
        spread: See `Mosaic`.
    """
    weights = {linear.module: linear.rows * linear.columns for linear in all_linears(config)}
    kinds: dict[str, list[str]] = {}
    for name in weights:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    wanted: dict[str, float] = {}
    for names in kinds.values():
        least, most = (extreme(found[name] for name in names) for extreme in (min, max))
        # OWL's map: the layer of the most outliers keeps 2 * spread more than the layer of the fewest.
        more = {name: 2 * spread * (found[name] - least) / ((most - least) or 1.0) for name in names}
        mean = sum(more.values()) / len(names)
        wanted |= {name: ratio - (more[name] - mean) for name in names}
    return _centred(wanted, weights, ratio)


def _centred(wanted: Mapping[str, float], weights: Mapping[str, int], ratio: float) -> dict[str, float]:
    """Return `wanted`, shifted together so that the mean over all weights is `ratio`, within `BOUNDS`."""
    lowest, highest = (pick(bound, ratio) for pick, bound in zip((min, max), BOUNDS, strict=True))

    def moved(shift: float) -> dict[str, float]:
        return {name: min(max(value + shift, lowest), highest) for name, value in wanted.items()}

    low, high, total = -1.0, 1.0, sum(weights.values())
    for _ in range(60):  # the mean grows with the shift
        middle = (low + high) / 2
        mean = sum(part * weights[name] for name, part in moved(middle).items()) / total
        low, high = (middle, high) if mean < ratio else (low, middle)
    return moved(high)
