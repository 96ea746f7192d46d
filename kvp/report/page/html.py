"""`report.html`: the tables, a plot to explore, all runs and the plots in one file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from kvp.report.page.about import about
from kvp.report.page.entries import find_entries
from kvp.report.records.runs import Run
from kvp.report.table.table import Table, letter
from kvp.tables import plain

HERE = Path(__file__).parent
CAPTIONS = {  # by the beginning of a plot's name
    "perplexity_by": "Perplexity against the fraction removed: means and standard deviations over seeds.",
    "zero_shot_by": "Zero-shot average against the fraction removed: means and standard deviations over seeds.",
    "pareto": "Perplexity against what is left; the lines are the fronts of the models not tuned and tuned.",
    "speed_and_memory": "Decoding speed, and peak memory over that of an empty process, of models not tuned.",
    "sensitivity": "Rise of the loss without a layer's KV; the band goes from the lowest to the highest seed.",
    "kept_widths": "What each layer kept of its dense width.",
    "recovery_losses": "Training losses of the recovery, smoothed; the raw values are faint.",
}


def write_html(
    runs: Sequence[Run],
    tables: Sequence[Table],
    plots: Sequence[Path],
    out: Path,
    *,
    home: Path | None = None,
) -> Path:
    """Write `report.html`; links to run.json are relative to its home, so both can be moved together.

    Args:
        plots: What `write_plots` wrote; the SVG files are put into the page.
        home: Directory that the page will stand in; `out` by default.
    """
    script, style = ((HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    pictures = [path for path in plots if path.suffix == ".svg"]
    entries = find_entries(runs)
    text = _template().render(
        entries=entries,
        numbers=list(dict.fromkeys(heading for entry in entries for heading in entry.numbers)),
        runs=runs,
        title=tables[0].title if tables else "kvp report",
        about=about(runs),
        tables=tables,
        pictures=[(_caption(path.stem), _embedded(path)) for path in pictures],
        href=partial(_href, out=home or out),
        script=Markup(script),  # ours, not data
        style=Markup(style),
        allowed={"script": _digest(script), "style": _digest(style)},
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"letter": letter, "plain": plain}
    return environment.get_template("report.html.jinja")


def _digest(text: str) -> str:
    """Return the hash that the page's policy allows: of this text, and of nothing that a record could smuggle in."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _href(run: Run, *, out: Path) -> str:
    """Return the path of the record's file from the page."""
    return quote(Path(os.path.relpath(run.path, out)).as_posix())


def _caption(name: str) -> str:
    return next((caption for start, caption in CAPTIONS.items() if name.startswith(start)), name)


def _embedded(picture: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.read_bytes()).decode()}"
