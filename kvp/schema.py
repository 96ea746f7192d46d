"""`python -m kvp.schema`: the page and the JSON schema of run.json, made from its type, in docs/reference."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvp.record import RunRecord
from kvp.tables import markdown

OUT = Path("docs/reference")
INTRODUCTION = """# run.json

`outputs/runs/<model>-<strategy>-<ratio>-<recovery>-s<seed>-<hash>/run.json`, one directory per configuration.
The file is there from the first second of a run. A finished record stays until its stages are gone.
`experiments/*/results.jsonl` holds the same records, one a line, without `directory`, `tracker`, `host` and `pid`.

Read it with `kvp.record.RunRecord.read(path)`, which brings old schemas up to date.
[run.schema.json](run.schema.json) is the JSON schema. `python -m kvp.schema` makes both files from the type.
"""


def main() -> None:
    """Write both files and print their paths."""
    parser = argparse.ArgumentParser(prog="python -m kvp.schema", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="default: %(default)s")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (out / name).write_text(text, encoding="utf-8")
        print(out / name)


def files() -> dict[str, str]:
    """Return the text of each file by name."""
    schema = RunRecord.model_json_schema()
    return {"run-json.md": _page(schema), "run.schema.json": json.dumps(schema, indent=1) + "\n"}


def _page(schema: Mapping[str, Any]) -> str:
    sections = [INTRODUCTION]
    for path, part in _parts(schema):
        title = f"## `{path}`\n\n" if path else ""
        rows = [(f"`{key}`", _unit(node) or "-", _meaning(node)) for key, node in _keys(part)]
        table = markdown(("key", "unit", "meaning"), rows, labels=3)
        sections.append(f"{title}{part['description']}\n\n{table}\n")
    return "\n".join(sections)


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each part of the record once, with the path where it stands first."""
    seen: set[str] = set()
    waiting: list[tuple[str, Mapping[str, Any]]] = [("", schema)]
    while waiting:
        path, part = waiting.pop(0)
        yield path, part
        inner = []
        for key, node in _keys(part):
            place = f"{path}.{key}".removeprefix(".")
            for reference, suffix in _references(node):
                if reference not in seen:
                    seen.add(reference)
                    inner.append((place + suffix, schema["$defs"][reference]))
        waiting = [*inner, *waiting]


def _keys(part: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the keys of a part with their schemas; `<name>` stands for keys that the run chooses."""
    yield from part["properties"].items()
    if isinstance(others := part.get("additionalProperties"), Mapping):
        meaning = "accuracy or standard error" if "unit" in others else "a task"
        yield "<name>", {"description": meaning, **others}


def _references(node: Mapping[str, Any], suffix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the names of the parts that a key holds, and how they hang on it: alone, in a list or by name."""
    if "$ref" in node:
        yield node["$ref"].rpartition("/")[2], suffix
    for other in node.get("anyOf", ()):
        yield from _references(other, suffix)
    if isinstance(items := node.get("items"), Mapping):
        yield from _references(items, f"{suffix}[]")
    if isinstance(values := node.get("additionalProperties"), Mapping):
        yield from _references(values, f"{suffix}.<name>")


def _meaning(node: Mapping[str, Any]) -> str:
    values = f": {', '.join(node['enum'])}" if "enum" in node else ""
    return node.get("description", "") + values


def _unit(node: Any) -> str:
    """Return the unit of the numbers below a key; empty for numbers without one and for other values."""
    if isinstance(node, Mapping):
        return node.get("unit") or next(filter(None, map(_unit, node.values())), "")
    return next(filter(None, map(_unit, node)), "") if isinstance(node, list) else ""


if __name__ == "__main__":
    main()
