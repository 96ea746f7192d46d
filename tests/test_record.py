"""The type of run.json: what it accepts, what it refuses, and that what is written and committed is of this type."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from kvp.pipeline.experiment import Experiment
from kvp.pipeline.runfile import recorded
from kvp.pipeline.session import Session
from kvp.record import RunRecord
from kvp.upgrade import upgraded
from tests.helpers.runs import LIGHT, compose_here

ROOT = Path(__file__).parents[1]
STUDIES = sorted(
    path for path in (ROOT / "experiments").glob("*/results.jsonl") if path.parent.name != "speed"
)


@pytest.fixture(scope="module")
def line():
    """A committed record of a recovered run, in its present form."""
    lines = (ROOT / "experiments/distillation/results.jsonl").read_bytes().splitlines()
    return json.loads(json.dumps(upgraded(json.loads(lines[0]))))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
def test_every_committed_record_is_one_and_loses_nothing(path):
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        data = RunRecord.read(text, f"{path}:{number}").data()
        assert data == json.loads(json.dumps(upgraded(json.loads(text))))


def test_all_records_were_walked():
    assert sum(len(path.read_bytes().splitlines()) for path in STUDIES) >= 351


@pytest.fixture
def x(tmp_path):
    return Experiment.compose(compose_here(tmp_path, "strategy=magnitude", *LIGHT), overrides=["seed=1"])


def test_a_running_run_writes_one(x):
    with recorded(Session(x), 0.0):
        record = RunRecord.read(x.directory / "run.json")
    assert (record.status, record.models(), record.ratio.asked.of) == ("running", {}, x.budget.of)


def test_a_failed_run_writes_one(x):
    def fail():
        session = Session(x)
        with recorded(session, 0.0):
            session.watch("prune")
            raise MemoryError("too big")

    with pytest.raises(MemoryError):
        fail()
    record = RunRecord.read(x.directory / "run.json")
    assert (record.status, record.error.type, record.stage) == ("failed", "MemoryError", "prune")
    assert record.overrides == ("seed=1",)


def test_a_record_written_and_read_again_is_the_same(tmp_path, line):
    record = RunRecord.read(line)
    record.write(tmp_path / "deeper" / "run.json")
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["run.json"]
    assert RunRecord.read(tmp_path / "deeper" / "run.json") == record
    assert json.loads((tmp_path / "deeper" / "run.json").read_text()) == line
    assert RunRecord.read(record) is record


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ((), "recoverd"),
        (("ratio",), "asekd"),
        (("pruned",), "sizes"),
        (("pruned", "size"), "parms"),
        (("pruned", "size", "layers", 0), "heads"),
        (("recovered", "evaluation", "perplexity", "squad", "protocol"), "widow"),
        (("recovery",), "loses"),
        (("stages", 0), "peak"),
        (("provenance",), "comit"),
    ],
)
def test_a_misspelt_key_is_refused_and_named(line, path, key):
    changed = json.loads(json.dumps(line))
    node = changed
    for part in path:
        node = node[part]
    node[key] = 1
    where = ".".join(map(str, (*path, key)))
    with pytest.raises(
        ValueError, match=rf"the record is no valid record \({where}: extra inputs .*\): delete it"
    ):
        RunRecord.read(changed)


def test_a_finished_run_has_its_models(line):
    without = {key: value for key, value in line.items() if key not in ("dense", "pruned")}
    with pytest.raises(ValueError, match="a finished run has dense, pruned"):
        RunRecord.read(without)


def test_models_are_those_present(line):
    assert [*RunRecord.read(line).models()] == ["dense", "pruned", "recovered"]
    untuned = {key: value for key, value in line.items() if key != "recovered"}
    assert [*RunRecord.read(untuned).models()] == ["dense", "pruned"]


def test_a_record_is_frozen(line):
    with pytest.raises(ValidationError, match="frozen"):
        RunRecord.read(line).pruned.size.params = 1


def test_tasks_stand_beside_their_average():
    lines = (ROOT / "experiments/frontier_tasks/results.jsonl").read_bytes().splitlines()
    for result in (RunRecord.read(text).pruned.evaluation.zero_shot for text in lines):
        assert {*result.average.tasks} == {*result.average.metrics} <= {*result.tasks}
        for task, metric in result.average.metrics.items():
            assert 0 <= result.tasks[task].metrics[metric] <= 1


def test_the_type_is_light():
    light = "import sys; sys.argv, sys.orig_argv = ['-m'], ['-m', 'kvp']"
    code = f"{light}; import kvp.record; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
