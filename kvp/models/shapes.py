"""The widths of every layer as data, and the size of a model with such widths.

The shapes come from the config. No weights are needed, so a laptop counts the parameters of a 7B recipe exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import mul
from typing import TYPE_CHECKING, Any

import torch

from kvp.models.family import family_of
from kvp.types import LayerShape, Plan, Size, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CHANNELS_PER_PAIR = 2


def layer_shapes(config: PretrainedConfig) -> tuple[LayerShape, ...]:
    """Return the widths of every layer of a dense or pruned model."""
    pruned = getattr(config, "kvp_layers", None)
    if pruned is None:
        return dense_shapes(config)
    return tuple(LayerShape(**{name: _frozen(value) for name, value in layer.items()}) for layer in pruned)


def dense_shapes(config: PretrainedConfig) -> tuple[LayerShape, ...]:
    """Return the widths that the config's global fields describe."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = LayerShape(
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        qk_head_dim=head_dim,
        v_head_dim=head_dim,
        intermediate_size=config.intermediate_size,
    )
    return (layer,) * config.num_hidden_layers


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def projected(config: PretrainedConfig, layer: LayerShape) -> int:
    """Return the channels per head that q and k compute: before a norm over the head all of them, else those kept."""
    return dense_shapes(config)[0].qk_head_dim if family_of(config).qk_norm else layer.qk_head_dim


def key_value_rows(config: PretrainedConfig, layer: LayerShape) -> tuple[int, int]:
    """Return how many channels k and v compute; of keys that are normed all, of latents those cached."""
    keys, values = layer.cached
    return keys if layer.k_latents else layer.num_key_value_heads * projected(config, layer), values


def expansion_rows(config: PretrainedConfig, layer: LayerShape) -> tuple[int, int]:
    """Return the rows of the matrices that expand one latent of keys, and one of values; 0 where there are none."""
    heads = layer.num_key_value_heads
    keys = heads * projected(config, layer) // layer.k_latents[0] if layer.k_latents else 0
    return keys, heads * layer.v_head_dim // layer.v_latents[0] if layer.v_latents else 0


def stream(config: PretrainedConfig, layer: LayerShape) -> tuple[int, int, int]:
    """Return the widths of the residual stream before a layer's attention, before its MLP and after the layer."""
    return layer.stream or (config.hidden_size,) * 3


def sliced(shapes: Sequence[LayerShape], widths: Sequence[int]) -> tuple[LayerShape, ...]:
    """Return the shapes with a residual stream of `widths`: two per layer, and one before the final norm.

    Raises:
        ValueError: The number of widths does not fit the layers.
    """
    if len(widths) != 2 * len(shapes) + 1:
        raise ValueError(
            f"{len(shapes)} layers have {2 * len(shapes)} sublayers, the plan has {len(widths) - 1} bases: it was "
            "made for another model"
        )
    around = zip(widths[::2], widths[1::2], widths[2::2], strict=False)
    return tuple(replace(shape, stream=three) for shape, three in zip(shapes, around, strict=True))


def require_whole_stream(
    config: PretrainedConfig, reason: str = "slicing comes last: prune the model that it was made from"
) -> None:
    """Refuse a sliced model.

    Raises:
        ValueError: The model is sliced.
    """
    if layer_shapes(config)[0].stream:
        raise ValueError(f"the residual stream of this model is sliced, and {reason}")


def cut(shapes: Sequence[LayerShape], plan: Plan) -> tuple[LayerShape, ...]:
    """Return the shapes that remain when `plan` is applied to a model of `shapes`.

    Raises:
        ValueError: The plan names a space that a model of these shapes does not have.
    """
    keep = {(space.kind, space.layer): indices for space, indices in plan.keep.items()}
    for space in plan.keep:
        _check_space(space, shapes)
    kept_blocks = keep.get(("block", None), torch.arange(len(shapes))).tolist()
    kept_attention = set(keep.get(("attention", None), torch.arange(len(shapes))).tolist())
    kept_mlp = set(keep.get(("mlp", None), torch.arange(len(shapes))).tolist())
    layers = []
    for index in kept_blocks:
        layer = _cut_layer(
            folded(shapes[index], plan.folded),
            *(keep.get((kind, index)) for kind in ("kv_group", "qk", "vo", "k_latent", "v_latent", "ffn")),
        )
        if index not in kept_attention:
            layer = replace(
                layer,
                num_attention_heads=0,
                num_key_value_heads=0,
                rope_pairs=None,
                k_latents=None,
                v_latents=None,
            )
        if index not in kept_mlp:
            layer = replace(layer, intermediate_size=0)
        layers.append(layer)
    return tuple(layers)


def _check_space(space: Space, shapes: Sequence[LayerShape]) -> None:
    if space.layer is not None and not 0 <= space.layer < len(shapes):
        raise ValueError(f"the plan names layer {space.layer}, the model has {len(shapes)} layers")
    if space.shape != space_shape(space, shapes):
        raise ValueError(
            f"the plan's space {space.key} has shape {space.shape}, the model's has "
            f"{space_shape(space, shapes)}: it was made for another model"
        )


