"""Seconds of phases: what the same work took in the store, else arithmetic over a rate that is measured or given."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from kvp.measurement.roofline import copy_bandwidth
from kvp.models.half import linear
from kvp.models.sources import HubModel
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.forecast import Forecast, device_of
from kvp.pipeline.foretell import foretell
from kvp.pipeline.needs import Need

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROWS = 512  # tokens of the product that is timed
WIDEST = {"cpu": 1024, "cuda": 16384}  # of that product: a CPU takes long for more
SHORTEST = 0.3  # seconds that the products take together
SHARE = 0.5  # of the rate of a large product, which a whole model reaches
PLANNING = ("score", "sensitivity", "plan", "refit")  # stages that the phase "score" stands for


class Clock:
    """Tells how long a phase takes on a run's device.

    Args:
        x: The run.
        config: The config of its model.
        tflops: Given 10^12 operations per second; None: measured, if the device is here.
        here: Whether the run's device is this machine's.
    """

    def __init__(
        self, x: Experiment, config: PretrainedConfig, tflops: float | None = None, *, here: bool = True
    ) -> None:
        self._given, self._here = tflops, here and (x.device == "cpu" or torch.cuda.is_available())
        self._rate = tflops * 1e12 if tflops else None
        self._bandwidth: float | None = None
        if self._here:
            self._rate = self._rate or _rate(config, x)
            self._bandwidth = copy_bandwidth(torch.device(x.device)) if x.protocol else None
        self._seen = _seen(x) if self._here else {}

    def seconds(self, need: Need) -> tuple[float | None, str]:
        """Return the seconds of one model's phase and how they are known; None if they are not."""
        if need.phase in self._seen:
            return self._seen[need.phase], "the store"
        if need.macs is None:
            return None, "unknown work"
        if self._rate is None or (need.steps and self._bandwidth is None):
            return None, "unknown rate"
        read = need.steps * (need.memory["weights"] + need.memory.get("cache", 0))
        return (
            2 * need.macs / (SHARE * self._rate) + (read / self._bandwidth if self._bandwidth else 0),
            "arithmetic",
        )

    def words(self) -> Iterator[str]:
        """Yield the assumptions behind the seconds."""
        if self._rate is None:
            yield "time: that device is not here; say tflops=N, its dense rate in 10^12 operations per second"
            return
        source = "as given" if self._given else "as measured here for a matrix product"
        yield (
            f"time: of the store where the same work was done before; else 2 operations per multiply-accumulate at "
            f"{SHARE:.0%} of {self._rate / 1e12:.3g} TFLOP/s, {source}"
        )


def _rate(config: PretrainedConfig, x: Experiment) -> float:
    """Return operations per second of a product of `ROWS` tokens with a matrix of the model, at most `WIDEST` wide."""
    device, widest = torch.device(x.device), WIDEST[x.device]
    hidden, inner = (min(width, widest) for width in (config.hidden_size, config.intermediate_size))
    states = torch.ones(ROWS, hidden, dtype=x.dtype, device=device)
    matrix = torch.ones(inner, hidden, dtype=x.dtype, device=device)
    linear(states, matrix).sum().item()
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < SHORTEST:
        linear(states, matrix)[0, 0].item()  # waits for the device
        done += 1
    operations = 2 * ROWS * hidden * inner * done
    return operations / (time.perf_counter() - began)


def _seen(x: Experiment) -> dict[str, float]:
    """Return the seconds of one model's phases that the store has seen; it downloads nothing and makes no store."""
    if not x.place.is_dir() or isinstance(x.source, HubModel):
        return {}
    try:
        stages, _ = foretell(x)
    except (OSError, ValueError, RuntimeError):
        return {}
    forecast = Forecast(x.store, device_of(x.device))
    forecast.learn(stage.name for stage in stages)
    phases: dict[str, list[float | None]] = {}
    models: dict[str, str] = {}
    for stage in stages:
        phase = "score" if stage.kind in PLANNING else stage.kind
        if models.setdefault(phase, stage.model) == stage.model:  # one model, the first that it looks at
            phases.setdefault(phase, []).append(forecast.seconds(stage.work))
    return {phase: sum(seconds) for phase, seconds in phases.items() if None not in seconds}  # type: ignore[arg-type]
