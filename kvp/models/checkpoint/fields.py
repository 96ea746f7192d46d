"""The fields of config.json: typed, in bounds, and said by names that transformers reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from kvp.models.checkpoint.rope import Rope, check_rope
from kvp.models.checkpoint.widths import Layer, check_widths
from kvp.models.family import FAMILIES, PRUNED_PREFIX, Family, family_named
from kvp.types import Dtype

LEGACY = (
    "torch_dtype",
    "rope_scaling",
    "rope_theta",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)
LayerType = Literal["full_attention", "sliding_attention"]
ALIKE = 0.85  # of two names: one is a slip of the other
REMOTE = "auto_map"


class Fields(BaseModel):
    """The fields that decide what the model computes; transformers checks the others."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    max_position_embeddings: PositiveInt = 2048
    hidden_act: str = "silu"
    rms_norm_eps: NonNegativeFloat = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    use_sliding_window: bool | None = None
    sliding_window: PositiveInt | None = None
    max_window_layers: NonNegativeInt = 0
    layer_types: list[LayerType] | None = None
    num_experts: PositiveInt | None = None
    num_local_experts: PositiveInt | None = None
    num_experts_per_tok: PositiveInt | None = None
    moe_intermediate_size: PositiveInt | None = None
    decoder_sparse_step: PositiveInt = 1
    mlp_only_layers: list[NonNegativeInt] | None = None
    no_rope_layers: list[Literal[0, 1]] | None = None
    attention_chunk_size: None = None
    is_causal: Literal[True] = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    dtype: Dtype | None = None
    torch_dtype: Dtype | None = None
    rope_theta: Annotated[float, Field(gt=1)] | None = None
    original_max_position_embeddings: PositiveInt | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    rope_parameters: Rope | None = None
    ropes: dict[LayerType, Rope] | None = None  # `rope_parameters` by type of layer (Gemma 3)
    rope_scaling: Rope | None = None
    architectures: list[str] | None = None
    kvp_layers: list[Layer] | None = None
    kvp_cache: dict[str, Any] | None = None

    @property
    def dense_head_dim(self) -> int:
        """Return the channels of a head before any cut."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


def check_fields(file: Path, config: Mapping[str, Any]) -> Fields:
    """Return the fields of a config.json, typed.

    Raises:
        ValueError: Names the file, the field, its value and its bound.
    """
    try:
        family = _family(config)
        given = _given(config)
        _check_names(config, family)
        _check_numbers(given)
        _check_attention(config, given, family)
        if family.experts:
            _check_experts(given)
        pairs = given.dense_head_dim // 2
        turning = _turning(given, family)
        ropes = given.ropes or {}
        check_rope(config, ropes.get("full_attention", given.rope_parameters), given.rope_scaling, turning)
        if sliding := ropes.get("sliding_attention"):  # whose older name is another
            check_rope({**config, "rope_theta": config.get("rope_local_base_freq")}, sliding, None, pairs)
        if config["model_type"].startswith(PRUNED_PREFIX):
            groups = given.num_key_value_heads or given.num_attention_heads
            normed = groups if family.joint_norm else None
            queries = given.num_attention_heads // groups
            check_widths(
                given.kvp_layers,
                given.num_hidden_layers,
                given.hidden_size,
                pairs,
                queries=queries,
                normed=normed,
            )
        elif strange := [name for name in ("kvp_layers", "kvp_cache") if config.get(name) is not None]:
            raise ValueError(
                f"{strange[0]} belongs to model_type={PRUNED_PREFIX}{family.name}, got {family.name}: copy the config "
                "of the checkpoint again"
            )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return given


def _family(config: Mapping[str, Any]) -> Family:
    """Return the family, if its class is transformers' own and the one that `architectures` names."""
    if config.get(REMOTE) or config.get("trust_remote_code"):
        raise ValueError(
            f"{REMOTE} asks for Python code of the checkpoint, and kvp runs none: if the model is an ordinary one of "
            f"{', '.join(FAMILIES)}, remove {REMOTE} and the .py files"
        )
    if config.get("quantization_config") or config.get("compression_config"):
        raise ValueError(
            "quantization_config: these weights are quantised, and kvp prunes none such: take the model's own "
            "checkpoint, or dequantise it once with from_pretrained(DIR).dequantize() and save_pretrained(OTHER)"
        )
    name = config.get("model_type")
    if not isinstance(name, str):
        raise ValueError(
            f"model_type must be one of {', '.join(FAMILIES)}, got {name!r}: copy the config again"
        )
    family = family_named(name)
    architectures = config.get("architectures")
    known = {f"{prefix}{family.prefix}ForCausalLM".lower() for prefix in ("", "kvp")}
    if (
        isinstance(architectures, list)
        and architectures
        and known.isdisjoint(map(str.lower, map(str, architectures)))
    ):
        raise ValueError(
            f"architectures is {architectures}, model_type {name!r} is {family.prefix}ForCausalLM: the config of "
            "another model, or one without a language model's head; correct the one that is wrong"
        )
    return family


