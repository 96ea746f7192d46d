"""From a spec and runs to a table: gather the numbers of each cell, compare them, mark the best, say what differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

from kvp.report.records.keys import check_key, label, order, where
from kvp.report.records.runs import Run
from kvp.report.table.cells import Draft, make_draft, reason
from kvp.report.table.lines import NAMES, Line, make_lines, vary
from kvp.report.table.notes import make_notes
from kvp.report.table.references import Published, published_cell
from kvp.report.table.spec import Spec, expand
from kvp.report.table.table import MISSING, Cell, Row, Table


def build(
    spec: Spec, runs: Sequence[Run], *, published: Sequence[Published] = (), allow_mixed: bool = False
) -> Table:
    """The table of these runs.

    Raises:
        ValueError: The spec does not fit the runs, nothing is left to show, or numbers that must not be compared
            meet in a column and `allow_mixed` does not admit them.
    """
    used = where([run for run in runs if run.status != "running"], spec.where)
    for heading, key in spec.rows.items():
        if heading not in spec.optional:
            check_key(used, key, f"spec {spec.name}, row {heading!r}")
    columns = expand(spec.columns, used)
    across = _across(spec, used)
    split = [spec.across] if spec.across else []
    extra = [
        key
        for key in vary(used, [*spec.rows.values(), *split], {column.model for column in columns})
        if key not in split
    ]
    headings = {key: heading for heading, key in spec.rows.items()} | {key: key for key in extra}
    lines = make_lines(used, list(headings), [spec.rows[heading] for heading in spec.group])
    if not any(column.model == "recovered" for column in columns):
        lines = [line for line in lines if line.kind != "control"]

    drafts = []
    for column, value in product(columns, across):
        titled = replace(column, title=f"{column.title}, {value}") if value else column
        drafts.append(
            make_draft(titled, lines, _chosen(spec.across, value), headings, allow_mixed=allow_mixed)
        )
    drafts = [draft for draft in drafts if any(cell.text != MISSING for cell in draft.cells)]
    if not drafts:
        failed = "".join(f"; {run.name} failed: {reason(run)}" for run in used if run.status == "failed")
        raise ValueError(f"table {spec.name} has no number to show{failed}")
    of_all = _remarks_on_all(drafts)
    shown = [key for key in headings if any(line.labels[key] not in (MISSING, "none") for line in lines)]
    footnotes: list[str] = []
    rows = [
        Row(
            kind=line.kind,
            labels=_named(line, shown),
            section=line.section,
            cells=tuple(
                _footnoted(
                    draft.cells[i], [text for text in draft.remarks[i] if text not in of_all], footnotes
                )
                for draft in drafts
            ),
        )
        for i, line in enumerate(lines)
    ]
    notes = [*make_notes(drafts, lines, extra), *(f"all numbers: {text}" for text in sorted(of_all))]
    if spec.published and not spec.across:
        rows += _published_rows(published, shown, drafts, lines, footnotes, notes)
    running = ", ".join(run.name for run in runs if run.status == "running")
    return Table(
        name=spec.name,
        title=f"{spec.title}, {', '.join(sorted({label(run, 'model') for run in used}))}",
        keys=tuple(headings[key] for key in shown),
        columns=tuple(draft.column for draft in drafts),
        rows=tuple(rows),
        footnotes=tuple(footnotes),
        notes=(*notes, *([f"running or killed, left out: {running}"] if running else [])),
    )


def _across(spec: Spec, runs: Sequence[Run]) -> list[str]:
    """The values that get columns of their own; one empty one without such a key."""
    if spec.across is None:
        return [""]
    key = spec.across
    check_key(runs, key, f"spec {spec.name}, across")
    return list(
        dict.fromkeys(label(r, key) for r in sorted(runs, key=lambda r: order(r, key)) if _has(r, key))
    )


def _has(run: Run, key: str) -> bool:
    return label(run, key) != MISSING


def _chosen(across: str | None, value: str) -> Callable[[Run], bool]:
    return lambda run: across is None or label(run, across) in (value, MISSING)


def _named(line: Line, shown: Sequence[str]) -> tuple[str, ...]:
    """The labels, a baseline's with its name where the strategy stands or where a dash is."""
    labels = {key: line.labels[key] for key in shown}
    if name := NAMES.get(line.kind):
        dashes = [key for key, value in labels.items() if value == MISSING]
        place = "strategy" if "strategy" in labels else next(iter(dashes), shown[0])
        labels[place] = name if labels[place] == MISSING else f"{labels[place]}, {name}"
    return tuple(labels.values())


def _remarks_on_all(drafts: Sequence[Draft]) -> set[str]:
    """What would be a footnote of every number, and is said once."""
    numbers = [set(draft.remarks[i]) for draft in drafts for i, cell in enumerate(draft.cells) if cell.runs]
    return set.intersection(*numbers) if numbers else set()


def _footnoted(cell: Cell, remarks: Sequence[str], footnotes: list[str]) -> Cell:
    """The cell with its remarks among the table's footnotes."""
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
    """A row for each published line that has a number in these columns, and notes on their sources."""
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
