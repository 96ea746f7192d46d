"""A corpus that no file holds: sums in words."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from kvp.data.corpora import Corpus, Part
from kvp.options import options


@options
class Sums(Corpus):
    """Sums of two numbers below `largest`; even first numbers train, odd ones test."""

    node: ClassVar[str] = "corpora.<name>"
    largest: int = Field(default=60, ge=2, description="both numbers are smaller")

    def documents(self, part: Part) -> list[str]:
        """Return a sum per document."""
        start = 0 if part == "train" else 1
        pairs = [(a, b) for a in range(start, self.largest, 2) for b in range(self.largest)]
        return [f"If you add {a} and {b}, you get {a + b}." for a, b in pairs]

    def identity(self, part: Part) -> dict[str, Any]:
        """Return what decides the text."""
        return {"name": "sums", "largest": self.largest, "part": part}

    def check(self, part: Part) -> None:
        """Need nothing."""
