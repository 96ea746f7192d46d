"""The pruned twin of a Hugging Face model class.

A twin's config is the family's config and two more fields:

| field        | holds                                                       |
| ------------ | ----------------------------------------------------------- |
| `kvp_layers` | the widths of every layer                                   |
| `kvp_cache`  | the options of a sparse cache (`kvp.models.mustafar`), if any |

A pruned model is an ordinary checkpoint. After `import kvp`, `from_pretrained`, `generate`, PEFT and lm-eval work.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kvp.models.attention import PrunedAttention, PrunedRotary
from kvp.models.family import FAMILIES, PRUNED_PREFIX, Family, family_of
from kvp.models.layers import NoAttention, NoMLP, resize
from kvp.models.shapes import layer_shapes, stream
from kvp.models.sliced import SlicedLayer, sliced_embedding
from kvp.models.sparse_cache import SparseDecoding
from kvp.types import LayerShape


def _twin(family: Family) -> type[PreTrainedModel]:
    """Make the model class of a family's pruned twin, and register it and its config with the Auto classes."""

    class Config(family.config_class):  # type: ignore[name-defined]
        model_type = PRUNED_PREFIX + family.name
        kvp_layers: list[dict[str, Any]] | None = None
        kvp_cache: dict[str, Any] | None = None

    class Attention(PrunedAttention, family.attention_class):  # type: ignore[name-defined]
        has_qk_norm = family.qk_norm

    class Rotary(PrunedRotary, family.rotary_class):  # type: ignore[name-defined]
        pass

    class Layer(SlicedLayer, family.layer_class):  # type: ignore[name-defined]
        pass

    class Model(SparseDecoding, family.causal_lm):  # type: ignore[name-defined]
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            cache_index, shapes = 0, layer_shapes(config)
            self.set_submodule(family.rotary, Rotary(config))
            if shapes[0].stream:
                self.model.embed_tokens = sliced_embedding(config, shapes[0])
                self.model.layers = nn.ModuleList(Layer(config, *shape) for shape in enumerate(shapes))
            for index, (layer, shape) in enumerate(zip(self.model.layers, shapes, strict=True)):
                if shape.num_key_value_heads:
                    layer.self_attn = Attention(config, index, shape, cache_index)
                    cache_index += 1
                else:
                    layer.self_attn = NoAttention()
                _resize_mlp(layer, config, shape)
            self.post_init()

    suffixes = {
        Config: "Config",
        Attention: "Attention",
        Rotary: "RotaryEmbedding",
        Layer: "DecoderLayer",
        Model: "ForCausalLM",
    }
    for cls, suffix in suffixes.items():
        cls.__name__ = cls.__qualname__ = f"Kvp{family.prefix}{suffix}"
    Model.config = Config
    AutoConfig.register(Config.model_type, Config)
    AutoModelForCausalLM.register(Config, Model)
    return Model


def _resize_mlp(layer: Any, config: PretrainedConfig, shape: LayerShape) -> None:
    if not (intermediate := shape.intermediate_size):
        layer.mlp = NoMLP()
        return
    _, before, after = stream(config, shape)
    for name in ("gate_proj", "up_proj"):
        resize(layer.mlp, name, before, intermediate)
    resize(layer.mlp, "down_proj", intermediate, after, bias=shape.down_bias)


PRUNED_CLASSES: dict[str, type[PreTrainedModel]] = {name: _twin(family) for name, family in FAMILIES.items()}


def pruned_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the twin's model class for a dense or pruned config."""
    return PRUNED_CLASSES[family_of(config).name]


def pruned_config(
    config: PretrainedConfig, shapes: Sequence[LayerShape], blocks: Sequence[int]
) -> PretrainedConfig:
    """Return the config of the twin of widths `shapes`, whose layers are the `blocks` of the given model.

    Raises:
        ValueError: No layer keeps an attention, so nothing would carry the position. Or single attentions are removed
            from a model that mixes sliding and full attention, whose cache could not tell the layers apart.
    """
    with_attention = [shape.num_key_value_heads > 0 for shape in shapes]
    fields = config.to_dict()
    if not any(with_attention):
        raise ValueError("the plan removes every attention; at least one layer must keep its attention")
    if fields.get("layer_types"):
        fields["layer_types"] = [fields["layer_types"][block] for block in blocks]
        if not all(with_attention) and len(set(fields["layer_types"])) > 1:
            raise ValueError(
                "attention cannot be removed from single layers of a model that mixes sliding and full "
                "attention; remove whole blocks instead"
            )
    fields.update(num_hidden_layers=len(shapes), kvp_layers=[dataclasses.asdict(shape) for shape in shapes])
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    config_class = pruned_class(config).config_class
    assert config_class is not None
    return config_class(**fields)
