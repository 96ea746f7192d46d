"""Needles through a whole run: its record, its table, and its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvp.pipeline.experiment import Experiment
from kvp.record import RunRecord
from kvp.report.records.runs import read_runs
from kvp.report.table.build import build
from kvp.report.table.spec import load_spec
from tests.helpers.runs import compose_here, run_here

WORDS = ("evaluation=needles", "recovery=none", "measure=none", "tracker=none")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("needles")
    return tmp_path, run_here(tmp_path, *WORDS)


def test_the_record_holds_every_task_and_length(finished):
    _, record = finished
    read = RunRecord.read(record)
    for name in ("dense", "pruned"):
        found = read.models()[name].evaluation.needles
        assert [*found] == ["single_1024", "multikey_1024", "variables_1024"]
        for result in found.values():
            assert (result.n, result.chance, result.bound) == (5, 0.25, 0.8)
            assert 800 < result.tokens <= 1024
            assert result.protocol.corpus["name"] == "squad"
        assert not read.models()[name].evaluation.perplexity
    same = {name: read.models()[name].evaluation.needles for name in ("dense", "pruned")}
    for name, result in same["dense"].items():  # texts do not depend on the model
        assert result.data_hash == same["pruned"][name].data_hash


def test_random_weights_are_at_chance_in_the_table(finished):
    tmp_path, record = finished
    made = build(load_spec("needles"), read_runs([Path(tmp_path, "runs")]))
    cells = [cell.text for row in made.rows for cell in row.cells[1:]]
    accuracies = [
        result["accuracy"]
        for name in ("dense", "pruned")
        for result in record[name]["evaluation"]["needles"].values()
    ]
    assert max(accuracies) < 0.8
    assert set(cells) == {"at chance"}


def test_a_run_without_needles_keeps_its_name(tmp_path):
    """An option that a run does not use must not name it."""
    assert "needles" not in Experiment.compose(compose_here(tmp_path)).node["evaluation"]
    assert Experiment.compose(compose_here(tmp_path, *WORDS)).node["evaluation"]["needles"]["samples"] == 5
