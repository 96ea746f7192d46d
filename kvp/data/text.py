"""Plain text to train on: corpora packed into windows of one length, every token a label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvp.data.corpora import Corpus, Selection, find
from kvp.data.tokens import encode, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class PackedText(Selection):
    """Non-overlapping windows over the documents of `corpora`.

    Attributes:
        length: Tokens of a window.
        max_tokens: Tokens in all, an equal share from each corpus; None for everything.
    """

    length: int
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 2:
            raise ValueError(f"length must be >= 2, got {self.length}: one token predicts nothing")
        least = self.length * len(self.corpora)
        if self.max_tokens is not None and self.max_tokens < least:
            raise ValueError(
                f"max_tokens must be >= {least} (a window per corpus) or null, got {self.max_tokens}"
            )

    def examples(
        self, tokenizer: PreTrainedTokenizerBase, corpora: Mapping[str, Corpus]
    ) -> list[dict[str, list[int]]]:
        """One example per window; its labels are its `input_ids`.

        Raises:
            ValueError: A corpus is unknown or fills no window.
        """
        share = None if self.max_tokens is None else self.max_tokens // len(self.corpora)
        examples = []
        for name in self.corpora:
            ids = encode(find(corpora, name).documents(self.part), tokenizer, join=self.join)
            packed = windows(ids[:share], self.length).tolist()
            if not packed:
                raise ValueError(
                    f"The {self.part} part of {name} has {len(ids)} tokens: lower length={self.length}"
                )
            examples += [{"input_ids": window, "labels": list(window)} for window in packed]
        return examples
