"""Jobs that a sweep has not started yet: a file among the runs while it lasts, which `kvp.status` reads."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from kvp.store.contents import is_alive


@dataclass(frozen=True)
class Queue:
    """The jobs of a sweep, and the process that launches them.

    Attributes:
        jobs: Names of the runs, in order.
        host: Machine of the process.
        pid: Its number there.
        started: Seconds since 1970.
    """

    jobs: tuple[str, ...]
    host: str
    pid: int
    started: float


@contextmanager
def queued(runs: Path, jobs: Sequence[str]) -> Iterator[None]:
    """Name the jobs of a sweep to whoever looks, while the block lasts."""
    queue = Queue(tuple(jobs), socket.gethostname(), os.getpid(), time.time())
    file = runs / f".sweep-{queue.host}-{queue.pid}.json"
    runs.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(queue)))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def waiting(runs: Path) -> Iterator[tuple[str, Queue]]:
    """Yield the jobs without a run.json of sweeps that still run; what a killed sweep left is passed over."""
    for file in sorted(runs.glob(".sweep-*.json")):
        try:
            queue = Queue(**json.loads(file.read_bytes()))
            alive = is_alive(queue.host, queue.pid, queue.started)
        except (OSError, ValueError, TypeError):
            continue
        if alive is not False:
            yield from ((job, queue) for job in queue.jobs if not (runs / job / "run.json").exists())
