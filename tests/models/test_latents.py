"""Latents in place of keys and values: the same function, the naive attention, every kind of cache, and its bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from kvp.measurement.cache import fixed_cache
from kvp.measurement.count import cache_bytes_per_token, macs
from kvp.models.checkpoint.widths import Layer, check_widths
from kvp.models.joined import joined
from kvp.models.latents import heads_of_latent, with_latents, with_latents_config
from kvp.models.shapes import layer_shapes, size
from kvp.models.spaces import available_kinds, find_spaces
from kvp.models.surgery import apply
from tests.conftest import HEADS, exact_norms, random_plan, tiny_config, tiny_model
from tests.helpers.masks import mask

KINDS = ["k_latent", "v_latent", "ffn"]


def logits(model, tokens, **inputs):
    with torch.no_grad():
        return exact_norms(model)(tokens, **inputs).logits


def cut_model(family="llama", heads="gqa", key_heads=4, value_heads=None, **changes):
    """A model with random latents: every matrix is random, so that no expansion is an identity."""
    model = with_latents(tiny_model(family, heads, dtype=torch.float64, **changes), key_heads, value_heads)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_up_proj" in name:
                parameter.normal_(std=0.4)
    kinds = [kind for kind in KINDS if kind in available_kinds(model.config)]
    return exact_norms(apply(model, random_plan(model, kinds)))


@pytest.mark.parametrize(("key_heads", "value_heads"), [(1, None), (2, 4), (None, 1)])
def test_latents_leave_the_function_as_it_is(family, heads, key_heads, value_heads, tokens):
    model = tiny_model(family, heads, dtype=torch.float64)
    twin = with_latents(model, key_heads, value_heads)
    torch.testing.assert_close(logits(twin, tokens), logits(model, tokens))
    before, after = (size(m.config, layer_shapes(m.config)) for m in (model, twin))
    assert after.kv_bytes_per_token == before.kv_bytes_per_token
    assert after.params == sum(p.numel() for p in twin.parameters())
    config = with_latents_config(model.config, key_heads, value_heads)
    assert layer_shapes(config) == layer_shapes(twin.config)


def test_masked_is_sliced(family, heads, tokens, tmp_path):
    model = with_latents(tiny_model(family, heads, dtype=torch.float64), 2, None)
    plan = random_plan(
        model, [kind for kind in (*KINDS, "attention") if kind in available_kinds(model.config)]
    )
    sliced = apply(model, plan)
    torch.testing.assert_close(logits(sliced, tokens), logits(mask(model, plan), tokens))
    assert (logits(sliced, tokens) - logits(model, tokens)).abs().max() > 1e-3
    assert size(sliced.config, layer_shapes(sliced.config)).params == sum(
        p.numel() for p in sliced.parameters()
    )
    sliced.float().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(sliced, tokens))


@torch.no_grad()
def test_attention_is_the_naive_formula(heads, tokens):
    """Expand key by key, rotate, attend over expanded values: no absorption, no batched products."""
    model = cut_model(heads=heads, key_heads=2, value_heads=None)
    layer, config = model.model.layers[0].self_attn, model.config
    shape = layer_shapes(config)[0]
    x = torch.randn(1, 5, config.hidden_size, dtype=torch.float64)
    tables = model.model.rotary_emb(x, torch.arange(5)[None])
    cos, sin = (table[0] for table in tables[:2])
    got, _ = layer(x, position_embeddings=tables, attention_mask=None)
    groups, queries, width = shape.num_key_value_heads, shape.num_attention_heads, shape.qk_head_dim

    def expanded(latents, weight, number):
        """Return (tokens, KV heads, head_dim): each latent's own block of columns times it."""
        parts = zip(latents.chunk(number, -1), weight.chunk(number, 1), strict=True)
        return torch.cat([c @ b.T for c, b in parts], -1).view(5, groups, width)

    def turn(vector, at):
        first, second = vector.chunk(2)
        return vector * cos[at] + torch.cat([-second, first]) * sin[at]

    keys = expanded(layer.k_proj(x)[0], layer.k_up_proj.weight, shape.k_latents[0])
    values = expanded(layer.v_proj(x)[0], layer.v_up_proj.weight, shape.v_latents[0])
    query = layer.q_proj(x)[0].view(5, queries, width)
    for t in range(5):
        read = []
        for head in range(queries):
            own = head // (queries // groups)
            scores = torch.stack([turn(query[t, head], t) @ turn(keys[s, own], s) for s in range(t + 1)])
            read.append((scores * layer.scaling).softmax(0) @ values[: t + 1, own])
        torch.testing.assert_close(got[0, t], layer.o_proj(torch.cat(read)))


