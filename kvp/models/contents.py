"""Identity of a local checkpoint: the bytes of its files, whatever their names, times and place are.

Hashing 14 GB takes about ten seconds. So the hashes of large files are remembered, in `kvp` of the user's cache
directory, for as long as the file system says that the file was not written. A remembered hash is never wrong after an
ordinary copy, which has another inode or another change time; only a change of the clock could fool it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from kvp.whole import write_whole

LARGE = 2**26  # bytes from which on a hash is worth remembering


def contents(files: Iterable[Path]) -> dict[str, str]:
    """Return the sha256 (hex) of each file by its name."""
    remembered = Remembered(_place())
    hashes = {file.name: remembered.sha256(file) for file in files}
    remembered.write()
    return hashes


class Remembered:
    """Hashes of large files, remembered in one JSON file; without it, or if it cannot be written, all is hashed."""

    def __init__(self, place: Path) -> None:
        self._place, self._new = place, False
        self._known: dict[str, str] = {}
        with suppress(OSError, ValueError, TypeError):
            known = json.loads(place.read_bytes())
            self._known = {key: value for key, value in dict(known).items() if isinstance(value, str)}

    def sha256(self, file: Path) -> str:
        """Return the sha256 (hex) of a file."""
        facts = file.stat()
        key = f"{facts.st_dev} {facts.st_ino} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
        if facts.st_size < LARGE or key not in self._known:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if facts.st_size < LARGE:
                return digest
            self._known[key], self._new = digest, True
        return self._known[key]

    def write(self) -> None:
        """Write what is new; a disk that is full or forbids it costs time, not correctness."""
        if not self._new:
            return
        with suppress(OSError):
            self._place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # compiled code lies there, too
            write_whole(self._place, json.dumps(self._known))


def _place() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "kvp", "sha256.json")
