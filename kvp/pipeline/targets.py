"""Classes that a configuration names by `_target_`: only code that kvp has or the user trusts is imported.

A `_target_` is code. `trusted=[mypkg]` on the command line names further packages. Packages that lie in the current
directory are the user's own, installed plugins were installed by the user: both need no such word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from kvp.identity import TARGET
from kvp.trust import find


def check_targets(config: Any, trusted: Collection[str]) -> None:
    """Refuse a class of a package that is not trusted, and a name that is no class, before anything is made of it.

    Args:
        config: The resolved configuration.
        trusted: Top-level packages beside kvp, plugins, and those of the current directory.

    Raises:
        ValueError: The message names the key, the class and the way out.
    """
    for key, target in _named(config, ""):
        if not isinstance(target, str) or "." not in target.strip("."):
            raise ValueError(f"{key} must be a class such as mypkg.module.Class, got {target!r}")
        find(key, target, trusted)


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
