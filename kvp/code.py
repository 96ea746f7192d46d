"""Source code behind a result: the modules that a piece of work runs, and those of them that nobody committed.

    modules = reachable(["mypkg.my_strategy", "kvp.models.surgery"])
    digest(modules)  # another value as soon as one of these files changes
    edits(modules)   # {"mypkg.my_strategy": "9f86d08..."}: code that no commit of kvp names

A module is read, never imported. Modules of kvp are followed, and those of a user's own code: whatever is neither the
standard library nor an installed package. A committed file of kvp stands for itself: its stage has a version.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OWN = ("kvp", "hydra_plugins")
HERE = Path(__file__).resolve().parent
TREE = HERE.parent  # the checkout, or site-packages
STDLIB = Path(sysconfig.get_path("stdlib")).resolve()
INSTALLED = {"site-packages", "dist-packages"}  # folders that installers write to

Modules = Mapping[str, Path]


def reachable(roots: Iterable[str], alone: Iterable[str] = ()) -> dict[str, Path]:
    """Return the modules of kvp and of users that some modules import, directly or not, with their files.

    Args:
        roots: Names of modules, or of classes and functions in them.
        alone: Names of modules whose imports are not followed.
    """
    roots, alone = tuple(roots), tuple(alone)
    known = _reached.get((roots, alone))
    if known is None or digest(known[0]) != known[1]:  # an import may have come or gone
        found = _search(roots, alone)
        known = _reached[roots, alone] = found, digest(found)
    return known[0]


def _search(roots: Iterable[str], alone: Iterable[str]) -> dict[str, Path]:
    waiting, found = [each for name in roots for each in _with_packages(_module(name))], {}
    tops = {name.partition(".")[0] for name in waiting}
    for name in map(_module, alone):
        if file := _file(name):
            found[name] = file
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if name in found or (top not in (*OWN, *tops) and _is_installed(top)):
            continue
        if file := _file(name):
            found[name] = file
            waiting += _imports(name, file)
    return dict(sorted(found.items()))


def digest(modules: Modules) -> str:
    """Return one sha256 (hex) of the source of all modules."""
    lines = "".join(f"{name} {_sha256(name, file)}\n" for name, file in modules.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def edits(modules: Modules) -> dict[str, str]:
    """Return the sha256 (hex) of every module that is not kvp's committed or released code."""
    return {
        name: _sha256(name, file)
        for name, file in modules.items()
        if name.partition(".")[0] not in OWN or not _is_released(name, file)
    }


def commit() -> dict[str, Any]:
    """Return the commit of the checkout, whether its code was edited since, and a sha256 (hex) of the edits.

    All are None outside a checkout: an installed wheel has its version.
    """
    changed = _changed_since_commit()
    if changed is None:
        return {"commit": None, "dirty": None, "dirty_sha256": None}
    files = {path: TREE / path for path in sorted(changed)}
    texts = "".join(f"{path} {_hashed(file) if file.is_file() else None}\n" for path, file in files.items())
    hashed = hashlib.sha256(texts.encode()).hexdigest() if changed else None
    return {"commit": _git("rev-parse", "HEAD").strip(), "dirty": bool(changed), "dirty_sha256": hashed}


def _module(name: str) -> str:
    """Return the module that a dotted name names, or the one that holds it."""
    while "." in name and _file(name) is None:
        name = name.rpartition(".")[0]
    return name


@cache
def _file(name: str) -> Path | None:
    """Return the source of a module; None if there is no such module, or it has none. Nothing is imported."""
    top, *below = name.split(".")
    for place in _places(top):
        whole = place.joinpath(*below)
        for file in (whole / "__init__.py", whole.with_suffix(".py"), whole):
            if file.is_file():
                return file
    return None


@cache
def _places(top: str) -> tuple[Path, ...]:
    """Return the directories of a top-level package, or its one file; none for what has no source."""
    if top in OWN:
        return (TREE / top,)
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return ()
    if spec is None:
        return ()
    if spec.submodule_search_locations:
        return tuple(Path(place).resolve() for place in spec.submodule_search_locations)
    return (Path(spec.origin).resolve(),) if spec.origin and spec.origin.endswith(".py") else ()


