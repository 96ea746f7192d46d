"""Apply a plan to a model: the only code that changes shapes.

`apply` cuts; `mask` zeroes the same rows and columns and keeps the shapes. Both give the same logits,
which is how every strategy's plans are tested.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from kvp.models.attention import NoAttention, NoMLP
from kvp.models.family import family_of
from kvp.models.pruned import pruned_class, pruned_config
from kvp.models.shapes import cut, layer_shapes
from kvp.models.spaces import ACROSS_LAYERS, keep_mask, members
from kvp.types import Plan

Masks = dict[str, dict[int, Tensor]]


@torch.no_grad()  # not inference_mode: LoRA could not train on the result
def apply(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """The pruned model: an ordinary Hugging Face model whose config carries the widths.

    The given model is left as it was; matrices that are not cut are shared with it, not copied.

    Raises:
        ValueError: The plan does not belong to a model of these shapes, or leaves no attention.
    """
    config, family = model.config, family_of(model.config)
    shapes, layers = layer_shapes(config), family.layers
    blocks = _kept_blocks(plan, len(shapes))
    new_config = pruned_config(config, cut(shapes, plan), blocks)
    new_config._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        twin = pruned_class(config)(new_config)
    masks, source = _masks(config, plan), {**model.state_dict(), **plan.edits}
    state = {}
    for name in twin.state_dict():
        old = re.sub(rf"^{re.escape(layers)}\.(\d+)\.", lambda m: f"{layers}.{blocks[int(m[1])]}.", name)
        state[name] = _sliced(source[old], masks.get(old.rpartition(".")[0], {}))
    twin.load_state_dict(state, assign=True)
    twin.set_submodule(family.rotary, copy.deepcopy(model.get_submodule(family.rotary)))
    twin.tie_weights()
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin.train(model.training)


def _kept_blocks(plan: Plan, num_layers: int) -> list[int]:
    kept = [keep.tolist() for space, keep in plan.keep.items() if space.kind == "block"]
    return kept[0] if kept else list(range(num_layers))


def _masks(config: PretrainedConfig, plan: Plan) -> Masks:
    """Per module and axis, which rows or columns stay under all spaces of the plan."""
    masks: Masks = defaultdict(dict)
    for space, keep in plan.keep.items():
        if space.kind in ACROSS_LAYERS:
            continue
        stays = keep_mask(space, keep.cpu())
        for member in members(config, space):
            mask, axes = stays[member.index], masks[member.name]
            axes[member.axis] = axes[member.axis] & mask if member.axis in axes else mask
    return masks


def _sliced(tensor: Tensor, axes: dict[int, Tensor]) -> Tensor:
    """Rows (axis 0, biases too) and columns (axis 1, weights only) that stay."""
    for axis, mask in axes.items():
        if axis < tensor.dim():
            tensor = tensor.index_select(axis, mask.nonzero().flatten().to(tensor.device))
    return tensor


@torch.no_grad()
def mask(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """A copy of the model with the removed rows and columns set to zero, its shapes unchanged."""
    model = copy.deepcopy(model)
    state = model.state_dict()
    for name, edit in plan.edits.items():
        state[name].copy_(edit)
    for name, axes in _masks(model.config, plan).items():
        _zero(model, name, axes)
    for space, keep in plan.keep.items():
        if space.kind in ACROSS_LAYERS:
            for layer in set(range(space.shape[0])) - set(keep.tolist()):
                _remove_sublayers(model, layer, space.kind)
    return model


def _zero(model: PreTrainedModel, name: str, axes: dict[int, Tensor]) -> None:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    for axis, stays in axes.items():
        gone = (~stays).nonzero().flatten().to(module.weight.device)
        module.weight.index_fill_(axis, gone, 0)
        if axis == 0 and module.bias is not None:
            module.bias.index_fill_(0, gone, 0)


def _remove_sublayers(model: PreTrainedModel, layer: int, kind: str) -> None:
    family = family_of(model.config)
    module = model.get_submodule(f"{family.layers}.{layer}")
    if kind in ("block", "attention"):
        module.set_submodule(family.attention, NoAttention())
    if kind in ("block", "mlp"):
        module.set_submodule(family.mlp, NoMLP())


@contextmanager
def without(model: PreTrainedModel, layer: int, kind: str) -> Iterator[None]:
    """The model without a sublayer or block, for the time of a `with`."""
    family = family_of(model.config)
    module = model.get_submodule(f"{family.layers}.{layer}")
    kept = {name: module.get_submodule(name) for name in (family.attention, family.mlp)}
    _remove_sublayers(model, layer, kind)
    try:
        yield
    finally:
        for name, child in kept.items():
            module.set_submodule(name, child)


@contextmanager
@torch.no_grad()
def masked(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """The model with the plan's rows and columns zeroed in place, for the time of a `with`."""
    masks = _masks(model.config, plan)
    modules = {name: model.get_submodule(name) for name in masks}
    kept = {name: copy.deepcopy(module.state_dict()) for name, module in modules.items()}
    try:
        for name, axes in masks.items():
            _zero(model, name, axes)
        yield
    finally:
        for name, module in modules.items():
            module.load_state_dict(kept[name])
