"""Build a table from a spec and runs: gather the numbers, compare them, mark the best, say what differs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import product

from kvp.report.records.keys import MISSING, check_key, label, order, where
from kvp.report.records.runs import Run
from kvp.report.table.cells import Draft, make_draft, reason
from kvp.report.table.lines import NAMES, Line, make_lines, vary
from kvp.report.table.notes import make_notes
from kvp.report.table.references import Published, published_cell
from kvp.report.table.spec import ColumnSpec, Spec, expand
from kvp.report.table.table import Cell, Row, Table
from kvp.tables import NOTE, plain


def build(
    spec: Spec, runs: Sequence[Run], *, published: Sequence[Published] = (), allow_mixed: bool = False
) -> Table:
    """Return the table of these runs.

    Args:
        spec: What the table shows.
        runs: The runs; those that are still running are left out and named in a note.
        published: Numbers of papers, shown if the spec asks for them.
        allow_mixed: Whether numbers of different protocols get a footnote instead of an error.

    Raises:
        ValueError: The spec does not fit the runs, nothing is left to show, or numbers that must not be compared
            meet in a column and `allow_mixed` does not admit them.
    """
    used = where([run for run in runs if run.status != "running"], spec.where)
    columns = _columns(spec, used)
    headings, extra = _headings(spec, used, columns)
    lines = make_lines(used, list(headings), [spec.rows[heading] for heading in spec.group])
    if not any(column.model == "recovered" for column, _ in columns):
        lines = [line for line in lines if line.kind != "control"]
    drafts = _drafts(spec, columns, lines, headings, allow_mixed=allow_mixed)
    if not drafts:
        failed = "".join(f"; {run.name} failed: {reason(run)}" for run in used if run.status == "failed")
        raise ValueError(f"table {spec.name} has no number to show{failed}")
    shown = [key for key in headings if any(line.labels[key] not in (MISSING, "none") for line in lines)]
    shown = shown or ["strategy" if "strategy" in headings else next(iter(headings))]  # dense models alone
    of_all = _remarks_on_all(drafts)
    footnotes: list[str] = []
    rows = _rows(lines, drafts, shown, of_all, footnotes)
    notes = [*make_notes(drafts, lines, extra), *(f"all numbers: {text}" for text in sorted(of_all))]
    if spec.published and not spec.across:
        rows += _published_rows(published, shown, drafts, lines, footnotes, notes)
    if running := ", ".join(run.name for run in runs if run.status == "running"):
        notes.append(f"running or killed, left out: {running}")
    return Table(
        name=spec.name,
        title=plain(f"{spec.title}, {', '.join(sorted({label(run, 'model') for run in used}))}", NOTE),
        keys=tuple(plain(headings[key]) for key in shown),
        columns=tuple(draft.column for draft in drafts),
        rows=tuple(rows),
        footnotes=tuple(plain(text, NOTE) for text in footnotes),
        notes=tuple(plain(text, NOTE) for text in notes),
    )


def _columns(spec: Spec, runs: Sequence[Run]) -> list[tuple[ColumnSpec, str]]:
    """Return the columns, each with the value of the key `across` that it is for; "" without such a key."""
    for heading, key in spec.rows.items():
        if heading not in spec.optional:
            check_key(runs, key, f"spec {spec.name}, row {heading!r}")
    columns = expand(spec.columns, runs)
    if spec.across is None:
        return [(column, "") for column in columns]
    key = spec.across
    check_key(runs, key, f"spec {spec.name}, across")
    labels = dict.fromkeys(label(run, key) for run in sorted(runs, key=lambda run: order(run, key)))
    values = [value for value in labels if value != MISSING]
    return [
        (replace(column, title=f"{column.title}, {value}"), value)
        for column, value in product(columns, values)
    ]


def _headings(
    spec: Spec, runs: Sequence[Run], columns: Sequence[tuple[ColumnSpec, str]]
) -> tuple[dict[str, str], list[str]]:
    """Return the headings of the labels by key, and the keys that were not asked for but vary."""
    split = [spec.across] if spec.across else []
    varying = vary(runs, [*spec.rows.values(), *split], {column.model for column, _ in columns})
    extra = [key for key in varying if key not in split]
    return {key: heading for heading, key in spec.rows.items()} | {key: key for key in extra}, extra


def _drafts(
    spec: Spec,
    columns: Sequence[tuple[ColumnSpec, str]],
    lines: Sequence[Line],
    shown: Collection[str],
    *,
    allow_mixed: bool,
) -> list[Draft]:
    """Return the columns with their cells; columns without any number or failure are left out."""
    drafts = [
        make_draft(column, lines, _chosen(spec.across, value), shown, allow_mixed=allow_mixed)
        for column, value in columns
    ]
    return [draft for draft in drafts if any(cell.text != MISSING for cell in draft.cells)]


def _chosen(across: str | None, value: str) -> Callable[[Run], bool]:
    """Return whether a run belongs to the columns of a value; a run on which the key has no effect does."""
    return lambda run: across is None or label(run, across) in (value, MISSING)


def _rows(
    lines: Sequence[Line],
    drafts: Sequence[Draft],
    shown: Sequence[str],
    of_all: Collection[str],
    footnotes: list[str],
) -> list[Row]:
    """Return the rows; the remarks that do not hold for all numbers are added to the footnotes."""

    def cell(draft: Draft, i: int) -> Cell:
        return _footnoted(
            draft.cells[i], [text for text in draft.remarks[i] if text not in of_all], footnotes
        )

    return [
        Row(
            kind=line.kind,
            labels=_named(line, shown),
            section=line.section,
            cells=tuple(cell(draft, i) for draft in drafts),
        )
        for i, line in enumerate(lines)
    ]


def _named(line: Line, shown: Sequence[str]) -> tuple[str, ...]:
    """Return the labels of a row; a baseline has its name where the strategy stands, or else at the first dash."""
    labels = {key: line.labels[key] for key in shown}
    if name := NAMES.get(line.kind):
        dashes = [key for key, value in labels.items() if value == MISSING]
        place = "strategy" if "strategy" in labels else next(iter(dashes), shown[0])
        labels[place] = name if labels[place] == MISSING else f"{labels[place]}, {name}"
    return tuple(labels.values())


def _remarks_on_all(drafts: Sequence[Draft]) -> set[str]:
    """Return the remarks that hold for every number, which a note states once."""
    numbers = [set(draft.remarks[i]) for draft in drafts for i, cell in enumerate(draft.cells) if cell.runs]
    return set.intersection(*numbers) if numbers else set()


def _footnoted(cell: Cell, remarks: Sequence[str], footnotes: list[str]) -> Cell:
    """Return the cell with its remarks as footnotes; new ones are added to the list."""
    footnotes += [text for text in remarks if text not in footnotes]
    return replace(cell, footnotes=tuple(sorted({footnotes.index(text) for text in remarks})))


def _published_rows(
    published: Sequence[Published],
    shown: Sequence[str],
    drafts: Sequence[Draft],
    lines: Sequence[Line],
    footnotes: list[str],
    notes: list[str],
) -> list[Row]:
    """Return a row for each published line that has a number in these columns; adds notes on their sources."""
    rows = []
    section = 1 + max(line.section for line in lines)
    for entry in published:
        pairs = [published_cell(entry, draft, lines) for draft in drafts]
        if all(cell.value is None for cell, _ in pairs):
            continue
        named = {"strategy": f"{entry.method} ({entry.paper})", "ratio": entry.ratio, "model": entry.model}
        rows.append(
            Row(
                kind="published",
                labels=tuple(named.get(key.removesuffix(".name"), MISSING) for key in shown),
                cells=tuple(_footnoted(cell, remarks, footnotes) for cell, remarks in pairs),
                section=section,
                source=entry.source,
            )
        )
        note = f"published, {entry.paper}: {entry.source}"
        notes += [note] if note not in notes else []
    return rows
