"""Second-order signals: the diagonal Fisher of weights, without a copy of the gradients per sample.

A sample's gradient of a linear map y = x W^T is the product of two thin matrices, (dL/dy)^T x with a row
per token. So one backward pass of a batch gives every sample's own gradient of one matrix at a time, in
float32 (in float16 its square would vanish), reduced as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvp.models.spaces import Member
from kvp.strategies.signals.gradients import backward_by_sample, require_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FisherReduce = Callable[[Tensor, Tensor, Tensor], Tensor]


def mean_root_fisher(
    model: PreTrainedModel,
    names: Sequence[str],
    batches: Sequence[Tensor],
    *,
    gradient_checkpointing: bool = False,
) -> dict[str, float]:
    """Return, per named matrix, the mean over its entries of the root of their Fisher information.

    That of an entry is the mean over samples of the squared gradient of a sample's mean loss, nats per token. Held at
    once beside the activations: a float32 copy of all these matrices, and of one sample's gradient of one.

    Raises:
        FloatingPointError: The loss or a sum is not finite.
    """
    squares = {
        name: torch.zeros_like(model.get_parameter(f"{name}.weight"), dtype=torch.float32) for name in names
    }

    def collect(name: str, inputs: Tensor, output: Tensor) -> None:
        @torch.no_grad()
        def hook(gradients: Tensor) -> None:
            for derivatives, rows in zip(gradients, inputs, strict=True):
                squares[name].add_((derivatives.float().T @ rows.float()).square_())

        if output.requires_grad:
            output.register_hook(hook)

    hooks = [(name, lambda x, y, name=name: collect(name, x.detach(), y)) for name in names]
    backward_by_sample(model, hooks, batches, "fisher", gradient_checkpointing=gradient_checkpointing)
    samples = sum(map(len, batches))
    means = {name: (total / samples).sqrt().mean() for name, total in squares.items()}
    for name, mean in means.items():
        require_finite(mean, f"the Fisher information of {name}")
    return {name: mean.item() for name, mean in means.items()}


def fisher_sums(
    model: PreTrainedModel,
    members: Sequence[Member],
    batches: Sequence[Tensor],
    reduce: FisherReduce,
    *,
    gradient_checkpointing: bool = False,
) -> dict[tuple[str, int], Tensor]:
    """Return the sums of `reduce(weight, gradient, fisher)` per row (axis 0) or column (axis 1) of each member.

    The gradient is that of a batch's mean loss (nats per token), fisher the mean over its samples of their
    squared gradients; both have the weight's shape, and so has the result, or (..., *shape) for several sums
    at once. Results are averaged over the batches, by their samples. Held at once: weights, activations, the
    inputs of the members and four float32 copies of the largest.

    Raises:
        FloatingPointError: The loss or a score is not finite.
    """
    axes: dict[str, set[int]] = {}
    for member in members:
        axes.setdefault(member.name, set()).add(member.axis)
    num_samples = sum(map(len, batches))
    sums: dict[tuple[str, int], Tensor] = {}

    def collect(name: str, inputs: Tensor, output: Tensor) -> None:
        @torch.no_grad()
        def hook(gradients: Tensor) -> None:
            weight = model.get_parameter(f"{name}.weight").float()
            gradient, fisher = torch.zeros_like(weight), torch.zeros_like(weight)
            for derivatives, rows in zip(gradients, inputs, strict=True):
                sample = derivatives.float().T @ rows.float()
                gradient.add_(sample, alpha=1 / len(inputs))
                fisher.addcmul_(sample, sample, value=1 / len(inputs))
            values = reduce(weight, gradient, fisher)
            for axis in axes[name]:
                row = values.sum(-1 - axis).cpu() * (len(inputs) / num_samples)
                sums[name, axis] = sums[name, axis] + row if (name, axis) in sums else row

        if output.requires_grad:
            output.register_hook(hook)

    hooks = [(name, lambda x, y, name=name: collect(name, x.detach(), y)) for name in axes]
    backward_by_sample(model, hooks, batches, "fisher", gradient_checkpointing=gradient_checkpointing)
    for (name, _), total in sums.items():
        require_finite(total.sum(), f"the score of {name}")
    return sums
