"""Mustafar's keys or values with room for a fixed number of tokens, so that a kernel writes and reads them in place."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from kvp.models.mustafar import WORD, Sparse


class FixedSparse:
    """Older tokens packed, the newest whole.

    Attributes:
        values: (batch, groups, older tokens, kept).
        bitmap: (batch, groups, older tokens, width / 8).
        newest: (batch, groups, window + 1, width). Token t has place t % (window + 1), until another takes it.
    """

    def __init__(
        self,
        codec: Sparse,
        *,
        batch_size: int,
        groups: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.codec, rows = codec, (batch_size, groups)
        older, places = max(length - codec.window - 1, 1), codec.window + 1
        options: Any = {"dtype": dtype, "device": device}
        self.values = torch.zeros(*rows, older, codec.values.width, **options)
        self.bitmap = torch.zeros(*rows, older, codec.width // WORD, dtype=torch.uint8, device=device)
        self.newest = torch.zeros(*rows, places, codec.width, **options)

    def __len__(self) -> int:
        """Return how many sequences there are."""
        return len(self.values)

    def store(self, states: Tensor, rows: slice) -> None:
        """Store the first tokens of some sequences, (batch, groups, tokens, width)."""
        tokens, places = states.shape[2], self.newest.shape[2]
        older = max(tokens - places, 0)
        for held, packed in zip(
            (self.values, self.bitmap), self.codec.pack(states[:, :, :older]), strict=True
        ):
            held[rows, :, :older] = packed
        self.newest[rows].index_copy_(2, torch.arange(older, tokens) % places, states[:, :, older:])

    def tensors(self) -> tuple[Tensor, ...]:
        """Return every tensor."""
        return self.values, self.bitmap, self.newest

    def bytes_per_token(self) -> Fraction:
        """Return the bytes of a packed token of one sequence."""
        return Fraction(self.values.nbytes + self.bitmap.nbytes, len(self) * self.values.shape[2])
