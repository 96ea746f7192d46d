"""Compensation layer by layer: every refit sees what the cut and refitted layers before it really give.

With X the dense inputs of a projection W and Z the kept inputs that arrive in the cut model,

    V = argmin ||X W^T - Z V^T||^2 + ridge d ||V - W_K||^2 = (W X^T Z + ridge d W_K) (Z^T Z + ridge d I)^-1,

d the mean of the diagonal of Z^T Z. A projection that has a bias gets it refitted too (X and Z centred); none is
added, so that stock engines still serve the model. The target is the dense output of the projection alone: with the
residual stream's own drift added to it, the packaged model comes out worse (experiments/frontier).

A sequence's first token is one among many in these sums, but every later token attends to it (StreamingLLM's attention
sink, arXiv 2309.17453; massive activations, 2402.17762). Where a refit spoils what early layers make of it, a whole
window is lost: `sink_weight` lets it count as so many tokens.

A free refit of o_proj gives each query head as many directions of the values as the cache has. With `factored` a head
keeps the `head_dim` directions W_h that it read before: V_h = V'_h W_h, and V' is fitted to W_h z. Multi-head latent
attention stores V' and W_h, and V' is as small as the dense o_proj.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.family import family_of
from kvp.models.masks import edited, masked
from kvp.models.plans import edits_file, found_or_made
from kvp.models.shapes import dense_shapes, layer_shapes
from kvp.options import options
from kvp.strategies.compensation.compensate import Compensation, cut_inputs
from kvp.strategies.signals.gradients import require_finite
from kvp.strategies.signals.moments import TINY
from kvp.strategies.signals.walk import Visit, walk
from kvp.types import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@options
class Sequential(Compensation):
    """Least squares on the inputs of the cut model.

    Attributes:
        ridge: Relative to d; draws V to W_K where the data say little.
        sink_weight: Tokens that the first of a sequence counts as; None: one, as all others do.
        factored: Whether each query head's o_proj stays in the directions of the values that it read before.
    """

    ridge: float = Field(default=0.1, gt=0, description="relative to the mean square of the kept inputs")
    sink_weight: float | None = Field(
        default=None, gt=0, description="tokens that the first of a sequence counts as"
    )
    factored: bool = Field(default=False, description="o_proj of each head keeps its rank, as MLA stores it")

    @torch.no_grad()
    @override
    def refit(self, model: PreTrainedModel, batches: Sequence[Tensor], plan: Plan, directory: Path) -> Plan:
        """One layer on the device at a time."""
        keeps, edits = cut_inputs(model, plan), dict(plan.edits)
        if not keeps:
            return plan
        states: list[Tensor] | None = None  # what the cut layers before this one give
        # The walk carries the dense states. `dense` and `arriving` are the same layer, entered by either of the two.
        for dense in walk(model, batches, "compensation", offload=True):
            arriving = Visit(model, dense.layer, dense.states if states is None else states, ExitStack())
            so_far = replace(plan, edits=dict(edits))
            make = partial(self._edits, dense, arriving, keeps, so_far)
            edits |= found_or_made(
                edits_file(directory, dense.layer), make
            )  # after a kill, `make` does not run
            with layer_cut(dense, replace(plan, edits=edits)):
                states = arriving.outputs()  # of the layer cut and refitted: what arrives at the next one
        return replace(plan, edits=edits)

    def _edits(
        self, dense: Visit, arriving: Visit, keeps: dict[str, Tensor], plan: Plan
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        names = [name for name in keeps if name.startswith(f"{dense.name}.")]
        # `through` spares the walk a pass: nothing has changed this layer yet. Exhaust it, or that is lost.
        whole = list(dense.through(*names)) if names else []
        for name in names:
            so_far = replace(plan, edits={**plan.edits, **found})
            entering = [inputs.pop(name) for inputs in whole]
            found |= self._refitted(arriving, name, entering, keeps[name], so_far)
        return found

    def _refitted(
        self, arriving: Visit, name: str, entering: Sequence[Tensor], keep: Tensor, plan: Plan
    ) -> dict[str, Tensor]:
        """Return the refitted weight of one projection, and the bias if it has one.

        Args:
            arriving: The layer, with the states that the cut and refitted layers before it give.
            name: The projection.
            entering: Per batch, (tokens, in) what enters the projection in the dense model.
            keep: (in,) boolean.
            plan: What is kept and rewritten so far.
        """
        parameters = dict(arriving.model.get_submodule(name).named_parameters())
        weight = parameters["weight"].detach()
        keep = keep.to(weight.device)
        prior = plan.edits.get(f"{name}.weight", weight).to(weight.device).double()[:, keep]
        read = _directions(arriving, name, prior) if self.factored else None
        sums = Products(intercept="bias" in parameters)
        with layer_cut(arriving, plan):
            for x, states, inputs in zip(entering, arriving.states, arriving.inputs(name), strict=True):
                counts = torch.ones(states.shape[:2], device=states.device)
                counts[:, 0] = self.sink_weight or 1
                kept = inputs[name][:, keep]
                if read is not None:
                    kept = at_work(kept) @ read.T.to(at_work(kept))
                sums.add(at_work(x) @ at_work(weight).T, kept, counts.flatten())
        require_finite(sums.sums["gram"].sum(), f"what enters {name}")
        solved = sums.solve(prior if read is None else prior @ read.T, self.ridge)
        columns = solved if read is None else solved @ read
        full = torch.zeros_like(weight)
        full[:, keep] = columns.to(weight.dtype)
        found = {f"{name}.weight": full.cpu()}
        if "bias" in parameters:
            shift = sums.mean("wanted") - solved @ sums.mean("arriving")
            found[f"{name}.bias"] = (parameters["bias"].detach().double() + shift).to(weight.dtype).cpu()
        return found


def _directions(visit: Visit, name: str, columns: Tensor) -> Tensor | None:
    """Return (heads * head_dim, in) orthonormal directions that each query head's o_proj reads; None: all there are.

    Args:
        visit: The layer.
        name: The projection; others than o_proj have no heads.
        columns: (out, in) what is kept of it, before the refit.
    """
    config = visit.model.config
    heads, width = layer_shapes(config)[visit.layer].num_attention_heads, dense_shapes(config)[0].v_head_dim
    if not name.endswith(f".{family_of(config).o}") or columns.shape[1] // heads <= width:
        return None
    by_head = columns.unflatten(1, (heads, -1)).transpose(0, 1)
    return torch.block_diag(*torch.linalg.svd(by_head, full_matrices=False).Vh[:, :width])


class Products:
    """Means over tokens that a fit of y = W x by z needs; batches in their dtype, float32 at least, sums in float64.

    Attributes:
        intercept: Whether a bias takes up the means.
    """

    def __init__(self, *, intercept: bool) -> None:
        self.intercept, self.count = intercept, 0.0
        self.sums: dict[str, Tensor] = {}

    def add(self, y: Tensor, z: Tensor, counts: Tensor | None = None) -> None:
        """Add y (tokens, out) and z (tokens, kept) of the same tokens; each counts `counts` times, else once."""
        counts = torch.ones(len(z), device=z.device) if counts is None else counts
        y, z = at_work(y), at_work(z)
        root = counts.to(z.dtype).sqrt()[:, None]
        y, z = root * y, root * z
        self.count += counts.sum().item()
        for name, total in {
            "gram": z.T @ z,
            "cross": y.T @ z,
            "square": y.square().sum(),
            "wanted": (root * y).sum(0),
            "arriving": (root * z).sum(0),
        }.items():
            self.sums[name] = self.sums[name].add_(total) if name in self.sums else total.double()

    def mean(self, name: str) -> Tensor:
        """Return one of the means.

        | name | mean of | shape |
        |---|---|---|
        | gram | z z^T | (kept, kept) |
        | cross | y z^T | (out, kept) |
        | square | abs(y)^2 | () |
        | wanted | y | (out,) |
        | arriving | z | (kept,) |
        """
        return self.sums[name] / self.count

    def centred(self) -> tuple[Tensor, Tensor]:
        """Return gram (kept, kept) and cross (out, kept), about the means if there is a bias to take them up."""
        gram, cross = self.mean("gram"), self.mean("cross")
        if self.intercept:
            arriving = self.mean("arriving")
            gram -= torch.outer(arriving, arriving)
            cross -= torch.outer(self.mean("wanted"), arriving)
        return gram, cross

    def solve(self, prior: Tensor, ridge: float) -> Tensor:
        """Return V (out, kept), which the ridge draws to the prior W_K.

        Raises:
            FloatingPointError: The inputs depend on each other, and the ridge is too small to tell them apart.
        """
        gram, cross = self.centred()
        amount = _amount(gram, ridge)
        gram.diagonal().add_(amount)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            raise FloatingPointError(
                f"strategy.compensation.ridge={ridge} is lost in rounding: raise it, or calibrate on more tokens"
            )
        return torch.cholesky_solve((cross + amount * prior).T, factor).T

    def residual(self, prior: Tensor, ridge: float) -> float:
        """Return the mean over tokens of |W x - V z|^2, without an intercept.

        V solves V (G + a I) = C + a W_K, with G the gram, C the cross and a the ridge. So V G V^T is known without G.
        """
        gram, cross = self.centred()
        columns, amount = self.solve(prior, ridge), _amount(gram, ridge)
        return (self.mean("square") + ((amount * (prior - columns) - cross) * columns).sum()).item()


def _amount(gram: Tensor, ridge: float) -> Tensor:
    """Return what the ridge adds to the diagonal of a gram."""
    return ridge * gram.diagonal().mean().clamp(min=TINY)


def at_work(tensor: Tensor) -> Tensor:
    """Return a tensor in its dtype, float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def layer_cut(visit: Visit, plan: Plan) -> Iterator[None]:
    """Give the model the visited layer as it is after the cut, for the time of a `with`."""
    own = {name: edit for name, edit in plan.edits.items() if name.startswith(f"{visit.name}.")}
    with edited(visit.model, own), masked(visit.model, plan):
        yield
