"""AdaPruner: search which calibration text and which importance suit this model (arXiv 2503.06184).

Structures are removed as by LLM-Pruner. A Bayesian search chooses the samples that are read and the importance.

Formula
-------
With w, g, F as in LLM-Pruner, a row or column counts

    (1 - s) first + s c second
    first    |sum w g| ("vector") or sum |w g| ("element")
    second   sum w^2 F;   c makes both equally large over the model

The search chooses s in [0, 1], vector or element, and which of the `parts` of the samples are read (none is all). It
chooses how the matrices of a structure are reduced: sum, max, prod or first (`kvp.strategies.templates.reductions`).
It minimises the loss of the masked model on the last `validation` of the samples, which no importance reads.

Faithful or interpreted
-----------------------
Interpreted: the search space is ours. The abstract says that calibration data and importance metric are searched
together, by Bayesian optimisation (second-hand: Optuna's TPE). How the paper writes the two subspaces as parameters,
how many trials it takes and what it minimises is in no text we could read.

* The first trial is LLM-Pruner itself: all parts, "element", s = 0, sum. What is found is never worse than that
  on the samples held out; on other text it may be.

Cost
----
One backward pass per sample gives the signals of all parts, which stay in memory as sums per row. Every trial then
costs a forward pass over the samples held out. A killed search goes on at its next trial.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.spaces import members
from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator, Uniform
from kvp.strategies.search.trials import Trials, masked_loss
from kvp.strategies.signals.fisher import fisher_sums
from kvp.strategies.target import Scores, Target
from kvp.strategies.templates.coupled import CoupledStrategy
from kvp.strategies.templates.reductions import unit_scores
from kvp.types import Budget, Plan, Space

if TYPE_CHECKING:
    from optuna import Trial
    from transformers import PretrainedConfig

Choice = Mapping[str, Any]
Rows = dict[tuple[str, int], Tensor]
START = {"granularity": "element", "second_order": 0.0, "reduction": "sum"}  # LLM-Pruner, with all parts


@options
class AdaPruner(CoupledStrategy):
    """Cut LLM-Pruner's structures by a searched importance on searched samples.

    Attributes:
        trials: Number of choices that are tried.
        parts: Number of parts that the calibration samples are cut into.
        validation: Fraction of the calibration samples that trials are compared on, the last ones.
        gradient_checkpointing: Trade time for activation memory.
    """

    late: ClassVar[tuple[str, ...]] = (*CoupledStrategy.late, "trials", "gradient_checkpointing")
    searches: ClassVar[bool] = True

    allocator: Allocator = Uniform(multiple_of=1)
    trials: int = Field(default=50, ge=1)
    parts: int = Field(default=8, ge=1, description="the calibration samples are cut into them")
    validation: float = Field(
        default=0.25, gt=0, lt=1, description="fraction of the samples that is held out"
    )
    gradient_checkpointing: bool = False

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        return self._scores(target.config, self._signals(target), START)

    @override
    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        signals, held_out = self._signals(target), self._split(target)[1].split(target.batch_size)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=target.seed))
        study.enqueue_trial({**START, **dict.fromkeys(_part_names(signals), True)})

        def plan(choice: Choice) -> Plan:
            return self.plan(target.config, self._scores(target.config, signals, choice), budget, profile)

        with closing(Trials(directory / "trials.jsonl", self.trials)) as trials:
            for _ in range(self.trials):
                trial = study.ask()
                choice = _choose(trial, len(signals))
                loss = trials.loss(choice, lambda: masked_loss(target.model, held_out, plan(choice)))  # noqa: B023
                study.tell(trial, loss)
        return plan(study.best_params)

    def _split(self, target: Target) -> tuple[Tensor, Tensor]:
        """Return the samples that importances may read, and those held out."""
        ids = target.calibration
        assert ids is not None
        held_out = max(1, round(self.validation * len(ids)))
        if held_out == len(ids):
            raise ValueError(
                f"strategy.validation={self.validation} of {len(ids)} calibration samples leaves none to score "
                "by; use more calibration.num_samples"
            )
        return ids[:-held_out], ids[-held_out:]

    def _signals(self, target: Target) -> list[Rows]:
        """Return, per part, (3, rows) of every matrix: the sums of w g, |w g| and w^2 F."""
        pool = self._split(target)[0]
        bound = [m for space in self.spaces(target.config) for m in members(target.config, space)]

        def terms(weight: Tensor, gradient: Tensor, fisher: Tensor) -> Tensor:
            first = weight * gradient
            return torch.stack([first, first.abs(), weight.square() * fisher])

        return [
            fisher_sums(
                target.model,
                bound,
                part.split(target.batch_size),
                terms,
                gradient_checkpointing=self.gradient_checkpointing,
            )
            for part in pool.tensor_split(min(self.parts, len(pool)))
        ]

    def _scores(
        self, config: PretrainedConfig, signals: Sequence[Rows], choice: Choice
    ) -> dict[Space, Tensor]:
        chosen = [part for name, part in zip(_part_names(signals), signals, strict=True) if choice.get(name)]
        mean = {
            key: torch.stack([part[key] for part in chosen or signals]).double().mean(0) for key in signals[0]
        }
        vector = choice["granularity"] == "vector"
        first = {key: rows[0].abs() if vector else rows[1] for key, rows in mean.items()}
        second = {key: rows[2] for key, rows in mean.items()}
        share = choice["second_order"]
        scale = _total(first) / max(_total(second), torch.finfo(torch.float64).tiny)
        worth = {key: (1 - share) * first[key] + share * scale * second[key] for key in mean}
        return {
            space: unit_scores(config, space, worth, choice["reduction"]) for space in self.spaces(config)
        }


def _choose(trial: Trial, parts: int) -> dict[str, Any]:
    return {
        "granularity": trial.suggest_categorical("granularity", ["element", "vector"]),
        "second_order": trial.suggest_float("second_order", 0, 1),
        "reduction": trial.suggest_categorical("reduction", ["sum", "max", "prod", "first"]),
        **{name: trial.suggest_categorical(name, [True, False]) for name in _part_names(range(parts))},
    }


def _part_names(parts: Sequence[Any]) -> list[str]:
    return [f"part_{number}" for number in range(len(parts))]


def _total(rows: Rows) -> float:
    return sum(float(row.sum()) for row in rows.values())
