"""Answer of a model to a short text, which an export carries with it for checks in any engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS, NEW_TOKENS = 96, 16
TEXT = """In 1969, on the 20th of July, two people walked on another world; 600 million watched. "That's one \
small step," said the first of them.

Don't forget:
\t1. the cache holds 23,040 bytes per token (3 heads x 64 channels x 30 layers);
\t2. naïve readers, like Zoë and Søren, expected 1048576.

So the question is how much of it"""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text and a model's answer, in float32.

    Attributes:
        text: What was read.
        ids: Its first tokens, as the checkpoint's tokenizer makes them.
        logprobs: Nats, of every token but the first.
        greedy: The tokens that follow greedily; the end of the text does not stop it.
        margins: How far the logit of each lies above the next best: whoever is no more exact than that may differ.
    """

    text: str
    ids: list[int]
    logprobs: list[float]
    greedy: list[int]
    margins: list[float]

    def stored(self) -> dict[str, Any]:
        """Return the sample as `serving.json` holds it."""
        return asdict(self)


@torch.no_grad()
def make_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Sample, torch.Tensor]:
    """Return the sample of a model on the CPU, and the logits (tokens, vocabulary)."""
    longest = min(MAX_TOKENS, model.config.max_position_embeddings - NEW_TOKENS)
    ids = tokenizer(TEXT).input_ids[:longest]
    output = model(torch.tensor([ids]), use_cache=True)
    logits, cache = output.logits[0].float(), output.past_key_values
    greedy, margins, last = [], [], logits[-1]
    for _ in range(NEW_TOKENS):
        best, second = last.topk(2).values.tolist()
        greedy.append(int(last.argmax()))
        margins.append(best - second)
        step = model(torch.tensor([greedy[-1:]]), past_key_values=cache, use_cache=True)
        cache, last = step.past_key_values, step.logits[0, -1].float()
    sample = Sample(text=TEXT, ids=ids, logprobs=token_logprobs(logits, ids), greedy=greedy, margins=margins)
    return sample, logits


def token_logprobs(logits: torch.Tensor, ids: list[int]) -> list[float]:
    """Return the log-probabilities in nats of all tokens but the first, from logits (tokens, vocabulary)."""
    logprobs = logits[:-1].double().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
