"""lm-eval's own model, but a context is read once for all its continuations.

A multiple-choice task asks for the log-likelihood of every option after the same prompt. lm-eval reads the prompt again
for each. Here a row holds the prompt and all options one after the other; a mask lets an option see the prompt and
itself, and its positions go on where the prompt ends. The numbers are the same but for rounding, and a task like
HellaSwag takes half of the arithmetic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from kvp.models.nll import token_nll

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, and tokens of context and continuation
Answer = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding would give the continuation


@dataclass(frozen=True)
class Row:
    """A context and what may follow it, in tokens.

    Attributes:
        context: The tokens that all continuations share.
        continuations: Each one's tokens; the last of them is only predicted.
        numbers: Which requests they answer.
    """

    context: list[int]
    continuations: list[list[int]]
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield where each continuation stands in the row, without its last token."""
        start = len(self.context)
        for tokens in self.continuations:
            yield start, (start := start + len(tokens) - 1)


class SharedContext(HFLM):
    """A model of lm-eval; `batch_size` counts contexts."""

    @override
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        longest = max((len(context) + len(tokens) for _, context, tokens in requests), default=0)
        if longest > self.max_length or not _takes_masks(self.model.config):
            whole: list[Answer] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return whole
        rows = sorted(_rows(requests), key=len, reverse=True)
        answers: dict[int, Answer] = {}
        for start in tqdm(range(0, len(rows), self.batch_size), desc="tasks", leave=False):
            answers |= _answers(self.model, rows[start : start + self.batch_size])
        return [answers[number] for number in range(len(requests))]


def _takes_masks(config: Any) -> bool:
    """Return whether a mask of our own says all of what a token sees: not with packed caches, or sliding windows."""
    packed = getattr(config, "kvp_cache", None) is not None
    return not packed and not any(transformers.DynamicCache(config=config).is_sliding)


def _rows(requests: Sequence[Request]) -> list[Row]:
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (_, context, _) in enumerate(requests):
        found[tuple(context)].append(number)
    return [
        Row(list(context), [requests[n][2] for n in numbers], numbers) for context, numbers in found.items()
    ]


@torch.inference_mode()
def _answers(model: Any, rows: Sequence[Row]) -> dict[int, Answer]:
    """Return the answers of some rows by the number of their request."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros_like(ids)
    seen = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself
    for row, (own_ids, own_positions, own_seen) in zip(
        rows, zip(ids, positions, seen, strict=True), strict=True
    ):
        first = len(row.context)
        own_ids[: len(row)] = torch.tensor([*row.context, *(t for c in row.continuations for t in c[:-1])])
        own_positions[:first], own_seen[:first, :first] = torch.arange(first), torch.ones(first, first).tril()
        for start, stop in row.spans():
            own_positions[start:stop] = first + torch.arange(stop - start)
            own_seen[start:stop, :first] = True
            own_seen[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril()
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill_(~seen, torch.finfo(model.dtype).min)
    read = {"input_ids": ids, "position_ids": positions, "attention_mask": mask[:, None]}
    on_device = {name: tensor.to(model.device) for name, tensor in read.items()}
    hidden = model.base_model(use_cache=False, **on_device).last_hidden_state
    return _scored(model, hidden, rows)


def _scored(model: Any, hidden: Tensor, rows: Sequence[Row]) -> dict[int, Answer]:
    """Return the answers from the hidden states (rows, tokens, hidden_size); only those that predict get logits."""
    at, targets, sizes, numbers = [], [], [], []
    for index, row in enumerate(rows):
        for number, tokens, (start, stop) in zip(row.numbers, row.continuations, row.spans(), strict=True):
            at += [(index, place) for place in (len(row.context) - 1, *range(start, stop))]
            targets += tokens
            sizes.append(len(tokens))
            numbers.append(number)
    logits = model.get_output_embeddings()(hidden[tuple(torch.tensor(at, device=hidden.device).T)])
    wanted = torch.tensor(targets, device=hidden.device)
    nll, greedy = token_nll(logits, wanted), logits.argmax(-1) == wanted
    return {
        number: (-own.sum().item(), bool(hit.all()))
        for number, own, hit in zip(numbers, nll.split(sizes), greedy.split(sizes), strict=True)
    }
