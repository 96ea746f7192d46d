"""Facts that a number was measured under, by name, and their words. They decide what may share a column or a panel."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kvp.record import OriginRecord, RunRecord, StageRecord
from kvp.results import MeasureRecord, NeedlesRecord, PerplexityRecord, TaskRecord, ZeroShotRecord
from kvp.tables import plain

Facts = dict[str, Any]

# all other stages are those of pruning
OTHER_STAGES = ("model", "pack", "recover", "sparsity", "measure", "evaluate")
WORDS = {
    "corpus": "{}",
    "part": "{} part",
    "join": "joined by {!r}",
    "bos": "BOS {}",
    "max_tokens": "first {} tokens",
    "metrics": "{}",
    "limit": "first {} documents",
    "num_fewshot": "{}-shot",
    "version": "task version {}",
    "lm_eval": "lm-eval {}",
    "split": "{} split",
    "source": "{} data",
    "data_hash": "prompts {}",
    "dtype": "{}",
    "haystack": "among {}",
    "texts": "{} texts",
    "length": "of {} tokens",
    "choices": "one of {} numbers",
    "hops": "{} hops",
    "draw": "draw {}",
    "bound": "above chance from an accuracy of {} on",
    "device": "{}",
    "threads": "{} threads",
    "batch_size": "batch {}",
    "prompt_length": "prompt of {}",
    "new_tokens": "{} new tokens",
    "warmup": "{} warm-up",
    "runs": "median of {}",
    "attention": "{} attention",
    "method": "memory by {}",
    "kv_bytes": "{} bytes per value",
}
# of a corpus: what decides which text is read, and what goes without saying
TEXT = {"repo": None, "file": None, "column": "text", "half": None, "max_documents": None, "read": None}
WITHOUT = {"max_tokens": "all tokens", "limit": "all documents", "add_bos_token": "BOS by the tokenizer"}


def facts(record: RunRecord, metric: str) -> Facts:
    """Return what a number of a record was measured under; nothing for a number that needs no protocol."""
    name, *path = metric.split(" - ")[0].split(".")
    if name == "pruning":
        by = maker(record, [stage for stage in record.stages if is_pruning(stage)])
        return {
            "dtype": record.config.get("dtype"),
            "device": by and by.device,
            "threads": by and by.threads,
        }
    if name not in record.models():
        return {}
    model = record.models()[name]
    match path:
        case ["evaluation", "perplexity", corpus, *_]:
            by = maker(record, _looking(record, name, f"evaluate/perplexity/{corpus}"))
            return _of_perplexity(model.evaluation.perplexity[corpus]) | {"device": by and by.device}
        case ["evaluation", "zero_shot", task, *_]:
            place = "evaluate/zero_shot/" + ("" if task == "average" else task)
            by = maker(record, _looking(record, name, place))
            return _of_tasks(model.evaluation.zero_shot, task, path[-1]) | {"device": by and by.device}
        case ["evaluation", "needles", hidden, *_]:
            by = maker(record, _looking(record, name, f"evaluate/needles/{hidden}"))
            return _of_needles(model.evaluation.needles[hidden]) | {"device": by and by.device}
        case ["measure", *_] if model.measure:
            return _of_measure(model.measure)
        case ["size", "kv_bytes_per_token" | "stored_bytes_per_token"]:
            width = sum(layer.kv_width for layer in model.size.layers)
            return {"kv_bytes": model.size.kv_bytes_per_token / width if width else None}
    return {}


def maker(record: RunRecord, stages: Sequence[StageRecord]) -> OriginRecord | None:
    """Return who made most of some stages, by seconds; None if that is not known.

    Old records know one maker only: it stands for all stages.
    """
    known = [stage for stage in stages if stage.origins]
    longest = max(known, key=lambda stage: stage.seconds, default=None)
    if longest is None:
        return next(iter(record.provenance.origins), None)
    return record.provenance.origins[longest.origins[-1]]


def is_pruning(stage: StageRecord) -> bool:
    """Return whether a stage belongs to pruning: neither the dense model's, nor recovery, nor a look at a model."""
    return stage.name.partition("/")[0] not in OTHER_STAGES


