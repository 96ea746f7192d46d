"""Quantised caches: keys and values in fewer bits than the model computes in.

Per token, a scale covers some channels of one token. KIVI (arXiv:2402.02750) gives keys a scale per channel instead,
because a few channels of keys are large in every token. It packs the keys of `window` tokens together, and the values
of a token as soon as it has left the window. Here, as in KIVI's code, a number is `low + scale * code`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from typing_extensions import override

from kvp.models.cache_formats import CacheFormat
from kvp.models.codecs import CODES, Codec, Float8, Integers
from kvp.options import options


@options
class Quantized(CacheFormat):
    """Integers, of other bits for keys than for values.

    Attributes:
        keys: "token": a scale covers channels of one key. "channel": it covers one channel of several keys (KIVI).
    """

    format: Literal["int"] = "int"
    key_bits: int = Field(ge=1, le=8, description="bits of a number of a key")
    value_bits: int = Field(ge=1, le=8, description="bits of a number of a value")
    keys: Literal["token", "channel"] = Field(default="token", description="what a scale of keys belongs to")
    group: int = Field(default=32, ge=1, description="numbers that share a scale, at most")

    def __post_init__(self) -> None:
        if self.keys == "channel" and (self.group % CODES or self.window % self.group or not self.window):
            raise ValueError(
                f"cache.keys=channel needs a cache.group that is a multiple of {CODES}, and a cache.window that is a "
                f"multiple of it above 0, got group={self.group} and window={self.window}: the keys of a window are "
                "packed together, in groups of tokens. Set cache.group=32 cache.window=32, or cache.keys=token"
            )

    @override
    def codecs(self, qk_head_dim: int, v_head_dim: int, attention: int = 0) -> tuple[Codec, Codec]:
        values = Integers(v_head_dim, self.window, bits=self.value_bits, group=self.group)
        if self.keys == "token":
            return Integers(qk_head_dim, self.window, bits=self.key_bits, group=self.group), values
        keys = Integers(
            qk_head_dim, block=self.window, bits=self.key_bits, group=self.group, per_channel=True
        )
        return keys, values


@options
class Quantized8(CacheFormat):
    """Numbers in float8 (e4m3), keys and values alike."""

    format: Literal["fp8"] = "fp8"

    @override
    def codecs(self, qk_head_dim: int, v_head_dim: int, attention: int = 0) -> tuple[Codec, Codec]:
        return Float8(qk_head_dim, self.window), Float8(v_head_dim, self.window)
