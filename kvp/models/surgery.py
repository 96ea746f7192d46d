"""Surgery: apply a plan to a model. No other code cuts."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kvp.models.configs import pruned_config
from kvp.models.family import family_of
from kvp.models.masks import Masks, masks_of
from kvp.models.plans import kept_blocks
from kvp.models.pruned import pruned_class
from kvp.models.rope import require_fixed_rope, switches
from kvp.models.shapes import cut, layer_shapes, require_whole_stream, sliced
from kvp.models.spaces import keep_mask
from kvp.models.stream import require_turnable, rotated
from kvp.types import LayerShape, Plan


@torch.no_grad()  # not inference_mode: LoRA could not train on the result
def apply(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Return the pruned model: an ordinary Hugging Face model whose config carries the widths.

    The given model does not change. Matrices that are not cut are shared with it, not copied.

    Raises:
        ValueError: The plan was made for other shapes or leaves no attention, the model is sliced already, or pairs
            are folded whose frequencies change with the length.
    """
    if plan.keep or plan.edits or plan.bases:
        require_whole_stream(model.config)
    if plan.folded is not None:
        require_fixed_rope(model.config)
    if plan.bases:
        require_turnable(model.config)
    twin = _cut(model, plan)
    return _sliced(twin, plan.bases) if plan.bases else twin


def _cut(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Cut the rows, columns, sublayers and blocks that the plan's spaces leave out."""
    config, layers = model.config, family_of(model.config).layers
    shapes = layer_shapes(config)
    blocks = kept_blocks(plan, len(shapes))
    twin = empty_twin(config, _biased(config, cut(shapes, plan), blocks, plan), blocks)
    masks, source = masks_of(config, plan) | _sinks(config, plan), _edited(model, plan)
    state = {}
    for name in twin.state_dict():
        old = re.sub(rf"^{re.escape(layers)}\.(\d+)\.", lambda m: f"{layers}.{blocks[int(m[1])]}.", name)
        state[name] = _selected(source[old], masks.get(old.rpartition(".")[0], {}))
    return filled(twin, state, model)


def _sliced(model: PreTrainedModel, bases: Sequence[Tensor]) -> PreTrainedModel:
    """Return the model with its residual stream expressed in `bases`."""
    config = model.config
    widths = [*(basis.shape[1] for basis in bases), config.hidden_size]
    shapes = sliced(layer_shapes(config), widths)
    return filled(empty_twin(config, shapes, range(len(shapes))), rotated(model, bases), model)


def empty_twin(
    config: PretrainedConfig, shapes: Sequence[LayerShape], blocks: Sequence[int]
) -> PreTrainedModel:
    """Return a model of these shapes without weights; its layers are the `blocks` of the config's model."""
    new_config = pruned_config(config, shapes, blocks)
    new_config._attn_implementation = config._attn_implementation
    new_config._experts_implementation = config._experts_implementation
    with torch.device("meta"):
        return pruned_class(config)(new_config)


def filled(twin: PreTrainedModel, state: Mapping[str, Tensor], model: PreTrainedModel) -> PreTrainedModel:
    """Load these parameters into the twin, and take everything else from the model.

    Raises:
        ValueError: The config ties a head that is not the embedding: the twin would lose it.
    """
    family = family_of(model.config)
    check_tied(state, f"{family.embedding}.weight", model.config)
    twin.load_state_dict(state, assign=True)
    for place in (family.rotary, family.embedding):
        take_buffers(twin, model, place)
    twin.tie_weights()
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin.train(model.training)


def take_buffers(twin: PreTrainedModel, model: PreTrainedModel, place: str) -> None:
    """Copy the buffers of a module, which no state dict has: rotary frequencies, the scale of an embedding."""
    buffers = dict(model.get_submodule(place).named_buffers())
    if "inv_freq" in buffers and switches(model.config):  # a long text may have changed them
        buffers["inv_freq"] = buffers["original_inv_freq"]
    for name, buffer in buffers.items():
        twin.get_submodule(place).register_buffer(name, buffer.clone(), persistent=False)


def check_tied(state: Mapping[str, Tensor], embedding: str, config: PretrainedConfig) -> None:
    """Refuse a head of its own where the config ties it to the embedding, because tying would lose it.

    Raises:
        ValueError: They differ; the message names the way out.
    """
    head = state.get("lm_head.weight")
    if not config.tie_word_embeddings or head is None or head is state[embedding]:
        return
    if head.data_ptr() != state[embedding].data_ptr() and not torch.equal(head, state[embedding]):
        raise ValueError(
            "config.tie_word_embeddings is true, and the model's lm_head differs from its embedding: set it to false, "
            "or call tie_weights() first"
        )


def _edited(model: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
    state = model.state_dict()
    return state | {name: edit.to(model.device, model.dtype) for name, edit in plan.edits.items()}


def _biased(
    config: PretrainedConfig, shapes: Sequence[LayerShape], blocks: Sequence[int], plan: Plan
) -> list[LayerShape]:
    """Return the shapes with the output biases that the plan's edits add."""
    family = family_of(config)

    def edited(block: int, part: str, name: str) -> bool:
        return f"{family.layers}.{block}.{part}.{name}.bias" in plan.edits

    return [
        replace(
            shape,
            o_bias=shape.num_key_value_heads > 0
            and (shape.o_bias or edited(block, family.attention, family.o)),
            down_bias=shape.intermediate_size > 0
            and (shape.down_bias or edited(block, family.mlp, family.down)),
        )
        for block, shape in zip(blocks, shapes, strict=True)
    ]


def _sinks(config: PretrainedConfig, plan: Plan) -> Masks:
    """Return masks of the sinks, one number per query head, which go with the KV groups; by name of the attention."""
    family = family_of(config)
    groups = {space.layer: space for space in plan.keep if space.kind == "kv_group"} if family.sinks else {}
    return {
        f"{family.layers}.{layer}.{family.attention}": {
            0: keep_mask(space, plan.keep[space].cpu()).repeat_interleave(
                layer_shapes(config)[layer].num_attention_heads // space.shape[0]
            )
        }
        for layer, space in groups.items()
        if layer is not None
    }


def _selected(tensor: Tensor, axes: dict[int, Tensor]) -> Tensor:
    """Return the rows (axis 0, biases too) and columns (axis 1, weights only) of a tensor that stay."""
    for axis, mask in axes.items():
        if axis < tensor.dim():
            tensor = tensor.index_select(axis, mask.nonzero().flatten().to(tensor.device))
    return tensor
