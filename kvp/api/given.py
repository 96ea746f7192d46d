"""Text and token ids that the caller brings along, in place of a named corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from kvp.data.calibration import Calibration
from kvp.data.corpora import Corpus, Part
from kvp.data.tokens import digest, encode
from kvp.options import options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GIVEN = "given"  # what the texts of the caller are called where a corpus has a name


@options
class GivenTexts(Corpus):
    """Texts of the caller: every part is all of them."""

    node: ClassVar[str] = "given"
    texts: Any

    def __post_init__(self) -> None:
        if isinstance(self.texts, str | bytes) or not isinstance(self.texts, Sequence) or not self.texts:
            raise ValueError(
                f"texts must be a list of text such as ['one', 'another'], got {_kind(self.texts)}"
            )
        for number, text in enumerate(self.texts):
            if not isinstance(text, str):
                raise ValueError(f"texts[{number}] must be text, got {_kind(text)}")
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(
                    f"texts[{number}] has half a character (a lone surrogate): read it with the right encoding"
                )
        if not any(text.strip() for text in self.texts):
            raise ValueError("texts must have text in them, got blanks only")

    @override
    def documents(self, part: Part) -> list[str]:
        return list(self.texts)

    @override
    def identity(self, part: Part) -> dict[str, Any]:
        return {"name": GIVEN, "sha256": sha256("\0".join(self.texts).encode()).hexdigest()}

    @override
    def check(self, part: Part) -> None:
        """Nothing can be missing."""


@options
class GivenIds(Calibration):
    """Token ids of the caller, (num_samples, length)."""

    corpora: Sequence[str] = ()
    ids: Tensor

    @override
    def sample(self, corpora: Mapping[str, Corpus], tokenizer: PreTrainedTokenizerBase) -> Tensor:
        return self.ids

    @override
    def identity(self, corpora: Mapping[str, Corpus]) -> dict[str, Any]:
        return {"ids": digest(self.ids), "shape": list(self.ids.shape), "batch_size": self.batch_size}

    @override
    def check(self, corpora: Mapping[str, Corpus]) -> None:
        """Nothing can be missing."""


def _kind(value: Any) -> str:
    """Return what a value is, in few words: a text may be long."""
    return "one text" if isinstance(value, str) else f"{type(value).__name__} {value!r:.40}"


def check_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """Return calibration ids as int64 on the CPU.

    Raises:
        ValueError: They are no whole numbers of shape (num_samples, length), or outside the vocabulary.
    """
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not whole or ids.dim() != 2 or not ids.numel() or ids.shape[1] < 2:
        raise ValueError(
            "calibration must be token ids of shape (num_samples, length), whole numbers and length >= 2; got "
            f"{str(ids.dtype).removeprefix('torch.')} of shape {tuple(ids.shape)}"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"calibration must hold token ids in [0, {vocab_size}) (the model's vocabulary), got {low} to {high}: "
            "another model's tokenizer made them"
        )
    return ids.to("cpu").long()


def windows_in(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> int:
    """Return how many whole windows the texts fill.

    Raises:
        ValueError: They fill none.
    """
    tokens = len(encode(texts, tokenizer))
    if tokens < length:
        raise ValueError(
            f"the texts have {tokens} tokens, fewer than one window of length={length}: give more text, or lower length"
        )
    return tokens // length
