"""The experiment, top to bottom: dense baseline, prune, recover, and the same examination of each.

python -m kvp ratio.value=0.25 recovery=lora_text
"""

from __future__ import annotations

import time

from kvp.pipeline.announce import announce
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.gate import check_inputs
from kvp.pipeline.progress import Progress
from kvp.pipeline.recording import make_record, model_record
from kvp.pipeline.runfile import RUN, finished_before, recorded
from kvp.pipeline.session import Session
from kvp.pipeline.stages import examine, make
from kvp.pipeline.tracked import show_later, shown
from kvp.record import RunRecord
from kvp.tracking import Null


def run(x: Experiment) -> RunRecord:
    """Run an experiment; finished stages are found, and `run.json` says how far it is.

    Returns:
        The record, as in `run.json`.

    Raises:
        ValueError: A budget, space or option is out of reach; nothing was computed.
        FileNotFoundError: Data or model are missing; the message names the ways out.
        FloatingPointError: A loss is not finite.
        StageError: The store cannot be written.
    """
    check_inputs(x)
    started, session = time.time(), Session(x)
    earlier = None if x.force else finished_before(x.directory)
    with recorded(session, started):
        Progress(x).follow(session)
        dense = make(session, "dense")
        with shown(x, Null() if earlier else x.tracker) as log:
            models = {"dense": model_record(x, dense, examine(session, "dense"))}
            pruned = make(session, "pruned")
            models["pruned"] = models["dense"]
            if not x.untouched:
                models["pruned"] = model_record(x, pruned, examine(session, "pruned"))
            if x.recovery is not None:
                recovered = make(session, "recovered")
                models["recovered"] = model_record(x, recovered, examine(session, "recovered"))

            location = log.location or (earlier.tracker if earlier else None)
            record = make_record(session, models, location, started)
            record.write(x.directory / RUN)
            announce(record, log)
    return show_later(x, record) if earlier else record
