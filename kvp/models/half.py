"""Linear layers of 16 bits on a CPU without arithmetic for them: products in float32, a few rows of a matrix at a time.

Such a CPU emulates them. A forward product then takes five times as long as in float32, and the gradient of its input
hundreds of times: torch has no fast kernel for it. Here a block of the matrix is widened, multiplied in float32 and
dropped. The product is rounded once, as by hardware, and once more with a bias. Weights and states stay in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

Model = TypeVar("Model", bound=nn.Module)

BLOCK = 2**20  # numbers that are widened at a time: 4 MiB, which stay in a cache
FEW = 8  # rows; fewer are bound by reading the matrix, which torch does at once


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `F.linear` returns, in the same dtype; on a CPU without arithmetic for it, by products in float32.

    Args:
        states: (..., width).
        weight: (outputs, width).
        bias: (outputs,) or None.
    """
    if not emulated(weight) or states.shape[:-1].numel() < FEW:
        return F.linear(states, weight, bias)
    output: Tensor = _Widened.apply(states, weight)
    return output if bias is None else output + bias


def emulated(weight: Tensor) -> bool:
    """Return whether a product with this matrix has to be emulated where it lies."""
    return weight.device.type == "cpu" and weight.dtype.itemsize == 2 and not in_hardware(weight.dtype)


@cache
def in_hardware(dtype: torch.dtype) -> bool:
    """Return whether this CPU multiplies in a dtype of 16 bits."""
    # private, because the public torch.cpu.get_capabilities() is newer than the oldest torch that pyproject allows
    names = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    return any(getattr(torch.cpu, name, bool)() for name in names[dtype])


class HalfLinear(nn.Linear):
    """A linear layer that computes so wherever its weight is."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def widened(model: Model) -> Model:
    """Return a model whose linear layers compute so, with the same parameters."""
    for module in model.modules():
        if type(module) is nn.Linear and emulated(module.weight):
            module.__class__ = HalfLinear
    return model


class _Widened(torch.autograd.Function):
    """(..., outputs) = states (..., width) times a matrix (outputs, width), transposed."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states if ctx.needs_input_grad[1] else None, weight)
        wide, output = states.float(), states.new_empty(*states.shape[:-1], len(weight))
        for place, rows in _blocks(weight):
            output[..., place] = F.linear(wide, rows)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,), (states, weight) = gradients, ctx.saved_tensors
        wide = gradient.flatten(0, -2).float()
        of_states = of_weight = None
        if ctx.needs_input_grad[0]:
            sums = wide.new_zeros(len(wide), weight.shape[1])
            for place, rows in _blocks(weight):
                sums.addmm_(wide[:, place], rows)
            of_states = sums.to(gradient.dtype).view(*gradient.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            of_weight = (wide.T @ states.flatten(0, -2).float()).to(weight.dtype)
        return of_states, of_weight


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of a matrix in float32, and where they lie; each block takes the place of the one before."""
    count = max(1, BLOCK // weight.shape[1])
    held = torch.empty(min(count, len(weight)), weight.shape[1])
    for start in range(0, len(weight), count):
        rows = weight[start : start + count]
        yield slice(start, start + count), held[: len(rows)].copy_(rows)