def _looking(record: RunRecord, model: str, place: str) -> list[StageRecord]:
    return [stage for stage in record.behind(model, place) if stage.examines]


def _of_perplexity(result: PerplexityRecord) -> Facts:
    protocol = result.protocol
    named = ("part", "window", "stride", "join", "bos", "max_tokens")
    return {
        "corpus": _corpus(protocol.corpus),
        **{name: getattr(protocol, name) for name in named},
        "dtype": _dtype(result.dtype),
    }


def _of_tasks(results: ZeroShotRecord, task: str, metric: str) -> Facts:
    """Return the facts of one task, or of the average: one value per fact, and where tasks differ, all of them."""
    metrics = {task: metric}
    if task == "average":
        metrics = results.average.metrics if results.average else {}
    tasks = {name: _of_task(results.tasks[name]) for name in metrics}
    merged: Facts = {"metrics": ", ".join(f"{name} {kind}" for name, kind in metrics.items())}
    for name in next(iter(tasks.values()), {}):
        values = {task: facts[name] for task, facts in tasks.items()}
        first, *others = values.values()
        listed = ", ".join(f"{value} ({task})" for task, value in values.items())
        merged[name] = listed if any(other != first for other in others) else first
    return merged


def _of_task(result: TaskRecord) -> Facts:
    names = ("limit", "num_fewshot", "add_bos_token", "version", "lm_eval", "source", "split")
    facts = {name: getattr(result, name) for name in names}
    return {**facts, "data_hash": result.data_hash[:8], "dtype": _dtype(result.dtype)}


def _of_needles(result: NeedlesRecord) -> Facts:
    protocol = result.protocol
    return {
        "haystack": _corpus(protocol.corpus),
        "texts": result.n,
        "length": protocol.length,
        "choices": protocol.choices,
        "hops": protocol.hops,
        "draw": protocol.seed,
        "bound": round(result.bound, 3),
        "data_hash": result.data_hash[:8],
        "dtype": _dtype(result.dtype),
    }


def _of_measure(result: MeasureRecord) -> Facts:
    return {
        **result.protocol.model_dump(exclude={"seed"}),  # of random tokens
        "dtype": _dtype(result.dtype),
        "method": result.memory.method,
        **{name: getattr(result, name) for name in ("device", "threads", "attention")},
    }


def _corpus(identity: Mapping[str, Any]) -> str:
    """Return a corpus in words: its version, and what else decides which text it is."""
    version = identity.get("distribution") or (identity.get("commit") or identity.get("sha256") or "")[:8]
    others = [f"{key} {identity[key]}" for key in TEXT if identity.get(key) not in (None, TEXT[key])]
    told = ", ".join(filter(None, [version, *others]))
    return plain(f"{identity['name']} ({told})" if told else identity["name"])


def _dtype(name: str) -> str:
    return name.removeprefix("torch.")


def pruning(record: RunRecord) -> dict[str, float | None] | None:
    """Return what pruning cost: seconds of its stages, and bytes at the highest peak; None if nothing was pruned.

    A stage that was found counts with what it took when it was computed.
    """
    stages = [stage for stage in record.stages if is_pruning(stage)]
    if all(stage.name != "prune" for stage in stages):
        return None
    peaks = [stage.peak_bytes for stage in stages if stage.peak_bytes is not None]
    return {"seconds": sum(stage.seconds for stage in stages), "peak_bytes": max(peaks, default=None)}


def phrases(of: Facts, leave_out: Collection[str] = ()) -> list[str]:
    """Return facts in words, without those that were not recorded."""
    recorded = {name: value for name, value in of.items() if value is not None or name in WITHOUT}
    return [phrase(name, value) for name, value in recorded.items() if name not in leave_out]


def phrase(name: str, value: Any) -> str:
    """Return one fact in words: "window 128", "all documents"."""
    if value is None:
        return WITHOUT.get(name, f"no {name}")
    if isinstance(value, float):
        value = f"{value:g}"
    elif isinstance(value, str) and name != "join":  # which is shown quoted
        value = plain(value)
    return WORDS.get(name, f"{name} {{}}").format(value)
