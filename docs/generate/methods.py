"""Pages of the methods: the docstring of each method's module, the options of its YAML, and what studies measured."""

from __future__ import annotations

import inspect
import re
from functools import cache
from importlib import import_module
from pathlib import Path

from docs.generate.settings import CONF, ROOT, defaults, head, settings, table, target
from kvp.tables import markdown

DOCS = ROOT / "docs"
METHODS = ROOT / "kvp" / "strategies" / "methods"
SECTIONS = ("Formula", "Faithful or interpreted", "Cost")  # of every module's docstring
STUDIES = {  # tables of experiments/ with a row per strategy
    "rivals/table.md": "Per byte of KV cache",
    "rivals_params/table.md": "Per parameter",
    "sparse/table.md": "With zeros in the weights",
    "rivals/cost.md": "Seconds and peak of pruning",
}
LEFT_OUT = re.compile(r"bytes/token|\(M\)|MiB|recovered|sens|search|plan|comp.*s$|score")
PAPER = re.compile(r"(?<!\[)arXiv[: ](\d{4}\.\d{5})")


def names() -> list[str]:
    """Return the modules of the methods, which are the names of their pages."""
    return sorted(path.stem for path in METHODS.glob("*.py") if path.stem != "__init__")


@cache
def strategies() -> dict[str, list[Path]]:
    """Return the YAML files of every module; that of the module's own name is the first."""
    found: dict[str, list[Path]] = {name: [] for name in names()}
    for path in sorted((CONF / "strategy").glob("*.yaml")):
        cls = target(path)
        assert cls, f"{path} names no class"
        found[cls.__module__.rpartition(".")[2]].append(path)
    return found


def page(name: str) -> str:
    """Return the page of one method."""
    module = import_module(f"kvp.strategies.methods.{name}")
    first, _, text = (inspect.getdoc(module) or "").partition("\n")
    title, _, lead = first.partition(": ")
    yamls = strategies()[name]
    own = DOCS / "methods" / f"{name}.md"
    more = own.read_text().partition("\n\n## ")[1:] if own.exists() else ()
    parts = [f"# {title}", upper(lead), facts(name, first, text), blocks(text), "".join(more)]
    parts += ["## Options", options(yamls[0]), *variants(yamls[0], yamls[1:])]
    parts += ["## Run it", commands(yamls[0]), *measured(name)]
    return cited("\n\n".join(part.strip() for part in parts if part.strip())) + "\n"


