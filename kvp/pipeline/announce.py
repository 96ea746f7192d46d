"""Log a finished run to its tracker: costs, final numbers, curves, widths, the plan."""

from __future__ import annotations

from typing import Any

from kvp.pipeline.recording import losses
from kvp.pipeline.session import Session
from kvp.record import RunRecord
from kvp.results import ModelRecord
from kvp.tracking import Log


def announce(record: RunRecord, session: Session, tracked: Log) -> None:
    """Log stage costs, final numbers, loss curve, widths, sensitivity profile and plan."""
    for _, stage in session.finished:
        cost = {"seconds": stage.seconds, "peak_bytes": stage.peak_bytes or 0}
        tracked.metrics({f"stage/{stage.name}/{key}": value for key, value in cost.items()})
    for point in losses(session):
        values = {f"recover/{k}": v for k, v in point.items() if k != "step" and v is not None}
        tracked.metrics(values, step=point["step"])
    tracked.summary(
        {name: finals(model) for name, model in record.models().items()} | {"ratio": record.ratio.achieved}
    )
    widths = [layer.model_dump() for layer in record.models()["pruned"].size.layers]
    tracked.table("widths", ["layer", *widths[0]], [[i, *row.values()] for i, row in enumerate(widths)])
    if profile := record.sensitivity:
        tracked.bar(
            "sensitivity", range(len(profile)), profile, "NLL without the block's KV - NLL (nats/token)"
        )
    if cut := session.done.get("prune"):
        tracked.artifact(cut.path / "plan.json", f"plan-{record.hash}", "plan")


def finals(model: ModelRecord) -> dict[str, Any]:
    """Return the headline numbers of one model."""
    tasks, measured = model.evaluation.zero_shot, model.measure
    numbers: dict[str, Any] = {
        "params": model.size.params,
        "kv_bytes_per_token": model.size.kv_bytes_per_token,
        "perplexity": {corpus: result.value for corpus, result in model.evaluation.perplexity.items()},
        "zero_shot": {
            task: {key: result.metrics[key] for key in ("acc", "acc_norm") if key in result.metrics}
            for task, result in tasks.tasks.items()
        },
    }
    if model.size.sparsity:
        numbers["sparsity"] = model.size.sparsity.fraction
    if tasks.average:
        numbers["zero_shot_average"] = tasks.average.value
    if measured:
        numbers["decode_tokens_per_second"] = measured.decode.tokens_per_second
        numbers["prefill_tokens_per_second"] = measured.prefill.tokens_per_second
        numbers["peak_bytes"] = measured.memory.peak_bytes
    return numbers
