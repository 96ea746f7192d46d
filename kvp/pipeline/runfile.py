"""`run.json` through the life of a run: running, finished or failed, and when an earlier run still stands."""

from __future__ import annotations

import logging
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvp.pipeline.origins import made_by_others
from kvp.pipeline.recording import asked, identity, made, provenance_record
from kvp.pipeline.session import Session
from kvp.record import ErrorRecord, RunRecord

log = logging.getLogger(__name__)

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
    }
    entered: tuple[str | None, int] = None, 0  # the last stage, and how many were finished before it

    def write(status: str, **more: Any) -> None:
        if finished_before(x.directory) is None:
            stage = entered[0] if entered[1] == len(session.finished) else None
            known = made(session)
            provenance = provenance_record(x, started, origins=known["origins"])
            reached = {"status": status, "stage": stage, "stages": known["stages"], "provenance": provenance}
            RunRecord.model_validate({**head, **reached, **more}).write(x.directory / RUN)

    def watch(place: str) -> None:
        nonlocal entered
        entered = place, len(session.finished)
        write("running")

    session.watch, session.earlier = watch, earlier_record(x.directory)
    write("running")
    try:
        yield
        if session.others:
            log.warning(made_by_others(session.others))
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
    record = earlier_record(directory)
    whole = (
        record and record.status == "finished" and all(Path(stage.path).exists() for stage in record.stages)
    )
    return record if whole else None


def earlier_record(directory: Path) -> RunRecord | None:
    """Return the record of an earlier run of this configuration; None if there is none, or a corrupt one."""
    try:
        return RunRecord.read(directory / RUN)
    except (OSError, ValueError):
        return None
