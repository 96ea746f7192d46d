"""The record of a run: what `run.json` says of it, and what the tracker is told."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvp.pipeline.experiment import Experiment, Record
from kvp.provenance import provenance
from kvp.tracking import Log
from kvp.types import DENOMINATORS, Size

SCHEMA = 3  # of run.json; documented in the README, raised when a key changes its meaning


def make_record(
    x: Experiment, models: Mapping[str, Record], directory: Path, tracker: str | None, started: float
) -> Record:
    """Everything a table or a reader needs; JSON data."""
    return {
        "schema": SCHEMA,
        **identity(x, directory),
        "status": "finished",
        "ratio": {"asked": asked(x), "achieved": achieved(models["dense"], models["pruned"])},
        **models,
        "sensitivity": x.profile,
        "recovery": x.recovery_result and {**x.recovery_result, **losses(x)},
        "stages": stages(x),
        "tracker": tracker,
        "provenance": {
            **origin(x, started),
            "model": x.source.identity(),
            "data_hashes": {
                name: result["data_hash"]
                for name, result in models["dense"]["evaluation"]["perplexity"].items()
            },
            "seconds": time.time() - started,
        },
    }


def identity(x: Experiment, directory: Path) -> Record:
    """Which run this is."""
    names = {"name": x.name, "hash": x.hash, "group": x.group, "directory": str(directory)}
    words = x.overrides and list(x.overrides)
    return {**names, "config": x.node, "choices": x.choices, "overrides": words}


def asked(x: Experiment) -> Record | None:
    """The budget, None for the dense model."""
    if x.unpruned:
        return None
    first, *then = ({"value": budget.value, "of": budget.of} for budget in (x.budget, *x.strategy.then))
    return first | ({"then": then} if then else {})


def losses(x: Experiment) -> Record:
    """(step, loss) pairs of a recovery, and those of the loss's parts if it has a teacher."""

    def curve(key: str) -> list[list[float]]:
        return [[point["step"], point[key]] for point in x.losses]

    parts = {key.removesuffix("_loss"): curve(key) for key in x.losses[0] if key.endswith("_loss")}
    return {"losses": curve("loss"), **({"loss_parts": parts} if parts else {})}


def origin(x: Experiment, started: float) -> Record:
    """Where its numbers come from."""
    return {
        **provenance(x.device),
        "dtype": str(x.dtype),
        "seed": x.node["seed"],
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
    }


def stages(x: Experiment) -> list[Record]:
    """Those computed or found so far."""
    return [
        {
            "name": stage.name,
            "fingerprint": stage.fingerprint,
            "path": str(stage.path),
            "seconds": stage.seconds,
            "peak_bytes": stage.peak_bytes,
            "found": stage.found,
        }
        for stage in x.stages
    ]


def achieved(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> dict[str, float]:
    """The fraction removed under every denominator; zeros only where they were counted."""

    def size(model: Mapping[str, Any]) -> Size:
        return Size(**{field.name: model["size"][field.name] for field in fields(Size)})

    sizes = {
        of: 1 - size(pruned).count(of) / size(dense).count(of) for of in DENOMINATORS if of != "sparsity"
    }
    zeros = pruned["size"]["sparsity"]
    return sizes | ({"sparsity": zeros["fraction"]} if zeros else {})


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
    if zeros := model["size"]["sparsity"]:
        numbers["sparsity"] = zeros["fraction"]
    if zero_shot["average"]:
        numbers["zero_shot_average"] = zero_shot["average"]["value"]
    if measured:
        numbers["decode_tokens_per_second"] = measured["decode"]["tokens_per_second"]
        numbers["prefill_tokens_per_second"] = measured["prefill"]["tokens_per_second"]
        numbers["peak_bytes"] = measured["memory"]["peak_bytes"]
    return numbers
