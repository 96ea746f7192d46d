"""All plots that a set of runs has data for, as PNG and SVG.

write_plots(read_runs(["outputs/runs"]), Path("report"))
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from kvp.report.plots import choices, layers, losses, panels, quality, speed
from kvp.report.plots.points import find_points
from kvp.report.plots.style import save, style
from kvp.report.records.runs import Run

AXES = {
    "perplexity": (panels.perplexity, "perplexity"),
    "zero_shot": (panels.zero_shot, "zero-shot average (%)"),
}


def write_plots(runs: Sequence[Run], out: Path) -> list[Path]:
    """Draw what the records hold data for; the same runs give the same bytes.

    Returns:
        The PNG and SVG files, two per plot.
    """
    out.mkdir(parents=True, exist_ok=True)
    with style():
        return [path for name, figure in figures(runs) if figure for path in save(figure, out, name)]


def figures(runs: Sequence[Run]) -> Iterator[tuple[str, Figure | None]]:
    """Yield every plot with a name; None without data for it."""
    points = find_points(runs)
    denominators = sorted({point.ratio[1] for point in points if point.ratio})
    for of in denominators:
        several = len({point.ratio for point in points if point.ratio and point.ratio[1] == of}) > 1
        draw = quality.against_ratio if several else choices.at_one_ratio
        for name, (read, label) in AXES.items():
            yield f"{name}_by_{of}", draw(points, of, read, label)
    for cost in quality.costs(points):
        yield f"pareto_{cost}", quality.pareto(points, cost, *AXES["perplexity"])
    yield "speed_and_memory", speed.speed_and_memory(points)
    yield "sensitivity", layers.sensitivity(points)
    bases = sorted({point.base for point in points})
    for base in bases:
        name = "kept_widths" if len(bases) == 1 else "kept_widths_" + re.sub(r"[^\w.-]", "_", base)
        yield name, layers.kept_widths([point for point in points if point.base == base])
    yield "recovery_losses", losses.recovery_losses(points)
