"""Compensation against naive sums, its promise per layer, and biases that survive the disk."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvp.models.masks import masks_of
from kvp.models.shapes import layer_shapes, size
from kvp.models.surgery import apply
from kvp.strategies.allocation.allocate import Global
from kvp.strategies.compensation.compensate import Bias, LeastSquares
from kvp.strategies.methods.flap import FLAP
from kvp.strategies.methods.numerical import Numerical
from kvp.strategies.signals.moments import Moments
from kvp.strategies.target import Target
from kvp.types import Budget
from tests.conftest import NETWORKS, random_plan, refitted, tiny_model
from tests.helpers.inputs import batches, naive_inputs
from tests.helpers.masks import mask


@pytest.fixture(params=NETWORKS)
def family(request) -> str:
    return request.param


def errors(model, plan, compensated):
    """Per compensated module, the mean squared error of its output on the dense inputs."""
    keeps = {name: axes[1] for name, axes in masks_of(model.config, plan).items() if 1 in axes}
    found = {}
    for name, x in naive_inputs(model, keeps).items():
        module = model.get_submodule(name)
        weight = compensated.edits.get(f"{name}.weight", module.weight)
        dense_bias = torch.zeros(len(weight)) if module.bias is None else module.bias
        bias = compensated.edits.get(f"{name}.bias", dense_bias)
        target = x @ module.weight.T + dense_bias
        output = x[:, keeps[name]] @ weight[:, keeps[name]].T + bias
        found[name] = (output - target).square().mean().item()
    return found


def test_moments_equal_the_naive_ones():
    x = torch.randn(50, 7, dtype=torch.float64) + 3
    joint, single = Moments(7, covariance=True), Moments(7)
    for rows in x.split(8):
        joint.add(rows)
        single.add(rows)
    torch.testing.assert_close(joint.mean, x.mean(0))
    torch.testing.assert_close(joint.scatter / joint.count, x.T.cov(correction=0))
    torch.testing.assert_close(joint.gram, x.T @ x)
    torch.testing.assert_close(single.scatter, joint.scatter.diagonal())
    torch.testing.assert_close(single.gram, x.square().sum(0))


def test_error_falls_in_every_layer(family, heads):
    model = tiny_model(family, heads, dtype=torch.float64)
    plan = random_plan(model, ["vo", "ffn"])
    plain = errors(model, plan, plan)
    bias = errors(model, plan, refitted(Bias(), model, batches(), plan))
    squares = errors(model, plan, refitted(LeastSquares(ridge=1e-4), model, batches(), plan))
    assert len(plain) == 2 * len(layer_shapes(model.config))
    for name in plain:
        assert squares[name] < bias[name] < plain[name]


@pytest.mark.parametrize("method", [FLAP, Numerical])
def test_error_falls_wherever_a_methods_own_plan_cuts(method, family, heads):
    model = tiny_model(family, heads, dtype=torch.float64)
    strategy = method(allocator=Global(multiple_of=1, max_ratio=1.0, per_cost=False))
    scores = strategy.score(Target(model, torch.cat(batches()), 2, seed=0))
    plan = strategy.plan(
        model.config, scores, Budget(value=0.4, of="block_params", tolerance=0.05), torch.zeros(3)
    )
    plain = {name: error for name, error in errors(model, plan, plan).items() if error > 0}
    bias, refit, columns = (
        errors(model, plan, refitted(compensation, model, batches(), plan))
        for compensation in (Bias(), LeastSquares(ridge=1e-4), LeastSquares(intercept=False))
    )
    assert {name.split(".")[2] for name in plain} == {"0", "1", "2"}
    for name in plain:
        assert refit[name] <= bias[name] < plain[name]
        assert columns[name] < plain[name]


def test_bias_is_the_mean_of_what_is_removed():
    model = tiny_model("mistral", "gqa", dtype=torch.float64)
    plan = random_plan(model, ["kv_group", "ffn"])
    edits = refitted(Bias(), model, batches(), plan).edits
    for name, axes in masks_of(model.config, plan).items():
        if 1 in axes:
            mean, weight = naive_inputs(model, [name])[name].mean(0), model.get_submodule(name).weight
            torch.testing.assert_close(edits[f"{name}.bias"], (mean * ~axes[1]) @ weight.T)
            assert torch.equal(edits[f"{name}.weight"], weight)


def test_without_intercept_it_is_numerical_prunings_update():
    model = tiny_model("mistral", "gqa", dtype=torch.float64)
    plan = random_plan(model, ["kv_group", "ffn"])
    edits = refitted(LeastSquares(ridge=1e-9, intercept=False), model, batches(), plan).edits
    name = "model.layers.1.mlp.down_proj"
    gone, weight = ~masks_of(model.config, plan)[name][1], model.get_submodule(name).weight
    x = naive_inputs(model, [name])[name]
    inverse, selector = torch.linalg.inv(2 * x.T @ x), torch.eye(len(gone), dtype=x.dtype)[:, gone]
    change = inverse @ selector @ torch.linalg.inv(selector.T @ inverse @ selector) @ selector.T @ weight.T
    torch.testing.assert_close(
        edits[f"{name}.weight"][:, ~gone], (weight.T - change).T[:, ~gone], rtol=1e-4, atol=1e-6
    )
    assert all(key.endswith(".weight") for key in edits)


def test_least_squares_equals_lstsq():
    model = tiny_model("llama", "gqa", dtype=torch.float64)
    plan = random_plan(model, ["kv_group", "ffn"])
    edits = refitted(LeastSquares(ridge=1e-9), model, batches(), plan).edits
    name = "model.layers.1.mlp.down_proj"
    keep = masks_of(model.config, plan)[name][1]
    x, module = naive_inputs(model, [name])[name], model.get_submodule(name)
    design = torch.cat([x[:, keep], torch.ones(len(x), 1)], dim=1).double()
    solution = torch.linalg.lstsq(design, x @ module.weight.T + module.bias).solution
    torch.testing.assert_close(
        design @ solution, x[:, keep] @ edits[f"{name}.weight"][:, keep].T + edits[f"{name}.bias"]
    )


def test_unlimited_ridge_is_the_bias_alone():
    model = tiny_model(dtype=torch.float64)
    plan = random_plan(model, ["vo", "ffn"])
    far, bias = (refitted(c, model, batches(), plan).edits for c in (LeastSquares(ridge=1e9), Bias()))
    assert far.keys() == bias.keys()
    for name in far:
        torch.testing.assert_close(far[name], bias[name], atol=1e-6, rtol=1e-6)


def test_masked_equals_sliced(family, heads, tokens):
    model = tiny_model(family, heads, dtype=torch.float64)
    plan = refitted(LeastSquares(), model, batches(), random_plan(model, ["kv_group", "vo", "ffn"]))
    with torch.no_grad():
        assert (apply(model, plan)(tokens).logits - mask(model, plan)(tokens).logits).abs().max() < 1e-6


def test_biases_count_and_survive_the_disk(family, tokens, tmp_path):
    model = tiny_model(family)
    sliced = apply(model, refitted(Bias(), model, batches(), random_plan(model, ["vo", "ffn"])))
    parameters = {id(p): p.numel() for p in sliced.parameters()}
    assert size(sliced.config, layer_shapes(sliced.config)).params == sum(parameters.values())
    sliced.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, sliced(tokens).logits)


def test_a_plan_that_cuts_no_input_is_left_alone():
    model = tiny_model()
    plan = random_plan(model, ["qk"])
    assert refitted(LeastSquares(), model, batches(), plan).edits == {}


@pytest.mark.parametrize("ridge", [0, -1.0])
def test_ridge_out_of_range(ridge):
    with pytest.raises(ValueError, match="ridge must be > 0"):
        LeastSquares(ridge=ridge)
