"""A finished table, as `build` makes it and every output reads it: text for people, numbers for machines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from kvp.report.records.keys import MISSING
from kvp.report.records.runs import Run

Better = Literal["lower", "higher"]
Kind = Literal["dense", "control", "run", "published"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of numbers; `better` says where its best is, None: nowhere."""

    title: str
    metric: str
    better: Better | None = None
    decimals: int = 2

    @property
    def heading(self) -> str:
        """The title with the arrow of what is better."""
        return self.title + {"lower": " ↓", "higher": " ↑", None: ""}[self.better]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number, or why there is none.

    Attributes:
        text: What is shown, without marks: "41.50 ± 0.93", "—" (missing) or a failure's reason ("OOM").
        value: The mean in the column's unit, not rounded; None without a number.
        std: The sample standard deviation over seeds; None for one seed.
        stderr: The standard error that one run's record has, not in the column's unit; None if it is not shown.
        delta: Distance to the unpruned model treated alike, if the column asks for it.
        runs: The runs behind it.
        best: 1 best, 2 second best of its section, 0 neither.
        footnotes: Indices into the table's footnotes.
    """

    text: str = MISSING
    value: float | None = None
    std: float | None = None
    stderr: float | None = None
    delta: float | None = None
    runs: tuple[Run, ...] = ()
    best: Literal[0, 1, 2] = 0
    footnotes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line: the dense baseline, a dense model tuned alike (control), runs, or published numbers.

    `section` numbers the groups in which the best is marked; `source` is a published row's.
    """

    kind: Kind
    labels: tuple[str, ...]
    cells: tuple[Cell, ...]
    section: int
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under headings; `keys` are the headings of the rows' labels. Footnotes are lettered from a."""

    name: str
    title: str
    keys: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    footnotes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sections(self) -> Iterator[list[Row]]:
        """The rows between two rules."""
        return (list(rows) for _, rows in groupby(self.rows, key=lambda row: row.section))


def letter(footnote: int) -> str:
    """Return the letter of a footnote: 0 -> a, 25 -> z, 26 -> aa."""
    return (letter(footnote // 26 - 1) if footnote >= 26 else "") + chr(ord("a") + footnote % 26)
