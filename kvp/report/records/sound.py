"""Soundness of records: parts that the report relies on are there, finite and fit each other.

`kvp.record` checks names and types. A record from a stranger, or of a damaged disk, may still hold numbers that no
run measures. Such a record is refused, and no report is made from the others in its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from kvp.record import WAY_OUT, Denominator, RunRecord
from kvp.results import ModelRecord, ZeroShotRecord

LARGEST = 1e200  # of a number; a larger one overflows when it is averaged or squared
DEEPEST = 40  # nodes of a configuration within each other
MAY_BE_NEGATIVE = ("config", "sensitivity", "ratio", "rest_bytes", "pid")
SHARES = ("acc", "acc_norm", "fraction", "average.value")  # in [0, 1]

Fault = tuple[str, str]  # the field, and what is wrong with it


def require_sound(record: RunRecord, place: str) -> None:
    """Refuse a record that no run has written.

    Raises:
        ValueError: The message names place, field and value.
    """
    for field, fault in _faults(record):
        raise ValueError(f"{place} is damaged, {field} {fault}: {WAY_OUT}")


def _faults(record: RunRecord) -> Iterator[Fault]:
    yield from _values(record.data())
    yield from _configuration(record.config)
    if (asked := record.ratio.asked) is not None:
        for budget in asked.budgets:
            if not 0 <= budget.value <= 1:
                yield "ratio.asked", f"is {budget.value}, not in [0, 1]"
    if record.status == "finished" and "kv_cache" not in (record.ratio.achieved or {}):
        yield "ratio.achieved", "has no kv_cache"
    if record.status == "finished" and record.config["recovery"] and not record.recovered:
        yield "recovered", "is missing beside config.recovery"
    for name, model in record.models().items():
        yield from ((f"{name}.{field}", fault) for field, fault in _model(model))


def _values(node: Any, path: tuple[str, ...] = ()) -> Iterator[Fault]:
    """Find texts that cannot be written, and numbers that are not finite, too large or below zero."""
    field = ".".join(path) or "the record"
    if len(path) > DEEPEST:
        yield field, f"lies deeper than {DEEPEST} nodes"
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _text(key, field)
            yield from _values(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _values(value, (*path, str(i)))
    elif isinstance(node, str):
        yield from _text(node, field)
    elif isinstance(node, int | float) and not isinstance(node, bool):
        if not -LARGEST <= node <= LARGEST or not math.isfinite(node):
            yield field, f"is {node:.3g}, not a finite number" if isinstance(node, float) else "is too large"
        elif node < 0 and not {*path} & {*MAY_BE_NEGATIVE}:
            yield field, f"is {node:g}, below 0"
        elif node > 1 and field.endswith(SHARES) and path[0] != "config":
            yield field, f"is {node:g}, above 1"


def _text(text: str, field: str) -> Iterator[Fault]:
    try:
        text.encode()
    except UnicodeEncodeError:
        yield field, "holds half a character"


def _configuration(config: Mapping[str, Any]) -> Iterator[Fault]:
    """Find nodes that label and group runs and are not there, or not of their kind."""
    seed, ratio = config.get("seed"), config.get("ratio")
    if not isinstance(seed, int) or isinstance(seed, bool):
        yield "config.seed", f"is {seed!r}, not a whole number"
    for node, key in (("model", "name"), ("strategy", "class")):
        value = config.get(node)
        if not isinstance(value, Mapping) or not isinstance(value.get(key), str) or not value[key]:
            yield f"config.{node}.{key}", "is no text"
    for node in ("recovery", "cache"):
        if not isinstance(config.get(node), Mapping | None) or (node == "recovery" and node not in config):
            yield f"config.{node}", "is neither null nor a mapping"
    if not isinstance(ratio, Mapping):
        yield "config.ratio", "is no mapping"
        return
    yield from _budget("config.ratio", ratio)
    yield from _nodes("config", config)


def _nodes(field: str, node: Any) -> Iterator[Fault]:
    """Find budgets and classes anywhere in a configuration that are none."""
    if isinstance(node, Mapping):
        if not isinstance(node.get("class", ""), str):
            yield f"{field}.class", f"is {node['class']!r}, not a text"
        if field.startswith("config.strategy") and {"value", "of"} <= node.keys():
            yield from _budget(field, node)
        for key, value in node.items():
            yield from _nodes(f"{field}.{key}", value)


def _budget(field: str, node: Mapping[str, Any]) -> Iterator[Fault]:
    value, of = node.get("value"), node.get("of")
    if of == "memory":  # a limit
        if isinstance(gib := node.get("gib"), bool) or not isinstance(gib, int | float) or not gib > 0:
            yield f"{field}.gib", f"is {gib!r}, not a number above 0"
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        yield f"{field}.value", f"is {value!r}, not a number in [0, 1]"
    if of not in get_args(Denominator):
        yield f"{field}.of", f"is {of!r}, not one of {', '.join(get_args(Denominator))}"


def _model(model: ModelRecord) -> Iterator[Fault]:
    """Find a model without layers, a perplexity of 0, a text without a name, and tasks without results."""
    if not model.size.layers:
        yield "size.layers", "is empty"
    results = model.evaluation
    named = {
        "perplexity": results.perplexity,
        "zero_shot": results.zero_shot.tasks,
        "needles": results.needles,
    }
    for kind, names in named.items():
        for odd in (name for name in names if "." in name or " - " in name):  # columns write paths with these
            yield f"evaluation.{kind}", f"names {odd!r}, and a name has no dot and no ' - '"
    for corpus, result in results.perplexity.items():
        field, name = f"evaluation.perplexity.{corpus}", result.protocol.corpus.get("name")
        if not result.value:
            yield f"{field}.value", "is 0"
        if not isinstance(name, str):
            yield f"{field}.protocol.corpus.name", f"is {name!r}, not a text"
    yield from _tasks(model.evaluation.zero_shot)


def _tasks(results: ZeroShotRecord) -> Iterator[Fault]:
    average = results.average
    for task in average.tasks if average else ():
        if task not in results.tasks:
            yield "evaluation.zero_shot.average.tasks", f"names {task!r}, which has no result"
    for task, metric in average.metrics.items() if average else ():
        if task not in results.tasks or metric not in results.tasks[task].metrics:
            yield "evaluation.zero_shot.average.metrics", f"names {task!r} {metric!r}, which has no result"
