"""Exports are exact below, at and above every length at which a checkpoint's arithmetic changes, or are refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvp.models.load import byte_tokenizer, save
from kvp.models.rope import switches
from kvp.models.surgery import apply
from kvp.serving import stock
from kvp.serving.sample import Sample, make_sample
from kvp.serving.stock import to_stock
from kvp.serving.verify import compare
from kvp.serving.write import export
from kvp.types import Plan
from tests.conftest import random_plan, tiny_model
from tests.helpers.masks import mask
from tests.helpers.stock import ROPES, shared_plan

LENGTHS = (32, 33, 128, 129, 300)
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 8.0],
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
EVERY = {**ROPES, "dynamic": {"rope_type": "dynamic", "factor": 4.0}, "longrope": LONGROPE}
PAIRS = {"cut": (0, 2, 3), "whole": (0, 1, 2, 3)}
WINDOWS = {
    "mistral": {"sliding_window": 32},
    "qwen2": {
        "sliding_window": 32,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
}


def model_of(rope, family="llama", **changes):
    return tiny_model(
        family, "gqa", rope_parameters=EVERY[rope] | {"rope_theta": 1000.0}, vocab_size=259, **changes
    )


def pruned_of(rope, pairs, family="llama", **changes):
    model = model_of(rope, family, **changes)
    return apply(model, shared_plan(model, PAIRS[pairs]))


@torch.no_grad()
def logits(model, length):
    ids = torch.randint(3, 259, (1, length), generator=torch.Generator().manual_seed(length))
    return model(ids, use_cache=False).logits


def require_same(one, other, lengths=LENGTHS):
    for length in lengths:
        expected = logits(other, length)
        apart = ((logits(one, length) - expected).norm() / expected.norm()).item()
        assert apart < 1e-4, f"{length} tokens: {apart}"


def require_same_cache(one, other):
    """Decode past windows and switches with a growing cache."""
    ids = torch.randint(3, 259, (1, 20), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(one.generate(ids, **options), other.generate(ids, **options))


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("rope", EVERY)
def test_a_stock_form_is_exact_at_every_length_or_refused(rope, pairs, tmp_path):
    pruned = pruned_of(rope, pairs, attention_bias=True, tie_word_embeddings=rope == "yarn")
    if (rope, pairs) == ("dynamic", "cut"):
        with pytest.raises(
            ValueError, match=r"'dynamic' computes new frequencies beyond max_position_embeddings=128"
        ):
            to_stock(pruned, "stock")
        return
    to_stock(pruned, "stock").save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    require_same(opened, pruned)
    if switches(pruned.config):
        require_same_cache(opened, pruned)


@pytest.mark.parametrize("rope", EVERY)
def test_padded_and_pruned_forms_are_exact_at_every_length(rope, tmp_path):
    pruned = pruned_of(rope, "cut", "mistral")
    to_stock(pruned, "padded").save_pretrained(tmp_path / "padded")
    pruned.save_pretrained(tmp_path / "pruned")
    for name in ("padded", "pruned"):
        require_same(AutoModelForCausalLM.from_pretrained(tmp_path / name), pruned, (33, 300))


@pytest.mark.parametrize("family", WINDOWS)
def test_a_window_goes_with_the_export(family, tmp_path):
    pruned = pruned_of("default", "cut", family, **WINDOWS[family])
    to_stock(pruned, "stock").save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    require_same(opened, pruned)
    require_same_cache(opened, pruned)
    whole = pruned_of("default", "cut", family)
    assert (logits(whole, 64) - logits(opened, 64)).norm() > 0.01 * logits(
        opened, 64
    ).norm()  # the window matters


def test_a_model_that_read_a_long_text_is_cut_as_it_was():
    for rope in ("dynamic", "longrope"):
        model = model_of(rope)
        plan = random_plan(model, ["qk", "vo"])
        expected = [logits(apply(model, plan), length) for length in (40, 300)]
        logits(model, 300)
        cut = apply(model, plan)
        for length, before in zip((40, 300), expected, strict=True):
            assert torch.equal(logits(cut, length), before), (rope, length)
        require_same(cut, mask(model_of(rope), plan), (20, 129, 300))


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_pairs_whose_frequencies_change_are_not_folded(rope):
    model = model_of(rope)
    with pytest.raises(ValueError, match=f"type '{rope}' has other frequencies beyond"):
        apply(model, Plan({}, folded=2))
    with pytest.raises(ValueError, match=r"strategy\.context=null"):
        mask(model, Plan({}, folded=2))


def test_the_sample_reads_below_at_and_above_each_switch():
    for rope, length in (("longrope", 32), ("dynamic", 128)):
        model = model_of(rope)
        assert switches(model.config) == (length,)
        sample, _ = make_sample(model, byte_tokenizer())
        ends = [start + len(logprobs) + 1 for start, logprobs in sample.passages]
        assert ends == [length, length + 1, 2 * length]
    assert not make_sample(model_of("yarn"), byte_tokenizer())[0].passages
    windowed, _ = make_sample(model_of("default", "mistral", sliding_window=90), byte_tokenizer())
    assert len(windowed.ids) == 128 - 16  # all that max_position_embeddings allows, and past the window


def test_a_passage_that_differs_fails():
    sample = Sample(
        text="",
        ids=[1, 2, 3],
        logprobs=[-1.0, -2.0],
        greedy=[4],
        margins=[1.0],
        passages=[(126, [-1.0, -2.0])],
    )
    answer = {"logprobs": torch.tensor([-1.0, -2.0]), "greedy": torch.tensor([4])}
    assert compare(sample, answer, exact=True)["passed"]  # of an engine that reads from position 0 only
    report = compare(sample, answer | {"passage.0": torch.tensor([-1.0, -2.3])}, exact=True)
    assert "positions 126 to 128 differ by 0.2121 nats" in report["why"]
    assert compare(sample, answer | {"passage.0": torch.tensor([-1.0, -2.0])}, exact=True)["passed"]


@pytest.mark.slow
def test_an_export_is_proved_at_its_switch(tmp_path, monkeypatch):
    save(pruned_of("longrope", "cut", "mistral"), byte_tokenizer(), tmp_path / "pruned")
    serving = export(tmp_path / "pruned", tmp_path / "out", "stock")
    assert serving["check"]["positions"] == ["0 to 63"] or serving["check"]["positions"]
    assert (
        "it does not change the frequencies" in serving["engines"]["vllm"]
        or "flash" in serving["engines"]["vllm"]
    )
    rope = json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]
    assert rope["short_factor"] != rope["long_factor"]
    true = stock.longrope

    def frozen(*given):
        made = true(*given)
        return made | {"long_factor": made["short_factor"]}

    monkeypatch.setattr(stock, "longrope", frozen)  # the fault of old: the short factors for every length
    with pytest.raises(ArithmeticError, match="log-probabilities"):
        export(tmp_path / "pruned", tmp_path / "frozen", "stock")


@pytest.mark.parametrize(
    ("rope", "changes", "message"),
    [
        ("dynamic", {}, "factors of a stock form are fixed"),
        ("longrope", {}, "change with the length: no GGUF"),
        ("default", {"sliding_window": 32}, "no sliding window, this model one of 32 in 128 positions"),
        ("default", {"max_position_embeddings": 16}, "max_position_embeddings must be >= 18"),
    ],
)
def test_a_gguf_that_could_not_be_exact_is_refused(rope, changes, message, tmp_path):
    save(pruned_of(rope, "cut", "mistral", **changes), byte_tokenizer(), tmp_path / "pruned")
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "pruned", tmp_path / "out", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]
