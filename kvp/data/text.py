"""Plain text to train on: corpora packed into windows of one length, every token a label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from kvp.data.corpora import Corpus, Selection, find
from kvp.data.tokens import encode, windows
from kvp.options import options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@options
class PackedText(Selection):
    """Non-overlapping windows over the documents of one or more corpora."""

    node: ClassVar[str] = "recovery.data"
    length: int = Field(ge=2, description="tokens of a window; one token predicts nothing")
    max_tokens: int | None = Field(
        default=None, description="tokens in all, an equal share per corpus; null: all"
    )

    def __post_init__(self) -> None:
        least = self.length * len(self.corpora)
        if self.max_tokens is not None and self.max_tokens < least:
            raise ValueError(
                f"recovery.data.max_tokens must be >= {least} (a window per corpus) or null, got {self.max_tokens}"
            )

    def examples(
        self, tokenizer: PreTrainedTokenizerBase, corpora: Mapping[str, Corpus]
    ) -> list[dict[str, list[int]]]:
        """Return one example per window; labels equal `input_ids`.

        Raises:
            ValueError: A corpus is unknown or fills no window.
        """
        share = None if self.max_tokens is None else self.max_tokens // len(self.corpora)
        examples = []
        for name in self.corpora:
            ids = encode(find(corpora, name).documents(self.part), tokenizer, join=self.join, limit=share)
            packed = windows(ids, self.length).tolist()
            if not packed:
                raise ValueError(
                    f"The {self.part} part of {name} has {len(ids)} tokens: lower length={self.length}"
                )
            examples += [{"input_ids": window, "labels": list(window)} for window in packed]
        return examples
