"""Joined KV heads: the same function in other shapes, that can be cut like any."""

from __future__ import annotations

import pytest
import torch

from kvp.models.joined import joined, joined_config
from kvp.models.shapes import layer_shapes, size
from kvp.models.surgery import apply
from kvp.serving.mla_check import mla_layout
from kvp.types import Plan
from tests.conftest import HEADS, exact_norms, random_plan, tiny_config, tiny_model
from tests.helpers.masks import mask
from tests.helpers.stock import ROPES

FAMILIES = ("llama", "mistral", "qwen2")  # the others norm queries and keys
DIVISORS = [
    (heads, n) for heads, (_, groups) in HEADS.items() for n in range(1, groups + 1) if groups % n == 0
]


def logits(model, tokens):
    with torch.no_grad():
        return exact_norms(model)(tokens).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("heads", "number"), DIVISORS)
def test_joined_heads_leave_the_function_as_it_is(family, heads, number, tokens):
    model = tiny_model(family, heads, dtype=torch.float64)
    twin = joined(model, number)
    torch.testing.assert_close(logits(twin, tokens), logits(model, tokens))
    before, after = (size(m.config, layer_shapes(m.config)) for m in (model, twin))
    assert {shape.num_key_value_heads for shape in layer_shapes(twin.config)} == {number}
    assert after.kv_bytes_per_token == before.kv_bytes_per_token
    assert after.params == sum(p.numel() for p in twin.parameters())
    assert layer_shapes(joined_config(model.config, number)) == layer_shapes(twin.config)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_joined_as_well(family, tokens):
    model = tiny_model(family, "mha", dtype=torch.float64)
    pruned = apply(model, random_plan(model, ["attention", "qk", "vo"]))
    torch.testing.assert_close(logits(joined(pruned, 2), tokens), logits(pruned, tokens))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_cut_after_joining_masked_equals_sliced(family, heads, tokens):
    model = joined(tiny_model(family, heads, dtype=torch.float64), 1)
    plan = random_plan(model, ["qk", "vo"])
    plan = Plan(plan.keep, folded=2)
    sliced = logits(apply(model, plan), tokens)
    torch.testing.assert_close(sliced, logits(mask(model, plan), tokens))
    assert (sliced - logits(model, tokens)).abs().max() > 1e-3


def test_no_number_is_no_joining():
    model = tiny_model()
    assert joined(model, None) is model
    assert joined_config(model.config, None) is model.config


@pytest.mark.parametrize("number", [0, 3, 8])
def test_a_number_that_does_not_divide_is_refused(number):
    with pytest.raises(ValueError, match="must divide the 4 KV heads"):
        joined_config(tiny_config("llama", "mha"), number)


def test_norms_over_head_dim_are_refused():
    with pytest.raises(ValueError, match="keep the heads apart"):
        joined_config(tiny_config("qwen3"), 1)


@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_scaled_frequencies_follow_their_pairs(heads, tokens):
    """Llama 3.1 scales its slow frequencies; joined and cut heads gather them, and MLA engines refuse them by name."""
    rope = {
        "rope_parameters": ROPES["llama3"] | {"rope_theta": 5e5},
        "attention_bias": False,
        "mlp_bias": False,
    }
    model = tiny_model("llama", heads, dtype=torch.float64, **rope)
    twin = joined(model, 1)
    torch.testing.assert_close(logits(twin, tokens), logits(model, tokens))
    plan = random_plan(twin, ["qk", "vo"])
    torch.testing.assert_close(logits(apply(twin, plan), tokens), logits(mask(twin, plan), tokens))
    with pytest.raises(ValueError, match=r"this model has 'llama3': use --to mla_longrope"):
        mla_layout(twin.config, "mla")
    assert mla_layout(twin.config, "mla_longrope").keeps_rope is False
