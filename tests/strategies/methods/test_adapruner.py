"""AdaPruner: scores by loops, a search that starts at LLM-Pruner and survives a kill."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.methods import adapruner
from kvp.strategies.methods.adapruner import START, AdaPruner
from kvp.strategies.methods.llm_pruner import LLMPruner
from kvp.strategies.search.trials import masked_loss
from kvp.strategies.target import Target
from kvp.types import Budget
from tests.conftest import tiny_model
from tests.helpers.gradients import naive_scores

WIDTHS = {"allocator": Uniform(multiple_of=1), "protect_first": 0, "protect_last": 0}
STRATEGY = AdaPruner(**WIDTHS, trials=14, parts=3)
BUDGET, PROFILE = Budget(value=0.3, of="block_params"), torch.zeros(2)


def make_target(heads="gqa", num_hidden_layers=2):
    model = tiny_model("llama", heads, num_hidden_layers=num_hidden_layers, attention_bias=False)
    ids = torch.randint(3, 96, (12, 12), generator=torch.Generator().manual_seed(2))
    return Target(model, ids, batch_size=3, seed=4)


def search(target, directory, strategy=STRATEGY):
    return strategy.search(target, strategy.score(target), BUDGET, PROFILE, directory)


def trials(directory):
    return [json.loads(line) for line in (directory / "trials.jsonl").read_text().splitlines()]


def same(plan, other):
    return all(torch.equal(keep, other.keep[space]) for space, keep in plan.keep.items())


@pytest.mark.parametrize("heads", ["mha", "gqa", "mqa"])
def test_scores_match_a_naive_loop(heads):
    """Of the first and the third part, samples 0 to 2 and 6 to 8; the last three are held out."""
    target = make_target(heads, num_hidden_layers=1)
    share = target.config.num_attention_heads // target.config.num_key_value_heads

    def naive(importance, *parts):
        ids = torch.cat([target.calibration[3 * part : 3 * part + 3] for part in parts])
        part = replace(target, calibration=ids, batch_size=len(ids))
        return naive_scores(part, 0, importance, "sum", lambda g: range(g * share, (g + 1) * share))

    def mean(one, other):
        return {kind: (one[kind] + other[kind]) / 2 for kind in one}

    second = mean(naive("second_order", 0), naive("second_order", 2))
    for granularity, first in {
        "element": mean(naive("taylor_element", 0), naive("taylor_element", 2)),
        "vector": naive("taylor_vector", 0, 2),
    }.items():
        choice = {**START, "granularity": granularity, "second_order": 0.3, "part_0": True, "part_2": True}
        found = STRATEGY._scores(target.config, STRATEGY._signals(target), choice)
        scale = sum(map(torch.sum, first.values())) / sum(map(torch.sum, second.values()))
        for space, score in found.items():
            expected = 0.7 * first[space.kind] + 0.3 * scale * second[space.kind]
            torch.testing.assert_close(score.float(), expected, rtol=1e-3, atol=0)


def test_the_first_trial_is_llm_pruner_on_the_samples_not_held_out(tmp_path):
    target = make_target()
    plan = search(target, tmp_path, replace(STRATEGY, trials=1))
    parts = replace(target, calibration=target.calibration[:9])
    llm_pruner = LLMPruner(**WIDTHS)
    assert same(plan, llm_pruner.plan(target.config, llm_pruner.score(parts), BUDGET, PROFILE))
    (start,) = trials(tmp_path)
    assert start["trial"] == {**START, "part_0": True, "part_1": True, "part_2": True}
    assert start["loss"] == masked_loss(target.model, target.calibration[9:].split(3), plan)


def test_the_best_trial_is_planned(tmp_path):
    target = make_target()
    plan = search(target, tmp_path)
    tried = trials(tmp_path)
    assert 1 < len(tried) <= STRATEGY.trials
    assert len({trial["trial"]["reduction"] for trial in tried}) > 1
    best = min(trial["loss"] for trial in tried)
    assert masked_loss(target.model, target.calibration[9:].split(3), plan) == best < tried[0]["loss"]


def test_a_killed_search_goes_on_to_the_same_plan(tmp_path, monkeypatch):
    target = make_target()
    undisturbed = search(target, tmp_path)
    expected = trials(tmp_path)
    (tmp_path / "killed").mkdir()
    left = 5

    def measure(*arguments):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return masked_loss(*arguments)

    monkeypatch.setattr(adapruner, "masked_loss", measure)
    with pytest.raises(KeyboardInterrupt):
        search(target, tmp_path / "killed")
    left = len(expected) - 5  # nothing is measured twice
    assert same(search(target, tmp_path / "killed"), undisturbed)
    assert trials(tmp_path / "killed") == expected
    assert left == 0


def test_too_few_samples_and_options_out_of_range_are_refused():
    target = make_target()
    with pytest.raises(ValueError, match="of 1 calibration samples leaves none"):
        STRATEGY.score(replace(target, calibration=target.calibration[:1]))
    for changes, message in (
        ({"trials": 0}, "trials must be >= 1, got 0"),
        ({"parts": 0}, "parts must be >= 1, got 0"),
        ({"validation": 1.0}, r"validation must be in \(0, 1\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaPruner(**WIDTHS, **changes)
