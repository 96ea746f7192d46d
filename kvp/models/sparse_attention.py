"""Attention of one query step that reads a sparse cache as it is stored: kept values and a bitmap, nothing expanded.

    scores = scaling * query . keys + mask       output = softmax(scores) . values

The query heads of a group share each vector that is read. On a CPU a kernel in C++ does it (`sparse_attention.cpp`), on
a GPU one in Triton (`sparse_attention_triton.py`). Where neither can be built the caller expands the cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kvp.models.native import library

SOURCE = Path(__file__).with_suffix(".cpp")
COMPUTED = {  # dtypes of a cache, and of the sums over it
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}

Segment = tuple[Tensor, ...]  # kept keys, their bitmap, kept values, their bitmap


class _Segment(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "key_bits", "values", "value_bits")),
        ("tokens", ctypes.c_int64),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "output", "mask")),
        ("segments", ctypes.POINTER(_Segment)),
        *((name, ctypes.c_void_p) for name in ("recent_keys", "recent_values")),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("count", "recent", "key_stride", "value_stride", "batch", "groups", "heads"),
                *("key_width", "value_width"),
                *("kept_keys", "kept_values", "mask_stride", "threads"),
            )
        ),
        ("scaling", ctypes.c_double),
    )


def readable(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a kernel reads sparse caches of this dtype on this device; builds it at the first call."""
    if device.type == "cuda":
        return dtype in COMPUTED and dtype != torch.float64 and _triton()
    return device.type == "cpu" and dtype in COMPUTED and library(SOURCE) is not None


def attend(
    query: Tensor,
    segments: Sequence[Segment],
    recent_keys: Tensor,
    recent_values: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Return what the heads of one token read, (batch, heads, value width).

    Args:
        query: (batch, heads, key width).
        segments: Older tokens in their order; values are (batch, groups, tokens, kept), bitmaps (..., width / 8).
        recent_keys: (batch, groups, newest tokens, key width), whole.
        recent_values: (batch, groups, newest tokens, value width), whole.
        mask: (batch or 1, all tokens), added to the scores; or None.
        scaling: Factor of the scores.
    """
    segments = [segment for segment in segments if segment[0].shape[2]]
    if query.device.type == "cuda":
        from kvp.models.sparse_attention_triton import attend_on_gpu

        return attend_on_gpu(query, segments, recent_keys, recent_values, mask, scaling)
    return _attend_on_cpu(query, segments, recent_keys, recent_values, mask, scaling)


def _attend_on_cpu(
    query: Tensor,
    segments: Sequence[Segment],
    recent_keys: Tensor,
    recent_values: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    batch, groups, recent, key_width = recent_keys.shape
    value_width, computed = recent_values.shape[-1], COMPUTED[recent_keys.dtype]
    keys, values, queries = _spaced(recent_keys), _spaced(recent_values), query.to(computed).contiguous()
    held = [tuple(part.contiguous() for part in segment) for segment in segments]
    output = queries.new_empty(batch, query.shape[1], value_width)
    if mask is not None:
        mask = mask.to(computed).contiguous()
    parts = (_Segment * len(held))(
        *(_Segment(*(part.data_ptr() for part in segment), segment[0].shape[2]) for segment in held)
    )
    step = _Step(
        queries=queries.data_ptr(),
        output=output.data_ptr(),
        mask=None if mask is None else mask.data_ptr(),
        segments=parts,
        recent_keys=keys.data_ptr(),
        recent_values=values.data_ptr(),
        count=len(held),
        recent=recent,
        key_stride=keys.stride(1),
        value_stride=values.stride(1),
        batch=batch,
        groups=groups,
        heads=query.shape[1] // groups,
        key_width=key_width,
        value_width=value_width,
        kept_keys=held[0][0].shape[-1] if held else 1,
        kept_values=held[0][2].shape[-1] if held else 1,
        mask_stride=0 if mask is None or len(mask) == 1 else mask.shape[-1],
        threads=torch.get_num_threads(),
        scaling=scaling,
    )
    built = library(SOURCE)
    assert built is not None
    getattr(built, f"kvp_attend_{str(recent_keys.dtype).removeprefix('torch.')}")(ctypes.byref(step))
    return output.to(query.dtype)


def _spaced(states: Tensor) -> Tensor:
    """Return states (batch, groups, tokens, width) whose groups lie at equal distances, each contiguous in itself."""
    groups, _, width = states.shape[1:]
    batch_stride, group_stride, *inner = states.stride()
    whole = inner == [width, 1] and batch_stride == groups * group_stride
    return states if whole else states.contiguous()


@cache
def _triton() -> bool:
    try:
        import triton  # noqa: F401  (comes with torch's builds for GPUs)
    except ImportError:
        return False
    return True
