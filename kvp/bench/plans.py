"""Pruned shapes of a given one: how wide methods leave a model, whatever its weights are.

The plans are the methods' own, with random scores: which channels stay changes no speed, how many does. Sets of
rope pairs differ between heads and layers, as KVPruner's do by default.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvp.bench.models import Subject
from kvp.models.configs import pruned_config
from kvp.models.plans import read_plan
from kvp.models.shapes import cut, layer_shapes, size
from kvp.models.surgery import kept_blocks
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.methods.kvpruner import KVPruner
from kvp.strategies.methods.llm_pruner import LLMPruner
from kvp.strategies.methods.shortened_llm import ShortenedLLM
from kvp.types import Budget, Denominator, Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOLERANCE = 0.05  # whole heads and blocks come in coarse steps; what was reached is in the record
KVPRUNER = KVPruner(allocator=Uniform(), importance="random")
Method = KVPruner | LLMPruner | ShortenedLLM
RIVALS: dict[str, Method] = {
    "LLM-Pruner": LLMPruner(allocator=Uniform(multiple_of=1), importance="random"),
    "Shortened-LLM": ShortenedLLM(criterion="magnitude"),
}


def cut_subjects(dense: Subject, value: float, *, rivals: bool) -> list[Subject]:
    """Return KVPruner's uniform cut of the fraction `value` of the KV cache.

    With `rivals` follow the shapes of LLM-Pruner and Shortened-LLM that lose as many parameters, and those that
    lose as many KV bytes.

    Raises:
        ValueError: A method cannot reach its ratio on this model; names the nearest.
    """
    ours = _config(dense.config, KVPRUNER, "kv_cache", value)
    found = {f"KVPruner {value:.0%} KV": ours}
    if rivals:
        params = 1 - _params(ours) / _params(dense.config)
        wanted: tuple[tuple[Denominator, str, float], ...] = (
            ("params", f"{params:.1%} parameters", params),
            ("kv_cache", f"{value:.0%} KV", value),
        )
        found |= {
            f"{name} {words}": _config(dense.config, method, of, ratio)
            for of, words, ratio in wanted
            for name, method in RIVALS.items()
        }
    return [Subject(name=name, config=config) for name, config in found.items()]


def planned_subject(dense: Subject, directory: Path) -> Subject:
    """Return the shape that a plan.json leaves of a model, with random weights.

    Raises:
        ValueError: There is no plan, it was made for another model, or it slices the residual stream.
    """
    if not (directory / "plan.json").is_file():
        raise ValueError(f"{directory} holds no plan.json: give the directory of a prune stage")
    plan = read_plan(directory)
    if plan.bases:
        raise ValueError(
            f"{directory} slices the residual stream: give the checkpoint beside the plan instead"
        )
    return Subject(name=directory.name, config=_after(dense.config, plan))


def _config(config: PretrainedConfig, method: Method, of: Denominator, value: float) -> PretrainedConfig:
    spaces = [method.space(config)] if isinstance(method, ShortenedLLM) else method.spaces(config)
    generator = torch.Generator().manual_seed(0)
    scores = {space: torch.rand(*space.shape, generator=generator) for space in spaces}
    budget = Budget(value=value, of=of, tolerance=TOLERANCE)
    return _after(config, method.plan(config, scores, budget, torch.zeros(len(layer_shapes(config)))))


def _after(config: PretrainedConfig, plan: Plan) -> PretrainedConfig:
    shapes = layer_shapes(config)
    return pruned_config(config, cut(shapes, plan), kept_blocks(plan, len(shapes)))


def _params(config: PretrainedConfig) -> int:
    return size(config, layer_shapes(config)).params
