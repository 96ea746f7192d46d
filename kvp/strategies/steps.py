"""The steps from a model to a plan, declared once: score, sensitivity, plan, refit.

A run walks them with a store between the steps (`kvp.pipeline.stages`). A chained strategy and a study of costs walk
them in memory (`find_plan`). A further step is a class here and its place in `STEPS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from kvp.identity import described, named
from kvp.models.cache_formats import CacheFormat
from kvp.models.plans import read_edits, read_plan, read_scores, write_plan, write_scores
from kvp.models.shapes import layer_shapes
from kvp.strategies.base import PlannedStrategy, Strategy
from kvp.strategies.limits import Limit, stored_as
from kvp.strategies.shape import after
from kvp.strategies.target import Scores, Target
from kvp.types import Budget, Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Inputs = dict[str, Any]
Values = Mapping[str, Any]  # what the steps so far gave, by name


@dataclass(frozen=True)
class Asked:
    """Everything that decides a plan, as data fit for a fingerprint.

    Attributes:
        options: The strategy's, classes by name.
        ratio: The budget's options.
        calibration: Which text is read; None if none is.
        dtype: The precision that the model computes in.
        seed: Decides all that is drawn.
    """

    options: Mapping[str, Any]
    ratio: Mapping[str, Any]
    calibration: Mapping[str, Any] | None
    dtype: str
    seed: int

    def strategy(self, strategy: Strategy, *late: str) -> Inputs:
        """Return the options of a strategy without `late`, and without the nulls that go without saying.

        So a new option changes no old fingerprint. Where the class has another default, null is a choice.
        """
        fields: Mapping[str, Any] = getattr(type(strategy), "__pydantic_fields__", {})
        chosen = {name for name, field in fields.items() if field.default is not None}
        return {
            name: value
            for name, value in self.options.items()
            if name not in late and (value is not None or name in chosen)
        }


@dataclass(frozen=True)
class Job:
    """The strategy, the budget and the model that the steps work on.

    Attributes:
        config: The model's.
        target: Loads the model, and the calibration text if the strategy reads any.
        cache: The format of the cache after the cut; None: as the model makes it.
    """

    strategy: Strategy
    budget: Budget
    config: PretrainedConfig
    target: Callable[[], Target]
    cache: CacheFormat | None = None


class Step(ABC):
    """One step: what decides its value, how the value is made, and its form on disk.

    Class attributes:
        name: Its stage in the store; `force=[name]` computes it again.
        version: Raised in the commit that changes its numbers.
        resumable: Whether `make` goes on from the files that a killed attempt left.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    resumable: ClassVar[bool] = False

    def applies(self, strategy: Strategy) -> bool:
        """Return whether a strategy takes this step."""
        return True

    def needs(self, strategy: Strategy) -> tuple[str, ...]:
        """Return the steps whose values this one reads."""
        return ()

    @abstractmethod
    def inputs(self, strategy: Strategy, asked: Asked) -> Inputs:
        """Return what decides the value, besides the model and the steps that are needed."""

    @abstractmethod
    def make(self, job: Job, values: Values, directory: Path) -> Any:
        """Return the value; `directory` keeps the files of a killed attempt."""

    def write(self, value: Any, directory: Path) -> Mapping[str, Any]:
        """Write the value, and return its part that is JSON; by default `make` has left all of it in files."""
        return {}

    @abstractmethod
    def read(self, directory: Path, result: Mapping[str, Any], values: Values) -> Any:
        """Return the value that `write` wrote."""


class Score(Step):
    """Score every unit; neither budget nor allocator is known."""

    name = "score"
    version = 2  # 1 weighed the samples of a short last batch more, and checkpointed with dropout

    @override
    def inputs(self, strategy: Strategy, asked: Asked) -> Inputs:
        return {
            "strategy": asked.strategy(strategy, *strategy.late),
            "calibration": asked.calibration,
            "dtype": asked.dtype,
            "seed": asked.seed,
        }

    @override
    def make(self, job: Job, values: Values, directory: Path) -> Scores:
        return job.strategy.score(job.target())

    @override
    def write(self, value: Scores, directory: Path) -> Mapping[str, Any]:
        write_scores(directory / "scores.safetensors", value)
        return {"spaces": len(value)}

    @override
    def read(self, directory: Path, result: Mapping[str, Any], values: Values) -> Scores:
        return read_scores(directory / "scores.safetensors")


