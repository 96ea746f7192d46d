"""The steps of an experiment, each a stage of the store or several.

A stage is named by a fingerprint of everything that decides its result; one that is there already is
found, not computed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvp.data.corpora import find
from kvp.evaluation.zeroshot import average
from kvp.models.joined import joined
from kvp.models.load import load_model, load_tokenizer, resolve_dtype
from kvp.models.load import save as save_checkpoint
from kvp.models.mustafar import bytes_per_token
from kvp.models.plans import REFIT, read_plan, read_scores, write_plan, write_scores
from kvp.models.shapes import layer_shapes, size
from kvp.models.sparsity import count_zeros
from kvp.models.surgery import apply
from kvp.pipeline import inputs
from kvp.pipeline.experiment import Checkpoint, Experiment, Record
from kvp.store import Stage
from kvp.strategies.base import PlannedStrategy
from kvp.strategies.target import Scores
from kvp.types import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dense(x: Experiment) -> Checkpoint:
    """The model to prune, as a Hugging Face directory."""
    identity = x.source.identity()
    if located := x.source.locate():
        return Checkpoint(located, inputs.identity_hash(identity))
    stage = x.once("model", "model", inputs.model(x, identity), x.source.write)
    return Checkpoint(stage.path, stage.fingerprint)


def join(x: Experiment, dense: Checkpoint) -> Checkpoint:
    """The dense model with fewer and wider KV heads; itself, unless the strategy asks for them."""
    if not x.strategy.joins:
        return dense

    def work(directory: Path) -> dict[str, Any]:
        model = joined(_stored(dense), x.strategy.joins)
        save_checkpoint(model, load_tokenizer(dense.path), directory / "model")
        return {}

    stage = x.once("join", "join", inputs.join(x, dense.fingerprint), work)
    return Checkpoint(stage.path / "model", stage.fingerprint)


def score(x: Experiment, dense: Checkpoint) -> tuple[Stage, Scores]:
    """Local importance of every unit; knows neither budget nor allocator."""

    def work(directory: Path) -> dict[str, Any]:
        scores = x.strategy.score(x.target(dense))
        write_scores(directory / "scores.safetensors", scores)
        return {"spaces": len(scores), **x.calibration_facts(dense)}

    stage = x.once("score", "score", inputs.score(x, dense.fingerprint), work)
    return stage, read_scores(stage.path / "scores.safetensors")


def sensitivity(x: Experiment, dense: Checkpoint, scored: Stage, scores: Scores) -> Stage | None:
    """Phase A of KVPruner: what the loss loses with each block's KV. None if nobody asks."""
    if not x.strategy.probes:
        return None

    def work(directory: Path) -> dict[str, Any]:
        return {"nats_per_token": x.strategy.sensitivity(x.target(dense), scores).tolist()}

    decisive = inputs.sensitivity(x, dense.fingerprint, scored.fingerprint)
    return x.once("sensitivity", "sensitivity", decisive, work)


def search(
    x: Experiment, dense: Checkpoint, scored: Stage, sensed: Stage | None, scores: Scores, profile: Tensor
) -> Stage | None:
    """The plan of a strategy that looks for it with the model at hand. None if it plans from its scores."""
    if not x.strategy.searches:
        return None

    def work(directory: Path) -> dict[str, Any]:
        plan = x.strategy.search(x.target(dense), scores, x.budget, profile, directory)
        write_plan(directory, plan)
        return x.calibration_facts(dense)

    sensed_by = sensed.fingerprint if sensed else None
    decisive = inputs.search(x, dense.fingerprint, scored.fingerprint, sensed_by)
    return x.once("search", "search", decisive, work, resumable=True)


def prune(x: Experiment, dense: Checkpoint) -> Checkpoint:
    """Join KV heads if asked to, score, allocate the budget or search for a plan, compensate if asked to, cut."""
    if x.untouched:
        return dense
    dense = join(x, dense)
    scored, scores = score(x, dense)
    sensed = sensitivity(x, dense, scored, scores)
    x.profile = sensed.result["nats_per_token"] if sensed else None
    profile = torch.tensor(x.profile or [0.0] * len(layer_shapes(dense.config)))
    found = search(x, dense, scored, sensed, scores, profile)

    def work(directory: Path) -> dict[str, Any]:
        if found:
            plan = read_plan(found.path)
        else:
            assert isinstance(x.strategy, PlannedStrategy)  # all that do not search are
            plan = x.strategy.plan(dense.config, scores, x.budget, profile)
        if compensation := x.strategy.compensation:
            target = x.target(dense)
            plan = compensation.refit(target.model, target.batches, plan, directory / REFIT)
        write_plan(directory, plan)
        _cut(x, dense, plan, directory / "model")
        shutil.rmtree(directory / REFIT, ignore_errors=True)
        return {"kept": {space.key: list(keep.shape) for space, keep in plan.keep.items()}}

    sensed_by = sensed.fingerprint if sensed else None
    found_by = found.fingerprint if found else None
    decisive = inputs.prune(x, dense.fingerprint, scored.fingerprint, sensed_by, found_by)
    stage = x.once("prune", "prune", decisive, work, resumable=True)
    return Checkpoint(stage.path / "model", stage.fingerprint)


def _cut(x: Experiment, dense: Checkpoint, plan: Plan, directory: Path) -> None:
    cut = apply(_stored(dense), plan)
    if x.cache is not None:
        x.cache.check(cut.config)
        cut.config.kvp_cache = asdict(x.cache)
    save_checkpoint(cut, load_tokenizer(dense.path), directory)


