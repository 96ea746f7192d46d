"""Calibration: the few token windows that a strategy may look at.

The pruning literature draws random crops from random rows long enough for one, and loops until it has
them; on small corpora that never ends, on corpora of single sentences it is biased to freak rows. Here
the rows are joined, cut into windows, and the windows are drawn without replacement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvp.data.corpora import Corpus, Selection, find
from kvp.data.tokens import bos_id, encode, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Calibration(Selection):
    """Windows drawn evenly from `corpora`.

    Attributes:
        num_samples: How many windows.
        length: Tokens of a window.
        batch_size: Windows per pass through the model.
        bos: BOS in place of each window's first token: some models (Gemma) are lost without it.
        seed: Of the draw.
    """

    num_samples: int = 32
    length: int = 128
    batch_size: int = 4
    bos: bool = False
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"num_samples": 1, "length": 2, "batch_size": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"calibration {name} must be >= {least}, got {getattr(self, name)}")

    def sample(self, corpora: Mapping[str, Corpus], tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Token ids, int64 of shape (num_samples, length).

        Raises:
            ValueError: A corpus is unknown or has too little text, or the tokenizer has no BOS to put.
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
        """As many random windows of one corpus as fall to it."""
        documents = find(corpora, name).documents(self.part)
        found = windows(encode(documents, tokenizer, join=self.join), self.length)
        share = math.ceil(self.num_samples / len(self.corpora))
        if len(found) < share:
            raise ValueError(
                f"The {self.part} part of {name} has {len(found)} windows of {self.length} tokens, not the "
                f"{share} wanted: lower calibration.num_samples or calibration.length, or add corpora"
            )
        return found[torch.randperm(len(found), generator=generator)[:share]]
