"""LLM-Pruner against loops over its formulas, its published parameter counts, and its iterative steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from kvp.__main__ import CONF
from kvp.models.shapes import cut, layer_shapes, size
from kvp.models.spaces import find_spaces
from kvp.models.surgery import apply
from kvp.strategies.allocation.allocate import Global, Sensitivity, Uniform
from kvp.strategies.methods.llm_pruner import LLMPruner
from kvp.strategies.target import Target
from kvp.types import Budget, Plan
from tests.conftest import random_plan, tiny_config, tiny_model
from tests.helpers.gradients import HEAD_DIM, naive_scores
from tests.helpers.published import LLAMA3_8B, LLAMA_7B, TINYLLAMA

TAYLOR = ["taylor_vector", "taylor_element", "second_order", "mixed"]


def llm_pruner(**changes):
    return LLMPruner(**{"allocator": Uniform(multiple_of=1), "protect_first": 0, "protect_last": 0} | changes)


@pytest.fixture
def target(heads):
    model = tiny_model("llama", heads, num_hidden_layers=2, attention_bias=False)
    ids = torch.randint(3, 96, (6, 12), generator=torch.Generator().manual_seed(2))
    return Target(model, ids, batch_size=6, seed=4)


@pytest.mark.parametrize(
    ("importance", "reduction"),
    [(importance, "sum") for importance in [*TAYLOR, "l1", "l2"]]
    + [("taylor_vector", reduction) for reduction in ("mean", "max", "prod", "first")],
)
def test_scores_match_a_naive_loop(target, importance, reduction):
    share = target.config.num_attention_heads // target.config.num_key_value_heads
    expected = naive_scores(
        target, 1, importance, reduction, lambda group: range(group * share, (group + 1) * share)
    )
    check_scores(target, expected, llm_pruner(importance=importance, group_reduction=reduction))


@pytest.mark.parametrize("heads", ["gqa"], indirect=True)
@pytest.mark.parametrize("reduction", ["sum", "max"])
def test_the_references_alignment_folds_query_heads_the_other_way_round(target, reduction):
    groups = target.config.num_key_value_heads
    expected = naive_scores(
        target,
        1,
        "taylor_element",
        reduction,
        lambda group: range(group, target.config.num_attention_heads, groups),
    )
    check_scores(target, expected, llm_pruner(group_reduction=reduction, reference_gqa_alignment=True))


def check_scores(target, expected, strategy):
    found = {space.kind: score for space, score in strategy.score(target).items() if space.layer == 1}
    for kind, values in expected.items():
        torch.testing.assert_close(
            found[kind].float(), values, rtol=1e-3, atol=0
        )  # products of four float32 scores


def test_query_heads_are_scored_with_their_own_group_unless_the_reference_is_asked_for():
    """Scores move with the groups; those of the reference do not."""
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, attention_bias=False)
    target = Target(model, torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(2)), 2, 0)
    space, order = find_spaces(model.config, ["kv_group"])[0], [1, 0, 2, 3]
    strategies = [llm_pruner(grouping="kv_group", reference_gqa_alignment=flag) for flag in (False, True)]
    before = [strategy.score(target)[space] for strategy in strategies]
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for name, rows in (("q_proj", 2 * HEAD_DIM), ("k_proj", HEAD_DIM), ("v_proj", HEAD_DIM)):
            weight = getattr(attention, name).weight
            weight.copy_(weight.view(4, rows, -1)[order].flatten(0, 1).clone())
        o = attention.o_proj.weight
        o.copy_(o.view(len(o), 4, -1)[:, order].flatten(1).clone())
    own, reference = (strategy.score(target)[space] for strategy in strategies)
    assert torch.allclose(own, before[0][order], rtol=1e-4)
    assert not torch.allclose(reference, before[1][order], rtol=1e-2)


@pytest.mark.parametrize(
    ("experiment", "config", "expected"),
    [
        ("llm_pruner_llama_7b", LLAMA_7B, 5_422_977_024),
        ("llm_pruner_llama_7b_50", LLAMA_7B, 3_350_188_032),
        ("llm_pruner_llama3_8b", LLAMA3_8B, 6_612_586_496),
        ("llm_pruner_tinyllama", TINYLLAMA, 945_907_712),
    ],
)
def test_recipes_leave_the_published_parameters(experiment, config, expected):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("config", overrides=[f"experiment={experiment}"])
    strategy, budget = (instantiate(node[name], _convert_="all") for name in ("strategy", "ratio"))
    strategy.check(config, budget)
    scores = {space: torch.zeros(space.shape) for space in strategy.spaces(config)}
    plan = strategy.plan(config, scores, budget, torch.zeros(config.num_hidden_layers))
    assert size(config, cut(layer_shapes(config), plan)).params == expected


def test_a_budget_that_unit_ratio_misses_is_refused_and_the_right_one_named():
    strategy = llm_pruner(unit_ratio=0.25, protect_first=4, protect_last=2)
    with pytest.raises(ValueError, match=r"removes 0\.195215 of params .* ask for ratio.value=0\.195215"):
        strategy.check(LLAMA_7B, Budget(value=0.25, of="params"))
    with pytest.raises(ValueError, match=r"removes 0\.203125 of kv_cache"):
        strategy.check(LLAMA_7B, Budget(value=0.25, of="kv_cache"))
    strategy.check(LLAMA_7B, Budget(value=0.203125, of="kv_cache", tolerance=0))


@pytest.mark.parametrize("of", ["params", "block_params", "kv_cache"])
def test_the_budget_decides_without_unit_ratio(of):
    config, strategy = LLAMA_7B, llm_pruner(protect_first=4, protect_last=2)
    scores = {space: torch.rand(space.shape) for space in strategy.spaces(config)}
    plan = strategy.plan(config, scores, Budget(value=0.2, of=of), torch.zeros(32))
    dense, left = (size(config, s).count(of) for s in (layer_shapes(config), cut(layer_shapes(config), plan)))
    assert abs(1 - left / dense - 0.2) < 0.001
    assert {space.layer for space in plan.keep} == set(range(4, 30))
    whole = [space for space, keep in plan.keep.items() if keep.shape == space.shape]
    assert {space.kind for space in whole} == ({"ffn"} if of == "kv_cache" else set())


def test_threshold_is_one_for_all_units():
    config = tiny_config("llama", "mha", num_hidden_layers=3)
    strategy = llm_pruner(allocator=Global(multiple_of=1, max_ratio=1, per_cost=False))
    generator = torch.Generator().manual_seed(0)
    scores = {space: torch.rand(space.shape, generator=generator) for space in strategy.spaces(config)}
    plan = strategy.plan(config, scores, Budget(value=0.2, of="block_params"), torch.zeros(3))
    kept = torch.cat([scores[space][keep] for space, keep in plan.keep.items()])
    assert 0 < len(kept) < sum(len(score) for score in scores.values())
    removed = torch.cat(list(scores.values())).sort().values[: -len(kept)]
    assert removed.max() < kept.sort().values[2]  # but for the last units, which meet the budget


@pytest.mark.parametrize("importance", ["taylor_element", "second_order", "l2", "random"])
def test_an_iterative_step_scores_what_is_left_and_brings_nothing_back(importance):
    model = tiny_model("llama", "gqa", head_dim=8, num_attention_heads=8, num_key_value_heads=4)
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(6))
    target = Target(model, ids, 4, 1)
    strategy = llm_pruner(importance=importance, unit_ratio=0.5, iterative_steps=2)
    budget, profile = Budget(value=0.5, of="kv_cache"), torch.zeros(3)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scores = strategy.score(target)
    found = strategy.search(target, scores, budget, profile, None)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    half = replace(strategy, unit_ratio=0.25).plan(model.config, scores, replace(budget, value=0.25), profile)
    smaller = apply(model, half)
    rest = strategy.score(replace(target, model=smaller))
    for space, keep in half.keep.items():
        again = next(values for s, values in rest.items() if s.key == space.key)
        if importance != "random":
            left = space.shape[0] // 2
            expected = keep[again.argsort(descending=True)[:left].sort().values]
            assert torch.equal(found.keep[space], expected)
        assert set(found.keep[space].tolist()) <= set(keep.tolist())


def test_random_scores_are_drawn_under_the_seed():
    target = Target(tiny_model(), None, 1, seed=3)
    strategy = llm_pruner(importance="random")
    assert not strategy.needs_calibration
    first, second, other = (strategy.score(t) for t in (target, target, replace(target, seed=4)))
    assert all(torch.equal(first[space], second[space]) for space in first)
    assert not any(torch.equal(first[space], other[space]) for space in first)


def test_what_cannot_be_pruned_is_refused():
    config = tiny_config("llama", "mqa")
    budget = Budget(value=0.25, of="kv_cache")
    with pytest.raises(ValueError, match="protect all 3 layers of this model"):
        llm_pruner(protect_first=2, protect_last=1).check(config, budget)
    with pytest.raises(ValueError, match="cannot be reached"):  # the only group of a layer stays
        llm_pruner().check(config, budget)
    model = tiny_model("llama", "mha")
    narrow = apply(model, Plan(random_plan(model, ["vo"]).keep))
    with pytest.raises(ValueError, match="equal query-key and value widths"):
        llm_pruner().score(Target(narrow, torch.ones(1, 8, dtype=torch.int64), 1, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"importance": "taylor_group"}, "importance must be one of taylor_vector, taylor_element"),
        ({"group_reduction": "last"}, "group_reduction must be one of sum, mean, max, prod, first"),
        ({"grouping": "block"}, "grouping must be one of both, kv_group, ffn"),
        ({"protect_first": -1}, "protect_first must be >= 0, got -1"),
        ({"iterative_steps": 0}, "iterative_steps must be >= 1, got 0"),
        ({"unit_ratio": 1.0}, r"unit_ratio must be in \[0, 1\) or null, got 1.0"),
        ({"unit_ratio": 0.5, "allocator": Sensitivity()}, "use strategy/allocator=uniform"),
    ],
)
def test_options_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        llm_pruner(**changes)
