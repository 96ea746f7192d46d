"""A plot of results.json: tokens per second against the requests at once, a panel per length and clock."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.lines import Line2D

from kvp.report.plots.style import legend, looks, make_panels, save, style

CLOCKS = {"seconds": "tokens/s", "cpu_seconds": "tokens per CPU second"}


def write_plot(record: dict[str, Any], out: Path) -> list[Path]:
    """Write throughput as PNG and SVG; return their paths."""
    models = [model for model in record["models"] if "refused" not in model["rounds"][0]]
    lengths = list(dict.fromkeys((load["prompt"], load["new"]) for load in record["loads"]))
    looked = looks(model["name"] for model in models)
    with style():
        figure, axes = make_panels(len(CLOCKS) * len(lengths))
        panels = [(length, clock) for length in lengths for clock in CLOCKS]
        for ax, ((prompt, new), clock) in zip(axes, panels, strict=True):
            here = [
                (number, load["at_once"])
                for number, load in enumerate(record["loads"])
                if (load["prompt"], load["new"]) == (prompt, new)
            ]
            for model in models:
                cells = [[turn["loads"][number] for turn in model["rounds"]] for number, _ in here]
                rates = [median(cell["tokens"] / cell[clock] for cell in of_rounds) for of_rounds in cells]
                look = looked[model["name"]]
                ax.plot([many for _, many in here], rates, color=look.color, marker=look.marker)
            ax.set_xscale("log", base=2)
            ax.set_xticks([many for _, many in here], [str(many) for _, many in here])
            ax.set(title=f"{prompt} + {new} tokens", xlabel="requests at once", ylabel=CLOCKS[clock])
        legend(
            figure, [Line2D([], [], label=name, color=x.color, marker=x.marker) for name, x in looked.items()]
        )
        return save(figure, out, "throughput")
