"""What mkdocs does beside showing docs/: it adds generated pages and files from outside, and moves their links."""

from __future__ import annotations

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.generate import all_options, examples, methods, outside
from docs.generate.settings import ROOT

GRAPH = re.compile(
    r"^```mermaid\n.*?^```\n", re.MULTILINE | re.DOTALL
)  # a browser would fetch Mermaid to draw it
REPOSITORY: dict[str, str] = {}  # the file of the repository that each page of the site shows


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the navigation: every method and every study has a page."""
    assert config.nav
    sections = {title: pages for entry in config.nav for title, pages in entry.items()}
    sections["Methods"] += [{name: f"methods/{name}.md"} for name in methods.names()]
    sections["Results"] += [
        {place.split("/")[1].replace("_", " "): place}
        for place in map(outside.place, outside.studies())
        if place.endswith("/index.md") and place != "results/index.md"
    ]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages and files that docs/ does not have."""
    REPOSITORY.clear()
    REPOSITORY.update({file.src_uri: f"docs/{file.src_uri}" for file in files.documentation_pages()})
    made = {f"methods/{name}.md": methods.page(name) for name in methods.names()}
    made |= {"reference/options.md": all_options.page(), "guides/examples.md": examples.page()}
    for path in (*outside.PAGES, *outside.studies()):
        made[outside.place(path)] = outside.titled(path, (ROOT / path).read_text())
        REPOSITORY[outside.place(path)] = path
    for place, text in made.items():
        if place in files.src_uris:
            files.remove(files.src_uris[place])
        files.append(File.generated(config, place, content=text))
        REPOSITORY.setdefault(place, f"docs/{place}")
    texts = {REPOSITORY[file.src_uri]: file.content_string for file in files.documentation_pages()}
    for path in {found for page, text in texts.items() for found in outside.linked(page, text)}:
        if (ROOT / path).is_file() and outside.place(path) not in files.src_uris:
            files.append(File.generated(config, outside.place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page whose links go where the site has what they mean; a table says what a graph shows on GitHub."""
    return outside.rewritten(REPOSITORY[page.file.src_uri], GRAPH.sub("", markdown))
