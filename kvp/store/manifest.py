"""Manifests: what a finished stage was made of, by whom, and a seal over all of its files."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULT, MANIFEST = "result.json", "manifest.json"
DISK_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
TORCH_FULL = ("PytorchStreamWriter failed writing", "inline_container.cc:")  # torch.save never says why
WAY_OUT = "Free space or get write access there, or choose another place with store=DIR."


class StageError(OSError):
    """The store cannot be written; the message names the place and the way out."""

    def __init__(self, path: Path, cause: BaseException | str, way_out: str = WAY_OUT) -> None:
        super().__init__(f"cannot write {path}: {cause}. {way_out}")


def why_full(error: BaseException) -> BaseException | str | None:
    """Return the cause, if an error says that a disk is full; libraries have their own classes for that."""
    if any(text in str(error) for text in DISK_FULL):
        return error
    return "torch could not write a whole file" if any(text in str(error) for text in TORCH_FULL) else None


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
        manifest = dict(json.loads(_bytes_of(directory / MANIFEST)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
    sealed = manifest.pop("seal", None) == _sha256(manifest)
    typed = {name: manifest.get(name) for name in ("files", "seconds", "fingerprint")}
    if not sealed or digest not in (None, manifest.get("fingerprint")) or not _are_typed(**typed):
        raise ValueError(f"{MANIFEST} was changed")
    return manifest


def check_files(directory: Path, files: Mapping[str, Any], *, whole: bool = True) -> None:
    """Refuse a directory whose files are not those of its manifest, or that holds one more.

    Names that begin with a dot are no files of a stage: file managers and NFS leave them, and nothing reads them.

    Args:
        directory: Directory of the stage.
        files: Files as the manifest describes them.
        whole: Whether to read them; otherwise names and sizes are compared.

    Raises:
        ValueError: Names the file and what is wrong with it.
    """
    for name in sorted(files_in(directory) - {MANIFEST, *files}):
        if not any(part.startswith(".") for part in name.split("/")):
            raise ValueError(f"{name} was added")
    for name, written in files.items():
        try:
            present = _describe(directory / name, whole)
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({error})") from error
        written = written if whole else {"size": written["size"]}
        if present != written:
            raise ValueError(f"{name} was changed: it is {present}, {written} was written")


def files_in(directory: Path) -> set[str]:
    """Return the names of everything below a directory that is no directory; links are not followed."""
    found = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(directory).as_posix() for path in found}


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
    publish(partial, partial / RESULT)


def publish(directory: Path, usual: Path) -> None:
    """Wait until a directory is on the disk, its files as readable as one that the umask decided (weights are 0600)."""
    mode = stat.S_IMODE(usual.stat().st_mode)
    for path in [*sorted(directory.rglob("*")), directory]:
        if path.is_file():
            path.chmod(mode)
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


def _are_typed(files: Any, seconds: Any, fingerprint: Any) -> bool:
    """Return whether a manifest holds what its readers use; anyone can seal anything."""
    described = isinstance(files, dict) and all(
        isinstance(each, dict) and each.keys() == {"sha256", "size"} for each in files.values()
    )
    return described and isinstance(seconds, int | float) and isinstance(fingerprint, str)


def _bytes_of(file: Path) -> bytes:
    """Return the bytes of a regular file; a pipe or a device would block or never end."""
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(file))
    return file.read_bytes()


def _describe(file: Path, whole: bool = True) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(file))
    if not whole:
        return {"size": file.stat().st_size}
    with file.open("rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "size": stream.tell()}


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turn the errors of a disk into StageError."""
    try:
        yield
    except StageError:
        raise
    except OSError as error:
        raise StageError(path, error) from error
