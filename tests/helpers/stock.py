"""Pruned models that ordinary Hugging Face classes can hold."""

from __future__ import annotations

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from kvp.models.surgery import apply
from kvp.models.unfused import fused_state
from kvp.types import Plan
from tests.conftest import random_plan, tiny_model

ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


def fused(twin):
    """A dense Phi-3 in transformers' own class, with the weights of its twin."""
    fields = {name: value for name, value in twin.config.to_dict().items() if not name.startswith("kvp_")}
    config = Phi3Config(
        **{name: value for name, value in fields.items() if name not in ("model_type", "architectures")}
    )
    model = Phi3ForCausalLM(config)
    model.load_state_dict(fused_state(twin.config, twin.state_dict()))
    return model.to(twin.dtype).eval()


def shared_plan(model, pairs):
    """The rope pairs `pairs` in every head and layer, and as many value channels, different in every one."""
    free = random_plan(model, ["qk", "vo"])
    keep = {}
    for space in free.keep:
        groups, width = space.shape
        if space.kind == "qk":
            keep[space] = torch.tensor([list(pairs)] * groups)
        else:
            generator = torch.Generator().manual_seed(space.layer)
            scores = torch.rand(groups, width, generator=generator)
            keep[space] = scores.topk(2 * len(pairs)).indices.sort().values
    return Plan(keep)


def stock_model(family, heads, rope="default", pairs=(0, 2, 3), **changes):
    theta = {"rope_theta": 1000.0}
    model = tiny_model(
        family, heads, rope_parameters=ROPES[rope] | theta, attention_bias=False, mlp_bias=False, **changes
    )
    return apply(model, shared_plan(model, pairs))
