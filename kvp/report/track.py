"""The summary run of a group in Weights & Biases: the tables, and the plots as images."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal

from kvp.report.records.keys import label
from kvp.report.records.runs import Run
from kvp.report.table.table import Cell, Table
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
    """Log a report as one run per group, and return where it lies."""
    group = group or "+".join(sorted({_group(run) for run in runs}))
    run_id = sha256(f"report {group}".encode()).hexdigest()[:12]
    config = {"runs": [run.hash for run in runs]}
    about = {"name": f"report-{group}", "run_id": run_id, "group": group, "job_type": "report"}
    with Wandb(mode=mode).run(directory=out, config=config, **about) as log:
        for table in tables:
            rows = [[*row.labels, *map(_value, row.cells)] for row in table.rows]
            log.table(table.name, [*table.keys, *(column.title for column in table.columns)], rows)
        for plot in plots:
            if plot.suffix == ".png":
                log.image(plot.stem, plot)
    return log.location


def _value(cell: Cell) -> float | str:
    return cell.text if cell.value is None else cell.value


def _group(run: Run) -> str:
    """Return the group of a run in the tracker."""
    return run.record.group or f"{label(run, 'model')}-{label(run, 'strategy')}"
