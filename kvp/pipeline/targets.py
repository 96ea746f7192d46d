"""Classes that a configuration names by `_target_`: only code that kvp has or the user trusts is imported.

A `_target_` is code. `trusted=[mypkg]` on the command line names further packages. Packages that lie in the current
directory are the user's own and need no such word.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvp.identity import TARGET


def check_targets(config: Any, trusted: Collection[str]) -> None:
    """Refuse a class of a package that is not trusted, and a name that is no class, before anything is made of it.

    Args:
        config: The resolved configuration.
        trusted: Top-level packages beside kvp and those of the current directory.

    Raises:
        ValueError: The message names the key, the class and the way out.
    """
    for key, target in _named(config, ""):
        if not isinstance(target, str) or "." not in target.strip("."):
            raise ValueError(f"{key} must be a class such as mypkg.module.Class, got {target!r}")
        root = target.partition(".")[0]
        if root not in ("kvp", *trusted) and not _is_here(root):
            raise ValueError(
                f"{key}={target} names code of {root}, which kvp does not trust: a configuration could run anything. "
                f"If you trust it, say trusted=[{root}] on the command line, or keep {root}/ in this directory"
            )
        _check_class(key, target)


def check_trusted(trusted: Any, overrides: Collection[str] | None) -> list[str]:
    """Return the packages that the user trusts; a file may not say so of itself.

    Args:
        trusted: The option.
        overrides: The words of the command line; None: composed in Python, by the user's own code.

    Raises:
        ValueError: It is no list of packages, or not from the command line.
    """
    if not isinstance(trusted, list) or not all(
        isinstance(name, str) and name.isidentifier() for name in trusted
    ):
        raise ValueError(f"trusted must be a list of top-level packages such as [mypkg], got {trusted!r}")
    if trusted and overrides is not None and not any(word.startswith("trusted=") for word in overrides):
        raise ValueError(
            f"trusted={trusted} stands in a file, and a file may not trust itself: say it on the command line"
        )
    return trusted


def _named(config: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield every `_target_` with its dotted key."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key == TARGET:
                yield f"{where}{key}", value
            else:
                yield from _named(value, f"{where}{key}.")
    elif isinstance(config, list):
        for number, value in enumerate(config):
            yield from _named(value, f"{where}{number}.")


def _is_here(root: str) -> bool:
    """Tell whether a package or module lies in the current directory itself, and would be imported from there."""
    if root in sys.modules and getattr(sys.modules[root], "__spec__", None) is None:
        return False
    spec = find_spec(root) if root.isidentifier() else None
    if spec is None or not (spec.has_location or spec.submodule_search_locations):  # built in, frozen
        return False
    places = spec.submodule_search_locations or [spec.origin or "/"]  # of a package its folder, else the file
    return Path.cwd().resolve() in [Path(place).resolve().parent for place in places]


def _check_class(key: str, target: str) -> None:
    """Refuse what is not there, and what a module of kvp has only imported from elsewhere."""
    module_name, _, name = target.rpartition(".")
    try:
        module = import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"{key}={target}: {module_name} cannot be imported ({error})") from error
    found = getattr(module, name, None)
    if found is None:
        close = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {module_name}.{close[0]}?" if close else ""
        raise ValueError(f"{key}={target}: {module_name} has no {name}{hint}")
    if module_name.partition(".")[0] == "kvp" and not _is_own(found):
        raise ValueError(f"{key}={target} is no class of kvp: name the class of an option")
    if not callable(found):
        raise ValueError(f"{key}={target} is no class, it is {found!r}")


def _is_own(found: object) -> bool:
    """Tell whether kvp defines a class; its modules also hold what they import."""
    return isinstance(found, type) and found.__module__.partition(".")[0] == "kvp"
