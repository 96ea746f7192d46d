"""CLOVER against the SVD of the whole product of values and o_proj."""

from __future__ import annotations

import pytest
import torch

from kvp.models.surgery import apply
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.methods.clover import CLOVER
from kvp.strategies.target import Target
from kvp.types import Budget
from tests.conftest import tiny_model

METHOD = CLOVER(allocator=Uniform(multiple_of=1, max_ratio=1.0))
BUDGET = Budget(value=0.25, of="kv_cache", tolerance=0.02)


def planned(model, path, budget=BUDGET):
    target = Target(model, None, batch_size=1, seed=0)
    return METHOD.search(target, METHOD.score(target), budget, torch.zeros(3), path)


def products(model, layer, heads):
    """Return per KV group o_proj's columns of its query heads, one below the other, times v_proj's rows."""
    attention = model.model.layers[layer].self_attn
    queries, groups = heads
    rows = attention.v_proj.weight.detach().view(groups, -1, 48)
    columns = attention.o_proj.weight.detach().view(48, groups, queries // groups, -1)
    return [torch.cat([*columns[:, g].unbind(1)]) @ rows[g] for g in range(groups)]


@pytest.mark.parametrize(("name", "heads"), [("mha", (4, 4)), ("gqa", (6, 2)), ("mqa", (4, 1))])
def test_the_largest_singular_directions_of_the_product_stay(name, heads, tmp_path):
    model = tiny_model("llama", name, dtype=torch.float64, attention_bias=False)
    plan = planned(model, tmp_path)
    pruned = apply(model, plan)
    for layer in range(3):
        after = products(pruned, layer, heads)
        for before, left in zip(products(model, layer, heads), after, strict=True):
            u, s, v = torch.linalg.svd(before)
            torch.testing.assert_close(left, u[:, :4] * s[:4] @ v[:4], atol=1e-8, rtol=1e-6)


def test_scores_are_squared_singular_values_and_halves_balance(tmp_path):
    model = tiny_model("llama", "gqa", dtype=torch.float64, attention_bias=False)
    scores = METHOD.score(Target(model, None, batch_size=1, seed=0))
    for space, score in scores.items():
        singular = [torch.linalg.svdvals(product)[:8] for product in products(model, space.layer, (6, 2))]
        torch.testing.assert_close(score.double(), torch.stack(singular) ** 2, atol=1e-5, rtol=1e-4)
    plan = planned(model, tmp_path)
    value = plan.edits["model.layers.0.self_attn.v_proj.weight"].view(2, 8, -1)
    output = plan.edits["model.layers.0.self_attn.o_proj.weight"].view(48, 2, 3, 8)
    torch.testing.assert_close(value.norm(dim=2), output.square().sum((0, 2)).sqrt())


def test_a_bias_of_values_stays_in_the_function(tmp_path, tokens):
    model = tiny_model("llama", "gqa", dtype=torch.float64)
    whole = apply(model, planned(model, tmp_path, Budget(value=0.0, of="kv_cache")))
    with torch.no_grad():
        torch.testing.assert_close(whole(tokens).logits, model(tokens).logits, atol=1e-6, rtol=1e-6)


def test_more_than_half_is_refused():
    with pytest.raises(ValueError, match="cannot be reached"):
        METHOD.check(tiny_model().config, Budget(value=0.6, of="kv_cache"))
