"""Compensation: what the kept columns of o_proj and down_proj can do for those that were cut.

Both projections write to the residual stream, so a cut value channel or neuron is lost as a term of their
sum. From the calibration inputs X (tokens, in_features) of the dense projection W (out, in), with kept
columns K and removed columns R:

* `Bias` (FLAP, arXiv:2312.11983, section 3.3): the removed term's mean, W_R mean(X_R), becomes a bias.
* `LeastSquares`: W_K and a bias are refitted to give the dense output again,
  argmin ||X W^T - X_K V^T - b||^2 + ridge ||V - W_K||^2, in closed form. With an unlimited ridge V is W_K
  and b the bias above.

Any strategy takes one as `strategy/compensation=bias|least_squares`. Query-key channels and whole
sublayers enter no projection, so nothing is compensated for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvp.models.masks import masks_of
from kvp.strategies.walk import walk
from kvp.types import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Moments:
    """Mean and covariance of the inputs of a projection, gathered in float64, batch by batch."""

    width: int
    covariance: bool
    count: int = 0
    mean: Tensor = field(init=False)
    scatter: Tensor | None = None  # sum of (x - mean)(x - mean)^T

    def __post_init__(self) -> None:
        self.mean = torch.zeros(self.width, dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        """`inputs` is (tokens, width); Chan et al.'s update, which does not cancel."""
        inputs = inputs.double()
        rows, mean = len(inputs), inputs.mean(0)
        shift, total = mean - self.mean.to(mean.device), self.count + rows
        if self.covariance:
            centred = inputs - mean
            new = centred.T @ centred + torch.outer(shift, shift) * (self.count * rows / total)
            self.scatter = new if self.scatter is None else self.scatter + new
        self.mean = self.mean.to(mean.device) + shift * (rows / total)
        self.count = total


@dataclass(frozen=True, kw_only=True)
class Compensation(ABC):
    """Rewrites what a plan keeps, from the inputs that calibration data give."""

    needs_covariance = False

    @abstractmethod
    def solve(self, weight: Tensor, keep: Tensor, inputs: Moments) -> tuple[Tensor, Tensor]:
        """The kept columns (out, kept) and the bias (out,) to add.

        Args:
            weight: (out, in) of the dense projection, float64.
            keep: (in,) boolean.
            inputs: Of the dense projection.
        """

    def refit(self, model: PreTrainedModel, batches: Sequence[Tensor], plan: Plan) -> Plan:
        """The plan with the rewritten weights and biases in its edits; one layer's statistics at a time."""
        keeps = {name: axes[1] for name, axes in masks_of(model.config, plan).items() if 1 in axes}
        keeps = {name: keep for name, keep in keeps.items() if not keep.all()}
        edits = dict(plan.edits)
        for visit in walk(model, batches, "compensation") if keeps else ():
            names = [name for name in keeps if name.startswith(f"{visit.name}.")]
            moments = {name: Moments(len(keeps[name]), self.needs_covariance) for name in names}
            for inputs in visit.inputs(*names):
                for name in names:
                    moments[name].add(inputs[name])
            for name in names:
                edits |= self._edit(model, name, keeps[name], moments[name])
        return replace(plan, edits=edits)

    def _edit(self, model: PreTrainedModel, name: str, keep: Tensor, inputs: Moments) -> dict[str, Tensor]:
        parameters = dict(model.get_submodule(name).named_parameters())
        weight, keep = parameters["weight"].detach(), keep.to(inputs.mean.device)
        columns, bias = self.solve(weight.double(), keep, inputs)
        edited = weight.clone()
        edited[:, keep] = columns.to(weight.dtype)
        if "bias" in parameters:
            bias = bias + parameters["bias"].detach().double()
        return {f"{name}.weight": edited.cpu(), f"{name}.bias": bias.to(weight.dtype).cpu()}


@dataclass(frozen=True, kw_only=True)
class Bias(Compensation):
    """Adds the mean of what was removed; the weights stay."""

    def solve(self, weight: Tensor, keep: Tensor, inputs: Moments) -> tuple[Tensor, Tensor]:
        """W_K, and W_R mean(X_R)."""
        return weight[:, keep], weight[:, ~keep] @ inputs.mean[~keep]


@dataclass(frozen=True, kw_only=True)
class LeastSquares(Compensation):
    """Refits the kept columns, by the covariance C of the inputs.

    V = W_K + W_R C_RK (C_KK + ridge d I)^-1, with d the mean of the diagonal of C_KK, and the bias that
    keeps the mean output.

    Attributes:
        ridge: Relative to d; draws V to W_K where the data say little.
    """

    needs_covariance = True
    ridge: float = 0.01

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError(f"strategy.compensation.ridge must be > 0, got {self.ridge}")

    def solve(self, weight: Tensor, keep: Tensor, inputs: Moments) -> tuple[Tensor, Tensor]:
        """V and the bias."""
        assert inputs.scatter is not None
        covariance = inputs.scatter / inputs.count
        kept, cross = covariance[keep][:, keep], covariance[~keep][:, keep]
        ridge = self.ridge * kept.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        regular = kept + ridge * torch.eye(len(kept), dtype=kept.dtype, device=kept.device)
        update = torch.linalg.solve(regular, (weight[:, ~keep] @ cross).T).T
        columns = weight[:, keep] + update
        return columns, weight @ inputs.mean - columns @ inputs.mean[keep]
