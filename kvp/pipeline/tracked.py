"""The logging of a run: while it goes on, or afterwards, and once per tracker."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvp.pipeline.announce import announce
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.runfile import RUN
from kvp.record import RunRecord
from kvp.tracking import Log, Null, RunInfo, Tracker
from kvp.whole import write_whole

log = logging.getLogger(__name__)

TRACKED = "tracked.json"  # beside run.json: where each tracker keeps the run, and the hash of what it shows


@contextmanager
def shown(x: Experiment, tracker: Tracker) -> Iterator[Log]:
    """Open the experiment in a tracker; once the block is over, remember that it holds the run.

    The block writes run.json and announces the run.
    """
    with tracker.run(**_about(x)) as tracked:
        yield tracked
    if not isinstance(tracker, Null):
        _remember(x, tracked.location)


def show_later(x: Experiment, record: RunRecord) -> RunRecord:
    """Log a run that was finished before, unless its tracker has it; return the record with its place."""
    if isinstance(x.tracker, Null):
        return record
    if before := _shown_before(x, record):
        log.info("logged before: %s", before)
        return record
    with shown(x, x.tracker) as tracked:
        announce(record, tracked)
        record = record.model_copy(update={"tracker": tracked.location})
        record.write(x.directory / RUN)
    return record


def _about(x: Experiment) -> RunInfo:
    """Return what a tracker shows of an experiment before it has results."""
    ratio = "dense" if x.unpruned else f"{x.budget.of} {x.budget.amount}"
    strategy, recovery = x.chosen("strategy"), x.chosen("recovery")
    return {
        "name": x.name,
        "run_id": x.hash,
        "directory": x.directory,
        "config": x.node,
        "group": x.group,
        "job_type": "run",
        "tags": [*dict.fromkeys((x.source.name, strategy, ratio, recovery, x.group))],
        "notes": f"{x.source.name}, {strategy}, {ratio}, recovery {recovery}, seed {x.node['seed']}",
    }


def _shown_before(x: Experiment, record: RunRecord) -> str | None:
    """Return where the tracker keeps this very result; None if it does not, or if a person removed it."""
    known = _read(x.directory / TRACKED).get(x.tracker.place)
    if not isinstance(known, dict) or known.get("shows") != _results_hash(record):
        return None
    location = str(known.get("location"))
    return location if "://" in location or Path(location).exists() else None


def _remember(x: Experiment, location: str) -> None:
    path = x.directory / TRACKED
    record = RunRecord.read(x.directory / RUN)
    known = _read(path) | {x.tracker.place: {"location": location, "shows": _results_hash(record)}}
    write_whole(path, json.dumps(known, indent=2))


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}  # none, or a damaged one: the run is logged again


def _results_hash(record: RunRecord) -> str:
    """Return the sha256 of the numbers of a run: logged again where they have changed."""
    numbers = record.model_dump(mode="json", include={"dense", "pruned", "recovered", "sensitivity", "ratio"})
    return sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()
