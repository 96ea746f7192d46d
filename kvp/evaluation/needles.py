"""Retrieval from long texts: which of several numbers does a text say, after RULER (arXiv:2404.06654), offline.

`kvp.evaluation.haystacks` makes the texts from packaged sentences. A model chooses the number whose first token it
finds likeliest behind the question, in one forward pass; with a packed cache it reads what a decoder reads.

RULER lets the model write, and looks for the number. There a small model fails, however it was pruned. A choice has a
known chance, 1 / `choices`, so that losing something can be told from never having had it:

    bound    the least share of n answers that a guesser gets right with a probability of at most 5 % (binomial)

Below the bound an accuracy says nothing: tables have "at chance" there, and wherever the dense model is below it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from tqdm.auto import tqdm

from kvp.data.corpora import Corpus, Part, find
from kvp.data.tokens import digest
from kvp.evaluation.haystacks import Haystack, Sample, Task, make_riddle, sentences_of
from kvp.models.caches import stated
from kvp.options import options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEVEL = 0.05  # the probability at which guessing is ruled out
SHORTEST = 64  # tokens
DRAWS_CHECKED = 20  # texts per task and length, before anything is computed


@options
class Needles:
    """Accuracy of choices among numbers that long texts hide.

    | task        | what is hidden                                              |
    | ----------- | ----------------------------------------------------------- |
    | "single"    | one number                                                  |
    | "multikey"  | `choices` numbers, each of its own key                      |
    | "variables" | `choices` numbers, each handed on through `hops` variables  |
    """

    node: ClassVar[str] = "evaluation.needles"
    tasks: Sequence[Task] = Field(min_length=1, description="such as [single, multikey, variables]")
    lengths: Sequence[int | Literal["longest"]] = Field(
        min_length=1, description='tokens of a text with its question; "longest": all positions of the model'
    )
    samples: int = Field(default=50, ge=5, le=10_000, description="texts per task and length")
    choices: int = Field(default=4, ge=2, le=9, description="numbers to choose from")
    hops: int = Field(default=2, ge=1, le=64, description="variables that hand a number on")
    corpus: str = Field(default="squad", description="the corpus whose sentences stand around the needles")
    part: Part = Field(default="test", description="which of its documents")
    seed: int = Field(default=0, ge=0, description="of the draw of texts")

    def __post_init__(self) -> None:
        for length in self.lengths:
            if length != "longest" and length < SHORTEST:
                raise ValueError(
                    f"evaluation.needles.lengths must be >= {SHORTEST} tokens, got {length}: a question takes as many"
                )

    def check(self, corpora: Mapping[str, Corpus]) -> None:
        """Raise at once if the corpus is unknown or out of reach."""
        find(corpora, self.corpus).check(self.part)

    def check_lengths(self, tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
        """Raise at once if what is hidden takes more tokens than a text has; `positions` are those of the model.

        Raises:
            ValueError: So it does, or the tokenizer begins two numbers alike.
        """
        haystack = Haystack([], tokenizer)
        for task, length in product(self.tasks, self.lengths):
            tokens = positions if length == "longest" else length
            for draw in islice(self._draws(task, tokens), DRAWS_CHECKED):
                haystack.bare(make_riddle(task, self.choices, self.hops, draw), tokens)

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        corpus: Corpus,
        task: Task,
        length: int | Literal["longest"],
    ) -> dict[str, Any]:
        """Return the accuracy on `samples` texts of a task and length, its error, and the protocol.

        Raises:
            ValueError: The text is too short for what it hides, or the tokenizer begins two numbers alike.
            FloatingPointError: A logit is not finite.
        """
        tokens = model.config.max_position_embeddings if length == "longest" else length
        samples = self.texts(tokenizer, corpus, task, tokens)
        training = model.training
        model.eval()
        bar = tqdm(samples, desc=f"needles {task}", leave=False)
        right = [chosen(model, sample) == sample.answer for sample in bar]
        model.train(training)
        accuracy = sum(right) / len(right)
        return {
            "accuracy": accuracy,
            "stderr": math.sqrt(accuracy * (1 - accuracy) / (len(samples) - 1)),
            "chance": 1 / self.choices,
            "bound": bound(len(samples), 1 / self.choices),
            "n": len(samples),
            "tokens": sum(len(sample.ids) for sample in samples) / len(samples),
            "protocol": {
                "task": task,
                "length": tokens,
                "choices": self.choices,
                "hops": self.hops if task == "variables" else None,
                "corpus": corpus.identity(self.part),
                "part": self.part,
                "seed": self.seed,
            },
            "cache": stated(model.config),
            "data_hash": digest(torch.cat([sample.ids for sample in samples])),
        }

    def texts(
        self, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, task: Task, tokens: int
    ) -> list[Sample]:
        """Return the texts of a task, the same for the same seed."""
        haystack = Haystack(sentences_of(corpus.documents(self.part)), tokenizer)
        return [
            haystack.sample(make_riddle(task, self.choices, self.hops, draw), tokens, draw)
            for draw in self._draws(task, tokens)
        ]

    def _draws(self, task: Task, tokens: int) -> Iterator[Random]:
        return (Random(f"{self.seed} {task} {tokens} {number}") for number in range(self.samples))


def bound(n: int, chance: float) -> float:
    """Return the least share of n answers that a guesser gets right with a probability of at most `LEVEL`.

    Above 1 if even n right answers are likelier than that.
    """
    tail = 1.0  # the probability of `right` right answers or more
    for right in range(n + 1):
        if tail <= LEVEL:
            return right / n
        tail -= math.comb(n, right) * chance**right * (1 - chance) ** (n - right)
    return (n + 1) / n


@torch.inference_mode()
def chosen(model: PreTrainedModel, sample: Sample) -> int:
    """Return the index of the number whose first token the model finds likeliest.

    Raises:
        FloatingPointError: A logit is not finite.
    """
    read: dict[str, Any] = {"use_cache": False}
    if getattr(model.config, "kvp_cache", None) is not None:
        from kvp.models.one_pass import as_decoded

        read = as_decoded(model, len(sample.ids))
    logits = model(sample.ids[None].to(model.device), logits_to_keep=1, **read).logits[0, -1]
    among = logits[sample.choices.to(logits.device)].float()
    if not among.isfinite().all():
        raise FloatingPointError(
            f"a logit behind {len(sample.ids)} tokens is not finite: broken weights, or {model.dtype} overflows (try "
            "model.dtype=float32)"
        )
    return int(among.argmax())
