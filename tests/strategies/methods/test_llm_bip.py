"""LLM-BIP by loops over channels, and by what a removed unit really changes at the end of its block."""

from __future__ import annotations

import pytest
import torch

from kvp.models.masks import masked
from kvp.models.spaces import find_spaces
from kvp.models.surgery import apply
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.methods.llm_bip import LLMBIP
from kvp.strategies.signals.walk import hidden_states
from kvp.strategies.target import Target
from kvp.types import Plan
from tests.conftest import tiny_model
from tests.helpers.inputs import batches, naive_inputs

HEAD_DIM = 8
STRATEGY = LLMBIP(allocator=Uniform(multiple_of=1))


def naive_score(model, space):
    """Entries of |X| |W_D|, or of |X| |W_O| (I + |W_U| |W_D|) as full matrices, added up."""
    layer = model.model.layers[space.layer]
    out = "self_attn.o_proj" if space.kind == "kv_group" else "mlp.down_proj"
    name = f"model.layers.{space.layer}.{out}"
    x, weight = naive_inputs(model, [name])[name], model.get_submodule(name).weight.detach()
    up, down = layer.mlp.up_proj.weight.detach().T.abs(), layer.mlp.down_proj.weight.detach().T.abs()
    onwards = torch.eye(48, dtype=x.dtype) + (up @ down if space.kind == "kv_group" else 0)
    columns = [
        (x[:, [j]].abs() @ weight.T[[j]].abs() @ onwards).sum().item() / len(x) for j in range(x.shape[1])
    ]
    if space.kind == "ffn":
        return torch.tensor(columns, dtype=torch.float64)
    width = HEAD_DIM * model.config.num_attention_heads // model.config.num_key_value_heads
    return torch.tensor([sum(columns[i : i + width]) for i in range(0, len(columns), width)]).double()


def test_scores_are_the_naive_ones(heads):
    model = tiny_model("llama", heads, dtype=torch.float64, num_hidden_layers=2)
    for space, score in STRATEGY.score(Target(model, torch.cat(batches()), 4, seed=0)).items():
        torch.testing.assert_close(score, naive_score(model, space), rtol=1e-5, atol=1e-8)


def change(model, space, unit):
    """Mean over tokens of the summed absolute change of the first block's output without the unit."""
    keep = torch.tensor([i for i in range(space.shape[0]) if i != unit])
    total = 0.0
    for ids in batches():
        dense = hidden_states(model, 0, 1, input_ids=ids)
        with masked(model, Plan({space: keep})):
            total += (dense - hidden_states(model, 0, 1, input_ids=ids)).abs().sum().item()
    return total / torch.cat(batches()).numel()


def test_a_neuron_is_worth_what_the_block_loses_with_it():
    model = tiny_model("llama", "gqa", dtype=torch.float64)
    space = find_spaces(model.config, ["ffn"])[0]
    score = STRATEGY.score(Target(model, torch.cat(batches()), 4, seed=0))[space]
    with torch.no_grad():
        for neuron in (0, 7, 39):
            assert score[neuron].item() == pytest.approx(change(model, space, neuron), rel=1e-6)


def test_a_group_is_worth_at_least_what_the_block_loses_with_it():
    """Without an MLP behind it, where the bound is a bound: there are only the triangle's inequalities."""
    model = tiny_model("llama", "gqa", dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.model.layers[0].mlp.up_proj.parameters():
            parameter.zero_()
        space = find_spaces(model.config, ["kv_group"])[0]
        score = STRATEGY.score(Target(model, torch.cat(batches()), 4, seed=0))[space]
        for group in range(2):
            assert 0 < change(model, space, group) <= score[group].item()


def test_layers_without_a_sublayer_are_scored_by_what_they_have():
    model = tiny_model("llama", "gqa", dtype=torch.float64)
    attention, mlp = (find_spaces(model.config, [kind])[0] for kind in ("attention", "mlp"))
    pruned = apply(model, Plan({attention: torch.tensor([0, 1]), mlp: torch.tensor([1, 2])}))
    scores = STRATEGY.score(Target(pruned, torch.cat(batches()), 4, seed=0))
    assert {space.key for space in scores} == {"kv_group.0", "kv_group.1", "ffn.1", "ffn.2"}
    assert all(score.isfinite().all() for score in scores.values())
