"""Files outside docs/ that the site shows, and links that work on GitHub and in the site alike.

Every link of a page is written for GitHub, relative to the file. In the site a file has another place:

| file | place in the site |
|---|---|
| docs/X | X |
| README.md | index.md |
| CONTRIBUTING.md, SECURITY.md, CHANGELOG.md | contributing.md, security.md, changelog.md |
| experiments/STUDY, its README, tables, pictures and records | results/STUDY/... |
| kvp/strategies/methods/NAME.py | methods/NAME.md |
| conf/... | reference/options.md |
| examples/..., notebooks/... | guides/examples.md |
| any other file that a page links | files/... |
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from docs.generate.settings import ROOT

LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
PAGES = {name: name.lower() for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")}


def place(path: str) -> str:
    """Return where the site has a file or folder of the repository."""
    if path == "README.md":
        return "index.md"
    if path in PAGES:
        return PAGES[path]
    room, _, rest = path.partition("/")
    if room == "docs":
        return rest
    if room in ("examples", "notebooks"):
        return "guides/examples.md"
    if room == "conf":
        return "reference/options.md"
    if method := re.fullmatch(r"kvp/strategies/methods/(\w+)\.py", path):
        return f"methods/{method[1]}.md"
    if room != "experiments":
        return f"files/{path}"
    if (ROOT / path).is_file():
        return f"results/{rest}".removesuffix("README.md") + (
            "index.md" if rest.endswith("README.md") else ""
        )
    return f"results/{rest}/index.md" if (ROOT / path / "README.md").exists() and rest else "results/index.md"


def studies() -> Iterator[str]:
    """Yield the Markdown files of the studies, as paths in the repository."""
    for path in sorted((ROOT / "experiments").rglob("*.md")):
        yield str(path.relative_to(ROOT))


def linked(path: str, text: str) -> Iterator[str]:
    """Yield the files and folders of the repository that a page links."""
    for _, link, _ in LINK.findall(text):
        if (ROOT / (found := resolved(path, link))).exists():
            yield found


def resolved(path: str, link: str) -> str:
    """Return the path in the repository that a link of a file means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def rewritten(path: str, text: str) -> str:
    """Return a page whose links go where the site has what they mean.

    Args:
        path: The page, as a path in the repository.
        text: Its Markdown.
    """
    here = posixpath.dirname(place(path))

    def moved(match: re.Match[str]) -> str:
        found = resolved(path, match[2])
        if not (ROOT / found).exists():
            return match[0]
        return f"{match[1]}{posixpath.relpath(place(found), here or '.')}{match[3]}"

    return LINK.sub(moved, text)


def titled(path: str, text: str) -> str:
    """Return a page with a heading; tables of studies have none, and get the width of the window."""
    if text.startswith("# "):
        return text
    return f"---\nhide: [navigation, toc]\n---\n# {Path(path).parent.name}: {Path(path).stem}\n\n{text}"
