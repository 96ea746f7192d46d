"""KV heads joined: the same function with fewer and wider heads, whose channels can then be cut together.

Neighbouring KV groups become one group that holds all their channels, in the same bytes. A query head becomes as wide;
it is zero in the channels of the other groups. Joining alone gains nothing. But a later cut can keep once what several
heads share, as multi-head latent attention does. MHA2MLA (arXiv:2502.14837) and TransMLA (arXiv:2502.07864) rewrite
models this way.

The cost is in q_proj and o_proj, by the number of heads joined and the share of the channels that a later cut removes:

| heads joined | share cut | size of q_proj and o_proj |
| ------------ | --------- | ------------------------- |
| m            | c         | m (1 - c) times the dense |
| 3            | 1/2       | 1.5 times the dense       |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvp.models.configs import pruned_config
from kvp.models.family import family_of
from kvp.models.shapes import CHANNELS_PER_PAIR, layer_shapes
from kvp.types import LayerShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def joined_config(
    config: PretrainedConfig, num_key_value_heads: int | None, latent: bool = False
) -> PretrainedConfig:
    """Return the config of the model that `joined` makes; without a number, the given config.

    Raises:
        ValueError: The number does not divide a layer's number of KV heads, or the family has norms over head_dim.
    """
    if num_key_value_heads is None:
        return config
    shapes = _joined_shapes(config, num_key_value_heads, latent)
    return pruned_config(config, shapes, range(len(shapes)))


@torch.no_grad()
def joined(model: PreTrainedModel, num_key_value_heads: int | None, latent: bool = False) -> PreTrainedModel:
    """Return the model with `num_key_value_heads` in every attention; without a number, the given model.

    With `latent` queries may read the values as keys, too: through a projection that is zero.

    Raises:
        ValueError: The number does not divide a layer's number of KV heads, or the family has norms over head_dim.
    """
    if num_key_value_heads is None:
        return model
    config, family, heads = model.config, family_of(model.config), num_key_value_heads
    shapes, state = _joined_shapes(config, heads, latent), model.state_dict()
    for index, before in enumerate(layer_shapes(config)):
        if shapes[index] == before:
            continue
        attention = f"{family.layers}.{index}.{family.attention}"
        for name, widen in ((family.q, _queries), (family.k, _keys), (family.o, _outputs)):
            for parameter in _parameters(state, f"{attention}.{name}"):
                state[parameter] = widen(state[parameter], before, heads)
        if latent:
            rows = shapes[index].num_attention_heads * shapes[index].v_head_dim
            for parameter in _parameters(state, f"{attention}.{family.q}"):
                old, new = state[parameter], parameter.replace(f".{family.q}.", f".{family.q_latent}.")
                state[new] = old.new_zeros(rows, *old.shape[1:])
    from kvp.models.surgery import empty_twin, filled  # imports seconds of modelling code

    return filled(empty_twin(config, shapes, range(len(shapes))), state, model)


def _parameters(state: Mapping[str, Tensor], module: str) -> list[str]:
    """Return the names of a module's weight and, if it has one, bias."""
    return [name for name in (f"{module}.weight", f"{module}.bias") if name in state]


def _joined_shapes(config: PretrainedConfig, heads: int, latent: bool) -> list[LayerShape]:
    if family_of(config).qk_norm:
        raise ValueError(
            f"{config.model_type}: its norms over head_dim keep the heads apart; use strategy.num_key_value_heads=null"
        )
    return [_joined_shape(shape, heads, latent) for shape in layer_shapes(config)]


def _joined_shape(layer: LayerShape, heads: int, latent: bool) -> LayerShape:
    groups = layer.num_key_value_heads
    if layer.k_latents:
        raise ValueError(
            "this model caches latents, which its heads share already: join the model it was made from"
        )
    if heads < 1 or groups % heads:
        raise ValueError(
            f"strategy.num_key_value_heads must divide the {groups} KV heads of every layer, got {heads}"
        )
    if not groups or (groups == heads and layer.latent == latent):
        return layer
    several = groups // heads
    rows = layer.rope_pairs or (tuple(range(layer.qk_head_dim // CHANNELS_PER_PAIR)),) * groups
    return replace(
        layer,
        num_key_value_heads=heads,
        qk_head_dim=several * layer.qk_head_dim,
        v_head_dim=several * layer.v_head_dim,
        latent=latent,
        rope_pairs=tuple(tuple(chain(*rows[n : n + several])) for n in range(0, groups, several)),
    )


def _keys(rows: Tensor, shape: LayerShape, heads: int) -> Tensor:
    """Order the rows of k_proj by joined head: the first channels of all its pairs, then the second ones."""
    split = rows.unflatten(0, (heads, -1, CHANNELS_PER_PAIR, shape.qk_head_dim // CHANNELS_PER_PAIR))
    return split.transpose(1, 2).flatten(0, 3).contiguous()


def _queries(rows: Tensor, shape: LayerShape, heads: int) -> Tensor:
    """Widen the rows of q_proj: each head gets zero rows for the pairs of the other groups."""
    several = shape.num_key_value_heads // heads
    queries = shape.num_attention_heads // shape.num_key_value_heads
    split = rows.unflatten(0, (heads, several, queries, CHANNELS_PER_PAIR, -1))
    wide = split.new_zeros(*split.shape[:4], several, *split.shape[4:])
    wide.diagonal(0, 1, 4).copy_(split.movedim(1, -1))
    return wide.flatten(0, 5)


def _outputs(weight: Tensor, shape: LayerShape, heads: int) -> Tensor:
    """Widen the columns of o_proj: each head gets zero columns for the other groups' values; a bias stays."""
    if weight.dim() == 1:
        return weight
    several = shape.num_key_value_heads // heads
    split = weight.unflatten(1, (heads, several, -1, shape.v_head_dim))
    wide = split.new_zeros(*split.shape[:4], several, shape.v_head_dim)
    wide.diagonal(0, 2, 4).copy_(split.movedim(2, -1))
    return wide.flatten(1)
