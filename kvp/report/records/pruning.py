"""What pruning cost, from the stages that a run went through or found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STAGES = ("join", "score", "sensitivity", "search", "plan", "refit", "prune")


def pruning(record: Mapping[str, Any]) -> dict[str, float | None] | None:
    """Seconds of all of them and bytes at the highest peak of the process; None where nothing was pruned.

    A stage that was found counts with what it took when it was computed.
    """
    stages = [stage for stage in record.get("stages", ()) if stage["name"] in STAGES]
    if all(stage["name"] != "prune" for stage in stages):
        return None
    peaks = [stage["peak_bytes"] for stage in stages if "peak_bytes" in stage]
    return {"seconds": sum(stage["seconds"] for stage in stages), "peak_bytes": max(peaks, default=None)}
