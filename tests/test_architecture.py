"""Imports go one way, third-party giants stand behind one module each, and nothing names this machine."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "kvp").rglob("*.py"))

ALLOWED = {
    "types": set(),
    "stage": set(),
    "tracking": set(),
    "provenance": set(),
    "models": {"models", "types"},
    "data": {"data", "types"},
    "strategies": {"strategies", "models", "types"},
    "recovery": {"recovery", "data", "types"},
    "evaluation": {"evaluation", "data", "models", "types"},
    "export": {"export", "models", "types"},
    "check": {"export"},
    "measurement": {"measurement", "models", "types"},
    "report": {"report", "tracking", "types"},
    "status": {"sweep"},
    "bench": {
        "__main__",
        "bench",
        "data",
        "experiment",
        "export",
        "measurement",
        "models",
        "provenance",
        "report",
        "stage",
        "steps",
        "strategies",
        "types",
    },
}
BEHIND = {
    "wandb": {"tracking"},
    "lm_eval": {"evaluation.zeroshot"},
    "jinja2": {"report.html"},
    "gguf": {"export.gguf_file", "export.gguf_tokens"},
    "llama_cpp": {"bench.llama_cpp_engine", "export.engine_llama_cpp"},
    "vllm": {"export.engine_vllm"},
    "optuna": {"strategies.adapruner"},
    "peft": {"recovery.fit", "recovery.merge"},
    "hydra": {"__main__", "experiment", "sweep.jobs", "sweep.sweep", "bench.chosen"},
    "omegaconf": {"__main__", "experiment", "sweep.jobs"},
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
        assert parts <= ALLOWED[part], f"{name} imports {parts - ALLOWED[part]}"
    for package, owners in BEHIND.items():
        if package in {module.partition(".")[0] for module in imported}:
            assert name in owners, f"only {owners} may import {package}"
    assert "utils" not in name


def test_every_package_is_in_the_wheel():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    files = [file for top in ("kvp", "hydra_plugins") for file in (ROOT / top).rglob("*.py")]
    assert {".".join(file.parent.relative_to(ROOT).parts) for file in files} <= {*named}


def test_one_strategy_never_imports_another():
    leaves = {
        "kvpruner",
        "kvpruner_plus",
        "magnitude",
        "random",
        "none",
        "llm_pruner",
        "adapruner",
        "shortened_llm",
        "shortgpt",
        "sleb",
        "flap",
        "wanda_sp",
        "numerical",
        "think",
        "llm_bip",
        "nirvana",
        "magnitude_sparse",
        "wanda",
        "sparsegpt",
        "alps",
        "mosaic",
        "search_llm",
        "slicegpt",
        "regrow",
    }
    for path in (ROOT / "kvp" / "strategies").glob("*.py"):
        if path.stem in leaves:
            assert not {f"kvp.strategies.{leaf}" for leaf in leaves} & imports(path)


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
