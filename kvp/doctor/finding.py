"""A finding of the doctor: a thing, its state, and the way out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "BROKEN"]
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        about: The part of the report, such as "packages".
        name: What was looked at.
        state: "BROKEN" for what every run needs; "missing" for what only some need.
        value: What was found.
        fix: What it is for and how to get it; empty if nothing is to be done.
    """

    about: str
    name: str
    state: State
    value: str
    fix: str = ""


def either(about: str, name: str, there: bool, value: str, fix: str) -> Finding:
    """Return that something is installed, or that it is missing and how to get it."""
    return Finding(about, name, "ok" if there else "missing", value, "" if there else fix)
