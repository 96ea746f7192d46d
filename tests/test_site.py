"""The site: the navigation has every page, every method has a whole page, every option is listed, nothing is broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import kvp
from docs.generate import all_options, engines, examples, methods, outside
from docs.generate.settings import CONF, settings
from tests.test_docs import BANNED, COMMAND, OPENER, composed, jobs, prose

ROOT = Path(__file__).parents[1]
SMALL = {
    "adapruner": {"trials": 2},
    "search_llm": {"evolution": "quick"},
    "kvpruner_plus_mla": {"context": None},  # folds leave no 25 % of a tiny model
}
LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=\"?(https?:[^\s\">]+)")


def navigation() -> list[str]:
    """Return the pages that mkdocs.yml lists; docs/hooks.py adds those of the methods and the studies."""
    sections = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    return [page for section in sections for pages in section.values() for page in pages]


def test_the_navigation_lists_every_page():
    written = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    generated = {f"methods/{name}.md" for name in methods.names()}
    brought = {"reference/options.md", "guides/examples.md", *outside.PAGES.values(), "results/index.md"}
    assert sorted(navigation()) == sorted((written - generated) | brought)


def test_the_page_of_examples_shows_their_code():
    text = examples.page()
    for path in ROOT.glob("examples/*.py"):
        assert path.read_text().strip() in text
    assert "## notebooks/" in text


def test_every_study_has_a_row():
    text = (ROOT / "experiments" / "README.md").read_text()
    assert all(f"[{path.parent.name}]" in text for path in ROOT.glob("experiments/*/README.md"))


def test_every_method_has_a_row_and_every_strategy_a_method():
    assert set(methods.listed()) == set(methods.names())
    assert all(paths and paths[0].stem == name for name, paths in methods.strategies().items())


@pytest.mark.parametrize("name", methods.names())
def test_the_page_of_a_method_is_whole(name, tmp_path):
    text = methods.page(name)
    headings = re.findall(r"^## (.+)$|^(.+)\n-+$", text, flags=re.MULTILINE)
    assert {first or second for first, second in headings} >= {*methods.SECTIONS, "Options", "Run it"}
    for fact in ("what is pruned", "signal", "shrinks the KV cache?", "stock-servable?", "faithful?"):
        assert re.search(rf"^\| {re.escape(fact)} +\| \S", text, flags=re.MULTILINE), fact
    for path in methods.strategies()[name]:
        for setting in settings(path):
            assert f".{setting.name}`" in text or setting.name in ("allocator", "compensation"), setting
    for module, words in COMMAND.findall(text):
        for overrides in jobs(words.partition("#")[0].split()) if module == "kvp" else ():
            composed(*overrides)
    page = tmp_path / "page.md"
    page.write_text(text)
    for paragraph in prose(page):
        assert not BANNED.search(paragraph), paragraph
        assert not OPENER.match(paragraph.strip()), paragraph


def test_a_page_shows_defaults_bounds_and_meaning():
    assert re.search(
        r"\| `strategy.growth` +\| `0.5` +\| in \[0, 1\) +\| Part of what is left", methods.page("regrow")
    )
    assert re.search(r"\| `strategy.metric` +\| `wifv` +\| `wifv`, `ifv`, `wifn` +\|", methods.page("flap"))
    assert "| 20 % of kv_cache |         bias |" in methods.page("flap")  # of experiments/rivals/table.md
    assert "### kvpruner_stock" in methods.page("kvpruner")


def test_the_page_of_all_options_has_each_with_a_meaning_of_its_class():
    text = all_options.page()
    for path in CONF.rglob("*.yaml"):
        group = path.parent.relative_to(CONF).as_posix()
        if group in all_options.groups():
            assert f"### {path.stem} {{ #{methods.anchor(group, path.stem)} }}" in text
            assert group == "experiment" or all(f"`{setting.default}`" in text for setting in settings(path))
    assert re.search(r"\| `recovery.rank` +\| `8` +\| > 0 +\| it is the width of the update", text)
    assert re.search(r"\| `seed` +\| `0` +\|", text)


@pytest.mark.parametrize(
    ("path", "link", "moved"),
    [
        ("docs/methods/index.md", "../../experiments/rivals", "../results/rivals/index.md"),
        ("docs/methods/index.md", "../../kvp/strategies/methods/flap.py", "flap.md"),
        ("docs/index.md", "../CONTRIBUTING.md", "contributing.md"),
        ("docs/index.md", "../examples/prune.py", "guides/examples.md"),
        ("docs/guides/options.md", "../../conf", "../reference/options.md"),
        ("experiments/rivals/README.md", "table.md", "table.md"),
        ("experiments/rivals/README.md", "../rivals_params", "../rivals_params/index.md"),
        ("CONTRIBUTING.md", "docs/extend/method.md", "extend/method.md"),
        ("docs/index.md", "../LICENSE", "files/LICENSE"),
        ("docs/index.md", "https://arxiv.org/abs/2409.11057", "https://arxiv.org/abs/2409.11057"),
    ],
)
def test_links_go_where_the_site_has_the_file(path, link, moved):
    assert outside.rewritten(path, f"[it]({link})") == f"[it]({moved})"


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.names())
def test_the_python_of_a_page_prunes(name):
    call = re.search(r"^pruned = kvp\.prune\((.*)\)$", methods.page(name), flags=re.MULTILINE)[1]
    small = {"num_samples": 4, "length": 64, **SMALL.get(name, {})}
    model, tokenizer = kvp.load("tiny")
    names = {"kvp": kvp, "model": model, "tokenizer": tokenizer, "small": small}
    pruned = eval(f"kvp.prune({call}, **small)", names)
    assert name == "none" or max(pruned.achieved.values()) > 0.05


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("mkdocs"), reason="pip install 'kvp[docs]'")
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    """Build as `make docs` does, which installs the extra first. Warnings are errors: mkdocs.yml is strict."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0 and "is excluded" not in done.stderr, done.stderr
    for page in (
        "index.html",
        "methods/flap/index.html",
        "reference/options/index.html",
        "results/rivals/index.html",
    ):
        assert (tmp_path / page).exists(), page
    for path in tmp_path.rglob("*.html"):
        assert not (found := LOADED.search(path.read_text())), f"{path} loads {found[1]}"


def test_the_guide_to_serving_shows_the_newest_records():
    assert engines.PAGE.read_text() == engines.page(), "run python -m docs.generate.engines"


def test_a_cell_says_run_refused_or_not_run():
    common = {"form": "stock", "model": "a", "engine": "vllm", "version": "1.0", "date": "2026-11-28"}
    run = common | {"status": "run", "rms": 3.7e-3}
    refused = common | {"form": "gguf", "status": "refused", "why": "made for llama_cpp"}
    other = run | {"model": "c", "status": "refused", "why": "of another width"}
    rows = engines.table([run, run | {"model": "b", "rms": 1e-6}, other, refused]).splitlines()
    cells = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in rows if line.startswith("| `")
    }
    assert cells["`stock`"] == "run 2026-11-28: 0.004 nats, 2 of 3 models"
    assert cells["`gguf`"] == "refused 2026-11-28 (1)"
    assert cells["`custom`"] == "not run"
    assert rows[-1] == "1. made for llama_cpp"
