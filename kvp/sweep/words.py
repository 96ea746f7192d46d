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
    """The run.json of a run; empty if there is none."""
    path = directory / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def line(directory: Path, number: int, seconds: float, reason: str | None) -> str:
    """ "[ 4/18] finished <run>: ..." or "[ 4/18] failed <run>: ..."."""
    record, jobs = read(directory), os.environ.get(JOBS, "?")
    head = f"[{number + 1:>{len(jobs)}}/{jobs}] {'failed  ' if reason else 'finished'} {directory.name}: "
    if reason:
        where = f"{record['stage']}: " if record.get("stage") else ""
        return f"{head}{where}{reason}"
    models = [record[name] for name in ("dense", "pruned", "recovered") if name in record]
    told = f"perplexity {corpora([record])} {' > '.join(map(perplexities, models))}"
    seen = told if record["dense"]["evaluation"]["perplexity"] else "no perplexity"
    return f"{head}{removed(record)}; {seen}; {stages(record)}; {seconds:.0f} s"


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
