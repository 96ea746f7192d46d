"""Magnitude: the smallest weights of a matrix, or of each row, by a naive loop."""

from __future__ import annotations

import pytest
import torch

from kvp.strategies.methods.magnitude_sparse import MagnitudeSparse
from tests.strategies.sparse import lowest_of, problem


@pytest.mark.parametrize("compare", ["matrix", "row"])
def test_a_naive_loop_zeroes_the_same(compare):
    weight, _, _ = problem()
    weight[2, 3] = -weight[4, 5]  # equal magnitudes
    rows, columns = weight.shape
    expected = weight.clone()
    scores = {(i, j): abs(weight[i, j].item()) for i in range(rows) for j in range(columns)}
    pools = (
        [scores]
        if compare == "matrix"
        else [{k: v for k, v in scores.items() if k[0] == i} for i in range(rows)]
    )
    for pool in pools:
        for i, j in lowest_of(pool, int(0.55 * len(pool))):
            expected[i, j] = 0
    assert torch.equal(MagnitudeSparse(compare=compare).pruner(None)(weight, 0.55), expected)


def test_equal_weights_do_not_cost_more_than_was_asked():
    weight = torch.tensor([[0.5, -0.5, 0.5, 0.5], [1.0, 0.5, -0.5, 2.0]])
    pruned = MagnitudeSparse().pruner(None)(weight, 0.5)
    assert pruned.tolist() == [[0, 0, 0, 0], [1.0, 0.5, -0.5, 2.0]]
