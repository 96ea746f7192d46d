"""Progress bars of every library: labelled on a terminal, absent from files and pipes.

tqdm draws all of them: kvp's, transformers', datasets' and lm-eval's.
"""

from __future__ import annotations

from functools import wraps
from inspect import signature
from typing import Any

from tqdm.std import tqdm

_label = ""  # of bars that have no name of their own


def label(text: str) -> None:
    """Name the work in progress, for bars that bring no name."""
    global _label
    _label = text


def only_on_terminals() -> None:
    """Draw bars only where stderr is a terminal when they start; one that is switched off stays off.

    A job of a sweep sends its output to a file, so the answer may change while the process lives.
    """
    draw = tqdm.__init__
    if hasattr(draw, "kvp"):
        return
    options = signature(draw)

    @wraps(draw)
    def __init__(*args: Any, **given: Any) -> None:
        bound = options.bind(*args, **given)
        bound.arguments["disable"] = bound.arguments.get("disable") or None  # None: tqdm looks for a terminal
        bound.arguments["desc"] = bound.arguments.get("desc") or _label
        draw(*bound.args, **bound.kwargs)

    __init__.kvp = True  # type: ignore[attr-defined]
    tqdm.__init__ = __init__
