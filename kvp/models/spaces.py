"""Spaces of a decoder, and the rows and columns of matrices that each space cuts.

The coupling between matrices stands here once. Surgery, masks and scores all read it:

| index of a space      | rows                                                          | columns                      |
| --------------------- | ------------------------------------------------------------- | ---------------------------- |
| kv_group g            | of k and v, and of the group's query heads in q and q_latent  | of those query heads in o    |
| qk i (rope pair)      | i and i + width / 2 of k, and of each query head in q; after  |                              |
|                       | a norm over the head: of what the norm writes                 |                              |
| vo j                  | j of v, and of each query head in q_latent                    | j of each query head in o    |
| k_latent, v_latent c  | c of k, of v                                                  | c of k_up, of v_up           |
| ffn n                 | n of gate and up                                              | n of down                    |
| attention, mlp, block | all of the sublayer or layer                                  |                              |

Only latent layers have a q_latent, and only layers that cache latents k_up and v_up. Query heads belong to groups
contiguously: head h to group h // (heads / groups).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvp.models.family import Family, family_of
from kvp.models.shapes import key_value_rows, layer_shapes, projected, space_shape
from kvp.types import KINDS, Kind, LayerShape, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ACROSS_LAYERS: tuple[Kind, ...] = ("block", "attention", "mlp")


@dataclass(frozen=True)
class Member:
    """One matrix cut by a space.

    Attributes:
        name: Name of the module, such as "model.layers.3.self_attn.q_proj".
        axis: 0 for rows (outputs, with their biases), 1 for columns (inputs).
        index: The flat index of the space that each row or column belongs to, (size of that axis,).
        norm: Name of the norm over heads that follows, if the space cuts what it writes. The matrix stays whole then.
    """

    name: str
    axis: int
    index: Tensor
    norm: str | None = None

    @property
    def output(self) -> str:
        """Return the name of the module whose output has the channels that the space cuts."""
        return self.norm or self.name


def available_kinds(config: PretrainedConfig) -> tuple[Kind, ...]:
    """Return the kinds of spaces that a model offers."""
    return tuple(kind for kind in KINDS if not _why_not(config, kind))


def _why_not(config: PretrainedConfig, kind: Kind) -> str:
    """Return why a model has no such space; empty if it has."""
    shapes = [shape for shape in layer_shapes(config) if shape.num_key_value_heads]
    latents = any(shape.k_latents for shape in shapes)
    if kind in ("k_latent", "v_latent") and not latents:
        return "it caches keys and values, and no latents"
    if kind in ("kv_group", "qk", "vo") and latents:
        return "it caches latents, which several heads share"
    if kind == "qk" and any(shape.qk_head_dim != projected(config, shape) for shape in shapes):
        return "its keys were cut after their norm, which needs the channels as they were"
    if kind == "attention" and len(set(getattr(config, "layer_types", None) or ())) > 1:
        return "it mixes sliding and full attention, and its cache could not tell the layers apart"
    return ""


def find_spaces(config: PretrainedConfig, kinds: Iterable[Kind]) -> list[Space]:
    """Return the spaces of the given kinds, layer by layer.

    Raises:
        ValueError: The family has no such space; the message lists the spaces that it has.
    """
    available, shapes = available_kinds(config), layer_shapes(config)
    spaces = []
    for kind in kinds:
        if kind not in available:
            raise ValueError(
                f"{config.model_type} has no space {kind!r}, because {_why_not(config, kind)}; it has: "
                f"{', '.join(available)}"
            )
        layers = [None] if kind in ACROSS_LAYERS else _layers_with(kind, shapes)
        for layer in layers:
            space = Space(kind, layer, ())
            spaces.append(Space(kind, layer, space_shape(space, shapes)))
    return spaces


def _layers_with(kind: Kind, shapes: Sequence[LayerShape]) -> list[int | None]:
    width = (lambda s: s.intermediate_size) if kind == "ffn" else (lambda s: s.num_key_value_heads)
    return [index for index, shape in enumerate(shapes) if width(shape)]


def members(config: PretrainedConfig, space: Space) -> list[Member]:
    """Return the matrices that `space` cuts, with the index that each row or column belongs to."""
    family, shapes = family_of(config), layer_shapes(config)
    if space.layer is None:
        return [
            Member(name, 0, torch.full((rows,), index))
            for index, shape in enumerate(shapes)
            for name, rows in _sublayer_rows(config, family, space.kind, index, shape)
        ]
    shape, layer = shapes[space.layer], f"{family.layers}.{space.layer}"
    groups, queries = shape.num_key_value_heads, shape.num_attention_heads
    q, k, v, o = (f"{layer}.{family.attention}.{name}" for name in (family.q, family.k, family.v, family.o))
    group_of_query = torch.arange(groups).repeat_interleave(queries // groups if groups else 1)
    of_groups, of_queries = torch.arange(groups), group_of_query
    q_latent = f"{layer}.{family.attention}.{family.q_latent}"
    match space.kind:
        case "kv_group":
            return [
                Member(q, 0, of_queries.repeat_interleave(projected(config, shape))),
                Member(k, 0, of_groups.repeat_interleave(projected(config, shape))),
                Member(v, 0, of_groups.repeat_interleave(shape.v_head_dim)),
                Member(o, 1, of_queries.repeat_interleave(shape.v_head_dim)),
                *([Member(q_latent, 0, of_queries.repeat_interleave(shape.v_head_dim))] * shape.latent),
            ]
        case "qk":
            pairs = shape.qk_head_dim // 2
            channel = torch.arange(pairs).repeat(2)
            norms = (
                f"{layer}.{family.attention}.{norm}" if family.qk_norm else None
                for norm in ("q_norm", "k_norm")
            )
            return [
                Member(name, 0, (of_heads[:, None] * pairs + channel).flatten(), norm)
                for name, of_heads, norm in zip((q, k), (of_queries, of_groups), norms, strict=True)
            ]
        case "vo":
            channel = torch.arange(shape.v_head_dim)
            of_heads = (of_queries[:, None] * shape.v_head_dim + channel).flatten()
            return [
                Member(v, 0, (of_groups[:, None] * shape.v_head_dim + channel).flatten()),
                Member(o, 1, of_heads),
                *([Member(q_latent, 0, of_heads)] * shape.latent),
            ]
        case "k_latent" | "v_latent":
            channel = torch.arange(torch.Size(space.shape).numel())
            reads, expands = (k, family.k_up) if space.kind == "k_latent" else (v, family.v_up)
            return [
                Member(reads, 0, channel),
                Member(f"{layer}.{family.attention}.{expands}", 1, channel),
            ]
        case _:
            neuron = torch.arange(shape.intermediate_size)
            gate, up, down = (
                f"{layer}.{family.mlp}.{name}" for name in (family.gate, family.up, family.down)
            )
            return [Member(gate, 0, neuron), Member(up, 0, neuron), Member(down, 1, neuron)]


def _sublayer_rows(
    config: PretrainedConfig, family: Family, kind: Kind, index: int, shape: LayerShape
) -> list[tuple[str, int]]:
    """Return (module name, number of rows) of the matrices of a layer that go with `kind`."""
    layer, hidden = f"{family.layers}.{index}", config.hidden_size
    groups, (keys, values) = shape.num_key_value_heads, key_value_rows(config, shape)
    attention = {
        family.q: shape.num_attention_heads * projected(config, shape),
        family.k: keys,
        family.v: values,
        family.o: hidden,
        **({family.q_latent: shape.num_attention_heads * shape.v_head_dim} if shape.latent else {}),
    }
    mlp = {family.gate: shape.intermediate_size, family.up: shape.intermediate_size, family.down: hidden}
    rows = []
    if kind in ("block", "attention") and groups:
        rows += [(f"{layer}.{family.attention}.{name}", count) for name, count in attention.items()]
    if kind in ("block", "mlp") and shape.intermediate_size:
        rows += [(f"{layer}.{family.mlp}.{name}", count) for name, count in mlp.items()]
    return rows


def tokens_first(config: PretrainedConfig, output: Tensor) -> Tensor:
    """Return what a module writes with the tokens second; a norm over heads may have the heads there.

    A second call undoes the first.
    """
    turned = output.dim() == 4 and family_of(config).heads_first  # the twin's norms write five dimensions
    return output.transpose(1, 2) if turned else output


def axis_sums(values: Tensor, axis: int) -> Tensor:
    """Return the sums of a matrix over its other axis, (size of the axis,); a norm's vector stays as it is."""
    return values if values.dim() == 1 else values.sum(1 - axis)


def fold(values: Tensor, member: Member, space: Space) -> Tensor:
    """Sum a vector over the rows (or columns) of a member into the indices of its space."""
    total = values.new_zeros(_numel(space.shape))
    return total.index_add_(0, member.index.to(values.device), values).view(space.shape)


def keep_mask(space: Space, keep: Tensor) -> Tensor:
    """Return a boolean mask (numel of the space,), True where the index stays."""
    mask = torch.zeros(_numel(space.shape), dtype=torch.bool)
    if keep.dim() == 2:
        keep = keep + torch.arange(space.shape[0])[:, None] * space.shape[1]
    mask[keep.flatten()] = True
    return mask


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
