"""The plot of an ablation: one ratio, a row for each strategy and its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvp.record import Denominator
from kvp.report.plots.means import Read, means
from kvp.report.plots.offscale import ceiling
from kvp.report.plots.panels import titles
from kvp.report.plots.points import Point
from kvp.report.plots.style import INK, Look, deviations, legend, looks, make_panels, set_scale

ROW = 0.18  # inches of height
NOTE = "on the right edge: off scale"
LINES: dict[str, Any] = {"dense": (0, (3.5, 2)), "dense, tuned alike": "solid"}


def at_one_ratio(points: Sequence[Point], of: Denominator, read: Read, label: str) -> Figure | None:
    """Draw a number of the runs that asked for one ratio of `of`: pruned is open, recovered filled, dense a line.

    Collapsed models stand on the right edge.
    """
    panels = {
        panel: group
        for panel, group in means([p for p in points if p.ratio is None or p.ratio[1] == of], read).items()
        if any(mean.point.ratio for mean in group)
    }
    if not panels:
        return None
    shown = [mean.point for group in panels.values() for mean in group]
    share = next(100 * point.ratio[0] for point in shown if point.ratio)
    names = sorted({point.strategy for point in shown if point.ratio})
    series = looks(point.recovery for point in sorted(shown, key=lambda p: p.tuned) if point.ratio)
    beyond = False
    figure, axes = make_panels(len(panels), height=0.8 + ROW * len(names), share_y="row", labels=names)
    for ax, (panel, title) in zip(axes, titles(panels).items(), strict=True):
        group = panels[panel]
        top = ceiling([mean.value for mean in group])
        inside = [mean.value for mean in group if mean.value <= top]
        set_scale(ax, inside, "x")
        for mean in group:
            point = mean.point
            if point.ratio is None:
                ax.axvline(mean.value, color=INK, linewidth=0.9, linestyle=LINES[point.state])
                continue
            row, marks = names.index(point.strategy), _marks(series[point.recovery], tuned=point.tuned)
            if mean.value <= top:
                ax.errorbar(mean.value, row, xerr=deviations([mean.std]), elinewidth=0.8, **marks)
            else:
                ax.plot(1, row, transform=ax.get_yaxis_transform(), clip_on=False, zorder=3, **marks)
        ax.set(title=title, xlabel=f"{label}, {share:g} % of {of} removed")
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        if len(inside) < len(group):
            ax.set_xlim(right=1.1 * max(inside))
            beyond = True
    legend(figure, _keys(shown, series, [NOTE] if beyond else []))
    return figure


def _marks(look: Look, *, tuned: bool) -> dict[str, Any]:
    fill = look.color if tuned else "white"
    return {"color": look.color, "marker": look.marker, "markerfacecolor": fill, "linestyle": "none"}


def _keys(shown: Sequence[Point], series: dict[str, Look], notes: Sequence[str]) -> list[Line2D]:
    keys = [
        Line2D(
            [],
            [],
            label="pruned" if name == "none" else f"recovered ({name})",
            **_marks(look, tuned=name != "none"),
        )
        for name, look in series.items()
    ]
    states = {point.state for point in shown}
    keys += [
        Line2D([], [], label=state, color=INK, linewidth=0.9, linestyle=dash)
        for state, dash in LINES.items()
        if state in states
    ]
    return keys + [Line2D([], [], label=note, linestyle="none") for note in notes]
