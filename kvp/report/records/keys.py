"""Keys of a run's configuration: they name rows, filter runs, and say what makes two runs different.

A key is a dotted path: "strategy", "ratio.value", "recovery.max_steps". A seed makes no difference. Neither do the
protocols of evaluation and measurement, which `facts` compares.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from kvp.report.records.runs import Run
from kvp.tables import plain

MISSING = "—"  # in place of a value that is not there or has no effect
PRUNING = ("strategy", "ratio", "calibration")  # of no effect where nothing is pruned
PROTOCOL = ("evaluation", "measure", "device", "dtype")

Order = tuple[int, str, float]


def unpruned(run: Run) -> bool:
    """Whether no weight is pruned: the dense baseline, the dense control of a recovery, or a packed cache alone."""
    return run.record.config["strategy"]["class"] == "NoPruning"


def untouched(run: Run) -> bool:
    """Whether the pruned model is the dense one, and its cache is dense too."""
    return unpruned(run) and not run.record.config.get("cache")


def recovers(run: Run) -> bool:
    """Whether the model is tuned."""
    return run.record.config["recovery"] is not None


def label(run: Run, key: str) -> str:
    """Return what a reader calls the value of a key; a dash where the key has no effect."""
    if _idle(run, key):
        return MISSING
    value = find(run, key)
    is_share = key == "ratio.value" and isinstance(value, int | float)
    return f"{100 * value:.4g} %" if is_share else _label(run, key, value)


def order(run: Run, key: str) -> Order:
    """Return what sorts rows by a key: dashes, then numbers, then words."""
    value = MISSING if _idle(run, key) else find(run, key)
    if value is None or value == MISSING:
        return (0, "", 0)
    if isinstance(value, int | float):
        return (1, "", value)
    if _is_budget(value):
        return (2, value["of"], value["value"])
    return (2, _label(run, key, value), 0)


def find(run: Run, key: str) -> Any:
    """Return the value of a key, a dash if the run's configuration has no such key."""
    value: Any = run.record.config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value


def check_key(runs: Sequence[Run], key: str, place: str) -> None:
    """Refuse a key that no run has.

    Args:
        runs: Runs; none accept every key.
        key: The key.
        place: Who asks for it, for the message.

    Raises:
        ValueError: No run has the key; the message names keys near it.
    """
    if any(find(run, key) != MISSING for run in runs) or not runs:
        return
    known = sorted({known for run in runs for known in _paths(run.record.config)})
    raise ValueError(f"{place}: no run has the key {key!r} in its config{near(key, known)}")


def near(name: str, known: Sequence[str]) -> str:
    """Return a hint at names like an unknown one: "; near it: a, b"."""
    tail = [other for other in known if other.endswith(f".{name}")]
    close = list(dict.fromkeys([*tail, *difflib.get_close_matches(name, known, n=4, cutoff=0.5)]))[:4]
    return f"; near it: {', '.join(close or known[:12])}"


def where(runs: Sequence[Run], filters: Iterable[str]) -> list[Run]:
    """Return the runs that pass every filter, "key=value" or "key=value,value"; values as tables label them.

    A filter on pruning (ratio.value=0.25) keeps the runs that prune nothing: they are the controls.

    Raises:
        ValueError: A filter has no "=", no run has its key, or no run passes.
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


def identity(run: Run, model: str) -> dict[str, Any]:
    """Return the settings, seeds included, that decide the numbers of one of a run's models: value by key."""
    config = run.record.config
    if model == "dense":
        return dict(_leaves({"model": config["model"]}))
    idle = {*PROTOCOL, "widths"}  # which the options of strategies hold already
    if unpruned(run):
        idle |= {*PRUNING}
    if model == "pruned":
        idle |= {"recovery", "seed"} if unpruned(run) else {"recovery"}
    read = _corpora_read(run, model)

    def decides(key: str) -> bool:
        node, _, rest = key.partition(".")
        return rest.partition(".")[0] in read if node == "corpora" else node not in idle

    return {key: value for key, value in _leaves(config) if decides(key)}


def seeds(run: Run, model: str) -> tuple[int, ...]:
    """Return the seeds that decide the numbers of one of a run's models."""
    return tuple(value for key, value in identity(run, model).items() if key.rpartition(".")[2] == "seed")


def varying(settings: Sequence[Mapping[str, Any]]) -> dict[str, Counter[str]]:
    """Return the keys, seeds left out, that have several values, and how often each value stands there.

    A setting without the key has no value of it.
    """
    keys = dict.fromkeys(key for each in settings for key in each if key.rpartition(".")[2] != "seed")
    values = {key: Counter(repr(each[key]) for each in settings if key in each) for key in keys}
    return {key: counts for key, counts in values.items() if len(counts) > 1}


def differences(runs: Sequence[Run], model: str) -> dict[str, int]:
    """Return the keys that decide a model's numbers and differ between runs: how many values each has.

    A key that a run lacks counts as null there; a corpus that it does not read counts as any.
    """
    settings = [identity(run, model) for run in runs]
    nulls = {key: None for each in settings for key in each if not key.startswith("corpora.")}
    return {key: len(values) for key, values in varying([nulls | each for each in settings]).items()}


def _corpora_read(run: Run, model: str) -> set[str]:
    """Return the names of the corpora that calibration and, for a recovered model, recovery read."""
    readers = ("calibration", "recovery.data") if model == "recovered" else ("calibration",)
    found = [find(run, f"{reader}.corpora") for reader in readers if not _idle(run, reader)]
    return {name for names in found if isinstance(names, list) for name in names}


def _idle(run: Run, key: str) -> bool:
    """Whether a key has no effect on a run; `strategy` itself says that nothing is pruned."""
    return unpruned(run) and key.partition(".")[0] in PRUNING and key != "strategy"


def _is_budget(value: Any) -> TypeGuard[Mapping[str, Any]]:
    if not isinstance(value, Mapping) or not isinstance(value.get("of"), str):
        return False
    return isinstance(value.get("value"), int | float)


def _label(run: Run, key: str, value: Any) -> str:
    if value is None:
        return "none"
    if _is_budget(value):
        return f"{100 * value['value']:.4g} % of {value['of']}"
    if isinstance(value, Mapping):
        return plain(str(value.get("name") or run.record.choices.get(key) or value.get("class", "?")))
    if isinstance(value, list):
        return plain("+".join(_label(run, key, item) for item in value))
    return f"{value:g}" if isinstance(value, float) else plain(str(value))


def _paths(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys of all nodes and leaves of a configuration."""
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a configuration with their keys."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
