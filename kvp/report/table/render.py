"""A table as Markdown, CSV, LaTeX and JSON: the same bytes for the same runs."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from kvp import tables
from kvp.report.table.table import Cell, Row, Table, letter

TEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{character: f"{{{character}}}" for character in "[]"},  # after a line's end they would be an option
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "—": "---",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "¹": "$^1$",
    "²": "$^2$",
    "<": "$<$",
    ">": "$>$",
}


def write_table(table: Table, out: Path) -> list[Path]:
    """Write table.md, table.csv, table.tex and sources.json."""
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "table.md": markdown(table),
        "table.csv": comma_separated(table),
        "table.tex": latex(table),
        "sources.json": json.dumps(sources(table), indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8", newline="\n")
    return [out / name for name in files]


def markdown(table: Table) -> str:
    """Return the table as GitHub Markdown: the best is bold, the second best underlined, footnotes stand below."""
    heads = [escaped(head) for head in (*table.keys, *(column.heading for column in table.columns))]
    rows = [[*map(escaped, row.labels), *map(_markdown, row.cells)] for row in table.rows]
    below = "\n".join(f"<sup>{letter(i)}</sup> {escaped(text)}  " for i, text in enumerate(table.footnotes))
    notes = "\n".join(f"- {escaped(note)}" for note in table.notes)
    parts = (
        f"**{escaped(table.title)}**",
        tables.markdown(heads, rows, labels=len(table.keys)),
        below,
        notes,
    )
    return "\n\n".join(filter(None, parts)) + "\n"


def comma_separated(table: Table) -> str:
    """Return the table as CSV, not rounded: mean, deviation and number of runs of each column."""
    stream = io.StringIO()
    write = csv.writer(stream, lineterminator="\n")
    heads = [(c.title, f"{c.title}: std", f"{c.title}: runs") for c in table.columns]
    write.writerow(["row", *map(_no_formula, (*table.keys, *(head for three in heads for head in three)))])
    for row in table.rows:
        labels = map(_no_formula, row.labels)
        write.writerow([row.kind, *labels, *(value for cell in row.cells for value in _values(cell))])
    return stream.getvalue()


def latex(table: Table) -> str:
    """Return the table as a booktabs tabular to \\input, with the notes below."""
    heads = [*table.keys, *(column.heading for column in table.columns)]
    sections = ["".join(f"{_tex_row(row)}\n" for row in section) for section in table.sections]
    footnotes = [rf"\textsuperscript{{{letter(i)}}}\,{_tex(text)}" for i, text in enumerate(table.footnotes)]
    below = [rf"{text}.\par" for text in (*footnotes, *map(_tex, table.notes))]
    return "\n".join(
        [
            f"% {table.title}; needs \\usepackage{{booktabs}}",
            rf"\begin{{tabular}}{{{'l' * len(table.keys)}{'r' * len(table.columns)}}}",
            r"\toprule",
            " & ".join(map(_tex, heads)) + r" \\",
            r"\midrule",
            "\\midrule\n".join(sections) + r"\bottomrule",
            r"\end{tabular}",
            "",
            r"{\footnotesize\raggedright",
            *below,
            "}",
            "",
        ]
    )


def sources(table: Table) -> dict[str, Any]:
    """Return the runs behind each cell: by hash, with their names and where they were read."""
    runs = {run.hash: run for row in table.rows for cell in row.cells for run in cell.runs}
    titles = [column.title for column in table.columns]
    return {
        "table": table.name,
        "runs": {key: {"name": run.name, "path": run.place} for key, run in sorted(runs.items())},
        "rows": [
            {
                "row": row.kind,
                "labels": dict(zip(table.keys, row.labels, strict=True)),
                **({"source": row.source} if row.source else {}),
                "cells": {
                    t: [r.hash for r in c.runs] for t, c in zip(titles, row.cells, strict=True) if c.runs
                },
            }
            for row in table.rows
        ],
    }


def _markdown(cell: Cell) -> str:
    text = {0: "{}", 1: "**{}**", 2: "<u>{}</u>"}[cell.best].format(escaped(cell.text))
    marks = ",".join(map(letter, cell.footnotes))
    return text + (f"<sup>{marks}</sup>" if marks else "")


def _values(cell: Cell) -> tuple[Any, Any, Any]:
    """Return mean, deviation and number of runs; of a failure the reason, of what is missing nothing."""
    if cell.value is None:
        return (_no_formula(cell.text) if cell.runs else ""), "", ""
    return cell.value, "" if cell.std is None else cell.std, len(cell.runs) or ""


def escaped(text: str) -> str:
    """Return a text that Markdown shows as it is: no tag, link, emphasis, code or formula; tables escape pipes."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")
    text = text.replace("\\", "&#92;")  # a backslash would free the pipe after it
    return re.sub(r"[`*\[\]$~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def _no_formula(text: str) -> str:
    """Return a text that a spreadsheet does not compute: an apostrophe goes before =, +, - and @."""
    return f"'{text}" if re.match(r"[=+@\t\r]|-(?![\d.]+( %)?$)", text) else text


def _tex_row(row: Row) -> str:
    cells = [*map(_tex, row.labels), *(_tex_cell(cell) for cell in row.cells)]
    return " & ".join(cells) + r" \\"


def _tex_cell(cell: Cell) -> str:
    text = {0: "{}", 1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}[cell.best].format(_tex(cell.text))
    marks = ",".join(map(letter, cell.footnotes))
    return text + (rf"\textsuperscript{{{marks}}}" if marks else "")


def _tex(text: str) -> str:
    return re.sub("|".join(map(re.escape, TEX)), lambda found: TEX[found[0]], text)
