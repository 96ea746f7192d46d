"""Keys of a run's configuration: what names a row, what filters runs, and what makes two runs different.

A key is a dotted path: "strategy", "ratio.value", "recovery.max_steps". A seed is no difference; neither
are the protocols of evaluation and measurement, which `compare` looks after.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kvp.report.records.runs import Run
from kvp.report.table.table import MISSING

PRUNING = ("strategy", "ratio", "calibration")  # of no effect where nothing is pruned
PROTOCOL = ("evaluation", "measure", "device", "dtype")

Order = tuple[int, str, float]


def unpruned(run: Run) -> bool:
    """Whether no weight is pruned: the dense baseline, the dense control of a recovery, or a sparse cache alone."""
    return run.record.config["strategy"]["class"] == "NoPruning"


def untouched(run: Run) -> bool:
    """Whether the pruned model is the dense one, its cache too."""
    return unpruned(run) and not run.record.config.get("cache")


def recovers(run: Run) -> bool:
    """Whether the model is tuned."""
    return run.record.config["recovery"] is not None


def label(run: Run, key: str) -> str:
    """What a reader calls the value of a key; a dash where it has no effect."""
    if _idle(run, key):
        return MISSING
    value = find(run, key)
    return f"{100 * value:.4g} %" if key == "ratio.value" else _label(run, key, value)


def order(run: Run, key: str) -> Order:
    """Sorts rows by a key: dashes, then numbers, then words."""
    value = MISSING if _idle(run, key) else find(run, key)
    if value is None or value == MISSING:
        return (0, "", 0)
    if isinstance(value, int | float):
        return (1, "", value)
    if isinstance(value, Mapping) and {"value", "of"} <= value.keys():
        return (2, value["of"], value["value"])
    return (2, _label(run, key, value), 0)


def find(run: Run, key: str) -> Any:
    """The value of a key, a dash if the run's configuration has no such key."""
    value: Any = run.record.config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value


def check_key(runs: Sequence[Run], key: str, place: str) -> None:
    """Refuse a key that no run has; `place` says who asked for it."""
    if any(find(run, key) != MISSING for run in runs) or not runs:
        return
    known = sorted({known for run in runs for known in _paths(run.record.config)})
    raise ValueError(f"{place}: no run has the key {key!r} in its config{near(key, known)}")


def near(name: str, known: Sequence[str]) -> str:
    """A hint at similar names."""
    tail = [other for other in known if other.endswith(f".{name}")]
    close = list(dict.fromkeys([*tail, *difflib.get_close_matches(name, known, n=4, cutoff=0.5)]))[:4]
    return f"; near it: {', '.join(close or known[:12])}"


def where(runs: Sequence[Run], filters: Iterable[str]) -> list[Run]:
    """The runs that pass every filter, "key=value" or "key=value,value"; values as tables label them.

    A filter on pruning (ratio.value=0.25) keeps the runs that prune nothing: they are the controls.

    Raises:
        ValueError: A filter has no "=", its key is unknown, or nothing passes.
    """
    left = list(runs)
    for text in filters:
        key, equals, values = text.partition("=")
        if not equals:
            raise ValueError(
                f"--where {text}: write key=value, such as strategy=kvpruner or ratio.value=0.25"
            )
        check_key(runs, key, f"--where {text}")
        there = sorted({label(run, key) for run in left} - {MISSING})
        left = [run for run in left if matches(run, key, values.split(","))]
        if not left:
            raise ValueError(f"--where {text}: no run is left; {key} is {', '.join(there)}")
    return left


def matches(run: Run, key: str, values: Sequence[str]) -> bool:
    """Whether a run has one of these values, or the key has no effect on it."""
    return _idle(run, key) or not {label(run, key), _label(run, key, find(run, key))}.isdisjoint(values)


def differences(runs: Sequence[Run], model: str) -> dict[str, int]:
    """The keys, other than seeds, that decide a model's numbers and differ: how many values each has."""
    settings = [identity(run, model) for run in runs]
    keys = {key for its in settings for key in its if key.rpartition(".")[2] != "seed"}
    counts = {
        key: len({repr(its.get(key)) for its in settings if key in its or not key.startswith("corpora.")})
        for key in sorted(keys)
    }
    return {key: count for key, count in counts.items() if count > 1}


def identity(run: Run, model: str) -> dict[str, Any]:
    """The settings, seeds included, that decide the numbers of one of a run's models."""
    config = run.record.config
    without = {*PROTOCOL}
    if model == "pruned":
        without.add("recovery")
    if unpruned(run):
        without |= {*PRUNING} | ({"seed"} if model == "pruned" else set())
    nodes = {"model": config["model"]} if model == "dense" else config
    readers = ("calibration", "recovery.data") if model == "recovered" else ("calibration",)
    read = {name for reader in readers if not _idle(run, reader) for name in _corpora(run, reader)}
    return {
        key: value
        for key, value in _leaves(nodes)
        if key.partition(".")[0] not in without
        and (not key.startswith("corpora.") or key.split(".")[1] in read)
    }


def _corpora(run: Run, node: str) -> Sequence[str]:
    names = find(run, f"{node}.corpora")
    return names if isinstance(names, list) else ()


def _idle(run: Run, key: str) -> bool:
    return unpruned(run) and key.partition(".")[0] in PRUNING and key != "strategy"


def _label(run: Run, key: str, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        if {"value", "of"} <= value.keys():
            return f"{100 * value['value']:.4g} % of {value['of']}"
        return str(value.get("name") or run.record.choices.get(key) or value.get("class", "?"))
    if isinstance(value, list):
        return "+".join(_label(run, key, item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _paths(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
