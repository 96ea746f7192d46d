"""Training examples as batches, and the loss on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from typing_extensions import override

from kvp.data.tokens import IGNORE
from kvp.models.nll import head_nll
from kvp.recovery.examples import Example


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return `input_ids` and `labels`, int64 of shape (examples, length of the longest in multiples of 8).

    The padding is on the right, where the causal mask hides it from every token that counts. The fast attention kernels
    apply because no attention mask is needed.
    """
    length = -8 * (-max(len(example["input_ids"]) for example in examples) // 8)
    fills = {"input_ids": 0, "labels": IGNORE}
    return {
        name: torch.tensor([e[name] + [fill] * (length - len(e[name])) for e in examples])
        for name, fill in fills.items()
    }


def lose_without_logits(model: PreTrainedModel) -> None:
    """Make a model's loss of its last hidden states, so that no batch of logits is held; a head that is trained stays.

    With large vocabularies logits and their gradients take more memory than all else of a training step.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.weight.requires_grad:
        return

    def loss(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> Tensor:
        """Return what transformers' loss of causal models does; `logits` are hidden states."""
        counted = labels[:, 1:] != IGNORE
        losses = head_nll(head, logits[:, :-1][counted], labels[:, 1:][counted])
        return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch

    model.set_output_embeddings(_Passed(head))
    model.loss_function = loss


class _Passed(nn.Module):
    """A head that hands on what it reads; its weight still moves with the model to a device."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


@torch.no_grad()
def mean_loss(model: torch.nn.Module, examples: Sequence[Example], batch_size: int) -> float:
    """Return the mean negative log-likelihood of the target tokens, in nats."""
    model.eval()
    device = next(model.parameters()).device
    total = targets = 0.0
    for start in tqdm(range(0, len(examples), batch_size), desc="validation", leave=False):
        batch = collate(examples[start : start + batch_size])
        count = (batch["labels"][:, 1:] != IGNORE).sum().item()
        total += model(**{name: ids.to(device) for name, ids in batch.items()}).loss.item() * count
        targets += count
    return total / targets
