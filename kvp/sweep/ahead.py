"""The work ahead of a sweep, for the processes that run its jobs: a list of stages in a directory while it lasts."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from kvp.pipeline.experiment import Experiment
from kvp.pipeline.forecast import Forecast, device_of
from kvp.pipeline.foretell import Foretold

AHEAD = "KVP_SWEEP_AHEAD"  # the environment variable that names the directory
JOBS, ENDED = "jobs.json", ".ended"


def time_left(stages: Collection[Foretold], x: Experiment) -> str:
    """Return how long the missing ones of some stages will take in the store and on the device of an experiment.

    It reads "about 6 min left", and is empty if none is missing.
    """
    if not x.place.is_dir():
        return f"{len(stages)} stages of unknown time left" if stages else ""
    missing = [stage for stage in stages if not x.store.stands(stage.name, stage.fingerprint, stage.since)]
    forecast = Forecast(x.store, device_of(x.device))
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


def job_ended(number: int, x: Experiment) -> str:
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
    return time_left(stages.values(), x)
