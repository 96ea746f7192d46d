"""Plots of what pruning costs: against the fraction removed, and against what is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvp.record import Denominator
from kvp.report.plots import panels
from kvp.report.plots.means import Mean, Read, means
from kvp.report.plots.offscale import NOTE, Spot, set_range
from kvp.report.plots.panels import Panel, titles
from kvp.report.plots.points import Point
from kvp.report.plots.style import FAINT, INK, Look, deviations, legend, looks, make_panels

Dash = Any  # a matplotlib line style
UNTUNED: Dash = (0, (3.5, 2))
TUNED: tuple[Dash, ...] = ("solid", (0, (6, 1.5, 1, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5, 1, 1.5)))
REMOVED = {
    "kv_cache": "KV cache removed (%)",
    "params": "parameters removed (%)",
    "block_params": "parameters of the blocks removed (%)",
    "blocks": "blocks removed (%)",
    "sparsity": "zeros in the matrices (%)",
    "cache_bytes": "stored cache bytes removed (%)",
    "memory": "bytes of weights and cache removed (%)",
}
DENSE = Look(color=INK, marker="*")
COSTS = {  # label, key of the size, unit
    "kv_bytes": ("KV cache (KiB per token)", "kv_bytes_per_token", 2**10),
    "stored_bytes": ("KV cache as stored (KiB per token)", "stored_bytes_per_token", 2**10),
    "params": ("parameters (millions)", "params", 10**6),
}


def against_ratio(points: Sequence[Point], of: Denominator, read: Read, label: str) -> Figure | None:
    """Draw a number against the achieved ratio of the runs that asked for `of`: mean and deviation over seeds.

    Pruned is dashed with open markers, recovered solid with filled ones. The dense model, and the dense model
    tuned alike, are the horizontal lines to read them against.
    """

    def draw(ax: Axes, group: Sequence[Mean], series: Mapping[str, Look], dashes: Mapping[str, Dash]) -> None:
        lines: dict[tuple[str, str], list[Mean]] = {}
        for mean in group:
            if mean.point.ratio:
                lines.setdefault((mean.point.strategy, mean.point.recovery), []).append(mean)
            else:
                ax.axhline(mean.value, color=INK, linewidth=0.9, linestyle=dashes[mean.point.recovery])
        for (strategy, recovery), line in lines.items():
            line.sort(key=removed)
            ax.errorbar(
                [removed(mean) for mean in line],
                [mean.value for mean in line],
                deviations(mean.std for mean in line),
                linestyle=dashes[recovery],
                elinewidth=0.8,
                **_marks(series[strategy], tuned=line[0].point.tuned),
            )
        shares = [removed(mean) for mean in group if mean.point.ratio]
        span = max(shares) - min(shares)
        beside = 0.08 * span if span > 1 else 10
        ax.set(xlabel=REMOVED[of], ylabel=label, xlim=(min(shares) - beside, max(shares) + beside))

    def removed(mean: Mean) -> float:
        return 100 * mean.at(lambda point: point.achieved[of])

    return _figure(
        [p for p in points if p.ratio is None or p.ratio[1] == of], read, removed, draw, _line_keys
    )


def costs(points: Sequence[Point]) -> list[str]:
    """Return the keys of `COSTS` that tell points apart: bytes as stored where some cache has a format, else not."""
    sizes = [point.model.size for point in points]
    stored = [size.stored_bytes_per_token for size in sizes]
    formats = None not in stored and stored != [size.kv_bytes_per_token for size in sizes]
    return [cost for cost in COSTS if cost != ("kv_bytes" if formats else "stored_bytes")]


def pareto(points: Sequence[Point], cost: str, read: Read, label: str) -> Figure | None:
    """Draw a number against a cost, less of both being better, with the fronts of untuned and tuned models.

    Tuning lowers perplexity by itself, so the tuned models have a front of their own.
    """
    name, key, unit = COSTS[cost]

    def read_both(point: Point) -> dict[Panel, float]:
        (left,) = panels.size(point, key)
        return {panel.under(*left.facts): value for panel, value in read(point).items()}

    def left(mean: Mean) -> float:
        return mean.at(lambda point: getattr(point.model.size, key) / unit)

    def draw(ax: Axes, group: Sequence[Mean], series: Mapping[str, Look], _: Mapping[str, Dash]) -> None:
        for tuned in (False, True):
            spots = [(left(mean), mean.value) for mean in group if mean.point.tuned == tuned]
            steps = front(spots)
            ax.step(
                [x for x, _ in steps],
                [y for _, y in steps],
                where="post",
                color=FAINT,
                linestyle="solid" if tuned else UNTUNED,
                linewidth=0.9,
                zorder=1,
            )
        for mean in group:
            look = series.get(mean.point.strategy, DENSE)
            ax.errorbar(
                left(mean),
                mean.value,
                deviations([mean.std]),
                linestyle="none",
                elinewidth=0.8,
                **_marks(look, tuned=mean.point.tuned),
            )
        ax.set(xlabel=name, ylabel=label)
        if cost == "stored_bytes":  # a format halves it, and halves it again
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:g}")

    return _figure(points, read_both, left, draw, _front_keys)


def front(spots: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the spots that no other spot beats in both coordinates, from left to right; less is better."""
    best: list[tuple[float, float]] = []
    for spot in sorted(spots):
        if not best or spot[1] < best[-1][1]:
            best.append(spot)
    return best


