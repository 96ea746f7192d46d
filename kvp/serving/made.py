"""The run that made a checkpoint: its record lies beside the store, and names the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvp.record import RunRecord
from kvp.store.locks import IN_USE

RECORD = "run.json"


@dataclass(frozen=True)
class Made:
    """A checkpoint's run.

    Attributes:
        record: What run.json holds.
        model: Which of its models the checkpoint is: "dense", "pruned" or "recovered".
    """

    record: RunRecord
    model: str


def checkpoint_of(path: Path) -> Path:
    """Return the checkpoint that a run.json, or its directory, made last; any other path as it is.

    Raises:
        ValueError: The run has made none.
    """
    file = path / RECORD if path.is_dir() else path
    if file.name != RECORD or not file.is_file():
        return path
    models = list(RunRecord.read(file).models().values())
    if not models:
        raise ValueError(f"{file} names no checkpoint: the run is not finished, repeat its command")
    return Path(models[-1].checkpoint)


def made_by(checkpoint: Path) -> Made | None:
    """Return the run of a checkpoint in a store; None if no run beside the store names it.

    Stages are known by their fingerprints, so a store and its runs may have moved.
    """
    stage = checkpoint.absolute().parts[-3:]
    store = next((place for place in checkpoint.absolute().parents if (place / IN_USE).exists()), None)
    for file in sorted(store.parent.glob(f"runs/*/{RECORD}")) if store else ():
        try:
            record = RunRecord.read(file)
        except (OSError, ValueError):
            continue  # a damaged record of another run says nothing about this checkpoint
        for name, model in record.models().items():
            if Path(model.checkpoint).parts[-3:] == stage:
                return Made(record, name)
    return None
