"""What the methods that read the inputs of o_proj and down_proj have in common."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvp.models.shapes import cut, layer_shapes, size
from kvp.models.spaces import find_spaces
from kvp.models.surgery import apply
from kvp.strategies.target import Target
from kvp.types import Budget
from tests.conftest import NETWORKS, tiny_config, tiny_model
from tests.helpers.masks import mask
from tests.strategies import cases
from tests.strategies.cases import make_plan

HEAD_DIM = 8


@pytest.fixture(params=NETWORKS)
def family(request) -> str:
    return request.param


@pytest.fixture(params=["flap", "numerical", "wanda_sp", "llm_bip"])
def strategy(request):
    return cases.strategy(request.param)


def scores_of(strategy, model, batch_size=2):
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(6))
    return strategy.score(Target(model, ids, batch_size, seed=0))


def test_scores_have_the_shapes_of_the_spaces_and_leave_the_model_alone(strategy, family, heads):
    model = tiny_model(family, heads)
    before = {name: p.clone() for name, p in model.named_parameters()}
    scores = scores_of(strategy, model)
    assert set(scores) == set(find_spaces(model.config, ["kv_group", "ffn"]))
    assert all(score.shape == space.shape and score.isfinite().all() for space, score in scores.items())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_scores_do_not_depend_on_the_batches(strategy):
    model = tiny_model(dtype=torch.float64)
    one, four = (scores_of(strategy, model, batch_size) for batch_size in (1, 4))
    for space in one:
        torch.testing.assert_close(one[space], four[space])


def test_scores_permute_with_the_units(strategy):
    model = tiny_model("llama", "gqa", dtype=torch.float64)
    before, layer = scores_of(strategy, model), model.model.layers[1]
    groups, neurons = torch.tensor([1, 0]), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, heads in (("q_proj", 3), ("k_proj", 1), ("v_proj", 1)):
            for parameter in getattr(layer.self_attn, name).parameters():
                blocks = parameter.view(2, heads * HEAD_DIM, -1)
                parameter.copy_(blocks[groups].clone().view_as(parameter))
        o = layer.self_attn.o_proj.weight
        o.copy_(o.view(len(o), 2, -1)[:, groups].clone().flatten(1))
        for name in ("gate_proj", "up_proj"):
            for parameter in getattr(layer.mlp, name).parameters():
                parameter.copy_(parameter[neurons].clone())
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, neurons].clone())
    after = scores_of(strategy, model)
    for space, score in before.items():
        order = groups if space.kind == "kv_group" else neurons
        torch.testing.assert_close(after[space], score[order] if space.layer == 1 else score)


def test_a_broken_model_is_named(strategy):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3] = torch.nan
    with pytest.raises(
        FloatingPointError, match=r"what enters model\.layers\.1\.mlp\.down_proj is not finite"
    ):
        scores_of(strategy, model)


def test_what_it_cannot_remove_is_refused(strategy):
    with pytest.raises(
        ValueError, match=r"ratio.value=0.25 of blocks cannot be reached .* nearest is 0.0000"
    ):
        strategy.check(tiny_config(), Budget(value=0.25, of="blocks"))


def test_a_parameter_budget_takes_groups_and_neurons(strategy, family, tokens):
    model = tiny_model(family, "gqa", dtype=torch.float64)
    plan = make_plan(strategy, model, Budget(value=0.35, of="params", tolerance=0.05))  # half a group
    dense, left = (
        size(model.config, shapes).params
        for shapes in (layer_shapes(model.config), cut(layer_shapes(model.config), plan))
    )
    assert abs(1 - left / dense - 0.35) <= 0.05
    assert {space.kind for space, keep in plan.keep.items() if len(keep) < space.shape[0]} == {
        "kv_group",
        "ffn",
    }
    with torch.no_grad():
        assert (apply(model, plan)(tokens).logits - mask(model, plan)(tokens).logits).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["wanda_sp", "llm_bip"])
@pytest.mark.parametrize(("by_share", "layer"), [(True, 1), (False, 0)])
def test_the_odd_group_goes_where_it_is_the_least_share(name, by_share, layer):
    """One of six groups: scores that grow with depth must not decide that the first layer loses it."""
    strategy, config = replace(cases.strategy(name), by_share=by_share), tiny_config("llama", "gqa")
    groups = torch.tensor([[1.1, 1.0], [40.0, 10.0], [110.0, 100.0]], dtype=torch.float64)
    scores = {
        space: groups[space.layer] if space.kind == "kv_group" else torch.ones(space.shape)
        for space in find_spaces(config, ["kv_group", "ffn"])
    }
    budget = Budget(value=1 / 6, of="kv_cache", tolerance=0.01)
    plan = strategy.plan(config, scores, budget, torch.zeros(3))
    kept = {space.layer: keep.tolist() for space, keep in plan.keep.items() if space.kind == "kv_group"}
    assert kept == {n: [0] if n == layer else [0, 1] for n in range(3)}
