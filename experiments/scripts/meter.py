"""One method's pruning in this process, step by step: seconds, and bytes at the peak."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor

from experiments.scripts.chosen import chosen
from kvp.bench.models import Subject, find_subjects
from kvp.measurement import memory
from kvp.models.sources import RandomModel
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.gate import check_model, check_sources
from kvp.pipeline.session import Session
from kvp.pipeline.stages import make
from kvp.provenance import provenance
from kvp.strategies.steps import Job, Keep, Step, Values, find_plan, in_folders
from kvp.strategies.target import Target


@dataclass
class Meter:
    """Seconds and peak bytes of steps, by name."""

    device: torch.device
    keep: Keep
    steps: dict[str, dict[str, float]] = field(default_factory=dict)

    def __call__(self, step: Step, values: Values, make: Callable[[Path], Any]) -> Any:
        """Do a step and note what it took."""
        memory.reset_peak(self.device)
        started, busy = time.perf_counter(), time.process_time()
        result = self.keep(step, values, make)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.steps[step.name] = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - busy,
            "peak_bytes": memory.peak_bytes(self.device),
        }
        return result


def measure(words: Sequence[str]) -> dict[str, Any]:
    """The cost of pruning as these options say; an error becomes `failed`, its message."""
    line: dict[str, Any] = {"model": None}
    try:
        x = chosen(words)
        line |= {"model": x.source.name, "ratio": {"value": x.budget.value, "of": x.budget.of}}
        return {**line, **_cost(x), "failed": None, "provenance": provenance(x.device)}
    except Exception as error:  # whatever it is, the other methods go on
        return {**line, "failed": f"{type(error).__name__}: {error}"}


def _cost(x: Experiment) -> dict[str, Any]:
    device = torch.device(x.device)
    subject, ids = _subject(x), _tokens(x)
    check_model(x, subject.config)
    with torch.device("meta"):  # imports what loading will need, so that it counts as empty
        transformers.AutoModelForCausalLM.from_config(subject.config)
    empty = memory.begin(device)
    model = subject.load(device=device, dtype=x.dtype, seed=0)
    target = Target(x.strategy.recast(model), ids, x.calibration.batch_size, x.node["seed"])
    job = Job(x.strategy, x.budget, target.config, lambda: target)
    with TemporaryDirectory() as directory:
        meter = Meter(device, in_folders(Path(directory)))
        find_plan(job, meter)
    for step in meter.steps.values():
        step["peak_bytes"] -= empty
    return {
        "calibration": {
            "samples": len(ids),
            "length": ids.shape[1],
            "batch_size": x.calibration.batch_size,
        },
        "dtype": str(x.dtype).removeprefix("torch."),
        "weights_bytes": memory.weights_bytes(model),
        "steps": meter.steps,
        **{unit: sum(step[unit] for step in meter.steps.values()) for unit in ("seconds", "cpu_seconds")},
        "peak_bytes": max(step["peak_bytes"] for step in meter.steps.values()),
    }


def _subject(x: Experiment) -> Subject:
    """The model; shapes of random weights are drawn on the device, not written."""
    if isinstance(x.source, RandomModel):
        return find_subjects(x.source.name)[0]
    checkpoint = make(Session(x), "dense")
    return Subject(name=x.source.name, config=checkpoint.config, checkpoint=checkpoint.path)


def _tokens(x: Experiment) -> Tensor:
    """(samples, length) what the calibration samples, or as many random ids for random weights."""
    if not isinstance(x.source, RandomModel):
        check_sources(x)
        session = Session(x)
        make(session, "dense")
        return session.calibration
    shape = (x.calibration.num_samples, x.calibration.length)
    return torch.randint(x.source.config["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
