"""Limits of a given memory: the largest batch and the longest context, by trying and from bytes.

From bytes: what the weights leave, divided by the cache of a sequence (or a token). By trying: a cache of that
size is allocated, a slice of the prompt is read and a step taken at its very end; the peak is what counts, with
the weights of this model alone. Prompts of any length are read in slices, as engines read them.

A model whose cache cannot be held in place is not tried where it decodes eagerly alone: the bytes are what is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kvp.bench.models import Subject
from kvp.estimate.serving import BLOCK, SLICE, longest_context, room
from kvp.measurement import memory
from kvp.measurement.paths import DecodePath, Static, prepare
from kvp.models.caches import cache_format
from kvp.models.family import family_of

Need = Callable[[int], float]


def predicted_batch(subject: Subject, *, length: int, limit: int, dtype: torch.dtype) -> int:
    """Return how many sequences of `length` tokens have a cache that fits beside the weights."""
    return max(0, limit - subject.weights_bytes(dtype)) // subject.cache_bytes(length, dtype)


def predicted_context(subject: Subject, *, limit: int, dtype: torch.dtype) -> int:
    """Return how many tokens of one sequence fit beside the weights, in blocks, within its positions and window."""
    per_token, positions = subject.cache_bytes_per_token(dtype), subject.config.max_position_embeddings
    window = (
        subject.cache_bytes(positions, dtype) - room(positions) * per_token
    )  # bytes that whole tokens add
    left = limit - subject.weights_bytes(dtype) - window
    attended = getattr(subject.config, "sliding_window", None) or positions  # `check_cache` refuses more
    return longest_context(left, per_token=per_token, positions=min(positions, attended))


def held_in_place(config: PretrainedConfig) -> bool:
    """Return whether every path can hold a model's cache: its attention has no sinks, and the cache is not packed."""
    return cache_format(config) is None and not family_of(config).sinks


def find_batch(
    subject: Subject,
    model: PreTrainedModel,
    *,
    prompt_length: int,
    new_tokens: int,
    limit: int,
    trial: bool = True,
) -> dict[str, int]:
    """Return the largest batch of such sequences, `found` by trying and `predicted` from bytes.

    Without a trial the prediction is what is found.
    """
    length, dtype = prompt_length + new_tokens, model.dtype
    most = predicted_batch(subject, length=length, limit=limit, dtype=dtype)

    def need(batch_size: int) -> float:
        return needed(model, batch_size=batch_size, prompt_length=prompt_length, new_tokens=new_tokens)

    found = largest(need, most, limit, subject.cache_bytes(length, dtype)) if trial else most
    return {"found": found, "predicted": most}


def find_context(
    subject: Subject, model: PreTrainedModel, *, limit: int, trial: bool = True
) -> dict[str, int]:
    """Return the longest context in tokens, `found` and `predicted`, and the model's `positions`.

    Without a trial the prediction is what is found.
    """
    most = predicted_context(subject, limit=limit, dtype=model.dtype)

    def need(blocks: int) -> float:
        return needed(model, batch_size=1, prompt_length=blocks * BLOCK - 1, new_tokens=1)

    unit = BLOCK * subject.cache_bytes_per_token(model.dtype)
    found = BLOCK * largest(need, most // BLOCK, limit, unit) if trial else most
    return {"found": found, "predicted": most, "positions": subject.config.max_position_embeddings}


@torch.inference_mode()
def needed(model: PreTrainedModel, *, batch_size: int, prompt_length: int, new_tokens: int) -> float:
    """Return the peak bytes of decoding such a batch with a cache of fixed size; infinite if memory runs out."""
    device, length = model.device, prompt_length + new_tokens
    tokens = min(prompt_length, SLICE[device.type])
    rows = min(batch_size, max(1, SLICE[device.type] // tokens))
    before = memory.begin(device)
    try:
        path: DecodePath = "native" if cache_format(model.config) else "static"
        decoder = prepare(path, model, batch_size=batch_size, prompt_length=length - 1, new_tokens=1)
        assert isinstance(decoder, Static)
        decoder.read(torch.zeros(rows, tokens, dtype=torch.long, device=device))
        decoder.seek(length - 1)
        decoder.step()
    except torch.OutOfMemoryError:
        return math.inf
    return memory.peak_bytes(device) - before + memory.weights_bytes(model)


def largest(need: Need, most: int, limit: int, unit: int) -> int:
    """Return the largest number up to `most` whose need keeps the limit, 0 if none does.

    Args:
        need: Bytes, rising by `unit` per number at least.
        most: More cannot fit; tried first.
        limit: Bytes.
        unit: Bytes; how far a need is beyond the limit tells how far to go back.
    """
    low, high, number = 0, most + 1, most
    while high - low > 1:
        excess = need(number) - limit
        low, high = (number, high) if excess <= 0 else (low, number)
        step = math.ceil(excess / unit) if math.isfinite(excess) else (high - low) // 2
        number = min(max(number - step, low + 1), high - 1)
    return low
