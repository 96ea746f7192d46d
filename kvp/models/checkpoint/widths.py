"""The widths that a pruned checkpoint's config carries."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt


class Layer(BaseModel):
    """One entry of `kvp_layers`: the fields of a `kvp.types.LayerShape`, as JSON has them."""

    model_config = ConfigDict(strict=True, extra="forbid")

    num_attention_heads: NonNegativeInt
    num_key_value_heads: NonNegativeInt
    qk_head_dim: NonNegativeInt
    v_head_dim: NonNegativeInt
    intermediate_size: NonNegativeInt
    rope_pairs: list[list[NonNegativeInt]] | None = None
    o_bias: bool = False
    down_bias: bool = False
    stream: list[PositiveInt] | None = None
    latent: bool = False
    normed_groups: list[NonNegativeInt] | None = None
    k_latents: list[PositiveInt] | None = None
    v_latents: list[PositiveInt] | None = None
    experts: NonNegativeInt = 0


def check_widths(
    layers: Sequence[Layer] | None,
    count: int,
    hidden_size: int,
    pairs: int,
    *,
    queries: int,
    normed: int | None = None,
) -> None:
    """Refuse widths that no cut leaves.

    Args:
        layers: The entries of `kvp_layers`.
        count: The number of layers that the config says.
        hidden_size: The width of the uncut residual stream.
        pairs: The rotary frequencies of the dense model's head.
        queries: The query heads of a KV group of the dense model.
        normed: The KV groups of the dense model, if its family norms all heads together.

    Raises:
        ValueError: Names the layer, the field and its bound.
    """
    if layers is None or len(layers) != count:
        found = "is missing" if layers is None else f"has {len(layers)} entries"
        raise ValueError(f"kvp_layers {found}, num_hidden_layers is {count}: copy the config again")
    if not any(layer.num_key_value_heads for layer in layers):
        raise ValueError("kvp_layers has no layer with an attention: copy the config again")
    for index, layer in enumerate(layers):
        try:
            _check_heads(layer, pairs, queries)
            _check_groups(layer, normed)
        except ValueError as error:
            raise ValueError(f"kvp_layers.{index}: {error}; copy the config again") from None
    _check_stream(layers, hidden_size)


def _check_heads(layer: Layer, pairs: int, queries: int) -> None:
    heads, groups = layer.num_attention_heads, layer.num_key_value_heads
    if (heads == 0) != (groups == 0) or (groups and heads % groups):
        raise ValueError(f"num_key_value_heads={groups} must divide num_attention_heads={heads}")
    if not groups:
        return
    if heads // groups % queries:
        raise ValueError(
            f"{heads} query heads of {groups} KV heads must be a multiple of {queries} each, as config.json says of "
            "the dense model"
        )
    if layer.qk_head_dim % 2 or not layer.qk_head_dim or not layer.v_head_dim:
        raise ValueError(
            f"qk_head_dim must be even and both widths > 0, got {layer.qk_head_dim} and {layer.v_head_dim}"
        )
    _check_latents(layer, groups)
    rows = layer.rope_pairs
    if rows is None:
        if layer.qk_head_dim != 2 * pairs:
            raise ValueError(
                f"qk_head_dim={layer.qk_head_dim} needs rope_pairs, the dense model has {2 * pairs}"
            )
        return
    width = layer.qk_head_dim // 2
    if len(rows) != groups or any(len(row) != width for row in rows):
        raise ValueError(f"rope_pairs must have {groups} rows of {width}, one per KV head")
    if (largest := max(max(row) for row in rows)) >= pairs:
        raise ValueError(f"rope_pairs must be below {pairs}, the pairs of the dense model, got {largest}")


def _check_groups(layer: Layer, normed: int | None) -> None:
    groups, named = layer.num_key_value_heads, layer.normed_groups
    if normed is None or not groups:
        if named is not None:
            raise ValueError(f"normed_groups must be null without a norm over all heads, got {named}")
    elif named is None or len(named) != groups or named != sorted({*named} & {*range(normed)}):
        raise ValueError(f"normed_groups must be {groups} ascending numbers below {normed}, got {named}")


def _check_latents(layer: Layer, groups: int) -> None:
    if (layer.k_latents is None) != (layer.v_latents is None) or (layer.k_latents and layer.latent):
        raise ValueError("k_latents and v_latents go together, and not with latent")
    for name in ("k_latents", "v_latents"):
        latents = getattr(layer, name)
        if latents is not None and (len(latents) != 2 or groups % latents[0]):
            raise ValueError(
                f"{name} must be a divisor of num_key_value_heads={groups} and a width, got {latents}"
            )


def _check_stream(layers: Sequence[Layer], hidden_size: int) -> None:
    streams = [layer.stream for layer in layers]
    if all(stream is None for stream in streams):
        return
    whole = [stream for stream in streams if stream is not None and len(stream) == 3]
    joints = zip(whole, [*(stream[0] for stream in whole[1:]), hidden_size], strict=False)
    if len(whole) != len(layers) or any(stream[2] != after for stream, after in joints):
        raise ValueError(
            f"kvp_layers: every stream must be three widths, end where the next begins, and the last at {hidden_size}; "
            "copy the config again"
        )