def _given(config: Mapping[str, Any]) -> Fields:
    fields, ropes = dict(config), config.get("rope_parameters")
    if isinstance(ropes, dict) and ropes and all(isinstance(rope, dict) for rope in ropes.values()):
        fields["ropes"] = fields.pop("rope_parameters")
    try:
        return Fields.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]).replace("ropes.", "rope_parameters.", 1)
        if first["type"] == "missing":
            raise ValueError(
                f"{name} is missing, and no default is right for every model: copy the config again"
            ) from None
        if first["type"] == "extra_forbidden":
            raise ValueError(
                f"{name}={first['input']!r}: nothing reads such a field; correct or remove it"
            ) from None
        bound = first["msg"].removeprefix("Input should be ")
        raise ValueError(f"{name} must be {bound}, got {first['input']!r}: copy the config again") from None


def _check_names(config: Mapping[str, Any], family: Family) -> None:
    """Refuse a name that is a slip of one that decides; transformers would take the default, without a word."""
    known = {field.name for field in fields(family.config_class)} | {*Fields.model_fields, *LEGACY}
    absent = [name for name in Fields.model_fields if name not in config]
    for name in config.keys() - known:
        if close := get_close_matches(name.lower(), absent, 1, ALIKE):
            raise ValueError(f"nothing reads {name!r}; {close[0]} is meant, and missing: correct the name")


def _check_numbers(given: Fields) -> None:
    heads, groups = given.num_attention_heads, given.num_key_value_heads
    if groups and heads % groups:
        raise ValueError(f"num_key_value_heads must divide num_attention_heads={heads}, got {groups}")
    if given.head_dim is None and given.hidden_size % heads:
        raise ValueError(f"num_attention_heads must divide hidden_size={given.hidden_size}, got {heads}")
    if given.dense_head_dim % 2:
        raise ValueError(f"head_dim must be even, RoPE turns pairs of channels, got {given.dense_head_dim}")
    if len({given.dtype, given.torch_dtype} - {None}) > 1:
        raise ValueError(f"dtype={given.dtype} and torch_dtype={given.torch_dtype} differ: leave one of them")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        check_ids(name, getattr(given, name), given.vocab_size)


def check_ids(name: str, value: int | list[int] | None, vocab_size: int) -> None:
    """Refuse a special id that the embedding has no row for; -1 means none in old configs.

    Raises:
        ValueError: Names the field, its value and its bound.
    """
    for number in value if isinstance(value, list) else [value]:
        none = number is None or (name == "pad_token_id" and number == -1)
        if not none and not (type(number) is int and 0 <= number < vocab_size):
            raise ValueError(
                f"{name} must be below vocab_size={vocab_size}, got {number!r}: correct it, or resize the embedding "
                "once with resize_token_embeddings(len(tokenizer))"
            )


def _turning(given: Fields, family: Family) -> int:
    """Return how many pairs of a head turn; only Phi-3's code turns some of them."""
    places = [given.rope_parameters, given.rope_scaling, *(given.ropes or {}).values(), given]
    factors = {place.partial_rotary_factor for place in places if place} - {None}
    factor, width = min(factors, default=1.0), given.dense_head_dim  # type: ignore[type-var]
    if factor == 1:
        return width // 2
    if not family.fused:
        raise ValueError(
            f"partial_rotary_factor must be 1, got {factor}: {family.name} models turn all channels"
        )
    turning = int(width * factor)  # type: ignore[operator]
    if turning < 2 or turning % 2:
        raise ValueError(
            f"partial_rotary_factor={factor} turns {turning} of {width} channels of a head: it must be an even number"
        )
    return turning // 2


def _check_experts(given: Fields) -> None:
    named = {given.num_experts, given.num_local_experts} - {None}
    if len(named) != 1:
        raise ValueError(
            f"num_experts={given.num_experts} and num_local_experts={given.num_local_experts}: give one of them"
        )
    count, chosen = named.pop(), given.num_experts_per_tok
    if chosen is None or chosen > count:  # type: ignore[operator]
        raise ValueError(f"num_experts_per_tok must be at most num_experts={count}, got {chosen}")
    if outside := [n for n in given.mlp_only_layers or () if n >= given.num_hidden_layers]:
        raise ValueError(
            f"mlp_only_layers must be below num_hidden_layers={given.num_hidden_layers}, got {outside[0]}"
        )


def _check_attention(config: Mapping[str, Any], given: Fields, family: Family) -> None:
    """Refuse windows that the family's code reads in one place only, and attention that no fused kernel computes."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if config.get(name):
            raise ValueError(
                f"{name}={config[name]}: kvp computes plain causal attention and plain logits only; prune a model "
                "without it"
            )
    own = {field.name for field in fields(family.config_class)}
    if given.no_rope_layers is not None and len(given.no_rope_layers) != given.num_hidden_layers:
        raise ValueError(
            f"no_rope_layers has {len(given.no_rope_layers)} entries, num_hidden_layers is {given.num_hidden_layers}: "
            "they must agree"
        )
    for name in ("sliding_window", "layer_types"):
        if getattr(given, name) is not None and name not in own:
            raise ValueError(
                f"{name}={getattr(given, name)}, and {family.name} models have no sliding attention: remove it, or "
                "correct model_type"
            )
    if given.layer_types is not None:
        if len(given.layer_types) != given.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(given.layer_types)} entries, num_hidden_layers is {given.num_hidden_layers}: "
                "they must agree"
            )
        slides = given.use_sliding_window or "use_sliding_window" not in own
        window = given.sliding_window if slides else None
        if "sliding_attention" in given.layer_types and window is None:
            raise ValueError(
                "layer_types has sliding_attention, it needs use_sliding_window=true and sliding_window"
            )
