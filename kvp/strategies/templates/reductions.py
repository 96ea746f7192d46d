"""Reduction of the matrices of a coupled structure to one score per unit (LLM-Pruner, arXiv 2305.11627, section 3.2).

A KV group takes its rows of q, k, v and its columns of o; an FFN neuron its rows of gate and up and its
column of down. Each of these matrices has its own say about a channel of the unit; a *reduction* makes one
of them, and a unit is worth the sum of its channels (a group has head_dim of them, a neuron one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kvp.models.shapes import layer_shapes
from kvp.models.spaces import members
from kvp.types import Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Reduction = Literal["sum", "mean", "max", "prod", "first"]

REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda matrices: matrices.sum(0),
    "mean": lambda matrices: matrices.mean(0),
    "max": lambda matrices: matrices.amax(0),
    "prod": lambda matrices: matrices.prod(0),
    "first": lambda matrices: matrices[0],
}


def channels_per_unit(config: PretrainedConfig, space: Space) -> int:
    """Return the rows of k and of v per KV group; one row per neuron.

    Raises:
        ValueError: Query-key and value widths differ, so that their channels do not correspond.
    """
    if space.kind == "ffn":
        return 1
    assert space.layer is not None
    shape = layer_shapes(config)[space.layer]
    if shape.qk_head_dim != shape.v_head_dim:
        raise ValueError(
            f"strategy.group_reduction needs equal query-key and value widths, layer {space.layer} has "
            f"{shape.qk_head_dim} and {shape.v_head_dim}: prune this model with strategy.grouping=ffn"
        )
    return shape.qk_head_dim


def unit_scores(
    config: PretrainedConfig,
    space: Space,
    rows: Mapping[tuple[str, int], Tensor],
    reduction: Reduction,
    reference_gqa_alignment: bool = False,
) -> Tensor:
    """Return (units,) float64 scores, from what each row (axis 0) or column (axis 1) of the members is worth.

    Channel c of a KV group collects channel c of all its query heads, from q and o. The reference's code
    folds q and o the other way round: group h collects the heads h, h + groups, h + 2 groups, ..., though
    it removes the right ones; `reference_gqa_alignment` repeats that. "first" is the reference's root of the
    group: q_proj (hf_prune.py), under GQA k_proj (llama3.py); gate_proj.
    """
    (units,), width = space.shape, channels_per_unit(config, space)
    values = [rows[member.name, member.axis].double() for member in members(config, space)]
    if len(values[0]) > units * width:  # query heads share their groups
        values.insert(0, values.pop(1))  # k first
    aligned = [
        row.view(-1, units, width).sum(0) if reference_gqa_alignment else row.view(units, -1, width).sum(1)
        for row in values
    ]
    return REDUCE[reduction](torch.stack(aligned)).sum(1)
