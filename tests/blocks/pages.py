"""Commands and code blocks of README.md, docs/ and examples/: what a reader may paste."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("examples/**/*.md"))]

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
FORM = re.compile(
    r"(?<!=)\[|\.\.\.|\w\|\w|\b[a-z]=b\b|\b(?!RUN\b|CKPT\b)[A-Z]{3,}\b"
)  # what a command may look like
OURS = re.compile(r"(?:[A-Z_]+=\S+ )*(?:kvp|python -m (?:kvp|pip)(?:\.\w+)*|make|pip)(?= |$)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    file: str = ""  # that the sentence before a YAML block names

    @property
    def place(self) -> str:
        """The block's page and line."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command line of a page: from a bash block, or in backticks in a text or table."""

    page: str
    line: int
    text: str
    words: tuple[str, ...]
    fenced: bool

    @property
    def is_form(self) -> bool:
        """Whether a text names a command (`kvp status`), or shows what it may look like (`kvp status [DIR]`)."""
        named = self.words[0] == "kvp" and self.words[1:] and self.words[1].isalpha() and not self.words[2:]
        return not self.fenced and bool(named or FORM.search(self.text))

    @property
    def place(self) -> str:
        """The command's page and line."""
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    text = page.read_text()
    name = str(page.relative_to(ROOT))
    found = []
    for fence in FENCE.finditer(text):
        before = text[: fence.start()].rstrip().rpartition("\n\n")[2]
        file = re.search(r"`([\w/]+\.yaml)`:$", before) if fence[2] == "yaml" else None
        body = re.sub(f"(?m)^{fence[1]}", "", fence[3])
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(name, line, fence[2], body, file[1] if file else ""))
    return found


def commands(page: Path) -> list[Command]:
    """Return the command lines of a page in order.

    Every line of a bash block is one. In backticks it is one if it begins as a command of ours and goes on.
    """
    name, found = str(page.relative_to(ROOT)), []
    for block in blocks(page):
        if block.language == "bash":
            for number, line in _lines(block.text):
                found.append(_command(name, block.line + number, line, fenced=True))
    for number, line in enumerate(FENCE.sub(_blank, page.read_text()).split("\n"), 1):
        for code in re.findall(r"`([^`]+)`", line):
            if OURS.match(code) and " " in code.removeprefix("python -m "):
                found.append(_command(name, number, code.replace(r"\|", "|"), fenced=False))
    return sorted(found, key=lambda command: command.line)


def _command(page: str, line: int, text: str, *, fenced: bool) -> Command:
    try:
        words = tuple(shlex.split(text, comments=True))
    except ValueError as error:
        raise ValueError(f"{page}:{line}: {error}: {text}") from error
    return Command(page, line, re.split(r"\s+#", text)[0].strip(), words, fenced)


def _lines(text: str) -> list[tuple[int, str]]:
    """Return the lines of a bash block with their numbers; comments go, a backslash joins, && parts."""
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)(^|\s)#.*$", "", text))
    return [
        (number, part.strip())
        for number, line in enumerate(joined.split("\n"), 1)
        for part in line.split(" && ")
        if part.strip()
    ]


def _blank(found: re.Match[str]) -> str:
    return "\n" * found[0].count("\n")
