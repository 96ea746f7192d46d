"""The residual stream in other coordinates: SliceGPT's algebra (arXiv:2401.15024), on weights and by hooks.

A basis Q_p is (hidden_size, width), with orthonormal columns. Position p = 2n stands before the attention of layer n,
p = 2n + 1 before its MLP. After the last layer the stream is whole. Expressed in Q_p, the stream x is x Q_p:

| part                             | dense | in bases                 |
| -------------------------------- | ----- | ------------------------ |
| reader, with the norm's weight g | W     | W diag(g) Q_p            |
| writer                           | W     | Q_p+1^T W                |
| bias of a writer                 | b     | Q_p+1^T b                |
| shortcut around a sublayer       | I     | Q_p+1^T Q_p              |

The norm still divides by |x|, because |x Q_p| = |x| for a square Q_p. A square Q_p changes nothing. Fewer columns
replace x by x Q_p Q_p^T, which is what `project` does to a model whose weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvp.models.family import family_of
from kvp.models.shapes import layer_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def require_turnable(config: PretrainedConfig) -> None:
    """Refuse a stream that cannot be expressed in other coordinates.

    Raises:
        ValueError: Norms follow attention and MLP, and their weights belong to single channels of the stream. Or there
            are experts.
    """
    if any(shape.experts for shape in layer_shapes(config)):
        raise ValueError(
            f"{config.model_type} has experts, which read the stream and stay whole, so it cannot be sliced: choose a "
            "strategy that cuts heads, channels or blocks"
        )
    if family_of(config).post_norms:
        raise ValueError(
            f"{config.model_type} norms what attention and MLP write, so its stream cannot be sliced: choose a "
            "strategy that cuts heads, channels, neurons or blocks"
        )


def rotated(model: PreTrainedModel, bases: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the parameters of the sliced twin by name, each computed in float64 and rounded once."""
    config, family, state = model.config, family_of(model.config), model.state_dict()
    exact = [basis.to(model.device, torch.float64) for basis in bases]
    exact.append(torch.eye(config.hidden_size, dtype=torch.float64, device=model.device))

    def put(name: str, value: Tensor) -> None:
        state[name] = value.to(model.dtype).contiguous()

    if config.tie_word_embeddings:
        put(f"{family.embedding}.basis.weight", exact[0].T)
    else:
        name = f"{family.embedding}.weight"
        put(name, state[name].double() @ exact[0])
    sublayers = (
        (family.attention, (family.q, family.k, family.v), family.o, "attention_shortcut"),
        (family.mlp, (family.gate, family.up), family.down, "mlp_shortcut"),
    )
    for position in range(len(bases)):
        before, after = exact[position : position + 2]
        layer = f"{family.layers}.{position // 2}"
        part, readers, writer, shortcut = sublayers[position % 2]
        norm = state.pop(f"{layer}.{family.layer_norms[position % 2]}.weight").double()
        for name in (f"{layer}.{part}.{reader}.weight" for reader in readers):
            if name in state:  # a removed sublayer has none
                put(name, state[name].double() * norm @ before)
        for name in (f"{layer}.{part}.{writer}.{parameter}" for parameter in ("weight", "bias")):
            if name in state:
                put(name, after.T @ state[name].double())
        put(f"{layer}.{shortcut}.weight", after.T @ before)
    return state


def project(model: PreTrainedModel, position: int, basis: Tensor) -> ExitStack:
    """Project the stream at a position onto the span of a basis, until the returned stack is closed."""
    family = family_of(model.config)
    layer = model.get_submodule(f"{family.layers}.{position // 2}")
    hooks, before = ExitStack(), {}

    def span(states: Tensor) -> Tensor:
        directions = basis.to(states.device)
        return (states.to(basis.dtype) @ directions @ directions.T).to(states.dtype)

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (span(args[0]), *args[1:])

    def remember(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        before["attention"] = args[0]

    def leave(module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        residual = before.pop("attention")  # the layer adds it again
        return span(residual + output[0]) - residual, output[1]

    if position % 2 == 0:
        hooks.callback(layer.register_forward_pre_hook(enter).remove)
    else:
        norm, attention = (layer.get_submodule(name) for name in (family.layer_norms[0], family.attention))
        hooks.callback(norm.register_forward_pre_hook(remember).remove)
        hooks.callback(attention.register_forward_hook(leave).remove)
    return hooks
