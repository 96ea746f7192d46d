"""Depth: how many blocks fall, which may not, and what cannot be had."""

from __future__ import annotations

import pytest
import torch

from kvp.models.shapes import cut, layer_shapes, size
from kvp.models.surgery import apply
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.compensation.compensate import Bias
from kvp.strategies.methods.random import Random
from kvp.strategies.methods.shortened_llm import ShortenedLLM
from kvp.strategies.methods.shortgpt import ShortGPT
from kvp.strategies.methods.sleb import SLEB
from kvp.strategies.target import Target
from kvp.types import Budget, Plan, Space
from tests.conftest import random_plan, tiny_config, tiny_model
from tests.helpers.published import LLAMA_7B, params

BLOCKS = Space("block", None, (32,))


def plan_of(strategy, value, of="blocks", *, config=LLAMA_7B, tolerance=0.02, seed=0):
    space = strategy.space(config)
    scores = {space: torch.rand(space.shape, generator=torch.Generator().manual_seed(seed))}
    budget = Budget(value=value, of=of, tolerance=tolerance)
    return strategy.plan(config, scores, budget, torch.zeros(space.shape)), scores[space]


def target_of(model, seed=3):
    ids = torch.randint(3, 96, (5, 14), generator=torch.Generator().manual_seed(seed))
    return Target(model, ids, batch_size=2, seed=0)


@pytest.mark.parametrize(
    ("removed", "expected"), [(6, 5_524_115_456), (9, 4_916_965_376), (11, 4_512_198_656)]
)
@pytest.mark.parametrize("of", ["blocks", "params", "block_params", "kv_cache"])
def test_shortened_llm_reaches_its_published_sizes(removed, expected, of):
    value = 1 - expected / 6_738_415_616 if of == "params" else removed / 32
    plan, scores = plan_of(ShortenedLLM(), value, of)
    assert params(LLAMA_7B, plan) == expected
    kept = plan.keep[BLOCKS].tolist()
    assert set(kept) >= {0, 1, 2, 3, 30, 31}
    gone = sorted(set(range(32)) - set(kept), key=lambda n: scores[n])
    assert gone == sorted(range(4, 30), key=lambda n: scores[n])[:removed]


def test_kv_cache_shrinks_with_every_block():
    dense = size(LLAMA_7B, layer_shapes(LLAMA_7B)).kv_bytes_per_token
    plan, _ = plan_of(ShortGPT(), 0.25, "kv_cache")
    assert size(LLAMA_7B, cut(layer_shapes(LLAMA_7B), plan)).kv_bytes_per_token == dense * 3 // 4


def test_the_nearest_number_of_blocks_is_taken_and_fewer_of_two():
    assert [len(plan_of(ShortGPT(), v)[0].keep[BLOCKS]) for v in (0.0, 0.01, 0.02, 0.046)] == [32, 32, 31, 31]
    assert len(plan_of(ShortGPT(), 1.5 / 32)[0].keep[BLOCKS]) == 31


def test_ties_go_to_the_lower_index():
    config = tiny_config(num_hidden_layers=4)
    strategy = ShortGPT(protect_first=1)
    space = strategy.space(config)
    plan = strategy.plan(config, {space: torch.zeros(4)}, Budget(value=0.5, of="blocks"), torch.zeros(4))
    assert plan.keep[space].tolist() == [0, 3]


def test_blocks_of_different_widths_are_counted_one_by_one():
    model = tiny_model("llama", "mha", intermediate_size=64, num_hidden_layers=4)
    narrow = {Space("ffn", 1, (64,)): torch.arange(8)}
    config = apply(model, Plan(narrow)).config
    scores = {Space("block", None, (4,)): torch.tensor([3.0, 0.0, 1.0, 2.0])}
    shapes = layer_shapes(config)
    dense = size(config, shapes).params
    for kept in ([0, 2, 3], [0, 3], [0]):
        plan = Plan({Space("block", None, (4,)): torch.tensor(kept)})
        value = 1 - size(config, cut(shapes, plan)).params / dense
        budget = Budget(value=value, of="params", tolerance=1e-6)
        found = ShortGPT().plan(config, scores, budget, torch.zeros(4))
        assert found.keep[Space("block", None, (4,))].tolist() == kept


@pytest.mark.parametrize(
    ("strategy", "value", "of", "message"),
    [
        (ShortGPT(), 0.046, "blocks", r"nearest is 0\.0312, 1 of 32; at most 31 may go \(0\.9688\)"),
        (ShortenedLLM(), 0.9, "blocks", r"nearest is 0\.8125, 26 of 32; at most 26 .* \(first 4, last 2\)"),
        (SLEB(), 0.6, "blocks", r"nearest is 0\.5000, 16 of 32"),
        (SLEB(max_ratio=0.9), 0.95, "blocks", r"nearest is 0\.8750, 28 of 32"),
        (ShortGPT(grouping="mlp"), 0.25, "kv_cache", r"whole mlps: the nearest is 0\.0000, 0 of 32"),
        (ShortGPT(grouping="attention"), 0.25, "blocks", r"nearest is 0\.0000, 0 of 32"),
    ],
)
def test_what_cannot_be_reached_is_refused_before_scoring(strategy, value, of, message):
    with pytest.raises(ValueError, match=message):
        strategy.check(LLAMA_7B, Budget(value=value, of=of, tolerance=0.01))