def space_shape(space: Space, shapes: Sequence[LayerShape]) -> tuple[int, ...]:
    """Return the shape that `space` has in a model of `shapes`."""
    if space.layer is None:
        return (len(shapes),)
    layer = shapes[space.layer]
    groups = layer.num_key_value_heads
    return {
        "kv_group": (groups,),
        "qk": (groups, layer.qk_head_dim // CHANNELS_PER_PAIR),
        "vo": (groups, layer.v_head_dim),
        "k_latent": layer.k_latents or (),
        "v_latent": layer.v_latents or (),
        "ffn": (layer.intermediate_size,),
    }[space.kind]


def folded(layer: LayerShape, first: int | None) -> LayerShape:
    """Return the layer with its rope pairs from frequency `first` on at the slowest; None changes nothing."""
    if first is None or not layer.num_key_value_heads:
        return layer
    rows = (
        layer.rope_pairs
        or (tuple(range(layer.qk_head_dim // CHANNELS_PER_PAIR)),) * layer.num_key_value_heads
    )
    slowest = max(map(max, rows))
    return replace(layer, rope_pairs=tuple(tuple(slowest if p >= first else p for p in row) for row in rows))


def _cut_layer(
    layer: LayerShape,
    groups: torch.Tensor | None,
    pairs: torch.Tensor | None,
    channels: torch.Tensor | None,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    neurons: torch.Tensor | None,
) -> LayerShape:
    rope_pairs = layer.rope_pairs
    if pairs is not None:
        dense = range(layer.qk_head_dim // CHANNELS_PER_PAIR)
        rows = rope_pairs or (tuple(dense),) * layer.num_key_value_heads
        rope_pairs = tuple(
            tuple(row[i] for i in kept) for row, kept in zip(rows, pairs.tolist(), strict=True)
        )
    if groups is not None:
        queries = layer.num_attention_heads // layer.num_key_value_heads
        rope_pairs = rope_pairs and tuple(rope_pairs[group] for group in groups.tolist())
        layer = replace(layer, num_attention_heads=queries * len(groups), num_key_value_heads=len(groups))
    return replace(
        layer,
        rope_pairs=rope_pairs,
        qk_head_dim=layer.qk_head_dim if pairs is None else CHANNELS_PER_PAIR * pairs.shape[-1],
        v_head_dim=layer.v_head_dim if channels is None else channels.shape[-1],
        k_latents=layer.k_latents if keys is None else (keys.shape[0], keys.shape[1]),
        v_latents=layer.v_latents if values is None else (values.shape[0], values.shape[1]),
        intermediate_size=layer.intermediate_size if neurons is None else len(neurons),
    )


def size(config: PretrainedConfig, shapes: Sequence[LayerShape]) -> Size:
    """Return parameters, blocks and KV bytes per token, in the config's dtype, of a model of `shapes`."""
    head_and_norm = config.vocab_size * config.hidden_size + config.hidden_size
    outside = head_and_norm + _embedding_params(config, shapes)
    block_params = sum(_layer_params(config, layer) for layer in shapes)
    return Size(
        params=outside + block_params,
        block_params=block_params,
        blocks=len(shapes),
        kv_bytes_per_token=itemsize(config) * sum(layer.kv_width for layer in shapes),
    )


def _embedding_params(config: PretrainedConfig, shapes: Sequence[LayerShape]) -> int:
    """Count the embedding's parameters that the head does not share.

    A shared matrix is not sliced, so a basis follows it in a sliced stream.
    """
    sliced = shapes[0].stream is not None
    rows = config.hidden_size * sliced if config.tie_word_embeddings else config.vocab_size
    return rows * stream(config, shapes[0])[0]


def itemsize(config: PretrainedConfig) -> int:
    """Return the bytes of one number in the config's dtype."""
    dtype = config.dtype or torch.float32
    return (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize


def _layer_params(config: PretrainedConfig, layer: LayerShape) -> int:
    (before, between, after), family = stream(config, layer), family_of(config)
    attention_bias = family.has_bias("attention_bias", config)
    qkv_bias, o_bias = attention_bias or family.qkv_bias, attention_bias or layer.o_bias
    mlp_bias = family.has_bias("mlp_bias", config)
    down_bias = mlp_bias or layer.down_bias
    width = projected(config, layer)
    q_out = layer.num_attention_heads * (width + layer.latent * layer.v_head_dim)
    k_out, v_out = key_value_rows(config, layer)
    o_in = layer.num_attention_heads * layer.v_head_dim
    attention = (before + qkv_bias) * (q_out + k_out + v_out) + between * (o_in + o_bias)
    attention += sum(map(mul, layer.cached, expansion_rows(config, layer)))
    if family.qk_norm:
        attention += 2 * width
    mlp = 2 * (between + mlp_bias) * layer.intermediate_size + after * (layer.intermediate_size + down_bias)
    around = before + between if layer.stream is None else between * (before + after)  # norms, or shortcuts
    around += len(family.post_norms) * config.hidden_size
    return around + attention * (layer.num_key_value_heads > 0) + mlp * (layer.intermediate_size > 0)
