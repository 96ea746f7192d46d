"""`run.json` through the life of a run: running, finished or failed, and when an earlier run still stands."""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvp.pipeline.experiment import Experiment, Record
from kvp.pipeline.recording import SCHEMA, asked, identity, origin, stages


@contextmanager
def recorded(x: Experiment, directory: Path, started: float) -> Iterator[None]:
    """`run.json` says "running" and in which stage, and if the block raises "failed" and why.

    The block writes "finished". A finished record that still stands is left as it is.
    """
    head = {
        "schema": SCHEMA,
        **identity(x, directory),
        "ratio": {"asked": asked(x)},
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "provenance": origin(x, started),
    }
    begun: tuple[str | None, int] = None, 0  # the last stage, and its place among those done

    def tell(status: str, **more: Any) -> None:
        if finished_before(directory) is None:
            stage = begun[0] if begun[1] == len(x.stages) else None
            reached = {"stage": stage, "stages": stages(x)}
            write_record({**head, "status": status, **reached, **more}, directory)

    def watch(name: str) -> None:
        nonlocal begun
        begun = name, len(x.stages)
        tell("running")

    x.watch = watch
    tell("running")
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # a full disk must not hide why
            tell("failed", error=_error(error))
        raise


def _error(error: BaseException) -> Record:
    message = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    trace = "".join(traceback.format_exception(error))
    return {"type": type(error).__name__, "message": message, "traceback": trace}


def write_record(record: Record, directory: Path) -> None:
    """Write `run.json` whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".run.json.{os.getpid()}.partial"
    partial.write_text(json.dumps(record, indent=2, allow_nan=False))
    os.replace(partial, directory / "run.json")


def finished_before(directory: Path) -> Record | None:
    """The record of an earlier, finished run of this configuration, if all its stages still stand."""
    path = directory / "run.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        finished = record["schema"] == SCHEMA and record["status"] == "finished"
        return record if finished and all(Path(s["path"]).exists() for s in record["stages"]) else None
    except (ValueError, LookupError, TypeError):
        return None  # corrupt: written anew
