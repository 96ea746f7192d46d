"""Tables of text: Markdown for files, ruled tables for the terminal.

The first columns are labels, to the left; all others are numbers, to the right.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from hashlib import sha256

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

WIDEST = 10_000  # characters, more than any table has
LABEL, NOTE = 160, 4000  # characters that a name and a note may have


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], *, labels: int = 1) -> str:
    """Return a GitHub table whose columns are aligned, without a newline at the end.

    Args:
        heads: Headings of the columns.
        rows: Cells of each row, as Markdown; pipes are escaped here.
        labels: Number of columns to the left.
    """
    lines = [[text.replace("|", r"\|") for text in line] for line in (heads, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if i < labels else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def line(texts: Sequence[str]) -> str:
        cells = (
            text.ljust(width) if i < labels else text.rjust(width)
            for i, (text, width) in enumerate(zip(texts, widths, strict=True))
        )
        return f"| {' | '.join(cells)} |"

    return "\n".join(map(line, (lines[0], rule, *lines[1:])))


def console_table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    title: str,
    labels: int = 1,
    ends: Collection[int] = (),
) -> Table:
    """Return a table for the terminal; text is shown as it is, without markup.

    Args:
        heads: Headings of the columns.
        rows: Cells of each row.
        title: Title above the table.
        labels: Number of columns to the left.
        ends: Rows, from 0, that a rule follows.
    """
    table = Table(title=Text(title), title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if i < labels else "right", no_wrap=i == 0)
    for i, row in enumerate(rows):
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row), end_section=i in ends)
    return table


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal; in a file or pipe, as wide as it needs to be."""
    console = Console()
    if not sys.stdout.isatty():
        wide = Console(width=WIDEST)
        console.width = Measurement.get(wide, wide.options, table).maximum
    console.print(table)


def plain(text: str, longest: int = LABEL) -> str:
    """Return a text whose line breaks are blanks and whose control and bidi characters are written out: \\u202e.

    A longer text ends in a hash of all of it, so two texts stay two.
    """
    shown = text if text.isprintable() else "".join(map(_visible, text))
    if len(shown) <= longest:
        return shown
    return f"{shown[: longest - 9]}…{sha256(text.encode(errors='backslashreplace')).hexdigest()[:8]}"


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode()
