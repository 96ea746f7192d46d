"""Bits by worth: against every division there is, and what each kept channel gets."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from kvp.models.directions import Directions, stored_bits
from kvp.strategies.allocation.bits import divide, divided, errors
from kvp.types import Plan, Space
from tests.conftest import tiny_config

CHOICES = (0, 2, 3, 4)


def loss(worths, bits):
    lost = dict(zip(CHOICES, errors(CHOICES, 32), strict=True))
    return sum(w * lost[b] for w, b in zip(worths, bits, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_no_division_of_as_many_bits_loses_less(seed):
    """At budgets that the division spends whole; at others a step may be left over."""
    worths = torch.rand(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    parts = [worths[:2][None], worths[2:][None]]
    found = [torch.cat([part.flatten() for part in divide(parts, n, 4, 32)]).tolist() for n in range(6, 26)]
    for bits in found:
        spent = sum(stored_bits(b, 32) for b in bits)
        every = [
            loss(worths, other)
            for other in product(CHOICES, repeat=5)
            if sum(stored_bits(b, 32) for b in other) <= spent and any(other[:2]) and any(other[2:])
        ]
        assert loss(worths, bits) == pytest.approx(min(every))
        assert any(bits[:2]) and any(bits[2:])


def test_errors_are_those_of_a_uniform_quantiser_between_extremes():
    numbers = torch.randn(100_000, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = numbers.amin(1, keepdim=True), numbers.amax(1, keepdim=True)
    for bits, expected in zip(CHOICES[1:], errors(CHOICES, 32)[1:], strict=True):
        step = (high - low) / (2**bits - 1)
        back = ((numbers - low) / step).round() * step + low
        assert (back - numbers).square().mean() == pytest.approx(expected, rel=0.15)


def test_a_channel_that_stays_has_the_bits_of_its_own_worth():
    qk, vo = Space("qk", 0, (1, 4)), Space("vo", 0, (1, 40))
    worth = torch.full((1, 40), 1e-9)
    worth[0, 20:36] = 8.0
    scores = {qk: torch.tensor([[90.0, 0.0, 50.0, 1e-9]]), vo: worth}
    plan = Plan({qk: torch.tensor([[0, 2, 3]]), vo: torch.arange(18, 40)[None]})
    config = tiny_config(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    # two bits each: 4 channels of keys with a scale per channel, 16 of values with one scale: 12 + 32 + 32 bits
    cache = divided(Directions(bits=80 / 16), config, plan, scores)
    stored = ["".join("1" if digit > "0" else "0" for digit in text) for text in (*cache.keys, *cache.values)]
    assert stored == ["110110", "00" + 16 * "1" + "0000"]
    with pytest.raises(ValueError, match="too few to store one direction per layer"):
        divided(Directions(bits=20 / 16), config, plan, scores)


@pytest.mark.parametrize("budget", [3, 100])
def test_a_budget_that_cannot_be_spent_names_what_can(budget):
    with pytest.raises(ValueError, match=r"the 4 channels that stay take 6 to 20: change cache\.bits"):
        divide([torch.ones(1, 2), torch.ones(1, 2)], budget, 4, 32)
