"""The summary run of a group in Weights & Biases: the tables, and the plots as images."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal

from kvp.report.keys import label
from kvp.report.runs import Run
from kvp.report.table import Cell, Table
from kvp.tracking import Wandb


def track(
    runs: Sequence[Run],
    tables: Sequence[Table],
    plots: Sequence[Path],
    out: Path,
    *,
    mode: Literal["offline", "online"],
    group: str | None,
) -> str:
    """Log a report, one run per group; where it lies."""
    group = group or "-".join(_all(runs, key) for key in ("model", "strategy"))
    run_id = sha256(f"report {group}".encode()).hexdigest()[:12]
    config = {"runs": [run.hash for run in runs]}
    about = {"name": f"report-{group}", "run_id": run_id, "group": group, "job_type": "report"}
    with Wandb(mode=mode).run(directory=out, config=config, **about) as log:
        for table in tables:
            rows = [
                [*row.labels, *(cell.value if cell.value is not None else cell.text for cell in row.cells)]
                for row in table.rows
            ]
            log.table(table.name, [*table.keys, *(column.title for column in table.columns)], rows)
        for plot in plots:
            if plot.suffix == ".png":
                log.image(plot.stem, plot)
    return log.location


def _value(cell: Cell) -> float | str:
    return cell.text if cell.value is None else cell.value


def _all(runs: Sequence[Run], key: str) -> str:
    return "+".join(sorted({label(run, key) for run in runs}))
