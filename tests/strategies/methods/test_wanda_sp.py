"""Wanda-sp by a loop, and its cut layer by layer by whole passes of the model cut so far."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.methods.wanda_sp import WandaSP
from kvp.strategies.target import Target
from kvp.types import Budget, Plan
from tests.conftest import tiny_model
from tests.helpers.inputs import batches, naive_inputs
from tests.helpers.masks import mask

HEAD_DIM = 8
STRATEGY = WandaSP(allocator=Uniform(multiple_of=1))


def naive_score(model, space, x, weight):
    """Per unit, the mean over its columns of ||X_j|| mean_i |W_ij|."""
    columns = [
        sqrt(sum(t * t for t in x[:, j].tolist())) * sum(map(abs, weight[:, j].tolist())) / len(weight)
        for j in range(weight.shape[1])
    ]
    if space.kind == "ffn":
        return torch.tensor(columns, dtype=torch.float64)
    width = HEAD_DIM * model.config.num_attention_heads // model.config.num_key_value_heads
    means = [sum(columns[i : i + width]) / width for i in range(0, len(columns), width)]
    return torch.tensor(means, dtype=torch.float64)


def naive_scores(model, states_of, spaces):
    for space in spaces:
        projection = "self_attn.o_proj" if space.kind == "kv_group" else "mlp.down_proj"
        name = f"model.layers.{space.layer}.{projection}"
        weight = model.get_submodule(name).weight
        yield space, naive_score(model, space, naive_inputs(states_of, [name])[name], weight)


def test_scores_are_the_naive_ones(heads):
    model = tiny_model("llama", heads, dtype=torch.float64, num_hidden_layers=2)
    scores = STRATEGY.score(Target(model, torch.cat(batches()), 3, seed=0))
    for space, expected in naive_scores(model, model, scores):
        torch.testing.assert_close(scores[space], expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_each_layer_is_chosen_on_the_states_of_the_model_cut_so_far(heads, seed, tmp_path):
    model = tiny_model("llama", heads, dtype=torch.float64, seed=seed)
    before = {name: p.clone() for name, p in model.named_parameters()}
    target, budget = Target(model, torch.cat(batches()), 3, seed=0), Budget(value=0.4, of="block_params")
    scores = STRATEGY.score(target)
    dense = STRATEGY.plan(model.config, scores, budget, torch.zeros(3))
    plan = STRATEGY.search(target, scores, budget, torch.zeros(3), tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    chosen = {}
    for layer in range(3):
        own = [space for space in dense.keep if space.layer == layer]
        for space, score in list(naive_scores(model, mask(model, Plan(chosen)), own)):
            chosen[space] = score.topk(len(dense.keep[space])).indices.sort().values
    assert set(plan.keep) == set(chosen)
    assert all(torch.equal(plan.keep[space], keep) for space, keep in chosen.items())
    assert any(not torch.equal(plan.keep[space], keep) for space, keep in dense.keep.items())
