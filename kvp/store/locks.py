"""Locks of a store: one per stage, held by the process that computes it, and one over all of it.

Every process that uses a store shares the lock over all; housekeeping needs it alone before it removes what a process
may have found. The kernel lets go of both when a process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kvp.store.manifest import StageError, on_disk

log = logging.getLogger(__name__)

IN_USE = ".in-use"
NO_LOCKS = "Use a local disk, or mount NFS with its locks (without nolock and local_lock)."


def beside(final: Path, suffix: str) -> Path:
    """Return the hidden path of a stage that has its name and a suffix."""
    return final.with_name(f".{final.name}.{suffix}")


@contextmanager
def locked(final: Path) -> Iterator[None]:
    """Hold the lock of a stage, after waiting for another holder; one that dies lets go of it.

    Raises:
        StageError: The lock cannot be taken, or is no file; or another process held it too when the block ended.
    """
    path, holder = beside(final, "lock"), beside(final, "holder")
    with on_disk(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _check_file(path)
        lock = FileLock(path, fallback_to_soft=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for %s, which %s is computing", final, _name_in(holder) or "another process")
            lock.acquire(poll_interval=0.2)
        except NotImplementedError as error:
            raise StageError(path, "this file system has no flock", way_out=NO_LOCKS) from error
    try:
        with on_disk(final):
            holder.unlink(missing_ok=True)  # a link of another user's is not followed
            with holder.open("x") as file:
                file.write(_me())
        yield
    finally:
        if _name_in(holder) == _me():
            with suppress(OSError):
                holder.unlink()
        lock.release()


@contextmanager
def locked_now(final: Path) -> Iterator[bool]:
    """Hold the lock of a stage if nobody holds it; yield whether this process does."""
    lock = FileLock(beside(final, "lock"), fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def check_alone(final: Path) -> None:
    """Refuse to finish a stage that another process computes too: its files may be mixed with this one's.

    Raises:
        StageError: The file system does not keep its locks.
    """
    if (other := _name_in(beside(final, "holder"))) != _me():
        why = (
            f"{other or 'another process'} computed it at the same time: this file system does not keep locks"
        )
        raise StageError(final, why, way_out=f"Repeat the command. {NO_LOCKS}")


def is_held(final: Path) -> bool:
    """Return whether a process, on whatever host, computes a stage now."""
    try:
        descriptor = os.open(beside(final, "lock"), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def share(root: Path) -> int:
    """Take the lock over a store beside other users of it; return a descriptor, which holds it until it is closed.

    Raises:
        OSError: The store cannot be written.
        StageError: Its lock is no file, or its file system has no locks.
    """
    descriptor = _open(root)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("waiting for the housekeeping of %s", root)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError as error:
        os.close(descriptor)
        raise StageError(root, error, way_out=NO_LOCKS) from error
    return descriptor


@contextmanager
def alone(root: Path) -> Iterator[bool]:
    """Take the lock over a store alone, if no process uses the store; yield whether none does."""
    descriptor = _open(root)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unused = True
    except BlockingIOError:
        unused = False
    try:
        yield unused
    finally:
        os.close(descriptor)


def _open(root: Path) -> int:
    _check_file(root / IN_USE)
    return os.open(root / IN_USE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _check_file(path: Path) -> None:
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise StageError(path, "it is no file, so it cannot be a lock", way_out="Remove it.")


def _me() -> str:
    return f"{socket.gethostname()} pid {os.getpid()}"


def _name_in(holder: Path) -> str:
    """Return who a holder file names; empty if nobody."""
    try:
        return holder.read_bytes()[:200].decode(errors="replace").strip()
    except OSError:
        return ""
