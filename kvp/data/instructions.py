"""Instruction data to recover with, in the Alpaca template, as LLM-Pruner (arXiv:2305.11627) uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvp.data.corpora import Corpus
from kvp.data.files import HubFile, rows, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label that the cross-entropy skips

PLAIN = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""
WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """Rows of "instruction", "input" (may be empty) and "output", each one example.

    Attributes:
        repo: Data set repository on the hub, at `revision`, in `file`.
        path: A local .json or .jsonl file instead.
        cutoff: Tokens after which an example is cut.
        train_on_inputs: Learn the prompt too, not only the response.
        add_eos: Close a response that the cutoff leaves whole with EOS. The published recipe does not.
        max_examples: Rows to read, None for all.
    """

    repo: str = "yahma/alpaca-cleaned"
    revision: str = "12567cabf869d7c92e573c7c783905fc160e9639"
    file: str = "alpaca_data_cleaned.json"
    path: str | None = None
    cutoff: int = 256
    train_on_inputs: bool = False
    add_eos: bool = False
    max_examples: int | None = None

    def __post_init__(self) -> None:
        if self.cutoff < 2:
            raise ValueError(f"cutoff must be >= 2, got {self.cutoff}: one token predicts nothing")
        if self.max_examples is not None and self.max_examples < 1:
            raise ValueError(f"max_examples must be >= 1 or null, got {self.max_examples}")

    def examples(
        self, tokenizer: PreTrainedTokenizerBase, corpora: Mapping[str, Corpus]
    ) -> list[dict[str, list[int]]]:
        """`input_ids` and `labels` of every row; `corpora` is not looked at.

        Special tokens are those that the tokenizer itself puts around a text. A row whose prompt alone
        reaches the cutoff teaches nothing and is left out.

        Raises:
            ValueError: A row lacks a field, no row is left, or the tokenizer has no EOS to add.
        """
        if self.add_eos and tokenizer.eos_token_id is None:
            raise ValueError(f"The tokenizer {tokenizer.name_or_path} has no EOS token: set add_eos to false")
        source = self._rows()
        prompts = [prompt(row) for row in source]
        texts = [text + row["output"] for text, row in zip(prompts, source, strict=True)]
        pairs = zip(_tokenise(tokenizer, prompts), _tokenise(tokenizer, texts), strict=True)
        examples = [self._example(*pair, tokenizer.eos_token_id) for pair in pairs]
        kept = [example for example in examples if set(example["labels"]) != {IGNORE}]
        if not kept:
            raise ValueError(
                f"All {len(source)} prompts reach the cutoff of {self.cutoff} tokens: raise cutoff"
            )
        return kept

    def _example(self, prompt_ids: list[int], ids: list[int], eos: int | None) -> dict[str, list[int]]:
        masked = 0 if self.train_on_inputs else _common_prefix(prompt_ids, ids)
        ids = ids[: self.cutoff]
        if self.add_eos and eos is not None and len(ids) < self.cutoff:
            ids = [*ids, eos]
        masked = min(masked, len(ids))
        return {"input_ids": ids, "labels": [IGNORE] * masked + ids[masked:]}

    def identity(self, corpora: Mapping[str, Corpus]) -> dict[str, Any]:
        """Every option, and which bytes are read."""
        source = self._hub().identity() if self.path is None else {"sha256": sha256(self._fetch())}
        options = ("cutoff", "train_on_inputs", "add_eos", "max_examples")
        return {"source": source, **{name: getattr(self, name) for name in options}}

    def check(self, corpora: Mapping[str, Corpus]) -> None:
        """Fails at once where the file is out of reach."""
        if self.path is None:
            self._hub().commit()
        elif not self._fetch().is_file():
            raise FileNotFoundError(f"There is no file {self.path}: set the `path` of the instructions")

    def _rows(self) -> list[dict[str, Any]]:
        source = list(islice(rows(self._fetch()), self.max_examples))
        for number, row in enumerate(source):
            if missing := {"instruction", "output"} - row.keys():
                raise ValueError(
                    f"row {number} of {self._fetch().name} has no {' and no '.join(sorted(missing))}"
                )
        return source

    def _hub(self) -> HubFile:
        return HubFile(repo=self.repo, revision=self.revision, file=self.file)

    def _fetch(self) -> Path:
        return self._hub().fetch() if self.path is None else Path(self.path).expanduser()


def prompt(row: Mapping[str, str]) -> str:
    """The Alpaca prompt of a row, up to where the response begins."""
    return (WITH_INPUT if row.get("input") else PLAIN).format(**row)


def _common_prefix(prompt_ids: list[int], ids: list[int]) -> int:
    """How many tokens are the prompt's alone: where prompt and response meet, a tokenizer may merge them."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, ids, strict=False))
    return sum(1 for _ in same)


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, verbose=False)["input_ids"]
