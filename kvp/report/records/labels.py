"""What a plot calls a strategy or a recovery: its name in tables, and the settings that tell it from the others.

If the runs of one name differ in one setting, all of them state it (grouping=coupled, grouping=separate). If they
differ in several, as in an ablation, each states where it departs from the most common value; an option that some
runs are older than is stated where it is set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kvp.report.records.keys import identity, label
from kvp.report.records.runs import Run


def strategy_labels(runs: Sequence[Run]) -> dict[str, str]:
    """By the run's hash: "kvpruner", "kvpruner grouping=coupled", "kvpruner + mustafar window=32 ..."."""
    labels = _labels(runs, "strategy", ("strategy", "calibration"), "pruned")
    return {run.hash: " + ".join([labels[run.hash], *_cache(run)]) for run in runs}


def recovery_labels(runs: Sequence[Run]) -> dict[str, str]:
    """By the run's hash: "none", "lora", "lora rank=16"."""
    return _labels(runs, "recovery", ("recovery",), "recovered")


def _cache(run: Run) -> list[str]:
    """The sparse cache, if there is one."""
    options = run.record.config.get("cache")
    if not options:
        return []
    settings = (f"{key}={value:g}" for key, value in options.items() if key != "class")
    return [" ".join([label(run, "cache"), *settings])]


def _labels(runs: Sequence[Run], named: str, described: Sequence[str], model: str) -> dict[str, str]:
    names = {run.hash: label(run, named) for run in runs}
    settings = {run.hash: identity(run, model) for run in runs}
    labels = {}
    for run in runs:
        alike = [settings[other.hash] for other in runs if names[other.hash] == names[run.hash]]
        completed = _completed(alike)
        usual = {
            key: _usual(values, any(key not in its for its in alike))
            for key in dict.fromkeys(key for its in completed for key in its)
            if key.partition(".")[0] in described and not key.endswith(".seed")
            if len(values := Counter(repr(its[key]) for its in completed if key in its)) > 1
        }
        its = settings[run.hash]
        stated = [key for key in usual if key in its and (len(usual) == 1 or repr(its[key]) != usual[key])]
        labels[run.hash] = " ".join([names[run.hash], *(_word(run, key) for key in stated)])
    return labels


def _usual(values: Counter[str], lacking: bool) -> str:
    """What is not stated: null, if a run is older than the option, else the most common value."""
    none = repr(None)
    return none if lacking and none in values else values.most_common(1)[0][0]


def _completed(alike: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings with a null for every option that others of the same node have: these runs are older than it."""

    def node(its: Mapping[str, Any], key: str) -> Any:
        return its.get(f"{key.rpartition('.')[0]}.class")

    options = {(node(its, key), key): None for its in alike for key in its if node(its, key)}
    return [{key: None for target, key in options if node(its, key) == target} | dict(its) for its in alike]


def _word(run: Run, key: str) -> str:
    """The last part of a key, or the node that it makes, and its value: grouping=coupled, calibration=squad."""
    node = key.removesuffix(".class")
    return f"{node.removesuffix('.corpora').rpartition('.')[2]}={label(run, node)}"
