"""Compensation against naive sums, its promise per layer, and biases that survive the disk."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvp.models.masks import mask, masks_of
from kvp.models.shapes import layer_shapes, size
from kvp.models.surgery import apply
from kvp.strategies.compensate import Bias, LeastSquares, Moments
from kvp.strategies.walk import caught_inputs
from tests.conftest import random_plan, tiny_model


def batches(count=6):
    ids = torch.randint(3, 96, (count, 20), generator=torch.Generator().manual_seed(3))
    return ids.split(2)


def naive_inputs(model, names):
    """(tokens, in_features) per module, from plain passes of the whole model."""
    seen = {name: [] for name in names}
    for ids in batches():
        with torch.no_grad(), caught_inputs(model, names) as caught:
            model(ids)
        for name in names:
            seen[name].append(caught[name].flatten(0, 1))
    return {name: torch.cat(rows) for name, rows in seen.items()}


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
    moments = Moments(7, covariance=True)
    for rows in x.split(8):
        moments.add(rows)
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.scatter / moments.count, x.T.cov(correction=0))


def test_error_falls_in_every_layer(family, heads):
    model = tiny_model(family, heads, dtype=torch.float64)
    plan = random_plan(model, ["vo", "ffn"])
    plain = errors(model, plan, plan)
    bias = errors(model, plan, Bias().refit(model, batches(), plan))
    squares = errors(model, plan, LeastSquares(ridge=1e-4).refit(model, batches(), plan))
    assert len(plain) == 2 * len(layer_shapes(model.config))
    for name in plain:
        assert squares[name] < bias[name] < plain[name]


def test_least_squares_equals_lstsq():
    model = tiny_model("llama", "gqa", dtype=torch.float64)
    plan = random_plan(model, ["kv_group", "ffn"])
    edits = LeastSquares(ridge=1e-9).refit(model, batches(), plan).edits
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
    far, bias = (c.refit(model, batches(), plan).edits for c in (LeastSquares(ridge=1e9), Bias()))
    assert far.keys() == bias.keys()
    for name in far:
        torch.testing.assert_close(far[name], bias[name], atol=1e-6, rtol=1e-6)


def test_masked_equals_sliced(family, heads, tokens):
    model = tiny_model(family, heads, dtype=torch.float64)
    plan = LeastSquares().refit(model, batches(), random_plan(model, ["kv_group", "vo", "ffn"]))
    with torch.no_grad():
        assert (apply(model, plan)(tokens).logits - mask(model, plan)(tokens).logits).abs().max() < 1e-6


def test_biases_count_and_survive_the_disk(family, tokens, tmp_path):
    model = tiny_model(family)
    sliced = apply(model, Bias().refit(model, batches(), random_plan(model, ["vo", "ffn"])))
    parameters = {id(p): p.numel() for p in sliced.parameters()}
    assert size(sliced.config, layer_shapes(sliced.config)).params == sum(parameters.values())
    sliced.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, sliced(tokens).logits)


def test_a_plan_that_cuts_no_input_is_left_alone():
    model = tiny_model()
    plan = random_plan(model, ["qk"])
    assert LeastSquares().refit(model, batches(), plan).edits == {}


@pytest.mark.parametrize("ridge", [0, -1.0])
def test_ridge_out_of_range(ridge):
    with pytest.raises(ValueError, match="ridge must be > 0"):
        LeastSquares(ridge=ridge)
