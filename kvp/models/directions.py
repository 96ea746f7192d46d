"""A cache of directions: each channel of keys and values has bits of its own, down to none.

`cache=directions` goes behind a strategy that prices its directions in nats (KVPruner+). Where a direction is worth
little it is stored in two bits or not at all, and where it is worth much in four. The run divides a budget of bits
(`kvp.strategies.allocation.bits`) and writes the result into the config of the checkpoint. A scale of
keys belongs to one channel of `group` tokens, one of values to `group` channels of a token; bits per channel count it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.cache_formats import CacheFormat
from kvp.models.codecs import CODES, SCALE, SMALLEST, Codec, Packed, from_bytes, to_bytes
from kvp.models.shapes import layer_shapes
from kvp.options import options

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@options
class Directions(CacheFormat):
    """Integers whose bits differ from channel to channel.

    Attributes:
        keys: Per attention a text of one digit per channel, all KV heads one after the other: the bits of that channel.
        values: The same for values.
    """

    format: Literal["directions"] = "directions"
    bits: float = Field(
        ge=0.5, le=8, description="mean bits per channel of the dense model's cache, scales counted"
    )
    most: int = Field(default=4, ge=2, le=8, description="bits of a channel at most")
    group: int = Field(
        default=32,
        ge=1,
        description="tokens of a key's channel, or channels of a token's values, per scale",
    )
    window: int = Field(
        default=32, ge=1, description="tokens that are packed together; fewer than that stay whole"
    )
    keys: tuple[str, ...] = Field(default=(), description="written by the run")
    values: tuple[str, ...] = Field(default=(), description="written by the run")

    def __post_init__(self) -> None:
        if self.group % CODES or self.window % self.group:
            raise ValueError(
                f"cache=directions needs a cache.group that is a multiple of {CODES}, and a cache.window that is a "
                f"multiple of it, got group={self.group} and window={self.window}: set cache.group=32 cache.window=32"
            )

    @override
    def codecs(self, qk_head_dim: int, v_head_dim: int, attention: int = 0) -> tuple[Codec, Codec]:
        keys, values = (given[attention] if given else "" for given in (self.keys, self.values))
        return (
            Mixed(qk_head_dim, block=self.window, digits=keys, group=self.group, per_channel=True),
            Mixed(v_head_dim, block=self.window, digits=values, group=self.group),
        )

    @override
    def check(self, config: PretrainedConfig) -> None:
        """Refuse a model for whose channels these bits were not written; no weights are read.

        Raises:
            ValueError: As every format, or the digits are not one per channel, or a layer stores nothing.
        """
        self.check_attention(config)
        shapes = [shape for shape in layer_shapes(config) if shape.num_key_value_heads]
        for name, given, widths in zip(
            ("keys", "values"),
            (self.keys, self.values),
            zip(*(shape.cached for shape in shapes), strict=True),
            strict=True,
        ):
            right = [len(digits) for digits in given] == list(widths)
            if not right or not all(any(d != "0" for d in digits) for digits in given):
                raise ValueError(
                    f"cache.{name} must give each of the model's {sum(widths)} channels a digit, the bits that it is "
                    f"stored in, and no layer zeros only; got {sum(map(len, given))} digits in {len(given)} layers. A "
                    "run of kvp writes them: strategy=kvpruner_plus cache=directions"
                )
            if unknown := set(chain(*given)) - set("012345678"):
                raise ValueError(f"cache.{name} must be of digits 0 to 8, got {min(unknown)!r}")


@dataclass(frozen=True)
class Mixed(Codec):
    """Integers whose bits differ from channel to channel; a channel of no bits is not stored and reads as zero.

    Channels of all heads are stored together, those of fewest bits first. Those of different bits may share a scale. Of
    every group its lowest number and its range are stored.

    Attributes:
        digits: Bits per channel, of all heads one after the other.
        group: Numbers that share a scale, at most.
        per_channel: Whether a group is one channel of `group` tokens, which `block` is a multiple of. Else it is some
            channels of one token.
    """

    digits: str = ""
    group: int = 32
    per_channel: bool = False

    @property
    def heads(self) -> int:
        """Return how many heads the digits are of."""
        return len(self.digits) // self.width or 1

    @property
    def classes(self) -> dict[int, int]:
        """Return how many channels have how many bits, fewest bits first."""
        return {int(digit): self.digits.count(digit) for digit in sorted(set(self.digits) - {"0"})}

    @property
    def stored(self) -> Tensor:
        """Return the channels that are stored, in their order."""
        return torch.tensor([i for bits in self.classes for i, d in enumerate(self.digits) if d == str(bits)])

    @property
    def layout(self) -> tuple[int, int]:
        """Return the tokens of a row, and its scales."""
        count = sum(self.classes.values())
        return (self.group, count) if self.per_channel else (1, -(-count // self.group))

    @override
    def pack(self, states: Tensor) -> Packed:
        tokens, _ = self.layout
        flat = states.transpose(1, 2).flatten(2)[
            ..., self.stored.to(states.device)
        ]  # (batch, tokens, channels)
        rows = flat.unflatten(
            1, (flat.shape[1] // tokens, tokens)
        ).mT.float()  # (batch, rows, channels, tokens)
        groups = [group.flatten(2) for group in rows.tensor_split(self.layout[1], dim=2)]
        low = torch.stack([group.amin(-1) for group in groups], dim=-1).to(SCALE)
        high = torch.stack([group.amax(-1) for group in groups], dim=-1)
        span = (high - low).clamp(min=SMALLEST).to(SCALE)
        shares = ((rows - self._spread(low)) / self._spread(span)).clamp(0, 1)
        codes = [
            to_bytes((part * (2**bits - 1)).round().to(torch.uint8).flatten(2), bits)
            for bits, part in zip(self.classes, shares.split(list(self.classes.values()), dim=2), strict=True)
        ]
        return tuple(part.unsqueeze(1) for part in (*codes, span, low))

    @override
    def unpack(self, packed: Packed) -> Tensor:
        (*codes, span, low), tokens = (part.squeeze(1) for part in packed), self.layout[0]
        shares = [
            from_bytes(part, bits)[..., : count * tokens].unflatten(-1, (count, tokens)) / (2**bits - 1)
            for part, (bits, count) in zip(codes, self.classes.items(), strict=True)
        ]
        rows = torch.cat(shares, dim=2) * self._spread(span) + self._spread(low)
        flat = rows.new_zeros(len(rows), rows.shape[1] * tokens, len(self.digits))
        flat[..., self.stored.to(rows.device)] = rows.mT.flatten(1, 2)
        return flat.unflatten(-1, (self.heads, self.width)).transpose(1, 2)

    def _spread(self, scales: Tensor) -> Tensor:
        """Return (batch, rows, groups) as (batch, rows, channels, 1)."""
        count = sum(self.classes.values())
        sizes = [len(group) for group in torch.arange(count).tensor_split(self.layout[1])]
        index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(scales.device)
        return scales[..., index, None].float()

    @override
    def bytes_per_token(self, itemsize: int) -> Fraction:
        tokens, scales = self.layout
        codes = sum(-(-count * tokens // CODES) * bits for bits, count in self.classes.items())
        return Fraction(codes + 2 * scales * SCALE.itemsize, tokens * self.heads)


def stored_bits(bits: int, group: int) -> Fraction:
    """Return the bits that a channel of `bits` takes per token, its scale and lowest number included; 0 takes none."""
    return Fraction(0) if not bits else bits + Fraction(2 * 8 * SCALE.itemsize, group)
