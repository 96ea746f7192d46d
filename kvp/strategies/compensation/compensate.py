"""Compensation: the kept columns of o_proj and down_proj make up for those that were cut.

Both projections write to the residual stream, so a cut value channel or neuron is lost as a term of their
sum. From the calibration inputs X (tokens, in_features) of the dense projection W (out, in), with kept
columns K and removed columns R:

* `Bias` (FLAP, arXiv:2312.11983; `compress` in its `lib/prune.py`): the removed term's mean,
  W_R mean(X_R), becomes a bias.
* `LeastSquares`: W_K and a bias are refitted to give the dense output again,
  argmin ||X W^T - X_K V^T - b||^2 + ridge ||V - W_K||^2, in closed form. With an unlimited ridge V is W_K
  and b the bias above. Without the intercept b it is Numerical Pruning's (arXiv:2412.12441).
* `Sequential`: the same fit, but to what really arrives: the inputs are those that the cut and refitted layers
  before give (SparseGPT and SliceGPT calibrate so), the outputs still the dense model's.

Any strategy takes one as `strategy/compensation=bias|least_squares|sequential`. Query-key channels and whole
sublayers enter no projection, so nothing is compensated for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.linears import all_linears
from kvp.models.masks import edited, masks_of
from kvp.options import options
from kvp.strategies.signals.moments import TINY, Moments, input_moments
from kvp.strategies.signals.walk import Visit, found_edits, walk
from kvp.types import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@options
class Compensation(ABC):
    """Rewrite what a plan keeps, from the inputs that calibration data give."""

    node: ClassVar[str] = "strategy.compensation"

    @abstractmethod
    def refit(self, model: PreTrainedModel, batches: Sequence[Tensor], plan: Plan, directory: Path) -> Plan:
        """Return the plan with the rewritten weights and biases in its edits; go on after the last layer made.

        Edits that the plan holds already change the basis only: the dense model with them is the same function.

        Args:
            model: The dense model.
            batches: Calibration ids.
            plan: The indices that stay, and a change of basis.
            directory: Keeps the layers that are done, of the same model, batches and plan.
        """


@options
class OnDenseInputs(Compensation):
    """Rewrite projection by projection, from the inputs of the dense model."""

    needs_covariance: ClassVar[bool] = False

    @abstractmethod
    def solve(self, weight: Tensor, keep: Tensor, inputs: Moments) -> tuple[Tensor, Tensor | None]:
        """Return the kept columns (out, kept), and the bias (out,) to add if there is one.

        Args:
            weight: (out, in) of the dense projection, float64.
            keep: (in,) boolean.
            inputs: Moments of what enters the dense projection.
        """

    @override
    def refit(self, model: PreTrainedModel, batches: Sequence[Tensor], plan: Plan, directory: Path) -> Plan:
        keeps = cut_inputs(model, plan)
        with edited(model, plan.edits):
            visits = walk(model, batches, "compensation") if keeps else ()
            made = found_edits(visits, partial(self._edits, keeps=keeps), directory)
        return replace(plan, edits={**plan.edits, **made})

    def _edits(self, visit: Visit, keeps: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [name for name in keeps if name.startswith(f"{visit.name}.")]
        edits: dict[str, Tensor] = {}
        for name, moments in input_moments(visit, names, self.needs_covariance).items():
            edits |= self._edit(visit.model, name, keeps[name], moments)
        return edits

    def _edit(self, model: PreTrainedModel, name: str, keep: Tensor, inputs: Moments) -> dict[str, Tensor]:
        parameters = dict(model.get_submodule(name).named_parameters())
        weight, keep = parameters["weight"].detach(), keep.to(inputs.mean.device)
        columns, bias = self.solve(weight.double(), keep, inputs)
        edited = weight.clone()
        edited[:, keep] = columns.to(weight.dtype)
        edits = {f"{name}.weight": edited.cpu()}
        if bias is not None:
            if "bias" in parameters:
                bias = bias + parameters["bias"].detach().double()
            edits[f"{name}.bias"] = bias.to(weight.dtype).cpu()
        return edits


def cut_inputs(model: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
    """Return (in_features,) boolean per projection that loses inputs, in the order of the forward pass: True stays."""
    place = {linear.module: number for number, linear in enumerate(all_linears(model.config))}
    keeps = {name: axes[1] for name, axes in masks_of(model.config, plan).items() if 1 in axes}
    ordered = sorted(keeps, key=lambda name: place.get(name, -1))  # what expands a latent comes before o_proj
    return {name: keeps[name] for name in ordered if not keeps[name].all()}


@options
class Bias(OnDenseInputs):
    """Add the mean of what was removed as a bias; the weights stay."""

    @override
    def solve(self, weight: Tensor, keep: Tensor, inputs: Moments) -> tuple[Tensor, Tensor]:
        return weight[:, keep], weight[:, ~keep] @ inputs.mean[~keep]


@options
class LeastSquares(OnDenseInputs):
    """Refit the kept columns, by the covariance C of the inputs.

    V = W_K + W_R C_RK (C_KK + ridge d I)^-1, with d the mean of the diagonal of C_KK, and the bias that
    keeps the mean output.

    Attributes:
        ridge: Relative to d; draws V to W_K where the data say little.
        intercept: Whether a bias is fitted too; without it C is the uncentred X^T X / tokens.
    """

    needs_covariance: ClassVar[bool] = True

    ridge: float = Field(default=0.01, gt=0, description="relative to the mean variance of the kept inputs")
    intercept: bool = True

    @override
    def solve(self, weight: Tensor, keep: Tensor, inputs: Moments) -> tuple[Tensor, Tensor | None]:
        covariance = (inputs.scatter if self.intercept else inputs.gram) / inputs.count
        kept, cross = covariance[keep][:, keep], covariance[~keep][:, keep]
        ridge = self.ridge * kept.diagonal().mean().clamp(min=TINY)
        regular = kept + ridge * torch.eye(len(kept), dtype=kept.dtype, device=kept.device)
        update = torch.linalg.solve(regular, (weight[:, ~keep] @ cross).T).T
        columns = weight[:, keep] + update
        bias = weight @ inputs.mean - columns @ inputs.mean[keep]
        return columns, bias if self.intercept else None
