"""The rotary embedding that a config describes: known, complete, and said once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

NEEDS = {  # beside rope_theta
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
MOVED = (
    "rope_theta",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)  # also beside the dictionary


class Rope(BaseModel):
    """The fields that transformers reads of `rope_parameters`, or of the older `rope_scaling`."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    rope_type: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] = Field(
        default="default", validation_alias=AliasChoices("rope_type", "type")
    )
    type: str | None = None
    rope_theta: Annotated[float, Field(gt=1)] | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt | None = None
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat | None = None
    beta_slow: PositiveFloat | None = None
    short_factor: list[PositiveFloat] | None = None
    long_factor: list[PositiveFloat] | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    mscale: PositiveFloat | None = None
    mscale_all_dim: PositiveFloat | None = None
    truncate: bool | None = None
    finetuned: bool | None = None


def check_rope(config: Mapping[str, Any], rope: Rope | None, older: Rope | None, pairs: int) -> None:
    """Refuse a rotary embedding that lacks a factor, or that two places of the config describe differently.

    Args:
        config: The fields of config.json.
        rope: Its `rope_parameters`.
        older: Its `rope_scaling`.
        pairs: The rotary frequencies of a head.

    Raises:
        ValueError: Names the field, its value and the bound.
    """
    for name, one in (("rope_parameters", rope), ("rope_scaling", older)):
        if one is not None:
            _check_complete(name, one, pairs, config)
    if rope is not None and older is not None:
        _check_same(rope, older)
    for name in MOVED:
        inside = {getattr(one, name) for one in (rope, older) if one is not None} - {None}
        if config.get(name) is not None and inside and inside != {config[name]}:
            raise ValueError(
                f"{name}={config[name]} stands beside {name}={inside.pop()} of the rotary embedding: leave one of them"
            )


def _check_complete(where: str, rope: Rope, pairs: int, config: Mapping[str, Any]) -> None:
    for field in NEEDS[rope.rope_type]:
        if getattr(rope, field) is None:
            raise ValueError(
                f"{where} of rope_type={rope.rope_type} needs {field}: copy it from the original config"
            )
    if rope.type is not None and rope.type != rope.rope_type:
        raise ValueError(f"{where} says rope_type={rope.rope_type} and type={rope.type}: leave one of them")
    for field in ("short_factor", "long_factor"):
        factors = getattr(rope, field)
        if factors is not None and len(factors) != pairs:
            raise ValueError(
                f"{where}.{field} must have one number per rope pair, {pairs}, got {len(factors)}"
            )
    if rope.rope_type == "llama3" and not rope.low_freq_factor < rope.high_freq_factor:  # type: ignore[operator]
        raise ValueError(
            f"{where}.low_freq_factor must be below high_freq_factor={rope.high_freq_factor}, "
            f"got {rope.low_freq_factor}"
        )
    original = rope.original_max_position_embeddings or config.get("original_max_position_embeddings")
    if rope.rope_type == "longrope" and rope.attention_factor is None and original == 1:
        raise ValueError(f"{where}.original_max_position_embeddings must be > 1, got {original}")
    if rope.rope_type == "dynamic" and pairs < 2:
        raise ValueError(f"{where} of rope_type=dynamic needs head_dim >= 4, got {2 * pairs}")


def _check_same(rope: Rope, older: Rope) -> None:
    """Refuse two dictionaries that differ; transformers 5 would read the older one, without a word."""
    ignored = {"type", *MOVED}
    one, other = (each.model_dump(exclude=ignored, exclude_none=True) for each in (rope, older))
    if one != other:
        field = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))[0]
        raise ValueError(
            f"rope_parameters has {field}={one.get(field)}, rope_scaling {field}={other.get(field)}: remove the one "
            "that is not meant"
        )
