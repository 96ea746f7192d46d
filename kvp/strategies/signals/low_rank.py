"""Factors of the projections of keys and values: what gives a latent, and what expands it.

KV heads that share a latent have rows W of k_proj or v_proj; a bias is the last column, read by a constant 1. With the
second moment C of the inputs x and any root S S^T = C, the SVD W S = U E V^T gives

    c = E^(1/2) V^T S^-1 x        the latent, which is cached
    W x ~ U E^(1/2) c             its expansion

Of all maps through r channels, the first r of c lose the least of W x: the mean square E_j^2 per channel dropped.
Every root gives the same. Cholesky's (SVD-LLM, arXiv:2403.07378, and Palu), the symmetric one (CARE) and two SVDs
(SVD-LLM v2) differ in rounding and in what is added to C for stability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvp.models.family import family_of
from kvp.models.shapes import layer_shapes
from kvp.strategies.signals.gradients import require_finite
from kvp.strategies.signals.moments import TINY, Moments
from kvp.strategies.signals.walk import Visit

Part = Literal["k", "v"]
SMALLEST = 1e-7  # of C's largest eigenvalue: directions that no token takes would be divided by nothing


@dataclass(frozen=True)
class Factors:
    """The factors of the projections of one part, per latent, best channel first.

    Attributes:
        reads: (latents, channels, in) what gives the latent, a bias as the last column.
        expands: (latents, rows, channels) what expands it.
        energies: (latents, channels) E^2, the mean square per token that each channel gives the projection's output.
    """

    reads: Tensor
    expands: Tensor
    energies: Tensor


def factored(rows: Tensor, moment: Tensor, damping: float = 0.0) -> Factors:
    """Return the factors of rows (latents, rows, in) under a second moment (in, in) of the inputs, float64."""
    values, vectors = torch.linalg.eigh(moment)
    values = values + damping * values.mean()
    root = values.clamp(min=SMALLEST * values[-1].clamp(min=TINY)).sqrt()  # S = vectors diag(root)
    left, singular, right = torch.linalg.svd(rows @ (vectors * root), full_matrices=False)
    scale = singular.sqrt()
    reads, expands = scale[..., None] * right @ (vectors / root).T, left * scale[:, None]
    short = rows.shape[1] - singular.shape[1]  # if the inputs are fewer than the heads' channels
    return Factors(pad(reads, (0, 0, 0, short)), pad(expands, (0, short)), pad(singular.square(), (0, short)))


def rows_of(visit: Visit, part: Part) -> Tensor:
    """Return a projection by latent, (latents, rows, in), float64; a bias is the last column."""
    shape, name = layer_shapes(visit.model.config)[visit.layer], module_of(visit, part)
    latents = shape.k_latents if part == "k" else shape.v_latents
    assert latents is not None
    weight = visit.model.get_parameter(f"{name}.weight").detach().double()
    if biased(visit):
        bias = visit.model.get_parameter(f"{name}.bias").detach().double()
        weight = torch.cat([weight, bias[:, None]], dim=1)
    return weight.unflatten(0, latents)


def edits_of(visit: Visit, part: Part, reads: Tensor, expands: Tensor) -> dict[str, Tensor]:
    """Return the parameters that such factors make (see `Factors`), by name, on the CPU."""
    family, name = family_of(visit.model.config), module_of(visit, part)
    up = f"{visit.name}.{family.attention}.{family.k_up if part == 'k' else family.v_up}"
    reads, expands = reads.flatten(0, 1), expands.transpose(0, 1).flatten(1)
    edits = {f"{up}.weight": expands, f"{name}.weight": reads}
    if biased(visit):
        edits |= {f"{name}.weight": reads[:, :-1], f"{name}.bias": reads[:, -1]}
    return {key: edit.to("cpu", visit.model.dtype).contiguous() for key, edit in edits.items()}


def input_moments_of(visit: Visit) -> Moments:
    """Return the moments of what enters k_proj and v_proj, with a last channel of 1 if they have a bias."""
    name, extra = module_of(visit, "k"), int(biased(visit))
    moments = Moments(visit.model.get_parameter(f"{name}.weight").shape[1] + extra, covariance=True)
    for inputs in visit.inputs(name):
        moments.add(pad(inputs[name], (0, extra), value=1.0))
    require_finite(moments.scatter.sum(), f"what enters {name}")
    return moments


def biased(visit: Visit) -> bool:
    """Tell whether the projections of keys and values have a bias."""
    return visit.model.get_submodule(module_of(visit, "k")).bias is not None


def module_of(visit: Visit, part: Part) -> str:
    """Return the name of the projection of a part."""
    family = family_of(visit.model.config)
    return f"{visit.name}.{family.attention}.{family.k if part == 'k' else family.v}"
