"""Build the record of a run from the stages of its session."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from kvp.evaluation.zeroshot import average
from kvp.models.caches import mean_bytes_per_token
from kvp.models.shapes import itemsize, layer_shapes, size
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.session import Checkpoint, Session
from kvp.provenance import command
from kvp.record import RecoveryRecord, RunRecord
from kvp.results import LayerRecord, ModelRecord
from kvp.store import Finished
from kvp.strategies.limits import Limit
from kvp.types import Size
from kvp.upgrade import SCHEMA

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OF_STAGE = ("started", "code", "edits")  # what an origin says of one stage alone


def make_record(
    session: Session, models: Mapping[str, ModelRecord], tracker: str | None, started: float
) -> RunRecord:
    """Return everything a table or a reader needs."""
    x, dense = session.x, models["dense"]
    sensed = session.done.get("sensitivity")
    hashes = {corpus: result.data_hash for corpus, result in dense.evaluation.perplexity.items()}
    known = made(session)
    provenance = provenance_record(
        x,
        started,
        origins=known["origins"],
        model=x.source.identity(),
        data_hashes=hashes,
        seconds=time.time() - started,
    )
    return RunRecord.model_validate(
        {
            **identity(x),
            "status": "finished",
            "ratio": {
                "asked": asked(x, session.checkpoint("dense").config),
                "achieved": achieved(dense, models["pruned"]) | achieved_bytes(session),
            },
            **models,
            "sensitivity": sensed and sensed.result["nats_per_token"],
            "recovery": recovery_record(session),
            "stages": known["stages"],
            "tracker": tracker,
            "provenance": provenance,
        }
    )


def model_record(x: Experiment, checkpoint: Checkpoint, examined: Mapping[str, Finished]) -> ModelRecord:
    """Return what is known of one model, from the stages that looked at it."""
    config, shapes = checkpoint.config, layer_shapes(checkpoint.config)
    widths = [
        {
            name: value
            for name in LayerRecord.model_fields
            if (value := getattr(shape, name)) is not None or name == "stream"
        }
        for shape in shapes
    ]
    results = {place: stage.result for place, stage in examined.items()}

    def below(folder: str) -> dict[str, dict[str, Any]]:
        return {
            place.removeprefix(folder): {**result, "dtype": str(x.dtype)}
            for place, result in results.items()
            if place.startswith(folder)
        }

    perplexity, tasks = below("evaluate/perplexity/"), below("evaluate/zero_shot/")
    needles = below("evaluate/needles/")
    for result in perplexity.values():
        result["overlap"] = overlap(x, result["protocol"]["corpus"])
    return ModelRecord.model_validate(
        {
            "checkpoint": str(checkpoint.path),
            "size": {
                **asdict(size(config, shapes)),
                "stored_bytes_per_token": mean_bytes_per_token(config, itemsize(config)),
                "layers": widths,
                "sparsity": results.get("sparsity"),
            },
            "evaluation": {
                "perplexity": perplexity,
                "zero_shot": {**tasks, "average": average(tasks) if tasks else None},
                **({"needles": needles} if needles else {}),
            },
            "measure": results.get("measure"),
        }
    )


def identity(x: Experiment) -> dict[str, Any]:
    """Return which run this is."""
    return {
        "schema": SCHEMA,
        "name": x.name,
        "hash": x.hash,
        "group": x.group,
        "directory": str(x.directory),
        "config": x.node,
        "choices": x.choices,
        "overrides": x.overrides and list(x.overrides),
        **({"config_dir": x.config_dir} if x.config_dir else {}),
    }


def asked(x: Experiment, dense: PretrainedConfig | None = None) -> dict[str, Any] | None:
    """Return the budget; None for the dense model, or for a limit in GiB as long as the dense model is not known."""
    value = x.budget.value
    if isinstance(x.budget, Limit) and value is None and dense is not None:
        value = x.budget.removed(dense, x.budget.most(dense))
    if x.unpruned or value is None:
        return None
    then = [{"value": budget.value, "of": budget.of} for budget in x.strategy.then]
    return {"value": value, "of": x.budget.of, **({"then": then} if then else {})}


def achieved_bytes(session: Session) -> dict[str, float]:
    """Return the fraction of stored bytes that is gone, if the budget is one or the cache has a format."""
    x, (dense, pruned) = session.x, (session.checkpoint(name).config for name in ("dense", "pruned"))
    if not x.unpruned and isinstance(x.budget, Limit):
        return {x.budget.of: x.budget.removed(dense, x.budget.count(pruned))}
    if x.cache is None:
        return {}
    before, after = (mean_bytes_per_token(config, itemsize(config)) for config in (dense, pruned))
    return {"cache_bytes": 1 - after / before}


def achieved(dense: ModelRecord, pruned: ModelRecord) -> dict[str, float]:
    """Return the fraction removed under every denominator; zeros only where they were counted."""

    def counts(model: ModelRecord) -> Size:
        return Size(**{field.name: getattr(model.size, field.name) for field in fields(Size)})

    sizes, zeros = counts(pruned).removed_from(counts(dense)), pruned.size.sparsity
    return sizes | ({"sparsity": zeros.fraction} if zeros else {})


def overlap(x: Experiment, evaluated: Mapping[str, Any]) -> dict[str, str]:
    """Return whether calibration or recovery read the evaluated text: "none", "same corpus", "same text"."""
    read = {
        "calibration": (x.calibration_identity() or {}).get("corpora", []) if not x.unpruned else [],
        "recovery": x.recovery.data.identity(x.corpora).get("corpora", []) if x.recovery else [],
    }

    def kind(other: Mapping[str, Any]) -> int:
        return 2 if other == evaluated else int(other["name"] == evaluated["name"])

    names = ("none", "same corpus", "same text")
    return {reader: names[max(map(kind, sources), default=0)] for reader, sources in read.items()}


def recovery_record(session: Session) -> RecoveryRecord | None:
    """Return what the recovery cost and gained, with its curves; None if there was none."""
    done, recovery = session.done.get("recover"), session.x.recovery
    if done is None or recovery is None:
        return None
    points = losses(session)

    def curve(key: str) -> list[tuple[int, float]]:
        return [(point["step"], point[key]) for point in points]

    parts = {key.removesuffix("_loss"): curve(key) for key in points[0] if key.endswith("_loss")}
    teacher = {"teacher": session.checkpoint("dense").fingerprint} if recovery.distillation else {}
    curves = {"losses": curve("loss"), **({"loss_parts": parts} if parts else {})}
    return RecoveryRecord.model_validate({**done.result, **teacher, **curves})


def losses(session: Session) -> list[dict[str, Any]]:
    """Return one point per optimizer step of the recovery; none if there was none."""
    if "recover" not in session.done:
        return []
    lines = (session.done["recover"].path / "losses.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def made(session: Session) -> dict[str, Any]:
    """Return the stages computed or found so far, as "stages", and who made them, as the "origins" of provenance."""
    makers: list[dict[str, Any]] = []
    stages = []
    for model, stage in session.finished:
        own = [maker_of(origin) for origin in stage.origins if origin]
        makers += [maker for maker in own if maker not in makers]
        last = stage.origins[-1] if stage.origins else {}
        stages.append(
            {
                "name": stage.name,
                "fingerprint": stage.fingerprint,
                "path": str(stage.path),
                "seconds": stage.seconds,
                "peak_bytes": stage.peak_bytes,
                "found": stage.found,
                "model": model,
                **{key: last[key] for key in OF_STAGE if key in last},
                "origins": [makers.index(maker) for maker in own],
            }
        )
    return {"stages": stages, "origins": makers}


def maker_of(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a stage's origin that it shares with other stages of its maker."""
    return {key: value for key, value in origin.items() if key not in OF_STAGE}


def provenance_record(x: Experiment, started: float, **more: Any) -> dict[str, Any]:
    """Return who made the numbers: the makers of the stages, and this command."""
    return {
        "origins": [],
        "command": command(x.overrides),
        "dtype": str(x.dtype),
        "seed": x.node["seed"],
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        **more,
    }
