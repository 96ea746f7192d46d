"""The stages of a run from their fingerprints, before any of them is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvp.pipeline.experiment import Experiment
from kvp.pipeline.forecast import kind_of_work
from kvp.pipeline.session import Forcing, beginning
from kvp.pipeline.stages import chain, models_of
from kvp.store import fingerprint


@dataclass(frozen=True)
class Foretold:
    """A stage of a run.

    Attributes:
        name: Its folder in the store.
        kind: Its name in `force`.
        model: The model that it makes or looks at.
        work: What it has in common with stages of about the same cost.
        since: When it must have been done to count (seconds since 1970); None: at any time.
        stands: Whether it is done, or a stage before it in the run has the same fingerprint.
        writes_model: Whether it leaves a checkpoint.
    """

    name: str
    kind: str
    model: str
    work: str
    fingerprint: str
    since: float | None
    stands: bool
    writes_model: bool


def foretell(x: Experiment) -> tuple[list[Foretold], Path]:
    """Return the stages of a run in their order, and where its dense model is or will be; do none.

    Raises:
        OSError, ValueError: The model or a text is out of reach.
    """
    foretold: list[Foretold] = []
    before, forcing = beginning(x.source), Forcing(x)
    there = x.place.is_dir()  # the store's first use would make it
    for stage, model in zip(chain(x), models_of(x), strict=True):
        inputs = stage.decides(x, before)
        digest = fingerprint(stage.place, stage.version, inputs)
        work = kind_of_work(stage.place, stage.version, inputs, before.get("model", digest))
        since = forcing.since(stage, inputs)
        twice = digest in {earlier.fingerprint for earlier in foretold}
        stands = twice or (there and x.store.stands(stage.place, digest, since))
        foretold.append(
            Foretold(stage.place, stage.name, model, work, digest, since, stands, stage.writes_model)
        )
        if stage.precedes:
            before[stage.place] = digest
    made = x.store.place("model", before["model"]) if there and "model" in before else x.place
    return foretold, x.source.locate() or made / "model"
