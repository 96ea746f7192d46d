"""Surveys of data files: each is read whole before anything is computed, and once while it stays as it is."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from kvp.data import files
from kvp.data.rows import Texts, read_texts

Stamp = tuple[int, ...]


def stamp(path: Path) -> Stamp:
    """Return what changes when a file is written or replaced."""
    now = path.stat()
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    return _sha256(path, stamp(path))


def departures(path: Path, column: str, limit: int | None = None) -> dict[str, str]:
    """Read a file whole and return in what it is not plain, nulls included.

    Raises:
        OSError: The file cannot be opened.
        ValueError: A part of it cannot be read; the message names file, row and reason.
    """
    return dict(_departures(path, column, limit, stamp(path)))


def departed(path: Path, texts: Texts) -> dict[str, str]:
    """Return in what a file that was read is not plain, nulls included."""
    nulls = {"null_rows": f"{texts.nulls} left out"} if texts.nulls else {}
    return texts.form.departures(path) | nulls


def require_plain(path: Path, found: dict[str, str]) -> None:
    """Refuse a hub's file that is not plain: its identity is fixed before it is read and could not say so.

    Raises:
        ValueError: The file departs from what its name promises.
    """
    odd = {key: value for key, value in found.items() if (key, value) != ("format", files.by_suffix(path)[0])}
    if odd:
        what = ", ".join(f"{key} {value}" for key, value in odd.items())
        raise ValueError(f"{path} is not plain ({what}): mend a copy, and read that as a local file")


@lru_cache(maxsize=256)
def _sha256(path: Path, _: Stamp) -> str:
    return files.sha256(path)


@lru_cache(maxsize=256)
def _departures(path: Path, column: str, limit: int | None, _: Stamp) -> tuple[tuple[str, str], ...]:
    return tuple(departed(path, read_texts(path, column, limit)).items())
