"""The strategies there are."""

from __future__ import annotations

from importlib import import_module
from inspect import getdoc

from kvp.composing import choices, target_of


def methods() -> dict[str, str]:
    """Return every strategy by name, with the first line of its description.

    A plugin's are among them. `kvp.prune(..., strategy=name)` takes the name.
    """
    found = {}
    for option in choices("strategy"):
        module, _, name = target_of("strategy", option).rpartition(".")
        found[option] = (getdoc(getattr(import_module(module), name)) or "").partition("\n")[0]
    return found
