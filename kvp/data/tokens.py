"""Text to token ids, in one way for calibration, training text and perplexity."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, join: str = "\n\n", bos: bool = False
) -> Tensor:
    """The joined documents as one stream of ids, int64 of shape (tokens,), tokenised once as a whole.

    The tokenizer adds no special tokens of its own; with `bos` one BOS opens the stream.

    Raises:
        ValueError: `bos` is asked for and the tokenizer has none.
    """
    # verbose=False: a stream is longer than any model's window, and is cut before a model sees it.
    ids = tokenizer(join.join(documents), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([bos_id(tokenizer), *ids] if bos else ids, dtype=torch.int64)


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the tokenizer's BOS token.

    Raises:
        ValueError: It has none.
    """
    if tokenizer.bos_token_id is None:
        raise ValueError(f"The tokenizer {tokenizer.name_or_path} has no BOS token: set bos to false")
    return tokenizer.bos_token_id


def windows(ids: Tensor, length: int) -> Tensor:
    """Non-overlapping windows of a stream, (windows, length); the tail that fills none is dropped."""
    return ids[: len(ids) // length * length].view(-1, length)


def digest(ids: Tensor) -> str:
    """SHA-256 of token ids, whatever their shape and device: tells two tokenizers or texts apart."""
    return hashlib.sha256(ids.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()
