"""bench.json while it grows: written after every round, so that the same command goes on after the last one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvp.bench.rounds import Series
from kvp.measurement.measure import Measure
from kvp.measurement.memory import Memory

FILE = "bench.json"
# What makes two benchmarks the same; the memory that happens to be free now does not.
SAME = ("schema", "protocol", "paths", "dtype", "device", "threads", "models")

Record = dict[str, Any]


def write(record: Mapping[str, Any], out: Path) -> None:
    """In one piece, whenever the process is killed."""
    partial = out / f".{FILE}"
    partial.write_text(json.dumps(record, indent=1))
    partial.replace(out / FILE)


def go_on(record: Record, out: Path) -> Record:
    """`record`, which is about to begin, with what an unfinished one of the same benchmark has measured."""
    path = out / FILE
    old = json.loads(path.read_bytes()) if path.is_file() else {}
    new = json.loads(json.dumps(record))
    if old.get("status") != "running" or any(old.get(key) != new[key] for key in SAME):
        return record
    fastest = max(old["copy_bytes_per_second"], record["copy_bytes_per_second"])
    history = {key: old["provenance"][key] for key in ("started", "seconds")}
    history["processes"] = old["provenance"]["processes"] + 1
    kept = {key: old[key] for key in ("memory_limit_bytes", "limits", "rows", "begun")}
    return (
        record
        | kept
        | {
            "copy_bytes_per_second": fastest,
            "provenance": record["provenance"] | history,
        }
    )


def place(path: str, point: Measure) -> Record:
    """Which rows a round belongs to."""
    return {
        "path": path,
        **{key: asdict(point)[key] for key in ("batch_size", "prompt_length", "new_tokens")},
    }


def begun(record: Record, where: Record) -> dict[str, Series] | None:
    """The rounds at `where` of an unfinished record, None if there are none."""
    stored = record["begun"]
    if stored is None or stored["place"] != where:
        return None
    return {name: _series(one) for name, one in stored["series"].items()}


def keep(record: Record, where: Record, series: Mapping[str, Series]) -> None:
    """Note the rounds so far."""
    record["begun"] = {"place": where, "series": {name: asdict(one) for name, one in series.items()}}


def _series(stored: Record) -> Series:
    memory = stored["memory"] and Memory(**stored["memory"])
    return Series(**stored | {"memory": memory})