def test_a_model_of_protected_blocks_only_is_refused():
    with pytest.raises(ValueError, match=r"nearest is 0\.0000, 0 of 3; at most 0 may go"):
        ShortenedLLM().check(tiny_config(), Budget(value=0.3, of="blocks"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShortGPT(grouping="kv_group"), "grouping must be one of block, attention, mlp"),
        (lambda: ShortGPT(distance="l2"), "distance must be one of cosine, angular"),
        (lambda: ShortenedLLM(criterion="hessian"), "criterion must be one of ppl, taylor, magnitude"),
        (lambda: ShortenedLLM(protect_last=-1), "protect_last must be >= 0, got -1"),
        (lambda: SLEB(max_ratio=0), r"max_ratio must be in \(0, 1\], got 0"),
        (lambda: SLEB(compensation=Bias()), "use strategy/compensation=none"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_attention_cannot_be_cut_from_layers_of_mixed_types():
    mixed = ["full_attention", "sliding_attention", "full_attention"]
    config = tiny_config("qwen2", layer_types=mixed, use_sliding_window=True, sliding_window=4)
    budget = Budget(value=1 / 3, of="kv_cache")
    with pytest.raises(ValueError, match="use grouping=block"):
        ShortGPT(grouping="attention").check(config, budget)
    ShortGPT().check(config, budget)


def test_an_attention_that_is_gone_cannot_go_again():
    model = tiny_model("llama", "gqa", num_hidden_layers=4)
    config = apply(model, Plan({Space("attention", None, (4,)): torch.tensor([0, 2, 3])})).config
    strategy = SLEB(grouping="attention", protect_first=0, protect_last=0, max_ratio=1.0)
    assert (strategy.candidates(config), strategy.most(config)) == ([0, 2, 3], 2)


@pytest.mark.parametrize("grouping", ["block", "attention", "mlp"])
@pytest.mark.parametrize(
    "make",
    [
        lambda g: ShortenedLLM(grouping=g, protect_first=0, protect_last=0),
        lambda g: ShortenedLLM(grouping=g, protect_first=0, protect_last=0, criterion="taylor"),
        lambda g: ShortGPT(grouping=g),
        lambda g: SLEB(grouping=g, protect_first=0, protect_last=0),
    ],
    ids=["ppl", "taylor", "shortgpt", "sleb"],
)
def test_scores_do_not_see_the_order_of_groups_and_neurons(make, grouping):
    strategy = make(grouping)
    model = tiny_model("llama", "gqa", attention_bias=False, mlp_bias=False)
    ((space, before),) = strategy.score(target_of(model)).items()
    layer, swap, order = model.model.layers[1], torch.tensor([1, 0]), torch.randperm(40)
    with torch.no_grad():
        for name, rows in (("q_proj", 24), ("k_proj", 8), ("v_proj", 8)):
            weight = getattr(layer.self_attn, name).weight
            weight.copy_(weight.view(2, rows, -1)[swap].flatten(0, 1).clone())
        out = layer.self_attn.o_proj.weight
        out.copy_(out.view(48, 2, 24)[:, swap].flatten(1).clone())
        for name in ("gate_proj", "up_proj"):
            weight = getattr(layer.mlp, name).weight
            weight.copy_(weight[order].clone())
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order].clone())
    assert torch.allclose(strategy.score(target_of(model))[space], before, rtol=1e-4)


@pytest.mark.parametrize("grouping", ["block", "attention", "mlp"])
def test_the_model_is_left_alone(grouping):
    model = tiny_model()
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        for make in (ShortenedLLM, ShortGPT, SLEB):
            make(grouping=grouping).score(target_of(model))
        assert torch.equal(model(ids).logits, before)


def test_a_pruned_model_can_be_pruned_again():
    model = tiny_model("llama", "gqa", num_hidden_layers=4)
    once = apply(model, random_plan(model, ["qk", "vo", "ffn"]))
    for strategy in (ShortGPT(), SLEB(), ShortenedLLM(protect_first=1, protect_last=1, criterion="taylor")):
        budget = Budget(value=0.25, of="blocks")
        plan = strategy.plan(once.config, strategy.score(target_of(once)), budget, torch.zeros(4))
        assert apply(once, plan).config.num_hidden_layers == 3


def mixed():
    """A Qwen3-MoE whose first block has one MLP, and the others experts."""
    return tiny_config("qwen3_moe", mlp_only_layers=[0])


def test_blocks_that_differ_are_refused_only_where_no_choice_is_near():
    config = mixed()
    sizes = [
        1
        - size(
            config, cut(layer_shapes(config), Plan({Space("block", None, (3,)): torch.tensor(kept)}))
        ).params
        / size(config, layer_shapes(config)).params
        for kept in ([1, 2], [0, 2], [0, 1])
    ]
    assert sizes[0] != pytest.approx(sizes[1], abs=0.02)
    strategy = ShortGPT()
    for value in sizes:
        strategy.check(config, Budget(value=value, of="params", tolerance=0.001))
    with pytest.raises(ValueError, match="cannot be reached by whole blocks"):
        strategy.check(config, Budget(value=min(sizes) / 2, of="params", tolerance=0.001))


def test_blocks_that_differ_never_miss_a_budget_without_a_word():
    config, strategy = mixed(), Random(grouping="block", allocator=Uniform(multiple_of=1))
    shapes = layer_shapes(config)
    missed = 0
    for seed in range(6):
        scores = {
            space: torch.rand(space.shape, generator=torch.Generator().manual_seed(seed))
            for space in strategy.spaces(config)
        }
        budget = Budget(value=0.3, of="params", tolerance=0.05)
        try:
            plan = strategy.plan(config, scores, budget, torch.zeros(3))
        except ValueError as error:
            missed += "differ in size" in str(error)
        else:
            gone = 1 - size(config, cut(shapes, plan)).params / size(config, shapes).params
            assert gone == pytest.approx(0.3, abs=0.05)
    assert missed


def test_an_overflow_is_said():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="is not finite"):
        ShortGPT().score(target_of(model))