def _stored(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model as its files hold it, on the CPU."""
    dtype = resolve_dtype(str(checkpoint.config.dtype).removeprefix("torch."), "cpu")
    return load_model(checkpoint.path, dtype=dtype, device="cpu")


def recover(x: Experiment, dense: Checkpoint, pruned: Checkpoint) -> Checkpoint | None:
    """LoRA on the pruned model, merged; the dense one teaches if it is asked to."""
    recovery = x.recovery
    if recovery is None:
        return None

    def work(directory: Path) -> dict[str, Any]:
        x.unload()
        return recovery.recover(
            pruned.path,
            directory,
            corpora=x.corpora,
            seed=x.node["seed"],
            device=x.device,
            teacher=dense.path,
        )

    decisive = inputs.recover(x, dense.fingerprint, pruned.fingerprint)
    stage = x.once("recover", "recover", decisive, work, resumable=True)
    x.recovery_result = stage.result | ({"teacher": dense.fingerprint} if recovery.distillation else {})
    x.losses = [json.loads(line) for line in (stage.path / "losses.jsonl").read_text().splitlines()]
    return Checkpoint(stage.path / "model", stage.fingerprint)


def evaluate(x: Experiment, checkpoint: Checkpoint) -> Record:
    """Perplexity per corpus and accuracy per task, each a stage of its own."""
    perplexity = {
        name: _perplexity(x, checkpoint, name) for name in (x.perplexity.corpora if x.perplexity else ())
    }
    tasks = {name: _zero_shot(x, checkpoint, name) for name in (x.zero_shot.tasks if x.zero_shot else ())}
    return {
        "perplexity": perplexity,
        "zero_shot": {**tasks, "average": average(tasks) if tasks else None},
    }


def _perplexity(x: Experiment, checkpoint: Checkpoint, name: str) -> Record:
    perplexity, corpus = x.perplexity, find(x.corpora, name)
    assert perplexity is not None
    decisive = inputs.perplexity(x, checkpoint.fingerprint, name)

    def work(directory: Path) -> dict[str, Any]:
        return perplexity.evaluate(x.load(checkpoint), load_tokenizer(checkpoint.path), corpus)

    stage = x.once(f"evaluate/perplexity/{name}", "perplexity", decisive, work)
    return {**stage.result, "dtype": str(x.dtype), "overlap": overlap(x, decisive["corpus"])}


def _zero_shot(x: Experiment, checkpoint: Checkpoint, task: str) -> Record:
    zero_shot = x.zero_shot
    assert zero_shot is not None

    def work(directory: Path) -> dict[str, Any]:
        return zero_shot.evaluate(x.load(checkpoint), load_tokenizer(checkpoint.path), task)

    decisive = inputs.zero_shot(x, checkpoint.fingerprint, task)
    stage = x.once(f"evaluate/zero_shot/{task}", "zero_shot", decisive, work)
    return {**stage.result, "dtype": str(x.dtype)}


def overlap(x: Experiment, evaluated: Mapping[str, Any]) -> dict[str, str]:
    """Whether calibration or recovery read the evaluated text: "none", "same corpus", "same text"."""
    read = {
        "calibration": (x.calibration_identity() or {}).get("corpora", []) if not x.unpruned else [],
        "recovery": x.recovery.data.identity(x.corpora).get("corpora", []) if x.recovery else [],
    }

    def kind(other: Mapping[str, Any]) -> int:
        return 2 if other == evaluated else int(other["name"] == evaluated["name"])

    names = ("none", "same corpus", "same text")
    return {reader: names[max(map(kind, sources), default=0)] for reader, sources in read.items()}


def sparsity(x: Experiment, checkpoint: Checkpoint) -> Record | None:
    """The zeros of a model, if the strategy makes any."""
    if not x.strategy.sparsifies:
        return None

    def work(directory: Path) -> dict[str, Any]:
        return count_zeros(checkpoint.path, checkpoint.config)

    return x.once("sparsity", "sparsity", inputs.sparsity(checkpoint.fingerprint), work).result


def measure(x: Experiment, checkpoint: Checkpoint) -> Record | None:
    """Tokens per second and memory, in a process of its own."""
    protocol = x.protocol
    if protocol is None:
        return None

    def work(directory: Path) -> dict[str, Any]:
        x.unload()
        dtype = str(x.dtype).removeprefix("torch.")
        return protocol.measure(checkpoint.path, device=x.device, dtype=dtype)

    result = x.once("measure", "measure", inputs.measure(x, checkpoint.fingerprint), work).result
    expected = bytes_per_token(checkpoint.config, x.dtype.itemsize)
    if result["kv_bytes_per_token"] != expected:
        raise RuntimeError(
            f"the cache of {checkpoint.path} holds {result['kv_bytes_per_token']} bytes per token, its shapes "
            f"say {expected}: the checkpoint and its config disagree"
        )
    return result


def examine(x: Experiment, checkpoint: Checkpoint) -> Record:
    """Everything the record says of one model."""
    config, shapes = checkpoint.config, layer_shapes(checkpoint.config)
    widths = [{k: v for k, v in asdict(shape).items() if k != "rope_pairs"} for shape in shapes]
    return {
        "checkpoint": str(checkpoint.path),
        "size": {**asdict(size(config, shapes)), "layers": widths, "sparsity": sparsity(x, checkpoint)},
        "evaluation": evaluate(x, checkpoint),
        "measure": measure(x, checkpoint),
    }
