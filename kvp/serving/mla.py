"""A model with one KV head as multi-head latent attention: an ordinary DeepseekV3 directory, exactly.

MLA caches a latent and a rotated key per token, and each query head reads both. A model of one KV head does the same
if the values are the latent and the keys are the rotated part. Three things differ, and weights make up for them:

| DeepseekV3                           | what this file writes                                             |
| ------------------------------------ | ----------------------------------------------------------------- |
| normalises the latent                | a latent so small that eps outweighs it: the norm is a constant   |
| has eps = 1e-6 there, in any config  | the residual stream at the scale where 1e-6 is the model's eps    |
| divides logits by its own head width | queries multiplied by the inverse                                 |

The norm's constant is a power of two and the scale of the latent is, too. So both are exact in bfloat16 and float32;
float16 cannot hold the latent. Queries of a latent layer (`q_latent_proj`) are factored through `qk_nope_head_dim`, and
`o_proj` through `v_head_dim`: as many directions of the latent as a head reads.
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
NOISE = 1e-15  # of a sum of squares, what float64 makes of a direction that is not read
REST = math.sqrt(NORM_EPS) / (LATENT * GAIN)  # what brings a normalised latent back to its size: 1.024
STEP = 8  # channels of a head that kernels take at a time
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
    reads = [_by_head(state.pop(f"{name}{family.o}.weight"), heads) for name in names]
    asks = [
        _by_head(state.pop(f"{name}{family.q_latent}.weight").T, heads)
        for name in names
        if layout.layer.latent
    ]
    width, nope = _directions_read(reads, model.dtype), _directions_read(asks, model.dtype)
    scaling: float = rotary.attention_scaling  # type: ignore[assignment]
    scale = math.sqrt((nope + layout.head_dim) / layout.dense_head_dim)
    stream = math.sqrt(NORM_EPS / config.rms_norm_eps)
    for index, name in enumerate(names):
        q, k, v = (state.pop(f"{name}{part}.weight").double() for part in (family.q, family.k, family.v))
        values, output = _factored(reads[index], width, model.dtype)
        keys, query = values.new_zeros(heads, nope, len(v)), q.new_zeros(heads, nope, q.shape[1])
        if asks:
            keys, narrow = _factored(asks[index], nope, model.dtype)
            query = REST * narrow.mT
        turning = interleaved(scaling**2 * q, heads).unflatten(0, (heads, -1))
        made = {
            "q_proj": scale * torch.cat([query, turning], 1).flatten(0, 1),
            "kv_a_proj_with_mqa": torch.cat([LATENT * v, interleaved(k, 1)]),
            "kv_a_layernorm": torch.full((len(v),), GAIN),
            "kv_b_proj": torch.cat([keys, values], 1).flatten(0, 1),
            "o_proj": REST * stream * output.transpose(0, 1).flatten(1),
        }
        state |= {f"{name}{part}.weight": tensor.to(model.dtype) for part, tensor in made.items()}
    for name in state:
        if stream != 1 and name.endswith(("embed_tokens.weight", "down_proj.weight")):
            state[name] = (state[name].double() * stream).to(model.dtype)
    mla_config = _config(config, layout.layer, width, nope, rope)
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


def _directions_read(reads: list[Tensor], dtype: torch.dtype) -> int:
    """Return how many directions of the latent a head of any layer reads, in steps of channels; 1 if none does.

    What rounding in `dtype` moves anyway may be lost.

    Args:
        reads: Per layer (heads, hidden, latent).
        dtype: The dtype of the weights.
    """
    widest = 0
    for each in reads:
        squares = _directions(each)[0].clamp(min=0)
        lost = (torch.finfo(dtype).eps / 4) ** 2 + each.shape[-1] * NOISE
        needed = (squares.cumsum(-1) > lost * squares.sum(-1, keepdim=True)).sum(-1)
        widest = max(widest, int(needed.max()))
    return min(-(-widest // STEP) * STEP, reads[0].shape[-1]) if widest else 1


def _factored(reads: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return directions (heads, width, latent) as `dtype` rounds them, and what is read along them.

    The latter (heads, hidden, width) is the least squares along the rounded ones, so that only it is rounded off.
    """
    heads, _, latent = reads.shape
    if width == latent:
        return torch.eye(latent).double().repeat(heads, 1, 1), reads
    directions = _directions(reads)[1][..., -width:].mT.to(dtype).double()
    crossed = directions @ reads.mT
    return directions, torch.linalg.solve(directions @ directions.mT, crossed).mT


def _directions(reads: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared sizes, ascending, and directions of the latent that each head reads."""
    return torch.linalg.eigh(reads.mT @ reads)


def _by_head(weight: Tensor, heads: int) -> Tensor:
    """Return (hidden, heads * latent) weights as (heads, hidden, latent)."""
    return weight.double().unflatten(1, (heads, -1)).transpose(0, 1)


def _config(
    config: PretrainedConfig, layer: Any, width: int, nope: int, rope: dict[str, Any]
) -> DeepseekV3Config:
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
        qk_nope_head_dim=nope,
        qk_rope_head_dim=layer.qk_head_dim,
        v_head_dim=width,
        first_k_dense_replace=config.num_hidden_layers,
        num_mtp_layers=0,
        rms_norm_eps=NORM_EPS,
        rope_parameters=rope,
        tie_word_embeddings=False,
    )
