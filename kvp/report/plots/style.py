"""The look of every plot: one column wide, 8 pt, colours that colour-blind readers and grey print tell apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

COLUMN = 3.4  # inches: one column of a two-column paper; a panel is this wide
HEIGHT = 2.2  # inches, of a panel
KEY, LETTER, LINE = 0.52, 0.068, 0.17  # inches that a legend's key, letter and line take at 8 pt
INK = "#000000"
FAINT = "#999999"
# Okabe and Ito (2008), without the yellow that vanishes on white paper; the first three differ in grey too.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
LOG_FROM = 8.0  # a log axis where the largest value is so many times the smallest

RC: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same bytes on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.hashsalt": "kvp",
    "svg.fonttype": "path",
    "savefig.dpi": 200,
}


@dataclass(frozen=True, kw_only=True)
class Look:
    """Colour and marker of one series."""

    color: str
    marker: str


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Return one look per name, in the order given; colours repeat after six, markers after eleven."""
    return {
        name: Look(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)])
        for i, name in enumerate(dict.fromkeys(names))
    }


def make_panels(
    count: int,
    *,
    height: float = HEIGHT,
    share_y: Literal["none", "row", "all"] = "none",
    labels: Sequence[str] = (),
) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` panels, at most two side by side, each one paper column wide, with room for labels."""
    columns = min(count, 2)
    rows = -(-count // columns)
    room = LETTER * max((len(label) - 12 for label in labels), default=0)
    figure = Figure(figsize=(COLUMN * columns + max(room, 0), height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y).flatten().tolist()
    for empty in grid[count:]:
        empty.remove()
    return figure, grid[:count]


def legend(figure: Figure, keys: Sequence[Artist]) -> None:
    """Draw one legend for all panels, in a strip added below them and so never over data."""
    inches = [KEY + LETTER * len(str(key.get_label())) for key in keys]
    columns = next(n for n in range(len(keys), 0, -1) if n == 1 or _width(inches, n) <= figure.get_figwidth())
    figure.set_figwidth(max(figure.get_figwidth(), _width(inches, columns)))
    figure.set_figheight(figure.get_figheight() + LINE * -(-len(keys) // columns))
    figure.legend(
        handles=keys, loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.2
    )


def _width(inches: Sequence[float], columns: int) -> float:
    """Return the width in inches of a legend that fills columns one by one, the first ones one key longer."""
    rows, longer = divmod(len(inches), columns)
    ends = [(rows + 1) * min(i, longer) + rows * max(i - longer, 0) for i in range(columns + 1)]
    return sum(max(inches[a:b]) for a, b in pairwise(ends))


def deviations(stds: Iterable[float]) -> list[float]:
    """Return lengths of error bars; NaN, which draws none, for a single seed, whose deviation is 0."""
    return [std or math.nan for std in stds]


def set_scale(ax: Axes, values: Iterable[float], axis: Literal["x", "y"] = "y") -> None:
    """Make an axis logarithmic where the range of the values demands it, with ticks written out (30, 100, 3,000).

    Where some values are not positive it is linear around zero, below a hundredth of the largest.
    """
    values = list(values)
    low, high = min(values), max(values)
    scale, line = (ax.set_yscale, ax.yaxis) if axis == "y" else (ax.set_xscale, ax.xaxis)
    if low > 0 and high >= LOG_FROM * low:
        scale("log")
        line.set_major_locator(LogLocator(subs=(1, 3) if high > 30 * low else (1, 2, 3, 5)))
    elif low <= 0 < high and high >= LOG_FROM**2 * abs(median(values)):
        scale("symlog", linthresh=10 ** math.floor(math.log10(high / 100)))
    else:
        return
    line.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    line.set_minor_formatter(NullFormatter())


def save(figure: Figure, out: Path, name: str) -> list[Path]:
    """Write `name.png` and `name.svg`, the same bytes each time: no date, no program, ids from a fixed salt."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, alike in both
    png, svg = out / f"{name}.png", out / f"{name}.svg"
    figure.savefig(png, metadata={"Software": None})
    figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return [png, svg]


def style() -> AbstractContextManager[None]:
    """Return the context of all drawing and saving: `with style():`."""
    return matplotlib.rc_context(RC)
