"""A pruned checkpoint as an ordinary directory of its family, such as Llama's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from kvp.models.family import FAMILIES, Family, family_of
from kvp.models.shapes import CHANNELS_PER_PAIR, dense_shapes, layer_shapes, turning_pairs
from kvp.models.surgery import check_tied, take_buffers
from kvp.models.unfused import fused_state
from kvp.serving.layout import Layout, require_whole_keys, stock_layout
from kvp.serving.rope import arithmetic, longrope, query_scale
from kvp.types import LayerShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Form = Literal["stock", "stock_arithmetic", "padded"]  # of an ordinary model
OF_PHI = ("resid_pdrop", "embd_pdrop", "original_max_position_embeddings", "partial_rotary_factor")
OURS = ("kvp_layers", "kvp_cache", "model_type", "architectures", "transformers_version")


@torch.no_grad()
def to_stock(model: PreTrainedModel, form: Form) -> PreTrainedModel:
    """Return the same function in a class that transformers has, on the CPU, in the dtype of the given model.

    Raises:
        ValueError: The shapes do not allow it; the message says what would.
    """
    config, family = model.config, family_of(model.config)
    require_whole_keys(config)
    if form == "padded":
        if family.fused:
            raise ValueError(
                f"{family.name} has no padded form, because its class fuses matrices: use --to stock"
            )
        layout = Layout(_padded_layer(config), tuple(range(_head_dim(config) // 2)), _head_dim(config))
        state = _padded_state(model)
    else:
        layout, state = stock_layout(config), dict(model.state_dict())
    stock_family = servable(config, layout)
    rotary, rope = model.get_submodule(family.rotary), _rope(config)
    if not layout.keeps_rope:
        scaling: float = rotary.attention_scaling  # type: ignore[assignment]
        if family.layer_fields and scaling != 1:
            raise ValueError(
                f"RoPE of type {rope['rope_type']!r} scales cosines, and some layers of {family.name} have none: "
                "use --to remote_code or custom"
            )
        rope = longrope(layout, rope, rotary) if form == "stock" else arithmetic(layout, rope)
        _scale_queries(state, config, family, query_scale(layout, scaling))
    check_tied(state, f"{family.embedding}.weight", config)
    if stock_family.fused:
        state = fused_state(config, state)
    stock_config = _stock_config(config, stock_family, layout, rope)
    with torch.device("meta"):
        stock = stock_family.causal_lm(stock_config)
    stock.load_state_dict(state, assign=True)
    stock.set_submodule(family.rotary, stock_family.rotary_class(stock_config))
    take_buffers(stock, model, family.embedding)
    stock.tie_weights()
    stock.generation_config = model.generation_config
    return stock.eval()


def add_old_keys(path: Path) -> None:
    """Add to a config.json the fields that transformers 5 no longer writes, and transformers 4 and most engines read.

    These are `rope_theta`, `rope_scaling`, `partial_rotary_factor`, `torch_dtype` and the number of experts.
    """
    config = json.loads(path.read_text())
    rope = config["rope_parameters"]
    config["torch_dtype"] = config.get("dtype")
    if "sliding_attention" in rope:  # Gemma 3 has two
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = None
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if (
        config["model_type"] == "phi3" and rope.get("rope_type") == "longrope"
    ):  # its class takes three fields, no more
        factors = {name: rope[name] for name in ("short_factor", "long_factor")}
        config["rope_scaling"] = {"type": "longrope", **factors}
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config["num_local_experts"]
    if "original_max_position_embeddings" in rope:
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    path.write_text(json.dumps(config, indent=2))


def _head_dim(config: PretrainedConfig) -> int:
    return dense_shapes(config)[0].qk_head_dim


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    return dict(config.rope_parameters)


def _scale_queries(state: dict[str, Tensor], config: PretrainedConfig, family: Family, scale: float) -> None:
    for index in range(config.num_hidden_layers):
        for part in ("weight", "bias"):
            name = f"{family.layers}.{index}.{family.attention}.{family.q}.{part}"
            if name in state:
                state[name] = (state[name].double() * scale).to(state[name].dtype)


def servable(config: PretrainedConfig, layout: Layout) -> Family:
    """Return the family whose classes hold a layout; no weights are read.

    Llama and Gemma 3 refuse a hidden size that their heads do not divide. Mistral is Llama's model and does not.

    Raises:
        ValueError: There is none; the message names the way out.
    """
    family = family_of(config)
    if family.fused:
        return _unfused(family, config, layout)
    if (
        family.name not in ("llama", "gemma3_text")
        or config.hidden_size % layout.layer.num_attention_heads == 0
    ):
        return family
    if family.name != "llama":
        raise ValueError(
            f"{layout.layer.num_attention_heads} heads do not divide hidden_size={config.hidden_size}, which "
            f"{family.name} classes demand: keep a number of groups that divides it, or --to padded, remote_code or "
            "custom"
        )
    if any(family.has_bias(option, config) for option in family.bias_options):
        raise ValueError(
            f"{layout.layer.num_attention_heads} heads do not divide hidden_size={config.hidden_size}, which "
            "Llama classes demand, and Mistral's have no biases: keep a number of groups that divides it"
        )
    return FAMILIES["mistral"]


def _unfused(family: Family, config: PretrainedConfig, layout: Layout) -> Family:
    """Mistral's classes compute what Phi-3's do, unless some channels never turn: then only whole heads can be said."""
    if turning_pairs(config) == layout.dense_head_dim // CHANNELS_PER_PAIR:
        return FAMILIES["mistral"]
    if layout.keeps_rope and layout.layer.num_attention_heads == config.num_attention_heads:
        return family
    raise ValueError(
        f"some channels of {family.name} never turn, and its class holds them in the dense number of whole heads "
        "only: use --to remote_code or custom, or prune with strategy.grouping=ffn or block"
    )


def _stock_config(
    config: PretrainedConfig, family: Family, layout: Layout, rope: dict[str, Any]
) -> PretrainedConfig:
    fields = {name: value for name, value in config.to_dict().items() if name not in OURS}
    if family.name == "mistral":
        fields.setdefault("sliding_window", None)
        fields = {name: value for name, value in fields.items() if name not in OF_PHI}
        rope = {name: value for name, value in rope.items() if name != "partial_rotary_factor"}
    fields |= {
        "num_attention_heads": layout.layer.num_attention_heads,
        "num_key_value_heads": layout.layer.num_key_value_heads,
        "head_dim": layout.head_dim,
        "intermediate_size": layout.layer.intermediate_size,
        "rope_parameters": rope,
    }
    return family.config_class(**fields)


def _padded_layer(config: PretrainedConfig) -> LayerShape:
    dense = dense_shapes(config)[0]
    if any(shape.o_bias or shape.down_bias for shape in layer_shapes(config)):
        raise ValueError("a compensation added biases that no stock class of the family has: no padded form")
    if any(
        shape.num_attention_heads * dense.num_key_value_heads
        != shape.num_key_value_heads * dense.num_attention_heads
        for shape in layer_shapes(config)
    ):
        raise ValueError(
            "KV heads were joined, the dense shape keeps them apart: no padded form; set "
            "strategy.num_key_value_heads=null"
        )
    if any(len(set(row)) < len(row) for shape in layer_shapes(config) for row in shape.rope_pairs or ()):
        raise ValueError(
            "folded rope pairs share one frequency, which the dense shape has once: no padded form; set "
            "strategy.context=null"
        )
    return replace(dense, rope_pairs=None, intermediate_size=config.intermediate_size)


def _padded_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every matrix in the dense model's shape: what was cut is zero, rope pairs are where they were."""
    config, family = model.config, family_of(model.config)
    shapes, dense = layer_shapes(config), dense_shapes(config)[0]
    with torch.device("meta"):
        fields = {name: value for name, value in config.to_dict().items() if name not in OURS}
        whole = family.causal_lm(family.config_class(**fields)).state_dict()
    state, narrow = {}, model.state_dict()
    for name, like in whole.items():
        if name in narrow and narrow[name].shape == like.shape and not _is_query_or_key(name, family):
            state[name] = narrow[name]
            continue
        state[name] = torch.zeros(like.shape, dtype=model.dtype)
        if name in narrow and narrow[name].numel():
            rows, columns = _places(name, family, shapes, dense)
            block = narrow[name] if narrow[name].dim() == 2 else narrow[name][:, None]
            target = state[name] if like.dim() == 2 else state[name][:, None]
            rows = torch.arange(block.shape[0]) if rows is None else rows
            columns = torch.arange(block.shape[1]) if columns is None else columns
            target[rows[:, None], columns] = block
    return state


