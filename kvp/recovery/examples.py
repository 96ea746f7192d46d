"""Training examples, and the data that a recovery makes them from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kvp.data.corpora import Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = dict[str, list[int]]  # "input_ids" and "labels" of equal length; the label -100 is no target


@runtime_checkable
class Examples(Protocol):
    """Training data, such as `kvp.data.text.PackedText` and `kvp.data.instructions.Instructions`."""

    def examples(self, tokenizer: PreTrainedTokenizerBase, corpora: Mapping[str, Corpus]) -> list[Example]:
        """Return every example, in a fixed order."""

    def identity(self, corpora: Mapping[str, Corpus]) -> dict[str, Any]:
        """Return which examples these are, fit for a fingerprint."""

    def check(self, corpora: Mapping[str, Corpus]) -> None:
        """Raise at once if the data is unknown or out of reach."""
