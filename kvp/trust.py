"""Code that a configuration or a command names: only packages that kvp is, has or was given are imported.

Trusted are kvp, packages of the current directory, installed plugins, and what the user names.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvp.nearest import did_you_mean
from kvp.plugins import installed, owner


def find(key: str, target: str, trusted: Collection[str], say: str = "trusted=[{}]") -> Any:
    """Return the class or function that a dotted name names.

    Args:
        key: What names it, for the error: "strategy._target_".
        target: Such as "mypkg.module.Class".
        trusted: Top-level packages beside kvp, plugins, and those of the current directory.
        say: Words of the command line that trust a package.

    Raises:
        ValueError: Its package is not trusted (and not imported), or there is no such class.
    """
    root = target.partition(".")[0]
    plugins = {plugin.package for plugin in installed() if not plugin.fault}
    if root not in ("kvp", *trusted, *plugins) and not _is_here(root):
        raise ValueError(
            f"{key}={target} names code of {root}, which kvp does not trust: a configuration could run anything. "
            f"If you trust it, say {say.format(root)} on the command line, or keep {root}/ in this directory"
        )
    module_name, _, name = target.rpartition(".")
    try:
        module = import_module(module_name)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(
            f"{key}={target}: {module_name} cannot be imported ({type(error).__name__}: {error}){owner(root)}"
        ) from error
    found = getattr(module, name, None)
    if found is None:
        near = did_you_mean(name, dir(module))
        whose = f".{near}{owner(root).removeprefix('.')}" if near else owner(root)
        raise ValueError(f"{key}={target}: {module_name} has no {name}{whose}")
    if root == "kvp" and not _is_own(found):
        raise ValueError(f"{key}={target} is no class of kvp: name the class of an option")
    if not callable(found):
        raise ValueError(f"{key}={target} is no class, it is {found!r}")
    return found


def _is_here(root: str) -> bool:
    """Tell whether a package or module lies in the current directory itself, and would be imported from there."""
    if root in sys.modules and getattr(sys.modules[root], "__spec__", None) is None:
        return False
    spec = find_spec(root) if root.isidentifier() else None
    if spec is None or not (spec.has_location or spec.submodule_search_locations):  # built in, frozen
        return False
    places = spec.submodule_search_locations or [spec.origin or "/"]  # of a package its folder, else the file
    return Path.cwd().resolve() in [Path(place).resolve().parent for place in places]


def _is_own(found: object) -> bool:
    """Tell whether kvp defines a class; its modules also hold what they import."""
    return isinstance(found, type) and found.__module__.partition(".")[0] == "kvp"
