"""The lengths of text at which a model's rotary frequencies change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def switches(config: PretrainedConfig) -> tuple[int, ...]:
    """Return the lengths beyond which a model, dense or pruned, turns its rope pairs at other frequencies."""
    rope: dict[str, Any] = config.rope_parameters
    if rope.get("rope_type") == "dynamic":
        return (config.max_position_embeddings,)
    if rope.get("short_factor") != rope.get("long_factor"):
        return (rope["original_max_position_embeddings"],)
    return ()


def require_fixed_rope(config: PretrainedConfig) -> None:
    """Refuse to fold rope pairs whose frequencies change with the length of the text.

    Raises:
        ValueError: Names the type of RoPE, the length and the way out.
    """
    if lengths := switches(config):
        raise ValueError(
            f"RoPE of type {config.rope_parameters['rope_type']!r} has other frequencies beyond {lengths[0]} tokens, "
            "so no pairs can be folded into one: set strategy.context=null"
        )
