"""What autograd keeps is counted exactly: against the tensors that a real forward pass saves."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvp.estimate.kept import Adapter, kept_bytes
from kvp.recovery.lora import PROJECTIONS

TOKENS = 2 * 24
SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "head_dim": 16,
}


def saved_bytes(model, inputs):
    """Return the bytes of the tensors that a pass saves for backward, without the parameters, each storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen, held = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        inputs(model)
    return sum(seen.values())


def per_layer(make, prepare):
    """Return the bytes per token that a third layer adds to two."""
    torch.manual_seed(0)
    ids = torch.randint(50, (2, 24))
    found = []
    for layers in (2, 3):
        model = prepare(make(layers))
        found.append(saved_bytes(model, lambda m: m(input_ids=ids, use_cache=False, logits_to_keep=1)))
    return (found[1] - found[0]) / TOKENS


def llama(dtype, groups):
    config = LlamaConfig(**SIZES, num_key_value_heads=groups, dtype=dtype)

    def make(layers):
        config.num_hidden_layers = layers
        return LlamaForCausalLM(config).to(dtype).requires_grad_(False)

    return config, make


def frozen(model):
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.requires_grad_(True))
    return model


def with_gradients(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj" in name)
    return frozen(model)


def adapted(dropout):
    def prepare(model):
        import peft

        config = peft.LoraConfig(r=2, target_modules=list(PROJECTIONS), lora_dropout=dropout)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=True).train()

    return prepare


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["mqa", "gqa", "mha"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_keeps_what_is_counted(dtype, groups):
    config, make = llama(dtype, groups)
    count = {"config": config, "layer": 0, "width": dtype.itemsize}
    assert per_layer(make, frozen) == kept_bytes(**count)
    assert per_layer(make, with_gradients) == kept_bytes(**count, gradients=("attention", "mlp"))
    for dropout in (0.0, 0.1):
        adapter = Adapter(rank=2, modules=PROJECTIONS, dropout=dropout > 0)
        assert per_layer(make, adapted(dropout)) == kept_bytes(**count, adapter=adapter)


def test_query_key_norms_keep_their_inputs():
    config = Qwen3Config(**SIZES, num_key_value_heads=2, num_hidden_layers=1, dtype="bfloat16")

    def make(layers):
        config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
        return Qwen3ForCausalLM(config).bfloat16().requires_grad_(False)

    assert per_layer(make, frozen) == kept_bytes(config, 0, width=2)


def test_norms_around_a_sublayer_are_counted():
    config = Gemma3TextConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, dtype="bfloat16")

    def make(layers):
        config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
        return Gemma3ForCausalLM(config).bfloat16().requires_grad_(False)

    assert per_layer(make, frozen) == pytest.approx(kept_bytes(config, 0, width=2), rel=0.01)


def test_an_adapter_has_as_many_parameters_as_peft_trains():
    config, make = llama(torch.float32, 2)
    model = adapted(0.0)(make(2))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert Adapter(rank=2, modules=PROJECTIONS).params(config) == trained
