"""The measuring process end to end on tiny checkpoints, its failures, and the protocol's bounds."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvp.measurement import memory
from kvp.measurement.count import macs
from kvp.measurement.measure import Measure
from kvp.measurement.speed import Timing, time_model
from kvp.models.shapes import layer_shapes, size
from kvp.models.surgery import apply
from tests.conftest import random_plan, tiny_model

PROTOCOL = Measure(batch_size=2, prompt_length=9, new_tokens=4, warmup=1, runs=3)


@pytest.fixture(scope="module")
def pruned():
    """Unequal widths, tied embeddings, one layer without attention."""
    model = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=True)
    return apply(model, random_plan(model, ["attention", "kv_group", "qk", "vo", "ffn"]))


@pytest.fixture(scope="module")
def checkpoint(pruned, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    pruned.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def measured(checkpoint):
    return PROTOCOL.measure(checkpoint, device="cpu", dtype="bfloat16")


def test_result_is_json_and_carries_its_protocol(measured):
    assert json.loads(json.dumps(measured)) == measured
    assert measured["protocol"] == asdict(PROTOCOL)
    assert measured["dtype"] == "bfloat16" and measured["attention"] == "sdpa"
    assert measured["threads"] >= 1 and measured["device"]


def test_counts_of_the_child_are_exact(measured, checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    shapes = layer_shapes(config)
    kv_bytes = size(config, shapes).kv_bytes_per_token
    assert any(layer.kv_width == 0 for layer in shapes)
    assert measured["kv_bytes_per_token"] == kv_bytes
    assert measured["memory"]["cache_bytes"] == 2 * (9 + 4) * kv_bytes
    inv_freq = 2 * 4 * 4  # two float32 buffers of head_dim / 2 = 4 frequencies
    assert measured["memory"]["weights_bytes"] == 2 * size(config, shapes).params + inv_freq
    assert measured["macs"] == macs(config, shapes, prompt_length=9)


def test_parts_of_the_peak_add_up(measured):
    parts = measured["memory"]
    assert parts["method"] == "rss"
    named = sum(parts[f"{name}_bytes"] for name in ("baseline", "weights", "cache"))
    assert parts["peak_bytes"] >= parts["baseline_bytes"] > 100e6
    assert parts["rest_bytes"] == max(0, parts["peak_bytes"] - named)


@pytest.mark.parametrize(("phase", "tokens"), [("prefill", 2 * 9), ("decode", 2 * 4)])
def test_medians_come_from_the_raw_seconds(measured, phase, tokens):
    result = measured[phase]
    rates = sorted(tokens / seconds for seconds in result["seconds"])
    assert len(rates) == PROTOCOL.runs
    assert result["tokens_per_second"] == pytest.approx(rates[1])
    assert rates[0] <= result["iqr"][0] <= result["tokens_per_second"] <= result["iqr"][1] <= rates[2]


def test_milliseconds_per_step(measured):
    median = sorted(measured["decode"]["seconds"])[1]
    assert measured["decode"]["milliseconds_per_step"] == pytest.approx(1000 * median / 4)


def test_summary_of_one_run():
    assert Timing(tokens=10, seconds=(2.0,)).summary() == {
        "tokens_per_second": 5.0,
        "iqr": [5.0, 5.0],
        "seconds": [2.0],
    }


def test_timed_decoding_is_greedy_generation():
    """The own loop walks the tokens that `generate` would: the cache ends with the same keys."""
    model = tiny_model(dtype=torch.float64)
    prompt = torch.arange(3, 15).view(2, 6)
    prefill, decode, cache = time_model(model, prompt, new_tokens=5, warmup=0, runs=2)
    assert len(prefill.seconds) == len(decode.seconds) == 2
    assert (prefill.tokens, decode.tokens) == (12, 10)
    generated = model.generate(
        prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True
    )
    for ours, theirs in zip(cache.layers, generated.past_key_values.layers, strict=True):
        assert ours.keys.shape[-2] == 6 + 5
        torch.testing.assert_close(ours.keys, theirs.keys)


def test_peak_is_seen_after_the_memory_is_gone():
    device = torch.device("cpu")
    memory.reset_peak(device)
    before = memory.peak_bytes(device)
    torch.ones(64 * 2**20, dtype=torch.uint8)
    assert memory.peak_bytes(device) - before == pytest.approx(64 * 2**20, rel=0.1)
    memory.reset_peak(device)
    assert memory.peak_bytes(device) - before < 32 * 2**20


def test_placed_weights_do_not_hang_on_the_file(pruned, tmp_path):
    pruned.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    placed = memory.place(model, torch.device("cpu"))
    weights = tmp_path / "model.safetensors"
    with weights.open("r+b") as file:  # in place, as a mapping would see it
        file.write(bytes(weights.stat().st_size))
    assert placed.lm_head.weight is placed.model.embed_tokens.weight
    for name, parameter in pruned.named_parameters():
        assert torch.equal(placed.get_parameter(name), parameter), name


def test_rest_is_never_negative():
    parts = memory.Memory(peak_bytes=5, weights_bytes=4, cache_bytes=3, baseline_bytes=2, method="rss")
    assert parts.summary() == {**asdict(parts), "rest_bytes": 0}


def test_broken_checkpoint_names_itself_and_the_protocol(pruned, tmp_path):
    pruned.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(RuntimeError, match="exit status 1") as failure:
        PROTOCOL.measure(tmp_path, device="cpu", dtype="bfloat16")
    message = str(failure.value)
    assert (
        str(tmp_path) in message and "prompt_length=9" in message and "model.safetensors cannot be" in message
    )


def test_a_killed_child_is_an_error(checkpoint, tmp_path, monkeypatch):
    """A process that the kernel ends leaves no traceback; the message says how it died."""
    (tmp_path / "sitecustomize.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=f"{re.escape(str(checkpoint))}.* was killed by SIGKILL"):
        PROTOCOL.measure(checkpoint, device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("name", ["batch_size", "prompt_length", "new_tokens", "runs"])
def test_counts_start_at_one(name):
    with pytest.raises(ValueError, match=f"measure.{name} must be >= 1, got 0"):
        Measure(**{name: 0})


@pytest.mark.parametrize("name", ["warmup", "seed"])
def test_no_negative_options(name):
    assert getattr(Measure(**{name: 0}), name) == 0
    with pytest.raises(ValueError, match=f"measure.{name} must be >= 0, got -1"):
        Measure(**{name: -1})


def test_sequences_fit_the_positions():
    protocol = Measure(prompt_length=100, new_tokens=29)
    protocol.check_positions(129)
    with pytest.raises(ValueError, match=re.escape("must be <= 128 (max_position_embeddings), got 100 + 29")):
        protocol.check_positions(128)


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [("mps", "float32", "cpu or cuda"), ("cpu", "int8", "dtype must be one of")],
)
def test_what_cannot_be_measured(device, dtype, message):
    with pytest.raises(ValueError, match=message):
        Measure().measure(Path("nowhere"), device=device, dtype=dtype)
