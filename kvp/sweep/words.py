"""What a sweep says of one job: cells of the table, and the line when it ends."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

JOBS = "KVP_SWEEP_JOBS"  # how many there are, for the processes that run them

Record = Mapping[str, Any]


def read(directory: Path) -> Record:
    """The run.json of a run; empty if there is none to be read."""
    try:
        return dict(json.loads((directory / "run.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def line(number: int, status: str, name: str, told: str) -> str:
    """ "[ 4/18] finished <run>: ..."."""
    jobs = os.environ.get(JOBS, "?")
    return f"[{number + 1:>{len(jobs)}}/{jobs}] {status:<8} {name}: {told}"


def facts(record: Record) -> str:
    """What a finished run found."""
    models = [record[name] for name in ("dense", "pruned", "recovered") if name in record]
    seen = f"perplexity {corpora([record])} {' > '.join(map(perplexities, models))}"
    if not record["dense"]["evaluation"]["perplexity"]:
        seen = "no perplexity"
    return f"{removed(record)}; {seen}; {stages(record)}; {record['provenance']['seconds']:.0f} s"


def reason(kind: str, message: str) -> str:
    """An error in one line: its class, and the last line that says something."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return f"{kind}: {lines[-1]}" if lines else kind


def removed(record: Record) -> str:
    """The achieved part of what was asked for: "25.0 % of kv_cache"."""
    asked = record["ratio"]["asked"]
    return f"{100 * record['ratio']['achieved'][asked['of']]:.1f} % of {asked['of']}" if asked else "nothing"


def corpora(records: Sequence[Record]) -> str:
    """Names of the corpora, as `perplexities` has them."""
    return " | ".join(dict.fromkeys(" / ".join(r["dense"]["evaluation"]["perplexity"]) for r in records))


def perplexities(model: Record) -> str:
    """One per corpus."""
    return " / ".join(f"{result['value']:.2f}" for result in model["evaluation"]["perplexity"].values())


def stages(record: Record) -> str:
    """How many were found, how many computed."""
    found = sum(stage["found"] for stage in record["stages"])
    return f"{found} found, {len(record['stages']) - found} computed"
