"""Plots of the layers: how much each one matters, and how wide it was left."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvp.report.plots.points import Point
from kvp.report.plots.style import legend, looks, make_panels, set_scale

WIDTHS = {
    "num_attention_heads": "query heads",
    "num_key_value_heads": "KV heads",
    "qk_head_dim": "query and key channels",
    "v_head_dim": "value channels",
    "intermediate_size": "FFN channels",
}
CELL = 0.2  # inches, height of a row of the heat map


def sensitivity(points: Sequence[Point]) -> Figure | None:
    """Draw phase A's profile, a line per strategy: mean over seeds, their range as a band.

    Strategies that share a profile (other budgets, other temperatures) share the line of the shortest label.
    """
    owners: dict[tuple[str, tuple[float, ...]], str] = {}
    for point in sorted(points, key=lambda point: len(point.strategy)):
        if point.state == "pruned" and point.run.record.sensitivity:
            owners.setdefault((point.base, point.run.record.sensitivity), point.strategy)
    if not owners:
        return None
    profiles: dict[tuple[str, str, int], list[tuple[float, ...]]] = {}
    for (base, profile), strategy in owners.items():
        profiles.setdefault((base, strategy, len(profile)), []).append(profile)
    bases = list(dict.fromkeys(base for base, _, _ in profiles))
    series = looks(strategy for _, strategy, _ in profiles)
    figure, axes = make_panels(len(bases))
    for ax, base in zip(axes, bases, strict=True):
        shown = [(strategy, alike) for (of, strategy, _), alike in profiles.items() if of == base]
        for strategy, alike in shown:
            layers = range(len(alike[0]))
            mean, low, high = (
                [f(values) for values in zip(*alike, strict=True)] for f in (statistics.fmean, min, max)
            )
            look = series[strategy]
            ax.fill_between(layers, low, high, color=look.color, alpha=0.2, linewidth=0)
            ax.plot(layers, mean, color=look.color, marker=look.marker, markersize=3)
        ax.set(title=base, xlabel="layer", ylabel="NLL rise without it (nats/token)")
        set_scale(ax, [value for _, alike in shown for profile in alike for value in profile])
    legend(figure, [Line2D([], [], label=name, color=x.color, marker=x.marker) for name, x in series.items()])
    return figure


def kept_widths(points: Sequence[Point]) -> Figure | None:
    """Draw a heat map of what each layer kept, in percent of dense: models x layers, a panel per axis that was cut.

    The points have one base; of several seeds the first is shown. Axes cut alike share a panel; a single model
    gets one panel, axes x layers. A model without whole blocks has other layers than dense and is not shown.
    """
    cut = {point.label: point for point in reversed(points) if point.state == "pruned"}
    kept = {
        axis: {name: share for name, point in reversed(cut.items()) if (share := _kept(point, axis))}
        for axis in WIDTHS
    }
    shown: dict[str, dict[str, list[float]]] = {}
    for axis, rows in kept.items():
        if any(share < 100 for row in rows.values() for share in row):
            same = next((title for title, others in shown.items() if others == rows), "")
            shown.pop(same, None)
            shown[f"{same}; {WIDTHS[axis]}".removeprefix("; ")] = rows
    if not shown:
        return None
    if len(cut) == 1:
        name = next(iter(cut))
        shown = {name: {title: rows[name] for title, rows in shown.items()}}
    labels = list(next(iter(shown.values())))
    figure, axes = make_panels(
        len(shown), height=0.8 + CELL * max(3, len(labels)), share_y="row", labels=labels
    )
    for ax, (title, rows) in zip(axes, shown.items(), strict=True):
        image = ax.imshow(
            list(rows.values()), cmap="cividis", vmin=0, vmax=100, aspect="auto", interpolation="none"
        )
        ax.set(title=title, xlabel="layer")
        ax.set_yticks(range(len(labels)), labels)
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="kept (%)", shrink=0.9, aspect=25)
    return figure


def _kept(point: Point, axis: str) -> list[float]:
    """Return percent of the dense width per layer; nothing if the pruned model has other layers."""
    dense, pruned = (point.run.record.models()[name].size.layers for name in ("dense", "pruned"))
    if len(dense) != len(pruned):
        return []
    return [
        100 * getattr(left, axis) / max(1, getattr(whole, axis))
        for whole, left in zip(dense, pruned, strict=True)
    ]
