"""Bytes of LoRA training: frozen weights, adapter, what the backward pass waits for, and the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvp.estimate.kept import Adapter, until_backward
from kvp.estimate.passes import FLOAT32, Parts, loss_bytes, weights_bytes, with_total

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ADAM = 4  # numbers in float32 per trained parameter: itself, its gradient and AdamW's two moments
HEAD = "lm_head"  # an update of it needs the logits
LOSS = 3  # copies of logits in float32 when their loss goes backward: log-softmax, its gradient, theirs


def training_bytes(
    config: PretrainedConfig,
    *,
    batch_size: int,
    length: int,
    width: int,
    adapter: Adapter,
    checkpointing: bool = False,
    teacher: PretrainedConfig | None = None,
) -> Parts:
    """Return the peak of a step: weights, adapter, activations, logits, teacher, total.

    Args:
        config: The config of the model that is trained.
        batch_size: Examples per pass.
        length: Tokens of an example.
        width: Bytes of a number of the frozen model's dtype.
        adapter: The update.
        checkpointing: Whether layers are computed again in the backward pass.
        teacher: The dense model, whose weights and logits are held too.
    """
    tokens = batch_size * length
    logits = LOSS * FLOAT32 * tokens * config.vocab_size
    passed = until_backward(
        config,
        tokens=tokens,
        width=width,
        checkpointing=checkpointing,
        loss=logits if teacher or HEAD in adapter.modules else loss_bytes(config, tokens=tokens, width=width),
        adapter=adapter,
    )
    parts = {
        "weights": weights_bytes(config, width),
        "adapter": ADAM * FLOAT32 * adapter.params(config),
        **passed,
    }
    if teacher is not None:
        # the logits of both models, and the gradient of the student's, which two parts of the loss add up
        parts["teacher"] = weights_bytes(teacher, width) + 3 * width * tokens * config.vocab_size
    return with_total(parts)
