"""Manifests: what a finished stage was made of, by whom, and a seal over all of its files."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULT, MANIFEST = "result.json", "manifest.json"
DISK_FULL = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]


class StageError(OSError):
    """The store cannot be written; the message names the place and the way out."""

    def __init__(self, path: Path, cause: BaseException) -> None:
        way_out = "Free space or get write access there, or choose another place with store=DIR."
        super().__init__(f"cannot write {path}: {cause}. {way_out}")


def fingerprint(stage: str, version: int, inputs: Mapping[str, Any]) -> str:
    """The sha256 (hex) of a stage's name, version and inputs as canonical JSON.

    Raises:
        TypeError: A value, or a key, that JSON does not hold (a Path, a tensor); its place is named.
        ValueError: A NaN or an infinity.
    """
    return _sha256({"stage": stage, "version": version, "inputs": plain(inputs, "inputs")})


def read_manifest(directory: Path, digest: str | None = None) -> dict[str, Any]:
    """Return the manifest of a finished stage.

    Raises:
        ValueError: It cannot be read or was changed; the message names the file.
    """
    try:
        manifest = dict(json.loads((directory / MANIFEST).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
    sealed = manifest.pop("seal", None) == _sha256(manifest)
    if not sealed or digest not in (None, manifest.get("fingerprint")):
        raise ValueError(f"{MANIFEST} was changed")
    return manifest


def check_files(directory: Path, files: Mapping[str, Any]) -> None:
    """Refuse a directory whose files are not those of its manifest.

    Raises:
        ValueError: Names the file and what is wrong with it.
    """
    for name, written in files.items():
        try:
            present = _describe(directory / name)
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({error})") from error
        if present != written:
            raise ValueError(f"{name} was changed: it is {present}, {written} was written")


def add_attempt(file: Path, origin: Mapping[str, Any], *, goes_on: bool) -> list[dict[str, Any]]:
    """Note who works on a stage, after those whose work it goes on with; return all, the last one last."""
    try:
        earlier = json.loads(file.read_bytes()) if goes_on else []
    except (OSError, ValueError):
        earlier = []
    same = ("started", "command")
    others = [each for each in earlier if _without(each, same) != _without(origin, same)]
    attempts = [*others, dict(origin)]
    file.write_text(json.dumps(attempts))
    return attempts


def seal(partial: Path, result: Mapping[str, Any], manifest: dict[str, Any]) -> None:
    """Write result and manifest, and wait until all files are on the disk."""
    (partial / RESULT).write_text(json.dumps(plain(result, "result"), indent=2))
    (partial / MANIFEST).unlink(missing_ok=True)  # of an attempt killed just before its rename
    inside = sorted(partial.rglob("*"))
    manifest["files"] = {p.relative_to(partial).as_posix(): _describe(p) for p in inside if p.is_file()}
    manifest["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    (partial / MANIFEST).write_text(json.dumps(manifest | {"seal": _sha256(manifest)}, indent=2))
    for path in [*inside, partial / MANIFEST, partial]:
        sync(path)


def _without(data: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name not in names}


def sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain(value: Any, where: str) -> Any:
    """Return `value` as JSON gives it back (tuples become lists), or raise an error that names the place."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: JSON keys are strings")
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
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
def on_disk(path: Path) -> Iterator[None]:
    """Turn the errors of a disk into StageError."""
    try:
        yield
    except OSError as error:
        raise StageError(path, error) from error
