"""The work ahead of a sweep, for the processes that run its jobs: a list of stages in a directory while it lasts."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from kvp.pipeline.forecast import Forecast
from kvp.pipeline.foretell import Foretold
from kvp.store import Store

AHEAD = "KVP_SWEEP_AHEAD"  # the environment variable that names the directory
JOBS, ENDED = "jobs.json", ".ended"


def time_left(stages: Collection[Foretold], store: Store) -> str:
    """Return how long the stages that are missing will take: "about 6 min left"; empty if none is missing."""
    missing = [stage for stage in stages if not store.stands(stage.name, stage.fingerprint, stage.since)]
    forecast = Forecast(store)
    forecast.learn(stage.name for stage in missing)
    return forecast.left([stage.work for stage in missing])


@contextmanager
def listed(chains: Sequence[Sequence[Foretold]]) -> Iterator[None]:
    """Let the jobs of the block see the missing stages of all jobs."""
    with TemporaryDirectory(prefix="kvp-sweep-") as directory:
        missing = [[vars(stage) for stage in chain if not stage.stands] for chain in chains]
        Path(directory, JOBS).write_text(json.dumps(missing))
        os.environ[AHEAD] = directory
        try:
            yield
        finally:
            del os.environ[AHEAD]


def job_ended(number: int, store: Store) -> str:
    """Note that a job of the sweep has ended, and return how long the others will take: "about 6 min left".

    It is empty if nothing is missing, or where the list of stages is out of reach: on another machine.
    """
    try:
        directory = Path(os.environ[AHEAD])
        chains = json.loads((directory / JOBS).read_bytes())
        (directory / f"{number}{ENDED}").touch()
    except (OSError, KeyError, ValueError):
        return ""
    going = [chain for n, chain in enumerate(chains) if not (directory / f"{n}{ENDED}").exists()]
    stages = {stage["fingerprint"]: Foretold(**stage) for chain in going for stage in chain}
    return time_left(stages.values(), store)
