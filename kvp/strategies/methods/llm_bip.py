"""LLM-BIP: ask how far a unit is felt at the end of its block, forward only (arXiv:2412.06419).

The paper bounds how much the output of a block changes without a channel. KV groups and neurons of the smallest bound
go, the same fraction of every layer.

Formula
-------
In the paper's notation, X W, with X_U what enters down_proj, X_H what enters o_proj, and absolute values by element:

    neuron j             |X_U[:, j]| |W_D[j, :]|                     what it writes into the residual stream
    attention channel j  |X_H[:, j]| |W_O[j, :]| (I + |W_U| |W_D|)   through the residual, and through the MLP

Faithful or interpreted
-----------------------
Interpreted: the formulas are second hand, there is no public code, and the aggregation is ours.

* A channel's number is the mean over tokens and the sum over the block's outputs; a KV group is worth the sum
  over the channels of its query heads.
* W_U is up_proj. As printed, the way through the MLP leaves out gate_proj and the norm before it.
* X is the dense model's. Every layer loses the same fraction of groups and of neurons (`allocator=uniform`),
  which is the protocol of LLM-Pruner; the paper's own is not known to us. A bound says nothing across layers;
  where the widths of few KV groups do not come out even, see `by_share`.

Cost
----
One forward pass, layer by layer, and products of a layer's absolute weights. No gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from kvp.models.family import family_of
from kvp.models.shapes import layer_shapes
from kvp.models.spaces import fold, members
from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator, Uniform
from kvp.strategies.allocation.pools import Pool
from kvp.strategies.signals.gradients import require_finite
from kvp.strategies.signals.walk import Visit
from kvp.strategies.target import Scores
from kvp.strategies.templates.projections import LayerwiseStrategy, shares
from kvp.types import Budget, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@options
class LLMBIP(LayerwiseStrategy):
    """Cut KV groups and neurons by the summed absolute change at the output of their block, mean over tokens.

    Attributes:
        by_share: Where layers cannot all lose the same number of units, those lose one more whose next unit is
            the smallest share of its layer's score; false: the smallest score, which is in the first layers.
    """

    late: ClassVar[tuple[str, ...]] = (*LayerwiseStrategy.late, "by_share")

    allocator: Allocator = Uniform(multiple_of=1, max_ratio=1.0)
    by_share: bool = True

    @override
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        if any(shape.experts for shape in layer_shapes(config)):
            raise ValueError(
                f"llm_bip follows a channel through up_proj and down_proj, and {config.model_type} has experts there: "
                "choose another strategy with strategy.grouping=kv_group, such as magnitude"
            )
        super().check(config, budget)

    @override
    def pools(self, config: PretrainedConfig, scores: Scores) -> list[Pool]:
        pools = super().pools(config, scores)
        return shares(pools) if self.by_share else pools

    @override
    def layer_scores(self, visit: Visit, spaces: Sequence[Space]) -> dict[Space, Tensor]:
        model = visit.model
        projections = {space: members(model.config, space)[-1] for space in spaces}  # o_proj and down_proj
        sizes = input_sizes(visit, [member.name for member in projections.values()])
        scores = {}
        for space, member in projections.items():
            columns = absolute(model, member.name)
            attention = space.kind == "kv_group"
            felt = columns.T @ block_reach(model, visit.layer) if attention else columns.sum(0)
            scores[space] = fold((sizes[member.name] * felt).cpu(), member, space)
        return scores


def input_sizes(visit: Visit, names: Sequence[str]) -> dict[str, Tensor]:
    """Return (in_features,) the mean over tokens of |x|, per named projection.

    Raises:
        FloatingPointError: An input is not finite.
    """
    sums: dict[str, Tensor] = {}
    for inputs in visit.inputs(*names):
        for name, rows in inputs.items():
            size = rows.double().abs().sum(0)
            sums[name] = sums[name] + size if name in sums else size
    for name, total in sums.items():
        require_finite(total.sum(), f"what enters {name}")
    tokens = sum(states.shape[:-1].numel() for states in visit.states)
    return {name: total / tokens for name, total in sums.items()}


def block_reach(model: PreTrainedModel, layer: int) -> Tensor:
    """Return (hidden,) (I + |W_U| |W_D|) 1: how far a unit after attention is felt at the end of the block."""
    family, config = family_of(model.config), model.config
    mlp = f"{family.layers}.{layer}.{family.mlp}"
    through = torch.ones(config.hidden_size, dtype=torch.float64, device=model.device)
    if not layer_shapes(config)[layer].intermediate_size:
        return through
    return through + absolute(model, f"{mlp}.{family.up}").T @ absolute(model, f"{mlp}.{family.down}").sum(0)


def absolute(model: PreTrainedModel, name: str) -> Tensor:
    """Return |W| of a projection, (out, in), float64."""
    return model.get_parameter(f"{name}.weight").detach().double().abs()
