"""Packages, launchers, engines, assets and plugins of this environment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, requires, version
from importlib.util import find_spec

import yaml
from packaging.requirements import Requirement

import kvp
from kvp.assets import DATA, INSTALL, MODEL
from kvp.doctor.finding import Finding, State, either
from kvp.plugins import CONF, installed
from kvp.trust import find

EXTRAS = {  # of pyproject.toml, with a module and its use
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "launcher=joblib, several processes on this machine"),
    "slurm": ("hydra_plugins.hydra_submitit_launcher", "launcher=submitit_local, launcher=submitit_slurm"),
    "ray": ("ray", "launcher=ray, several machines"),
}
ENGINES = {
    "llama_cpp": ("checking a GGUF", "pip install 'kvp[gguf]'"),
    "vllm": ("kvp check DIR --engine vllm", "make serve-env: an environment of its own, for --python"),
}
ASSETS = {MODEL: "model=smollm2_135m", DATA: "packaged corpora and zero-shot tasks"}


def packages() -> Iterator[Finding]:
    """Yield the version of each package that kvp needs, against its range."""
    yield Finding("packages", "kvp", "ok", kvp.__version__)
    yield Finding("packages", "Python", "ok", sys.version.split()[0])
    try:
        needed = [Requirement(line) for line in requires("kvp") or ()]
    except PackageNotFoundError:
        yield Finding(
            "packages", "ranges", "missing", "kvp runs from a folder", "pip install -e . checks versions"
        )
        return
    for each in needed:
        if each.marker and not each.marker.evaluate():  # of an extra
            continue
        try:
            there = version(each.name)
        except PackageNotFoundError:
            yield Finding("packages", each.name, "BROKEN", "not installed", f"pip install '{each}'")
            continue
        fits = each.specifier.contains(there, prereleases=True)
        fix = "" if fits else f"kvp needs {each.specifier}: pip install '{each}'"
        yield Finding("packages", each.name, "ok" if fits else "BROKEN", there, fix)


def launchers() -> Iterator[Finding]:
    """Yield the launchers of sweeps."""
    for extra, (module, meaning) in EXTRAS.items():
        there = _has(module)
        yield either("launchers", extra, there, _said(there), f"{meaning}: pip install 'kvp[{extra}]'")


def engines(pythons: list[str]) -> Iterator[Finding]:
    """Yield the engines here, and in the environments of other interpreters."""
    for module, (meaning, way) in ENGINES.items():
        there = _has(module)
        yield either("engines", module, there, _said(there), f"{meaning}: {way}")
        for python in pythons:
            yield _elsewhere(python, module, meaning)


def _elsewhere(python: str, module: str, meaning: str) -> Finding:
    """Return whether another interpreter has an engine."""
    ask = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    name = f"{module} in {python}"
    try:
        there = subprocess.run([python, "-I", "-c", ask], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("engines", name, "missing", "no Python", f"it does not start: {error}")
    return either("engines", name, there, _said(there), f"{meaning}: install it there")


def _has(module: str) -> bool:
    """Return whether a module is there; it is not imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of its package
        return False


def _said(there: bool) -> str:
    return "installed" if there else "not installed"


def assets() -> Iterator[Finding]:
    """Yield the wheels with the packaged model and texts."""
    for name, meaning in ASSETS.items():
        try:
            yield Finding("assets", name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding("assets", name, "missing", "not installed", f"{meaning}: {INSTALL}")
    for file in sorted((CONF / "model").glob("*.yaml")):
        wheels = yaml.safe_load(file.read_text()).get("wheels", ())
        if wheels:
            yield either("assets", f"model={file.stem}", *_wheels(wheels))


def _wheels(wheels: Sequence[str]) -> tuple[bool, str, str]:
    """Return whether all wheels of a packaged model are here, how many, and how to get them."""
    names = [wheel.partition("==")[0] for wheel in wheels]
    here = sum(bool(list(Distribution.discover(name=name))) for name in names)
    return here == len(names), f"{here} of {len(names)} wheels", f"pip install --no-deps {' '.join(wheels)}"


def plugins() -> Iterator[Finding]:
    """Yield each strategy of each installed plugin, and whether its class loads."""
    from kvp.strategies.base import Strategy

    for plugin in installed():
        for option, target in plugin.strategies.items():
            fault = plugin.fault and plugin.left_out
            if not fault:
                try:
                    made = find(f"strategy={option}", target, ())
                    if not (isinstance(made, type) and issubclass(made, Strategy)):
                        fault = f"{target} is no Strategy: pip uninstall {plugin.distribution}"
                except ValueError as error:
                    fault = str(error)
            state: State = "missing" if fault else "ok"
            yield Finding("plugins", f"strategy={option}", state, plugin.distribution, fault)