@torch.no_grad()
def test_a_growing_cache_holds_the_latents_alone(family, heads, tokens):
    model = cut_model(family, heads)
    whole, cache = logits(model, tokens), DynamicCache(config=model.config)
    steps = [model(part, past_key_values=cache).logits for part in tokens.split([6, 1, 3, *[1] * 7], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    expected = size(model.config, layer_shapes(model.config)).kv_bytes_per_token
    per_number = 4 if model.config.dtype == torch.float32 else 8
    assert cache_bytes_per_token(cache) == expected // per_number * 8


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "smollm3"])
def test_a_static_cache_gives_the_same(family, tokens):
    model = cut_model(family)
    text = torch.cat([tokens] * 3, 1)[:, :45]  # beyond Gemma's sliding window of 32
    cache = StaticCache(config=model.config, max_cache_len=50)
    steps = [model(part, past_key_values=cache).logits for part in text.split([20, *[1] * 25], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), logits(model, text))


@torch.no_grad()
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "original_max_position_embeddings": 48,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 3.0, 5.0, 9.0],
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_empty_slots_of_a_static_cache_are_no_longer_text(rope, tokens):
    """Their positions would switch the keys to the frequencies of long texts, and leave the queries."""
    model = cut_model(rope_parameters=rope | {"rope_theta": 1e4})
    text = torch.cat([tokens[:1]] * 3, 1)[:, :40]
    made = [StaticCache(config=model.config, max_cache_len=100), DynamicCache()]
    steps = [[model(one, past_key_values=cache).logits for one in text.split(1, dim=1)] for cache in made]
    torch.testing.assert_close(torch.cat(steps[0], 1), torch.cat(steps[1], 1))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_sequence_goes_on_as_alone(side, tokens):
    model = cut_model()
    short, one = slice(None, 5), tokens[:, 16:17]
    row = torch.cat([tokens[:1, short], torch.zeros(1, 4, dtype=torch.long)], 1)
    seen = torch.tensor([[1] * 5 + [0] * 4, [1] * 9])
    if side == "left":
        row, seen = row.roll(4, 1), torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    cache, alone = DynamicCache(), DynamicCache()
    at = (seen.cumsum(1) - 1).clamp(min=0)
    text = torch.cat([row, tokens[1:2, :9]])
    model(text, attention_mask=seen, position_ids=at, past_key_values=cache)
    seen = torch.cat([seen, torch.ones(2, 1, dtype=torch.long)], 1)
    both = model(
        one, attention_mask=seen, position_ids=torch.tensor([[5], [9]]), past_key_values=cache
    ).logits
    model(tokens[:1, short], past_key_values=alone)
    torch.testing.assert_close(both[:1], model(one[:1], past_key_values=alone).logits)


def test_a_model_from_a_config_alone_has_ordinary_weights():
    config = with_latents_config(tiny_config("llama", "gqa"), 2, None)
    made = AutoModelForCausalLM.from_config(config)
    assert all(0 < weight.abs().max() < 10 for name, weight in made.named_parameters() if "_up_proj" in name)