Draw = Callable[[Axes, Sequence[Mean], Mapping[str, Look], Mapping[str, Dash]], None]
Keys = Callable[[Sequence[Point], Mapping[str, Dash]], list[Line2D]]


def _figure(
    points: Sequence[Point], read: Read, across: Callable[[Mean], float], draw: Draw, keys: Keys
) -> Figure | None:
    """Draw a panel per protocol under which something was pruned, and the legend."""
    shared = {
        panel: group
        for panel, group in means(points, read).items()
        if any(mean.point.ratio for mean in group)
    }
    if not shared:
        return None
    shown = [mean.point for group in shared.values() for mean in group]
    series = looks(point.strategy for point in shown if point.ratio)
    tuned = dict.fromkeys(point.recovery for point in shown if point.tuned)
    dashes = {"none": UNTUNED} | {name: TUNED[i % len(TUNED)] for i, name in enumerate(tuned)}
    figure, axes = make_panels(len(shared))
    names = [Line2D([], [], label=name, linestyle="none", **_marks(look)) for name, look in series.items()]
    beyond = []
    for ax, (panel, title) in zip(axes, titles(shared).items(), strict=True):
        draw(ax, shared[panel], series, dashes)
        spots = [
            Spot(
                across(mean),
                mean.value,
                _marks(series.get(mean.point.strategy, DENSE), tuned=mean.point.tuned),
            )
            for mean in shared[panel]
        ]
        beyond.append(set_range(ax, spots, title))
    if any(beyond):
        names.append(Line2D([], [], linestyle="none", label=NOTE))
    legend(figure, names + keys(shown, dashes))
    return figure


def _marks(look: Look, *, tuned: bool = True) -> dict[str, Any]:
    """Return the marker of a series; open for untuned models."""
    fill, size = look.color if tuned else "white", 8 if look.marker == "*" else 4.5
    return {"color": look.color, "marker": look.marker, "markerfacecolor": fill, "markersize": size}


def _line_keys(shown: Sequence[Point], dashes: Mapping[str, Dash]) -> list[Line2D]:
    """Return the keys of the dashes and of the horizontal lines, which have the dashes of the recovery."""
    states = {(point.recovery, point.state) for point in shown}
    keys = []
    for name, dash in dashes.items():
        words, fill = ("pruned", "white") if name == "none" else (f"recovered ({name})", FAINT)
        if states & {(name, "pruned"), (name, "recovered")}:
            keys.append(
                Line2D([], [], label=words, color=FAINT, linestyle=dash, marker="o", markerfacecolor=fill)
            )
    for state, dash in (("dense", UNTUNED), ("dense, tuned alike", TUNED[0])):
        if any(state == other for _, other in states):
            keys.append(Line2D([], [], label=state, color=INK, linewidth=0.9, linestyle=dash))
    return keys


def _front_keys(shown: Sequence[Point], _: Mapping[str, Dash]) -> list[Line2D]:
    """Return the keys of dense, the fill, and the two fronts."""
    keys = [Line2D([], [], label="dense", linestyle="none", **_marks(DENSE))]
    for tuned in (False, True):
        if any(point.tuned == tuned for point in shown):
            marks: dict[str, Any] = {
                "label": f"{'tuned' if tuned else 'not tuned'}, with front",
                "linestyle": TUNED[0] if tuned else UNTUNED,
                "markerfacecolor": FAINT if tuned else "white",
            }
            keys.append(Line2D([], [], color=FAINT, marker="o", **marks))
    return keys
