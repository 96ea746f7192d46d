"""Options as the YAML files of conf/ and the classes behind them document them: name, default, bounds, meaning."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt
from yaml.nodes import MappingNode, Node

from kvp.options import bounds
from kvp.tables import markdown

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
KEYS = ("defaults", "_target_", "hydra")  # of a YAML file; no options
ATTRIBUTE = re.compile(r"^(\w+): (.*(?:\n(?: .*)?)*)", re.MULTILINE)


@dataclass(frozen=True)
class Setting:
    """One option: dotted name, default as written, what it may be, what it is for."""

    name: str
    default: str
    values: str
    meaning: str


def head(path: Path) -> tuple[str, list[str]]:
    """Return the text of the comment at the head of a YAML file, and the commands in it."""
    lines = [line[1:] for line in path.read_text().split("\n\n")[0].splitlines() if line.startswith("#")]
    commands = [re.sub(r" {2,}\(.*", "", line).strip() for line in lines if line.startswith("   ")]
    text = " ".join(line.strip() for line in lines if not line.startswith(("   ", " @package")))
    return text, commands


def defaults(path: Path) -> dict[str, str]:
    """Return the option that a YAML file chooses for each group it names; a file it goes on from has no group."""
    chosen: dict[str, str] = {}
    for entry in (yaml.safe_load(path.read_text()) or {}).get("defaults", []):
        if isinstance(entry, dict):
            ((group, name),) = entry.items()
            chosen[str(group).removeprefix("override ").rpartition("@")[2]] = str(name)
        elif entry != "_self_":
            chosen[""] = entry
    return chosen


def target(path: Path) -> type | None:
    """Return the class that an option makes, its own or that of the file it goes on from."""
    named = (yaml.safe_load(path.read_text()) or {}).get("_target_")
    if named is None:
        base = defaults(path).get("")
        return target(path.with_name(f"{base}.yaml")) if base else None
    return load(named)


def load(named: str) -> type:
    """Return the class of a dotted name."""
    module, _, name = named.rpartition(".")
    made: type = getattr(import_module(module), name)
    return made


def settings(path: Path) -> list[Setting]:
    """Return the options that a YAML file sets, in its order. A comment beside a value is its meaning."""
    text = path.read_text()
    node, lines = yaml.compose(text, Loader=yaml.SafeLoader), text.splitlines()
    if not isinstance(node, MappingNode):
        return []
    found = []
    for name, value, cls in leaves(node, target(path)):
        comment = re.search(r"#\s*(.*)", lines[value.end_mark.line][value.end_mark.column :])
        values, meaning = documented(cls, name.rpartition(".")[2]) if cls else ("", "")
        default = " ".join(text[value.start_mark.index : value.end_mark.index].split())
        found.append(Setting(name, default, values, meaning or (comment[1] if comment else "")))
    return found


def leaves(node: MappingNode, cls: type | None, above: str = "") -> Iterator[tuple[str, Node, type | None]]:
    """Yield the dotted name and the node of every value of a mapping, and the class that takes it."""
    for key, value in node.value:
        if key.value in KEYS:
            continue
        if isinstance(value, MappingNode) and value.value and not value.flow_style:
            within = next(
                (load(inner.value) for name, inner in value.value if name.value == "_target_"), None
            )
            yield from leaves(value, within, f"{above}{key.value}.")
        else:
            yield f"{above}{key.value}", value, cls


def documented(cls: type, name: str) -> tuple[str, str]:
    """Return what an option of a class may be and what it is for; empty for names that the class has not."""
    fields = getattr(cls, "__pydantic_fields__", {})
    if name not in fields:
        return "", ""
    meaning = next((found[name] for base in cls.__mro__ if name in (found := attributes(base))), "")
    meaning = meaning or fields[name].description or ""
    return allowed(hints(cls)[name], fields[name].metadata), re.sub(r"\bNone\b", "null", meaning)


@cache
def hints(cls: type) -> dict[str, Any]:
    """Return the types of the fields of a class."""
    return get_type_hints(cls)


@cache
def attributes(cls: type) -> dict[str, str]:
    """Return the meaning of each field that the docstring of a class lists under "Attributes"."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    block = re.search(r"^Attributes:\n((?: .*\n?|\n)*)", doc, re.MULTILINE)
    entries = ATTRIBUTE.findall(textwrap.dedent(block[1])) if block else []
    return {name: " ".join(text.split()) for name, text in entries}


def allowed(kind: Any, metadata: Sequence[Any]) -> str:
    """Return what a field may be: its choices, its bounds, or its type."""
    parts = [part for part in get_args(kind) if part is not type(None)]
    null = " or null" if type(None) in get_args(kind) else ""
    if null and len(parts) == 1:
        return allowed(parts[0], metadata) + null
    if get_origin(kind) is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if any(isinstance(bound, Ge | Gt | Le | Lt) for bound in metadata):
        return f"{bounds(metadata)}{null}"
    return {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}.get(kind, "")


def rows(found: Sequence[Setting], above: str = "") -> list[list[str]]:
    """Return the cells of a table of options."""
    return [[f"`{above}{s.name}`", f"`{s.default}`", s.values, escaped(s.meaning)] for s in found]


def escaped(text: str) -> str:
    """Return plain text as Markdown that shows it; what stands in backticks is code already."""
    return re.sub(r"(`[^`]*`)|([_*])", lambda match: match[1] or f"\\{match[2]}", text)


def table(found: Sequence[Setting], above: str = "") -> str:
    """Return a table of options, with what stands above their names."""
    return markdown(["option", "default", "values", "meaning"], rows(found, above), labels=4)
