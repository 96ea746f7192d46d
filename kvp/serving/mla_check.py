"""Models that multi-head latent attention can be, by their config alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

from kvp.models.family import family_of
from kvp.models.shapes import dense_shapes, layer_shapes, turning_pairs
from kvp.serving.layout import Layout, stock_layout
from kvp.serving.rope import require_fixed_factors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NORM_EPS = 1e-6  # of the latent's norm: transformers has it in the code, engines read the config


def mla_layout(config: PretrainedConfig, form: str) -> Layout:
    """Return the layout of a checkpoint that is MLA; no weights are read.

    Raises:
        ValueError: It is none; the message names the property and the way out.
    """
    _check_attention(config)
    groups = sorted({shape.num_key_value_heads for shape in layer_shapes(config)} - {0})
    if groups != [1]:
        raise ValueError(
            f"MLA caches what all heads share, this model has {groups[-1]} KV heads: join them by "
            "strategy=kvpruner_plus_stock strategy.num_key_value_heads=1"
        )
    layout = stock_layout(config, one_width=False)
    require_fixed_factors(config)
    if form != "mla_longrope":
        _check_default_rope(config, layout)
    return layout


def _check_attention(config: PretrainedConfig) -> None:
    family = family_of(config)
    biased = [option for option in ("attention_bias", "mlp_bias") if family.has_bias(option, config)]
    if family.qkv_bias or biased:
        whose = f"{family.name} models have" if family.qkv_bias else f"this model has ({', '.join(biased)})"
        raise ValueError(
            f"MLA engines have no biases in their projections, which {whose}: export it --to stock"
        )
    if family.qk_norm:
        raise ValueError(
            f"{family.name} normalises queries and keys, which MLA does not: export it --to stock"
        )
    if family.experts:
        raise ValueError(f"{family.name} has experts, and kvp writes none as MLA: export it --to stock")
    if turning_pairs(config) != dense_shapes(config)[0].qk_head_dim // 2:
        raise ValueError(
            f"some channels of {family.name} never turn, and MLA engines turn all: use --to remote_code"
        )
    if family.layer_fields:
        raise ValueError(
            f"{family.name} has layers without RoPE, which MLA engines turn: export it --to stock"
        )
    window, positions = getattr(config, "sliding_window", None), config.max_position_embeddings
    if window is not None and window < positions:
        raise ValueError(
            f"MLA has no sliding window, this model one of {window} in {positions} positions: use --to stock. For "
            f"texts of up to {window} tokens set sliding_window=null and max_position_embeddings={window} in "
            "config.json, which computes the same"
        )
    if str(config.dtype).removeprefix("torch.") == "float16":
        raise ValueError(
            "float16 cannot hold the latent, which is 2^-24 of its size: store the checkpoint in bfloat16 or float32"
        )


def _check_default_rope(config: PretrainedConfig, layout: Layout) -> None:
    """Refuse pairs that the default rotary embedding of no theta turns."""
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"engines read default RoPE for MLA, this model has {kind!r}: use --to mla_longrope")
    twice = [pair for pair, count in Counter(layout.pairs).items() if count > 1]
    steps = {after - before for before, after in pairwise(layout.pairs)}
    if twice:
        raise ValueError(
            f"default RoPE turns one direction per frequency, here {_some(twice)} of the rope pairs stand more than "
            "once: use --to mla_longrope"
        )
    if layout.pairs[0] or len(steps) > 1 or min(steps, default=1) < 1:
        raise ValueError(
            f"default RoPE turns pairs 0, m, 2 m, ... , here are {_some(layout.pairs)}: use --to mla_longrope"
        )


def _some(pairs: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, pairs[:12])) + (", ..." if len(pairs) > 12 else "")
