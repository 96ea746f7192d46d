"""Models whose q, k and v are one matrix, with these one by one: the same function, in the family's twin.

Phi-3 and Phi-4 are such models. A partial RoPE (Phi-4-mini) turns the first channels of a head. The twin turns channels
i and i + head_dim / 2, so the rows of a head are put into that order, and the last pairs stand still:

| channels of a head, r turn | in the twin                                    |
| -------------------------- | ---------------------------------------------- |
| 0 ... r / 2                | the first channels of pairs 0 ... r / 2        |
| r / 2 ... r                | the second channels of these pairs             |
| r ... head_dim             | pairs r / 2 ... head_dim / 2, which stand still |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvp.models.family import family_of
from kvp.models.shapes import CHANNELS_PER_PAIR, dense_shapes, layer_shapes, turning_pairs

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

QKV, GATE_UP = "qkv_proj", "gate_up_proj"


@torch.no_grad()
def unfused(model: PreTrainedModel) -> PreTrainedModel:
    """Return the twin of a model that fuses matrices; any other model, and a twin, as it is. Weights are shared."""
    config, family = model.config, family_of(model.config)
    if not family.fused or config.model_type != family.name:
        return model
    from kvp.models.surgery import empty_twin, filled  # imports seconds of modelling code

    shapes = layer_shapes(config)
    return filled(empty_twin(config, shapes, range(len(shapes))), _apart(config, model.state_dict()), model)


def fused_state(config: PretrainedConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a twin's parameters, whose queries and keys are whole, by the names of the family's own class."""
    family, order, found = family_of(config), _order(config).argsort(), dict(state)
    for layer in range(config.num_hidden_layers):
        attention, mlp = (f"{family.layers}.{layer}.{part}" for part in (family.attention, family.mlp))
        q, k, v = (found.pop(f"{attention}.{name}.weight") for name in (family.q, family.k, family.v))
        found[f"{attention}.{QKV}.weight"] = torch.cat((_rows(q, order), _rows(k, order), v))
        gate, up = (found.pop(f"{mlp}.{name}.weight") for name in (family.gate, family.up))
        found[f"{mlp}.{GATE_UP}.weight"] = torch.cat((gate, up))
    return found


def _apart(config: PretrainedConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    family, order, found = family_of(config), _order(config), dict(state)
    width = dense_shapes(config)[0].qk_head_dim
    rows = [config.num_attention_heads * width, *[config.num_key_value_heads * width] * 2]
    for layer in range(config.num_hidden_layers):
        attention, mlp = (f"{family.layers}.{layer}.{part}" for part in (family.attention, family.mlp))
        q, k, v = found.pop(f"{attention}.{QKV}.weight").split(rows)
        for name, weight in ((family.q, _rows(q, order)), (family.k, _rows(k, order)), (family.v, v)):
            found[f"{attention}.{name}.weight"] = weight
        for name, weight in zip(
            (family.gate, family.up), found.pop(f"{mlp}.{GATE_UP}.weight").chunk(2), strict=True
        ):
            found[f"{mlp}.{name}.weight"] = weight
    return found


def _order(config: PretrainedConfig) -> Tensor:
    """Return (head_dim,) the family's channel that stands at each place of the twin's head."""
    width, turning = dense_shapes(config)[0].qk_head_dim, turning_pairs(config)
    turns, still = torch.arange(2 * turning), torch.arange(2 * turning, width)
    halves = zip(turns.chunk(CHANNELS_PER_PAIR), still.chunk(CHANNELS_PER_PAIR), strict=False)
    return torch.cat([torch.cat(half) for half in halves]) if len(still) else turns


def _rows(weight: Tensor, order: Tensor) -> Tensor:
    """Return the rows of a projection with the channels of every head in another order."""
    if torch.equal(order, torch.arange(len(order))):
        return weight
    return weight.unflatten(0, (-1, len(order)))[:, order.to(weight.device)].flatten(0, 1)
