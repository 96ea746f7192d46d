"""Calibration batches, and the inputs of modules from plain passes over them."""

from __future__ import annotations

import torch

from kvp.strategies.signals.walk import caught_inputs


def batches(count=6):
    ids = torch.randint(3, 96, (count, 20), generator=torch.Generator().manual_seed(3))
    return ids.split(2)


def naive_inputs(model, names):
    """(tokens, in_features) per module, from plain passes of the whole model."""
    seen = {name: [] for name in names}
    for ids in batches():
        with torch.no_grad(), caught_inputs(model, names) as caught:
            model(ids)
        for name in names:
            seen[name].append(caught[name].flatten(0, 1))
    return {name: torch.cat(rows) for name, rows in seen.items()}
