"""What a recovery is: it trains a pruned checkpoint a little, so that what the cut broke heals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvp.data.corpora import Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = dict[str, list[int]]  # "input_ids" and "labels" of equal length; the label -100 is no target


class Examples(Protocol):
    """Training data: `kvp.data.text.PackedText`, `kvp.data.instructions.Instructions`."""

    def examples(self, tokenizer: PreTrainedTokenizerBase, corpora: Mapping[str, Corpus]) -> list[Example]:
        """Every example, in a fixed order."""

    def identity(self, corpora: Mapping[str, Corpus]) -> dict[str, Any]:
        """Which examples these are, fit for a fingerprint."""

    def check(self, corpora: Mapping[str, Corpus]) -> None:
        """Fails at once where the data is unknown or out of reach."""


class Recovery(ABC):
    """Knows a checkpoint on disk only, never the plan behind it, so it serves dense controls as well."""

    @abstractmethod
    def recover(
        self,
        checkpoint: Path,
        directory: Path,
        *,
        corpora: Mapping[str, Corpus],
        seed: int,
        device: str,
        teacher: Path | None = None,
    ) -> dict[str, Any]:
        """Writes the recovered checkpoint to `directory / "model"` and returns what it cost and gained.

        Args:
            checkpoint: Hugging Face directory with a tokenizer; it is only read.
            directory: Where to work; files of a killed attempt in it are gone on from.
            corpora: The text that the data may name.
            seed: For everything that is drawn.
            device: "cpu" or "cuda".
            teacher: The dense model, for a recovery that learns from it.
        """

    @abstractmethod
    def identity(self, corpora: Mapping[str, Corpus]) -> dict[str, Any]:
        """Everything but the checkpoint and the seed that decides the result, fit for a fingerprint."""

    @abstractmethod
    def check(self, corpora: Mapping[str, Corpus], device: str) -> None:
        """Fails at once where the data is unknown or out of reach, or the device does not suffice."""
