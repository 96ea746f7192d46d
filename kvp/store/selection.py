"""Targets of a removal: the runs and stages that words of a command name, and what speaks against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kvp.nearest import did_you_mean
from kvp.store.contents import Entry, Run, users
from kvp.store.housekeeping import owned

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Selection:
    """Runs, and stages: those that are named and those that only the runs need."""

    runs: tuple[Run, ...]
    entries: tuple[Entry, ...]


def select(targets: Sequence[str], found: Sequence[Entry], runs: Sequence[Run], *, force: bool) -> Selection:
    """Return what words name: a run by name or directory, a stage by kind/name, name or directory.

    Raises:
        ValueError: A word names nothing or several things, a run works, a stage is being computed, or others need it.
    """
    chosen: dict[Path, Run] = {}
    stages: dict[Path, Entry] = {}
    for target in targets:
        if matching := [run for run in runs if _names_run(target, run)]:
            chosen[_only(target, matching).path] = matching[0]
        elif fitting := [entry for entry in found if _names_stage(target, entry)]:
            stages[_only(target, fitting).path] = fitting[0]
        else:
            raise ValueError(_nothing(target, found, runs))
    gone = tuple(chosen.values())
    if not force:
        _check_runs(gone, runs)
        _check_needed(tuple(stages.values()), [run for run in runs if run.path not in chosen])
    own = {key for run in gone for key in owned(run, runs, gone)}
    stages |= {entry.path: entry for entry in found if entry.in_place and entry.key in own}
    if busy := [entry for entry in stages.values() if entry.state == "being computed"]:
        raise ValueError(f"a process computes {busy[0].kind}/{busy[0].digest} now: end it first")
    return Selection(gone, tuple(stages.values()))


def _names_run(target: str, run: Run) -> bool:
    return target == run.name or Path(target).resolve() in (run.path.resolve(), run.path.parent.resolve())


def _names_stage(target: str, entry: Entry) -> bool:
    words = (entry.path.name, f"{entry.kind}/{entry.path.name}")
    return target.rstrip("/") in words or Path(target).absolute() == entry.path.absolute()


def _only(target: str, matching: Sequence[Thing]) -> Thing:
    if len(matching) > 1:
        raise ValueError(f"{target} names {len(matching)} things: give the directory instead")
    return matching[0]


def _nothing(target: str, found: Sequence[Entry], runs: Sequence[Run]) -> str:
    names = [*(run.name for run in runs), *(f"{entry.kind}/{entry.path.name}" for entry in found)]
    hint = did_you_mean(target, names, most=2) or " python -m kvp.store ls shows the names."
    return f"there is no run or stage {target!r}.{hint}"


def _check_runs(chosen: Sequence[Run], runs: Sequence[Run]) -> None:
    if working := [run for run in chosen if run.is_running]:
        raise ValueError(
            f"{working[0].name} runs, as {working[0].host} pid {working[0].pid}: end it first, or --force if that "
            "process is gone"
        )
    unread = [run for run in runs if run.status == "unreadable" and run not in chosen]
    if chosen and unread:
        raise ValueError(
            f"{unread[0].path} cannot be read ({unread[0].fault}), so nobody knows which stages it needs: mend or "
            "delete it, or --force"
        )


def _check_needed(stages: Sequence[Entry], others: Sequence[Run]) -> None:
    needed = users(others)
    for entry in stages:
        if entry.in_place and (names := needed.get(entry.key)):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{entry.kind}/{entry.digest} is needed by {names[0]}{more}: remove them too, or --force (their "
                "commands compute it again)"
            )
