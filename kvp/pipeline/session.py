"""One run in progress: the stages done so far, and the model in memory.

An `Experiment` never changes; a `Session` does. `kvp.pipeline.stages` has the stages.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from kvp.code import digest, edits, reachable
from kvp.models.load import load_config, load_model, load_tokenizer, resolve_dtype
from kvp.models.sources import ModelSource
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.origins import changed_since, differences
from kvp.provenance import provenance
from kvp.record import RunRecord
from kvp.store import Finished, fingerprint
from kvp.strategies.steps import Job
from kvp.strategies.target import Target

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

Inputs = dict[str, Any]
Before = Mapping[str, str]  # fingerprints of the stages before, by place
MAKERS = {  # the places of the stages that can have made a model, the last one first
    "dense": ("model",),
    "joined": ("join", "model"),
    "cut": ("prune", "model"),
    "pruned": ("pack/pruned", "prune", "model"),
    "tuned": ("recover",),
    "recovered": ("pack/recovered", "recover"),
}


def maker(model: str, before: Collection[str]) -> str:
    """Return the stage that made a model, of those before; one that changed nothing was skipped."""
    return next(stage for stage in MAKERS[model] if stage in before)


def beginning(source: ModelSource) -> dict[str, str]:
    """Return the fingerprint of a model that is a directory already, and so needs no stage; else nothing."""
    if source.locate() is None:
        return {}
    return {"model": sha256(json.dumps(source.identity(), sort_keys=True).encode()).hexdigest()}


class Stage(ABC):
    """A part of a run that is done once per fingerprint of its inputs.

    Attributes:
        name: Its kind, as `force` names it.
        version: Raised in the commit that changes its numbers.
        resumable: Whether its work goes on from the files that a killed attempt left.
        writes_model: Whether it leaves a checkpoint in "model", for estimates of disk space.
        precedes: Whether later stages build on it.
    """

    name: str
    version: int = 1
    resumable: bool = False
    writes_model: bool = False
    precedes: bool = True

    @property
    def place(self) -> str:
        """Return its folder in the store, which is also its name in the record."""
        return self.name

    def applies(self, x: Experiment) -> bool:
        """Return whether the run has this stage."""
        return True

    @abstractmethod
    def inputs(self, x: Experiment, before: Before) -> Inputs:
        """Return the options and the stages before that decide its result, as JSON data."""

    def runs(self, x: Experiment) -> tuple[str, ...]:
        """Return the modules and classes that its work runs, by dotted name; here all that its own module imports."""
        return (type(self).__module__,)

    @final
    def modules(self, x: Experiment) -> dict[str, Path]:
        """Return the modules of kvp and of users that its work runs."""
        return reachable(self.runs(x), alone=(type(self).__module__,))

    @final
    def decides(self, x: Experiment, before: Before) -> Inputs:
        """Return everything that decides its result: its inputs, and the code that nobody committed."""
        edited = edits(self.modules(x))
        return {**self.inputs(x, before), **({"code": edited} if edited else {})}

    @abstractmethod
    def work(self, session: Session, directory: Path) -> Mapping[str, Any] | None:
        """Write its files into `directory` and return its result, as JSON data."""

    def take(self, session: Session, done: Finished) -> None:  # noqa: B027 (most stages have nothing to keep)
        """Keep what later stages read of it in memory."""


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory, and the fingerprint of what made it."""

    path: Path
    fingerprint: str

    @cached_property
    def config(self) -> PretrainedConfig:
        """Return its config; no weights are read."""
        return load_config(self.path)

    def stored(self) -> PreTrainedModel:
        """Return the model as its files hold it, on the CPU."""
        dtype = resolve_dtype(str(self.config.dtype).removeprefix("torch."), "cpu")
        return load_model(self.path, dtype=dtype, device="cpu")


class Forcing:
    """Tell which stages are computed again: those whose kind `force` names, and all that build on them."""

    def __init__(self, x: Experiment) -> None:
        self._kinds, self._since = x.force, x.since
        self._forced: set[str] = set()

    def since(self, stage: Stage, inputs: Inputs) -> float | None:
        """Return the moment (seconds since 1970) from which on a finished stage counts; None: any moment."""
        text = json.dumps(inputs)
        if stage.name not in self._kinds and not any(parent in text for parent in self._forced):
            return None
        self._forced.add(fingerprint(stage.place, stage.version, inputs))
        return self._since


class Values(Mapping[str, Any]):
    """Values of the steps of planning, by name; each is read from the store when it is first asked for."""

    def __init__(self) -> None:
        self._readers: dict[str, Callable[[], Any]] = {}
        self._read: dict[str, Any] = {}

    def add(self, name: str, read: Callable[[], Any]) -> None:
        """Say how a value is read."""
        self._readers[name] = read

    def __getitem__(self, name: str) -> Any:
        if name not in self._read:
            self._read[name] = self._readers[name]()
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def say(done: Finished) -> None:
    """Print how a stage came to be."""
    log.info("%s %s (%.1f s)", done.name, "found" if done.found else "computed", done.seconds)


