"""The page of the examples: the scripts of examples/ and the notebooks of notebooks/, as they are."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from docs.generate.settings import ROOT


def page() -> str:
    """Return the page."""
    parts = ["# Examples", "Tests run all of these on a small model."]
    for path in sorted(ROOT.glob("examples/*.py")):
        text = path.read_text()
        first = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        parts += [f"## {path.relative_to(ROOT)}", first, code(text)]
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        parts += [f"## {path.relative_to(ROOT)}", *cells(path)]
    return "\n\n".join(parts) + "\n"


def cells(path: Path) -> list[str]:
    """Return the texts and the code of a notebook; its headings are below that of the notebook."""
    found = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        found.append(
            code(text) if cell["cell_type"] == "code" else re.sub("^#", "###", text, flags=re.MULTILINE)
        )
    return found


def code(text: str) -> str:
    """Return a block of Python."""
    return f"```python\n{text.strip()}\n```"
