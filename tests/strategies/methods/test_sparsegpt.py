"""SparseGPT against Optimal Brain Surgeon written out: one inverse per column, one update per weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvp.strategies.methods.sparsegpt import SparseGPT
from kvp.strategies.signals.moments import Moments
from kvp.strategies.templates.surgeon import inverse_factor
from tests.strategies.sparse import error, lowest_of, problem

PLAIN = SparseGPT(block_size=8)


def naive(weight, gram, ratio, block_size, compare="block", kept=None, of=None, damping=0.01):
    weight, (rows, columns) = weight.clone(), weight.shape
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    gone = set()
    for j in range(columns):
        if of is None and j % block_size == 0:
            block = range(j, min(j + block_size, columns))
            scores = {
                (i, c): (weight[i, c] ** 2 / inverses[c][0, 0]).item() for i in range(rows) for c in block
            }
            pools = [scores]
            if compare == "row":
                pools = [{key: score for key, score in scores.items() if key[0] == i} for i in range(rows)]
            for pool in pools:
                gone |= lowest_of(pool, int(ratio * len(pool)))
        if of is not None and j % of == 0:
            for i in range(rows):
                run = range(j, j + of)
                gone |= lowest_of(
                    {(i, c): (weight[i, c] ** 2 / inverses[c][0, 0]).item() for c in run}, of - kept
                )
        for i in range(rows):
            if (i, j) in gone:
                weight[i, j:] -= weight[i, j].item() / inverses[j][0, 0] * inverses[j][0]
                weight[i, j] = 0
    return weight


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("compare", ["block", "row"])
@pytest.mark.parametrize("block_size", [8, 12, 128])
def test_every_update_is_that_of_optimal_brain_surgeon(block_size, compare, ratio):
    weight, _, moments = problem(columns=16)
    method = SparseGPT(block_size=block_size, compare=compare)
    expected = naive(weight, moments.gram, ratio, block_size, compare)
    torch.testing.assert_close(method.pruner(moments)(weight, ratio), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8), (1, 4)])
def test_n_of_m_is_chosen_as_the_columns_are_reached(kept, of):
    weight, _, moments = problem()
    method = replace(PLAIN, pattern=f"{kept}:{of}")
    expected = naive(weight, moments.gram, None, 8, kept=kept, of=of)
    torch.testing.assert_close(method.pruner(moments)(weight, 1 - kept / of), expected, rtol=1e-8, atol=1e-9)


def test_the_factor_holds_the_inverses_of_the_columns_left():
    _, _, moments = problem()
    gram = moments.gram
    factor = inverse_factor(gram, 0.01)
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(16)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(hessian))
    for j in range(16):
        torch.testing.assert_close(factor[j, j] ** 2, torch.linalg.inv(hessian[j:, j:])[0, 0])


def test_the_updates_lower_the_error():
    weight, inputs, moments = problem()
    pruned = PLAIN.pruner(moments)(weight, 0.5)
    assert error(weight, pruned, inputs) < 0.5 * error(weight, weight.masked_fill(pruned == 0, 0), inputs)


def test_an_input_that_is_always_zero_costs_nothing():
    weight, inputs, _ = problem()
    inputs[:, 5] = 0
    moments = Moments(16, covariance=True)
    moments.add(inputs)
    pruned = PLAIN.pruner(moments)(weight, 0.5)
    assert (pruned[:, 5] == 0).all()
    assert pruned.isfinite().all()
    alone = Moments(15, covariance=True)
    alone.add(inputs[:, [j for j in range(16) if j != 5]])
    assert ((pruned == 0).sum() - 10) < 10 * 15 * 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block_size must be >= 1, got 0"),
        ({"block_size": 6, "pattern": "2:4"}, "multiple of the 4 of strategy.pattern=2:4, got 6"),
        ({"damping": 0}, "damping must be > 0, got 0"),
        ({"compare": "matrix"}, "compare must be one of block, row"),
    ],
)
def test_options_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **change)
