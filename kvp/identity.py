"""Names for classes and chosen options that stay the same when a file moves.

A fingerprint and a run's hash are made of these, never of module paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

TARGET, CLASS = "_target_", "class"


def named(config: Any) -> Any:
    """Return a configuration whose `_target_: kvp.strategies.methods.flap.FLAP` reads `class: FLAP`.

    A class of another package keeps its whole path, so no two classes share a name.
    """
    if isinstance(config, Mapping):
        return {
            CLASS if key == TARGET else key: class_name(value) if key == TARGET else named(value)
            for key, value in config.items()
        }
    return [named(value) for value in config] if isinstance(config, list) else config


def described(value: Any) -> Any:
    """Return an object of options as the configuration that makes it."""
    if is_dataclass(value) and not isinstance(value, type):
        made = {each.name: described(getattr(value, each.name)) for each in fields(value)}
        return {TARGET: f"{type(value).__module__}.{type(value).__qualname__}", **made}
    return list(value) if isinstance(value, tuple) else value


def class_name(target: str) -> str:
    """Return the class of a dotted path; of another package than kvp the whole path, whose names kvp does not know."""
    return target.rpartition(".")[2] if target.startswith("kvp.") else target


def targets(config: Any, at: str = "") -> dict[str, str]:
    """Return the classes and functions that a configuration names: {"strategy.allocator": "mypkg.rules.Halves"}."""
    items: Any = config.items() if isinstance(config, Mapping) else ()
    items = enumerate(config) if isinstance(config, list) else items
    found: dict[str, str] = {}
    for key, value in items:
        found |= {at: value} if key == TARGET else targets(value, f"{at}.{key}".lstrip("."))
    return found


def chosen_options(choices: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """Return which option was chosen for which node: {"strategy": "flap", "strategy.allocator": "threshold"}.

    Args:
        choices: Hydra's `runtime.choices`: option by group, such as "strategy/allocator" or "strategy@strategy.first".
        config: The configuration; groups that make none of its nodes (experiment, debug) are left out.
    """
    by_node = {group.rpartition("@")[2].replace("/", "."): option for group, option in choices.items()}
    return {node: str(option) for node, option in sorted(by_node.items()) if node.partition(".")[0] in config}
