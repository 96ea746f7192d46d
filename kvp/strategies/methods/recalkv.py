"""ReCalKV: alike heads share latents of keys, and latents of values are calibrated (arXiv:2505.24357).

1. Heads are reordered, so that the four whose keys are most alike share a latent (head-wise similarity-aware
   reordering). Queries, values and o_proj follow their head, so the function stays.
2. All values of a layer share one latent. Its expansion, then the latent itself, is refitted to the inputs that arrive
   from the layers compressed before (offline calibration).

Formula
-------
With the rows W_h of head h in k_proj and K the covariance of the inputs, heads are alike by

    CKA(h, i) = |W_h K W_i^T|^2 / (|W_h K W_h^T| |W_i K W_i^T|)      Frobenius norms

Pairs join from the most alike down, until each latent has its heads. Factors W ~ B A and ranks are as for Palu. With A
of values, and C the second moment of the arriving inputs, `iterations` times

    B = W C A^T (A C A^T)^-1      the least squares of values by the latent
    A = B^+ W

Faithful or interpreted
-----------------------
Faithful to XIANGLONGYAN/ReCalKV (`palu/decomposition.py`, `palu/model/modules/svd_linear.py`) in factors, grouping,
calibration and Fisher shares.

* The authors' code takes the CKA of whitened weights, centred over input channels. Here it is that of the keys
  themselves, centred over tokens.
* Ranks are multiples of `multiple_of` that meet the budget. The authors round to 32 and take what comes.
* A bias is a column of W. The authors leave biases out of the factors.
* The authors multiply values' expansions into o_proj. Here each head expands what it has read: the same function.

Cost
----
One forward and backward pass, and three walks with an eigendecomposition of hidden_size per layer. Decoding saves
bytes only: every step expands the keys of the whole cache (`kvp/models/latent_attention.py`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from kvp.models.linears import Linear, named_linears
from kvp.models.masks import edited, masked
from kvp.models.plans import edits_file, found_or_made
from kvp.options import options
from kvp.strategies.signals.head_moments import Heads
from kvp.strategies.signals.low_rank import Factors, Part, edits_of, factored, input_moments_of, rows_of
from kvp.strategies.signals.moments import TINY, Moments
from kvp.strategies.signals.outputs import visits_of_heads
from kvp.strategies.signals.walk import Visit
from kvp.strategies.target import Scores, Target
from kvp.strategies.templates.latent import FisherLatentStrategy
from kvp.types import Budget, Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ORDER = "order"  # of the heads, among the edits of a file


@options
class ReCalKV(FisherLatentStrategy):
    """ReCalKV, with either of its parts as an option.

    Attributes:
        reorder: Whether alike heads share a latent of keys; else neighbouring ones do.
        iterations: How often values are calibrated; 0: not at all.
    """

    late: ClassVar[tuple[str, ...]] = (*FisherLatentStrategy.late, "iterations")

    value_heads: int | None = Field(
        default=None, ge=1, description="KV heads per latent; null: all of a layer"
    )
    reorder: bool = True
    iterations: int = Field(default=1, ge=0, description="0 calibrates no values")

    @override
    def factors(self, visit: Visit, part: Part, moments: Moments) -> Factors:
        rows = reordered(visit, rows_of(visit, part), self._order(visit, moments))
        return factored(rows, moments.gram / moments.count, self.damping)

    @override
    def rewritten(self, config: PretrainedConfig) -> list[Linear]:
        return [*super().rewritten(config), *named_linears(config, "q", "o")]

    @override
    def edits(self, visit: Visit) -> dict[str, Tensor]:
        """Return the parameters of the layer visited, its heads in their new order."""
        heads, moved = Heads(visit), dict[str, Tensor]()
        order = self._order(visit, input_moments_of(visit))
        axes = {heads.name("q"): 0, heads.name("o"): 1}
        if heads.family.joint_norm:
            axes |= {f"{heads.prefix}.q_norm": 0, f"{heads.prefix}.k_norm": 0}
        if heads.family.sinks:
            axes[f"{heads.prefix}.sinks"] = 0
        for name, value in visit.model.get_submodule(heads.prefix).named_parameters(prefix=heads.prefix):
            axis = axes.get(name, axes.get(name.rpartition(".")[0]))
            if axis is not None and axis < value.dim():  # o_proj's bias has no heads
                split = value.detach().unflatten(axis, (heads.groups, -1)).index_select(axis, order)
                moved[name] = heads.stored(split.flatten(axis, axis + 1))
        return {**super().edits(visit), **moved}

    @override
    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        plan = self.plan(target.config, scores, budget, profile)
        for visit in visits_of_heads(target):
            found_or_made(_dense_file(directory, visit.layer), partial(self._uncalibrated, visit))
        edits: dict[str, Tensor] = {}
        for visit in visits_of_heads(target):
            keep = {space: kept for space, kept in plan.keep.items() if space.layer == visit.layer}
            rank = next(kept.shape[1] for space, kept in keep.items() if space.kind == "v_latent")
            make = partial(self._calibrated, visit, load_file(_dense_file(directory, visit.layer)), rank)
            made = found_or_made(edits_file(directory, visit.layer), make)
            visit.leaving.enter_context(edited(visit.model, made))  # the layers after it see its errors
            visit.leaving.enter_context(masked(visit.model, Plan(keep)))
            edits |= made
        return replace(plan, edits=edits)

    def _uncalibrated(self, visit: Visit) -> dict[str, Tensor]:
        """Return the edits of a layer of the dense model, and the order of its heads."""
        return {ORDER: self._order(visit, input_moments_of(visit)).cpu(), **self.edits(visit)}

    def _calibrated(self, visit: Visit, before: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
        """Return the edits of a layer, its values calibrated to the inputs that arrive."""
        edits = {name: edit for name, edit in before.items() if name != ORDER}
        if not self.iterations:
            return edits
        moments, name = input_moments_of(visit), Heads(visit).name("v")
        moment, rows = moments.gram / moments.count, rows_of(visit, "v")
        rows = reordered(visit, rows, before[ORDER].to(rows.device))
        reads = edits[f"{name}.weight"].to(rows)
        if f"{name}.bias" in edits:
            reads = torch.cat([reads, edits[f"{name}.bias"].to(rows)[:, None]], dim=1)
        reads = reads.unflatten(0, (len(rows), -1))[:, :rank]  # A
        for _ in range(self.iterations):
            crossed = moment @ reads.mT  # C A^T
            expands = rows @ crossed @ torch.linalg.pinv(reads @ crossed, hermitian=True)  # B
            reads = torch.linalg.pinv(expands) @ rows
        gone = rows.shape[1] - rank
        return edits | edits_of(visit, "v", pad(reads, (0, 0, 0, gone)), pad(expands, (0, gone)))

    def _order(self, visit: Visit, moments: Moments) -> Tensor:
        """Return the KV heads in their new order: those that share a latent of keys one after the other."""
        rows = rows_of(visit, "k")
        by_head = rows.flatten(0, 1).unflatten(0, (Heads(visit).groups, -1))
        if not self.reorder:
            return torch.arange(len(by_head), device=rows.device)
        crossed = torch.einsum("hri,ij,gsj->hgrs", by_head, moments.scatter / moments.count, by_head)
        inner = crossed.square().sum((2, 3))  # |W_h K W_i^T|^2, the square root of its diagonal |W_h K W_h^T|
        norms = inner.diagonal().clamp(min=TINY).sqrt()
        groups = grouped(inner / (norms[:, None] * norms), len(by_head) // len(rows))
        return torch.tensor(list(chain(*groups)), device=rows.device)


def _dense_file(directory: Path, layer: int) -> Path:
    return directory / f"uncalibrated-{layer}.safetensors"


def grouped(alike: Tensor, size: int) -> list[list[int]]:
    """Return groups of `size` heads: pairs join from the most alike down, while there is room for them.

    Args:
        alike: (heads, heads) symmetric; higher = more alike.
        size: A divisor of the number of heads.
    """
    groups: list[list[int]] = [[] for _ in range(len(alike) // size)]
    pairs = sorted(combinations(range(len(alike)), 2), key=lambda pair: (-alike[pair].item(), pair))
    for pair in pairs if size > 1 else ():
        placed = [group for group in groups if set(group) & set(pair)]
        room = [group for group in (placed or groups) if len(group) + 2 - len(set(group) & set(pair)) <= size]
        if len(placed) < 2 and room:
            room[0].extend(head for head in pair if head not in room[0])
    left = iter(sorted(set(range(len(alike))) - set(chain(*groups))))
    for group in groups:
        group.extend(next(left) for _ in range(size - len(group)))
    return groups


def reordered(visit: Visit, rows: Tensor, order: Tensor) -> Tensor:
    """Return the rows (latents, rows, in) of a projection with the KV heads in another order."""
    by_head = rows.flatten(0, 1).unflatten(0, (Heads(visit).groups, -1))
    return by_head[order].flatten(0, 1).unflatten(0, (len(rows), -1))
