"""The lengths of text at which a model's rotary frequencies change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROPE_BY_LENGTH = ("dynamic", "longrope")  # types whose frequencies depend on the length of the text


def ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Return the rotary embeddings of a model: one, or one per type of layer (Gemma 3)."""
    rope: dict[str, Any] = config.rope_parameters
    several = [each for each in rope.values() if isinstance(each, dict)]
    return several or [rope]


def switches(config: PretrainedConfig) -> tuple[int, ...]:
    """Return the lengths beyond which a model, dense or pruned, turns its rope pairs at other frequencies."""
    for rope in ropes(config):
        if rope.get("rope_type") == "dynamic":
            return (config.max_position_embeddings,)
        if rope.get("short_factor") != rope.get("long_factor"):
            return (rope["original_max_position_embeddings"],)
    return ()


def require_fixed_rope(config: PretrainedConfig) -> None:
    """Refuse to fold rope pairs whose frequencies change with the length of the text.

    Raises:
        ValueError: Names the type of RoPE, the length and the way out; or layers have RoPE of their own.
    """
    if len(ropes(config)) > 1:
        raise ValueError(
            f"{config.model_type} turns pairs by other frequencies in sliding than in full attention, so none can be "
            "folded into one: set strategy.context=null"
        )
    if config.rope_parameters.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"some pairs of {config.model_type} never turn (partial_rotary_factor), so none can be folded into the "
            "slowest: set strategy.context=null"
        )
    if lengths := switches(config):
        raise ValueError(
            f"RoPE of type {config.rope_parameters['rope_type']!r} has other frequencies beyond {lengths[0]} tokens, "
            "so no pairs can be folded into one: set strategy.context=null"
        )
