"""Translate edits of a cut model into edits of the model before the cut."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from kvp.models.family import family_of
from kvp.models.masks import masks_of
from kvp.types import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def uncut(model: PreTrainedModel, plan: Plan, edits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return edits of `model` after which the cut by `plan` leaves `edits`.

    Rows and columns that the cut removes keep their values.

    Args:
        model: The model before the cut.
        plan: The cut; it may have edits of its own.
        edits: Weights of the cut model, by their names in it.
    """
    masks, layers = masks_of(model.config, plan), family_of(model.config).layers
    blocks = next((keep.tolist() for space, keep in plan.keep.items() if space.kind == "block"), None)

    def before(name: str) -> str:
        if blocks is None:
            return name
        return re.sub(
            rf"^{re.escape(layers)}\.(\d+)\.", lambda found: f"{layers}.{blocks[int(found[1])]}.", name
        )

    whole = {}
    for name, value in ((before(name), value) for name, value in edits.items()):
        old = plan.edits[name] if name in plan.edits else model.get_parameter(name).detach()
        axes = masks.get(name.rpartition(".")[0], {})
        rows, columns = (
            axes[axis].cpu().nonzero().flatten() if axis in axes else slice(None) for axis in (0, 1)
        )
        new = old.to("cpu", copy=True)
        region = new[rows]
        region[:, columns] = value.to(old.dtype)
        new[rows] = region
        whole[name] = new
    return whole
