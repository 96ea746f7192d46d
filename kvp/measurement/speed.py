"""Time of prefill and decode apart, for a loaded model, in this process.

A prompt is compute bound and a decode step memory bound, so one number for both (Shortened-LLaMA,
arXiv:2402.02834, times a whole `generate`) hides where a pruned model gains. The loop is our own:
greedy, no end of text, no overhead of `generate`, per run a fresh cache of the kind the checkpoint asks for.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvp.models.sparse_cache import cache_for

Mark = float | torch.cuda.Event


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each run, and the tokens (over the whole batch) that one run handled."""

    tokens: int
    seconds: tuple[float, ...]

    def summary(self) -> dict[str, Any]:
        """Median tokens per second, interquartile range [q1, q3] of the same, and the raw seconds."""
        rates = self.tokens / torch.tensor(self.seconds, dtype=torch.float64)
        q1, median, q3 = rates.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        return {"tokens_per_second": median, "iqr": [q1, q3], "seconds": list(self.seconds)}


@torch.inference_mode()
def time_model(
    model: PreTrainedModel, prompt: Tensor, *, new_tokens: int, warmup: int, runs: int
) -> tuple[Timing, Timing, Cache]:
    """Prefill timing, decode timing and the cache at the end of the last run.

    Prefill is the forward pass of `prompt` (batch, prompt_length) with logits of the last position
    only; decode is `new_tokens` steps after it. The first `warmup` runs are not counted.
    """
    for _ in range(warmup):
        _run(model, prompt, new_tokens)
    prefill, decode = [], []
    for _ in range(runs):
        (start, middle, end), cache = _run(model, prompt, new_tokens)
        prefill.append(_seconds(start, middle))
        decode.append(_seconds(middle, end))
    return (
        Timing(tokens=prompt.numel(), seconds=tuple(prefill)),
        Timing(tokens=len(prompt) * new_tokens, seconds=tuple(decode)),
        cache,
    )


def _run(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[list[Mark], Cache]:
    """One prompt and its continuation; marks before the prompt, before and after decoding."""
    cache = cache_for(model.config)
    marks = [_mark(prompt.device)]
    token = _next_token(model, prompt, cache)
    marks.append(_mark(prompt.device))
    for _ in range(new_tokens):
        token = _next_token(model, token, cache)
    marks.append(_mark(prompt.device))
    return marks, cache


def _next_token(model: PreTrainedModel, tokens: Tensor, cache: Cache) -> Tensor:
    return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)


def _mark(device: torch.device) -> Mark:
    """Now: a CUDA event in the stream, so that the host never waits inside a run, or a clock reading."""
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


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's model name (its architecture where the system does not tell)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
