"""Several models timed in turns, so that what slows the machine down slows all of them.

One process holds all models. In every round each of them does one run, in the given order and then in the
reverse one; a ratio of two models is the median over the ratios of single rounds. A caller may keep finished
rounds, so that a benchmark that was stopped goes on with the next one. A round is never made of two halves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from kvp.measurement import memory
from kvp.measurement.count import cache_bytes
from kvp.measurement.measure import Measure
from kvp.measurement.paths import DecodePath, attention_kernels, prepare
from kvp.measurement.speed import quartiles, time_run

OUT_OF_MEMORY = "out of memory beside the other models"

Round = dict[str, dict[str, Any]]  # what each model did in one round, as JSON data
Keep = Callable[[int, Callable[[], Round]], Round]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Seconds of one model's rounds, those that do not count first, and the memory of the last round.

    Attributes:
        prefill: Seconds of reading the prompt, per round.
        decode: Seconds of all steps, per round.
        memory: Parts of the peak; None before the last round.
        kernels: Implementations of the attention.
        failed: Why the model has no rounds; None if it has.
    """

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    memory: memory.Memory | None = None
    kernels: list[str] = field(default_factory=list)
    failed: str | None = None

    @property
    def whole(self) -> list[float]:
        """Seconds of prompt and steps together, per round."""
        return [prefill + decode for prefill, decode in zip(self.prefill, self.decode, strict=True)]

    def counted(self, warmup: int) -> Series:
        """Return the series without its first `warmup` rounds."""
        return replace(self, prefill=self.prefill[warmup:], decode=self.decode[warmup:])

    def followed_by(self, run: dict[str, Any]) -> Series:
        """Return the series with one more round; one that failed leaves nothing else."""
        if run["failed"]:
            return Series(failed=run["failed"])
        return Series(
            prefill=[*self.prefill, run["prefill"]],
            decode=[*self.decode, run["decode"]],
            memory=memory.Memory(**run["memory"]) if run["memory"] else None,
            kernels=run["kernels"],
        )


def in_turns(
    models: Mapping[str, PreTrainedModel],
    path: DecodePath,
    point: Measure,
    *,
    keep: Keep = lambda number, work: work(),
    watch: Callable[[str], None] = lambda name: None,
) -> dict[str, Series]:
    """Run `point.warmup` rounds that do not count and `point.runs` that do; one out of memory leaves the turns.

    Args:
        models: Models by name, all on one device.
        path: How they decode.
        point: Batch, prompt and new tokens.
        keep: Gets the number of a round and its work; returns the round, kept or worked now.
        watch: Gets the name of the model before each run.
    """
    series = {name: Series() for name in models}
    rounds = point.warmup + point.runs
    for number in range(rounds):
        turns = [name for name in models if series[name].failed is None]
        if number % 2:
            turns.reverse()

        def work(turns: list[str] = turns, last: bool = number == rounds - 1) -> Round:
            done = {}
            for name in turns:
                watch(name)
                done[name] = _run(models[name], path, point, last=last)
            return done

        for name, run in keep(number, work).items():
            series[name] = series[name].followed_by(run)
    return {name: one.counted(point.warmup) for name, one in series.items()}


def _run(model: PreTrainedModel, path: DecodePath, point: Measure, *, last: bool) -> dict[str, Any]:
    """Return the seconds of one run, and of the last one the memory and the kernels."""
    run: dict[str, Any] = {"prefill": None, "decode": None, "memory": None, "kernels": [], "failed": None}
    device, new_tokens = model.device, point.new_tokens
    try:
        prompt = point.prompt(model.config.vocab_size).to(device)
        before = memory.begin(device)
        decoder = prepare(
            path, model, batch_size=point.batch_size, prompt_length=point.prompt_length, new_tokens=new_tokens
        )
        run["prefill"], run["decode"] = time_run(decoder, prompt, new_tokens)
        if last:
            parts = memory.Memory(
                peak_bytes=memory.peak_bytes(device) - before + memory.weights_bytes(model),
                weights_bytes=memory.weights_bytes(model),
                cache_bytes=cache_bytes(decoder.cache),
                baseline_bytes=0,
                method="cuda" if device.type == "cuda" else "rss",
            )
            run |= {"memory": asdict(parts), "kernels": attention_kernels(decoder)}
    except torch.OutOfMemoryError:
        run["failed"] = OUT_OF_MEMORY
    return run


def ratio(series: list[float], to: list[float]) -> dict[str, Any]:
    """Return how many times faster `series` is than `to`: median and quartiles over the ratios of single rounds."""
    q1, median, q3 = quartiles([other / own for own, other in zip(series, to, strict=True)])
    return {"median": median, "iqr": [q1, q3]}
