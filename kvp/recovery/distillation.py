"""Distillation: the loss of a recovery also measures the distance of the model from its teacher, the dense model.

Hinton et al. (arXiv:1503.02531) compare logits at a temperature. TinyBERT (arXiv:1909.10351) compares hidden states
layer by layer; here the error is relative to the teacher's state, because a few states are a thousand times the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kvp.options import options

Part = Literal["text", "logits", "hidden"]
PARTS: tuple[Part, ...] = get_args(Part)
CHUNK = 128  # positions whose logits are in float32 at a time


@options
class Distillation:
    """The weights of the loss `text_weight` text + `logits_weight` logits + `hidden_weight` hidden.

    Each part is a mean over target tokens: text and logits (`divergence`) in nats, hidden (`hidden_error`) a fraction.
    """

    node: ClassVar[str] = "recovery.distillation"
    text_weight: float = Field(default=1.0, ge=0, description="it weighs the text's negative log-likelihood")
    logits_weight: float = Field(default=1.0, ge=0, description="it weighs the divergence of the logits")
    hidden_weight: float = Field(
        default=0.0, ge=0, description="it weighs the error of hidden states; the model must keep all layers"
    )
    temperature: float = Field(
        default=1.0, gt=0, description="it divides the logits; above 1, improbable tokens count for more"
    )

    def __post_init__(self) -> None:
        if not self.logits_weight + self.hidden_weight > 0:
            raise ValueError(
                "recovery.distillation.logits_weight or .hidden_weight must be > 0, got 0 and 0: nothing is learned "
                "from the dense model; raise one, or choose recovery/distillation=none"
            )

    def weight(self, part: Part) -> float:
        """Return the weight of a part of the loss."""
        return {"text": self.text_weight, "logits": self.logits_weight, "hidden": self.hidden_weight}[part]


def divergence(student: Tensor, teacher: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """Return `temperature`^2 KL(teacher || student), summed over the positions that count; nats, >= 0.

    The square keeps the gradient's size as the temperature rises. At most `CHUNK` positions are in float32 at a time,
    because the backward pass computes them again.

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
    # Hinton et al., section 2: both distributions at the temperature, the gradient scaled back by its square
    found, expected = ((logits.float() / temperature).log_softmax(-1) for logits in (student, teacher))
    nats = functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1)
    return temperature**2 * (nats * counts).sum()


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor], counts: Tensor) -> Tensor:
    """Return |student - teacher|^2 / |teacher|^2 of hidden states, as a mean over layers and a sum over tokens.

    Args:
        student: The hidden states after each layer, (sequences, tokens, hidden size).
        teacher: States of the same shapes, without a gradient.
        counts: Which positions count, (sequences, tokens), bool.

    Raises:
        ValueError: The two models differ in layers or hidden size.
    """
    widths = [[states.shape[-1] for states in model] for model in (student, teacher)]
    if widths[0] != widths[1]:
        pruned, dense = (f"{len(sizes)} layers of {max(sizes)} channels" for sizes in widths)
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
