"""Families of decoders: the attribute names under which a Hugging Face model keeps its parts.

Families that differ only in names are rows of `FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Family:
    """The names of a decoder's layers, sublayers and projections.

    Attributes:
        name: The `model_type` of the Hugging Face config.
        prefix: The beginning of the Hugging Face class names; the classes are imported on first use.
        folder: The folder of `transformers.models` that has them, if its name is another.
        infix: What follows the prefix in the names of the config and of the model without a head (Gemma 3: "Text").
        post_norms: Norms of what attention and MLP write, before it joins the residual stream (Gemma 3).
        qk_norm: A norm over `head_dim` follows the query and key projections (Qwen3). It averages over all channels of
            a head. So q and k stay whole, and rope pairs are cut after the norm: only the cache shrinks.
        heads_first: That norm sees (batch, heads, seq_len, head_dim), not (batch, seq_len, heads, head_dim) (Gemma 3).
        layer_fields: The config's fields with an entry per layer, beside `layer_types` (SmolLM3: 1 where RoPE turns).
        qkv_bias: q, k and v always have a bias and o never (Qwen2).
        bias_options: The config's fields that give projections a bias: `attention_bias` to q, k, v and o, `mlp_bias` to
            gate, up and down. A family reads no other.
    """

    name: str
    prefix: str
    folder: str = ""
    infix: str = ""
    qk_norm: bool = False
    heads_first: bool = False
    layer_fields: tuple[str, ...] = ()
    qkv_bias: bool = False
    bias_options: tuple[str, ...] = ()
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    rotary: str = "model.rotary_emb"
    norm: str = "model.norm"
    layer_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    post_norms: tuple[str, ...] = ()
    attention: str = "self_attn"
    mlp: str = "mlp"
    q: str = "q_proj"
    q_latent: str = "q_latent_proj"  # of pruned twins only, like k_up and v_up
    k_up: str = "k_up_proj"
    v_up: str = "v_up_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def _class(self, suffix: str) -> Any:
        return getattr(self._module("modeling"), self.prefix + suffix)

    def _module(self, kind: str) -> ModuleType:
        folder = self.folder or self.name
        return import_module(f"transformers.models.{folder}.{kind}_{folder}")

    def has_bias(self, option: str, config: PretrainedConfig) -> bool:
        """Return whether the config gives projections a bias by `option`, which other families do not read."""
        return option in self.bias_options and bool(getattr(config, option, False))

    @property
    def causal_lm(self) -> type[PreTrainedModel]:
        """Return the Hugging Face model class."""
        return self._class("ForCausalLM")

    @property
    def decoder(self) -> type[PreTrainedModel]:
        """Return the Hugging Face class of the model without its head."""
        return self._class(f"{self.infix}Model")

    @property
    def attention_class(self) -> type:
        """Return the attention class, whose forward the pruned twin replaces."""
        return self._class("Attention")

    @property
    def layer_class(self) -> type:
        """Return the decoder layer's class, whose forward a sliced twin replaces."""
        return self._class("DecoderLayer")

    @property
    def rotary_class(self) -> type:
        """Return the rotary embedding's class, which the pruned twin extends."""
        return self._class("RotaryEmbedding")

    @property
    def config_class(self) -> type[PretrainedConfig]:
        """Return the Hugging Face config class of the dense model."""
        return getattr(self._module("configuration"), f"{self.prefix}{self.infix}Config")


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(name="llama", prefix="Llama", bias_options=("attention_bias", "mlp_bias")),
        Family(name="mistral", prefix="Mistral"),
        Family(name="qwen2", prefix="Qwen2", qkv_bias=True),
        Family(name="qwen3", prefix="Qwen3", qk_norm=True, bias_options=("attention_bias",)),
        Family(
            name="smollm3",
            prefix="SmolLM3",
            bias_options=("attention_bias", "mlp_bias"),
            layer_fields=("no_rope_layers",),
        ),
        Family(
            name="gemma3_text",
            prefix="Gemma3",
            folder="gemma3",
            infix="Text",
            qk_norm=True,
            heads_first=True,
            bias_options=("attention_bias",),
            layer_norms=("input_layernorm", "pre_feedforward_layernorm"),
            post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        ),
    )
}
REFUSED = {  # model types that people bring, and why they have no row
    "gemma2": "it caps its logits and its attention softly, which no fused kernel and no loss here computes",
    "gemma3": "it holds an image tower; its text part alone has model_type gemma3_text",
    "phi3": "q, k and v are one matrix, so are gate and up",
}

PRUNED_PREFIX = "kvp_"


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a dense or pruned model.

    Raises:
        ValueError: The `model_type` is unknown.
    """
    return family_named(config.model_type)


def family_named(model_type: str) -> Family:
    """Return the family of a dense or pruned `model_type`.

    Raises:
        ValueError: It is unknown.
    """
    name = model_type.removeprefix(PRUNED_PREFIX)
    if name not in FAMILIES:
        why = f", because {REFUSED[name]}" if name in REFUSED else ""
        raise ValueError(
            f"model_type {model_type!r} is not supported{why}; known families: {', '.join(FAMILIES)}. "
            "To add a family, add a row to FAMILIES in kvp/models/family.py."
        )
    return FAMILIES[name]
