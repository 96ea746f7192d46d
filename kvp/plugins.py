"""Plugins: installed packages that bring strategies, and with them options of any group.

    [project.entry-points."kvp.strategies"]
    key_norm = "kvp_keynorm.method:KeyNorm"

The folder `conf` of the package joins the options of kvp: `kvp_keynorm/conf/strategy/key_norm.yaml` is
`strategy=key_norm`. A plugin with a fault is left out whole, and says so where one of its options is asked for.
Nothing here imports a plugin.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

import yaml

GROUP = "kvp.strategies"
HERE = Path(__file__).resolve().parent
CONF = next(path for path in (HERE / "conf", HERE.parent / "conf") if path.is_dir())


@dataclass(frozen=True)
class Plugin:
    """A package that an installed distribution announces.

    Attributes:
        distribution: The name by which pip knows it.
        package: The top-level package of its classes.
        strategies: The class of each strategy, as `package.module.Class`.
        conf: The folder of its options.
        fault: Why it is left out; empty if it is sound.
    """

    distribution: str
    package: str
    strategies: dict[str, str]
    conf: Path
    fault: str = ""

    @property
    def left_out(self) -> str:
        """Return the line that names the fault and the way out."""
        return (
            f"the plugin {self.distribution} is left out: {self.fault}; update it, or pip uninstall "
            f"{self.distribution}"
        )


@cache
def installed() -> tuple[Plugin, ...]:
    """Return the plugins of this environment, in the order of their distributions' names."""
    announced: dict[tuple[str, str], list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        distribution = point.dist.name if point.dist else "?"
        announced.setdefault((distribution, point.value.partition(":")[0].partition(".")[0]), []).append(
            point
        )
    found: list[Plugin] = []
    for (distribution, package), points in sorted(announced.items()):
        conf = _conf(package)
        strategies = {point.name: point.value.replace(":", ".") for point in points}
        fault = next(_faults(package, points, conf, found), "")
        found.append(Plugin(distribution, package, strategies, conf or Path(package, "conf"), fault))
    return tuple(found)


def sound() -> list[Plugin]:
    """Return the plugins whose options join."""
    return [plugin for plugin in installed() if not plugin.fault]


def lacking(group: str, option: str) -> Plugin | None:
    """Return the plugin that would have an option, if it were not left out."""
    for plugin in installed():
        if plugin.fault and (
            (group == "strategy" and option in plugin.strategies)
            or (plugin.conf / group / f"{option}.yaml").is_file()
        ):
            return plugin
    return None


def owner(name: str) -> str:
    """Return words that name the plugin of a module or class, for the end of an error; empty for other code."""
    package = name.partition(".")[0]
    names = [plugin.distribution for plugin in installed() if plugin.package == package]
    return f". It is of the plugin {names[0]}: update it, or pip uninstall {names[0]}" if names else ""


def _conf(package: str) -> Path | None:
    """Return the folder of options of a top-level package; None if it has none."""
    spec = find_spec(package) if package.isidentifier() else None
    folders = [Path(place, "conf") for place in (spec and spec.submodule_search_locations) or ()]
    return next((folder.resolve() for folder in folders if folder.is_dir()), None)


def _brings(distribution: Distribution | None, package: str) -> bool:
    """Return whether a distribution lists a package; an editable one may list none, outside site-packages."""
    if distribution is None:
        return False
    named = (distribution.read_text("top_level.txt") or "").split()
    spec = find_spec(package) if package.isidentifier() else None
    place = Path(spec.origin) if spec and spec.origin else Path("/nowhere")
    listed = package in (*named, *(file.parts[0] for file in distribution.files or ()))
    return listed or not {"site-packages", "dist-packages", "nowhere"} & {*place.parts}


def _faults(package: str, points: list[EntryPoint], conf: Path | None, others: list[Plugin]) -> Iterator[str]:
    """Yield why a plugin cannot join."""
    for point in points:
        if not (point.module and point.attr and point.module.replace(".", "").isidentifier()):
            yield f"its entry point {point.name} = {point.value} is no class such as mypkg.module:Class"
    if package in sys.stdlib_module_names or package == "kvp" or not _brings(points[0].dist, package):
        yield f"its entry point names {package}, which is not its own package"
    if conf is None:
        yield f"{package} has no folder conf: its options belong there, as package data"
        return
    for point in points:
        if not (conf / "strategy" / f"{point.name}.yaml").is_file():
            yield f"there is no conf/strategy/{point.name}.yaml in {package}"
    for file in sorted(conf.rglob("*.yaml")):
        option = file.relative_to(conf)
        if why := _unreadable(file):
            yield f"its conf/{option} cannot be read ({why})"
        if option.parts[0] == "machine":
            yield f"its conf/{option} would change every run"
        if (CONF / option).is_file():
            yield f"its conf/{option} has the name of an option of kvp"
        for other in others:
            if not other.fault and (other.conf / option).is_file():
                yield f"its conf/{option} has the name of an option of {other.distribution}"


def _unreadable(file: Path) -> str:
    """Return why a file is no YAML; empty if it is."""
    try:
        yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        return " ".join(str(error).split())
    return ""
