"""Plots of recovery: the training losses of each run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvp.report.plots.points import Point
from kvp.report.plots.style import INK, Look, legend, looks, make_panels

MEMORY = 0.8  # weight of the past in the running mean
# Lines for the parts of a loss with a teacher, before they are weighted; those in nats per token.
PARTS: dict[str, Literal[":", "-."]] = {"text": ":", "logits": "-."}


def recovery_losses(points: Sequence[Point]) -> Figure | None:
    """Draw a line per run over faint raw losses; a panel per ratio and recovery, with the dense control in black.

    Of a run that learns from the dense model, thin lines show the loss's parts.
    """
    curves = [point for point in points if point.tuned and _losses(point)]
    panels = list(dict.fromkeys((p.base, p.recovery, p.amount) for p in curves))
    panels = [panel for panel in panels if panel[-1]] or panels  # the controls stand in the others' panels
    if not panels:
        return None
    varied = [len(set(values)) > 1 for values in zip(*panels, strict=True)]
    series = {"dense": Look(color=INK, marker="*")} | looks(p.strategy for p in curves if p.ratio)
    series = {name: look for name, look in series.items() if any(p.strategy == name for p in curves)}
    figure, axes = make_panels(len(panels), share_y="all")
    for ax, (base, recovery, amount) in zip(axes, panels, strict=True):
        for point in reversed(curves):
            if (point.base, point.recovery) == (base, recovery) and point.amount in (amount, ""):
                look = series[point.strategy]
                steps, raw = zip(*_losses(point), strict=True)
                ax.plot(steps, raw, color=look.color, linewidth=0.6, alpha=0.25)
                every = max(1, len(steps) // 6)
                ax.plot(steps, smoothed(raw), color=look.color, marker=look.marker, markevery=every)
                for part, (at, curve) in _parts(point).items():
                    ax.plot(at, smoothed(curve), color=look.color, linestyle=PARTS[part], linewidth=0.8)
        ax.set(xlabel="step", ylabel="training loss (nats/token)")
        words = (base, recovery, f"{amount} removed")
        ax.set_title(", ".join(word for word, differs in zip(words, varied, strict=True) if differs))
    keys = [Line2D([], [], label=name, color=x.color, marker=x.marker) for name, x in series.items()]
    shown = {part for point in curves for part in _parts(point)}
    keys += [
        Line2D([], [], label=f"{part} part", color=INK, linestyle=line, linewidth=0.8)
        for part, line in PARTS.items()
        if part in shown
    ]
    legend(figure, keys)
    return figure


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the exponential running mean, without the pull of a start at zero."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = MEMORY * mean + (1 - MEMORY) * value
        weight = MEMORY * weight + (1 - MEMORY)
        result.append(mean / weight)
    return result


def _losses(point: Point) -> list[tuple[int, float]]:
    """Return (step, loss) pairs, losses in nats per token."""
    recovery = point.run.record.recovery
    return [(step, loss) for step, loss in (recovery.losses if recovery else ()) if loss is not None]


def _parts(point: Point) -> dict[str, tuple[list[int], list[float]]]:
    """Return steps and values of the loss's parts; none without a teacher."""
    recovery = point.run.record.recovery
    curves = recovery.loss_parts if recovery else {}
    known = {part: {step: loss for step, loss in curves.get(part, ()) if loss is not None} for part in PARTS}
    return {part: ([*curve], [*curve.values()]) for part, curve in known.items() if curve}
