"""The stages of a run from their fingerprints, before any of them is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvp.pipeline.experiment import Experiment
from kvp.pipeline.session import Forcing, beginning
from kvp.pipeline.stages import chain
from kvp.store import fingerprint


@dataclass(frozen=True)
class Foretold:
    """A stage of a run.

    Attributes:
        name: Its folder in the store.
        kind: Its name in `force`.
        stands: Whether it is done.
        writes_model: Whether it leaves a checkpoint.
    """

    name: str
    kind: str
    fingerprint: str
    stands: bool
    writes_model: bool


def foretell(x: Experiment) -> tuple[list[Foretold], Path]:
    """Return the stages of a run in their order, and where its dense model is or will be; do none.

    Raises:
        OSError, ValueError: The model or a text is out of reach.
    """
    foretold, before, forcing = [], beginning(x.source), Forcing(x)
    for stage in chain(x):
        inputs = stage.decides(x, before)
        digest = fingerprint(stage.place, stage.version, inputs)
        stands = x.store.stands(stage.place, digest, forcing.since(stage, inputs))
        foretold.append(Foretold(stage.place, stage.name, digest, stands, stage.writes_model))
        if stage.precedes:
            before[stage.name] = digest
    return foretold, x.source.locate() or x.store.place("model", before["model"]) / "model"
