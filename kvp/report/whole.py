"""Reports on the disk, whole or not at all: files are written beside their place first, and moved there at the end."""

from __future__ import annotations

import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Give a directory to write in; its files move to `out` at the end, and nothing does if the block raises.

    Where `out` is new, the directory is renamed. Where it stands, each file takes the place of the one before, links
    included. A process that is killed leaves a hidden directory, which the next report removes.
    """
    out = out.absolute()
    there = out.is_dir()
    place = out if there else out.parent
    place.mkdir(parents=True, exist_ok=True)
    _tidy(place)
    partial = place / f".kvp-report.{os.getpid()}.{socket.gethostname()}.partial"
    partial.mkdir()
    try:
        yield partial
        for file in (file for file in partial.rglob("*") if file.is_file()):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        if there:
            for file in sorted(file for file in partial.rglob("*") if file.is_file()):
                target = out / file.relative_to(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
        else:
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tidy(place: Path) -> None:
    """Remove what killed processes of this machine left."""
    for left in place.glob(f".kvp-report.*.{glob.escape(socket.gethostname())}.partial"):
        pid = left.name.split(".")[2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
