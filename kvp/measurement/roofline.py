"""The limit of a decode step: the bytes that it must move, at the rate at which the device copies.

A step of a small batch does little arithmetic with every weight and every cached number that it reads, so it
can be no faster than memory. What is left out (activations, tables) is small beside both.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import ceil, floor
from typing import TYPE_CHECKING

import torch

from kvp.models.caches import stored_bytes
from kvp.models.shapes import active_width, expert_params, layer_shapes, size, stream

if TYPE_CHECKING:
    from transformers import PretrainedConfig

COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes, beyond any cache of the processor
REPEATS = 12


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """Bytes that one decode step reads or writes.

    Attributes:
        weights_bytes: Every parameter once; of an embedding that is not also the head, the rows looked up. Of experts
            those that one token needs, because all tokens of a step may agree.
        cache_bytes: Keys and values of all tokens, the new one's written, the others' read.
    """

    weights_bytes: int
    cache_bytes: float

    @property
    def total(self) -> float:
        """Bytes of weights and cache."""
        return self.weights_bytes + self.cache_bytes


def step_bytes(config: PretrainedConfig, *, batch_size: int, tokens: float, dtype: torch.dtype) -> StepBytes:
    """Return the bytes of a step from shapes alone; `tokens` per sequence after it, or their mean over steps."""
    shapes = layer_shapes(config)
    params = size(config, shapes).params
    if not config.tie_word_embeddings:
        params -= max(0, config.vocab_size - batch_size) * stream(config, shapes[0])[0]
    for shape in shapes:
        if shape.experts:
            idle = shape.experts - active_width(config, shape) // shape.intermediate_size
            params -= idle * expert_params(config, shape)
    before, after = (stored_bytes(config, dtype.itemsize, whole) for whole in (floor(tokens), ceil(tokens)))
    kept = before + (tokens - floor(tokens)) * (after - before)
    return StepBytes(weights_bytes=params * dtype.itemsize, cache_bytes=batch_size * kept)


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second, read and written, of the fastest of several large copies."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(REPEATS):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
