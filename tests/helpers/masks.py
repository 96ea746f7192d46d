"""A plan applied without changing a shape, as a second way to what `kvp.models.surgery.apply` cuts."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvp.models.latent_attention import Expansion
from kvp.models.masks import after_norms, fold_rotary, mask_output, masks_of, remove_sublayers
from kvp.models.spaces import ACROSS_LAYERS
from kvp.models.stream import project
from kvp.types import Plan


@torch.no_grad()
def mask(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """A copy of the model with the removed rows and columns set to zero, its shapes unchanged."""
    model = copy.deepcopy(model)
    state = model.state_dict()
    for name, edit in plan.edits.items():
        if name in state:
            state[name].copy_(edit)
        else:  # a bias that a compensation adds
            module, _, parameter = name.rpartition(".")
            model.get_submodule(module).register_parameter(
                parameter, nn.Parameter(edit.to(model.device, model.dtype))
            )
    for name, axes in masks_of(model.config, plan).items():
        _zero(model, name, axes)
    for name, stays in after_norms(model.config, plan).items():
        mask_output(model, name, stays)
    for space, keep in plan.keep.items():
        if space.kind in ACROSS_LAYERS:
            for layer in set(range(space.shape[0])) - set(keep.tolist()):
                remove_sublayers(model, layer, space.kind)
    for position, basis in enumerate(plan.bases):
        project(model, position, basis)
    fold_rotary(model, plan.folded)
    return model


def _zero(model: PreTrainedModel, name: str, axes: dict[int, Tensor]) -> None:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear | Expansion)
    for axis, stays in axes.items():
        gone = (~stays).nonzero().flatten().to(module.weight.device)
        module.weight.index_fill_(axis, gone, 0)
        if axis == 0 and isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.index_fill_(0, gone, 0)
