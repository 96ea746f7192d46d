"""What the tests of sparse methods share: small problems, and a method applied to a tiny model."""

from __future__ import annotations

from pathlib import Path

import torch

from kvp.strategies.signals.moments import Moments
from kvp.strategies.target import Target
from kvp.types import Budget


def problem(rows=10, columns=16, tokens=60, seed=0):
    """A weight (rows, columns), and inputs (tokens, columns) that hang together, with their moments."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = draw(tokens, columns) @ draw(columns, columns) * (0.2 + torch.rand(columns, generator=generator))
    moments = Moments(columns, covariance=True)
    moments.add(inputs)
    return draw(rows, columns), inputs, moments


def error(weight, pruned, inputs):
    """||X W^T - X V^T||^2 relative to ||X W^T||^2."""
    return ((inputs @ (weight - pruned).T).square().sum() / (inputs @ weight.T).square().sum()).item()


def lowest_of(scores, count):
    """The `count` lowest of a dict of scores, by name; of equal ones the first."""
    return set(sorted(scores, key=lambda name: scores[name])[:count])


def sparse_plan(strategy, model, ratio, directory, samples=4):
    ids = torch.randint(3, 96, (samples, 24), generator=torch.Generator().manual_seed(6))
    target = Target(model, ids if strategy.needs_calibration else None, batch_size=2, seed=1)
    budget = Budget(value=ratio, of="sparsity")
    strategy.check(model.config, budget)
    profile = torch.zeros(model.config.num_hidden_layers)
    Path(directory).mkdir(exist_ok=True)
    return strategy.search(target, strategy.score(target), budget, profile, Path(directory))
