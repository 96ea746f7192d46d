"""Imports go one way, third-party giants stand behind one module each, and nothing names this machine."""

from __future__ import annotations

import ast
import runpy
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "kvp").rglob("*.py"))

TABLE = yaml.safe_load((ROOT / "docs" / "imports.yaml").read_text())
BEHIND = {
    "wandb": {"tracking.weights_and_biases"},
    "lm_eval": {"evaluation.zeroshot", "evaluation.shared_context"},
    "jinja2": {"report.page.html"},
    "gguf": {
        "models.gguf_header",
        "models.gguf_reader",
        "serving.gguf_file",
        "serving.gguf_tokens",
        "serving.mla_gguf",
    },
    "llama_cpp": {"bench.llama_cpp.engine", "serving.engine_llama_cpp", "serving.quantize_llama_cpp"},
    "vllm": {"bench.serve.client_vllm", "serving.engine_vllm", "serving.vllm_layers"},
    "optuna": {"strategies.methods.adapruner"},
    "peft": {"recovery.fit", "recovery.merge"},
    "hydra": {"__main__", "composing", "hints", "pipeline.experiment", "sweep.jobs", "sweep.sweep"},
    "omegaconf": {"__main__", "composing", "hints", "pipeline.experiment", "sweep.jobs"},
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "kvp").with_suffix("").parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path):
    name, imported = name_of(path), imports(path)
    room = name.partition(".")[0]
    rooms = {module.split(".")[1] for module in imported if module.startswith("kvp.")} - {room}
    if room not in ("__init__", "__main__"):
        more = rooms - {*TABLE["rooms"][room]["imports"], *TABLE["anywhere"]}
        assert not more, f"{name} imports {more}, docs/imports.yaml does not allow it"
    for package, owners in BEHIND.items():
        if package in {module.partition(".")[0] for module in imported}:
            assert name in owners, f"only {owners} may import {package}"
    assert "utils" not in name


def test_the_table_of_rooms_has_no_circle_and_none_too_many():
    order = list(TABLE["rooms"])
    for room, row in TABLE["rooms"].items():
        assert all(order.index(other) < order.index(room) for other in row["imports"]), room
    present = {name_of(path).partition(".")[0] for path in MODULES} - {"__init__", "__main__"}
    assert present == {*order}


def test_the_architecture_page_shows_the_table():
    draw = runpy.run_path(str(ROOT / "docs" / "draw_imports.py"))
    assert (ROOT / "docs" / "architecture.md").read_text() == draw["page"](), "run docs/draw_imports.py"


def test_no_module_imports_in_a_circle():
    """Imports inside functions count, those for type checkers too: a circle is a circle."""
    known = {f"kvp.{name_of(path).removesuffix('.__init__')}": path for path in MODULES}
    graph = {name: imports(path) & known.keys() - {name} for name, path in known.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_every_package_is_in_the_wheel():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    files = [file for top in ("kvp", "hydra_plugins") for file in (ROOT / top).rglob("*.py")]
    assert {".".join(file.parent.relative_to(ROOT).parts) for file in files} <= {*named}


def test_one_method_never_imports_another():
    methods = sorted((ROOT / "kvp" / "strategies" / "methods").glob("*.py"))
    assert len(methods) > 20
    for path in methods:
        others = {name for name in imports(path) if name.startswith("kvp.strategies.methods")}
        assert not others, f"{name_of(path)} imports {others}"


def test_every_strategy_yaml_has_its_module():
    def target(path):
        lines = path.read_text().splitlines()
        own = [line.split()[1] for line in lines if line.startswith("_target_: ")]
        return (
            own[0]
            if own
            else target(path.with_stem(lines[lines.index("defaults:") + 1].removeprefix("  - ")))
        )

    for path in (ROOT / "conf" / "strategy").glob("*.yaml"):
        assert (ROOT / f"{target(path).rpartition('.')[0].replace('.', '/')}.py").exists()
