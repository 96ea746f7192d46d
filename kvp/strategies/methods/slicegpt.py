"""SliceGPT: keep the residual stream in the coordinates of its largest variance (arXiv:2401.15024, ICLR 2024).

Norms commute with a rotation of the stream once their weights are folded into the projections behind them. So the
stream has a basis of its own before every attention and every MLP. Projections lose rows and columns. Heads and the KV
cache keep their widths, and the head is not sliced.

Formula
-------
With the stream's states X (tokens, hidden_size) before a sublayer, uncentred and before the norm:

    Q_p   eigenvectors of X^T X of the D_s largest eigenvalues, D_s everywhere
    shortcut of sublayer p   Q_p^T Q_p+1   (D_s, D_s), counted among the parameters

`kvp.models.stream` and `kvp.models.sliced` apply them. X comes from a model that is sliced up to there.
`orientation=random` turns each basis within the span, which changes the function by rounding only.

Faithful or interpreted
-----------------------
Faithful to `rotate_and_slice_sequential` in microsoft/TransformerCompression (`src/slicegpt/rotate.py`); tied head and
budget are interpreted. With the two differences in norm and embedding undone, the logits agree to rounding.

* The authors' slice fraction is of `hidden_size`. Here the budget is of parameters, shortcuts included, and D_s the
  multiple of `multiple_of` that comes nearest. On LLaMA-2-7B their slices of 20, 25 and 30 % remove 9.39, 15.34 and
  21.45 % of all parameters. A slice of 10 % adds 2.99 %.
* The authors' code takes the mean off the embeddings of LLaMA too, which only LayerNorm allows. Here they stay.
* Their norm has a fixed epsilon of 1e-5. Here the config's stays.
* They untie an embedding from its head, which at a small model's size costs more than slicing saves. Here the head
  keeps the shared matrix and a basis follows the embedding: the same function.
* They turn the stream before the head too, and the head back. Here that place keeps its coordinates: the same function.
* Their damping of X^T X moves no eigenvector, so there is none.

Cost
----
One forward pass, layer by layer, and two eigendecompositions of hidden_size per layer. No gradient. Every token then
pays for the shortcuts, and the KV cache stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.estimate.passes import FLOAT32, with_total
from kvp.models.family import family_of
from kvp.models.plans import SUBLAYERS, bases_file, found_or_made
from kvp.models.shapes import itemsize, layer_shapes, size, sliced
from kvp.models.stream import project, require_turnable
from kvp.options import options
from kvp.strategies.base import Strategy
from kvp.strategies.signals.gradients import require_finite
from kvp.strategies.signals.moments import Moments
from kvp.strategies.signals.walk import Visit, walk
from kvp.strategies.target import Scores, Target
from kvp.types import Budget, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Orientation = Literal["random", "pca"]


@options
class SliceGPT(Strategy):
    """Slice the residual stream.

    Attributes:
        multiple_of: Widths of the stream are multiples of this.
        orientation: How the coordinates lie within what stays: "random", or the principal axes ("pca").
    """

    late: ClassVar[tuple[str, ...]] = ("compensation", "multiple_of", "orientation")  # nothing is scored
    searches: ClassVar[bool] = True  # every basis depends on those before it
    slices: ClassVar[bool] = True

    multiple_of: int = Field(default=8, ge=1, description="widths of the stream are multiples of it")
    orientation: Orientation = "random"

    def __post_init__(self) -> None:
        if self.compensation is not None:
            raise ValueError(
                "strategy.compensation makes up for columns of o_proj and down_proj; slicing cuts rows of them: "
                "leave it out"
            )

    @override
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        require_turnable(config)
        self.width(config, budget)

    @override
    def peak_bytes(self, config: PretrainedConfig, *, on_cpu: bool, **sizes: Any) -> dict[str, int]:
        parts = super().peak_bytes(config, on_cpu=on_cpu, **sizes)
        bases = 2 * len(layer_shapes(config)) * config.hidden_size**2  # as wide as the stream at most
        width = max(itemsize(config), FLOAT32)
        return with_total({**parts, "bases": on_cpu * width * bases})

    def width(self, config: PretrainedConfig, budget: Budget) -> int:
        """Return the width D_s; `hidden_size`, if the dense model is the nearest to the budget.

        Raises:
            ValueError: The budget is of something that slicing does not shorten, or no width comes near it.
        """
        if budget.of not in ("params", "block_params"):
            raise ValueError(
                f"SliceGPT makes the residual stream narrower, which shortens no {budget.of}: choose ratio=params or "
                "ratio=block_params"
            )
        shapes, hidden = layer_shapes(config), config.hidden_size
        dense = size(config, shapes).count(budget.of)
        removed = {hidden: 0.0}
        for width in range(self.multiple_of, hidden, self.multiple_of):
            left = size(config, sliced(shapes, [width] * 2 * len(shapes) + [hidden]))
            removed[width] = 1 - left.count(budget.of) / dense
        nearest = min(removed, key=lambda width: (abs(removed[width] - budget.value), -width))
        if abs(removed[nearest] - budget.value) > budget.tolerance:
            raise ValueError(
                f"ratio.value={budget.value} of {budget.of} cannot be reached by slicing this model: the nearest is "
                f"{removed[nearest]:.4f}, at a width of {nearest} of {hidden}. Ask for ratio.value="
                f"{removed[nearest]:.4f}, or change ratio.tolerance or strategy.multiple_of={self.multiple_of}"
            )
        return nearest

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        return {}

    @override
    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        width = self.width(target.config, budget)
        if width == target.config.hidden_size:
            return Plan({})
        bases: list[Tensor] = []
        for visit in walk(target.model, target.batches, "SliceGPT", offload=True):
            file = bases_file(directory, visit.layer)
            made = found_or_made(file, partial(self._bases, visit, width, target.seed))
            for part in SUBLAYERS:
                visit.leaving.enter_context(project(visit.model, len(bases), made[part]))
                bases.append(made[part])
        return Plan({}, bases=bases)

    def _bases(self, visit: Visit, width: int, seed: int) -> dict[str, Tensor]:
        """Return the bases before the attention and the MLP of the layer visited."""
        position, norm = 2 * visit.layer, f"{visit.name}.{family_of(visit.model.config).layer_norms[1]}"
        dtype = torch.promote_types(visit.model.dtype, torch.float32)

        def basis(states: Iterable[Tensor], position: int) -> Tensor:
            moments = Moments(visit.model.config.hidden_size, covariance=True)
            for batch in states:
                moments.add(batch.flatten(0, -2))
            place = f"the residual stream before the {SUBLAYERS[position % 2]} of layer {visit.layer}"
            require_finite(moments.scatter.sum(), place)
            generator = torch.Generator().manual_seed(seed + position)
            return self._principal(moments.gram, width, generator).to("cpu", dtype).contiguous()

        attention = basis(visit.states, position)
        with project(visit.model, position, attention):
            mlp = basis((inputs[norm] for inputs in visit.inputs(norm)), position + 1)
        return dict(zip(SUBLAYERS, (attention, mlp), strict=True))

    def _principal(self, gram: Tensor, width: int, generator: torch.Generator) -> Tensor:
        """Return (hidden_size, width) the eigenvectors of the largest eigenvalues, or another basis of their span."""
        vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :width]
        if self.orientation == "pca":
            return vectors
        draw = torch.randn(width, width, dtype=torch.float64, generator=generator)
        return vectors @ torch.linalg.qr(draw).Q.to(vectors.device)
