"""Exports of models that cache latents: as their own code, and no stock form."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig

from kvp.models.latents import with_latents
from kvp.models.load import byte_tokenizer, save
from kvp.models.mustafar import Mustafar
from kvp.models.surgery import apply
from kvp.serving.check_vllm import check_vllm
from kvp.serving.engines import caches_latents, engines
from kvp.serving.remote_code import code
from kvp.serving.write import export
from tests.conftest import random_plan, tiny_model


def latents(family="llama"):
    model = with_latents(tiny_model(family, vocab_size=259), 2, None)
    return apply(model, random_plan(model, ["k_latent", "v_latent"]))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_code_of_an_export_computes_the_same(family, tmp_path, tokens):
    model = latents(family)
    (tmp_path / "own.py").write_text(code(family))
    spec = spec_from_file_location("own_latents", tmp_path / "own.py")
    own = module_from_spec(spec)
    spec.loader.exec_module(own)
    prefix = type(model).__name__.removesuffix("ForCausalLM")
    Config, Model = (getattr(own, prefix + suffix) for suffix in ("Config", "ForCausalLM"))
    other = Model(Config(**model.config.to_dict())).eval()
    other.load_state_dict(model.state_dict())
    ids = tokens[:1, :6]
    with torch.no_grad():
        assert torch.equal(other(tokens).logits, model(tokens).logits)
    made = (each.generate(ids, max_new_tokens=6, do_sample=False) for each in (other, model))
    assert torch.equal(*made)


@pytest.mark.parametrize("form", ["stock", "stock_arithmetic", "padded", "gguf", "mla"])
def test_no_stock_form_has_latents(form, tmp_path):
    save(latents(), byte_tokenizer(), tmp_path / "model")
    with pytest.raises(ValueError, match="expands keys from latents on every step"):
        export(tmp_path / "model", tmp_path / "out", to=form)
    assert not (tmp_path / "out").exists()


def test_vllm_and_a_sparse_cache_are_refused_by_name(tmp_path):
    model = latents()
    save(model, byte_tokenizer(), tmp_path)
    assert engines(model.config, "remote_code", {"passed": True})["vllm"].startswith("no:")
    with pytest.raises(ValueError, match="vLLM has no such cache: leave out --engine"):
        check_vllm(tmp_path, {}, None, own_code=True, python="python")
    with pytest.raises(ValueError, match=r"caches latents, .*: choose cache=none"):
        Mustafar(key_sparsity=0.5, value_sparsity=0.5, window=8).check(model.config)


@pytest.mark.parametrize("stock", [DeepseekV3Config(), LlamaConfig()], ids=lambda config: config.model_type)
def test_a_stock_config_caches_no_latents_of_ours(stock):
    assert not caches_latents(stock) and caches_latents(latents().config)
