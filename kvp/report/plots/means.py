"""Means of points over seeds, panel by panel."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvp.report.plots.panels import Panel
from kvp.report.plots.points import Point

Read = Callable[[Point], Mapping[Panel, float]]  # a number of a model, by panel


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Mean and standard deviation (0 for one draw) over points that differ in seeds only."""

    points: Sequence[Point]
    value: float
    std: float

    @property
    def point(self) -> Point:
        """The first point, for what all of them share."""
        return self.points[0]

    def at(self, read: Callable[[Point], float]) -> float:
        """Return the mean of another number of the points."""
        return statistics.fmean(map(read, self.points))


def means(
    points: Iterable[Point], read: Read, *, apart: Callable[[Point], Hashable] = lambda _: None
) -> dict[Panel, list[Mean]]:
    """Return, per panel, one mean per group (and value of `apart`), in the order of the points.

    A draw counts once, however many runs share its model; the dense model has none.
    """
    values: dict[Panel, dict[Hashable, dict[tuple[int, ...], tuple[Point, float]]]] = {}
    for point in points:
        for panel, value in read(point).items():
            groups = values.setdefault(panel.under(("model", point.base)), {})
            groups.setdefault((point.group, apart(point)), {}).setdefault(point.seeds, (point, value))
    return {
        panel: [_mean(list(draws.values())) for draws in groups.values()] for panel, groups in values.items()
    }


def _mean(members: Sequence[tuple[Point, float]]) -> Mean:
    numbers = [value for _, value in members]
    std = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return Mean(points=[point for point, _ in members], value=statistics.fmean(numbers), std=std)
