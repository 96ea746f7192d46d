"""README, docs and the studies' READMEs: links resolve, commands compose, the README is short, the prose is plain."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from kvp.__main__ import CONF

ROOT = Path(__file__).parents[1]
STUDIES = [ROOT / "experiments" / "README.md", *sorted(ROOT.glob("experiments/*/README.md"))]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
PAGES += [
    page for page in sorted(ROOT.glob("docs/**/*.md")) if page.name != "run-json.md"
]  # that one is generated
SETTINGS = [
    ROOT / "conf" / "config.yaml",
    *sorted(ROOT.glob("conf/experiment/*.yaml")),
    *ROOT.glob("conf/launcher/*"),
]

GROUPS = (
    "model",
    "strategy",
    "strategy/allocator",
    "strategy/compensation",
    "ratio",
    "widths",
    "calibration",
    "cache",
)
GROUPS += ("recovery", "recovery/distillation", "evaluation", "measure", "tracker", "launcher", "debug")

LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
COMMAND = re.compile(r"python -m ([\w.]+)(.*)")
BANNED = re.compile(r"\b(apart|as good as|is had|told|affair)\b", re.IGNORECASE)
OPENER = re.compile(r"^(?:[-*] |\d\. )?(?:Of|Those|As|The same|The first's|What|Its|By|For|From|How|Which)\b")


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def prose(page: Path) -> list[str]:
    """Return the paragraphs, list items and table rows of a page, without code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "`code`", text)
    return re.split(r"\n\s*\n|\n(?=\s*(?:[-*] |\d\. |\|))", text)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Return module and arguments of every `python -m kvp...` line without a placeholder in capitals.

    Lines with options of their own (--config-dir) are left to tests/blocks, which writes those options first.
    """
    text = re.sub(r"\\\n\s*", "", page.read_text())
    found = []
    for line in re.findall(r"^.*python -m (?:kvp|experiments).*$", text, flags=re.MULTILINE):
        for module, rest in COMMAND.findall(line):
            words = re.split(r"\s#|`|[;|<&]|\)$", rest)[0]
            if (
                not re.search(r"(?<![\w{])[A-Z]{2,}|\$|\.\.\.|--config-dir|^.*[\"'].*\n", words)
                and words.count('"') % 2 == 0
            ):
                found.append((module, shlex.split(words)))
    return found


@pytest.mark.parametrize("name", names(PAGES + STUDIES))
def test_links_resolve(name):
    page = ROOT / name
    for target, anchor in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{name} links {target}, which does not exist"
        if anchor:
            assert anchor in anchors(path), (
                f"{name} links {target}#{anchor}, and the page has no such heading"
            )


@pytest.mark.parametrize("name", names(PAGES + STUDIES))
def test_commands_name_modules_and_compose(name):
    for module, arguments in commands(ROOT / name):
        assert find_spec(module), f"{name} runs python -m {module}, which does not exist"
        if module == "kvp":
            for overrides in jobs(arguments):
                composed(*overrides)


@cache
def composed(*overrides: str) -> None:
    """Compose a command once, however many pages show it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose("config", overrides=list(overrides))


def jobs(arguments: list[str]) -> list[list[str]]:
    """Return one list of overrides per position in the sweeps of a command line."""
    options = [word for word in arguments if "=" in word and not word.startswith(("-", "hydra."))]
    values = [(key, split(value)) for key, _, value in (option.partition("=") for option in options)]
    longest = max((len(several) for _, several in values), default=1)
    return [[f"{key}={several[n % len(several)]}" for key, several in values] for n in range(longest)]


def split(value: str) -> list[str]:
    """Return the values of a sweep; a list in brackets is one value."""
    return [value] if value.startswith(("[", "{")) else value.split(",")


def test_commands_are_found():
    assert ("kvp", ["strategy=none", "recovery=lora_text"]) in commands(ROOT / "README.md")
    assert jobs(["-m", "a=1,2", "b=[3,4]"]) == [["a=1", "b=[3,4]"], ["a=2", "b=[3,4]"]]


def test_help_fits_a_screen_and_names_every_option():
    text = OmegaConf.load(CONF / "config.yaml").hydra.help.template
    lines = text.splitlines()
    assert len(lines) <= 40
    assert all(len(line) <= 80 for line in lines)
    offered = {path.stem for group in GROUPS for path in (CONF / group).glob("*.yaml")}
    assert {name for name in offered if not name.endswith("_shape")} <= set(re.findall(r"\w+", text))


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


@pytest.mark.parametrize("name", names(PAGES + STUDIES))
def test_prose_is_plain(name):
    for paragraph in prose(ROOT / name):
        assert not (found := BANNED.search(paragraph)), f"{name}: {found[0]!r} in: {paragraph.strip()}"
        assert not OPENER.match(paragraph.strip()), f"{name} opens a paragraph badly: {paragraph.strip()}"


@pytest.mark.parametrize("name", names(SETTINGS))
def test_comments_are_plain(name):
    for line in (ROOT / name).read_text().splitlines():
        comment = line.partition("#")[2]
        assert not BANNED.search(comment), f"{name}: {line}"
        assert not (line.startswith("#") and OPENER.match(comment.strip())), f"{name}: {line}"


@pytest.mark.parametrize("folder", ["kvp", "hydra_plugins", "experiments/scripts"])
def test_docstrings_make_sense_alone(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                assert not OPENER.match(first), f"{path.relative_to(ROOT)}: {first}"
                assert not re.search(r"\b(as good as|is had|told|affair)\b", first), (
                    f"{path.relative_to(ROOT)}: {first}"
                )
