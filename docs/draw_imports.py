"""Draw the rooms of docs/imports.yaml into docs/architecture.md: `python docs/draw_imports.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
BEGIN, END = "<!-- drawn by docs/draw_imports.py -->", "<!-- end -->"


def drawn(table: dict[str, Any]) -> str:
    """Return a graph of the imports, and a table of what each room is for."""
    rooms = table["rooms"]
    arrows = [f"  {room} --> {other}" for room in rooms for other in direct(rooms, room)]
    rows = [
        f"| `{room}` | {row['for']} | {', '.join(row['imports']) or '-'} |" for room, row in rooms.items()
    ]
    return "\n".join(
        [
            "```mermaid",
            "graph BT",
            *arrows,
            "```",
            "",
            "| room | what it is for | imports |",
            "|---|---|---|",
            *rows,
        ]
    )


def direct(rooms: dict[str, Any], room: str) -> list[str]:
    """Return the imports of a room that no other import of it has already: the graph needs no more arrows."""
    imports = rooms[room]["imports"]
    return [
        one for one in imports if not any(one in reached(rooms, other) for other in imports if other != one)
    ]


def reached(rooms: dict[str, Any], room: str) -> set[str]:
    """Return all rooms that one imports, directly or not."""
    return {found for one in rooms[room]["imports"] for found in (one, *reached(rooms, one))}


def page() -> str:
    """Return docs/architecture.md with the drawing up to date."""
    text = (HERE / "architecture.md").read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{drawn(yaml.safe_load((HERE / 'imports.yaml').read_text()))}\n{END}{tail}"


if __name__ == "__main__":
    (HERE / "architecture.md").write_text(page())
