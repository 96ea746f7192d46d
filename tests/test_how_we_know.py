"""docs/how-we-know.md: each claim names a test that exists; README's comparison has the numbers of committed tables."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how-we-know.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
TABLES = ("rivals", "rivals_params", "rivals_recovered", "bytes")


@cache
def functions(file: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_claims_test_exists(file, name):
    assert name in functions(file)


@pytest.mark.parametrize(
    "title", ["Parity", "Counted twice", "Broken on purpose", "Exports proved", "Origins"]
)
def test_every_claim_has_one(title):
    part = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (section,) = [text for text in part if text.startswith(title)]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "github.com" not in line]
    claims = [row for row in rows if not re.match(r"\| (method|claim|repository) \|", row)]
    assert len(claims) >= 5
    for row in claims:
        assert re.search(r"`tests/[\w/]+\.py::\w+`|experiments/", row), row


def test_readmes_comparison_is_that_of_committed_tables():
    part = (ROOT / "README.md").read_text().partition("**Bits come first**")[2].partition("## Prune from")[0]
    known = [
        re.sub(r"[*]|</?u>|<sup>.*?</sup>", "", line).replace(" ", "").split("|")
        for name in TABLES
        for line in (ROOT / "experiments" / name / "table.md").read_text().splitlines()
    ]
    pairs = re.findall(r"([\d.]+) / ([\d.]+)", part)
    assert len(pairs) >= 16
    for squad, lambada in pairs:
        assert any(_beside(cells, squad, lambada) for cells in known), f"{squad} / {lambada} is in no table"


def _beside(cells: list[str], squad: str, lambada: str) -> bool:
    """Whether a row of a table has both: SQuAD, DROP, LAMBADA stand side by side."""
    return any(pair == (squad, lambada) for pair in zip(cells, cells[2:], strict=False))
