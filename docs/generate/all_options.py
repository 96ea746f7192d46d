"""The page of all options: every group, option, default and meaning of conf/."""

from __future__ import annotations

from pathlib import Path

from docs.generate.methods import anchor, cited
from docs.generate.settings import CONF, head, settings, table

HIDDEN = ("hydra", "machine")  # groups without options of a run
INTRODUCTION = """# All options

`python -m kvp GROUP=OPTION` chooses an option of a group, and `python -m kvp GROUP.NAME=VALUE` changes one value.
`python -m kvp --cfg job --resolve` prints what a command would run. Every group has a folder in `conf`.
Options of the methods stand on [their own pages](../methods/index.md).

## Of the run
"""


def page() -> str:
    """Return the page."""
    parts = [INTRODUCTION, table(settings(CONF / "config.yaml"))]
    for group in groups():
        parts.append(f"## {group}")
        for path in sorted((CONF / group).glob("*.yaml")):
            parts += option(group, path)
    return cited("\n\n".join(part.strip() for part in parts if part.strip())) + "\n"


def groups() -> list[str]:
    """Return the groups in the order of config.yaml's folders, inner ones after those they belong to."""
    folders = {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} - {".", "strategy"}
    return sorted(folder for folder in folders if folder.partition("/")[0] not in HIDDEN)


def option(group: str, path: Path) -> list[str]:
    """Return the heading, the comment, the commands and the table of one option."""
    text, commands = head(path)
    found = [] if group == "experiment" else settings(path)  # an experiment sets options of other groups
    code = "\n".join(["```bash", *commands, "```"]) if commands else ""
    above = "" if path.read_text().startswith("# @package _global_") else f"{group.replace('/', '.')}."
    return [
        f"### {path.stem} {{ #{anchor(group, path.stem)} }}",
        text,
        code,
        table(found, above) if found else "",
    ]
