"""The cells of a column: one number per row from the runs, why there is none, what to say, which is best."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Literal

from kvp.record import MODELS
from kvp.report.records.facts import facts
from kvp.report.records.keys import identity
from kvp.report.records.runs import Run
from kvp.report.table.compare import Comparison, Number, compare
from kvp.report.table.lines import IDLE, Line
from kvp.report.table.spec import UNITS, ColumnSpec, as_model, bound_of, read, stderr_of
from kvp.report.table.table import Cell, Column
from kvp.tables import plain

AT_CHANCE = "at chance"


@dataclass
class Draft:
    """A column on the way: the cells, the remarks on each, and what the numbers were measured under."""

    spec: ColumnSpec
    cells: list[Cell]
    remarks: list[list[str]]
    comparison: Comparison

    @property
    def column(self) -> Column:
        """The column as the table keeps it."""
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
    """Return the column of these rows.

    Args:
        column: What the column shows.
        lines: The rows.
        chosen: Whether a run belongs to the column.
        shown: Keys that label the rows.
        allow_mixed: Whether numbers of different protocols get a footnote instead of an error.

    Raises:
        ValueError: The numbers must not be compared.
    """
    gathered = [_gather(column, line, chosen) for line in lines]
    numbers = [Number(i, run, some.metric) for i, some in enumerate(gathered) for run, _ in some.found]
    comparison = compare(column.title, numbers, shown, allow_mixed=allow_mixed)
    cells = [_cell(column, some) for some in gathered]
    remarks = [[*comparison.remarks.get(i, ()), *some.remarks] for i, some in enumerate(gathered)]
    if any(cell.std for cell in cells):
        for i, text in _lonely_seeds(column, lines, gathered).items():
            remarks[i].append(text)
    if column.delta:
        cells = [_with_delta(column, lines, cells, i) for i in range(len(lines))]
    if column.better and comparison.comparable:
        cells = _marked(column, lines, cells, comparison)
    return Draft(column, cells, remarks, comparison)


@dataclass(frozen=True)
class Gathered:
    """The numbers of a cell.

    Attributes:
        metric: Path of the number in the record.
        found: The numbers, each with a run that has it.
        by_setting: Their means, one per setting and seed.
        failed: The failed runs without a number.
        remarks: What to say of the cell.
    """

    metric: str
    found: list[tuple[Run, float]] = field(default_factory=list)
    by_setting: list[float] = field(default_factory=list)
    failed: list[Run] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs with a number, sorted."""
        return sorted({run.seed for run, _ in self.found})


def _gather(column: ColumnSpec, line: Line, chosen: Callable[[Run], bool]) -> Gathered:
    """Return the numbers of a cell, one per setting and seed.

    A number that several runs share, for they found the same stage of the store, counts once.
    """
    if not _applies(column, line):
        return Gathered(column.metric)
    dense = line.kind == "dense"
    metric, model = (as_model(column.metric, "dense"), "dense") if dense else (column.metric, column.model)
    runs: Sequence[Run] = line.runs if dense else [run for run in line.of(model) if chosen(run)]
    if line.kind != "run" and model != "recovered":
        runs = _under_the_usual_protocol(runs, metric)
    settings = _by_setting(runs, metric, model)
    failed = [run for run in runs if run.status == "failed" and _setting(run, model) not in settings]
    repeats = max(map(len, settings.values()), default=0)
    remarks = [f"mean of {repeats} repeats with one seed"] if repeats > 1 else []
    if settings and not dense:
        remarks += [f"seed {run.seed}: {reason(run)}" for run in failed]
    return Gathered(
        metric=metric,
        found=[pair for same in settings.values() for pair in same],
        by_setting=[fmean(value for _, value in same) for same in settings.values()],
        failed=failed,
        remarks=remarks,
    )


def _applies(column: ColumnSpec, line: Line) -> bool:
    """Whether a row can have a number of the column: dense is neither tuned nor cut, a control is not cut."""
    root = column.metric.partition(".")[0]
    if line.kind == "dense":
        return root in MODELS and column.model != "recovered"
    return line.kind == "run" or root != "ratio"


