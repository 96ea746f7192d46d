"""llama.cpp gives the answer of transformers from the GGUF of a pruned model, whatever its RoPE and tokenizer."""

from __future__ import annotations

import gguf
import pytest
import torch
from tokenizers import Regex, pre_tokenizers

from kvp.models.load import byte_tokenizer, save
from kvp.models.surgery import apply
from kvp.serving import gguf_file
from kvp.serving.check import check
from kvp.serving.write import export
from kvp.types import Plan
from tests.conftest import random_plan, tiny_model
from tests.helpers.stock import ROPES, stock_model
from tests.helpers.tokenizers import BYTE_LEVEL, saved, trained


def fields(path):
    reader = gguf.GGUFReader(path / "model.gguf")
    return reader.fields, {tensor.name: tensor for tensor in reader.tensors}


def test_the_file_has_the_widths_the_tokens_and_the_rope_factors(tmp_path, monkeypatch):
    monkeypatch.setattr("kvp.serving.write.has", lambda engine: False)
    serving = export(saved(tmp_path / "pruned"), tmp_path / "out", "gguf")
    assert serving["check"] is None
    assert serving["engines"]["llama.cpp"].startswith("not verified")
    known, tensors = fields(tmp_path / "out")
    assert known["llama.attention.key_length"].contents() == 6
    assert known["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert len(known["tokenizer.ggml.tokens"].contents()) == tensors["token_embd.weight"].shape[1]
    default = 1000.0 ** (-torch.arange(3) / 3)  # of 3 pairs
    kept = 1000.0 ** (-torch.tensor([0, 2, 3]) / 4)  # of 4
    assert torch.tensor(tensors["rope_freqs.weight"].data).allclose(default / kept, rtol=1e-5)


def test_whole_rope_needs_no_factors(tmp_path, monkeypatch):
    monkeypatch.setattr("kvp.serving.write.has", lambda engine: False)
    export(saved(tmp_path / "pruned", pairs=(0, 1, 2, 3)), tmp_path / "out", "gguf")
    assert "rope_freqs.weight" not in fields(tmp_path / "out")[1]


def test_a_tokenizer_that_llama_cpp_has_not_is_refused(tmp_path):
    tokens = trained()
    tokens.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\w+"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    save(stock_model("llama", "gqa", vocab_size=len(tokens)), tokens, tmp_path / "pruned")
    with pytest.raises(ValueError, match="pre-tokenizer is known"):
        export(tmp_path / "pruned", tmp_path / "out", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


@pytest.mark.slow
def test_bytes_alone_are_a_tokenizer(tmp_path):
    """The tiny model of debug=smoke has a token per byte and no merges."""
    pytest.importorskip("llama_cpp")
    save(stock_model("llama", "gqa", vocab_size=259), byte_tokenizer(), tmp_path / "pruned")
    assert export(tmp_path / "pruned", tmp_path / "out", "gguf")["check"]["passed"]


def test_qwen3_takes_default_rope_only(tmp_path):
    tokens = trained()
    model = tiny_model(
        "qwen3", "gqa", vocab_size=len(tokens), rope_parameters=ROPES["linear"] | {"rope_theta": 1e3}
    )
    plan = Plan({space: torch.arange(20) for space in random_plan(model, ["ffn"]).keep})
    save(apply(model, plan), tokens, tmp_path / "pruned")
    with pytest.raises(ValueError, match="reads no rope factors"):
        export(tmp_path / "pruned", tmp_path / "out", "gguf")


@pytest.mark.slow
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_llama_cpp_gives_the_same_logits(family, rope, tmp_path):
    pytest.importorskip("llama_cpp")
    serving = export(saved(tmp_path / "pruned", family, rope), tmp_path / "out", "gguf")
    assert serving["check"]["engine"] == "llama_cpp"
    assert serving["check"]["logits_relative_difference"] < 1e-5
    assert check(tmp_path / "out")["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BYTE_LEVEL, "sentencepiece"])
def test_llama_cpp_reads_the_text_the_same(name, tmp_path):
    pytest.importorskip("llama_cpp")
    assert export(saved(tmp_path / "pruned", tokenizer=name), tmp_path / "out", "gguf")["check"]["passed"]


@pytest.mark.slow
def test_without_the_factors_the_engine_is_silent_and_the_check_is_not(tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp")
    true = gguf_file._rope
    monkeypatch.setattr(
        gguf_file, "_rope", lambda *given: (torch.ones_like(true(*given)[0]), true(*given)[1])
    )
    with pytest.raises(ArithmeticError, match="log-probabilities differ"):
        export(saved(tmp_path / "pruned"), tmp_path / "out", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


@pytest.mark.slow
def test_qwen3_of_fewer_neurons_in_llama_cpp(tmp_path):
    pytest.importorskip("llama_cpp")
    tokens = trained("qwen2")
    model = tiny_model("qwen3", "gqa", vocab_size=len(tokens))
    plan = Plan({space: torch.arange(20) for space in random_plan(model, ["ffn"]).keep})
    save(apply(model, plan), tokens, tmp_path / "pruned")
    assert export(tmp_path / "pruned", tmp_path / "out", "gguf")["check"]["passed"]
