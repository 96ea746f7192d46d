"""Pruned shapes of a given one: how wide methods leave a model, whatever its weights are.

The plans are the methods' own, with random scores: which channels stay changes no speed, how many does. Sets of
rope pairs differ between heads and layers, as KVPruner's do by default.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvp.bench.models import Subject
from kvp.models.plans import read_plan
from kvp.models.shapes import layer_shapes, size
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.base import Strategy
from kvp.strategies.methods.kvpruner import KVPruner
from kvp.strategies.methods.llm_pruner import LLMPruner
from kvp.strategies.methods.shortened_llm import ShortenedLLM
from kvp.strategies.shape import after, expected_shape
from kvp.types import Budget, Denominator

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOLERANCE = 0.05  # whole heads and blocks come in coarse steps; what was reached is in the record
KVPRUNER = KVPruner(allocator=Uniform(), importance="random")
RIVALS: dict[str, Strategy] = {
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
    ours = cut_config(dense.config, KVPRUNER, "kv_cache", value)
    cut = f"{100 * value:.4g}% KV"
    found = {f"KVPruner {cut}": ours}
    if rivals:
        params = 1 - _params(ours) / _params(dense.config)
        wanted: tuple[tuple[Denominator, str, float], ...] = (
            ("params", f"{params:.1%} parameters", params),
            ("kv_cache", cut, value),
        )
        found |= {
            f"{name} {words}": cut_config(dense.config, method, of, ratio)
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
    return Subject(name=directory.name, config=after(dense.config, plan))


def cut_config(config: PretrainedConfig, method: Strategy, of: Denominator, value: float) -> PretrainedConfig:
    """Return the config that a method leaves of a model if it removes the fraction `value`.

    Raises:
        ValueError: The method cannot reach its ratio on this model; names the nearest.
    """
    found = expected_shape(
        method, method.recast_config(config), Budget(value=value, of=of, tolerance=TOLERANCE)
    )
    assert found is not None  # all methods here plan from scores
    return found


def _params(config: PretrainedConfig) -> int:
    return size(config, layer_shapes(config)).params
