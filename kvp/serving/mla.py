"""A model with one KV head as multi-head latent attention: an ordinary DeepseekV3 directory, exactly.

MLA caches a latent and a rotated key per token, and each query head reads both. A model of one KV head does the same
if the values are the latent and the keys are the rotated part. Three things differ, and weights make up for them:

| DeepseekV3                           | what this file writes                                             |
| ------------------------------------ | ----------------------------------------------------------------- |
| normalises the latent                | a latent so small that eps outweighs it: the norm is a constant   |
| has eps = 1e-6 there, in any config  | the residual stream at the scale where 1e-6 is the model's eps    |
| divides logits by its own head width | queries multiplied by the inverse                                 |

The norm's constant is a power of two and the scale of the latent is, too. So both are exact in bfloat16 and float32;
float16 cannot hold the latent. `o_proj` is factored through `v_head_dim` where its rank is no more than a dense head's.
Two forms differ in the rotary embedding: `mla` has default angles, which kernels for MLA want, and `mla_longrope` has
factors for any set of pairs. TransMLA (arXiv:2502.07864) converts models for a patched engine.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvp.models.family import family_of
from kvp.models.shapes import itemsize, layer_shapes, size
from kvp.models.surgery import check_tied
from kvp.serving.mla_check import NORM_EPS, mla_layout
from kvp.serving.rope import arithmetic, interleaved, longrope, with_unit_yarn
from kvp.types import Size

if TYPE_CHECKING:
    from transformers import DeepseekV3Config, PretrainedConfig, PreTrainedModel

LATENT = 2.0**-24  # the scale of the latent: its mean square is far below eps
GAIN = 2.0**14  # the norm's weight
REST = math.sqrt(NORM_EPS) / (LATENT * GAIN)  # what brings a normalised latent back to its size: 1.024
NOPE = 1  # channels of keys without rotation; the class demands one, and it is zero
SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "hidden_act", "max_position_embeddings"),
    *("initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"),
)


@torch.no_grad()
def to_mla(model: PreTrainedModel, form: str) -> PreTrainedModel:
    """Return the same function as a DeepseekV3ForCausalLM on the CPU, in the dtype of the given model.

    Raises:
        ValueError: The model is no MLA; the message says what would be.
    """
    from transformers import DeepseekV3ForCausalLM  # imports seconds of modelling code

    config, family = model.config, family_of(model.config)
    layout, rotary = mla_layout(config, form), model.get_submodule(family.rotary)
    old: dict[str, Any] = dict(config.rope_parameters)
    if form == "mla_longrope":
        rope = longrope(layout, old, rotary)
    else:
        rope = with_unit_yarn(arithmetic(layout, old), config.max_position_embeddings)
    state, heads = dict(model.state_dict()), layout.layer.num_attention_heads
    check_tied(state, f"{family.embedding}.weight", config)
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    names = [f"{family.layers}.{index}.{family.attention}." for index in range(config.num_hidden_layers)]
    outputs = [_by_head(state[f"{name}{family.o}.weight"], heads) for name in names]
    width = _value_width(outputs, layout.dense_head_dim, model.dtype)
    scaling: float = rotary.attention_scaling  # type: ignore[assignment]
    scale = math.sqrt((NOPE + layout.head_dim) / layout.dense_head_dim) * scaling**2
    stream = math.sqrt(NORM_EPS / config.rms_norm_eps)
    for name, output in zip(names, outputs, strict=True):
        q, k, v, _ = (
            state.pop(f"{name}{part}.weight").double() for part in (family.q, family.k, family.v, family.o)
        )
        made = {
            "q_proj": _queries(q * scale, heads),
            "kv_a_proj_with_mqa": torch.cat([LATENT * v, interleaved(k, 1)]),
            "kv_a_layernorm": torch.full((len(v),), GAIN),
            **_values(output * stream, width),
        }
        state |= {f"{name}{part}.weight": tensor.to(model.dtype) for part, tensor in made.items()}
    for name in state:
        if stream != 1 and name.endswith(("embed_tokens.weight", "down_proj.weight")):
            state[name] = (state[name].double() * stream).to(model.dtype)
    mla_config = _config(config, layout.layer, width, rope)
    with torch.device("meta"):
        mla = DeepseekV3ForCausalLM(mla_config)
    mla.load_state_dict(state, assign=True)
    mla.model.rotary_emb = type(mla.model.rotary_emb)(mla_config)
    mla.generation_config = model.generation_config
    return mla.eval()


def mla_size(config: Any) -> Size:
    """Return parameters and bytes per token of the cache of an MLA model."""
    from transformers import DeepseekV3ForCausalLM

    with torch.device("meta"):
        mla = DeepseekV3ForCausalLM(config)
    cached = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    return Size(
        params=sum(each.numel() for each in mla.parameters()),
        block_params=sum(each.numel() for each in mla.model.layers.parameters()),
        blocks=config.num_hidden_layers,
        kv_bytes_per_token=itemsize(config) * cached,
    )


def mla_facts(before: PretrainedConfig, after: PretrainedConfig) -> dict[str, Any]:
    """Return widths, parameters and cache of an MLA model, beside those of the checkpoint that it was made of."""
    sizes = {"checkpoint": size(before, layer_shapes(before)), "export": mla_size(after)}
    widths = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    return {
        "architecture": "DeepseekV3ForCausalLM",
        **{name: getattr(after, name) for name in widths},
        "kv_bytes_per_token": {name: it.kv_bytes_per_token for name, it in sizes.items()},
        "params": {name: it.params for name, it in sizes.items()},
    }


def _queries(rows: Tensor, heads: int) -> Tensor:
    """Put the zero channels without rotation before the rotated ones of every head."""
    by_head = interleaved(rows, heads).unflatten(0, (heads, -1))
    return torch.cat([by_head.new_zeros(heads, NOPE, rows.shape[1]), by_head], 1).flatten(0, 1)


def _values(output: Tensor, width: int) -> dict[str, Tensor]:
    """Factor each head's `o_proj` as (o_proj of `width` channels) times (the latent's way to them, `kv_b_proj`)."""
    heads, _, latent = output.shape
    up = (
        _directions(output)[1][..., -width:].mT
        if width < latent
        else torch.eye(latent).double().repeat(heads, 1, 1)
    )
    keys = up.new_zeros(heads, NOPE, latent)
    return {
        "kv_b_proj": torch.cat([keys, up], 1).flatten(0, 1),
        "o_proj": REST * (output @ up.mT).transpose(0, 1).flatten(1),
    }


def _value_width(outputs: list[Tensor], head_dim: int, dtype: torch.dtype) -> int:
    """Return the dense head's width if every `o_proj` (heads, hidden, latent) fits through it, else the latent's.

    What rounding in `dtype` moves anyway may be lost.
    """
    latent, eps = outputs[0].shape[-1], torch.finfo(dtype).eps
    if latent <= head_dim:
        return latent
    squares = (_directions(output)[0] for output in outputs)
    fits = all((each[:, :-head_dim].sum(1) <= eps**2 * each.sum(1)).all() for each in squares)
    return head_dim if fits else latent


def _directions(output: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared sizes, ascending, and directions of the latent that each head reads."""
    return torch.linalg.eigh(output.mT @ output)


def _by_head(weight: Tensor, heads: int) -> Tensor:
    """Return an `o_proj` as (heads, hidden, channels)."""
    return weight.double().unflatten(1, (heads, -1)).transpose(0, 1)


def _config(config: PretrainedConfig, layer: Any, width: int, rope: dict[str, Any]) -> DeepseekV3Config:
    """Return the config: all layers dense, queries not factored, nothing shared between embedding and head."""
    from transformers import DeepseekV3Config

    same: dict[str, Any] = {name: getattr(config, name, None) for name in SAME}
    return DeepseekV3Config(
        **same,
        intermediate_size=layer.intermediate_size,
        num_attention_heads=layer.num_attention_heads,
        num_key_value_heads=layer.num_attention_heads,
        q_lora_rank=None,
        kv_lora_rank=layer.v_head_dim,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=layer.qk_head_dim,
        v_head_dim=width,
        first_k_dense_replace=config.num_hidden_layers,
        num_mtp_layers=0,
        rms_norm_eps=NORM_EPS,
        rope_parameters=rope,
        tie_word_embeddings=False,
    )
