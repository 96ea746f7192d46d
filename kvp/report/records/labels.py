"""Names of strategies and recoveries in plots: the name in tables, and the settings that tell runs of it apart.

If the runs of one name differ in one setting, all of them state it (grouping=coupled, grouping=separate). If they
differ in several, as in an ablation, each states where it departs from the most common value. An option that some
runs are older than is stated where it is set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kvp.report.records.keys import identity, label, unpruned, varying
from kvp.report.records.runs import Run


def strategy_labels(runs: Sequence[Run]) -> dict[str, str]:
    """Return labels by the run's hash: "kvpruner", "kvpruner grouping=coupled", "dense + mustafar window=32"."""
    labels = _labels(runs, "strategy", ("strategy", "calibration"), "pruned")
    labels |= {run.hash: "dense" for run in runs if unpruned(run)}
    return {run.hash: " + ".join([labels[run.hash], *_cache(run)]) for run in runs}


def recovery_labels(runs: Sequence[Run]) -> dict[str, str]:
    """Return labels by the run's hash: "none", "lora", "lora rank=16"."""
    return _labels(runs, "recovery", ("recovery",), "recovered")


def _cache(run: Run) -> list[str]:
    """Return the label of the format of the cache, if the run has one."""
    options = run.record.config.get("cache")
    if not options:
        return []
    settings = (f"{key}={label(run, f'cache.{key}')}" for key in options if key != "class")
    return [" ".join([label(run, "cache"), *settings])]


def _labels(runs: Sequence[Run], named: str, nodes: Collection[str], model: str) -> dict[str, str]:
    """Return labels by the run's hash.

    Args:
        runs: The runs of a report.
        named: Key whose value is the name.
        nodes: Nodes of the configuration whose settings a label may state.
        model: The model that the settings decide.
    """
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(label(run, named), []).append(run)
    labels = {}
    for name, alike in by_name.items():
        settings = [identity(run, model) for run in alike]
        usual = _usual(settings, nodes)
        for run, own in zip(alike, settings, strict=True):
            stated = [
                key for key in usual if key in own and (len(usual) == 1 or repr(own[key]) != usual[key])
            ]
            labels[run.hash] = " ".join([name, *(_word(run, key) for key in stated)])
    return labels


def _usual(settings: Sequence[Mapping[str, Any]], nodes: Collection[str]) -> dict[str, str]:
    """Return the settings of these nodes that differ, each with the value that goes without saying.

    It is the most common value; null, if a run is older than the option.
    """
    found = {}
    for key, values in varying(_completed(settings)).items():
        if key.partition(".")[0] in nodes:
            older = any(key not in each for each in settings)
            found[key] = _null_or_most_common(values) if older else values.most_common(1)[0][0]
    return found


def _null_or_most_common(values: Counter[str]) -> str:
    null = repr(None)
    return null if null in values else values.most_common(1)[0][0]


def _completed(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the settings with a null for every option that a run is older than: others of the same class have it."""

    def class_of(each: Mapping[str, Any], key: str) -> Any:
        return each.get(f"{key.rpartition('.')[0]}.class")

    options = dict.fromkeys((class_of(each, key), key) for each in settings for key in each)
    known = [(name, key) for name, key in options if name]
    return [{key: None for name, key in known if class_of(each, key) == name} | {**each} for each in settings]


def _word(run: Run, key: str) -> str:
    """Return the last part of a key, or the node that it makes, and the value: grouping=coupled, calibration=squad."""
    node = key.removesuffix(".class")
    return f"{node.removesuffix('.corpora').rpartition('.')[2]}={label(run, node)}"
