"""Numerical Pruning's closed form against Newton's method on the objective as it is printed."""

from __future__ import annotations

import torch

from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.methods.numerical import Numerical
from kvp.strategies.target import Target
from tests.conftest import tiny_model
from tests.helpers.inputs import batches, naive_inputs

HEAD_DIM = 8
STRATEGY = Numerical(allocator=Uniform(multiple_of=1))


def newton_mask(x, weight, ratio):
    """(D,) argmin of the relaxed problem, with a penalty that dwarfs the rest."""
    columns = weight.shape[1]
    penalty = 1e6 * x.square().sum() * weight.square().mean()

    def objective(z):
        error = (x @ weight.T - (x * z) @ weight.T).square().sum() / 2
        return error + penalty / 2 * (z.sum() - (1 - ratio) * columns).square()

    z = torch.full((columns,), 0.5, dtype=x.dtype)
    for _ in range(2):
        gradient = torch.autograd.functional.jacobian(objective, z)
        z = z - torch.linalg.solve(torch.autograd.functional.hessian(objective, z), gradient)
    return z


def test_scores_are_newtons(heads):
    ratio = 0.3
    model = tiny_model("llama", heads, dtype=torch.float64, num_hidden_layers=2)
    scores = STRATEGY.score(Target(model, torch.cat(batches()), 3, seed=0))
    for space, score in scores.items():
        projection = "self_attn.o_proj" if space.kind == "kv_group" else "mlp.down_proj"
        name = f"model.layers.{space.layer}.{projection}"
        x, weight = naive_inputs(model, [name])[name], model.get_submodule(name).weight.detach()
        mask = newton_mask(x, weight, ratio)
        if space.kind == "kv_group":
            per_group = HEAD_DIM * model.config.num_attention_heads // model.config.num_key_value_heads
            mask = torch.stack([mask[i : i + per_group].mean() for i in range(0, len(mask), per_group)])
        torch.testing.assert_close(score, (mask - 1) / ratio, rtol=1e-3, atol=1e-4)


def test_a_dead_neuron_goes_first():
    model = tiny_model(dtype=torch.float64)
    with torch.no_grad():
        for name in ("weight", "bias"):
            model.model.layers[1].mlp.up_proj.get_parameter(name)[7] = 0
    scores = STRATEGY.score(Target(model, torch.cat(batches()), 3, seed=0))
    assert all(score.isfinite().all() for score in scores.values())
    for space, score in scores.items():
        if (space.kind, space.layer) == ("ffn", 1):
            assert score.argmin() == 7


def test_a_layer_that_writes_nothing_is_scored():
    model = tiny_model(dtype=torch.float64)
    with torch.no_grad():
        for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            linear.weight.zero_()
    scores = STRATEGY.score(Target(model, torch.cat(batches()), 3, seed=0))
    assert all(score.isfinite().all() for score in scores.values())
