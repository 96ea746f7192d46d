"""The cells of a column: one number per row from its runs, why there is none, what to say, which is best."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Literal

from kvp.record import MODELS
from kvp.report.records.facts import facts
from kvp.report.records.keys import PRUNING, identity
from kvp.report.records.runs import Run
from kvp.report.table.compare import Comparison, Number, compare
from kvp.report.table.lines import Line
from kvp.report.table.spec import UNITS, ColumnSpec, as_model, read
from kvp.report.table.table import Cell, Column


@dataclass
class Draft:
    """A column on its way: its cells, the remarks on each, and what its numbers were measured under."""

    spec: ColumnSpec
    cells: list[Cell]
    remarks: list[list[str]]
    comparison: Comparison

    @property
    def column(self) -> Column:
        """What the table keeps of it."""
        unit = f" ({self.spec.unit})" if self.spec.unit else ""
        return Column(
            title=self.spec.title + unit,
            metric=self.spec.metric,
            better=self.spec.better,
            decimals=self.spec.decimals,
        )


def make_draft(
    column: ColumnSpec,
    lines: Sequence[Line],
    chosen: Callable[[Run], bool],
    shown: Collection[str],
    *,
    allow_mixed: bool,
) -> Draft:
    """The column of these rows, from the runs that are `chosen` for it.

    Raises:
        ValueError: Its numbers must not be compared.
    """
    gathered = [_gather(column, line, chosen) for line in lines]
    numbers = [Number(i, run, its.metric) for i, its in enumerate(gathered) for run, _ in its.found]
    comparison = compare(column.title, numbers, shown, allow_mixed=allow_mixed)
    cells = [_cell(column, its) for its in gathered]
    seeds = [sorted({run.record.config["seed"] for run, _ in its.found}) for its in gathered]
    every = max(
        (its for its, line in zip(seeds, lines, strict=True) if line.kind != "dense"), key=len, default=[]
    )
    spread = any(cell.std for cell in cells)
    remarks = []
    for i, (line, its) in enumerate(zip(lines, gathered, strict=True)):
        texts = [*comparison.remarks.get(i, ()), *its.remarks]
        seeded = line.kind == "run" or column.model == "recovered"
        if spread and seeded and its.found and len(seeds[i]) < len(every):
            texts.append(f"seed {', '.join(map(str, seeds[i]))} only")
        remarks.append(texts)
    if column.delta:
        cells = [_with_delta(column, lines, cells, i) for i in range(len(lines))]
    if column.better and comparison.comparable:
        cells = _marked(column, lines, cells, comparison)
    return Draft(column, cells, remarks, comparison)


@dataclass(frozen=True)
class Gathered:
    """The numbers of a cell, each with a run it is of; the failed runs; what to say."""

    metric: str
    found: list[tuple[Run, float]]
    by_setting: list[float]
    failed: list[Run]
    remarks: list[str]


def _gather(column: ColumnSpec, line: Line, chosen: Callable[[Run], bool]) -> Gathered:
    """One number per setting and seed: what several runs share (a stage of the store) counts once."""
    of_model = column.metric.partition(".")[0] in MODELS
    foreign = column.model == "recovered" or not of_model
    cut = column.metric.startswith("ratio.")
    if (line.kind == "dense" and foreign) or (line.kind == "control" and cut):
        return Gathered(column.metric, [], [], [], [])
    metric = as_model(column.metric, "dense") if line.kind == "dense" else column.metric
    model = "dense" if line.kind == "dense" else column.model
    runs: Sequence[Run] = line.runs if model == "dense" else [run for run in line.of(model) if chosen(run)]
    if line.kind != "run" and model != "recovered":
        runs = _under_the_usual_protocol(runs, metric)
    settings: dict[str, list[tuple[Run, float]]] = {}
    for run in runs:
        value = read(run.record, metric)
        if value is not None:
            same = settings.setdefault(_setting(run, model), [])
            if all(value != other for _, other in same):
                same.append((run, value))
    failed = [run for run in runs if run.status == "failed" and _setting(run, model) not in settings]
    repeats = max((len(same) for same in settings.values()), default=0)
    remarks = [f"mean of {repeats} repeats with one seed"] if repeats > 1 else []
    if settings and line.kind != "dense":
        remarks += [f"seed {run.record.config['seed']}: {reason(run)}" for run in failed]
    found = [pair for same in settings.values() for pair in same]
    means = [fmean(value for _, value in same) for same in settings.values()]
    return Gathered(metric, found, means, failed, remarks)


def _setting(run: Run, model: str) -> str:
    return repr(sorted(identity(run, model).items()))


def _under_the_usual_protocol(runs: Sequence[Run], metric: str) -> Sequence[Run]:
    """Of the runs, each of which evaluates dense anew, those that did as most did, and those without a number."""
    under = {run.hash: facts(run.record, metric) for run in runs if read(run.record, metric) is not None}
    usual = max(under.values(), key=list(under.values()).count, default={})
    return [run for run in runs if under.get(run.hash, usual) == usual]


def _cell(column: ColumnSpec, its: Gathered) -> Cell:
    if not its.by_setting:
        runs = tuple(its.failed)
        return Cell(text=reason(runs[0]), runs=runs) if runs else Cell()
    scale = UNITS[column.unit]
    value = scale * fmean(its.by_setting)
    std = scale * stdev(its.by_setting) if len(its.by_setting) > 1 else None
    text = f"{value:,.{column.decimals}f}" + (f" ± {std:,.{column.decimals}f}" if std else "")
    return Cell(text=text, value=value, std=std, runs=tuple(run for run, _ in its.found))


def _with_delta(column: ColumnSpec, lines: Sequence[Line], cells: Sequence[Cell], i: int) -> Cell:
    """The cell with its distance to the unpruned model treated alike, where there is just one."""
    kind: Literal["dense", "control"] = "control" if column.model == "recovered" else "dense"
    free = PRUNING if kind == "control" else (*PRUNING, "recovery")
    bases = [
        cell.value
        for line, cell in zip(lines, cells, strict=True)
        if line.kind == kind and line.alike(lines[i], free) and cell.value is not None
    ]
    value = cells[i].value
    if lines[i].kind != "run" or value is None or len(bases) != 1 or bases[0] is None:
        return cells[i]
    delta = value - bases[0]
    return replace(cells[i], delta=delta, text=f"{cells[i].text} ({delta:+,.{column.decimals}f})")


def _marked(
    column: ColumnSpec, lines: Sequence[Line], cells: Sequence[Cell], comparison: Comparison
) -> list[Cell]:
    """The cells with the best of each section marked, and the second best of three or more.

    None is, where calibration or recovery read the evaluated corpus for some rows and not for others.
    """
    sign = 1 if column.better == "lower" else -1
    marked = list(cells)
    for section in {line.section for line in lines if line.kind == "run"}:
        values = {
            i: sign * round(cell.value, column.decimals)
            for i, (line, cell) in enumerate(zip(lines, cells, strict=True))
            if line.section == section and line.kind == "run" and cell.value is not None
        }
        ranks = sorted(set(values.values()))
        if len(ranks) < 2 or len({tuple(comparison.read.get(i, ())) for i in values}) > 1:
            continue
        for i, value in values.items():
            if value == ranks[0]:
                marked[i] = replace(cells[i], best=1)
            elif value == ranks[1] and len(values) > 2:
                marked[i] = replace(cells[i], best=2)
    return marked


def reason(run: Run) -> str:
    """Why a run failed, in a word."""
    error = run.record.error
    kind, message = (error.type.rpartition(".")[2], error.message) if error else ("failed", "")
    if kind in ("MemoryError", "OutOfMemoryError") or "out of memory" in message.lower():
        return "OOM"
    return {"FloatingPointError": "NaN", "KeyboardInterrupt": "interrupted"}.get(kind, kind)
