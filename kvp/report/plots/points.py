"""Points of plots: one per model of a run, grouped over seeds."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from kvp.record import Denominator
from kvp.report.records.keys import unpruned, untouched
from kvp.report.records.labels import recovery_labels, strategy_labels
from kvp.report.records.runs import Run
from kvp.results import ModelRecord
from kvp.tables import plain

State = Literal["dense", "dense, tuned alike", "pruned", "recovered"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One of the models of a run.

    Attributes:
        part: Name of the model in the record: dense, pruned or recovered.
        model: What the record holds of it.
        base: Name of the dense model.
        strategy: Label of the strategy and the settings; "dense" if nothing is pruned.
        recovery: Label of the recovery and the settings; "none" if untuned.
        ratio: (value, denominator) asked for; None if nothing is pruned.
        amount: The ratio in words; with the denominator where the runs ask for several.
        achieved: Fraction removed, under every denominator.
    """

    run: Run
    state: State
    part: str
    model: ModelRecord
    base: str
    strategy: str
    recovery: str
    ratio: tuple[float, Denominator] | None
    amount: str
    achieved: Mapping[Denominator, float]
    seed: int

    @property
    def tuned(self) -> bool:
        """Recovered, or the dense control of a recovery."""
        return self.recovery != "none"

    @property
    def group(self) -> Hashable:
        """A key that points share if they differ in the seed only."""
        return self.base, self.state, self.strategy, self.recovery, self.ratio

    @property
    def label(self) -> str:
        """Strategy, ratio asked for and recovery, in words."""
        return f"{self.strategy} {self.amount}".rstrip() + (f", {self.recovery}" if self.tuned else "")


def find_points(runs: Sequence[Run]) -> list[Point]:
    """Return every model of every finished run: dense, the controls, then the rest by strategy and ratio."""
    finished = [run for run in runs if run.status == "finished"]
    strategies, recoveries = strategy_labels(finished), recovery_labels(finished)
    mixed = len({run.record.config["ratio"]["of"] for run in finished if not unpruned(run)}) > 1
    found = []
    for run in finished:
        config, models, bare = run.record.config, run.record.models(), untouched(run)
        states: dict[State, str] = {"dense": "dense"}
        states |= (
            {"dense, tuned alike": "recovered"} if bare else {"pruned": "pruned", "recovered": "recovered"}
        )
        for state, part in states.items():
            if part in models:
                pruned = state in ("pruned", "recovered")
                asked, achieved = config["ratio"], run.record.ratio.achieved or {}
                budget = run.record.ratio.asked
                value = 0.0 if unpruned(run) or budget is None else budget.value
                amount = f"{100 * value:g} %" + (f" of {asked['of']}" if mixed else "")
                found.append(
                    Point(
                        run=run,
                        state=state,
                        part=part,
                        model=models[part],
                        base=run.model,
                        strategy=plain(strategies[run.hash]) if pruned else "dense",
                        recovery=plain(recoveries[run.hash]) if part == "recovered" else "none",
                        ratio=(value, asked["of"]) if pruned else None,
                        amount=amount if pruned else "",
                        achieved=achieved if pruned else dict.fromkeys(achieved, 0.0),
                        seed=run.seed,
                    )
                )
    return sorted(found, key=lambda p: (STATES.index(p.state), p.strategy, p.ratio or (), p.recovery, p.seed))
