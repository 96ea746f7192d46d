"""Perplexity against Hugging Face's own loss, one window at a time."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F

from kvp.data.corpora import FileCorpus
from kvp.data.tokens import digest, encode
from kvp.evaluation.perplexity import Perplexity
from kvp.models.nll import ROWS, token_nll
from tests.conftest import tiny_model
from tests.helpers.caches import naive, stepwise

WINDOW, TOKENS = 32, 205


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "letters.txt"
    path.write_text("".join(random.Random(0).choices("abcdefgh ", k=400)))
    return FileCorpus(path=str(path))


def perplexity(**options):
    return Perplexity(corpora=["letters"], **{"window": WINDOW, "max_tokens": TOKENS, **options})


@torch.no_grad()
def reference(model, ids, *, window, stride, prefix=()):
    total = count = 0
    for start in range(0, len(ids) - window + 1, stride):
        tokens = torch.tensor([*prefix, *ids[start : start + window].tolist()])
        labels = tokens.clone()
        if start:
            labels[:-stride] = -100
        scored = int((labels[1:] != -100).sum())
        total += scored * model(tokens[None], labels=labels[None]).loss.item()
        count += scored
    return total / count, count


@pytest.mark.parametrize("bos", ["none", "start", "window"])
@pytest.mark.parametrize("stride", [None, WINDOW - 1, 12, 1])
def test_equals_the_loss_of_each_window(model, tokenizer, corpus, stride, bos):
    result = perplexity(stride=stride, bos=bos, batch_size=3).evaluate(model, tokenizer, corpus)
    ids = encode(corpus.documents("test"), tokenizer, bos=bos == "start")[:TOKENS]
    prefix = [tokenizer.bos_token_id] if bos == "window" else []
    nll, count = reference(model, ids, window=WINDOW, stride=stride or WINDOW, prefix=prefix)
    assert result["nll"] == pytest.approx(nll, rel=1e-5)
    assert result["value"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert result["num_tokens"] == count
    assert result["num_windows"] == 1 + (TOKENS - WINDOW) // (stride or WINDOW)


def test_llm_pruner_protocol_predicts_all_but_the_first_token_of_a_window(model, tokenizer, corpus):
    result = perplexity().evaluate(model, tokenizer, corpus)
    assert result["num_windows"] == TOKENS // WINDOW
    assert result["num_tokens"] == TOKENS // WINDOW * (WINDOW - 1)
    covered = TOKENS // WINDOW * WINDOW
    assert result["data_hash"] == digest(encode(corpus.documents("test"), tokenizer)[:covered])


def test_a_sparse_cache_is_decoded_with_token_by_token(model, tokenizer, corpus):
    dense = perplexity().evaluate(model, tokenizer, corpus)
    assert dense["cache"] is None
    model.config.kvp_cache = {"key_sparsity": 0.5, "value_sparsity": 0.7, "window": 4}
    result = perplexity(stride=20, max_tokens=72).evaluate(model, tokenizer, corpus)
    assert result["cache"] == model.config.kvp_cache
    windows = encode(corpus.documents("test"), tokenizer)[:72].unfold(0, WINDOW, 20)
    logits = stepwise(model, windows, naive(model.config), 1)[:, :-1]
    losses = token_nll(logits, windows[:, 1:])
    expected = torch.cat([losses[0], losses[1:, -20:].flatten()])
    assert result["num_tokens"] == len(expected)
    assert result["nll"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert abs(perplexity().evaluate(model, tokenizer, corpus)["nll"] - dense["nll"]) > 1e-3


def test_max_tokens_null_is_the_whole_corpus(model, tokenizer, corpus):
    assert perplexity(max_tokens=None).evaluate(model, tokenizer, corpus)["num_windows"] == 400 // WINDOW


@pytest.mark.parametrize(("bos", "window", "predictions"), [("none", 128, 127), ("window", 127, 127)])
def test_the_window_is_capped_by_the_positions(model, tokenizer, corpus, bos, window, predictions):
    result = perplexity(window=1000, stride=900, bos=bos, max_tokens=140).evaluate(model, tokenizer, corpus)
    assert model.config.max_position_embeddings == 128
    assert result["protocol"]["window"] == window
    assert result["protocol"]["stride"] == window
    assert result["protocol"]["asked_window"] == 1000
    assert (result["num_windows"], result["num_tokens"]) == (1, predictions)


def test_the_mode_of_the_model_is_restored_and_dropout_is_off(tokenizer, corpus):
    model = tiny_model(vocab_size=len(tokenizer), attention_dropout=0.5)
    expected = perplexity().evaluate(model, tokenizer, corpus)
    assert not model.training
    assert perplexity().evaluate(model.train(), tokenizer, corpus) == expected
    assert model.training


def test_one_window_too_short_is_refused(model, tokenizer, corpus):
    with pytest.raises(ValueError, match="A window is 32 tokens, but letters/test gives 31"):
        perplexity(max_tokens=31).evaluate(model, tokenizer, corpus)


def test_bos_needs_a_token(model, corpus, tokenizer):
    without = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no BOS token: set bos=none"):
        perplexity(bos="start").evaluate(model, without, corpus)


def test_a_loss_that_is_not_finite_names_corpus_and_window(model, tokenizer, tmp_path):
    (tmp_path / "broken.txt").write_text("a" * 5 * WINDOW + "z" * 3 * WINDOW)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("z")] = float("nan")
    corpus = FileCorpus(path=str(tmp_path / "broken.txt"))
    with pytest.raises(FloatingPointError, match=r"NLL of broken is not finite in window 5 of 6"):
        perplexity(batch_size=4).evaluate(model, tokenizer, corpus)


def test_token_nll_is_float32_whatever_the_logits():
    logits = torch.randn(3, ROWS, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.randint(50, (3, ROWS), generator=torch.Generator().manual_seed(1))
    expected = F.cross_entropy(logits.float().mT, targets, reduction="none")
    torch.testing.assert_close(token_nll(logits, targets), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"stride": 0},
        {"stride": WINDOW + 1},
        {"bos": "always"},
        {"max_tokens": 1},
        {"batch_size": 0},
        {"part": "validation"},
        {"corpora": []},
    ],
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        Perplexity(**{"corpora": ["letters"], "window": WINDOW, "max_tokens": TOKENS, **options})
