"""Codecs: how a cache stores the keys or the values of the tokens that have left its window.

A codec knows the width of a head and the exact bytes that it stores, scales included. `kvp.models.packed_cache` holds
the tensors. Integers are asymmetric: low + scale * code, with `low` and `scale` in float16 and codes in whole bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

Packed = tuple[Tensor, ...]  # each (batch, groups, rows, ...); further tokens are further rows

SCALE = torch.float16  # of the scale and the lowest number of a group
SMALLEST = 2.0**-24  # above 0 in float16: the scale of a group of equal numbers
CODES = 8  # numbers whose codes fill whole bytes, whatever their bits


@dataclass(frozen=True)
class Codec(ABC):
    """Storage of the vectors of one head: in which form, and from when on.

    Attributes:
        width: Channels of a vector.
        window: Newest tokens that stay whole.
        block: Tokens that are packed together. Those that do not fill a block stay whole, too.
    """

    width: int
    window: int = 0
    block: int = 1

    @abstractmethod
    def pack(self, states: Tensor) -> Packed:
        """Return what is stored of states (batch, groups, tokens, width), whole blocks of tokens."""

    @abstractmethod
    def unpack(self, packed: Packed) -> Tensor:
        """Return the states (batch, groups, tokens, width) that are attended to."""

    @abstractmethod
    def bytes_per_token(self, itemsize: int) -> Fraction:
        """Return the bytes of one packed vector; a number that is stored whole takes `itemsize`."""

    def packed(self, tokens: int) -> int:
        """Return how many of the oldest `tokens` are packed once all of them are stored."""
        return max(tokens - self.window, 0) // self.block * self.block

    def bytes_of(self, tokens: int, itemsize: int) -> Fraction:
        """Return the bytes of a head's `tokens` vectors, those of the window included."""
        packed = self.packed(tokens)
        return packed * self.bytes_per_token(itemsize) + (tokens - packed) * self.width * itemsize


@dataclass(frozen=True)
class Whole(Codec):
    """Vectors as the model makes them."""

    @override
    def pack(self, states: Tensor) -> Packed:
        return (states,)

    @override
    def unpack(self, packed: Packed) -> Tensor:
        return packed[0]

    @override
    def bytes_per_token(self, itemsize: int) -> Fraction:
        return Fraction(self.width * itemsize)


@dataclass(frozen=True)
class Float8(Codec):
    """Numbers in float8 e4m3 without a scale, as vLLM's `--kv-cache-dtype fp8` stores them by default.

    The largest number is 448; beyond it they saturate.
    """

    LARGEST: ClassVar[float] = torch.finfo(torch.float8_e4m3fn).max

    @override
    def pack(self, states: Tensor) -> Packed:
        return (states.clamp(-self.LARGEST, self.LARGEST).to(torch.float8_e4m3fn).view(torch.uint8),)

    @override
    def unpack(self, packed: Packed) -> Tensor:
        return packed[0].view(torch.float8_e4m3fn).float()

    @override
    def bytes_per_token(self, itemsize: int) -> Fraction:
        return Fraction(self.width)


@dataclass(frozen=True)
class Integers(Codec):
    """Integers of 1 to 8 bits between the lowest and the highest number of a group.

    A group is some channels of one token, or one channel over some tokens. A width that `group` does not divide is
    divided into groups as equal as they can be, none above `group`.

    Attributes:
        bits: Bits of a number.
        group: Numbers that share a scale, at most.
        per_channel: Whether a group runs over tokens; `block` is then a multiple of it.
    """

    bits: int = 8
    group: int = 32
    per_channel: bool = False

    @property
    def layout(self) -> tuple[int, int, int]:
        """Return the tokens of a row, its groups, and the numbers of a group."""
        if self.per_channel:
            return self.group, self.width, self.group
        count = -(-self.width // self.group)
        return 1, count, -(-self.width // count)

    @override
    def pack(self, states: Tensor) -> Packed:
        tokens, count, size = self.layout
        if self.per_channel:
            grouped = states.unflatten(2, (states.shape[2] // tokens, tokens)).mT
        else:  # the last channel fills the last group up, where it changes no scale
            filled = [states, states[..., -1:].expand(*states.shape[:-1], count * size - self.width)]
            grouped = torch.cat(filled, dim=-1).unflatten(-1, (count, size))
        grouped, levels = grouped.float(), 2**self.bits - 1
        low = grouped.amin(-1).to(SCALE)
        scale = ((grouped.amax(-1) - low) / levels).clamp(min=SMALLEST).to(SCALE)
        codes = ((grouped - low[..., None]) / scale[..., None].float()).round().clamp(0, levels)
        return to_bytes(codes.flatten(-2).to(torch.uint8), self.bits), scale, low

    @override
    def unpack(self, packed: Packed) -> Tensor:
        _, count, size = self.layout
        codes, scale, low = packed
        grouped = from_bytes(codes, self.bits)[..., : count * size].unflatten(-1, (count, size)).float()
        states = grouped * scale[..., None].float() + low[..., None].float()
        return states.mT.flatten(2, 3) if self.per_channel else states.flatten(-2)[..., : self.width]

    @override
    def bytes_per_token(self, itemsize: int) -> Fraction:
        tokens, count, size = self.layout
        codes = -(-count * size // CODES) * self.bits
        return Fraction(codes + 2 * count * SCALE.itemsize, tokens)


def to_bytes(codes: Tensor, bits: int) -> Tensor:
    """Return codes (..., n) below 2 ** bits as bytes (..., ceil(n / 8) * bits), the first code in the lowest bits."""
    codes = F.pad(codes, (0, -codes.shape[-1] % CODES))
    octets = codes.unflatten(-1, (codes.shape[-1] // CODES, CODES)).long() << _shifts(bits, codes.device)
    words = octets.sum(-1, keepdim=True)  # no bit is set twice
    return words.view(torch.uint8)[..., :bits].flatten(-2)


def from_bytes(packed: Tensor, bits: int) -> Tensor:
    """Return the codes (..., 8 * m) of bytes (..., m * bits), as uint8."""
    words = F.pad(packed.unflatten(-1, (packed.shape[-1] // bits, bits)), (0, CODES - bits))
    octets = words.view(torch.int64) >> _shifts(bits, packed.device)
    return (octets & (2**bits - 1)).to(torch.uint8).flatten(-2)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return bits * torch.arange(CODES, device=device)
