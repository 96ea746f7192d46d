"""Allocators of ranks against their rules, counted by hand or one rank at a time."""

from __future__ import annotations

import math

import pytest
import torch

from kvp.strategies.allocation.pools import Part, Pool
from kvp.strategies.allocation.ranks import Proportional, Residual, TruncationLoss
from kvp.types import Space

PROFILE = torch.zeros(4)


def pools(*scores, kinds=("k_latent",)):
    """Pools of layers 0, 1, ... for each kind in turn; a row of scores each."""
    made = []
    for kind in kinds:
        for layer, row in enumerate(scores):
            values = torch.as_tensor(row, dtype=torch.float32).view(1, -1)
            space = Space(kind, layer, tuple(values.shape))
            made.append(Pool((Part(space, values),), units=values.shape[1], layer=layer))
    return made


def test_what_stays_is_in_proportion_to_the_sum_of_scores():
    given = pools([1.0] * 10, [3.0] * 10, [2.0] * 10)
    removed = Proportional(max_ratio=1.0).targets(given, [2.0] * 3, 36.0, PROFILE)  # 12 of 30 units stay
    assert [10 - units for units in removed] == pytest.approx([2, 6, 4])
    removed = Proportional(max_ratio=1.0).targets(given, [2.0] * 3, 12.0, PROFILE)  # 24 stay, 12 do not fit
    assert [10 - units for units in removed] == pytest.approx([14 / 3, 10, 28 / 3])
    nothing = Proportional().targets(pools([0.0] * 4, [0.0] * 4), [1.0, 1.0], 4.0, PROFILE)
    assert nothing == pytest.approx([2, 2])


def test_ratios_are_inverse_to_the_logarithm_of_the_loss():
    rows = [[9.0, 16.0, 100.0, 100.0], [1.0, 3.0, 100.0, 100.0], [400.0, 500.0, 100.0, 124.0]]
    given = pools(*rows, kinds=("k_latent", "v_latent"))
    removed = TruncationLoss(max_ratio=1.0).targets(given, [1.0] * 6, 12.0, PROFILE)  # half of each kind
    weights = [1 / math.log(1 + math.sqrt(sum(sorted(row)[:2]))) for row in rows]
    assert removed == pytest.approx([6 * w / sum(weights) for w in weights] * 2)
    assert removed[1] > removed[0] > removed[2]


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.65])
def test_ranks_go_to_the_residual_that_falls_most(ratio):
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.rand(40, generator=generator) ** power * 10).tolist() for power in (1, 2, 3, 4)]
    given = pools(*rows)
    allocator = Residual(max_ratio=1.0)
    removed = allocator.targets(given, [3.0] * 4, ratio * 480, PROFILE)
    average = 40 * (1 - ratio)
    first = int(average) // 2
    ranks = [first] * 4

    def gain(layer):
        energies = sorted(rows[layer], reverse=True)
        if ranks[layer] >= min(40, 2 * int(average)):
            return -1.0
        residual = energies[ranks[layer]] / sum(energies[ranks[layer] :])
        return residual * math.sqrt((4 - layer) / 2.5) / math.sqrt(ranks[layer] / first)

    for _ in range(round(4 * average) - 4 * first):
        ranks[max(range(4), key=gain)] += 1
    assert [40 - units for units in removed] == ranks
    assert len(set(ranks)) > 1


def test_pools_without_energy_are_divided_alike():
    given = pools([0.0] * 8, [0.0] * 8, kinds=("k_latent", "v_latent"))
    for allocator in (Residual(max_ratio=1.0), TruncationLoss(max_ratio=1.0), Proportional(max_ratio=1.0)):
        removed = allocator.targets(given, [1.0] * 4, 16.0, torch.zeros(2))
        assert sum(removed) == pytest.approx(16)


def test_keys_and_values_share_the_ratio():
    given = pools([5.0, 1.0, 1.0, 1.0], [1.0] * 4, kinds=("k_latent", "v_latent"))
    given[2:] = pools([1e6] * 4, [1e6] * 4, kinds=("v_latent",))
    for allocator in (Residual(max_ratio=1.0), TruncationLoss(max_ratio=1.0)):
        removed = allocator.targets(given, [1.0] * 4, 8.0, torch.zeros(2))
        assert sum(removed[:2]) == pytest.approx(4)
        assert sum(removed[2:]) == pytest.approx(4)
