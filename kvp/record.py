"""The record of a run: `run.json`, what the tracker is told, and when an earlier run still stands."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvp.experiment import Experiment, Record
from kvp.provenance import provenance
from kvp.tracking import Log
from kvp.types import DENOMINATORS, Size

SCHEMA = 1  # of run.json; documented in the README, raised when a key changes its meaning


def make_record(
    x: Experiment, models: Mapping[str, Record], directory: Path, tracker: str | None, started: float
) -> Record:
    """Everything a table or a reader needs; JSON data."""
    return {
        "schema": SCHEMA,
        "name": x.name,
        "hash": x.hash,
        "directory": str(directory),
        "config": x.node,
        "ratio": {
            "asked": None if x.unpruned else {"value": x.budget.value, "of": x.budget.of},
            "achieved": achieved(models["dense"], models["pruned"]),
        },
        **models,
        "sensitivity": x.profile,
        "recovery": x.recovery_result
        and {**x.recovery_result, "losses": [[point["step"], point["loss"]] for point in x.losses]},
        "stages": [
            {
                "name": stage.name,
                "fingerprint": stage.fingerprint,
                "path": str(stage.path),
                "seconds": stage.seconds,
                "peak_bytes": stage.peak_bytes,
                "found": stage.found,
            }
            for stage in x.stages
        ],
        "tracker": tracker,
        "provenance": {
            **provenance(x.device),
            "dtype": str(x.dtype),
            "seed": x.node["seed"],
            "model": x.source.identity(),
            "data_hashes": {
                name: result["data_hash"]
                for name, result in models["dense"]["evaluation"]["perplexity"].items()
            },
            "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
            "seconds": time.time() - started,
        },
    }


def achieved(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> dict[str, float]:
    """The fraction removed under every denominator."""

    def size(model: Mapping[str, Any]) -> Size:
        return Size(**{key: value for key, value in model["size"].items() if key != "layers"})

    return {of: 1 - size(pruned).count(of) / size(dense).count(of) for of in DENOMINATORS}


def write_record(record: Record, directory: Path) -> None:
    """Write `run.json` whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / ".run.json.partial"
    partial.write_text(json.dumps(record, indent=2, allow_nan=False))
    os.replace(partial, directory / "run.json")


def finished_before(directory: Path) -> Record | None:
    """The record of an earlier run of this configuration, if all its stages still stand."""
    path = directory / "run.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError:
        return None  # written anew
    stands = record.get("schema") == SCHEMA and all(Path(s["path"]).exists() for s in record["stages"])
    return record if stands else None


def announce(record: Record, x: Experiment, tracked: Log) -> None:
    """Tell the tracker: stage costs, finals, loss curve, widths, sensitivity profile, plan."""
    for stage in x.stages:
        cost = {"seconds": stage.seconds, "peak_bytes": stage.peak_bytes or 0}
        tracked.metrics({f"stage/{stage.name}/{key}": value for key, value in cost.items()})
    for point in x.losses:
        values = {f"recover/{k}": v for k, v in point.items() if k != "step" and v is not None}
        tracked.metrics(values, step=point["step"])
    models = {name: record[name] for name in ("dense", "pruned", "recovered") if name in record}
    tracked.summary(
        {name: finals(model) for name, model in models.items()} | {"ratio": record["ratio"]["achieved"]}
    )
    widths = record["pruned"]["size"]["layers"]
    tracked.table("widths", ["layer", *widths[0]], [[i, *row.values()] for i, row in enumerate(widths)])
    if x.profile:
        tracked.bar(
            "sensitivity", range(len(x.profile)), x.profile, "NLL without the block's KV - NLL (nats/token)"
        )
    for plan in (stage.path / "plan.json" for stage in x.stages if stage.name == "prune"):
        tracked.artifact(plan, f"plan-{x.hash}", "plan")


def finals(model: Mapping[str, Any]) -> dict[str, Any]:
    """The headline numbers of one model."""
    zero_shot, measured = model["evaluation"]["zero_shot"], model["measure"]
    numbers = {
        "params": model["size"]["params"],
        "kv_bytes_per_token": model["size"]["kv_bytes_per_token"],
        "perplexity": {name: result["value"] for name, result in model["evaluation"]["perplexity"].items()},
        "zero_shot": {
            task: {key: result[key] for key in ("acc", "acc_norm") if result.get(key) is not None}
            for task, result in zero_shot.items()
            if task != "average"
        },
    }
    if zero_shot["average"]:
        numbers["zero_shot_average"] = zero_shot["average"]["value"]
    if measured:
        numbers["decode_tokens_per_second"] = measured["decode"]["tokens_per_second"]
        numbers["prefill_tokens_per_second"] = measured["prefill"]["tokens_per_second"]
        numbers["peak_bytes"] = measured["memory"]["peak_bytes"]
    return numbers
