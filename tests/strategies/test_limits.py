"""Budgets in bytes: the least cut that meets them, on shapes and plans, and what is refused."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from kvp.models.caches import mean_bytes_per_token, stored_bytes
from kvp.models.quantized import Quantized
from kvp.models.shapes import itemsize, layer_shapes, size
from kvp.models.surgery import apply
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.limits import GIB, CacheBytes, Limit, Memory, expected_ratio, stored_as
from kvp.strategies.methods.kvpruner_plus import KVPrunerPlus
from kvp.strategies.methods.magnitude import Magnitude
from kvp.strategies.methods.none import NoPruning
from kvp.strategies.methods.palu import Palu
from kvp.strategies.methods.slicegpt import SliceGPT
from kvp.strategies.shape import after
from kvp.strategies.steps import FindPlan, Job
from kvp.strategies.target import Target
from kvp.types import Budget
from tests.conftest import tiny_model

INT4 = Quantized(key_bits=4, value_bits=4, group=16)


@pytest.fixture(scope="module")
def model():
    return tiny_model(head_dim=32, num_hidden_layers=4).float()


def found(model, method, budget, cache, directory=None):
    """The plan of a method under scores of its own."""
    target = Target(model, torch.randint(3, 96, (4, 16)), 2, 0)
    scores = method.score(target)
    job = Job(method, budget, model.config, lambda: target, cache)
    return FindPlan().make(job, {"score": scores}, directory)


@pytest.mark.parametrize("value", [0.9, 0.93])
@pytest.mark.parametrize("cache", [None, INT4])
def test_the_cut_is_the_least_that_meets_the_bytes(model, value, cache):
    value = value if cache else value - 0.5
    method, budget = Magnitude(), CacheBytes(value=value, tolerance=0.1)
    plan = found(model, method, budget, cache)
    pruned = stored_as(apply(model, plan).config, cache)
    dense = mean_bytes_per_token(model.config, 4)
    removed = 1 - mean_bytes_per_token(pruned, 4) / dense
    assert value <= removed <= value + 0.1
    scores = method.score(Target(model, None, 1, 0))
    kept = layer_shapes(pruned)
    ratio = 1 - sum(s.kv_width for s in kept) / sum(s.kv_width for s in layer_shapes(model.config))
    for less in torch.linspace(0, ratio - 0.01, 20).tolist():  # no smaller ratio does
        smaller = method.plan(
            model.config, scores, Budget(value=less, of="kv_cache", tolerance=1), torch.zeros(4)
        )
        left = mean_bytes_per_token(stored_as(after(model.config, smaller), cache), 4)
        assert left > (1 - value) * dense or left == mean_bytes_per_token(pruned, 4)


def test_weights_and_cache_of_a_batch_fit_into_the_memory(model):
    dense = 4 * size(model.config, layer_shapes(model.config)).params
    cache = 16 * stored_bytes(model.config, 4, 100)
    budget = Memory(gib=0.7 * (dense + cache) / GIB, batch_size=16, context=100, cut="block_params")
    assert budget.count(model.config) == dense + cache
    pruned = apply(model, found(model, Magnitude(), budget, None))
    held = sum(p.numel() * 4 for p in pruned.parameters()) + 16 * stored_bytes(pruned.config, 4, 100)
    assert 0.6 * (dense + cache) < held <= 0.7 * (dense + cache)


def test_a_search_gets_the_plan_that_was_found(model, tmp_path):
    method = KVPrunerPlus(compensation=None, context=None)
    assert method.searches
    plan = found(model, method, CacheBytes(value=0.9, tolerance=0.1), INT4, tmp_path)
    pruned = stored_as(apply(model, plan).config, INT4)
    assert 0.9 <= 1 - mean_bytes_per_token(pruned, 4) / mean_bytes_per_token(model.config, 4) <= 1


def test_latents_are_counted_in_the_form_that_is_cut(model):
    expected = expected_ratio(
        CacheBytes(value=0.5, tolerance=0.1), Palu(allocator=Uniform()), model.config, None
    )
    assert expected.of == "kv_cache" and 0.4 < expected.value < 0.6


def test_an_ordinary_budget_stays(model):
    budget = Budget(value=0.25, of="kv_cache")
    assert expected_ratio(budget, Magnitude(), model.config, INT4) is budget
    limit = CacheBytes(value=0.5)
    assert expected_ratio(limit, NoPruning(), model.config, INT4) is limit


@pytest.mark.parametrize(
    ("budget", "method", "message"),
    [
        (CacheBytes(value=0.5), Magnitude(), r"ratio.value=0.5000 holds without a cut: .* has ratio.value=0.8"),
        (CacheBytes(value=0.999), Magnitude(), r"ratio.value=0.9990 cannot be met by a cut of kv_cache: .* leaves"),
        (CacheBytes(value=0.9, tolerance=0), Magnitude(), r"the plan has ratio.value=0.9\d+. Ask for that"),
        (Memory(gib=1, context=64), Magnitude(), r"ratio.gib=1.0000 holds without a cut"),
        (Memory(gib=1e-9, context=64), Magnitude(), r"ratio.gib=0.0000 cannot be met by a cut of params"),
        (Memory(gib=1e-3), Magnitude(), r"ratio.context must be <= 128 \(max_position_embeddings\), got 4096"),
        (CacheBytes(value=0.9, cut="params"), SliceGPT(), "SliceGPT must see the model to plan"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_refused_before_scoring(model, budget, method, message):
    with pytest.raises(ValueError, match=message):
        expected_ratio(budget, method, model.config, INT4)


def test_memory_has_no_fraction():
    with pytest.raises(ValueError, match=r"ratio=memory has no option value, got 0.5: set ratio.gib"):
        Memory(gib=1, value=0.5)
    with pytest.raises(ValueError, match=r"ratio.gib must be > 0, got 0"):
        Memory(gib=0)
    assert Memory(gib=1.5).amount == "1.5GiB" and CacheBytes(value=0.5).amount == "0.5"


def test_a_config_keeps_its_own_cache(model):
    config = stored_as(model.config, INT4)
    assert config.kvp_cache == asdict(INT4) and not hasattr(model.config, "kvp_cache")
    assert stored_as(config, None) is config
    budget = CacheBytes(value=0.5)
    assert budget.most(config) == 0.5 * mean_bytes_per_token(model.config, itemsize(model.config))
    assert isinstance(budget, Limit)
