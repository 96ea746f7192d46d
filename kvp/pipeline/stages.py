"""Every stage of a run, declared once: its name, version, needs, inputs and work.

`chain` gives them in their order. A run does them (`kvp.pipeline.session`), a sweep foretells them
(`kvp.pipeline.foretell`). A further stage is a class here and its place in `CHAIN` or `examination`; a further step
from a model to a plan belongs to `kvp.strategies.steps`.

Inputs name what a stage builds on by fingerprint, not by result: so a whole run is known before any of it is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from typing_extensions import override

from kvp.models.directions import Directions
from kvp.models.load import dress, load_tokenizer, save
from kvp.models.plans import write_plan
from kvp.pipeline.examination import EXAMINING, examination
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.session import Before, Checkpoint, Inputs, Session, Stage, maker
from kvp.store import Finished
from kvp.strategies.allocation.bits import divided
from kvp.strategies.steps import STEPS, Step, final_plan

MODELS = ("dense", "pruned", "recovered")


class Model(Stage):
    """Write the model to prune as a Hugging Face directory; a source that is one already needs no stage."""

    name = "model"
    writes_model = True

    @override
    def applies(self, x: Experiment) -> bool:
        return x.source.locate() is None

    @override
    def inputs(self, x: Experiment, before: Before) -> Inputs:
        return {
            "node": {k: v for k, v in x.node["model"].items() if k not in ("dtype", "name")},
            "identity": x.source.identity(),
        }

    @override
    def runs(self, x: Experiment) -> tuple[str, ...]:
        return ("kvp.models.load", *x.named("model"))

    @override
    def work(self, session: Session, directory: Path) -> Mapping[str, Any] | None:
        return session.x.source.write(directory / "model")


class Join(Stage):
    """Write the dense model in the form in which it is cut: with fewer and wider KV heads, or with latents."""

    name = "join"
    writes_model = True

    @override
    def applies(self, x: Experiment) -> bool:
        return bool(x.strategy.recasts)

    @override
    def inputs(self, x: Experiment, before: Before) -> Inputs:
        return {"model": before["model"], **x.strategy.recasts}

    @override
    def runs(self, x: Experiment) -> tuple[str, ...]:
        return ("kvp.models.joined", "kvp.models.latents", "kvp.models.load")

    @override
    def work(self, session: Session, directory: Path) -> None:
        dense = session.checkpoint("dense")
        model = session.x.strategy.recast(dense.stored())
        save(model, load_tokenizer(dense.path), directory / "model")


class Planning(Stage):
    """Take one step from the model to a plan, and keep its value in the store."""

    def __init__(self, step: Step) -> None:
        self.step, self.name = step, step.name
        self.version, self.resumable = step.version, step.resumable

    @override
    def applies(self, x: Experiment) -> bool:
        return not x.untouched and self.step.applies(x.strategy)

    @override
    def inputs(self, x: Experiment, before: Before) -> Inputs:
        needs = {name: before[name] for name in self.step.needs(x.strategy) if name in before}
        return {"model": before[maker("joined", before)], **needs, **self.step.inputs(x.strategy, x.asked)}

    @override
    def runs(self, x: Experiment) -> tuple[str, ...]:
        texts = (
            ("calibration", *map("corpora.{}".format, x.calibration.corpora)) if x.reads_calibration else ()
        )
        return (type(self.step).__module__, "kvp.models.load", *x.named("strategy", "ratio", *texts))

    @override
    def work(self, session: Session, directory: Path) -> Mapping[str, Any]:
        value = self.step.make(session.job, session.values, directory)
        reads = self.step.inputs(session.x.strategy, session.x.asked).get("calibration")
        return {**self.step.write(value, directory), **(session.calibration_facts() if reads else {})}

    @override
    def take(self, session: Session, done: Finished) -> None:
        session.values.add(self.name, lambda: self.step.read(done.path, done.result, session.values))


class Prune(Stage):
    """Cut the model by its plan."""

    name = "prune"
    writes_model = True

    @override
    def applies(self, x: Experiment) -> bool:
        return not x.untouched

    @override
    def inputs(self, x: Experiment, before: Before) -> Inputs:
        plan = {name: before[name] for name in ("plan", "refit") if name in before}
        return {"model": before[maker("joined", before)], **plan}

    @override
    def runs(self, x: Experiment) -> tuple[str, ...]:
        return ("kvp.models.load", "kvp.models.plans", "kvp.models.surgery")

    @override
    def work(self, session: Session, directory: Path) -> Mapping[str, Any]:
        from kvp.models.surgery import apply  # imports seconds of modelling code

        dense, plan = session.checkpoint("joined"), final_plan(session.values)
        cut = apply(dense.stored(), plan)
        write_plan(directory, plan)
        save(cut, load_tokenizer(dense.path), directory / "model")
        return {"kept": {space.key: list(keep.shape) for space, keep in plan.keep.items()}}


class Pack(Stage):
    """Write a checkpoint whose config says how its cache is stored; its weights are the files of the one before.

    Training reads no cache. So this comes after it, and one cut is tuned once for all formats.

    Attributes:
        before: The model that it starts from, a key of `MAKERS`.
        model: The one that it makes.
    """

    name = "pack"

    def __init__(self, before: str, model: str) -> None:
        self.before, self.model = before, model

    @property
    @override
    def place(self) -> str:
        return f"{self.name}/{self.model}"

    @override
    def applies(self, x: Experiment) -> bool:
        return x.cache is not None and (x.recovery is not None or self.model == "pruned")

    @override
    def inputs(self, x: Experiment, before: Before) -> Inputs:
        return {"model": before[maker(self.before, before)], "cache": x.node["cache"]}

    @override
    def runs(self, x: Experiment) -> tuple[str, ...]:
        divides = ("kvp.strategies.allocation.bits",) if isinstance(x.cache, Directions) else ()
        return ("kvp.models.load", *divides, *x.named("cache"))

    @override
    def work(self, session: Session, directory: Path) -> None:
        cache, packed = session.x.cache, session.checkpoint(self.before)
        assert cache is not None
        if isinstance(cache, Directions):
            dense = session.checkpoint("dense").config
            cache = divided(cache, dense, final_plan(session.values), session.values["score"])
        cache.check(packed.config)
        dress(packed.path, directory / "model", kvp_cache=asdict(cache))


class Recover(Stage):
    """Tune the pruned model by LoRA and merge; the dense one teaches if it is asked to."""

    name = "recover"
    version = 2  # 1 tuned two of the seven projections of a dense model with fused matrices (Phi-3)
    resumable = True
    writes_model = True

    @override
    def applies(self, x: Experiment) -> bool:
        return x.recovery is not None

    @override
    def inputs(self, x: Experiment, before: Before) -> Inputs:
        assert x.recovery is not None
        teacher = {"teacher": before["model"]} if x.recovery.distillation else {}
        options = x.recovery.identity(x.corpora)
        return {
            "model": before[maker("cut", before)],
            "recovery": options,
            "seed": x.node["seed"],
            **teacher,
        }

    @override
    def runs(self, x: Experiment) -> tuple[str, ...]:
        return ("kvp.recovery.training", *x.named("recovery", "corpora"))

    @override
    def work(self, session: Session, directory: Path) -> Mapping[str, Any]:
        from kvp.recovery.training import train  # imports seconds of peft and Trainer

        x = session.x
        assert x.recovery is not None
        session.unload()
        return train(
            x.recovery,
            session.checkpoint("cut").path,
            directory,
            corpora=x.corpora,
            seed=x.node["seed"],
            device=x.device,
            teacher=session.checkpoint("dense").path,
        )


CHAIN: dict[str, tuple[Stage, ...]] = {  # what makes each model
    "dense": (Model(),),
    "pruned": (Join(), *map(Planning, STEPS), Prune(), Pack("cut", "pruned")),
    "recovered": (Recover(), Pack("tuned", "recovered")),
}
NAMES = (*(stage.name for made in CHAIN.values() for stage in made), *(kind.name for kind in EXAMINING))
KINDS = tuple(dict.fromkeys(NAMES))  # two stages pack


def making(x: Experiment, model: str) -> list[Stage]:
    """Return the stages of a run that make a model."""
    return [stage for stage in CHAIN[model] if stage.applies(x)]


def chain(x: Experiment) -> Iterator[Stage]:
    """Yield every stage of a run, in its order."""
    for model in MODELS:
        yield from making(x, model)
        yield from examination(x, model)


def models_of(x: Experiment) -> list[str]:
    """Return for every stage of a run, in its order, the model that it makes or looks at."""
    return [model for model in MODELS for _ in (*making(x, model), *examination(x, model))]


def make(session: Session, model: str) -> Checkpoint:
    """Do the stages that make "dense", "pruned" or "recovered"."""
    for stage in making(session.x, model):
        session.once(stage, model)
    return session.checkpoint(model)


def examine(session: Session, model: str) -> dict[str, Finished]:
    """Do the stages that look at a model, and return them by place."""
    return {stage.place: session.once(stage, model) for stage in examination(session.x, model)}


def check_force(x: Experiment) -> None:
    """Refuse to compute a stage again that does not exist.

    Raises:
        ValueError: Names the stages there are.
    """
    if unknown := [kind for kind in x.force if kind not in KINDS]:
        raise ValueError(
            f"force is a list of stages to compute again, such as [prune], of {', '.join(KINDS)}; got "
            f"{', '.join(unknown)}"
        )
