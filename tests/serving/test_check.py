"""kvp.serving.check passes what was exported, fails what was changed since, and says what it cannot do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvp.models.load import byte_tokenizer, save
from kvp.serving.check import check
from kvp.serving.sample import Sample, make_sample
from kvp.serving.stock import to_stock
from kvp.serving.verify import compare
from tests.conftest import tiny_model
from tests.helpers.stock import stock_model


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """What an export of a stock model is, without the proof."""
    path = tmp_path_factory.mktemp("check")
    stock = to_stock(stock_model("llama", "gqa", vocab_size=259), "stock")
    save(stock, byte_tokenizer(), path / "out")
    sample, _ = make_sample(stock, byte_tokenizer())
    serving = {"form": "stock", "dtype": "float32", "sample": sample.stored()}
    (path / "out" / "serving.json").write_text(json.dumps(serving))
    return path


@pytest.fixture
def exported(original, tmp_path):
    return Path(shutil.copytree(original / "out", tmp_path / "out"))


def command(directory):
    return subprocess.run([sys.executable, "-m", "kvp.check", str(directory)], capture_output=True, text=True)


def test_an_export_passes(original):
    done = command(original / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("passed\n")


@pytest.mark.slow
def test_a_changed_export_fails(exported):
    weights = load_file(exported / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file(weights | {name: 1.1 * weights[name]}, exported / "model.safetensors", {"format": "pt"})
    done = command(exported)
    assert done.returncode == 1
    assert "FAILED: log-probabilities differ" in done.stdout
    save_file(weights | {name: weights[name][:6]}, exported / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"q_proj\.weight of shape \(6, 48\)"):
        check(exported)


def test_what_cannot_be_checked_is_said(exported, original):
    with pytest.raises(FileNotFoundError, match=r"no serving\.json.*--to custom"):
        check(original)
    with pytest.raises(ModuleNotFoundError, match="vllm is not installed in"):
        check(exported, "vllm", sys.executable)
    with pytest.raises(ModuleNotFoundError, match="there is no interpreter nowhere/python"):
        check(exported, "vllm", "nowhere/python")
    with pytest.raises(ValueError, match="opens in transformers and vllm, not in llama_cpp"):
        check(exported, "llama_cpp")
    serving = json.loads((exported / "serving.json").read_text())
    for damage, message in (
        ({"sample": {**serving["sample"], "ids": "abc"}}, "sample is damaged at ids"),
        ({"sample": [1]}, "sample is damaged"),
        ({"sample": {"text": "x"}}, "sample is damaged at ids"),
        ({"form": "onnx"}, "names no form and dtype"),
        ({"dtype": 8}, "names no form and dtype"),
    ):
        (exported / "serving.json").write_text(json.dumps(serving | damage))
        with pytest.raises(ValueError, match=rf"serving\.json.*{message}"):
            check(exported)
    (exported / "serving.json").write_text('{"form": "sto')
    with pytest.raises(ValueError, match=r"serving\.json cannot be read as JSON"):
        check(exported)
    del serving["sample"]
    (exported / "serving.json").write_text(json.dumps(serving))
    with pytest.raises(ValueError, match="export the checkpoint again"):
        check(exported)


def test_greedy_tokens_may_differ_at_near_ties_only():
    sample = Sample(text="", ids=[1, 2, 3], logprobs=[-1.0, -2.0], greedy=[4, 5], margins=[0.003, 0.5])
    said = torch.tensor([-1.001, -2.0])
    for greedy, passed in (([4, 5], True), ([9, 9], True), ([4, 9], False)):
        report = compare(sample, {"logprobs": said, "greedy": torch.tensor(greedy)}, exact=False)
        assert report["passed"] is passed
        assert report["greedy_tokens_equal"] is (greedy == sample.greedy)
    assert not compare(sample, {"logprobs": said, "greedy": torch.tensor([4, 5])}, exact=True)["passed"]
    answer = {"logprobs": said, "greedy": torch.tensor([4, 5]), "ids": torch.tensor([1, 2, 7])}
    assert "tokenizer" in compare(sample, answer, exact=False)["why"]
    answer = {"logprobs": torch.tensor([float("nan"), -2.0]), "greedy": torch.tensor([4, 5])}
    assert not compare(sample, answer, exact=False)["passed"]


def test_the_sample_is_what_generate_and_the_loss_say():
    model = tiny_model(vocab_size=259)
    sample, logits = make_sample(model, byte_tokenizer())
    ids = torch.tensor([sample.ids])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert -sum(sample.logprobs) / len(sample.logprobs) == pytest.approx(loss.item(), abs=1e-5)
    model.generation_config.eos_token_id = None
    generated = model.generate(ids, max_new_tokens=len(sample.greedy), do_sample=False)
    assert generated[0, len(sample.ids) :].tolist() == sample.greedy
    top = logits[-1].topk(2).values
    assert sample.margins[0] == pytest.approx((top[0] - top[1]).item(), abs=1e-5)
