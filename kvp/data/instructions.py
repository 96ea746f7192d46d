"""Instruction data to recover with, in the Alpaca template, as LLM-Pruner (arXiv:2305.11627) uses it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from kvp.data.corpora import Corpus
from kvp.data.files import form_of
from kvp.data.hub import HubFile
from kvp.data.rows import cell, rows
from kvp.data.survey import require_plain, sha256
from kvp.data.tokens import IGNORE
from kvp.options import options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


@options
class Instructions:
    """Rows of "instruction", "input" (may be empty) and "output", each one example."""

    node: ClassVar[str] = "recovery.data"
    repo: str = Field(default="yahma/alpaca-cleaned", description="data set repository on the hub")
    revision: str = Field(default="12567cabf869d7c92e573c7c783905fc160e9639", description="commit or branch")
    file: str = Field(default="alpaca_data_cleaned.json", description="the file of the repository")
    path: str | None = Field(default=None, description="a local .json or .jsonl file in place of the hub's")
    cutoff: int = Field(default=256, ge=2, description="tokens of an example; one token predicts nothing")
    train_on_inputs: bool = Field(default=False, description="learn the prompt too, not only the response")
    add_eos: bool = Field(
        default=False, description="EOS after a whole response; LLM-Pruner's recipe adds none"
    )
    max_examples: int | None = Field(default=None, ge=1, description="rows to read; null: all")

    def examples(
        self, tokenizer: PreTrainedTokenizerBase, corpora: Mapping[str, Corpus]
    ) -> list[dict[str, list[int]]]:
        """Return `input_ids` and `labels` of every row; `corpora` is not read.

        The tokenizer adds the special tokens that it puts around any text. A row is left out if the prompt alone
        reaches the cutoff, because it teaches nothing.

        Raises:
            ValueError: A row lacks a field, no row is left, or the tokenizer has no EOS to add.
        """
        if self.add_eos and tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path} has no EOS token: set recovery.data.add_eos to false"
            )
        source = self._rows()
        prompts = [prompt(row) for row in source]
        texts = [text + row["output"] for text, row in zip(prompts, source, strict=True)]
        pairs = zip(_tokenise(tokenizer, prompts), _tokenise(tokenizer, texts), strict=True)
        examples = [self._example(*pair, tokenizer.eos_token_id) for pair in pairs]
        kept = [example for example in examples if set(example["labels"]) != {IGNORE}]
        if not kept:
            raise ValueError(
                f"All {len(source)} prompts reach the cutoff of {self.cutoff} tokens: raise recovery.data.cutoff"
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
        """Return every option, and which bytes are read."""
        source = self._hub().identity() if self.path is None else self._local_identity()
        options = ("cutoff", "train_on_inputs", "add_eos", "max_examples")
        return {"source": source, **{name: getattr(self, name) for name in options}}

    def _local_identity(self) -> dict[str, Any]:
        path = self._fetch()
        read = form_of(path).departures(path)
        return {"sha256": sha256(path), **({"read": read} if read else {})}

    def check(self, corpora: Mapping[str, Corpus]) -> None:
        """Raise at once if the file is out of reach, or a row of it is no example."""
        if self.path is None:
            self._hub().commit()
            require_plain(self._fetch(), form_of(self._fetch()).departures(self._fetch()))
        elif not self._fetch().exists():
            raise FileNotFoundError(f"There is no file {self.path}: set recovery.data.path")
        self._rows()

    def _rows(self) -> list[dict[str, str]]:
        path = self._fetch()
        source = [_checked(*each) for each in islice(rows(path), self.max_examples)]
        if not source:
            raise ValueError(f"{path} holds no rows")
        return source

    def _hub(self) -> HubFile:
        return HubFile(repo=self.repo, revision=self.revision, file=self.file)

    def _fetch(self) -> Path:
        return self._hub().fetch() if self.path is None else Path(self.path).expanduser()


def prompt(row: Mapping[str, str]) -> str:
    """Return the Alpaca prompt of a row, up to where the response begins."""
    return (WITH_INPUT if row.get("input") else PLAIN).format(**row)


def _checked(place: str, row: Any) -> dict[str, str]:
    """Return the texts of a row; an absent or null input is an empty one."""
    given = {"input": None, **row} if isinstance(row, Mapping) else row
    names = ("instruction", "input", "output")
    texts = {name: cell(given, name, place, way_out=f"a row has {', '.join(names)}") for name in names}
    for name in ("instruction", "output"):
        if texts[name] is None:
            raise ValueError(f"{place} has null in {name!r}: remove or mend the row")
    return {name: text or "" for name, text in texts.items()}


def _common_prefix(prompt_ids: list[int], ids: list[int]) -> int:
    """Count the tokens that belong to the prompt alone; a tokenizer may merge prompt and response where they meet."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, ids, strict=False))
    return sum(1 for _ in same)


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, verbose=False)["input_ids"]
