from __future__ import annotations

import base64
import hashlib
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from kvp.report.page.html import write_html
from kvp.report.records.keys import MISSING
from kvp.report.records.runs import collect, read_runs
from kvp.report.table.build import build
from kvp.report.table.spec import load_spec
from tests.report.sample_records import make_failed, make_record, write

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\" onclick=\"x"
VOID = {"meta", "img", "input", "br", "link"}
PLOT = '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="10"><rect width="20" height="10"/></svg>'


class Element:
    """A tag with what is in it."""

    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag, self.attributes, self.children, self.own = tag, attributes, [], ""

    def __getitem__(self, name: str) -> str | None:
        return self.attributes.get(name)

    def all(self, tag: str, **attributes: str) -> Iterator[Element]:
        for child in self.children:
            if child.tag == tag and all(child[name] == value for name, value in attributes.items()):
                yield child
            yield from child.all(tag, **attributes)

    @property
    def text(self) -> str:
        return " ".join(f"{self.own} {' '.join(child.text for child in self.children)}".split())


class Page(HTMLParser):
    """The tree of a page; refuses tags that are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.stack = [Element("page", {})]
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert len(self.stack) == 1, [element.tag for element in self.stack]

    @property
    def root(self) -> Element:
        return self.stack[0]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        element = Element(tag, dict(attrs))
        self.stack[-1].children.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.stack[-1].own += data


def records() -> list[dict[str, Any]]:
    """Pruned and recovered, two seeds, a control, a failure."""
    return [
        *(make_record(seed=seed, steps=60, ppl=40.0 + seed) for seed in (0, 1)),
        make_record("magnitude", ratio=0.5, ppl=900.0),
        make_record("none", steps=60, recovered=18.0),
        make_failed("torch.OutOfMemoryError", "CUDA out of memory", strategy="random", ratio=0.5),
    ]


def make_page(place: Path, *made: dict[str, Any], lines: bool = False) -> Path:
    """The report of runs below `place`, as run.json files or as the lines of a results.jsonl."""
    runs = read_runs([write(place / "runs", *(made or records()))])
    if lines:
        collect(runs, place / "results.jsonl")
        runs = read_runs([place / "results.jsonl"])
    out = place / "report"
    out.mkdir()
    (out / "pareto_params.svg").write_text(PLOT)
    tables = [build(load_spec("main"), runs)]
    return write_html(runs, tables, [out / "pareto_params.png", out / "pareto_params.svg"], out)


def test_every_number_links_to_the_record_it_was_read_from(tmp_path):
    path = make_page(tmp_path)
    cells = [
        cell for cell in Page(path).root.all("td") if cell["data-value"] and cell.text not in (MISSING, "OOM")
    ]
    assert len(cells) > 40
    for cell in cells:
        links = [link["href"] for link in cell.all("a")]
        assert links, cell.text
        for link in links:
            assert (path.parent / unquote(link)).resolve().is_relative_to(tmp_path / "runs")
            assert (path.parent / unquote(link)).is_file()
    (pruned,) = (cell for cell in cells if cell.text.startswith("40.50 ± 0.71"))
    assert len(list(pruned.all("a"))) == 2  # one per seed


def test_lines_of_results_link_to_the_file_and_show_the_hash(tmp_path):
    page = Page(make_page(tmp_path, lines=True)).root
    (table,) = page.all("table", id="runs")
    heads = list(table.all("th", scope="row"))
    assert {link["href"] for head in heads for link in head.all("a")} == {"../results.jsonl"}
    assert {head.text for head in heads} == {record["hash"] for record in records()}


def test_the_page_needs_no_network_and_runs_only_its_own_script(tmp_path):
    page = Page(make_page(tmp_path))
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page.source)
    (policy,) = (meta["content"] for meta in page.root.all("meta") if meta["http-equiv"])
    (script,) = page.root.all("script")
    digest = base64.b64encode(hashlib.sha256(script.own.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    (picture,) = page.root.all("img")
    assert base64.b64decode(picture["src"].partition(",")[2]).decode() == PLOT
    assert picture["alt"]


def test_what_records_say_is_escaped(tmp_path):
    evil = make_record(
        ratio=0.5,
        config__model__name=EVIL,
        provenance__origins__0__device=EVIL,
        config__strategy__grouping=EVIL,
    )
    evil["name"] = f"evil-{evil['hash']}"
    source = Page(make_page(tmp_path, evil, make_record(ratio=0.5, config__model__name=EVIL))).source
    assert "<img src=x" not in source and 'onclick="x' not in source
    assert source.count("<script>") == source.count("</script>") == 1
    assert "&lt;img src=x" in source


def test_tables_can_be_sorted_and_read_aloud(tmp_path):
    page = Page(make_page(tmp_path)).root
    tables = list(page.all("table"))
    assert [next(table.all("caption")).text for table in tables] == [
        "Main comparison, smollm2_135m",
        "All runs",
    ]
    for table in tables:
        (head,) = table.all("thead")
        for heading in head.all("th"):
            assert heading["scope"] == "col" and heading["aria-sort"] == "none"
            assert [child.tag for child in heading.children] == ["button"]
        widths = {len(row.children) for row in table.all("tr")}
        assert len(widths) == 1
        for body in table.all("tbody"):
            assert all(len(list(row.all("th", scope="row"))) == 1 for row in body.all("tr"))


def test_failed_runs_show_why_and_dense_comes_once(tmp_path):
    (table,) = Page(make_page(tmp_path)).root.all("table", id="runs")
    rows = [row.text for row in table.all("tr")]
    assert sum("failed: OOM" in row for row in rows) == 1
    assert sum(" dense " in row for row in rows) == 1
    assert sum("dense, tuned alike" in row for row in rows) == 1


def test_the_same_records_give_the_same_bytes_elsewhere(tmp_path):
    pages = [make_page(tmp_path / place) for place in ("here", "there/deeper")]
    assert pages[0].read_bytes() == pages[1].read_bytes()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    installed = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, installed)), None)
    with sync_api.sync_playwright() as playwright:
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip(
                "needs a browser: apt install chromium-headless-shell, or playwright install chromium"
            )
        with playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]) as launched:
            yield launched


@pytest.fixture
def opened(browser, tmp_path) -> Iterator[Any]:
    """The page, opened from its file; fails on any error in it and on any request beyond it."""
    path = make_page(tmp_path, *records(), make_record(ratio=0.5, provenance__origins__0__device=EVIL))
    page = browser.new_page(color_scheme="light")
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("console", lambda message: trouble.append(message.text))
    page.on("request", lambda request: trouble.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert page.evaluate("window.hacked") is None
    assert not [entry for entry in trouble if entry != path.as_uri() and not entry.startswith("data:")]
    page.close()


def column(page: Any, heading: str, table: str = "#runs") -> list[str]:
    """The texts of the visible cells below a heading."""
    return page.evaluate(
        """([table, heading]) => {
            const at = [...document.querySelectorAll(`${table} thead th`)].find((th) => th.textContent === heading);
            const rows = [...document.querySelectorAll(`${table} tbody tr`)].filter((row) => !row.hidden);
            return rows.map((row) => row.cells[at.cellIndex].textContent.trim());
        }""",
        [table, heading],
    )


@pytest.mark.slow
def test_sorting_by_mouse_and_keyboard(opened):
    heading = "perplexity: squad, window 128, cpu (x86_64)"
    button = opened.get_by_role("button", name=heading)
    button.click()
    values = [float(text) for text in column(opened, heading) if text]
    assert values == sorted(values) and len(values) > 5
    assert opened.locator("#runs th[aria-sort=ascending]").inner_text().strip() == heading
    assert column(opened, heading)[-1] == ""  # the failed run has no number
    button.focus()
    opened.keyboard.press("Enter")
    assert [float(text) for text in column(opened, heading) if text] == values[::-1]
    assert column(opened, heading)[-1] == ""
    assert opened.locator("#runs th[aria-sort=descending]").count() == 1


@pytest.mark.slow
def test_the_filter_narrows_tables_and_plot(opened):
    everything = opened.locator("#plot a").count()
    opened.get_by_label("Filter rows and points").fill("KVPRUNER recovered")
    assert set(column(opened, "state")) == {"recovered"}
    assert set(column(opened, "strategy")) == {"kvpruner"}
    assert 0 < opened.locator("#plot a").count() == len(column(opened, "run")) < everything
    assert opened.locator("#count").inner_text().startswith("2 of ")
    opened.get_by_label("Filter rows and points").fill("nothing has this")
    assert opened.locator("#plot").inner_text() == "No run has both numbers."


@pytest.mark.slow
def test_hovering_and_focus_show_the_run_and_points_open_it(opened, tmp_path):
    tip = opened.locator("#tip")
    assert tip.is_hidden()
    point = opened.locator("#plot a[aria-label*='magnitude']").first
    point.hover()
    assert "smollm2_135m-magnitude-kv_cache0.5-none" in tip.inner_text()
    assert "900.00" in tip.inner_text()
    opened.mouse.move(0, 0)
    assert tip.is_hidden()
    point.focus()
    assert tip.is_visible()
    target = (tmp_path / "report" / unquote(point.get_attribute("href"))).resolve()
    assert target.is_file() and "magnitude" in target.parent.name


@pytest.mark.slow
def test_the_axes_can_be_chosen(opened):
    for heading in opened.locator("#y option").all_inner_texts():
        opened.get_by_label("Vertical").select_option(label=heading)
        assert opened.locator("#plot a").count() > 0
        assert heading in opened.locator("#plot svg").get_attribute("aria-label")


@pytest.mark.slow
def test_light_and_dark(opened):
    paper = "getComputedStyle(document.body).backgroundColor"
    light = opened.evaluate(paper)
    assert light == "rgb(255, 255, 255)"
    opened.emulate_media(color_scheme="dark")
    dark = opened.evaluate(paper)
    assert dark != light
    toggle = opened.get_by_role("button", name="Dark")
    assert toggle.get_attribute("aria-pressed") == "true"
    toggle.click()
    assert opened.evaluate(paper) == light
    assert toggle.get_attribute("aria-pressed") == "false"
    opened.reload()
    assert opened.evaluate(paper) == light  # remembered
