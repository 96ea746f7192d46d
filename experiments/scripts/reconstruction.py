"""Measure what sparse methods lose of each matrix's outputs, all on the same inputs: those of the dense model.

    python -m experiments.scripts.reconstruction [option=value ...]

Options are those of `python -m kvp`: model, calibration, `ratio.value` (0.7) and `strategy.pattern`. One JSON line
per matrix, ||X W^T - X V^T||^2 / ||X W^T||^2 of every method with its other defaults, and one that sums up.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from statistics import geometric_mean

import torch

from experiments.scripts.chosen import chosen
from kvp.models.linears import linears
from kvp.pipeline.gate import check_model, check_sources
from kvp.pipeline.session import Session
from kvp.pipeline.stages import make
from kvp.strategies.methods.alps import ALPS
from kvp.strategies.methods.magnitude_sparse import MagnitudeSparse
from kvp.strategies.methods.sparsegpt import SparseGPT
from kvp.strategies.methods.wanda import Wanda
from kvp.strategies.signals.moments import input_moments
from kvp.strategies.signals.walk import walk
from kvp.strategies.target import Target
from kvp.strategies.templates.sparse import SparseStrategy

METHODS = {"magnitude": MagnitudeSparse(), "wanda": Wanda(), "sparsegpt": SparseGPT(), "alps": ALPS()}


def errors(
    target: Target, methods: Mapping[str, SparseStrategy], ratio: float
) -> Iterator[tuple[str, dict[str, float]]]:
    """Per matrix, the relative squared error of every method; one layer at a time."""
    for visit in walk(target.model, target.batches, "reconstruction", offload=True):
        fed = linears(target.config, visit.layer)
        moments = input_moments(visit, [group[0].module for group in fed], covariance=True)
        for group in fed:
            inputs = moments.pop(group[0].module)
            gram, pruners = inputs.gram, {name: method.pruner(inputs) for name, method in methods.items()}
            for linear in group:
                weight = visit.model.get_parameter(linear.weight).detach()
                weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
                whole = (weight.double() @ gram * weight).sum()
                lost = {}
                for name, prune in pruners.items():
                    change = (prune(weight, ratio) - weight).double()
                    lost[name] = ((change @ gram * change).sum() / whole).item()
                yield linear.module, lost


def main() -> None:
    """Print the lines; progress goes to stderr."""
    x = chosen(["strategy=sparsegpt", "recovery=none", "ratio=sparsity", "ratio.value=0.7", *sys.argv[1:]])
    assert isinstance(x.strategy, SparseStrategy)
    methods = {name: replace(method, pattern=x.strategy.pattern) for name, method in METHODS.items()}
    check_sources(x)
    session = Session(x)
    check_model(x, make(session, "dense").config)
    found = {}
    for name, lost in errors(session.target(), methods, x.budget.value):
        found[name] = lost
        print(json.dumps({"matrix": name, **lost}), flush=True)
    result = {
        "matrices": len(found),
        "sparsity": x.budget.value,
        "pattern": x.strategy.pattern,
        "geometric_mean": {name: geometric_mean(lost[name] for lost in found.values()) for name in METHODS},
        "alps_at_most_sparsegpt": sum(lost["alps"] <= lost["sparsegpt"] for lost in found.values()),
        "command": " ".join(["python -m experiments.scripts.reconstruction", *sys.argv[1:]]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
