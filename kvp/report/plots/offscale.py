"""Collapsed models, which lie above the axis: on it, they would squeeze all others together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from kvp.report.plots.style import set_scale

COLLAPSED = 30  # times the best value of a panel
NOTE = "above the axis: off scale"


class Spot(NamedTuple):
    """A value, where it stands, and the look of the marker."""

    x: float
    value: float
    marks: Mapping[str, Any]


def ceiling(values: Sequence[float]) -> float:
    """Return the largest value that has a place on the axis; a percentage always has one."""
    return max(COLLAPSED * min(values), 100)


def set_range(ax: Axes, spots: Sequence[Spot], title: str) -> bool:
    """Scale the y axis to what has not collapsed, mark the rest above it, and return whether there is any."""
    top = ceiling([spot.value for spot in spots])
    set_scale(ax, [min(spot.value, top) for spot in spots])
    left, right = ax.get_xlim()
    placed: list[float] = []
    highest = 0
    for spot in (spot for spot in spots if spot.value > top):
        below = sum(abs(spot.x - x) < 0.02 * (right - left) for x in placed)
        placed.append(spot.x)
        highest = max(highest, below)
        y = 1 + 0.05 * below  # of the panel's height
        ax.plot(spot.x, y, transform=ax.get_xaxis_transform(), clip_on=False, zorder=3, **spot.marks)
    if placed:
        ax.set_ylim(top=top)
    ax.set_title(title, pad=6 + 6 * highest)
    return bool(placed)
