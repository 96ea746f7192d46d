"""FLAP's metrics by a loop over tokens, and its cut by counting parameters."""

from __future__ import annotations

import statistics
from math import sqrt

import pytest
import torch

from kvp.models.shapes import layer_shapes, size
from kvp.models.spaces import find_spaces
from kvp.strategies.allocation.allocate import Global
from kvp.strategies.methods.flap import FLAP
from kvp.strategies.target import Target
from kvp.types import Budget
from tests.conftest import tiny_config, tiny_model
from tests.helpers.inputs import batches, naive_inputs

HEAD_DIM = 8
AL_AM = Global(multiple_of=1, max_ratio=1.0, per_cost=False)


def naive_columns(x, weight, metric, squared):
    """The z-scores of all columns of a projection with inputs `x`."""
    raw = []
    for j in range(weight.shape[1]):
        tokens, column = x[:, j].tolist(), weight[:, j].tolist()
        mean = sum(tokens) / len(tokens)
        variance = sum((t - mean) ** 2 for t in tokens) / len(tokens)
        value = {
            "wifv": variance * sum(w * w for w in column),
            "ifv": variance,
            "wifn": sqrt(sum(t * t for t in tokens)) * sum(map(abs, column)) / len(column),
        }[metric]
        raw.append(value * value if squared else value)
    mean, deviation = statistics.mean(raw), statistics.stdev(raw)
    return [(value - mean) / deviation for value in raw]


@pytest.mark.parametrize("metric", ["wifv", "ifv", "wifn"])
def test_scores_are_the_naive_ones(metric, heads):
    model = tiny_model("llama", heads, dtype=torch.float64, num_hidden_layers=2)
    scores = FLAP(allocator=AL_AM, metric=metric).score(Target(model, torch.cat(batches()), 3, seed=0))
    groups = model.config.num_key_value_heads
    per_group = HEAD_DIM * model.config.num_attention_heads // groups
    for space, score in scores.items():
        projection = "self_attn.o_proj" if space.kind == "kv_group" else "mlp.down_proj"
        name = f"model.layers.{space.layer}.{projection}"
        x, weight = naive_inputs(model, [name])[name], model.get_submodule(name).weight
        expected = naive_columns(x, weight, metric, squared=space.kind == "kv_group")
        if space.kind == "kv_group":
            expected = [
                sum(expected[group * per_group : (group + 1) * per_group]) / per_group
                for group in range(groups)
            ]
        assert score.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_head_counts_as_many_parameters_as_four_thirds_of_its_width_in_neurons():
    config = tiny_config("mistral", "mha", num_hidden_layers=6)
    generator = torch.Generator().manual_seed(3)
    scores = {s: torch.randn(s.shape, generator=generator) for s in find_spaces(config, ["kv_group", "ffn"])}
    ranked = sorted((score[i].item(), s, i) for s, score in scores.items() for i in range(len(score)))
    gone = ranked[:70]
    weight = sum(4 * HEAD_DIM / 3 if space.kind == "kv_group" else 1 for _, space, _ in gone)
    parameters = weight * 3 * config.hidden_size
    ratio = parameters / size(config, layer_shapes(config)).block_params
    plan = FLAP(allocator=AL_AM).plan(
        config, scores, Budget(value=ratio, of="block_params", tolerance=1e-6), torch.zeros(6)
    )
    assert any(space.kind == "kv_group" for _, space, _ in gone)
    removed = {(space, i) for _, space, i in gone}
    for space, score in scores.items():
        assert plan.keep[space].tolist() == [i for i in range(len(score)) if (space, i) not in removed]


def test_under_a_cache_budget_neurons_stay():
    config = tiny_config("llama", "mha", num_hidden_layers=6)
    spaces = find_spaces(config, ["kv_group", "ffn"])
    scores = {s: torch.rand(s.shape, generator=torch.Generator().manual_seed(1)) for s in spaces}
    plan = FLAP(allocator=AL_AM).plan(config, scores, Budget(value=0.25, of="kv_cache"), torch.zeros(6))
    assert sum(len(keep) for space, keep in plan.keep.items() if space.kind == "kv_group") == 18
    assert all(len(keep) == 40 for space, keep in plan.keep.items() if space.kind == "ffn")


def test_unknown_metric():
    with pytest.raises(ValueError, match=r"strategy\.metric must be one of wifv, ifv, wifn, got 'fluc'"):
        FLAP(allocator=AL_AM, metric="fluc")
