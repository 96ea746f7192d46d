"""The table at the end of a run: dense, pruned and recovered side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 120  # of the table in a file or pipe

MODELS = ("dense", "pruned", "recovered")

Read = Callable[[Mapping[str, Any]], str]


def print_summary(record: Mapping[str, Any]) -> None:
    """The table, what was achieved of what was asked, and where everything lies."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(_table(record))
    for line in [*_notes(record), *_places(record)]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _table(record: Mapping[str, Any]) -> Table:
    models = [name for name in MODELS if name in record]
    table = Table(title=record["name"], title_justify="left")
    table.add_column("", no_wrap=True)
    for name in models:
        table.add_column(name, justify="right")
    for label, read in _rows(record):
        table.add_row(label, *(read(record[name]) for name in models))
    return table


def _rows(record: Mapping[str, Any]) -> list[tuple[str, Read]]:
    dense = record["dense"]
    rows: list[tuple[str, Read]] = [
        ("parameters", lambda m: f"{m['size']['params'] / 1e6:,.2f} M"),
        ("KV cache per token", lambda m: f"{m['size']['kv_bytes_per_token']:,} B"),
    ]
    if dense["size"].get("sparsity"):
        rows.append(("zeros in linear weights", lambda m: f"{100 * m['size']['sparsity']['fraction']:.2f} %"))
        rows += [(f"weights, if stored {how}", partial(_stored, how)) for how in ("dense", "2:4", "bitmap")]
    for name, result in dense["evaluation"]["perplexity"].items():
        label = f"perplexity {name} (window {result['protocol']['window']})"
        rows.append((label, partial(_perplexity, name)))
    for name, result in dense["evaluation"]["zero_shot"].items():
        if name != "average":
            metric = dense["evaluation"]["zero_shot"]["average"]["metrics"][name]
            rows.append((_task_label(name, metric, result), partial(_task, name, metric)))
    if average := dense["evaluation"]["zero_shot"]["average"]:
        label = f"zero-shot average % ({len(average['tasks'])} tasks)"
        rows.append((label, _average))
    if protocol := dense["measure"] and dense["measure"]["protocol"]:
        shape = f"batch {protocol['batch_size']}, {protocol['prompt_length']}+{protocol['new_tokens']}"
        if record["config"].get("cache"):
            rows.append(("KV cache per token, stored", lambda m: f"{m['measure']['kv_bytes_per_token']:,} B"))
        rows += [
            (f"prefill tokens/s ({shape})", lambda m: _rate(m["measure"]["prefill"])),
            (f"decode tokens/s ({shape})", lambda m: _rate(m["measure"]["decode"])),
            ("memory: weights", lambda m: _mebibytes(m["measure"]["memory"]["weights_bytes"])),
            ("memory: KV cache", lambda m: _mebibytes(m["measure"]["memory"]["cache_bytes"])),
            ("memory: peak over an empty process", lambda m: _mebibytes(_peak(m["measure"]["memory"]))),
        ]
    return rows


def _stored(how: str, model: Mapping[str, Any]) -> str:
    taken = model["size"]["sparsity"]["model_bytes"][how]
    return "-" if taken is None else _mebibytes(taken)


def _perplexity(corpus: str, model: Mapping[str, Any]) -> str:
    return f"{model['evaluation']['perplexity'][corpus]['value']:.2f}"


def _task_label(task: str, metric: str, result: Mapping[str, Any]) -> str:
    limit = f", first {result['limit']}" if result.get("limit") else ""
    return f"{task} % ({metric}, {result['split']}{limit})"


def _task(task: str, metric: str, model: Mapping[str, Any]) -> str:
    result = model["evaluation"]["zero_shot"][task]
    return _percent(result[metric], result[f"{metric}_stderr"])


def _average(model: Mapping[str, Any]) -> str:
    average = model["evaluation"]["zero_shot"]["average"]
    return _percent(average["value"], average["stderr"])


def _percent(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def _rate(timing: Mapping[str, Any]) -> str:
    low, high = timing["iqr"]
    return f"{timing['tokens_per_second']:,.0f} ± {(high - low) / 2:,.0f}"


def _peak(memory: Mapping[str, Any]) -> int:
    return memory["peak_bytes"] - memory["baseline_bytes"]


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _notes(record: Mapping[str, Any]) -> list[str]:
    achieved = ", ".join(f"{of} {100 * value:.2f} %" for of, value in record["ratio"]["achieved"].items())
    asked = record["ratio"]["asked"]
    budgets = [asked, *asked.get("then", [])] if asked else []
    words = ", then ".join(f"{100 * budget['value']:g} % of {budget['of']}" for budget in budgets)
    asked_words = f"asked {words}; " if words else ""
    notes = [f"removed: {asked_words}achieved {achieved}"]
    for name in record["dense"]["evaluation"]["perplexity"]:
        overlaps = {
            reader: kind
            for model in MODELS
            if model in record
            for reader, kind in record[model]["evaluation"]["perplexity"][name]["overlap"].items()
        }
        notes += [
            f"note: {reader} read the {kind} as perplexity on {name}"
            for reader, kind in overlaps.items()
            if kind != "none"
        ]
    if "recovered" in record:
        notes.append(
            "read recovered against the dense model tuned alike (strategy=none with the same recovery), not "
            "against dense: tuning on text lowers perplexity by itself"
        )
    return notes


def _places(record: Mapping[str, Any]) -> list[str]:
    last = next(record[name] for name in reversed(MODELS) if name in record)
    found = sum(stage["found"] for stage in record["stages"])
    return [
        f"stages: {len(record['stages'])}, {found} found finished, {record['provenance']['seconds']:.1f} s in all",
        f"record: {record['directory']}/run.json",
        f"checkpoint: {last['checkpoint']}",
        f"tracker: {record['tracker'] or 'none'}",
    ]
