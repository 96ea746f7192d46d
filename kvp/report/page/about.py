"""The line below a report's title: models, dates, devices and code of its runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvp.record import OriginRecord
from kvp.report.records.keys import label
from kvp.report.records.runs import Run
from kvp.tables import NOTE, plain


def about(runs: Sequence[Run]) -> str:
    """Return the models, dates, dtypes, devices and commits behind runs."""
    origins = [origin for run in runs for origin in run.record.provenance.origins]
    days = sorted(run.record.provenance.started[:10] for run in runs)
    parts = (
        _listed(label(run, "model") for run in runs),
        days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}",
        _listed(str(run.record.config.get("dtype")) for run in runs),
        _listed(origin.device_name or origin.device for origin in origins),
        _listed(map(_code, origins)),
    )
    return plain("; ".join(filter(None, parts)), NOTE)


def _code(origin: OriginRecord) -> str:
    commit = f"commit {origin.commit[:8]}" if origin.commit else "no commit"
    return commit + (" with uncommitted code" if origin.dirty else "")


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted({plain(value) for value in values}))
