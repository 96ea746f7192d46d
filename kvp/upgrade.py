"""Records of old schemas, brought up to date.

Schema 1 has finished runs only, without a status and without overrides. Schemas 1 and 2 name classes by module path
and do not say which options were chosen. Schemas 1 to 3 know only the command that wrote the record: its code and
machine stand for the stages that it computed, and those that it found have no known origin.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kvp.identity import named

SCHEMA = 4  # of run.json; raised when a key changes its meaning
ORIGIN = ("kvp", "commit", "dirty", "versions", "python", "platform", "device", "threads", "dtype", "command")


def upgraded(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a record as this kvp writes it.

    The chosen options are guessed from the classes, so `kvpruner_stock` reads as its parent, `kvpruner`.
    """
    if record["schema"] == SCHEMA:
        return record
    config, record = record["config"], {**record, **_with_origin(record)}
    if record["schema"] == 3 or not isinstance(config, Mapping) or not _names_classes(config):
        return {**record, "schema": SCHEMA}  # what is no configuration, readers of the record refuse
    choices, config = dict(_guessed_options(config)), named(config)
    return {"status": "finished", **record, "schema": SCHEMA, "config": config, "choices": choices}


def _with_origin(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return provenance and stages with the command's origin; nothing where they are damaged."""
    old, stages = record.get("provenance"), record.get("stages")
    if not isinstance(old, Mapping) or not isinstance(stages, list):
        return {}
    if not all(isinstance(stage, Mapping) for stage in stages):
        return {}
    origin = {name: old[name] for name in ORIGIN if name in old}
    stages = [{**stage, "origins": [] if stage.get("found") else [0]} for stage in stages]
    kept = {name: value for name, value in old.items() if name not in ORIGIN or name in ("dtype", "command")}
    return {"provenance": {**kept, "origins": [origin]}, "stages": stages}


def _names_classes(config: Mapping[str, Any]) -> bool:
    """Whether every `_target_` of a configuration is a text."""
    nodes = [value for value in config.values() if isinstance(value, Mapping)]
    return isinstance(config.get("_target_", ""), str) and all(map(_names_classes, nodes))


def _guessed_options(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, node in config.items():
        if isinstance(node, Mapping):
            if "_target_" in node:
                yield prefix + name, _option(node["_target_"])
            yield from _guessed_options(node, f"{prefix}{name}.")


def _option(target: str) -> str:
    """Return a guess at what conf/ called a class: its module if that is named like it (llm_pruner), else the class.

    Options of one class share the guess: `kvpruner_stock` reads as `kvpruner`, `lora_text` as `lora`.
    """
    module, name = ("", *target.split("."))[-2:]
    alike = module.replace("_", "") == name.lower() or name == "NoPruning"
    return module if alike else re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()
