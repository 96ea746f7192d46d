"""Keys and values read from latents: the same function, whose latents can then be cut.

Neighbouring KV heads share a latent of keys, and a latent of values. Both begin as what they stand for: as wide as
the heads together, with expansions that are the identity. Nothing is gained yet. A method then turns each latent so
that its last channels are worth the least (`kvp.strategies.templates.latent`), and a plan cuts them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from kvp.models.configs import pruned_config
from kvp.models.family import family_of
from kvp.models.shapes import layer_shapes, projected
from kvp.types import LayerShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def with_latents_config(
    config: PretrainedConfig, key_heads: int | None, value_heads: int | None
) -> PretrainedConfig:
    """Return the config of the model that `with_latents` makes.

    Raises:
        ValueError: A layer has latents already, of either kind.
    """
    shapes = _shapes(config, key_heads, value_heads)
    return pruned_config(config, shapes, range(len(shapes)))


@torch.no_grad()
def with_latents(model: PreTrainedModel, key_heads: int | None, value_heads: int | None) -> PreTrainedModel:
    """Return the model with latents in place of keys and values.

    Args:
        model: One whose keys and values are cached as they are.
        key_heads: KV heads that share a latent of keys, or the next smaller number that divides those of the layer.
            None: all.
        value_heads: The same for values.

    Raises:
        ValueError: A layer has latents already, of either kind.
    """
    config, family = model.config, family_of(model.config)
    shapes, state = _shapes(config, key_heads, value_heads), model.state_dict()
    for index, shape in enumerate(shapes):
        attention = f"{family.layers}.{index}.{family.attention}"
        for name, latents in ((family.k_up, shape.k_latents), (family.v_up, shape.v_latents)):
            if latents:
                like = state[f"{attention}.{family.k}.weight"]
                identity = torch.eye(latents[1], device=like.device, dtype=like.dtype)
                state[f"{attention}.{name}.weight"] = identity.repeat(1, latents[0])
    from kvp.models.surgery import empty_twin, filled  # imports seconds of modelling code

    return filled(empty_twin(config, shapes, range(len(shapes))), state, model)


def _shapes(config: PretrainedConfig, key_heads: int | None, value_heads: int | None) -> list[LayerShape]:
    return [_shape(config, layer, key_heads, value_heads) for layer in layer_shapes(config)]


def _shape(
    config: PretrainedConfig, layer: LayerShape, key_heads: int | None, value_heads: int | None
) -> LayerShape:
    heads = layer.num_key_value_heads
    if layer.latent or layer.k_latents or layer.v_latents:
        raise ValueError(
            "keys or values of this model are read from latents already: give the model that it was made from"
        )
    if not heads:
        return layer
    keys, values = (heads_of_latent(heads, wanted) for wanted in (key_heads, value_heads))
    return replace(
        layer,
        k_latents=(heads // keys, keys * projected(config, layer)),
        v_latents=(heads // values, values * layer.v_head_dim),
    )


def heads_of_latent(heads: int, wanted: int | None) -> int:
    """Return the largest divisor of the KV heads of a layer that is at most `wanted`; None: all of them."""
    return next(n for n in range(min(wanted or heads, heads), 0, -1) if heads % n == 0)
