"""The stages that look at a model, dense, pruned or recovered alike: zeros, quality, speed and memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, Self

from typing_extensions import override

from kvp.data.corpora import find
from kvp.evaluation.haystacks import Task
from kvp.models.caches import bytes_per_token
from kvp.models.directions import Directions
from kvp.models.load import load_tokenizer
from kvp.models.sparsity import count_zeros
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.session import Before, Inputs, Session, Stage, maker
from kvp.provenance import hardware
from kvp.store import Finished

# of perplexity with a packed cache; 1 decoded token by token and differs in the sixth digit
PACKED_VERSION = 2
# of speed with a packed cache; 1 expanded Mustafar's in every step
DECODED_VERSION = 2
# of needles with a cache of directions; 1 had the bits of every layer in its result, which no record takes
DIRECTIONS_VERSION = 2


@dataclass(frozen=True)
class Examining(Stage):
    """Look at one of the models.

    Attributes:
        model: "dense", "pruned" or "recovered".
    """

    precedes = False
    model: str

    @classmethod
    @abstractmethod
    def of(cls, x: Experiment, model: str) -> list[Self]:
        """Return the stages of this kind that a run has for a model."""


class Sparsity(Examining):
    """Count the zeros of a model."""

    name = "sparsity"

    @override
    @classmethod
    def of(cls, x: Experiment, model: str) -> list[Self]:
        return [cls(model)] if x.strategy.sparsifies else []

    @override
    def inputs(self, x: Experiment, before: Before) -> Inputs:
        return {"model": before[maker(self.model, before)]}

    @override
    def runs(self, x: Experiment) -> tuple[str, ...]:
        return ("kvp.models.sparsity",)

    @override
    def work(self, session: Session, directory: Path) -> Mapping[str, Any]:
        checkpoint = session.checkpoint(self.model)
        return count_zeros(checkpoint.path, checkpoint.config)


@dataclass(frozen=True)
class Perplexity(Examining):
    """Measure the perplexity of a model on one corpus."""

    name = "perplexity"
    corpus: str

    @override
    @classmethod
    def of(cls, x: Experiment, model: str) -> list[Self]:
        return [cls(model, corpus) for corpus in x.perplexity.corpora] if x.perplexity else []

    @property
    @override
    def place(self) -> str:
        return f"evaluate/perplexity/{self.corpus}"

    @override
    def inputs(self, x: Experiment, before: Before) -> Inputs:
        assert x.perplexity is not None
        packed = {} if x.cache is None or self.model == "dense" else {"packed_cache": PACKED_VERSION}
        return {
            "model": before[maker(self.model, before)],
            "dtype": str(x.dtype),
            "protocol": without(asdict(x.perplexity), "corpora"),
            "corpus": find(x.corpora, self.corpus).identity(x.perplexity.part),
            **packed,
        }

    @override
    def runs(self, x: Experiment) -> tuple[str, ...]:
        return ("kvp.models.load", *x.named("evaluation.perplexity", f"corpora.{self.corpus}"))

    @override
    def work(self, session: Session, directory: Path) -> Mapping[str, Any]:
        x, checkpoint = session.x, session.checkpoint(self.model)
        assert x.perplexity is not None
        tokenizer, corpus = load_tokenizer(checkpoint.path), find(x.corpora, self.corpus)
        return x.perplexity.evaluate(session.load(checkpoint), tokenizer, corpus)


@dataclass(frozen=True)
class ZeroShot(Examining):
    """Measure the accuracy of a model on one task."""

    name = "zero_shot"
    task: str

    @override
    @classmethod
    def of(cls, x: Experiment, model: str) -> list[Self]:
        return [cls(model, task) for task in x.zero_shot.tasks] if x.zero_shot else []

    @property
    @override
    def place(self) -> str:
        return f"evaluate/zero_shot/{self.task}"

    @override
    def inputs(self, x: Experiment, before: Before) -> Inputs:
        assert x.zero_shot is not None
        return {
            "model": before[maker(self.model, before)],
            "dtype": str(x.dtype),
            "protocol": without(asdict(x.zero_shot), "tasks"),
            "task": self.task,
            **x.zero_shot.versions(),
        }

    @override
    def runs(self, x: Experiment) -> tuple[str, ...]:
        return ("kvp.models.load", *x.named("evaluation.zero_shot"))

    @override
    def work(self, session: Session, directory: Path) -> Mapping[str, Any]:
        x, checkpoint = session.x, session.checkpoint(self.model)
        assert x.zero_shot is not None
        return x.zero_shot.evaluate(session.load(checkpoint), load_tokenizer(checkpoint.path), self.task)


@dataclass(frozen=True)
class Needles(Examining):
    """Measure how often a model finds what texts of one length hide."""

    name = "needles"
    task: Task
    length: int | Literal["longest"]

    @override
    @classmethod
    def of(cls, x: Experiment, model: str) -> list[Self]:
        return (
            [cls(model, *both) for both in product(x.needles.tasks, x.needles.lengths)] if x.needles else []
        )

    @property
    @override
    def place(self) -> str:
        return f"evaluate/needles/{self.task}_{self.length}"

    @override
    def inputs(self, x: Experiment, before: Before) -> Inputs:
        assert x.needles is not None
        return {
            "model": before[maker(self.model, before)],
            "dtype": str(x.dtype),
            "protocol": without(asdict(x.needles), "tasks", "lengths"),
            "task": self.task,
            "length": self.length,
            "corpus": find(x.corpora, x.needles.corpus).identity(x.needles.part),
            **({"directions": DIRECTIONS_VERSION} if isinstance(x.cache, Directions) else {}),
        }

    @override
    def runs(self, x: Experiment) -> tuple[str, ...]:
        assert x.needles is not None
        return ("kvp.models.load", *x.named("evaluation.needles", f"corpora.{x.needles.corpus}"))

    @override
    def work(self, session: Session, directory: Path) -> Mapping[str, Any]:
        x, checkpoint = session.x, session.checkpoint(self.model)
        assert x.needles is not None
        tokenizer, corpus = load_tokenizer(checkpoint.path), find(x.corpora, x.needles.corpus)
        return x.needles.evaluate(session.load(checkpoint), tokenizer, corpus, self.task, self.length)


class Measure(Examining):
    """Time a model and weigh its memory, in a process of its own.

    Recovery changes values of a pruned model and no shape. So the two are measured once. A dense model may be tuned
    in another form, without fused matrices, and is measured again.
    """

    name = "measure"

    @override
    @classmethod
    def of(cls, x: Experiment, model: str) -> list[Self]:
        return [cls(model)] if x.protocol else []

    @override
    def inputs(self, x: Experiment, before: Before) -> Inputs:
        assert x.protocol is not None
        packed = {} if x.cache is None or self.model == "dense" else {"packed_decode": DECODED_VERSION}
        shaped = "pruned" if self.model == "recovered" and not x.untouched else self.model
        return {
            "model": before[maker(shaped, before)],
            "protocol": asdict(x.protocol),
            "dtype": str(x.dtype).removeprefix("torch."),
            "device": list(hardware(x.device).values()),
            **packed,
        }

    @override
    def runs(self, x: Experiment) -> tuple[str, ...]:
        return ("kvp.measurement.child", *x.named("measure"))

    @override
    def work(self, session: Session, directory: Path) -> Mapping[str, Any]:
        x, checkpoint = session.x, session.checkpoint(self.model)
        assert x.protocol is not None
        session.unload()
        dtype = str(x.dtype).removeprefix("torch.")
        return x.protocol.measure(checkpoint.path, device=x.device, dtype=dtype)

    @override
    def take(self, session: Session, done: Finished) -> None:
        checkpoint, measured = session.checkpoint(self.model), done.result["kv_bytes_per_token"]
        expected = bytes_per_token(checkpoint.config, session.x.dtype.itemsize)
        if measured != expected:
            raise RuntimeError(
                f"the cache of {checkpoint.path} holds {measured} bytes per token, its shapes say {expected}: the "
                "checkpoint and its config disagree"
            )


EXAMINING: tuple[type[Examining], ...] = (Sparsity, Perplexity, ZeroShot, Needles, Measure)


def examination(x: Experiment, model: str) -> list[Examining]:
    """Return the stages of a run that look at a model; none where it is the dense one again, or not made."""
    if (model == "pruned" and x.untouched) or (model == "recovered" and x.recovery is None):
        return []
    return [stage for kind in EXAMINING for stage in kind.of(x, model)]


def without(node: Mapping[str, Any], *names: str) -> Inputs:
    """Return a mapping without some keys."""
    return {key: value for key, value in node.items() if key not in names}
