"""A prompt that is read once for all its options gives the log-likelihoods of lm-eval's own model."""

from __future__ import annotations

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from kvp.evaluation import shared_context
from kvp.evaluation.shared_context import SharedContext
from kvp.models.surgery import apply
from tests.conftest import FAMILIES, random_plan, tiny_model

PAIRS = [  # as tasks ask: several options of a prompt, one-token options, a prompt of one option, an empty prompt
    *(("The cat sat on the", option) for option in (" mat", " windowsill in the sun", " dog")),
    *(("Is it so? Answer:", option) for option in (" y", " n")),
    ("Alone", " and without another"),
    ("", "nothing before"),
    ("The cat sat on the", " mat"),
]


def requests(lm, pairs):
    made = []
    for context, continuation in pairs:
        ids = lm.tok_encode(continuation)
        made.append(
            ((context, continuation), *(lm._encode_pair(context, continuation) if context else ([1], ids)))
        )
    return made


def both(model, tokenizer, pairs=PAIRS, batch_size=3):
    """The answers of lm-eval and ours."""
    made = [
        kind(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, max_length=64)
        for kind in (HFLM, SharedContext)
    ]
    asked = requests(made[0], pairs)
    return [lm._loglikelihood_tokens(asked, disable_tqdm=True) for lm in made]


def assert_same(expected, found, tolerance=1e-3):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for (wanted, _), (got, _) in zip(expected, found, strict=True):
        assert got == pytest.approx(wanted, abs=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_log_likelihoods_of_lm_eval(family, tokenizer):
    model = tiny_model(family, vocab_size=len(tokenizer), max_position_embeddings=64)
    expected, found = both(model, tokenizer)
    assert_same(expected, found)
    assert len({round(value, 3) for value, _ in found}) == len(PAIRS) - 1  # the repeated pair alone repeats


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_pruned_model_does_too_in_batches_of_any_size(batch_size, heads, tokenizer):
    model = tiny_model(heads=heads, vocab_size=len(tokenizer), max_position_embeddings=64)
    pruned = apply(model, random_plan(model, ["attention", "kv_group", "qk", "vo", "ffn"]))
    assert_same(*both(pruned, tokenizer, batch_size=batch_size))


@pytest.mark.parametrize("reason", ["sliding", "packed", "long"])
def test_lm_eval_reads_what_a_mask_cannot_say_and_what_is_too_long(reason, tokenizer, monkeypatch):
    changes = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    model = tiny_model(
        "qwen2",
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        **(changes if reason == "sliding" else {}),
    )
    if reason == "packed":
        model.config.kvp_cache = {"name": "int8"}
    pairs = [("x" * 70, " y"), ("x" * 70, " n")] if reason == "long" else PAIRS
    monkeypatch.setattr(shared_context, "_answers", lambda *_: pytest.fail("read in rows"))
    expected, found = both(model, tokenizer, pairs)
    assert found == expected


def test_a_padded_row_is_as_finite_as_a_whole_one(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=64, dtype=torch.bfloat16)
    expected, found = both(model, tokenizer, batch_size=8)
    assert_same(expected, found, tolerance=0.3)
