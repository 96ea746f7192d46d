"""Latent layers: queries read the values as keys that never turn, as in multi-head latent attention."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvp.models.joined import joined
from kvp.models.masks import masked
from kvp.models.shapes import layer_shapes, size
from kvp.models.surgery import apply
from tests.conftest import random_plan, tiny_model


def latent_model(family="llama", heads="gqa"):
    """A joined model with random queries of the latent."""
    model = joined(tiny_model(family, heads), 1, latent=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_latent_proj" in name:
                parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@torch.no_grad()
def test_the_latent_changes_nothing_while_its_queries_are_zero(family, heads, tokens):
    model = tiny_model(family, heads)
    latent = joined(model, 1, latent=True)
    assert (latent(tokens).logits - model(tokens).logits).abs().max() < 1e-5
    shapes = layer_shapes(latent.config)
    assert size(latent.config, shapes).params == sum(p.numel() for p in latent.parameters())
    assert sum(s.kv_width for s in shapes) == sum(s.kv_width for s in layer_shapes(model.config))
    assert all(s.query_head_dim == s.qk_head_dim + s.v_head_dim for s in shapes)


@torch.no_grad()
def test_attention_is_the_softmax_of_both_parts(tokens):
    """Attend by the formula, token by token: q_rope R k_rope + q_latent v, over the cached keys and values alone."""
    model = latent_model()
    layer = model.model.layers[0].self_attn
    x = torch.randn(1, 5, model.config.hidden_size)
    position = torch.arange(5)[None]
    cos, sin = (table[0] for table in model.model.rotary_emb(x, position)[:2])
    got, _ = layer(x, position_embeddings=model.model.rotary_emb(x, position), attention_mask=None)
    pairs = torch.tensor(layer.rope_pairs[0])
    heads, turned, width = model.config.num_attention_heads, layer.qk_head_dim // 2, layer.v_head_dim

    def turn(vector, at):
        first, second = vector[:turned], vector[turned:]
        c, s = cos[at][pairs], sin[at][pairs]
        return torch.cat([first * c - second * s, second * c + first * s])

    q, still = layer.q_proj(x)[0].view(5, heads, -1), layer.q_latent_proj(x)[0].view(5, heads, -1)
    k, v = layer.k_proj(x)[0], layer.v_proj(x)[0]
    for t in range(5):
        read = []
        for head in range(heads):
            logits = torch.stack(
                [turn(q[t, head], t) @ turn(k[s], s) + still[t, head] @ v[s] for s in range(t + 1)]
            )
            read.append((logits * layer.scaling).softmax(0) @ v[: t + 1])
        expected = layer.o_proj(torch.cat(read))
        assert read[0].shape == (width,)
        assert (got[0, t] - expected).abs().max() < 1e-5


@torch.no_grad()
def test_masked_is_sliced(heads, tokens, tmp_path):
    model = latent_model(heads=heads)
    plan = random_plan(model, ["qk", "vo", "ffn"])
    sliced = apply(model, plan)
    with masked(model, plan):
        expected = model(tokens).logits
    assert (sliced(tokens).logits - expected).abs().max() < 1e-5
    shapes = layer_shapes(sliced.config)
    assert size(sliced.config, shapes).params == sum(p.numel() for p in sliced.parameters())
    sliced.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, sliced(tokens).logits)


@torch.no_grad()
def test_the_cache_holds_turning_keys_and_the_latent_only(tokens):
    sliced = apply(model := latent_model(), random_plan(model, ["qk", "vo"]))
    whole = sliced(tokens).logits
    first = sliced(tokens[:, :-1], use_cache=True)
    layer = first.past_key_values.layers[0]
    shape = layer_shapes(sliced.config)[0]
    assert (layer.keys.shape[-1], layer.values.shape[-1]) == (shape.qk_head_dim, shape.v_head_dim)
    step = sliced(tokens[:, -1:], past_key_values=first.past_key_values, use_cache=True)
    assert (step.logits[:, -1] - whole[:, -1]).abs().max() < 1e-5
