"""Several models timed in turns, so that what slows the machine down slows all of them.

One process holds all models. In every round each of them does one run, in the given order and then in the
reverse one; a ratio of two models is the median over the ratios of single rounds. Finished rounds are kept, so
that a benchmark that was stopped goes on with the next one; a round is never made of two halves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from kvp.measurement import memory
from kvp.measurement.count import cache_bytes
from kvp.measurement.measure import Measure
from kvp.measurement.paths import DecodePath, attention_kernels, prepare
from kvp.measurement.speed import quartiles, time_run

OUT_OF_MEMORY = "out of memory beside the other models"


@dataclass
class Series:
    """What one model did: seconds per round, those that do not count first, and the memory of the last.

    Attributes:
        prefill: Seconds of reading the prompt.
        decode: Seconds of all steps.
        kernels: Implementations of the attention.
        failed: Why there is nothing, None if there is.
    """

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    memory: memory.Memory | None = None
    kernels: list[str] = field(default_factory=list)
    failed: str | None = None

    @property
    def whole(self) -> list[float]:
        """Seconds of prompt and steps together."""
        return [prefill + decode for prefill, decode in zip(self.prefill, self.decode, strict=True)]

    def counted(self, warmup: int) -> Series:
        """Without the first `warmup` rounds."""
        return replace(self, prefill=self.prefill[warmup:], decode=self.decode[warmup:])


def in_turns(
    models: Mapping[str, PreTrainedModel],
    path: DecodePath,
    point: Measure,
    *,
    begun: Mapping[str, Series] | None = None,
    watch: Callable[[str], None] = lambda name: None,
    after: Callable[[Mapping[str, Series]], None] = lambda series: None,
) -> dict[str, Series]:
    """`point.warmup` rounds that do not count and `point.runs` that do; one out of memory leaves the turns.

    Args:
        models: By name, all on one device.
        path: How they decode.
        point: Batch, prompt and new tokens.
        begun: What an earlier process was told by `after`; goes on from there, without warming up again.
        watch: Told the name of the model before each run.
        after: Told everything after each round.
    """
    series = dict(begun) if begun else {name: Series() for name in models}
    rounds = point.warmup + point.runs
    for number in range(max((len(one.decode) for one in series.values()), default=0), rounds):
        names = [name for name in models if series[name].failed is None]
        for name in names if number % 2 == 0 else reversed(names):
            watch(name)
            try:
                _run(models[name], path, point, series[name], last=number == rounds - 1)
            except torch.OutOfMemoryError:
                series[name] = Series(failed=OUT_OF_MEMORY)
        after(series)
    return {name: one.counted(point.warmup) for name, one in series.items()}


def _run(model: PreTrainedModel, path: DecodePath, point: Measure, series: Series, *, last: bool) -> None:
    device, new_tokens = model.device, point.new_tokens
    prompt = point.prompt(model.config.vocab_size).to(device)
    before = memory.begin(device)
    decoder = prepare(
        path, model, batch_size=point.batch_size, prompt_length=point.prompt_length, new_tokens=new_tokens
    )
    prefill, decode = time_run(decoder, prompt, new_tokens)
    series.prefill.append(prefill)
    series.decode.append(decode)
    if last:
        series.memory = memory.Memory(
            peak_bytes=memory.peak_bytes(device) - before + memory.weights_bytes(model),
            weights_bytes=memory.weights_bytes(model),
            cache_bytes=cache_bytes(decoder.cache),
            baseline_bytes=0,
            method="cuda" if device.type == "cuda" else "rss",
        )
        series.kernels = attention_kernels(decoder)


def ratio(series: list[float], to: list[float]) -> dict[str, Any]:
    """How much faster `series` is than `to`, round by round: median and quartiles of the rates' ratios."""
    q1, median, q3 = quartiles([other / own for own, other in zip(series, to, strict=True)])
    return {"median": median, "iqr": [q1, q3]}
