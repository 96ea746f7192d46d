"""A plan applied without changing a shape: its rows and columns are zero, or its sublayers are away.

`mask` and `kvp.models.surgery.apply` give the same logits, which is how every strategy's plans are tested.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kvp.models.family import family_of
from kvp.models.layers import NoAttention, NoMLP
from kvp.models.spaces import ACROSS_LAYERS, keep_mask, members
from kvp.models.stream import project
from kvp.types import Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Masks = dict[str, dict[int, Tensor]]


def masks_of(config: PretrainedConfig, plan: Plan) -> Masks:
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
    for space, keep in plan.keep.items():
        if space.kind in ACROSS_LAYERS:
            for layer in set(range(space.shape[0])) - set(keep.tolist()):
                _remove_sublayers(model, layer, space.kind)
    for position, basis in enumerate(plan.bases):
        project(model, position, basis)
    fold_rotary(model, plan.folded)
    return model


def _zero(model: PreTrainedModel, name: str, axes: dict[int, Tensor]) -> None:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    for axis, stays in axes.items():
        gone = (~stays).nonzero().flatten().to(module.weight.device)
        module.weight.index_fill_(axis, gone, 0)
        if axis == 0 and module.bias is not None:
            module.bias.index_fill_(0, gone, 0)


def fold_rotary(model: PreTrainedModel, first: int | None) -> None:
    """Let the rope pairs of a dense model from `first` on turn at the slowest frequency; none, if that is None."""
    if first is not None:
        frequencies = model.get_submodule(family_of(model.config).rotary).get_buffer("inv_freq")
        frequencies[first:] = frequencies[-1]


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
def edited(model: PreTrainedModel, edits: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other values of some parameters, for the time of a `with`; nothing is copied back."""
    before = {}
    for name, value in edits.items():
        parameter = model.get_parameter(name)
        before[name], parameter.data = parameter.data, value.to(parameter.device, parameter.dtype)
    try:
        yield
    finally:
        for name, value in before.items():
            model.get_parameter(name).data = value


@contextmanager
def masked(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """The model without the plan's rows and columns, for the time of a `with`: what they write is zero.

    No weight is touched or copied; gradients of removed rows and columns are zero.
    """
    with ExitStack() as stack:
        for name, axes in masks_of(model.config, plan).items():
            module = model.get_submodule(name)
            weight = module.get_parameter("weight")
            gone = {axis: ~stays.to(weight.device) for axis, stays in axes.items()}
            if 0 in gone:
                hook = module.register_forward_hook(
                    lambda module, inputs, output, gone=gone[0]: output.masked_fill(gone, 0)
                )
                stack.callback(hook.remove)
            if 1 in gone:
                hook = module.register_forward_pre_hook(
                    lambda module, inputs, gone=gone[1]: (inputs[0].masked_fill(gone, 0),)
                )
                stack.callback(hook.remove)
        for position, basis in enumerate(plan.bases):
            stack.enter_context(project(model, position, basis))
        stack.enter_context(_folded(model, plan.folded))
        yield


@contextmanager
def _folded(model: PreTrainedModel, first: int | None) -> Iterator[None]:
    frequencies = model.get_submodule(family_of(model.config).rotary).get_buffer("inv_freq")
    before = frequencies.clone()
    fold_rotary(model, first)
    try:
        yield
    finally:
        frequencies.copy_(before)
