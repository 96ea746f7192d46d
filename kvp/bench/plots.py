"""Plots of a record: decode speed against its limit, and the parts of the peak memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from kvp.report.plots.speed import PARTS
from kvp.report.plots.style import COLOURS, INK, Look, legend, looks, make_panels, save, style

Row = Mapping[str, Any]
BAR = 0.2  # inches, of figure height
GAIN = COLOURS[0]
BY_BYTES: dict[str, Any] = {"marker": "|", "markersize": 12, "markeredgewidth": 2, "color": INK}


def write_plots(record: Mapping[str, Any], out: Path) -> list[Path]:
    """Write decode and memory as PNG and SVG; return their paths, none without rows.

    At one batch size the decode plot compares with the first model; there is none where that does not fit.
    """
    rows = [row for row in record["rows"] if not row["failed"]]
    if not rows:
        return []
    names = [model["name"] for model in record["models"]]
    with style():
        several = len({row["batch_size"] for row in rows}) > 1
        decode = _decode(rows, names) if several else _gain(rows, names[0])
        written = [] if decode is None else save(decode, out, "decode")
        return [*written, *save(_memory(rows), out, "memory")]


def _decode(rows: Sequence[Row], names: Sequence[str]) -> Figure:
    """Tokens per second against the batch, one panel per path and shape; dashed: the roofline."""
    looked = {names[0]: Look(color=INK, marker="*")} | looks(names[1:])
    panels = _panels(rows)
    figure, axes = make_panels(len(panels))
    for ax, (title, group) in zip(axes, panels.items(), strict=True):
        for name, look in looked.items():
            line = sorted((row for row in group if row["model"] == name), key=lambda row: row["batch_size"])
            batches = [row["batch_size"] for row in line]
            limits = [1000 * row["batch_size"] / row["roofline"]["milliseconds_per_step"] for row in line]
            rates = [row["decode"]["tokens_per_second"] for row in line]
            ax.plot(batches, limits, color=look.color, linestyle="--", linewidth=0.8)
            ax.plot(batches, rates, color=look.color, marker=look.marker)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes := sorted({row["batch_size"] for row in group}), [str(size) for size in sizes])
        ax.set_yscale("log")
        ax.set(title=title, xlabel="batch size", ylabel="decoded tokens/s")
    keys = [Line2D([], [], label=name, color=x.color, marker=x.marker) for name, x in looked.items()]
    legend(figure, [*keys, Line2D([], [], label="roofline", color=INK, linestyle="--", linewidth=0.8)])
    return figure


def _gain(rows: Sequence[Row], first: str) -> Figure | None:
    """Decode rate over the first model's at the one batch size there is, and what the bytes of a step predict.

    Rows of a path and shape at which the first model does not fit have no rate over it; None: all are such.
    """
    panels = _panels([row for row in rows if row["against_first"]])
    if not panels:
        return None
    figure, axes = _bars(panels)
    for ax, (title, group) in zip(axes, panels.items(), strict=True):
        names, against = [row["model"] for row in group], [row["against_first"] for row in group]
        rates = [gain["decode"]["median"] for gain in against]
        spread = [
            [abs(gain["decode"]["iqr"][side] - gain["decode"]["median"]) for gain in against]
            for side in (0, 1)
        ]
        ax.barh(names, rates, xerr=spread, color=GAIN, error_kw={"ecolor": INK, "elinewidth": 0.8})
        ax.plot([gain["decode_by_bytes"] for gain in against], names, linestyle="", **BY_BYTES)
        ax.set(title=f"{title}, batch {group[0]['batch_size']}", xlabel=f"decode rate / {first}")
    bars = Patch(label="measured, interquartile range", color=GAIN)
    legend(figure, [bars, Line2D([], [], label="predicted from bytes", linestyle="", **BY_BYTES)])
    return figure


def _bars(panels: Mapping[str, Sequence[Row]]) -> tuple[Figure, list[Axes]]:
    """A panel each with room for a bar per model, the first on top."""
    labels = [row["model"] for group in panels.values() for row in group]
    figure, axes = make_panels(len(panels), height=0.9 + BAR * max(map(len, panels.values())), labels=labels)
    for ax in axes:
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.invert_yaxis()
    return figure, list(axes)


def _memory(rows: Sequence[Row]) -> Figure:
    """Weights, cache and rest of the peak at the largest batch of each panel that all of its models hold."""
    panels = {title: _together(group) for title, group in _panels(rows).items()}
    figure, axes = _bars(panels)
    for ax, (title, group) in zip(axes, panels.items(), strict=True):
        left = [0.0] * len(group)
        for part, (label, color) in PARTS.items():
            widths = [row["memory"][part] / 2**20 for row in group]
            ax.barh([row["model"] for row in group], widths, left=left, color=color, label=label)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        ax.set(title=f"{title}, batch {group[0]['batch_size']}", xlabel="peak memory (MiB)")
    legend(figure, [Patch(label=label, color=color) for label, color in PARTS.values()])
    return figure


def _together(group: Sequence[Row]) -> list[Row]:
    names = {row["model"] for row in group}
    batches = sorted({row["batch_size"] for row in group}, reverse=True)
    at = {batch: [row for row in group if row["batch_size"] == batch] for batch in batches}
    return next((rows for rows in at.values() if len(rows) == len(names)), at[batches[0]])


def _panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    panels: dict[str, list[Row]] = {}
    for row in rows:
        title = f"{row['path']}, {row['prompt_length']} + {row['new_tokens']} tokens"
        panels.setdefault(title, []).append(row)
    return panels
