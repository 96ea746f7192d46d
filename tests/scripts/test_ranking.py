"""Rises of the loss without each KV group, and how scores agree with them."""

from __future__ import annotations

import re

import pytest
import torch

from experiments.scripts.chosen import chosen
from experiments.scripts.ranking import agreement, compare, rises, spearman, table
from kvp.models.load import load_model
from kvp.models.surgery import apply
from kvp.pipeline.session import Session
from kvp.pipeline.stages import make
from kvp.types import Plan, Space

WORDS = (
    "debug=smoke",
    "tracker=none",
    "measure=none",
    "evaluation=none",
    "recovery=none",
    "calibration.length=16",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return f"store={tmp_path_factory.mktemp('store')}"


@pytest.fixture(scope="module")
def experiment(store):
    return chosen([*WORDS, "strategy=magnitude", "strategy.grouping=kv_group", store])


@torch.no_grad()
def test_rises_are_those_of_the_cut_models(experiment):
    session = Session(experiment)
    checkpoint = make(session, "dense")
    found = rises(session, samples=2)
    model = load_model(checkpoint.path, dtype=torch.float32, device="cpu")
    ids = session.calibration[:2]
    base = model(ids, labels=ids).loss
    assert len(found) == 10
    for space, rise in list(found.items())[::3]:
        for group in range(2):
            cut = apply(model, Plan({space: torch.tensor([1 - group])}))
            assert rise[group].item() == pytest.approx((cut(ids, labels=ids).loss - base).item(), abs=2e-6)


def test_scores_that_are_the_rises_agree_with_them():
    rise = {
        Space("kv_group", n, (3,)): torch.rand(3, generator=torch.Generator().manual_seed(n))
        for n in range(4)
    }
    others = {Space("ffn", 0, (2,)): torch.zeros(2)}
    same = agreement({**others, **rise}, rise)
    assert same == pytest.approx({"groups": 12, "spearman": 1, "within_layers": 1, "least_right": 1})
    mirrored = agreement({space: -values for space, values in list(rise.items())[1:]}, rise)
    assert mirrored["groups"] == 9 and mirrored["spearman"] == mirrored["within_layers"] == pytest.approx(-1)
    assert mirrored["least_right"] == 0


def test_ranks_correlate():
    values = torch.tensor([0.1, 5.0, 3.0, 4.0])
    assert spearman(values, values.exp()) == pytest.approx(1)
    assert spearman(values, -values) == pytest.approx(-1)
    assert spearman(values, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)


def test_the_table_has_a_row_per_method(store):
    result = compare(["flap", "random strategy.grouping=kv_group"], 1, [*WORDS, store])
    text = re.sub(" +", " ", table(result))
    assert "| flap | 20 |" in text and "| random strategy.grouping=kv_group | 20 |" in text
    assert result["removed"] == 4 and len(result["rises"]) == 10
    for row in result["methods"].values():
        assert row["rise_global"] >= result["least_rise"] - 1e-9