def _is_query_or_key(name: str, family: Family) -> bool:
    return name.split(".")[-2] in (family.q, family.k)


def _places(
    name: str, family: Family, shapes: tuple[LayerShape, ...], dense: LayerShape
) -> tuple[Tensor | None, Tensor | None]:
    """Rows and columns of the dense matrix that the rows and columns of a pruned one go to; None: the first."""
    if not name.startswith(f"{family.layers}."):
        return None, None
    shape, module = shapes[int(name[len(family.layers) + 1 :].split(".")[0])], name.split(".")[-2]
    groups, queries = shape.num_key_value_heads, shape.num_attention_heads
    if module in (family.q, family.k):
        heads = queries if module == family.q else groups
        pairs = shape.rope_pairs or (tuple(range(shape.qk_head_dim // CHANNELS_PER_PAIR)),) * groups
        half = dense.qk_head_dim // CHANNELS_PER_PAIR
        rows = [
            head * dense.qk_head_dim + pair + offset
            for head in range(heads)
            for offset in (0, half)
            for pair in pairs[head * groups // heads]
        ]
        return torch.tensor(rows), None
    if module in (family.v, family.o):
        heads = groups if module == family.v else queries
        channel = torch.arange(shape.v_head_dim)
        flat = (torch.arange(heads)[:, None] * dense.v_head_dim + channel).flatten()
        return (flat, None) if module == family.v else (None, flat)
    return None, None
