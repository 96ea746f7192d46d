"""Time prefill and decode separately, for a loaded model, in this process.

A prompt is compute bound and a decode step memory bound, so one number for both (Shortened-LLaMA,
arXiv:2402.02834, times a whole `generate`) hides where a pruned model gains. The loop is our own, without
the overhead of `generate`, with a fresh cache per run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvp.measurement.paths import Decoder, Eager

Mark = float | torch.cuda.Event


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each run, and the tokens (over the whole batch) that one run handled."""

    tokens: int
    seconds: tuple[float, ...]

    def summary(self) -> dict[str, Any]:
        """Return the median tokens per second, their interquartile range [q1, q3], and the raw seconds."""
        q1, median, q3 = quartiles([self.tokens / seconds for seconds in self.seconds])
        return {"tokens_per_second": median, "iqr": [q1, q3], "seconds": list(self.seconds)}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    q1, median, q3 = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return q1, median, q3


def time_model(
    model: PreTrainedModel, prompt: Tensor, *, new_tokens: int, warmup: int, runs: int
) -> tuple[Timing, Timing, Cache]:
    """Return prefill timing, decode timing and the cache at the end of the last run, on the eager path.

    Prefill is the forward pass of `prompt` (batch, prompt_length) with logits of the last position
    only; decode is `new_tokens` steps after it. The first `warmup` runs are not counted.
    """
    for _ in range(warmup):
        time_run(Eager(model), prompt, new_tokens)
    seconds = []
    for _ in range(runs):
        decoder = Eager(model)
        seconds.append(time_run(decoder, prompt, new_tokens))
    prefill, decode = zip(*seconds, strict=True)
    return (
        Timing(tokens=prompt.numel(), seconds=prefill),
        Timing(tokens=len(prompt) * new_tokens, seconds=decode),
        decoder.cache,
    )


@torch.inference_mode()
def time_run(decoder: Decoder, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Return the seconds of reading a prompt and of the steps after it."""
    start = _mark(prompt.device)
    decoder.read(prompt)
    middle = _mark(prompt.device)
    for _ in range(new_tokens):
        decoder.step()
    end = _mark(prompt.device)
    return _seconds(start, middle), _seconds(middle, end)


def _mark(device: torch.device) -> Mark:
    """Return a CUDA event in the stream, so that the host never waits inside a run; on a CPU a clock reading."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Mark, end: Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return end - start  # type: ignore[operator]
    end.synchronize()
    return start.elapsed_time(end) / 1000
