"""Texts with something to find: numbers and variables among the sentences of a corpus, after RULER (arXiv:2404.06654).

| task      | what the text holds                                      | what is asked for                           |
| --------- | -------------------------------------------------------- | ------------------------------------------- |
| single    | the number of one key                                    | it                                          |
| multikey  | the numbers of `choices` keys                            | that of one key                             |
| variables | `choices` chains: a number, handed on by `hops` variables | the number of the last variable of a chain  |

An answer is one of `choices` numbers, and their first digits differ. In `single` the others stand nowhere in the text.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, Literal

from torch import Tensor, tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Task = Literal["single", "multikey", "variables"]

DIGITS = 6  # of a number
LETTERS = 5  # of a variable
KEYS = (
    *("anchor", "basket", "candle", "desert", "engine", "forest", "garden", "hammer", "island", "jacket"),
    *("kettle", "ladder", "mirror", "needle", "orange", "pencil", "quarry", "ribbon", "saddle", "tunnel"),
)
END = re.compile(r"(?<=[.!?])\s+")  # of a sentence


@dataclass(frozen=True)
class Riddle:
    """Hold what is hidden in a text, and the question behind it.

    Attributes:
        opening: Says what to look for.
        needles: Sentences, in the order in which they stand in the text.
        question: Ends where the number follows.
        numbers: The numbers to choose from.
        answer: The index of the right one.
    """

    opening: str
    needles: tuple[str, ...]
    question: str
    numbers: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Sample:
    """Hold a text in tokens, and the tokens that begin the numbers to choose from.

    Attributes:
        ids: (tokens,) up to where the numbers differ.
        choices: (choices,) the next token of each number.
        answer: The index of the right one.
    """

    ids: Tensor
    choices: Tensor
    answer: int


def make_riddle(task: Task, choices: int, hops: int, draw: Random) -> Riddle:
    """Return what is hidden and asked for."""
    first = draw.sample(string.digits[1:], choices)
    numbers = tuple(digit + "".join(draw.choices(string.digits, k=DIGITS - 1)) for digit in first)
    answer = draw.randrange(choices)
    if task == "variables":
        names = iter(_names((hops + 1) * choices, draw))
        chains = [[next(names) for _ in range(hops + 1)] for _ in numbers]
        statements = [
            [f"VAR {chain[0]} = {number}."] + [f"VAR {new} = VAR {old}." for old, new in pairwise(chain)]
            for chain, number in zip(chains, numbers, strict=True)
        ]
        last = chains[answer][-1]
        return Riddle(
            "Remember the assignments of variables that are hidden in the following text.",
            tuple(_interleaved(statements, draw)),
            f"Question: which number does the variable {last} hold? Answer: the variable {last} holds the number",
            numbers,
            answer,
        )
    keys = draw.sample(KEYS, choices)
    hidden = [f"The special magic number for {key} is: {n}." for key, n in zip(keys, numbers, strict=True)]
    needles = [hidden[answer]] if task == "single" else draw.sample(hidden, choices)
    return Riddle(
        "Remember the special magic numbers that are hidden in the following text.",
        tuple(needles),
        f"Question: what is the special magic number for {keys[answer]} in the text? "
        f"Answer: the special magic number for {keys[answer]} is:",
        numbers,
        answer,
    )


def _names(count: int, draw: Random) -> list[str]:
    """Return different variables."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(draw.choices(string.ascii_uppercase, k=LETTERS))] = None
    return list(names)


def _interleaved(chains: Sequence[Sequence[str]], draw: Random) -> list[str]:
    """Return the statements of all chains in a random order that keeps that of each chain."""
    turns = [n for n, chain in enumerate(chains) for _ in chain]
    draw.shuffle(turns)
    left = [iter(chain) for chain in chains]
    return [next(left[n]) for n in turns]


def sentences_of(documents: Sequence[str]) -> list[str]:
    """Return the sentences of a corpus in order, without line breaks."""
    return [" ".join(part.split()) for document in documents for part in END.split(document) if part.strip()]


class Haystack:
    """The sentences of a corpus, and how many tokens each takes."""

    def __init__(self, sentences: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.sentences, self.tokenizer = sentences, tokenizer
        self._counts: dict[int, int] = {}

    def sample(self, riddle: Riddle, length: int, draw: Random) -> Sample:
        """Return a text of at most `length` tokens, its question included, as near to them as sentences allow.

        Raises:
            ValueError: What is hidden alone takes more, or the tokenizer begins two numbers alike.
        """
        bare = self.bare(riddle, length)
        start, around = draw.randrange(len(self.sentences)), list[str]()
        for step in range(length):  # no sentence takes less than a token
            place = (start + step) % len(self.sentences)
            bare += self._count(place)
            if bare > length:
                break
            around.append(self.sentences[place])
        while True:
            places = sorted(draw.choices(range(len(around) + 1), k=len(riddle.needles)))
            parts = list(around)
            for shift, (place, needle) in enumerate(zip(places, riddle.needles, strict=True)):
                parts.insert(place + shift, needle)
            text = self._text(riddle, parts)
            if len(self._ids(text)) <= length:
                return self._split(text, riddle)
            around.pop()

    def bare(self, riddle: Riddle, length: int) -> int:
        """Return how many tokens the needles and the question take alone.

        Raises:
            ValueError: They are more than `length`, or the tokenizer begins two numbers alike.
        """
        text = self._text(riddle, riddle.needles)
        if (tokens := len(self._ids(text))) > length:
            raise ValueError(
                f"evaluation.needles.lengths must be >= {tokens} for what this model's tokenizer makes of the needles "
                f"and the question alone, got {length}: lower choices or hops"
            )
        self._split(text, riddle)
        return tokens

    def _text(self, riddle: Riddle, parts: Sequence[str]) -> str:
        return f"{riddle.opening}\n\n{' '.join(parts)}\n\n{riddle.question}"

    def _count(self, place: int) -> int:
        if place not in self._counts:
            found = self.tokenizer(f" {self.sentences[place]}", add_special_tokens=False, verbose=False)
            self._counts[place] = len(found["input_ids"])
        return self._counts[place]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, verbose=False)["input_ids"]

    def _split(self, text: str, riddle: Riddle) -> Sample:
        """Return the tokens that all numbers share as continuations of the text, and the next one of each."""
        rows = [self._ids(f"{text} {number}") for number in riddle.numbers]
        shared = next((n for n, same in enumerate(zip(*rows, strict=False)) if len({*same}) > 1), 0)
        choices = [row[shared] for row in rows]
        if len({*choices}) < len(choices):
            raise ValueError(
                f"the tokenizer begins two of the numbers {', '.join(riddle.numbers)} with one token, so no choice "
                "among them can be read: evaluation.needles needs another tokenizer"
            )
        return Sample(tensor(rows[0][:shared]), tensor(choices), riddle.answer)
