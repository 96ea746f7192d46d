"""Tables of a record: what was measured next to its limit, and how much fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.text import Text

from kvp.tables import console_table, print_table
from kvp.tables import markdown as markdown_table

Record = Mapping[str, Any]
Cells = list[str]  # of one row; a row of a single cell is the heading of those below it


class Block(NamedTuple):
    """A table: its title, the headings of its columns, its rows."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Cells]

    def filled(self, heading: Callable[[str], Any]) -> list[list[Any]]:
        """Return the rows, all of one length; `heading` makes the first cell of a heading."""
        rest = [""] * (len(self.heads) - 1)
        return [
            [heading(*row), *rest] if len(row) == 1 else [*row, *rest][: len(self.heads)] for row in self.rows
        ]


def print_tables(record: Record) -> None:
    """Print models, rows and limits, and how to read them."""
    for block in _blocks(record):
        rows = block.filled(lambda text: Text(text, style="bold"))
        ends = [number - 1 for number, row in enumerate(block.rows) if len(row) == 1 and number]
        print_table(console_table(block.heads, rows, title=block.title, ends=ends))
    print(*_notes(record), sep="\n")


def markdown(record: Record) -> str:
    """Return models, rows and limits as Markdown, and how to read them."""
    texts = [
        f"**{block.title}**\n\n{markdown_table(block.heads, block.filled('**{}**'.format))}"
        for block in _blocks(record)
    ]
    return "\n\n".join([*texts, *_notes(record)]) + "\n"


def _blocks(record: Record) -> list[Block]:
    return [_models(record), _rows(record), _limits(record)]


def _models(record: Record) -> Block:
    heads = ("model", "parameters", "weights", "KV per token", "removed: parameters", "KV", "widths of 8")
    rows = [
        [
            model["name"],
            f"{model['params'] / 1e6:,.1f} M",
            f"{model['weights_bytes'] / 2**20:,.1f} MiB",
            f"{model['kv_bytes_per_token']:,} B",
            f"{model['removed']['params']:.1%}",
            f"{model['removed']['kv_cache']:.1%}",
            "yes" if model["aligned"] else "no",
        ]
        for model in record["models"]
    ]
    return Block("models", heads, rows)


def _rows(record: Record) -> Block:
    times = ("prefill tok/s", "decode tok/s", "latency s", "x first", "by bytes", "of roofline")
    title = f"{record['protocol']['name']} on {record['device']}, {record['dtype']}"
    rows: list[Cells] = []
    place: tuple[Any, ...] = ()
    for row in record["rows"]:
        path, batch, prompt, new = here = _place(row)
        if here != place:
            rows.append([f"{path}, batch {batch}, {prompt} + {new}"])
            place = here
        rows.append([row["model"], *([row["failed"]] if row["failed"] else _measured(row))])
    return Block(title, ("model", *times, "cache MiB", "rest", "attention"), rows)


def _place(row: Record) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("path", "batch_size", "prompt_length", "new_tokens"))


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


def _limits(record: Record) -> Block:
    title = f"what fits {record['memory_limit_bytes'] / 2**30:,.2f} GiB: found by trying (from bytes)"
    shapes = record["limits"][0]["largest_batch"] if record["limits"] else []
    batches = (f"batch of {shape['prompt_length']}+{shape['new_tokens']}" for shape in shapes)
    rows = []
    for limits in record["limits"]:
        context = limits["longest_context"]
        full = " = all positions" if context["found"] + 16 > context["positions"] else ""
        rows.append([limits["model"], *map(_found, limits["largest_batch"]), _found(context) + full])
    return Block(title, ("model", *batches, "tokens of one sequence"), rows)


def _found(limit: Record) -> str:
    return f"{limit['found']:,} ({limit['predicted']:,})"


def _notes(record: Record) -> list[str]:
    return [
        "Medians ± half the interquartile range. x first: decode rate over the first model's, median over rounds in "
        "which the models took turns; by bytes: what the bytes of a step predict.",
        f"Roofline: weights and cache that a step moves, over the copy rate of this device, "
        f"{record['copy_bytes_per_second'] / 1e9:,.1f} GB/s read and written.",
        *_other_kernels(record["rows"]),
    ]


def _other_kernels(rows: Sequence[Record]) -> list[str]:
    """Return a warning for each model and path whose kernels are not those of the first model."""
    found = {}
    for row in rows:
        first = next(one for one in rows if _place(one) == _place(row))
        if not (row["failed"] or first["failed"]) and row["attention"] != first["attention"]:
            kernels = " and ".join(", ".join(one["attention"]) for one in (row, first))
            found[row["model"], row["path"]] = (
                f"{row['model']} and {first['model']} ran by different kernels on path {row['path']} ({kernels}): the "
                "ratio compares kernels as well as sizes."
            )
    return list(found.values())
