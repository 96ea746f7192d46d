"""ALPS against its equations written out: a linear solve per step, conjugate gradients row by row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experiments.scripts.reconstruction import METHODS, errors
from kvp.strategies.methods.alps import ALPS, Problem
from kvp.strategies.methods.sparsegpt import SparseGPT
from kvp.strategies.target import Target
from tests.conftest import tiny_model
from tests.strategies.sparse import error, lowest_of, problem


def project(weight, count):
    """The weight without its `count` smallest entries, and what stays."""
    rows, columns = weight.shape
    scores = {(i, j): abs(weight[i, j].item()) for i in range(rows) for j in range(columns)}
    keep = torch.ones_like(weight, dtype=torch.bool)
    for i, j in lowest_of(scores, count):
        keep[i, j] = False
    return torch.where(keep, weight, 0), keep


def naive(weight, gram, ratio, damping=0.01, rho=0.1, max_steps=300, refit_steps=10):
    """As mazumder-lab/ALPS does, in the paper's layout: B, D and V are (in, out)."""
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    scale = hessian.diagonal().sqrt()
    hessian = torch.diag(1 / scale) @ hessian @ torch.diag(1 / scale)
    dense = (weight * scale).T
    count, kept = int(ratio * weight.numel()), weight.numel() - int(ratio * weight.numel())
    goal, dual = hessian @ dense, torch.zeros_like(dense)

    def cut(matrix):
        values, keep = project(matrix.T, count)  # ties go row by row of W
        return values.T, keep.T

    start, support = cut(dense)
    sparse, grown, history = start, False, []
    for step in range(max_steps):
        dense = torch.linalg.solve(hessian + rho * torch.eye(len(gram)), goal - dual + rho * sparse)
        sparse, now = cut(dense + dual / rho)
        dual = dual + rho * (dense - sparse)
        if (step + 1) % 3 == 0:
            change = int((now != support).sum())
            support = now
            if change / kept > 0.1:
                grown, rho = True, rho * 1.3
            elif change / kept > 0.005:
                grown, rho = True, rho * 1.2
            elif change and grown:
                rho *= 1.1
            elif change:
                rho, sparse, dual = rho / 5, start, torch.zeros_like(dual)
            elif grown:
                break
            else:
                rho /= 5
            history.append(rho)
            rho = min(rho, 1e6)
            if step >= 30 and change / kept < 3e-4:
                break
    solution, keep = cut(dense)
    for column in range(solution.shape[1]):
        on = keep[:, column].nonzero().flatten()
        matrix, right = hessian[on][:, on], goal[on, column]
        x = solution[on, column]
        residual = right - matrix @ x
        direction = residual.clone()
        for _ in range(refit_steps):
            if residual.norm() < 1e-14:
                break
            length = residual @ residual / (direction @ matrix @ direction)
            x = x + length * direction
            new = residual - length * matrix @ direction
            direction = new + (new @ new) / (residual @ residual) * direction
            residual = new
        solution[on, column] = x
    return solution.T / scale, history


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_every_step_is_that_of_the_equations(ratio, seed):
    weight, _, moments = problem(seed=seed)
    expected, history = naive(weight, moments.gram, ratio)
    assert len(set(history)) > 3  # rho did grow
    torch.testing.assert_close(ALPS().pruner(moments)(weight, ratio), expected, rtol=1e-6, atol=1e-8)


def test_a_rho_too_large_falls_and_starts_anew():
    """With 1e4 the support moves little or not: rho falls by fifths before it grows."""
    weight, _, moments = problem(rows=20, columns=32)
    expected, history = naive(weight, moments.gram, 0.5, rho=1e4)
    assert history[0] == 1e4 / 5
    assert max(history) > min(history) != history[-1]
    torch.testing.assert_close(ALPS(rho=1e4).pruner(moments)(weight, 0.5), expected, rtol=1e-6, atol=1e-8)


def test_the_refit_ends_in_the_least_squares_of_the_support():
    weight, _, moments = problem()
    hessian = moments.gram / len(moments.gram)
    posed = Problem(weight, hessian, *torch.linalg.eigh(hessian))
    start, keep = project(weight, 80)
    refitted = posed.refit(start, keep, 60)
    assert torch.equal(refitted == 0, ~keep)
    losses = []
    for steps in range(12):
        change = posed.refit(start, keep, steps) - weight
        losses.append(((change @ hessian) * change).sum().item())
    assert losses == sorted(losses, reverse=True)
    for i in range(len(weight)):
        on = keep[i].nonzero().flatten()
        exact = torch.linalg.solve(hessian[on][:, on], (weight[i] @ hessian)[on])
        torch.testing.assert_close(refitted[i, on], exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_it_beats_sparsegpt(pattern, seed):
    ratio = 0.7 if pattern == "unstructured" else 0.5
    weight, inputs, moments = problem(rows=24, columns=40, tokens=200, seed=seed)
    errors = [
        error(weight, method.pruner(moments)(weight, ratio), inputs)
        for method in (ALPS(pattern=pattern), SparseGPT(pattern=pattern))
    ]
    assert errors[0] <= errors[1]


def test_it_beats_sparsegpt_in_every_matrix_of_a_model():
    model = tiny_model(num_hidden_layers=2)
    ids = torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(6))
    found = dict(errors(Target(model, ids, batch_size=4, seed=0), METHODS, 0.7))
    assert len(found) == 2 * 7
    for name, lost in found.items():
        assert lost["alps"] <= lost["sparsegpt"] < 1, name


def test_float32_weights_give_float32_and_about_the_same():
    weight, inputs, moments = problem(rows=24, columns=40, tokens=200)
    exact, rounded = (ALPS().pruner(moments)(part, 0.6) for part in (weight, weight.float()))
    assert rounded.dtype == torch.float32
    assert error(weight, rounded.double(), inputs) == pytest.approx(error(weight, exact, inputs), rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rho": 0}, "rho must be > 0, got 0"),
        ({"damping": -1}, "damping must be > 0, got -1"),
        ({"max_steps": -1}, "max_steps must be >= 0, got -1"),
        ({"compare": "block"}, "compare must be one of matrix, row"),
    ],
)
def test_options_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        replace(ALPS(), **change)
