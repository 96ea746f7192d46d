"""The keys or the values of a layer under a `Codec`, and attention that reads them as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvp.models.codecs import Codec, Packed, Whole
from kvp.models.mustafar import Sparse
from kvp.models.sparse_attention import attend, readable

AS_STORED = "kvp_as_stored"  # name of the attention below
SEGMENT = 128  # tokens to which a segment grows, copied in every step, before the next begins


@dataclass(frozen=True)
class Stored:
    """Keys or values that a pass attends to, as they are stored: in place of a tensor.

    Attributes:
        codec: How the older tokens are packed.
        segments: What it stores of them, in their order.
        recent: (batch, groups, newest tokens, width), whole, those of the pass included.
    """

    codec: Codec
    segments: Sequence[Packed]
    recent: Tensor

    reader: ClassVar[str] = AS_STORED

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the newest tokens, whose last number is the width."""
        return self.recent.shape

    @property
    def as_channels(self) -> bool:
        """Return whether a kernel reads it: some channels of every token, whole, on a device that has the kernel."""
        sparse = isinstance(self.codec, Sparse) and isinstance(self.codec.values, Whole)
        return sparse and readable(self.recent.device, self.recent.dtype)

    def whole(self) -> Tensor:
        """Return (batch, groups, tokens, width), the older tokens as they are unpacked."""
        older = [self.codec.unpack(segment).to(self.recent.dtype) for segment in self.segments]
        return torch.cat([*older, self.recent], dim=-2)


class PackedStates:
    """The keys or the values of a layer, with the newest tokens whole and older ones packed.

    Attributes:
        recent: (batch, groups, newest tokens, width).
        segments: What the codec stores of the older ones, in pieces, so that a step copies few of them.
        sizes: Tokens of each segment.
    """

    def __init__(self, states: Tensor, codec: Codec) -> None:
        self.codec, self.recent = codec, states[..., :0, :]
        self.segments: list[Packed] = []
        self.sizes: list[int] = []

    @property
    def older(self) -> int:
        """Return the number of packed tokens."""
        return sum(self.sizes)

    @property
    def tokens(self) -> int:
        """Return the number of tokens stored."""
        return self.older + self.recent.shape[-2]

    def append(self, new: Tensor) -> Stored:
        """Store new tokens; return all tokens as they are attended to, with the new and the recent ones whole."""
        recent = torch.cat([self.recent, new], dim=-2)
        attended = Stored(self.codec, tuple(self.segments), recent)
        if leaving := self.codec.packed(self.older + recent.shape[-2]) - self.older:
            self._keep(self.codec.pack(recent[..., :leaving, :]), leaving)
            recent = recent[..., leaving:, :].clone()  # a view would keep the whole tensor in memory
        self.recent = recent
        return attended

    def _keep(self, packed: Packed, tokens: int) -> None:
        if self.sizes and self.sizes[-1] < SEGMENT:
            packed = tuple(torch.cat(both, dim=2) for both in zip(self.segments.pop(), packed, strict=True))
            tokens += self.sizes.pop()
        self.segments.append(packed)
        self.sizes.append(tokens)

    def select(self, sequences: Tensor) -> None:
        """Make the sequences of these indices the batch."""
        sequences = sequences.to(self.recent.device)
        self.recent = self.recent[sequences]
        self.segments = [tuple(x[sequences] for x in segment) for segment in self.segments]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return every stored tensor."""
        return self.recent, *(x for segment in self.segments for x in segment)

    def bytes_per_token(self) -> Fraction:
        """Return the bytes of a packed token of one sequence; 0 if none is packed."""
        packed = sum(x.nbytes for segment in self.segments for x in segment)
        return Fraction(packed, len(self.recent) * self.older or 1)


def as_stored(
    module: Any,
    query: Tensor,
    key: Stored,
    value: Stored,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return what one token's queries (batch, heads, 1, width) read, (batch, 1, heads, value width).

    The states are expanded for what no kernel does: weights (the eager attention), gradients, dropout, sinks, and masks
    that differ between heads.
    """
    kind: str = module.config._attn_implementation
    differs = attention_mask is not None and attention_mask.shape[1] > 1
    gradients = torch.is_grad_enabled() and query.requires_grad
    if kind == "eager" or differs or gradients or dropout or s_aux is not None:
        read = ALL_ATTENTION_FUNCTIONS.get_interface(kind, module.eager)
        states = query, key.whole(), value.whole()
        return read(module, *states, attention_mask, dropout=dropout, scaling=scaling, s_aux=s_aux, **kwargs)
    segments = [(*k, *v) for k, v in zip(key.segments, value.segments, strict=True)]
    mask = None if attention_mask is None else _added(attention_mask[:, 0, 0])
    output = attend(query[:, :, 0], segments, key.recent, value.recent, mask, scaling)
    return output[:, None], None


def _added(mask: Tensor) -> Tensor:
    """Return a mask as numbers that are added to the scores."""
    return (
        torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
        if mask.dtype == torch.bool
        else mask
    )


AttentionInterface.register(AS_STORED, as_stored)
