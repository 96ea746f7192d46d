"""Mosaic: outliers by a naive loop, targets by the formula, and SparseGPT at those targets."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from kvp.models.linears import all_linears
from kvp.strategies.methods.mosaic import Mosaic, outliers, targets
from kvp.strategies.methods.sparsegpt import SparseGPT
from kvp.strategies.signals.moments import Moments
from tests.conftest import tiny_config, tiny_model
from tests.strategies.sparse import problem, sparse_plan

METHOD = Mosaic(block_size=16, outlier=2.0)


def test_outliers_match_a_naive_loop():
    weight, inputs, _ = problem()
    moments = Moments(16)
    moments.add(inputs)
    rows, columns = weight.shape
    scores = [
        abs(weight[i, j].item()) * sum(x[j].item() ** 2 for x in inputs) ** 0.5
        for i in range(rows)
        for j in range(columns)
    ]
    mean = sum(scores) / len(scores)
    expected = sum(score > 2 * mean for score in scores) / len(scores)
    assert 0 < expected < 0.5
    assert outliers(weight, moments, 2.0) == pytest.approx(expected)
    joint = Moments(16, covariance=True)
    joint.add(inputs)
    assert outliers(weight, joint, 2.0) == pytest.approx(expected)


def drawn(config):
    generator = torch.Generator().manual_seed(0)
    return {linear.module: float(torch.rand(1, generator=generator)) for linear in all_linears(config)}


def test_targets_follow_owls_map_within_each_projection():
    config = tiny_config()
    found = drawn(config)
    made = targets(config, found, 0.7, 0.08)
    for kind in ("q_proj", "o_proj", "down_proj"):
        names = [name for name in found if name.endswith(kind)]
        d = [found[name] for name in names]
        r = [2 * 0.08 * (value - min(d)) / (max(d) - min(d)) for value in d]
        keep = [value - sum(r) / len(r) + (1 - 0.7) for value in r]
        assert [made[name] for name in names] == pytest.approx([1 - value for value in keep])
        assert max(d) == d[min(range(3), key=lambda n: made[names[n]])]  # most outliers, fewest zeros


@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 0.97])
def test_targets_have_the_asked_mean_over_all_weights_and_stay_in_bounds(ratio):
    config = tiny_config(num_hidden_layers=5)
    made = targets(config, drawn(config), ratio, 0.08)
    weights = {linear.module: linear.rows * linear.columns for linear in all_linears(config)}
    mean = sum(made[name] * count for name, count in weights.items()) / sum(weights.values())
    assert mean == pytest.approx(ratio, abs=1e-9)
    assert min(made.values()) >= min(0.01, ratio)
    assert max(made.values()) <= 0.99
    alike = targets(config, dict.fromkeys(weights, 0.2), ratio, 0.08)
    assert list(alike.values()) == pytest.approx([ratio] * len(alike))


def test_each_projection_is_pruned_to_its_target_as_sparsegpt_does(tmp_path):
    model = tiny_model(dtype=torch.float64)
    plan = sparse_plan(METHOD, model, 0.6, tmp_path / "a")
    found = {name: part.item() for name, part in load_file(tmp_path / "a" / "outliers.safetensors").items()}
    assert len(set(found.values())) > 3
    made = targets(model.config, found, 0.6, METHOD.spread)
    zeros = 0
    for linear in all_linears(model.config):
        gone = (plan.edits[linear.weight] == 0).sum().item()
        assert gone == METHOD.count(linear.rows, linear.columns, made[linear.module])
        zeros += gone
    total = sum(linear.rows * linear.columns for linear in all_linears(model.config))
    assert zeros / total == pytest.approx(0.6, abs=0.01)
    uniform = replace(METHOD, spread=0.0)
    same = sparse_plan(SparseGPT(block_size=16), model, 0.6, tmp_path / "b").edits
    assert all(
        torch.equal(e, same[name])
        for name, e in sparse_plan(uniform, model, 0.6, tmp_path / "c").edits.items()
    )
    again = sparse_plan(METHOD, model, 0.6, tmp_path / "d")
    assert all(torch.equal(edit, again.edits[name]) for name, edit in plan.edits.items())


def test_a_search_goes_on_from_the_files_of_a_killed_one(tmp_path):
    """The dense model's outliers and the first layer are those on the disk, even if another run left them."""
    model, killed = tiny_model(dtype=torch.float64), tmp_path / "killed"
    other = sparse_plan(METHOD, model, 0.3, tmp_path / "other").edits
    (killed / "edits").mkdir(parents=True)
    shutil.copy(tmp_path / "other/edits/0.safetensors", killed / "edits/0.safetensors")
    shutil.copy(tmp_path / "other/outliers.safetensors", killed / "outliers.safetensors")
    (killed / "edits/1.partial").write_text("half a file")
    written = (killed / "outliers.safetensors").stat().st_mtime_ns
    edits = sparse_plan(METHOD, model, 0.6, killed).edits
    assert (killed / "outliers.safetensors").stat().st_mtime_ns == written
    zeros = {name: (edit == 0).double().mean() for name, edit in edits.items()}
    assert all(torch.equal(edits[name], other[name]) for name in edits if ".0." in name)
    assert all(zeros[name] > 0.45 for name in edits if ".0." not in name)


def test_options_out_of_range():
    with pytest.raises(ValueError, match="one sparsity for all projections"):
        replace(METHOD, pattern="2:4")
    with pytest.raises(ValueError, match="spread must be >= 0, got -1"):
        replace(METHOD, spread=-1)


def test_a_sparsity_that_rounding_misses_is_refused(tmp_path):
    method = replace(METHOD, compare="row", block_size=8)
    with pytest.raises(ValueError, match=r"would be 0\.\d+, as the part of each row is rounded down"):
        sparse_plan(method, tiny_model(), 0.5, tmp_path)
