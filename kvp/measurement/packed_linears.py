"""The matrices of a model as oneDNN wants them for a few rows at a time, beside those that the model has.

`F.linear` with the rows of a decode step reads weights at a sixth of the speed of a copy on a CPU. oneDNN reads weights
that it has laid out for so many rows in about half of the time. The layout is a copy: the prompt is read with the
model's own matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def check_packing(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse matrices that oneDNN does not lay out.

    Raises:
        ValueError: They are on a GPU, torch has no oneDNN, or the CPU does not compute in the dtype.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise ValueError(f"path packed needs oneDNN, on a CPU; got device {device}: use --path static")
    if dtype != torch.float32 and not _computes_in(dtype):
        raise ValueError(
            f"path packed needs a dtype that oneDNN computes in on this CPU, got {dtype}: use --dtype float32, or "
            "--path static"
        )


def _computes_in(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedLinears:
    """Every linear module of a model, laid out for `rows` rows of input."""

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        check_packing(model.device, model.dtype)
        layout = torch.ops.mkldnn._reorder_linear_weight
        self._forwards = [
            (module, partial(_linear, weight=layout(module.weight.detach(), rows), bias=module.bias))
            for module in model.modules()
            if isinstance(module, nn.Linear)
        ]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the modules compute with the laid-out matrices, in inference mode."""
        for module, forward in self._forwards:
            module.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module, _ in self._forwards:
                del module.forward


def _linear(states: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return result
