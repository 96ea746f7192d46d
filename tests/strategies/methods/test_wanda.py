"""Wanda: weights times input norms, by a naive loop."""

from __future__ import annotations

import math

import pytest
import torch

from kvp.strategies.methods.wanda import Wanda
from kvp.strategies.signals.moments import Moments
from tests.strategies.sparse import lowest_of, problem


@pytest.mark.parametrize("compare", ["row", "matrix"])
def test_a_naive_loop_zeroes_the_same(compare):
    weight, inputs, _ = problem()
    moments = Moments(weight.shape[1])
    for part in inputs.split(25):
        moments.add(part)
    rows, columns = weight.shape
    norms = [math.sqrt(sum(x[j].item() ** 2 for x in inputs)) for j in range(columns)]
    scores = {(i, j): abs(weight[i, j].item()) * norms[j] for i in range(rows) for j in range(columns)}
    pools = (
        [scores]
        if compare == "matrix"
        else [{k: v for k, v in scores.items() if k[0] == i} for i in range(rows)]
    )
    expected = weight.clone()
    for pool in pools:
        for i, j in lowest_of(pool, int(0.55 * len(pool))):
            expected[i, j] = 0
    assert torch.equal(Wanda(compare=compare).pruner(moments)(weight, 0.55), expected)


def test_two_of_four_are_the_best_of_each_run():
    weight, inputs, _ = problem()
    moments = Moments(weight.shape[1])
    moments.add(inputs)
    pruned = Wanda(pattern="2:4").pruner(moments)(weight, 0.5)
    norms = inputs.norm(dim=0)
    for i in range(weight.shape[0]):
        for start in range(0, weight.shape[1], 4):
            scores = {j: (weight[i, j].abs() * norms[j]).item() for j in range(start, start + 4)}
            gone = lowest_of(scores, 2)
            for j in scores:
                assert pruned[i, j] == (0 if j in gone else weight[i, j])
