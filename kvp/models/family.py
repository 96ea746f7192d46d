"""Families of decoders: the attribute names under which a Hugging Face model keeps its parts.

Two families that differ in names only are two rows of `FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a decoder keeps its layers, sublayers and projections.

    Attributes:
        name: The `model_type` of the Hugging Face config.
        causal_lm: The Hugging Face model class.
        attention_class: Its attention module, whose forward the pruned twin replaces.
        qk_norm: A norm over `head_dim` follows the query and key projections (Qwen3): its statistics
            run over all channels of a head, so rope pairs cannot be cut without changing the rest.
        qkv_bias: q, k and v always have a bias and o never (Qwen2); otherwise the config's
            `attention_bias` speaks for all four.
    """

    name: str
    causal_lm: type[PreTrainedModel]
    attention_class: type
    qk_norm: bool = False
    qkv_bias: bool = False
    layers: str = "model.layers"
    rotary: str = "model.rotary_emb"
    norm: str = "model.norm"
    attention: str = "self_attn"
    mlp: str = "mlp"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    @property
    def config_class(self) -> type[PretrainedConfig]:
        """The Hugging Face config class of the dense model."""
        config_class = self.causal_lm.config_class
        assert config_class is not None
        return config_class


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="llama",
            causal_lm=modeling_llama.LlamaForCausalLM,
            attention_class=modeling_llama.LlamaAttention,
        ),
        Family(
            name="mistral",
            causal_lm=modeling_mistral.MistralForCausalLM,
            attention_class=modeling_mistral.MistralAttention,
        ),
        Family(
            name="qwen2",
            causal_lm=modeling_qwen2.Qwen2ForCausalLM,
            attention_class=modeling_qwen2.Qwen2Attention,
            qkv_bias=True,
        ),
        Family(
            name="qwen3",
            causal_lm=modeling_qwen3.Qwen3ForCausalLM,
            attention_class=modeling_qwen3.Qwen3Attention,
            qk_norm=True,
        ),
    )
}

PRUNED_PREFIX = "kvp_"


def family_of(config: PretrainedConfig) -> Family:
    """The family of a dense or pruned model.

    Raises:
        ValueError: The `model_type` is none of the known ones.
    """
    name = config.model_type.removeprefix(PRUNED_PREFIX)
    if name not in FAMILIES:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported; known families: {', '.join(FAMILIES)}. "
            "A family is one record in kvp/models/family.py."
        )
    return FAMILIES[name]