@torch.no_grad()
def test_the_cache_of_a_speed_test_gives_the_same(tokens):
    model = cut_model()
    cache, cursor = fixed_cache(
        model.config, batch_size=2, length=17, dtype=torch.float64, device=torch.device("cpu")
    )
    steps = []
    for part, start in ((tokens[:, :9], 0), *((tokens[:, n : n + 1], n) for n in range(9, 17))):
        cursor.positions, cursor.visible = torch.arange(start, start + part.shape[1]), start + part.shape[1]
        steps.append(model(part, past_key_values=cache, position_ids=cursor.positions[None]).logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits(model, tokens))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["static", "dynamic"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_padded_prompts_generate_as_alone(family, implementation, tokens):
    model = cut_model(family)
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "cache_implementation": implementation,
    }
    alone = model.generate(tokens[:1, :5], **options)[0, 5:]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens[:1, :5]], 1)
    both = torch.cat([padded, tokens[1:, :9]])
    together = model.generate(both, attention_mask=(both != 0).long(), **options)[0, 9:]
    assert torch.equal(alone, together)
    ids = tokens[:1, :5]
    for _ in range(12):  # by whole passes
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(alone, ids[0, 5:])


@torch.no_grad()
def test_cached_keys_turn_as_far_as_their_positions_say(tokens):
    """Positions that begin elsewhere, as after a cut of the prompt, shift queries and keys alike."""
    model, cache = cut_model(), DynamicCache()
    at = torch.arange(17)[None] + 40
    model(tokens[:, :16], past_key_values=cache, position_ids=at[:, :16])
    step = model(tokens[:, 16:], past_key_values=cache, position_ids=at[:, 16:]).logits
    torch.testing.assert_close(step[:, -1], logits(model, tokens, position_ids=at)[:, -1])


def test_multiply_accumulates_are_those_of_torch(heads, tokens):
    from torch.utils.flop_counter import FlopCounterMode

    model = cut_model(heads=heads, key_heads=2).float()
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(tokens[:1], use_cache=False)
    counted = macs(model.config, layer_shapes(model.config), prompt_length=17)
    assert counter.get_total_flops() == 2 * counted


def test_spaces_and_refusals():
    model = tiny_model()
    twin = with_latents(model, None, None)
    assert available_kinds(twin.config) == ("block", "attention", "mlp", "k_latent", "v_latent", "ffn")
    with pytest.raises(ValueError, match="no space 'k_latent', because it caches keys and values"):
        find_spaces(model.config, ["k_latent"])
    with pytest.raises(ValueError, match="no space 'vo', because it caches latents"):
        find_spaces(twin.config, ["vo"])
    with pytest.raises(ValueError, match="latents already: give the model that it was made from"):
        with_latents(twin, None, None)
    with pytest.raises(ValueError, match="caches latents, which its heads share already"):
        joined(twin, 1)
    assert [heads_of_latent(heads, 4) for heads in (1, 2, 3, 6, 8, 32)] == [1, 2, 3, 3, 4, 4]
    assert heads_of_latent(6, None) == 6


def test_a_config_of_other_latents_is_refused():
    shapes = layer_shapes(with_latents_config(tiny_config("llama", "mha"), 2, None))
    good = Layer(**{**vars(shapes[0]), "k_latents": [2, 16], "v_latents": [1, 32], "rope_pairs": None})
    check_widths([good], 1, 48, 4, queries=1)
    for change, words in (
        ({"k_latents": [3, 16]}, "k_latents must be a divisor of num_key_value_heads=4"),
        ({"v_latents": [1]}, "v_latents must be a divisor"),
        ({"v_latents": None}, "k_latents and v_latents go together"),
        ({"latent": True}, "and not with latent"),
    ):
        with pytest.raises(ValueError, match=words):
            check_widths([good.model_copy(update=change)], 1, 48, 4, queries=1)
    assert HEADS["mha"] == (4, 4)
    assert replace(shapes[0], k_latents=(2, 6), v_latents=(1, 10)).cached == (12, 10)