@cache
def _is_installed(top: str) -> bool:
    """Return whether a package is the standard library's, or an installed one; what has no source counts as one."""
    places = _places(top)
    ours = [place for place in places if not (place.is_relative_to(STDLIB) or INSTALLED & {*place.parts})]
    return not ours or top in _distributed()


@cache
def _distributed() -> frozenset[str]:
    """Return the top-level packages that installed distributions name, wherever they lie."""
    return frozenset(packages_distributions())


def _imports(name: str, file: Path) -> Iterator[str]:
    """Yield the modules that a file imports, anywhere in it, and the packages that they are in."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in _import_nodes(file, _sha256(name, file)):
        if isinstance(node, ast.Constant):
            names = [str(node.value)] if _file(str(node.value)) else []
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for full in names:
            yield from _with_packages(full)


def _with_packages(name: str) -> Iterator[str]:
    """Yield the packages that a module is in, which Python runs before it, and the module."""
    parts = name.split(".")
    yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


@cache
def _import_nodes(file: Path, sha256: str) -> list[Any]:
    """Return the imports of a file, and the strings that may name a module: import_module("mypkg.rule")."""
    try:
        nodes = list(_running(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):  # a module that nobody can import imports nothing
        return []
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) or _may_name(node, file)]


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a tree; what stands under `if TYPE_CHECKING:` runs never."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from _running(other)
        else:
            yield from _running(child)


def _may_name(node: ast.AST, file: Path) -> bool:
    """Return whether a node is a dotted name in a user's own code; kvp itself imports nothing by such names."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or file.is_relative_to(HERE):
        return False
    return "." in node.value and all(part.isidentifier() for part in node.value.split("."))


_reached: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[dict[str, Path], str]] = {}
_seen: dict[str, tuple[Any, str]] = {}  # the spec that a module was loaded by, and its source then


def _sha256(name: str, file: Path) -> str:
    """Return the sha256 (hex) of a module's source when it was loaded: an edit changes nothing in this process."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if name not in _seen or _seen[name][0] is not spec:
        _seen[name] = spec, _hashed(file)
    return _seen[name][1]


def _hashed(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _is_released(name: str, file: Path) -> bool:
    """Return whether a file of kvp is as it was committed, or as its wheel brought it."""
    path = file.relative_to(TREE).as_posix()
    changed = _changed_since_commit()
    if changed is not None:
        return path not in changed
    return _wheel().get(path) == _sha256(name, file)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=TREE, capture_output=True, text=True, check=True)
    return done.stdout


@cache
def _changed_since_commit() -> frozenset[str] | None:
    """Return the modules of kvp that differ from HEAD, are new or gone, as paths below `TREE`; None outside a checkout.

    Files are compared with HEAD's themselves: what git was told to ignore is code, too.
    """
    try:
        lines = _git("ls-tree", "-r", "-z", "HEAD", "--", *OWN).split("\0")
    except (OSError, subprocess.CalledProcessError):
        return None
    committed = {
        path: facts.split()[2] for facts, _, path in (line.partition("\t") for line in lines if line)
    }
    if "kvp/__init__.py" not in committed:
        return None
    present = {file.relative_to(TREE).as_posix() for own in OWN for file in (TREE / own).rglob("*.py")}
    modules = {path for path in committed if path.endswith(".py")}
    changed = {path for path in present & modules if _blob(TREE / path, committed[path]) != committed[path]}
    return frozenset(changed | (present ^ modules))


def _blob(file: Path, like: str) -> str:
    """Return the id that git gives a file's content, by the hash of another id: sha1 or sha256."""
    data = file.read_bytes()
    return hashlib.new("sha1" if len(like) == 40 else "sha256", b"blob %d\0" % len(data) + data).hexdigest()


@cache
def _wheel() -> dict[str, str]:
    """Return the sha256 (hex) of the files that a wheel of kvp brought, by path; none if it is not installed."""
    try:
        files = distribution("kvp").files or []
    except PackageNotFoundError:
        return {}
    hashes = {file.as_posix(): file.hash.value for file in files if file.hash and file.hash.mode == "sha256"}
    return {path: base64.urlsafe_b64decode(value + "=").hex() for path, value in hashes.items()}
