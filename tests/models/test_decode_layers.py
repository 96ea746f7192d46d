"""One kernel for all layers gives what the model's own forward gives, and leaves what it has not to others."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from kvp.measurement.cache import fixed_cache
from kvp.models import decode_layers, native
from kvp.models.decode_layers import DecodeLayers, serves
from kvp.models.family import FAMILIES
from kvp.models.joined import joined
from kvp.models.mustafar import Mustafar
from kvp.models.packed_cache import cache_for
from kvp.models.surgery import apply
from kvp.strategies.compensation.compensate import Bias
from kvp.types import Plan
from tests.conftest import random_plan, refitted, tiny_config, tiny_model

SERVED = ("llama", "mistral", "phi3", "qwen2", "smollm3")
TOKENS = 9
needs_kernel = pytest.mark.skipif(native.library(decode_layers.SOURCE) is None, reason="no C++ compiler")


def build(family="llama", heads="gqa", kinds=(), **changes):
    """A model of heads of 32 channels, whose cuts leave 16."""
    model = tiny_model(family, heads, head_dim=32, **changes)
    plan = random_plan(model, list(kinds), keep=0.5)
    even = {space: keep for space, keep in plan.keep.items() if space.kind not in ("qk", "vo")}
    for space, keep in plan.keep.items():
        if space not in even:  # as many in each layer
            rows = [
                torch.randperm(space.shape[-1], generator=torch.Generator().manual_seed(row))
                for row in range(9)
            ]
            kept = {"qk": 8, "vo": 16}[space.kind]
            even[space] = torch.stack([row[:kept].sort().values for row in rows[: keep.shape[0]]])
    return apply(model, Plan(even)) if kinds else model


@torch.inference_mode()
def hidden_by_kernel(model, ids):
    """The states after the last layer, token by token."""
    cache, _ = fixed_cache(
        model.config, batch_size=len(ids), length=TOKENS, dtype=torch.float32, device=torch.device("cpu")
    )
    layers = DecodeLayers(model, [layer.states for layer in cache.layers])
    embedded = model.get_input_embeddings()(ids)
    return torch.cat([layers.step(embedded[:, at : at + 1], at) for at in range(ids.shape[1])], dim=1)


@torch.inference_mode()
def check(model, batch_size=3):
    ids = torch.randint(96, (batch_size, TOKENS), generator=torch.Generator().manual_seed(batch_size))
    assert serves(model)
    found = model.base_model.norm(hidden_by_kernel(model, ids))
    expected = model.base_model(ids).last_hidden_state
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


@needs_kernel
@pytest.mark.parametrize("kinds", [(), ("qk", "vo"), ("kv_group", "ffn"), ("attention", "mlp")])
@pytest.mark.parametrize("family", SERVED)
def test_the_kernel_is_the_forward_pass(family, heads, kinds):
    check(build(family, heads, kinds))


@needs_kernel
@pytest.mark.parametrize("batch_size", [1, 8, 9, 17])
def test_any_number_of_sequences(batch_size):
    check(build(kinds=("qk", "vo")), batch_size)


@needs_kernel
def test_joined_heads_and_added_biases():
    check(joined(build(), 1, False))
    model = build()
    plan = random_plan(model, ["kv_group", "ffn"])
    batches = [torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(0))]
    check(apply(model, refitted(Bias(), model, batches, plan)))


def sparse(model, window=4):
    """Return the model with a cache that drops half of every key and three tenths of every value."""
    twin = apply(model, Plan({})) if not hasattr(model.config, "kvp_layers") else model
    twin.config.kvp_cache = asdict(Mustafar(key_sparsity=0.5, value_sparsity=0.3, window=window))
    return twin


@needs_kernel
@pytest.mark.parametrize("window", [0, 4, 32])
@pytest.mark.parametrize("kinds", [(), ("qk", "vo")])
def test_a_sparse_cache_is_read_and_written_as_the_packed_one_is(window, kinds, heads):
    check_sparse(sparse(build(heads=heads, kinds=kinds), window))


@torch.inference_mode()
def check_sparse(model):
    ids = torch.randint(96, (9, TOKENS), generator=torch.Generator().manual_seed(0))
    assert serves(model)
    cache = cache_for(model.config)
    expected = [
        model.base_model(ids[:, at : at + 1], past_key_values=cache).last_hidden_state for at in range(TOKENS)
    ]
    found = model.base_model.norm(hidden_by_kernel(model, ids))
    torch.testing.assert_close(found, torch.cat(expected, dim=1), atol=2e-4, rtol=2e-4)


@needs_kernel
@torch.inference_mode()
def test_of_equal_channels_as_many_stay_and_numbers_that_are_none_harm_nothing():
    """A vector of one number, or of none that can be ordered, fills its place and no more."""
    model = sparse(build(), window=0)
    for parameter in (parameter for name, parameter in model.named_parameters() if "v_proj" in name):
        parameter.zero_()
    cache, _ = fixed_cache(
        model.config, batch_size=2, length=TOKENS, dtype=torch.float32, device=torch.device("cpu")
    )
    layers = DecodeLayers(model, [layer.states for layer in cache.layers])
    embedded = model.get_input_embeddings()(torch.tensor([[3], [5]]))
    for at in range(4):
        assert layers.step(embedded, at).isfinite().all()
    values = cache.layers[0].states[1]
    kept = values.values.shape[-1]
    bits = (values.bitmap[:, :, :3, :, None] >> torch.arange(8)) & 1
    assert (bits.flatten(-2).sum(-1) == kept).all()
    assert torch.equal(bits.flatten(-2)[0, 0, 0].nonzero().flatten(), torch.arange(kept)), (
        "the first of equals"
    )
    layers.step(embedded * torch.nan, 4)
    before = values.values[:, :, 5:].clone()
    layers.step(embedded, 5)
    assert torch.equal(values.values[:, :, 5:], before)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(build(kinds=("qk", "vo")))
        check_sparse(sparse(build()))
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_without_vector_instructions_it_is_the_same(monkeypatch, tmp_path):
    """Other processors than x86 with AVX2 take the plain loops."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", tuple(flag for flag in native.FLAGS if flag != "-march=native"))
    native.library.cache_clear()
    try:
        check(build(kinds=("qk", "vo")), 9)
    finally:
        native.library.cache_clear()


@needs_kernel
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(SERVED)))
def test_other_layers_are_left_to_other_kernels(family):
    assert not serves(tiny_model(family))


@needs_kernel
def test_widths_and_rotations_that_the_kernel_has_not():
    assert not serves(tiny_model(head_dim=12))
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not serves(tiny_model(head_dim=32, rope_parameters=dynamic))
    partial = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert not serves(tiny_model("phi3", head_dim=32, rope_parameters=partial))


@needs_kernel
def test_what_a_layer_computes_beside_its_matrices_is_left_to_it():
    assert serves(tiny_model(head_dim=16))
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    assert not serves(inject_adapter_in_model(adapters, tiny_model(head_dim=16)))
    hooked = tiny_model(head_dim=16)
    hooked.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    assert not serves(hooked)
    norm = tiny_model(head_dim=16)
    norm.model.layers[0].input_layernorm.bfloat16()
    assert not serves(norm)
    turned = tiny_model(head_dim=16)
    query = turned.model.layers[0].self_attn.q_proj
    query.weight = torch.nn.Parameter(query.weight.detach().t().contiguous().t())
    assert not serves(turned)
    fused = tiny_config("phi3", head_dim=16)
    assert not serves(FAMILIES["phi3"].causal_lm(fused))
