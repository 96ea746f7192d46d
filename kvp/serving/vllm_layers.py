"""Widths of single layers in vLLM: what its Transformers backend asks a model for, as part of an export's own code.

vLLM makes one attention per layer, in the shape that a converter of the config names. The converters of vLLM know one
shape per model, or `per_layer_config` of transformers. An export `--to remote_code` registers its own. vLLM keeps keys
and values in one width, so the wider of the two is cached.
"""

import sys
from copy import copy

from transformers import PretrainedConfig

from kvp.models.family import PRUNED_PREFIX, Family
from kvp.models.shapes import layer_shapes


def declare_to_vllm(family: Family) -> None:
    """Register the widths of single layers with vLLM, if vLLM is what imports this file."""
    if "vllm" not in sys.modules:
        return
    try:  # transformers demands what a modelling file imports outside of a try
        from vllm.transformers_utils import model_arch_config_convertor as vllm
    except ImportError:  # a vLLM that knows one shape per model only
        return

    class Widths(vllm.ModelArchConfigConvertorBase):
        def get_per_layer_hf_configs(self) -> list[tuple[PretrainedConfig, PretrainedConfig]]:
            """Return the config of every layer, twice: for text and as a whole."""
            return [(config, config) for config in one_by_one(self.hf_config)]

    vllm.MODEL_ARCH_CONFIG_CONVERTORS[PRUNED_PREFIX + family.name] = Widths


def one_by_one(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Return a config per layer, with the widths of that layer as its own."""
    configs = []
    for shape in layer_shapes(config):
        each = copy(config)
        each.num_attention_heads = shape.num_attention_heads
        each.num_key_value_heads = shape.num_key_value_heads
        each.head_dim = max(shape.query_head_dim, shape.v_head_dim)
        configs.append(each)
    return configs
