"""The nearest valid word for a mistaken one, as the end of an error message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(given: object, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> str:
    """Return " Did you mean X?" or " Did you mean X or Y?", and nothing if no known word is near."""
    close = difflib.get_close_matches(str(given), list(known), n=most, cutoff=cutoff)
    return f" Did you mean {' or '.join(close)}?" if close else ""
