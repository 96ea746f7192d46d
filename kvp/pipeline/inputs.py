"""What decides the result of each stage: the inputs of its fingerprint.

They name what a stage builds on by fingerprint, not by result, so that a whole run can be foretold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from kvp.data.corpora import find
from kvp.pipeline.experiment import Experiment
from kvp.provenance import hardware

Inputs = dict[str, Any]


def identity_hash(identity: Mapping[str, Any]) -> str:
    """The fingerprint of a model that is there already."""
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def model(x: Experiment, identity: Mapping[str, Any]) -> Inputs:
    """Of writing the dense model."""
    return {"node": _without(x.node["model"], "dtype", "name"), "identity": identity}


def join(x: Experiment, dense: str) -> Inputs:
    """Of rewriting the dense model with fewer KV heads."""
    return {"model": dense, "num_key_value_heads": x.strategy.joins}


def score(x: Experiment, dense: str) -> Inputs:
    """Of scoring; neither budget nor allocator are among them."""
    return {
        "model": dense,
        "dtype": str(x.dtype),
        "strategy": _chosen(x, *x.strategy.late),
        "calibration": x.calibration_identity(),
        "seed": x.node["seed"],
    }


def sensitivity(x: Experiment, dense: str, scored: str) -> Inputs:
    """Of the profile that the allocator asks for."""
    return {
        "model": dense,
        "dtype": str(x.dtype),
        "calibration": x.calibration_identity(),
        "probe": x.strategy.probe_inputs(scored),
    }


def search(x: Experiment, dense: str, scored: str, sensed: str | None) -> Inputs:
    """Of a plan that is searched for; what compensates for the cut is not among them."""
    return {
        "model": dense,
        "dtype": str(x.dtype),
        "score": scored,
        "sensitivity": sensed,
        "strategy": _chosen(x, "compensation"),
        "budget": x.node["ratio"],
        "calibration": x.calibration_identity(),
        "seed": x.node["seed"],
    }


def prune(x: Experiment, dense: str, scored: str, sensed: str | None, found: str | None) -> Inputs:
    """Of plan and cut; `found` is what searched for the plan."""
    inputs = {
        "model": dense,
        "score": scored,
        "sensitivity": sensed,
        "strategy": _chosen(x),
        "budget": x.node["ratio"],
    }
    if found:
        inputs |= {"search": found}
    if x.cache is not None:
        inputs |= {"cache": asdict(x.cache)}
    if x.strategy.compensation is not None:
        inputs |= {"dtype": str(x.dtype), "calibration": x.calibration_identity()}
    return inputs


def recover(x: Experiment, dense: str, pruned: str) -> Inputs:
    """Of training; the dense model decides only as a teacher."""
    assert x.recovery is not None
    inputs = {"model": pruned, "recovery": x.recovery.identity(x.corpora), "seed": x.node["seed"]}
    if x.recovery.distillation:
        inputs |= {"teacher": dense}
    return inputs


def sparsity(model: str) -> Inputs:
    """Of the zeros of a model."""
    return {"model": model}


def perplexity(x: Experiment, model: str, name: str) -> Inputs:
    """Of the perplexity of a model on one corpus."""
    assert x.perplexity is not None
    return {
        "model": model,
        "dtype": str(x.dtype),
        "protocol": _without(asdict(x.perplexity), "corpora"),
        "corpus": find(x.corpora, name).identity(x.perplexity.part),
    }


def zero_shot(x: Experiment, model: str, task: str) -> Inputs:
    """Of a model's accuracy on one task."""
    assert x.zero_shot is not None
    return {
        "model": model,
        "dtype": str(x.dtype),
        "protocol": _without(asdict(x.zero_shot), "tasks"),
        "task": task,
    }


def measure(x: Experiment, model: str) -> Inputs:
    """Of a model's speed and memory, on this machine."""
    assert x.protocol is not None
    return {
        "model": model,
        "protocol": asdict(x.protocol),
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": list(hardware(x.device).values()),
    }


def _chosen(x: Experiment, *late: str) -> Inputs:
    """The strategy's options; a null is left out, so that a new option changes no old fingerprint."""
    options = _without(x.node["strategy"], *late)
    return {name: value for name, value in options.items() if value is not None}


def _without(node: Mapping[str, Any], *names: str) -> Inputs:
    return {key: value for key, value in node.items() if key not in names}
