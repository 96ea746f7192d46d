"""Look at a model as a plan would leave it, without changing a shape: by masks, hooks and swapped sublayers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvp.models.family import family_of
from kvp.models.layers import NoAttention, NoMLP
from kvp.models.rope import require_fixed_rope
from kvp.models.spaces import ACROSS_LAYERS, keep_mask, members, tokens_first
from kvp.models.stream import project
from kvp.types import Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Masks = dict[str, dict[int, Tensor]]


def masks_of(config: PretrainedConfig, plan: Plan) -> Masks:
    """Return boolean masks per matrix and axis: the rows (0) or columns (1) that every space of the plan keeps."""
    return _masks(config, plan)[0]


def after_norms(config: PretrainedConfig, plan: Plan) -> dict[str, Tensor]:
    """Return boolean masks per norm over heads: the channels (heads * head_dim,) that the plan keeps of its output."""
    return {name: axes[0] for name, axes in _masks(config, plan)[1].items()}


def _masks(config: PretrainedConfig, plan: Plan) -> tuple[Masks, Masks]:
    """Return the masks of matrices that are cut, and those of norms after which is cut."""
    cut: Masks = defaultdict(dict)
    after: Masks = defaultdict(dict)
    for space, keep in plan.keep.items():
        if space.kind in ACROSS_LAYERS:
            continue
        stays = keep_mask(space, keep.cpu())
        for member in members(config, space):
            mask, axes = stays[member.index], (after if member.norm else cut)[member.output]
            axes[member.axis] = axes[member.axis] & mask if member.axis in axes else mask
    return cut, after


def fold_rotary(model: PreTrainedModel, first: int | None) -> None:
    """Let the rope pairs of a dense model from `first` on turn at the slowest frequency; None changes nothing.

    Raises:
        ValueError: The frequencies change with the length of the text.
    """
    if first is not None:
        require_fixed_rope(model.config)
        frequencies = model.get_submodule(family_of(model.config).rotary).get_buffer("inv_freq")
        frequencies[first:] = frequencies[-1]


def remove_sublayers(model: PreTrainedModel, layer: int, kind: str) -> None:
    """Put empty sublayers in the place of a layer's attention, MLP or both (kind "block")."""
    family = family_of(model.config)
    module = model.get_submodule(f"{family.layers}.{layer}")
    if kind in ("block", "attention"):
        module.set_submodule(family.attention, NoAttention())
    if kind in ("block", "mlp"):
        module.set_submodule(family.mlp, NoMLP(family.expert_bias))


@contextmanager
def without(model: PreTrainedModel, layer: int, kind: str) -> Iterator[None]:
    """Remove a sublayer or block from the model for the time of a `with`."""
    family = family_of(model.config)
    module = model.get_submodule(f"{family.layers}.{layer}")
    kept = {name: module.get_submodule(name) for name in (family.attention, family.mlp)}
    remove_sublayers(model, layer, kind)
    try:
        yield
    finally:
        for name, child in kept.items():
            module.set_submodule(name, child)


@contextmanager
def edited(model: PreTrainedModel, edits: Mapping[str, Tensor]) -> Iterator[None]:
    """Give some parameters of the model other values for the time of a `with`; nothing is copied back."""
    before = {}
    for name, value in edits.items():
        parameter = model.get_parameter(name)
        before[name], parameter.data = parameter.data, value.to(parameter.device, parameter.dtype)
    try:
        yield
    finally:
        for name, value in before.items():
            model.get_parameter(name).data = value


def mask_output(model: PreTrainedModel, norm: str, stays: Tensor) -> RemovableHandle:
    """Set the channels (heads * head_dim,) of a norm over heads to zero that do not stay, until the hook is removed."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        states = tokens_first(model.config, output)
        gone = ~stays.to(states.device).view(states.shape[2:])
        return tokens_first(model.config, states.masked_fill(gone, 0))

    return model.get_submodule(norm).register_forward_hook(hook)


@contextmanager
def masked(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Set what the plan's rows and columns write to zero, for the time of a `with`.

    No weight is changed or copied. Gradients of removed rows and columns are zero.
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
        for name, stays in after_norms(model.config, plan).items():
            stack.callback(mask_output(model, name, stays).remove)
        for position, basis in enumerate(plan.bases):
            stack.enter_context(project(model, position, basis))
        stack.enter_context(_folded(model, plan.folded))
        yield


@contextmanager
def _folded(model: PreTrainedModel, first: int | None) -> Iterator[None]:
    if first is None:
        yield
        return
    frequencies = model.get_submodule(family_of(model.config).rotary).get_buffer("inv_freq")
    before = frequencies.clone()
    fold_rotary(model, first)
    try:
        yield
    finally:
        frequencies.copy_(before)
