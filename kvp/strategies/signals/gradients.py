"""Gradients, gate derivatives and activation norms of passes over calibration data.

All passes run the model's own forward with hooks. None calls a decoder layer by hand, so a change in the arguments
of a layer cannot silently change a number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from kvp.models.nll import next_token_nll
from kvp.models.spaces import Member, axis_sums, tokens_first

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Reduce = Callable[[Tensor, Tensor], Tensor]
Objective = Callable[["PreTrainedModel", Tensor], Tensor]

CHECKPOINTS = {  # what transformers' layers ask before they checkpoint
    "training": True,
    "gradient_checkpointing": True,
    "_gradient_checkpointing_func": partial(checkpoint, use_reentrant=False),
}


def mean_loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the mean loss of one batch, in nats per token."""
    return next_token_nll(model, input_ids=ids, labels=ids).mean()


def gradient_sums(
    model: PreTrainedModel,
    members: Sequence[Member],
    batches: Sequence[Tensor],
    reduce: Reduce,
    *,
    objective: Objective = mean_loss,
    gradient_checkpointing: bool = False,
) -> dict[tuple[str, int], Tensor]:
    """Return the sums of `reduce(weight, gradient)` per row (axis 0) or column (axis 1) of each member.

    The gradient is that of `objective(model, ids)` for one batch, by default of the mean loss (nats per
    token); results are averaged over the samples. Each gradient is reduced in float32 as soon as it is
    ready and freed, so that memory is weights + activations + one gradient.

    Raises:
        FloatingPointError: The loss or a score is not finite.
    """
    axes: dict[str, set[int]] = {}
    for member in members:
        axes.setdefault(member.name, set()).add(member.axis)
    sums: dict[tuple[str, int], Tensor] = {}
    samples = sum(map(len, batches))
    batch = 0  # samples of the batch at hand

    def collect(name: str) -> Callable[[nn.Parameter], None]:
        def hook(weight: nn.Parameter) -> None:
            with torch.no_grad():
                values = reduce(weight.float(), weight.grad.float())  # type: ignore[union-attr]
                for axis in axes[name]:
                    row = axis_sums(values, axis).cpu() / (samples / batch)
                    sums[name, axis] = sums[name, axis] + row if (name, axis) in sums else row
            weight.grad = None

        return hook

    with _only_gradients_of(model, axes, collect), _checkpointing(model, gradient_checkpointing):
        for number, ids in enumerate(tqdm(batches, desc="gradients", unit="batch")):
            ids, batch = ids.to(model.device), len(ids)
            with torch.enable_grad():
                loss = objective(model, ids)
                require_finite(loss, f"the calibration loss of batch {number}")
                loss.backward()
                del loss
    for (name, _), total in sums.items():
        require_finite(total.sum(), f"the score of {name}")
    return sums


def gate_derivatives(
    model: PreTrainedModel,
    members: Sequence[Member],
    batches: Sequence[Tensor],
    *,
    gradient_checkpointing: bool = False,
) -> dict[tuple[str, int], Tensor]:
    """Return (samples, channels) dL/dgate of each output (axis 0) or input (axis 1) channel of each member.

    L is a sample's mean loss in nats per token, and the gate scales the channel at all its tokens:
    dL/dgate = sum over tokens of activation times gradient. No weight needs a gradient.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    gates: dict[tuple[str, int], list[Tensor]] = defaultdict(list)

    def watch(key: tuple[str, int], activation: Tensor) -> None:
        values = activation.detach()  # a hook that held its own tensor would keep every batch's graph alive

        def hook(gradient: Tensor) -> None:
            moved = tokens_first(model.config, values.float() * gradient.float())
            gates[key].append(moved.sum(1).flatten(1).cpu())

        if activation.requires_grad:
            activation.register_hook(hook)

    def catch(key: tuple[str, int]) -> Callable[[Tensor, Tensor], None]:
        return lambda inputs, output: watch(key, inputs if key[1] else output)

    hooks = [(member.output, catch((member.name, member.axis))) for member in members]
    backward_by_sample(model, hooks, batches, "gates", gradient_checkpointing=gradient_checkpointing)
    return {key: torch.cat(samples) for key, samples in gates.items()}


def backward_by_sample(
    model: PreTrainedModel,
    hooks: Sequence[tuple[str, Callable[[Tensor, Tensor], None]]],
    batches: Sequence[Tensor],
    desc: str,
    *,
    gradient_checkpointing: bool = False,
) -> None:
    """Run one backward per batch of the *sum* of the samples' losses, so that no sample's gradient is scaled.

    A sample's loss is its mean in nats per token. No weight needs a gradient: what is wanted is taken by
    `hooks`, (name of a module, called with its input and output in the forward pass).

    Raises:
        FloatingPointError: The loss is not finite.
    """
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(_only_gradients_of(model, {}, lambda name: lambda weight: None))
        stack.enter_context(_checkpointing(model, gradient_checkpointing))
        embed = model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_(True))
        stack.callback(embed.remove)
        for name, hook in hooks:
            handle = model.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, hook=hook: hook(inputs[0], output)
            )
            stack.callback(handle.remove)
        for number, ids in enumerate(tqdm(batches, desc=desc, unit="batch")):
            ids = ids.to(model.device)
            losses = next_token_nll(model, input_ids=ids, labels=ids).mean(dim=1)
            require_finite(losses.sum(), f"the calibration loss of batch {number}")
            losses.sum().backward()
            del losses  # with what hooks hold, before the next pass


@contextmanager
def _only_gradients_of(
    model: PreTrainedModel,
    names: dict[str, set[int]],
    collect: Callable[[str], Callable[[nn.Parameter], None]],
) -> Iterator[None]:
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    handles = []
    for name in names:
        weight = model.get_parameter(f"{name}.weight")
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(collect(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)


@contextmanager
def _checkpointing(model: PreTrainedModel, enabled: bool) -> Iterator[None]:
    """Recompute the activations inside layers; leave the model as its user had it.

    transformers' own switch leaves hooks on the embeddings. A layer checkpoints in training mode only, but what is in
    it stays as it is, without dropout.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if enabled and isinstance(m, GradientCheckpointingLayer)]
    before = [{name: vars(layer)[name] for name in CHECKPOINTS if name in vars(layer)} for layer in layers]
    for layer in layers:
        vars(layer).update(CHECKPOINTS)
    try:
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name in CHECKPOINTS:
                vars(layer).pop(name, None)
            vars(layer).update(values)


def require_finite(value: Tensor, what: str) -> None:
    """Raise FloatingPointError, naming `what`, unless the scalar `value` is finite."""
    if not torch.isfinite(value):
        raise FloatingPointError(
            f"{what} is not finite: check the checkpoint, or score in float32 (model.dtype=float32)"
        )


def output_square_sums(
    model: PreTrainedModel, names: Sequence[str], batches: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the sum of squares over all calibration tokens, per output channel of each named module."""
    sums: dict[str, Tensor] = {}

    def collect(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            states = tokens_first(model.config, output)
            squares = states.float().pow(2).flatten(2).sum((0, 1)).cpu()
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    with ExitStack() as stack, torch.inference_mode():
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(collect(name))
            stack.callback(handle.remove)
        for ids in tqdm(batches, desc="activations", unit="batch"):
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
    return sums