class Sensitivity(Step):
    """Measure what the loss gains without each block's KV: phase A of KVPruner."""

    name = "sensitivity"

    @override
    def applies(self, strategy: Strategy) -> bool:
        return strategy.probes

    @override
    def needs(self, strategy: Strategy) -> tuple[str, ...]:
        return ("score",) if strategy.probes_by_score else ()

    @override
    def inputs(self, strategy: Strategy, asked: Asked) -> Inputs:
        return {"probe": strategy.probe_inputs(), "calibration": asked.calibration, "dtype": asked.dtype}

    @override
    def make(self, job: Job, values: Values, directory: Path) -> Tensor:
        return job.strategy.sensitivity(job.target(), values["score"])

    @override
    def write(self, value: Tensor, directory: Path) -> Mapping[str, Any]:
        return {"nats_per_token": value.tolist()}

    @override
    def read(self, directory: Path, result: Mapping[str, Any], values: Values) -> Tensor:
        return torch.tensor(result["nats_per_token"], dtype=torch.float64)


class FindPlan(Step):
    """Turn scores and a budget into indices; a strategy that searches looks at the model again."""

    name = "plan"
    resumable = True

    @override
    def needs(self, strategy: Strategy) -> tuple[str, ...]:
        return ("score", "sensitivity")

    @override
    def inputs(self, strategy: Strategy, asked: Asked) -> Inputs:
        decided: Inputs = {"strategy": asked.strategy(strategy, "compensation"), "budget": asked.ratio}
        if strategy.searches:
            decided |= {"calibration": asked.calibration, "dtype": asked.dtype, "seed": asked.seed}
        return decided

    @override
    def make(self, job: Job, values: Values, directory: Path) -> Plan:
        strategy, scores = job.strategy, values["score"]
        profile = values.get("sensitivity", torch.zeros(len(layer_shapes(job.config))))
        if not isinstance(job.budget, Limit):
            return _plan(job, scores, job.budget, profile, directory)
        assert isinstance(strategy, PlannedStrategy)  # others were refused at the gate

        def shape(asked: Budget) -> PretrainedConfig:
            return after(job.config, strategy.plan(job.config, scores, asked, profile))

        plan = _plan(job, scores, job.budget.ratio(job.config, job.cache, shape), profile, directory)
        left = stored_as(after(job.config, plan), job.cache)
        job.budget.check_count(job.config, job.budget.count(left))
        return plan

    @override
    def write(self, value: Plan, directory: Path) -> Mapping[str, Any]:
        write_plan(directory, value)
        return {}

    @override
    def read(self, directory: Path, result: Mapping[str, Any], values: Values) -> Plan:
        return read_plan(directory)


def _plan(job: Job, scores: Scores, budget: Budget, profile: Tensor, directory: Path) -> Plan:
    if job.strategy.searches:
        return job.strategy.search(job.target(), scores, budget, profile, directory)
    assert isinstance(job.strategy, PlannedStrategy)  # all that do not search are
    return job.strategy.plan(job.config, scores, budget, profile)


class Refit(Step):
    """Rewrite the kept weights, so that they make up for those that go."""

    name = "refit"
    version = 2  # 1 fitted down_proj before o_proj wherever `sequential` refitted both
    resumable = True

    @override
    def applies(self, strategy: Strategy) -> bool:
        return strategy.compensation is not None

    @override
    def needs(self, strategy: Strategy) -> tuple[str, ...]:
        return ("plan",)

    @override
    def inputs(self, strategy: Strategy, asked: Asked) -> Inputs:
        return {
            "compensation": asked.options.get("compensation", named(described(strategy.compensation))),
            "calibration": asked.calibration,
            "dtype": asked.dtype,
        }

    @override
    def make(self, job: Job, values: Values, directory: Path) -> Plan:
        target, compensation = job.target(), job.strategy.compensation
        assert compensation is not None
        return compensation.refit(target.model, target.batches, values["plan"], directory)

    @override
    def read(self, directory: Path, result: Mapping[str, Any], values: Values) -> Plan:
        plan: Plan = values["plan"]
        return replace(plan, edits={**plan.edits, **read_edits(directory)})


Keep = Callable[[Step, Values, Callable[[Path], Any]], Any]
STEPS: tuple[Step, ...] = (Score(), Sensitivity(), FindPlan(), Refit())


def final_plan(values: Values) -> Plan:
    """Return the plan to cut by: refitted, if there was a refit."""
    return values["refit"] if "refit" in values else values["plan"]


def in_folders(directory: Path) -> Keep:
    """Return a keeper of values in memory; each step has a folder for the files of a killed attempt."""

    def keep(step: Step, values: Values, make: Callable[[Path], Any]) -> Any:
        place = directory / step.name
        place.mkdir(parents=True, exist_ok=True)
        return make(place)

    return keep


def find_plan(job: Job, keep: Keep, known: Values | None = None) -> Plan:
    """Walk the steps and return the plan.

    Args:
        job: The strategy, its budget and the model.
        keep: Called with each step, the values so far and its work in a directory; returns the step's value.
        known: Values of steps that are not walked again.
    """
    values = dict(known or {})
    for step in STEPS:
        if step.name not in values and step.applies(job.strategy):
            values[step.name] = keep(step, values, partial(step.make, job, values))
    return final_plan(values)
