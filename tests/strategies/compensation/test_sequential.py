"""The sequential refit against a naive one, layer after layer, on models that are really cut."""

from __future__ import annotations

import pytest
import torch

from kvp.models.masks import masks_of
from kvp.models.plans import edits_file
from kvp.models.surgery import apply
from kvp.strategies.compensation.compensate import LeastSquares
from kvp.strategies.compensation.sequential import Products, Sequential
from kvp.strategies.signals.walk import caught_inputs
from kvp.types import Plan
from tests.conftest import NETWORKS, random_plan, refitted, tiny_model
from tests.helpers.masks import mask

IDS = torch.randint(3, 96, (6, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=NETWORKS)
def family(request) -> str:
    return request.param


def inputs(model, name):
    with torch.no_grad(), caught_inputs(model, [name]) as caught:
        model(IDS)
    return caught[name].flatten(0, 1)


def naive(model, plan, ridge):
    """Refit o_proj, then down_proj, of each layer of a masked copy in turn, from passes of the whole copy."""
    copy, edits = mask(model, plan), {}
    for name, axes in masks_of(model.config, plan).items():
        if 1 not in axes:
            continue
        keep, module, dense = axes[1], copy.get_submodule(name), model.get_submodule(name)
        x, z = inputs(model, name), inputs(copy, name)[:, keep]
        y = x @ dense.weight.T
        prior = dense.weight[:, keep].detach()
        if dense.bias is not None:
            x, z, y = x - x.mean(0), z - z.mean(0), y - y.mean(0)
        d = ridge * (z.T @ z / len(z)).diagonal().mean()
        rows = torch.cat([z, (len(z) * d).sqrt() * torch.eye(z.shape[1], dtype=z.dtype)])
        wanted = torch.cat([y, (len(z) * d).sqrt() * prior.T])
        with torch.no_grad():
            module.weight[:, keep] = torch.linalg.lstsq(rows, wanted).solution.T
            if dense.bias is not None:
                shift = inputs(model, name).mean(0) @ dense.weight.T
                module.bias.copy_(
                    dense.bias + shift - inputs(copy, name)[:, keep].mean(0) @ module.weight[:, keep].T
                )
        edits[name] = module.weight.detach().clone()
    return edits


def test_it_is_the_naive_fit(family, heads):
    model = tiny_model(family, heads, dtype=torch.float64)
    plan = random_plan(model, ["vo", "ffn"])
    backwards = Plan(dict(reversed(plan.keep.items())))  # as a plan's file may list it
    found = refitted(Sequential(ridge=0.01), model, IDS.split(2), backwards)
    expected = naive(model, ordered(model, plan), 0.01)
    for name, weight in expected.items():
        keep = masks_of(model.config, plan)[name][1]
        torch.testing.assert_close(
            found.edits[f"{name}.weight"][:, keep], weight[:, keep], rtol=1e-6, atol=1e-8
        )


def ordered(model, plan):
    """The plan with its spaces layer by layer, values before neurons, so that `masks_of` lists them in order."""
    keep = dict(sorted(plan.keep.items(), key=lambda item: (item[0].layer, item[0].kind == "ffn")))
    return type(plan)(keep)


def test_it_comes_nearer_to_the_dense_logits_than_one_that_sees_dense_inputs(family, heads):
    model = tiny_model(family, heads, dtype=torch.float64)
    plan = random_plan(model, ["vo", "ffn"])

    def distance(found):
        with torch.no_grad():
            return (apply(model, found)(IDS).logits - model(IDS).logits).square().mean().item()

    sequential = distance(refitted(Sequential(ridge=1e-3), model, IDS.split(2), plan))
    static = distance(refitted(LeastSquares(ridge=1e-3, intercept=False), model, IDS.split(2), plan))
    assert sequential < static < distance(plan)


def test_masked_is_sliced_after_the_refit():
    model = tiny_model("llama", "gqa", dtype=torch.float64)
    found = refitted(Sequential(), model, IDS.split(2), random_plan(model, ["vo", "ffn"]))
    with torch.no_grad():
        torch.testing.assert_close(mask(model, found)(IDS).logits, apply(model, found)(IDS).logits)


def test_a_killed_refit_goes_on_after_the_last_layer(tmp_path):
    model = tiny_model("llama", "gqa", dtype=torch.float64)
    plan = random_plan(model, ["vo", "ffn"])
    whole = refitted(Sequential(), model, IDS.split(2), plan)

    def die(*_):
        raise KeyboardInterrupt

    with model.model.layers[1].register_forward_pre_hook(die), pytest.raises(KeyboardInterrupt):
        Sequential().refit(model, IDS.split(2), plan, tmp_path)
    done = edits_file(tmp_path, 0)
    written = done.stat().st_mtime_ns
    resumed = Sequential().refit(model, IDS.split(2), plan, tmp_path)
    assert done.stat().st_mtime_ns == written
    assert resumed.edits.keys() == whole.edits.keys()
    assert all(torch.equal(resumed.edits[name], edit) for name, edit in whole.edits.items())


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="ridge must be > 0"):
        Sequential(ridge=0)
    with pytest.raises(ValueError, match="sink_weight must be > 0 or null, got -1: tokens"):
        Sequential(sink_weight=-1)


@pytest.mark.parametrize("intercept", [True, False])
def test_a_token_that_counts_as_three_is_three_tokens(intercept):
    generator = torch.Generator().manual_seed(0)
    y, z = (torch.randn(9, width, generator=generator, dtype=torch.float64) for width in (4, 3))
    counts = torch.tensor([3, *[1] * 8])
    counted, repeated = Products(intercept=intercept), Products(intercept=intercept)
    counted.add(y, z, counts)
    repeated.add(y.repeat_interleave(counts, 0), z.repeat_interleave(counts, 0))
    prior = torch.zeros(4, 3, dtype=torch.float64)
    torch.testing.assert_close(counted.solve(prior, 0.1), repeated.solve(prior, 0.1))
    torch.testing.assert_close(counted.mean("wanted"), repeated.mean("wanted"))


def test_the_first_token_comes_nearer_if_it_counts_for_more():
    model = tiny_model(dtype=torch.float64)
    plan, name = random_plan(model, ["vo"]), "model.layers.0.self_attn.o_proj"
    keep = masks_of(model.config, plan)[name][1]
    x = inputs(model, name)
    wanted = x @ model.get_submodule(name).weight.T

    def error(sink_weight):
        found = refitted(Sequential(ridge=0.01, sink_weight=sink_weight), model, IDS.split(2), plan)
        off = x[:, keep] @ found.edits[f"{name}.weight"][:, keep].T - wanted
        return off.view(*IDS.shape, -1)[:, 0].norm(), off.norm()

    (sink, total), (heavy_sink, heavy_total) = error(None), error(100.0)
    assert heavy_sink < sink and total < heavy_total
    assert error(1.0) == (sink, total)


def test_a_ridge_that_rounding_swallows_is_refused():
    rows = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 40)
    sums = Products(intercept=False)
    sums.add(rows[:, :5], rows)
    assert sums.solve(torch.zeros(5, 40), 1e-3).isfinite().all()
    with pytest.raises(FloatingPointError, match="ridge=1e-15 is lost in rounding"):
        sums.solve(torch.zeros(5, 40), 1e-15)
