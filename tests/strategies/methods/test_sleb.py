"""SLEB against a greedy loop that cuts a model for every candidate of every step."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from kvp.models.surgery import apply
from kvp.strategies.methods.sleb import SLEB
from kvp.strategies.target import Target
from kvp.types import Budget, Plan, Space
from tests.conftest import tiny_model

LAYERS = 6
BLOCKS = Space("block", None, (LAYERS,))


@pytest.fixture
def target(heads):
    model = tiny_model("llama", heads, num_hidden_layers=LAYERS, dtype=torch.float64)
    ids = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(2))
    return Target(model, ids, batch_size=2, seed=4)


@torch.no_grad()
def naive_order(target, kind, first, last, steps):
    gone = []
    for _ in range(steps):
        losses = {}
        for n in range(first, LAYERS - last):
            if n not in gone:
                kept = torch.tensor([i for i in range(LAYERS) if i not in (*gone, n)])
                cut = apply(target.model, Plan({Space(kind, None, (LAYERS,)): kept}))
                losses[n] = cut(target.calibration, labels=target.calibration).loss.item()
        gone.append(min(losses, key=losses.__getitem__))
    return gone


@pytest.mark.parametrize(("kind", "first", "last"), [("block", 1, 1), ("block", 0, 0), ("mlp", 1, 0)])
def test_places_are_those_of_a_naive_greedy_loop(target, kind, first, last):
    strategy = SLEB(grouping=kind, protect_first=first, protect_last=last)
    (place,) = strategy.score(target).values()
    order = naive_order(target, kind, first, last, steps=3)
    assert [place[n].item() for n in order] == [0, 1, 2]
    assert sorted(place.tolist()) == [0, 1, 2, 3, 3, 3]


def test_the_order_does_not_depend_on_how_far_it_goes(target):
    (short,) = SLEB(max_ratio=0.34).score(target).values()
    (long,) = SLEB(max_ratio=1.0).score(target).values()
    assert (short < 2).sum() == 2
    assert torch.equal(short < 2, long < 2)
    assert long[0] == long[-1] == 4  # protected: behind the four that were ranked


def test_it_decides_on_the_first_samples_if_told(target):
    (few,) = SLEB(samples=2).score(target).values()
    (alone,) = SLEB().score(replace(target, calibration=target.calibration[:2])).values()
    assert torch.equal(few, alone)
    with pytest.raises(ValueError, match=r"strategy\.samples must be >= 1 or null, got 0"):
        SLEB(samples=0)


def test_it_is_not_the_one_shot_order(target):
    """Removing a block changes what the others are worth; else greedy would have no point."""
    (place,) = SLEB(max_ratio=1.0).score(target).values()
    losses = SLEB().losses(target, list(range(1, 5)), "once")
    assert place[1:5].argsort().tolist() != losses.argsort().tolist()


def test_every_budget_takes_the_head_of_one_order(target):
    strategy = SLEB(max_ratio=0.7)
    scores = strategy.score(target)
    gone = []
    for n in range(5):
        budget = Budget(value=n / LAYERS, of="blocks")
        plan = strategy.plan(target.config, scores, budget, torch.zeros(LAYERS))
        gone.append(set(range(LAYERS)) - set(plan.keep[BLOCKS].tolist()))
    assert [len(blocks) for blocks in gone] == [0, 1, 2, 3, 4]
    assert all(fewer < more for fewer, more in pairwise(gone))
