"""Stages: work done once per fingerprint of its inputs, in a directory that exists only when finished.

    stage = Store(Path("outputs/store")).once("score", {"seed": 0}, lambda directory: {"loss": 3.2})

Below `root/<stage>/`: `<fp>/` is finished, `.<fp>.partial/` being written, `.<fp>.lock` held by the
process that writes, `.<fp>.holder` says who that is, `.<fp>.corrupt-<n>/` was found damaged,
`.<fp>.replaced-<n>/` computed again on demand. A process may die at any moment. Needs a file system
with `flock`: any local disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kvp.cost import measured

log = logging.getLogger(__name__)

Work = Callable[[Path], Mapping[str, Any] | None]

AGAIN = "it is to be computed again"
RESULT, MANIFEST = "result.json", "manifest.json"
DISK_FULL = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]


class StageError(OSError):
    """The store cannot be written; the message names the place and the way out."""

    def __init__(self, path: Path, cause: BaseException) -> None:
        way_out = "Free space or get write access there, or choose another place with store=DIR."
        super().__init__(f"cannot write {path}: {cause}. {way_out}")


@dataclass(frozen=True)
class Finished:
    """A finished stage: its directory, and the mapping its work returned, as JSON gives it back.

    `seconds` and `peak_bytes` (see `kvp.cost.measured`) are those of the process that did the work. `found`
    says that it was finished before; False: it was computed now.
    """

    name: str
    fingerprint: str
    path: Path
    result: dict[str, Any]
    seconds: float
    peak_bytes: int | None
    found: bool


def fingerprint(stage: str, version: int, inputs: Mapping[str, Any]) -> str:
    """The sha256 (hex) of a stage's name, version and inputs as canonical JSON.

    Raises:
        TypeError: A value, or a key, that JSON does not hold (a Path, a tensor); its place is named.
        ValueError: A NaN or an infinity.
    """
    return _sha256({"stage": stage, "version": version, "inputs": _plain(inputs, "inputs")})


class Store:
    """Finished stages below one directory, shared by any number of processes.

    Raises:
        StageError: `root` cannot be created or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self._verified: set[Path] = set()
        with _on_disk(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as probe:
                probe.write(b"kvp")

    def once(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        work: Work,
        *,
        version: int = 1,
        resumable: bool = False,
        since: float | None = None,
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

        Raises:
            StageError: The disk is full or refuses to be written.
            TypeError, ValueError: `inputs` or the result are not JSON data, or hold a NaN.
        """
        digest = fingerprint(stage, version, inputs)
        final = self.place(stage, digest)
        found = self._unfit(final, digest, since) is None
        if not found:
            with _locked(final):
                unfit = self._unfit(final, digest, since)  # none if another process has just finished it
                found = unfit is None
                if unfit:
                    head = {"stage": stage, "version": version, "inputs": _plain(inputs, "inputs")}
                    partial = _make_way(final, unfit, resumable, since)
                    _finish(partial, final, work, head | {"fingerprint": digest}, resumable)
                    self._verified.add(final)
        manifest, result = (json.loads((final / name).read_bytes()) for name in (MANIFEST, RESULT))
        return Finished(stage, digest, final, result, manifest["seconds"], manifest["peak_bytes"], found)

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
            manifest = dict(json.loads((final / MANIFEST).read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            return f"{MANIFEST} cannot be read ({error})"
        if manifest.pop("seal", None) != _sha256(manifest) or manifest["fingerprint"] != digest:
            return f"{MANIFEST} was changed"
        for name, written in {} if final in self._verified else manifest["files"].items():
            try:
                present = _describe(final / name)
            except OSError as error:
                return f"{name} cannot be read ({error})"
            if present != written:
                return f"{name} was changed: it is {present}, {written} was written"
        self._verified.add(final)
        return None


def _older(final: Path, since: float | None) -> bool:
    return since is not None and (final / MANIFEST).stat().st_mtime < since


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON gives it back (tuples become lists), or an error naming the place."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: JSON keys are strings")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: JSON holds finite numbers only; use None for 'no value'")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}, not JSON data (str, number, list, mapping)")


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "size": stream.tell()}


@contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StageError(path, error) from error


@contextmanager
def _locked(final: Path) -> Iterator[None]:
    """Holds the lock of a stage, after waiting for another holder; one that dies lets go of it."""
    lock, holder = FileLock(final.with_name(f".{final.name}.lock")), final.with_name(f".{final.name}.holder")
    with _on_disk(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            who = holder.read_text() if holder.exists() else "another process"
            log.info("waiting for %s, which %s is computing", final, who)
            lock.acquire(poll_interval=0.2)
    try:
        with _on_disk(final):
            holder.write_text(f"{socket.gethostname()} pid {os.getpid()}")
        yield
    finally:
        lock.release()


def _make_way(final: Path, unfit: str, resumable: bool, since: float | None) -> Path:
    """Moves an unfit directory aside and returns the one to write in, empty unless resumable."""
    partial = final.with_name(f".{final.name}.partial")
    with _on_disk(final):
        if final.exists():
            kind = "replaced" if unfit == AGAIN else "corrupt"
            names = (final.with_name(f".{final.name}.{kind}-{n}") for n in count(1))
            aside = next(path for path in names if not path.exists())
            log.warning("%s: %s; moved to %s, computing it now", final, unfit, aside.name)
            final.rename(aside)
        stale = since is not None and partial.exists() and partial.stat().st_mtime < since
        if partial.exists() and (stale or not resumable):
            shutil.rmtree(partial)
        partial.mkdir(exist_ok=True)
    return partial


def _finish(partial: Path, final: Path, work: Work, manifest: dict[str, Any], resumable: bool) -> None:
    """Does the work, and renames its directory once all of it is on the disk."""
    try:
        with measured() as cost:
            result = work(partial)
        with _on_disk(partial):
            _seal(partial, result or {}, manifest | cost)
            partial.rename(final)
            _sync(final.parent)
    except BaseException as error:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        full = any(text in str(error) for text in DISK_FULL)  # safetensors has its own class of error
        if full and not isinstance(error, StageError):
            raise StageError(partial, error) from error
        raise


def _seal(partial: Path, result: Mapping[str, Any], manifest: dict[str, Any]) -> None:
    (partial / RESULT).write_text(json.dumps(_plain(result, "result"), indent=2))
    (partial / MANIFEST).unlink(missing_ok=True)  # of an attempt killed just before its rename
    inside = sorted(partial.rglob("*"))
    manifest["files"] = {p.relative_to(partial).as_posix(): _describe(p) for p in inside if p.is_file()}
    manifest["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    (partial / MANIFEST).write_text(json.dumps(manifest | {"seal": _sha256(manifest)}, indent=2))
    for path in [*inside, partial / MANIFEST, partial]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
