"""The format of a checkpoint's cache by its config, and the bytes that it stores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING, Any

from kvp.models.cache_formats import CacheFormat
from kvp.models.codecs import Codec, Whole
from kvp.models.directions import Directions
from kvp.models.mustafar import Mustafar, MustafarIntegers
from kvp.models.quantized import Quantized, Quantized8
from kvp.models.shapes import layer_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FORMATS: dict[str | None, type[CacheFormat]] = {  # by `format`, which Mustafar's options do not have
    None: Mustafar,
    "mustafar_int": MustafarIntegers,
    "int": Quantized,
    "fp8": Quantized8,
    "directions": Directions,
}
CONTEXT = 4096  # tokens of a sequence, where bytes per token include the window


def cache_format(config: PretrainedConfig) -> CacheFormat | None:
    """Return the format that a checkpoint's config asks for; None: keys and values as they are.

    Raises:
        ValueError: An option is out of its bounds.
    """
    given: Any = getattr(config, "kvp_cache", None)
    if given is None:
        return None
    kind = given.get("format") if isinstance(given, Mapping) else given
    if not isinstance(given, Mapping) or not isinstance(kind, str | None) or kind not in FORMATS:
        known = ", ".join(name for name in FORMATS if name)
        raise ValueError(f"cache must be options whose format is one of {known} or absent, got {given!r}")
    return FORMATS[kind](**given)


def stated(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return the options of the format as a record states them: without what each layer has of its own."""
    given = getattr(config, "kvp_cache", None)
    return given and {name: value for name, value in given.items() if not isinstance(value, list | tuple)}


def bytes_per_token(config: PretrainedConfig, itemsize: int) -> int:
    """Return the bytes of keys and values per token of one sequence, over all layers, rounded up.

    In a cache of fewer bits or channels this is a packed token, its scales included.
    """
    return ceil(sum(count * codec.bytes_per_token(itemsize) for count, codec in _codecs(config)))


def stored_bytes(config: PretrainedConfig, itemsize: int, tokens: int) -> int:
    """Return the bytes of the cache of one sequence of `tokens`, over all layers, its window included."""
    return ceil(sum(count * codec.bytes_of(tokens, itemsize) for count, codec in _codecs(config)))


def mean_bytes_per_token(config: PretrainedConfig, itemsize: int, tokens: int = CONTEXT) -> int:
    """Return the bytes per token of a sequence of `tokens`, its window included, rounded up."""
    return ceil(Fraction(stored_bytes(config, itemsize, tokens), tokens))


def _codecs(config: PretrainedConfig) -> Iterator[tuple[int, Codec]]:
    """Yield how the keys and the values of each layer are stored, and of how many heads."""
    kind = cache_format(config)
    for number, shape in enumerate(shape for shape in layer_shapes(config) if shape.num_key_value_heads):
        heads = 1 if shape.k_latents else shape.num_key_value_heads
        keys, values = (channels // heads for channels in shape.cached)
        for codec in kind.codecs(keys, values, number) if kind else map(Whole, (keys, values)):
            yield heads, codec