def origin_of(x: Experiment, stage: Stage) -> dict[str, Any]:
    """Return who does a stage now: code, versions, machine, command, start."""
    modules = stage.modules(x)
    return {
        **provenance(x.device, x.overrides),
        "dtype": str(x.dtype),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": digest(modules),
        "edits": edits(modules),
    }


class Session:
    """Does the stages of an experiment, or finds them done.

    Attributes:
        x: The experiment.
        finished: The stages so far, in order, each with the model that it makes or looks at.
        done: Those that later stages build on, by place.
        values: What the steps of planning gave, by name (`kvp.strategies.steps`).
        watch: Called with the place of each stage before it is done or found.
        after: Called with each stage once it is done or found; prints a line by default.
        earlier: The record that an earlier run of this configuration left, to tell what changed since.
        others: Kinds of found stages that other code made, by how that code differs.
    """

    def __init__(self, x: Experiment) -> None:
        self.x = x
        self.finished: list[tuple[str, Finished]] = []
        self.done: dict[str, Finished] = {}
        self.values = Values()
        self.watch: Callable[[str], None] = lambda place: None
        self.after: Callable[[Finished], None] = say
        self.earlier: RunRecord | None = None
        self.others: dict[str, list[str]] = {}
        self._before = beginning(x.source)
        self._forcing = Forcing(x)
        self._loaded: tuple[Path, PreTrainedModel] | None = None

    def once(self, stage: Stage, model: str) -> Finished:
        """Do a stage of a model or find it done, and note it for the record."""
        self.watch(stage.place)
        inputs = stage.decides(self.x, self._before)
        done = self.x.store.once(
            stage.place,
            inputs,
            lambda directory: stage.work(self, directory),
            version=stage.version,
            resumable=stage.resumable,
            since=self._forcing.since(stage, inputs),
            origin=lambda: origin_of(self.x, stage),
        )
        self.after(done)
        self._tell_of_code(stage, model, done)
        self.finished.append((model, done))
        if stage.precedes:
            self.done[stage.place] = done
            self._before[stage.place] = done.fingerprint
        stage.take(self, done)
        return done

    def _tell_of_code(self, stage: Stage, model: str, done: Finished) -> None:
        """Say which changed code made a stage be computed; remember a found one that other code made."""
        now = origin_of(self.x, stage)
        if done.found:
            if words := differences(done.origins, now):
                self.others.setdefault(words, []).append(stage.name)
        elif changed := changed_since(self.earlier, model, stage.place, now["edits"]):
            log.info("%s was computed because this code has changed: %s", stage.place, ", ".join(changed))

    def checkpoint(self, model: str) -> Checkpoint:
        """Return the checkpoint of a model.

        Args:
            model: "dense", "pruned" or "recovered"; "joined" is the dense one, its KV heads joined if they are. "cut"
                and "tuned" are the pruned and the recovered one before their config says how the cache is stored.
        """
        stage = maker(model, self._before)
        path = self.done[stage].path / "model" if stage in self.done else self.x.source.locate()
        assert path is not None
        return Checkpoint(path, self._before[stage])

    @property
    def job(self) -> Job:
        """Return what the steps from the model to a plan work on."""
        x = self.x
        return Job(x.strategy, x.budget, self.checkpoint("joined").config, self.target, x.cache)

    def target(self) -> Target:
        """Load what the strategy may look at."""
        x, checkpoint = self.x, self.checkpoint("joined")
        calibration = self.calibration if x.reads_calibration else None
        return Target(self.load(checkpoint), calibration, x.calibration.batch_size, x.node["seed"])

    @cached_property
    def calibration(self) -> Tensor:
        """Return (num_samples, length) calibration ids."""
        return self.x.calibration.sample(self.x.corpora, load_tokenizer(self.checkpoint("dense").path))

    def calibration_facts(self) -> dict[str, Any]:
        """Return the hash of the calibration ids, for the stages that may read them."""
        if not self.x.reads_calibration:
            return {}
        return {"calibration_hash": sha256(self.calibration.numpy().tobytes()).hexdigest()}

    def load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """Return the model of a checkpoint, in the run's dtype and on its device; the last one stays in memory."""
        if self._loaded is None or self._loaded[0] != checkpoint.path:
            self.unload()
            model = load_model(checkpoint.path, dtype=self.x.dtype, device=self.x.device)
            self._loaded = checkpoint.path, model
        return self._loaded[1]

    def unload(self) -> None:
        """Let go of the model in memory, before another process or the Trainer loads one of its own."""
        self._loaded = None
