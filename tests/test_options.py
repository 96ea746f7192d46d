"""An option out of bounds is refused with its name, bound, value and meaning; several at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, asdict, replace
from typing import ClassVar, Literal

import pytest
from pydantic import Field

from kvp.options import options


class Unchecked:
    pass


@options
class Base(ABC):
    node: ClassVar[str] = "ratio"
    value: float = Field(ge=0, lt=1, description="it is the fraction removed")
    of: Literal["a", "b"] = "a"
    tolerance: float | None = Field(default=None, gt=0)
    steps: int = Field(default=3, ge=1)
    other: Unchecked | None = None
    names: Sequence[str] = ("x",)

    @abstractmethod
    def work(self) -> int: ...


@options
class Leaf(Base):
    fast: bool = False

    def __post_init__(self) -> None:
        if self.fast and self.steps > 5:
            raise ValueError(f"ratio.steps must be <= 5 with ratio.fast=true, got {self.steps}")

    def work(self) -> int:
        return self.steps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"value": 1.5}, "ratio.value must be in [0, 1), got 1.5: it is the fraction removed"),
        ({"value": "x"}, "ratio.value must be a number, got 'x': it is the fraction removed"),
        ({"value": 0, "of": "c"}, "ratio.of must be one of a, b, got 'c'"),
        ({"value": 0, "tolerance": -1}, "ratio.tolerance must be > 0 or null, got -1"),
        ({"value": 0, "steps": 0}, "ratio.steps must be >= 1, got 0"),
        ({"value": 0, "steps": 2.5}, "ratio.steps must be a whole number, got 2.5"),
        ({"value": 0, "steps": 9, "fast": True}, "ratio.steps must be <= 5 with ratio.fast=true, got 9"),
        ({"value": 0, "other": "x"}, "ratio.other must be a Unchecked or null, got 'x'"),
        ({"value": 0, "nmaes": []}, "ratio has no option 'nmaes'; Leaf has value, of, tolerance"),
        ({}, "ratio.value is not set: Leaf needs it: it is the fraction removed"),
        ({"value": 1, "steps": 0}, "got 1: it is the fraction removed; ratio.steps must be >= 1"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        Leaf(**given)
    assert type(refusal.value) is ValueError
    assert message in str(refusal.value)


def test_it_is_a_frozen_dataclass_that_checks_replacements_too():
    leaf = Leaf(value=0.5, names=["y"])
    assert asdict(leaf)["names"] == ["y"]
    assert replace(leaf, steps=4).work() == 4
    assert leaf == replace(leaf)
    with pytest.raises(FrozenInstanceError):
        leaf.steps = 4
    with pytest.raises(ValueError, match="steps must be >= 1"):
        replace(leaf, steps=0)
    with pytest.raises(TypeError):
        Base(value=0)  # abstract
