"""Answer of a model to a short text, which an export carries with it for checks in any engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kvp.models.rope import switches

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS, NEW_TOKENS = 96, 16
BEYOND, LONGEST = (
    32,
    1024,
)  # tokens read past a sliding window; a window that needs more is compared by the configs
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
        passages: First position and log-probabilities of the beginning of the text, read so that it ends below, at and
            above each length at which the frequencies change.
    """

    text: str
    ids: list[int]
    logprobs: list[float]
    greedy: list[int]
    margins: list[float]
    passages: list[tuple[int, list[float]]] = field(default_factory=list)

    def stored(self) -> dict[str, Any]:
        """Return the sample as `serving.json` holds it."""
        return asdict(self)


def require_positions(config: PretrainedConfig) -> None:
    """Refuse a model that is too short for any proof.

    Raises:
        ValueError: Names the bound.
    """
    if config.max_position_embeddings < (least := NEW_TOKENS + 2):
        raise ValueError(
            f"max_position_embeddings must be >= {least} to prove an export, got {config.max_position_embeddings}"
        )


@torch.no_grad()
def make_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Sample, torch.Tensor]:
    """Return the sample of a model on the CPU, and the logits (tokens, vocabulary)."""
    text, ids = _text(model.config, tokenizer)
    output = model(torch.tensor([ids]), use_cache=True)
    logits, cache = output.logits[0].float(), output.past_key_values
    greedy, margins, last = [], [], logits[-1]
    for _ in range(NEW_TOKENS):
        best, second = last.topk(2).values.tolist()
        greedy.append(int(last.argmax()))
        margins.append(best - second)
        step = model(torch.tensor([greedy[-1:]]), past_key_values=cache, use_cache=True)
        cache, last = step.past_key_values, step.logits[0, -1].float()
    passages = []
    for start, count in _passages(model.config, len(ids)):
        positions = torch.arange(start, start + count)[None]
        there = model(torch.tensor([ids[:count]]), position_ids=positions, use_cache=False).logits[0].float()
        passages.append((start, token_logprobs(there, ids[:count])))
    sample = Sample(
        text=text,
        ids=ids,
        logprobs=token_logprobs(logits, ids),
        greedy=greedy,
        margins=margins,
        passages=passages,
    )
    return sample, logits


def _text(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """Return the text and its first tokens; it is longer than a sliding window, where that is short enough."""
    longest, possible = MAX_TOKENS, config.max_position_embeddings - NEW_TOKENS
    window = getattr(config, "sliding_window", None)
    if window is not None and window + BEYOND <= LONGEST:
        longest = max(longest, window + BEYOND)
    longest, text = min(longest, possible), TEXT
    while len(ids := tokenizer(text).input_ids) < longest:
        text += "\n" + TEXT
    return text, ids[:longest]


def _passages(config: PretrainedConfig, tokens: int) -> list[tuple[int, int]]:
    """Return first position and number of tokens of texts that end at a switch, one past it, and well beyond it."""
    ends = [end for length in switches(config) for end in (length, length + 1, 2 * length)]
    return [(max(0, end - tokens), min(end, tokens)) for end in ends if end > 1]


def token_logprobs(logits: torch.Tensor, ids: list[int]) -> list[float]:
    """Return the log-probabilities in nats of all tokens but the first, from logits (tokens, vocabulary)."""
    logprobs = logits[:-1].double().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
