"""Plots of what pruning gains: decoding speed and peak memory, against the batch or as bars.

Tuning does not change a model's shape, so only untuned models are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from kvp.report.plots.means import means
from kvp.report.plots.panels import decode_speed, peak_memory, titles
from kvp.report.plots.points import Point
from kvp.report.plots.style import COLOURS, FAINT, INK, Look, deviations, legend, looks, make_panels
from kvp.results import MeasureRecord

SPEED, MEMORY = "decoded tokens/s", "peak memory (MiB)"  # the peak is over that of an empty process
PARTS = {  # of the peak over that of an empty process
    "weights_bytes": ("weights", COLOURS[0]),
    "cache_bytes": ("KV cache", COLOURS[1]),
    "rest_bytes": ("rest: activations, workspace", "#D9D9D9"),
}
BAR = 0.2  # inches, of figure height


def speed_and_memory(points: Sequence[Point]) -> Figure | None:
    """Draw lines against the batch size if several were measured, otherwise bars per model."""
    measured = [point for point in points if point.model.measure and not point.tuned]
    if not any(point.ratio for point in measured):
        return None
    return _lines(measured) if len({batch(point) for point in measured}) > 1 else _bars(measured)


def batch(point: Point) -> int:
    """Return the sequences that a model was measured with at a time."""
    return _measured(point).protocol.batch_size


def _lines(points: Sequence[Point]) -> Figure:
    series = {"dense": Look(color=INK, marker="*")} | looks(point.label for point in points if point.ratio)
    speeds, peaks = (
        means(points, partial(read, any_batch=True), apart=batch) for read in (decode_speed, peak_memory)
    )
    figure, axes = make_panels(2 * len(speeds))
    for row, (panel, title) in enumerate(titles(speeds).items()):
        for ax, group, label in zip(
            axes[2 * row :], (speeds[panel], peaks[panel]), (SPEED, MEMORY), strict=False
        ):
            for below, (name, look) in enumerate(reversed(series.items())):
                line = sorted((m for m in group if m.point.label == name), key=lambda mean: batch(mean.point))
                ax.errorbar(
                    [batch(mean.point) for mean in line],
                    [mean.value for mean in line],
                    deviations(mean.std for mean in line),
                    color=look.color,
                    marker=look.marker,
                    markersize=4.5 + 1.5 * min(below, 3),  # seen below others of the same value
                    zorder=2 - below / len(series),
                )
            ax.set_xscale("log", base=2)
            ax.set_xticks(
                sizes := sorted({batch(mean.point) for mean in group}), [str(size) for size in sizes]
            )
            ax.set_ylim(bottom=0)
            ax.set(title=title, xlabel="batch size", ylabel=label)
    legend(figure, [Line2D([], [], label=name, color=x.color, marker=x.marker) for name, x in series.items()])
    return figure


def _bars(points: Sequence[Point]) -> Figure:
    speeds = means(points, decode_speed)
    labels = [mean.point.label for group in speeds.values() for mean in group]
    figure, axes = make_panels(
        2 * len(speeds), height=0.9 + BAR * max(map(len, speeds.values())), share_y="row", labels=labels
    )
    for row, (panel, title) in enumerate(titles(speeds).items()):
        speed, memory = axes[2 * row : 2 * row + 2]
        group = speeds[panel]
        names = [mean.point.label for mean in group]
        quartiles = [[abs(mean.at(partial(_quartile, i)) - mean.value) for mean in group] for i in (0, 1)]
        speed.barh(
            names, [mean.value for mean in group], color=FAINT, xerr=quartiles, error_kw={"linewidth": 0.8}
        )
        left = [0.0] * len(group)
        for part, (label, color) in PARTS.items():
            widths = [mean.at(partial(_mebibytes, part)) for mean in group]
            memory.barh(names, widths, left=left, color=color, label=label)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for ax, label in ((speed, f"{SPEED} with quartiles"), (memory, MEMORY)):
            ax.set(title=title, xlabel=label)
            ax.grid(axis="y", visible=False)
            ax.tick_params(axis="y", length=0)
        speed.invert_yaxis()  # the shared axis of both
    legend(figure, [Patch(label=label, color=color) for label, color in PARTS.values()])
    return figure


def _quartile(which: int, point: Point) -> float:
    return _measured(point).decode.iqr[which]


def _mebibytes(part: str, point: Point) -> float:
    return getattr(_measured(point).memory, part) / 2**20


def _measured(point: Point) -> MeasureRecord:
    assert point.model.measure is not None  # `speed_and_memory` leaves out the others
    return point.model.measure
