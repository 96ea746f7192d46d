"""A table in the terminal."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from kvp.report.table.table import Cell, Table, letter

STYLES = {0: "", 1: "bold", 2: "underline"}


def show(table: Table) -> None:
    """Print a table as it is in table.md; as wide as it needs to be where nobody watches."""
    shown = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for key in table.keys:
        shown.add_column(Text(key))
    for column in table.columns:
        shown.add_column(Text(column.heading), justify="right")
    for section in table.sections:
        for row in section:
            labels = map(Text, row.labels)
            shown.add_row(*labels, *map(_cell, row.cells), end_section=row is section[-1])
    console = Console()
    if not sys.stdout.isatty():
        console.width = Measurement.get(Console(width=10_000), Console(width=10_000).options, shown).maximum
    console.print(shown)
    for i, text in enumerate(table.footnotes):
        console.print(f"{letter(i)} {text}", soft_wrap=True, highlight=False, markup=False)
    for note in table.notes:
        console.print(f"- {note}", soft_wrap=True, highlight=False, markup=False)


def _cell(cell: Cell) -> Text:
    marks = ",".join(map(letter, cell.footnotes))
    return Text.assemble((cell.text, STYLES[cell.best]), (f" {marks}" if marks else "", "dim"))
