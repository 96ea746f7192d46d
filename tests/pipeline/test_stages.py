"""The chain is declared once: what runs is what was foretold, and a further stage needs no edit elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

from kvp.pipeline import examination, stages
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.foretell import foretell
from kvp.pipeline.run import run
from kvp.pipeline.session import Session, Stage
from kvp.pipeline.stages import CHAIN, Planning
from kvp.strategies import steps
from tests.helpers.runs import LIGHT, compose_here

WORDS = {
    "plain": (),
    "joined and refitted": (
        "strategy=kvpruner_plus",
        "strategy.num_key_value_heads=1",
        "ratio.value=0.5",
        "strategy/compensation=sequential",
        "recovery=none",
    ),
    "zeros": ("strategy=wanda", "ratio=sparsity", "ratio.value=0.5", "recovery=none"),
    "a chain": ("strategy=chain", "recovery=none"),
    "dense": ("strategy=none", "recovery=none"),
    "a taught model": ("strategy=magnitude", "recovery/distillation=logits"),
}


def experiment(tmp_path, *words):
    return Experiment.compose(compose_here(tmp_path, *LIGHT, "evaluation.perplexity.corpora=[squad]", *words))


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_what_runs_is_what_was_foretold(tmp_path, words):
    x = experiment(tmp_path, *words)
    foretold, _ = foretell(x)
    assert not any(stage.stands for stage in foretold)
    record = run(x)
    assert [(s.name, s.fingerprint) for s in record.stages] == [(s.name, s.fingerprint) for s in foretold]
    assert all(stage.stands for stage in foretell(x)[0])


@pytest.mark.parametrize(
    ("strategy", "stands"),
    [
        ("magnitude", {"dense": False, "pruned": False, "recovered": True}),
        ("none", {"dense": False, "recovered": False}),  # tuned without fused matrices, if it has some
    ],
)
def test_a_recovered_model_is_foretold_to_be_measured_with_the_pruned_one(strategy, stands, tmp_path):
    x = experiment(tmp_path, f"strategy={strategy}", "recovery=lora_text", "measure=cpu_quick")
    assert {stage.model: stage.stands for stage in foretell(x)[0] if stage.kind == "measure"} == stands


@dataclass(frozen=True)
class Layers(examination.Examining):
    """Count the layers of a model: a stage that looks at one."""

    name = "layers"

    @classmethod
    def of(cls, x, model):
        return [cls(model)]

    def inputs(self, x, before):
        return {"model": before[stages.maker(self.model, before)]}

    def work(self, session: Session, directory: Path):
        return {"layers": session.checkpoint(self.model).config.num_hidden_layers}


class Note(Stage):
    """Write a note on the plan: a stage of the chain."""

    name = "note"

    def inputs(self, x, before):
        return {"plan": before["plan"]}

    def work(self, session: Session, directory: Path):
        return {"spaces": len(session.values["plan"].keep)}


class Doubled(steps.Step):
    """Double the scores: a step from the model to a plan."""

    name = "doubled"

    def needs(self, strategy):
        return ("score",)

    def inputs(self, strategy, asked):
        return {}

    def make(self, job, values, directory):
        return {space: 2 * score for space, score in values["score"].items()}

    def write(self, value, directory):
        steps.write_scores(directory / "doubled.safetensors", value)
        return {}

    def read(self, directory, result, values):
        return steps.read_scores(directory / "doubled.safetensors")


def test_a_further_stage_is_run_foretold_forced_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(examination, "EXAMINING", (*examination.EXAMINING, Layers))
    *before, prune = CHAIN["pruned"]
    monkeypatch.setitem(CHAIN, "pruned", (*before, Planning(Doubled()), Note(), prune))
    monkeypatch.setattr(stages, "KINDS", (*stages.KINDS, "note"))
    x = experiment(tmp_path, "strategy=magnitude", "recovery=none")
    foretold = [stage.name for stage in foretell(x)[0]]
    assert foretold.count("layers") == 2 and foretold.index("doubled") < foretold.index("note")
    assert [stage.name for stage in run(x).stages] == foretold
    again = run(replace(x, force=("note",), since=x.since + 1e6))
    assert {stage.name for stage in again.stages if not stage.found} == {"note"}
    result = Path(next(stage.path for stage in again.stages if stage.name == "note"), "result.json")
    assert '"spaces": 20' in result.read_text()


def test_an_experiment_does_not_change(tmp_path):
    x = experiment(tmp_path, "recovery=none")

    def now():
        return {field.name: repr(getattr(x, field.name)) for field in fields(x)}

    before = now()
    run(x)
    assert now() == before
    with pytest.raises(AttributeError):
        x.seed = 1


def test_a_stage_that_is_not_there_cannot_be_forced(tmp_path):
    x = experiment(tmp_path, "force=[serach]")
    with pytest.raises(
        ValueError, match=r"force .* model, join, score, sensitivity, plan, refit, prune.*serach"
    ):
        run(x)
    assert not x.directory.exists() and not list(Path(x.store.root).glob("score/*"))
