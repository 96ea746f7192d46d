"""Regrowth: gates by differences of losses, units grown back by hand, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kvp.models.spaces import find_spaces, keep_mask, members
from kvp.strategies.allocation.allocate import Global, Uniform
from kvp.strategies.compensation.compensate import Bias
from kvp.strategies.methods.kvpruner import KVPruner
from kvp.strategies.methods.magnitude import Magnitude
from kvp.strategies.methods.regrow import REGROWN, Regrow, corrected, gated_worth
from kvp.strategies.methods.shortgpt import ShortGPT
from kvp.strategies.methods.sleb import SLEB
from kvp.strategies.target import Target
from kvp.types import Budget, Plan, Space
from tests.conftest import exact_norms, random_plan, tiny_config, tiny_model
from tests.helpers.masks import mask

L1 = Magnitude(allocator=Uniform(multiple_of=2), norm="l1")
STEP = 1e-4


@pytest.fixture
def target(heads):
    model = exact_norms(tiny_model("llama", heads, num_hidden_layers=2, head_dim=16, dtype=torch.float64))
    ids = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(2))
    return Target(model, ids, batch_size=2, seed=4)


@torch.no_grad()
def naive_worth(target, plan, space, flat):
    """Per sample the slope of its loss where a removed unit comes back with a little of its activations."""
    pruned, dense = mask(target.model, plan), target.model
    for member in members(target.config, space):
        module, whole = pruned.get_submodule(member.name), dense.get_submodule(member.name)
        mine = member.index == flat
        if member.axis:
            module.weight[:, mine] = whole.weight[:, mine]
        else:
            module.weight[mine] = whole.weight[mine]
            module.bias[mine] = whole.bias[mine]
    carrier = members(target.config, space)[REGROWN[space.kind]]
    module, mine = pruned.get_submodule(carrier.name), carrier.index == flat
    weight, bias, losses = module.weight[mine].clone(), module.bias[mine].clone(), []
    for scale in (STEP, -STEP):
        module.weight[mine], module.bias[mine] = scale * weight, scale * bias
        logits = pruned(target.calibration).logits[:, :-1].transpose(1, 2)
        losses.append(F.cross_entropy(logits, target.calibration[:, 1:], reduction="none").mean(1))
    return ((losses[0] - losses[1]) / (2 * STEP)).abs().mean().item()


@pytest.mark.parametrize("kinds", [["qk", "vo"], ["kv_group", "ffn"]])
def test_gates_are_slopes_of_the_loss_of_the_pruned_model(target, kinds):
    plan = random_plan(target.model, kinds, keep=0.5)
    found = gated_worth(target, plan)
    for space in find_spaces(target.config, kinds):
        gone = (~keep_mask(space, plan.keep[space])).nonzero().flatten().tolist()
        for flat in gone[:: max(1, len(gone) // 3)]:
            expected = naive_worth(target, plan, space, flat)
            assert found[space].flatten()[flat].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_the_units_that_grow_back_are_those_of_the_steepest_gates(target):
    """By hand, head by head: what the deeper cut keeps, and of the rest the largest slopes up to the budget."""
    strategy, budget = Regrow(first=L1, growth=1 / 3), Budget(value=0.25, of="kv_cache", tolerance=0.01)
    strategy.check(target.config, budget)
    scores, profile = L1.score(target), torch.zeros(2)
    deep = L1.plan(target.config, scores, replace(budget, value=0.5), profile)
    plan = strategy.search(target, scores, budget, profile, None)
    changed = 0
    for space, keep in plan.keep.items():
        width, worth = space.shape[1], gated_worth(target, deep)[space]
        for group, (before, after) in enumerate(zip(deep.keep[space].tolist(), keep.tolist(), strict=True)):
            assert (len(before), len(after)) == (width // 2, width * 3 // 4)
            gone = [i for i in range(width) if i not in before]
            back = sorted(gone, key=lambda i: -worth[group, i])[: len(after) - len(before)]
            assert after == sorted([*before, *back])
            best = scores[space][group].argsort(descending=True)[: len(after)]
            changed += set(best.tolist()) != set(after)
    assert changed


def test_one_ranking_over_all_layers_decides_where_units_grow_back():
    config, spaces = tiny_config("llama", "mha"), [Space("ffn", layer, (40,)) for layer in range(3)]
    scores = {space: torch.rand(40, generator=torch.Generator().manual_seed(space.layer)) for space in spaces}
    first = KVPruner(allocator=Global(multiple_of=1, max_ratio=1.0), grouping="ffn")
    budget = Budget(value=0.3, of="block_params", tolerance=0.05)
    deep = first.plan(config, scores, Regrow(first=first, growth=0.2).deeper(budget), torch.zeros(3))
    worth = {space: torch.full((40,), 1.0 + space.layer) for space in spaces}
    plan = first.plan(config, corrected(scores, deep, worth), budget, torch.zeros(3))
    more = [len(plan.keep[space]) - len(deep.keep[space]) for space in spaces]
    assert more[:2] == [0, 0] and more[2] > 0
    assert all(set(deep.keep[space].tolist()) <= set(plan.keep[space].tolist()) for space in spaces)


def test_equal_scores_and_gates_without_slope_are_no_error():
    space = Space("ffn", 0, (4,))
    made = corrected({space: torch.ones(4)}, Plan({space: torch.tensor([1, 3])}), {space: torch.zeros(4)})
    assert made[space].argsort(descending=True, stable=True).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": SLEB()}, "must plan from its scores"),
        ({"first": ShortGPT()}, "must plan from its scores|cuts block"),
        ({"first": KVPruner(allocator=Uniform(), grouping="mlp")}, "KVPruner cuts mlp"),
        ({"first": replace(L1, compensation=Bias())}, r"set strategy\.first\.compensation=null"),
        ({"growth": 1.0}, r"growth must be in \[0, 1\), got 1.0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Regrow(**{"first": L1, **options})


def test_a_cut_too_deep_to_grow_back_from_is_refused():
    strategy = Regrow(first=L1, growth=0.9)
    with pytest.raises(
        ValueError, match=r"growth=0.9 cuts 0.9250 before it grows back to 0.25, lower it: ratio"
    ):
        strategy.check(tiny_config(), Budget(value=0.25, of="kv_cache", tolerance=0.05))
