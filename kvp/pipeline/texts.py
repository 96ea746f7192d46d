"""Whether there is text enough for what a run reads, and whether the tokenizer has what the run asks of it.

A text is tokenised only if its length leaves that open: tokens are at most its bytes, and rarely longer than 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from kvp.data.corpora import Part, find
from kvp.data.instructions import Instructions
from kvp.data.text import PackedText
from kvp.data.tokens import encode
from kvp.pipeline.experiment import Experiment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenizing = Callable[[], "PreTrainedTokenizerBase"]  # loads it when it is first called
LONG_TOKEN = 16  # bytes; a text of so many per token wanted is not counted
SLACK = 2  # a normaliser may lengthen a text before it is cut into tokens


@dataclass(frozen=True)
class Need:
    """Tokens that a run reads of one corpus.

    Attributes:
        options: The options that decide how many, as the error names them.
    """

    corpus: str
    part: Part
    join: str
    tokens: int
    options: str


def check_texts(x: Experiment, tokenizing: Tokenizing, positions: int) -> None:
    """Refuse a run whose corpora are too short for it, or whose tokenizer lacks a special token.

    Args:
        x: The run.
        tokenizing: Returns the model's tokenizer; called once, where the run depends on it.
        positions: Tokens that the model reads at most at a time.

    Raises:
        ValueError: The message names the corpus, what it has and what is wanted.
    """
    tokenizer = cache(tokenizing)
    _check_special(x, tokenizer)
    for need in _needs(x, positions):
        _check_need(x, need, tokenizer)
    if x.needles:
        x.needles.check_lengths(tokenizer(), positions)


def _needs(x: Experiment, positions: int) -> Iterator[Need]:
    """Yield what calibration, training and evaluation read."""
    if x.reads_calibration:
        read = x.calibration
        share = math.ceil(read.num_samples / len(read.corpora))
        for name in read.corpora:
            options = f"calibration.num_samples={read.num_samples} of calibration.length={read.length}"
            yield Need(name, read.part, read.join, share * read.length, options)
    data = x.recovery and x.recovery.data
    if isinstance(data, PackedText) and x.recovery:
        held_out = x.recovery.validation
        if data.max_tokens is not None and data.max_tokens // data.length <= held_out:
            raise ValueError(
                f"recovery.validation must be < {data.max_tokens // data.length} (recovery.data.max_tokens in windows "
                f"of {data.length}), got {held_out}: an example must be left to train on"
            )
        share = max(1, math.ceil((held_out + 1) / len(data.corpora)))
        for name in data.corpora:
            options = f"recovery.validation={held_out} and one window of recovery.data.length={data.length}"
            yield Need(name, data.part, data.join, share * data.length, options)
    examples = data.max_examples if isinstance(data, Instructions) else None
    if x.recovery and examples is not None and examples <= x.recovery.validation:
        raise ValueError(
            f"recovery.validation must be < recovery.data.max_examples={examples}, got {x.recovery.validation}: an "
            "example must be left to train on"
        )
    if text := x.perplexity:
        window = min(text.window, positions)
        if text.max_tokens is not None and text.max_tokens < window:
            raise ValueError(
                f"evaluation.perplexity.max_tokens must be >= {window} (evaluation.perplexity.window) or null, got "
                f"{text.max_tokens}: a shorter stream fills no window"
            )
        for name in text.corpora:
            yield Need(name, text.part, text.join, window, f"evaluation.perplexity.window={text.window}")


def _check_need(x: Experiment, need: Need, tokenizer: Tokenizing) -> None:
    corpus = find(x.corpora, need.corpus)
    documents = corpus.documents(need.part)
    length = sum(map(len, documents)) + len(need.join) * max(len(documents) - 1, 0)
    if length >= LONG_TOKEN * need.tokens:
        return
    most = SLACK * (sum(len(text.encode()) for text in documents) + len(need.join.encode()) * len(documents))
    found = most if need.tokens > most else len(encode(documents, tokenizer(), join=need.join))
    if found < need.tokens:
        at_most = "at most " if found == most else ""
        raise ValueError(
            f"the {need.part} part of {need.corpus} has {at_most}{found:,} tokens, and {need.options} reads "
            f"{need.tokens:,} of it: lower them, or add corpora"
        )


def _check_special(x: Experiment, tokenizer: Tokenizing) -> None:
    """Refuse a special token that the tokenizer lacks; it is not loaded where none is asked for."""
    asked = []
    if x.reads_calibration and x.calibration.bos:
        asked.append(("calibration.bos=true", "bos"))
    if x.perplexity and x.perplexity.bos != "none":
        asked.append((f"evaluation.perplexity.bos={x.perplexity.bos}", "bos"))
    if x.recovery and isinstance(x.recovery.data, Instructions) and x.recovery.data.add_eos:
        asked.append(("recovery.data.add_eos=true", "eos"))
    for option, token in asked:
        if getattr(tokenizer(), f"{token}_token_id") is None:
            raise ValueError(
                f"{option}, but the tokenizer of {x.source.name} has no {token.upper()} token: leave it out"
            )
