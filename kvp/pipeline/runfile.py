"""`run.json` through the life of a run: running, finished or failed, and when an earlier run still stands."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvp.pipeline.recording import asked, identity, provenance_record, stages
from kvp.pipeline.session import Session
from kvp.record import ErrorRecord, RunRecord

RUN = "run.json"


@contextmanager
def recorded(session: Session, started: float) -> Iterator[None]:
    """Keep `run.json` at "running" and its stage, and if the block raises at "failed" and why.

    The block writes "finished". A finished record that still stands is left as it is.
    """
    x = session.x
    head = {
        **identity(x),
        "ratio": {"asked": asked(x)},
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "provenance": provenance_record(x, started),
    }
    entered: tuple[str | None, int] = None, 0  # the last stage, and how many were finished before it

    def write(status: str, **more: Any) -> None:
        if finished_before(x.directory) is None:
            stage = entered[0] if entered[1] == len(session.finished) else None
            reached = {"status": status, "stage": stage, "stages": stages(session)}
            RunRecord.model_validate({**head, **reached, **more}).write(x.directory / RUN)

    def watch(place: str) -> None:
        nonlocal entered
        entered = place, len(session.finished)
        write("running")

    session.watch = watch
    write("running")
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # a full disk must not hide why
            write("failed", error=_error(error))
        raise


def _error(error: BaseException) -> ErrorRecord:
    message = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    trace = "".join(traceback.format_exception(error))
    return ErrorRecord(type=type(error).__name__, message=message, traceback=trace)


def finished_before(directory: Path) -> RunRecord | None:
    """Return the record of an earlier, finished run of this configuration, if all its stages still stand."""
    try:
        record = RunRecord.read(directory / RUN)
    except (OSError, ValueError):
        return None  # none, or a corrupt one: written anew
    whole = record.status == "finished" and all(Path(stage.path).exists() for stage in record.stages)
    return record if whole else None
