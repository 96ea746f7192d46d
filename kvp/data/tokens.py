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
MARGIN = 1_000  # tokens before the end of a part that the cut may change


def encode(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    join: str = "\n\n",
    bos: bool = False,
    limit: int | None = None,
) -> Tensor:
    """Return the joined documents as one stream of ids, int64 of shape (tokens,), tokenised once as a whole.

    The tokenizer adds no special tokens. With `bos` one BOS opens the stream. With `limit` only so many ids are
    returned, and a longer text is tokenised only as far as they reach.

    Raises:
        ValueError: `bos` is set and the tokenizer has no BOS.
    """
    opening = [bos_id(tokenizer)] if bos else []
    text, part = join.join(documents), 16 * max(limit or 0, MARGIN)
    while limit is not None and len(text) > part:
        ids = _ids(text[: text.rfind("\n", part // 2, part) + 1 or part], tokenizer)
        if len(ids) >= limit + MARGIN:
            return torch.tensor([*opening, *ids][:limit], dtype=torch.int64)
        part *= 4
    return torch.tensor([*opening, *_ids(text, tokenizer)][:limit], dtype=torch.int64)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose=False: the stream is longer than a model's window, and is cut before a model reads it.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


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
