"""Imports go one way, third-party giants stand behind one module each, and nothing names this machine."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "kvp").rglob("*.py"))

ALLOWED = {  # what each package may import of kvp, from the bottom up
    "types": set(),
    "identity": set(),
    "options": set(),
    "record": {"results", "upgrade"},
    "schema": {"record", "tables"},
    "tables": set(),
    "results": set(),
    "upgrade": {"identity"},
    "store": set(),
    "tracking": set(),
    "provenance": set(),
    "models": {"models", "types"},
    "data": {"data", "types"},
    "strategies": {"strategies", "models", "types"},
    "recovery": {"recovery", "data", "types"},
    "evaluation": {"evaluation", "data", "models", "types"},
    "measurement": {"measurement", "models", "types"},
    "export": {"export", "models", "types"},
    "report": {"report", "record", "results", "tables", "tracking"},
    "pipeline": {
        "pipeline", "data", "evaluation", "identity", "measurement", "models", "provenance", "recovery", "store",
        "record", "results", "strategies", "tables", "tracking", "types",
    },
    "sweep": {"sweep", "pipeline", "models", "record", "results", "tables", "strategies", "tracking"},
    "bench": {
        "bench", "data", "export", "measurement", "models", "pipeline", "provenance", "report", "store", "strategies",
        "types",
    },
    "check": {"export"},
    "status": {"sweep"},
}  # fmt: skip
BEHIND = {
    "wandb": {"tracking"},
    "lm_eval": {"evaluation.zeroshot"},
    "jinja2": {"report.page.html"},
    "gguf": {"export.gguf_file", "export.gguf_tokens"},
    "llama_cpp": {"bench.llama_cpp.engine", "export.engine_llama_cpp"},
    "vllm": {"export.engine_vllm"},
    "optuna": {"strategies.methods.adapruner"},
    "peft": {"recovery.fit", "recovery.merge"},
    "hydra": {"__main__", "pipeline.experiment", "sweep.jobs", "sweep.sweep"},
    "omegaconf": {"__main__", "pipeline.experiment", "sweep.jobs"},
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "kvp").with_suffix("").parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path):
    name, imported = name_of(path), imports(path)
    part = name.partition(".")[0]
    parts = {module.split(".")[1] for module in imported if module.startswith("kvp.")}
    if part in ALLOWED:
        assert parts <= ALLOWED[part] | {"options"}, f"{name} imports {parts - ALLOWED[part]}"
    for package, owners in BEHIND.items():
        if package in {module.partition(".")[0] for module in imported}:
            assert name in owners, f"only {owners} may import {package}"
    assert "utils" not in name


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
