"""Budgets are met exactly, or refused with the nearest that can be."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from kvp.models.shapes import cut, layer_shapes, size
from kvp.models.spaces import find_spaces
from kvp.models.surgery import apply
from kvp.strategies.allocation.allocate import Global, Sensitivity, Uniform, rounded_to_budget, water_fill
from kvp.strategies.allocation.pools import Part, Pool
from kvp.strategies.methods.magnitude import Magnitude
from kvp.strategies.methods.random import Random
from kvp.types import DENOMINATORS, Budget
from tests.conftest import random_plan, tiny_config, tiny_model

ALLOCATORS = [Uniform(multiple_of=4), Global(multiple_of=4), Sensitivity(multiple_of=4)]


def achieved(config, plan, of):
    dense, left = size(config, layer_shapes(config)), size(config, cut(layer_shapes(config), plan))
    return 1 - left.count(of) / dense.count(of)


def scores_for(config, strategy, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {s: torch.rand(s.shape, generator=generator) for s in find_spaces(config, strategy.kinds())}


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("value", [0.0, 0.1, 0.25, 0.37, 0.5])
def test_the_budget_is_met_within_half_a_step(allocator, value):
    config = tiny_config("llama", "mha", head_dim=32, num_hidden_layers=12)
    strategy, profile = Random(allocator=allocator), torch.linspace(0, 2, 12)
    budget = Budget(value=value, of="kv_cache")
    plan = strategy.plan(config, scores_for(config, strategy), budget, profile)
    step = 4 / (32 * 12)  # one layer, 4 of 32 channels
    assert abs(achieved(config, plan, "kv_cache") - value) <= step / 2 + 1e-9
    for space, keep in plan.keep.items():
        assert keep.shape[-1] * (2 if space.kind == "qk" else 1) % 4 == 0


@pytest.mark.parametrize("of", [of for of in DENOMINATORS if of != "sparsity"])
@pytest.mark.parametrize("grouping", ["coupled", "kv_group", "ffn", "block"])
def test_every_denominator_means_what_it_says(of, grouping):
    config = tiny_config("llama", "mha", head_dim=32, num_hidden_layers=12, intermediate_size=160)
    strategy = Magnitude(allocator=Uniform(multiple_of=4), grouping=grouping)
    budget = Budget(value=0.08, of=of, tolerance=0.02)
    reachable = {"blocks": ["block"], "kv_cache": ["coupled", "kv_group", "block"]}
    scores, profile = scores_for(config, strategy), torch.zeros(12)
    if grouping in reachable.get(of, [grouping]):
        assert abs(achieved(config, strategy.plan(config, scores, budget, profile), of) - 0.08) < 0.02
    else:
        with pytest.raises(ValueError, match=r"the nearest is 0\.0000"):
            strategy.plan(config, scores, budget, profile)


def test_an_unreachable_ratio_names_the_nearest():
    config = tiny_config("llama", "mha", head_dim=32)
    strategy = Random(allocator=Uniform(multiple_of=8), scope="model")
    with pytest.raises(ValueError, match=r"ratio.value=0.4 of kv_cache .* nearest is 0.5000"):
        strategy.check(config, Budget(value=0.4, of="kv_cache"))
    strategy.check(config, Budget(value=0.5, of="kv_cache"))
    with pytest.raises(ValueError, match=r"nearest is 0\.2390 \(at most 0\.2390"):  # 0.75 of the 31.87 %
        Random(allocator=Uniform()).check(LlamaConfig(), Budget(value=0.5, of="params"))


def test_water_filling_closes_the_budget_and_respects_capacities():
    shares = water_fill([4.0, 2.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], 2.5)
    assert sum(shares) == pytest.approx(2.5)
    assert shares[0] == 1.0
    assert shares[1] == pytest.approx(2 * shares[2]) or shares[1] == 1.0
    assert water_fill([1.0, 1.0], [1.0, 2.0], 9.0) == [1.0, 2.0]


def test_sensitive_layers_give_up_less():
    config = tiny_config("llama", "mha", head_dim=64, num_hidden_layers=4)
    for rule, temperature in (("inverse", 1.0), ("softmax", 1.0)):
        strategy = Random(allocator=Sensitivity(rule=rule, temperature=temperature, multiple_of=2))
        plan = strategy.plan(
            config,
            scores_for(config, strategy),
            Budget(value=0.4, of="kv_cache"),
            torch.tensor([2.0, 0.5, 0.1, 1.0]),
        )
        kept = {s.layer: keep.shape[-1] for s, keep in plan.keep.items() if s.kind == "vo"}
        assert kept[0] > kept[3] > kept[1] > kept[2] >= 64 * 0.25


def test_temperature_zero_is_uniform():
    config = tiny_config("llama", "mha", head_dim=32, num_hidden_layers=4)
    profile, budget = torch.tensor([2.0, 0.0, 0.1, 1.0]), Budget(value=0.25, of="kv_cache")
    plans = []
    for allocator in (Uniform(), Sensitivity(temperature=0.0)):
        strategy = Random(allocator=allocator)
        plans.append(strategy.plan(config, scores_for(config, strategy), budget, profile))
    assert all(torch.equal(keep, plans[1].keep[space]) for space, keep in plans[0].keep.items())


@pytest.mark.parametrize(("rule", "temperature"), [("inverse", 300.0), ("inverse", 1e6), ("softmax", 1e-6)])
def test_an_extreme_temperature_still_meets_the_budget(rule, temperature):
    config = tiny_config("llama", "mha", head_dim=32, num_hidden_layers=4)
    strategy = Random(allocator=Sensitivity(rule=rule, temperature=temperature, multiple_of=1))
    profile, budget = torch.tensor([2.0, 0.0, 0.1, 9.0]), Budget(value=0.4, of="kv_cache")
    plan = strategy.plan(config, scores_for(config, strategy), budget, profile)
    assert achieved(config, plan, "kv_cache") == pytest.approx(0.4, abs=0.02)
    kept = {s.layer: keep.shape[-1] for s, keep in plan.keep.items() if s.kind == "vo"}
    assert kept[1] == 8 and min(kept.values()) == 8  # the cheapest layer is full, the others take the rest


def test_global_removes_the_lowest_scores_of_all():
    space = find_spaces(tiny_config("llama", num_hidden_layers=2), ["ffn"])
    parts = [Part(s, torch.arange(40.0)[None] + 100 * s.layer) for s in space]
    pools = [Pool((part,), units=40, layer=i) for i, part in enumerate(parts)]
    assert Global(multiple_of=1).targets(pools, [1.0, 1.0], 25.0, torch.zeros(2)) == [25.0, 0.0]
    assert Global(multiple_of=1).targets(pools, [1.0, 1.0], 35.0, torch.zeros(2)) == [30.0, 5.0]


def test_ties_in_rounding_go_to_the_cheapest_step():
    losses = [torch.ones(8), torch.full((8,), 0.5), torch.full((8,), 2.0)]
    assert rounded_to_budget([3.0] * 3, [[0, 2, 4, 6]] * 3, [1.0] * 3, 8.0, losses) == [2, 4, 2]


def test_pool_keeps_the_best_and_breaks_ties_downwards():
    space = find_spaces(tiny_config("llama", "gqa"), ["vo"])[0]
    scores = torch.tensor([[5.0, 1, 4, 1, 3, 1, 2, 0], [0.0, 0, 0, 0, 0, 0, 0, 9]])
    part = Part(space, scores)
    assert part.keep(4).tolist() == [[0, 2, 4, 6], [0, 1, 2, 7]]
    assert part.keep(5).tolist() == [[0, 1, 2, 4, 6], [0, 1, 2, 3, 7]]
    assert Pool((part,), units=8).losses().tolist() == [0, 1, 1, 1, 2, 3, 4, 14]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget(value=1.5, of="params"), r"\[0, 1\), got 1.5"),
        (lambda: Budget(value=0.1, of="heads"), "ratio.of must be one of kv_cache"),
        (lambda: Uniform(multiple_of=0), "multiple_of must be >= 1, got 0"),
        (lambda: Uniform(max_ratio=0), r"max_ratio must be in \(0, 1\], got 0"),
        (lambda: Sensitivity(temperature=-1), "temperature must be >= 0"),
        (lambda: Sensitivity(rule="linear"), "rule must be one of inverse, softmax"),
        (lambda: Random(allocator=Uniform(), grouping="heads"), "grouping must be one of coupled"),
        (lambda: Random(allocator=Uniform(), grouping="ffn", scope="layer"), "no meaning for grouping=ffn"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wanted_spaces_must_exist():
    model = tiny_model("qwen3")
    cut = apply(model, random_plan(model, ["qk"]))
    with pytest.raises(
        ValueError, match=r"has no space 'qk', .*; it has: block, attention, mlp, kv_group, vo, ffn"
    ):
        Random(allocator=Uniform()).check(cut.config, Budget(value=0.25, of="kv_cache"))
