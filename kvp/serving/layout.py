"""Shapes that stock engines take: one width everywhere, and one set of rope pairs in that order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvp.models.family import family_of
from kvp.models.shapes import CHANNELS_PER_PAIR, cut_after_norm, dense_shapes, layer_shapes
from kvp.types import LayerShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WAY_OUT = {
    "num_key_value_heads": "keep equally many groups per layer: strategy/allocator=uniform",
    "qk_head_dim": "strategy=kvpruner_stock keeps one width, and one set of rope pairs",
    "v_head_dim": "strategy=kvpruner_stock keeps one width, and one set of rope pairs",
    "intermediate_size": "one width per layer: strategy/allocator=uniform",
}


@dataclass(frozen=True)
class Layout:
    """The one shape of all layers of a stock model.

    Attributes:
        layer: Its widths; `rope_pairs` is None.
        pairs: The rotary frequencies kept, indices into the dense model's head_dim // 2.
        dense_head_dim: Of the model that was pruned: its softmax scale stays.
    """

    layer: LayerShape
    pairs: tuple[int, ...]
    dense_head_dim: int

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.layer.qk_head_dim

    @property
    def keeps_rope(self) -> bool:
        """Whether the rotary frequencies are the dense model's."""
        return self.pairs == tuple(range(self.dense_head_dim // CHANNELS_PER_PAIR))


def stock_layout(config: PretrainedConfig, one_width: bool = True) -> Layout:
    """The layout of a checkpoint, dense or pruned, whose keys and values must have `one_width`.

    Raises:
        ValueError: Its shapes are not those of a stock model; the message names what differs, and the
            KVPruner options that give it.
    """
    require_whole_keys(config)
    shapes = layer_shapes(config)
    for name, way_out in WAY_OUT.items():
        values = sorted(_widths(shapes, name))
        if len(values) > 1:
            missing = " (a sublayer is missing)" if 0 in values else ""
            raise ValueError(
                f"no stock engine serves layers of different {name}, here {_some(values)}{missing}; {way_out}, "
                "or remove whole blocks; --to padded gives the same logits without the saving"
            )
    first = shapes[0]
    if one_width and first.qk_head_dim != first.v_head_dim:
        raise ValueError(
            f"a stock config has one head_dim, here keys have {first.qk_head_dim} channels and values "
            f"{first.v_head_dim}; strategy=kvpruner_stock keeps both equal (grouping=coupled or separate)"
        )
    for name, present in {"o_proj": first.o_bias, "down_proj": first.down_bias}.items():
        if present or any(shape.o_bias or shape.down_bias for shape in shapes):
            raise ValueError(
                f"a compensation gave {name} a bias that {family_of(config).name} models have not; use "
                "strategy/compensation=none or least_squares with intercept=false"
            )
    if first.experts:  # a config says the width of MLPs beside that of experts
        networks = {shape.intermediate_size for shape in shapes if not shape.experts}
        first = replace(first, intermediate_size=min(networks, default=config.intermediate_size))
    return Layout(first, _pairs(shapes), dense_shapes(config)[0].qk_head_dim)


def _widths(shapes: Sequence[LayerShape], name: str) -> set[int]:
    """Return the values of a width; experts are as wide as the MLPs beside them."""
    values = {getattr(shape, name) for shape in shapes}
    if name != "intermediate_size" or not any(shape.experts for shape in shapes):
        return values
    networks = {shape.intermediate_size for shape in shapes if not shape.experts}
    return networks if networks - {0} else values


def require_whole_keys(config: PretrainedConfig) -> None:
    """Refuse keys that were cut after a norm over the head, which no class of transformers does.

    Raises:
        ValueError: They were; the message names what goes.
    """
    family = family_of(config)
    if any(cut_after_norm(config, shape) for shape in layer_shapes(config)):
        others = "vo, ffn or block" if family.joint_norm else "vo, kv_group, ffn or block"
        raise ValueError(
            f"the keys of this model were cut after their norm, which {family.name} classes do not: use "
            f"--to remote_code or custom, or prune with strategy.grouping={others}"
        )


def _pairs(shapes: Sequence[LayerShape]) -> tuple[int, ...]:
    every = tuple(range(shapes[0].qk_head_dim // CHANNELS_PER_PAIR))
    rows = {row for shape in shapes for row in shape.rope_pairs or (every,)}
    if len(rows) > 1:
        raise ValueError(
            f"stock rotary embeddings serve one set of rope pairs, here are {len(rows)} (per layer or per "
            "head); strategy=kvpruner_stock (scope=model) keeps one set in the whole model"
        )
    return next(iter(rows))


def _some(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:6]))
    return shown + (", ..." if len(values) > 6 else "")
