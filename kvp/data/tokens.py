"""Text to token ids, in one way for calibration, training text and perplexity."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IGNORE = -100  # the label that the cross-entropy skips


def encode(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, join: str = "\n\n", bos: bool = False
) -> Tensor:
    """Return the joined documents as one stream of ids, int64 of shape (tokens,), tokenised once as a whole.

    The tokenizer adds no special tokens. With `bos` one BOS opens the stream.

    Raises:
        ValueError: `bos` is set and the tokenizer has no BOS.
    """
    # verbose=False: the stream is longer than a model's window, and is cut before a model reads it.
    ids = tokenizer(join.join(documents), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([bos_id(tokenizer), *ids] if bos else ids, dtype=torch.int64)


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the tokenizer's BOS token.

    Raises:
        ValueError: The tokenizer has no BOS.
    """
    if tokenizer.bos_token_id is None:
        raise ValueError(f"The tokenizer {tokenizer.name_or_path} has no BOS token: set bos to false")
    return tokenizer.bos_token_id


def windows(ids: Tensor, length: int) -> Tensor:
    """Return non-overlapping windows of a stream, (windows, length), without the tail that fills none."""
    return ids[: len(ids) // length * length].view(-1, length)


def digest(ids: Tensor) -> str:
    """Return the SHA-256 of token ids, whatever their shape and device."""
    return hashlib.sha256(ids.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()
