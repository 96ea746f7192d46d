"""A directory that is whole or not there, whoever else writes and whatever ends the process."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvp.store.locks import IN_USE
from kvp.store.manifest import StageError, publish, sync, why_full


@contextmanager
def whole(out: Path, usual: str) -> Iterator[Path]:
    """Yield an empty directory that becomes `out` when the block ends well, and is gone when it does not.

    All files become as readable as the one called `usual`. A lock of its own keeps other processes away. A kill leaves
    the directory hidden and unlocked, for the next attempt to empty.
    """
    if store := next((place for place in out.absolute().parents if (place / IN_USE).exists()), None):
        raise ValueError(
            f"{out} lies inside the store {store}, whose stages must not change: choose another directory"
        )
    partial, way_out = out.with_name(f".{out.name}.partial"), "Free space there, or choose another directory."
    busy = FileExistsError(f"another process writes {out} now: wait for it, or choose another directory")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise StageError(out, error, way_out) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        if out.exists() or not partial.exists() or not os.path.samestat(os.fstat(descriptor), partial.stat()):
            raise busy  # it was finished between the two
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            yield partial
            publish(partial, partial / usual)
            partial.rename(out)
            sync(out.parent)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if why := why_full(error):
                raise StageError(out, why, way_out) from error
            raise
    finally:
        os.close(descriptor)
