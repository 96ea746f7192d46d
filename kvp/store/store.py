"""Stages: work done once per fingerprint of its inputs, in a directory that exists only when finished.

    stage = Store(Path("outputs/store")).once("score", {"seed": 0}, lambda directory: {"loss": 3.2})

Below `root/<stage>/`: `<fp>/` is finished, `.<fp>.partial/` being written, `.<fp>.lock` held by the
process that writes, `.<fp>.holder` says who that is, `.<fp>.attempts` who wrote so far, `.<fp>.corrupt-<n>/`
was found damaged, `.<fp>.replaced-<n>/` computed again on demand. A process may die at any moment. Needs a
file system with `flock`: any local disk.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from kvp.cost import measured
from kvp.store.locks import beside, check_alone, locked, share
from kvp.store.manifest import (
    MANIFEST,
    RESULT,
    StageError,
    add_attempt,
    check_files,
    fingerprint,
    on_disk,
    plain,
    read_manifest,
    seal,
    sync,
    why_full,
)

log = logging.getLogger(__name__)

Work = Callable[[Path], Mapping[str, Any] | None]

AGAIN = "it is to be computed again"
CLOCKS_DIFFER = 60  # seconds, of hosts that share a store


@dataclass(frozen=True)
class Finished:
    """A finished stage.

    Attributes:
        result: What its work returned, as JSON gives it back.
        seconds: Time of the process that did the work.
        peak_bytes: Peak memory of that process, see `kvp.cost.measured`.
        found: Whether it was finished before; False: it was computed now.
        origins: What the caller said of each process that had a part in it, the one that finished it last.
    """

    name: str
    fingerprint: str
    path: Path
    result: dict[str, Any]
    seconds: float
    peak_bytes: int | None
    found: bool
    origins: tuple[dict[str, Any], ...] = ()


class Store:
    """Finished stages below one directory, shared by any number of processes.

    Raises:
        StageError: `root` cannot be created or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self._verified: set[Path] = set()
        with on_disk(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as probe:
                probe.write(b"kvp")
            weakref.finalize(self, os.close, share(self.root))

    def once(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        work: Work,
        *,
        version: int = 1,
        resumable: bool = False,
        since: float | None = None,
        origin: Callable[[], Mapping[str, Any]] = dict,
    ) -> Finished:
        """Finds the stage finished, or lets `work` write it; never both, never half.

        Args:
            stage: What is done; may hold a slash ("evaluate/squad").
            inputs: Everything that decides the result, as JSON data.
            work: Writes its files into the directory it is given and returns its result. Raises:
                nothing stays. The names result.json and manifest.json are taken.
            version: Raise it when the code of `work` changes its numbers.
            resumable: Keep the files of a failed or killed attempt for the next one to go on from;
                `work` removes those that are no part of the result.
            since: Compute again what was finished before this moment (seconds since 1970).
            origin: Tells who works, as JSON data for the manifest; it is asked only if there is work to do.

        Raises:
            StageError: The disk is full or refuses to be written.
            TypeError, ValueError: `inputs` or the result are not JSON data, or hold a NaN.
        """
        digest = fingerprint(stage, version, inputs)
        final = self.place(stage, digest)
        found = self._unfit(final, digest, since) is None
        if not found:
            with locked(final):
                unfit = self._unfit(final, digest, since)  # none if another process has just finished it
                found = unfit is None
                if unfit:
                    head: dict[str, Any] = {
                        "stage": stage,
                        "version": version,
                        "inputs": plain(inputs, "inputs"),
                    }
                    partial = _make_way(final, unfit, resumable, since)
                    head["origins"] = _attempts(partial, origin())
                    _finish(partial, final, work, head | {"fingerprint": digest}, resumable)
                    self._verified.add(final)
        facts, result = (json.loads((final / name).read_bytes()) for name in (MANIFEST, RESULT))
        origins = tuple(facts.get("origins", ()))
        return Finished(stage, digest, final, result, facts["seconds"], facts["peak_bytes"], found, origins)

    def place(self, stage: str, digest: str) -> Path:
        """Return the directory of a stage, finished or not."""
        return self.root / stage / digest[:16]

    def stands(self, stage: str, digest: str, since: float | None = None) -> bool:
        """Whether `once` would look for damage only, not compute; reads no file."""
        final = self.place(stage, digest)
        return (final / MANIFEST).exists() and not _older(final, since)

    def _unfit(self, final: Path, digest: str, since: float | None) -> str | None:
        """Why a directory is no finished stage to be used; None: it is."""
        if damage := self._damage(final, digest):
            return damage
        return AGAIN if _older(final, since) else None

    def _damage(self, final: Path, digest: str) -> str | None:
        """Return what is wrong with a finished directory, naming the file; None: nothing. Hash files once."""
        try:
            files = read_manifest(final, digest)["files"]
            if final not in self._verified:
                check_files(final, files)
        except ValueError as error:
            return str(error)
        self._verified.add(final)
        return None


def _older(final: Path, since: float | None) -> bool:
    return since is not None and _written_before(final / MANIFEST, since)


def _written_before(path: Path, since: float) -> bool:
    """Return whether a path is older than a moment; one from the future is, too: a clock was wrong when it came."""
    return not since <= path.stat().st_mtime <= time.time() + CLOCKS_DIFFER


def _make_way(final: Path, unfit: str, resumable: bool, since: float | None) -> Path:
    """Moves an unfit directory aside and returns the one to write in, empty unless resumable."""
    partial = beside(final, "partial")
    with on_disk(final):
        if os.path.lexists(final):
            kind = "replaced" if unfit == AGAIN else "corrupt"
            names = (beside(final, f"{kind}-{n}") for n in count(1))
            aside = next(path for path in names if not os.path.lexists(path))
            log.warning("%s: %s; moved to %s, computing it now", final, unfit, aside.name)
            final.rename(aside)
        foreign = partial.is_symlink() or (partial.exists() and not partial.is_dir())
        if foreign:
            partial.unlink()
        stale = since is not None and partial.exists() and _written_before(partial, since)
        if partial.exists() and (stale or not resumable):
            shutil.rmtree(partial)
        partial.mkdir(exist_ok=True)
    return partial


def _attempts_of(partial: Path) -> Path:
    return partial.with_suffix(".attempts")


def _attempts(partial: Path, origin: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return who works on a stage; before the last those whose files it goes on with."""
    with on_disk(partial):
        goes_on = any(partial.iterdir())
        if _attempts_of(partial).is_symlink():
            _attempts_of(partial).unlink()
        return add_attempt(_attempts_of(partial), plain(origin, "origin"), goes_on=goes_on)


def _finish(partial: Path, final: Path, work: Work, head: dict[str, Any], resumable: bool) -> None:
    """Does the work, and renames its directory once all of it is on the disk."""
    try:
        with measured() as cost:
            result = work(partial)
        with on_disk(partial):
            seal(partial, result or {}, head | cost)
            check_alone(final)
            partial.rename(final)
            _attempts_of(partial).unlink(missing_ok=True)
            sync(final.parent)
    except BaseException as error:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                _attempts_of(partial).unlink(missing_ok=True)
        if not isinstance(error, StageError) and (why := why_full(error)):
            raise StageError(partial, why) from error
        raise
