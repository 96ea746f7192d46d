"""Points of plots: one per model of a run, grouped over seeds."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from kvp.record import Denominator
from kvp.report.records.keys import differences, label, seeds, unpruned, untouched
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
        base: Name of the dense model, with its settings where the runs have several of one name.
        strategy: Label of the strategy and the settings; "dense" if nothing is pruned.
        recovery: Label of the recovery and the settings; "none" if untuned.
        ratio: (value, denominator) asked for; None if nothing is pruned.
        amount: The ratio in words; with the denominator where the runs ask for several.
        achieved: Fraction removed, under every denominator.
        seeds: All that decide the model; none of a dense one.
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
    seeds: tuple[int, ...]

    @property
    def tuned(self) -> bool:
        """Recovered, or the dense control of a recovery."""
        return self.recovery != "none"

    @property
    def group(self) -> Hashable:
        """A key that points share if they differ in seeds only."""
        return self.base, self.state, self.strategy, self.recovery, self.ratio

    @property
    def label(self) -> str:
        """Strategy, ratio asked for and recovery, in words."""
        return f"{self.strategy} {self.amount}".rstrip() + (f", {self.recovery}" if self.tuned else "")


def find_points(runs: Sequence[Run]) -> list[Point]:
    """Return every model of every finished run: dense, the controls, then the rest by strategy and ratio."""
    finished = [run for run in runs if run.status == "finished"]
    strategies, recoveries, bases = strategy_labels(finished), recovery_labels(finished), _bases(finished)
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
                        base=bases[run.hash],
                        strategy=plain(strategies[run.hash]) if pruned else "dense",
                        recovery=plain(recoveries[run.hash]) if part == "recovered" else "none",
                        ratio=(value, asked["of"]) if pruned else None,
                        amount=amount if pruned else "",
                        achieved=achieved if pruned else dict.fromkeys(achieved, 0.0),
                        seeds=() if state == "dense" else seeds(run, part),
                    )
                )
    found = _told_apart(found)
    return sorted(
        found, key=lambda p: (STATES.index(p.state), p.strategy, p.ratio or (), p.recovery, p.seeds)
    )


def _told_apart(points: Sequence[Point]) -> list[Point]:
    """Return the points; of those that differ in more than seeds and labels, each states in what."""
    groups: dict[Hashable, list[Point]] = {}
    for point in points:
        groups.setdefault(point.group, []).append(point)
    told = []
    for alike in groups.values():
        keys = _keys([point.run for point in alike], alike[0].part)
        late = [key for key in keys if key.startswith("recovery") or alike[0].ratio is None]
        early = [key for key in keys if key not in late]
        told += [
            replace(
                point,
                strategy=_stating(point.run, point.strategy, early),
                recovery=_stating(point.run, point.recovery, late),
            )
            for point in alike
        ]
    return told


def _bases(runs: Sequence[Run]) -> dict[str, str]:
    """Return the names of dense models by the run's hash; of several under one name, with what they differ in."""
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.model, []).append(run)
    keys = {name: _keys(alike, "dense") for name, alike in by_name.items()}
    return {run.hash: _stating(run, run.model, keys[run.model]) for run in runs}


def _keys(runs: Sequence[Run], model: str) -> list[str]:
    """Return the settings of a model in which the runs differ; of a node of another class the node alone."""
    keys = [*differences(runs, model)]
    nodes = [key.removesuffix(".class") for key in keys if key.endswith(".class")]
    return nodes + [
        key for key in keys if not any(key == node or key.startswith(f"{node}.") for node in nodes)
    ]


def _stating(run: Run, name: str, keys: Sequence[str]) -> str:
    """Return a name and settings: "kvpruner column=question"."""
    return " ".join([name, *(f"{key.rpartition('.')[2]}={label(run, key)}" for key in keys)])
