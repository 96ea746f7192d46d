"""The experiment, top to bottom: dense baseline, prune, recover, and the same examination of each.

python -m kvp ratio.value=0.25 recovery=lora_text
"""

from __future__ import annotations

import time

from kvp.pipeline import stages as steps
from kvp.pipeline.experiment import Experiment, Record
from kvp.pipeline.recording import announce, make_record
from kvp.pipeline.runfile import finished_before, recorded, write_record
from kvp.tracking import Null


def run(x: Experiment) -> Record:
    """Run an experiment; everything finished before is found, and `run.json` tells how far it is.

    Returns:
        The record, as in `run.json`.

    Raises:
        ValueError: A budget or space is not to be had; nothing was computed.
        FileNotFoundError: Data or model are missing; the message names the ways out.
        FloatingPointError: A loss is not finite.
        StageError: The store cannot be written.
    """
    started, directory = time.time(), x.runs / x.name
    earlier = None if x.force else finished_before(directory)
    tracker = Null() if earlier else x.tracker
    with recorded(x, directory, started):
        x.check_sources()
        dense = steps.dense(x)
        x.check_model(dense.config)
        with tracker.run(
            name=x.name, run_id=x.hash, directory=directory, config=x.node, group=x.group, job_type="run"
        ) as tracked:
            models = {"dense": steps.examine(x, dense)}
            pruned = steps.prune(x, dense)
            models["pruned"] = steps.examine(x, pruned)
            recovered = steps.recover(x, dense, pruned)
            if recovered is not None:
                models["recovered"] = steps.examine(x, recovered)

            location = tracked.location or (earlier or {}).get("tracker")
            record = make_record(x, models, directory, location, started)
            write_record(record, directory)
            announce(record, x, tracked)
    return record
