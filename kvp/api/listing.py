"""The strategies there are."""

from __future__ import annotations

from inspect import getdoc

from kvp.choices import choices
from kvp.composing import target_of
from kvp.trust import find


def methods() -> dict[str, str]:
    """Return every strategy by name, with the first line of its description.

    A plugin's are among them. `kvp.prune(..., strategy=name)` takes the name.
    """
    found = {}
    for option in choices("strategy"):
        try:
            method = find(f"strategy={option}", target_of("strategy", option), ())
            found[option] = (getdoc(method) or "").partition("\n")[0]
        except ValueError as error:  # of a plugin that is broken
            found[option] = str(error)
    return found
