"""Negative log-likelihoods of a model's predictions, computed with few logits in float32 at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kvp.models.half import emulated, linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 512  # tokens whose logits are computed at once
WORDS = 2048  # words of the vocabulary at once; on a CPU a third faster than all, which overflow its cache


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
    return head_nll(head, hidden, targets)


def head_nll(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the NLL of what a head predicts, as `hidden_nll` does.

    Its gradient reaches the hidden states, not the head. It is made with the loss, so that no logits wait for it.
    """
    assert head.bias is None
    weight = head.weight.detach()
    pieces = zip(hidden.flatten(0, -2).split(ROWS), targets.flatten().split(ROWS), strict=True)
    return torch.cat([_NLL.apply(rows, weight, wanted) for rows, wanted in pieces]).view(targets.shape)


class _NLL(torch.autograd.Function):
    """(rows,) = log-sum-exp of all logits of hidden states (rows, hidden_size) minus the target's, in float32.

    Logits are made of a few words at a time. A running maximum keeps their sum of exponentials in range, and with it
    the sum of the words' vectors weighted by them, which is the gradient of the log-sum-exp:

        d NLL / d hidden = sum over words of softmax(logits)[word] * weight[word] - weight[target]
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows, wanted = len(hidden), ctx.needs_input_grad[0]
        highest = hidden.new_full((rows,), torch.finfo(torch.float32).min, dtype=torch.float32)
        total, chosen = torch.zeros_like(highest), torch.zeros_like(highest)
        weighted = torch.zeros_like(hidden, dtype=torch.float32) if wanted else None
        for number, words in enumerate(weight.split(WORDS)):
            logits = linear(hidden, words).float()
            place = targets - number * WORDS
            inside = (place >= 0) & (place < len(words))
            chosen += logits.gather(1, place.clamp(0, len(words) - 1)[:, None])[:, 0].where(inside, 0)
            before, highest = highest, torch.maximum(highest, logits.amax(1))
            shrunk, likely = (before - highest).exp_(), logits.sub_(highest[:, None]).exp_()
            total.mul_(shrunk).add_(likely.sum(1))
            if weighted is not None:
                weighted.mul_(shrunk[:, None]).add_(_product(likely, words))
            del logits, likely  # before the next ones are made
        if weighted is not None:
            weighted.div_(total[:, None]).sub_(weight[targets])
            ctx.save_for_backward(weighted.to(hidden.dtype))
        return highest + total.log() - chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weighted,) = ctx.saved_tensors
        return (gradients[0][:, None] * weighted).to(weighted.dtype), None, None


def _product(likely: Tensor, words: Tensor) -> Tensor:
    """Return float32 (rows, words) times 16 or 32 bits (words, hidden_size), as fast as the device multiplies."""
    return likely @ words.float() if emulated(words) else likely.to(words.dtype) @ words
