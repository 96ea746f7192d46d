"""Housekeeping of a store: what may go, what must stay and why, and removals that a kill leaves whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from kvp.store.contents import Entry, Key, Run, users
from kvp.store.locks import beside, locked_now
from kvp.store.manifest import on_disk, sync

STALE = 7 * 86400.0  # seconds after which nobody goes on with an unfinished stage
COMPANIONS = ("holder", "attempts", "lock")  # files beside a stage; the lock goes last


@dataclass(frozen=True)
class Verdict:
    """Whether a stage goes, and why."""

    entry: Entry
    goes: bool
    why: str


def verdicts(
    found: Sequence[Entry],
    runs: Sequence[Run],
    *,
    older_than: float | None = None,
    keep_unreferenced: bool = False,
    in_use: bool = False,
) -> list[Verdict]:
    """Return what gc would do with each stage.

    Args:
        found: Stages of the store.
        runs: Runs that may need them.
        older_than: Age in seconds below which everything stays; None: only unfinished stages must be a week old.
        keep_unreferenced: Whether finished stages stay that no run needs.
        in_use: Whether a process uses the store: it may have found what its run.json does not name yet.
    """
    needed = users(runs)
    unread = [run.path for run in runs if run.status == "unreadable"]
    present = {entry.key for entry in found if entry.state == "finished"}

    def judge(entry: Entry) -> Verdict:
        if entry.state == "being computed":
            return Verdict(entry, False, "a process computes it")
        if entry.state == "removed":
            return Verdict(entry, True, "left of a removal that was killed")
        if entry.in_place and entry.key in needed:
            return Verdict(entry, False, f"{len(needed[entry.key])} runs need it")
        if entry.state == "unfinished" and entry.key not in present:
            limit, why = STALE if older_than is None else older_than, "unfinished, and nobody goes on with it"
        elif entry.in_place:
            limit, why = older_than or 0.0, "no run needs it"
            if reason := _kept(keep_unreferenced, in_use, unread):
                return Verdict(entry, False, f"no run needs it, but {reason}")
        else:
            limit, why = older_than or 0.0, f"{entry.state}, and no run looks there"
        if entry.age is None or entry.age < limit:
            return Verdict(entry, False, "it is too new")
        return Verdict(entry, True, why)

    return [judge(entry) for entry in found]


def _kept(asked: bool, in_use: bool, unread: Sequence[Path]) -> str:
    """Return why finished stages stay that no run needs; empty if they go."""
    if asked:
        return "it is to be kept"
    if in_use:
        return "a process uses the store"
    return f"{unread[0]} cannot be read" if unread else ""


def owned(run: Run, runs: Iterable[Run], also_gone: Iterable[Run] = ()) -> set[Key]:
    """Return the stages that a run needs and no other does, but those that go with it."""
    gone = {run.path, *(other.path for other in also_gone)}
    needed = users(other for other in runs if other.path not in gone)
    return {key for key in run.stages if key not in needed}


def sizes(run: Run, runs: Sequence[Run], found: Mapping[Key, Entry]) -> tuple[int, int, int]:
    """Return the bytes of a run's own stages and of those that it shares, and how many are not in the store."""
    own = owned(run, runs)
    present = [key for key in run.stages if key in found]
    shared = sum(found[key].bytes for key in present if key not in own)
    return sum(found[key].bytes for key in present if key in own), shared, len(run.stages) - len(present)


def remove(entry: Entry) -> bool:
    """Remove a stage, whole or not at all; a link goes, not where it leads. Return False if a process computes it.

    Raises:
        StageError: The disk refuses.
    """
    with on_disk(entry.path), locked_now(entry.final) as free:
        if free:
            discard(entry.path, entry.final)
        return free


def discard(path: Path, final: Path) -> None:
    """Rename a path to a hidden name of `final`, then delete it: it is never half there."""
    aside = path
    if not path.name.startswith(f".{final.name}.removed-"):
        names = (beside(final, f"removed-{number}") for number in count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        path.rename(aside)
        sync(aside.parent)
    _delete(aside)


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def tidy(root: Path, found: Iterable[Entry]) -> None:
    """Remove the files beside stages that are gone, and folders without stages; nobody else may use the store."""
    folders = {entry.path.parent for entry in found}
    kept = {entry.final for entry in found if os.path.lexists(entry.path)}
    for final in {_final_of(file) for folder in folders for file in _companions(folder)} - kept:
        with on_disk(final), locked_now(final) as free:
            for suffix in COMPANIONS if free else ():
                beside(final, suffix).unlink(missing_ok=True)
    for folder in folders:
        with suppress(OSError):  # it is not empty
            while folder != root:
                folder.rmdir()
                folder = folder.parent


def tidy_runs(directories: Iterable[Path]) -> None:
    """Remove what killed removals and writers of run.json left; no process may use the store of these runs."""
    for directory in directories:
        for path in [*directory.rglob(".*.removed-*"), *directory.rglob(".run.json.*.partial")]:
            with on_disk(path):
                _delete(path)


def _companions(folder: Path) -> Iterator[Path]:
    for suffix in COMPANIONS:
        yield from folder.glob(f".????????????????.{suffix}")


def _final_of(companion: Path) -> Path:
    return companion.with_name(companion.name.split(".")[1])
