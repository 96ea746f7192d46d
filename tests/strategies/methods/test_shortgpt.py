"""Block influence against a token-by-token loop over the states that a plain pass shows."""

from __future__ import annotations

import math

import pytest
import torch

from kvp.strategies.methods.shortgpt import ShortGPT
from kvp.strategies.target import Target
from tests.conftest import tiny_model


@pytest.fixture
def target(heads):
    model = tiny_model("llama", heads, num_hidden_layers=2)
    ids = torch.randint(3, 96, (5, 11), generator=torch.Generator().manual_seed(2))
    return Target(model, ids, batch_size=2, seed=4)


def residual_stream(model, ids):
    """Per layer: the states before it, between its sublayers, and after it."""
    seen = {}

    def keep(key):
        return lambda module, args, kwargs: seen.__setitem__(
            key, args[0] if args else kwargs["hidden_states"]
        )

    handles = [model.model.norm.register_forward_pre_hook(keep("end"), with_kwargs=True)]
    for n, layer in enumerate(model.model.layers):
        for place in ("input_layernorm", "post_attention_layernorm"):
            norm = getattr(layer, place)
            handles.append(norm.register_forward_pre_hook(keep((n, place)), with_kwargs=True))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    starts = [seen[n, "input_layernorm"] for n in range(len(model.model.layers))] + [seen["end"]]
    middles = [seen[n, "post_attention_layernorm"] for n in range(len(model.model.layers))]
    return [(starts[n], middles[n], starts[n + 1]) for n in range(len(middles))]


def naive(target, grouping, distance):
    first, last = {"block": (0, 2), "attention": (0, 1), "mlp": (1, 2)}[grouping]
    found = []
    for states in residual_stream(target.model, target.calibration):
        values = []
        for x, y in zip(states[first].flatten(0, 1), states[last].flatten(0, 1), strict=True):
            cosine = float(x @ y / (x.norm() * y.norm()))
            values.append(1 - cosine if distance == "cosine" else math.acos(cosine) / math.pi)
        found.append(sum(values) / len(values))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("grouping", ["block", "attention", "mlp"])
@pytest.mark.parametrize("distance", ["cosine", "angular"])
def test_block_influence_matches_a_naive_loop(target, grouping, distance):
    (found,) = ShortGPT(grouping=grouping, distance=distance).score(target).values()
    torch.testing.assert_close(found, naive(target, grouping, distance), rtol=1e-5, atol=1e-7)


def test_a_block_that_does_nothing_has_no_influence():
    model = tiny_model(num_hidden_layers=3)
    with torch.no_grad():
        for module in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            module.weight.zero_()
            module.bias.zero_()
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    (found,) = ShortGPT().score(Target(model, ids, batch_size=2, seed=0)).values()
    assert abs(found[1]) < 1e-6 < 1e-3 < min(found[0], found[2])
