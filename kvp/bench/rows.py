"""Entries of bench.json: a model, and a model on one path under one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from kvp.bench.models import Subject
from kvp.bench.rounds import Series, ratio
from kvp.measurement.measure import Measure
from kvp.measurement.roofline import StepBytes, step_bytes
from kvp.measurement.speed import Timing, quartiles
from kvp.models.shapes import layer_shapes, size

ALIGNED = 8  # channels; attention kernels of GPUs pad or refuse widths that are no multiple of it

Row = dict[str, Any]


def describe(subject: Subject, first: Subject, dtype: torch.dtype) -> Row:
    """Return the sizes and widths of a model, and the fractions removed from the first."""
    shapes, per_token = layer_shapes(subject.config), subject.cache_bytes_per_token(dtype)
    heads = {width for s in shapes if s.kv_width for width in (s.qk_head_dim, s.v_head_dim)}
    return {
        "name": subject.name,
        "checkpoint": subject.checkpoint and str(subject.checkpoint),
        "params": size(subject.config, shapes).params,
        "weights_bytes": subject.weights_bytes(dtype),
        "kv_bytes_per_token": per_token,
        "removed": {
            "params": 1 - subject.weights_bytes(dtype) / first.weights_bytes(dtype),
            "kv_cache": 1 - per_token / first.cache_bytes_per_token(dtype),
        },
        "aligned": all(width % ALIGNED == 0 for width in heads),
        "layers": [{k: v for k, v in asdict(shape).items() if k != "rope_pairs"} for shape in shapes],
    }


def make_rows(
    subjects: Sequence[Subject],
    series: Sequence[Series],
    path: str,
    point: Measure,
    *,
    dtype: torch.dtype,
    bandwidth: float,
) -> list[Row]:
    """Return one row per model, in their order; the others are compared with the first."""
    moved = [_moved(subject, point, dtype) for subject in subjects]
    rows = []
    for subject, own, bytes_ in zip(subjects, series, moved, strict=True):
        asked = {
            "model": subject.name,
            "path": path,
            "batch_size": point.batch_size,
            "prompt_length": point.prompt_length,
            "new_tokens": point.new_tokens,
            "failed": own.failed,
        }
        against = None if series[0].failed else moved[0].total / bytes_.total
        rows.append(
            asked if own.failed else asked | _measured(own, series[0], point, bytes_, bandwidth, against)
        )
    return rows


def _measured(
    own: Series, first: Series, point: Measure, moved: StepBytes, bandwidth: float, by_bytes: float | None
) -> Row:
    assert own.memory is not None
    prefill, decode = (
        Timing(tokens=point.batch_size * tokens, seconds=tuple(seconds)).summary()
        for tokens, seconds in ((point.prompt_length, own.prefill), (point.new_tokens, own.decode))
    )
    step = 1000 * point.batch_size / decode["tokens_per_second"]
    row = {"decode": {**decode, "milliseconds_per_step": step}, "roofline": asdict(moved)}
    low, middle, high = quartiles(own.whole)
    return {
        "latency": {"seconds": middle, "iqr": [low, high]},
        "prefill": prefill,
        "decode": row["decode"],
        "memory": own.memory.summary(),
        "attention": own.kernels,
        "roofline": row["roofline"] | roofline(row, bandwidth),
        "against_first": None
        if by_bytes is None
        else {
            "latency": ratio(own.whole, first.whole),
            "prefill": ratio(own.prefill, first.prefill),
            "decode": ratio(own.decode, first.decode),
            "decode_by_bytes": by_bytes,
        },
    }


def roofline(row: Row, bandwidth: float) -> Row:
    """Return the shortest step that the bytes allow at `bandwidth` bytes per second, and the fraction reached."""
    moved = row["roofline"]["weights_bytes"] + row["roofline"]["cache_bytes"]
    limit = 1000 * moved / bandwidth
    return {"milliseconds_per_step": limit, "fraction": limit / row["decode"]["milliseconds_per_step"]}


def _moved(subject: Subject, point: Measure, dtype: torch.dtype) -> StepBytes:
    """Return the bytes of the mean step; the first step ends with one token more than the prompt."""
    mean = point.prompt_length + (1 + point.new_tokens) / 2
    return step_bytes(subject.config, batch_size=point.batch_size, tokens=mean, dtype=dtype)
