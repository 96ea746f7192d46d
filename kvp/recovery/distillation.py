"""Distillation: the loss of a recovery also measures how far the model is from its teacher, the dense model.

Logits and temperature are those of Hinton et al. (arXiv:1503.02531). Hidden states are compared layer by layer as
TinyBERT does (arXiv:1909.10351), here relative to the teacher's, for a few of them are a thousand times the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Part = Literal["text", "logits", "hidden"]
PARTS: tuple[Part, ...] = get_args(Part)
CHUNK = 128  # positions whose logits are in float32 at a time


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Minimises `text_weight` text + `logits_weight` logits + `hidden_weight` hidden, each a mean over target tokens.

    Attributes:
        text_weight: Of the negative log-likelihood of the text, in nats.
        logits_weight: Of `divergence`, in nats.
        hidden_weight: Of `hidden_error`, a fraction; for models that keep every layer and their hidden size.
        temperature: Divides the logits of both models; above 1, improbable tokens count for more.
    """

    text_weight: float = 1.0
    logits_weight: float = 1.0
    hidden_weight: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for part in PARTS:
            if not 0 <= self.weight(part) < float("inf"):
                raise ValueError(f"{part}_weight must be >= 0, got {self.weight(part)}")
        if not self.logits_weight + self.hidden_weight > 0:
            raise ValueError(
                "logits_weight and hidden_weight are 0, so nothing is learned from the dense model: raise one, or "
                "choose recovery/distillation=none"
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be > 0, got {self.temperature}: it divides the logits")

    def weight(self, part: Part) -> float:
        """Of a part of the loss."""
        return {"text": self.text_weight, "logits": self.logits_weight, "hidden": self.hidden_weight}[part]


def divergence(student: Tensor, teacher: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """`temperature`^2 KL(teacher || student), summed over the positions that count; nats, >= 0.

    The square keeps the gradient's size as the temperature rises. No more than `CHUNK` positions are in float32 at
    a time, for the backward pass computes them again.

    Args:
        student: Logits, (sequences, tokens, vocabulary).
        teacher: Logits of the same shape, without a gradient.
        counts: Which positions count, (sequences, tokens), bool.
        temperature: Divides both logits.
    """
    chunks = zip(
        student.flatten(0, 1).split(CHUNK),
        teacher.flatten(0, 1).split(CHUNK),
        counts.flatten().split(CHUNK),
        strict=True,
    )
    return torch.stack(
        [
            checkpoint(_divergence, *chunk, temperature, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
    ).sum()


def _divergence(student: Tensor, teacher: Tensor, counts: Tensor, temperature: float) -> Tensor:
    found, expected = ((logits.float() / temperature).log_softmax(-1) for logits in (student, teacher))
    nats = functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1)
    return temperature**2 * (nats * counts).sum()


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor], counts: Tensor) -> Tensor:
    """|student - teacher|^2 / |teacher|^2 of a token's hidden state, its mean over layers, summed over tokens.

    Args:
        student: The hidden states after each layer, (sequences, tokens, hidden size).
        teacher: The same, without a gradient.
        counts: Which positions count, (sequences, tokens), bool.

    Raises:
        ValueError: They are not the states of as many layers of one size.
    """
    widths = [[states.shape[-1] for states in model] for model in (student, teacher)]
    if widths[0] != widths[1]:
        pruned, dense = (f"{len(its)} layers of {max(its)} channels" for its in widths)
        raise ValueError(
            f"recovery.distillation.hidden_weight compares hidden states layer by layer: the pruned model has "
            f"{pruned}, the dense one {dense}. Set it to 0"
        )
    errors = [
        (
            (found.float() - expected.float()).square().sum(-1) / expected.float().square().sum(-1) * counts
        ).sum()
        for found, expected in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()
