"""Calibration: the few token windows that a strategy may look at.

The pruning literature draws random crops from random rows long enough for one, and loops until it has enough. On small
corpora that loop never ends; on corpora of single sentences it prefers freak rows. Here the rows are joined and cut
into windows, and the windows are drawn without replacement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvp.data.corpora import Corpus, Selection, find
from kvp.data.tokens import bos_id, encode, windows
from kvp.options import options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@options
class Calibration(Selection):
    """Token windows drawn evenly from one or more corpora."""

    node: ClassVar[str] = "calibration"
    num_samples: int = Field(ge=1, description="windows drawn")
    length: int = Field(ge=2, description="tokens of a window")
    batch_size: int = Field(ge=1, description="windows per pass through the model")
    bos: bool = Field(default=False, description="BOS replaces each window's first token; Gemma needs it")
    seed: int = Field(description="it seeds the draw")

    def sample(self, corpora: Mapping[str, Corpus], tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Return token ids, int64 of shape (num_samples, length).

        Raises:
            ValueError: A corpus is unknown or has too little text, or `bos` is set and the tokenizer has no BOS.
        """
        generator = torch.Generator().manual_seed(self.seed)
        pool = torch.cat([self._share(corpora, name, tokenizer, generator) for name in self.corpora])
        samples = pool[torch.randperm(len(pool), generator=generator)[: self.num_samples]]
        if self.bos:
            samples[:, 0] = bos_id(tokenizer)
        return samples

    def _share(
        self,
        corpora: Mapping[str, Corpus],
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        generator: torch.Generator,
    ) -> Tensor:
        """Draw one corpus's equal share of the windows."""
        documents = find(corpora, name).documents(self.part)
        found = windows(encode(documents, tokenizer, join=self.join), self.length)
        share = math.ceil(self.num_samples / len(self.corpora))
        if len(found) < share:
            raise ValueError(
                f"The {self.part} part of {name} has {len(found)} windows of {self.length} tokens, not the "
                f"{share} wanted: lower calibration.num_samples or calibration.length, or add corpora"
            )
        return found[torch.randperm(len(found), generator=generator)[:share]]
