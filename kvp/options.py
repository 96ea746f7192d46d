"""Options: frozen dataclasses whose fields pydantic checks, with errors that a user can act on.

    @options
    class Budget:
        node: ClassVar[str] = "ratio"
        value: float = Field(ge=0, lt=1, description="it is the fraction removed")

    Budget(value=1.5)  # ValueError: ratio.value must be in [0, 1), got 1.5: it is the fraction removed

An error names the option, its bound, the value, and the field's description. A check that depends on several fields is
a `__post_init__` that raises ValueError in the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from functools import wraps
from typing import Any, TypeVar, dataclass_transform, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

T = TypeVar("T")

CONFIG = ConfigDict(arbitrary_types_allowed=True, extra="forbid", validate_default=False, allow_inf_nan=False)
KINDS = {  # by the first word of pydantic's error type
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "dict": "a mapping",
    "mapping": "a mapping",
    "sequence": "a list",
    "list": "a list",
}


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field, field))
def options(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass that refuses a field out of bounds.

    The class attribute `node` is the option group that errors name ("ratio", "strategy"); subclasses inherit it.

    Raises:
        ValueError: On construction, for every field at once.
    """
    made = dataclass(cls, frozen=True, kw_only=True, config=CONFIG)
    construct: Callable[..., None] = made.__init__

    @wraps(construct)
    def __init__(self: Any, **given: Any) -> None:
        try:
            construct(self, **given)
        except ValidationError as error:
            raise ValueError("; ".join(worded(made, each) for each in error.errors())) from None

    made.__init__ = __init__  # type: ignore[method-assign]
    return made  # type: ignore[return-value]


def worded(cls: Any, error: Mapping[str, Any]) -> str:
    """Return one error of pydantic in the words of the option: name, bound, value, meaning."""
    if error["type"] == "value_error":  # raised by a __post_init__, which words it itself
        return str(error["ctx"]["error"])
    fields: dict[str, FieldInfo] = cls.__pydantic_fields__
    name, *inner = error["loc"] or ("",)
    option = ".".join(map(str, (cls.node, name, *(at for at in inner if isinstance(at, int)))))
    if error["type"] == "unexpected_keyword_argument":
        return f"{cls.node} has no option {name!r}; {cls.__name__} has {', '.join(fields) or 'none'}"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{option} is not set: {cls.__name__} needs it{_meaning(fields[name])}"
    return f"{option} must be {_bound(fields[name], error)}, got {error['input']!r}{_meaning(fields[name])}"


def _bound(info: FieldInfo, error: Mapping[str, Any]) -> str:
    """Return what a field may be: "in [0, 1)", ">= 1 or null", "one of a, b"."""
    null = " or null" if type(None) in get_args(info.annotation) else ""
    if error["type"] == "literal_error":
        return f"one of {_listed(error['ctx']['expected'])}{null}"
    if error["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return f"{bounds(info.metadata)}{null}"
    if error["type"] == "too_short":
        return f"a list of at least {error['ctx']['min_length']}{null}"
    kind = error["type"].partition("_")[0]
    if kind in KINDS:
        return f"{KINDS[kind]}{null}"
    if error["type"] in ("is_instance_of", "dataclass_type", "dataclass_exact_type"):
        name = error["ctx"].get("class") or error["ctx"].get("class_name")
        return f"{'a list' if name == 'Sequence' else f'a {name}'}{null}"
    return f"valid ({error['msg'][0].lower()}{error['msg'][1:]}){null}"


def bounds(metadata: Sequence[Any]) -> str:
    """Return the bounds of a field as "in [0, 1)", "> 0" or "<= 3"."""
    low = next((bound for bound in metadata if isinstance(bound, Ge | Gt)), None)
    high = next((bound for bound in metadata if isinstance(bound, Le | Lt)), None)
    if low and high:
        left = f"[{low.ge:g}" if isinstance(low, Ge) else f"({low.gt:g}"
        return f"in {left}, {high.le:g}]" if isinstance(high, Le) else f"in {left}, {high.lt:g})"
    if low:
        return f">= {low.ge:g}" if isinstance(low, Ge) else f"> {low.gt:g}"
    assert high
    return f"<= {high.le:g}" if isinstance(high, Le) else f"< {high.lt:g}"


def _listed(expected: str) -> str:
    """Return "'a', 'b' or 'c'" as "a, b, c"."""
    return expected.replace(" or ", ", ").replace("'", "")


def _meaning(info: FieldInfo) -> str:
    return f": {info.description}" if info.description else ""
