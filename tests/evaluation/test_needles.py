"""Needles: texts whose answer stands in them, choices read from logits, and when an accuracy says something."""

from __future__ import annotations

import random
import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from kvp.data.corpora import FileCorpus
from kvp.evaluation.needles import Needles, bound, chosen
from kvp.models.directions import Directions
from kvp.models.shapes import layer_shapes
from kvp.results import NeedlesRecord
from tests.conftest import tiny_model
from tests.helpers.caches import naive, stepwise

WORDS = ["river", "stone", "cloud", "grass", "wind", "rain"]
ALL = ("single", "multikey", "variables")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "sentences.txt"
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randrange(3, 9))).capitalize() + "." for _ in range(300)]
    path.write_text(" ".join(sentences))
    return FileCorpus(path=str(path))


def needles(**options):
    return Needles(**{"tasks": ALL, "lengths": [700], "samples": 12, "corpus": "sentences", **options})


class Oracle:
    """A model that reads the text as a person does; `mistakes` of its answers are the next number."""

    device, training = torch.device("cpu"), False

    def __init__(self, tokenizer, mistakes=0):
        self.tokenizer, self.mistakes = tokenizer, mistakes
        self.config = SimpleNamespace(max_position_embeddings=900)

    def eval(self):
        return self

    def train(self, training):
        assert not training

    def __call__(self, ids, **read):
        text = self.tokenizer.decode(ids[0])
        number = self.answer(text)
        if self.mistakes:
            self.mistakes -= 1
            number = str(int(number[0]) % 9 + 1)
        logits = torch.zeros(1, 1, 300)
        logits[0, 0, self.tokenizer.encode(number[0], add_special_tokens=False)[0]] = 1.0
        return SimpleNamespace(logits=logits)

    def answer(self, text):
        asked = re.search(r"(?:number for|the variable) (\w+)", text[text.rindex("Question:") :])[1]
        while found := re.search(rf"VAR {asked} = VAR (\w+)\.", text):
            asked = found[1]
        return re.search(rf"(?:VAR {asked} =|number for {asked} is:) (\d+)", text)[1]


@pytest.mark.parametrize("task", ALL)
def test_a_reader_answers_all_of_it_from_the_text(task, tokenizer, corpus):
    result = needles().evaluate(Oracle(tokenizer), tokenizer, corpus, task, 700)
    assert (result["accuracy"], result["stderr"], result["n"]) == (1.0, 0.0, 12)
    assert 640 < result["tokens"] <= 700
    assert result["protocol"]["hops"] == (2 if task == "variables" else None)
    wrong = needles(choices=9).evaluate(Oracle(tokenizer, 3), tokenizer, corpus, "multikey", "longest")
    assert wrong["protocol"]["length"] == 900 and 840 < wrong["tokens"] <= 900
    assert wrong["accuracy"] == 9 / 12
    assert wrong["stderr"] == pytest.approx((9 / 12 * 3 / 12 / 11) ** 0.5)


def test_the_result_states_a_cache_without_what_each_layer_has_of_its_own(tokenizer, corpus):
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    digits = ["4" * (model.config.num_key_value_heads * layer_shapes(model.config)[0].qk_head_dim)] * 3
    cache = Directions(bits=3.0, keys=tuple(digits), values=tuple(digits))
    model.config.kvp_cache = asdict(cache)
    result = needles(samples=5).evaluate(model, tokenizer, corpus, "single", 400)
    stated = {"format": "directions", "bits": 3.0, "most": 4, "group": 32, "window": 32}
    assert NeedlesRecord.model_validate({**result, "dtype": "float32"}).cache == stated


def test_texts_hide_what_the_task_says(tokenizer, corpus):
    for task, hidden, statements in (("single", 1, 0), ("multikey", 4, 0), ("variables", 4, 12)):
        for sample in needles().texts(tokenizer, corpus, task, 700):
            text = tokenizer.decode(sample.ids)
            around, question = text[: text.rindex("Question:")], text[text.rindex("Question:") :]
            assert len(re.findall(r"\d{6}", around)) == hidden
            assert len(re.findall(r"VAR \w+ = ", around)) == statements
            assert not re.search(r"\d", question)
            assert len({*sample.choices.tolist()}) == 4
            assert re.search("river|stone", around)


def test_places_differ_and_the_seed_decides(tokenizer, corpus):
    def places(seed):
        texts = needles(seed=seed).texts(tokenizer, corpus, "single", 700)
        return [tokenizer.decode(sample.ids).index("special magic number for") for sample in texts]

    assert places(0) == places(0) != places(1)
    assert max(places(0)) - min(places(0)) > 200


def test_the_bound_is_the_least_that_guessing_seldom_reaches():
    """Against the draws of a guesser."""
    draws = torch.rand(200_000, 50, generator=torch.Generator().manual_seed(0)) < 0.25
    right = draws.sum(1)
    least = round(50 * bound(50, 0.25))
    assert (right >= least).double().mean() < 0.05 < (right >= least - 1).double().mean()
    assert bound(5, 0.5) == 1.0
    assert bound(4, 0.5) > 1


def test_the_choice_is_the_likeliest_first_token(model, tokenizer, corpus):
    (sample, *_) = needles(lengths=[120], choices=2).texts(tokenizer, corpus, "single", 400)
    sample = SimpleNamespace(ids=sample.ids[-100:], choices=sample.choices, answer=sample.answer)
    with torch.no_grad():
        logits = model(sample.ids[None]).logits[0, -1]
    assert chosen(model, sample) == logits[sample.choices].argmax()
    model.config.kvp_cache = {"key_sparsity": 0.5, "value_sparsity": 0.7, "window": 4}
    decoded = stepwise(model, sample.ids[None], naive(model.config), 1)[0, -1]
    assert chosen(model, sample) == decoded[sample.choices].argmax()
    assert not torch.allclose(decoded, logits, atol=1e-4)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="behind 100 tokens is not finite"):
        chosen(model, sample)


def test_a_random_model_is_at_chance(tokenizer, corpus):
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    result = needles(samples=40, seed=1).evaluate(model.train(), tokenizer, corpus, "multikey", 512)
    assert model.training
    assert result["accuracy"] < result["bound"] < 0.5
    assert result["chance"] == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [63]}, "lengths must be >= 64"),
        ({"lengths": ["long"]}, "longest"),
        ({"tasks": ["double"]}, "single"),
        ({"samples": 4}, "samples"),
        ({"choices": 10}, "choices"),
    ],
)
def test_odd_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        needles(**options)


def test_what_does_not_fit_is_refused(tokenizer, corpus):
    with pytest.raises(
        ValueError, match=r"lengths must be >= \d+ for what .* got 100: lower choices or hops"
    ):
        needles().texts(tokenizer, corpus, "variables", 100)
    with pytest.raises(ValueError, match="Unknown corpus 'sentences'"):
        needles().check({})


def test_a_tokenizer_that_begins_numbers_alike_is_refused(corpus):
    def of_word_lengths(text, **_):
        return {"input_ids": [len(word) for word in text.split()]}

    with pytest.raises(ValueError, match="begins two of the numbers"):
        needles(choices=9).texts(of_word_lengths, corpus, "single", 700)
