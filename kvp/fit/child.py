"""The process that measures the cost of one phase of a run: its argument is a JSON spec, its last line JSON.

python -m kvp.fit.child '{"phase": "score", "words": ["model=smollm2_135m"], "checkpoint": "outputs/..."}'
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

import kvp  # noqa: F401  (registers the pruned classes)
from kvp.bars import only_on_terminals
from kvp.composing import compose
from kvp.measurement import memory
from kvp.models.load import load_config, load_model
from kvp.models.shapes import layer_shapes
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.needs import recipe_length
from kvp.types import Budget, Plan

if TYPE_CHECKING:
    from kvp.strategies.target import Scores, Target

STEPS = 2  # of training
WARM = (1, 16)  # sequences and tokens after which libraries have taken what they take once


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A phase that can be run.

    Attributes:
        work: The phase on random tokens of a batch size and a length.
        batch_size: Sequences of the run's passes.
        length: Tokens of its sequences.
        repeats: How often the work takes such a batch.
        held: Bytes of weights in memory between two calls.
    """

    work: Callable[[int, int], None]
    batch_size: int
    length: int
    repeats: int = 1
    held: int = 0


def scoring(x: Experiment, checkpoint: Path) -> Trial:
    """Return the scoring of a run's strategy, and its sensitivity analysis."""
    from kvp.strategies.target import Target

    model = _loaded(x, checkpoint)

    def work(batch_size: int, length: int) -> None:
        ids = _ids(model.config.vocab_size, batch_size, length)
        target = Target(model, ids, batch_size, 0)
        scores = x.strategy.score(target)
        if x.strategy.probes:
            x.strategy.sensitivity(target, scores)

    data = x.calibration
    return Trial(work=work, batch_size=data.batch_size, length=data.length, held=memory.weights_bytes(model))


def planning(x: Experiment, checkpoint: Path) -> Trial:
    """Return what a run's strategy does between scores and plan; a search looks at the model again."""
    model, scores, target = _scored(x, checkpoint)

    def work(batch_size: int, length: int) -> None:
        with TemporaryDirectory() as directory:
            _plan(x, target(batch_size, length), scores, Path(directory))

    data = x.calibration
    return Trial(work=work, batch_size=data.batch_size, length=data.length, held=memory.weights_bytes(model))


def refitting(x: Experiment, checkpoint: Path) -> Trial:
    """Return the refit of a plan that is made on the fewest tokens, and held with its edits as in a run."""
    (model, scores, target), compensation = _scored(x, checkpoint), x.strategy.compensation
    assert compensation is not None

    def work(batch_size: int, length: int) -> None:
        with TemporaryDirectory() as directory:
            plan = _plan(x, target(*WARM), scores, Path(directory))
            compensation.refit(model, target(batch_size, length).batches, plan, Path(directory, "refit"))

    data = x.calibration
    return Trial(work=work, batch_size=data.batch_size, length=data.length, held=memory.weights_bytes(model))


def evaluating(x: Experiment, checkpoint: Path) -> Trial:
    """Return the NLL of a batch of windows."""
    from kvp.evaluation.perplexity import window_nll

    model, data = _loaded(x, checkpoint), x.perplexity
    assert data is not None

    @torch.inference_mode()
    def work(batch_size: int, length: int) -> None:
        window_nll(model, _ids(model.config.vocab_size, batch_size, length).to(model.device), length - 1)

    return Trial(work=work, batch_size=data.batch_size, length=data.window, held=memory.weights_bytes(model))


def recovering(x: Experiment, checkpoint: Path) -> Trial:
    """Return `STEPS` steps of a run's LoRA training."""
    from kvp.recovery.fit import Job, fit

    recipe, vocabulary = x.recovery, load_config(checkpoint).vocab_size
    assert recipe is not None

    def work(batch_size: int, length: int) -> None:
        ids = _ids(vocabulary, STEPS * batch_size, length).tolist()
        few = replace(
            recipe,
            max_steps=STEPS,
            epochs=None,
            warmup_steps=0,
            batch_size=batch_size,
            micro_batch_size=batch_size,
        )
        with TemporaryDirectory() as directory:
            job = Job(
                checkpoint=str(checkpoint),
                directory=directory,
                seed=0,
                device=x.device,
                resume=None,
                teacher=str(checkpoint),
            )
            fit(few, job, [{"input_ids": row, "labels": row} for row in ids], [])

    length = recipe_length(recipe)
    return Trial(work=work, batch_size=recipe.micro_batch_size, length=length, repeats=STEPS)


PHASES: dict[str, Callable[[Experiment, Path], Trial]] = {
    "score": scoring,
    "plan": planning,
    "refit": refitting,
    "perplexity": evaluating,
    "recover": recovering,
}


def _scored(x: Experiment, checkpoint: Path) -> tuple[PreTrainedModel, Scores, Callable[[int, int], Target]]:
    """Return a model, its scores on the fewest tokens, and what gives it random tokens to read."""
    from kvp.strategies.target import Target

    model = _loaded(x, checkpoint)

    def target(batch_size: int, length: int) -> Target:
        return Target(model, _ids(model.config.vocab_size, batch_size, length), batch_size, 0)

    return model, x.strategy.score(target(*WARM)), target


def _plan(x: Experiment, target: Target, scores: Scores, directory: Path) -> Plan:
    profile = torch.ones(len(layer_shapes(target.config)))  # every layer as sensitive as the others
    assert isinstance(x.budget, Budget)
    return x.strategy.search(target, scores, x.budget, profile, directory)


def _loaded(x: Experiment, checkpoint: Path) -> PreTrainedModel:
    """Return the model in the form in which the run's strategy cuts it."""
    model = x.strategy.recast(load_model(checkpoint, dtype=x.dtype, device="cpu"))
    return memory.place(model, torch.device(x.device))


def _ids(vocabulary: int, batch_size: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch_size, length), generator=generator)


def measure(phase: str, words: list[str], checkpoint: Path) -> dict[str, Any]:
    """Return the bytes of a phase on one batch, and the CPU seconds and the tokens that it adds to a batch of `WARM`.

    The bytes are without the interpreter and what libraries take once. The seconds are of all threads; those of a batch
    of `WARM`, in which loading a model is, are taken off.
    """
    x = Experiment.compose(compose(words), words)
    device = torch.device(x.device)
    trial = PHASES[phase](x, checkpoint)
    trial.work(*WARM)
    began = time.process_time()
    trial.work(*WARM)
    least = time.process_time() - began
    memory.reset_peak(device)  # hands back what the first passes have freed
    before = memory.begin(device) - trial.held
    began = time.process_time()
    trial.work(trial.batch_size, trial.length)
    seconds = time.process_time() - began
    return {
        "bytes": memory.peak_bytes(device) - before,
        "cpu_seconds": max(0.0, seconds - least),
        "tokens": trial.repeats * (trial.batch_size * trial.length - WARM[0] * WARM[1]),
    }


def main() -> None:
    """Measure what the spec in argv[1] names, and print it."""
    only_on_terminals()
    spec = json.loads(sys.argv[1])
    print(json.dumps(measure(spec["phase"], spec["words"], Path(spec["checkpoint"]))), flush=True)


if __name__ == "__main__":
    main()
