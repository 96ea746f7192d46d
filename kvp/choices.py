"""Options of a group, wherever they lie: --config-dir, hydra.searchpath, installed plugins, and kvp itself."""

from __future__ import annotations

import re
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

from kvp.plugins import CONF, sound


def choices(group: str) -> list[str]:
    """Return the options of a group by name."""
    return sorted({path.stem for folder in folders() for path in (folder / group).glob("*.yaml")})


def file(group: str, choice: str) -> Path | None:
    """Return the YAML of a choice; None if there is none."""
    paths = (folder / group / f"{choice}.yaml" for folder in folders())
    return next((path for path in paths if path.is_file()), None)


def described(group: str) -> str:
    """Return each option of a group with the first sentence of its file's comment, in lines of 80 characters.

    Raises:
        ValueError: There is no such group.
    """
    names = choices(group)
    if not names:
        raise ValueError(f"there is no group {group!r}: kvp run --help shows all groups")
    wide = max(map(len, names)) + 2
    return "\n".join(
        textwrap.fill(f"{name:<{wide}}{_sentence(group, name)}", 80, subsequent_indent=" " * wide)
        for name in names
    )


def _sentence(group: str, name: str) -> str:
    path = file(group, name)
    lines = path.read_text(encoding="utf-8").splitlines() if path else []
    comment = " ".join(line[2:] for line in lines if line.startswith("# ") and line[2] not in "@ ")
    return re.split(r"\.(?:\s|$)", comment, maxsplit=1)[0]


def folders() -> list[Path]:
    """Return the folders of options, kvp's own last."""
    return [*own(), *(plugin.conf for plugin in sound()), CONF]


def own() -> list[Path]:
    """Return the folders of options that the command line names."""
    return [*map(Path, config_dirs()), *_search_path()]


def config_dirs() -> list[str]:
    """Return what --config-dir names on the command line."""
    argv = sys.argv[1:]
    given = [word.partition("=")[2] for word in argv if re.match(r"(--config-dir|-cd)=", word)]
    return given + [argv[n + 1] for n, word in enumerate(argv[:-1]) if word in ("--config-dir", "-cd")]


def _search_path() -> list[Path]:
    """Return the folders of hydra.searchpath=[...] on the command line."""
    words = [word.partition("=")[2] for word in sys.argv[1:] if word.startswith("hydra.searchpath=")]
    return [_place(item.strip(" '\"")) for word in words for item in word.strip("[]").split(",")]


def _place(item: str) -> Path:
    """Return the folder of `file://conf`, `conf` or `pkg://mypkg.conf`."""
    if not item.startswith("pkg://"):
        return Path(item.removeprefix("file://"))
    package, *below = item.removeprefix("pkg://").replace("/", ".").split(".")
    spec = find_spec(package) if package.isidentifier() else None
    places = (spec and spec.submodule_search_locations) or ["/nowhere"]
    return Path(places[0], *below)
