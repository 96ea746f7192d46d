"""The configs of pruned twins, registered with transformers; no modelling code, which takes seconds to import.

A twin's config is the family's config and two more fields:

| field        | holds                                                       |
| ------------ | ----------------------------------------------------------- |
| `kvp_layers` | the widths of every layer                                   |
| `kvp_cache`  | the format of its cache (`kvp.models.caches`), if it is one |
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from kvp.models.family import FAMILIES, PRUNED_PREFIX, Family, family_of
from kvp.types import LayerShape


def config_twin(family: Family) -> type[PretrainedConfig]:
    """Make the config class of a family's pruned twin."""

    class Config(family.config_class):  # type: ignore[name-defined]
        model_type = PRUNED_PREFIX + family.name
        kvp_layers: list[dict[str, Any]] | None = None
        kvp_cache: dict[str, Any] | None = None

    Config.__name__ = Config.__qualname__ = f"Kvp{family.prefix}Config"
    return Config


PRUNED_CONFIGS = {name: config_twin(family) for name, family in FAMILIES.items()}
for config_class in PRUNED_CONFIGS.values():
    AutoConfig.register(config_class.model_type, config_class)
    globals()[config_class.__name__] = config_class  # where pickle looks for it


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
    for name in family_of(config).layer_fields:
        fields[name] = [fields[name][block] for block in blocks]
    if fields.get("layer_types"):
        fields["layer_types"] = [fields["layer_types"][block] for block in blocks]
        if not all(with_attention) and len(set(fields["layer_types"])) > 1:
            raise ValueError(
                "attention cannot be removed from single layers of a model that mixes sliding and full "
                "attention; remove whole blocks instead"
            )
    if "mlp_only_layers" in fields:
        fields["mlp_only_layers"] = [index for index, shape in enumerate(shapes) if not shape.experts]
        fields["decoder_sparse_step"] = 1
    fields.update(num_hidden_layers=len(shapes), kvp_layers=[dataclasses.asdict(shape) for shape in shapes])
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    return PRUNED_CONFIGS[family_of(config).name](**fields)