def _by_setting(runs: Sequence[Run], metric: str, model: str) -> dict[str, list[tuple[Run, float]]]:
    """Return the numbers of the runs by setting and seed; several only where they differ."""
    settings: dict[str, list[tuple[Run, float]]] = {}
    for run in runs:
        value = read(run.record, metric)
        if value is not None:
            same = settings.setdefault(_setting(run, model), [])
            if all(value != other for _, other in same):
                same.append((run, value))
    return settings


def _lonely_seeds(column: ColumnSpec, lines: Sequence[Line], gathered: Sequence[Gathered]) -> dict[int, str]:
    """Return what to say of rows with fewer seeds than the others, by row."""
    most = max(
        (len(some.seeds) for some, line in zip(gathered, lines, strict=True) if line.kind != "dense"),
        default=0,
    )
    return {
        i: f"seed {', '.join(map(str, some.seeds))} only"
        for i, (line, some) in enumerate(zip(lines, gathered, strict=True))
        if (line.kind == "run" or column.model == "recovered") and 0 < len(some.seeds) < most
    }


def _setting(run: Run, model: str) -> str:
    return repr(sorted(identity(run, model).items()))


def _under_the_usual_protocol(runs: Sequence[Run], metric: str) -> Sequence[Run]:
    """Return the runs that evaluated the dense model as most did, and those without a number of it."""
    under = {run.hash: facts(run.record, metric) for run in runs if read(run.record, metric) is not None}
    usual = max(under.values(), key=list(under.values()).count, default={})
    return [run for run in runs if under.get(run.hash, usual) == usual]


def _cell(column: ColumnSpec, gathered: Gathered) -> Cell:
    if not gathered.by_setting:
        runs = tuple(gathered.failed)
        return Cell(text=reason(runs[0]), runs=runs) if runs else Cell()
    if any(at_chance(run, gathered.metric) for run, _ in gathered.found):
        return Cell(text=AT_CHANCE, runs=tuple(run for run, _ in gathered.found))
    scale = UNITS[column.unit]
    value = scale * fmean(gathered.by_setting)
    std = scale * stdev(gathered.by_setting) if len(gathered.by_setting) > 1 else None
    error = None
    if column.stderr and len(gathered.found) == 1:
        error = read(gathered.found[0][0].record, stderr_of(gathered.metric))
    spread = std or (error and scale * error)
    text = f"{value:,.{column.decimals}f}" + (f" ± {spread:,.{column.decimals}f}" if spread else "")
    return Cell(text=text, value=value, std=std, stderr=error, runs=tuple(run for run, _ in gathered.found))


def at_chance(run: Run, metric: str) -> bool:
    """Whether an accuracy, or the dense model's, is one that guessing reaches, too (`kvp.evaluation.needles`)."""
    for each in (metric, as_model(metric, "dense")) if " - " not in metric else ():
        value, bound = read(run.record, each), read(run.record, bound_of(each))
        if value is not None and bound is not None and value < bound:
            return True
    return False


def _with_delta(column: ColumnSpec, lines: Sequence[Line], cells: Sequence[Cell], i: int) -> Cell:
    """Return the cell with the distance to the unpruned model treated alike, where there is just one."""
    kind: Literal["dense", "control"] = "control" if column.model == "recovered" else "dense"
    bases = [
        cell.value
        for line, cell in zip(lines, cells, strict=True)
        if line.kind == kind and line.alike(lines[i], IDLE[kind]) and cell.value is not None
    ]
    value = cells[i].value
    if lines[i].kind != "run" or value is None or len(bases) != 1 or bases[0] is None:
        return cells[i]
    delta = value - bases[0]
    return replace(cells[i], delta=delta, text=f"{cells[i].text} ({delta:+,.{column.decimals}f})")


def _marked(
    column: ColumnSpec, lines: Sequence[Line], cells: Sequence[Cell], comparison: Comparison
) -> list[Cell]:
    """Return the cells with the best of each section marked, and the second best of three or more.

    No cell is marked where calibration or recovery read the evaluated corpus for some rows and not for others.
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
    """Return why a run failed, in a word: "OOM", "NaN", "interrupted" or the class of the error."""
    error = run.record.error
    kind, message = (error.type.rpartition(".")[2], error.message) if error else ("failed", "")
    if kind in ("MemoryError", "OutOfMemoryError") or "out of memory" in message.lower():
        return "OOM"
    return {"FloatingPointError": "NaN", "KeyboardInterrupt": "interrupted"}.get(kind, plain(kind))
