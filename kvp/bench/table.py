"""The record as tables: what was measured beside its limit, and how much fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 160  # of a table in a file or pipe
Record = Mapping[str, Any]


def print_tables(record: Record, console: Console) -> None:
    """Models, rows, limits, and how to read them."""
    for table in _tables(record):
        console.print(table)
    for line in _notes(record):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def markdown(record: Record) -> str:
    """The same for a README."""
    return "\n\n".join([*map(_markdown, _tables(record)), *_notes(record)]) + "\n"


def _tables(record: Record) -> list[Table]:
    return [_models(record), _rows(record), _limits(record)]


def _markdown(table: Table) -> str:
    columns = [[str(column.header), "---", *map(_bold, column.cells)] for column in table.columns]
    rows = zip(*columns, strict=True)
    return "\n".join([f"**{table.title}**", "", *(f"| {' | '.join(row)} |" for row in rows)])


def _bold(cell: Any) -> str:
    return str(cell).replace("[bold]", "**").replace("[/bold]", "**")


def _models(record: Record) -> Table:
    columns = ("parameters", "weights", "KV per token", "removed: parameters", "KV", "widths of 8")
    table = _table("models", *columns)
    for model in record["models"]:
        removed = model["removed"]
        table.add_row(
            model["name"],
            f"{model['params'] / 1e6:,.1f} M",
            f"{model['weights_bytes'] / 2**20:,.1f} MiB",
            f"{model['kv_bytes_per_token']:,} B",
            f"{removed['params']:.1%}",
            f"{removed['kv_cache']:.1%}",
            "yes" if model["aligned"] else "no",
        )
    return table


def _rows(record: Record) -> Table:
    times = ("prefill tok/s", "decode tok/s", "latency s", "x first", "by bytes", "of roofline")
    title = f"{record['protocol']['name']} on {record['device']}, {record['dtype']}"
    table = _table(title, *times, "cache MiB", "rest", "attention")
    section: tuple[Any, ...] = ()
    for row in record["rows"]:
        path, batch, prompt, new = (row[k] for k in ("path", "batch_size", "prompt_length", "new_tokens"))
        if section != (section := (path, batch, prompt, new)):
            table.add_section()
            table.add_row(f"[bold]{path}, batch {batch}, {prompt} + {new}[/bold]")
        table.add_row(row["model"], *([row["failed"]] if row["failed"] else _measured(row)))
    return table


def _measured(row: Record) -> list[str]:
    against, parts = row["against_first"], row["memory"]
    low, high = row["latency"]["iqr"]
    return [
        _rate(row["prefill"]),
        _rate(row["decode"]),
        f"{row['latency']['seconds']:.3f} ± {(high - low) / 2:.3f}",
        f"{against['decode']['median']:.2f}" if against else "-",
        f"{against['decode_by_bytes']:.2f}" if against else "-",
        f"{row['roofline']['fraction']:.2f}",
        *(f"{parts[f'{part}_bytes'] / 2**20:,.1f}" for part in ("cache", "rest")),
        ", ".join(row["attention"]),
    ]


def _rate(timing: Record) -> str:
    low, high = timing["iqr"]
    return f"{timing['tokens_per_second']:,.0f} ± {(high - low) / 2:,.0f}"


def _limits(record: Record) -> Table:
    title = f"what fits {record['memory_limit_bytes'] / 2**30:,.2f} GiB: found by trying (from bytes)"
    shapes = record["limits"][0]["largest_batch"] if record["limits"] else []
    batches = (f"batch of {shape['prompt_length']}+{shape['new_tokens']}" for shape in shapes)
    table = _table(title, *batches, "tokens of one sequence")
    for limits in record["limits"]:
        context = limits["longest_context"]
        full = " = all positions" if context["found"] + 16 > context["positions"] else ""
        table.add_row(limits["model"], *map(_found, limits["largest_batch"]), _found(context) + full)
    return table


def _found(limit: Record) -> str:
    return f"{limit['found']:,} ({limit['predicted']:,})"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("model", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _notes(record: Record) -> list[str]:
    return [
        "Medians ± half the interquartile range. x first: decode rate over the first model's, median over rounds in "
        "which the models took turns; by bytes: what the bytes of a step predict.",
        f"Roofline: weights and cache that a step moves, over the copy rate of this device, "
        f"{record['copy_bytes_per_second'] / 1e9:,.1f} GB/s read and written.",
    ]
