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
        layer_norms: Norms of what attention and MLP read; OLMo 2 has none.
        post_norms: Norms of what attention and MLP write, before it joins the residual stream (Gemma 3, OLMo 2).
        qk_norm: A norm follows the query and key projections (Qwen3). It averages over all channels of a head. So q and
            k stay whole, and rope pairs are cut after the norm: only the cache shrinks.
        joint_norm: That norm averages over the channels of all heads (OLMo 2). KV groups are cut after it, too.
        heads_first: That norm sees (batch, heads, seq_len, head_dim), not (batch, seq_len, heads, head_dim) (Gemma 3).
        layer_fields: The config's fields with an entry per layer, beside `layer_types` (SmolLM3: 1 where RoPE turns).
        fused: In the family's own class q, k and v are one matrix, and so are gate and up (Phi-3). The twin has them
            one by one, in Mistral's classes.
        experts: The config's field for the width of an expert, if MLPs are experts behind a router (Qwen3-MoE). Experts
            stay whole.
        expert_files: Names of an expert's gate, up and down in files that hold it by itself; none, if no files do.
        expert_folder: The MLP's name in such files (Mixtral).
        expert_bias: Router and experts have biases, and the MLP returns the router's scores, too (gpt-oss).
        sinks: Every query head has a logit that takes attention from all tokens (gpt-oss).
        qkv_bias: q, k and v always have a bias and o never (Qwen2).
        bias_options: The config's fields that give projections a bias: `attention_bias` to q, k, v and o, `mlp_bias` to
            gate, up and down. A family reads no other.
    """

    name: str
    prefix: str
    folder: str = ""
    infix: str = ""
    qk_norm: bool = False
    joint_norm: bool = False
    heads_first: bool = False
    layer_fields: tuple[str, ...] = ()
    fused: bool = False
    experts: str = ""
    expert_files: tuple[str, ...] = ()
    expert_folder: str = "mlp"
    expert_bias: bool = False
    sinks: bool = False
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
        if not self.fused:
            return self._class("Attention")
        return import_module("transformers.models.mistral.modeling_mistral").MistralAttention

    @property
    def mlp_class(self) -> Any:
        """Return the class of a twin's MLP, if it is not the one that the layer has already."""
        return (
            import_module("transformers.models.mistral.modeling_mistral").MistralMLP if self.fused else None
        )

    @property
    def eager_attention(self) -> Any:
        """Return the function that computes attention outside of fused kernels."""
        folder = self.folder or self.name if self.sinks else "llama"
        return import_module(f"transformers.models.{folder}.modeling_{folder}").eager_attention_forward

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
        *(
            Family(
                name=name,
                prefix=prefix,
                qk_norm=True,
                joint_norm=True,
                bias_options=("attention_bias",),
                layer_norms=(),
                post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
            )
            for name, prefix in (("olmo2", "Olmo2"), ("olmo3", "Olmo3"))
        ),
        Family(name="phi3", prefix="Phi3", fused=True),
        Family(
            name="qwen3_moe",
            prefix="Qwen3Moe",
            qk_norm=True,
            bias_options=("attention_bias",),
            experts="moe_intermediate_size",
            expert_files=("gate_proj", "up_proj", "down_proj"),
        ),
        Family(
            name="mixtral",
            prefix="Mixtral",
            experts="intermediate_size",
            expert_files=("w1", "w3", "w2"),
            expert_folder="block_sparse_moe",
        ),
        Family(
            name="gpt_oss",
            prefix="GptOss",
            bias_options=("attention_bias",),
            experts="intermediate_size",
            expert_bias=True,
            sinks=True,
        ),
    )
}
REFUSED = {  # model types that people bring, and why they have no row
    "gemma2": "it caps its logits and its attention softly, which no fused kernel and no loss here computes",
    "gemma3": "it holds an image tower; its text part alone has model_type gemma3_text",
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
