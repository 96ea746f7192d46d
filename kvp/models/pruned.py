"""The pruned twin of a Hugging Face model class.

A pruned model is an ordinary checkpoint. After `import kvp`, `from_pretrained`, `generate`, PEFT and lm-eval work.
"""

from typing import Any

from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kvp.models.attention import PrunedAttention, PrunedRotary
from kvp.models.configs import PRUNED_CONFIGS
from kvp.models.family import FAMILIES, Family, family_of
from kvp.models.latent_attention import LatentAttention
from kvp.models.layers import NoAttention, NoMLP, resize
from kvp.models.packed_cache import PackedDecoding
from kvp.models.shapes import layer_shapes, stream
from kvp.models.sliced import SlicedLayer, sliced_embedding
from kvp.types import LayerShape


def model_twin(family: Family, Config: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """Make the model class of a family's pruned twin; an export `--to remote_code` carries this code."""

    class Traits:
        has_qk_norm, joint_norm, has_sinks = family.qk_norm, family.joint_norm, family.sinks
        eager = staticmethod(family.eager_attention)

    class Attention(Traits, PrunedAttention, family.attention_class):  # type: ignore[name-defined]
        pass

    class OfLatents(Traits, LatentAttention, family.attention_class):  # type: ignore[name-defined]
        pass

    class Rotary(PrunedRotary, family.rotary_class):  # type: ignore[name-defined]
        pass

    class Layer(SlicedLayer, family.layer_class):  # type: ignore[name-defined]
        pass

    def narrow(model: Any, config: PretrainedConfig) -> None:
        """Give a decoder the widths of its config."""
        cache_index, shapes = 0, layer_shapes(config)
        model.rotary_emb = Rotary(config)
        if shapes[0].stream:
            model.embed_tokens = sliced_embedding(config, shapes[0])
            model.layers = nn.ModuleList(Layer(config, *shape) for shape in enumerate(shapes))
        for index, (layer, shape) in enumerate(zip(model.layers, shapes, strict=True)):
            if shape.num_key_value_heads:
                layer.self_attn = (
                    OfLatents(config, index, shape, cache_index, model.rotary_emb)
                    if shape.k_latents
                    else Attention(config, index, shape, cache_index)
                )
                cache_index += 1
            else:
                layer.self_attn = NoAttention()
            if family.mlp_class:
                layer.mlp = family.mlp_class(config)
            _resize_mlp(layer, config, shape, family.expert_bias)

    class Decoder(family.decoder):  # type: ignore[name-defined]
        config_class = Config

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            narrow(self, config)
            self.post_init()

    class Model(family.causal_lm):  # type: ignore[name-defined]
        config_class, decoder_class = Config, Decoder

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            narrow(self.model, config)
            self.post_init()

    for model in (
        Decoder,
        Model,
    ):  # else transformers looks for experts in this file, and chooses the slowest kernel
        model._can_set_experts_implementation_cached_value = bool(family.experts)
    suffixes = {
        Decoder: "Model",
        Attention: "Attention",
        OfLatents: "LatentAttention",
        Rotary: "RotaryEmbedding",
        Layer: "DecoderLayer",
        Model: "ForCausalLM",
    }
    for cls, suffix in suffixes.items():
        cls.__name__ = cls.__qualname__ = f"Kvp{family.prefix}{suffix}"
        globals()[cls.__name__] = cls  # where pickle looks for it
    for model in (Decoder, Model):  # a sliced layer lies on one device, too
        model._no_split_modules = [*model._no_split_modules, Layer.__name__]
    Decoder.config = Model.config = Config
    return Model


def _resize_mlp(layer: Any, config: PretrainedConfig, shape: LayerShape, scored: bool) -> None:
    if not (intermediate := shape.intermediate_size):
        layer.mlp = NoMLP(scored)
        return
    if shape.experts:
        return
    _, before, after = stream(config, shape)
    for name in ("gate_proj", "up_proj"):
        resize(layer.mlp, name, before, intermediate)
    resize(layer.mlp, "down_proj", intermediate, after, bias=shape.down_bias)


def _decoding(model: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class with the cache that its config asks for."""
    return type(model.__name__, (PackedDecoding, model), {"__module__": __name__})


PRUNED_CLASSES = {
    name: _decoding(model_twin(family, PRUNED_CONFIGS[name])) for name, family in FAMILIES.items()
}
for name, model_class in PRUNED_CLASSES.items():
    AutoModelForCausalLM.register(PRUNED_CONFIGS[name], model_class)
    AutoModel.register(PRUNED_CONFIGS[name], model_class.decoder_class)  # type: ignore[attr-defined]
    globals()[model_class.__name__] = model_class


def pruned_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the twin's model class for a dense or pruned config."""
    return PRUNED_CLASSES[family_of(config).name]
