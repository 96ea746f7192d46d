"""Compensation layer by layer: every refit sees what the cut and refitted layers before it really give.

With X the dense inputs of a projection W and Z the kept inputs that arrive in the cut model,

    V = argmin ||X W^T - Z V^T||^2 + ridge d ||V - W_K||^2 = (W X^T Z + ridge d W_K) (Z^T Z + ridge d I)^-1,

d the mean of the diagonal of Z^T Z. A projection that has a bias gets it refitted too (X and Z centred); none is
added, so that stock engines still serve the model. The target is the dense output of the projection alone: with the
residual stream's own drift added to it, the packaged model comes out worse (experiments/frontier).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvp.models.masks import edited, masked
from kvp.models.plans import edits_file, found_or_made
from kvp.strategies.compensate import Compensation, cut_inputs
from kvp.strategies.signals import require_finite
from kvp.strategies.walk import Visit, walk
from kvp.types import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Sequential(Compensation):
    """Least squares on the inputs of the cut model.

    Attributes:
        ridge: Relative to d; draws V to W_K where the data say little.
    """

    ridge: float = 0.1

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError(f"strategy.compensation.ridge must be > 0, got {self.ridge}")

    @torch.no_grad()
    def refit(self, model: PreTrainedModel, batches: Sequence[Tensor], plan: Plan, directory: Path) -> Plan:
        """One layer on the device at a time."""
        keeps, edits = cut_inputs(model, plan), dict(plan.edits)
        states: list[Tensor] | None = None  # of the cut model, before the layer
        for visit in walk(model, batches, "compensation", offload=True) if keeps else ():
            arriving = Visit(model, visit.layer, visit.states if states is None else states, ExitStack())
            make = partial(self._edits, visit, arriving, keeps, replace(plan, edits=edits))
            edits |= found_or_made(edits_file(directory, visit.layer), make)
            with cut(visit, replace(plan, edits=edits)):
                states = arriving.outputs()
        return replace(plan, edits=edits)

    def _edits(
        self, dense: Visit, arriving: Visit, keeps: dict[str, Tensor], plan: Plan
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in (name for name in keeps if name.startswith(f"{dense.name}.")):
            so_far = replace(plan, edits={**plan.edits, **found})
            found |= self._refitted(dense, arriving, name, keeps[name], so_far)
        return found

    def _refitted(
        self, dense: Visit, arriving: Visit, name: str, keep: Tensor, plan: Plan
    ) -> dict[str, Tensor]:
        parameters = dict(dense.model.get_submodule(name).named_parameters())
        weight = parameters["weight"].detach()
        keep = keep.to(weight.device)
        prior = plan.edits.get(f"{name}.weight", weight).to(weight.device).double()[:, keep]
        sums = Products(weight, intercept="bias" in parameters)
        wanted = [inputs[name] for inputs in dense.inputs(name)]
        with cut(dense, plan):
            for x, inputs in zip(wanted, arriving.inputs(name), strict=True):
                sums.add(x, inputs[name][:, keep])
        require_finite(sums.gram.sum(), f"what enters {name}")
        columns = sums.solve(prior, self.ridge)
        full = torch.zeros_like(weight)
        full[:, keep] = columns.to(weight.dtype)
        found = {f"{name}.weight": full.cpu()}
        if "bias" in parameters:
            bias = parameters["bias"].detach().double() + sums.wanted - columns @ sums.arriving
            found[f"{name}.bias"] = bias.to(weight.dtype).cpu()
        return found


class Products:
    """Means over tokens of z z^T, of (W x) z^T, of |W x|^2, and of W x and z: of a batch in the model's dtype, float32
    at least, of all batches in float64.

    Attributes:
        weight: (out, in), W, in what a batch is multiplied in.
        gram: (kept, kept)
        cross: (out, kept)
        square: ()
        wanted: (out,)
        arriving: (kept,)
    """

    def __init__(self, weight: Tensor, *, intercept: bool) -> None:
        self.weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        self.intercept, self.count = intercept, 0
        zero = weight.new_zeros((), dtype=torch.float64)
        self.gram = self.cross = self.square = self.wanted = self.arriving = zero

    def add(self, x: Tensor, z: Tensor) -> None:
        """(tokens, in) and (tokens, kept), of the same tokens."""
        z = z.to(self.weight)
        y = x.to(self.weight) @ self.weight.T
        self.count += len(z)
        for name, mean in {
            "gram": z.T @ z / len(z),
            "cross": y.T @ z / len(z),
            "square": y.square().sum(1).mean(),
            "wanted": y.mean(0),
            "arriving": z.mean(0),
        }.items():
            before = getattr(self, name)
            setattr(self, name, mean.double().sub_(before).mul_(len(z) / self.count).add_(before))

    def centred(self) -> tuple[Tensor, Tensor]:
        """`gram` and `cross`, about the means if there is a bias to take them up."""
        if not self.intercept:
            return self.gram, self.cross
        about = (torch.outer(mean, self.arriving) for mean in (self.arriving, self.wanted))
        return self.gram - next(about), self.cross - next(about)

    def solve(self, prior: Tensor, ridge: float) -> Tensor:
        """V, (out, kept), from W_K."""
        gram, cross = self.centred()
        amount = ridge * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        regular = gram + amount * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(regular, (cross + amount * prior).T).T

    def residual(self, prior: Tensor, ridge: float) -> float:
        """Mean over tokens of |W x - V z|^2, without an intercept."""
        columns = self.solve(prior, ridge)
        return (self.square + ((columns @ self.gram - 2 * self.cross) * columns).sum()).item()


@contextmanager
def cut(visit: Visit, plan: Plan) -> Iterator[None]:
    """The model with the layer visited as it is after the cut, for the time of a `with`."""
    own = {name: edit for name, edit in plan.edits.items() if name.startswith(f"{visit.name}.")}
    with edited(visit.model, own), masked(visit.model, plan):
        yield
