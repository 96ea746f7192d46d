"""Training examples as batches, and the loss on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from kvp.data.tokens import IGNORE
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
