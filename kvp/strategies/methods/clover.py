"""CLOVER: value channels in the singular directions of values times o_proj, head by head (arXiv:2411.17426, ICML 2025).

A value head and its columns of o_proj act through their product alone. In the basis of that product's SVD the channels
are orthogonal, and the smallest go. Nothing is read but weights.

Formula
-------
With the rows W of a KV group in v_proj, and O the columns of o_proj of its query heads, one below the other:

    O W = U E V^T        W' = E^(1/2) V^T, O' = U E^(1/2); channels of the largest E stay

It is found from d x d matrices, d = head_dim: with S = W W^T, the E^2 are the eigenvalues of S^(1/2) O^T O S^(1/2).

Faithful or interpreted
-----------------------
Interpreted: the paper's abstract was read. Its full text and code were out of reach.

* The paper also takes the SVD of queries times keys, where no RoPE stands between them. All families here have RoPE, so
  keys stay, and at most half of the cache can go.
* A KV group with several query heads has one SVD of all their columns. The paper has one head per group.
* A bias is a column of W. The paper's fine-tuning of singular values is not part of it.

Cost
----
No pass of the model: two eigendecompositions of head_dim per KV group. Shapes stay those of ordinary attention.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from kvp.models.linears import Linear, named_linears
from kvp.models.shapes import layer_shapes
from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator, Uniform
from kvp.strategies.signals.gradients import require_finite
from kvp.strategies.signals.head_moments import Heads, output_columns
from kvp.strategies.signals.heads import roots
from kvp.strategies.signals.moments import TINY
from kvp.strategies.signals.walk import Visit, found_edits, walk
from kvp.strategies.target import Scores, Target
from kvp.strategies.templates.scored import ScoreStrategy
from kvp.types import Budget, Kind, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@options
class CLOVER(ScoreStrategy):
    """CLOVER's cut of value channels."""

    searches: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = False

    allocator: Allocator = Uniform(max_ratio=1.0)  # all but one step

    @override
    def kinds(self) -> tuple[Kind, ...]:
        return ("vo",)

    @override
    def rewritten(self, config: PretrainedConfig) -> list[Linear]:
        return named_linears(config, "v", "o")

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        """Return (groups, v_head_dim) E^2, in the new basis; largest first."""
        spaces, scores = {space.layer: space for space in self.spaces(target.config)}, dict[Space, Tensor]()
        for visit in walk(target.model, (), "CLOVER"):
            if visit.layer in spaces:
                energies = orthogonal(visit)[1]
                require_finite(energies.sum(), f"o_proj times v_proj of layer {visit.layer}")
                scores[spaces[visit.layer]] = energies.float().cpu()
        return scores

    @override
    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        plan = self.plan(target.config, scores, budget, profile)
        shapes = layer_shapes(target.config)
        visits = (
            visit for visit in walk(target.model, (), "CLOVER") if shapes[visit.layer].num_key_value_heads
        )
        return replace(plan, edits=found_edits(visits, _edits, directory))


def _edits(visit: Visit) -> dict[str, Tensor]:
    return orthogonal(visit)[0]


def orthogonal(visit: Visit) -> tuple[dict[str, Tensor], Tensor]:
    """Return v_proj and o_proj of the layer visited in their singular directions, and (groups, v_head_dim) E^2."""
    heads, columns = Heads(visit), output_columns(visit)
    values, energies = heads.rows("v"), []
    for group, rows in enumerate(values):
        root, inverse = roots(rows @ rows.T)  # S^(1/2), S^(-1/2)
        outputs = columns[group].flatten(0, 1)  # O
        squares, basis = (best.flip(-1) for best in torch.linalg.eigh(root @ outputs.T @ outputs @ root))
        scale = squares.clamp(min=TINY).pow(0.25)  # E^(1/2)
        values[group] = scale[:, None] * (basis.T @ inverse @ rows)
        columns[group] = columns[group] @ root @ basis / scale
        energies.append(squares.clamp(min=0))
    edits = heads.edits("v", values) | {
        f"{heads.name('o')}.weight": heads.stored(columns.permute(2, 0, 1, 3).flatten(1))
    }
    return edits, torch.stack(energies)
