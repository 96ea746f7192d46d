"""Linear layers of a few rows, as a decode step has them, at the speed at which memory gives their weights.

`F.linear` with the eight rows of a batch reads weights at a fifth of the speed of memory on a CPU. The kernel
(`skinny_linear.cpp`) reads each weight once, where it lies, and multiplies it by all rows: 0.4 of the time at 8 rows,
0.7 at 64.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kvp.models.native import library

SOURCE = Path(__file__).with_suffix(".cpp")
MOST_ROWS = 64  # beyond it F.linear is about as fast

_OPS = torch.library.Library("kvp", "FRAGMENT")
_OPS.define("skinny_linear(Tensor states, Tensor weight, Tensor? bias) -> Tensor")


def buildable() -> bool:
    """Return whether there is a kernel; compiles it at the first call."""
    return library(SOURCE) is not None


def linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what `F.linear` returns, (..., outputs), of float32 on a CPU and at most `MOST_ROWS` rows (..., width)."""
    result: Tensor = torch.ops.kvp.skinny_linear(states, weight, bias)
    return result


def _on_cpu(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    built, (outputs, width) = library(SOURCE), weight.shape
    assert built is not None
    states, weight = states.contiguous(), weight.contiguous()
    output, rows = states.new_empty(*states.shape[:-1], outputs), states.numel() // width
    tensors = (states, weight, bias, output)
    built.kvp_linear_float32(
        *(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors),
        *(ctypes.c_int64(number) for number in (rows, width, outputs, torch.get_num_threads())),
    )
    return output


def _shape(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return states.new_empty(*states.shape[:-1], weight.shape[0])


_OPS.impl("skinny_linear", _on_cpu, "CPU")
torch.library.register_fake("kvp::skinny_linear", _shape, lib=_OPS)
