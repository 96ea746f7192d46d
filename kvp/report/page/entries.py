"""The table of all runs: a line per model of a run, with every number that the records hold."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from kvp.record import OriginRecord
from kvp.report.plots import panels
from kvp.report.plots.means import Read
from kvp.report.plots.panels import Panel, titles
from kvp.report.plots.points import Point, find_points
from kvp.report.records.keys import MISSING, label
from kvp.report.records.runs import Run
from kvp.report.table.cells import reason
from kvp.tables import plain

Numbers = Mapping[str, tuple[str, float]]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line: one model of a run, or a run without a model.

    Attributes:
        texts: Labels of the model by heading.
        origin: Device, dtype and commit by heading.
        numbers: Numbers by heading, each as text and as a value.
        point: The model; None for a run that failed or is still running.
    """

    run: Run
    texts: Mapping[str, str]
    origin: Mapping[str, str]
    numbers: Numbers
    point: Point | None


def find_entries(runs: Sequence[Run]) -> list[Entry]:
    """Return the lines in the order of the runs; a dense model that several runs share comes once, with the first."""
    points = find_points(runs)
    found: dict[Hashable, Entry] = {}
    for point, numbers in zip(points, _numbers(points), strict=True):
        dense = point.state == "dense"
        key = (point.base, tuple(numbers.items())) if dense else (point.run.hash, point.state)
        found.setdefault(key, _entry(point.run, point.state, point, numbers))
    for run in runs:
        if run.status != "finished":
            found[run.hash] = _entry(run, f"failed: {reason(run)}" if run.status == "failed" else run.status)
    order = {run.hash: i for i, run in enumerate(runs)}
    return sorted(found.values(), key=lambda entry: order[entry.run.hash])


def _entry(
    run: Run, state: str, point: Point | None = None, numbers: Numbers = MappingProxyType({})
) -> Entry:
    texts = {
        "model": label(run, "model"),
        "strategy": label(run, "strategy") if point is None or point.ratio else "none",
        "ratio": label(run, "ratio") if point is None or point.ratio else MISSING,
        "recovery": label(run, "recovery") if point is None or point.tuned else "none",
        "state": state,
        "seed": label(run, "seed"),
    }
    record, makers = run.record, run.record.provenance.origins
    stages = record.stages if point is None else record.behind(point.part, "evaluate")
    known = record.origins(stages) or makers
    made_by = {
        "device": plain(", ".join(dict.fromkeys(maker.device for maker in known))),
        "dtype": plain(record.provenance.dtype.removeprefix("torch.")),
        "commit": plain(", ".join(dict.fromkeys(_commit(maker) for maker in known))),
    }
    return Entry(run=run, texts=texts, origin=made_by, numbers=numbers, point=point)


def _commit(maker: OriginRecord) -> str:
    return str(maker.commit)[:8] + (" (dirty)" if maker.dirty else "")


def _numbers(points: Sequence[Point]) -> list[dict[str, tuple[str, float]]]:
    """Return the numbers of each point by heading, in the order of `READERS`; each protocol has a heading."""
    removed = "KV cache removed (%)"
    found = [{removed: (f"{100 * p.achieved['kv_cache']:.2f}", 100 * p.achieved["kv_cache"])} for p in points]
    for heading, decimals, read in READERS:
        values = [read(point) for point in points]
        named = titles(dict.fromkeys(panel for each in values for panel in each))
        for numbers, each in zip(found, values, strict=True):
            for panel, value in each.items():
                title = f"{heading}: {named[panel]}".removesuffix(": ")
                numbers[title] = (f"{value:,.{decimals}f}", value)
    return found


def _cache_bytes(point: Point) -> dict[Panel, float]:
    return panels.size(point, "kv_bytes_per_token")


def _millions(point: Point) -> dict[Panel, float]:
    return {panel: count / 1e6 for panel, count in panels.size(point, "params").items()}


READERS: tuple[tuple[str, int, Read], ...] = (  # heading, decimals, values
    ("KV cache (B/token)", 0, _cache_bytes),
    ("parameters (M)", 2, _millions),
    ("perplexity", 2, panels.perplexity),
    ("zero-shot average (%)", 1, panels.zero_shot),
    ("decoded tokens/s", 1, panels.decode_speed),
    ("peak memory (MiB)", 1, panels.peak_memory),
)
