"""Show a finished run in its tracker: the models side by side, what they cost, how the recovery went."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvp.pipeline.summary import results
from kvp.record import RunRecord, StageRecord
from kvp.results import ModelRecord
from kvp.tracking import Log
from kvp.tracking.base import flat

STAGES = ["model", "stage", "seconds", "peak bytes", "found"]


def announce(record: RunRecord, log: Log) -> None:
    """Log a finished run. On the axis "stage", 0 is the dense model, 1 the pruned and 2 the recovered one."""
    log.config(origin(record))
    models = record.models()
    for number, model in enumerate(models.values()):
        log.metrics(numbers_of(model), step=number, axis="stage")
    points = losses(record)
    for point in points if len(points) > 1 else ():  # one point is no curve
        values = {f"recover/{k}": v for k, v in point.items() if k != "step" and v is not None}
        log.metrics(values, step=point["step"])
    log.summary({name: finals(model) for name, model in models.items()} | {"ratio": ratios(record)})
    heads, rows = results(record)
    log.table("results", heads, rows)
    costs = [[each.model, each.name, each.seconds, each.peak_bytes, each.found] for each in record.stages]
    log.table("stages", STAGES, costs)
    widths = [layer.model_dump() for layer in models["pruned"].size.layers]
    log.table("widths", ["layer", *widths[0]], [[i, *row.values()] for i, row in enumerate(widths)])
    if bars := list(accuracies(record)):
        labels, percents = zip(*bars, strict=True)
        log.bar("accuracy", labels, percents, "Zero-shot accuracy (± standard error)")
    if profile := record.sensitivity:
        log.bar("sensitivity", range(len(profile)), profile, "NLL without the block's KV - NLL (nats/token)")
    if cut := stage(record, "prune"):
        log.artifact(Path(cut.path) / "plan.json", f"plan-{record.hash}", "plan")


def origin(record: RunRecord) -> dict[str, Any]:
    """Return the code that made the stages of a run, and where its checkpoints and its record lie."""
    makers = record.provenance.origins
    return {
        "version": _listed(maker.kvp for maker in makers),
        "commit": _listed(maker.commit for maker in makers),
        "dirty": any(maker.dirty for maker in makers),
        "device": _listed(maker.device_name or maker.device for maker in makers),
        "origins": [maker.model_dump(exclude={"command"}) for maker in makers],
        "checkpoints": {name: model.checkpoint for name, model in record.models().items()},
        "record": f"{record.directory}/run.json",
    }


def _listed(values: Iterable[str | None]) -> str:
    """Return distinct values in one line, "unknown" for none."""
    return ", ".join(dict.fromkeys(value or "unknown" for value in values))


def ratios(record: RunRecord) -> dict[str, dict[str, float]]:
    """Return the fractions asked for, of all chained strategies, and those achieved, by denominator."""
    budgets = record.ratio.asked.budgets if record.ratio.asked else ()
    achieved = record.ratio.achieved or {}
    return {
        "asked": {budget.of: budget.value for budget in budgets},
        "achieved": dict(achieved.items()),
    }


def finals(model: ModelRecord) -> dict[str, Any]:
    """Return the numbers of one model: size, quality, bytes and tokens per second."""
    tasks, measured = model.evaluation.zero_shot, model.measure
    numbers: dict[str, Any] = {
        "params": model.size.params,
        "perplexity": {corpus: result.value for corpus, result in model.evaluation.perplexity.items()},
        "zero_shot": {task: dict(result.metrics) for task, result in tasks.tasks.items()},
        "bytes": {"kv_per_token": model.size.kv_bytes_per_token},
    }
    if model.size.stored_bytes_per_token not in (None, model.size.kv_bytes_per_token):
        numbers["bytes"]["kv_per_token_stored"] = model.size.stored_bytes_per_token
    if model.size.sparsity:
        numbers["sparsity"] = model.size.sparsity.fraction
    if tasks.average and tasks.average.value is not None:
        numbers["zero_shot"]["average"] = {"acc": tasks.average.value, "acc_stderr": tasks.average.stderr}
    if found := model.evaluation.needles:
        numbers["needles"] = {
            name: {"acc": result.accuracy, "acc_stderr": result.stderr, "bound": result.bound}
            for name, result in found.items()
        }
    if measured:
        parts = ("weights", "cache", "rest", "peak")
        numbers["bytes"] |= {part: getattr(measured.memory, f"{part}_bytes") for part in parts}
        numbers["bytes"]["kv_per_token_measured"] = measured.kv_bytes_per_token
        numbers["tokens_per_second"] = {
            "prefill": measured.prefill.tokens_per_second,
            "decode": measured.decode.tokens_per_second,
        }
    return numbers


def numbers_of(model: ModelRecord) -> dict[str, float]:
    """Return the numbers of one model by name: {"zero_shot/piqa/acc": 0.5}."""
    return {name: value for name, value in flat(finals(model)).items() if value is not None}


def accuracies(record: RunRecord) -> Iterator[tuple[str, float]]:
    """Yield a bar per task and model, in percent; the label holds the standard error."""
    models = record.models()
    average = models["dense"].evaluation.zero_shot.average
    for task, metric in average.metrics.items() if average else ():
        for name, model in models.items():
            metrics = model.evaluation.zero_shot.tasks[task].metrics
            error = metrics.get(f"{metric}_stderr")  # none of one document
            spread = "" if error is None else f" (± {100 * error:.1f})"
            yield f"{task} {name}{spread}", 100 * metrics[metric]


def losses(record: RunRecord) -> list[dict[str, Any]]:
    """Return one point per optimizer step of the recovery; none if there was none."""
    tuned = stage(record, "recover")
    lines = (Path(tuned.path) / "losses.jsonl").read_text().splitlines() if tuned else []
    return [json.loads(line) for line in lines]


def stage(record: RunRecord, name: str) -> StageRecord | None:
    """Return a stage of a run by name; None if it has none."""
    return next((stage for stage in record.stages if stage.name == name), None)
