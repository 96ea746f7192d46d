"""A table in the terminal."""

from __future__ import annotations

from itertools import accumulate

from rich.text import Text

from kvp.report.table.table import Cell, Table, letter
from kvp.tables import console_table, print_table

STYLES = {0: "", 1: "bold", 2: "underline"}


def show(table: Table) -> None:
    """Print a table with the footnotes and notes of table.md."""
    heads = [*table.keys, *(column.heading for column in table.columns)]
    rows: list[list[str | Text]] = [[*row.labels, *map(_cell, row.cells)] for row in table.rows]
    ends = {count - 1 for count in accumulate(map(len, table.sections))}
    print_table(console_table(heads, rows, title=table.title, labels=len(table.keys), ends=ends))
    for i, text in enumerate(table.footnotes):
        print(letter(i), text)
    for note in table.notes:
        print("-", note)


def _cell(cell: Cell) -> Text:
    marks = ",".join(map(letter, cell.footnotes))
    return Text.assemble((cell.text, STYLES[cell.best]), (f" {marks}" if marks else "", "dim"))
