"""Gemma 3's text model: sliding and full layers with RoPE of their own, norms around both sublayers, a scaled table."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvp
from kvp.models.checkpoint.fields import check_fields
from kvp.models.family import family_named
from kvp.models.load import byte_tokenizer, save
from kvp.models.mustafar import Mustafar
from kvp.models.shapes import layer_shapes, size
from kvp.models.spaces import available_kinds, find_spaces
from kvp.models.surgery import apply
from kvp.serving.write import export
from kvp.strategies.methods.kvpruner_plus import KVPrunerPlus
from kvp.strategies.methods.slicegpt import SliceGPT
from kvp.types import Budget, Plan
from tests.conftest import random_plan, tiny_config, tiny_model
from tests.helpers.masks import mask

FAMILY = "gemma3_text"
KINDS = ["block", "mlp", "kv_group", "qk", "vo", "ffn"]


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def test_what_it_offers():
    assert available_kinds(tiny_config(FAMILY)) == tuple(KINDS)
    with pytest.raises(
        ValueError, match=r"has no space 'attention', because it mixes sliding and full attention"
    ):
        find_spaces(tiny_config(FAMILY), ["attention"])
    full = tiny_config(FAMILY, layer_types=["full_attention"] * 3)
    assert "attention" in available_kinds(full)


@pytest.mark.parametrize("window", [4, 7])
@pytest.mark.parametrize("seed", range(3))
def test_short_windows_are_kept(window, seed, tokens):
    model = tiny_model(FAMILY, "mqa", dtype=torch.float64, seed=seed, sliding_window=window)
    pruned = apply(model, random_plan(model, KINDS, seed=seed))
    assert (
        logits(pruned, tokens) - logits(mask(model, random_plan(model, KINDS, seed=seed)), tokens)
    ).abs().max() < 1e-6
    wide = tiny_model(FAMILY, "mqa", dtype=torch.float64, seed=seed)
    assert (
        logits(apply(wide, random_plan(wide, KINDS, seed=seed)), tokens) - logits(pruned, tokens)
    ).abs().max() > 1e-4


@pytest.mark.parametrize("heads", ["mqa", "gqa"])
def test_generation_past_the_window_is_the_same_with_every_cache(heads, tokens):
    model = tiny_model(FAMILY, heads, sliding_window=6)
    pruned = apply(model, random_plan(model, KINDS))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    dynamic = pruned.generate(tokens, **options)
    assert torch.equal(dynamic, pruned.generate(tokens, cache_implementation="static", **options))
    assert torch.equal(dynamic, pruned.generate(tokens, use_cache=False, **options))


def test_both_rotary_bases_and_the_scale_of_the_embedding_survive(tokens, tmp_path):
    model = tiny_model(FAMILY, tie_word_embeddings=True)
    pruned = apply(model, random_plan(model, ["qk", "vo"]))
    for name in ("sliding_attention_inv_freq", "full_attention_inv_freq"):
        assert torch.equal(getattr(pruned.model.rotary_emb, name), getattr(model.model.rotary_emb, name))
    assert pruned.model.embed_tokens.embed_scale == model.model.embed_tokens.embed_scale
    pruned.save_pretrained(tmp_path)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(reopened, tokens), logits(pruned, tokens))
    assert size(pruned.config, layer_shapes(pruned.config)).params == sum(
        p.numel() for p in pruned.parameters()
    )


@pytest.mark.slow
def test_blocks_and_neurons_are_stock(tmp_path):
    model = tiny_model(FAMILY, vocab_size=259)
    block, *ffn = (space for kind in ("block", "ffn") for space in find_spaces(model.config, [kind]))
    pruned = apply(
        model, Plan({block: torch.tensor([0, 2]), **{space: torch.arange(3, 35) for space in ffn}})
    )
    save(pruned, byte_tokenizer(), tmp_path / "pruned")
    assert export(tmp_path / "pruned", tmp_path / "out", "stock")["check"]["passed"]
    opened, _ = kvp.load(tmp_path / "out", dtype="float32")
    assert type(opened).__name__ == "Gemma3ForCausalLM"
    assert (
        logits(opened, torch.arange(3, 60)[None]) - logits(pruned, torch.arange(3, 60)[None])
    ).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("form", "reason"), [("gguf", "writes no GGUF of"), ("mla", "normalises queries and keys")]
)
def test_other_forms_are_refused_by_name(form, reason, tmp_path):
    save(tiny_model(FAMILY, "mqa", vocab_size=259), byte_tokenizer(), tmp_path / "dense")
    with pytest.raises(ValueError, match=rf"gemma3_text.*{reason}|{reason}.*gemma3_text"):
        export(tmp_path / "dense", tmp_path / "out", form)


def test_methods_that_do_not_fit_are_refused_by_name():
    config, budget = tiny_config(FAMILY), Budget(value=0.25, of="kv_cache", tolerance=0.2)
    with pytest.raises(ValueError, match="norms what attention and MLP write"):
        SliceGPT().check(config, Budget(value=0.25, of="params"))
    with pytest.raises(ValueError, match="norms what attention and MLP write"):
        apply(tiny_model(FAMILY), Plan({}, bases=[torch.eye(48)] * 6))
    with pytest.raises(ValueError, match=r"set strategy\.context=null"):
        KVPrunerPlus().check(config, budget)
    with pytest.raises(ValueError, match="norms of queries and keys"):
        KVPrunerPlus(context=None, num_key_value_heads=1).check(config, budget)
    with pytest.raises(ValueError, match="layers of sliding attention"):
        Mustafar().check(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("use_bidirectional_attention", True),
    ],
)
def test_soft_caps_and_two_directions_are_refused(field, value, tmp_path):
    fields = tiny_config(FAMILY).to_dict() | {field: value, "architectures": ["Gemma3ForCausalLM"]}
    with pytest.raises(ValueError, match=f"{field}={value}: kvp computes plain causal attention"):
        check_fields(tmp_path / "config.json", fields)


@pytest.mark.parametrize(
    ("name", "reason"), [("gemma2", "caps its logits"), ("gemma3", "image tower"), ("gemma2", "fused kernel")]
)
def test_relatives_are_refused_by_name(name, reason):
    with pytest.raises(
        ValueError, match=rf"'{name}' is not supported, because .*{reason}.*; known families: llama"
    ):
        family_named(name)
