"""Contents of a store as housekeeping sees them: every stage with its state and bytes, and the runs that use it.

Nothing is written. What other users or a kill left is a state or a fault, never an error.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from kvp.store.locks import IN_USE, is_held
from kvp.store.manifest import MANIFEST, check_files, read_manifest

State = Literal["finished", "being computed", "unfinished", "corrupt", "replaced", "removed"]
Key = tuple[str, str]  # the kind of a stage, and the beginning of its fingerprint, which is its name

DIGEST = re.compile(r"[0-9a-f]{16}")
HIDDEN = re.compile(r"\.([0-9a-f]{16})\.(partial|corrupt-\d+|replaced-\d+|removed-\d+)")
STATES: dict[str, State] = {"corrupt": "corrupt", "replaced": "replaced", "removed": "removed"}


@dataclass(frozen=True)
class Entry:
    """A stage in a store, whole or not.

    Attributes:
        kind: Its folder, such as "evaluate/perplexity/squad".
        digest: Name of its directory when it is finished.
        written: When its newest file was written (seconds since 1970, by the clock of that host).
        fault: Why it is corrupt, or where its link leads; empty if nothing is to be said.
    """

    path: Path
    kind: str
    digest: str
    state: State
    bytes: int
    written: float
    fault: str = ""

    @property
    def key(self) -> Key:
        """Return what a run calls it."""
        return self.kind, self.digest

    @property
    def final(self) -> Path:
        """Return where it is when it is finished."""
        return self.path.with_name(self.digest)

    @property
    def in_place(self) -> bool:
        """Return whether it lies where a run looks for it."""
        return self.path == self.final

    @property
    def age(self) -> float | None:
        """Return the seconds since it was written; None: a clock was wrong, it is from the future."""
        age = time.time() - self.written
        return max(age, 0) if age > -60 else None


@dataclass(frozen=True)
class Run:
    """A run.json and the stages that it names.

    Attributes:
        status: "running", "finished", "failed", or "unreadable".
        fault: Why it cannot be read.
    """

    path: Path
    status: str
    stages: frozenset[Key]
    host: str | None = None
    pid: int | None = None
    fault: str = ""

    @property
    def name(self) -> str:
        """Return the name of its directory."""
        return self.path.parent.name

    @property
    def is_running(self) -> bool:
        """Return whether its process works, or may work: another host's processes are not seen."""
        if self.status != "running" or self.pid is None:
            return False
        return is_alive(self.host, self.pid, self.path.stat().st_mtime) is not False


def entries(root: Path, *, whole: bool = False) -> list[Entry]:
    """Return the stages of a store, sorted; `whole` reads every file instead of comparing sizes."""
    return sorted(_entries(root, root, whole, set()), key=lambda entry: (entry.kind, entry.path.name))


def is_store(root: Path, found: Iterable[Entry]) -> bool:
    """Return whether a directory is a store, so that what lies there may be removed."""
    return (root / IN_USE).is_file() or any(entry.state == "finished" for entry in found)


def runs_in(directories: Iterable[Path]) -> list[Run]:
    """Return the runs below directories, sorted by name; hidden ones are being removed."""
    files = {
        file.resolve(): file
        for directory in directories
        for file in below(directory, links=True)
        if file.name == "run.json"
        and not any(part.startswith(".") for part in file.relative_to(directory).parts)
    }
    return sorted(map(_run, files.values()), key=lambda run: run.name)


def below(directory: Path, *, links: bool = False) -> Iterator[Path]:
    """Yield the files and directories below one; what goes while it is walked is left out.

    With `links`, directories that are links are walked too, each directory once.
    """
    seen: set[str] = set()
    for folder, directories, files in os.walk(directory, followlinks=links):
        if links and (place := os.path.realpath(folder)) in seen:
            directories.clear()
            continue
        elif links:
            seen.add(place)
        yield from (Path(folder, name) for name in (*directories, *files))


def users(runs: Iterable[Run]) -> Mapping[Key, list[str]]:
    """Return the names of the runs that need each stage."""
    found = defaultdict(list)
    for run in runs:
        for key in run.stages:
            found[key].append(run.name)
    return found


def is_alive(host: str | None, pid: int, since: float) -> bool | None:
    """Return whether a process that ran at a time (seconds since 1970) still runs; None if it is another machine's."""
    if host != socket.gethostname():
        return None
    try:
        process = psutil.Process(pid)
        return process.create_time() <= since + 1 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError, OverflowError):  # the latter two: no number of a process
        return False
    except psutil.Error:
        return None


def _entries(root: Path, folder: Path, whole: bool, seen: set[str]) -> Iterator[Entry]:
    if (real := os.path.realpath(folder)) in seen:  # a link that leads back
        return
    seen.add(real)
    kind = folder.relative_to(root).as_posix()
    for path in _inside(folder):
        if entry := _look(path, kind, whole):
            yield entry
        elif path.is_dir() and not path.name.startswith(".") and not DIGEST.fullmatch(path.name):
            yield from _entries(root, path, whole, seen)


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:  # it has just gone
        return []


def _look(path: Path, kind: str, whole: bool) -> Entry | None:
    """Return a path as an entry; None if it is none, or has just gone: a process may be at work."""
    try:
        if hidden := HIDDEN.fullmatch(path.name):
            digest, suffix = hidden.groups()
            return _entry(path, kind, digest, STATES.get(suffix.partition("-")[0]) or _progress(path, digest))
        if DIGEST.fullmatch(path.name):
            fault = _fault(path, kind, whole)
            return _entry(path, kind, path.name, "corrupt" if fault else "finished", fault)
    except FileNotFoundError:
        pass
    return None


def _progress(partial: Path, digest: str) -> State:
    return "being computed" if is_held(partial.with_name(digest)) else "unfinished"


def _entry(path: Path, kind: str, digest: str, state: State, fault: str = "") -> Entry:
    if path.is_symlink():
        fault = fault or f"a link to {os.readlink(path)}"
    sizes, times = [0], [0.0]
    manifest = path / MANIFEST
    for file in [path] if path.is_symlink() else [path, *below(path)]:
        try:
            stat = file.lstat()
        except OSError:  # a process is at work there
            continue
        sizes.append(0 if file.is_dir() else stat.st_size)
        times.append(stat.st_mtime)
    written = manifest.stat().st_mtime if state == "finished" else max(times)
    return Entry(path, kind, digest, state, sum(sizes), written, fault)


def _fault(path: Path, kind: str, whole: bool) -> str:
    """Return what is wrong with a stage where a run looks for it."""
    try:
        manifest = read_manifest(path)
        check_files(path, manifest["files"], whole=whole)
    except ValueError as error:
        return str(error)
    if (manifest.get("stage"), manifest["fingerprint"][:16]) != (kind, path.name):
        return f"it is the stage {manifest.get('stage')}/{manifest['fingerprint'][:16]}"
    return ""


def _run(path: Path) -> Run:
    try:
        data: Any = json.loads(path.read_bytes())
        stages = frozenset((each["name"], each["fingerprint"][:16]) for each in data["stages"])
        status, host, pid = str(data["status"]), data.get("host"), data.get("pid")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return Run(path, "unreadable", frozenset(), fault=f"{type(error).__name__}: {error}")
    return Run(path, status, stages, host, pid if isinstance(pid, int) else None)
