"""Decode by kernels that are compiled for this CPU: linear layers and attention read weights and cache once.

`F.linear` with a few rows reads weights at a fraction of the speed of memory, and so does torch's attention of one
query per head. `kvp.models.skinny_linear` does not, nor does the kernel of `kvp.models.sparse_attention`, here over a
cache without a sparse part. The prompt is read as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvp.measurement.grouped import grouped
from kvp.models import skinny_linear, sparse_attention
from kvp.models.decode_layers import LANES

NATIVE = "kvp_native"
ATTEND = "attend_whole"  # the operator, in torch.ops.kvp

_OPS = torch.library.Library("kvp", "FRAGMENT")
_OPS.define(f"{ATTEND}(Tensor query, Tensor key, Tensor value, Tensor? mask, float scaling) -> Tensor")


def check_native(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a model whose step these kernels do not compute.

    Raises:
        ValueError: It is on a GPU, its dtype is not float32, or there is no compiler.
    """
    if device.type != "cpu" or dtype != torch.float32:
        raise ValueError(
            f"path native computes in float32 on a CPU; got {dtype} on device {device}: use --dtype float32, or "
            "--path static"
        )
    if not available(device, dtype):
        raise ValueError(
            "path native needs a C++ compiler, and none built its kernels: install g++ or set CXX, or use --path "
            "static"
        )


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels compute a model of this dtype on this device; compiles them at the first call."""
    serves = device.type == "cpu" and dtype == torch.float32
    return serves and skinny_linear.buildable() and sparse_attention.readable(device, dtype)


class NativeLinears:
    """The linear modules of a model, which read few rows by the kernel and more as before."""

    def __init__(self, model: PreTrainedModel) -> None:
        modules = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self._forwards = [
            (module, partial(_linear, module)) for module in modules
        ]  # a compiler knows them again

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the modules compute so, in inference mode."""
        for module, forward in self._forwards:
            module.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module, _ in self._forwards:
                del module.forward


def _linear(module: nn.Linear, states: Tensor) -> Tensor:
    if states.shape[:-1].numel() > skinny_linear.MOST_ROWS:
        return F.linear(states, module.weight, module.bias)
    return skinny_linear.linear(states, module.weight, module.bias)


def native(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(batch, 1, heads, v_head_dim): all heads of a group read a key or value together, once."""
    if query.shape[2] > 1 or key.shape[-1] % LANES or value.shape[-1] % LANES:
        return grouped(module, query, key, value, attention_mask, scaling, **kwargs)
    mask = None if attention_mask is None else attention_mask[:, 0, 0]
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: Tensor = torch.ops.kvp.attend_whole(query, key, value, mask, factor)
    return output, None


def _attend_whole(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    return sparse_attention.attend(query[:, :, 0], [], key, value, mask, scaling)[:, None]


def _shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[-1])


_OPS.impl(ATTEND, _attend_whole, "CPU")
torch.library.register_fake(f"kvp::{ATTEND}", _shape, lib=_OPS)
AttentionInterface.register(NATIVE, native)
AttentionMaskInterface.register(NATIVE, sdpa_mask)