def cited(text: str) -> str:
    """Return a page whose papers are links, but for those in code."""
    prose = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    prose[::2] = [PAPER.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", part) for part in prose[::2]]
    return "".join(prose)


def upper(text: str) -> str:
    """Return a text with its first letter large."""
    return text[:1].upper() + text[1:]


def blocks(text: str) -> str:
    """Return a docstring as Markdown, in which a list begins after an empty line."""
    return re.sub(r"^((?!\* |\d\. | ).+)\n(?=\* |1\. )", r"\1\n\n", text, flags=re.MULTILINE)


def facts(name: str, first: str, text: str) -> str:
    """Return what a reader looks up first: the row of docs/methods/index.md, the paper, the verdict on fidelity."""
    rows = [["`strategy=`", ", ".join(f"`{path.stem}`" for path in strategies()[name])]]
    made = target(strategies()[name][0])
    assert made
    rows += [["in Python", f"[`kvp.{made.__name__}`](../reference/api.md)"]]
    rows += [[head, cell] for head, cell in listed()[name].items()]
    rows += [["paper", f"arXiv {number}"] for number in PAPER.findall(first)]
    verdict = re.search(r"^Faithful or interpreted\n-+\n(.*?\.)(?:\s|$)", text, re.MULTILINE | re.DOTALL)
    rows += [["faithful?", " ".join(verdict[1].split())]] if verdict else []
    return markdown(["", ""], rows, labels=2)


def anchor(group: str, name: str) -> str:
    """Return the anchor of an option on the page of all options."""
    return f"{group}-{name}".replace("/", "-")


@cache
def listed() -> dict[str, dict[str, str]]:
    """Return the rows of the table of docs/methods/index.md, by method."""
    found: dict[str, dict[str, str]] = {}
    heads: list[str] = []
    for line in (DOCS / "methods" / "index.md").read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and cells[0] == "strategy":
            heads = cells
        elif heads and cells and not cells[0].startswith("---"):
            for module in re.findall(r"methods/(\w+)\.py", cells[0]):
                found[module] = dict(zip(heads[1:], cells[1:], strict=True))
    return found


def options(path: Path) -> str:
    """Return the table of a method's options, the tables of its classes, and what it takes by default."""
    cls, found = target(path), settings(path)
    assert cls
    own = [setting for setting in found if setting.name not in ("allocator", "compensation")]
    parts = [table(own, "strategy.") if own else "It has no options of its own."]
    for base in cls.__mro__:
        lines = [line for line in inspect.cleandoc(base.__doc__ or "").splitlines() if line.startswith("|")]
        parts += ["\n".join(lines)] if "strategies" in base.__module__ and lines else []
    chosen = [
        f"`strategy.{group}` is [`{name}`]({place(group, name)})."
        for group, name in defaults(path).items()
        if group
    ]
    chosen += [f"`{s.default}` sets the allocator's options." for s in found if s.name == "allocator"]
    return "\n\n".join([*parts, " ".join(chosen)])


def place(group: str, name: str) -> str:
    """Return the link to the option of a group that a strategy names in its defaults."""
    if (CONF / "strategy" / group).is_dir():
        return f"../reference/options.md#{anchor(f'strategy/{group}', name)}"
    if group == "ratio":
        return f"../reference/options.md#{anchor(group, name)}"
    return f"{name}.md"


def variants(main: Path, others: list[Path]) -> list[str]:
    """Return what other YAML files make of the same class: their purpose, and the options that differ."""
    parts = []
    for path in others:
        changed = [setting for setting in settings(path) if setting not in settings(main)]
        command = head(path)[1] or [f"python -m kvp strategy={path.stem}"]
        parts += [f"### {path.stem}", head(path)[0], "\n".join(["```bash", *command, "```"])]
        parts += [table(changed, "strategy.")] if changed else []
    return parts


def commands(path: Path) -> str:
    """Return how to run a method: the commands of its YAML, and the first of them from Python."""
    lines = head(path)[1] or [f"python -m kvp strategy={path.stem}"]
    given = dict(re.findall(r"([\w./@]+)=(\S+)", lines[0]))
    call = [f'strategy="{path.stem}"', f"ratio={given.get('ratio.value', '0.25')}"]
    call += [f'of="{given["ratio"]}"'] if given.get("ratio", "kv_cache") != "kv_cache" else []
    return "\n".join(
        [
            "```bash",
            *lines,
            "```",
            "",
            "```python",
            "import kvp",
            "",
            'model, tokenizer = kvp.load("smollm2_135m")',
            f"pruned = kvp.prune(model, tokenizer, {', '.join(call)})",
            "```",
        ]
    )


def measured(name: str) -> list[str]:
    """Return the rows of the studies' tables that are about one method."""
    parts = []
    for study, title in STUDIES.items():
        if found := about(ROOT / "experiments" / study, strategies()[name]):
            rows = markdown(*found)
            note = ", where notes explain the letters" if "<sup>" in rows else ""
            parts += [f"[{title}](../../experiments/{study}){note}:", rows]
    return ["## Measured", "The model is SmolLM2-135M, in float32 on a CPU.", *parts] if parts else []


def about(path: Path, yamls: list[Path]) -> tuple[list[str], list[list[str]]] | None:
    """Return heads and rows of a study's table about some strategies, without the columns that say nothing of them."""
    lines = [line.split("|")[1:-1] for line in path.read_text().splitlines() if line.startswith("|")]
    heads, _, *rows = [[re.sub(r"\*\*|</?u>", "", cell).strip() for cell in line] for line in lines]
    column = [head.lower() for head in heads].index("strategy")
    rows = [row for row in rows if row[column] in {path.stem for path in yamls}]
    full = [n for n in range(len(heads)) if n != column and any(row[n] not in ("—", "-") for row in rows)]
    full = [n for n in full if not LEFT_OUT.search(heads[n])]
    return ([heads[n] for n in full], [[row[n] for n in full] for row in rows]) if rows else None
