"""Ratios of a benchmark's record: how many times faster one thing ran than another, in turns on the same machine.

A record holds them under `ratios`, by a name that says what ran where: {"median": 1.24, "iqr": [1.2, 1.3]}. Higher is
faster. What slows the machine down slows both sides, so ratios of two days can be compared where seconds cannot.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

KEY = "ratios"
PARTS = ("prefill", "decode", "latency")

Verdict = Literal["worse", "better", "as before", "missing"]


@dataclass(frozen=True)
class Ratio:
    """A ratio of speeds: the median of the rounds, and their quartiles."""

    median: float
    low: float
    high: float


def of_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the ratios of bench.json's rows; the first model, which is compared with, has none."""
    found: dict[str, Any] = {}
    first = None
    for row in rows:
        first = first or row["model"]
        if row["failed"] or row["model"] == first or not row["against_first"]:
            continue
        place = (
            f"{row['path']}, batch {row['batch_size']}, {row['prompt_length']} + {row['new_tokens']} tokens"
        )
        found |= {f"{row['model']} / {first}, {place}: {part}": row["against_first"][part] for part in PARTS}
    return found


def read_ratios(path: Path) -> tuple[dict[str, Ratio], str | None]:
    """Return the ratios of a record by name, and the device, dtype and threads that it names.

    Args:
        path: A JSON record, or JSON lines whose first is one.

    Raises:
        ValueError: The file is no such record, or a ratio is no number with its quartiles.
    """
    try:
        text = path.read_text()
        record = _first(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get(KEY), dict) or not record[KEY]:
        raise ValueError(
            f"{path} holds no ratios: give a bench.json or results.jsonl of kvp bench, or a results.json of kvp bench "
            "serve. One that was measured before kvp wrote ratios must be measured again"
        )
    made = record.get("provenance")
    device = record.get("device") or (made.get("device_name") if isinstance(made, dict) else None)
    threads = f"{record['threads']} threads" if "threads" in record else None
    told = ", ".join(str(word) for word in (device, record.get("dtype"), threads) if word)
    return {name: _ratio(path, name, given) for name, given in record[KEY].items()}, told or None


def _first(text: str) -> Any:
    """Return a JSON document, or the first line of JSON lines."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return json.loads(text.partition("\n")[0])


def _ratio(path: Path, name: str, given: Any) -> Ratio:
    try:
        low, high = map(float, given["iqr"])
        made = Ratio(float(given["median"]), low, high)
    except (TypeError, KeyError, ValueError):
        made = Ratio(0, 0, 0)
    if not 0 < made.low <= made.median <= made.high < float("inf"):
        raise ValueError(
            f"{path}: the ratio {name!r} must have a median between the two numbers of iqr, all above 0, got {given!r}"
        )
    return made


def verdict(before: Ratio | None, after: Ratio | None, tolerance: float) -> Verdict:
    """Return how a ratio moved; it did if the quartiles do not overlap, and the median is off by `tolerance`."""
    if before is None or after is None:
        return "missing"
    if abs(after.median / before.median - 1) <= tolerance:
        return "as before"
    if after.high < before.low:
        return "worse"
    return "better" if after.low > before.high else "as before"
