"""Negative log-likelihoods of a model's predictions, computed with few logits in float32 at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvp.models.half import linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 512  # tokens whose logits are computed at once
WORDS = 4096  # words of the vocabulary at once; on a CPU a third faster than all, which overflow its cache


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target in nats, in float32 whatever the dtype of `logits`.

    `logits` is (..., vocab); `targets` and the result are (...).
    """
    chunks = zip(logits.flatten(0, -2).split(ROWS), targets.flatten().split(ROWS), strict=True)
    return torch.cat([F.cross_entropy(x.float(), y, reduction="none") for x, y in chunks]).view(targets.shape)


def next_token_nll(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Return negative log-likelihoods in nats, (batch, seq_len - 1), without holding all logits at once.

    Pass `labels` (batch, seq_len) and either `input_ids` or `inputs_embeds`.
    """
    labels = inputs.pop("labels")
    hidden = model.base_model(use_cache=False, **inputs).last_hidden_state
    return hidden_nll(model, hidden[:, :-1], labels[:, 1:])


def hidden_nll(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the NLL of what last hidden states (..., hidden_size) predict, in nats, in the shape of `targets`."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    pieces = zip(hidden.flatten(0, -2).split(ROWS), targets.flatten().split(ROWS), strict=True)
    return torch.cat([_nll(rows, head, wanted) for rows, wanted in pieces]).view(targets.shape)


def _nll(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Return the NLL of each hidden state (rows, hidden_size): log-sum-exp of all logits minus the target's."""
    assert head.bias is None
    sums, chosen = [], torch.zeros(len(targets), device=hidden.device)
    for number, weight in enumerate(head.weight.split(WORDS)):
        logits = linear(hidden, weight).float()
        sums.append(logits.logsumexp(dim=1))
        place = targets - number * WORDS
        inside = (place >= 0) & (place < len(weight))
        logit = logits.gather(1, place.clamp(0, len(weight) - 1)[:, None])[:, 0]
        chosen = chosen + logit.where(inside, 0)
    return torch.stack(sums).logsumexp(dim=0) - chosen
