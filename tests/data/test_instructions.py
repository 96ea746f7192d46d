from __future__ import annotations

import json

import pytest
from huggingface_hub import constants
from tokenizers.processors import TemplateProcessing

from kvp.data.instructions import Instructions, prompt
from kvp.data.tokens import IGNORE

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Add the numbers.", "input": "2 and {3}", "output": "They are 5.\nTwo plus three."},
    {"instruction": "Repeat. " * 200, "input": "", "output": "Repeat."},
]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "alpaca.json"
    file.write_text(json.dumps(ROWS))
    return str(file)


def test_the_prompt_has_an_input_section_only_if_there_is_an_input():
    plain, with_input = prompt(ROWS[0]), prompt(ROWS[1])
    assert plain.startswith("Below is an instruction that describes a task. Write a response")
    assert plain.endswith("### Instruction:\nName a colour.\n\n### Response:\n") and "### Input" not in plain
    assert "a task, paired with an input that provides further context. Write a response" in with_input
    assert with_input.endswith("numbers.\n\n### Input:\n2 and {3}\n\n### Response:\n")


def test_only_the_response_is_learnt(path, tokenizer):
    examples = Instructions(path=path).examples(tokenizer, {})
    for example, row in zip(examples, ROWS, strict=False):
        labels = [label for label in example["labels"] if label != IGNORE]
        assert tokenizer.decode(labels) == row["output"]
        assert tokenizer.decode(example["input_ids"]) == prompt(row) + row["output"]
        assert example["labels"][-len(labels) :] == labels == example["input_ids"][-len(labels) :]


def test_a_prompt_that_reaches_the_cutoff_is_left_out(path, tokenizer):
    assert len(Instructions(path=path, cutoff=256).examples(tokenizer, {})) == 2
    kept = Instructions(path=path, cutoff=5000).examples(tokenizer, {})
    assert len(kept) == 3
    with pytest.raises(
        ValueError, match=r"All 3 prompts reach the cutoff of 8 tokens: raise recovery.data.cutoff"
    ):
        Instructions(path=path, cutoff=8).examples(tokenizer, {})


def test_a_long_response_is_cut(path, tokenizer):
    whole = Instructions(path=path, cutoff=5000).examples(tokenizer, {})[1]
    cutoff = len(whole["input_ids"]) - 3
    cut = Instructions(path=path, cutoff=cutoff).examples(tokenizer, {})[1]
    assert cut == {name: ids[:-3] for name, ids in whole.items()}


def test_the_prompt_is_learnt_too_if_asked(path, tokenizer):
    for example in Instructions(path=path, train_on_inputs=True, cutoff=64).examples(tokenizer, {}):
        assert example["labels"] == example["input_ids"] and len(example["labels"]) <= 64


def test_eos_closes_only_a_response_that_fits(path, tokenizer):
    plain = Instructions(path=path).examples(tokenizer, {})
    closed = Instructions(path=path, add_eos=True).examples(tokenizer, {})
    for example, reference in zip(closed, plain, strict=True):
        assert example["input_ids"] == [*reference["input_ids"], tokenizer.eos_token_id]
        assert example["labels"][-1] == tokenizer.eos_token_id
    cutoff = len(plain[0]["input_ids"])
    full = Instructions(path=path, add_eos=True, cutoff=cutoff, max_examples=1).examples(tokenizer, {})
    assert full == plain[:1]


def test_the_bos_that_a_tokenizer_adds_is_kept_and_masked(path, tokenizer):
    opened = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    opened.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", opened.bos_token_id)]
    )
    example = Instructions(path=path).examples(opened, {})[0]
    assert example["input_ids"][0] == opened.bos_token_id and example["labels"][0] == IGNORE
    assert example["input_ids"].count(opened.bos_token_id) == 1


def test_max_examples_takes_the_first_rows_of_json_lines(tmp_path, tokenizer):
    path = tmp_path / "alpaca.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    assert len(Instructions(path=str(path), max_examples=1).examples(tokenizer, {})) == 1


def test_a_row_without_output_is_named(tmp_path, tokenizer):
    path = tmp_path / "alpaca.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"instruction": "x", "text": "y"}))
    data = Instructions(path=str(path))
    for read in (data.check, lambda corpora: data.examples(tokenizer, corpora)):
        with pytest.raises(
            ValueError, match=r"alpaca\.jsonl, line 2 has no column 'output'; it has .*, text"
        ):
            read({})


def test_the_identity_says_which_bytes(path):
    hub = Instructions().identity({})
    assert hub["source"] == {
        "repo": "yahma/alpaca-cleaned",
        "commit": "12567cabf869d7c92e573c7c783905fc160e9639",
        "file": "alpaca_data_cleaned.json",
    }
    local = Instructions(path=path).identity({})
    assert len(local["source"]["sha256"]) == 64 and json.loads(json.dumps(local)) == local
    assert Instructions(path=path, cutoff=128).identity({}) != local


def test_check_fails_early(path, tmp_path, monkeypatch):
    Instructions(path=path).check({})
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        Instructions(path=str(tmp_path / "nowhere.json")).check({})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="local file"):
        Instructions().check({})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"cutoff": 1}, "cutoff must be >= 2, got 1"),
        ({"max_examples": 0}, "max_examples must be >= 1 or null, got 0"),
    ],
)
def test_bad_options_name_value_and_bound(option, message):
    with pytest.raises(ValueError, match=message):
        Instructions(**option)
